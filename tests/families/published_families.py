"""The families that are served with several GPUs, each in the form that is published, and what is done with it.

`test_families.py` holds every cell by the real commands; `python -m tests.helpers.tp_plans` puts the table into
docs/reference/architectures.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.helpers import checkpoints, multimodal_checkpoints, served_checkpoints, served_forms
from tests.inputs import test_mistral
from tests.rules import test_heads, test_published, test_remote_code

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
    """As transformers saves it, which is how it is published."""

    def make(out: Path) -> Path:
        checkpoints.make(name, out)
        if config:
            path = out / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return out

    return make


def _served(name: str) -> Callable[[Path], Path]:
    return lambda out: served_checkpoints.make(name, out)


def _form(name: str) -> Callable[[Path], Path]:
    return lambda out: served_forms.make(name, out, published=True)


def _remote(name: str) -> Callable[[Path], Path]:
    return lambda out: served_forms.write(name, out)


def _code(name: str) -> Callable[[Path], Path]:
    return lambda out: test_remote_code.checkpoint(name, out)


def _nested(name: str) -> Callable[[Path], Path]:
    return lambda out: multimodal_checkpoints.make(name, out)


def _around(name: str) -> Callable[[Path], Path]:
    return lambda out: test_published.write(name, _made_beside(out), out)


def _head(name: str) -> Callable[[Path], Path]:
    return lambda out: test_heads.with_head(name, _made_beside(out), out)[0]


def _made_beside(out: Path) -> Callable[..., Path]:
    return lambda name: checkpoints.make(name, out.with_name(f"{out.name}-of"))


def _mistral(kind: str) -> Callable[[Path], Path]:
    return lambda out: test_mistral.published(out, kind)


FAMILIES = (
    Family("Kimi K2", "kimi_k2", _around("kimi_k2")),
    Family("Kimi K2.5", "kimi_k25", _served("kimi_k25")),
    Family("Nemotron-H", "nemotron_h", _saved("nemotron_h")),
    Family("Nemotron-H, transformers' names", "nemotron_h", _around("nemotron_h, transformers' names")),
    Family("Nemotron Nano VL", "NemotronH_Nano_VL_V2", _around("nemotron_h in a larger model")),
    Family("ERNIE 4.5", "ernie4_5", _saved("ernie4_5")),
    Family("ERNIE 4.5 MoE", "ernie4_5_moe", _saved("ernie4_5_moe")),
    Family("ERNIE 4.5 VL MoE", "ernie4_5_vl_moe", _form("ernie4_5_vl_moe")),
    Family("DeepSeek V3", "deepseek_v3", _saved("deepseek_v3")),
    Family("DeepSeek V3.2", "deepseek_v32", _saved("deepseek_v32")),
    Family("DeepSeek V4", "deepseek_v4", _served("deepseek_v4")),
    Family("DeepSeek VL2", "deepseek_vl_v2", _around("deepseek_vl_v2")),
    Family("Gemma 3", "gemma3", _nested("gemma3")),
    Family("ShieldGemma 2", "shieldgemma2", _around("shieldgemma2")),
    Family("Gemma 4", "gemma4", _served("gemma4")),
    Family("Gemma 4, unified", "gemma4_unified", _served("gemma4_unified")),
    Family("Qwen2.5-VL", "qwen2_5_vl", _nested("qwen2_5_vl")),
    Family("Qwen2.5-VL, flat config", "qwen2_5_vl", _around("qwen2_5_vl, flat")),
    Family("Qwen2.5-Omni", "qwen2_5_omni", _around("qwen2_5_omni")),
    Family("Qwen3-VL", "qwen3_vl", _nested("qwen3_vl")),
    Family("Qwen3-VL MoE", "qwen3_vl_moe", _nested("qwen3_vl_moe")),
    Family("Qwen3-Next", "qwen3_next", _saved("qwen3_next")),
    Family("Qwen3.5, text", "qwen3_5_text", _saved("qwen3_5_text")),
    Family("Qwen3.5 MoE, text", "qwen3_5_moe_text", _saved("qwen3_5_moe_text")),
    Family("Qwen4, experimental", "qwen4_exp_text", _saved("qwen4_exp")),
    Family("GLM-4.6V", "glm46v", _served("glm46v")),
    Family("GLM-4.7 Flash", "glm4_moe_lite", _saved("glm4_moe_lite")),
    Family("GLM-5", "glm_moe_dsa", _saved("glm_moe_dsa")),
    Family("GLM-5 Next", "glm5_next", _form("glm5_next")),
    Family("ChatGLM", "chatglm", _code("chatglm")),
    Family("MiniMax-Text-01, M1", "minimax", _saved("minimax")),
    Family("MiniMax M2", "minimax_m2", _saved("minimax_m2")),
    Family("MiniMax M3", "minimax_m3_vl", _served("minimax_m3_vl")),
    Family("Ministral 3", "ministral3", _saved("ministral3")),
    Family("Mistral 3", "mistral3", _nested("mistral3")),
    Family("Mistral Small 4", "mistral3", _served("mistral3 with mistral4")),
    Family("Mistral Large 4", "mistral_large4", _served("mistral_large4")),
    Family("Mistral's own form", None, _mistral("7b")),
    Family("Mistral's own form, with experts", None, _mistral("mixtral")),
    Family("Mistral's own form, Mistral Large 3", None, _mistral("large 3")),
    Family("Mistral's own form, Pixtral", None, _mistral("pixtral")),
    Family("MiMo V2", "mimo_v2", _served("mimo_v2")),
    Family("MiMo V2 Flash", "mimo_v2_flash", _saved("mimo_v2_flash")),
    Family("Ling 2.0", "bailing_moe_v2", _served("bailing_moe_v2")),
    Family("Ring 2.5", "bailing_hybrid", _served("bailing_hybrid, Ring 2.5")),
    Family("Ling 3.0", "bailing_hybrid", _served("bailing_hybrid, Ling 3.0")),
    Family("Step 3.7", "step3p7", _served("step3p7")),
    Family("Kimi Linear", "kimi_linear", _served("kimi_linear")),
    Family("Kimi K3", "kimi_k3", _served("kimi_k3")),
    Family("LongCat Flash", "longcat_flash", _served("longcat_flash")),
    Family("Laguna", "laguna", _saved("laguna")),
    Family("Inkling", "inkling_text", _saved("inkling")),
    Family("Muse Glimmer", "muse_glimmer", _form("muse_glimmer")),
    Family("dots3 Note", "dots3_note_text", _saved("dots3_note")),
    Family("Hunyuan V3", "hy_v3", _saved("hy_v3")),
    Family("Hunyuan V4", "hy_v4", _saved("hy_v4")),
    Family("Nemotron NAS", "nemotron-nas", _remote("nemotron-nas")),
    Family("Llama 3.2 Vision", "mllama", _form("mllama")),
    Family("Llama 4, text", "llama4_text", _saved("llama4_text")),
    Family("Molmo 2", "molmo2", _form("molmo2")),
    Family("Phi-4 multimodal", "phi4mm", _remote("phi4mm")),
    Family("LLaVA", "llava", _nested("llava")),
    Family("InternVL", "internvl", _nested("internvl")),
    Family("Jamba", "jamba", _saved("jamba")),
    Family("Zamba 2", "zamba2", _saved("zamba2")),
    Family("Mamba 2", "mamba2", _saved("mamba2")),
    Family("LFM 2", "lfm2", _saved("lfm2")),
    Family("LFM 2 MoE", "lfm2_moe", _saved("lfm2_moe")),
    Family("OLMo Hybrid", "olmo_hybrid", _saved("olmo_hybrid")),
    Family("DBRX", "dbrx", _saved("dbrx")),
    Family("BitNet, in bf16", "bitnet", _saved("bitnet")),
    Family("EXAONE 3", "exaone", _code("exaone")),
    Family("EXAONE MoE", "exaone_moe", _saved("exaone_moe")),
    Family("MiniCPM", "minicpm", _remote("minicpm")),
    Family("Baichuan", "baichuan", _code("baichuan")),
    Family("Qwen", "qwen", _code("qwen")),
    Family("AFMoE", "afmoe", _saved("afmoe")),
    Family("Granite 4", "granitemoehybrid", _saved("granitemoehybrid")),
    Family("Falcon H1", "falcon_h1", _saved("falcon_h1")),
    Family("Bamba", "bamba", _saved("bamba")),
    Family("Apertus", "apertus", _saved("apertus")),
    Family("Falcon, as RefinedWeb", "RefinedWeb", _saved("falcon-new")),
    Family("A classifier of sequences", "llama", _head("sequences")),
    Family("A classifier of tokens", "qwen3", _head("tokens")),
    Family("A reward model", "qwen2", _head("reward")),
    Family("A value beside the logits", "mistral", _head("value beside logits")),
    Family("An embedding model", "qwen3", _head("none")),
    Family("An embedding model, in both directions", "llama_bidirec", _head("in both directions")),
)

DRAFTS = {"LongCat Flash": "model.mtp"}
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
