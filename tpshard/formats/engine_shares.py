"""A rank's share of a tensor as an engine has it: cut its way, transposed, fused with others, stacked over experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from tpshard.box import Box, Shape, full, slab
from tpshard.errors import UnsupportedError
from tpshard.formats.engines import Family, fits_any
from tpshard.layout import Deal, LogicalTensor, Part, StoredTensor, deal, shard, why_not
from tpshard.model import CASTABLE, Model
from tpshard.rules import Axis, Cut

Share = StoredTensor
"""A rank's share of one logical tensor, before it is named, fused or stacked."""


@dataclass(frozen=True)
class Recipe:
    """What one of the engine's parameters is made of: lists of tensors to fuse, one list for every stacked expert."""

    groups: tuple[tuple[str, ...], ...]
    stacked: bool = False


def shares_of(
    family: Family, model: Model, tensors: Sequence[LogicalTensor], ranges: Deal, tp: int
) -> dict[str, tuple[Share, ...]]:
    """Each tensor's share of every rank, cut and turned as the engine has it."""
    names = [model.full_name(tensor.name) for tensor in tensors]
    hows = [family.cut(name) for name in names]
    axes, ranges, cut = dict(model.axes), dict(ranges), []
    for tensor, name, how in zip(tensors, names, hows, strict=True):
        if fits_any(family.float32, name) and tensor.dtype in CASTABLE:
            tensor = replace(tensor, dtype="F32")
        if how == "even":
            axis = _even(tensor, tp)
            axes[axis.name], ranges[axis.name] = axis, deal({axis.name: axis}, tp, None, None)[axis.name]
            tensor = replace(tensor, cut=Cut(tensor.cut.kind, tensor.cut.dim, (axis.name,)))
        elif how in ("replicate", "first"):
            tensor = replace(tensor, cut=Cut("replicate"))
        elif how is not None and how != "grouped":
            tensor = replace(tensor, cut=Cut(tensor.cut.kind, tensor.cut.dim, tuple(how.split()[1:])))
        cut.append(tensor)
    shares = {}
    for tensor, name, how, held in zip(cut, names, hows, zip(*shard(cut, axes, tp, ranges), strict=True), strict=True):
        if how == "grouped":
            held = tuple(_grouped(tensor, axes, ranges, rank) for rank in range(tp))
        elif how == "first":
            zeros = held[0]._replace(parts=(), fills=(full(tensor.shape),))
            held = (held[0], *(zeros for _ in held[1:]))
        shares[tensor.name] = tuple(map(_transposed, held)) if fits_any(family.transposed, name) else held
    return shares


def _even(tensor: LogicalTensor, tp: int) -> Axis:
    """An axis of everything that is stored along the cut dim, whatever it is."""
    assert tensor.cut.dim is not None
    axis = Axis(f"{tensor.shape[tensor.cut.dim]} rows", tensor.shape[tensor.cut.dim], unit=1)
    if reason := why_not(axis, tp):
        raise UnsupportedError(reason, tensor=tensor.name, found=f"tp {tp}")
    return axis


def _grouped(tensor: LogicalTensor, axes: Mapping[str, Axis], ranges: Deal, rank: int) -> Share:
    """The share of a tensor that is stored interleaved, as its segments one after another."""
    cut = tensor.cut
    assert cut.dim is not None and cut.interleave is not None
    repeats = axes[cut.interleave].count
    sizes = [axes[name].count // repeats * axes[name].unit for name in cut.segments]
    parts: list[Part] = []
    stored = 0
    for index, name in enumerate(cut.segments):
        first, last = ranges[name][rank]
        per_group = axes[name].count // repeats
        for group in range(repeats):
            low, high = max(first, group * per_group), min(last, (group + 1) * per_group)
            if low >= high:
                continue
            start = group * sum(sizes) + sum(sizes[:index]) + (low - group * per_group) * axes[name].unit
            length = (high - low) * axes[name].unit
            box = slab(tensor.shape, cut.dim, start, start + length)
            parts.append(Part(tensor.name, box, tuple(stored if dim == cut.dim else 0 for dim in range(len(box)))))
            stored += length
    shape = (*tensor.shape[: cut.dim], stored, *tensor.shape[cut.dim + 1 :])
    return StoredTensor(tensor.name, tensor.dtype, shape, tuple(parts))


def _transposed(share: Share) -> Share:
    """The share with its last two dims exchanged."""
    last = len(share.shape) - 1
    order = (*range(last - 1), last, last - 1)

    def turned(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[dim] for dim in order)

    parts = tuple(part._replace(at=turned(part.at), order=order) for part in share.parts)
    fills = tuple(tuple(box[dim] for dim in order) for box in share.fills)
    return share._replace(shape=turned(share.shape), parts=parts, fills=fills)


def join_shares(
    name: str, recipe: Recipe, rank: int, shares: Mapping[str, tuple[Share, ...]], shapes: Mapping[str, Shape]
) -> StoredTensor:
    """One parameter of one rank: shares fused along their first dim, experts stacked before it."""
    if recipe == Recipe(recipe.groups[:1]) and len(recipe.groups[0]) == 1:
        return shares[recipe.groups[0][0]][rank]._replace(name=name)
    parts: list[Part] = []
    fills: list[Box] = []
    for expert, group in enumerate(recipe.groups):
        begin = 0
        for share in (shares[each][rank] for each in group):
            for part in share.parts:
                if recipe.stacked:
                    assert part.view is None and part.order is None
                    box, at, view = _stacked(part.box, part.at, begin, expert, shapes[part.tensor])
                    parts.append(Part(part.tensor, box, at, view))
                else:
                    parts.append(part._replace(at=(part.at[0] + begin, *part.at[1:])))
            for (start, stop), *rest in share.fills:
                filled = ((start + begin, stop + begin), *rest)
                fills.append(((expert, expert + 1), *filled) if recipe.stacked else filled)
            begin += share.shape[0]
    first = shares[recipe.groups[0][0]][rank]
    if len({shares[each][rank].dtype for group in recipe.groups for each in group}) > 1:
        raise UnsupportedError(f"the tensors that make {name} have different dtypes", tensor=name, hint="cast: --dtype")
    shape = (begin, *first.shape[1:])
    stacked = (len(recipe.groups), *shape) if recipe.stacked else shape
    return StoredTensor(name, first.dtype, stacked, tuple(parts), tuple(fills))


@lru_cache(maxsize=1 << 16)
def _stacked(box: Box, at: Shape, begin: int, expert: int, shape: Shape) -> tuple[Box, Shape, Shape]:
    """A part of one expert's tensor of `shape` where all are stacked: box, corner, view. Cached: layers are alike."""
    return ((0, 1), *box), (expert, at[0] + begin, *at[1:]), (1, *shape)
