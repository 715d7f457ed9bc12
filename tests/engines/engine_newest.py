"""Small checkpoints of the newest models for the engines, as they are published: transformers saves other names."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.engines import engine_shapes
from tests.helpers.served_shapes import KimiK3, kimi_k3

_TOKENS = {"vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {
    **_TOKENS,
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128},
}
_LATENT = {
    **{"num_key_value_heads": 8, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32},
    "v_head_dim": 32,
}
_VISION = {
    **{"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"image_size": 56, "patch_size": 14},
}


@dataclass(frozen=True)
class Published:
    """A published form. model_type: of transformers' class that makes it; None where there are shapes alone.

    config: what differs from the class's config. names: what names of saved tensors become, as patterns. changes: of
    the saved config; None removes a key, and a table changes the table that is there. shapes, numbers: of tensors
    beside. nested: the key of the whole config that the saved one then is. beside: other files of the directory, which
    vLLM reads.
    """

    model_type: str | None
    config: Mapping[str, Any]
    names: Sequence[tuple[str, str]] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    numbers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    nested: str = ""
    beside: Mapping[str, Any] = field(default_factory=dict)


_RADIO = (192, 2, 12, 384)  # width, layers, heads and features of a tower's name: `held.py` has them for it


def _radio() -> dict[str, tuple[int, ...]]:
    """A tower of Nemotron VL, and the projector behind it."""
    wide, layers, _, ffn = _RADIO
    start = "vision_model.radio_model."
    found: dict[str, tuple[int, ...]] = {
        f"{start}input_conditioner.norm_mean": (3, 1, 1),
        f"{start}input_conditioner.norm_std": (3, 1, 1),
        f"{start}model.patch_generator.embedder.weight": (wide, 3 * 16 * 16),
        f"{start}model.patch_generator.pos_embed": (1, 16, wide),
        f"{start}model.patch_generator.cls_token.token": (4, wide),
        "mlp1.0.weight": (4 * wide,),
        "mlp1.1.weight": (192, 4 * wide),
        "mlp1.3.weight": (256, 192),
    }
    rows = {"attn.qkv": (3 * wide, wide), "attn.proj": (wide, wide), "mlp.fc1": (ffn, wide), "mlp.fc2": (wide, ffn)}
    for layer in range(layers):
        block = f"{start}model.blocks.{layer}."
        found |= {f"{block}norm{each}.{leaf}": (wide,) for each in (1, 2) for leaf in ("weight", "bias")}
        found |= {f"{block}{name}.weight": shape for name, shape in rows.items()}
        found |= {f"{block}{name}.bias": shape[:1] for name, shape in rows.items()}
    return found


def _siglip_of_timm() -> dict[str, tuple[int, ...]]:
    """A tower of DeepSeek-VL2, as `small_timm.py` has it, and the projector behind it."""
    wide, ffn, pool = 128, 192, "vision.attn_pool."
    linear = {f"{pool}q": (wide, wide), f"{pool}kv": (2 * wide, wide), f"{pool}proj": (wide, wide)}
    linear |= {f"{pool}mlp.fc1": (ffn, wide), f"{pool}mlp.fc2": (wide, ffn)}
    linear |= {"vision.patch_embed.proj": (wide, 3, 14, 14), "projector.layers.0": (256, 4 * wide)}
    linear["projector.layers.2"] = (256, 256)
    norms = ["vision.norm", f"{pool}norm"]
    for layer in range(2):
        block = f"vision.blocks.{layer}."
        norms += [f"{block}norm1", f"{block}norm2"]
        linear |= {f"{block}attn.qkv": (3 * wide, wide), f"{block}attn.proj": (wide, wide)}
        linear |= {f"{block}mlp.fc1": (ffn, wide), f"{block}mlp.fc2": (wide, ffn)}
    found: dict[str, tuple[int, ...]] = {"vision.pos_embed": (1, 16, wide), f"{pool}latent": (1, 1, wide)}
    found |= dict.fromkeys(("image_newline", "view_seperator"), (256,))
    found |= {f"{name}.weight": shape for name, shape in linear.items()}
    found |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    return found | {f"{name}.{leaf}": (wide,) for name in norms for leaf in ("weight", "bias")}


_TEACHERS = [{"name": "one", "use_summary": True}, {"name": "another", "use_summary": False}]

_KIMI_LINEAR = {
    **{"kda_layers": [1], "full_attn_layers": [2], "head_dim": 32, "num_heads": 8, "short_conv_kernel_size": 4},
}
_SLIDING = {
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 48},
    **{"swa_head_dim": 56, "swa_qk_nope_head_dim": 40, "swa_qk_rope_head_dim": 16, "swa_v_head_dim": 24},
    "sliding_window": 8,
}
_DOTS_LAYERS = ["full_attention", "full_attention", "sliding_attention"]

_QWEN4 = {
    **_TEXT,
    **{"num_experts": 8, "moe_intermediate_size": 64, "num_experts_per_tok": 2, "head_dim": 32},
    **{"shared_expert_intermediate_size": 128, "layer_types": ["linear_attention", "full_attention"]},
    **{"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32, "linear_value_head_dim": 48},
    **{"hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [1], "ple_embed_dim": 128, "heads_per_ngram": 2},
    **{"ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 4},
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 4},
    **{"indexer_compress_ratio": 2, "output_gate_type": "sigmoid"},
}

_HY4 = (
    _TEXT
    | _LATENT
    | {"q_lora_rank": 48, "n_routed_experts": 8, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
    | {"index_n_heads": 4, "index_head_dim": 64, "index_topk": 8, "num_hidden_layers": 3}
)
_HY4_NAMES = (  # transformers saves other names than published files have
    (r"hc_pre\.hc_(attn|mlp)_layer\.hc_", r"hc_\1_layer.hc_pre.hc_"),
    (r"hc_pre\.hc_head\.", "hc_head."),
    (r"(mlp|shared_experts)\.linear_gate", r"\1.gate_proj"),
)
_KIMI_K3 = KimiK3(
    **{"hidden": 256, "dense": 512, "vocab": 1000, "q_lora": 48, "kv_lora": 32, "nope": 32, "rope": 16, "value": 32},
    **{"linear_heads": 8, "linear": 32, "experts": 8, "expert": 64, "small": 128},
    **{"vision": 64, "vision_qkv": 96, "vision_ffn": 128},
)

LOADED: dict[str, Published] = {
    "kimi_linear": Published(
        "kimi_linear",
        _TEXT
        | _LATENT
        | {"num_experts": 8, "moe_intermediate_size": 64, "num_experts_per_token": 2, "first_k_dense_replace": 1}
        | {"layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 32, "linear_num_heads": 8},
        [(r"block_sparse_moe\.(gate|up|down)_proj", r"mlp.\1_proj")],
        {
            **dict.fromkeys(("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads")),
            "linear_attn_config": _KIMI_LINEAR,
            "mla_use_nope": True,
        },
    ),
    "kimi_k3": Published(
        None,
        {
            **{"model_type": "kimi_k3", "architectures": ["KimiK3ForConditionalGeneration"]},
            "text_config": _TEXT
            | _LATENT
            | {"model_type": "kimi_linear", "q_lora_rank": 48, "mla_use_nope": True, "mla_use_output_gate": True}
            | {"num_experts": 8, "moe_intermediate_size": 64, "num_experts_per_token": 2, "first_k_dense_replace": 1}
            | {"num_shared_experts": 1, "routed_expert_hidden_size": 128, "latent_moe_use_norm": True}
            | {"hidden_act": "situ", "activation_situ_beta": 1.0, "attn_res_block_size": 2}
            | {"linear_attn_config": _KIMI_LINEAR | {"use_full_rank_gate": True, "gate_lower_bound": -5.0}},
            "vision_config": {
                **{"vt_hidden_size": 64, "vt_num_hidden_layers": 2, "vt_num_attention_heads": 4, "patch_size": 14},
                **{"vt_intermediate_size": 128, "qkv_hidden_size": 96, "init_pos_emb_height": 4},
                "init_pos_emb_width": 4,
            },
        },
        shapes=kimi_k3(_KIMI_K3, draft=False),
    ),
    "inkling_mm_model": Published(
        "inkling_mm_model",
        {
            "text_config": _TEXT
            | {"n_routed_experts": 8, "moe_intermediate_size": 64, "num_experts_per_tok": 2, "head_dim": 32}
            | {"swa_head_dim": 32, "swa_num_attention_heads": 8, "swa_num_key_value_heads": 8, "d_rel": 4}
            | {"rel_extent": 16, "sliding_window_size": 8, "num_key_value_heads": 4, "n_shared_experts": 2}
            | {"local_layer_ids": [0], "mlp_layer_types": ["dense", "sparse"], "vocab_size": 1024}
            | {"unpadded_vocab_size": 1000},
            "vision_config": {"patch_size": 4, "temporal_patch_size": 2, "num_hidden_layers": 3},
            "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 16},
        },
        changes={
            "architectures": ["InklingForConditionalGeneration"],
            "text_config": {
                **dict.fromkeys(("layer_types", "mlp_layer_types", "moe_intermediate_size", "model_type")),
                **{"intermediate_size": 64, "dense_intermediate_size": 512, "local_layer_ids": [0], "dense_mlp_idx": 1},
                **dict.fromkeys(("use_embed_norm", "use_gate_bias", "use_global_scale", "shared_expert_sink"), True),
            },
            "vision_config": {
                **{"decoder_dmodel": 256, "vision_encoder_type": "hmlp", "n_layers": 3, "n_channels": 3},
                "use_vision_norm": True,
            },
            "audio_config": {
                **{"decoder_dmodel": 256, "audio_mode": "dmel", "use_audio_norm": True},
                **{"dmel_min_value": -7.0, "dmel_max_value": 2.0},
            },
        },
    ),
    "minimax_m3_vl": Published(
        "minimax_m3_vl",
        {
            "text_config": _TEXT
            | {"head_dim": 32, "rotary_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2}
            | {"dense_intermediate_size": 512, "shared_intermediate_size": 64, "intermediate_size": 64}
            | {"index_n_heads": 2, "index_head_dim": 32, "index_block_size": 128, "index_topk_blocks": 1}
            | {"layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"]},
            "vision_config": _VISION,
            "projector_hidden_size": 192,
        },
        changes={
            "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
            "vision_config": {
                "model_type": "clip_vision_model",
                "img_token_compression_config": {
                    **{"image_token_compression_method": "patch_merge"},
                    **{"spatial_merge_size": 2, "temporal_patch_size": 2},
                },
            },
            "text_config": {
                **dict.fromkeys(("layer_types", "mlp_layer_types")),
                "hidden_act": "swigluoai",
                "moe_layer_freq": [0, 1],
                "sparse_attention_config": {
                    **{"use_sparse_attention": True, "sparse_index_dim": 32, "sparse_num_index_heads": 2},
                    **{"sparse_topk_blocks": 1, "sparse_block_size": 128, "sparse_disable_index_value": [0, 1]},
                    **{"sparse_score_type": "max", "sparse_init_block": 0, "sparse_local_block": 1},
                    "sparse_attention_freq": [0, 1],
                },
            },
        },
    ),
    "deepseek_v4": Published(
        "deepseek_v4",
        _TOKENS
        | {"hidden_size": 256, "moe_intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8}
        | {"head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 48, "num_experts_per_tok": 2}
        | {"n_routed_experts": 8, "max_position_embeddings": 128, "compress_ratios": [0, 4, 128, 4]}
        | {"num_hash_layers": 1, "sliding_window": 8, "o_groups": 4, "o_lora_rank": 32, "index_n_heads": 4}
        | {"index_head_dim": 128, "index_topk": 8, "hc_mult": 2, "hc_sinkhorn_iters": 3},
        [
            (r"^model\.embed_tokens\.", "embed."),
            (r"^lm_head\.", "head."),
            (r"^model\.hc_head\.hc_", "hc_head_"),
            (r"\.attn\.norm\.", ".attn.kv_norm."),
            (r"^model\.", ""),
        ],
        {"layer_types": None, "mlp_layer_types": None, "compress_ratios": [0, 4, 128, 4, 0]}
        | {"num_hash_layers": 1, "topk_method": "noaux_tc", "scoring_func": "sqrtsoftplus"},
    ),
    "hy_v4": Published("hy_v4", _HY4, _HY4_NAMES),
    "hy_v4-tied": Published("hy_v4", _HY4 | {"tie_word_embeddings": True}, _HY4_NAMES),
    "glm5_next": Published(
        "glm5_next",
        {
            "text_config": _TEXT
            | {"num_key_value_heads": 8, "n_routed_experts": 8, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
            | {"kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 32, "v_head_dim": 32, "hc_mult": 2}
            | {"index_n_heads": 4, "index_head_dim": 32, "index_topk": 16, "index_kpool": 8}
            | {"linear_head_dim": 32, "linear_num_heads": 8}
            | {"layer_types": ["linear_attention", "indexed_attention"], "mlp_layer_types": ["dense", "sparse"]},
            "vision_config": {
                **{"depth": 2, "num_heads": 4, "num_hidden_layers": 2, "num_attention_heads": 4},
                **{"hidden_size": 128, "intermediate_size": 192, "patch_size": 14, "image_size": 56},
                **{"out_hidden_size": 256, "projection_intermediate_size": 192},
            },
        },
        changes={
            "text_config": {
                "mhc": True,
                "mla_use_nope": True,
                "topk_method": "noaux_tc",
                "scoring_func": "sigmoid",
                "indexer_rope_interleave": True,
            }
        },
    ),
    "dots3_note": Published(
        "dots3_note",
        {
            "text_config": _TEXT
            | _LATENT
            | {"q_lora_rank": 48, "n_routed_experts": 8, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
            | {"index_n_heads": 4, "index_head_dim": 64, "index_topk": 8, "num_hidden_layers": 3, "head_dim": 48}
            | {"shared_experts_intermediate_size": 64, **_SLIDING},
            "vision_config": {
                **{"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
                **{"moe_intermediate_size": 64, "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 2},
                **{"num_experts_per_tok": 1, "adapter_in_dim": 128, "adapter_out_dim": 256},
            },
            "audio_config": {
                **{"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4},
                **{"downsample_hidden_size": 8, "adapter_input_size": 128, "adapter_out_dim": 256},
            },
        },
        # Published with the text model's values at the top.
        changes=_TEXT
        | _LATENT
        | _SLIDING
        | {"architectures": ["Dots3NoteForCausalLM"], "text_config": None, "layer_types": _DOTS_LAYERS}
        | {"q_lora_rank": 48, "n_routed_experts": 8, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
        | {"index_n_heads": 4, "index_head_dim": 64, "index_topk": 8, "num_hidden_layers": 3}
        | {"n_shared_experts": 1, "first_k_dense_replace": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        | {"attention_gate_type": "headwise", "swa_attention_gate_type": "headwise", "sliding_window_size": 8}
        | {"apply_mla_qkv_lora_rescale": True, "moe_shared_expert_intermediate_size": 64}
        | {"rope_theta": 8e7, "swa_rope_theta": 5e4, "rms_norm_eps": 1e-5}
        | {
            "vision_config": {
                **dict.fromkeys(("mlp_layer_types", "num_local_experts", "rope_parameters", "model_type")),
                **{"embed_dim": 128, "pyramid_num_routed": [-1, 2], "adapter_type": "patch_merger"},
                "capacity_factor": 1,
            },
            "audio_config": {
                **{"whisper_adapter_in_dim": 128, "whisper_adapter_out_dim": 256},
                "whisper_config": {
                    **{"d_model": 128, "encoder_attention_heads": 4, "encoder_layers": 1, "encoder_ffn_dim": 192},
                    **{"num_mel_bins": 128, "max_source_positions": 6000, "activation_function": "swiglu"},
                },
            },
        },
        beside={"added_tokens.json": {"<|imgpad|>": 999}},
    ),
    "qwen4_exp": Published("qwen4_exp_text", _QWEN4),
    "qwen4_exp-other-sizes": Published(
        "qwen4_exp_text",
        _QWEN4
        | {"ple_layer_ids": [1, 2], "split_ngram_parts": 7, "hc_lowrank": 14, "num_hidden_layers": 3}
        | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    ),
    # As transformers names it where the config asks for no parts.
    "qwen4_exp-one-table": Published(
        "qwen4_exp_text", _QWEN4 | {"split_ngram_parts": 1}, [(r"ngram_embedding\.shard_0", "ngram_embedding")]
    ),
    "qwen4_exp-tower": Published(
        "qwen4_exp",
        {
            "text_config": _QWEN4
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}},
            "vision_config": {
                **{"depth": 2, "num_heads": 4, "hidden_size": 128, "intermediate_size": 192, "out_hidden_size": 256},
                **{"patch_size": 14, "num_position_embeddings": 16, "spatial_merge_size": 2, "temporal_patch_size": 2},
            },
        },
        changes={"vision_config": {"deepstack_visual_indexes": []}},  # its class reads it, and transformers has none
    ),
    "deepseek_vl_v2": Published(
        "deepseek_v2",
        _TEXT
        | _LATENT
        | {"q_lora_rank": None, "n_routed_experts": 8, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
        | {"first_k_dense_replace": 1, "n_shared_experts": 1, "tie_word_embeddings": False},
        [("^", "language.")],
        {
            **{"architectures": ["DeepseekVLV2ForCausalLM"], "model_type": "deepseek_vl_v2", "tile_tag": "2D"},
            **{"vision_config": {"layers": 2, "width": 128, "heads": 4}, "global_view_pos": "head"},
            "projector_config": {"input_dim": 128, "n_embed": 256, "depth": 2, "mlp_ratio": 1, "downsample_ratio": 2},
        },
        _siglip_of_timm(),
        nested="language_config",
    ),
    "NemotronH_Nano_VL_V2": Published(
        "nemotron_h",
        _TEXT
        | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_hidden_layers": 4}
        | {"mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 32, "moe_shared_expert_intermediate_size": 64}
        | {"hybrid_override_pattern": "M*-E", "head_dim": 32, "n_groups": 4, "tie_word_embeddings": False},
        [("^", "language_model.")],
        {
            **{"architectures": ["NemotronH_Nano_VL_V2"], "model_type": "NemotronH_Nano_VL_V2"},
            **{"force_image_size": 32, "patch_size": 16, "downsample_ratio": 0.5, "template": "nemotron"},
            **{"ps_version": "v2", "image_tag_type": "internvl", "vit_hidden_size": _RADIO[0]},
            **{"projector_hidden_size": 192, "norm_mean": [0.5, 0.5, 0.5], "norm_std": [0.2, 0.2, 0.2]},
            "vision_config": {
                "args": {
                    "model": "vit_base_patch16_224",
                    "register_multiple": 4,
                    "cpe_max_size": 64,
                    "teachers": _TEACHERS,
                },
                **{"patch_size": 16, "preferred_resolution": [32, 32]},
            },
        },
        _radio(),
        {"vision_model.radio_model.summary_idxs": [0]},
        nested="llm_config",
    ),
}
"""What vLLM loads."""
LOADED["kimi_k3-6-heads"] = replace(
    LOADED["kimi_k3"],
    config=LOADED["kimi_k3"].config
    | {"vision_config": LOADED["kimi_k3"].config["vision_config"] | {"vt_num_attention_heads": 6}},
)

LATER: dict[str, Published] = {
    "mistral_large4": Published(
        "mistral_large4",
        {
            "text_config": _TEXT
            | _LATENT
            | {"q_lora_rank": 48, "n_routed_experts": 8, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
            | {"num_hidden_layers": 3, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 8}
            | {"kv_source_layers": [0, 1, 1], "index_topk_pattern": "FFS"},
            "vision_config": _VISION | {"head_dim": 32},
        },
        changes={"text_config": {"indexer_types": None, "mlp_layer_types": None}},
    ),
}
"""Types of which the table has no names yet."""

ROOMY = {"deepseek_v4": ".attn_sink"}
"""How the names end of parameters that a kernel has larger than what is loaded."""


@dataclass(frozen=True)
class Draft:
    """A layer that predicts further tokens. copied, copy: how names begin of the layer that it is like, and its own.

    around: shapes of what it has besides, of width, vocabulary and ffn; `../` and `/` begin names as they do paths.
    without: what it does not have, as a pattern.
    changes: of the config.
    """

    copied: str
    copy: str
    around: Mapping[str, str]
    without: str = "$^"
    changes: Mapping[str, Any] = field(default_factory=dict)


_JOINED = {"enorm.weight": "width", "hnorm.weight": "width", "eh_proj.weight": "width 2*width"}
DRAFTS = {
    "hy_v4": Draft(
        "model.layers.1.",
        "model.mtp_layers.0.",
        _JOINED | {"final_layernorm.weight": "width"},
        r"hc_",
        {"num_nextn_predict_layers": 1},
    ),
    "dots3_note": Draft(
        "model.layers.2.self_attn.",
        "model.layers.3.self_attn.",
        {
            **{f"../{name}": shape for name, shape in _JOINED.items()},
            **{"../shared_head.norm.weight": "width", "../shared_head.head.weight": "vocab width"},
            **{"../input_layernorm.weight": "width", "../post_attention_layernorm.weight": "width"},
            **{"../mlp.gate_proj.weight": "ffn width", "../mlp.up_proj.weight": "ffn width"},
            **{"../mlp.down_proj.weight": "width ffn", "/model.mtp.embed_tokens.weight": "vocab width"},
        },
        changes={"num_nextn_predict_layers": 1},
    ),
    "minimax_m3_vl": Draft(
        "language_model.model.layers.1.",
        "language_model.model.mtp.layers.0.transformer_layer.",
        {f"../{name}": shape for name, shape in (_JOINED | {"final_layernorm.weight": "width"}).items()},
        changes={"text_config": {"num_mtp_modules": 1}},
    ),
    "deepseek_v4": Draft(
        "layers.3.",
        "mtp.0.",
        {
            **dict.fromkeys(("enorm.weight", "hnorm.weight", "norm.weight"), "width"),
            **dict.fromkeys(("e_proj.weight", "h_proj.weight"), "width width"),
            **dict.fromkeys(("emb.tok_emb.weight", "head.weight"), "vocab width"),
            **{"hc_head_fn": "2 2*width", "hc_head_base": "2", "hc_head_scale": "1"},
        },
        r"compressor|indexer",
    ),
    "glm5_next": Draft(
        "model.language_model.layers.1.",
        "model.language_model.layers.2.",
        _JOINED | {"shared_head.norm.weight": "width", "embed_tokens.weight": "vocab width"},
        r"^hc_",
        {"text_config": {"num_nextn_predict_layers": 1}},
    ),
    "kimi_k3": Draft(
        "language_model.model.layers.1.",
        "language_model.model.layers.2.",
        _JOINED
        | {"shared_head.norm.weight": "width"}
        | dict.fromkeys(("shared_head.head.weight", "embed_tokens.weight"), "vocab width"),
        r"_res_",
        {"text_config": {"num_nextn_predict_layers": 1}},
    ),
}
"""Of which there are layers that predict further tokens."""
_BLOCK = "transformer_block."
_AROUND = {
    **{"../hidden_norm.weight": "width", "../embed_norm.weight": "width", "../input_proj.weight": "width 2*width"},
    "/model.mtp.chain_norm.weight": "width",
}
LEFT_OUT: dict[str, tuple[Draft, ...]] = {
    "inkling_mm_model": (
        # All of them are dense, and which of them attend to a window is said apart from the layers before.
        Draft("model.llm.layers.1.", f"model.mtp.layers.0.{_BLOCK}", _AROUND, r"^mlp\."),
        Draft("model.llm.layers.0.mlp.", f"model.mtp.layers.0.{_BLOCK}mlp.", {}),
        Draft(
            "model.llm.layers.0.",
            f"model.mtp.layers.1.{_BLOCK}",
            _AROUND,
            changes={
                "mtp_config": {"num_nextn_predict_layers": 2, "local_layer_ids": [1], "chain_hidden_post_norm": True}
            },
        ),
    ),
}
"""The same of those of which no draft model is written."""


def with_draft(name: str, path: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """The checkpoint with such layers."""
    import torch
    from safetensors.torch import load_file, save_file

    drafts = LEFT_OUT[name] if name in LEFT_OUT else (DRAFTS[name],)
    changed = reduce(_changed, (draft.changes for draft in drafts))
    file = make(name, path, _changed(changed, changes or {})) / "model.safetensors"
    tensors, config = load_file(file), json.loads((path / "config.json").read_text())
    text = config.get("text_config") or config
    width = text["hidden_size"]
    sizes = {"width": width, "2*width": 2 * width, "vocab": text["vocab_size"], "ffn": text.get("intermediate_size")}
    drafted = {}
    for draft in drafts:
        for each, tensor in tensors.items():
            own = each.removeprefix(draft.copied)
            if own != each and not re.search(draft.without, own):
                drafted[draft.copy + own] = tensor
        for each, shape in draft.around.items():
            above = {"../": draft.copy.rstrip(".").rpartition(".")[0] + ".", "/": ""}
            start = next((place for begins, place in above.items() if each.startswith(begins)), draft.copy)
            like = torch.float32 if "hc_" in each else torch.bfloat16
            drafted[start + each.removeprefix("../").removeprefix("/")] = torch.empty(
                [sizes.get(size) or int(size) for size in shape.split()], dtype=like
            )
    save_file(tensors | engine_shapes.own_numbers(drafted), file, metadata={"format": "pt"})
    return path


def make(name: str, path: Path, changes: Mapping[str, Any] | None = None, *, published: bool = True) -> Path:
    """Write a checkpoint with parameters of its own for every name, so that none can stand for another.

    changes: of the written config. published: whether names are those of published files, not what transformers saves.
    """
    import torch
    from safetensors.torch import save_file

    form = {**LOADED, **LATER}[name]
    tensors, config = _saved(form, path) if form.model_type else ({}, dict(form.config))
    config = {form.nested: config} if form.nested else config
    for old, new in form.names if published else ():
        tensors = {re.sub(old, new, each): tensor for each, tensor in tensors.items()}
    for each, shape in form.shapes.items():
        tensors[each] = torch.empty(shape, dtype=torch.bfloat16)
    tensors = engine_shapes.own_numbers(tensors)
    tensors |= {each: torch.tensor(values) for each, values in form.numbers.items()}
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    written = _changed(_changed({"dtype": "bfloat16", **config}, form.changes), changes or {})
    (path / "config.json").write_text(json.dumps(written, indent=2))
    for file, content in form.beside.items():
        (path / file).write_text(json.dumps(content))
    return path


def _saved(published: Published, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors and the config that transformers saves."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.for_model(published.model_type, **published.config)
    auto = AutoModelForImageTextToText if "vision_config" in published.config else AutoModelForCausalLM
    with _assignment():
        model = auto.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    return load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())


@contextmanager
def _assignment() -> Iterator[None]:
    """The one function of scipy that Inkling's tower asks for while it is made: which scale each of few layers has."""

    def linear_sum_assignment(costs: Any) -> tuple[range, list[int]]:
        rows = range(len(costs))
        return rows, list(min(combinations(range(len(costs[0])), len(rows)), key=lambda each: costs[rows, each].sum()))

    optimize = ModuleType("scipy.optimize")
    vars(optimize)["linear_sum_assignment"] = linear_sum_assignment
    modules = {"scipy": ModuleType("scipy"), "scipy.optimize": optimize}
    own = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules |= modules
    try:
        yield
    finally:  # and not all else that was imported meanwhile
        for name in modules:
            del sys.modules[name]
        sys.modules |= own


def _changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with other values; None removes a key, and a table changes the table that is there."""
    found = dict(config)
    for key, value in changes.items():
        found[key] = _changed(found[key], value) if isinstance(value, dict) and key in found else value
    return {key: value for key, value in found.items() if value is not None or key not in changes}
