"""Text models as they are published, of which transformers' class has other names, or none without a tower.

Right shards pass; of wrong ones the first module that differs is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers import published_text
from tests.helpers.command import succeeds
from tests.helpers.command import tpshard as command
from tests.helpers.grids import some
from tpshard.errors import UnsupportedError
from tpshard.rules import architecture
from tpshard.verifier.hf.prepare import engine_of

RULES = Path(architecture.__file__).parent / "architectures"


@dataclass(frozen=True)
class Case:
    """rules: the file of its rules.

    exchanged: a tensor of rank 1, of which the first two blocks of so many rows change places. whole: a module that
    every rank is given whole, by a rule that says so; and the module that this is seen in. allowed: beginnings of names
    of what is cut and run by nothing. runs: what the report says is run.
    """

    rules: str
    exchanged: tuple[str, int, str]
    whole: tuple[str, str] | None
    allowed: Sequence[str] = ()
    runs: str | None = None


CASES: dict[str, Case] = {
    "mistral_large4": Case(
        "mistral_large4",
        ("layers.0.attention.wq.weight", 24, "layers.0.self_attn.q_proj"),
        ("layers.*.attention.wkv_b", "layers.0.self_attn"),
        runs="the whole model",
    ),
    "step3p5": Case(
        "step3p5",
        ("model.layers.0.self_attn.q_proj.weight", 16, "layers.0.self_attn.q_proj"),
        ("model.layers.*.share_expert.up_proj", "layers.1.mlp.shared_experts"),
        allowed=["model.layers.2"],
    ),
    "mimo_v2": Case(
        "mimo_v2_flash",
        ("model.layers.1.self_attn.attention_sink_bias", 1, "layers.1.self_attn"),
        ("model.layers.*.mlp.experts.*.up_proj", "layers.1.mlp.experts"),
        allowed=["model.mtp"],
    ),
    "deepseek_v4": Case(
        "deepseek_v4",
        ("layers.1.attn.wq_b.weight", 16, "layers.1.self_attn"),
        ("model.layers.*.attn.wq_b", "layers.0.self_attn"),
        allowed=["mtp"],
    ),
    "longcat_flash": Case(
        "longcat_flash",
        ("model.layers.0.self_attn.0.q_b_proj.weight", 24, "layers.0.self_attn.0.q_b_proj"),
        ("model.layers.*.self_attn.0.kv_b_proj", "layers.0.self_attn.0"),
        allowed=["model.mtp"],
    ),
    "bailing_moe_v2": Case(
        "bailing_moe",
        ("model.layers.0.attention.query_key_value.weight", 16, "layers.0.self_attn"),
        ("model.layers.*.mlp.shared_experts.up_proj", "layers.1.mlp.shared_experts"),
        allowed=["model.layers.2"],
    ),
    "bailing_moe": Case(
        "bailing_moe",
        ("model.layers.0.attention.query_key_value.weight", 8, "layers.0.self_attn"),
        ("model.layers.*.mlp.shared_experts.up_proj", "layers.0.shared_mlp"),
    ),
    "bailing_hybrid": Case(
        "bailing_hybrid",
        ("model.layers.2.attention.kv_b_proj.weight", 28, "layers.2.self_attn"),
        ("model.layers.*.attention.kv_b_proj", "layers.1.self_attn"),
    ),
    "bailing_moe_v3": Case(
        "bailing_hybrid",
        ("model.layers.1.attention.q_proj.weight", 24, "layers.1.self_attn"),
        ("model.layers.*.attention.f_proj", "layers.0.self_attn"),
    ),
    "baichuan": Case(
        "baichuan",
        ("model.layers.0.self_attn.W_pack.weight", 8, "layers.0.self_attn"),
        ("model.layers.*.mlp.up_proj", "layers.0.mlp"),
    ),
    "baichuan-2": Case(
        "baichuan",
        ("lm_head.weight", 8, "lm_head"),
        ("model.layers.*.self_attn.W_pack", "layers.0.self_attn"),
    ),
    "minimax_text_01": Case(
        "minimax",
        ("model.layers.1.self_attn.q_proj.weight", 8, "layers.1.self_attn"),
        ("model.layers.*.self_attn.output_gate", "layers.0.self_attn"),
    ),
    "nemotron-nas": Case(
        "nemotron_nas",
        ("model.layers.2.self_attn.q_proj.weight", 8, "layers.2.self_attn"),
        None,  # it has its class's names, as above
    ),
    "phi4mm": Case(
        "phi4mm",
        ("model.layers.1.self_attn.qkv_proj.base_layer.weight", 8, "layers.1.self_attn"),
        ("model.layers.*.self_attn.o_proj.base_layer", "layers.0.self_attn"),
    ),
    "minicpm": Case(
        "minicpm",
        ("model.layers.0.self_attn.q_proj.weight", 8, "layers.0.self_attn"),
        None,  # it has its class's names, of which wrong rules are tried in test_parallel
    ),
    "exaone": Case(
        "exaone",
        ("transformer.h.0.attn.attention.q_proj.weight", 8, "layers.0.self_attn.q_proj"),
        ("transformer.h.*.mlp.c_fc_1", "layers.0.mlp"),
    ),
    "qwen": Case(
        "qwen",
        ("transformer.h.0.attn.c_attn.weight", 8, "layers.0.self_attn"),
        ("transformer.h.*.mlp.w1", "layers.0.mlp"),
    ),
    "chatglm": Case(
        "chatglm",
        ("transformer.encoder.layers.0.self_attention.query_key_value.weight", 8, "layers.0.self_attn"),
        ("transformer.encoder.layers.*.mlp.dense_4h_to_h", "layers.0.mlp"),
    ),
}
BY_DEFAULT = ["step3p5", "mimo_v2"]


@pytest.mark.parametrize("name", some(CASES, BY_DEFAULT))
def test_it_is_proved_as_published(name: str, tmp_path: Path) -> None:
    found = verified(name, split(name, tmp_path), "weights,exact")
    assert (found["verdict"], found["settings"]["engine"]) == ("pass", "transformers"), found["reason"]
    assert [tier["status"] for tier in found["tiers"]] == ["pass"] * 2
    assert {canary["status"] for canary in found["canaries"]} == {"caught"}
    assert found["settings"].get("runs") == CASES[name].runs


@pytest.mark.parametrize("name", some(CASES, BY_DEFAULT))
def test_heads_in_another_order_fail(name: str, tmp_path: Path) -> None:
    tensor, rows, module = CASES[name].exchanged
    out = split(name, tmp_path)
    file = out / "rank-00001-of-00002.safetensors"
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    tensors = load_file(file)
    tensors[tensor][: 2 * rows] = tensors[tensor][: 2 * rows].roll(rows, 0)
    save_file(tensors, file, said)
    found = verified(name, out, "exact")
    assert found["verdict"] == "fail" and module in found["reason"], found["reason"]


@pytest.mark.parametrize("name", some(CASES, BY_DEFAULT))
def test_what_is_another_ranks_fails(name: str, tmp_path: Path) -> None:
    tensor, _, module = CASES[name].exchanged
    out = split(name, tmp_path)
    files = sorted(out.glob("rank-*.safetensors"))
    both = [load_file(file) for file in files]
    both[0][tensor], both[1][tensor] = both[1][tensor], both[0][tensor]
    for file, tensors in zip(files, both, strict=True):
        with safe_open(file, "pt") as opened:
            said = opened.metadata()
        save_file(tensors, file, said)
    found = verified(name, out, "exact")
    assert found["verdict"] == "fail" and module.rpartition(".")[0] in where(found), found["reason"]


@pytest.mark.parametrize("name", some([name for name in CASES if CASES[name].whole], BY_DEFAULT))
def test_a_wrong_rule_fails(name: str, tmp_path: Path) -> None:
    module, place = CASES[name].whole or ("", "")
    text = (RULES / f"{CASES[name].rules}.toml").read_text()
    without = re.sub(rf'"{re.escape(module)}\??",?', "", text)
    assert without != text
    file = tmp_path / "wrong.toml"
    file.write_text(without.replace('\n"replicate" = [', f'\n"replicate" = ["{module}?",', 1))
    found = verified(name, split(name, tmp_path, "--rules", file), "exact")
    assert found["verdict"] == "fail" and place in where(found), found["reason"]


_RING: dict[str, Any] = {"model_type": "bailing_hybrid", "architectures": ["BailingMoeV2_5ForCausalLM"]}
UNLIKE: list[tuple[str, dict[str, Any], str]] = [
    ("baichuan-13B", {}, "ALiBi"),
    ("baichuan-2", {"tie_word_embeddings": True}, "one table for its embedding and its normed head"),
    ("bailing_moe", {"score_function": "sigmoid"}, "a sigmoid for the scores of its experts"),
    ("bailing_moe", {"norm_topk_prob": False}, "scores of experts that need not sum to 1"),
    ("bailing_moe", {"partial_rotary_factor": 0.5}, "rotary positions in a part of each head"),
    ("bailing_moe_v3", {"q_lora_rank": 24}, "queries that come from a latent"),
    (
        "bailing_moe_v3",
        {"gated_attention_proj_granularity_type": "element_wise"},
        "another gate than one for each head",
    ),
    ("bailing_moe_v3", {"expert_swiglu_limit_list": [0, 7, 0]}, "limits in its experts"),
    ("minimax_text_01", {"postnorm": False}, "residuals taken before its norms"),
    ("minimax_text_01", {"shared_intermediate_size": 16}, "shared experts"),
    ("bailing_moe_v3", _RING, "Ring 2.5's linear attention"),
    ("phi4mm", {"attention_bias": True}, "biases"),
    ("chatglm", {"rmsnorm": False}, "LayerNorms"),
    ("minicpm", {"num_experts": 8}, "experts"),
    ("minicpm", {"dim_model_base": None}, "values in its config that nothing is computed with"),
    ("phi4mm", {"vision_lora": {"r": 8}}, "an adapter without a rank and a scale"),
]


@pytest.mark.parametrize(("name", "changes", "what"), UNLIKE)
def test_what_its_class_does_not_compute_is_said(
    name: str, changes: Mapping[str, Any], what: str, tmp_path: Path
) -> None:
    config = json.loads((published_text.make(name, tmp_path / "model") / "config.json").read_text())
    assert name == "baichuan-13B" or engine_of("auto", config) == "transformers"
    other = config | changes
    with pytest.raises(UnsupportedError, match=f"this {other['model_type']} model, which has {what}"):
        engine_of("auto", other)


def test_a_published_config_without_sizes_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="does not know the model type 'ernie4_5_moe_vl'"):
        engine_of("auto", {"model_type": "ernie4_5_moe_vl", "vision_config": {}})


def test_rows_that_the_config_contradicts_are_damage(tmp_path: Path) -> None:
    out = split("bailing_moe_v2", tmp_path)
    for directory in (tmp_path / "model", out):
        file = directory / "config.json"
        config = json.loads(file.read_text())
        del config["num_key_value_heads"]
        file.write_text(json.dumps(config))
    found = command("verify", out, "--source", tmp_path / "model", "--tier", "weights")
    assert (found.code, "contradicts the shape" in found.err) == (3, True), found.err


ADAPTERS = {
    "self_attn.qkv_proj.lora_B.speech": lambda held: held[: 2 * 8].roll(8, 0),
    "self_attn.o_proj.lora_A.vision": lambda held: held[:, : 2 * 8].roll(8, 1),
    "mlp.gate_up_proj.lora_A.vision": lambda held: held[:1] * 1.001,
}
"""What is done to the first elements of an adapter's matrix on one rank: heads in another order, another number."""


