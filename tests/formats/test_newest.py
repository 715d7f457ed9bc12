"""The newest models for vLLM: what is written comes back whole, and what the table says beyond other families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines.engine_newest import LOADED, make, with_draft
from tests.helpers import served_forms
from tests.helpers.command import fails, succeeds
from tests.helpers.toys import read_all
from tpshard.api import convert as api
from tpshard.errors import UnsupportedError
from tpshard.execute.publish import Settings

QUICK = Settings(fsync=False, workers=1)
FILE = "model-rank-1-part-0.safetensors"


@pytest.mark.parametrize("name", LOADED)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "source")
    out = tmp_path / "out"
    succeeds("split", source, "--tp", 2, "--format", "vllm", "-o", out, "--no-fsync")
    succeeds("check", out, "--source", source)
    succeeds("merge", out, "-o", tmp_path / "merged", "--no-fsync")
    assert read_all(tmp_path / "merged") == read_all(source)


def split(name: str, tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A source's tensors, and what the second of two ranks has."""
    source = make(name, tmp_path / "source")
    api.split(source, 2, tmp_path / "out", format="vllm", settings=QUICK)
    return load_file(source / "model.safetensors"), load_file(tmp_path / "out" / FILE)


def test_what_predicts_further_tokens_is_named_as_left_out(tmp_path: Path) -> None:
    """Of Hy4 it has names of its own behind the layers."""
    source = make("hy_v4", tmp_path / "source")
    file = source / "model.safetensors"
    tensors = load_file(file)
    layer = "model.layers.1."
    more = {n.replace(layer, "model.mtp_layers.0."): x.clone() for n, x in tensors.items() if n.startswith(layer)}
    more |= {"model.mtp_layers.0.enorm.weight": tensors["model.norm.weight"].clone()}
    save_file(tensors | more, file, metadata={"format": "pt"})
    out = tmp_path / "out"
    found = succeeds("split", source, "--tp", 2, "--format", "vllm", "-o", out, "--no-fsync")
    assert f"{len(more)} tensors predict further tokens" in found.err
    assert not [name for name in load_file(out / FILE) if "mtp" in name]
    succeeds("check", out, "--source", source)


def test_what_the_class_has_as_ones_is_written_as_ones(tmp_path: Path) -> None:
    """Of Nemotron VL's tower, which is cut by as many heads as a tower of that name has; another name is refused."""
    whole, held = split("NemotronH_Nano_VL_V2", tmp_path)
    for layer in range(2):
        block, stored = f"vision_model.model.encoder.layers.{layer}.", f"vision_model.radio_model.model.blocks.{layer}."
        for each in ("ls1", "ls2"):
            assert torch.equal(held[block + each], torch.ones(192, dtype=torch.bfloat16))
        thirds = [part.chunk(2)[1] for part in whole[f"{stored}attn.qkv.weight"].chunk(3)]
        assert torch.equal(held[f"{block}attn.qkv.weight"], torch.cat(thirds))
    assert torch.equal(held["vision_model.summary_idxs"], torch.tensor([0]))
    assert not [name for name in held if "input_conditioner" in name]
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["vision_config"]["args"]["model"] = "vit_giant"
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="how many vision heads a tower 'vit_giant' has is not known"):
        api.split(tmp_path / "source", 2, tmp_path / "other", format="vllm", settings=QUICK)


def test_of_a_tower_the_feed_forwards_alone_are_cut(tmp_path: Path) -> None:
    """Of DeepSeek-VL2's, that of its pooling too."""
    whole, held = split("deepseek_vl_v2", tmp_path)
    cut = {
        name for name in held if name.startswith(("vision.", "projector.")) and held[name].shape != whole[name].shape
    }
    modules = [*(f"blocks.{layer}.mlp" for layer in range(2)), "attn_pool.mlp"]
    assert cut == {f"vision.{each}.{leaf}" for each in modules for leaf in ("fc1.weight", "fc1.bias", "fc2.weight")}
    name = "vision.attn_pool.mlp.fc2.weight"
    assert torch.equal(held[name], whole[name].chunk(2, 1)[1])


def test_experts_narrower_than_the_class_makes_them_are_followed_by_zeros(tmp_path: Path) -> None:
    whole, held = split("kimi_linear", tmp_path)
    experts = "model.layers.1.block_sparse_moe.experts."
    stacked = held[f"{experts}routed_experts.w13_weight"]
    assert stacked.shape == (8, 512, 256)
    assert torch.equal(stacked[3, :32], whole[f"{experts}3.w1.weight"][32:])
    assert torch.equal(stacked[3, 256:288], whole[f"{experts}3.w3.weight"][32:])
    assert not stacked[:, 32:256].any() and not stacked[:, 288:].any()
    linear = held["model.layers.0.self_attn.in_proj_qkvgfab.weight"]
    assert torch.equal(linear[-32:], whole["model.layers.0.self_attn.f_a_proj.weight"])


