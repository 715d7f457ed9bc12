"""Mistral's own form, params.json and other names, as transformers' classes have it, which compute the same models.

What the values mean, and which names are whose, is read off vLLM's own loading of that form.
"""

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]
_LAYER = r"^(model\.language_model\.layers\.\d+)\."
_IN_LAYER = {
    **{"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention": "self_attn"},
    **{"feed_forward": "mlp", "experts": "mlp.experts", "gate": "mlp.gate", "shared_experts": "mlp.shared_experts"},
}
_ATTENTION = {
    **{"wv": "v_proj", "wo": "o_proj", "wq_a": "q_a_proj", "wq_b": "q_b_proj", "q_a_norm": "q_a_layernorm"},
    **{"wkv_a_with_mqa": "kv_a_proj_with_mqa", "wkv_b": "kv_b_proj", "kv_a_norm": "kv_a_layernorm"},
}
_BLOCK = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
NAMES: tuple[tuple[str, str], ...] = (
    *((r"^layers\.", "model.language_model.layers."), (r"^tok_embeddings\.", "model.language_model.embed_tokens.")),
    *((r"^norm\.", "model.language_model.norm."), (r"^output\.", "lm_head.")),
    *((rf"{_LAYER}{old}\.", rf"\1.{new}.") for old, new in _IN_LAYER.items()),
    *(
        (r"^vision_encoder\.", "model.vision_tower."),
        (r"^pre_mm_projector_norm\.", "model.multi_modal_projector.norm."),
    ),
    (r"^patch_merger\.", "model.multi_modal_projector.patch_merger."),
    (r"^vision_language_adapter\.w_in\.", "model.multi_modal_projector.linear_1."),
    (r"^vision_language_adapter\.w_out\.", "model.multi_modal_projector.linear_2."),
    *((rf"(self_attn|attention)\.{old}\.", rf"\1.{new}.") for old, new in _ATTENTION.items()),
    *((rf"(mlp|shared_experts|feed_forward)\.{old}\.", rf"\1.{new}.") for old, new in _BLOCK.items()),
)
"""As a model with a tower has them; where a text model is run alone, `language_model` falls away."""
PAIRED = tuple(
    (f".{module}.{old}", f".{module}.{new}")
    for module in ("self_attn", "attention")
    for old, new in (("wq", "q_proj"), ("wk", "k_proj"))
)
_TOWER = ("hidden_size", "num_channels", "image_size", "patch_size", "intermediate_size", "num_hidden_layers")
_KEYS = {
    **{"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"},
    **{"hidden_dim": "intermediate_size", "norm_eps": "rms_norm_eps", "vocab_size": "vocab_size"},
}
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
_MORE = ("use_biases", "ada_rms_norm_t_cond", "multimodal")
"""What none of these classes has."""


def text_config(params: Config) -> dict[str, Any] | str:
    """The config of the class that computes the text model; words where none is known to compute the same."""
    return _text_config(params) or "values in params.json that none of the known ones computes"


def _text_config(params: Config) -> dict[str, Any] | None:
    if any(params.get(key) for key in _MORE) or not params.get("causal", True):
        return None
    config = {new: params[old] for old, new in _KEYS.items()} | {
        "model_type": "mistral",
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "head_dim": params.get("head_dim") or params["dim"] // params["n_heads"],
        "hidden_act": params.get("activation", "silu"),
        "max_position_embeddings": params.get("max_position_embeddings", 128_000),
        "tie_word_embeddings": params["tie_word_embeddings"],
        "sliding_window": params.get("sliding_window"),
    }
    rope = _rope(params, latent="qk_nope_head_dim" in params)
    if rope is None:
        return None
    config["rope_parameters"] = rope
    if params.get("qk_nope_head_dim"):
        return _latent(config, params)
    if params.get("moe"):
        return _mixtral(config, params["moe"]) if not params.get("llama_4_scaling") else None
    return _dense(config, params)


