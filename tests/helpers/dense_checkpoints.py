"""Small models of the dense families that came after the first ones: model type and config of each, by name.

GQA with 2 KV heads (repeated at tp 4) wherever a family has it, head_dim unlike hidden / heads wherever a config may
say so, and one more variant for each switch that adds, drops or reshapes a tensor.
"""

from __future__ import annotations

from typing import Any

_MHA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
}
_GQA = _MHA | {"num_key_value_heads": 2}
_WIDE = _GQA | {"head_dim": 16}  # 8 x 16 = 128 columns of heads from a hidden size of 64
_MPT = {"d_model": 64, "n_heads": 8, "n_layers": 2, "max_seq_len": 64}

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "phi": ("phi", _MHA),
    "phi-tied-qk-norm": ("phi", _GQA | {"qk_layernorm": True, "tie_word_embeddings": True}),
    "phi3": ("phi3", _MHA),
    "phi3-gqa-head-dim": ("phi3", _WIDE),
    "phi4-mini": ("phi3", _GQA | {"tie_word_embeddings": True, "partial_rotary_factor": 0.75}),
    "gemma": ("gemma", _WIDE | {"num_key_value_heads": 1}),
    "gemma-bias": ("gemma", _WIDE | {"attention_bias": True}),
    "gemma3_text": ("gemma3_text", _WIDE | {"sliding_window": 8, "sliding_window_pattern": 2}),
    "gemma3_text-untied": ("gemma3_text", _WIDE | {"tie_word_embeddings": False}),
    "stablelm-bias": ("stablelm", _MHA | {"use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", _GQA | {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", _GQA),
    "starcoder2-untied-nobias": ("starcoder2", _GQA | {"tie_word_embeddings": False, "use_bias": False}),
    "olmo": ("olmo", _MHA | {"clip_qkv": 0.5}),
    "olmo-gqa-bias": ("olmo", _GQA | {"attention_bias": True}),
    "olmo2": ("olmo2", _GQA),
    "olmo2-head-dim": ("olmo2", _WIDE | {"num_key_value_heads": 4}),
    "olmo3": ("olmo3", _GQA | {"sliding_window": 8}),
    "cohere": ("cohere", _MHA),
    "cohere-qk-norm": ("cohere", _GQA | {"use_qk_norm": True}),
    "cohere2": ("cohere2", _GQA | {"sliding_window": 8}),
    "granite": ("granite", _GQA | {"attention_bias": True, "mlp_bias": True}),
    "granite-tied": ("granite", _WIDE | {"tie_word_embeddings": True}),
    "glm": ("glm", _WIDE),
    "glm4": ("glm4", _WIDE | {"attention_bias": False}),
    "smollm3": ("smollm3", _GQA),
    "smollm3-untied-bias": (
        "smollm3",
        _WIDE | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "mpt": ("mpt", _MPT),
    "mpt-12-heads": ("mpt", _MPT | {"d_model": 96, "n_heads": 12, "tie_word_embeddings": False}),
    "nemotron": ("nemotron", _WIDE),
    "nemotron-bias": ("nemotron", _GQA | {"attention_bias": True, "mlp_bias": True}),
    "exaone4": ("exaone4", _WIDE | {"sliding_window": 8}),
    "ministral": ("ministral", _WIDE | {"sliding_window": 8}),
    "ministral3": ("ministral3", _WIDE),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _WIDE | {"attention_bias": True}),
    "arcee": ("arcee", _WIDE | {"mlp_bias": True}),
    "ernie4_5": ("ernie4_5", _WIDE | {"use_bias": True}),
    "helium": ("helium", _GQA | {"head_dim": 8, "mlp_bias": True}),
    "cwm": ("cwm", _WIDE | {"sliding_window": 8}),
    "internlm3": ("internlm3", _WIDE),
    "iquestcoder": ("iquestcoder", _WIDE),
    "vaultgemma": ("vaultgemma", _WIDE | {"sliding_window": 8}),
    "jais2": ("jais2", _WIDE),
    "hyperclovax": ("hyperclovax", _WIDE),
    "hyperclovax-pre-norm": ("hyperclovax", _WIDE | {"use_post_norm": False, "mlp_bias": True}),
    "nanochat": ("nanochat", _WIDE),
    "granite_swa": ("granite_swa", _WIDE | {"sliding_window": 8}),
    "apertus": ("apertus", _GQA),
    "persimmon": ("persimmon", _MHA),
    "codegen": ("codegen", {"n_embd": 64, "n_head": 8, "n_layer": 2, "n_positions": 64, "rotary_dim": 4}),
    "xglm": ("xglm", {"d_model": 64, "attention_heads": 8, "num_layers": 2, "ffn_dim": 128}),
    "biogpt": ("biogpt", _MHA),
    "seed_oss": ("seed_oss", _WIDE),
    "seed_oss-bias": ("seed_oss", _GQA | {"head_dim": 8, "attention_out_bias": True, "mlp_bias": True}),
}

# Base-model prefix, head and input embedding, where they are not as in Llama.
ELSEWHERE = {
    "mpt": ("transformer.", "lm_head", "transformer.wte"),
    "codegen": ("transformer.", "lm_head", "transformer.wte"),
    "biogpt": ("biogpt.", "output_projection", "biogpt.embed_tokens"),
}

# Norms that multiply by 1 + weight.
CENTRED_AT_ZERO = frozenset({"gemma", "gemma3_text", "vaultgemma", "nemotron"})
