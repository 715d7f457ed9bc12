"""Lowering: a step of a plan as blocks, and a block's regions as file operations.

A block is a box of the logical tensor that fits a small buffer, where it lies row-major. Each region of a source or
target meets the block in strided runs; a run of files' bytes that is contiguous becomes one operation with many
slices of the buffer (`preadv`, `pwritev`), so strided copies cost a list, not a system call a row. A region that is
stored in another order of dims goes through a second buffer in that order.
"""

from collections.abc import Iterator, Sequence
from itertools import product, zip_longest
from math import gcd, isqrt, prod
from typing import Any, NamedTuple, TypeVar

from tpshard.planning.box import Box, Shape, extents, intersect, merge_box, merge_shape, mergeable
from tpshard.planning.join import Fill, Region, Step, Transfer
from tpshard.planning.strides import Piece, row_major
from tpshard.storage.safetensors import DTYPE_BITS

BLOCK = 2 << 20
"""Bytes of a block: small enough to stay in the last-level cache, large enough that a block costs little Python."""
TURNED = 4 * BLOCK
"""The same where rows become columns: of that shape that what is read and written at once is long on both sides."""


class Flat(NamedTuple):
    """A region with dims merged, at least two of them; the file's bytes [begin, end), pieces and item size in bytes.

    Offsets and strides count items. order: where the file has the dims in another order, which dim of the step each dim
    of the pieces is; the number after the last one stands for a dim of size 1.
    """

    file: str
    begin: int
    end: int
    item: int
    pieces: tuple[Piece, ...]
    order: tuple[int, ...] | None = None

    @property
    def innermost(self) -> int:
        """The dim of the step along which the file's items follow each other."""
        if self.order is None:
            return len(self.pieces[0].box) - 1 if self.pieces else 0
        return self.order[-1] if self.order[-1] < len(self.order) - 1 else self.order[-2]

    def starts(self, dim: int) -> set[int]:
        """Where the pieces begin along a dim of the step."""
        place = dim if self.order is None else self.order.index(dim)
        return {piece.box[place][0] for piece in self.pieces}


class FlatScales(NamedTuple):
    """The scales of a tensor's blocks as a step that is read whole. of: the tensor's shape. shape: theirs."""

    of: Shape
    shape: Shape
    step: "FlatStep"


