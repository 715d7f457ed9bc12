"""GPTQ as GPTQModel quantises and writes it, on a CPU; its AWQ asks for CUDA, so auto-round writes that.

GPTQModel 7.6.0, transformers 5.17.0, torch 2.13.0. Calibration runs on random token ids.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from torch import Tensor

from tests.quantised.common import (
    DENSE,
    FIXTURES,
    SMALL,
    keep_fixture,
    module_of,
    numbers_as_words,
    random_model,
    tensors_of,
    write_reference,
)


def calibration() -> list[dict[str, list[int]]]:
    ids = torch.randint(3, 64, (32, 32), generator=torch.Generator().manual_seed(2)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 32} for row in ids]


def gptq(module: Mapping[str, Tensor], older: bool) -> Tensor:
    """TorchLinear's weight, its scales in float32; `older` files hold each zero less one."""
    groups, rows = module["scales"].shape
    bits = 32 * module["qzeros"].shape[1] // rows
    columns = module["qweight"].shape[0] * 32 // bits
    sequential = torch.arange(columns, dtype=torch.int32) // (columns // groups)
    linear = TorchLinear(bits, columns // groups, False, False, columns, rows, register_buffers=False)
    linear.qweight, linear.qzeros = module["qweight"], module["qzeros"].clone()
    linear.scales, linear.g_idx = module["scales"].float(), module.get("g_idx", sequential)
    if older:
        stored = linear.qzeros[..., None] >> torch.arange(0, 32, bits, dtype=torch.int32) & (1 << bits) - 1
        assert stored.max() < (1 << bits) - 1, "the addition would carry into the next zero"
        convert_gptq_v1_to_v2_format_module(linear, bits, torch.int32)
    return linear.dequantize_weight().T


def awq(module: Mapping[str, Tensor]) -> Tensor:
    groups = module["qweight"].shape[0] // module["scales"].shape[0]
    return dequantize_gemm(module["qweight"], module["qzeros"], module["scales"].float(), 4, groups).T


def reference(name: str) -> None:
    """The dequantised weights of a fixture by GPTQModel's own code."""
    described = json.loads((FIXTURES / name / "config.json").read_text())["quantization_config"]
    tensors = tensors_of(FIXTURES / name)
    packed_as_awq = described["quant_method"] == "awq"
    older = described.get("checkpoint_format", "gptq") != "gptq_v2"
    found = {}
    for module in sorted({key.rpartition(".")[0] for key in tensors if key.endswith(".qweight")}):
        local = module_of(tensors, module)
        found[module] = awq(local) if packed_as_awq else gptq(local, older)
    code = "gptqmodel " + ("dequantize_gemm" if packed_as_awq else "TorchLinear.dequantize_weight")
    write_reference(name, f"{code}, scales in float32, transposed to [out, in]", found)


def fixture(
    name: str,
    model_type: str = "llama",
    config: Mapping[str, Any] = SMALL,
    dtype: torch.dtype = torch.float16,
    **how: Any,
) -> None:
    if sys.argv[1:] and name not in sys.argv[1:]:
        return
    with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as folder:
        random_model(model_type, config, dtype).save_pretrained(source)
        numbers_as_words().save_pretrained(source)
        settings = QuantizeConfig(**({"bits": 4, "group_size": 32, "device": "cpu", "offload_to_disk": False} | how))
        model = GPTQModel.load(source, settings, backend=BACKEND.AUTO, dtype=dtype)
        model.quantize(calibration(), batch_size=4)
        model.save(folder)
        kept = keep_fixture(name, Path(folder))
    reference(name)
    print(name, sorted({key.rpartition(".")[2] for key in tensors_of(kept)}), flush=True)


def main() -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its loader asks for two, and two cores give one
    fixture("gptq-int4", config=DENSE, desc_act=False)
    fixture("gptq-int8", desc_act=False, bits=8)
    fixture("gptq-int4-asym", "qwen3", desc_act=False, sym=False)
    fixture("gptq-int4-desc-act", desc_act=True, act_group_aware=False)
    fixture("gptq-int4-channel", desc_act=False, act_group_aware=False, group_size=-1)
    fixture("gptq-int4-v2", desc_act=False, sym=False, format="gptq_v2")
    rules = {r"+:.*\.down_proj$": {"bits": 8, "group_size": 64}, r"-:.*\.0\.self_attn\.o_proj$": {}}
    fixture("gptq-dynamic", desc_act=False, dynamic=rules)


if __name__ == "__main__":
    main()
