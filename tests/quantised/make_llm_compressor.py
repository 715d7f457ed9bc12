"""compressed-tensors checkpoints as llm-compressor writes them, on a CPU.

llm-compressor 0.14.0.1, compressed-tensors 0.19.0, transformers 5.17.0, torch 2.13.0. Calibration, where a scheme asks
for it, runs on random token ids.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.quantised.common import (
    DENSE,
    EXPERTS,
    SMALL,
    keep_fixture,
    module_of,
    numbers_as_words,
    random_model,
    tensors_of,
    write_reference,
)

NVFP4_TOLERANCE = 1.2e-7
NVFP4_REASON = "theirs, run in float32, divides the block's scale by the global scale first: two roundings"
EXPERTS_AS_THEY_ARE = ["lm_head", "re:.*mlp.gate$"]


def weights(**arguments: Any) -> QuantizationArgs:
    return QuantizationArgs(**({"num_bits": 4, "type": "int", "symmetric": True} | arguments))


def grouped(bits: int = 4, size: int = 32, **more: Any) -> QuantizationArgs:
    return weights(num_bits=bits, strategy="group", group_size=size, **more)


def linears(scheme: QuantizationArgs, targets: str | list[str] = "Linear", **more: Any) -> dict[str, Any]:
    targets = [targets] if isinstance(targets, str) else targets
    return {"config_groups": {"group_0": QuantizationScheme(targets=targets, weights=scheme, **more)}}


def calibration() -> Dataset:
    ids = torch.randint(3, 64, (16, 32), generator=torch.Generator().manual_seed(2)).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 32] * 16})


def dequantised(module: Mapping[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """compressed_tensors' own decompression, its floating scales raised to float32 beforehand, which is exact."""
    name = CompressionFormat(scheme.format).value
    if name == "nvfp4-pack-quantized":
        packed = module["weight_packed"]
        values = unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2, dtype=torch.float32)
        scale, divisor = module["weight_scale"].float(), module["weight_global_scale"]
        return dequantize(values, scale, args=scheme.weights, global_scale=divisor, dtype=torch.float32)
    local = {key: value.float() if value.dtype == torch.bfloat16 else value for key, value in module.items()}
    return BaseCompressor.get_value_from_registry(name).decompress(local, scheme)["weight"]


