"""Lowering against NumPy: blocks tile the tensor, and operations move each of its elements to its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.toys import BITS, Bits, bits_of, of_bits, random_tensor
from tpshard.execute import blocks as lower
from tpshard.execute.blocks import FlatStep, flatten, operations
from tpshard.planning.box import Box, Shape, extents, full, tiles, volume
from tpshard.planning.join import Fill, Region, Transfer
from tpshard.planning.strides import Piece

Files = dict[str, bytearray]
GAP = 0xA5


@dataclass(frozen=True)
class Held:
    """A region, and what it was made from: the stored tensor's shape, and where in it each box lies.

    order: dim d of the stored tensor is dim order[d] of the boxes.
    """

    region: Region
    shape: Shape
    places: tuple[tuple[Box, Shape], ...]
    order: tuple[int, ...]

    def where(self, box: Box, at: Shape) -> tuple[slice, ...]:
        sizes = [extents(box)[dim] for dim in self.order]
        return tuple(slice(a, a + size) for a, size in zip(at, sizes, strict=True))


def held(
    file: str, begin: int, dtype: str, shape: Shape, places: Sequence[tuple[Box, Shape]], order: Sequence[int] = ()
) -> Held:
    order = tuple(order or range(len(shape)))
    steps = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    strides = tuple(steps[order.index(dim)] for dim in range(len(shape)))
    pieces = tuple(Piece(box, sum(a * s for a, s in zip(at, steps, strict=True)), strides) for box, at in places)
    end = begin + prod(shape) * BITS[dtype] // 8
    return Held(Region(file, begin, end, dtype, pieces), shape, tuple(places), order)


def region_of(
    boxes: Sequence[Box], file: str, dtype: str, begin: int, gap: int, granule: int = 1, order: Sequence[int] = ()
) -> Held:
    """A stored tensor that holds boxes below one another, each shifted by `gap`, with room left over around them."""
    dims = len(boxes[0])
    order = order or range(dims)
    sizes = [tuple(extents(box)[dim] for dim in order) for box in boxes]
    places = []
    top = gap
    for box, size in zip(boxes, sizes, strict=True):
        places.append((box, (top, *(gap * (granule if d == dims - 1 else 1) for d in range(1, dims)))))
        top += size[0] + gap
    widest = [max(size[d] for size in sizes) for d in range(dims)]
    shape = (top, *(widest[d] + 2 * gap * (granule if d == dims - 1 else 1) for d in range(1, dims)))
    if dims == 1:
        shape = (-(-top // granule) * granule,)
    return held(file, begin, dtype, shape, places, order)


def put(files: Files, side: Held, logical: Bits) -> None:
    """Write the region's boxes of a logical array into its file, all else a pattern."""
    region = side.region
    stored = np.full((*side.shape, BITS[region.dtype]), 1, dtype=np.uint8)
    for box, at in side.places:
        values = logical[tuple(slice(*s) for s in box)]
        stored[side.where(box, at)] = values.transpose(*side.order, len(side.order))
    files[region.file] = bytearray([GAP] * region.begin) + of_bits(region.dtype, stored).data


def get(files: Files, side: Held) -> tuple[list[Bits], bytes]:
    """The region's boxes as its file has them, and everything else in the file with those boxes cleared."""
    region = side.region
    raw = files[region.file]
    flat = np.unpackbits(np.frombuffer(bytes(raw[region.begin :]), dtype=np.uint8), bitorder="little")
    stored = flat.reshape(*side.shape, BITS[region.dtype]).copy()
    found = []
    for box, at in side.places:
        here = side.where(box, at)
        back = [side.order.index(dim) for dim in range(len(side.order))]
        found.append(stored[here].transpose(*back, len(back)).copy())
        stored[here] = 0
    return found, bytes(raw[: region.begin]) + of_bits(region.dtype, stored).data


