"""Small models of further families that are served with more than one device, by name; as small as a family allows."""

from __future__ import annotations

from typing import Any

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}

_LATENT = {
    **{"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12},
    **{"num_key_value_heads": 8, "n_routed_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    # 12 tokens are more than 8.
    **{"index_n_heads": 4, "index_head_dim": 16, "index_topk": 8},
}

FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax": (
        "minimax",
        # A prompt is several blocks of lightning attention.
        SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8, "mlp_alpha_factor": 2.0},
    ),
    # Keys and values of equal width: of others transformers saves the convolutions cut at the wrong places.
    "minimax-stacked": ("minimax", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8}),
    "olmo_hybrid": (
        "olmo_hybrid",
        SIZES
        | {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "olmo_hybrid-stacked": ("olmo_hybrid", SIZES | {"layer_types": ["linear_attention", "full_attention"]}),
    "mamba2": (
        "mamba2",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 12, "n_groups": 2}
        | {"chunk_size": 8, "use_bias": True},
    ),
    "bitnet": ("bitnet", SIZES),
    # Three layers share two transformers, whose adapters are their own.
    "zamba2": (
        "zamba2",
        SIZES
        | {"num_hidden_layers": 4, "layers_block_type": ["hybrid", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 2}
        | {"n_mamba_heads": 8, "mamba_ngroups": 2, "mamba_d_state": 12, "chunk_size": 8, "adapter_rank": 4}
        | {"num_key_value_heads": 8, "use_shared_attention_adapter": True, "use_mem_rope": True},
    ),
    "dbrx": (
        "dbrx",
        {
            "d_model": 64,
            "n_heads": 8,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 1e4},
        }
        | {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    ),
    "hy_v4": ("hy_v4", SIZES | _LATENT | {"num_hidden_layers": 3}),
    "hy_v4-stacked": ("hy_v4", SIZES | _LATENT),
    "dots3_note": (
        "dots3_note_text",
        SIZES
        | _LATENT
        | {"num_hidden_layers": 3, "shared_experts_intermediate_size": 48, "sliding_window": 8, "head_dim": 24}
        | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 24, "swa_kv_lora_rank": 16}
        | {"swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 10},
    ),
    "qwen4_exp": (
        "qwen4_exp_text",
        SIZES
        | _EXPERTS
        | {"head_dim": 16, "shared_expert_intermediate_size": 48, "layer_types": ["linear_attention", "full_attention"]}
        | {
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
        }
        | {"hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [1], "ple_embed_dim": 32, "heads_per_ngram": 2}
        | {"ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 4}
        | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4}
        | {"indexer_compress_ratio": 2},
    ),
    "inkling": (
        "inkling_text",
        SIZES
        | {
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "swa_head_dim": 8,
        }
        | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "d_rel": 4, "rel_extent": 16}
        | {
            "sliding_window_size": 8,
            "layer_types": ["hybrid_sliding", "hybrid"],
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "laguna": (
        "laguna",
        SIZES
        | _EXPERTS
        | {
            "head_dim": 16,
            "shared_expert_intermediate_size": 48,
            "layer_types": ["sliding_attention", "full_attention"],
        }
        | {"num_attention_heads_per_layer": [4, 8], "sliding_window": 8},
    ),
    "laguna-stacked": (
        "laguna",
        SIZES | _EXPERTS | {"head_dim": 16, "shared_expert_intermediate_size": 48, "gating": "per-head"},
    ),
    "laguna-per-element": (
        "laguna",
        SIZES | _EXPERTS | {"head_dim": 16, "shared_expert_intermediate_size": 48, "gating": "per-element"},
    ),
}
NOT_STACKED = frozenset(
    {
        "olmo_hybrid",
        "olmo_hybrid-stacked",
        "mamba2",
        "bitnet",
        "laguna-stacked",
        "zamba2",
        "dbrx",
        "hy_v4",
        "hy_v4-stacked",
        "inkling",
    }
    | {"minimax", "minimax-stacked", "laguna", "laguna-per-element"}
)
"""Those without experts, whose experts are always stacked, or that have a variant with stacked ones."""
DEFAULT = ("laguna", "zamba2", "dbrx")
"""Those that tests of every variant run by default: with heads of their own in a layer, parameters of several layers,
experts in one dim."""
