"""Whose code runs a model in `verify`, by its model_type. Without torch: lists of what is supported need no more."""

from typing import Literal

ProvedBy = Literal["tpshard", "transformers", "bytes"]

DECODED = frozenset(
    (
        "RefinedWeb RefinedWebModel bloom falcon gemma2 gpt2 gpt_bigcode gpt_neo gpt_neox gptj internlm2 llama"
        " mistral opt qwen2 qwen3"
    ).split()
)
"""Those that tpshard's own decoder computes."""
# Those whose modules are told a rank's heads and widths. Any other class runs among zeros (`hf/masked`).
TRIED = frozenset(
    (
        "afmoe apertus arcee bamba biogpt codegen cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3"
        " deepseek_v32 dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_h1 flex_olmo gemma gemma2"
        " gemma3_text gemma4_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_neox gpt_oss gptj"
        " granite granite_swa granitemoe granitemoehybrid granitemoeshared helium hunyuan_v1_dense"
        " hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jamba lfm2 lfm2_moe llama llama4_text"
        " mimo_v2_flash minimax_m2 ministral ministral3 mistral mistral4 mixtral mpt nanochat nemotron"
        " nemotron_h olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3"
        " qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 solar_open stablelm"
        " starcoder2 vaultgemma xglm"
    ).split()
)
AMONG_ZEROS = frozenset(
    (
        "bailing_hybrid bitnet dbrx deepseek_v4 diffllama doge dots3_note_text ernie4_5_moe_vl_text"
        " ernie4_5_vl_moe_text falcon_mamba gemma4_unified_text glm5_next_text hy_v4 inkling_text jetmoe"
        " kimi_linear laguna longcat_flash mamba2 mellum minimax minimax_m3_text"
        " minimax_m3_vl_text mistral_large4 mllama_text_model molmo2_text muse_glimmer_text"
        " olmo_hybrid phi4_multimodal qwen4_exp_text step3p5 step3p7_text youtu zamba2"
    ).split()
)
"""Of any other class of transformers that `verify` runs, those that the tests run, with right rules and wrong ones."""
COMPUTES_AS = {
    "inkling_mm_model_text": "inkling_text",
    "inkling_model": "inkling_text",
    "kimi_k2": "deepseek_v3",
    "llama_bidirec": "llama",  # but for the mask, which every rank has whole
    "glm4v_text": "glm4",
    "glm4v_moe_text": "glm4_moe",
    "qwen2_5_omni_text": "qwen2",
    "qwen3_omni_moe_text": "qwen3_moe",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
"""Text models that compute as these do, some of them on text alone: its positions in three dimensions are one."""
BY_CONFIG = {
    "baichuan": "llama",
    "bailing_hybrid": "bailing_hybrid",
    "bailing_moe": "granitemoeshared",
    "bailing_moe_v2": "glm4_moe",
    "bailing_moe_v3": "bailing_hybrid",
    "chatglm": "glm",
    "exaone": "llama",
    "mimo_v2": "mimo_v2_flash",
    "minicpm": "granite",
    "mistral_native": "mistral",  # and others of Mistral's
    "minimax_m1": "minimax",
    "minimax_text_01": "minimax",
    "nemotron-nas": "llama",
    "phi4mm": "phi3",
    "qwen": "qwen2",
}
"""Models that publish code of their own, which these compute where the config says no more: `hf/own_code`."""


def proved_by(model_type: str) -> ProvedBy:
    """Whose code `verify` runs by default; "bytes" where it has none that was tried."""
    if model_type in DECODED:
        return "tpshard"
    return (
        "transformers" if {**COMPUTES_AS, **BY_CONFIG}.get(model_type, model_type) in TRIED | AMONG_ZEROS else "bytes"
    )
