"""What a rank holds of a module along its cut axis: which elements, in a row."""

from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise

from tpshard.planning.axes import Axis, Cut
from tpshard.planning.deal import Deal

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
            dealt.ends[name],
        )
        for name in cut.segments
    )
    return _intervals(segments, axes[cut.interleave].count if cut.interleave else 1)


@lru_cache(maxsize=4096)
def _intervals(
    segments: tuple[tuple[int, int, int, int, int, tuple[int, ...]], ...], repeats: int
) -> tuple[tuple[Interval, ...], tuple[tuple[int, int], ...], int]:
    """segments: (count, unit, first, last, shared, ends) with a rank's units [first, last); `repeats` interleaves them.

    shared: among how many groups of ranks that hold the same the axis is divided, 0 when no two ranks do. ends: where
    another rank's units begin or end, if not where this one's do.
    Neighbouring intervals become one, unless they are shared otherwise: replicas stay equal boxes.
    """
    kept: list[Interval] = []
    last_shared = 0
    fills: list[tuple[int, int]] = []
    logical = stored = 0
    for repeat in range(repeats):
        for count, unit, first, last, shared, ends in segments:
            size = count // repeats
            low, high = max(first, repeat * size), min(last, (repeat + 1) * size)
            begin = logical - repeat * size * unit
            logical += size * unit
            between = (end for end in ends if low < end < high)
            for one, other in pairwise((low, *between, high)):
                start, length = begin + one * unit, max(0, other - one) * unit
                follows = kept and kept[-1][1] == start and kept[-1][2] + start - kept[-1][0] == stored
                if length and follows and shared == last_shared and one not in ends:
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
