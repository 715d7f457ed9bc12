"""Engines' `sharded_state`: what each rank has, against slices made by hand; refusals; and the way back.

What the engines themselves hold is compared by `make test-engines`; here torch cuts LLaMA, GPT-2 and Mixtral anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tpshard
from tests.conftest import Get
from tests.engines import check_vllm_quantised, engine_models, fp8_blocks
from tests.engines.engine_models import DRAFTS, NO_CLASS, with_draft
from tests.engines.engine_models import make as make_for_engines
from tests.helpers import multimodal_checkpoints as multimodal
from tests.helpers import served_checkpoints as served
from tests.helpers.checkpoints import make
from tests.helpers.paths import DOCS
from tests.quantised.fixture_table import FIXTURES
from tpshard.errors import CorruptError, TpshardError, UnsupportedError, UsageError
from tpshard.execute.publish import Settings
from tpshard.formats.engine_tables import EngineFamily, load_table

Tensors = dict[str, torch.Tensor]
TABLES = Path(tpshard.__file__).parent / "formats" / "tables"
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight")
PAGE = DOCS / "reference" / "formats.md"
SCALES = ("_k_scale", "_prob_scale", "_q_scale", "_v_scale")


def load(directory: Path) -> Tensors:
    """All tensors of a checkpoint."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def ranks(directory: Path, tp: int) -> list[Tensors]:
    """All tensors of each rank; one file each."""
    return [load_file(directory / f"model-rank-{rank}-part-0.safetensors") for rank in range(tp)]


