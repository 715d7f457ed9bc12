"""Small models of the families that are served with many GPUs, each as it is published.

Those of which transformers has a class are made by it, and renamed where it saves other names than published files.
Of the others there are names and shapes, from vLLM's loaders or the model's own repository, and random bits.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.checkpoints import POSITIONS, VOCAB
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
class Cuts:
    """Which modules a rank has a part of, by the ends of their names; all others are whole on every rank.

    columns, rows: equal parts of the first dim, of the last. kv: heads, of which one may be on several ranks, by
    the number of them. ends: embeddings and heads. blocks: blocks one behind the other in the first dim, with the
    size of each, of which a rank has a part of each; and into how many repeats of them a module is divided.
    experts: stacked ones, whose first dim is none of these.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    kv: Mapping[str, int] = field(default_factory=dict)
    ends: tuple[str, ...] = ("embed_tokens", "lm_head")
    blocks: Mapping[str, tuple[Sequence[int], int]] = field(default_factory=dict)
    third: tuple[str, ...] = ()


_GATED = ("gate_proj", "up_proj")
_MLA = Cuts((*_GATED, "q_b_proj", "kv_b_proj"), ("o_proj", "down_proj"))


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


def _layer(start: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{start}{name}": shape for name, shape in shapes.items()}


def _gated(start: str, wide: int, hidden: int = 64, names: Sequence[str] = (*_GATED, "down_proj")) -> dict[str, Any]:
    """A feed-forward: gate, up and down."""
    gate, up, down = (f"{start}{name}.weight" for name in names)
    return {gate: (wide, hidden), up: (wide, hidden), down: (hidden, wide)}


def _norms(*names: str, hidden: int = 64) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (hidden,) for name in names}


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
        *("b_proj", "f_b_proj", "g_b_proj", "dt_bias", "kv_b_proj", "q_b_proj", "w1", "w3", *_GATED),
        "self_attn.g_proj",
    ),
    ("o_proj", "down_proj", "w2"),
    ends=("embed_tokens", "lm_head", "shared_head.head"),
    third=("A_log",),
)
_LING = Cuts(
    (
        *(f"{letter}_{what}" for letter in "qkv" for what in ("proj", "conv1d")),
        *("b_proj", "f_proj", "g_proj", "dt_bias", "A_log", "kv_b_proj", "q_b_proj", "g_norm", *_GATED),
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
_GQA = Cuts(("q_proj", *_GATED), ("o_proj", "down_proj"), {"k_proj": 2, "v_proj": 2})
_K3_LINEAR = {
    "full_attn_layers": [2],
    "kda_layers": [1],
    "head_dim": 16,
    "num_heads": 4,
    "short_conv_kernel_size": 4,
    "use_full_rank_gate": True,
}
_K3 = {
    **{"language_model.lm_head.weight": (VOCAB, 64), "language_model.model.embed_tokens.weight": (VOCAB, 64)},
    **_norms("language_model.model.norm", "language_model.model.output_attn_res_norm"),
    **{"language_model.model.output_attn_res_proj.weight": (1, 64)},
    **{f"vision_tower.encoder.blocks.0.{name}.weight": (32, 32) for name in ("wqkv", "wo")},
    **{"mm_projector.proj.0.weight": (64, 32)},
}
for _i in range(3):  # the third predicts one more token
    _start = f"language_model.model.layers.{_i}."
    _K3 |= _norms(*(f"{_start}{name}_layernorm" for name in ("input", "post_attention")))
    if _i < 2:
        _K3 |= _norms(*(f"{_start}{name}" for name in ("self_attention_res_norm", "mlp_res_norm")))
        _K3 |= {f"{_start}{name}.weight": (1, 64) for name in ("self_attention_res_proj", "mlp_res_proj")}
    if _i == 0:
        _K3 |= {f"{_start}self_attn.{name}_proj.weight": (64, 64) for name in "qkvg"}
        _K3 |= {f"{_start}self_attn.{name}_conv1d.weight": (64, 1, 4) for name in "qkv"}
        _K3 |= {f"{_start}self_attn.f_a_proj.weight": (16, 64), f"{_start}self_attn.f_b_proj.weight": (64, 16)}
        _K3 |= {f"{_start}self_attn.b_proj.weight": (4, 64), f"{_start}self_attn.dt_bias": (64,)}
        _K3 |= {f"{_start}self_attn.A_log": (1, 1, 4, 1), f"{_start}self_attn.o_norm.weight": (16,)}
        _K3 |= {f"{_start}self_attn.o_proj.weight": (64, 64)} | _gated(f"{_start}mlp.", 96)
    else:
        _K3 |= {f"{_start}self_attn.q_a_proj.weight": (24, 64), f"{_start}self_attn.q_a_layernorm.weight": (24,)}
        _K3 |= {f"{_start}self_attn.q_b_proj.weight": (192, 24), f"{_start}self_attn.kv_b_proj.weight": (224, 16)}
        _K3 |= {f"{_start}self_attn.kv_a_proj_with_mqa.weight": (24, 64), f"{_start}self_attn.o_proj.weight": (64, 96)}
        _K3 |= {f"{_start}self_attn.kv_a_layernorm.weight": (16,), f"{_start}self_attn.g_proj.weight": (96, 64)}
        _moe = f"{_start}block_sparse_moe."
        _K3 |= {f"{_moe}gate.weight": (4, 64), f"{_moe}gate.e_score_correction_bias": (4,)}
        _K3 |= {
            f"{_moe}routed_expert_{way}_proj.weight": shape for way, shape in (("down", (40, 64)), ("up", (64, 40)))
        }
        _K3 |= {f"{_moe}routed_expert_norm.weight": (40,)} | _gated(f"{_moe}shared_experts.", 32)
        for _e in range(4):
            _K3 |= _gated(f"{_moe}experts.{_e}.", 32, 40, ("w1", "w3", "w2"))
    if _i == 2:
        _K3 |= _norms(*(f"{_start}{name}" for name in ("enorm", "hnorm", "shared_head.norm")))
        _K3 |= {f"{_start}eh_proj.weight": (64, 128), f"{_start}embed_tokens.weight": (VOCAB, 64)}
        _K3 |= {f"{_start}shared_head.head.weight": (VOCAB, 64)}


def _bailing(layers: int, *, hybrid: bool) -> dict[str, tuple[int, ...]]:
    """Ling 2.0 with GQA, or Ring 2.5: linear attention, then latent; the last layer predicts one more token."""
    found: dict[str, tuple[int, ...]] = {"model.word_embeddings.weight": (VOCAB, 64), "lm_head.weight": (VOCAB, 64)}
    found |= _norms("model.norm")
    for i in range(layers):
        start, last = f"model.layers.{i}.", i == layers - 1
        attention = f"{start}attention."
        found |= _norms(f"{start}input_layernorm", f"{start}post_attention_layernorm")
        if hybrid and i == 1 or hybrid and last:
            found |= {f"{attention}q_a_proj.weight": (24, 64), f"{attention}q_a_layernorm.weight": (24,)}
            found |= {f"{attention}q_b_proj.weight": (192, 24), f"{attention}kv_b_proj.weight": (224, 16)}
            found |= {f"{attention}kv_a_proj_with_mqa.weight": (24, 64), f"{attention}kv_a_layernorm.weight": (16,)}
            found |= {f"{attention}dense.weight": (64, 96)}
        else:
            rows = 64 * 3 if hybrid else 128 + 2 * 32
            found |= {f"{attention}query_key_value.weight": (rows, 64), f"{attention}dense.weight": (64, rows * 2 // 3)}
            head = 8 if hybrid else 16
            found |= _norms(f"{attention}query_layernorm", f"{attention}key_layernorm", hidden=head)
            if hybrid:
                found |= {f"{attention}dense.weight": (64, 64), f"{attention}g_proj.weight": (64, 64)}
                found |= _norms(f"{attention}g_norm")
        if i == 0:
            found |= _gated(f"{start}mlp.", 96)
        else:
            found |= {f"{start}mlp.gate.weight": (4, 64), f"{start}mlp.gate.expert_bias": (4,)}
            found |= _gated(f"{start}mlp.shared_experts.", 64)
            for expert in range(4):
                found |= _gated(f"{start}mlp.experts.{expert}.", 32)
        if last:
            found |= _norms(*(f"{start}{name}" for name in ("enorm", "hnorm", "final_layernorm")))
            found |= {f"{start}eh_proj.weight": (64, 128)}
    return found


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


def _mimo() -> dict[str, tuple[int, ...]]:
    """Query, key and value in as many shares as there are KV heads: 2, also where a window has 4 of them."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, 64), "lm_head.weight": (VOCAB, 64)}
    found |= _norms("model.norm") | {"visual.blocks.0.attn.qkv.weight": (96, 32)}
    for start, kv in (("model.layers.0.", 2), ("model.layers.1.", 4), ("model.mtp.layers.0.", 4)):
        found |= _norms(f"{start}input_layernorm")
        found |= _norms(f"{start}{'pre_mlp' if 'mtp' in start else 'post_attention'}_layernorm")
        found |= {f"{start}self_attn.qkv_proj.weight": (8 * 16 + kv * (16 + 12), 64)}
        found |= {f"{start}self_attn.o_proj.weight": (64, 8 * 12)}
        if kv == 4:
            found |= {f"{start}self_attn.attention_sink_bias": (8,)}
        if start == "model.layers.1.":
            found |= {f"{start}mlp.gate.weight": (4, 64), f"{start}mlp.gate.e_score_correction_bias": (4,)}
            for expert in range(4):
                found |= _gated(f"{start}mlp.experts.{expert}.", 32)
        else:
            found |= _gated(f"{start}mlp.", 96)
    extra = "model.mtp.layers.0."
    return (
        found
        | _norms(f"{extra}enorm", f"{extra}hnorm", f"{extra}final_layernorm")
        | {f"{extra}eh_proj.weight": (64, 128)}
    )


def _v4_further() -> dict[str, tuple[int, ...]]:
    """What predicts one more token in DeepSeek V4."""
    found = {
        **{
            f"attn.{name}.weight": shape
            for name, shape in {"wq_a": (24, 64), "wq_b": (128, 24), "wkv": (16, 64)}.items()
        },
        **{"attn.q_norm.weight": (24,), "attn.kv_norm.weight": (16,), "attn.attn_sink": (8,)},
        **{
            "attn.wo_a.weight": (48, 32),
            "attn.wo_b.weight": (64, 48),
            "ffn.gate.weight": (4, 64),
            "ffn.gate.bias": (4,),
        },
        **_gated("ffn.shared_experts.", 32, names=("w1", "w3", "w2")),
        **{f"hc_{what}_{part}": shape for what in ("attn", "ffn") for part, shape in _HC.items()},
        **{"hc_head_fn": (2, 128), "hc_head_base": (2,), "hc_head_scale": (1,)},
        **{
            "e_proj.weight": (64, 64),
            "h_proj.weight": (64, 64),
            "emb.tok_emb.weight": (VOCAB, 64),
            "head.weight": (VOCAB, 64),
        },
        **_norms("attn_norm", "ffn_norm", "enorm", "hnorm", "norm"),
    }
    for expert in range(4):
        found |= _gated(f"ffn.experts.{expert}.", 32, names=("w1", "w3", "w2"))
    return _layer("mtp.0.", found)


_HC = {"fn": (8, 128), "base": (8,), "scale": (3,)}

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
        _v4_further(),
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
            ("q_proj", *_GATED, "w1", "w3"),
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
            (*_GATED, "q_b_proj", "kv_b_proj"),
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
        shapes=_K3,
    ),
    "bailing_moe_v2": Served(
        None,
        _BAILING,
        Cuts(
            _GATED,
            ("dense", "down_proj"),
            ends=("word_embeddings", "lm_head"),
            blocks={"query_key_value": ((128, 32, 32), 1)},
        ),
        shapes=_bailing(3, hybrid=False),
        widths=(2, 1),
    ),
    "bailing_hybrid, Ring 2.5": Served(
        None,
        _BAILING
        | _LATENT
        | {"model_type": "bailing_hybrid", "q_lora_rank": 24, "head_dim": 8, "layer_group_size": 2}
        | {"group_norm_size": 4},
        _LING,
        shapes=_bailing(3, hybrid=True),
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
        shapes=_layer(
            "model.layers.2.",
            {
                **_norms("input_layernorm", "post_attention_layernorm", "enorm", "hnorm"),
                **_norms("transformer.shared_head.norm"),
                **_norms("self_attn.q_norm", "self_attn.k_norm", hidden=16),
                **{f"self_attn.{name}_proj.weight": (64, 64) for name in "qo"},
                **{f"self_attn.{name}_proj.weight": (32, 64) for name in "kv"},
                **{"self_attn.g_proj.weight": (4, 64), "eh_proj.weight": (64, 128)},
                **{"transformer.shared_head.output.weight": (VOCAB, 64)},
                **_gated("mlp.", 96),
            },
        ),
    ),
    "longcat_flash": Served(
        "longcat_flash",
        _ENDS
        | {name: value for name, value in _LATENT.items() if name != "num_key_value_heads"}
        | {"hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2, "num_attention_heads": 8, "q_lora_rank": 24}
        # transformers saves matrices for experts that have none, where there are such.
        | {"moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 0, "expert_ffn_hidden_size": 32},
        _MLA,
        shapes={
            **{"model.mtp.embed_tokens.weight": (VOCAB, 64), "model.mtp.layers.0.eh_proj.weight": (64, 128)},
            **_norms("model.mtp.norm", "model.mtp.layers.0.enorm.m", "model.mtp.layers.0.hnorm.m"),
            **_gated("model.mtp.layers.0.transformer_layer.mlp.", 96),
            **_norms("model.mtp.layers.0.input_layernorm", "model.mtp.layers.0.post_attention_layernorm"),
            **{f"model.mtp.layers.0.self_attn.{name}.weight": shape for name, shape in {
                **{"q_a_proj": (24, 64), "q_a_layernorm": (24,), "q_b_proj": (192, 24), "kv_b_proj": (224, 16)},
                **{"kv_a_proj_with_mqa": (24, 64), "kv_a_layernorm": (16,), "o_proj": (64, 96)},
            }.items()},
        },
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
            (*_GATED, "attention_sink_bias"),
            ("o_proj", "down_proj"),
            blocks={
                "mtp.layers.0.self_attn.qkv_proj": ((64, 32, 24), 2),
                "layers.0.self_attn.qkv_proj": ((64, 16, 12), 2),
                "layers.1.self_attn.qkv_proj": ((64, 32, 24), 2),
            },
        ),
        shapes=_mimo(),
        widths=(2, 1),
    ),
}  # fmt: skip


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


def held(name: str, whole: Any, cuts: Cuts, rank: int, tp: int) -> Any:
    """What a rank must hold of a tensor."""
    import torch

    module = name.removesuffix(".weight").removesuffix(".bias")

    def one_of(ends: Any) -> str | None:
        return next((end for end in ends if f".{module}".endswith(f".{end}")), None)

    if any(part in name for part in ("vision", "visual", "projector", "patch_merge", "embed_audio", "vit_large")):
        return whole
    if one_of(cuts.ends):
        rows = -(-VOCAB // tp) * tp
        return torch.cat([whole, whole.new_zeros(rows - VOCAB, *whole.shape[1:])]).chunk(tp)[rank]
    if (end := one_of(cuts.blocks)) is not None:
        sizes, repeats = cuts.blocks[end]
        dim = whole.dim() - 2
        blocks = whole.split(list(sizes) * repeats, dim)
        if repeats == 1:
            return torch.cat([block.chunk(tp, dim)[rank] for block in blocks], dim)
        each, own = len(sizes), repeats // tp
        mine = blocks[rank * own * each : (rank + 1) * own * each]
        return torch.cat(mine)
    if (end := one_of(cuts.kv)) is not None:
        kv = cuts.kv[end]
        return whole.chunk(kv)[rank * kv // tp] if kv < tp else whole.chunk(tp)[rank]
    if whole.dim() == 3 and one_of(("gate_proj", "up_proj", "experts.gate_up_proj")):
        return whole.chunk(tp, 1)[rank]
    if one_of(cuts.third):
        return whole.chunk(tp, 2)[rank]
    if one_of(cuts.columns):
        return whole.chunk(tp)[rank]
    if one_of(cuts.rows):
        return whole.chunk(tp, whole.dim() - 1)[rank]
    return whole
