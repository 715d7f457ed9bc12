"""Mistral's own form as input: params.json in place of config.json, and consolidated.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tpshard
from tests.helpers.by_hand import tensors_of, tensors_of_file
from tests.helpers.checkpoints import VOCAB
from tests.helpers.command import fails, succeeds
from tests.helpers.served_cuts import Cuts, held
from tests.helpers.toys import contents, random_tensor, read_all, write
from tpshard.execute.publish import Settings

PARAMS = {
    **{"dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 96, "n_heads": 8, "n_kv_heads": 2},
    **{"norm_eps": 1e-5, "vocab_size": VOCAB, "rope_theta": 1e6},
}
LATENT = {
    **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12},
    "moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "expert_hidden_dim": 32, "num_shared_experts": 1},
        **{"first_k_dense_replace": 1, "route_every_n": 1},
    },
}
CUTS = Cuts(
    ("wq", "wq_b", "wkv_b", "w1", "w3"),
    ("wo", "w2"),
    {"wk": 2, "wv": 2},
    ends=("tok_embeddings", "output"),
)


def _shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of Mistral 7B, Mixtral, or Mistral Large 3."""
    found: dict[str, tuple[int, ...]] = {"tok_embeddings": (VOCAB, 64), "output": (VOCAB, 64), "norm": (64,)}
    for i in range(2):
        layer = {"attention_norm": (64,), "ffn_norm": (64,)}
        if kind == "large 3":
            layer |= {"attention.wq_a": (24, 64), "attention.q_a_norm": (24,), "attention.wq_b": (192, 24)}
            layer |= {"attention.wkv_a_with_mqa": (24, 64), "attention.kv_a_norm": (16,)}
            layer |= {"attention.wkv_b": (224, 16), "attention.wo": (64, 96)}
        else:
            layer |= {"attention.wq": (128, 64), "attention.wo": (64, 128)}
            layer |= {"attention.wk": (32, 64), "attention.wv": (32, 64)}
        blocks = {"feed_forward": 96}
        if kind == "large 3" and i == 1:
            blocks = {"shared_experts": 32, **{f"experts.{expert}": 32 for expert in range(4)}}
            layer["gate"] = (4, 64)
        elif kind == "mixtral":
            blocks = {f"feed_forward.experts.{expert}": 96 for expert in range(4)}
            layer["feed_forward.gate"] = (4, 64)
        for block, wide in blocks.items():
            layer |= {f"{block}.w1": (wide, 64), f"{block}.w2": (64, wide), f"{block}.w3": (wide, 64)}
        found |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    if kind == "pixtral":
        found |= {"vision_encoder.patch_conv": (32, 3, 14, 14), "vision_encoder.ln_pre": (32,)}
        found |= {f"vision_encoder.transformer.layers.0.attention.w{letter}": (32, 32) for letter in "qkvo"}
        found |= {"vision_language_adapter.w_in": (64, 32), "vision_language_adapter.w_out": (64, 64)}
    return {f"{name}.weight": shape for name, shape in found.items()}


KINDS: dict[str, Mapping[str, Any]] = {
    "7b": PARAMS,
    "pixtral": PARAMS | {"vision_encoder": {"hidden_size": 32}},
    "mixtral": PARAMS | {"moe": {"num_experts": 4, "num_experts_per_tok": 2}},
    "large 3": PARAMS | LATENT,
}


def published(directory: Path, kind: str, files: int = 1) -> Path:
    rng = np.random.default_rng(len(kind))
    tensors = {name: random_tensor(rng, "BF16", shape) for name, shape in _shapes(kind).items()}
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps(KINDS[kind]))
    (directory / "tekken.json").write_text("{}")
    if files == 1:
        write(directory / "consolidated.safetensors", tensors)
        return directory
    weight_map = {}
    for part in range(files):
        name = f"consolidated-{part + 1:05}-of-{files:05}.safetensors"
        mine = {each: tensor for i, (each, tensor) in enumerate(tensors.items()) if i % files == part}
        write(directory / name, mine)
        weight_map |= dict.fromkeys(mine, name)
    index = directory / "consolidated.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@pytest.mark.parametrize(("kind", "files"), [("7b", 1), ("pixtral", 1), ("mixtral", 2), ("large 3", 2)])
