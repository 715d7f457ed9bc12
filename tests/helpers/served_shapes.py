"""Names and shapes of families that are served with many GPUs, where transformers has no class or leaves some out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class KimiK3:
    """The sizes of a small Kimi K3. linear: of a head of linear attention. small: the width that experts work in."""

    hidden: int = 64
    dense: int = 96
    vocab: int = VOCAB
    heads: int = 8
    q_lora: int = 24
    kv_lora: int = 16
    nope: int = 16
    rope: int = 8
    value: int = 12
    linear_heads: int = 4
    linear: int = 16
    experts: int = 4
    expert: int = 32
    small: int = 40
    vision: int = 32
    vision_qkv: int = 48
    vision_ffn: int = 40
    image: int = 4


def kimi_k3(of: KimiK3 = KimiK3(), *, draft: bool = True) -> dict[str, tuple[int, ...]]:  # noqa: B008
    """A layer of linear attention, a latent one with experts in a smaller space, and one that predicts a token more."""
    hidden, text = of.hidden, "language_model.model."
    found: dict[str, tuple[int, ...]] = {
        **{"language_model.lm_head.weight": (of.vocab, hidden), f"{text}embed_tokens.weight": (of.vocab, hidden)},
        **norms(f"{text}norm", f"{text}output_attn_res_norm", hidden=hidden),
        **{f"{text}output_attn_res_proj.weight": (1, hidden)},
        **_kimi_k3_tower(of),
    }
    for i in range(2 + draft):
        start = f"{text}layers.{i}."
        found |= norms(*(f"{start}{name}_layernorm" for name in ("input", "post_attention")), hidden=hidden)
        if i < 2:
            found |= norms(*(f"{start}{name}" for name in ("self_attention_res_norm", "mlp_res_norm")), hidden=hidden)
            found |= {f"{start}{name}.weight": (1, hidden) for name in ("self_attention_res_proj", "mlp_res_proj")}
        if i == 0:
            found |= layered(f"{start}self_attn.", _kimi_k3_linear(of)) | gated(f"{start}mlp.", of.dense, hidden)
        else:
            found |= layered(f"{start}self_attn.", _kimi_k3_latent(of))
            moe = f"{start}block_sparse_moe."
            found |= {f"{moe}gate.weight": (of.experts, hidden), f"{moe}gate.e_score_correction_bias": (of.experts,)}
            found |= {f"{moe}routed_expert_down_proj.weight": (of.small, hidden)}
            found |= {f"{moe}routed_expert_up_proj.weight": (hidden, of.small)}
            found |= {f"{moe}routed_expert_norm.weight": (of.small,)}
            found |= gated(f"{moe}shared_experts.", of.expert, hidden)
            for expert in range(of.experts):
                found |= gated(f"{moe}experts.{expert}.", of.expert, of.small, ("w1", "w3", "w2"))
        if i == 2:
            found |= norms(*(f"{start}{name}" for name in ("enorm", "hnorm", "shared_head.norm")), hidden=hidden)
            found |= {f"{start}eh_proj.weight": (hidden, 2 * hidden)}
            found |= {f"{start}{name}.weight": (of.vocab, hidden) for name in ("embed_tokens", "shared_head.head")}
    return found


def _kimi_k3_linear(of: KimiK3) -> dict[str, tuple[int, ...]]:
    rows = of.linear_heads * of.linear
    return {
        **{f"{name}_proj.weight": (rows, of.hidden) for name in "qkvg"},
        **{f"{name}_conv1d.weight": (rows, 1, 4) for name in "qkv"},
        **{"f_a_proj.weight": (of.linear, of.hidden), "f_b_proj.weight": (rows, of.linear)},
        **{"b_proj.weight": (of.linear_heads, of.hidden), "dt_bias": (rows,)},
        **{"A_log": (1, 1, of.linear_heads, 1), "o_norm.weight": (of.linear,), "o_proj.weight": (of.hidden, rows)},
    }


def _kimi_k3_latent(of: KimiK3) -> dict[str, tuple[int, ...]]:
    return {
        **{"q_a_proj.weight": (of.q_lora, of.hidden), "q_a_layernorm.weight": (of.q_lora,)},
        **{"q_b_proj.weight": (of.heads * (of.nope + of.rope), of.q_lora)},
        **{"kv_a_proj_with_mqa.weight": (of.kv_lora + of.rope, of.hidden), "kv_a_layernorm.weight": (of.kv_lora,)},
        **{"kv_b_proj.weight": (of.heads * (of.nope + of.value), of.kv_lora)},
        **{"g_proj.weight": (of.heads * of.value, of.hidden), "o_proj.weight": (of.hidden, of.heads * of.value)},
    }


def _kimi_k3_tower(of: KimiK3) -> dict[str, tuple[int, ...]]:
    wide, merged = of.vision, 4 * of.vision
    found: dict[str, tuple[int, ...]] = {
        "vision_tower.patch_embed.proj.weight": (wide, 3, 14, 14),
        "vision_tower.patch_embed.pos_emb.weight": (of.image, of.image, wide),
        "vision_tower.encoder.final_layernorm.weight": (wide,),
        **{"mm_projector.proj.0.weight": (merged, merged), "mm_projector.proj.2.weight": (of.hidden, merged)},
        "mm_projector.post_norm.weight": (of.hidden,),
    }
    for i in range(2):
        block = f"vision_tower.encoder.blocks.{i}."
        found |= norms(f"{block}norm0", f"{block}norm1", hidden=wide)
        found |= {f"{block}wqkv.weight": (3 * of.vision_qkv, wide), f"{block}wo.weight": (wide, of.vision_qkv)}
        found |= {f"{block}mlp.fc0.weight": (of.vision_ffn, wide), f"{block}mlp.fc1.weight": (wide, of.vision_ffn)}
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
