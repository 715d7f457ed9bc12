"""Cut a whole checkpoint into ranks by hand: an independent statement of what each rank of each family holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight", "lm_head.bias", "embed_out.weight")
COLUMN = (".up_proj", ".gate_proj", ".c_fc", ".fc_in", ".dense_h_to_4h", ".fc1")
ROW = (".down_proj", "mlp.c_proj", ".fc_out", ".dense_4h_to_h", ".fc2")
OUT = (".o_proj", ".out_proj", "attn.c_proj", "attention.dense")
QKV = (".c_attn", ".query_key_value")


def deal(count: int, parts: Sequence[int]) -> list[int]:
    """`count` things dealt in proportion to `parts`, whole ones only, all of them, nobody empty-handed."""
    given = [max(1, count * part // sum(parts)) for part in parts]
    given[0] += count - sum(given)
    assert min(given) > 0
    return given


def ranges(counts: Sequence[int]) -> list[range]:
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def facts(config: Mapping[str, Any]) -> tuple[int, int]:
    """Heads and KV heads."""
    heads = next(config[k] for k in ("num_attention_heads", "n_head", "num_heads") if config.get(k))
    kind = config["model_type"]
    if kind == "falcon":
        if config["new_decoder_architecture"]:
            return heads, config["num_kv_heads"]
        return heads, 1 if config["multi_query"] else heads
    if kind == "gpt_bigcode":
        return heads, 1 if config["multi_query"] else heads
    return heads, config.get("num_key_value_heads") or heads


def take(tensor: Tensor, dim: int, units: int, wanted: Sequence[int]) -> Tensor:
    """The wanted of `units` equal pieces along a dim, in the order wanted."""
    pieces = tensor.chunk(units, dim)
    assert len(pieces) == units
    return torch.cat([pieces[i] for i in wanted], dim)


def cut(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], tp: int, parts: Sequence[int] | None = None
) -> list[dict[str, Tensor]]:
    """What each of `tp` ranks stores, evenly or in proportion to `parts`; an even vocabulary is padded with zeros."""
    heads, kv = facts(config)
    shares = list(parts or [1] * tp)
    per_kv = heads // kv
    if kv < tp or kv == 1:
        q_of = ranges(deal(heads, shares))
        kv_of = [range(r * kv // tp, r * kv // tp + 1) for r in range(tp)]
    else:
        kv_of = ranges(deal(kv, shares))
        q_of = [range(k.start * per_kv, k.stop * per_kv) for k in kv_of]
    return [{n: _cut(n, tensor, config, r, shares, q_of, kv_of) for n, tensor in tensors.items()} for r in range(tp)]


def _cut(
    name: str,
    tensor: Tensor,
    config: Mapping[str, Any],
    r: int,
    shares: list[int],
    q_of: list[range],
    kv_of: list[range],
) -> Tensor:
    heads, kv = facts(config)
    tp = len(shares)
    module = name.rsplit(".", 1)[0]
    conv1d = config["model_type"] == "gpt2" and name.endswith("weight")
    out, into = (1, 0) if conv1d else (0, 1)
    even = len(set(shares)) == 1
    if name.endswith(EMBEDDINGS) or name in HEADS:
        if even:
            missing = -len(tensor) % tp
            tensor = torch.cat((tensor, tensor.new_zeros((missing, *tensor.shape[1:]))))
        rows = ranges([len(tensor) // tp] * tp if even else deal(len(tensor), shares))[r]
        return tensor[rows.start : rows.stop].clone()
    if module.endswith(".q_proj"):
        return take(tensor, 0, heads, q_of[r])
    if module.endswith((".k_proj", ".v_proj")):
        return take(tensor, 0, kv, kv_of[r])
    if module.endswith(QKV):
        return _cut_fused(tensor, out, config, heads, kv, q_of[r], kv_of[r])
    if module.endswith(OUT):
        return tensor.clone() if name.endswith("bias") else take(tensor, into, heads, q_of[r])
    if module.endswith(COLUMN):
        return take(tensor, out, tensor.shape[out], ranges(deal(tensor.shape[out], shares))[r])
    if module.endswith(ROW):
        if name.endswith("bias"):
            return tensor.clone()
        return take(tensor, into, tensor.shape[into], ranges(deal(tensor.shape[into], shares))[r])
    return tensor.clone()


def _cut_fused(
    tensor: Tensor, out: int, config: Mapping[str, Any], heads: int, kv: int, q: range, mine: range
) -> Tensor:
    kind = config["model_type"]
    total = heads + 2 * kv
    per_head = kind in ("gpt_neox", "bloom") or (kind in ("gpt_bigcode", "falcon") and kv == heads)
    if kind == "falcon" and config["new_decoder_architecture"]:
        per_kv = heads // kv
        wanted = []
        for k in mine:
            own = [h for h in q if h // per_kv == k]
            first = k * (per_kv + 2)
            wanted += [first + h - k * per_kv for h in own] + [first + per_kv, first + per_kv + 1]
        return take(tensor, out, total, wanted)
    if per_head:
        return take(tensor, out, heads, q)
    segments = [*q, *(heads + k for k in mine), *(heads + kv + k for k in mine)]
    return take(tensor, out, total, segments)
