"""The config of a class of transformers that computes a model published with code of its own, by its published config.

Each function gives that config, or words for what the model has and its class does not compute.
"""

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]
Made = dict[str, Any] | str
LAYERS = "unlike_layers"
"""The key of a class's config that says what differs of each layer: `kv` heads, `ffn` and its activation.

0: it has none; MATRIX: one matrix stands for it.
"""
MATRIX = "matrix"
NO_VALUES = (ArithmeticError, AttributeError, IndexError, TypeError, ValueError)
"""What a config leads to that has a text, a list, a null or a 0 where a size belongs."""


def _renamed(config: Config, keys: Mapping[str, str]) -> dict[str, Any]:
    found = {key: value for key, value in config.items() if key not in keys}
    return {**found, **{new: config[old] for old, new in keys.items() if old in config}}


def _first(*unlike: tuple[object, str]) -> str:
    """The words that stand behind the first condition that holds; none where none does."""
    return next((words for holds, words in unlike if holds), "")


def minicpm(config: Config) -> Made:
    """Granite: both scale embeddings, what each layer adds, and logits."""
    if config.get("num_experts"):
        return "experts"
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    return {
        **{key: value for key, value in config.items() if key not in ("scale_emb", "scale_depth", "dim_model_base")},
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
        "embedding_multiplier": config.get("scale_emb", 1),
        "residual_multiplier": config.get("scale_depth", 1) / layers**0.5,
        "logits_scaling": hidden / config.get("dim_model_base", 1),
        "attention_multiplier": (config.get("head_dim") or hidden // config["num_attention_heads"]) ** -0.5,
    }


def exaone(config: Config) -> Made:
    """Llama, under other names."""
    keys = {
        "num_layers": "num_hidden_layers",
        "layer_norm_epsilon": "rms_norm_eps",
        "activation_function": "hidden_act",
    }
    return _renamed(config, keys)


def qwen(config: Config) -> Made:
    """Qwen2 without groups; gate and up are each half as wide as said. Longer texts than the trained ones differ."""
    if not config.get("no_bias", True):
        return "biases in all its projections"
    keys = {"layer_norm_epsilon": "rms_norm_eps", "rotary_emb_base": "rope_theta"}
    return {
        **_renamed(config, keys),
        "num_key_value_heads": config["num_attention_heads"],
        "intermediate_size": (config.get("intermediate_size") or config["ffn_hidden_size"]) // 2,
        "hidden_act": "silu",
    }


def baichuan(config: Config) -> Made:
    """Llama without groups. The head of Baichuan 2, whose config knows a z-loss, is of rows of length 1.

    The larger models, whose positions are ALiBi's, say how long a text is under another key.
    """
    if "max_position_embeddings" not in config:
        return "ALiBi in the place of rotary positions"
    norm_head = "z_loss_weight" in config or config["vocab_size"] == 125696
    if norm_head and config.get("tie_word_embeddings"):
        return "one table for its embedding and its normed head"
    return {**config, "num_key_value_heads": config["num_attention_heads"], "norm_head": norm_head}


def mimo_v2(config: Config) -> Made:
    """MiMo-V2-Flash, with q, k and v as one."""
    window = {
        "num_attention_heads": "swa_num_attention_heads",
        "head_dim": "swa_head_dim",
        "v_head_dim": "swa_v_head_dim",
    }
    kinds, experts = config.get("hybrid_layer_pattern") or [], config.get("moe_layer_freq") or []
    groups = config.get("swa_num_key_value_heads")
    other = any(config.get(swa) not in (None, config.get(key)) for key, swa in window.items())
    unlike = _first(
        (other, "heads of another size in its windows"),
        (not (kinds and experts), "no lists of the kinds of its layers"),
        (not config.get("add_swa_attention_sink_bias", True), "windows without sinks"),
        (config.get("add_full_attention_sink_bias"), "sinks in full attention"),
        (groups not in (None, 2 * config["num_key_value_heads"]), "not twice as many KV heads in its windows"),
    )
    if unlike:
        return unlike
    partial = config.get("partial_rotary_factor", 1.0)
    thetas = {
        "full_attention": config.get("rope_theta", 5e6),
        "sliding_attention": config.get("swa_rope_theta", 1e4),
    }
    return {
        **_renamed(config, {"layernorm_epsilon": "rms_norm_eps"}),
        "layer_types": ["sliding_attention" if kind else "full_attention" for kind in kinds],
        "mlp_layer_types": ["sparse" if kind else "dense" for kind in experts],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": partial}
            for kind, theta in thetas.items()
        },
    }


def _shared_width(config: Config) -> int:
    """Of all shared experts of a Ling, which are one module."""
    each = config.get("moe_shared_expert_intermediate_size") or config["moe_intermediate_size"]
    return int(each) * int(config.get("num_shared_experts") or 0)


