"""The fixtures, one row each: README.md holds this table, and the test holds the files against it.

`python -m tests.quantised.fixture_table` prints the table for README.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
REFERENCES = HERE / "references"

TRANSFORMERS = "transformers 5.17.0"
LLM_COMPRESSOR = "llm-compressor 0.14.0.1"
MODELOPT = "ModelOpt 0.47.0"
AUTO_ROUND = "auto-round 0.15.1"
GPTQMODEL = "GPTQModel 7.6.0"
QUARK = "Quark 0.13"
HAND_MADE = "hand-made"

BLOCK = {".weight": "F8_E4M3", ".weight_scale_inv": "F32"}
BLOCK_BF16 = BLOCK | {".weight_scale_inv": "BF16"}
PACKED = {".weight_packed": "I32", ".weight_scale": "BF16", ".weight_shape": "I64"}
ASYMMETRIC = PACKED | {".weight_zero_point": "I32"}
CHANNEL = {".weight": "F8_E4M3", ".weight_scale": "BF16"}
NVFP4 = {".weight_packed": "U8", ".weight_scale": "F8_E4M3", ".weight_global_scale": "F32"}
NVFP4_BOTH = NVFP4 | {".input_global_scale": "F32"}
SCALAR = {".weight": "F8_E4M3", ".weight_scale": "F32", ".input_scale": "F32"}
MODELOPT_NVFP4 = {".weight": "U8", ".weight_scale": "F8_E4M3", ".weight_scale_2": "F32"}
KV = {".k_scale": "F32", ".v_scale": "F32"}
GPTQ = {".qweight": "I32", ".qzeros": "I32", ".scales": "F16", ".g_idx": "I32"}
AWQ = {".qweight": "I32", ".qzeros": "I32", ".scales": "F16"}


@dataclass(frozen=True)
class Fixture:
    """`kinds`: the companions of a quantised module and their dtypes, one dict for each kind of module there is.

    `besides`: suffixes of further tensors that are no companion of a weight or stand at some modules alone.
    """

    name: str
    format: str
    tool: str
    model: str
    kinds: tuple[dict[str, str], ...]
    besides: dict[str, str] = field(default_factory=dict)
    remark: str = ""


TABLE = (
    Fixture("fp8-block-llama", "FP8 block, 128×128", TRANSFORMERS, "llama", (BLOCK,)),
    Fixture(
        "fp8-block-deepseek",
        "FP8 block, 128×128",
        TRANSFORMERS,
        "deepseek_v3: MLA, experts one by one, shared expert",
        (BLOCK,),
        remark="kv_a_proj_with_mqa has 192 rows: a partial last block",
    ),
    Fixture(
        "fp8-block-deepseek-mtp",
        "FP8 block, 32×32",
        TRANSFORMERS,
        "deepseek_v3: a dense and a sparse layer, MTP layer",
        (BLOCK,),
        remark="kv_a_proj_with_mqa has 48 rows; eh_proj is not quantised",
    ),
    Fixture(
        "fp8-block-qwen3",
        "FP8 block, 32×32, BF16 scales",
        TRANSFORMERS,
        "qwen3",
        (BLOCK_BF16,),
        remark="o_proj of layer 1 is not quantised and listed",
    ),
    Fixture("fp8-block-qwen3-moe", "FP8 block, 64×64, BF16 scales", TRANSFORMERS, "qwen3_moe", (BLOCK_BF16,)),
    Fixture(
        "fp8-block-stacked-experts",
        "FP8 block, 32×32",
        TRANSFORMERS,
        "qwen3_moe, experts stacked as transformers 5 holds them",
        (BLOCK, {"": "F8_E4M3", "_scale_inv": "F32"}),
    ),
    Fixture(
        "fp8-block-ue8m0",
        "FP8 block, 32×32, `scale_fmt: ue8m0`",
        TRANSFORMERS,
        "llama",
        (BLOCK | {".weight_scale_inv": "F8_E8M0"},),
    ),
    Fixture("fp8-tensor-static", "FP8 per tensor, `fp8`, static", HAND_MADE, "llama", (SCALAR,)),
    Fixture(
        "fbgemm-fp8",
        "FBGEMM_FP8",
        HAND_MADE,
        "llama",
        ({".weight": "F8_E4M3", ".weight_scale": "F32", ".input_scale_ub": "F32"},),
    ),
    Fixture("ct-int4-group", "CT pack-quantized INT4, groups of 32", LLM_COMPRESSOR, "llama", (PACKED,)),
    Fixture("ct-int4-asym-group", "CT pack-quantized INT4, asymmetric", LLM_COMPRESSOR, "qwen3", (ASYMMETRIC,)),
    Fixture("ct-int4-channel", "CT pack-quantized INT4, channel", LLM_COMPRESSOR, "llama", (PACKED,)),
    Fixture(
        "ct-int4-asym-channel", "CT pack-quantized INT4, channel, asymmetric", LLM_COMPRESSOR, "llama", (ASYMMETRIC,)
    ),
    Fixture("ct-int8-pack-group", "CT pack-quantized INT8, groups of 32", LLM_COMPRESSOR, "llama", (PACKED,)),
    Fixture("ct-int3-group", "CT pack-quantized INT3, groups of 32", LLM_COMPRESSOR, "llama", (PACKED,)),
    Fixture("ct-int3-asym-group", "CT pack-quantized INT3, asymmetric", LLM_COMPRESSOR, "llama", (ASYMMETRIC,)),
    Fixture(
        "ct-int-mixed-groups",
        "CT pack-quantized, three config groups",
        LLM_COMPRESSOR,
        "llama",
        (PACKED, ASYMMETRIC),
        remark="attention 8 bits in groups of 64; gate and up 4 bits, asymmetric, in groups of 32; down 8 bits",
    ),
    Fixture("ct-int4-actorder-weight", "CT pack-quantized INT4, actorder weight", LLM_COMPRESSOR, "llama", (PACKED,)),
    Fixture(
        "ct-int4-g-idx",
        "CT pack-quantized INT4, actorder group",
        HAND_MADE,
        "llama",
        (PACKED | {".weight_g_idx": "I32"},),
        remark="llm-compressor 0.14 writes it no more",
    ),
    Fixture(
        "ct-int4-nested-text-config",
        "CT pack-quantized INT4, groups of 32",
        LLM_COMPRESSOR,
        "mistral3: vision tower not quantised",
        (PACKED,),
        remark="quantization_config moved by hand from config.json's top into its text_config",
    ),
    Fixture("ct-int4-qwen3-moe", "CT pack-quantized INT4, groups of 32", LLM_COMPRESSOR, "qwen3_moe", (PACKED,)),
    Fixture("ct-fp8-channel", "CT float-quantized, channel, dynamic", LLM_COMPRESSOR, "llama", (CHANNEL,)),
    Fixture(
        "ct-fp8-static-kv",
        "CT float-quantized, per tensor, static; CT KV cache",
        LLM_COMPRESSOR,
        "llama",
        (CHANNEL | {".input_scale": "BF16"},),
        {".k_scale": "BF16", ".v_scale": "BF16"},
    ),
    Fixture(
        "ct-fp8-kv-per-head",
        "CT float-quantized, channel, dynamic; CT KV cache per head",
        LLM_COMPRESSOR,
        "llama",
        (CHANNEL,),
        {".k_scale": "BF16", ".v_scale": "BF16"},
    ),
    Fixture(
        "ct-fp8-static-phi3",
        "CT float-quantized, per tensor, static",
        LLM_COMPRESSOR,
        "phi3",
        (CHANNEL | {".input_scale": "BF16"},),
        remark="qkv_proj and gate_up_proj fused on disk, one scale each",
    ),
    Fixture("ct-fp8-block", "CT float-quantized, block, 32×32", LLM_COMPRESSOR, "llama", (CHANNEL,)),
    Fixture(
        "ct-int8-w8a8",
        "CT int-quantized W8A8, dynamic",
        LLM_COMPRESSOR,
        "llama",
        ({".weight": "I8", ".weight_scale": "BF16"},),
    ),
    Fixture(
        "ct-int8-static",
        "CT int-quantized W8A8, static",
        LLM_COMPRESSOR,
        "llama",
        ({".weight": "I8", ".weight_scale": "BF16", ".input_scale": "BF16", ".input_zero_point": "I8"},),
    ),
    Fixture("ct-nvfp4", "CT nvfp4-pack-quantized, W4A4", LLM_COMPRESSOR, "llama", (NVFP4_BOTH,)),
    Fixture("ct-nvfp4-weights-only", "CT nvfp4-pack-quantized, W4A16", LLM_COMPRESSOR, "llama", (NVFP4,)),
    Fixture(
        "ct-fp8-channel-qwen3-moe", "CT float-quantized, channel, dynamic", LLM_COMPRESSOR, "qwen3_moe", (CHANNEL,)
    ),
    Fixture("ct-nvfp4-qwen3-moe", "CT nvfp4-pack-quantized, W4A4", LLM_COMPRESSOR, "qwen3_moe", (NVFP4_BOTH,)),
    Fixture(
        "ct-nvfp4-unequal-scales",
        "CT nvfp4-pack-quantized, W4A4",
        HAND_MADE,
        "qwen3_moe",
        (NVFP4_BOTH,),
        remark="each matrix has global scales of its own; the tools give q, k, v one, and gate, up one",
    ),
    Fixture(
        "ct-fp8-nvfp4-mixed-precision",
        "CT mixed-precision: float-quantized and nvfp4-pack-quantized",
        LLM_COMPRESSOR,
        "llama",
        (CHANNEL, NVFP4),
        remark="attention FP8 per channel, MLP NVFP4",
    ),
    Fixture(
        "ct-mxfp4",
        "CT mxfp4-pack-quantized",
        LLM_COMPRESSOR,
        "llama",
        ({".weight_packed": "U8", ".weight_scale": "U8"},),
    ),
    Fixture(
        "ct-mxfp8", "CT mxfp8-quantized", LLM_COMPRESSOR, "llama", ({".weight": "F8_E4M3", ".weight_scale": "U8"},)
    ),
    Fixture("modelopt-fp8-kv", "ModelOpt FP8; ModelOpt KV cache", MODELOPT, "llama", (SCALAR,), KV),
    Fixture(
        "modelopt-fp8-hf-quant-config-alone",
        "ModelOpt FP8; ModelOpt KV cache",
        MODELOPT,
        "qwen3",
        (SCALAR,),
        KV,
        remark="quantization_config taken out of config.json; hf_quant_config.json names the quantisation alone",
    ),
    Fixture(
        "modelopt-fp8-per-channel-per-token",
        "ModelOpt FP8_PER_CHANNEL_PER_TOKEN",
        MODELOPT,
        "llama",
        ({".weight": "F8_E4M3", ".weight_scale": "F32"},),
    ),
    Fixture(
        "modelopt-fp8-pb-wo",
        "ModelOpt FP8_PB_WO, 32×32",
        MODELOPT,
        "llama",
        ({".weight": "F8_E4M3", ".weight_scale": "F32"},),
    ),
    Fixture(
        "modelopt-nvfp4-kv",
        "ModelOpt NVFP4; ModelOpt KV cache",
        MODELOPT,
        "llama",
        (MODELOPT_NVFP4 | {".input_scale": "F32"},),
        KV,
    ),
    Fixture(
        "modelopt-nvfp4-qwen3-moe", "ModelOpt NVFP4", MODELOPT, "qwen3_moe", (MODELOPT_NVFP4 | {".input_scale": "F32"},)
    ),
    Fixture("modelopt-w4a16-nvfp4", "ModelOpt W4A16_NVFP4", MODELOPT, "llama", (MODELOPT_NVFP4,)),
    Fixture("modelopt-mxfp8", "ModelOpt MXFP8", MODELOPT, "llama", ({".weight": "F8_E4M3", ".weight_scale": "U8"},)),
    Fixture(
        "modelopt-fp8-pb-wo-128",
        "ModelOpt FP8_PB_WO, 128×128",
        MODELOPT,
        "llama",
        ({".weight": "F8_E4M3", ".weight_scale": "F32"},),
    ),
    Fixture("modelopt-fp8-qwen3-moe", "ModelOpt FP8", MODELOPT, "qwen3_moe", (SCALAR,)),
    Fixture("modelopt-w4a16-nvfp4-qwen3-moe", "ModelOpt W4A16_NVFP4", MODELOPT, "qwen3_moe", (MODELOPT_NVFP4,)),
    Fixture(
        "modelopt-mixed-precision",
        "ModelOpt MIXED_PRECISION",
        MODELOPT,
        "llama",
        (SCALAR, MODELOPT_NVFP4 | {".input_scale": "F32"}),
        remark="attention FP8, MLP NVFP4",
    ),
    Fixture(
        "modelopt-mixed-precision-kv",
        "ModelOpt MIXED_PRECISION; ModelOpt KV cache",
        MODELOPT,
        "llama",
        (SCALAR, MODELOPT_NVFP4 | {".input_scale": "F32"}),
        KV,
        remark="attention FP8, MLP NVFP4",
    ),
    Fixture(
        "modelopt-w4a8-awq",
        "ModelOpt W4A8_AWQ",
        MODELOPT,
        "llama",
        ({".weight": "U8", ".weight_scale": "F32", ".weight_scale_2": "F32", ".input_scale": "F32"},),
        {".pre_quant_scale": "BF16"},
        remark="pre_quant_scale at o_proj and down_proj alone (elsewhere in the norm), left out of the reference",
    ),
    Fixture(
        "quark-fp8",
        "Quark FP8 per tensor, static",
        QUARK,
        "llama",
        ({".weight": "F8_E4M3", ".weight_scale": "BF16", ".input_scale": "BF16"},),
    ),
    Fixture("quark-fp8-channel", "Quark FP8 per channel, dynamic", QUARK, "llama", (CHANNEL,)),
    Fixture(
        "quark-int8",
        "Quark INT8 per channel, static",
        QUARK,
        "llama",
        (
            {
                ".weight": "I8",
                ".weight_scale": "BF16",
                ".weight_zero_point": "I8",
                ".input_scale": "F32",
                ".input_zero_point": "I8",
            },
        ),
        remark="zero points of 0",
    ),
    Fixture("quark-mxfp4", "Quark MXFP4", QUARK, "llama", ({".weight": "U8", ".weight_scale": "U8"},)),
    Fixture(
        "mxfp4-gpt-oss",
        "MXFP4 gpt-oss",
        HAND_MADE,
        "gpt_oss, experts stacked, gate and up by turns",
        ({"_blocks": "U8", "_scales": "U8", "_bias": "BF16"},),
    ),
    Fixture(
        "fp4-experts-deepseek",
        "DeepSeek-V4 `expert_dtype: fp4`",
        HAND_MADE,
        "deepseek_v3's modules, experts one by one",
        ({".weight": "I8", ".scale": "F8_E8M0"}, {".weight": "F8_E4M3", ".scale": "F8_E8M0"}),
        remark="scales have V4's name, `.scale`; linears FP8 block, 32×32",
    ),
    Fixture("gptq-int4", "GPTQ, 4 bits, sequential", GPTQMODEL, "llama", (GPTQ,)),
    Fixture("gptq-int8", "GPTQ, 8 bits", GPTQMODEL, "llama", (GPTQ,)),
    Fixture("gptq-int4-asym", "GPTQ, 4 bits, `sym: false`", GPTQMODEL, "qwen3", (GPTQ,)),
    Fixture("gptq-int4-desc-act", "GPTQ, 4 bits, `desc_act: true`", GPTQMODEL, "llama", (GPTQ,)),
    Fixture("gptq-int4-channel", "GPTQ, 4 bits, `group_size: -1`", GPTQMODEL, "llama", (GPTQ,)),
    Fixture("gptq-int4-v2", "GPTQ, 4 bits, `checkpoint_format: gptq_v2`", GPTQMODEL, "llama", (GPTQ,)),
    Fixture(
        "gptq-dynamic",
        "GPTQ, `dynamic`",
        GPTQMODEL,
        "llama",
        (GPTQ,),
        remark="down_proj 8 bits in groups of 64, o_proj not quantised",
    ),
    Fixture("autoround-gptq", "GPTQ, 4 bits, `quant_method: gptq`", AUTO_ROUND, "llama", (GPTQ,)),
    Fixture("autoround-awq", "AWQ gemm, `quant_method: awq`", AUTO_ROUND, "llama", (AWQ,)),
    Fixture(
        "autoround-mixed-bits",
        "GPTQ packing, `quant_method: auto-round`, `extra_config`",
        AUTO_ROUND,
        "llama",
        ({name: dtype for name, dtype in GPTQ.items() if name != ".g_idx"},),
        remark="o_proj 8 bits, down_proj not quantised",
    ),
    Fixture("autoround-awq-qwen3-moe", "AWQ gemm, `quant_method: awq`", AUTO_ROUND, "qwen3_moe", (AWQ,)),
    Fixture("autoround-gptq-qwen3-moe", "GPTQ, 4 bits, `quant_method: gptq`", AUTO_ROUND, "qwen3_moe", (GPTQ,)),
)


def reference_of(fixture: Fixture) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((REFERENCES / f"{fixture.name}.json").read_text())
    return content


def _dtypes(kind: dict[str, str]) -> str:
    return ", ".join(f"`{suffix.lstrip('.') or 'the weight'}` {dtype}" for suffix, dtype in kind.items())


def markdown() -> str:
    """The table of README.md."""
    lines = ["| fixture | format | written by | model | on disk | reference |", "|---|---|---|---|---|---|"]
    for fixture in TABLE:
        reference = reference_of(fixture)
        how = f"rows within {reference['relative_tolerance']}" if reference["relative_tolerance"] else "exact"
        kinds = " or ".join(map(_dtypes, fixture.kinds)) + (f"; {_dtypes(fixture.besides)}" if fixture.besides else "")
        model = fixture.model + (f"; {fixture.remark}" if fixture.remark else "")
        cells = (f"`{fixture.name}`", fixture.format, fixture.tool, model, kinds, f"{how}: {reference['code']}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
