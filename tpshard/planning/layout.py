"""Layouts: for every stored tensor of every rank, which logical box lies where in it.

A *deal* gives each rank a range of units of each axis; a layout follows from the deal and the tensors' cuts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from tpshard.planning.box import Box, Shape, full, slab
from tpshard.errors import UnsupportedError, UsageError
from tpshard.storage.safetensors import DTYPE_BITS
from tpshard.rules.classify import Axis, Cut

if TYPE_CHECKING:
    from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Mesh:
    """How many ranks there are along each kind of parallelism. pp and ep are reserved."""

    tp: int
    pp: int = 1
    ep: int = 1


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor of the unsharded model: what the source holds and what merge gives back."""

    name: str
    dtype: str
    shape: Shape
    cut: Cut


class Part(NamedTuple):
    """A box of a logical tensor, and its corner in the stored tensor.

    view: the shape in which box sees the logical tensor, if not its own; same elements in the same order.
    order: dim d of the stored tensor is dim order[d] of the box; None when they are the same.
    """

    tensor: str
    box: Box
    at: Shape
    view: Shape | None = None
    order: tuple[int, ...] | None = None


class StoredTensor(NamedTuple):
    """One tensor of one rank: parts of logical tensors, and boxes of a constant (padding).

    view: the shape in which parts and fills see it, if not its own. value: the bytes of one element of the fills;
    none for zeros.
    """

    name: str
    dtype: str
    shape: Shape
    parts: tuple[Part, ...]
    fills: tuple[Box, ...] = ()
    view: Shape | None = None
    value: bytes = b""


Layout = tuple[tuple[StoredTensor, ...], ...]
"""One tuple of stored tensors per rank; all ranks list the same names in the same order."""

Deal = Mapping[str, tuple[tuple[int, int], ...]]
"""For each axis, each rank's half-open range of units."""


def deal(axes: Mapping[str, Axis], tp: int, shares: Sequence[Fraction | int] | None, pad_to: int | None) -> Deal:
    """Give each rank its range of units of each axis.

    shares: relative weights of the ranks, or None for even shares, where a count that does not divide is refused.
    pad_to: size that padded axes grow to (default: the next multiple of tp).
    UnsupportedError names the axis and the values of tp that work.
    """
    return {name: _deal_axis(axis, axes, tp, shares, pad_to) for name, axis in axes.items()}


