"""Small models of the families that are served with many GPUs, each as it is published.

Those of which transformers has a class are made by it, and renamed where it saves other names than published files.
Of the others there are names and shapes, from vLLM's loaders or the model's own repository, and random bits.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.checkpoints import POSITIONS, VOCAB
from tests.helpers.served_cuts import Cuts
from tests.helpers.served_shapes import GATED, bailing, deepseek_v4_further, gated, kimi_k3, layered, mimo, norms
from tests.helpers.toys import Tensor, random_tensor, read_all, write_checkpoint

_ENDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = _ENDS | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_LATENT = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_WINDOWS = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
_STEP = _TEXT | {
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "share_expert_dim": 48,
    "num_sliding_attention_heads": 4,
    "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}


@dataclass(frozen=True)
class Served:
    """A published form. model_type: of the class that makes it; None where there are shapes alone.

    config: what differs from the class's config. names: what names of saved tensors become, as patterns. changes: of
    the saved config; None removes a key. shapes: of tensors that are put beside, or all of them. widths: for tests.
    """

    model_type: str | None
    config: Mapping[str, Any]
    cuts: Cuts
    names: Sequence[tuple[str, str]] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    widths: tuple[int, int] = (2, 4)


_MLA = Cuts((*GATED, "q_b_proj", "kv_b_proj"), ("o_proj", "down_proj"))
_V4 = Cuts(
    ("attn.wq_b", "attn.attn_sink", "attn.wo_a", "w1", "w3"),
    ("attn.wo_b", "w2"),
    ends=("embed", "embed_tokens", "head", "tok_emb"),
)
_DEEPSEEK_V4 = _ENDS | {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 24,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "max_position_embeddings": POSITIONS,
    "compress_ratios": [0, 4, 128, 4],
    "num_hash_layers": 1,
    "sliding_window": 8,
    "o_groups": 4,
    "o_lora_rank": 12,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 2,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
}
_KIMI = Cuts(
    (
        *(f"{letter}_{what}" for letter in "qkv" for what in ("proj", "conv1d")),
        *("b_proj", "f_b_proj", "g_b_proj", "dt_bias", "kv_b_proj", "q_b_proj", "w1", "w3", *GATED),
        "self_attn.g_proj",
    ),
    ("o_proj", "down_proj", "w2"),
    ends=("embed_tokens", "lm_head", "shared_head.head"),
    third=("A_log",),
)
_LING = Cuts(
    (
        *(f"{letter}_{what}" for letter in "qkv" for what in ("proj", "conv1d")),
        *("b_proj", "f_proj", "g_proj", "dt_bias", "A_log", "kv_b_proj", "q_b_proj", "g_norm", *GATED),
    ),
    ("dense", "o_proj", "down_proj"),
    ends=("word_embeddings", "lm_head", "shared_head.head"),
    blocks={"query_key_value": ((64, 64, 64), 1)},
)
_STEP_CUTS = Cuts(
    ("q_proj", "g_proj", "mlp.gate_proj", "mlp.up_proj", "share_expert.gate_proj", "share_expert.up_proj"),
    ("o_proj", "down_proj"),
    {"k_proj": 2, "v_proj": 2},
    ends=("embed_tokens", "lm_head", "shared_head.output"),
)
_GQA = Cuts(("q_proj", *GATED), ("o_proj", "down_proj"), {"k_proj": 2, "v_proj": 2})
_K3_LINEAR = {
    "full_attn_layers": [2],
    "kda_layers": [1],
    "head_dim": 16,
    "num_heads": 4,
    "short_conv_kernel_size": 4,
    "use_full_rank_gate": True,
}
_BAILING = _TEXT | {
    "model_type": "bailing_moe_v2",
    "head_dim": 16,
    "use_qk_norm": True,
    "first_k_dense_replace": 1,
    "num_experts": 4,
    "num_shared_experts": 2,
    "moe_intermediate_size": 32,
    "moe_router_enable_expert_bias": True,
    "num_nextn_predict_layers": 1,
}

SERVED: dict[str, Served] = {
    "deepseek_v4": Served(
        "deepseek_v4",
        _DEEPSEEK_V4,
        _V4,
        [
            (r"^model\.embed_tokens\.", "embed."),
            (r"^model\.hc_head\.hc_", "hc_head_"),
            (r"\.attn\.norm\.", ".attn.kv_norm."),
            (r"^model\.", ""),
        ],
        {"layer_types": None, "mlp_layer_types": None, "compress_ratios": [0, 4, 128, 4, 0], "num_hash_layers": 1},
        deepseek_v4_further(),
    ),
    "deepseek_v4, as transformers saves it": Served("deepseek_v4", _DEEPSEEK_V4, _V4),
    "gemma4": Served(
        "gemma4",
        {
            "text_config": _TEXT
            | _WINDOWS
            | {"global_head_dim": 24, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
            "vision_config": _VISION | {"head_dim": 8, "num_key_value_heads": 4, "position_embedding_size": 16},
            "audio_config": None,
        },
        _GQA,
    ),
    "gemma4_unified": Served(
        "gemma4_unified",
        {
            "text_config": _TEXT | _WINDOWS | {"global_head_dim": 24},
            "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32, "patch_size": 4},
            "audio_config": {"audio_embed_dim": 16},
        },
        _GQA,
    ),
    "kimi_k25": Served(
        "kimi_k25",
        {
            "tie_word_embeddings": False,
            "projection_hidden_size": 32,
            "text_config": _TEXT
            | _LATENT
            | _EXPERTS
            | {"model_type": "deepseek_v3", "q_lora_rank": 24, "n_routed_experts": 4, "first_k_dense_replace": 1}
            | {"n_group": 2, "topk_group": 1},
            "vision_config": _VISION,
        },
        _MLA,
        [(r"^language_model\.model\.blocks\.", "language_model.model.layers.")],
    ),
    "glm46v": Served(
        "glm46v",
        {
            "text_config": _TEXT
            | {"num_attention_heads": 4, "head_dim": 16}
            | {
                "rope_parameters": {
                    **{"rope_type": "default", "rope_theta": 1e4},
                    **{"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]},
                }
            },
            "vision_config": {
                **{"depth": 1, "num_heads": 4, "patch_size": 14, "image_size": 28, "hidden_size": 32},
                **{"intermediate_size": 48, "out_hidden_size": 64},
            },
        },
        Cuts(("q_proj",), ("o_proj", "down_proj"), {"k_proj": 2, "v_proj": 2}, blocks={"gate_up_proj": ((96, 96), 1)}),
    ),
    "minimax_m3_vl": Served(
        "minimax_m3_vl",
        {
            "text_config": _TEXT
            | {"head_dim": 16, "rotary_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
            | {"dense_intermediate_size": 80, "shared_intermediate_size": 48, "intermediate_size": 32}
            | {"index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 1}
            | {"layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"]},
            "vision_config": _VISION,
            "projector_hidden_size": 64,
        },
        Cuts(
            ("q_proj", *GATED, "w1", "w3"),
            ("o_proj", "down_proj", "w2"),
            {"k_proj": 2, "v_proj": 2, "index_q_proj": 2},
        ),
    ),
    "mistral3 with mistral4": Served(
        "mistral3",
        {
            "text_config": _TEXT
            | _LATENT
            | _EXPERTS
            | {"model_type": "mistral4", "q_lora_rank": 24, "n_routed_experts": 4, "first_k_dense_replace": 1},
            "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 8},
        },
        Cuts(
            (*GATED, "q_b_proj", "kv_b_proj"),
            ("o_proj", "down_proj"),
            blocks={"experts.gate_up_proj": ((32, 32), 1)},
        ),
    ),
    "kimi_linear": Served(
        "kimi_linear",
        _TEXT
        | _LATENT
        | {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_token": 2, "first_k_dense_replace": 1}
        | {"layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 16, "linear_num_heads": 4},
        _KIMI,
        [(r"block_sparse_moe\.(gate|up|down)_proj", r"mlp.\1_proj")],
        {
            **dict.fromkeys(("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads")),
            "linear_attn_config": {
                **{"full_attn_layers": [2], "kda_layers": [1], "head_dim": 16, "num_heads": 4},
                "short_conv_kernel_size": 4,
            },
        },
    ),
    "kimi_k3": Served(
        None,
        {
            "model_type": "kimi_k3",
            "text_config": _TEXT
            | _LATENT
            | {"model_type": "kimi_linear", "q_lora_rank": 24, "mla_use_output_gate": True, "num_experts": 4}
            | {"moe_intermediate_size": 32, "num_experts_per_token": 2, "first_k_dense_replace": 1}
            | {"num_shared_experts": 1, "routed_expert_hidden_size": 40, "latent_moe_use_norm": True}
            | {"attn_res_block_size": 2, "num_nextn_predict_layers": 1, "linear_attn_config": _K3_LINEAR},
        },
        _KIMI,
        shapes=kimi_k3(),
    ),
    "bailing_moe_v2": Served(
        None,
        _BAILING,
        Cuts(
            GATED,
            ("dense", "down_proj"),
            ends=("word_embeddings", "lm_head"),
            blocks={"query_key_value": ((128, 32, 32), 1)},
        ),
        shapes=bailing(3, hybrid=False),
        widths=(2, 1),
    ),
    "bailing_hybrid, Ring 2.5": Served(
        None,
        _BAILING
        | _LATENT
        | {"model_type": "bailing_hybrid", "q_lora_rank": 24, "head_dim": 8, "layer_group_size": 2}
        | {"group_norm_size": 4},
        _LING,
        shapes=bailing(3, hybrid=True),
    ),
    "bailing_hybrid, Ling 3.0": Served(
        "bailing_hybrid",
        _TEXT
        | _LATENT
        | _EXPERTS
        | {"num_experts": 4, "layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
        | {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
        _LING,
        [(r"layers\.0\.attention\.dense\.", "layers.0.attention.o_proj.")],
        {
            **dict.fromkeys(("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads")),
            **{"layer_group_size": 2, "head_dim": 16, "gated_attention_proj_granularity_type": "head_wise"},
        },
    ),
    "step3p7": Served(
        "step3p7",
        {"text_config": _STEP, "vision_config": _VISION},
        _STEP_CUTS,
        changes={
            "text_config": {
                **dict.fromkeys(("mlp_layer_types", "mtp_layer_types", "num_key_value_heads", "n_routed_experts")),
                **dict.fromkeys(("num_sliding_attention_heads", "per_layer_config")),
                **{"num_attention_groups": 2, "moe_num_experts": 4, "moe_layers_enum": "1"},
                "num_nextn_predict_layers": 1,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
                "attention_other_setting": {
                    **{"attention_type": "sliding_attention", "num_attention_heads": 4},
                    **{"num_attention_groups": 2, "head_dim": 16},
                },
            }
        },
        shapes=layered(
            "model.layers.2.",
            {
                **norms("input_layernorm", "post_attention_layernorm", "enorm", "hnorm"),
                **norms("transformer.shared_head.norm"),
                **norms("self_attn.q_norm", "self_attn.k_norm", hidden=16),
                **{f"self_attn.{name}_proj.weight": (64, 64) for name in "qo"},
                **{f"self_attn.{name}_proj.weight": (32, 64) for name in "kv"},
                **{"self_attn.g_proj.weight": (4, 64), "eh_proj.weight": (64, 128)},
                **{"transformer.shared_head.output.weight": (VOCAB, 64)},
                **gated("mlp.", 96),
            },
        ),
    ),
    "longcat_flash": Served(
        "longcat_flash",
        _ENDS
        | {name: value for name, value in _LATENT.items() if name != "num_key_value_heads"}
        | {"hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2, "num_attention_heads": 8, "q_lora_rank": 24}
        # transformers saves matrices for experts that have none, where there are such.
        | {"moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 0, "expert_ffn_hidden_size": 32}
        | {"head_dim": 8},  # of what is turned
        _MLA,
        shapes={
            **{"model.mtp.embed_tokens.weight": (VOCAB, 64), "model.mtp.layers.0.eh_proj.weight": (64, 128)},
            **norms("model.mtp.norm", "model.mtp.layers.0.enorm.m", "model.mtp.layers.0.hnorm.m"),
            **gated("model.mtp.layers.0.transformer_layer.mlp.", 96),
            **norms("model.mtp.layers.0.input_layernorm", "model.mtp.layers.0.post_attention_layernorm"),
            **{f"model.mtp.layers.0.self_attn.{name}.weight": shape for name, shape in {
                **{"q_a_proj": (24, 64), "q_a_layernorm": (24,), "q_b_proj": (192, 24), "kv_b_proj": (224, 16)},
                **{"kv_a_proj_with_mqa": (24, 64), "kv_a_layernorm": (16,), "o_proj": (64, 96)},
            }.items()},
        },
        changes={"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"},
    ),
    "mistral_large4": Served(
        "mistral_large4",
        {
            "text_config": _TEXT
            | _LATENT
            | _EXPERTS
            | {"num_hidden_layers": 3, "n_routed_experts": 4, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 8}
            | {"kv_source_layers": [0, 1, 1], "index_topk_pattern": "FFS"},
            "vision_config": _VISION | {"head_dim": 8},
        },
        Cuts(
            ("attention.wq", "wkv_b", "w1", "w3", "attention.ssmax_scaling.s", "attention.ssmax_scaling.b"),
            ("wo", "w2"),
            ends=("tok_embeddings", "output"),
        ),
        changes={"text_config": {"indexer_types": None, "mlp_layer_types": None}},
    ),
    "mimo_v2": Served(
        None,
        _TEXT
        | {"model_type": "mimo_v2", "head_dim": 16, "v_head_dim": 12, "swa_num_key_value_heads": 4}
        | {"n_routed_experts": 4, "moe_intermediate_size": 32, "hybrid_layer_pattern": [0, 1]}
        | {"moe_layer_freq": [0, 1], "vision_config": {}},
        Cuts(
            (*GATED, "attention_sink_bias"),
            ("o_proj", "down_proj"),
            blocks={
                "mtp.layers.0.self_attn.qkv_proj": ((64, 32, 24), 2),
                "layers.0.self_attn.qkv_proj": ((64, 16, 12), 2),
                "layers.1.self_attn.qkv_proj": ((64, 32, 24), 2),
            },
        ),
        shapes=mimo(),
        widths=(2, 1),
    ),
}  # fmt: skip


SERVED["minimax_m3_vl, numbers for layers"] = replace(
    SERVED["minimax_m3_vl"],
    changes={
        "text_config": {
            **dict.fromkeys(("layer_types", "mlp_layer_types", "index_n_heads", "index_head_dim")),
            **dict.fromkeys(("index_block_size", "index_topk_blocks")),
            **{"model_type": "minimax_m3_text", "moe_layer_freq": [0, 1]},
            "sparse_attention_config": {
                **{"sparse_num_index_heads": 2, "sparse_index_dim": 16, "sparse_attention_freq": [0, 1]},
                **{"sparse_block_size": 4, "sparse_topk_blocks": 1},
            },
        }
    },
)


def make(name: str, path: Path) -> Path:
    """Write the checkpoint, as it is published."""
    return written(SERVED[name], path)


def written(served: Served, path: Path) -> Path:
    """Write a checkpoint, as it is published."""
    rng = np.random.default_rng(len(served.shapes))
    tensors: dict[str, Tensor] = {}
    config = dict(served.config)
    if served.model_type is not None:
        saved = _saved(served, path.with_name(f"{path.name}-saved"))
        tensors = {_renamed(each, served.names): tensor for each, tensor in read_all(saved).items()}
        config = json.loads((saved / "config.json").read_text())
    tensors |= {each: random_tensor(rng, "F32", shape) for each, shape in served.shapes.items()}
    return write_checkpoint(path, _changed(config, served.changes), tensors)


def _saved(served: Served, path: Path) -> Path:
    """What transformers saves: norms around 1, all else around 0."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = AutoConfig.for_model(served.model_type, **served.config)
    auto = AutoModelForImageTextToText if "vision_config" in served.config else AutoModelForCausalLM
    model: Any = auto.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(each.encode())))
            parameter.copy_(0.1 * drawn + ("norm" in each))
    model.save_pretrained(path)
    return path


def _renamed(name: str, names: Sequence[tuple[str, str]]) -> str:
    for old, new in names:
        name = re.sub(old, new, name)
    return name


def _changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with other values; None removes a key, and a table changes the table that is there."""
    found = dict(config)
    for key, value in changes.items():
        found[key] = _changed(found[key], value) if isinstance(value, dict) and key in found else value
    return {key: value for key, value in found.items() if value is not None or key not in changes}
