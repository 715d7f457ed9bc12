"""Configs that are published with code of their own, as transformers' class of the same model has them."""

from collections.abc import Callable, Mapping
from typing import Any

from tpshard.verifier.hf import mistral_params
from tpshard.verifier.hf.own_code import PUBLISHED_AS, as_known
from tpshard.verifier.hf.own_configs import NO_VALUES

Config = Mapping[str, Any]


def _ernie_vl(config: Config) -> Config:
    """ERNIE 4.5 VL: all values at the top; transformers' script of the same name says what becomes of them."""
    vision, count = config["vision_config"], config["num_hidden_layers"]
    starts, ends = config["moe_layer_start_index"], config.get("moe_layer_end_index") or [count - 1]
    interval, theta = config.get("moe_layer_interval") or 1, config.get("rope_theta", 5e5)
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": _sections(config)}
    sparse = [(layer + 1) % interval == 0 and min(starts) <= layer <= max(ends) for layer in range(count)]
    text = {key: value for key, value in config.items() if key not in ("vision_config", "rope_scaling")} | {
        "model_type": "ernie4_5_vl_moe_text",
        "moe_num_experts": config["moe_num_experts"][0],
        "moe_num_shared_experts": config.get("moe_num_shared_experts") or 0,
        "mlp_layer_types": ["sparse" if each else "dense" for each in sparse],
        "rope_parameters": rope,
    }
    merged = {key.replace("conv", "merge"): config[key] for key in _CONVS if key in config}
    width = {"intermediate_size": int(vision["hidden_size"] * vision["mlp_ratio"])} if "mlp_ratio" in vision else {}
    return {
        "model_type": "ernie4_5_vl_moe",
        "text_config": text,
        "vision_config": {"model_type": "ernie4_5_vl_moe_vision"} | width | merged | _known(vision),
        "image_token_id": config.get("im_patch_id", 100295),
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
    }


_CONVS = ("spatial_conv_size", "temporal_conv_size")


def _sections(config: Config) -> list[int]:
    """How many frequencies go with rows, columns and frames."""
    half = (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]) // 2
    frames = config.get("freq_allocation", 20)
    return [(half - frames) // 2, (half - frames) // 2, frames]


def _known(vision: Config) -> dict[str, Any]:
    known = ("depth", "hidden_size", "hidden_act", "num_heads", "in_channels", "patch_size", "intermediate_size")
    return {key: vision[key] for key in (*known, "spatial_merge_size") if key in vision}


def _mistral(config: Config) -> Config:
    """Mistral's own form: values of the text model at the top, those of a tower below."""
    text = as_known(config)
    found = None if text is config else mistral_params.with_tower(config, text)
    return config if found is None else {**found, PUBLISHED_AS: text[PUBLISHED_AS]}


def _inkling(config: Config) -> Config:
    """Inkling: whatever type its text says, or none, the class has one for it."""
    text = config.get("text_config")
    return {**config, "text_config": {**text, "model_type": "inkling_text"}} if isinstance(text, Mapping) else config


_PUBLISHED: Mapping[str, Callable[[Config], Config]] = {
    "ernie4_5_moe_vl": _ernie_vl,
    "inkling_mm_model": _inkling,
    "mistral_native": _mistral,
}


def as_class(config: Config) -> Config:
    """The config as transformers' class has it; the config itself, where that is how it is published, or no size is."""
    change = _PUBLISHED.get(str(config.get("model_type")))
    try:
        return config if change is None else change(config)
    except (KeyError, *NO_VALUES):
        return config
