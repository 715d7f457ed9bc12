"""Checkpoints with heads of other tasks, or without a head, made of those of the families."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.toys import Tensor, read_all, write_checkpoint

Made = Callable[..., Path]
BOTH_WAYS = {"model_type": "llama_bidirec", "pooling": "avg"}
LINEAR = {"score.weight": (2, 64)}
WITH_HEADS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "sequences": ("llama-gqa", {"architectures": ["LlamaForSequenceClassification"]}, LINEAR),
    "tokens": ("qwen3", {"architectures": ["Qwen3ForTokenClassification"]}, LINEAR | {"score.bias": (2,)}),
    "reward": (
        "qwen2-bias",
        {"architectures": ["Qwen2ForRewardModel"]},
        {"score.0.weight": (64, 64), "score.0.bias": (64,), "score.2.weight": (1, 64), "score.2.bias": (1,)},
    ),
    "reward, of one module": ("llama-mqa", {"architectures": ["LlamaForRewardModel"]}, {"v_head.weight": (1, 64)}),
    "value beside logits": ("mistral", {}, {"v_head.summary.weight": (1, 64), "v_head.summary.bias": (1,)}),
    "classifier": ("gpt2", {"architectures": ["GPT2ForTokenClassification"]}, {"classifier.weight": (2, 96)}),
    "in both directions": (
        "llama-gqa",
        {"architectures": ["LlamaBidirectionalForSequenceClassification"]} | BOTH_WAYS,
        LINEAR,
    ),
    "in both directions, none": ("llama-gqa", {"architectures": ["LlamaBidirectionalModel"]} | BOTH_WAYS, {}),
    "none": ("qwen3", {"architectures": ["Qwen3Model"]}, {}),
    "none, by transformers' class": ("olmo", {"architectures": ["OlmoModel"]}, {}),
}


def random_floats(shape: tuple[int, ...]) -> Tensor:
    return Tensor("F32", shape, np.random.default_rng(0).standard_normal(shape).astype("<f4").tobytes())


def with_head(case: str, made: Made, out: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint with another head than its own, and the head's tensors."""
    name, changes, shapes = WITH_HEADS[case]
    config, tensors = json.loads((made(name) / "config.json").read_text()), read_all(made(name))
    if changes:
        tensors = {n: tensor for n, tensor in tensors.items() if n not in ("lm_head.weight", "output.weight")}
    head = {name: random_floats(shape) for name, shape in shapes.items()}
    return write_checkpoint(out, config | changes, tensors | head), head