def test_the_gate_in_one_step_is_before_what_all_ranks_have_and_zeros_round_the_rows_up(tmp_path: Path) -> None:
    whole, held = split("kimi_k3", tmp_path)
    layers = "language_model.model.layers."
    linear = held[f"{layers}0.self_attn.in_proj_qkvgfab.weight"]
    parts = [whole[f"{layers}0.self_attn.{each}_proj.weight"] for each in ("g", "f_a", "b")]
    assert linear.shape == (560, 256)
    assert torch.equal(linear[384:548], torch.cat([parts[0][128:], parts[1], parts[2][4:]]))
    assert not linear[548:].any()
    latent = held[f"{layers}1.self_attn.fused_qkv_a_g_proj.weight"]
    parts = [whole[f"{layers}1.self_attn.{each}.weight"] for each in ("q_a_proj", "kv_a_proj_with_mqa", "g_proj")]
    assert torch.equal(latent, torch.cat([*parts[:2], parts[2][128:]]))
    assert f"{layers}1.block_sparse_moe.experts.routed_output_transform.up_proj.weight" in held


def test_a_tower_whose_heads_do_not_divide_is_whole(tmp_path: Path) -> None:
    source = make("kimi_k3-6-heads", tmp_path / "source")
    rows = {}
    for tp in (2, 4):
        api.split(source, tp, tmp_path / f"{tp}", format="vllm", settings=QUICK)
        held = load_file(tmp_path / f"{tp}" / FILE)
        names = (f"vision_tower.encoder.blocks.1.{each}.weight" for each in ("wqkv", "mlp.fc0"))
        rows[tp] = [len(held[each]) for each in names]
    assert rows == {2: [144, 64], 4: [288, 128]}


def test_how_vllm_must_be_started_is_said_where_its_kernels_need_it(tmp_path: Path) -> None:
    given = ("--tp", 2, "--format", "vllm", "--json")
    (note,) = succeeds("plan", make("kimi_k3", tmp_path / "k3"), *given).json["warnings"]
    assert note.startswith('start vLLM with --additional-config \'{"kda_decode_backend": "triton", ')
    assert not succeeds("plan", make("kimi_linear", tmp_path / "linear"), *given).json["warnings"]


def test_inkling_as_vllm_has_it(tmp_path: Path) -> None:
    """Rows by turns lie apart in experts alone; a stack of shared ones is one matrix, each beside the one before."""
    whole, held = split("inkling_mm_model", tmp_path)
    ours, layer = "model.llm.layers.", "model.layers.1."
    rows = whole[f"{ours}1.mlp.experts.w13_weight"][:, 64:]
    expected = torch.cat([rows[:, 0::2], rows[:, 1::2]], 1)
    assert torch.equal(held[f"{layer}mlp.experts.routed_experts.w13_weight"], expected)
    assert torch.equal(held["model.layers.0.mlp.gate_up_proj.weight"], whole[f"{ours}0.mlp.w13_dn.weight"][512:])
    down = whole[f"{ours}1.mlp.shared_experts.shared_w2_weight"]
    assert torch.equal(held[f"{layer}mlp.sink_experts.w2_weight"], torch.cat([down[0, :, 32:], down[1, :, 32:]], 1))
    gate = held[f"{layer}mlp.gate.weight"]
    assert torch.equal(gate[:10], whole[f"{ours}1.mlp.gate.weight"]) and gate.shape == (16, 256) and not gate[10:].any()
    parts = (whole[f"{ours}1.attn.{each}.weight"].chunk(2)[1] for each in ("wq_du", "wk_dv", "wv_dv", "wr_du"))
    assert torch.equal(held[f"{layer}attn.qkvr.weight"], torch.cat([*parts]))
    assert torch.equal(held[f"{layer}mlp_sconv.weight"], whole[f"{ours}1.mlp_sconv.weight"][128:])
    assert torch.equal(held["model.embed_tokens.weight"], whole["model.llm.embed.weight"])
    assert {name: held[name].item() for name in held if "_scale" in name and "attn" in name} == {
        f"model.layers.{i}.attn.{each}_scale": 1.0 for i in (0, 1) for each in "kv"
    }


