"""Formats that no tool writes on a CPU, by their published formulas: hand-made.

transformers 5.17.0 and compressed-tensors 0.19.0 dequantise them; torch 2.13.0.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.quantised.common import (
    DENSE,
    EXPERTS,
    SMALL,
    config_of,
    random_model,
    saved_names,
    write_fixture,
    write_reference,
)
from tests.quantised.make_llm_compressor import NVFP4_REASON, NVFP4_TOLERANCE, dequantised
from tests.quantised.make_transformers import CODE, LINEAR, SMALL_DEEPSEEK, fp8_config, in_blocks, quantizer

FP8_MAX = 448.0
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4_LARGEST_EXPONENT = 2


def tensors_and_config(model_type: str, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = random_model(model_type, config)
    with tempfile.TemporaryDirectory() as folder:
        return saved_names(model, Path(folder)), config_of(model)


def back(weight: Tensor, scale: Tensor) -> Tensor:
    return Fp8Dequantize(quantizer([1, 1]))._dequantize_one(weight, scale, torch.float32)


def fp8_per_tensor(name: str) -> None:
    """One scale a matrix and one for its activations, under the names that AutoFP8 gave them."""
    tensors, config = tensors_and_config("llama", SMALL)
    written, found = dict(tensors), {}
    for key in filter(LINEAR.search, tensors):
        module, weight = key.removesuffix(".weight"), tensors[key].float()
        scale = weight.abs().max() / FP8_MAX
        written[key] = (weight / scale).to(torch.float8_e4m3fn)
        written[f"{module}.weight_scale"] = scale
        written[f"{module}.input_scale"] = torch.tensor(0.01 + 0.001 * len(found))
        found[module] = back(written[key], scale)
    how = {"activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8"}
    write_fixture(name, config | {"quantization_config": how}, written)
    write_reference(name, CODE, found)


def fbgemm(name: str) -> None:
    """A scale for each row, and a bound for the scales of the activations."""
    tensors, config = tensors_and_config("llama", SMALL)
    written, found = dict(tensors), {}
    for key in filter(LINEAR.search, tensors):
        module, weight = key.removesuffix(".weight"), tensors[key].float()
        scale = weight.abs().amax(1, keepdim=True) / FP8_MAX
        written[key] = (weight / scale).to(torch.float8_e4m3fn)
        written[f"{module}.weight_scale"] = scale
        written[f"{module}.input_scale_ub"] = torch.tensor([1200.0])
        found[module] = back(written[key], scale)
    how = {"activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"], "quant_method": "fbgemm_fp8"}
    write_fixture(name, config | {"quantization_config": how}, written)
    write_reference(name, CODE, found)


def in_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two E2M1 values in a byte, the first in the low half, and a power of two for 32 values: bytes and exponents."""
    blocks = weight.float().unflatten(-1, (-1, 32))
    exponent = blocks.abs().amax(-1).log2().floor() - FP4_LARGEST_EXPONENT
    scaled = blocks / exponent.exp2()[..., None]
    codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    codes = codes.flatten(-2)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponent + 127).to(torch.uint8)


def gpt_oss(name: str) -> None:
    """The published layout: experts stacked, rows of gate and up by turns, blocks of 32 values in 16 bytes."""
    sizes = DENSE | {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["full_attention"],
    }
    tensors, config = tensors_and_config("gpt_oss", sizes)
    written, found = dict(tensors), {}
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        packed, scales = in_fp4(written.pop(key).transpose(1, 2))  # transformers holds them as [expert, in, out]
        written[f"{key}_blocks"] = packed.unflatten(-1, (-1, 16))
        written[f"{key}_scales"] = scales
        dense = convert_moe_packed_tensors(written[f"{key}_blocks"], scales, dtype=torch.float32)
        found[key] = dense.transpose(1, 2)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    how = {"modules_to_not_convert": skipped, "quant_method": "mxfp4"}
    write_fixture(name, config | {"quantization_config": how}, written)
    write_reference(
        name, "transformers.integrations.mxfp4.convert_moe_packed_tensors, float32, [expert, out, in]", found
    )


