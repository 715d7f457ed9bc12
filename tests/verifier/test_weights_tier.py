"""The weights tier through `tpshard verify`: every element, in every format, whatever a prompt meets."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.checkpoints import make
from tests.helpers.command import Result, succeeds, tpshard
from tpshard.errors import DifferentError
from tpshard.verifier.elements import Held, Parameter
from tpshard.verifier.ranks.weights import InMemory

Made = Callable[..., Path]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def split(model: Path, tp: int = 2, *options: object) -> Path:
    succeeds("split", model, "--tp", tp, "-o", "out", "--no-fsync", *options)
    return Path("out")


def weights(model: Path, *options: object, tier: str = "weights") -> dict[str, Any]:
    return tpshard("verify", "out", "--source", model, "--tier", tier, "--json", *options).json


def change(shards: Path, rank: int, name: str, edit: Callable[[Tensor], Tensor], tp: int = 2) -> None:
    path = shards / f"rank-{rank:05}-of-{tp:05}.safetensors"
    tensors = load_file(path)
    tensors[name] = edit(tensors[name]).contiguous()
    save_file(tensors, path)


def last_bit(tensor: Tensor) -> Tensor:
    """The lowest bit of the first element turned over."""
    tensor.view(-1).view(torch.uint8)[0] ^= 1
    return tensor


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-gqa", ("--format", "vllm")),
        ("llama-gqa", ("--format", "meta")),
        ("llama-gqa", ("--format", "dcp-hf")),
        ("gpt2", ("--format", "vllm")),
        ("gpt2", ("--format", "dcp")),
        ("bloom", ("--format", "vllm")),
        ("phi3", ("--uneven",)),
        ("gpt_oss", ("--format", "vllm")),
        ("mixtral", ("--dtype", "bfloat16")),
    ],
)
def test_correct_sets_of_any_format(name: str, options: tuple[str, ...], made: Made) -> None:
    model = made(name) if options != ("--format", "meta") else make(name, Path("model"), vocab_size=256)
    split(model, 3 if "--uneven" in options else 2, *options)
    found = weights(model)
    assert (found["verdict"], found["reason"]) == ("pass", None)
    (tier,) = found["tiers"]
    assert tier["metrics"]["differences"] == 0 and tier["metrics"]["elements"] > 1000
    assert [canary["status"] for canary in found["canaries"]] == ["caught"] * 3


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama-gqa", "model.embed_tokens.weight"),
        ("llama-gqa", "model.layers.1.self_attn.k_proj.weight"),
        ("llama-gqa", "model.norm.weight"),
        ("gpt2", "transformer.h.1.attn.c_attn.bias"),
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
    ],
)
def test_one_bit(name: str, tensor: str, made: Made) -> None:
    model = made(name)
    change(split(model), 1, tensor, last_bit)
    found = weights(model)
    assert found["verdict"] == "fail" and tensor in found["reason"] and "rank 1" in found["reason"]


def test_what_only_a_run_can_tell(made: Made) -> None:
    """Nobody told this tier how Phi-3's class cuts q, k and v: rows in another order are the ranks' as well."""
    model = made("phi3")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    change(split(model), 1, name, lambda weight: weight.flip(0))
    found = weights(model, tier="weights,exact")
    first, second = found["tiers"]
    assert first["status"] == "pass" and name in first["by_running"]
    assert second["status"] == "fail" and "model.layers.1.self_attn" in found["reason"]


def with_a_layer_more(model: Path) -> Path:
    """DeepSeek's layer that predicts a token further, which no class of transformers runs."""
    made = make("deepseek_v3", model, num_nextn_predict_layers=1)
    tensors = load_file(made / "model.safetensors")
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    more = {
        name.replace(f"layers.{last}.", f"layers.{last + 1}."): tensor + 0.01
        for name, tensor in tensors.items()
        if f"layers.{last}." in name
    }
    norm, head = tensors["model.norm.weight"], tensors["lm_head.weight"]
    more |= {f"model.layers.{last + 1}.{name}.weight": norm for name in ("enorm", "hnorm", "shared_head.norm")}
    more |= {f"model.layers.{last + 1}.eh_proj.weight": torch.randn(len(norm), 2 * len(norm))}
    more |= {f"model.layers.{last + 1}.{name}.weight": head for name in ("embed_tokens", "shared_head.head")}
    save_file(
        {name: tensor.clone() for name, tensor in (tensors | more).items()},
        made / "model.safetensors",
        {"format": "pt"},
    )
    return made


