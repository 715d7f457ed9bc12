"""Classes of transformers that nobody here ran: equal is equal, and a difference is no failure of the shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.command import succeeds, tpshard

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MELLUM = {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
HEADS = '{ count = "num_attention_heads", unit = "head_dim or hidden_size // num_attention_heads", group = "kv" }'
KV = '{ count = "num_key_value_heads", unit = "head_dim or hidden_size // num_attention_heads", replicate = true }'
LAYER = "model.layers.*."


def rules(model_type: str, ffn: str, mlp: str, column: dict[str, str], replicated: tuple[str, ...]) -> str:
    """Rules of a decoder whose MLP lies at `mlp` and is cut by the axis `ffn`."""
    under: dict[str, list[str]] = {
        "column vocab": ["model.embed_tokens", "lm_head?"],
        "column heads": [f"{LAYER}self_attn.q_proj"],
        "column kv": [f"{LAYER}self_attn.k_proj", f"{LAYER}self_attn.v_proj"],
        "row heads": [f"{LAYER}self_attn.o_proj"],
        f"column {ffn}": [f"{LAYER}{mlp}.gate_proj", f"{LAYER}{mlp}.up_proj"],
        f"row {ffn}": [f"{LAYER}{mlp}.down_proj"],
        "replicate": [f"{LAYER}*_layernorm", "model.norm", *(LAYER + each for each in replicated)],
    }
    for module, rule in column.items():
        under[rule].append(LAYER + module)
    count = "intermediate_size" if ffn == "ffn" else "moe_intermediate_size"
    return "\n".join(
        [
            f'model_types = ["{model_type}"]',
            'prefix = "model."\nlayers = "num_hidden_layers"\ntied = { lm_head = "model.embed_tokens" }',
            *(['experts = "num_local_experts or num_experts"'] if ffn != "ffn" else []),
            f'[axes]\nheads = {HEADS}\nkv = {KV}\n{ffn} = {{ count = "{count}" }}',
            'vocab = { count = "vocab_size", pad = true }\n[rules]',
            *(f'"{rule}" = {modules}'.replace("'", '"') for rule, modules in under.items()),
        ]
    )


MINE = {
    "mellum": rules("mellum", "moe", "mlp.experts.*", {}, ("mlp.gate", "self_attn.q_norm", "self_attn.k_norm")),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(model_type: str, **settings: object) -> Path:
    """A model as transformers saves it, and rules for it in mine.toml."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **SIZES | settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.08)
    model.save_pretrained("model")
    Path("mine.toml").write_text(MINE[model_type])
    return Path("model")


def split(*more: object) -> None:
    succeeds("split", "model", "--tp", 2, "--rules", "mine.toml", "-o", "out", "--no-fsync", *more)


def test_own_rules_are_proved_by_the_class() -> None:
    write("mellum", **MELLUM)
    split()
    report = succeeds("verify", "out", "--source", "model", "--rules", "mine.toml", "--json").json
    assert [tier["status"] for tier in report["tiers"]] == ["pass"] * 4
    assert {canary["status"] for canary in report["canaries"]} == {"caught"}
    assert len(report["canaries"]) >= 8


def test_wrong_rules_do_not_pass() -> None:
    write("mellum", **MELLUM)
    gated = f'"{LAYER}mlp.experts.*.gate_proj", '
    wrong = MINE["mellum"].replace(gated, "").replace('"replicate" = [', f'"replicate" = [{gated}')
    assert wrong != MINE["mellum"]
    Path("mine.toml").write_text(wrong)
    split()
    verdict = tpshard("verify", "out", "--source", "model", "--rules", "mine.toml", "--json")
    assert verdict.code == 8 and verdict.json["verdict"] == "inconclusive"


def test_another_element_fails_whoever_runs_it() -> None:
    write("mellum", **MELLUM)
    split("--checksum", "none")
    file = Path("out/rank-00001-of-00002.safetensors")
    raw = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    raw[begin + json.loads(raw[8:begin])["model.layers.1.self_attn.q_proj.weight"]["data_offsets"][0]] ^= 1
    file.write_bytes(bytes(raw))
    verdict = tpshard("verify", "out", "--source", "model", "--tier", "weights", "--json")
    assert verdict.code == 1 and "layers.1.self_attn.q_proj.weight" in verdict.json["reason"]


def test_a_cut_that_no_class_here_has_is_named() -> None:
    write("mellum", **MELLUM)
    norm = f'"{LAYER}input_layernorm"'
    text = MINE["mellum"].replace(f'"{LAYER}*_layernorm"', f'"{LAYER}post_attention_layernorm"')
    Path("mine.toml").write_text(text.replace('"column heads" = [', f'"column heads" = [{norm}, '))
    split()
    verdict = tpshard("verify", "out", "--source", "model", "--rules", "mine.toml", "--json")
    assert verdict.code == 8
    assert "Mellum model was never tried here" in verdict.json["reason"]
    assert "model.layers.0.input_layernorm.weight is cut" in verdict.json["reason"]
    statuses = {tier["name"]: tier["status"] for tier in verdict.json["tiers"]}
    assert (statuses["bytes"], statuses["weights"], statuses["exact"]) == ("pass", "pass", "inconclusive")


def test_a_class_without_attention_is_met() -> None:
    """Nothing of it is like the classes that were tried: whatever cannot be told is no crash."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 32, "time_step_rank": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).save_pretrained("model")
    layer = "backbone.layers.*."
    mixers = ("A_log", "D", "conv1d", "in_proj", "x_proj", "dt_proj", "out_proj")
    leaves = ["norm", *(f"mixer.{leaf}" for leaf in mixers)]
    whole = json.dumps([layer + leaf for leaf in leaves] + ["backbone.norm_f"])
    Path("mine.toml").write_text(
        'model_types = ["mamba"]\nprefix = "backbone."\nlayers = "num_hidden_layers"\n'
        'tied = { lm_head = "backbone.embeddings" }\n[axes]\nvocab = { count = "vocab_size", pad = true }\n'
        f'[rules]\n"column vocab" = ["backbone.embeddings", "lm_head?"]\n"replicate" = {whole}\n'
    )
    split()
    verdict = tpshard("verify", "out", "--source", "model", "--rules", "mine.toml", "--json")
    assert verdict.code in (0, 8), verdict.err
