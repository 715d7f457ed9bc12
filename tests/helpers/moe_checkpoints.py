"""Small models of the mixture-of-experts families: model type and config of each, by name.

Eight experts, GQA with 2 KV heads (repeated at tp 4) wherever a family has it, layer, expert and shared expert of
different widths, and a layer without experts wherever a config may ask for one.
"""

from __future__ import annotations

from typing import Any

_GQA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
_MHA = _GQA | {"num_key_value_heads": 8}
_LOCAL = _GQA | {"num_local_experts": 8}
_FINE = {"moe_intermediate_size": 32, "n_routed_experts": 8, "first_k_dense_replace": 1}
_LATENT = (
    _MHA
    | _FINE
    | {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
)

MOE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", _LOCAL),
    "mixtral-head-dim": ("mixtral", _LOCAL | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2_moe": (
        "qwen2_moe",
        _GQA
        | {
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": ("qwen3_moe", _GQA | {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 16}),
    "qwen3_moe-every-other": (
        "qwen3_moe",
        _GQA
        | {
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "head_dim": 16,
            "decoder_sparse_step": 2,
            "attention_bias": True,
        },
    ),
    "olmoe": ("olmoe", _GQA | {"num_experts": 8}),
    "granitemoe": ("granitemoe", _LOCAL),
    "granitemoe-tied-bias": ("granitemoe", _LOCAL | {"tie_word_embeddings": True, "attention_bias": True}),
    "phimoe": ("phimoe", _LOCAL | {"attention_bias": True, "lm_head_bias": True}),
    "deepseek_v2": ("deepseek_v2", _LATENT | {"n_shared_experts": 2, "attention_bias": True, "mlp_bias": True}),
    "deepseek_v2-lite": ("deepseek_v2", _LATENT | {"q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", _LATENT | {"n_group": 4, "topk_group": 2}),
    "deepseek_v3-all-sparse": (
        "deepseek_v3",
        _LATENT
        | {"n_group": 2, "topk_group": 1, "n_shared_experts": 2, "first_k_dense_replace": 0, "q_lora_rank": None},
    ),
    "gpt_oss": ("gpt_oss", _LOCAL | {"head_dim": 16, "sliding_window": 8}),
    "glm4_moe": ("glm4_moe", _GQA | _FINE | {"head_dim": 16}),
    "glm4_moe-bias-qk-norm": ("glm4_moe", _GQA | _FINE | {"attention_bias": True, "use_qk_norm": True}),
    "minimax_m2": ("minimax_m2", _LOCAL | {"head_dim": 16}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        _GQA
        | {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "use_bias": True, "moe_layer_interval": 2},
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", _GQA | {"num_experts": 8, "moe_topk": 2, "head_dim": 16}),
    "dots1": ("dots1", _GQA | _FINE | {"n_shared_experts": 2}),
}
# As newer code may save them: the experts of a layer stacked, under the names of its own modules.
STACKED = "-stacked"
MOE |= {
    name + STACKED: MOE[name]
    for name in (
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        "granitemoe",
        "phimoe",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe",
        "minimax_m2",
        "ernie4_5_moe",
        "hunyuan_v1_moe",
        "dots1",
    )
}
