"""Quark's checkpoints in Hugging Face layout, quantised and exported on a CPU.

amd-quark 0.13, transformers 5.17.0, torch 2.13.0. Calibration runs on random token ids.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from quark.torch import ModelQuantizer, export_safetensors
from quark.torch.kernel.hw_emulation.hw_emulation_interface import dequantize_impl
from quark.torch.quantization.config.config import (
    DataTypeSpec,
    FP8E4M3PerChannelSpec,
    FP8E4M3PerTensorSpec,
    Int8PerChannelSpec,
    Int8PerTensorSpec,
    OCP_MXFP4Spec,
    QConfig,
    QLayerConfig,
)
from quark.torch.utils.pack import Pack_fp4
from torch import Tensor

from tests.quantised.common import SMALL, keep_fixture, module_of, random_model, tensors_of, write_reference

CODE = "quark.torch.kernel.hw_emulation dequantize_impl, float32"


def dequantised(module: Mapping[str, Tensor]) -> Tensor:
    """Quark's own functions on what the files hold."""
    weight, scale = module["weight"], module["weight_scale"]
    if weight.dtype == torch.uint8:
        values = Pack_fp4(None, "fp4").unpack(weight, reorder=False)
        return dequantize_impl("fp4", values, torch.exp2(scale.float() - 127), None, -1, 32, "per_group")
    kind = "int8" if weight.dtype == torch.int8 else "fp8_e4m3"
    scheme = "per_channel" if scale.dim() else "per_tensor"
    zero = module.get("weight_zero_point")
    return dequantize_impl(kind, weight.float(), scale.float(), zero, 0, None, scheme)


def fixture(name: str, weight: DataTypeSpec, activation: DataTypeSpec | None = None) -> None:
    if sys.argv[1:] and name not in sys.argv[1:]:
        return
    inputs = activation and activation.to_quantization_spec()
    layers = QLayerConfig(weight=weight.to_quantization_spec(), input_tensors=inputs)
    ids = torch.randint(3, 64, (8, 32), generator=torch.Generator().manual_seed(2))
    quantiser = ModelQuantizer(QConfig(global_quant_config=layers, exclude=["lm_head"]))
    with tempfile.TemporaryDirectory() as folder:
        model = quantiser.freeze(quantiser.quantize_model(random_model("llama", SMALL), [ids]))
        with torch.no_grad():
            export_safetensors(model, folder, weight_format="real_quantized", pack_method="order")
        kept = keep_fixture(name, Path(folder))
    tensors = tensors_of(kept)
    found = {}
    for module in sorted({key.rpartition(".")[0] for key in tensors if key.endswith(".weight_scale")}):
        found[module] = dequantised(module_of(tensors, module))
    write_reference(name, CODE, found)
    print(name, sorted({key.rpartition(".")[2] for key in tensors}), flush=True)


def main() -> None:
    fixture("quark-fp8", FP8E4M3PerTensorSpec(), FP8E4M3PerTensorSpec())
    fixture("quark-fp8-channel", FP8E4M3PerChannelSpec(ch_axis=0), FP8E4M3PerChannelSpec(ch_axis=1, is_dynamic=True))
    rounding = {"symmetric": True, "scale_type": "float", "round_method": "half_even", "is_dynamic": False}
    fixture("quark-int8", Int8PerChannelSpec(ch_axis=0, **rounding), Int8PerTensorSpec("min_max", **rounding))
    fixture("quark-mxfp4", OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False), OCP_MXFP4Spec(ch_axis=-1, is_dynamic=True))


if __name__ == "__main__":
    main()