def test_inklings_draft_is_named_as_left_out_and_refused_as_a_model_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = with_draft("inkling_mm_model", tmp_path / "source")
    more = [name for name in load_file(source / "model.safetensors") if name.startswith("model.mtp.")]
    (note,) = succeeds("plan", source, "--tp", 2, "--format", "vllm", "--json").json["warnings"]
    assert note.startswith(f"{len(more)} tensors predict further tokens") and "does not load it" in note
    succeeds("split", source, "--tp", 2, "--format", "vllm", "-o", "out", "--no-fsync")
    plain = make("inkling_mm_model", tmp_path / "plain")
    succeeds("split", plain, "--tp", 2, "--format", "vllm", "-o", "same", "--no-fsync")
    held, without = load_file(Path("out", FILE)), load_file(Path("same", FILE))
    assert held.keys() == without.keys() and all(torch.equal(held[name], without[name]) for name in held)
    succeeds("check", "out", "--source", source)
    error = fails(4, "plan", source, "--tp", 2, "--format", "vllm-speculator")
    assert "as many of these layers as it is told" in error["message"]


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("local_layer_ids", {"layer_types": ["hybrid_sliding", "hybrid"]}),
        ("dense_mlp_idx", {"mlp_layer_types": ["dense", "sparse"]}),
        ("use_gate_bias", {}),
    ],
)
def test_inkling_is_refused_where_its_config_leaves_out_what_vllm_reads(
    key: str, instead: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers writes it."""
    monkeypatch.chdir(tmp_path)
    source = make("inkling_mm_model", tmp_path / "source", {"text_config": {key: None, **instead}})
    error = fails(4, "plan", source, "--tp", 2, "--format", "vllm")
    assert f"a config that does not say {key}" in error["message"]


def test_inkling_has_no_more_ranks_than_heads_of_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = make("inkling_mm_model", tmp_path / "source")
    assert "4 kv" in fails(4, "plan", source, "--tp", 8, "--format", "vllm")["message"]


def test_layers_that_choose_what_they_attend_to_have_that_in_one_matrix_and_scales_elsewhere(tmp_path: Path) -> None:
    whole, held = split("minimax_m3_vl", tmp_path)
    layers = "language_model.model.layers."
    attention = next(name for name in whole if name.endswith("layers.1.self_attn.index_k_proj.weight"))
    assert torch.equal(held[f"{layers}1.self_attn.qkv_proj.weight"][-32:], whole[attention])
    assert held[f"{layers}0.self_attn.qkv_proj.weight"].shape[0] < held[f"{layers}1.self_attn.qkv_proj.weight"].shape[0]
    assert {f"{layers}0.self_attn.attn._k_scale", f"{layers}1.self_attn._k_scale"} <= held.keys()
    assert f"{layers}1.self_attn.attn._k_scale" not in held


def test_outputs_of_latent_attention_have_another_place_than_those_of_linear(tmp_path: Path) -> None:
    whole, held = split("glm5_next", tmp_path)
    layers = "language_model.model._active_layers."
    assert {f"{layers}0.self_attn.o_proj.weight", f"{layers}1.self_attn.mla_attn.o_proj.weight"} <= held.keys()
    log = whole["model.language_model.layers.0.self_attn.A_log"]
    assert torch.equal(held[f"{layers}0.self_attn.A_log"], log[4:].float().view(1, 1, 4, 1))


def test_gates_are_whole_and_layers_of_a_window_have_their_outputs_elsewhere(tmp_path: Path) -> None:
    whole, held = split("dots3_note", tmp_path)
    layers = "language_model.model.layers."
    assert {f"{layers}1.self_attn.mla_attn.o_proj.weight", f"{layers}2.self_attn.o_proj.weight"} <= held.keys()
    gates = whole["model.layers.2.self_attn.g_proj.weight"]
    assert torch.equal(held[f"{layers}2.self_attn.g_proj.weight"], gates)
    assert {f"{layers}1.self_attn.mla_attn.mla_attn._k_scale", f"{layers}2.self_attn.mla_attn._k_scale"} <= held.keys()
    assert f"{layers}2.self_attn.mla_attn.mla_attn._k_scale" not in held
    expert = "blocks.1.mlp.experts.1.fc2.weight"
    assert torch.equal(held[f"visual.{expert}"], whole[f"vision_encoder.{expert}"])


def test_a_layer_that_predicts_one_more_token_is_cut_as_one_that_attends_to_a_window(tmp_path: Path) -> None:
    """`native` keeps it; it is dense, whatever the layers before it are."""
    source, out = with_draft("dots3_note", tmp_path / "source"), tmp_path / "out"
    config = json.loads((source / "config.json").read_text())
    del config["num_nextn_predict_layers"]  # published configs do not count it
    (source / "config.json").write_text(json.dumps(config))
    succeeds("split", source, "--tp", 2, "-o", out, "--no-fsync")
    succeeds("check", out, "--source", source)
    succeeds("merge", out, "-o", tmp_path / "merged", "--no-fsync")
    assert read_all(tmp_path / "merged") == read_all(source)
    whole, held = load_file(source / "model.safetensors"), load_file(out / "rank-00001-of-00002.safetensors")
    for name in ("self_attn.q_b_proj", "self_attn.g_proj", "mlp.up_proj"):
        full = f"model.layers.3.{name}.weight"
        assert torch.equal(held[full], whole[full].chunk(2)[1])
    assert torch.equal(held["model.layers.3.eh_proj.weight"], whole["model.layers.3.eh_proj.weight"])
    plan = succeeds("plan", source, "--tp", 2, "--format", "vllm")
    assert "model.layers.3" in plan.out + plan.err and "model.mtp" in plan.out + plan.err


def test_a_config_with_the_text_models_values_below_is_refused(tmp_path: Path) -> None:
    """vLLM reads the published one, in which they are at the top."""
    source = served_forms.make("dots3_note", tmp_path / "source", published=True)
    with pytest.raises(UnsupportedError, match="reads the published config"):
        api.split(source, 2, tmp_path / "out", format="vllm", settings=QUICK)


def test_numbered_parts_are_one_table_of_which_ranks_have_rows(tmp_path: Path) -> None:
    """A part of 35 rows ends within a rank's, and the buffers of the hash are as they are."""
    whole, held = split("qwen4_exp-other-sizes", tmp_path)
    place = "model.layers.1.ple.ple_embedding."
    parts = [whole[f"{place}ngram_embedding.shard_{number}.weight"] for number in range(7)]
    table = torch.cat(parts)
    assert len(parts[0]) != len(parts[-1]) and len(table) // 2 % len(parts[0])
    assert torch.equal(held[f"{place}ngram_embedding.weight"], table[len(table) // 2 :])
    for buffer in ("layer_multipliers", "ngram_heads_offsets", "ngram_heads_vocab_sizes"):
        assert torch.equal(held[place + buffer], whole[place + buffer])


def test_what_is_fused_has_zeros_behind_up_to_a_multiple(tmp_path: Path) -> None:
    whole, held = split("qwen4_exp", tmp_path)
    place, mixed = "model.layers.0.attn_hyper_connection.", "input_mix_weight_down_block_inject.weight"
    mix, inject = (whole[f"{place}{name}.weight"] for name in ("input_mix_weight_down", "block_inject_weight"))
    assert held[place + mixed].shape == (16, mix.shape[1]) and len(mix) + len(inject) == 10
    assert torch.equal(held[place + mixed][:10], torch.cat((mix, inject))) and not held[place + mixed][10:].any()
    indexed = whole["model.layers.1.self_attn.indexer.index_qk_proj.weight"]
    assert torch.equal(held["model.layers.1.self_attn.qkv_proj.weight"][-len(indexed) :], indexed)


TABLE = "model.layers.0.ple.ple_embedding."


@pytest.mark.parametrize(
    ("lacking", "code", "message"),
    [
        (f"{TABLE}ngram_heads_offsets", 3, "a buffer that the engine keeps"),
        (f"{TABLE}ngram_embedding.shard_1.weight", 3, "of how many parts model.layers.0.ple.ple_embedding.ngram_embed"),
        (f"{TABLE}ngram_embedding.shard_3.weight", 3, "of how many parts model.layers.0.ple.ple_embedding.ngram_embed"),
        (None, 4, "do not divide"),
    ],
)
def test_a_table_that_is_not_there_in_full(
    lacking: str | None, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = make("qwen4_exp", Path("source")) / "model.safetensors"
    tensors, last = load_file(file), f"{TABLE}ngram_embedding.shard_3.weight"
    if lacking:
        del tensors[lacking]
    else:
        tensors[last] = tensors[last][1:].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    succeeds("plan", "source", "--tp", 2)
    error = fails(code, "plan", "source", "--tp", 2, "--format", "vllm")
    assert message in error["message"], error


@pytest.mark.parametrize("name", ["deepseek_v4", "hy_v4"])
def test_names_that_transformers_saves_and_vllm_does_not_load_are_refused(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "source", published=False)
    api.split(source, 2, tmp_path / "native", settings=QUICK)
    with pytest.raises(UnsupportedError, match="published names"):
        api.split(source, 2, tmp_path / "out", format="vllm", settings=QUICK)
