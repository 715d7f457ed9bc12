"""Lowering: a step of a plan as blocks, and a block's regions as file operations.

A block is a box of the logical tensor that fits a small buffer, where it lies row-major. Each region of a source or
target meets the block in strided runs; a run of files' bytes that is contiguous becomes one operation with many
slices of the buffer (`preadv`, `pwritev`), so strided copies cost a list, not a system call a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, prod

from tpshard.box import Box, Shape, extents, full, intersect, merge_box, merge_shape, mergeable
from tpshard.header import DTYPE_BITS
from tpshard.planning import Fill, Region, Step

BLOCK = 1 << 20
"""Bytes of a block: small enough to stay in a core's cache, large enough that a system call is cheap."""

Slices = list[tuple[int, int]]
"""Offset and length in the buffer, in bytes."""


@dataclass(frozen=True, slots=True)
class Flat:
    """A region with dims merged: shape and pieces in items along at least two dims, item size in bytes."""

    file: str
    begin: int
    item: int
    shape: Shape
    pieces: tuple[tuple[Box, Shape], ...]


@dataclass(frozen=True, slots=True)
class FlatStep:
    """A step in merged dims. The same block of it is read from `sources` and goes to `targets`."""

    name: str
    shape: Shape
    sources: tuple[Flat, ...]
    replicas: tuple[Flat, ...]
    targets: tuple[Flat, ...]
    source_dtype: str | None
    target_dtype: str

    def blocks(self) -> Iterator[Box]:
        """Boxes that tile the tensor, each of at most BLOCK bytes unless one item is larger.

        The two halves alternate: neighbouring blocks mostly belong to one rank's file, and two workers on one file
        would wait for its lock.
        """
        item = max(flat.item for flat in (*self.sources, *self.targets))
        dim = next((d for d in range(len(self.shape)) if prod(self.shape[d + 1 :]) * item <= BLOCK), len(self.shape) - 1)
        step = max(1, BLOCK // (item * max(1, prod(self.shape[dim + 1 :]))))
        starts = range(0, self.shape[dim], step)
        half = (len(starts) + 1) // 2
        order = [i for pair in zip(range(half), range(half, 2 * half), strict=True) for i in pair if i < len(starts)]
        for outer in product(*(range(size) for size in self.shape[:dim])):
            for start in (starts[i] for i in order):
                yield (
                    *((i, i + 1) for i in outer),
                    (start, min(start + step, self.shape[dim])),
                    *full(self.shape[dim + 1 :]),
                )


def flatten(step: Step) -> FlatStep:
    """Merge the dims of a step that no region tells apart; elements smaller than a byte become whole bytes."""
    if isinstance(step, Fill):
        shape, sources, replicas, targets = step.target.shape, (), (), (step.target,)
    else:
        shape, sources, replicas, targets = step.shape, step.sources, step.replicas, step.targets
    regions: tuple[Region, ...] = (*sources, *replicas, *targets)
    if not shape:
        shape = (1,)
        regions = tuple(_scalar(region) for region in regions)
    groups = mergeable(shape, ((box, region.shape) for region in regions for box, _ in region.pieces))
    flats = tuple(_flat(region, shape, groups) for region in regions)
    bits = DTYPE_BITS[regions[0].dtype]
    merged = _items(merge_shape(shape, groups), 8 // gcd(8, bits))
    a, b = len(sources), len(sources) + len(replicas)
    return FlatStep(
        name=step.name,
        shape=merged if len(merged) > 1 else (1, *merged),
        sources=flats[:a],
        replicas=flats[a:b],
        targets=flats[b:],
        source_dtype=sources[0].dtype if sources else None,
        target_dtype=targets[0].dtype,
    )


def _scalar(region: Region) -> Region:
    return Region(region.file, region.begin, region.dtype, (1,), (((((0, 1),), (0,))),))


def _items(shape: Shape, granule: int) -> Shape:
    """A shape whose last dim counts items of `granule` elements each, the fewest that fill whole bytes."""
    if not all(shape):
        return (*shape[:-1], -(-shape[-1] // granule))
    assert shape[-1] % granule == 0, f"{shape} does not end on a byte"
    return (*shape[:-1], shape[-1] // granule)


def _flat(region: Region, shape: Shape, groups: Sequence[tuple[int, int]]) -> Flat:
    bits = DTYPE_BITS[region.dtype]
    granule = 8 // gcd(8, bits)
    stored = _items(merge_shape(region.shape, groups), granule)
    pieces = []
    for box, at in region.pieces:
        merged = merge_box(box, shape, groups)
        start, stop = merged[-1]
        corner = merge_box(tuple((a, a) for a in at), region.shape, groups)
        assert start % granule == stop % granule == corner[-1][0] % granule == 0, f"{region} is cut inside a byte"
        last = (start // granule, stop // granule)
        at_merged = (*(a for a, _ in corner[:-1]), corner[-1][0] // granule)
        pieces.append(((*merged[:-1], last), at_merged))
    if len(stored) == 1:
        stored = (1, *stored)
        pieces = [(((0, 1), *box), (0, *at)) for box, at in pieces]
    return Flat(region.file, region.begin, granule * bits // 8, stored, tuple(pieces))


def operations(flat: Flat, block: Box) -> Iterator[tuple[int, Slices]]:
    """Where a region's share of a block lies: file offset of each contiguous run, and its slices of the buffer."""
    item, width = flat.item, extents(block)[-1]
    rows = extents(block)[-2]
    for outer in product(*(range(start, stop) for start, stop in block[:-2])):
        base = 0
        for index, (start, stop) in zip(outer, block[:-2], strict=True):
            base = base * (stop - start) + index - start
        base *= rows
        spans = []  # (first row, last row, stored row of the first, column in the buffer, length, stored column)
        for box, at in flat.pieces:
            common = intersect(box[-2:], block[-2:])
            if common is None or any(not start <= i < stop for i, (start, stop) in zip(outer, box, strict=False)):
                continue
            (top, bottom), (left, right) = common
            plane = 0
            for index, (start, _), corner, size in zip(outer, box, at, flat.shape, strict=False):
                plane = plane * size + index - start + corner
            row = plane * flat.shape[-2] + top - box[-2][0] + at[-2]
            column = left - box[-1][0] + at[-1]
            spans.append((top, bottom, row, left - block[-1][0], right - left, column))
        if spans:
            yield from _runs(flat, spans, base, block[-2][0], width, item)


def _runs(
    flat: Flat, spans: list[tuple[int, int, int, int, int, int]], base: int, first_row: int, width: int, item: int
) -> Iterator[tuple[int, Slices]]:
    stored_width = flat.shape[-1]
    spans.sort(key=lambda span: (span[2], span[5]))
    top, bottom, row = spans[0][:3]
    together = all(span[:3] == (top, bottom, row) for span in spans)
    adjacent = all(a[5] + a[4] == b[5] for a, b in zip(spans, spans[1:], strict=False))
    whole_rows = spans[0][5] == 0 and sum(span[4] for span in spans) == stored_width
    start = base + top - first_row
    count = bottom - top
    if together and adjacent and (whole_rows or count == 1):
        offset = flat.begin + (row * stored_width + spans[0][5]) * item
        if len(spans) == 1 and spans[0][4] == width:  # whole rows here and there
            yield offset, [(start * width * item, count * width * item)]
            return
        pattern = [(left * item, length * item) for _, _, _, left, length, _ in spans]
        stride = width * item
        yield offset, [(r + left, length) for r in range(start * stride, (start + count) * stride, stride) for left, length in pattern]
        return
    for top, bottom, row, left, length, column in spans:
        for i in range(bottom - top):
            offset = flat.begin + ((row + i) * stored_width + column) * item
            yield offset, [(((base + top - first_row + i) * width + left) * item, length * item)]
