"""Quantised checkpoints through `tpshard split --format vllm` and `tpshard verify`, and what must be noticed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engines.check_vllm_quantised import LOADED
from tests.helpers.command import Result, succeeds, tpshard
from tests.helpers.gpt_oss import with_blocks
from tests.helpers.grids import one_in, some
from tests.helpers.toys import metadata
from tests.quantised.fixture_table import FIXTURES

FEW = (
    "ct-int4-asym-group",
    "ct-nvfp4-qwen3-moe",
    "fp8-block-llama",
    "gptq-int4",
    "modelopt-fp8-kv",
)
"""One of each kind of scheme, dense or with experts, beside gpt-oss below; the others under TPSHARD_TEST_ALL."""
LAYER = "model.layers.0."
FUSED = (f"{LAYER}mlp.experts.routed_experts.w13_", f"{LAYER}mlp.gate_up_proj.")
VALUES = ("weight_packed", "qweight", "weight")
COMPANIONS = (
    *("weight_global_scale", "weight_scale_2", "weight_zero_point", "qzeros"),
    *("weight_scale", "weight_scale_inv"),
)
SHARDS = Path("out/model-rank-1-part-0.safetensors")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def split(name: str) -> dict[str, Tensor]:
    """A fixture split for vLLM at tp 2; what rank 1 has."""
    succeeds("split", FIXTURES / name, "--tp", 2, "--format", "vllm", "-o", "out", "--no-fsync")
    return load_file(SHARDS)


def verify(name: str, *options: object) -> Result:
    return tpshard("verify", "out", "--source", FIXTURES / name, "--tokens", 1, "--json", *options)


def write(tensors: Mapping[str, Tensor]) -> None:
    said = metadata(SHARDS)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, SHARDS, said)


def bit_flipped(tensor: Tensor) -> Tensor:
    tensor.view(-1).view(torch.uint8)[0] ^= 1
    return tensor


@pytest.mark.parametrize("name", some(LOADED, FEW))
def test_what_vllm_loads_is_proved(name: str) -> None:
    """It passes; with a bit of a value or of a companion turned over, that tensor is named as the source names it."""
    tensors = split(name)
    found = verify(name)
    assert found.code == 0 and found.json["verdict"] == "pass", found.json["reason"]
    assert [(tier["name"], tier["status"]) for tier in found.json["tiers"]] == [
        (tier, "pass") for tier in ("bytes", "weights", "exact", "native")
    ]
    begin = next(begin for begin in FUSED if any(key.startswith(begin) for key in tensors))
    for suffixes in (VALUES, COMPANIONS):
        stored = next(f"{begin}{suffix}" for suffix in suffixes if f"{begin}{suffix}" in tensors)
        write(tensors | {stored: bit_flipped(tensors[stored].clone())})
        result = verify(name, "--tier", "weights")
        assert result.code == 1 and result.json["verdict"] == "fail"
        reason, matrix = result.json["reason"], r"mlp\.(experts\.(0\.)?)?gate(_up)?_proj"
        assert re.match(rf"{re.escape(LAYER)}{matrix}.* of rank 1 ", reason), reason


@pytest.mark.parametrize("blocks", some([5, 7], [5]))
def test_gpt_oss_whose_blocks_do_not_divide(blocks: int) -> None:
    """vLLM gives the last rank fewer."""
    model = with_blocks(blocks, Path("model"))
    succeeds("split", model, "--tp", 2, "--format", "vllm", "-o", "out", "--no-fsync")
    found = tpshard("verify", "out", "--source", model, "--tokens", 1, "--json")
    assert found.code == 0 and found.json["verdict"] == "pass", found.json["reason"]
    stored = f"{LAYER}mlp.experts.routed_experts.w2_weight_scale"
    tensors = load_file(SHARDS)
    write(tensors | {stored: bit_flipped(tensors[stored].clone())})
    assert tpshard("verify", "out", "--source", model, "--tier", "weights").code == 1


def slots_exchanged(tensor: Tensor) -> Tensor:
    return tensor[[1, 0, *range(2, len(tensor))]]


def halves_exchanged(tensor: Tensor) -> Tensor:
    return tensor.roll(tensor.shape[0] // 2, 0)


FAULTS: dict[str, tuple[str, str, Callable[[Tensor], Tensor], str]] = {
    "scales of q and k": (
        "modelopt-fp8-kv",
        f"{LAYER}self_attn.qkv_proj.weight_scale",
        slots_exchanged,
        f"{LAYER}self_attn.q_proj.weight_scale[0] of rank 1",
    ),
    "zero points of gate and up": (
        "ct-int4-asym-group",
        f"{LAYER}mlp.gate_up_proj.weight_zero_point",
        halves_exchanged,
        f"{LAYER}mlp.gate_proj.weight_zero_point",
    ),
    "scales of two experts": (
        "ct-nvfp4-qwen3-moe",
        f"{LAYER}mlp.experts.routed_experts.w2_weight_scale",
        slots_exchanged,
        f"{LAYER}mlp.experts.0.down_proj.weight_scale",
    ),
    "scales of gate and up of an expert": (
        "ct-nvfp4-unequal-scales",
        f"{LAYER}mlp.experts.routed_experts.w13_weight_global_scale",
        lambda tensor: tensor.flip(1),
        f"{LAYER}mlp.experts.0.gate_proj.weight_global_scale",
    ),
    "GPTQ's scales of q and k": (
        "gptq-int4",
        f"{LAYER}self_attn.qkv_proj.scales",
        lambda tensor: tensor.roll(1, 1),
        f"{LAYER}self_attn.q_proj.scales",
    ),
    "a scale of activations": (
        "modelopt-fp8-kv",
        f"{LAYER}self_attn.qkv_proj.input_scale",
        bit_flipped,
        f"{LAYER}self_attn.q_proj.input_scale",
    ),
    "scales of the cache": (
        "ct-fp8-kv-per-head",
        f"{LAYER}self_attn.attn.v_scale",
        bit_flipped,
        f"{LAYER}self_attn.v_scale",
    ),
}


@pytest.mark.parametrize("fault", one_in(2, list(FAULTS)))
def test_a_companion_in_the_wrong_place(fault: str) -> None:
    name, stored, change, where = FAULTS[fault]
    tensors = split(name)
    write(tensors | {stored: change(tensors[stored].clone())})
    result = verify(name, "--tier", "weights")
    assert result.code == 1 and result.json["reason"].startswith(where), result.json["reason"]


STRANGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "a cache that would be scaled": (
        "fp8-block-llama",
        lambda tensors: tensors[f"{LAYER}self_attn.attn.k_scale"].fill_(2.0),
        f"{LAYER}self_attn.attn.k_scale",
    ),
    "biases of experts": (
        "autoround-gptq-qwen3-moe",
        lambda tensors: tensors[f"{LAYER}mlp.experts.routed_experts.w2_bias"].fill_(1.0),
        f"{LAYER}mlp.experts.routed_experts.w2_bias",
    ),
    "a scale that is another for k": (
        "ct-fp8-static-phi3",
        lambda tensors: tensors[f"{LAYER}self_attn.qkv_proj.weight_scale"][1].mul_(2),
        f"{LAYER}self_attn.qkv_proj.weight",
    ),
    "no scale of activations": (
        "modelopt-fp8-kv",
        lambda tensors: tensors.pop(f"{LAYER}mlp.down_proj.input_scale"),
        f"{LAYER}mlp.down_proj.input_scale",
    ),
    "no scale": (
        "ct-int8-w8a8",
        lambda tensors: tensors.pop(f"{LAYER}mlp.down_proj.weight_scale"),
        f"{LAYER}mlp.down_proj.weight_scale",
    ),
    "a companion that the source has not": (
        "ct-int4-group",
        lambda tensors: tensors.update({f"{LAYER}mlp.down_proj.weight_g_idx": torch.zeros(64, dtype=torch.int32)}),
        f"{LAYER}mlp.down_proj.weight_g_idx",
    ),
    "a tensor twice": (
        "ct-int8-w8a8",
        lambda tensors: tensors.update({f"{LAYER}self_attn.q_proj.weight_scale": torch.ones(64, 1)}),
        f"{LAYER}self_attn.q",
    ),
    "rows of another width": (
        "ct-int4-group",
        lambda tensors: tensors.update({(key := f"{LAYER}mlp.gate_up_proj.weight_scale"): tensors[key][:-65]}),
        f"{LAYER}mlp.",
    ),
    "the shape of another weight": (
        "ct-int4-group",
        lambda tensors: tensors[f"{LAYER}mlp.gate_up_proj.weight_shape"].add_(1),
        f"{LAYER}mlp.up_proj.weight_shape",
    ),
}


@pytest.mark.parametrize("fault", one_in(2, list(STRANGE)))
def test_what_vllm_would_hold_beside_the_source(fault: str) -> None:
    name, change, tensor = STRANGE[fault]
    tensors = split(name)
    change(tensors)
    write(tensors)
    result = verify(name, "--tier", "weights")
    assert result.code == 1
    told = result.json["error"]["tensor"] if "error" in result.json else result.json["tiers"][0]["reason"]
    assert tensor in told, told


@pytest.mark.parametrize(
    ("name", "key", "module"),
    [
        ("autoround-awq", "modules_to_not_convert", "model.layers.0.mlp.up_proj"),
        ("gptq-dynamic", "modules_in_block_to_quantize", "model.layers.1.self_attn.o_proj"),
    ],
)
def test_a_config_that_names_the_wrong_modules(name: str, key: str, module: str) -> None:
    split(name)
    path = Path("out/config.json")
    config: dict[str, Any] = json.loads(path.read_text())
    config["quantization_config"][key].append(module)
    path.write_text(json.dumps(config))
    result = verify(name, "--tier", "weights")
    assert result.code == 1 and key in result.json["reason"]