def assert_same(ours: Tensors, expected: Tensors) -> None:
    assert sorted(ours) == sorted(expected)
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def vocab(weight: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """Padded with zero rows to a multiple of 64, then cut evenly."""
    rows = -(-len(weight) // 64) * 64
    padded = torch.cat([weight, weight.new_zeros(rows - len(weight), *weight.shape[1:])])
    return padded.chunk(tp)[rank]


def heads(weight: torch.Tensor, count: int, rank: int, tp: int) -> torch.Tensor:
    """A rank's heads of `count`; where there are fewer than ranks, the one that it shares with its neighbours."""
    if count >= tp:
        return weight.chunk(tp)[rank]
    return weight.chunk(count)[rank // (tp // count)]


def scales(path: str, layers: int) -> Tensors:
    return {f"{path.format(layer)}.{scale}": torch.tensor(1.0) for layer in range(layers) for scale in SCALES}


def llama(source: Tensors, config: dict[str, Any], rank: int, tp: int) -> Tensors:
    """A rank of LLaMA, Mistral or Qwen without biases."""
    kept = {name: tensor for name, tensor in source.items() if name.endswith("norm.weight")}
    kept |= {
        name: vocab(tensor, rank, tp) for name, tensor in source.items() if "embed_tokens" in name or "lm_head" in name
    }
    if config["tie_word_embeddings"]:
        kept["lm_head.weight"] = kept.pop("model.embed_tokens.weight")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        q, k, v, o = (source[f"{prefix}.self_attn.{each}_proj.weight"] for each in "qkvo")
        kv = config["num_key_value_heads"]
        own = [q.chunk(tp)[rank], heads(k, kv, rank, tp), heads(v, kv, rank, tp)]
        kept[f"{prefix}.self_attn.qkv_proj.weight"] = torch.cat(own)
        kept[f"{prefix}.self_attn.o_proj.weight"] = o.chunk(tp, dim=1)[rank]
        if f"{prefix}.mlp.gate_proj.weight" in source:
            gate, up, down = (source[f"{prefix}.mlp.{each}_proj.weight"] for each in ("gate", "up", "down"))
            kept[f"{prefix}.mlp.gate_up_proj.weight"] = torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
            kept[f"{prefix}.mlp.down_proj.weight"] = down.chunk(tp, dim=1)[rank]
    return kept


def mixtral(source: Tensors, config: dict[str, Any], rank: int, tp: int) -> Tensors:
    kept = llama(source, config, rank, tp)
    for layer in range(config["num_hidden_layers"]):
        moe = f"model.layers.{layer}.block_sparse_moe"
        kept[f"{moe}.gate.weight"] = source[f"{moe}.gate.weight"]
        experts = [
            [source[f"{moe}.experts.{expert}.{each}.weight"] for each in ("w1", "w2", "w3")]
            for expert in range(config["num_local_experts"])
        ]
        both = [torch.cat([w1.chunk(tp)[rank], w3.chunk(tp)[rank]]) for w1, _, w3 in experts]
        kept[f"{moe}.experts.routed_experts.w13_weight"] = torch.stack(both)
        down = [w2.chunk(tp, dim=1)[rank] for _, w2, _ in experts]
        kept[f"{moe}.experts.routed_experts.w2_weight"] = torch.stack(down)
    return kept


def gpt2(source: Tensors, config: dict[str, Any], rank: int, tp: int) -> Tensors:
    """Conv1D weights turned to [out, in]; row biases whole; the tied embedding under the head's name."""
    kept = {name: tensor for name, tensor in source.items() if ".ln_" in name or "wpe" in name}
    kept["lm_head.weight"] = vocab(source["transformer.wte.weight"], rank, tp)
    for layer in range(config["n_layer"]):
        prefix = f"transformer.h.{layer}"
        for leaf in ("weight", "bias"):
            q, k, v = source[f"{prefix}.attn.c_attn.{leaf}"].t().chunk(3)
            kept[f"{prefix}.attn.c_attn.{leaf}"] = torch.cat([each.chunk(tp)[rank] for each in (q, k, v)])
            kept[f"{prefix}.mlp.c_fc.{leaf}"] = source[f"{prefix}.mlp.c_fc.{leaf}"].t().chunk(tp)[rank]
        for module in ("attn.c_proj", "mlp.c_proj"):
            kept[f"{prefix}.{module}.weight"] = source[f"{prefix}.{module}.weight"].t().chunk(tp, dim=1)[rank]
            kept[f"{prefix}.{module}.bias"] = source[f"{prefix}.{module}.bias"]
    return kept


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(
    ("name", "expected", "scaled"),
    [
        ("llama-gqa", llama, "model.layers.{}.self_attn.attn"),
        ("gpt2", gpt2, "transformer.h.{}.attn.attn"),
        ("mixtral", mixtral, "model.layers.{}.self_attn.attn"),
    ],
)
def test_each_rank_is_what_slices_made_by_hand_give(
    name: str, expected: Callable[..., Tensors], scaled: str, tp: int, tmp_path: Path, quick: Settings
) -> None:
    # 280 rows become 320: no smaller multiple than the engine's own fits.
    new = tmp_path / "source"
    source = make_for_engines(name, new) if name == "mixtral" else make(name, new, vocab_size=280)
    config = json.loads((source / "config.json").read_text())
    out = tmp_path / "out"
    tpshard.split(source, tp, out, format="vllm", settings=quick)
    tensors = load(source)
    layers = config.get("num_hidden_layers") or config["n_layer"]
    for rank, held in enumerate(ranks(out, tp)):
        assert_same(held, expected(tensors, config, rank, tp) | scales(scaled, layers))
    assert not tpshard.check(out, source).differences
    tpshard.merge(out, tmp_path / "merged", settings=quick)
    assert_same(load(tmp_path / "merged"), tensors)


def test_sglang_is_vllm_without_scales(made: Get, tmp_path: Path, quick: Settings) -> None:
    tpshard.split(made("llama-gqa"), 2, tmp_path / "vllm", format="vllm", settings=quick)
    tpshard.split(made("llama-gqa"), 2, tmp_path / "sglang", format="sglang", settings=quick)
    for ours, theirs in zip(ranks(tmp_path / "sglang", 2), ranks(tmp_path / "vllm", 2), strict=True):
        assert_same(ours, {name: tensor for name, tensor in theirs.items() if not name.endswith(SCALES)})
        assert len(theirs) > len(ours)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "falcon-new", "bloom", "gpt_neox", "opt-350m-like", "jamba"])
def test_resharded_from_any_format_equals_split(name: str, made: Get, tmp_path: Path, quick: Settings) -> None:
    """native → vllm, vllm at another width → vllm, and vllm → native are each what a split gives."""

    def files(directory: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}

    source = made(name)
    for form in ("native", "vllm"):
        for tp in (2, 4):
            tpshard.split(source, tp, tmp_path / f"{form}{tp}", format=form, settings=quick)
    for whence, tp, form in (("native2", 4, "vllm"), ("vllm4", 2, "vllm"), ("vllm2", 4, "native")):
        out = tmp_path / f"{whence}-{form}{tp}"
        tpshard.reshard(tmp_path / whence, tp, out, format=form, settings=quick)
        assert files(out) == files(tmp_path / f"{form}{tp}")


def test_several_parts_hold_the_same(made: Get, tmp_path: Path, quick: Settings) -> None:
    tpshard.split(made("llama-gqa"), 2, tmp_path / "one", format="vllm", settings=quick)
    tpshard.split(made("llama-gqa"), 2, tmp_path / "many", format="vllm", max_file_size=60_000, settings=quick)
    for rank, whole in enumerate(ranks(tmp_path / "one", 2)):
        parts = sorted((tmp_path / "many").glob(f"model-rank-{rank}-part-*.safetensors"))
        assert len(parts) > 1
        assert_same({name: tensor for part in parts for name, tensor in load_file(part).items()}, whole)
    assert not tpshard.check(tmp_path / "many", made("llama-gqa")).differences


@pytest.mark.parametrize(
    ("name", "kept"),
    [("llama-tied", "lm_head"), ("gpt2", "lm_head"), ("gemma2", "model.embed_tokens"), ("bloom", "lm_head")],
)
def test_a_tied_pair_has_one_name_and_the_config_says_so(
    name: str, kept: str, made: Get, tmp_path: Path, quick: Settings
) -> None:
    source = shutil.copytree(made(name), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    if name != "llama-tied":  # whose default is not tied
        del config["tie_word_embeddings"]
        (source / "config.json").write_text(json.dumps(config))
    tpshard.split(source, 2, tmp_path / "out", format="vllm", settings=quick)
    stored = ranks(tmp_path / "out", 2)[0]
    embedding = next(tensor for each, tensor in load(source).items() if each.endswith(EMBEDDINGS))
    expected = vocab(embedding, 0, 2)
    found = [each for each, t in stored.items() if t.shape == expected.shape and torch.equal(t, expected)]
    assert found == [f"{kept}.weight"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_tied_head_that_is_stored_stays_and_the_config_says_untied(
    made: Get, tmp_path: Path, quick: Settings
) -> None:
    """Nobody has compared the two when the plan is made, so neither is left out."""
    source = made("llama-tied", tied_head_stored=True)
    tpshard.split(source, 2, tmp_path / "out", format="vllm", settings=quick)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(ranks(tmp_path / "out", 2)[0])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    tpshard.merge(tmp_path / "out", tmp_path / "merged", settings=quick)
    assert_same(load(tmp_path / "merged"), load(source))


def test_names_without_a_prefix_and_buffers(made: Get, tmp_path: Path, quick: Settings) -> None:
    tpshard.split(made("gpt2"), 2, tmp_path / "saved", format="vllm", settings=quick)
    published = made("gpt2", strip_prefix=True, buffers=True)
    tpshard.split(published, 2, tmp_path / "published", format="vllm", settings=quick)
    for ours, theirs in zip(ranks(tmp_path / "published", 2), ranks(tmp_path / "saved", 2), strict=True):
        assert_same(ours, theirs)
    plan = tpshard.plan(published, 2, format="vllm").to_json()
    dropped = {row["name"] for row in plan["tensors"] if row["rule"] == "drop"}
    assert dropped == {name for name in load(published) if name.endswith((".attn.bias", ".masked_bias"))} != set()


def test_a_dtype_that_the_engine_holds_otherwise_is_cast_and_comes_back(tmp_path: Path, quick: Settings) -> None:
    source = make_for_engines("glm4_moe", tmp_path / "source")
    tpshard.split(source, 2, tmp_path / "out", format="vllm", settings=quick)
    tensors = load(source)
    gate = "model.layers.1.mlp.gate.weight"
    assert tensors[gate].dtype == torch.bfloat16
    held = ranks(tmp_path / "out", 2)[1]
    assert held[gate].dtype == torch.float32
    assert torch.equal(held[gate], tensors[gate].float())
    assert not tpshard.check(tmp_path / "out", source).differences
    tpshard.merge(tmp_path / "out", tmp_path / "merged", settings=quick)
    assert_same(load(tmp_path / "merged"), tensors)


def test_a_bias_that_is_added_once_lies_on_rank_0_alone(tmp_path: Path, quick: Settings) -> None:
    source = make_for_engines("gpt_oss", tmp_path / "source")
    tpshard.split(source, 2, tmp_path / "out", format="vllm", settings=quick)
    name = "model.layers.0.mlp.experts.routed_experts.w2_bias"
    first, second = (rank[name] for rank in ranks(tmp_path / "out", 2))
    assert torch.equal(first, load(source)["model.layers.0.mlp.experts.down_proj_bias"])
    assert second.shape == first.shape
    assert not second.any()


def test_a_first_dim_of_1_that_the_engine_does_not_have(tmp_path: Path, quick: Settings) -> None:
    source = make("ernie4_5_moe", tmp_path / "source", use_bias=False)
    tpshard.split(source, 2, tmp_path / "out", format="vllm", settings=quick)
    bias = load(source)["model.layers.1.mlp.moe_statics.e_score_correction_bias"]
    held = ranks(tmp_path / "out", 2)[1]["model.layers.1.mlp.experts.routed_experts.e_score_correction_bias"]
    assert bias.shape == (1, *held.shape)
    assert torch.equal(held, bias[0])


@pytest.mark.parametrize("name", ["step3p5", "step3p5-experts-apart"])
def test_stacks_of_experts_are_fused_along_their_second_dim(name: str, tmp_path: Path, quick: Settings) -> None:
    source = make_for_engines(name, tmp_path / "source")
    tpshard.split(source, 2, tmp_path / "out", format="vllm", settings=quick)
    tensors, moe = load(source), "model.layers.1.moe"
    for rank, held in enumerate(ranks(tmp_path / "out", 2)):
        stacks = {}
        for part in ("gate", "up", "down"):
            apart = [tensors.get(f"{moe}.experts.{expert}.{part}_proj.weight") for expert in range(8)]
            found = tensors.get(f"{moe}.{part}_proj.weight")
            stacks[part] = (torch.stack(apart) if found is None else found).chunk(2, -1 if part == "down" else 1)[rank]
        experts = f"{moe}.experts.routed_experts"
        assert torch.equal(held[f"{experts}.w13_weight"], torch.cat([stacks["gate"], stacks["up"]], 1))
        assert torch.equal(held[f"{experts}.w2_weight"], stacks["down"])


def test_layers_that_do_not_attend_have_no_scales(made: Get, tmp_path: Path, quick: Settings) -> None:
    tpshard.split(made("qwen3_next"), 2, tmp_path / "out", format="vllm", settings=quick)
    scaled = {name for name in ranks(tmp_path / "out", 2)[0] if name.endswith(SCALES)}
    assert scaled == set(scales("model.layers.1.self_attn.attn", 1))


@pytest.mark.parametrize("name", [*DRAFTS, *NO_CLASS])
def test_what_predicts_further_tokens_is_left_out_and_named(name: str, tmp_path: Path, quick: Settings) -> None:
    source, plain = with_draft(name, tmp_path / "source"), make_for_engines(name, tmp_path / "plain")
    for model, out in ((source, "out"), (plain, "plain-out")):
        tpshard.split(model, 2, tmp_path / out, format="vllm", settings=quick)
    for ours, expected in zip(ranks(tmp_path / "out", 2), ranks(tmp_path / "plain-out", 2), strict=True):
        assert_same(ours, expected)
    plan = tpshard.plan(source, 2, format="vllm").to_json()
    dropped = {row["name"] for row in plan["tensors"] if row["rule"] == "drop"}
    assert dropped == load(source).keys() - load(plain).keys() != set()


def test_what_the_class_holds_unquantised_is_refused_where_it_is_not(tmp_path: Path) -> None:
    source = make_for_engines("deepseek_v32", tmp_path / "source")
    tensors, config = load(source), json.loads((source / "config.json").read_text())
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn.indexer.weights_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 2)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(UnsupportedError, match="indexer.weights_proj.weight: it is quantised, and the engine's class"):
        tpshard.split(source, 2, tmp_path / "out", format="vllm")


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("gpt_neo", {}, UnsupportedError, "does not load gpt_neo"),
        ("gpt_bigcode-mha", {}, UnsupportedError, "multi_query false"),
        ("llama", {"uneven": True}, UsageError, "even shares"),
        ("llama", {"shares": [1, 3]}, UsageError, "even shares"),
        ("llama", {"pad_vocab_to": 512}, UsageError, "even shares"),
        ("llama", {"engine_version": "0.1"}, UnsupportedError, "names of vLLM 0.1"),
        ("llama", {"tp": 3}, UnsupportedError, "8 heads on 3 ranks"),
        ("gptj-tied-inner", {}, UnsupportedError, "does not tie"),
        ("gemma4_text-shared", {}, UnsupportedError, "with num_kv_shared_layers 2: its class counts"),
    ],
)
def test_refused(
    name: str, options: dict[str, Any], error: type[TpshardError], message: str, made: Get, tmp_path: Path
) -> None:
    options = {"tp": 2, "out": tmp_path / "out", "format": "vllm"} | options
    with pytest.raises(error, match=message) as caught:
        tpshard.split(made(name), **options)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gpt_oss", "internlm2", "olmoe"])