def with_tower(params: Config, text: Config) -> Config | None:
    """The config of the class that sees pictures, around that of its text model; None where nothing sees any."""
    args = params.get("vision_encoder")
    if not args or not args.keys() >= {*_TOWER, "num_attention_heads", "image_token_id"}:
        return None
    vision = {key: args[key] for key in (*_TOWER, "num_attention_heads")} | {
        "model_type": "pixtral",
        "hidden_act": "silu",
        "head_dim": args["hidden_size"] // args["num_attention_heads"],
        "rope_parameters": {"rope_type": "default", "rope_theta": args.get("rope_theta", 10_000.0)},
    }
    config = {
        "text_config": dict(text),
        "vision_config": vision,
        "image_token_index": args["image_token_id"],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": args.get("adapter_bias", True),
        "vision_feature_layer": -1,
        "tie_word_embeddings": params["tie_word_embeddings"],
    }
    merged, normed = args.get("mm_projector_id") == "patch_merge", args.get("add_pre_mm_projector_layer_norm")
    if merged and normed:
        return config | {"model_type": "mistral3", "spatial_merge_size": args.get("spatial_merge_size", 1)}
    return None if merged or normed else config | {"model_type": "llava", "vision_feature_select_strategy": "full"}


def _dense(config: dict[str, Any], params: Config) -> dict[str, Any] | None:
    """Mistral, Ministral where windows differ by layer, or Ministral 3 where positions scale queries."""
    window = config["sliding_window"]
    if params.get("llama_4_scaling"):
        return config | {"model_type": "ministral3"} if not window else None
    if not isinstance(window, list):
        return config
    sizes = {each for each in window if each is not None}
    if len(sizes) > 1 or config["num_hidden_layers"] % len(window):
        return None
    kinds = ["full_attention" if each is None else "sliding_attention" for each in window]
    kinds *= config["num_hidden_layers"] // len(window)
    return config | {"model_type": "ministral", "layer_types": kinds, "sliding_window": next(iter(sizes), None)}


def _mixtral(config: dict[str, Any], moe: Config) -> dict[str, Any] | None:
    if moe.get("num_shared_experts") or isinstance(config["sliding_window"], list):
        return None
    experts = {"num_local_experts": moe["num_experts"], "num_experts_per_tok": moe["num_experts_per_tok"]}
    return config | experts | {"model_type": "mixtral"}


def _latent(config: dict[str, Any], params: Config) -> dict[str, Any] | None:
    """Mistral 4, as Mistral Large 3 is. Of several groups of experts vLLM scores another sum than transformers."""
    moe = params.get("moe") or {}
    alike = (
        (not moe or moe.get("num_shared_experts"))
        and moe.get("route_every_n") in (None, 1)
        and (moe.get("num_expert_groups") or 1) == 1
        and not config["sliding_window"]
        and config["rms_norm_eps"] == 1e-6  # which the class has for latents, whatever the config says
    )
    if not alike:
        return None
    experts = {
        "n_routed_experts": moe.get("num_experts", 1),
        "n_shared_experts": moe.get("num_shared_experts", 1),
        "num_experts_per_tok": moe.get("num_experts_per_tok", 1),
        "moe_intermediate_size": moe.get("expert_hidden_dim") or params["hidden_dim"],
        "first_k_dense_replace": moe.get("first_k_dense_replace") or 0 if moe else params["n_layers"],
        "routed_scaling_factor": moe.get("routed_scale", 1.0),
    }
    latent = {key: params.get(key) for key in _LATENT}
    every = {"num_key_value_heads": params["n_heads"], "norm_topk_prob": True, "rope_interleave": True}
    del config["head_dim"]  # which is of the parts together
    return config | latent | experts | every | {"model_type": "mistral4"}


def _rope(params: Config, *, latent: bool) -> dict[str, Any] | None:
    """Rotary positions; None where two lengths are said of which a class has one."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.get("rope_theta", 10_000.0)}
    if latent:  # of plain ones Mistral 4's class turns whole heads; by a factor of 1 nothing is stretched
        rope |= {"rope_type": "yarn", "factor": 1.0}
    if yarn := params.get("yarn"):
        rope |= {"rope_type": "yarn", "factor": float(yarn["factor"])}
        names = {"original_max_position_embeddings": "original_max_position_embeddings"}
        names |= {"beta": "beta_fast", "alpha": "beta_slow"}
        rope |= {new: yarn[old] for old, new in names.items() if old in yarn}
        if not yarn.get("apply_scale", True):
            rope["attention_factor"] = 1.0
        elif latent:  # they scale scores, not the rotated part alone
            rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    scaling = params.get("llama_4_scaling")
    if not scaling and not latent:
        return rope
    length = (scaling or rope).get("original_max_position_embeddings", 1)
    if rope.get("original_max_position_embeddings", length) != length:
        return None
    return rope | {
        "original_max_position_embeddings": length,
        "llama_4_scaling_beta": scaling["beta"] if scaling else 0.0,
    }
