"""ModelOpt's checkpoints in Hugging Face layout, quantised and exported on a CPU.

nvidia-modelopt 0.47.0, transformers 5.17.0, torch 2.13.0. Calibration runs on random token ids.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.quant_utils import pack_int4_in_uint8
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor
from torch import Tensor

from tests.quantised.common import (
    DENSE,
    EXPERTS,
    SMALL,
    WIDE,
    keep_fixture,
    module_of,
    random_model,
    tensors_of,
    write_reference,
)


def calibrate(model: torch.nn.Module) -> None:
    ids = torch.randint(3, 64, (8, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model(input_ids=ids)


def unpacked(packed: Tensor, scale: Tensor) -> Tensor:
    """W4A8_AWQ, for which ModelOpt has no dequantising code: its own packing must give the stored bytes back."""
    codes = torch.stack([packed & 15, packed >> 4], 1).flatten(0, 1).to(torch.int8)
    values = (codes - 16 * (codes > 7)) * scale.repeat_interleave(128, 1)
    assert torch.equal(pack_int4_in_uint8(values, scale, 128), packed)
    return values


def dequantised(name: str, module: Mapping[str, Tensor]) -> Tensor:
    """ModelOpt's quantised tensors' own `dequantize`, in float32."""
    weight, scale = module["weight"], module["weight_scale"]
    single = torch.float32
    if "weight_scale_2" in module and "awq" not in name:
        shape = torch.Size([weight.shape[0], weight.shape[1] * 2])
        held = NVFP4QTensor(shape, single, weight)
        return held.dequantize(single, scale=scale, double_scale=module["weight_scale_2"], block_sizes={-1: 16})
    if "mxfp8" in name:
        return MXFP8QTensor(weight.shape, single, weight).dequantize(single, scale=scale)
    if "awq" in name:
        return unpacked(weight, scale)
    held = FP8QTensor(weight.shape, single, weight)
    if scale.dim() == 4:
        blocks = {-1: weight.shape[1] // scale.shape[2], -2: weight.shape[0] // scale.shape[0]}
        return held.dequantize(single, scale=scale[:, 0, :, 0], block_sizes=blocks)
    return held.dequantize(single, scale=scale[:, None] if scale.dim() == 1 else scale)


def fixture(
    name: str,
    scheme: Mapping[str, Any],
    model_type: str = "llama",
    config: Mapping[str, Any] = SMALL,
    older: bool = False,
) -> None:
    """`older`: the quantisation stands in hf_quant_config.json alone, as older exports have it."""
    if sys.argv[1:] and name not in sys.argv[1:]:
        return
    with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as folder:
        random_model(model_type, config).save_pretrained(source)
        model = type(random_model(model_type, config)).from_pretrained(source, dtype=torch.bfloat16)
        model = mtq.quantize(model, copy.deepcopy(dict(scheme)), calibrate)
        export_hf_checkpoint(model, export_dir=folder)
        kept = keep_fixture(name, Path(folder))
    described = json.loads((kept / "config.json").read_text())
    if older:
        described.pop("quantization_config")
    else:
        (kept / "hf_quant_config.json").unlink()
    (kept / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    tensors = tensors_of(kept)
    found = {}
    for module in sorted({key.rpartition(".")[0] for key in tensors if key.endswith(".weight_scale")}):
        found[module] = dequantised(name, module_of(tensors, module))
    tolerance = 1.2e-7 if "nvfp4" in name or "mixed" in name else 0.0
    why = "theirs multiplies the two scales first, in float32: two roundings" if tolerance else ""
    code = "modelopt.torch.quantization.qtensor dequantize, float32"
    if "awq" in name:
        code = "by formula; modelopt's pack_int4_in_uint8 gives the stored bytes back"
    write_reference(name, code, found, tolerance=tolerance, why=why)
    print(name, sorted({key.rpartition(".")[2] for key in tensors}), flush=True)


def with_kv(scheme: Mapping[str, Any]) -> dict[str, Any]:
    joined = copy.deepcopy(dict(scheme))
    joined["quant_cfg"] = [*joined["quant_cfg"], *copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])]
    return joined


def in_blocks_of(size: int) -> dict[str, Any]:
    scheme = copy.deepcopy(dict(mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG))
    for entry in scheme["quant_cfg"]:
        if "block_sizes" in (entry.get("cfg") or {}):
            entry["cfg"]["block_sizes"] = {-1: size, -2: size}
    return scheme


def mixed() -> dict[str, Any]:
    """FP8 in attention, NVFP4 in the MLP."""
    scheme = copy.deepcopy(dict(mtq.NVFP4_DEFAULT_CFG))
    eight: dict[str, Any] = {"num_bits": (4, 3), "axis": None}
    for kind in ("weight", "input"):
        scheme["quant_cfg"].append({"quantizer_name": f"*self_attn*{kind}_quantizer", "cfg": eight, "enable": True})
    return scheme


def main() -> None:
    fixture("modelopt-fp8-kv", with_kv(mtq.FP8_DEFAULT_CFG))
    fixture("modelopt-fp8-hf-quant-config-alone", with_kv(mtq.FP8_DEFAULT_CFG), "qwen3", older=True)
    fixture("modelopt-fp8-per-channel-per-token", mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG)
    fixture("modelopt-fp8-pb-wo", in_blocks_of(32))
    fixture("modelopt-nvfp4-kv", with_kv(mtq.NVFP4_DEFAULT_CFG))
    fixture("modelopt-w4a16-nvfp4", mtq.W4A16_NVFP4_CFG)
    fixture("modelopt-mxfp8", mtq.MXFP8_DEFAULT_CFG)
    fixture("modelopt-mixed-precision", mixed())
    fixture("modelopt-mixed-precision-kv", with_kv(mixed()))
    wide = DENSE | {"num_hidden_layers": 1, "hidden_size": 256, "head_dim": 64}
    fixture("modelopt-w4a8-awq", mtq.W4A8_AWQ_BETA_CFG, config=wide)
    fixture("modelopt-fp8-pb-wo-128", in_blocks_of(128), config=WIDE)
    fixture("modelopt-fp8-qwen3-moe", mtq.FP8_DEFAULT_CFG, "qwen3_moe", EXPERTS)
    fixture("modelopt-w4a16-nvfp4-qwen3-moe", mtq.W4A16_NVFP4_CFG, "qwen3_moe", EXPERTS)
    fixture("modelopt-nvfp4-qwen3-moe", mtq.NVFP4_DEFAULT_CFG, "qwen3_moe", EXPERTS)


if __name__ == "__main__":
    main()