class FlatStep(NamedTuple):
    """A step in merged dims. The same block of it is read from `sources` and goes to `targets`."""

    name: str
    shape: Shape
    sources: tuple[Flat, ...]
    replicas: tuple[Flat, ...]
    targets: tuple[Flat, ...]
    source_dtype: str | None
    target_dtype: str
    value: bytes
    function: str = ""
    scales: "FlatScales | None" = None

    def blocks(self) -> Iterator[Box]:
        """Boxes that tile the tensor, each of at most BLOCK bytes unless one item is larger.

        Where a region is turned, the most is TURNED bytes. The two halves alternate: neighbouring blocks mostly belong
        to one rank's file, and two workers on one file would wait for its lock. No elements, no blocks.
        """
        if not all(self.shape):
            return
        size = self._block()
        dim = next((d for d, (a, b) in enumerate(zip(size, self.shape, strict=True)) if 1 < a < b), 0)
        sides = [
            [(start, min(start + a, b)) for start in range(0, b, a)] for a, b in zip(size, self.shape, strict=True)
        ]
        half = (len(sides[dim]) + 1) // 2
        sides[dim] = [side for pair in zip_longest(sides[dim][:half], sides[dim][half:]) for side in pair if side]
        yield from product(*sides)

    def _block(self) -> Shape:
        """The shape of a block: whole in as many of the last dims as fit, or long in two where a region is turned."""
        item = max(flat.item for flat in (*self.sources, *self.targets))
        last = len(self.shape) - 1
        turned = {flat.innermost for flat in (*self.sources, *self.replicas, *self.targets)} - {last}
        size = [1] * len(self.shape)
        if turned:
            dim, count = min(turned), max(1, TURNED // item)
            size[dim] = min(self.shape[dim], max(isqrt(count), count // self.shape[last]))
            share = gcd(*(start for flat in self.targets for start in flat.starts(dim)))
            if 0 < share <= size[dim]:
                size[dim] -= size[dim] % share  # a rank's rows are cut no more often than they must be
            size[last] = min(self.shape[last], max(1, count // size[dim]))
            return tuple(size)
        count = max(1, BLOCK // item)
        for dim in range(last, -1, -1):
            size[dim] = min(self.shape[dim], count)
            count //= size[dim]
            if size[dim] < self.shape[dim]:
                break
        return tuple(size)


def flatten(step: Step) -> FlatStep:
    """Merge the dims of a step that no region tells apart; elements smaller than a byte become whole bytes."""
    value = b""
    if isinstance(step, Fill):
        shape, a, b = extents(step.target.pieces[0].box), 0, 0
        regions: tuple[Region, ...] = (step.target,)
        value = step.value
    else:
        shape, a, b = step.shape, len(step.sources), len(step.sources) + len(step.replicas)
        regions = (*step.sources, *step.replicas, *step.targets)
    if not shape:
        shape = (1,)
        regions = tuple(_scalar(region) for region in regions)
    groups = mergeable(shape, ((piece.box, piece.strides) for region in regions for piece in region.pieces))
    flats = tuple(_flat(region, shape, groups) for region in regions)
    merged = _items(merge_shape(shape, groups), 8 // gcd(8, DTYPE_BITS[regions[0].dtype]))
    return FlatStep(
        name=step.name,
        shape=merged if len(merged) > 1 else (1, *merged),
        sources=flats[:a],
        replicas=flats[a:b],
        targets=flats[b:],
        source_dtype=regions[0].dtype if a else None,
        target_dtype=regions[-1].dtype,
        value=value,
        function="" if isinstance(step, Fill) else step.function,
        scales=None if isinstance(step, Fill) else _scales(step),
    )


def _scales(step: Transfer) -> FlatScales | None:
    if step.scales is None:
        return None
    return FlatScales(step.scales.of, step.scales.shape, flatten(step.scales.step))


def _scalar(region: Region) -> Region:
    return region._replace(pieces=tuple(Piece(((0, 1),), piece.offset, (1,)) for piece in region.pieces))


def _items(shape: Shape, granule: int) -> Shape:
    """A shape whose last dim counts items of `granule` elements each, the fewest that fill whole bytes."""
    if not all(shape):
        return (*shape[:-1], -(-shape[-1] // granule))
    assert shape[-1] % granule == 0, f"{shape} does not end on a byte"
    return (*shape[:-1], shape[-1] // granule)


def _flat(region: Region, shape: Shape, groups: Sequence[tuple[int, int]]) -> Flat:
    bits = DTYPE_BITS[region.dtype]
    granule = 8 // gcd(8, bits)  # elements that fill whole bytes
    pieces = []
    for box, offset, strides in region.pieces:
        merged = merge_box(box, shape, groups)
        steps = [strides[last] for _, last in groups]
        if granule > 1 and all(stop > start for start, stop in merged):
            (start, stop), outer = merged[-1], steps[:-1]
            inside = [start, stop, offset, *(s for s, (a, b) in zip(outer, merged, strict=False) if b - a > 1)]
            assert steps[-1] == 1 and not any(each % granule for each in inside), f"{region} is cut inside a byte"
        box = (*merged[:-1], (merged[-1][0] // granule, merged[-1][1] // granule))
        pieces.append(Piece(box, offset // granule, (*(each // granule for each in steps[:-1]), steps[-1])))
    if len(groups) == 1:
        pieces = [Piece(((0, 1), *box), offset, (0, *steps)) for box, offset, steps in pieces]
    order = _order(pieces)
    if order is not None:
        pieces = [
            Piece(_permuted((*box, (0, 1)), order), offset, _permuted((*steps, 1), order))
            for box, offset, steps in pieces
        ]
    return Flat(region.file, region.begin, region.end, granule * bits // 8, tuple(pieces), order)


def _order(pieces: Sequence[Piece]) -> tuple[int, ...] | None:
    """In which order the dims lie in the file, with one more of size 1; None when that is their own order.

    The last one's elements follow each other, and so do those of the last dim of pieces in their own order.
    """
    filled = [piece for piece in pieces if all(start < stop for start, stop in piece.box)]
    if not filled:
        return None
    strides = filled[0].strides
    assert all(piece.strides == strides for piece in filled), "pieces of one region lie in different orders"
    ndim = len(strides)
    long = [dim for dim in range(ndim) if any(b.box[dim][1] - b.box[dim][0] > 1 for b in filled)]
    stored = sorted(long, key=lambda dim: -strides[dim])
    if stored == long and (strides[-1] == 1 or ndim - 1 not in long):
        return None
    short = [dim for dim in range(ndim) if dim not in long]
    return (ndim, *short, *stored) if strides[stored[-1]] == 1 else (*short, *stored, ndim)


_T = TypeVar("_T")


def _permuted(values: tuple[_T, ...], order: Sequence[int]) -> tuple[_T, ...]:
    return tuple(values[dim] for dim in order)


def operations(
    flat: Flat, block: Box, buffer: memoryview, *, reading: bool = False
) -> Iterator[tuple[int, list[memoryview]]]:
    """A region's share of a block: the file offset of each contiguous run, and the slices of memory that hold it.

    The slices are of the buffer, or of a second one in the order of the file. reading: the caller fills the slices, and
    the buffer has the bytes when the iterator is exhausted; else it takes the bytes from them.
    """
    if flat.order is None:
        yield from _operations(flat, block, buffer)
        return
    ordered = _permuted((*block, (0, 1)), flat.order)
    strides = _permuted(row_major(extents((*block, (0, 1)))), flat.order)
    for piece in flat.pieces:
        share = intersect(piece.box, ordered)
        if share is None:
            continue
        shape = extents(share)
        stored = memoryview(bytearray(prod(shape) * flat.item))
        first = sum((a - b) * s for (a, _), (b, _), s in zip(share, ordered, strides, strict=True))
        here = _view(buffer, first, shape, strides, flat.item)
        there = _view(stored, 0, shape, row_major(shape), flat.item)
        if not reading:
            there[...] = here
        yield from _stored_runs(flat, piece, share, stored)
        if reading:
            here[...] = there


def _stored_runs(flat: Flat, piece: Piece, share: Box, stored: memoryview) -> Iterator[tuple[int, list[memoryview]]]:
    """The runs of the file's bytes that hold a share of a piece; `stored` has it row-major."""
    shape, run, dim = extents(share), 1, len(share)
    while dim and (shape[dim - 1] == 1 or piece.strides[dim - 1] == run):
        dim -= 1
        run *= shape[dim]
    first = piece.offset + sum((a - b) * s for (a, _), (b, _), s in zip(share, piece.box, piece.strides, strict=True))
    length = run * flat.item
    for number, at in enumerate(_offsets(first, shape[:dim], piece.strides[:dim])):
        yield flat.begin + at * flat.item, [stored[number * length : (number + 1) * length]]


def _offsets(first: int, shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Where the elements of a box lie, the last dim fastest."""
    found = [first]
    for size, stride in zip(shape, strides, strict=True):
        found = [at + i * stride for at in found for i in range(size)]
    return found


def _view(memory: memoryview, first: int, shape: Shape, strides: Sequence[int], item: int) -> Any:
    """A box in memory as an array of items of `item` bytes; its first item and strides count items."""
    import numpy  # its import takes a tenth of a second, and most splits turn nothing

    return numpy.ndarray(shape, f"V{item}", memory, first * item, [stride * item for stride in strides])


def _operations(flat: Flat, block: Box, buffer: memoryview) -> Iterator[tuple[int, list[memoryview]]]:
    item = flat.item
    (top_row, bottom_row), (left_column, right_column) = block[-2:]
    rows, width = bottom_row - top_row, right_column - left_column
    for outer in product(*(range(start, stop) for start, stop in block[:-2])):
        base = 0  # the first row of the buffer with this outer index
        for index, (start, stop) in zip(outer, block[:-2], strict=True):
            base = base * (stop - start) + index - start
        base *= rows
        spans = []
        for box, at, strides in flat.pieces:
            (first, last), (near, far) = box[-2:]
            top, bottom = max(first, top_row), min(last, bottom_row)
            left, right = max(near, left_column), min(far, right_column)
            if top >= bottom or left >= right:
                continue
            if any(not start <= i < stop for i, (start, stop) in zip(outer, box, strict=False)):
                continue
            for index, (start, _), stride in zip(outer, box, strides, strict=False):
                at += (index - start) * stride
            spans.append(
                _Span(
                    at=(at + (top - first) * strides[-2] + left - near) * item,
                    stride=strides[-2] * item,
                    rows=bottom - top,
                    start=((base + top - top_row) * width + left - left_column) * item,
                    length=(right - left) * item,
                )
            )
        if spans:
            yield from _runs(flat.begin, sorted(spans), width * item, buffer)


class _Span(NamedTuple):
    """Equal parts of some rows: where the first is stored and what lies between two; the same in the buffer. Bytes."""

    at: int
    stride: int
    rows: int
    start: int
    length: int


def _runs(
    begin: int, spans: list[_Span], buffer_stride: int, buffer: memoryview
) -> Iterator[tuple[int, list[memoryview]]]:
    """Runs of spans in stored order; the spans of one row that follow each other make one run, and whole rows do."""
    at, stride, rows, start, length = spans[0]
    together = all(span.stride == stride and span.rows == rows for span in spans)
    adjacent = all(a.at + a.length == b.at for a, b in zip(spans, spans[1:], strict=False))
    if together and adjacent and (rows == 1 or sum(span.length for span in spans) == stride):
        if len(spans) == 1:
            if length == buffer_stride:  # the buffer's rows are whole too
                yield begin + at, [buffer[start : start + rows * length]]
            else:
                stop = start + rows * buffer_stride
                yield begin + at, [buffer[i : i + length] for i in range(start, stop, buffer_stride)]
            return
        pattern = [(span.start, span.start + span.length) for span in spans]
        yield (
            begin + at,
            [buffer[i + a : i + b] for i in range(0, rows * buffer_stride, buffer_stride) for a, b in pattern],
        )
        return
    for span in spans:
        if len(spans) > 1 and (span.rows == 1 or span.length == span.stride):
            yield from _runs(begin, [span], buffer_stride, buffer)
            continue
        for i in range(span.rows):
            first = span.start + i * buffer_stride
            yield begin + span.at + i * span.stride, [buffer[first : first + span.length]]
