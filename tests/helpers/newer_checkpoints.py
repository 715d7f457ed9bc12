"""Small models of the families that came last, by name; most are put together from modules that others have too.

As small as a family allows: two layers, so that a config may ask for one of either kind, and four experts.
"""

from __future__ import annotations

from typing import Any

from tests.helpers.further_checkpoints import FURTHER, NOT_STACKED, SIZES

_GQA = SIZES | {"num_experts_per_tok": 2}
_WIDE = _GQA | {"head_dim": 16}
_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32}
_ROUTED = {"n_routed_experts": 4, "moe_intermediate_size": 32}
_LOCAL = {"num_local_experts": 4}
_LATENT = (
    _GQA
    | _ROUTED
    | {"num_key_value_heads": 8, "kv_lora_rank": 16, "q_lora_rank": 24, "first_k_dense_replace": 1}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
)
# 12 tokens are more than 8.
_INDEXED = _LATENT | {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 8, "n_group": 2, "topk_group": 1}
# Two value heads share a key head.
_LINEAR = _WIDE | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 3,
}
# One layer of Mamba 2, with a bias and without, and one that attends. At tp 4 two ranks share a group.
_MAMBA = _GQA | {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 12,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

NEWER: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4_text": (
        "llama4_text",
        _WIDE | _LOCAL | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_bias": True},
    ),
    "qwen3_next": (
        "qwen3_next",
        _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 48, "mlp_only_layers": [0]},
    ),
    "qwen3_5_text": ("qwen3_5_text", _LINEAR),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 48}),
    "glm4_moe_lite": ("glm4_moe_lite", _LATENT),
    "deepseek_v32": ("deepseek_v32", _INDEXED),
    "glm_moe_dsa": ("glm_moe_dsa", _INDEXED | {"indexer_types": ["full", "shared"]}),
    "exaone_moe": ("exaone_moe", _WIDE | _EXPERTS | {"sliding_window": 8}),
    "solar_open": ("solar_open", _WIDE | _ROUTED | {"attention_bias": True}),
    "flex_olmo": ("flex_olmo", _GQA | {"num_experts": 4}),
    "hy_v3": ("hy_v3", _WIDE | _EXPERTS),
    "cohere2_moe": (
        "cohere2_moe",
        _WIDE
        | {"num_experts": 4, "num_shared_experts": 2, "prefix_dense_intermediate_size": 48}
        | {"mlp_layer_types": ["dense", "sparse"]},
    ),
    "granitemoeshared": ("granitemoeshared", _GQA | _LOCAL | {"shared_intermediate_size": 48}),
    "granitemoehybrid": (
        "granitemoehybrid",
        _MAMBA
        | _LOCAL
        | {"shared_intermediate_size": 48, "layer_types": ["linear_attention", "full_attention"]}
        | {"mamba_n_groups": 1, "mamba_proj_bias": True},
    ),
    "granitemoehybrid-dense": (
        "granitemoehybrid",
        _MAMBA
        | {"num_local_experts": 0, "shared_intermediate_size": 48, "tie_word_embeddings": True}
        | {"layer_types": ["full_attention", "linear_attention"], "mamba_conv_bias": False},
    ),
    "nemotron_h": (
        "nemotron_h",
        _WIDE
        | _ROUTED
        | {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 12, "n_groups": 2, "chunk_size": 8}
        | {"moe_shared_expert_intermediate_size": 48, "moe_latent_size": 40, "hybrid_override_pattern": "M*-E"}
        | {"num_hidden_layers": 4},
    ),
    "falcon_h1": (
        "falcon_h1",
        _MAMBA | {"mamba_d_ssm": 128, "mamba_rms_norm": True, "ssm_multipliers": [0.5, 0.7, 1.3, 1.7, 2.0]},
    ),
    "falcon_h1-no-norm": ("falcon_h1", _MAMBA | {"mamba_d_ssm": 128, "mamba_norm_before_gate": False}),
    "bamba": ("bamba", _MAMBA | {"attn_layer_indices": [1]}),
    "mistral4": ("mistral4", _LATENT | {"rope_parameters": _YARN}),
    "gemma4_text": (
        "gemma4_text",
        _WIDE
        | {"global_head_dim": 24, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 251},
    ),
    "gemma4_text-moe": (
        "gemma4_text",
        _WIDE
        | {"global_head_dim": 24, "layer_types": ["sliding_attention", "full_attention"], "attention_k_eq_v": True}
        | {"num_global_key_value_heads": 4, "hidden_size_per_layer_input": 0, "enable_moe_block": True}
        | {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "gemma4_text-shared": (
        "gemma4_text",
        _WIDE
        | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 24}
        | {
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 251,
        },
    ),
    "jamba": (
        "jamba",
        _GQA
        | {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 12, "mamba_dt_rank": 8}
        | {"mamba_proj_bias": True},
    ),
    "lfm2": (
        "lfm2",
        _GQA
        | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16, "block_ffn_dim_multiplier": 1.1}
        | {"conv_bias": True},
    ),
    "lfm2_moe": ("lfm2_moe", _GQA | _EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        _WIDE
        | _ROUTED
        | {"v_head_dim": 12, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
        | {"attention_bias": True},
    ),
    "afmoe": ("afmoe", _WIDE | _EXPERTS | {"num_dense_layers": 1}),
}
AS_THEY_ARE = frozenset(
    {"llama4_text", "granitemoeshared", "granitemoehybrid", "granitemoehybrid-dense", "qwen3_5_text", "bamba"}
    | {"falcon_h1", "falcon_h1-no-norm", "mistral4", "gemma4_text", "gemma4_text-moe", "gemma4_text-shared"}
    | {"lfm2", "lfm2_moe"}
)
"""Those whose experts are always stacked, or that have none."""

NEWER |= FURTHER
AS_THEY_ARE |= NOT_STACKED
