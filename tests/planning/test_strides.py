"""Views against NumPy: a piece's affine map finds the elements that a reshape, a transposition and a slice give."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpshard.planning.box import Box, Shape, full, tiles
from tpshard.planning.layout import Part, StoredTensor
from tpshard.planning.strides import Piece, common_view, fine_box, pieces_of, placed_box, row_major

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def elements(shape: Shape, box: Box) -> set[int]:
    """The row-major numbers of a box's elements."""
    return set(np.arange(prod(shape)).reshape(shape)[tuple(slice(*side) for side in box)].ravel().tolist())


def mapped(piece: Piece, fine: Shape) -> dict[int, int]:
    """Logical element number → stored element number, by the definition of a piece."""
    numbers = np.arange(prod(fine)).reshape(fine)
    found = {}
    for index in product(*(range(start, stop) for start, stop in piece.box)):
        steps = zip(index, piece.box, piece.strides, strict=True)
        found[int(numbers[index])] = piece.offset + sum((i - start) * stride for i, (start, _), stride in steps)
    return found


@given(shapes, st.data())
def test_a_finer_view_tells_apart_what_each_of_the_others_does(shape: Shape, data: st.DataObject) -> None:
    merged = data.draw(st.integers(0, len(shape) - 1))
    coarse = (*shape[:merged], prod(shape[merged:]))
    unit = (1, *shape)
    fine = common_view(coarse, [None, shape, unit])
    assert prod(fine) == prod(shape)
    if common_view(coarse, [None]) != fine:
        assert 1 not in fine
    sides = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in coarse]
    box = tuple((a, b) for a, b in sides)
    held = [number for each in fine_box(box, coarse, fine) for number in elements(fine, each)]
    assert sorted(held) == sorted(elements(coarse, box))


@pytest.mark.parametrize("order", [None, (1, 0, 2), (2, 1, 0)])
@given(st.tuples(*[st.integers(1, 3)] * 3), st.data())
def test_a_piece_is_the_slice_transposed(order: tuple[int, ...] | None, view: Shape, data: st.DataObject) -> None:
    """The logical tensor is a matrix whose rows are seen as two dims; the part lies somewhere in a larger tensor."""
    shape = (view[0] * view[1], view[2])
    sides = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in view]
    box = tuple((a, b) for a, b in sides)
    sizes = [box[dim][1] - box[dim][0] for dim in order or range(3)]
    at = tuple(data.draw(st.integers(0, 2)) for _ in range(3))
    stored = StoredTensor("s", "F32", tuple(a + size + 1 for a, size in zip(at, sizes, strict=True)), ())
    part = Part("t", box, at, view, order)
    fine = common_view(shape, [view])
    found: dict[int, int] = {}
    for piece in pieces_of(stored.view or stored.shape, *part[1:], shape, fine):
        found |= mapped(piece, fine)
    logical = np.arange(prod(shape)).reshape(view)[tuple(slice(*side) for side in box)]
    here = np.arange(prod(stored.shape)).reshape(stored.shape)[
        tuple(slice(*side) for side in placed_box(part.box, part.at, part.order))
    ]
    expected = logical.transpose(order) if order else logical
    assert found == dict(zip(expected.ravel().tolist(), here.ravel().tolist(), strict=True))


def test_a_view_of_the_stored_tensor_has_its_own_strides() -> None:
    """Rotary order: within a head of 4, rows 0 1 2 3 are stored as 0 2 1 3."""
    stored = StoredTensor("wq", "F32", (8, 3), (), view=(2, 2, 2, 3))
    part = Part("q", full((2, 2, 2, 3)), (0, 0, 0, 0), (2, 2, 2, 3), (0, 2, 1, 3))
    (piece,) = pieces_of(stored.view, *part[1:], (8, 3), common_view((8, 3), [part.view]))
    rows = np.arange(24).reshape(8, 3)
    expected = rows.reshape(2, 2, 2, 3).transpose(0, 2, 1, 3).reshape(8, 3)
    order = mapped(piece, (2, 2, 2, 3))
    assert [order[int(n)] for n in expected.ravel()] == list(range(24))


def test_a_range_that_cuts_inner_dims_becomes_several_boxes() -> None:
    boxes = fine_box(((3, 17),), (24,), (2, 3, 4))
    assert tiles(full((1, 14)), [((0, 1), (a - 3, b - 3)) for a, b in _spans(boxes)])


def _spans(boxes: tuple[Box, ...]) -> list[tuple[int, int]]:
    numbers = np.arange(24).reshape(2, 3, 4)
    spans = []
    for box in boxes:
        held = sorted(numbers[tuple(slice(*side) for side in box)].ravel().tolist())
        assert held == list(range(held[0], held[-1] + 1))
        spans.append((held[0], held[-1] + 1))
    return spans


def test_views_that_cannot_be_told_together() -> None:
    with pytest.raises(AssertionError, match="cannot be told together"):
        common_view((6,), [(2, 3), (3, 2)])


def test_row_major() -> None:
    for shape in [(), (5,), (2, 3, 4), (1, 1), (0, 3)]:
        array = np.zeros(shape, dtype=np.uint8)
        if array.size:
            assert row_major(shape) == array.strides
