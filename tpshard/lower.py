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
from typing import NamedTuple

from tpshard.box import Box, Shape, extents, full, merge_box, merge_shape, mergeable
from tpshard.header import DTYPE_BITS
from tpshard.planning import Fill, Region, Step

BLOCK = 2 << 20
"""Bytes of a block: small enough to stay in the last-level cache, large enough that a block costs little Python."""


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
        would wait for its lock. A tensor without elements has no blocks.
        """
        if not all(self.shape):
            return
        item = max(flat.item for flat in (*self.sources, *self.targets))
        dim = next(
            (d for d in range(len(self.shape)) if prod(self.shape[d + 1 :]) * item <= BLOCK), len(self.shape) - 1
        )
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
        shape, held = extents(step.target.pieces[0][0]), (0, 0)
        regions: tuple[Region, ...] = (step.target,)
    else:
        shape, held = step.shape, (len(step.sources), len(step.sources) + len(step.replicas))
        regions = (*step.sources, *step.replicas, *step.targets)
    if not shape:
        shape = (1,)
        regions = tuple(_scalar(region) for region in regions)
    groups = mergeable(shape, ((box, region.shape) for region in regions for box, _ in region.pieces))
    flats = tuple(_flat(region, shape, groups) for region in regions)
    bits = DTYPE_BITS[regions[0].dtype]
    merged = _items(merge_shape(shape, groups), 8 // gcd(8, bits))
    a, b = held
    return FlatStep(
        name=step.name,
        shape=merged if len(merged) > 1 else (1, *merged),
        sources=flats[:a],
        replicas=flats[a:b],
        targets=flats[b:],
        source_dtype=regions[0].dtype if a else None,
        target_dtype=regions[-1].dtype,
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
    granule = 8 // gcd(8, bits)  # elements that fill whole bytes
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


def operations(flat: Flat, block: Box, buffer: memoryview) -> Iterator[tuple[int, list[memoryview]]]:
    """A region's share of a block: the file offset of each contiguous run, and the slices of the buffer it holds."""
    item = flat.item
    (top_row, bottom_row), (left_column, right_column) = block[-2:]
    rows, width = bottom_row - top_row, right_column - left_column
    for outer in product(*(range(start, stop) for start, stop in block[:-2])):
        base = 0  # the first row of the buffer with this outer index
        for index, (start, stop) in zip(outer, block[:-2], strict=True):
            base = base * (stop - start) + index - start
        base *= rows
        spans = []
        for box, at in flat.pieces:
            (first, last), (near, far) = box[-2:]
            top, bottom = max(first, top_row), min(last, bottom_row)
            left, right = max(near, left_column), min(far, right_column)
            if top >= bottom or left >= right:
                continue
            if any(not start <= i < stop for i, (start, stop) in zip(outer, box, strict=False)):
                continue
            plane = 0
            for index, (start, _), corner, size in zip(outer, box, at, flat.shape, strict=False):
                plane = plane * size + index - start + corner
            spans.append(
                _Span(
                    row=plane * flat.shape[-2] + top - first + at[-2],
                    column=left - near + at[-1],
                    rows=bottom - top,
                    start=((base + top - top_row) * width + left - left_column) * item,
                    length=(right - left) * item,
                )
            )
        if spans:
            yield from _runs(flat, sorted(spans), width * item, buffer)


class _Span(NamedTuple):
    """Part of some rows: where it is stored (in items) and where in the buffer its first row lies (in bytes)."""

    row: int
    column: int
    rows: int
    start: int
    length: int


def _runs(flat: Flat, spans: list[_Span], stride: int, buffer: memoryview) -> Iterator[tuple[int, list[memoryview]]]:
    """Runs of spans in stored order; the spans of one row that follow each other make one run, and whole rows do."""
    item, stored_stride = flat.item, flat.shape[-1] * flat.item
    row, column, rows = spans[0][:3]
    together = all(span.row == row and span.rows == rows for span in spans)
    adjacent = all(a.column * item + a.length == b.column * item for a, b in zip(spans, spans[1:], strict=False))
    whole = column == 0 and sum(span.length for span in spans) == stored_stride
    if together and adjacent and (whole or rows == 1):
        offset = flat.begin + row * stored_stride + column * item
        if len(spans) == 1:
            _, _, _, start, length = spans[0]
            if length == stride:  # the buffer's rows are whole too
                yield offset, [buffer[start : start + rows * stride]]
            else:
                yield offset, [buffer[i : i + length] for i in range(start, start + rows * stride, stride)]
            return
        pattern = [(span.start, span.start + span.length) for span in spans]
        yield offset, [buffer[i + a : i + b] for i in range(0, rows * stride, stride) for a, b in pattern]
        return
    for row, column, rows, start, length in spans:
        for i in range(rows):
            offset = flat.begin + (row + i) * stored_stride + column * item
            yield offset, [buffer[start + i * stride : start + i * stride + length]]