def _deal_axis(
    axis: Axis, axes: Mapping[str, Axis], tp: int, shares: Sequence[Fraction | int] | None, pad_to: int | None
) -> tuple[tuple[int, int], ...]:
    count = padded(axis, tp, pad_to)
    group = axes[axis.group] if axis.group else None
    if shares is None:
        if reason := why_not(axis, tp):
            raise UnsupportedError(
                reason,
                expected="tp " + listing(possible_tp(axes)),
                found=f"tp {tp}",
                hint="use one of those, or deal unequal shares with --uneven",
            )
        if count < tp:  # replicated, contiguously: ranks 0 and 1 hold unit 0
            return tuple((r * count // tp, r * count // tp + 1) for r in range(tp))
        return tuple((r * count // tp, (r + 1) * count // tp) for r in range(tp))
    if axis.replicate and count < tp:
        if tp % count:
            raise UnsupportedError(
                f"{count} {axis.name} units cannot be repeated evenly on {tp} ranks",
                expected=f"a tp of at most {count}, or a multiple of it",
                found=f"tp {tp}",
            )
        return tuple((r * count // tp, r * count // tp + 1) for r in range(tp))
    if group is None or group.count == count or count % group.count:
        return _ranges(_apportion(axis, count, shares))
    per_group = count // group.count
    if group.count >= tp:
        return tuple((a * per_group, b * per_group) for a, b in _deal_axis(group, axes, tp, shares, pad_to))
    together = tp // group.count  # ranks that share one group divide its units among themselves
    sizes = [
        size
        for g in range(group.count)
        for size in _apportion(axis, per_group, shares[g * together : (g + 1) * together])
    ]
    return _ranges(sizes)


def _apportion(axis: Axis, count: int, shares: Sequence[Fraction | int]) -> list[int]:
    """Divide `count` units by weight: each rank at least one, largest remainder first, then the lower rank."""
    if count < len(shares):
        raise UnsupportedError(
            f"{count} {axis.name} on {len(shares)} ranks: a unit is never cut",
            expected=f"tp of at most {count}",
            found=f"tp {len(shares)}",
        )
    total = sum(shares)
    ideal = [count * share for share in shares]  # in units of 1 / total, so that it is exact
    sizes = [max(1, int(value // total)) for value in ideal]
    while sum(sizes) < count:
        rank = max(range(len(sizes)), key=lambda r: (ideal[r] - sizes[r] * total, -r))
        sizes[rank] += 1
    while sum(sizes) > count:
        rank = min((r for r in range(len(sizes)) if sizes[r] > 1), key=lambda r: (ideal[r] - sizes[r] * total, r))
        sizes[rank] -= 1
    return sizes


def _ranges(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    ranges = []
    start = 0
    for size in sizes:
        ranges.append((start, start + size))
        start += size
    return tuple(ranges)


def padded(axis: Axis, tp: int, pad_to: int | None) -> int:
    """The axis' count with padding; UsageError when pad_to is too small or does not divide."""
    if not axis.pad:
        return axis.count
    if pad_to is None:
        return -(-axis.count // tp) * tp
    if pad_to < axis.count or pad_to % tp:
        raise UsageError(
            f"cannot pad {axis.name} of {axis.count} to {pad_to}",
            expected=f"a multiple of tp {tp} that is at least {axis.count}",
            found=pad_to,
            hint=f"for example --pad-vocab-to {-(-max(axis.count, pad_to) // tp) * tp}",
        )
    return pad_to


def why_not(axis: Axis, tp: int) -> str | None:
    """Why an axis cannot be dealt evenly to tp ranks, or None when it can."""
    if axis.pad or axis.count % tp == 0 or (axis.replicate and tp % axis.count == 0):
        return None
    also = f", and {tp} is not a multiple of {axis.count}" if axis.replicate and tp > axis.count else ""
    return f"{axis.count} {axis.name} on {tp} ranks: {axis.count} is not a multiple of {tp}{also}"


def possible_tp(axes: Mapping[str, Axis]) -> list[int]:
    """Every tp that divides all axes evenly, 1 included."""
    return [tp for tp in range(1, largest_tp(axes) + 1) if all(why_not(axis, tp) is None for axis in axes.values())]


def largest_tp(axes: Mapping[str, Axis]) -> int:
    """No tp above this can work: the smallest count that is neither padded nor repeated."""
    return min((axis.count for axis in axes.values() if not axis.pad and not axis.replicate), default=1)


def listing(values: Sequence[int]) -> str:
    """`1, 2, 3 or 4`."""
    texts = [str(value) for value in values]
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def equal_shares(tp: int) -> tuple[int, ...]:
    """The shares of `--uneven` without weights."""
    return (1,) * tp


Interval = tuple[int, int, int]
"""Logical start and stop along the cut dim, and the start in the stored tensor."""


def intervals(
    cut: Cut, axes: Mapping[str, Axis], ranges: Deal, rank: int
) -> tuple[tuple[Interval, ...], tuple[tuple[int, int], ...], int]:
    """What a rank holds along a cut dim: the intervals, the ranges of padding, and the stored size, in elements."""
    tp = len(next(iter(ranges.values())))
    segments = tuple(
        (
            axes[name].count,
            axes[name].unit,
            *ranges[name][rank],
            axes[name].count if axes[name].replicate and axes[name].count < tp else 0,
        )
        for name in cut.segments
    )
    return _intervals(segments, axes[cut.interleave].count if cut.interleave else 1)


@lru_cache(maxsize=4096)
def _intervals(
    segments: tuple[tuple[int, int, int, int, int], ...], repeats: int
) -> tuple[tuple[Interval, ...], tuple[tuple[int, int], ...], int]:
    """segments: (count, unit, first, last, shared) with a rank's units [first, last); `repeats` interleaves them.

    shared: among how many groups of ranks that hold the same the axis is divided, 0 when no two ranks do.
    Neighbouring intervals become one, unless they are shared otherwise: replicas stay equal boxes.
    """
    kept: list[Interval] = []
    last_shared = 0
    fills: list[tuple[int, int]] = []
    logical = stored = 0
    for repeat in range(repeats):
        for count, unit, first, last, shared in segments:
            size = count // repeats
            low, high = max(first, repeat * size), min(last, (repeat + 1) * size)
            start = logical + (low - repeat * size) * unit
            length = max(0, high - low) * unit
            logical += size * unit
            follows = kept and kept[-1][1] == start and kept[-1][2] + start - kept[-1][0] == stored
            if length and follows and shared == last_shared:
                kept[-1] = (kept[-1][0], start + length, kept[-1][2])
            elif length:
                kept.append((start, start + length, stored))
            last_shared = shared if length else last_shared
            stored += length
            if repeat == repeats - 1 and last > count:
                extra = (last - max(first, count)) * unit
                fills.append((stored, stored + extra))
                stored += extra
    return tuple(kept), tuple(fills), stored


def shard(tensors: Sequence[LogicalTensor], axes: Mapping[str, Axis], tp: int, ranges: Deal) -> Layout:
    """The layout of a tensor-parallel split: every rank's tensors, in the order of `tensors`."""
    known: dict[tuple[Shape, Cut, str], tuple[_Share, ...]] = {}  # layers are alike
    ranks: tuple[list[StoredTensor], ...] = tuple([] for _ in range(tp))
    for tensor in tensors:
        name, dtype = tensor.name, tensor.dtype
        if tensor.cut.dim is None:
            stored = whole(tensor)
            for rank in ranks:
                rank.append(stored)
            continue
        key = (tensor.shape, tensor.cut, dtype)
        if key not in known:
            known[key] = tuple(_share(tensor, axes, ranges, rank) for rank in range(tp))
        for rank, (shape, pieces, zeros) in zip(ranks, known[key], strict=True):
            rank.append(StoredTensor(name, dtype, shape, tuple([Part(name, box, at) for box, at in pieces]), zeros))
    return tuple(map(tuple, ranks))


_Share = tuple[Shape, tuple[tuple[Box, Shape], ...], tuple[Box, ...]]
"""What a rank holds of a tensor: stored shape, boxes with their corners, and boxes of padding."""


def _share(tensor: LogicalTensor, axes: Mapping[str, Axis], ranges: Deal, rank: int) -> _Share:
    cut, shape, dim = tensor.cut, tensor.shape, tensor.cut.dim
    assert dim is not None
    kept, fills, size = intervals(cut, axes, ranges, rank)
    _check_bytes(tensor, dim, [(start, stop) for start, stop, _ in kept] + [(0, size)])

    before, after = (0,) * dim, (0,) * (len(shape) - dim - 1)
    pieces = tuple((slab(shape, dim, start, stop), (*before, at, *after)) for start, stop, at in kept)
    zeros = tuple(slab(shape, dim, start, stop) for start, stop in fills)
    return (*shape[:dim], size, *shape[dim + 1 :]), pieces, zeros


def whole(tensor: LogicalTensor) -> StoredTensor:
    """A logical tensor stored as it is."""
    return StoredTensor(tensor.name, tensor.dtype, tensor.shape, (Part(tensor.name, *_everything(tensor.shape)),))


@lru_cache(maxsize=4096)
def _everything(shape: Shape) -> tuple[Box, Shape]:
    return full(shape), (0,) * len(shape)


def _check_bytes(tensor: LogicalTensor, dim: int, ranges: Sequence[tuple[int, int]]) -> None:
    """A dtype smaller than a byte is cut, and padded, only where bytes end."""
    bits = DTYPE_BITS[tensor.dtype] * prod(tensor.shape[dim + 1 :])
    row = bits * tensor.shape[dim]
    for start, stop in ranges:
        if (start * bits) % 8 or (stop * bits) % 8 or row % 8:
            raise UnsupportedError(
                f"{tensor.name}: a cut at {start}:{stop} of dim {dim} falls inside a byte of {tensor.dtype}",
                tensor=tensor.name,
                expected="cuts where bytes end",
                hint="use a smaller tp",
            )
