"""Checkpoints with quantised modules of random bits, in the tensors and config of each format.

What quantisation tools write is tested with files that they wrote; these have every format in one small model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.helpers.checkpoints import make

if TYPE_CHECKING:
    from torch import Tensor

Companions = dict[str, "Tensor"]
Quantise = Callable[["Tensor"], Companions]
_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 2,
}
DENSE = ("llama-gqa", _SIZES)
"""A model of which a module of 128 rows and columns a rank is the smallest at tp 2."""
LATENT = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 24,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
"""DeepSeek's, whose kv_a has 40 rows: two blocks of 16 and a partial one."""


def _fp8(block: tuple[int, int] | None, shape: str, suffix: str = "weight_scale", dtype: str = "float32") -> Quantise:
    """Values of 8 bits, with a scale for each block; None: for all; a block of no columns: for a row."""

    def quantise(weight: Tensor) -> Companions:
        import torch

        (rows, columns), (high, wide) = weight.shape, block or weight.shape
        grid = (-(-rows // high), -(-columns // wide) if wide else 1)
        scale = torch.rand(grid).add(0.5).mul(0.004).to(getattr(torch, dtype))
        forms = {"matrix": grid, "row": grid[:1], "scalar": (), "four": (grid[0], 1, grid[1], 1)}
        scale = scale.view(forms[shape])
        return {"weight": (torch.randn(rows, columns) * 10).to(torch.float8_e4m3fn), suffix: scale}

    return quantise


def _with(quantise: Quantise, **more: Tensor | float) -> Quantise:
    """The same with scales of activations beside."""

    def both(weight: Tensor) -> Companions:
        import torch

        return quantise(weight) | {name: torch.as_tensor(value) for name, value in more.items()}

    return both


def _int8(weight: Tensor) -> Companions:
    import torch

    return {
        "weight": torch.randint(-128, 128, weight.shape, dtype=torch.int8),
        "weight_scale": _scales(len(weight), 1).bfloat16() / 20,
    }


def _mx(suffix: str, *, packed: bool) -> Quantise:
    def quantise(weight: Tensor) -> Companions:
        import torch

        rows, columns = weight.shape
        exponents = torch.randint(121, 124, (rows, columns // 32), dtype=torch.uint8) - (0 if packed else 2)
        if packed:
            return {suffix: torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8), "weight_scale": exponents}
        return {suffix: torch.randn(rows, columns).to(torch.float8_e4m3fn), "weight_scale": exponents}

    return quantise


def _nvfp4(values: str, whole: str, inverted: bool) -> Quantise:
    def quantise(weight: Tensor) -> Companions:
        import torch

        rows, columns = weight.shape
        factor = torch.rand(1) + 0.5
        packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
        scale = (torch.rand(rows, columns // 16) * 100 + 10).to(torch.float8_e4m3fn)
        return {values: packed, "weight_scale": scale, whole: factor * 2000 if inverted else (factor / 2000).view(())}

    return quantise


def _w4a8(weight: Tensor) -> Companions:
    import torch

    rows, columns = weight.shape
    packed = torch.randint(0, 256, (rows // 2, columns), dtype=torch.uint8)
    factors = {
        "weight_scale_2": torch.rand(()),
        "input_scale": torch.rand(()),
        "pre_quant_scale": torch.rand(columns).bfloat16(),
    }
    return {"weight": packed, "weight_scale": _scales(rows, columns // 128)} | factors


def _scales(*shape: int) -> Tensor:
    import torch

    return (torch.rand(shape) + 0.5) / 100


def _words(*shape: int) -> Tensor:
    import torch

    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def _integers(bits: int, group: int | None, *, zeros: bool = False, groups: bool = False) -> Quantise:
    """compressed-tensors' packed integers."""

    def quantise(weight: Tensor) -> Companions:
        import torch

        rows, columns = weight.shape
        count = columns // (group or columns)
        scale = _scales(rows, count).bfloat16() * 8 / 2**bits
        found = {
            "weight_packed": _words(rows, columns * bits // 32),
            "weight_scale": scale,
            "weight_shape": torch.tensor([rows, columns]),
        }
        if zeros:
            found["weight_zero_point"] = _words(rows * bits // 32, count)
        if groups:
            found["weight_g_idx"] = (torch.randperm(columns) // (columns // count)).int()
        return found

    return quantise


def _gptq(bits: int, *, scattered: bool = False) -> Quantise:
    def quantise(weight: Tensor) -> Companions:
        import torch

        rows, columns = weight.shape
        order = torch.randperm(columns) if scattered else torch.arange(columns)
        zeros = _words(columns // 64, rows * bits // 32)
        return {
            "qweight": _words(columns * bits // 32, rows),
            "qzeros": zeros,
            "scales": _scales(columns // 64, rows).half() * 8 / 2**bits,
            "g_idx": (order // 64).int(),
        }

    return quantise


def _awq(weight: Tensor) -> Companions:
    rows, columns = weight.shape
    shapes = (columns, rows // 8), (columns // 64, rows // 8)
    return {"qweight": _words(*shapes[0]), "qzeros": _words(*shapes[1]), "scales": _scales(columns // 64, rows).half()}


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _modelopt(algorithm: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, **more}


_GROUPED = {"type": "int", "strategy": "group", "group_size": 64}
_FLOAT = {"type": "float", "num_bits": 8}
FORMATS: Mapping[str, tuple[dict[str, Any], Quantise]] = {
    "fp8-block": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        _fp8((128, 128), "matrix", "weight_scale_inv"),
    ),
    "fp8-tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        _with(_fp8(None, "scalar"), input_scale=1.5),
    ),
    "fp8-channel": (
        _compressed("float-quantized", **_FLOAT, strategy="channel"),
        _fp8((1, 0), "matrix", dtype="bfloat16"),
    ),
    "fp8-row": (_modelopt("FP8_PER_CHANNEL_PER_TOKEN"), _fp8((1, 0), "row")),
    "fp8-four-dims": (_modelopt("FP8_PB_WO"), _fp8((128, 128), "four")),
    "mxfp8": (_compressed("mxfp8-quantized", **_FLOAT, strategy="group", group_size=32), _mx("weight", packed=False)),
    "int8": (_compressed("int-quantized", type="int", num_bits=8, strategy="channel"), _int8),
    "int3-zeros": (
        _compressed("pack-quantized", **_GROUPED, num_bits=3, symmetric=False),
        _integers(3, 64, zeros=True),
    ),
    "int4-groups": (
        _compressed("pack-quantized", **_GROUPED, num_bits=4, actorder="group"),
        _integers(4, 64, zeros=True, groups=True),
    ),
    "int8-channel": (_compressed("pack-quantized", type="int", num_bits=8, strategy="channel"), _integers(8, None)),
    "nvfp4": (
        _compressed("nvfp4-pack-quantized", type="float", num_bits=4, strategy="tensor_group", group_size=16),
        _with(_nvfp4("weight_packed", "weight_global_scale", True), input_global_scale=[2.0]),
    ),
    "nvfp4-modelopt": (
        _modelopt("NVFP4", group_size=16),
        _with(_nvfp4("weight", "weight_scale_2", False), input_scale=0.5),
    ),
    "mxfp4": (
        _compressed("mxfp4-pack-quantized", type="float", num_bits=4, strategy="group", group_size=32),
        _mx("weight_packed", packed=True),
    ),
    "w4a8-awq": (_modelopt("W4A8_AWQ", group_size=128), _w4a8),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}, _gptq(4)),
    "gptq-v2-8": (
        {"quant_method": "gptq", "bits": 8, "group_size": 64, "desc_act": False, "checkpoint_format": "gptq_v2"},
        _gptq(8),
    ),
    "gptq-scattered": (
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True},
        _gptq(4, scattered=True),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}, _awq),
}
"""By name: what config.json says, and what a module's tensors are."""
_MODULE = re.compile(r".+\.(\w+_proj|kv_a_proj_with_mqa)\.weight")


def quantised(name: str, path: Path) -> Path:
    """A checkpoint in one of `FORMATS`, "deepseek" (FP8 blocks, one partial) or "gpt-oss" (its experts in MXFP4)."""
    import torch

    torch.manual_seed(0)
    if name == "deepseek":
        made = make("deepseek_v3", path, dtype="bfloat16", **LATENT)
        side = 16
        said: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [side, side]}
        return _rewritten(made, said, _fp8((side, side), "matrix", "weight_scale_inv"), _MODULE)
    if name == "gpt-oss":
        made = make("gpt_oss", path, dtype="bfloat16", hidden_size=64, intermediate_size=64)
        return _rewritten(made, {"quant_method": "mxfp4"}, _blocks, re.compile(r".+\.experts\.(gate_up|down)_proj"))
    model, sizes = DENSE
    said, quantise = FORMATS[name]
    return _rewritten(make(model, path, dtype="bfloat16", **sizes), said, quantise, _MODULE)


def _blocks(weight: Tensor) -> Companions:
    import torch

    experts, columns, rows = weight.shape
    scales = torch.randint(121, 124, (experts, rows, columns // 32), dtype=torch.uint8)
    return {"_blocks": torch.randint(0, 256, (*scales.shape, 16), dtype=torch.uint8), "_scales": scales}


def _rewritten(model: Path, said: Mapping[str, Any], quantise: Quantise, modules: re.Pattern[str]) -> Path:
    from safetensors.torch import load_file, save_file

    file, config = model / "model.safetensors", model / "config.json"
    found: Companions = {}
    for name, tensor in load_file(file).items():
        if modules.fullmatch(name):
            base = name.removesuffix("weight")
            found |= {f"{base}{suffix}": each.contiguous() for suffix, each in quantise(tensor).items()}
        else:
            found[name] = tensor
    save_file(found, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": said}))
    return model
