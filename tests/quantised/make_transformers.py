"""FP8 blocks and gpt-oss MXFP4 by transformers' own quantising and dequantising code, on a CPU.

transformers 5.17.0, torch 2.13.0. transformers refuses to quantise a model to FP8 without a GPU, so its `Fp8Quantize`
is called on each weight; names, config.json and file layout are those of published checkpoints.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from tests.quantised.common import DENSE, EXPERTS, SMALL, WIDE, config_of, random_model, saved_names, write_fixture
from tests.quantised.common import write_reference as keep

LINEAR = re.compile(r"(?<!eh)_proj(_with_mqa)?\.weight$")
DEEPSEEK: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 0,
}
"""kv_a_proj_with_mqa has 192 rows: one and a half blocks."""
SMALL_DEEPSEEK = DEEPSEEK | {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_nextn_predict_layers": 1,
}
"""The same shape for blocks of 32, kv_a_proj_with_mqa with 48 rows, and a layer that predicts one token further."""


def quantizer(block: list[int], scale_fmt: str = "float") -> FineGrainedFP8HfQuantizer:
    config = FineGrainedFP8Config(weight_block_size=tuple(block))
    config.scale_fmt = scale_fmt
    return FineGrainedFP8HfQuantizer(config)


def whole_blocks(weight: Tensor, block: list[int]) -> Tensor:
    """Zeros behind the last row and column up to whole blocks, as DeepSeek describes its partial blocks."""
    return pad(weight, (0, -weight.shape[-1] % block[1], 0, -weight.shape[-2] % block[0]))


def in_blocks(
    tensors: Mapping[str, Tensor], chosen: Iterable[str], block: list[int], scale: torch.dtype, scale_fmt: str = "float"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The checkpoint with the chosen weights in FP8 blocks, and what transformers makes of them in float32."""
    names = set(chosen)
    written: dict[str, Tensor] = {}
    dequantised: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in names:
            written[name] = tensor
            continue
        rows, columns = tensor.shape[-2:]
        pair = Fp8Quantize(quantizer(block, scale_fmt))._quantize_one(name, whole_blocks(tensor, block))
        weight, scales = pair.pop(name), next(iter(pair.values()))
        scale_name = name.removesuffix(".weight") + (".weight_scale_inv" if name.endswith(".weight") else "_scale_inv")
        written[name] = weight[..., :rows, :columns]
        written[scale_name] = scales.to(scale)
        back = Fp8Dequantize(quantizer(block))._dequantize_one(
            whole_blocks(written[name], block), written[scale_name], torch.float32
        )
        dequantised[name.removesuffix(".weight")] = back[..., :rows, :columns]
    return written, dequantised


def fp8_config(block: list[int], **more: Any) -> dict[str, Any]:
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": block} | more


CODE = "transformers.integrations.finegrained_fp8.Fp8Dequantize to float32"


def fp8_blocks(
    name: str,
    model_type: str,
    config: Mapping[str, Any],
    block: int,
    scale: torch.dtype = torch.float32,
    left_out: tuple[str, ...] = (),
    listed: bool = False,
    **quantization: Any,
) -> None:
    """Linears of the layers in blocks; `left_out` names modules that stay as they are, and the config lists them."""
    model = random_model(model_type, config)
    with tempfile.TemporaryDirectory() as folder:
        tensors = saved_names(model, Path(folder))
    if config.get("num_nextn_predict_layers"):
        tensors |= next_token_layer(tensors, config)
    chosen = [key for key in tensors if LINEAR.search(key) and key.removesuffix(".weight") not in left_out]
    written, back = in_blocks(tensors, chosen, [block, block], scale, quantization.get("scale_fmt", "float"))
    more = quantization | ({"modules_to_not_convert": ["lm_head", *left_out]} if listed else {})
    described = config_of(model) | {"quantization_config": fp8_config([block, block], **more)}
    if "num_nextn_predict_layers" in config:
        described["num_nextn_predict_layers"] = config["num_nextn_predict_layers"]
    write_fixture(name, described, written)
    keep(name, CODE, back)


def next_token_layer(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """DeepSeek-V3's further layer, which transformers does not build: the last layer's tensors and five of its own."""
    last, further = (f"model.layers.{config['num_hidden_layers'] + step}." for step in (-1, 0))
    layer = {further + name.removeprefix(last): t.flip(0) for name, t in tensors.items() if name.startswith(last)}
    layer |= {
        further + f"{norm}.weight": tensors["model.norm.weight"].clone()
        for norm in ("enorm", "hnorm", "shared_head.norm")
    }
    layer[further + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    layer[further + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    halves = [tensors["model.layers.0.self_attn.o_proj.weight"][:, : config["hidden_size"]]] * 2
    layer[further + "eh_proj.weight"] = torch.cat(halves, 1).clone()
    return layer


def stacked_experts(name: str) -> None:
    """Experts as transformers 5 holds them, [expert, out, in], with the scales of each."""
    model = random_model("qwen3_moe", EXPERTS)
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    chosen = [
        key for key in tensors if LINEAR.search(key) or key.endswith(("experts.gate_up_proj", "experts.down_proj"))
    ]
    written, back = in_blocks(tensors, chosen, [32, 32], torch.float32)
    skipped = ["lm_head", "model.layers.0.mlp.gate"]
    write_fixture(
        name, config_of(model) | {"quantization_config": fp8_config([32, 32], modules_to_not_convert=skipped)}, written
    )
    keep(name, CODE, back)


def main() -> None:
    fp8_blocks("fp8-block-llama", "llama", WIDE, 128)
    fp8_blocks("fp8-block-deepseek", "deepseek_v3", DEEPSEEK, 128)
    fp8_blocks("fp8-block-deepseek-mtp", "deepseek_v3", SMALL_DEEPSEEK, 32)
    skipped = ("model.layers.1.self_attn.o_proj",)
    fp8_blocks("fp8-block-qwen3", "qwen3", DENSE, 32, torch.bfloat16, skipped, listed=True)
    ue8m0 = {"scale_fmt": "ue8m0"}
    fp8_blocks("fp8-block-ue8m0", "llama", SMALL, 32, torch.float8_e8m0fnu, **ue8m0)
    sizes = {"moe_intermediate_size": 128, "head_dim": 64}
    fp8_blocks("fp8-block-qwen3-moe", "qwen3_moe", EXPERTS | sizes, 64, torch.bfloat16, listed=True)
    stacked_experts("fp8-block-stacked-experts")


if __name__ == "__main__":
    main()