def bailing_moe(config: Config) -> Made:
    """Granite with shared experts: a softmax of the chosen scores is one of all, made to sum to 1."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    unlike = _first(
        (config.get("score_function") not in (None, "softmax"), "a sigmoid for the scores of its experts"),
        (config.get("moe_router_enable_expert_bias"), "a bias in the choice of its experts"),
        (config.get("n_group") and config.get("topk_group"), "groups of experts to choose from"),
        (not config.get("norm_topk_prob"), "scores of experts that need not sum to 1"),
        (config.get("routed_scaling_factor", 1) != 1, "scaled scores of experts"),
        (config.get("first_k_dense_replace"), "layers without experts"),
        (config.get("use_qk_norm"), "norms of queries and keys"),
        (config.get("use_qkv_bias") or config.get("use_bias"), "biases"),
        (config.get("norm_head"), "a normed head"),
        (config.get("partial_rotary_factor", 1) != 1, "rotary positions in a part of each head"),
        (config.get("rotary_dim") not in (None, head), "rotary positions in a part of each head"),
    )
    if unlike:
        return unlike
    keys = {"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"}
    kept = {key: value for key, value in config.items() if key != "intermediate_size"}
    return {
        **_renamed(kept, keys),
        "head_dim": head,
        "shared_intermediate_size": _shared_width(config),
        **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0),
        "attention_multiplier": head**-0.5,
    }


def bailing_moe_v2(config: Config) -> Made:
    """GLM-4.5: the same attention, with norms of its heads, and the same choice of experts."""
    shared = config.get("num_shared_experts") or 0
    unlike = _first(
        (config.get("score_function", "sigmoid") != "sigmoid", "a softmax for the scores of its experts"),
        (not config.get("moe_router_enable_expert_bias", True), "no bias in the choice of its experts"),
        (not shared, "no shared experts"),
        (_shared_width(config) != shared * config["moe_intermediate_size"], "shared experts of another width"),
        (config.get("use_bias"), "biases in all its projections"),
        (config.get("norm_head"), "a normed head"),
    )
    if unlike:
        return unlike
    keys = {
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
        "use_qkv_bias": "attention_bias",
    }
    partial = config.get("partial_rotary_factor", 1.0)
    if config.get("rotary_dim") and config.get("head_dim"):
        partial = config["rotary_dim"] / config["head_dim"]
    return {**_renamed(config, keys), "partial_rotary_factor": partial}


def bailing_hybrid(config: Config) -> Made:
    """Ling 3.0 under the type of its class, saved by that or as published; or Ring 2.5."""
    if config.get("layer_types"):
        return dict(config)
    if config.get("architectures") == ["BailingMoeV2_5ForCausalLM"]:
        return "Ring 2.5's linear attention"
    return bailing_moe_v3(config)


def bailing_moe_v3(config: Config) -> Made:
    """Ling 3.0. What is turned of a head has a size of its own, so no factor says it.

    Layers behind the last whole group attend to all tokens, which the class does not know by itself.
    """
    shared, rest = divmod(_shared_width({"num_shared_experts": 1, **config}), config["moe_intermediate_size"])
    limits = (config.get(f"{each}_swiglu_limit_list") or () for each in ("expert", "share_expert"))
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    unlike = _first(
        (config.get("q_lora_rank"), "queries that come from a latent"),
        (
            config.get("gated_attention_proj_granularity_type", "head_wise") != "head_wise",
            "another gate than one for each head",
        ),
        (not config.get("no_kda_lora", True), "gates of linear attention that come from a latent"),
        (config.get("score_function", "sigmoid") != "sigmoid", "a softmax for the scores of its experts"),
        (not config.get("moe_router_enable_expert_bias", True), "no bias in the choice of its experts"),
        (any(map(any, limits)), "limits in its experts"),
        (not shared or rest, "shared experts of another width"),
        (config.get("use_bias") or config.get("use_qkv_bias"), "biases"),
        (rope.get("rope_type", rope.get("type", "default")) != "default", "scaled positions"),
    )
    if unlike:
        return unlike
    layers, group = config["num_hidden_layers"], config["layer_group_size"]
    full = (layer % group == group - 1 or layer >= layers // group * group for layer in range(layers))
    return {
        **{key: value for key, value in config.items() if key != "partial_rotary_factor"},
        "num_shared_experts": shared,
        "layer_types": ["full_attention" if each else "linear_attention" for each in full],
    }


def chatglm(config: Config) -> Made:
    """GLM-4 as it was before its class: fused, with rows of query, key and value one behind another."""
    unlike = _first(
        (not config.get("rmsnorm", True), "LayerNorms"),
        (not config.get("multi_query_attention", True), "no groups of heads"),
        (config.get("add_bias_linear"), "biases in all its projections"),
        (config.get("apply_residual_connection_post_layernorm"), "residuals taken behind its norms"),
        (not config.get("post_layer_norm", True), "no norm behind its last layer"),
        (not config.get("original_rope", True), "positions in two dimensions"),
    )
    if unlike:
        return unlike
    keys = {
        **{"num_layers": "num_hidden_layers", "multi_query_group_num": "num_key_value_heads"},
        **{"ffn_hidden_size": "intermediate_size", "kv_channels": "head_dim", "layernorm_epsilon": "rms_norm_eps"},
        **{
            "add_qkv_bias": "attention_bias",
            "padded_vocab_size": "vocab_size",
            "seq_length": "max_position_embeddings",
        },
    }
    theta = 10000 * config.get("rope_ratio", 1)
    return {"pad_token_id": None, **_renamed(config, keys), "partial_rotary_factor": 0.5, "rope_theta": theta}


def minimax_text_01(config: Config) -> Made:
    """MiniMax, which turns whole heads: so features of queries and keys lie in another order, and most are turned by 0.

    How fast the layers forget differs by less than 1e-5.
    """
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    turned, shared = config.get("rotary_dim") or head, config.get("shared_intermediate_size") or 0
    unlike = _first(
        (not config.get("postnorm"), "residuals taken before its norms"),
        (any(shared) if isinstance(shared, list) else shared, "shared experts"),
        (not isinstance(config["num_local_experts"], int), "layers with unlike numbers of experts"),
        (config["num_local_experts"] == 1, "no experts"),
        (heads & heads - 1, "a number of heads that is no power of 2"),
    )
    if unlike:
        return unlike
    each = [("full_attention", "full_attn"), ("linear_attention", "linear_attn"), ("mlp", "mlp")]
    kinds = config.get("attn_type_list") or config.get("decoder_attention_types") or [1] * layers
    factor = {"rope_type": "proportional", "partial_rotary_factor": turned / head} if turned != head else {}
    return {
        **_renamed(
            {key: value for key, value in config.items() if key != "rope_theta"},
            {f"layernorm_{old}_{ab}": f"{new}_{ab}_factor" for old, new in each for ab in ("alpha", "beta")},
        ),
        **{"head_dim": head, "rotary_dim": turned},
        "layer_types": ["full_attention" if kind else "linear_attention" for kind in kinds],
        # Of the whole head's width, which the class divides by.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.get("rope_theta", 1e4) ** (head / turned)}
        | factor,
    }


def nemotron_nas(config: Config) -> Made:
    """LLaMA, with layers that differ."""
    heads, hidden, layers = config["num_attention_heads"], config["hidden_size"], []
    for block in config["block_configs"]:
        attention, ffn = block["attention"], block["ffn"]
        unlike = _first(
            (attention.get("window_length") or attention.get("num_sink_tokens"), "windows"),
            (attention.get("sparsify") or ffn.get("sparsify"), "sparse matrices"),
        )
        if unlike:
            return unlike
        kv = MATRIX if attention["replace_with_linear"] else 0
        if not kv and not attention["no_op"]:
            kv = heads // attention["n_heads_in_group"]
        wide = MATRIX if ffn["replace_with_linear"] else 0
        if not wide and not ffn["no_op"]:
            # A multiple of the model's width, for which two of three matrices count.
            wide = ffn.get("intermediate_size") or -(-int(2 * ffn["ffn_mult"] * hidden / 3) // 256) * 256
        layers.append({"kv": kv, "ffn": wide, "hidden_act": ffn.get("hidden_act")})
    if config.get("position_embedding_type") in ("mistral_yarn", "rope_llama4"):
        return "neighbours that are turned together"
    # What it says of all layers stands for none of them, and its class wants numbers.
    sizes = {"num_key_value_heads": heads, "intermediate_size": config.get("intermediate_size") or 1}
    return {**config, **sizes, LAYERS: layers}


def _is_adapter(said: Config) -> bool:
    return bool(said["r"]) and said["lora_alpha"] / said["r"] > 0 if {"r", "lora_alpha"} <= said.keys() else False


def phi4mm(config: Config) -> Made:
    """Phi-3, of text alone: no adapter is used then."""
    said = (config[key] for key in ("speech_lora", "vision_lora") if isinstance(config.get(key), Mapping))
    unlike = _first(
        (config.get("attention_bias") or config.get("mlp_bias") or config.get("lm_head_bias"), "biases"),
        (config.get("full_attn_mod", 1) != 1, "several kinds of attention"),
        (not all(map(_is_adapter, said)), "an adapter without a rank and a scale"),
    )
    return unlike or {**config, "tie_word_embeddings": config.get("tie_word_embeddings", True)}
