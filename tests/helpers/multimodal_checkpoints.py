"""Small random vision-language checkpoints, under the names of published files and under transformers' own of today."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from tests.helpers.checkpoints import POSITIONS, VOCAB

_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Half as wide as the text model, with heads and layers of the same number: what a rule could take for the decoder.
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 14}


def _rope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}}


_GLM_VISION = {
    **{"depth": 2, "num_heads": 4, "patch_size": 14, "image_size": 28, "hidden_size": 32},
    **{"intermediate_size": 48, "out_hidden_size": 64},
}
_GLM_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
_GLM = {"num_attention_heads": 4, "rope_parameters": _GLM_ROPE}
MORE_CONFIGS: dict[str, dict[str, Any]] = {
    "glm4v": {"text_config": _TEXT | _GLM | {"head_dim": 16}, "vision_config": _GLM_VISION},
    "glm4v_moe": {
        "text_config": _TEXT
        | _GLM
        | {"n_routed_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 16},
        "vision_config": _GLM_VISION,
    },
    "qwen3_vl_moe": {
        "text_config": _TEXT
        | _rope(4, 2, 2)
        | {
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
        "vision_config": _QWEN_VISION
        | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    },
}
"""Those of which one test is enough: others have their layers."""
CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "clip_vision_model"},
    },
    "gemma3": {
        "text_config": _TEXT | {"model_type": "gemma3_text", "head_dim": 16},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral", "head_dim": 16},
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 8},
    },
    "qwen2_vl": {
        "text_config": _TEXT | _rope(1, 1, 2),
        "vision_config": _QWEN_VISION | {"embed_dim": 32, "hidden_size": 64},
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | _rope(1, 1, 2),
        "vision_config": _QWEN_VISION | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64},
    },
    "qwen3_vl": {
        "text_config": _TEXT | _rope(4, 2, 2) | {"head_dim": 16},
        "vision_config": _QWEN_VISION
        | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    },
    "idefics3": {"text_config": _TEXT | {"model_type": "llama"}, "vision_config": _VISION},
    "internvl": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": _VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
    },
}


def make(model_type: str, path: Path) -> Path:
    """Write the checkpoint as transformers does: under the names of published files."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = AutoConfig.for_model(model_type, **(CONFIGS | MORE_CONFIGS)[model_type])
    model = AutoModelForImageTextToText.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return path


def renamed(path: Path, out: Path, names: dict[str, str]) -> Path:
    """The checkpoint with beginnings of names replaced, the first that fits."""
    from safetensors.torch import load_file, save_file

    def new(name: str) -> str:
        old = next((start for start in names if name.startswith(start)), "")
        return names.get(old, "") + name[len(old) :]

    out.mkdir()
    (out / "config.json").write_bytes((path / "config.json").read_bytes())
    save_file({new(name): tensor for name, tensor in load_file(path / "model.safetensors").items()}, out / FILE)
    return out


FILE = "model.safetensors"


def with_config(path: Path, **values: Any) -> None:
    """Change a checkpoint's config; None removes a key."""
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