@pytest.mark.parametrize("module", some(ADAPTERS, ["self_attn.qkv_proj.lora_B.speech"]))
def test_adapters_are_run(module: str, tmp_path: Path) -> None:
    out = split("phi4mm", tmp_path)
    found = verified("phi4mm", out, "weights,exact")
    assert [each["prefix"] for each in found["not_run"]] == ["model.embed_tokens_extend"]
    assert found["warnings"] == ["adapters (speech, vision) are run added to their matrices, all at once"]
    file = out / "rank-00001-of-00002.safetensors"
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    tensors = load_file(file)
    tensor = tensors[f"model.layers.1.{module}.weight"]
    changed = ADAPTERS[module](tensor)
    tensor[: changed.shape[0], : changed.shape[1]] = changed
    save_file(tensors, file, said)
    for tier in ("weights", "exact"):
        found = verified("phi4mm", out, tier)
        assert found["verdict"] == "fail" and "layers.1." in found["reason"], found["reason"]


def test_an_adapter_that_every_rank_has_whole_fails(tmp_path: Path) -> None:
    text = (RULES / "phi4mm.toml").read_text()
    cut = ', "model.layers.*.self_attn.qkv_proj.lora_B.[sv]*?"'
    without = text.replace(cut, "", 1)
    assert without != text
    file = tmp_path / "wrong.toml"
    file.write_text(without.replace('\n"replicate" = [', f'\n"replicate" = [{cut[2:]},', 1))
    found = verified("phi4mm", split("phi4mm", tmp_path, "--rules", file), "exact")
    assert found["verdict"] == "fail" and "layers.0.self_attn" in where(found), found["reason"]


def where(found: Any) -> str:
    """The module that differs first, or what is said of a rank's part where nothing was run."""
    first = found["tiers"][0]["first"]
    return str(first["module"] if first else found["reason"])


def split(name: str, folder: Path, *more: object) -> Path:
    model = published_text.make(name, folder / "model")
    succeeds("split", model, "--tp", 2, "-o", folder / "out", "--no-fsync", *more)
    return folder / "out"


def verified(name: str, out: Path, tiers: str) -> Any:
    allowed = [word for each in CASES[name].allowed for word in ("--allow-not-run", each)]
    given = ("--source", out.parent / "model", "--tier", tiers, "--tokens", 2, "--json", *allowed)
    return command("verify", out, *given).json
