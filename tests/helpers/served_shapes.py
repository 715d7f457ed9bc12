"""Names and shapes of families that are served with many GPUs, where transformers has no class or leaves some out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.helpers.checkpoints import VOCAB

GATED = ("gate_proj", "up_proj")


def layered(start: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{start}{name}": shape for name, shape in shapes.items()}


def gated(start: str, wide: int, hidden: int = 64, names: Sequence[str] = (*GATED, "down_proj")) -> dict[str, Any]:
    """A feed-forward: gate, up and down."""
    gate, up, down = (f"{start}{name}.weight" for name in names)
    return {gate: (wide, hidden), up: (wide, hidden), down: (hidden, wide)}


def norms(*names: str, hidden: int = 64) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (hidden,) for name in names}


def kimi_k3() -> dict[str, tuple[int, ...]]:
    """A layer of linear attention, a latent one with experts in a smaller space, and one that predicts a token more."""
    found: dict[str, tuple[int, ...]] = {
        **{"language_model.lm_head.weight": (VOCAB, 64), "language_model.model.embed_tokens.weight": (VOCAB, 64)},
        **norms("language_model.model.norm", "language_model.model.output_attn_res_norm"),
        **{"language_model.model.output_attn_res_proj.weight": (1, 64)},
        **{f"vision_tower.encoder.blocks.0.{name}.weight": (32, 32) for name in ("wqkv", "wo")},
        **{"mm_projector.proj.0.weight": (64, 32)},
    }
    for i in range(3):  # the third predicts one more token
        start = f"language_model.model.layers.{i}."
        found |= norms(*(f"{start}{name}_layernorm" for name in ("input", "post_attention")))
        if i < 2:
            found |= norms(*(f"{start}{name}" for name in ("self_attention_res_norm", "mlp_res_norm")))
            found |= {f"{start}{name}.weight": (1, 64) for name in ("self_attention_res_proj", "mlp_res_proj")}
        if i == 0:
            found |= {f"{start}self_attn.{name}_proj.weight": (64, 64) for name in "qkvg"}
            found |= {f"{start}self_attn.{name}_conv1d.weight": (64, 1, 4) for name in "qkv"}
            found |= {f"{start}self_attn.f_a_proj.weight": (16, 64), f"{start}self_attn.f_b_proj.weight": (64, 16)}
            found |= {f"{start}self_attn.b_proj.weight": (4, 64), f"{start}self_attn.dt_bias": (64,)}
            found |= {f"{start}self_attn.A_log": (1, 1, 4, 1), f"{start}self_attn.o_norm.weight": (16,)}
            found |= {f"{start}self_attn.o_proj.weight": (64, 64)} | gated(f"{start}mlp.", 96)
        else:
            found |= {f"{start}self_attn.q_a_proj.weight": (24, 64), f"{start}self_attn.q_a_layernorm.weight": (24,)}
            found |= {f"{start}self_attn.q_b_proj.weight": (192, 24), f"{start}self_attn.kv_b_proj.weight": (224, 16)}
            found |= {
                f"{start}self_attn.kv_a_proj_with_mqa.weight": (24, 64),
                f"{start}self_attn.o_proj.weight": (64, 96),
            }
            found |= {f"{start}self_attn.kv_a_layernorm.weight": (16,), f"{start}self_attn.g_proj.weight": (96, 64)}
            moe = f"{start}block_sparse_moe."
            found |= {f"{moe}gate.weight": (4, 64), f"{moe}gate.e_score_correction_bias": (4,)}
            found |= {
                f"{moe}routed_expert_{way}_proj.weight": shape for way, shape in (("down", (40, 64)), ("up", (64, 40)))
            }
            found |= {f"{moe}routed_expert_norm.weight": (40,)} | gated(f"{moe}shared_experts.", 32)
            for expert in range(4):
                found |= gated(f"{moe}experts.{expert}.", 32, 40, ("w1", "w3", "w2"))
        if i == 2:
            found |= norms(*(f"{start}{name}" for name in ("enorm", "hnorm", "shared_head.norm")))
            found |= {f"{start}eh_proj.weight": (64, 128), f"{start}embed_tokens.weight": (VOCAB, 64)}
            found |= {f"{start}shared_head.head.weight": (VOCAB, 64)}
    return found


def bailing(layers: int, *, hybrid: bool) -> dict[str, tuple[int, ...]]:
    """Ling 2.0 with GQA, or Ring 2.5: linear attention, then latent; the last layer predicts one more token."""
    found: dict[str, tuple[int, ...]] = {"model.word_embeddings.weight": (VOCAB, 64), "lm_head.weight": (VOCAB, 64)}
    found |= norms("model.norm")
    for i in range(layers):
        start, last = f"model.layers.{i}.", i == layers - 1
        attention = f"{start}attention."
        found |= norms(f"{start}input_layernorm", f"{start}post_attention_layernorm")
        if hybrid and i == 1 or hybrid and last:
            found |= {f"{attention}q_a_proj.weight": (24, 64), f"{attention}q_a_layernorm.weight": (24,)}
            found |= {f"{attention}q_b_proj.weight": (192, 24), f"{attention}kv_b_proj.weight": (224, 16)}
            found |= {f"{attention}kv_a_proj_with_mqa.weight": (24, 64), f"{attention}kv_a_layernorm.weight": (16,)}
            found |= {f"{attention}dense.weight": (64, 96)}
        else:
            rows = 64 * 3 if hybrid else 128 + 2 * 32
            found |= {f"{attention}query_key_value.weight": (rows, 64), f"{attention}dense.weight": (64, rows * 2 // 3)}
            head = 8 if hybrid else 16
            found |= norms(f"{attention}query_layernorm", f"{attention}key_layernorm", hidden=head)
            if hybrid:
                found |= {f"{attention}dense.weight": (64, 64), f"{attention}g_proj.weight": (64, 64)}
                found |= norms(f"{attention}g_norm")
        if i == 0:
            found |= gated(f"{start}mlp.", 96)
        else:
            found |= {f"{start}mlp.gate.weight": (4, 64), f"{start}mlp.gate.expert_bias": (4,)}
            found |= gated(f"{start}mlp.shared_experts.", 64)
            for expert in range(4):
                found |= gated(f"{start}mlp.experts.{expert}.", 32)
        if last:
            found |= norms(*(f"{start}{name}" for name in ("enorm", "hnorm", "final_layernorm")))
            found |= {f"{start}eh_proj.weight": (64, 128)}
    return found


def mimo() -> dict[str, tuple[int, ...]]:
    """Query, key and value in as many shares as there are KV heads: 2, also where a window has 4 of them."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, 64), "lm_head.weight": (VOCAB, 64)}
    found |= norms("model.norm") | {"visual.blocks.0.attn.qkv.weight": (96, 32)}
    for start, kv in (("model.layers.0.", 2), ("model.layers.1.", 4), ("model.mtp.layers.0.", 4)):
        found |= norms(f"{start}input_layernorm")
        found |= norms(f"{start}{'pre_mlp' if 'mtp' in start else 'post_attention'}_layernorm")
        found |= {f"{start}self_attn.qkv_proj.weight": (8 * 16 + kv * (16 + 12), 64)}
        found |= {f"{start}self_attn.o_proj.weight": (64, 8 * 12)}
        if kv == 4:
            found |= {f"{start}self_attn.attention_sink_bias": (8,)}
        if start == "model.layers.1.":
            found |= {f"{start}mlp.gate.weight": (4, 64), f"{start}mlp.gate.e_score_correction_bias": (4,)}
            for expert in range(4):
                found |= gated(f"{start}mlp.experts.{expert}.", 32)
        else:
            found |= gated(f"{start}mlp.", 96)
    extra = "model.mtp.layers.0."
    return (
        found
        | norms(f"{extra}enorm", f"{extra}hnorm", f"{extra}final_layernorm")
        | {f"{extra}eh_proj.weight": (64, 128)}
    )


def deepseek_v4_further() -> dict[str, tuple[int, ...]]:
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
        **gated("ffn.shared_experts.", 32, names=("w1", "w3", "w2")),
        **{f"hc_{what}_{part}": shape for what in ("attn", "ffn") for part, shape in HC.items()},
        **{"hc_head_fn": (2, 128), "hc_head_base": (2,), "hc_head_scale": (1,)},
        **{
            "e_proj.weight": (64, 64),
            "h_proj.weight": (64, 64),
            "emb.tok_emb.weight": (VOCAB, 64),
            "head.weight": (VOCAB, 64),
        },
        **norms("attn_norm", "ffn_norm", "enorm", "hnorm", "norm"),
    }
    for expert in range(4):
        found |= gated(f"ffn.experts.{expert}.", 32, names=("w1", "w3", "w2"))
    return layered("mtp.0.", found)


HC = {"fn": (8, 128), "base": (8,), "scale": (3,)}
