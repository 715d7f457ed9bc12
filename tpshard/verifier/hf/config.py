"""A checkpoint's config as transformers reads it: that of the text model, or of the model with its towers."""

from collections.abc import Collection, Mapping
from typing import Any

from tpshard.errors import UnsupportedError
from tpshard.verifier.dequantise.find import QUANTISATION
from tpshard.verifier.hf.own_code import as_known, published_as, unlike
from tpshard.verifier.hf.published import as_class
from tpshard.verifier.model_types import COMPUTES_AS, TRIED

TEXT_KEYS = ("text_config", "llm_config", "language_config")
# Facts of a file, not of a model.
NO_MATTER = {"architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache"}
OUTER = "outer_model_type"
"""Holds, in the config of a text model, the type of the model that nests it: its table has the names of the files."""
WITHOUT_TOWERS = "without_towers"
"""Is true of the config of a model with towers of which the text model alone is run."""
# Weights are dequantised before a class has them.
_LEFT_OUT = {"model_type", "architectures", *QUANTISATION}


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model: the config itself, or what a multimodal one nests."""
    config = with_towers(config)
    nested = next((config[key] for key in TEXT_KEYS if isinstance(config.get(key), Mapping)), None)
    outer = str(config.get("model_type"))
    if outer not in TRIED and nested is None and f"{outer}_text" in COMPUTES_AS:
        # The first files of Qwen2-VL and Qwen2.5-VL have the text model's values beside the vision model's.
        return _on_text_alone({**config, "model_type": f"{outer}_text"})
    if outer in TRIED or nested is None:
        return _on_text_alone(config)
    tied = bool(nested.get("tie_word_embeddings") or config.get("tie_word_embeddings"))
    return {"model_type": f"{outer}_text", **_on_text_alone(nested), "tie_word_embeddings": tied}


def _on_text_alone(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the model that computes the same, where there are no pictures."""
    alike = COMPUTES_AS.get(str(config.get("model_type")))
    if alike is None:
        return as_known(config)
    changed = {**config, "model_type": alike}
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := config.get(key), Mapping):
            kept = {name: value for name, value in rope.items() if not name.startswith("mrope")}
            changed[key] = {name: "default" if value == "mrope" else value for name, value in kept.items()}
    return changed


def covers(config: Mapping[str, Any]) -> bool:
    """Whether a class of transformers computes logits for this config, tried here or not. Remote code never does."""
    text = text_of(config)
    if unlike(text) is not None:
        return False
    model_type = str(text.get("model_type"))
    if model_type in TRIED:
        return True
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        return False
    known = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or has_towers(config)
    return known or larger_of(model_type) is not None


def uncovered(config: Mapping[str, Any]) -> UnsupportedError | None:
    """Of a published config that says more than the class computes which else computes its type: what that is."""
    text = text_of(config)
    if (what := unlike(text)) is None:
        return None
    said = f"no class of transformers computes this {text.get('model_type')} model, which has {what}"
    return UnsupportedError(said, hint="--tier bytes compares the files; remote code is never run")


def tried(config: Any) -> bool:
    """Whether a class was split and run here, from its own names, so that a rank's model can be told its widths."""
    return config.model_type in TRIED and published_as(config) is None


def larger_of(model_type: str) -> str | None:
    """The type of the model with towers whose class computes a text model's logits, where none does for it alone."""
    try:
        from transformers.models.auto.configuration_auto import model_type_to_module_name
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        )
    except ImportError:
        return None
    found: str = model_type_to_module_name(model_type)
    alone = model_type in TRIED or model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return None if alone or found not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else found


def _in_larger(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """The config of the text model; true with that of a model with towers, where this alone has a class."""
    text = text_of(config)
    larger = larger_of(str(text.get("model_type")))
    if larger is None:
        return text, False
    if with_towers(config).get("model_type") == larger:
        return with_towers(config), True
    tied = bool(text.get("tie_word_embeddings"))
    return {"model_type": larger, "text_config": dict(text), "tie_word_embeddings": tied}, True


def model_config(config: Mapping[str, Any], *, whole: bool = False) -> Any:
    """The text model's config as transformers reads it; whole: that of the model with its towers.

    UnsupportedError where the library is not installed, or where it or this engine does not know the model.
    """
    outer = with_towers(config).get("model_type")
    given = config
    config, alone = (with_towers(given), False) if whole else _in_larger(given)
    try:
        from transformers import AutoConfig
        from transformers.utils import logging
    except ImportError:
        hint = "pip install transformers, or --tier bytes"
        raise UnsupportedError(f"a {config.get('model_type')} model needs transformers", hint=hint) from None
    if not (whole or alone or covers(config)):
        if (unknown := uncovered(config)) is not None:
            raise unknown
        what = f"this transformers has no class that computes logits for the model type {config.get('model_type')!r}"
        raise UnsupportedError(what, hint="--tier bytes compares the files; remote code is never run")
    from huggingface_hub.errors import StrictDataclassError

    # Every rank's model would repeat the library's remarks on the config.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]

    settings = {key: _plain(value) for key, value in config.items() if key not in _LEFT_OUT}
    try:
        made = AutoConfig.for_model(config["model_type"], **settings)
        made.to_dict()  # what it reads and cannot say again is no config either
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        reason, hint = " ".join(str(error).split()), "a newer transformers may"
        raise UnsupportedError(f"this transformers does not read the config: {reason}", hint=hint) from None
    for each in (made, text_config(made)):
        if hasattr(each, "per_layer_config"):
            each.allow_global_per_layer_attribute_access = True  # for what is said of most layers
    if outer != config.get("model_type"):
        setattr(made, OUTER, outer)
    if alone:
        setattr(made, WITHOUT_TOWERS, True)
    return made


def with_towers(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the model that sees pictures and computes logits: of a model that also speaks, a part."""
    thinker = config.get("thinker_config")
    return as_class(thinker if isinstance(thinker, Mapping) else config)


def has_towers(config: Mapping[str, Any]) -> bool:
    """Whether transformers has a class for the whole model, of which the text model is a part."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    except ImportError:
        return False
    model_type = str(with_towers(config).get("model_type"))
    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or not parted(config)


def parted(config: Mapping[str, Any]) -> bool:
    """Whether the text model has a config, and a class, of its own; else a class that computes it has the tower too."""
    text, own = text_of(config), isinstance(config.get("vision_config"), Mapping)
    return not (own and text.get("model_type") == config.get("model_type") and _is_causal(text))


def _is_causal(text: Mapping[str, Any]) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(text.get("model_type")) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _plain(value: Any) -> Any:
    """A value of config.json, in which transformers writes an infinite number as `{"__float__": "Infinity"}`."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _plain(v) for k, v in value.items()}
    return value


def same_model(one: Any, other: Any, but: Collection[str] = ()) -> bool:
    """Whether two configs are of models of the same sizes and settings. but: keys that others judge."""
    left, right = one.to_dict(), other.to_dict()
    return all(left.get(key) == right.get(key) for key in (left.keys() | right.keys()) - NO_MATTER - {*but})


def text_config(config: Any) -> Any:
    """The part of a config that describes the text model, where it has such a part."""
    return next((each for key in TEXT_KEYS if (each := getattr(config, key, None)) is not None), config)