def test_what_nothing_runs_and_is_cut() -> None:
    model = with_a_layer_more(Path("model"))
    shards = split(model)

    def verdict(*options: object) -> Result:
        return tpshard("verify", "out", "--source", model, "--tier", "weights", "--json", *options)

    unsure = verdict()
    assert unsure.code == 8 and "tensors that are cut are run by nothing here" in unsure.json["reason"]
    cut, whole = unsure.json["not_run"]
    one = cut["prefix"]
    assert (whole["prefix"], "the same on every rank" in whole["why"], "is cut" in cut["why"]) == (one, True, True)
    assert f"--allow-not-run {one} accepts" in unsure.json["reason"]
    allowed = verdict("--allow-not-run", one)
    names = next(tier["not_run"] for tier in allowed.json["tiers"] if tier["name"] == "weights")
    assert allowed.code == 0 and cut["tensors"] + whole["tensors"] == len(names) > 10
    zeroed = next(name for name in names if name.endswith("o_proj.weight"))
    change(shards, 1, zeroed, torch.zeros_like)
    refused = verdict("--allow-not-run", one)
    assert refused.code == 1 and zeroed in refused.json["reason"]


@pytest.mark.parametrize("tier", ["exact", "native"])
def test_what_nothing_runs_is_said_without_this_tier_too(tier: str) -> None:
    model = with_a_layer_more(Path("model"))
    split(model)

    def verdict(*options: object) -> Result:
        return tpshard("verify", "out", "--source", model, "--tier", tier, "--tokens", 1, "--json", *options)

    unsure = verdict()
    assert unsure.code == 8 and "tensors that are cut are run by nothing here" in unsure.json["reason"]
    cut, whole = unsure.json["not_run"]
    assert ("is cut" in cut["why"], "nothing was compared" in whole["why"]) == (True, True)
    accepted = verdict("--allow-not-run", cut["prefix"])
    assert (accepted.code, accepted.json["verdict"]) == (0, "pass")
    assert accepted.json["not_run"] == unsure.json["not_run"]
    assert all(canary["status"] == "caught" for canary in accepted.json["canaries"])


def test_a_device_that_does_not_repeat_itself(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    model, numbers = made("llama-gqa"), count()
    split(model)
    monkeypatch.setattr("tpshard.verifier.tiers.digest", lambda logits: str(next(numbers)))
    result = tpshard("verify", "out", "--source", model, "--tier", "native", "--tokens", 1, "--json")
    assert result.code == 8 and "does not repeat itself on this device" in result.json["reason"]


@pytest.mark.parametrize(
    ("source", "ranks", "right"),
    [
        ([1, 2, 1, 2, 3, 3], [[1, 2, 3], [1, 2, 3]], True),  # of an order that nobody knows, three on a rank
        ([1, 2, 1, 2, 3, 3], [[1, 2, 1], [2, 3, 2]], False),  # 2 is there once too often
        ([0, 0, 5, 0, 0, 7, 0, 0], [[5, 0, 0, 0], [7, 0, 0, 0]], True),  # nearly the ranges, and right
        ([0, 0, 5, 0, 0, 7, 0, 0], [[0, 0, 5, 0], [0, 0, 0, 0]], None),  # 7 is nowhere
    ],
)
def test_where_no_cut_is_known(source: list[int], ranks: list[list[int]], right: bool | None) -> None:
    """Values that repeat can lie in any order, but each as often as in the source."""
    whole = Held(InMemory({"x": torch.tensor(source)}), "x")
    held = [Held(InMemory({"x": torch.tensor(rank)}), "x") for rank in ranks]
    parameter = Parameter("x", whole, held, known=False)
    if right is None:
        with pytest.raises(DifferentError, match="not held by any rank"):
            parameter.shares()
    else:
        fits = [share.fits(rank) for share, rank in zip(parameter.shares(), held, strict=True)]
        assert all(fits) is right
