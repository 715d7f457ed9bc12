"""Families after LLaMA: from config.json, with its defaults, to a Family."""

from dataclasses import replace

from tpshard.verifier.families.config import Config, rope_of, sized
from tpshard.verifier.families.family import Family


def llama(config: Config, model_type: str) -> Family:
    family = sized(config, model_type, head_dim=128 if model_type == "qwen3" else 0)
    family = replace(
        family,
        kv_heads=config.number("num_key_value_heads", default=family.heads),
        norm="rms",
        eps=float(config.get("rms_norm_eps", default=1e-6)),
        activation=config.get("hidden_act", default="silu"),
        gate="mlp.gate_proj",
        rope=rope_of(config, family.head_dim),
    )
    return family.with_biases(attention=_says(config, "attention_bias"), mlp=_says(config, "mlp_bias"))


def _says(config: Config, key: str, default: bool = False) -> bool:
    """A flag of the config."""
    return bool(config.get(key, default=default))


def internlm2(config: Config, model_type: str) -> Family:
    family = replace(
        llama(config, model_type),
        heads_names=("output",),
        embed="tok_embeddings",
        fused="groups",
        qkv=("attention.wqkv",),
        attention="attention",
        out="attention.wo",
        mlp="feed_forward",
        gate="feed_forward.w1",
        up="feed_forward.w3",
        down="feed_forward.w2",
        attn_norm="attention_norm",
        mlp_norm="ffn_norm",
    )
    return family.with_biases(attention=_says(config, "bias", default=True))


def mistral(config: Config, model_type: str) -> Family:
    family = llama(config, model_type)
    window = config.values.get("sliding_window", 4096)
    return replace(family, windows=(window,) * family.layers, biases=())


def qwen(config: Config, model_type: str) -> Family:
    family = llama(config, model_type)
    window = config.get("sliding_window", default=4096) if config.get("use_sliding_window", default=False) else None
    first = config.get("max_window_layers", default=28)
    norms = ("self_attn.q_norm", "self_attn.k_norm") if model_type == "qwen3" else (None, None)
    windows = config.layer_windows(family.layers, window, lambda i: window is not None and i >= first)
    family = replace(family, windows=windows, q_norm=norms[0], k_norm=norms[1])
    own = _says(config, "attention_bias")
    return family.with_biases(attention=own) if model_type == "qwen3" else family.with_biases(more=family.qkv)


def gemma2(config: Config, model_type: str) -> Family:
    family = llama(config, model_type)
    head_dim = config.number("head_dim", default=256)
    window = config.get("sliding_window", default=4096)
    scale = float(config.get("query_pre_attn_scalar", default=256)) ** -0.5
    return replace(
        family.with_biases(attention=_says(config, "attention_bias")),
        head_dim=head_dim,
        kv_heads=config.number("num_key_value_heads", default=4),
        rope=rope_of(config, head_dim),
        norm="rms_plus_one",
        activation=config.get("hidden_activation", default="gelu_pytorch_tanh"),
        embed_scale=family.hidden**0.5,
        attn_out_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_out_norm="post_feedforward_layernorm",
        scales=(scale,) * family.layers,
        windows=config.layer_windows(family.layers, window, lambda i: i % 2 == 0),
        softcap=config.values.get("attn_logit_softcapping", 50.0),
        final_softcap=config.values.get("final_logit_softcapping", 30.0),
    )
