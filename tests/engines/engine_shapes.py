"""Shapes of the tensors of types that transformers has no class for, or saves wrongly; by their published names."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def own_numbers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same shapes and dtypes, with numbers drawn by name, so that none can stand for another."""
    import torch

    found = {}
    for name, tensor in tensors.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if tensor.is_floating_point():
            values = (tensor.dim() == 1) + 0.08 * torch.randn(tensor.shape, generator=generator)
            found[name] = values.to(tensor.dtype)
        else:
            found[name] = torch.randint(0, 8, tensor.shape, generator=generator, dtype=tensor.dtype)
    return found


def olmo_hybrid(config: Mapping[str, Any]) -> Shapes:
    """Keys and values of other widths, of which transformers saves the convolutions cut at the wrong places."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv = hidden // heads * config["num_key_value_heads"]
    keys, values = heads * config["linear_key_head_dim"], heads * config["linear_value_head_dim"]
    shapes = _ends(config, "embed_tokens")
    for layer, kind in enumerate(config["layer_types"]):
        prefix = f"model.layers.{layer}."
        if kind == "full_attention":
            rows = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
            shapes |= {f"{prefix}self_attn.{name}.weight": (each, hidden) for name, each in rows.items()}
            shapes |= {f"{prefix}self_attn.q_norm.weight": (hidden,), f"{prefix}self_attn.k_norm.weight": (kv,)}
            norms = ("post_attention_layernorm", "post_feedforward_layernorm")
        else:
            start = f"{prefix}linear_attn."
            rows = {"q": keys, "k": keys, "v": values, "g": values, "a": heads, "b": heads}
            shapes |= {f"{start}{name}_proj.weight": (each, hidden) for name, each in rows.items()}
            shapes |= {f"{start}{name}_conv1d.weight": (rows[name], 1, 4) for name in "qkv"}
            shapes |= {
                f"{start}A_log": (heads,),
                f"{start}dt_bias": (heads,),
                f"{start}o_proj.weight": (hidden, values),
            }
            shapes[f"{start}o_norm.weight"] = (config["linear_value_head_dim"],)
            norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{prefix}{norm}.weight": (hidden,) for norm in norms}
        shapes |= _gated(f"{prefix}mlp.", config["intermediate_size"], hidden)
    return shapes


def nemotron_nas(config: Mapping[str, Any]) -> Shapes:
    """Layers of many widths, some without attention or without a feed-forward, some with one matrix in its place."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    shapes = _ends(config, "embed_tokens")
    for layer, block in enumerate(config["block_configs"]):
        prefix, attention, ffn = f"model.layers.{layer}.", block["attention"], block["ffn"]
        if attention["replace_with_linear"]:
            shapes[f"{prefix}self_attn.linear_attn.weight"] = (hidden, hidden)
        elif not attention["no_op"]:
            kv = hidden // attention["n_heads_in_group"]
            rows = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
            shapes |= {f"{prefix}self_attn.{name}.weight": (each, hidden) for name, each in rows.items()}
            if config.get("attention_bias"):
                shapes |= {f"{prefix}self_attn.{name}.bias": (each,) for name, each in rows.items()}
        if not attention["no_op"]:
            shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        if not ffn["no_op"]:
            wide = ffn.get("intermediate_size") or -(-int(2 * ffn["ffn_mult"] * hidden / 3) // 256) * 256
            shapes |= _gated(f"{prefix}mlp.", wide, hidden)
            shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    assert heads * (hidden // heads) == hidden
    return shapes


def dbrx(config: Mapping[str, Any]) -> Shapes:
    """Of which newer code saves a config that older code does not read."""
    hidden, vocab, heads = config["d_model"], config["vocab_size"], config["n_heads"]
    experts = config["ffn_config"]["moe_num_experts"]
    rows = hidden + 2 * config["attn_config"]["kv_n_heads"] * hidden // heads
    shapes: Shapes = {"transformer.wte.weight": (vocab, hidden), "transformer.norm_f.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["n_layers"]):
        prefix = f"transformer.blocks.{layer}."
        shapes |= {f"{prefix}norm_attn_norm.norm_{place}.weight": (hidden,) for place in (1, 2)}
        shapes[f"{prefix}norm_attn_norm.attn.Wqkv.weight"] = (rows, hidden)
        shapes[f"{prefix}norm_attn_norm.attn.out_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}ffn.router.layer.weight"] = (experts, hidden)
        stacked = experts * config["ffn_config"]["ffn_hidden_size"]
        shapes |= {f"{prefix}ffn.experts.mlp.{name}": (stacked, hidden) for name in ("w1", "v1", "w2")}
    return shapes


def minicpm(config: Mapping[str, Any]) -> Shapes:
    """LLaMA's tensors, and experts in some."""
    hidden, experts = config["hidden_size"], config.get("num_experts", 0)
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = _ends(config, "embed_tokens")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        rows = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
        shapes |= {f"{prefix}self_attn.{name}.weight": (each, hidden) for name, each in rows.items()}
        if config.get("attention_bias"):
            shapes |= {f"{prefix}self_attn.{name}.bias": (each,) for name, each in rows.items()}
        shapes |= {f"{prefix}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        if experts:
            shapes[f"{prefix}mlp.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            shapes |= _gated(f"{prefix}mlp.experts.{expert}.", config["intermediate_size"], hidden, "w1 w3 w2")
        if not experts:
            shapes |= _gated(f"{prefix}mlp.", config["intermediate_size"], hidden)
    return shapes


def bailing_moe(config: Mapping[str, Any]) -> Shapes:
    """Ling: queries, keys and values as one matrix."""
    hidden, head = config["hidden_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = _ends(config, "word_embeddings")
    for layer in range(config["num_hidden_layers"]):
        attention = f"model.layers.{layer}.attention."
        if config["use_qk_norm"]:
            shapes |= {f"{attention}{letter}_layernorm.weight": (head,) for letter in ("query", "key")}
        shapes[f"{attention}query_key_value.weight"] = ((heads + 2 * kv) * head, hidden)
        shapes[f"{attention}dense.weight"] = (hidden, heads * head)
        if config["use_qkv_bias"] or config["use_bias"]:
            shapes[f"{attention}query_key_value.bias"] = ((heads + 2 * kv) * head,)
        if config["use_bias"]:
            shapes[f"{attention}dense.bias"] = (hidden,)
        shapes |= _sparse(f"model.layers.{layer}.", layer, config)
    return shapes


def bailing_hybrid(config: Mapping[str, Any]) -> Shapes:
    """Ring 2.5 or Ling 3.0: linear attention, then latent."""
    hidden, heads, head = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    group, ring = config["layer_group_size"], config["architectures"] == ["BailingMoeV2_5ForCausalLM"]
    shapes = _ends(config, "word_embeddings")
    for layer in range(config["num_hidden_layers"]):
        attention = f"model.layers.{layer}.attention."
        if (layer + 1) % group == 0:
            shapes |= _latent(attention, config)
        elif ring:
            shapes[f"{attention}query_key_value.weight"] = (3 * heads * head, hidden)
            shapes[f"{attention}dense.weight"] = (hidden, heads * head)
            shapes[f"{attention}g_proj.weight"] = (heads * head, hidden)
            shapes[f"{attention}g_norm.weight"] = (heads * head,)
            shapes |= {f"{attention}{letter}_layernorm.weight": (head,) for letter in ("query", "key")}
        else:
            shapes |= {f"{attention}{letter}_proj.weight": (heads * head, hidden) for letter in "qkvfg"}
            shapes |= {f"{attention}{letter}_conv1d.weight": (heads * head, 1, 4) for letter in "qkv"}
            shapes |= {f"{attention}b_proj.weight": (heads, hidden), f"{attention}dt_bias": (heads * head,)}
            shapes |= {f"{attention}A_log": (1, 1, heads, 1), f"{attention}o_norm.weight": (head,)}
            shapes[f"{attention}o_proj.weight"] = (hidden, heads * head)
        shapes |= _sparse(f"model.layers.{layer}.", layer, config)
    return shapes


def _latent(attention: str, config: Mapping[str, Any]) -> Shapes:
    hidden, heads, query = config["hidden_size"], config["num_attention_heads"], config["q_lora_rank"]
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    plain, value = config["qk_nope_head_dim"], config["v_head_dim"]
    shapes: Shapes = {
        "kv_a_proj_with_mqa.weight": (latent + rope, hidden),
        "kv_a_layernorm.weight": (latent,),
        "kv_b_proj.weight": (heads * (plain + value), latent),
        "dense.weight": (hidden, heads * value),
    }
    if query:
        shapes |= {"q_a_proj.weight": (query, hidden), "q_a_layernorm.weight": (query,)}
        shapes["q_b_proj.weight"] = (heads * (plain + rope), query)
    else:
        shapes["q_proj.weight"] = (heads * (plain + rope), hidden)
    if gate := config.get("gated_attention_proj_granularity_type"):
        shapes["g_proj.weight"] = (heads if gate == "head_wise" else heads * value, hidden)
    return {f"{attention}{name}": shape for name, shape in shapes.items()}


def _sparse(prefix: str, layer: int, config: Mapping[str, Any]) -> Shapes:
    """A layer's norms and its feed-forward, with experts where it has them."""
    hidden, experts = config["hidden_size"], config["num_experts"]
    shapes: Shapes = {f"{prefix}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    if layer < config["first_k_dense_replace"]:
        return shapes | _gated(f"{prefix}mlp.", config["intermediate_size"], hidden)
    shapes[f"{prefix}mlp.gate.weight"] = (experts, hidden)
    if config.get("moe_router_enable_expert_bias"):
        shapes[f"{prefix}mlp.gate.expert_bias"] = (experts,)
    wide = config["moe_intermediate_size"]
    for expert in range(experts):
        shapes |= _gated(f"{prefix}mlp.experts.{expert}.", wide, hidden)
    return shapes | _gated(f"{prefix}mlp.shared_experts.", wide * config["num_shared_experts"], hidden)


def _ends(config: Mapping[str, Any], embedding: str) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {f"model.{embedding}.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    return shapes if config.get("tie_word_embeddings") else shapes | {"lm_head.weight": (vocab, hidden)}


def _gated(prefix: str, wide: int, hidden: int, names: str = "gate_proj up_proj down_proj") -> Shapes:
    gate, up, down = (f"{prefix}{name}.weight" for name in names.split())
    return {gate: (wide, hidden), up: (wide, hidden), down: (hidden, wide)}
