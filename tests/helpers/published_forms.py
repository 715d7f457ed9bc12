"""Checkpoints of the families as others publish them: names, configs and what surrounds a decoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.toys import Tensor, random_tensor, read_all, write_checkpoint

Made = Callable[..., Path]


@dataclass(frozen=True)
class Published:
    """A published form. made: the checkpoint that it is made of. names: how names begin, and what they begin with here.

    config: what differs from the config of `made`. key: where the decoder's config is nested in `config`; None: it is
    not, or its values are beside the outer ones. beside: other tensors, by name and shape, whole on every rank.
    vllm: whether its names there are known. verified: what verify says.
    """

    made: str
    names: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    beside: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    vllm: bool = False
    verified: str = "pass"


TOWER = {"vision_tower.encoder.blocks.0.mlp.fc0.weight": (48, 32), "vision_tower.patch_embed.proj.bias": (32,)}
PUBLISHED = {
    "kimi_k2": Published("deepseek_v3", config={"model_type": "kimi_k2"}, vllm=True),
    "kimi_k25": Published(
        "deepseek_v3",
        {"": "language_model."},
        {"model_type": "kimi_k25", "vision_config": {}, "text_config": {"model_type": "kimi_k2"}},
        "text_config",
        TOWER | {"mm_projector.linear_1.weight": (64, 128)},
    ),
    "qwen2_5_vl, flat": Published(
        "qwen2-bias",
        config={"model_type": "qwen2_5_vl", "vision_config": {}},
        beside={"visual.blocks.0.attn.qkv.weight": (96, 32), "visual.merger.ln_q.weight": (32,)},
    ),
    "nemotron_h, transformers' names": Published("nemotron_h", {"backbone.": "model."}),
    "nemotron_h in a larger model": Published(
        "nemotron_h",
        {"": "language_model."},
        {"model_type": "NemotronH_Nano_VL_V2", "llm_config": {}},
        "llm_config",
        {"vision_model.radio_model.model.blocks.0.mlp.fc1.weight": (48, 32), "mlp1.0.weight": (32,)},
    ),
    "deepseek_vl_v2": Published(
        "deepseek_v2",
        {"": "language."},
        {"model_type": "deepseek_vl_v2", "language_config": {}},
        "language_config",
        {"vision.blocks.0.attn.qkv.weight": (96, 32), "projector.layers.0.weight": (64, 32)},
    ),
    "qwen2_5_omni": Published(
        "qwen2-bias",
        {"": "thinker."},
        {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": {"model_type": "qwen2_5_omni_text"}}},
        "thinker_config.text_config",
        {
            "thinker.visual.blocks.0.attn.q.weight": (32, 32),
            "token2wav.code2wav_dit_model.input_embed.proj.bias": (32,),
        },
    ),
    "shieldgemma2": Published(
        "gemma3_text",
        {"": "model.language_model."},
        {"model_type": "shieldgemma2", "text_config": {}},
        "text_config",
        {"model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (32, 32)},
    ),
}


def write(name: str, made: Made, out: Path) -> Path:
    """The checkpoint of the table."""
    form = PUBLISHED[name]
    model = made(form.made)
    plain = json.loads((model / "config.json").read_text())
    config = json.loads(json.dumps(form.config))
    if form.key is None:
        config = plain | config
    else:
        inner = config
        for key in form.key.split("."):
            inner = inner[key]
        inner |= plain | inner
    tensors = {_renamed(name, form.names): tensor for name, tensor in read_all(model).items()}
    if "thinker_config" in config:  # a talker has such a decoder too
        tensors |= copied(tensors, "thinker.model.", "talker.model.")
    rng, dtype = np.random.default_rng(0), next(iter(tensors.values())).dtype
    return write_checkpoint(out, config, tensors | {n: random_tensor(rng, dtype, s) for n, s in form.beside.items()})


def _renamed(name: str, names: Mapping[str, str]) -> str:
    start = max((old for old in names if name.startswith(old)), key=len, default=None)
    return name if start is None else names[start] + name[len(start) :]


def copied(tensors: Mapping[str, Tensor], layer: str, copy: str) -> dict[str, Tensor]:
    """A layer once more."""
    return {copy + name.removeprefix(layer): tensor for name, tensor in tensors.items() if name.startswith(layer)}
