"""Small quantised checkpoints of random bits: the names, dtypes and shapes that each tool publishes for a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.command import LLAMA, llama_tensors
from tests.helpers.toys import Tensor, random_tensor, write_checkpoint

SMALL: dict[str, Any] = LLAMA | {
    "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
"""Heads of 32: at tp 2 and 4 whole groups of 32, blocks of 16 and words."""
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""What a module stores: by suffix, dtype and shape."""


def words(n: int, bits: int) -> int:
    """The 32-bit words of n packed values."""
    return -(-n * bits // 32)


def compressed(bits: int, group: int | None, symmetric: bool, order: bool = False) -> Callable[[int, int], Shapes]:
    """compressed-tensors' pack-quantized: values packed along `in`, zero points along `out`."""

    def shapes(n: int, k: int) -> Shapes:
        groups = 1 if group is None else k // group
        found = {
            "weight_packed": ("I32", (n, words(k, bits))),
            "weight_scale": ("BF16", (n, groups)),
            "weight_shape": ("I64", (2,)),
        }
        zeros = {} if symmetric else {"weight_zero_point": ("I32", (words(n, bits), groups))}
        return found | zeros | ({"weight_g_idx": ("I32", (k,))} if order else {})

    return shapes


def gptq(bits: int, group: int | None) -> Callable[[int, int], Shapes]:
    """GPTQ: values packed along `in`, zero points along `out`."""

    def shapes(n: int, k: int) -> Shapes:
        groups = 1 if group is None else k // group
        return {
            "qweight": ("I32", (words(k, bits), n)),
            "qzeros": ("I32", (groups, words(n, bits))),
            "scales": ("F16", (groups, n)),
            "g_idx": ("I32", (k,)),
        }

    return shapes


def awq(n: int, k: int) -> Shapes:
    """AWQ's gemm layout: values and zero points packed along `out`."""
    return {
        "qweight": ("I32", (k, n // 8)),
        "qzeros": ("I32", (k // 32, n // 8)),
        "scales": ("F16", (k // 32, n)),
    }


def fp8(
    scale: str, dtype: str, shape: Callable[[int, int], tuple[int, ...]], values: str = "F8_E4M3", **rest: Any
) -> Callable[[int, int], Shapes]:
    """A weight of 8 bits with a scale of this name, dtype and shape; rest: what else is stored."""
    return lambda n, k: {"weight": (values, (n, k)), scale: (dtype, shape(n, k)), **rest}


SCALAR = ("F32", ())
CT: dict[str, Any] = {"quant_method": "compressed-tensors"}
GPTQ4 = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
MODELOPT: dict[str, Any] = {"quant_method": "modelopt"}


def _grid(n: int, k: int) -> tuple[int, int]:
    return -(-n // 16), -(-k // 16)


def ct(**weights: Any) -> dict[str, Any]:
    """A config of compressed-tensors with one group."""
    return CT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


FORMATS: dict[str, tuple[dict[str, Any], Callable[[int, int], Shapes]]] = {
    "fp8 blocks": (
        {"quant_method": "fp8", "weight_block_size": [16, 16]},
        fp8("weight_scale_inv", "F32", _grid),
    ),
    "fp8 blocks, E8M0": (
        {"quant_method": "fp8", "weight_block_size": [16, 16], "scale_fmt": "ue8m0"},
        fp8("weight_scale_inv", "F8_E8M0", _grid),
    ),
    "fp8 per tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        fp8("weight_scale", "F32", lambda n, k: (), input_scale=SCALAR),
    ),
    "ct fp8 channel": (ct(strategy="channel"), fp8("weight_scale", "BF16", lambda n, k: (n, 1))),
    "ct fp8 tensor": (ct(strategy="tensor"), fp8("weight_scale", "BF16", lambda n, k: (1,))),
    "ct fp8 block": (ct(block_structure=[16, 16]), fp8("weight_scale", "BF16", _grid)),
    "fbgemm": (
        {"quant_method": "fbgemm_fp8"},
        fp8("weight_scale", "F32", lambda n, k: (n, 1), input_scale_ub=("F32", (1,))),
    ),
    "modelopt fp8 channel": (
        MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        fp8("weight_scale", "F32", lambda n, k: (n,)),
    ),
    "ct mxfp8": (ct(group_size=32), fp8("weight_scale", "U8", lambda n, k: (n, k // 32))),
    "ct int8": (
        ct(strategy="channel", num_bits=8),
        fp8(
            "weight_scale", "BF16", lambda n, k: (n, 1), "I8", input_scale=("BF16", (1,)), input_zero_point=("I8", (1,))
        ),
    ),
    **{
        f"ct int{bits}": (ct(num_bits=bits, group_size=32), compressed(bits, 32, symmetric=bits in (4, 8)))
        for bits in range(2, 9)
    },
    "ct int4 channel": (ct(num_bits=4, strategy="channel"), compressed(4, None, symmetric=False)),
    "ct int4 order": (ct(num_bits=4, group_size=32, actorder="group"), compressed(4, 32, False, order=True)),
    "ct nvfp4": (
        CT | {"format": "nvfp4-pack-quantized"},
        lambda n, k: {
            "weight_packed": ("U8", (n, k // 2)),
            "weight_scale": ("F8_E4M3", (n, k // 16)),
            "weight_global_scale": ("F32", (1,)),
            "input_global_scale": ("F32", (1,)),
        },
    ),
    "ct mxfp4": (
        CT | {"format": "mxfp4-pack-quantized"},
        lambda n, k: {"weight_packed": ("U8", (n, k // 2)), "weight_scale": ("U8", (n, k // 32))},
    ),
    "modelopt nvfp4": (
        MODELOPT | {"quant_algo": "NVFP4", "group_size": 16},
        lambda n, k: {
            "weight": ("U8", (n, k // 2)),
            "weight_scale": ("F8_E4M3", (n, k // 16)),
            "weight_scale_2": SCALAR,
            "input_scale": SCALAR,
        },
    ),
    "modelopt w4a8": (
        MODELOPT | {"quant_algo": "W4A8_AWQ", "group_size": 32},
        lambda n, k: {
            "weight": ("U8", (n // 2, k)),
            "weight_scale": ("F32", (n, k // 32)),
            "weight_scale_2": SCALAR,
            "input_scale": SCALAR,
            "pre_quant_scale": ("BF16", (k,)),
        },
    ),
    "int8 halves, E8M0": (
        {"quant_method": "fp8", "weight_block_size": [16, 16]},
        lambda n, k: {"weight": ("I8", (n, k // 2)), "weight_scale_inv": ("F8_E8M0", (n, k // 32))},
    ),
    "gptq 4": (GPTQ4, gptq(4, 32)),
    "gptq 8": (GPTQ4 | {"bits": 8, "checkpoint_format": "gptq_v2"}, gptq(8, 32)),
    "gptq desc_act": (GPTQ4 | {"desc_act": True}, gptq(4, 32)),
    "gptq one group": (GPTQ4 | {"group_size": -1}, gptq(4, None)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq),
    "auto-round": ({"quant_method": "auto-round", "bits": 4, "group_size": 32}, gptq(4, 32)),
}
"""By name: what config.json says under quantization_config, and what a module of [n, k] stores."""


def in_order(k: int, groups: int) -> bytes:
    """GPTQ's g_idx of groups that are in order."""
    return np.repeat(np.arange(groups, dtype="<i4"), k // groups).tobytes()


def quantised_tensors(
    shapes: Callable[[int, int], Shapes], seed: int = 0, skip: str = "", **config: Any
) -> dict[str, Tensor]:
    """The tensors of `SMALL` with all matrices of the layers quantised, but for those whose name contains `skip`."""
    rng = np.random.default_rng(seed)
    found: dict[str, Tensor] = {}
    for name, tensor in llama_tensors(seed, "BF16", **(SMALL | config)).items():
        if "_proj." not in name or (skip and skip in name):
            found[name] = tensor
            continue
        n, k = tensor.shape
        module = name.removesuffix(".weight")
        for suffix, (dtype, shape) in shapes(n, k).items():
            found[f"{module}.{suffix}"] = random_tensor(rng, dtype, shape)
        if f"{module}.g_idx" in found:
            groups = found[f"{module}.scales"].shape[0]
            found[f"{module}.g_idx"] = Tensor("I32", (k,), in_order(k, groups))
    return found


def make(path: Path, name: str, *, skip: str = "", parts: int = 2, **config: Any) -> Path:
    """Write the checkpoint of one of `FORMATS`."""
    said, shapes = FORMATS[name]
    layers = {key: value for key, value in config.items() if key == "num_hidden_layers"}
    tensors = quantised_tensors(shapes, skip=skip, **layers)
    names = list(tensors)
    size = -(-len(names) // parts)
    files = [names[i : i + size] for i in range(0, len(names), size)]
    given = SMALL | {"torch_dtype": "bfloat16", "quantization_config": said} | config
    return write_checkpoint(path, {k: v for k, v in given.items() if v is not None}, tensors, files)