def test_kv_heads_that_the_class_does_not_repeat(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="4 kv on 8 ranks"):
        tpshard.split(make_for_engines(name, tmp_path / "source"), 8, tmp_path / "out", format="vllm")


def test_what_the_class_would_leave_out_is_refused(made: Get, tmp_path: Path) -> None:
    biased = made("qwen3-tied-bias")
    with pytest.raises(UnsupportedError, match="o_proj.bias"):
        tpshard.split(biased, 2, tmp_path / "out", format="vllm")
    with pytest.raises(UnsupportedError, match="mlp.down_proj.bias"):
        tpshard.split(made("llama-mha-bias"), 2, tmp_path / "out", format="sglang")


def test_the_types_that_are_said_to_be_compared_quantised_are_those_that_are() -> None:
    configs = [json.loads((FIXTURES / name / "config.json").read_text()) for name in check_vllm_quantised.LOADED]
    compared = {(config.get("text_config") or config)["model_type"] for config in configs}
    compared |= {engine_models.LOADED[name][0] for name in (*fp8_blocks.BLOCKS, *fp8_blocks.PACKED_TEXTS)}
    assert load_table(TABLES / "vllm.toml").quantised_types == compared


def test_a_text_model_among_others_that_are_not_known_is_refused(tmp_path: Path) -> None:
    source = multimodal.make("idefics3", tmp_path / "source")
    with pytest.raises(UnsupportedError, match="in idefics3 with llama in it"):
        tpshard.split(source, 2, tmp_path / "out", format="vllm")


