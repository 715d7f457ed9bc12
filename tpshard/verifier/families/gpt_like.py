"""Families after GPT-2, and OPT: from config.json, with its old keys and its defaults, to a Family."""

from dataclasses import replace

from tpshard.errors import UnsupportedError
from tpshard.verifier.families.config import Config, require_length, rope_of, sized
from tpshard.verifier.families.family import Family, Rope

# GPT-Neo has names of its own for layers and heads.
GPT2_SIZES = (
    ("n_embd", "hidden_size"),
    ("n_layer", "num_layers", "num_hidden_layers"),
    ("n_head", "num_heads", "num_attention_heads"),
)
BLOOM_SIZES = (("hidden_size", "n_embed"), ("n_layer", "num_hidden_layers"), ("n_head", "num_attention_heads"))


def gpt2(config: Config, model_type: str) -> Family:
    family = sized(config, model_type, GPT2_SIZES)
    scales = family.scales if config.get("scale_attn_weights", default=True) else (1.0,) * family.layers
    if config.get("scale_attn_by_inverse_layer_idx", default=False) and model_type == "gpt2":
        scales = tuple(scale / (i + 1) for i, scale in enumerate(scales))
    family = replace(
        family,
        eps=float(config.get("layer_norm_epsilon", default=1e-5)),
        activation=config.get("activation_function", default="gelu_new"),
        prefixes=("transformer.", ""),
        embed="wte",
        positions="wpe",
        layer="h.{}.",
        fused="segments",
        qkv=("attn.c_attn",),
        attention="attn",
        out="attn.c_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        attn_norm="ln_1",
        mlp_norm="ln_2",
        final_norm="ln_f",
        scales=scales,
        conv1d=model_type == "gpt2",
    )
    return family.with_biases(attention=True, mlp=True, norms=True)


def gpt_bigcode(config: Config, model_type: str) -> Family:
    family = gpt2(config, model_type)
    multi_query = config.get("multi_query", default=True)
    return replace(
        family,
        activation=config.get("activation_function", default="gelu_pytorch_tanh"),
        fused="segments" if multi_query else "heads",
        kv_heads=1 if multi_query else family.heads,
    )


def gpt_neo(config: Config, model_type: str) -> Family:
    family = gpt2(config, model_type)
    kinds = config.get("attention_layers")
    if kinds is None:
        pattern = config.get("attention_types", default=[[["global", "local"], 12]])
        kinds = [kind for names, count in pattern for _ in range(count) for kind in names]
    require_length("attention_types", kinds, family.layers)
    window = config.number("window_size", default=256)
    family = replace(
        family,
        fused=None,
        qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        out="attn.attention.out_proj",
        windows=tuple(window if kind == "local" else None for kind in kinds),
        scales=(1.0,) * family.layers,
    )
    return family.with_biases(mlp=True, norms=True, more=(family.out,))


def gptj(config: Config, model_type: str) -> Family:
    family = gpt2(config, model_type)
    dims = config.number("rotary_dim", default=64)
    family = replace(
        family,
        positions=None,
        fused=None,
        qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        out="attn.out_proj",
        up="mlp.fc_in",
        down="mlp.fc_out",
        mlp_norm=None,
        block="parallel",
        scales=(family.head_dim**-0.5,) * family.layers,
        rope=Rope(dims, 10000.0, config.number("n_positions", default=2048), interleaved=True),
    )
    return family.with_biases(mlp=True, norms=True, more=("lm_head",))


def gpt_neox(config: Config, model_type: str) -> Family:
    family = sized(config, model_type)
    share = float(config.get("rotary_pct", "partial_rotary_factor", default=0.25))
    family = replace(
        family,
        eps=float(config.get("layer_norm_eps", default=1e-5)),
        activation=config.get("hidden_act", default="gelu"),
        prefixes=("gpt_neox.", ""),
        heads_names=("embed_out", "lm_head"),
        embed="embed_in",
        fused="heads",
        qkv=("attention.query_key_value",),
        attention="attention",
        out="attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        final_norm="final_layer_norm",
        block="parallel" if config.get("use_parallel_residual", default=True) else "sequential",
        rope=rope_of(config, family.head_dim, theta_key="rotary_emb_base", share=share),
    )
    attention = bool(config.get("attention_bias", default=True))
    return family.with_biases(attention=attention, mlp=True, norms=True)


def bloom(config: Config, model_type: str) -> Family:
    family = replace(
        sized(config, model_type, BLOOM_SIZES),
        eps=float(config.get("layer_norm_epsilon", default=1e-5)),
        activation="gelu_pytorch_tanh",
        prefixes=("transformer.", ""),
        embed="word_embeddings",
        embed_norm="word_embeddings_layernorm",
        layer="h.{}.",
        fused="heads",
        qkv=("self_attention.query_key_value",),
        attention="self_attention",
        out="self_attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        final_norm="ln_f",
        residual_after_norm=bool(config.get("apply_residual_connection_post_layernorm", default=False)),
        alibi="bloom",
    )
    return family.with_biases(attention=True, mlp=True, norms=True)


def falcon(config: Config, model_type: str) -> Family:
    family = bloom(config, model_type)
    # RefinedWeb and RefinedWebModel are what 40B and 7B were called before transformers had the family.
    new = bool(config.get("new_decoder_architecture", default=model_type == "RefinedWeb"))
    multi_query = bool(config.get("multi_query", default=True))
    parallel = bool(config.get("parallel_attn", default=True))
    norms = config.get("num_ln_in_parallel_attn", default=2 if new else 1)
    if (new and not parallel) or (norms == 2 and not new):
        found = f"new_decoder_architecture {new}, parallel_attn {parallel}, num_ln_in_parallel_attn {norms}"
        raise UnsupportedError("this Falcon config describes no model that transformers can run", found=found)
    two = parallel and norms == 2
    alibi = bool(config.get("alibi", default=False))
    if new:
        kv_heads = config.number("num_kv_heads", "n_head_kv", default=family.heads)
    else:
        kv_heads = 1 if multi_query else family.heads
    family = replace(
        family,
        activation=config.get("activation", default="gelu"),
        embed_norm=None,
        kv_heads=kv_heads,
        fused="groups" if new else "segments" if multi_query else "heads",
        attn_norm="ln_attn" if two else "input_layernorm",
        mlp_norm="ln_mlp" if two else None if parallel else "post_attention_layernorm",
        block="parallel" if parallel else "sequential",
        residual_after_norm=False,
        alibi="falcon" if alibi else None,
        rope=None if alibi else rope_of(config, family.head_dim),
    )
    linear = bool(config.get("bias", default=False))
    return family.with_biases(attention=linear, mlp=linear, norms=True)


def opt(config: Config, model_type: str) -> Family:
    family = sized(config, model_type)
    before = bool(config.get("do_layer_norm_before", default=True))
    projected = config.number("word_embed_proj_dim", default=family.hidden) != family.hidden
    final = before and not config.get("_remove_final_layer_norm", default=False)
    affine = bool(config.get("layer_norm_elementwise_affine", default=True))
    family = replace(
        family,
        activation=config.get("activation_function", default="relu"),
        prefixes=("model.decoder.", "decoder.", ""),
        positions="embed_positions",
        position_offset=2,
        project_in="project_in" if projected else None,
        project_out="project_out" if projected else None,
        out="self_attn.out_proj",
        up="fc1",
        down="fc2",
        attn_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        final_norm="final_layer_norm" if final else None,
        block="sequential" if before else "post",
        bare_norms=not affine,
    )
    linear = bool(config.get("enable_bias", default=True))
    return family.with_biases(attention=linear, mlp=linear, norms=affine)
