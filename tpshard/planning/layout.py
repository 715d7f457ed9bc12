"""Layouts: for every stored tensor of every rank, which logical box lies where in it.

A *deal* gives each rank a range of units of each axis; a layout follows from the deal and the tensors' cuts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from tpshard.errors import UnsupportedError
from tpshard.planning.axes import Axis, Cut
from tpshard.planning.box import Box, Shape, full, slab
from tpshard.planning.deal import Deal, deal, listing, possible_tp
from tpshard.planning.mesh import Mesh
from tpshard.storage.safetensors import DTYPE_BITS


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


Interval = tuple[int, int, int]
"""Logical start and stop along the cut dim, and the start in the stored tensor."""


def intervals(
    cut: Cut, axes: Mapping[str, Axis], dealt: Deal, rank: int
) -> tuple[tuple[Interval, ...], tuple[tuple[int, int], ...], int]:
    """What a rank holds of a module along its cut axis: the intervals, the ranges of padding, and the stored size.

    All are elements of the axis, of which `cut.ratio` are one element of the tensor.
    """
    segments = tuple(
        (
            axes[name].count,
            axes[name].unit,
            *dealt.of(name, rank),
            axes[name].count if axes[name].replicate and axes[name].count < dealt.mesh.width(axes[name].along) else 0,
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


def shard(tensors: Sequence[LogicalTensor], axes: Mapping[str, Axis], dealt: Deal) -> Layout:
    """The layout of a tensor-parallel split: every rank's tensors, in the order of `tensors`."""
    known: dict[tuple[Shape, Cut, str], tuple[_Share, ...]] = {}  # layers are alike
    ranks: tuple[list[StoredTensor], ...] = tuple([] for _ in range(dealt.mesh.size))
    for tensor in tensors:
        name, dtype = tensor.name, tensor.dtype
        if tensor.cut.dim is None:
            stored = whole(tensor)
            for rank in ranks:
                rank.append(stored)
            continue
        key = (tensor.shape, tensor.cut, dtype)
        if key not in known:
            _check_ratio(tensor, tensors, axes, dealt)
            known[key] = tuple(_share(tensor, axes, dealt, rank) for rank in range(dealt.mesh.size))
        for rank, (shape, pieces, zeros) in zip(ranks, known[key], strict=True):
            rank.append(StoredTensor(name, dtype, shape, tuple([Part(name, box, at) for box, at in pieces]), zeros))
    return tuple(map(tuple, ranks))


_Share = tuple[Shape, tuple[tuple[Box, Shape], ...], tuple[Box, ...]]
"""What a rank holds of a tensor: stored shape, boxes with their corners, and boxes of padding."""


def _share(tensor: LogicalTensor, axes: Mapping[str, Axis], dealt: Deal, rank: int) -> _Share:
    cut, shape, dim = tensor.cut, tensor.shape, tensor.cut.dim
    assert dim is not None
    kept, fills, size = intervals(cut, axes, dealt, rank)
    if cut.ratio != 1:
        kept = tuple((start // cut.ratio, -(-stop // cut.ratio), at // cut.ratio) for start, stop, at in kept)
        fills = tuple((-(-start // cut.ratio), stop // cut.ratio) for start, stop in fills)
        size = -(-size // cut.ratio)
    _check_bytes(tensor, dim, [(start, stop) for start, stop, _ in kept] + [(0, size)])

    before, after = (0,) * dim, (0,) * (len(shape) - dim - 1)
    pieces = tuple((slab(shape, dim, start, stop), (*before, at, *after)) for start, stop, at in kept)
    zeros = tuple(slab(shape, dim, start, stop) for start, stop in fills)
    return (*shape[:dim], size, *shape[dim + 1 :]), pieces, zeros


def _check_ratio(
    tensor: LogicalTensor, tensors: Sequence[LogicalTensor], axes: Mapping[str, Axis], dealt: Deal
) -> None:
    """UnsupportedError where ranks part inside an element that stands for several of the axis.

    It names the values of tp that work for all of `tensors`.
    """
    cut = tensor.cut
    if cut.ratio == 1 or (position := _inside_an_element(cut, axes, dealt)) is None:
        return
    cuts = {each.cut for each in tensors if each.cut.ratio != 1}
    deals = {tp: deal(axes, Mesh(tp)) for tp in possible_tp(axes)}
    possible = [tp for tp in deals if all(_inside_an_element(each, axes, deals[tp]) is None for each in cuts)]
    units = " + ".join(f"{axes[name].count} {name} of {axes[name].unit}" for name in cut.segments)
    raise UnsupportedError(
        f"{tensor.name}: a cut at {position} of {units} falls inside an element, which stands for {cut.ratio}",
        tensor=tensor.name,
        expected=f"cuts at multiples of {cut.ratio}, as with tp {listing(possible)}",
        found=f"tp {dealt.mesh.tp}",
    )


def _inside_an_element(cut: Cut, axes: Mapping[str, Axis], dealt: Deal) -> int | None:
    """The first boundary that is not on a whole element of the tensor; the end of the axis may be inside its last."""
    end = sum(axes[name].count * axes[name].unit for name in cut.segments)
    for rank in range(dealt.mesh.size):
        kept, fills, _ = intervals(cut, axes, dealt, rank)
        ends = [position for start, stop, _ in kept for position in (start, stop) if position != end]
        for position in (*ends, *(stop for _, stop in fills)):
            if position % cut.ratio:
                return position
    return None


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
            what = f"{tensor.name}: a cut at {start}:{stop} of dim {dim} falls inside a byte of {tensor.dtype}"
            raise UnsupportedError(what, tensor=tensor.name, expected="cuts where bytes end", hint="use a smaller tp")