def fixture(
    name: str,
    recipe: QuantizationModifier | GPTQModifier,
    model_type: str = "llama",
    config: Mapping[str, Any] = SMALL,
    calibrated: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    if sys.argv[1:] and name not in sys.argv[1:]:
        return
    source = tempfile.TemporaryDirectory()
    random_model(model_type, config, dtype).save_pretrained(source.name)
    model = AutoModelForCausalLM.from_pretrained(source.name, dtype=dtype)
    if calibrated:
        oneshot(
            model=model,
            recipe=recipe,
            dataset=calibration(),
            processor=numbers_as_words(),
            num_calibration_samples=16,
            max_seq_length=32,
        )
    else:
        oneshot(model=model, recipe=recipe, pipeline="datafree")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_compressed=True)
        kept = keep_fixture(name, Path(folder))
    tensors = tensors_of(kept)
    found: dict[str, Tensor] = {}
    kinds = set()
    for module, part in model.named_modules():
        scheme = getattr(part, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            prefix = module + "."
            local = {key.removeprefix(prefix): t for key, t in tensors.items() if key.rpartition(".")[0] == module}
            found[module] = dequantised(local, scheme)
            kinds.add(CompressionFormat(scheme.format).value)
    rounds = "nvfp4-pack-quantized" in kinds
    tolerance, why = (NVFP4_TOLERANCE, NVFP4_REASON) if rounds else (0.0, "")
    code = f"compressed_tensors decompress ({', '.join(sorted(kinds))}), float32"
    write_reference(name, code, found, tolerance=tolerance, why=why)
    print(name, sorted({key.rpartition(".")[2] for key in tensors}), flush=True)


def nested(name: str) -> None:
    """A vision-language model; the entry is moved by hand to where some publishers have it, the text config."""
    if sys.argv[1:] and name not in sys.argv[1:]:
        return
    text = SMALL | {"model_type": "mistral"}
    sight = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    sight |= {"model_type": "pixtral", "image_size": 28, "patch_size": 14}
    source = tempfile.TemporaryDirectory()
    config = {"text_config": text, "vision_config": sight, "tie_word_embeddings": False}
    random_model("mistral3", config, kind=AutoModelForImageTextToText).save_pretrained(source.name)
    model = AutoModelForImageTextToText.from_pretrained(source.name, dtype=torch.bfloat16)
    apart = ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
    oneshot(model=model, recipe=plain(linears(grouped()), apart), pipeline="datafree")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_compressed=True)
        kept = keep_fixture(name, Path(folder))
    described = json.loads((kept / "config.json").read_text())
    described["text_config"]["quantization_config"] = described.pop("quantization_config")
    (kept / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    tensors = tensors_of(kept)
    scheme = QuantizationScheme(targets=["Linear"], weights=grouped(), format="pack-quantized")
    found = {}
    for module in [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]:
        found[module] = dequantised(module_of(tensors, module), scheme)
    write_reference(name, "compressed_tensors decompress (pack-quantized), float32", found)
    print(name, sorted({key.rpartition(".")[2] for key in tensors}), flush=True)


def plain(scheme: str | dict[str, Any], ignore: list[str] | None = None, **more: Any) -> QuantizationModifier:
    chosen = scheme if isinstance(scheme, dict) else {"targets": ["Linear"], "scheme": scheme}
    return QuantizationModifier(ignore=ignore or ["lm_head"], **chosen, **more)


def main() -> None:
    fixture("ct-int4-group", plain(linears(grouped())), config=DENSE)
    fixture("ct-int4-asym-group", plain(linears(grouped(symmetric=False))), "qwen3", DENSE)
    fixture("ct-int4-channel", plain(linears(weights(strategy="channel"))))
    fixture("ct-int4-asym-channel", plain(linears(weights(strategy="channel", symmetric=False))))
    fixture("ct-int8-pack-group", plain(linears(grouped(8))))
    fixture("ct-int3-group", plain(linears(grouped(3))))
    fixture("ct-int3-asym-group", plain(linears(grouped(3, symmetric=False))))
    several = {
        "config_groups": {
            "group_0": QuantizationScheme(targets=["re:.*self_attn.*"], weights=grouped(8, 64)),
            "group_1": QuantizationScheme(targets=["re:.*(gate|up)_proj"], weights=grouped(4, 32, symmetric=False)),
            "group_2": QuantizationScheme(targets=["re:.*down_proj"], weights=weights(num_bits=8, strategy="channel")),
        }
    }
    fixture("ct-int-mixed-groups", plain(several))
    fixture("ct-fp8-channel", plain("FP8_DYNAMIC"))
    cache = QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True)
    fixture("ct-fp8-static-kv", plain("FP8", kv_cache_scheme=cache), calibrated=True)
    heads = QuantizationArgs(num_bits=8, type="float", strategy="attn_head", dynamic=False, symmetric=True)
    fixture("ct-fp8-kv-per-head", plain("FP8_DYNAMIC", kv_cache_scheme=heads), calibrated=True)
    fixture("ct-fp8-static-phi3", plain("FP8"), "phi3", calibrated=True)
    nested("ct-int4-nested-text-config")
    fixture("ct-int8-w8a8", plain("W8A8"))
    static = QuantizationArgs(num_bits=8, type="int", strategy="tensor", symmetric=False)
    fixture(
        "ct-int8-static",
        plain(linears(weights(num_bits=8, strategy="channel"), input_activations=static)),
        calibrated=True,
    )
    fixture("ct-nvfp4", plain("NVFP4"), calibrated=True)
    fixture("ct-nvfp4-weights-only", plain("NVFP4A16"))
    fixture("ct-mxfp4", plain("MXFP4A16"))
    fixture("ct-mxfp8", plain("MXFP8"))
    block = weights(num_bits=8, type="float", strategy="block", block_structure=[32, 32])
    tokens = QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=32, dynamic=True, symmetric=True)
    fixture("ct-fp8-block", plain(linears(block, input_activations=tokens)))
    fixture("ct-int4-qwen3-moe", plain(linears(grouped()), EXPERTS_AS_THEY_ARE), "qwen3_moe", EXPERTS)
    fixture("ct-fp8-channel-qwen3-moe", plain("FP8_DYNAMIC", EXPERTS_AS_THEY_ARE), "qwen3_moe", EXPERTS)
    fixture("ct-nvfp4-qwen3-moe", plain("NVFP4", EXPERTS_AS_THEY_ARE), "qwen3_moe", EXPERTS, calibrated=True)
    fixture(
        "ct-fp8-nvfp4-mixed-precision",
        plain(
            {
                "config_groups": {
                    "group_0": QuantizationScheme(
                        targets=["re:.*self_attn.*"],
                        weights=weights(num_bits=8, type="float", strategy="channel"),
                        input_activations=QuantizationArgs(
                            num_bits=8, type="float", strategy="token", dynamic=True, symmetric=True
                        ),
                    ),
                    "group_1": QuantizationScheme(
                        targets=["re:.*mlp.*"],
                        weights=weights(type="float", strategy="tensor_group", group_size=16),
                    ),
                }
            }
        ),
    )
    fixture(
        "ct-int4-actorder-weight",
        GPTQModifier(ignore=["lm_head"], block_size=32, **linears(grouped(actorder="weight"))),
        calibrated=True,
    )


if __name__ == "__main__":
    main()
