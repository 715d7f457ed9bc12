"""What config.json says must be there: the rules beside transformers' classes, and checkpoints that contradict it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch

from tests.helpers.checkpoints import _COMMON, VARIANTS
from tests.helpers.grids import some
from tpshard.errors import CorruptError
from tpshard.rules.multimodal import find_rules
from tpshard.storage.safetensors import TensorInfo

FEW = ["llama", "qwen2-bias", "gpt2", "gpt_neox", "falcon-new", "opt", "deepseek_v3", "nemotron_h", "stablelm-bias"]
Shapes = Mapping[str, tuple[int, ...]]


@cache
def model_of(name: str, **changes: Any) -> tuple[dict[str, Any], Shapes, Any]:
    """A variant's config, the shapes of its state_dict, and its class; without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    variant = VARIANTS[name]
    config = AutoConfig.for_model(variant.model_type, **{**_COMMON, **variant.config, **changes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    stored = revert_weight_conversion(model, model.state_dict())  # type: ignore[no-untyped-call]
    found = {key: tuple(value.shape) for key, value in stored.items()}
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    said = {**config.to_dict(), "model_type": variant.model_type, "architectures": [type(model).__name__]}
    return said, found, type(model)


def infos(shapes: Shapes) -> list[TensorInfo]:
    made = []
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        made.append(TensorInfo(name, "BF16", shape, "model.safetensors", 0, size))
    return made


def accepted(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether rules and config agree that these tensors are a whole model."""
    try:
        find_rules(config, None, "config.json").classify(infos(shapes))
    except CorruptError:
        return False
    return True


def one_of_each_kind(names: Any) -> list[str]:
    """One name of each kind: layers and experts are alike."""
    return list({re.sub(r"\b\d+\b", "*", name): name for name in names}.values())


def switched(name: str) -> list[dict[str, Any]]:
    """The variant's config with each of its flags that decide about a tensor turned over, one at a time."""
    config, _, _ = model_of(name)
    changes: list[dict[str, Any]] = [{}]
    for key, value in config.items():
        if isinstance(value, bool) and ("bias" in key or key == "tie_word_embeddings" or "affine" in key):
            both = ("attention_bias", "mlp_bias") if config["model_type"] == "internlm3" and "bias" in key else (key,)
            changes.append({each: not value for each in both})
    return changes


@pytest.mark.parametrize("name", some(VARIANTS, FEW))
def test_what_must_be_there_is_what_transformers_class_has(name: str) -> None:
    for change in switched(name):
        config, shapes, _ = model_of(name, **change)
        assert accepted(config, shapes), change
        biases = [each for each in shapes if each.endswith(".bias")]
        for bias in one_of_each_kind(biases):
            assert not accepted(config, {n: s for n, s in shapes.items() if n != bias}), f"{change} without {bias}"
        for weight in one_of_each_kind(n for n in shapes if n.endswith(".weight")):
            bias = weight.removesuffix("weight") + "bias"
            if bias not in shapes:
                out = shapes[weight][:1]
                assert not accepted(config, {**shapes, bias: out}), f"{change} with {bias}"
        if not config["tie_word_embeddings"]:
            headless = {n: s for n, s in shapes.items() if not re.match("lm_head|embed_out|output_projection", n)}
            assert not accepted(config, headless), f"{change} without a head"
