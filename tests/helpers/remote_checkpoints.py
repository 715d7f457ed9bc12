"""Checkpoints of families that remote code alone runs, and what each rank has of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.toys import Tensor, write_checkpoint

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]]
"""By module, the shape of its weight, and the sizes of the blocks of its rows of which each rank has its share: `()`
where columns are cut, None where every rank has all of it."""
HIDDEN, HEADS, FFN, VOCAB = 16, 4, 12, 10
_SIZES = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "vocab_size": VOCAB, "num_hidden_layers": 2}
_NORM = ((HIDDEN,), None)


def of_layers(start: str, modules: Shapes) -> Shapes:
    """Modules of two layers."""
    return {f"{start}.{layer}.{name}": shape for layer in range(2) for name, shape in modules.items()}


def ends(embedding: str, norm: str, head: str = "lm_head") -> Shapes:
    table = ((VOCAB, HIDDEN), (VOCAB,))
    return {embedding: table, norm: _NORM, head: table}


REMOTE: dict[str, tuple[dict[str, Any], Shapes, set[str]]] = {
    "baichuan": (
        {"intermediate_size": FFN},
        ends("model.embed_tokens", "model.norm")
        | of_layers(
            "model.layers",
            {
                "self_attn.W_pack": ((3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN, HIDDEN)),
                "self_attn.o_proj": ((HIDDEN, HIDDEN), ()),
                "mlp.gate_proj": ((FFN, HIDDEN), (FFN,)),
                "mlp.up_proj": ((FFN, HIDDEN), (FFN,)),
                "mlp.down_proj": ((HIDDEN, FFN), ()),
                "input_layernorm": _NORM,
                "post_attention_layernorm": _NORM,
            },
        ),
        set(),
    ),
    "qwen": (
        {"intermediate_size": 2 * FFN},
        ends("transformer.wte", "transformer.ln_f")
        | of_layers(
            "transformer.h",
            {
                "attn.c_attn": ((3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN, HIDDEN)),
                "attn.c_proj": ((HIDDEN, HIDDEN), ()),
                "mlp.w1": ((FFN, HIDDEN), (FFN,)),
                "mlp.w2": ((FFN, HIDDEN), (FFN,)),
                "mlp.c_proj": ((HIDDEN, FFN), ()),
                "ln_1": _NORM,
                "ln_2": _NORM,
            },
        ),
        {"attn.c_attn"},
    ),
    "exaone": (
        {"intermediate_size": FFN, "num_key_value_heads": 2, "num_layers": 2, "num_hidden_layers": None},
        ends("transformer.wte", "transformer.ln_f")
        | of_layers(
            "transformer.h",
            {
                "attn.attention.q_proj": ((HIDDEN, HIDDEN), (HIDDEN,)),
                "attn.attention.k_proj": ((HIDDEN // 2, HIDDEN), (HIDDEN // 2,)),
                "attn.attention.v_proj": ((HIDDEN // 2, HIDDEN), (HIDDEN // 2,)),
                "attn.attention.out_proj": ((HIDDEN, HIDDEN), ()),
                "mlp.c_fc_0": ((FFN, HIDDEN), (FFN,)),
                "mlp.c_fc_1": ((FFN, HIDDEN), (FFN,)),
                "mlp.c_proj": ((HIDDEN, FFN), ()),
                "ln_1": _NORM,
                "ln_2": _NORM,
            },
        ),
        set(),
    ),
    "chatglm": (
        {"ffn_hidden_size": FFN, "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True}
        | {"num_layers": 2, "kv_channels": HIDDEN // HEADS, "padded_vocab_size": VOCAB, "vocab_size": 9},
        ends("transformer.embedding.word_embeddings", "transformer.encoder.final_layernorm", "transformer.output_layer")
        | of_layers(
            "transformer.encoder.layers",
            {
                "self_attention.query_key_value": ((2 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN // 2, HIDDEN // 2)),
                "self_attention.dense": ((HIDDEN, HIDDEN), ()),
                "mlp.dense_h_to_4h": ((2 * FFN, HIDDEN), (FFN, FFN)),
                "mlp.dense_4h_to_h": ((HIDDEN, FFN), ()),
                "input_layernorm": _NORM,
                "post_attention_layernorm": _NORM,
            },
        ),
        {"self_attention.query_key_value"},
    ),
}


def checkpoint(model_type: str, out: Path) -> Path:
    changes, shapes, biased = REMOTE[model_type]
    rng = np.random.default_rng(0)
    whole = {f"{module}.weight": shape for module, (shape, _) in shapes.items()}
    whole |= {f"{m}.bias": shape[:1] for m, (shape, _) in shapes.items() if m.endswith(tuple(biased or {"-"}))}
    tensors = {
        name: Tensor("F32", shape, rng.standard_normal(shape).astype("<f4").tobytes()) for name, shape in whole.items()
    }
    config = {key: value for key, value in (_SIZES | changes | {"model_type": model_type}).items() if value is not None}
    return write_checkpoint(out, config, tensors)
