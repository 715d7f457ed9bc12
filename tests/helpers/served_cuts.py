"""What each rank must hold of the families that are served with many GPUs, cut by hand in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.checkpoints import VOCAB


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