def fp4_experts(name: str) -> None:
    """DeepSeek-V4's formats and scale names under DeepSeek-V3's module names: FP4 experts, all else in FP8 blocks."""
    tensors, config = tensors_and_config("deepseek_v3", SMALL_DEEPSEEK | {"num_nextn_predict_layers": 0})
    experts = [key for key in tensors if ".experts." in key]
    linears = [key for key in tensors if LINEAR.search(key) and key not in experts]
    block = [32, 32]
    written, found = in_blocks(tensors, linears, block, torch.float8_e8m0fnu, "ue8m0")
    for key in experts:
        module = key.removesuffix(".weight")
        packed, exponents = in_fp4(tensors[key])
        written[key] = packed.view(torch.int8)
        written[f"{module}.weight_scale_inv"] = exponents.view(torch.float8_e8m0fnu)
        found[module] = back(written[key], written[f"{module}.weight_scale_inv"])
    renamed = {key.replace(".weight_scale_inv", ".scale"): tensor for key, tensor in written.items()}
    how = fp8_config(block, scale_fmt="ue8m0")
    write_fixture(name, config | {"expert_dtype": "fp4", "quantization_config": how}, renamed)
    write_reference(name, CODE, found)


def group_order(name: str) -> None:
    """compressed-tensors INT4 whose columns belong to groups out of order, `weight_g_idx`, as it was written to 2025.

    Its older code sorted columns by group before it quantised and put them back afterwards; today's refuses, so it
    compresses and decompresses the sorted weight here.
    """
    tensors, config = tensors_and_config("llama", SMALL)
    written, found = dict(tensors), {}
    arguments = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments), format="pack-quantized")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for number, key in enumerate(filter(LINEAR.search, tensors)):
        module, weight = key.removesuffix(".weight"), written.pop(key).float()
        columns = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(number))
        groups = torch.empty_like(columns).scatter_(0, columns, torch.arange(weight.shape[1]) // 32)
        scale = (weight[:, columns].unflatten(1, (-1, 32)).abs().amax(2) / 7.5).to(torch.bfloat16)
        packed = compressor.compress({"weight": weight[:, columns], "weight_scale": scale.float()}, scheme)
        plain = compressor.decompress(packed, scheme)["weight"]
        found[module] = torch.empty_like(plain).index_copy_(1, columns, plain)
        unsorted = torch.empty_like(plain).index_copy_(1, columns, plain / scale.float().repeat_interleave(32, 1))
        whole = QuantizationScheme(
            targets=["Linear"], weights=QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="channel")
        )
        codes = compressor.compress({"weight": unsorted, "weight_scale": torch.ones(weight.shape[0], 1)}, whole)
        written[f"{module}.weight_packed"] = codes["weight_packed"]
        written[f"{module}.weight_shape"] = codes["weight_shape"]
        written[f"{module}.weight_scale"] = scale
        written[f"{module}.weight_g_idx"] = groups.to(torch.int32)
    how = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments | {"actorder": "group"}}},
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    write_fixture(name, config | {"quantization_config": how}, written)
    write_reference(name, "compressed_tensors decompress (pack-quantized) of the sorted columns, float32", found)


def unequal_global_scales(name: str) -> None:
    """NVFP4 whose matrices have a global scale each: llm-compressor and ModelOpt give q, k, v and gate, up one."""
    tensors, config = tensors_and_config("qwen3_moe", EXPERTS)
    written, found = dict(tensors), {}
    group = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    inputs = group | {"dynamic": "local"}
    scheme = QuantizationScheme(
        targets=["Linear"], weights=group, input_activations=inputs, format="nvfp4-pack-quantized"
    )
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    for number, key in enumerate(filter(LINEAR.search, tensors)):
        module, weight = key.removesuffix(".weight"), written.pop(key).float()
        divisor = FP8_MAX * E2M1[-1] / weight.abs().max().reshape(1)
        largest = weight.unflatten(1, (-1, 16)).abs().amax(2)
        scale = (largest / E2M1[-1] * divisor).to(torch.float8_e4m3fn).float()
        local = {"weight": weight, "weight_scale": scale, "weight_global_scale": divisor}
        local = compressor.compress(local, scheme) | {"input_global_scale": torch.tensor([300.0 + number])}
        written |= {f"{module}.{companion}": tensor for companion, tensor in local.items()}
        found[module] = dequantised(local, scheme)
    how = {
        "config_groups": {"group_0": {"input_activations": inputs, "targets": ["Linear"], "weights": group}},
        "format": "nvfp4-pack-quantized",
        "ignore": ["lm_head", "model.layers.0.mlp.gate"],
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    write_fixture(name, config | {"quantization_config": how}, written)
    code = "compressed_tensors decompress (nvfp4-pack-quantized), float32"
    write_reference(name, code, found, tolerance=NVFP4_TOLERANCE, why=NVFP4_REASON)


def main() -> None:
    fp8_per_tensor("fp8-tensor-static")
    fbgemm("fbgemm-fp8")
    gpt_oss("mxfp4-gpt-oss")
    fp4_experts("fp4-experts-deepseek")
    group_order("ct-int4-g-idx")
    unequal_global_scales("ct-nvfp4-unequal-scales")


if __name__ == "__main__":
    main()
