"""InternLM 2 is a LLaMA whose q, k and v are one matrix, sorted by KV group. transformers has no class for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.small_models import relative, run, tokens
from tpshard.api import convert as api
from tpshard.api import verify as verifying
from tpshard.errors import DifferentError
from tpshard.execute.publish import Settings
from tpshard.verifier.options import VerifyOptions
from tpshard.verifier.run import verify

Get = Callable[..., Path]
NAMES = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
KV = {"llama-gqa": 2, "llama-mha-bias": 8, "llama-tied": 4}


def internlm(llama: Mapping[str, Tensor], kv: int) -> dict[str, Tensor]:
    """A LLaMA's tensors with q, k and v in one: for each KV head the q heads that use it, its k, its v."""
    tensors = {}
    for name, tensor in llama.items():
        layer, found, rest = name.partition("self_attn.q_proj")
        if found:
            parts = [llama[f"{layer}self_attn.{letter}_proj{rest}"] for letter in "qkv"]
            grouped = [part.reshape(kv, -1, *part.shape[1:]) for part in parts]
            tensors[f"{layer}attention.wqkv{rest}"] = torch.cat(grouped, 1).flatten(0, 1)
        elif not any(f"self_attn.{letter}_proj" in name for letter in "kv"):
            old = next((old for old in NAMES if f"{old}." in name), None)
            tensors[name if old is None else name.replace(old, NAMES[old])] = tensor.clone()
    return tensors


@pytest.fixture(scope="module")
def model(made: Get, tmp_path_factory: pytest.TempPathFactory) -> Get:
    """A checkpoint made of a LLaMA; no bias goes up or down, as in the published code."""

    def get(name: str) -> Path:
        out = tmp_path_factory.mktemp(name) / "model"
        out.mkdir()
        llama = made(name)
        config = json.loads((llama / "config.json").read_text()) | {"model_type": "internlm2"}
        tensors = internlm(load_file(llama / "model.safetensors"), KV[name])
        config["bias"] = name == "llama-mha-bias"
        if name == "llama-mha-bias":
            tensors = {key: x for key, x in tensors.items() if "feed_forward" not in key or key.endswith("weight")}
        (out / "config.json").write_text(json.dumps(config))
        save_file({key: x.contiguous() for key, x in tensors.items()}, out / "model.safetensors")
        return out

    return get


@pytest.mark.parametrize("name", KV)
def test_it_computes_what_the_llama_does(name: str, made: Get, model: Get) -> None:
    llama = {key: x for key, x in load_file(made(name) / "model.safetensors").items() if "mlp" not in key or
             key.endswith("weight")}  # fmt: skip
    config = json.loads((made(name) / "config.json").read_text())
    ours = model(name)
    found = run(json.loads((ours / "config.json").read_text()), [load_file(ours / "model.safetensors")], tokens())
    (wanted,) = run(config, [llama], tokens())
    assert relative(found[0], wanted) <= 1e-14


@pytest.mark.parametrize(
    ("name", "format", "tp"),
    [
        ("llama-gqa", "native", 4),
        ("llama-mha-bias", "native", 2),
        ("llama-tied", "native", 4),
        ("llama-gqa", "vllm", 2),
        ("llama-tied", "vllm", 4),
    ],
)
def test_a_correct_split_passes(name: str, format: str, tp: int, model: Get, tmp_path: Path) -> None:
    source = model(name)
    api.split(source, tp, tmp_path / "out", format=format, settings=Settings(fsync=False, workers=1))
    verdict = verifying.verify(tmp_path / "out", source, tiers=("bytes", "exact"), device="cpu")
    assert [tier.status for tier in verdict.tiers] == ["pass", "pass"], verdict.reason
    assert (verdict.settings["engine"], verdict.warnings) == ("tpshard", ())
    assert verdict.canaries and all(canary.status == "caught" for canary in verdict.canaries)


def test_groups_that_the_engine_would_take_for_others(model: Get, tmp_path: Path) -> None:
    """vLLM gathers all ranks' q, then all k, then all v: files that hold whole groups are wrong for it."""
    source = model("llama-gqa")
    settings = Settings(fsync=False, workers=1)
    api.split(source, 2, tmp_path / "native", settings=settings)
    api.split(source, 2, tmp_path / "out", format="vllm", settings=settings)
    name = "model.layers.2.attention.wqkv.weight"
    for rank in range(2):
        path = tmp_path / f"out/model-rank-{rank}-part-0.safetensors"
        tensors = load_file(path)
        tensors[name] = load_file(tmp_path / f"native/rank-{rank:05}-of-00002.safetensors")[name]
        save_file(tensors, path)
    verdict = verify(VerifyOptions(tmp_path / "out", tiers=("exact",), device="cpu"), source)
    reason = f"k of {name.removesuffix('.weight')} of rank 0 differs first"
    assert verdict.exit_code == 1 and (verdict.reason or "").startswith(reason), verdict.reason


def test_ranks_whose_rows_are_not_the_models_together(model: Get, tmp_path: Path) -> None:
    """As where KV heads are repeated: the engine gathers every copy, and cannot sort them."""
    source, shards = model("llama-gqa"), tmp_path / "out"
    api.split(source, 2, shards, format="vllm", settings=Settings(fsync=False, workers=1))
    for rank, message in ((1, "rank 1 has no .* of the others' shape"), (0, "together are not the model's q, k and v")):
        path = shards / f"model-rank-{rank}-part-0.safetensors"
        tensors = load_file(path)
        save_file({key: torch.cat((x, x[-16:])) if "wqkv" in key else x for key, x in tensors.items()}, path)
        with pytest.raises(DifferentError, match=message):
            verify(VerifyOptions(shards, tiers=("exact",), device="cpu"), source)