def move(step: FlatStep, files: Files) -> list[int]:
    """Take every block from the sources to the targets; the number of operations of each block."""
    counts = []
    for block in step.blocks():
        item = (*step.sources, *step.targets)[0].item
        buffer = memoryview(bytearray(volume(block) * item))
        count = 0
        for flat in step.sources:
            for offset, parts in operations(flat, block, buffer, reading=True):
                count += 1
                for part in parts:
                    part[:] = files[flat.file][offset : offset + len(part)]
                    offset += len(part)
        for flat in step.targets:
            for offset, parts in operations(flat, block, buffer):
                count += 1
                for part in parts:
                    files[flat.file][offset : offset + len(part)] = part
                    offset += len(part)
        counts.append(count)
    return counts


@st.composite
def cut_up(draw: st.DrawFn, shape: Shape, granule: int) -> list[list[Box]]:
    """The whole shape in boxes, dealt to a few stored tensors; the last dim is cut at multiples of `granule`."""
    pieces = [full(shape)]
    for _ in range(draw(st.integers(0, 4))):
        piece = pieces.pop(draw(st.integers(0, len(pieces) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        step = granule if dim == len(shape) - 1 else 1
        start, stop = piece[dim]
        at = start + step * draw(st.integers(0, (stop - start) // step))
        pieces += [(*piece[:dim], side, *piece[dim + 1 :]) for side in ((start, at), (at, stop)) if side[0] < side[1]]
    owners = [draw(st.integers(0, 2)) for _ in pieces]
    return [dealt for owner in range(3) if (dealt := [p for p, o in zip(pieces, owners, strict=True) if o == owner])]


@given(st.data(), st.sampled_from(sorted(BITS)), st.sampled_from([1, 3, 8, 20, 64, 1 << 20]))
def test_every_element_arrives_whatever_the_boxes(data: st.DataObject, dtype: str, block: int) -> None:
    granule = 8 // gcd(8, BITS[dtype])
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))
    shape = (*shape[:-1], shape[-1] * granule)
    logical = bits_of(random_tensor(np.random.default_rng(0), dtype, shape))
    files: Files = {}
    sides = []
    for side in ("from", "to"):
        regions = []
        for number, boxes in enumerate(data.draw(cut_up(shape, granule))):
            gap = 0 if len(shape) == 1 and granule > 1 else data.draw(st.integers(0, 2))
            dims = list(range(len(shape)))
            order = data.draw(st.permutations(dims[: -1 if granule > 1 else None])) + dims[-1 if granule > 1 else 99 :]
            begin = data.draw(st.integers(0, 9))
            region = region_of(boxes, f"{side}{number}", dtype, begin, gap, granule, order)
            put(files, region, logical if side == "from" else 1 - logical)
            regions.append(region)
        sides.append(tuple(regions))
    before = {side.region.file: get(files, side)[1] for side in sides[1]}
    step = flatten(Transfer("t", shape, tuple(s.region for s in sides[0]), (), tuple(s.region for s in sides[1])))
    with patch.multiple(lower, BLOCK=block, TURNED=block):
        assert tiles(full(step.shape), list(step.blocks()))
        assert all(volume(b) * step.sources[0].item <= max(block, step.sources[0].item) for b in step.blocks())
        move(step, files)
    for target in sides[1]:
        found, around = get(files, target)
        assert around == before[target.region.file]
        for (box, _), values in zip(target.places, found, strict=True):
            assert np.array_equal(values, logical[tuple(slice(*s) for s in box)])


def transfer(shape: Shape, targets: Sequence[tuple[Box, Shape]], dtype: str = "BF16") -> FlatStep:
    """One whole source, and a target file for each `(box, stored shape)`."""
    source = held("source", 100, dtype, shape, [(full(shape), (0,) * len(shape))]).region
    wanted = [
        held(f"rank{rank}", 100, dtype, stored, [(box, (0,) * len(shape))]).region
        for rank, (box, stored) in enumerate(targets)
    ]
    return flatten(Transfer("t", shape, (source,), (), tuple(wanted)))


def test_a_column_split_is_one_dim_and_few_operations() -> None:
    step = transfer((64, 8), [(((i, i + 16), (0, 8)), (16, 8)) for i in range(0, 64, 16)])
    assert (step.shape, {extents(flat.pieces[0].box) for flat in step.targets}) == ((1, 512), {(1, 128)})
    block, buffer = ((0, 1), (0, 512)), memoryview(bytearray(1024))
    for flat, size in [(step.sources[0], 1024), *((flat, 256) for flat in step.targets)]:
        ((offset, parts),) = operations(flat, block, buffer)
        assert (offset, [len(part) for part in parts]) == (100, [size])


def test_a_row_split_is_one_operation_of_many_slices_a_rank() -> None:
    step = transfer((64, 8), [(((0, 64), (i, i + 2)), (64, 2)) for i in range(0, 8, 2)])
    assert step.shape == (64, 8)
    buffer = memoryview(bytearray(1024))
    block = ((0, 64), (0, 8))
    assert [len(parts) for _, parts in operations(step.sources[0], block, buffer)] == [1]
    for flat in step.targets:
        ((offset, parts),) = operations(flat, block, buffer)
        assert (offset, len(parts), {len(part) for part in parts}) == (100, 64, {4})


def test_fused_segments_of_whole_rows_are_one_operation() -> None:
    """[q; k; v] of one rank along the last dim: three pieces side by side fill the rank's rows."""
    shape, stored = (10, 12), (10, 6)
    pieces = tuple(((((0, 10), (a, a + 2))), (0, at)) for a, at in ((0, 0), (4, 2), (8, 4)))
    source = held("source", 0, "F32", shape, [(full(shape), (0, 0))]).region
    step = flatten(Transfer("t", shape, (source,), (), (held("rank", 8, "F32", stored, pieces).region,)))
    ((offset, parts),) = operations(step.targets[0], ((0, 10), (0, 12)), memoryview(bytearray(480)))
    assert (offset, len(parts), sum(map(len, parts))) == (8, 30, 240)


@pytest.mark.parametrize(
    ("shape", "block", "count"),
    [((4, 6), 1 << 20, 1), ((4, 6), 12, 4), ((4, 6), 24, 2), ((4, 6), 4, 12), ((4, 6), 2, 24), ((4, 6), 1, 24)],
)
def test_blocks_are_as_large_as_allowed(shape: Shape, block: int, count: int) -> None:
    step = transfer(shape, [(((0, 4), (0, 3)), (4, 3)), (((0, 4), (3, 6)), (4, 3))])
    with patch.object(lower, "BLOCK", block):
        blocks = list(step.blocks())
    assert len(blocks) == count
    assert tiles(full(step.shape), blocks)


def test_blocks_take_turns_between_the_halves() -> None:
    step = transfer((8, 4), [(((0, 4), (0, 4)), (4, 4)), (((4, 8), (0, 4)), (4, 4))])
    with patch.object(lower, "BLOCK", 8):
        assert [block[1][0] // 4 for block in step.blocks()] == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_fill_writes_its_boxes_and_nothing_else() -> None:
    region = held("rank", 3, "F16", (5, 4), [(((0, 2), (0, 4)), (3, 0))]).region
    files = {"rank": bytearray(b"\xff" * (3 + 40))}
    step = flatten(Fill("embed", region))
    assert (step.sources, step.source_dtype, step.target_dtype) == ((), None, "F16")
    with patch.object(lower, "BLOCK", 6):
        assert len(move(step, files)) == 3  # what is not filled is not looked at
    assert files["rank"] == b"\xff" * (3 + 24) + b"\0" * 16


def test_a_fill_may_hold_another_constant_than_zero() -> None:
    region = held("rank", 0, "F32", (2, 3), [(((0, 2), (0, 3)), (0, 0))]).region
    one = np.ones(1, dtype="<f4").tobytes()
    assert flatten(Fill("scale", region, one)).value == one
    assert flatten(Fill("scale", region)).value == b""


def test_a_transposed_target_is_written_in_runs_of_its_own_rows() -> None:
    """[in, out] to [out, in]: one operation a block, of the rows of the target that it meets."""
    source = held("source", 0, "BF16", (6, 4), [(full((6, 4)), (0, 0))]).region
    target = held("rank", 0, "BF16", (4, 6), [(full((6, 4)), (0, 0))], (1, 0)).region
    step = flatten(Transfer("t", (6, 4), (source,), (), (target,)))
    assert step.targets[0].order == (2, 1, 0) and step.sources[0].order is None
    buffer = memoryview(bytearray(range(48)))
    ((offset, parts),) = operations(step.targets[0], ((0, 6), (0, 4)), buffer)
    transposed = np.arange(48, dtype=np.uint8).view("<u2").reshape(6, 4).T
    assert (offset, b"".join(parts)) == (0, transposed.tobytes())


@pytest.mark.parametrize("shape", [(), (1,), (7,)])
def test_a_scalar_and_a_vector_move_too(shape: Shape) -> None:
    step = transfer(shape, [(full(shape), shape)] * 2, "F32")
    data = bytes(range(4 * prod(shape)))
    files = {"source": bytearray(100) + data, "rank0": bytearray(100 + len(data)), "rank1": bytearray(100 + len(data))}
    move(step, files)
    assert files["rank0"] == files["rank1"] == files["source"]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("dtype", ["F4", "F32"])
def test_a_tensor_without_elements_has_no_blocks(shape: Shape, dtype: str) -> None:
    assert list(transfer(shape, [(full(shape), shape)], dtype).blocks()) == []
    half = ((0, 2), (0, 0), (0, 4))
    assert list(transfer((4, 0, 4), [(half, (2, 0, 4)), (((2, 4), *half[1:]), (2, 0, 4))], dtype).blocks()) == []


def test_an_item_is_the_fewest_elements_that_fill_bytes() -> None:
    for dtype, item in (("F4", 1), ("F6_E2M3", 3), ("U8", 1), ("BF16", 2), ("C64", 8)):
        step = transfer((8, 8), [(((0, 8), (i, i + 4)), (8, 4)) for i in (0, 4)], dtype)
        assert step.sources[0].item == item
        assert prod(step.shape) * item * 8 == 64 * BITS[dtype]


def test_a_turned_tensor_is_moved_in_blocks_that_are_long_on_both_sides() -> None:
    """Runs of whole rows of the target, and as few as there can be: a block ends where a rank's share does."""
    shape = (96, 40)  # [in, out] to three ranks of [out, in / 3]
    source = held("source", 0, "BF16", shape, [(full(shape), (0, 0))]).region
    ranks = [
        held(f"rank{r}", 0, "BF16", (40, 32), [(((32 * r, 32 * r + 32), (0, 40)), (0, 0))], (1, 0)).region
        for r in range(3)
    ]
    step = flatten(Transfer("t", shape, (source,), (), tuple(ranks)))
    with patch.object(lower, "TURNED", 2 * 50 * 40):  # one rank's rows and a half
        blocks = list(step.blocks())
    assert tiles(full(shape), blocks) and {extents(block) for block in blocks} == {(32, 40)}
    buffer = memoryview(bytearray(2 * 32 * 40))
    runs = [list(operations(flat, block, buffer)) for flat in step.targets for block in blocks]
    assert [len(each) for each in runs if each] == [1, 1, 1]
    with patch.object(lower, "TURNED", 2 * 20 * 20):
        assert {extents(block) for block in step.blocks()} == {(20, 20), (16, 20)}


def test_a_reordered_head_is_one_run() -> None:
    """Meta's rotary order: the pairs of a head lie elsewhere in it, but it is written whole."""
    view = (4, 2, 8, 6)
    source = held("source", 0, "BF16", view, [(full(view), (0, 0, 0, 0))]).region
    target = held("rank", 0, "BF16", (4, 8, 2, 6), [(full(view), (0, 0, 0, 0))], (0, 2, 1, 3)).region
    step = flatten(Transfer("q", view, (source,), (), (target,)))
    buffer = memoryview(bytearray(i % 251 for i in range(2 * prod(view))))
    ((offset, parts),) = operations(step.targets[0], full(step.shape), buffer)
    expected = np.frombuffer(buffer, dtype="<u2").reshape(view).transpose(0, 2, 1, 3)
    assert (offset, b"".join(parts)) == (0, expected.tobytes())