def test_a_text_model_that_has_no_class_is_refused_with_the_reason(tmp_path: Path) -> None:
    source = served.make("mistral3 with mistral4", tmp_path / "source")
    with pytest.raises(UnsupportedError, match="in mistral3 with mistral4 in it, .*: vLLM has no class for it"):
        tpshard.split(source, 2, tmp_path / "out", format="vllm")


def test_a_class_that_the_engine_has_dropped_is_refused_by_its_name(made: Get, tmp_path: Path) -> None:
    """Of a type that it loads under another class."""
    source = shutil.copytree(made("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["AquilaForCausalLM"]}))
    with pytest.raises(UnsupportedError, match="AquilaForCausalLM: .*LlamaForCausalLM computes the same") as caught:
        tpshard.split(source, 2, tmp_path / "out", format="vllm")
    assert "`architectures`" in str(caught.value.hint)
    tpshard.split(source, 2, tmp_path / "out", format="native")


def test_mimo_v2_is_refused_with_a_tower_and_without(tmp_path: Path) -> None:
    for source in (served.make("mimo_v2", tmp_path / "tower"), make_for_engines("mimo_v2", tmp_path / "text")):
        with pytest.raises(UnsupportedError, match="does not load mimo_v2 .*in another order than they are stored in"):
            tpshard.split(source, 2, tmp_path / "out", format="vllm")


def test_a_checkpoint_without_its_head_is_refused(made: Get, tmp_path: Path) -> None:
    """It is incomplete, unless its class has none."""
    source = shutil.copytree(made("llama-gqa", base_only=True), tmp_path / "source")
    tpshard.plan(source, 2, format="vllm")
    config = json.loads((source / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptError, match=r"lm_head\.weight is not there"):
        tpshard.split(source, 2, tmp_path / "out", format="vllm")


def test_a_vocabulary_that_does_not_divide_when_padded_is_refused(tmp_path: Path) -> None:
    """192 rows on 9 ranks: the padding is the engine's, so more of it is no way out."""
    source = make(
        "llama",
        tmp_path / "source",
        num_attention_heads=9,
        num_key_value_heads=9,
        hidden_size=72,
        vocab_size=190,
        intermediate_size=144,
    )
    with pytest.raises(UnsupportedError, match="192 vocab on 9 ranks"):
        tpshard.split(source, 9, tmp_path / "out", format="vllm")


def test_files_of_the_other_width_do_not_pass_the_check(made: Get, tmp_path: Path, quick: Settings) -> None:
    tpshard.split(made("llama"), 2, tmp_path / "two", format="vllm", settings=quick)
    tpshard.split(made("llama"), 4, tmp_path / "four", format="vllm", settings=quick)
    with pytest.raises(TpshardError, match="is for tp 4, not tp 2"):
        tpshard.check(tmp_path / "four", tp=2)
    shutil.copy(tmp_path / "four" / "model-rank-0-part-0.safetensors", tmp_path / "two")
    with pytest.raises(CorruptError, match="not of this set"):
        tpshard.check(tmp_path / "two")


def test_a_missing_member_of_a_fused_parameter_is_refused(made: Get, tmp_path: Path) -> None:
    source = shutil.copytree(made("qwen2-bias"), tmp_path / "source")
    tensors = load(source)
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptError, match=r"layers\.1\.self_attn\.(qkv_proj|k_proj)"):
        tpshard.split(source, 2, tmp_path / "out", format="vllm")


@pytest.mark.parametrize("table", ["vllm.toml", "sglang.toml"])
def test_tables_name_only_modules_that_some_architecture_has(table: str) -> None:
    """Every model_type has rules, and every family says where its layers and its head are."""
    from tpshard.rules.architecture import builtin

    whole = load_table(TABLES / table)
    families, of = whole.families, {kind: each for each, kinds in whole.kinds.items() for kind in kinds.values()}
    assert families
    if table == "sglang.toml":  # the page of architectures, which is made from the tables, lists vLLM's
        section = PAGE.read_text().split("## sglang\n")[1].split("\n## ")[0]
        assert [each for each in families if f"`{each}`" not in section] == []
    for model_type, family in families.items():
        named = of.get(model_type, model_type)
        assert named in builtin(named).model_types
        assert family.layer.endswith(".*")
        assert family.head or family.tied


def test_patterns() -> None:
    family = EngineFamily(
        layer="model.layers.*",
        fused={"model.layers.*.w13_": ("model.layers.*.experts.#.w1", "model.layers.*.experts.#.w3")},
        renamed={"model.layers.*.q": "h.*.r", "model": "m"},
    )
    expert = family.kind("model.layers.3.experts.12.w3.weight_scale")
    assert expert.fused == (("model.layers.*.w13_", 1, "model.layers.{0}.w13_weight_scale", 1, 0, False, False),)
    assert family.kind("model.layers.4.experts.0.w3.weight_scale") is expert
    assert family.layer_of("model.layers.3.experts.12.w3.weight_scale") == 3
    assert family.layer_of("model.norm.weight") is None
    assert family.rename("model.layers.3.q.bias") == "h.3.r.bias"
    assert family.rename("model.layers.3.q_proj") == "m.layers.3.q_proj"
    assert family.rename("model.layers.3.{x}.weight") == "m.layers.3.{x}.weight"
    assert family.rename("lm_head.{0}.7") == "lm_head.{0}.7"
