"""Small checkpoints for the engines: one or more of every architecture, as transformers saves them.

Larger than those of the other tests, because engines want heads of 32 and vocabularies that they pad: 8 heads, 2 KV
heads (repeated at tp 4), a vocabulary of 1000, bfloat16.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.engines import engine_shapes, engine_written

_TOKENS = {"vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = _TOKENS | {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8}
_MHA = _SIZES | {"intermediate_size": 512, "max_position_embeddings": 128}
_GQA = _MHA | {"num_key_value_heads": 2}
_HEAD = _GQA | {"head_dim": 32}
_GPT2 = _TOKENS | {"n_embd": 256, "n_layer": 2, "n_head": 8, "n_positions": 128}
_GPTJ = _GPT2 | {"rotary_dim": 8}
_BLOOM = _TOKENS | {"hidden_size": 256, "n_layer": 2, "n_head": 8}
_FALCON = _SIZES | {"max_position_embeddings": 128}
_OPT = _SIZES | {"ffn_dim": 512, "max_position_embeddings": 128, "word_embed_proj_dim": 256}
_NEO = _TOKENS | {
    "hidden_size": 256,
    "num_layers": 2,
    "num_heads": 8,
    "max_position_embeddings": 128,
    "attention_types": [[["global", "local"], 1]],
}
_MPT = {"vocab_size": 1000, "d_model": 256, "n_heads": 8, "n_layers": 2, "max_seq_len": 128}
_LOCAL = _GQA | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128}
_FINE = _HEAD | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LATENT = _MHA | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 8,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_group": 4,
    "topk_group": 2,
}
_GLM_MOE = _HEAD | {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "use_qk_norm": True,
}
_LING = {
    **{"first_k_dense_replace": 1, "num_shared_experts": 2, "moe_router_enable_expert_bias": True},
    **{"use_qk_norm": True, "use_rmsnorm": True, "use_bias": False, "use_qkv_bias": False, "norm_head": False},
    **{"score_function": "sigmoid", "n_group": 4, "topk_group": 2, "router_dtype": "fp32", "norm_topk_prob": True},
    **{"embedding_dropout": 0.0, "attention_dropout": 0.0, "output_dropout": 0.0, "partial_rotary_factor": 0.5},
}
_LING_1 = _LING | {
    **{"first_k_dense_replace": 0, "moe_router_enable_expert_bias": False, "use_qk_norm": False},
    **{"score_function": None, "n_group": None, "topk_group": None, "router_dtype": None, "partial_rotary_factor": 1.0},
}
_RING = (
    _FINE
    | _LING
    | {"layer_group_size": 2, "group_norm_size": 4, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_rope_head_dim": 16}
    | {"qk_nope_head_dim": 32, "v_head_dim": 48, "num_key_value_heads": 8, "partial_rotary_factor": 0.5}
    | {"architectures": ["BailingMoeV2_5ForCausalLM"], "tie_word_embeddings": False}
)
_LING_3 = _RING | {
    **{"architectures": ["BailingMoeV3ForCausalLM"], "short_conv_kernel_size": 4, "no_kda_lora": True},
    **{"moe_shared_expert_intermediate_size": 64, "gated_attention_proj_granularity_type": "head_wise"},
}
_LONGCAT = {
    **_TOKENS,
    **{"hidden_size": 256, "num_layers": 2, "num_attention_heads": 8, "max_position_embeddings": 128},
    **{"ffn_hidden_size": 512, "expert_ffn_hidden_size": 64, "n_routed_experts": 8, "moe_topk": 2},
    **{"zero_expert_num": 2, "zero_expert_type": "identity", "routed_scaling_factor": 6.0, "router_bias": False},
    **{"q_lora_rank": 48, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32},
    **{"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "attention_method": "MLA", "attention_bias": False},
    "tie_word_embeddings": False,
}
_GPT_OSS = _LOCAL | {"head_dim": 32}

_SPARSE = _LATENT | {"index_n_heads": 4, "index_head_dim": 64, "index_topk": 8, "topk_method": "noaux_tc"}
_LITE = _LATENT | {"n_group": 1, "topk_group": 1}
_QWEN_NEXT = (
    _FINE
    | {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 128}
    | {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32, "linear_value_head_dim": 48}
    | {"mlp_only_layers": [0], "decoder_sparse_step": 1}
)
# Its published config has keys that transformers' own has under other names, and vLLM reads.
_MINIMAX = _LOCAL | {"head_dim": 32, "rotary_dim": 16, "use_routing_bias": True, "scoring_func": "sigmoid"}
_ERNIE = _GQA | {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 2}
_HY = (
    _FINE
    | {"num_hidden_layers": 3, "num_shared_experts": 1, "first_k_dense_replace": 1}
    | {"expert_hidden_dim": 64, "qk_norm": True, "route_norm": True}
)
_EXAONE = _FINE | {"sliding_window": 8, "num_shared_experts": 1}
_AF = (
    _FINE
    | {"num_dense_layers": 1, "num_shared_experts": 2}
    | {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}
)
_MIMO = (
    _HEAD
    | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "v_head_dim": 16}
    | {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
    | {"hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "layernorm_epsilon": 1e-6, "sliding_window_size": 8}
    | {"swa_num_attention_heads": 8, "swa_num_key_value_heads": 4, "swa_head_dim": 32, "swa_v_head_dim": 16}
    | {"add_swa_attention_sink_bias": True, "n_group": 1, "topk_group": 1}
)
# In a window more heads attend.
_STEP = _HEAD | {
    **{"num_hidden_layers": 3, "num_attention_groups": 2, "max_seq_len": 128, "sliding_window": 8},
    # The list goes on for the layers that predict further tokens.
    **{"layer_types": ["full_attention", "sliding_attention"] * 2, "use_head_wise_attn_gate": True},
    **{"moe_num_experts": 8, "moe_top_k": 2, "moe_intermediate_size": 64, "share_expert_dim": 128},
    **{"moe_layers_enum": "1,2", "use_moe": True, "use_moe_router_bias": True, "need_fp32_gate": True},
    **{"moe_router_activation": "sigmoid", "partial_rotary_factors": [0.5, 1.0, 0.5]},
    "attention_other_setting": {
        **{"attention_type": "sliding_attention", "num_attention_heads": 12, "num_attention_groups": 2, "head_dim": 32},
    },
    **{"apart": False, "attention_bias": False, "mlp_bias": False},
}

_BIASES = ("correction_bias", "expert_bias")

_TIED = {"tie_word_embeddings": True}
_UNTIED = {"tie_word_embeddings": False}
_BIAS = {"attention_bias": True}
_FOUR = {"num_key_value_heads": 4}
_LINEAR = _HEAD | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_MAMBA = _GQA | {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_n_groups": 1}
_HUNYUAN = _HEAD | {"num_experts": 8, "num_experts_per_tok": 2, "moe_topk": 2, "intermediate_size": 128}
_HYBRID = {"shared_intermediate_size": 64, "layer_types": ["linear_attention", "full_attention"]}
_NEMOTRON = (
    _HEAD
    | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_hidden_layers": 4}
    | {"mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 32, "moe_shared_expert_intermediate_size": 64}
    | {"hybrid_override_pattern": "M*-E"}
)
_JAMBA = {
    "num_experts": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 16,
    "mamba_dt_rank": 16,
}
_CONV = _GQA | {"layer_types": ["conv", "full_attention"]}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}

_LLAMA4 = (
    _HEAD
    | {"num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size": 128, "intermediate_size_mlp": 256}
    | {"interleave_moe_layer_step": 2}
)
_GEMMA4 = _HEAD | {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "global_head_dim": 64,
    "vocab_size_per_layer_input": 1000,
}
_GEMMA4_MOE = {
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
}
_CHATGLM = {
    **{"hidden_size": 256, "ffn_hidden_size": 512, "num_layers": 2, "num_attention_heads": 8, "kv_channels": 32},
    **{"multi_query_attention": True, "multi_query_group_num": 2, "padded_vocab_size": 1000, "vocab_size": 1000},
    **{"seq_length": 128, "rmsnorm": True, "layernorm_epsilon": 1e-5, "post_layer_norm": True},
    **{"apply_residual_connection_post_layernorm": False, "fp32_residual_connection": False, "original_rope": True},
    **{"add_bias_linear": False, "add_qkv_bias": True, "num_hidden_layers": 2},
}

_ATTENDS = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 4}
_NO_ATTENTION = {"no_op": True, "replace_with_linear": False, "n_heads_in_group": None}
_FEEDS = {"no_op": False, "replace_with_linear": False, "ffn_mult": 1.5}
_SEARCHED = (
    _TOKENS
    | {"hidden_size": 256, "num_attention_heads": 8, "max_position_embeddings": 128, "num_hidden_layers": 4}
    | {
        "block_configs": [
            {"attention": _ATTENDS, "ffn": _FEEDS},
            {"attention": _NO_ATTENTION, "ffn": _FEEDS | {"ffn_mult": 3.0}},
            {"attention": _ATTENDS | {"n_heads_in_group": 8}, "ffn": {"no_op": True, "replace_with_linear": False}},
            {"attention": _ATTENDS, "ffn": {"no_op": False, "replace_with_linear": False, "intermediate_size": 384}},
        ]
    }
)
_LINEAR_BLOCKS = {
    "num_hidden_layers": 1,
    "block_configs": [{"attention": _NO_ATTENTION | {"no_op": False, "replace_with_linear": True}, "ffn": _FEEDS}],
}
_MINICPM = _GQA | {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 64}
# Layers that attend to a window have fewer heads.
_LAGUNA = (
    _FINE
    | {"layer_types": ["sliding_attention", "full_attention"], "num_attention_heads_per_layer": [4, 8]}
    | {"shared_expert_intermediate_size": 128, "sliding_window": 8}
)
_OLMO_HYBRID = _GQA | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 48,
}
_DBRX = {
    **{"vocab_size": 1000, "d_model": 256, "n_heads": 8, "n_layers": 2, "max_seq_len": 128},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 8, "moe_top_k": 2},
}
_MAMBA_2 = {
    **{"vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"hidden_size": 256, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 64, "state_size": 32, "chunk_size": 32},
}
_ZAMBA = (
    _MHA
    | {"num_hidden_layers": 4, "layers_block_type": ["hybrid", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 2}
    | {"n_mamba_heads": 8, "mamba_d_state": 32, "chunk_size": 32, "adapter_rank": 16, "num_key_value_heads": 8}
)

_MIXED = {"num_shared_experts": 2, "prefix_dense_intermediate_size": 64, "mlp_layer_types": ["dense", "sparse"]}

LOADED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GQA | _UNTIED),
    "llama-tied-bias": ("llama", _GQA | _TIED | _BIAS | {"mlp_bias": True}),
    "mistral": ("mistral", _GQA | _UNTIED),
    "qwen2": ("qwen2", _GQA | _UNTIED),
    "qwen2-tied": ("qwen2", _GQA | _TIED),
    "qwen3": ("qwen3", _HEAD | _UNTIED),
    "qwen3-tied": ("qwen3", _HEAD | _TIED),
    "gemma2": ("gemma2", _HEAD),
    "gpt2": ("gpt2", _GPT2),
    "gpt2-untied": ("gpt2", _GPT2 | _UNTIED),
    "gpt_neox": ("gpt_neox", _MHA | _UNTIED),
    "gpt_neox-tied-nobias": ("gpt_neox", _MHA | _TIED | {"attention_bias": False}),
    "gptj": ("gptj", _GPTJ | _UNTIED),
    "gpt_bigcode": ("gpt_bigcode", _GPT2 | {"multi_query": True}),
    "gpt_bigcode-untied": ("gpt_bigcode", _GPT2 | _UNTIED | {"multi_query": True}),
    "bloom": ("bloom", _BLOOM),
    "falcon-new": ("falcon", _FALCON | {"new_decoder_architecture": True, "multi_query": False, "num_kv_heads": 2}),
    "falcon-mqa-untied": ("falcon", _FALCON | _UNTIED | {"multi_query": True}),
    "falcon-mha": ("falcon", _FALCON | {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}),
    "opt": ("opt", _OPT),
    "opt-untied": ("opt", _OPT | _UNTIED),
    "opt-350m-like": ("opt", _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 128}),
    "opt-nobias": ("opt", _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "phi3": ("phi3", _GQA | _UNTIED),
    "phi3-tied": ("phi3", _GQA | _TIED),
    "gemma": ("gemma", _HEAD),
    "gemma3": ("gemma3_text", _HEAD),
    "gemma3-bias": ("gemma3_text", _HEAD | _BIAS),
    "stablelm": ("stablelm", _GQA | _UNTIED),
    "stablelm-tied-bias": ("stablelm", _GQA | _TIED | {"use_qkv_bias": True}),
    "starcoder2": ("starcoder2", _GQA | _TIED),
    "starcoder2-untied-nobias": ("starcoder2", _GQA | _UNTIED | {"use_bias": False}),
    "olmo": ("olmo", _GQA | _UNTIED),
    "olmo-tied-bias": ("olmo", _GQA | _TIED | _BIAS),
    "olmo2": ("olmo2", _GQA | _UNTIED),
    "olmo2-tied-bias": ("olmo2", _GQA | _TIED | _BIAS),
    "cohere": ("cohere", _GQA | _TIED),
    "cohere-norm": ("cohere", _MHA | _TIED | {"use_qk_norm": True}),
    "cohere2": ("cohere2", _GQA | _TIED),
    "granite": ("granite", _GQA | _TIED),
    "granite-untied-bias": ("granite", _GQA | _UNTIED | _BIAS | {"mlp_bias": True}),
    "glm": ("glm", _HEAD | _UNTIED),
    "glm-tied-nobias": ("glm", _HEAD | _TIED | {"attention_bias": False}),
    "glm4": ("glm4", _HEAD | _UNTIED),
    "glm4-tied-bias": ("glm4", _HEAD | _TIED | _BIAS),
    "smollm3": ("smollm3", _GQA | _TIED),
    "smollm3-untied-bias": ("smollm3", _GQA | _UNTIED | _BIAS | {"mlp_bias": True}),
    "internlm2": ("internlm2", _GQA | _UNTIED | _FOUR | {"bias": False}),
    "internlm2-tied": ("internlm2", _GQA | _TIED | _FOUR | {"bias": False}),
    "nemotron": ("nemotron", _HEAD | _UNTIED),
    "nemotron-tied-bias": ("nemotron", _HEAD | _TIED | _BIAS | {"mlp_bias": True}),
    "exaone4": ("exaone4", _GQA | _TIED),
    "exaone4-untied": (
        "exaone4",
        _GQA | _UNTIED | {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "seed_oss": ("seed_oss", _HEAD | _UNTIED),
    "seed_oss-tied-bias": ("seed_oss", _HEAD | _TIED | {"attention_out_bias": True, "mlp_bias": True}),
    "ministral": ("ministral", _HEAD | _UNTIED),
    "ministral3": ("ministral3", _HEAD | _UNTIED),
    "ministral3-tied": ("ministral3", _HEAD | _TIED),
    "ernie4_5": ("ernie4_5", _HEAD | _UNTIED),
    "ernie4_5-tied": ("ernie4_5", _HEAD | _TIED),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _HEAD | _UNTIED),
    "hunyuan_v1_dense-tied-bias": ("hunyuan_v1_dense", _HEAD | _TIED | _BIAS),
    "apertus": ("apertus", _GQA | _UNTIED | _ROPE),
    "apertus-tied-bias": ("apertus", _GQA | _TIED | _BIAS | _ROPE),
    "arcee": ("arcee", _HEAD | _UNTIED | _ROPE),
    "arcee-tied-bias": ("arcee", _HEAD | _TIED | _BIAS | _ROPE | {"mlp_bias": True}),
    "exaone": ("exaone", _GQA | _UNTIED | {"bias": False, "mlp_bias": False}),
    "bailing_moe_v2": ("bailing_moe_v2", _FINE | _UNTIED | _LING),
    "exaone-tied-bias": ("exaone", _GQA | _TIED | {"bias": True, "mlp_bias": False}),
    "cwm": ("cwm", _HEAD | _UNTIED | _ROPE),
    "cwm-tied-bias": ("cwm", _HEAD | _TIED | _ROPE | {"mlp_bias": True}),
    "helium": ("helium", _HEAD | _UNTIED),
    "helium-tied-bias": ("helium", _HEAD | _TIED | _BIAS | {"mlp_bias": True}),
    "internlm3": ("internlm3", _HEAD | _UNTIED),
    "internlm3-tied-bias": ("internlm3", _HEAD | _TIED | {"qkv_bias": True, "bias": True}),
    "iquestcoder": ("iquestcoder", _HEAD | _UNTIED),
    "iquestcoder-tied-bias": ("iquestcoder", _HEAD | _TIED | _BIAS | {"mlp_bias": True}),
    "nanochat": ("nanochat", _HEAD | _UNTIED),
    "nanochat-tied-bias": ("nanochat", _HEAD | _TIED | _BIAS),
    "hyperclovax": ("hyperclovax", _HEAD | _UNTIED),
    "hyperclovax-tied-bias": ("hyperclovax", _HEAD | _TIED | _BIAS | {"mlp_bias": True, "use_post_norm": False}),
    "jais2": ("jais2", _HEAD | _UNTIED),
    "jais2-tied-nobias": ("jais2", _HEAD | _TIED | {"attention_bias": False, "mlp_bias": False}),
    "granite_swa": ("granite_swa", _HEAD | _TIED),
    "granite_swa-untied-bias": ("granite_swa", _HEAD | _UNTIED | _BIAS | {"mlp_bias": True}),
    "vaultgemma": ("vaultgemma", _HEAD | _TIED),
    "vaultgemma-untied-bias": ("vaultgemma", _HEAD | _UNTIED | _BIAS),
    "olmo3": ("olmo3", _GQA | _UNTIED),
    "olmo3-tied-bias": ("olmo3", _GQA | _TIED | _BIAS),
    "qwen3_5_text": ("qwen3_5_text", _LINEAR | _UNTIED),
    "qwen3_5_text-tied": ("qwen3_5_text", _LINEAR | _TIED),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", _LINEAR | _FINE | _UNTIED | {"shared_expert_intermediate_size": 128}),
    "lfm2": ("lfm2", _CONV | _TIED | {"conv_dim": 256, "block_dim": 256}),
    "lfm2-bias": ("lfm2", _CONV | _TIED | {"conv_dim": 256, "block_dim": 256, "conv_bias": True}),
    "lfm2_moe": ("lfm2_moe", _CONV | _FINE | _TIED | {"num_dense_layers": 1}),
    "lfm2_moe-bias": (
        "lfm2_moe",
        _CONV | _FINE | _TIED | {"num_dense_layers": 0, "use_expert_bias": False, "conv_bias": True},
    ),
    "dots1": ("dots1", _GLM_MOE | _UNTIED | {"n_group": 1, "topk_group": 1}),
    "dots1-tied-bias": ("dots1", _GLM_MOE | _TIED | _BIAS | {"n_group": 1, "topk_group": 1}),
    "solar_open": ("solar_open", _GLM_MOE | _UNTIED),
    "cohere2_moe": ("cohere2_moe", _FINE | _TIED | _MIXED),
    "flex_olmo": ("flex_olmo", _GQA | _UNTIED | {"num_experts": 8, "num_experts_per_tok": 2}),
    "flex_olmo-tied-bias": ("flex_olmo", _GQA | _TIED | _BIAS | {"num_experts": 8, "num_experts_per_tok": 2}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", _HUNYUAN | _UNTIED),
    "hunyuan_v1_moe-tied-bias": ("hunyuan_v1_moe", _HUNYUAN | _TIED | _BIAS),
    "granitemoehybrid": ("granitemoehybrid", _MAMBA | _LOCAL | _UNTIED | _HYBRID),
    "granitemoehybrid-tied-dense": ("granitemoehybrid", _MAMBA | _TIED | _BIAS | _HYBRID | {"num_local_experts": 0}),
    "falcon_h1": ("falcon_h1", _MAMBA | _UNTIED | {"head_dim": 32, "mamba_d_ssm": 512, "mamba_rms_norm": True}),
    "falcon_h1-tied-groups": (
        "falcon_h1",
        _MAMBA | _TIED | {"head_dim": 32, "mamba_d_ssm": 512, "mamba_rms_norm": False, "mamba_n_groups": 4},
    ),
    "nemotron_h": ("nemotron_h", _NEMOTRON | {"n_groups": 4}),
    "nemotron_h-latent": ("nemotron_h", _NEMOTRON | {"n_groups": 1, "moe_latent_size": 64}),
    "jamba": ("jamba", _GQA | _UNTIED | _JAMBA),
    "jamba-bias": ("jamba", _GQA | _UNTIED | _JAMBA | {"mamba_proj_bias": True}),
    "mixtral": ("mixtral", _LOCAL | _UNTIED),
    "mixtral-tied": ("mixtral", _LOCAL | _TIED),
    "qwen2_moe": ("qwen2_moe", _FINE | _UNTIED | {"shared_expert_intermediate_size": 128, "mlp_only_layers": [0]}),
    "qwen2_moe-tied": ("qwen2_moe", _FINE | _TIED | {"shared_expert_intermediate_size": 128}),
    "qwen3_moe": ("qwen3_moe", _FINE | _UNTIED | {"mlp_only_layers": [0]}),
    "qwen3_moe-tied": ("qwen3_moe", _FINE | _TIED),
    "olmoe": ("olmoe", _GQA | _UNTIED | _FOUR | {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128}),
    "granitemoe": ("granitemoe", _LOCAL | _TIED),
    "granitemoe-untied": ("granitemoe", _LOCAL | _UNTIED),
    "phimoe": ("phimoe", _LOCAL | _UNTIED | _BIAS),
    "phimoe-tied": ("phimoe", _LOCAL | _TIED),
    "deepseek_v2": ("deepseek_v2", _LATENT | _UNTIED | {"topk_method": "group_limited_greedy"}),
    "deepseek_v2-lite": ("deepseek_v2", _LATENT | _UNTIED | {"q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", _LATENT | _UNTIED | {"topk_method": "noaux_tc"}),
    "deepseek_v3-no-q-lora": ("deepseek_v3", _LATENT | _UNTIED | {"q_lora_rank": None, "topk_method": "noaux_tc"}),
    "gpt_oss": ("gpt_oss", _GPT_OSS | _UNTIED | _FOUR),
    "glm4_moe": ("glm4_moe", _GLM_MOE | _UNTIED),
    "glm4_moe-bias": ("glm4_moe", _GLM_MOE | _UNTIED | _BIAS),
    "deepseek_v32": ("deepseek_v32", _SPARSE | _UNTIED),
    "glm_moe_dsa": ("glm_moe_dsa", _SPARSE | _UNTIED),
    "glm_moe_dsa-shared": ("glm_moe_dsa", _SPARSE | _UNTIED | {"index_topk_pattern": "FSF"}),
    "glm4_moe_lite": ("glm4_moe_lite", _LITE | _UNTIED),
    "glm4_moe_lite-no-q-lora": ("glm4_moe_lite", _LITE | _UNTIED | {"q_lora_rank": None}),
    "qwen3_next": ("qwen3_next", _QWEN_NEXT | _UNTIED),
    "minimax_m2": ("minimax_m2", _MINIMAX | _UNTIED),
    "ernie4_5_moe": ("ernie4_5_moe", _ERNIE | _UNTIED),
    "ernie4_5_moe-tied-no-shared": ("ernie4_5_moe", _ERNIE | _TIED | {"moe_num_shared_experts": 0}),
    "hy_v3": ("hy_v3", _HY | _UNTIED),
    "hy_v3-tied": ("hy_v3", _HY | _TIED),
    "exaone_moe": ("exaone_moe", _EXAONE | _UNTIED),
    "exaone_moe-tied": ("exaone_moe", _EXAONE | _TIED),
    "afmoe": ("afmoe", _AF | _UNTIED),
    "granitemoeshared": ("granitemoeshared", _LOCAL | _TIED | {"shared_intermediate_size": 128}),
    "granitemoeshared-untied": ("granitemoeshared", _LOCAL | _UNTIED | {"shared_intermediate_size": 128}),
    "llama4": ("llama4_text", _LLAMA4 | _UNTIED),
    "gemma4": ("gemma4_text", _GEMMA4 | {"hidden_size_per_layer_input": 16}),
    "gemma4-untied-bias": ("gemma4_text", _GEMMA4 | _UNTIED | _BIAS | {"hidden_size_per_layer_input": 0}),
    "gemma4-moe": ("gemma4_text", _GEMMA4 | _GEMMA4_MOE),
    "gemma4-moe-k-is-v": (
        "gemma4_text",
        _GEMMA4 | _GEMMA4_MOE | {"attention_k_eq_v": True, "num_global_key_value_heads": 4},
    ),
    "chatglm": ("chatglm", _CHATGLM | _UNTIED),
    "chatglm-bias": ("chatglm", _CHATGLM | _UNTIED | {"add_bias_linear": True}),
    "chatglm-tied": ("chatglm", _CHATGLM | _TIED),
    "mimo_v2_flash": ("mimo_v2_flash", _MIMO | _UNTIED),
    "mimo_v2_flash-bias": ("mimo_v2_flash", _MIMO | _UNTIED | _BIAS),
    "nemotron-nas": ("nemotron-nas", _SEARCHED | _UNTIED),
    "nemotron-nas-tied-bias": ("nemotron-nas", _SEARCHED | _TIED | _BIAS),
    "minicpm": ("minicpm", _MINICPM | _TIED),
    "minicpm-untied-experts": ("minicpm", _MINICPM | _UNTIED | {"num_experts": 8, "num_experts_per_tok": 2}),
    "bailing_moe": ("bailing_moe", _FINE | _UNTIED | _LING_1),
    "bailing_moe-tied": ("bailing_moe", _FINE | _TIED | _LING_1),
    "bailing_moe-bias": ("bailing_moe", _FINE | _UNTIED | _LING_1 | {"use_qkv_bias": True}),
    "bailing_hybrid": ("bailing_hybrid", _RING),
    "bailing_hybrid-no-q-lora": ("bailing_hybrid", _RING | {"q_lora_rank": None}),
    "bailing_hybrid-v3": ("bailing_hybrid", _LING_3),
    "bailing_moe_v3": ("bailing_moe_v3", _LING_3 | {"gated_attention_proj_granularity_type": "element_wise"}),
    "longcat_flash": ("longcat_flash", _LONGCAT),
    "longcat_flash-plain": ("longcat_flash", _LONGCAT | {"mla_scale_q_lora": False, "zero_expert_num": 0}),
    "bailing_moe_v3-head-wise": ("bailing_moe_v3", _LING_3 | {"q_lora_rank": None}),
    "zamba2": ("zamba2", _ZAMBA | _TIED | {"mamba_ngroups": 4, "use_shared_attention_adapter": True}),
    "zamba2-one-group": ("zamba2", _ZAMBA | _TIED | {"mamba_ngroups": 1, "use_shared_attention_adapter": False}),
    "mamba2": ("mamba2", _MAMBA_2 | _UNTIED | {"n_groups": 4}),
    "mamba2-tied": ("mamba2", _MAMBA_2 | _TIED | {"n_groups": 1}),
    "step3p5": ("step3p5", _STEP | _UNTIED),
    "step3p5-experts-apart": ("step3p5", _STEP | _UNTIED | {"apart": True}),
}

PIPELINES = [
    "llama", "llama-tied-bias", "mistral", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied", "gemma2", "gpt_neox",
    "gpt_neox-tied-nobias", "phi3", "phi3-tied", "starcoder2", "starcoder2-untied-nobias", "olmo", "olmo2",
    "olmo2-tied-bias", "cohere", "cohere2", "granite", "granite-untied-bias", "glm", "glm-tied-nobias", "glm4",
    "smollm3", "smollm3-untied-bias", "nemotron", "exaone4", "exaone4-untied", "seed_oss", "mixtral", "mixtral-tied",
    "qwen2_moe", "qwen2_moe-tied", "qwen3_moe-tied", "olmoe", "granitemoe", "granitemoe-untied", "phimoe",
    "phimoe-tied", "deepseek_v2", "deepseek_v2-lite", "deepseek_v3", "deepseek_v3-no-q-lora", "gpt_oss",
]  # fmt: skip
"""Those whose stages are compared: of every family that the table lists under `pipelines`."""
WHOLE_EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe-tied", "olmoe", "granitemoe", "phimoe", "deepseek_v3", "gpt_oss"]
"""Those that are compared where vLLM has whole experts on each rank."""
"""What vLLM loads."""

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neo": ("gpt_neo", _NEO),
    "mpt": ("mpt", _MPT),
    "bloom-untied": ("bloom", _BLOOM | _UNTIED),
    "gptj-tied": ("gptj", _GPTJ | _TIED),
    "stablelm-norms": ("stablelm", _GQA | _UNTIED | {"qk_layernorm": True}),
    "phi": ("phi", _GQA | _UNTIED),
    "ernie4_5-bias": ("ernie4_5", _HEAD | _UNTIED | {"use_bias": True}),
    "qwen3_5_text-bias": ("qwen3_5_text", _LINEAR | _UNTIED | _BIAS),
    "lfm2-untied": ("lfm2", _CONV | _UNTIED | {"conv_dim": 256, "block_dim": 256}),
    "lfm2-without-conv_dim": ("lfm2", _CONV | _TIED),
    "granitemoehybrid-no-conv-bias": (
        "granitemoehybrid",
        _MAMBA | _LOCAL | _UNTIED | _HYBRID | {"mamba_conv_bias": False},
    ),
    "granitemoehybrid-proj-bias": (
        "granitemoehybrid",
        _MAMBA | _LOCAL | _UNTIED | _HYBRID | {"mamba_proj_bias": True},
    ),
    "falcon_h1-groups": ("falcon_h1", _MAMBA | _UNTIED | {"mamba_d_ssm": 512, "mamba_n_groups": 2}),
    "falcon_h1-bias": ("falcon_h1", _MAMBA | _UNTIED | _BIAS | {"mamba_d_ssm": 512}),
    "falcon_h1-mlp-bias": ("falcon_h1", _MAMBA | _UNTIED | {"mamba_d_ssm": 512, "mlp_bias": True}),
    "nemotron_h-bias": ("nemotron_h", _NEMOTRON | {"n_groups": 4, "mlp_bias": True}),
    "nemotron_h-groups": ("nemotron_h", _NEMOTRON | {"n_groups": 2}),
    "jamba-tied": ("jamba", _GQA | _TIED | _JAMBA),
    "bamba": ("bamba", _MAMBA | {"attn_layer_indices": [1]}),
    "codegen": ("codegen", _GPTJ | _UNTIED),
    "xglm": ("xglm", _TOKENS | {"d_model": 256, "attention_heads": 8, "num_layers": 2, "ffn_dim": 512}),
    "cohere2_moe-untied": ("cohere2_moe", _FINE | _UNTIED | _MIXED),
    "phimoe-head-bias": ("phimoe", _LOCAL | _UNTIED | {"lm_head_bias": True}),
    "qwen3-bias": ("qwen3", _HEAD | _UNTIED | _BIAS),
    "qwen3_moe-bias": ("qwen3_moe", _FINE | _UNTIED | _BIAS),
    "gemma-bias": ("gemma", _HEAD | _BIAS),
    "cohere-bias": ("cohere", _GQA | _TIED | _BIAS),
    "cohere-norm-repeated": ("cohere", _GQA | _TIED | {"use_qk_norm": True}),
    "cohere-untied": ("cohere", _GQA | _UNTIED),
    "granitemoe-bias": ("granitemoe", _LOCAL | _UNTIED | _BIAS),
    "internlm2-bias": ("internlm2", _GQA | _UNTIED | {"bias": True}),
    "olmoe-tied": ("olmoe", _GQA | _TIED | {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128}),
    "deepseek_v3-bias": ("deepseek_v3", _LATENT | _UNTIED | _BIAS | {"topk_method": "noaux_tc"}),
    "deepseek_v3-tied": ("deepseek_v3", _LATENT | _TIED | {"topk_method": "noaux_tc"}),
    "glm4_moe-tied": ("glm4_moe", _GLM_MOE | _TIED),
    "gpt_oss-tied": ("gpt_oss", _GPT_OSS | _TIED | _FOUR),
    "gpt_oss-repeated-kv": ("gpt_oss", _GPT_OSS | _UNTIED),
    "deepseek_v32-bias": ("deepseek_v32", _SPARSE | _UNTIED | _BIAS),
    "deepseek_v32-tied": ("deepseek_v32", _SPARSE | _TIED),
    "glm4_moe_lite-bias": ("glm4_moe_lite", _LITE | _UNTIED | _BIAS),
    "glm4_moe_lite-tied": ("glm4_moe_lite", _LITE | _TIED),
    "qwen3_next-bias": ("qwen3_next", _QWEN_NEXT | _UNTIED | _BIAS),
    "qwen3_next-tied": ("qwen3_next", _QWEN_NEXT | _TIED),
    "minimax_m2-tied": ("minimax_m2", _MINIMAX | _TIED),
    "ernie4_5_moe-bias": ("ernie4_5_moe", _ERNIE | _UNTIED | {"use_bias": True}),
    "hy_v3-bias": ("hy_v3", _HY | _UNTIED | _BIAS),
    "hy_v3-mlp-bias": ("hy_v3", _HY | _UNTIED | {"mlp_bias": True}),
    "afmoe-bias": ("afmoe", _AF | _UNTIED | _BIAS),
    "afmoe-tied": ("afmoe", _AF | _TIED),
    "granitemoeshared-bias": ("granitemoeshared", _LOCAL | _UNTIED | _BIAS | {"shared_intermediate_size": 128}),
    "llama4-bias": ("llama4_text", _LLAMA4 | _UNTIED | _BIAS),
    "mimo_v2_flash-tied": ("mimo_v2_flash", _MIMO | _TIED),
    "olmo_hybrid": ("olmo_hybrid", _OLMO_HYBRID | _UNTIED),
    "nemotron-nas-linear": ("nemotron-nas", _SEARCHED | _UNTIED | _LINEAR_BLOCKS),
    "minicpm-bias": ("minicpm", _MINICPM | _TIED | _BIAS),
    "bailing_moe-norm-head": ("bailing_moe", _FINE | _UNTIED | _LING_1 | {"norm_head": True}),
    "bailing_moe-all-biases": ("bailing_moe", _FINE | _UNTIED | _LING_1 | {"use_bias": True}),
    "mamba2-bias": ("mamba2", _MAMBA_2 | _UNTIED | {"n_groups": 1, "use_bias": True}),
    "mamba2-no-conv-bias": ("mamba2", _MAMBA_2 | _UNTIED | {"n_groups": 1, "use_conv_bias": False}),
    "dbrx": ("dbrx", _DBRX | _UNTIED),
    "step3p5-tied": ("step3p5", _STEP | _TIED),
    "step3p5-bias": ("step3p5", _STEP | _UNTIED | _BIAS),
    "step3p5-mlp-bias": ("step3p5", _STEP | _UNTIED | {"mlp_bias": True}),
    "step3p5-without-moe_num_experts": (
        "step3p5",
        {key: each for key, each in (_STEP | _UNTIED).items() if key != "moe_num_experts"},
    ),
}
"""What vLLM does not load, or loads with something of the checkpoint left out; at tp 4."""

NOT_RUN: dict[str, tuple[str, dict[str, Any]]] = {
    "persimmon": ("persimmon", _MHA),
    "biogpt": ("biogpt", _MHA),
    "bitnet": ("bitnet", _GQA | _UNTIED),
    "gpt_bigcode-mha": ("gpt_bigcode", _GPT2 | {"multi_query": False}),
    "olmoe-repeated": (
        "olmoe",
        _GQA
        | _UNTIED
        | {"num_key_value_heads": 1, "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128},
    ),
}
"""What vLLM loads whole and cannot run; at tp 2."""

READ_OTHERWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "mimo_v2": (
        "mimo_v2",
        _MIMO | _UNTIED | {"attention_bias": False, "norm_topk_prob": True, "num_key_value_heads": 4},
    ),
}
"""What vLLM loads whole, with rows in another order than they are stored in; at tp 2."""


UNREAD: dict[str, tuple[str, dict[str, Any]]] = {
    "laguna": ("laguna", _LAGUNA | _UNTIED),
    "laguna-tied-bias": ("laguna", _LAGUNA | _TIED | _BIAS),
    "laguna-per-element": ("laguna", _LAGUNA | _UNTIED | {"gating": "per-element"}),
}
"""What vLLM loads with something left out that its class has a place for."""

_MTP = ("mtp.fc", "mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden")


def _next(copied: int, layer: int, *others: str) -> tuple[str, str, tuple[str, ...]]:
    around = ("enorm", "hnorm", "eh_proj", *(others or ("embed_tokens", "shared_head.head", "shared_head.norm")))
    return f"model.layers.{copied}.", f"model.layers.{layer}.", tuple(f"model.layers.{layer}.{each}" for each in around)


_WINDOW = ("enorm", "hnorm", "eh_proj", "input_layernorm", "pre_mlp_layernorm", "final_layernorm")
_STEP_AROUND = (
    *("enorm", "hnorm", "eh_proj", "input_layernorm", "post_attention_layernorm"),
    *("transformer.shared_head.norm", "transformer.shared_head.output"),
)
_DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
DRAFTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "deepseek_v3": _next(2, 3),
    "deepseek_v32": _next(2, 3),
    "glm4_moe": _next(1, 2),
    "glm4_moe_lite": _next(2, 3),
    "qwen3_next": ("model.layers.1.", "mtp.layers.0.", _MTP),
    "ernie4_5_moe": (
        "model.layers.0.",
        "model.mtp_block.0.",
        ("model.mtp_emb_norm.0", "model.mtp_hidden_norm.0", "model.mtp_linear_proj.0"),
    ),
    "ernie4_5_moe-tied-no-shared": (
        "model.layers.0.",
        "model.mtp_block.0.",
        ("model.mtp_emb_norm.0", "model.mtp_hidden_norm.0", "model.mtp_linear_proj.0"),
    ),
    "hy_v3": _next(2, 3, "final_layernorm"),
    "exaone_moe": ("model.layers.0.", "mtp.layers.0.", _MTP),
    "bailing_hybrid": _next(1, 2, "final_layernorm"),
    "bailing_hybrid-v3": _next(1, 2, "final_layernorm"),
    "bailing_moe_v3": _next(1, 2, "final_layernorm"),
    "nemotron_h": (
        "backbone.layers.1.",
        "mtp.layers.0.",
        ("mtp.layers.0.enorm", "mtp.layers.0.hnorm", "mtp.layers.0.eh_proj", "mtp.layers.1.final_layernorm"),
    ),
    "mimo_v2_flash": (
        "model.layers.1.self_attn.",
        "model.mtp.layers.0.self_attn.",
        tuple(f"model.mtp.layers.0.{each}" for each in (*_WINDOW, *_DENSE)),
    ),
}
"""Of which layer what predicts further tokens is a copy, under which name, and what is around it."""
ALSO_COPIED = {"nemotron_h": ("backbone.layers.3.", "mtp.layers.1.")}
"""Of those that take two layers for it, the second one."""
NO_CLASS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "step3p5": (
        "model.layers.1.self_attn.",
        "model.layers.3.self_attn.",
        tuple(f"model.layers.3.{each}" for each in (*_STEP_AROUND, *_DENSE)),
    ),
}
"""The same of those whose draft model vLLM does not load."""
DRAFT_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_next": {"mlp_only_layers": []},
    "nemotron_h": {"mtp_hybrid_override_pattern": "*E"},
}
"""Other configs for those that vLLM makes a draft model of."""


def with_draft(name: str, path: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint with a layer that predicts one more token, as published files have it. changes: of the config."""
    import torch
    from safetensors.torch import load_file, save_file

    copied, copy, around = {**DRAFTS, **NO_CLASS}[name]
    make(name, path, changes)
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    vocab, width = config["vocab_size"], config["hidden_size"]
    ffn = config.get("intermediate_size")
    shapes = {"down_proj": (width, ffn), "gate_proj": (ffn, width), "up_proj": (ffn, width)}
    shapes |= dict.fromkeys(("embed_tokens", "head", "output"), (vocab, width))
    drafted = {}
    for start, own in ((copied, copy), *([ALSO_COPIED[name]] if name in ALSO_COPIED else [])):
        drafted |= {own + each.removeprefix(start): t for each, t in tensors.items() if each.startswith(start)}
    assert drafted
    for module in around:
        last = module.rpartition(".")[2]
        shape = shapes.get(last, (width,) if "norm" in module else (width, 2 * width))
        drafted[f"{module}.weight"] = torch.empty(shape, dtype=torch.bfloat16)
    save_file(tensors | engine_shapes.own_numbers(drafted), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return path


def make(name: str, path: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint with parameters of its own for every name, so that none can stand for another.

    changes: of the config.
    """
    model_type, config = {**LOADED, **REFUSED, **NOT_RUN, **UNREAD, **READ_OTHERWISE}[name]
    config = {**config, **(changes or {})}
    if model_type in WRITTEN:
        return written(path, model_type, config)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config), dtype=torch.bfloat16)
    with torch.no_grad():
        state = [*model.named_parameters(), *(each for each in model.named_buffers() if each[0].endswith(_BIASES))]
        for each, parameter in state:
            generator = torch.Generator().manual_seed(zlib.crc32(each.encode()))
            parameter.copy_((parameter.dim() == 1) + 0.08 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return path


def _internlm2(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    qkv = heads * hidden // config["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.tok_embeddings.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}attention.wqkv.weight": (qkv, hidden),
            f"{prefix}attention.wo.weight": (hidden, hidden),
            f"{prefix}feed_forward.w1.weight": (ffn, hidden),
            f"{prefix}feed_forward.w3.weight": (ffn, hidden),
            f"{prefix}feed_forward.w2.weight": (hidden, ffn),
            f"{prefix}attention_norm.weight": (hidden,),
            f"{prefix}ffn_norm.weight": (hidden,),
        }
        if config["bias"]:
            shapes |= {f"{prefix}attention.wqkv.bias": (qkv,), f"{prefix}attention.wo.bias": (hidden,)}
    return shapes


def _chatglm(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, vocab = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    qkv = (config["num_attention_heads"] + 2 * config["multi_query_group_num"]) * config["kv_channels"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (vocab, hidden),
        "transformer.encoder.final_layernorm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["transformer.output_layer.weight"] = (vocab, hidden)
    for layer in range(config["num_layers"]):
        prefix = f"transformer.encoder.layers.{layer}."
        linear = {
            "self_attention.query_key_value": (qkv, hidden),
            "self_attention.dense": (hidden, hidden),
            "mlp.dense_h_to_4h": (2 * ffn, hidden),
            "mlp.dense_4h_to_h": (hidden, ffn),
        }
        for module, shape in linear.items():
            shapes[f"{prefix}{module}.weight"] = shape
            if config["add_bias_linear"] or ("query" in module and config["add_qkv_bias"]):
                shapes[f"{prefix}{module}.bias"] = shape[:1]
        shapes |= {f"{prefix}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return shapes


def _exaone(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.ln_f.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"transformer.h.{layer}."
        attention = f"{prefix}attn.attention."
        rows = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "out_proj": hidden}
        shapes |= {f"{attention}{module}.weight": (each, hidden) for module, each in rows.items()}
        shapes |= {f"{attention}{module}.bias": (each,) for module, each in rows.items() if config["bias"]}
        shapes |= {f"{prefix}mlp.{module}.weight": (ffn, hidden) for module in ("c_fc_0", "c_fc_1")}
        shapes[f"{prefix}mlp.c_proj.weight"] = (hidden, ffn)
        shapes |= {f"{prefix}{norm}.weight": (hidden,) for norm in ("ln_1", "ln_2")}
    return shapes


def _longcat_flash(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, vocab, heads = config["hidden_size"], config["vocab_size"], config["num_attention_heads"]
    query, latent, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    plain, value = config["qk_nope_head_dim"], config["v_head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_layers"]):
        prefix = f"model.layers.{layer}."
        blocks = {
            f"mlp.experts.{each}.": config["expert_ffn_hidden_size"] for each in range(config["n_routed_experts"])
        }
        for half in "01":
            blocks[f"mlps.{half}."] = config["ffn_hidden_size"]
            shapes |= {f"{prefix}{norm}_layernorm.{half}.weight": (hidden,) for norm in ("input", "post_attention")}
            attention = {
                "q_a_proj": (query, hidden),
                "q_a_layernorm": (query,),
                "q_b_proj": (heads * (plain + rope), query),
                "kv_a_proj_with_mqa": (latent + rope, hidden),
                "kv_a_layernorm": (latent,),
                "kv_b_proj": (heads * (plain + value), latent),
                "o_proj": (hidden, heads * value),
            }
            shapes |= {f"{prefix}self_attn.{half}.{module}.weight": shape for module, shape in attention.items()}
        for block, wide in blocks.items():
            shapes |= {f"{prefix}{block}{name}_proj.weight": (wide, hidden) for name in ("gate", "up")}
            shapes[f"{prefix}{block}down_proj.weight"] = (hidden, wide)
        chosen = config["n_routed_experts"] + config["zero_expert_num"]
        shapes[f"{prefix}mlp.router.classifier.weight"] = (chosen, hidden)
        shapes[f"{prefix}mlp.router.e_score_correction_bias"] = (chosen,)
    return shapes


WRITTEN: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, tuple[int, ...]]]]] = {
    "internlm2": ("InternLM2ForCausalLM", _internlm2),
    "exaone": ("ExaoneForCausalLM", _exaone),
    "chatglm": ("ChatGLMModel", _chatglm),
    "bailing_moe_v2": ("BailingMoeV2ForCausalLM", engine_shapes.bailing_moe),
    "bailing_moe": ("BailingMoeForCausalLM", engine_shapes.bailing_moe),
    "bailing_hybrid": ("BailingMoeV2_5ForCausalLM", engine_shapes.bailing_hybrid),
    "bailing_moe_v3": ("BailingMoeV3ForCausalLM", engine_shapes.bailing_hybrid),
    "olmo_hybrid": ("OlmoHybridForCausalLM", engine_shapes.olmo_hybrid),
    "nemotron-nas": ("DeciLMForCausalLM", engine_shapes.nemotron_nas),
    "dbrx": ("DbrxForCausalLM", engine_shapes.dbrx),
    "minicpm": ("MiniCPMForCausalLM", engine_shapes.minicpm),
    "longcat_flash": ("LongcatFlashForCausalLM", _longcat_flash),
    **engine_written.WRITTEN,
}
"""What transformers has no class for, or saves wrongly: the class that the config names, and the tensors' shapes."""


def written(path: Path, model_type: str, config: dict[str, Any]) -> Path:
    """Write a checkpoint of a type of `WRITTEN`."""
    import torch
    from safetensors.torch import save_file

    architecture, shapes = WRITTEN[model_type]
    tensors = {}
    for name, shape in shapes(config).items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        tensors[name] = (0.08 * torch.randn(shape, generator=generator)).bfloat16()
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    described = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "activation_function": "silu",
        "rms_norm_eps": 1e-6,
        "layer_norm_epsilon": 1e-6,
        "rope_theta": 10000.0,
        "dtype": "bfloat16",
        **config,
    }
    (path / "config.json").write_text(json.dumps(described, indent=2))
    return path
