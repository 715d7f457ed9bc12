"""EAGLE's and EAGLE-3's draft models as input, in the names of the checkpoints that are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.command import fails, succeeds, tpshard

HIDDEN, FFN, HEADS, KV, HEAD, VOCAB, DRAFTED = 64, 96, 8, 2, 8, 100, 40
KINDS = {"eagle": "eagle", "eagle3": "eagle3", "speculators": "eagle3"}
"""Kinds of checkpoints, and the rules that fit them."""


def make(kind: str, path: Path) -> Path:
    """An EAGLE head, an EAGLE-3 head as SafeAILab publishes it, or one that speculators wrote."""
    layer, own = "midlayer." if kind == "eagle3" else "layers.0.", kind != "eagle"
    taken = 2 * HIDDEN if own else HIDDEN
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}self_attn.q_proj.weight": (HEADS * HEAD, taken),
        f"{layer}self_attn.k_proj.weight": (KV * HEAD, taken),
        f"{layer}self_attn.v_proj.weight": (KV * HEAD, taken),
        f"{layer}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
        f"{layer}mlp.gate_proj.weight": (FFN, HIDDEN),
        f"{layer}mlp.up_proj.weight": (FFN, HIDDEN),
        f"{layer}mlp.down_proj.weight": (HIDDEN, FFN),
        f"{layer}post_attention_layernorm.weight": (HIDDEN,),
        "embed_tokens.weight": (VOCAB, HIDDEN),
        "fc.weight": (HIDDEN, 3 * HIDDEN if own else 2 * HIDDEN),
    }
    config: dict[str, Any] = {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN},
        **{"intermediate_size": FFN, "num_attention_heads": HEADS, "num_key_value_heads": KV, "vocab_size": VOCAB},
        **{"num_hidden_layers": 1, "rms_norm_eps": 1e-5, "bias": not own},
    }
    if own:
        shapes |= {f"{layer}{each}.weight": (HIDDEN,) for each in ("hidden_norm", "input_layernorm")}
        shapes |= {"norm.weight": (HIDDEN,), "lm_head.weight": (DRAFTED, HIDDEN)}
        config |= {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFTED}
    else:
        shapes["fc.bias"] = (HIDDEN,)
    if kind == "speculators":
        size = config.pop("draft_vocab_size")
        config = {"speculators_model_type": "eagle3", "draft_vocab_size": size, "transformer_layer_config": config}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.08 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if own:
        tensors |= {"d2t": torch.arange(DRAFTED), "t2d": torch.ones(VOCAB, dtype=torch.bool)}
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_split_checked_and_merged(kind: str, tmp_path: Path) -> None:
    source, shards, rules = make(kind, tmp_path / "source"), tmp_path / "shards", ("--rules", KINDS[kind])
    succeeds("split", source, "--tp", 4, "-o", shards, *rules)
    succeeds("check", shards, "--source", source, *rules)
    succeeds("merge", shards, "-o", tmp_path / "merged")
    whole, merged = load_file(source / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert whole.keys() == merged.keys() and all(torch.equal(whole[name], merged[name]) for name in whole)
    layer = "midlayer" if kind == "eagle3" else "layers.0"
    held = load_file(shards / "rank-00001-of-00004.safetensors")
    q = whole[f"{layer}.self_attn.q_proj.weight"]
    assert torch.equal(held[f"{layer}.self_attn.q_proj.weight"], q[16:32])
    assert torch.equal(held[f"{layer}.self_attn.k_proj.weight"], whole[f"{layer}.self_attn.k_proj.weight"][:HEAD])
    assert torch.equal(held["fc.weight"], whole["fc.weight"])
    if kind != "eagle":
        assert torch.equal(held["lm_head.weight"], whole["lm_head.weight"][10:20])
        assert torch.equal(held["d2t"], whole["d2t"]) and torch.equal(held["t2d"], whole["t2d"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_refusal_names_the_rules_that_fit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = make(kind, tmp_path / "source")
    error = fails(4, "plan", source, "--tp", 2)
    assert error["hint"].startswith(f"every tensor fits --rules {KINDS[kind]}: ")


def test_verify_compares_bytes_and_takes_it_for_no_llama(tmp_path: Path) -> None:
    source, shards, rules = make("eagle3", tmp_path / "source"), tmp_path / "shards", ("--rules", "eagle3")
    succeeds("split", source, "--tp", 2, "-o", shards, *rules)
    result = tpshard("verify", shards, "--source", source, *rules, "--json")
    assert (result.code, result.json["verdict"]) == (8, "inconclusive")
    assert result.json["tiers"][0]["status"] == "pass"
