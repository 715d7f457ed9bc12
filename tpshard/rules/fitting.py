"""Which built-in rules fit a checkpoint whose model_type has none: what the refusal suggests, and never takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from tpshard.errors import TpshardError, UnsupportedError
from tpshard.rules.architecture import Architecture, all_builtin
from tpshard.rules.classify import Classification
from tpshard.rules.multimodal import ModelRules, find_prefix, text_config
from tpshard.rules.quantisation.schemes import Companion
from tpshard.storage.safetensors import TensorInfo
from tpshard.storage.tensor_names import numbered

_MOST = 4
"""The number of architectures that are suggested."""


def with_fitting(
    error: UnsupportedError,
    config: Mapping[str, Any],
    tensors: Sequence[TensorInfo],
    quantised: Mapping[str, Companion],
) -> UnsupportedError:
    """The refusal of an unknown model_type, or of tensors that its rules do not know, with rules that fit every tensor.

    The architecture that `architectures` of config.json names comes first; where it does not fit, the reason is said.
    Of those that cut every tensor in the same way one is suggested.
    """
    known = all_builtin()
    named = next((architecture for architecture in known if _names(config, architecture)), None)
    sample = list({numbered(tensor.name)[0]: tensor for tensor in reversed(tensors)}.values())
    fitting: dict[str, Classification] = {}
    hints = [error.hint or ""]
    for architecture in sorted(known, key=lambda each: (each is not named, each.name != "llama", each.name)):
        text = text_config(config)
        try:
            if text is not None:
                find_prefix(architecture, text, sample)  # soon says no to most, also where there are very many tensors
            found, _ = ModelRules(architecture, config, text).classify(tensors, quantised)
        except TpshardError as refusal:
            if architecture is named and refusal.message != error.message:
                hints.insert(0, f"`architectures` names a class of {named.name}, whose rules do not fit: {refusal}")
            continue
        if not any((found.cuts, found.axes) == (other.cuts, other.axes) for other in fitting.values()):
            fitting[architecture.name] = found
    if fitting:
        which = " or ".join(f"--rules {name}" for name in list(fitting)[:_MOST])
        hints.insert(0, f"every tensor fits {which}: right if the model computes as that architecture does")
    said = {key: getattr(error, key) for key in ("path", "tensor", "expected", "found")}
    return UnsupportedError(error.message, **said, hint="; ".join(filter(None, hints)))


def _names(config: Mapping[str, Any], architecture: Architecture) -> bool:
    """Whether `architectures` of a config names a class of an architecture, as in LlamaForCausalLM."""
    classes = config.get("architectures")
    named = {str(each).partition("For")[0].lower() for each in classes} if isinstance(classes, list) else set()
    return any(model_type.replace("_", "").lower() in named for model_type in architecture.model_types)
