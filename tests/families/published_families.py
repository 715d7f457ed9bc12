"""The families that are served with several GPUs, each in the form that is published, and what is done with it.

`test_families.py` holds every cell by the real commands; `python -m tests.helpers.tp_plans` puts the table into
docs/reference/architectures.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.engines import engine_models, engine_nested, engine_newest
from tests.helpers import (
    checkpoints,
    head_checkpoints,
    mistral_form,
    published_forms,
    published_text,
    remote_checkpoints,
    served_checkpoints,
    served_forms,
)

Verified = Literal["pass", "text", "bytes"]


@dataclass(frozen=True)
class Family:
    """A published form of a model.

    name: as people call it. model_type: of its config.json; None where it has none. make: writes a small checkpoint of
    that form into a directory. verify: "pass", what is cut runs and is proved; "text", the same of the text model, and
    the report names a tower as not run; "bytes", no class runs it, and each rank's bytes are proved alone. vllm:
    whether `--format vllm` writes it; the engines' tests compare what is written.
    """

    name: str
    model_type: str | None
    make: Callable[[Path], Path]
    verify: Verified = "pass"
    vllm: bool = False


def _saved(name: str, **config: Any) -> Callable[[Path], Path]:
    """As transformers saves it, which is how it is published. config: what differs from that of the tests."""
    return lambda out: checkpoints.make(name, out, **config)


def _by(make: Callable[[str, Path], Path]) -> Callable[[str], Callable[[Path], Path]]:
    return lambda name: lambda out: make(name, out)


_served = _by(served_checkpoints.make)
_code = _by(remote_checkpoints.checkpoint)
_text = _by(published_text.make)


def _old(name: str) -> Callable[[Path], Path]:
    """Under the keys of the first published configs."""
    return lambda out: checkpoints.published(_made_beside(out)(name), out, old_keys=True)


def _form(name: str) -> Callable[[Path], Path]:
    return lambda out: served_forms.make(name, out, published=True)


def _engine(name: str) -> Callable[[Path], Path]:
    """The checkpoint that vLLM's classes load in the engines' tests."""
    for made in (engine_nested, engine_newest):
        if name in made.LOADED:
            return lambda out: made.make(name, out)
    return lambda out: engine_models.make(name, out)


def _drafted(name: str) -> Callable[[Path], Path]:
    """The same with layers that predict further tokens."""
    return lambda out: engine_newest.with_draft(name, out)


def _around(name: str) -> Callable[[Path], Path]:
    return lambda out: published_forms.write(name, _made_beside(out), out)


def _head(name: str) -> Callable[[Path], Path]:
    return lambda out: head_checkpoints.with_head(name, _made_beside(out), out)[0]


def _made_beside(out: Path) -> Callable[..., Path]:
    return lambda name: checkpoints.make(name, out.with_name(f"{out.name}-of"))


def _mistral(kind: str) -> Callable[[Path], Path]:
    return lambda out: mistral_form.published(out, kind)


FAMILIES = (
    Family("Kimi K2", "kimi_k2", _around("kimi_k2"), vllm=True),
    Family("Kimi K2.5", "kimi_k25", _engine("kimi_k25"), vllm=True),
    Family("Kimi VL", "kimi_vl", _engine("kimi_vl"), verify="text", vllm=True),
    Family("Kimi Linear", "kimi_linear", _engine("kimi_linear"), vllm=True),
    Family("Kimi K3", "kimi_k3", _engine("kimi_k3"), verify="bytes", vllm=True),
    Family("Nemotron-H", "nemotron_h", _engine("nemotron_h"), vllm=True),
    Family("Nemotron-H, transformers' names", "nemotron_h", _around("nemotron_h, transformers' names"), vllm=True),
    Family("Nemotron Nano VL", "NemotronH_Nano_VL_V2", _engine("NemotronH_Nano_VL_V2"), verify="text", vllm=True),
    Family("Llama-Nemotron", "nemotron-nas", _engine("nemotron-nas"), vllm=True),
    Family("Llama-Nemotron, one matrix for attention", "nemotron-nas", _text("nemotron-nas")),
    Family("ERNIE 4.5", "ernie4_5", _engine("ernie4_5"), vllm=True),
    Family("ERNIE 4.5 MoE", "ernie4_5_moe", _engine("ernie4_5_moe"), vllm=True),
    Family("ERNIE 4.5 VL", "ernie4_5_moe_vl", _engine("ernie4_5_moe_vl"), vllm=True),
    Family("DeepSeek V2", "deepseek_v2", _engine("deepseek_v2"), vllm=True),
    Family("DeepSeek V3", "deepseek_v3", _engine("deepseek_v3"), vllm=True),
    Family("DeepSeek V3.2", "deepseek_v32", _engine("deepseek_v32"), vllm=True),
    Family("DeepSeek V4", "deepseek_v4", _served("deepseek_v4"), verify="text", vllm=True),
    Family("DeepSeek VL2", "deepseek_vl_v2", _engine("deepseek_vl_v2"), verify="text", vllm=True),
    Family("Gemma 3", "gemma3", _engine("gemma3"), vllm=True),
    Family("ShieldGemma 2", "shieldgemma2", _around("shieldgemma2"), verify="text"),
    Family("Gemma 4", "gemma4", _engine("gemma4"), vllm=True),
    Family("Gemma 4, unified", "gemma4_unified", _engine("gemma4_unified"), vllm=True),
    Family("Qwen2-VL", "qwen2_vl", _engine("qwen2_vl"), vllm=True),
    Family("Qwen2.5-VL", "qwen2_5_vl", _engine("qwen2_5_vl"), vllm=True),
    Family("Qwen2.5-VL, flat config", "qwen2_5_vl", _around("qwen2_5_vl, flat"), verify="text", vllm=True),
    Family("Qwen2.5-Omni", "qwen2_5_omni", _engine("qwen2_5_omni"), vllm=True),
    Family("Qwen3-VL", "qwen3_vl", _engine("qwen3_vl"), vllm=True),
    Family("Qwen3-VL MoE", "qwen3_vl_moe", _engine("qwen3_vl_moe"), vllm=True),
    Family("Qwen3-Omni", "qwen3_omni_moe", _engine("qwen3_omni_moe"), vllm=True),
    Family("Qwen3-Next", "qwen3_next", _engine("qwen3_next"), vllm=True),
    Family("Qwen3.5", "qwen3_5", _engine("qwen3_5"), vllm=True),
    Family("Qwen3.5 MoE", "qwen3_5_moe", _engine("qwen3_5_moe"), vllm=True),
    Family("Qwen4, experimental", "qwen4_exp_text", _saved("qwen4_exp"), vllm=True),
    Family("Qwen4, experimental, with a tower", "qwen4_exp", _form("qwen4_exp"), vllm=True),
    Family("GLM-4.5", "glm4_moe", _engine("glm4_moe"), vllm=True),
    Family("GLM-4.1V", "glm4v", _engine("glm4v"), vllm=True),
    Family("GLM-4.5V", "glm4v_moe", _engine("glm4v_moe"), vllm=True),
    Family("GLM-4.6V", "glm46v", _served("glm46v")),
    Family("GLM-4.7 Flash", "glm4_moe_lite", _engine("glm4_moe_lite"), vllm=True),
    Family("GLM-5", "glm_moe_dsa", _engine("glm_moe_dsa"), vllm=True),
    Family("GLM-5.3 Flash", "glm5_next", _engine("glm5_next"), vllm=True),
    Family("ChatGLM", "chatglm", _text("chatglm"), vllm=True),
    Family("MiniMax-Text-01", "minimax_text_01", _text("minimax_text_01")),
    Family("MiniMax-Text-01, transformers' form", "minimax", _saved("minimax")),
    Family("MiniMax M2", "minimax_m2", _engine("minimax_m2"), vllm=True),
    Family("MiniMax M3", "minimax_m3_vl", _engine("minimax_m3_vl"), vllm=True),
    Family("Ministral 3", "ministral3", _engine("ministral3"), vllm=True),
    Family("Mistral 3", "mistral3", _engine("mistral3"), vllm=True),
    Family("Mistral Small 4", "mistral3", _served("mistral3 with mistral4")),
    Family("Mistral Large 4", "mistral_large4", _served("mistral_large4")),
    Family("Mistral's own form", None, _mistral("7b"), vllm=True),
    Family("Mistral's own form, with experts", None, _mistral("mixtral")),
    Family("Mistral's own form, Mistral Large 3", None, _mistral("large 3"), vllm=True),
    Family("Mistral's own form, Mistral Large 3 with its tower", None, _mistral("large 3, merged"), vllm=True),
    Family("Mistral's own form, Pixtral", None, _mistral("pixtral"), vllm=True),
    Family("Mistral's own form, Mistral Small 3.1", None, _mistral("merged"), vllm=True),
    Family("MiMo V2", "mimo_v2", _text("mimo_v2"), verify="text"),
    Family("MiMo V2 Flash", "mimo_v2_flash", _engine("mimo_v2_flash"), vllm=True),
    Family("Ling 1", "bailing_moe", _engine("bailing_moe"), vllm=True),
    Family("Ling 2.0", "bailing_moe_v2", _engine("bailing_moe_v2"), vllm=True),
    Family("Ring 2.5", "bailing_hybrid", _engine("bailing_hybrid"), verify="bytes", vllm=True),
    Family("Ling 3.0", "bailing_hybrid", _served("bailing_hybrid, Ling 3.0")),
    Family("Ling 3.0, as bailing_moe_v3", "bailing_moe_v3", _engine("bailing_moe_v3-head-wise"), vllm=True),
    Family("Step 3.5", "step3p5", _text("step3p5"), verify="text", vllm=True),
    Family("Step 3.7", "step3p7", _served("step3p7"), verify="text", vllm=True),
    Family("LongCat Flash", "longcat_flash", _served("longcat_flash"), verify="text", vllm=True),
    Family("Laguna", "laguna", _saved("laguna"), vllm=True),
    Family("Inkling", "inkling_mm_model", _drafted("inkling_mm_model"), verify="text", vllm=True),
    Family("Inkling, the text as transformers saves it", "inkling_text", _saved("inkling")),
    Family("Muse Glimmer", "muse_glimmer", _engine("muse_glimmer"), vllm=True),
    Family("dots3 Note", "dots3_note", _engine("dots3_note"), vllm=True),
    Family("dots3 Note, transformers' config", "dots3_note", _form("dots3_note")),
    Family("Hunyuan V3", "hy_v3", _engine("hy_v3"), vllm=True),
    Family("Hunyuan V4", "hy_v4", _engine("hy_v4"), vllm=True),
    Family("Llama 3.2 Vision", "mllama", _form("mllama")),
    Family("Llama 4", "llama4", _engine("llama4"), vllm=True),
    Family("Molmo 2", "molmo2", _engine("molmo2"), vllm=True),
    Family("Phi-4 multimodal", "phi4mm", _engine("phi4mm"), verify="text", vllm=True),
    Family("Phi-4 multimodal, transformers' form", "phi4_multimodal", _form("phi4_multimodal")),
    Family("LLaVA", "llava", _engine("llava"), vllm=True),
    Family("InternVL", "internvl", _engine("internvl"), vllm=True),
    Family("Jamba", "jamba", _engine("jamba"), vllm=True),
    Family("Zamba 2", "zamba2", _engine("zamba2"), vllm=True),
    Family("Mamba 2", "mamba2", _engine("mamba2"), vllm=True),
    Family("LFM 2", "lfm2", _engine("lfm2"), vllm=True),
    Family("LFM 2 MoE", "lfm2_moe", _engine("lfm2_moe"), vllm=True),
    Family("OLMo Hybrid", "olmo_hybrid", _saved("olmo_hybrid")),
    Family("DBRX", "dbrx", _saved("dbrx")),
    Family("BitNet, in bf16", "bitnet", _saved("bitnet")),
    Family("EXAONE 3", "exaone", _engine("exaone"), vllm=True),
    Family("EXAONE MoE", "exaone_moe", _engine("exaone_moe"), vllm=True),
    Family("MiniCPM", "minicpm", _engine("minicpm"), vllm=True),
    Family("Baichuan", "baichuan", _text("baichuan")),
    Family("Baichuan 2", "baichuan", _text("baichuan-2")),
    Family("Baichuan, 13B", "baichuan", _text("baichuan-13B"), verify="bytes"),
    Family("Qwen", "qwen", _code("qwen")),
    Family("AFMoE", "afmoe", _engine("afmoe"), vllm=True),
    Family("Granite 4", "granitemoehybrid", _saved("granitemoehybrid", mamba_proj_bias=False), vllm=True),
    Family("Falcon H1", "falcon_h1", _saved("falcon_h1"), vllm=True),
    Family("Bamba", "bamba", _saved("bamba")),
    Family("Apertus", "apertus", _engine("apertus"), vllm=True),
    Family("Falcon, as RefinedWeb", "RefinedWeb", _old("falcon-new"), vllm=True),
    Family("A classifier of sequences", "llama", _head("sequences"), verify="text", vllm=True),
    Family("A classifier of tokens", "qwen3", _head("tokens"), verify="text"),
    Family("A reward model", "qwen2", _head("reward"), verify="text", vllm=True),
    Family("A value beside the logits", "mistral", _head("value beside logits"), verify="text"),
    Family("An embedding model", "qwen3", _head("none"), vllm=True),
    Family("An embedding model, in both directions", "llama_bidirec", _head("in both directions, none"), vllm=True),
    Family("A reranker, in both directions", "llama_bidirec", _head("in both directions"), verify="text", vllm=True),
)

DRAFTS = {
    "LongCat Flash": "model.mtp",
    "DeepSeek V4": "mtp",
    "Inkling": "model.mtp",
    "MiMo V2": "model.mtp",
    "Step 3.5": "model.layers.2",
    "Step 3.7": "model.layers.2",
}
"""Of which there are layers that predict further tokens in the small checkpoint: cut, not run, and accepted so."""
VERIFIED = {"pass": "whole", "text": "the text", "bytes": "bytes"}


def lines() -> Iterator[str]:
    """The rows of the table in the documentation."""
    from tpshard.api.archs import nesting, supported

    texts = {each.model_type: each.quantised for those in supported().values() for each in those}
    towers = {each.model_type: each.quantised for each in nesting()}
    for each in FAMILIES:
        kind = f"`{each.model_type}`" if each.model_type else "–"
        compared = each.vllm and (towers.get(str(each.model_type)) or "vllm" in texts.get(str(each.model_type), ()))
        cells = (each.name, kind, VERIFIED[each.verify], "yes" if each.vllm else "–", "yes" if compared else "–")
        yield f"| {' | '.join(cells)} |"
