"""Classes of transformers of which nobody here knows where they read a rank's heads: right rules pass, wrong ones fail.

The classes, and what they make of a checkpoint's names, are transformers'; the rules are somebody's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command import succeeds, tpshard
from tests.helpers.grids import some
from tests.helpers.own_rules import CONFIGS, make, rules


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def split(text: str, *more: object) -> None:
    Path("mine.toml").write_text(text)
    succeeds("split", "model", "--tp", 2, "--rules", "mine.toml", "-o", "out", "--no-fsync", *more)


def verify(tiers: str, *more: object) -> Any:
    given = ("--rules", "mine.toml", "--tier", tiers, "--tokens", 2, "--json", *more)
    return tpshard("verify", "out", "--source", "model", *given)


RIGHT = [model_type for model_type in CONFIGS if model_type != "diffllama"]


@pytest.mark.parametrize("model_type", some(RIGHT, ["longcat_flash", "mamba2", "minimax"]))
def test_own_rules_are_proved_by_the_class(model_type: str) -> None:
    make(model_type)
    split(rules(model_type))
    found = verify("weights,exact,native")
    assert found.code == 0, found.json["reason"]
    assert [tier["status"] for tier in found.json["tiers"]] == ["pass"] * 3
    assert {canary["status"] for canary in found.json["canaries"]} == {"caught"}
    assert len(found.json["canaries"]) >= 6


WRONG = [
    ("bitnet", "replicated", "mlp.ffn_sub_norm"),  # whole, where its features are cut
    ("dbrx", "joined", "column q kv kv"),
    ("dbrx", "replicated", "ffn.experts.mlp.v1"),
    ("falcon_mamba", "joined", "column features features"),
    ("hy_v4", "replicated", "self_attn.linear_gate"),
    ("hy_v4", "replicated", "mlp.experts.down_proj?"),
    ("jetmoe", "joined", "column ffn ffn"),
    ("kimi_linear", "replicated", "self_attn.b_proj?"),
    ("laguna", "replicated", "mlp.shared_expert.down_proj?"),
    ("longcat_flash", "replicated", "self_attn.[01].kv_b_proj"),
    ("mamba2", "joined", "column ssm_heads ssm_groups ssm_groups"),
    ("mamba2", "replicated", "mixer.A_log?"),
    ("mellum", "replicated", "mlp.experts.*.gate_proj"),
    ("minimax", "replicated", "self_attn.qkv_proj?"),
    ("olmo_hybrid", "replicated", "linear_attn.[qk]_conv1d?"),
    ("youtu", "replicated", "self_attn.o_proj"),
    ("zamba2", "joined", "column ffn ffn"),
]


@pytest.mark.parametrize(
    ("model_type", "how", "what"), some(WRONG, [WRONG[1], WRONG[9], WRONG[10], WRONG[12], WRONG[15]])
)
def test_wrong_rules_fail(model_type: str, how: str, what: str) -> None:
    make(model_type)
    split(rules(model_type, what) if how == "replicated" else rules(model_type, joined=what))
    found = verify("weights,exact")
    assert (found.code, found.json["verdict"]) == (1, "fail"), found.json["reason"]
    assert found.json["tiers"][1]["first"] is not None


def test_heads_that_belong_together_are_not_told_by_their_number() -> None:
    """DiffLlama subtracts the attention of the second half of its heads from that of the first: ranks hold neither."""
    make("diffllama")
    split(rules("diffllama"))
    found = verify("weights,exact")
    assert found.code == 1 and "layers.0.self_attn" in found.json["reason"]


def test_more_than_a_rank_uses_is_named() -> None:
    make("mellum")
    split(rules("mellum", "mlp.experts.*.gate_proj"))
    reason = verify("exact").json["reason"]
    assert "holds more of model.layers.0.mlp.experts.gate_up_proj than its part of the model uses" in reason


def test_numbers_of_which_some_are_alike() -> None:
    """Nobody knows which of them a rank holds: nothing is said of those that it does not use."""
    from safetensors.torch import load_file, save_file

    make("mamba2")
    file = Path("model/model.safetensors")
    tensors = load_file(file)
    alike = {name: (tensor * 16).round() / 16 for name, tensor in tensors.items() if name.endswith("conv1d.bias")}
    assert alike and all(len(tensor.unique()) < len(tensor) // 4 for tensor in alike.values())
    save_file(tensors | alike, file, metadata={"format": "pt"})
    split(rules("mamba2"))
    found = verify("weights,exact")
    assert found.code == 0, found.json["reason"]


def test_a_config_that_a_class_stumbles_over() -> None:
    make("mellum")
    split(rules("mellum"))
    config = Path("model/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": 10**6}))
    Path("out/config.json").write_bytes(config.read_bytes())
    found = verify("exact")
    assert found.code == 4 and "Padding_idx must be within num_embeddings" in found.err


def test_another_element_fails_whoever_runs_it() -> None:
    make("mellum")
    split(rules("mellum"), "--checksum", "none")
    file = Path("out/rank-00001-of-00002.safetensors")
    raw = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    raw[begin + json.loads(raw[8:begin])["model.layers.1.self_attn.q_proj.weight"]["data_offsets"][0]] ^= 1
    file.write_bytes(bytes(raw))
    verdict = verify("weights")
    assert verdict.code == 1 and "layers.1.self_attn.q_proj.weight" in verdict.json["reason"]


def test_a_cut_that_nobody_has_seen_is_named() -> None:
    """Numbers that a class multiplies with each other, cut: nothing is summed behind them."""
    make("diffllama")
    whole = tuple(f"self_attn.{each}_proj" for each in "qkvo")
    cut = ('{ count = "hidden_size // num_attention_heads" }', "self_attn.lambda_*")
    split(rules("diffllama", *whole, also=cut))
    found = verify("weights,exact")
    assert found.code == 8, found.json["reason"]
    assert "model.layers.0.self_attn is cut in a way that nobody here has seen" in found.json["reason"]


def test_a_class_without_attention_is_met() -> None:
    """Nothing of it is like the classes that were tried: whatever cannot be told is no crash."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 32, "time_step_rank": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).save_pretrained("model")
    layer = "backbone.layers.*."
    mixers = ("A_log", "D", "conv1d", "in_proj", "x_proj", "dt_proj", "out_proj")
    leaves = ["norm", *(f"mixer.{leaf}" for leaf in mixers)]
    whole = json.dumps([layer + leaf for leaf in leaves] + ["backbone.norm_f"])
    split(
        'model_types = ["mamba"]\nprefix = "backbone."\nlayers = "num_hidden_layers"\n'
        'tied = { lm_head = "backbone.embeddings" }\n[axes]\nvocab = { count = "vocab_size", pad = true }\n'
        f'[rules]\n"column vocab" = ["backbone.embeddings", "lm_head?"]\n"replicate" = {whole}\n'
    )
    assert verify("weights,exact").code == 0
