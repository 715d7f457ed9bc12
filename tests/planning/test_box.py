"""Boxes against NumPy masks: a box is a set of elements, and every function is about such sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tpshard.planning.box import (
    Box,
    Shape,
    corner,
    extents,
    full,
    intersect,
    merge_box,
    merge_shape,
    mergeable,
    tiles,
    volume,
)
from tpshard.planning.strides import row_major

Mask = NDArray[np.bool_]


def mask(shape: Shape, box: Box) -> Mask:
    """The elements of a box in a tensor of `shape`."""
    result = np.zeros(shape, dtype=np.bool_)
    result[tuple(slice(*side) for side in box)] = True
    return result


def boxes_in(shape: Shape) -> st.SearchStrategy[Box]:
    sides = [st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda s: (min(s), max(s))) for n in shape]
    return st.tuples(*sides)


shapes = st.lists(st.integers(1, 4), max_size=4).map(tuple)
spaces = shapes.flatmap(lambda shape: st.tuples(st.just(shape), st.lists(boxes_in(shape), max_size=6)))


@st.composite
def tilings(draw: st.DrawFn) -> tuple[Shape, Box, list[Box]]:
    """All of a shape, or a box inside it, cut in two a few times."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
    container = draw(st.just(full(shape)) | boxes_in(shape))
    pieces = [container]
    for _ in range(draw(st.integers(0, 5))):
        piece = pieces.pop(draw(st.integers(0, len(pieces) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        start, stop = piece[dim]
        at = draw(st.integers(start, stop))
        pieces += [(*piece[:dim], side, *piece[dim + 1 :]) for side in ((start, at), (at, stop))]
    return shape, container, draw(st.permutations(pieces))


def test_the_box_of_a_scalar_has_one_element() -> None:
    assert full(()) == () == extents(())
    assert volume(()) == 1
    assert intersect((), ()) == ()
    assert tiles((), [()])
    assert not tiles((), [])
    assert not tiles((), [(), ()])


def test_a_box_is_half_open() -> None:
    box = ((2, 5), (0, 4))
    assert (corner(box), extents(box), volume(box)) == ((2, 0), (3, 4), 12)
    assert full((3, 2)) == ((0, 3), (0, 2))
    assert intersect(box, ((5, 6), (0, 4))) is None


@given(spaces)
def test_intersect_is_what_both_hold(space: tuple[Shape, list[Box]]) -> None:
    shape, boxes = space
    for a, b in zip(boxes, boxes[1:], strict=False):
        common = intersect(a, b)
        both = mask(shape, a) & mask(shape, b)
        assert (common is None) == (not both.any())
        assert common is None or np.array_equal(mask(shape, common), both)
        assert common is None or volume(common) == both.sum()


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), boxes_in(shape), st.lists(boxes_in(shape), max_size=4))))
def test_tiles_means_each_element_once_and_none_outside(space: tuple[Shape, Box, list[Box]]) -> None:
    shape, container, boxes = space
    held = sum((mask(shape, box).astype(int) for box in boxes), np.zeros(shape, dtype=int))
    assert tiles(container, boxes) == np.array_equal(held, mask(shape, container).astype(int))


@given(tilings(), st.data())
def test_a_cut_up_box_is_tiled_until_a_piece_is_lost_doubled_or_moved(
    case: tuple[Shape, Box, list[Box]], data: st.DataObject
) -> None:
    shape, container, pieces = case
    assert tiles(container, pieces)
    full_pieces = [piece for piece in pieces if volume(piece)]
    if full_pieces:
        piece = data.draw(st.sampled_from(full_pieces))
        others = list(pieces)
        others.remove(piece)
        assert not tiles(container, others)
        assert not tiles(container, [*pieces, piece])
        dim = data.draw(st.integers(0, len(shape) - 1))
        moved = tuple((a + (d == dim), b + (d == dim)) for d, (a, b) in enumerate(piece))
        assert not tiles(container, [*others, moved])


@pytest.mark.parametrize(
    ("stored", "boxes", "groups"),
    [
        ((2, 6), [((0, 2), (0, 6)), ((2, 4), (0, 6))], [(0, 1)]),  # column: rows follow one another
        ((4, 3), [((0, 4), (0, 3)), ((0, 4), (3, 6))], [(0, 0), (1, 1)]),  # row: every row is cut
        ((4, 6), [((0, 4), (0, 6))], [(0, 1)]),  # whole
    ],
)
def test_dims_that_nobody_cuts_are_one(stored: Shape, boxes: list[Box], groups: list[tuple[int, int]]) -> None:
    assert mergeable((4, 6), [(box, row_major(stored)) for box in boxes]) == groups


def test_a_dim_that_is_whole_here_but_wider_where_it_is_stored_stays_a_dim() -> None:
    assert mergeable((4, 6), [(((0, 4), (0, 6)), (12, 1))]) == [(0, 0), (1, 1)]
    assert mergeable((4, 6), [(((0, 4), (0, 6)), (1, 4))]) == [(0, 0), (1, 1)], "transposed"


def test_a_merged_box_counts_in_whole_inner_dims() -> None:
    groups = [(0, 0), (1, 2)]
    assert merge_shape((2, 4, 6), groups) == (2, 24)
    assert merge_box(((0, 1), (1, 3), (0, 6)), (2, 4, 6), groups) == ((0, 1), (6, 18))


@given(tilings())
def test_a_merged_box_holds_the_same_elements(case: tuple[Shape, Box, list[Box]]) -> None:
    shape, _, pieces = case
    groups = mergeable(shape, [(piece, row_major(extents(piece))) for piece in pieces])
    assert [dim for first, last in groups for dim in range(first, last + 1)] == list(range(len(shape)))
    merged = merge_shape(shape, groups)
    for piece in pieces:
        assert np.array_equal(mask(shape, piece).reshape(merged), mask(merged, merge_box(piece, shape, groups)))
