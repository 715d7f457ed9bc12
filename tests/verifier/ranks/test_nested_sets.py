"""Sets for vLLM of models that nest a text model: what is wrong in a tower, which nothing runs, is found as well."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tpshard.formats
from tests.engines.engine_nested import make
from tests.helpers.command import Result, succeeds
from tests.helpers.command import tpshard as run
from tpshard.verifier.ranks.nested import NESTED

Tensors = dict[str, torch.Tensor]
Made = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A source, and its set for vLLM at tp 2."""

    def get(name: str) -> tuple[Path, Path]:
        source, shards = home / name, home / f"{name}-shards"
        if not source.exists():
            make(name, source)
            succeeds("split", source, "--tp", 2, "--format", "vllm", "-o", shards)
        return source, shards

    home = tmp_path_factory.mktemp("nested")
    return get


def weights_tier(shards: Path, source: Path) -> Result:
    return run("verify", shards, "--source", source, "--tier", "weights", "--json")


def rewrite(shards: Path, rank: int, tensors: Tensors) -> None:
    """A rank's file with other tensors, which says of itself what it said."""
    path = shards / f"model-rank-{rank}-part-0.safetensors"
    with safe_open(path, "pt") as file:
        said = file.metadata()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, said)


Fault = Callable[[list[Tensors], Tensors], None]
"""Changes the ranks' tensors, seeing the source's."""


def cut_as_one(name: str) -> Fault:
    def fault(ranks: list[Tensors], source: Tensors) -> None:
        for held, rows in zip(ranks, source[name].chunk(2), strict=True):
            held[name] = rows.clone()

    return fault


def exchanged(name: str) -> Fault:
    def fault(ranks: list[Tensors], _: Tensors) -> None:
        ranks[0][name], ranks[1][name] = ranks[1][name], ranks[0][name]

    return fault


def whole(name: str) -> Fault:
    def fault(ranks: list[Tensors], source: Tensors) -> None:
        for held in ranks:
            held[name] = source[name].clone()

    return fault


def cut(name: str, dim: int) -> Fault:
    def fault(ranks: list[Tensors], source: Tensors) -> None:
        for held, share in zip(ranks, source[name].chunk(2, dim), strict=True):
            held[name] = share.clone()

    return fault


def missing(name: str) -> Fault:
    return lambda ranks, _: [held.pop(name) for held in ranks] and None


def uneven(name: str) -> Fault:
    def fault(ranks: list[Tensors], source: Tensors) -> None:
        rows = len(source[name]) // 4
        ranks[0][name], ranks[1][name] = source[name][:rows].clone(), source[name][rows:].clone()

    return fault


def one_bit(name: str) -> Fault:
    def fault(ranks: list[Tensors], _: Tensors) -> None:
        ranks[1][name].view(-1).view(torch.uint8)[0] ^= 1

    return fault


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("qwen2_5_vl", cut_as_one("visual.blocks.1.attn.qkv.weight"), "visual.blocks.1.attn.qkv.weight"),
        ("qwen2_5_vl", exchanged("visual.blocks.0.attn.proj.weight"), "visual.blocks.0.attn.proj.weight"),
        ("qwen2_5_vl", exchanged("visual.blocks.0.mlp.gate_up_proj.weight"), "visual.blocks.0.mlp"),
        ("qwen2_5_vl", cut("visual.blocks.0.attn.proj.weight", 0), "not what vLLM has of it"),
        ("qwen2_5_vl", whole("visual.merger.mlp.0.weight"), "not what vLLM has of it"),
        ("qwen2_5_vl", cut("visual.patch_embed.proj.weight", 0), "not what vLLM has of it"),
        ("qwen2_5_vl", uneven("visual.merger.mlp.0.bias"), "not what vLLM has of it"),
        ("qwen2_5_vl", missing("visual.merger.ln_q.weight"), "has no tensor visual.merger.ln_q.weight"),
        ("qwen2_5_vl", one_bit("visual.blocks.1.norm1.weight"), "visual.blocks.1.norm1.weight"),
        ("qwen2_5_vl", exchanged("language_model.model.layers.0.self_attn.qkv_proj.weight"), "self_attn.q_proj"),
        ("qwen2_vl", exchanged("visual.blocks.0.attn.qkv.weight"), "visual.blocks.0.attn.qkv.weight"),
        ("llava", exchanged("vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj.weight"), "self_attn."),
        ("llava", one_bit("multi_modal_projector.linear_1.weight"), "multi_modal_projector.linear_1.weight"),
    ],
)
def test_a_wrong_tower_fails(name: str, fault: Fault, said: str, split: Made, tmp_path: Path) -> None:
    source, right = split(name)
    shards = shutil.copytree(right, tmp_path / "shards")
    ranks = [load_file(shards / f"model-rank-{rank}-part-0.safetensors") for rank in range(2)]
    fault(ranks, load_file(source / "model.safetensors"))
    for rank, tensors in enumerate(ranks):
        rewrite(shards, rank, tensors)
    found = weights_tier(shards, source)
    assert (found.code, said in found.out + found.err) == (1, True), found.out + found.err


@pytest.mark.parametrize("flag", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}])
def test_a_flag_that_the_files_contradict_fails(flag: dict[str, object], split: Made, tmp_path: Path) -> None:
    source, right = split("qwen2_5_vl")
    shards = shutil.copytree(right, tmp_path / "shards")
    config = json.loads((shards / "config.json").read_text())
    text = {**config["text_config"], **flag.get("text_config", {})}  # type: ignore[dict-item]
    (shards / "config.json").write_text(json.dumps({**config, **flag, "text_config": text}))
    found = weights_tier(shards, source)
    assert found.code == 1 and "tie_word_embeddings" in found.out


def test_every_type_that_is_written_is_verified() -> None:
    tables = Path(tpshard.formats.__file__).parent / "tables"
    nested = tomllib.loads((tables / "vllm_nested.toml").read_text())["nested"]
    bytes_alone = {"kimi_k3", "mistral_native with a tower"}
    assert NESTED.keys() | bytes_alone == {name for each in nested.values() for name in each["model_types"]}