def test_there_and_back(kind: str, files: int, quick: Settings, tmp_path: Path) -> None:
    import torch

    model = published(tmp_path / "model", kind, files)
    source = tensors_of(model)
    for tp in (2, 4):
        tpshard.split(model, tp, tmp_path / f"{tp}", settings=quick)
        for rank in range(tp):
            found = tensors_of_file(tmp_path / f"{tp}" / f"rank-{rank:05}-of-{tp:05}.safetensors")
            assert found.keys() == source.keys()
            for name, whole in source.items():
                wanted = held(name, whole, CUTS, rank, tp).contiguous()
                assert torch.equal(found[name].view(torch.uint8), wanted.view(torch.uint8)), f"{rank}: {name}"
    assert tpshard.check(tmp_path / "2", model, settings=quick).equal
    tpshard.reshard(tmp_path / "2", 4, tmp_path / "resharded", settings=quick)
    assert contents(tmp_path / "resharded") == contents(tmp_path / "4")
    tpshard.merge(tmp_path / "4", tmp_path / "merged", settings=quick)
    assert read_all(tmp_path / "merged") == read_all(model)
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {path.name for path in model.iterdir()}
    assert (tmp_path / "merged" / "params.json").read_bytes() == (model / "params.json").read_bytes()


def test_through_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "model", "7b")
    plan = succeeds("plan", "model", "--tp", 2, "--json").json
    assert plan["architecture"]["model_type"] == "mistral_native" and plan["possible_tp"] == [1, 2, 4, 8]
    succeeds("split", "model", "--tp", 2, "--dtype", "float32", "-o", "out")
    assert not Path("out/config.json").exists() and Path("out/params.json").exists()
    assert succeeds("check", "out", "--source", "model").code == 0
    assert succeeds("verify", "out", "--source", "model", "--tier", "bytes", "--json").json["verdict"] == "pass"
    refused = fails(4, "split", "model", "--tp", 2, "--format", "vllm", "-o", "vllm")
    assert "'mistral_native'" in refused["message"]


def test_fp8_scales_go_with_their_weights(quick: Settings, tmp_path: Path) -> None:
    """As in Mistral Large 3: one scale for each matrix, and one for what it is multiplied with."""
    model, rng = published(tmp_path / "model", "7b"), np.random.default_rng(1)
    tensors = read_all(model)
    for name in [name for name in tensors if ".attention.w" in name or ".feed_forward.w" in name]:
        tensors[name] = random_tensor(rng, "F8_E4M3", tensors[name].shape)
        for scale in ("qscale_weight", "qscale_act"):
            tensors[name.replace("weight", scale)] = random_tensor(rng, "F32", ())
    write(model / "consolidated.safetensors", tensors)
    quantised = PARAMS | {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}
    (model / "params.json").write_text(json.dumps(quantised))
    tpshard.split(model, 2, tmp_path / "out", settings=quick)
    found = read_all(tmp_path / "out", "rank-00001-*.safetensors")
    assert found["layers.0.attention.wk.weight"].shape == (16, 64)
    assert found["layers.0.attention.wk.qscale_weight"] == tensors["layers.0.attention.wk.qscale_weight"]
    assert tpshard.check(tmp_path / "out", model, settings=quick).equal
    tpshard.merge(tmp_path / "out", tmp_path / "merged", settings=quick)
    assert read_all(tmp_path / "merged") == tensors


def test_a_config_json_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many repositories have both."""
    monkeypatch.chdir(tmp_path)
    model = published(tmp_path / "model", "7b")
    llama = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 8}
    (model / "config.json").write_text(json.dumps(llama | {"num_hidden_layers": 1, "vocab_size": 10}))
    assert "no llama rule matches the tensor" in fails(4, "plan", "model", "--tp", 2)["message"]
    for name in ("config.json", "params.json"):
        (model / name).unlink()
    assert fails(3, "plan", "model", "--tp", 2)["message"] == "no config.json beside the weights"


def test_another_kind_of_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = published(tmp_path / "model", "7b")
    (model / "params.json").write_text(json.dumps({"model_type": "mamba", "dim": 64, "n_layers": 2}))
    assert "no rules for model_type 'mamba'" in fails(4, "plan", "model", "--tp", 2)["message"]
