"""Views: a stored tensor as pieces of a logical one, each an affine map from logical indices to stored elements.

A part says where a box lies; a piece says the same as an offset and strides, so that a plain copy, a transposition and
a reordering inside a head are one thing to the executor.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

from tpshard.planning.box import Box, Shape, extents, full


class Piece(NamedTuple):
    """The element of logical index i in `box` is stored element `offset + sum((i - start of box) * strides)`."""

    box: Box
    offset: int
    strides: tuple[int, ...]


def row_major(shape: Shape) -> tuple[int, ...]:
    """The strides of a tensor of `shape`, in elements."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 1, 0, -1):
        strides[dim - 1] = strides[dim] * shape[dim]
    return tuple(strides)


def common_view(shape: Shape, views: Iterable[Shape | None]) -> Shape:
    """The coarsest shape that refines `shape` and all views of it: what each of them tells apart, it does.

    AssertionError when there is none: two views that cut a dim at places of which neither divides the other.
    """
    others = {view for view in views if view is not None and view != shape}
    if not others:
        return shape
    inner = sorted({size for view in (shape, *others) for size in _inner_sizes(view)})
    sizes = []
    for small, large in zip(inner, inner[1:], strict=False):
        assert large % small == 0, f"views {shape} and {others} cannot be told together"
        sizes.append(large // small)
    return tuple(reversed(sizes))


def _inner_sizes(shape: Shape) -> list[int]:
    return [prod(shape[dim:]) for dim in range(len(shape) + 1)]


def pieces_of(
    stored: Shape, box: Box, at: Shape, view: Shape | None, order: tuple[int, ...] | None, shape: Shape, fine: Shape
) -> tuple[Piece, ...]:
    """A part of a stored tensor, seen in the shape `stored`, as pieces over `fine`.

    fine: a refinement of the logical tensor's `shape` and of the part's view.
    """
    view = view or shape
    by_dim = row_major(stored)
    offset = sum(start * stride for start, stride in zip(at, by_dim, strict=True))
    strides = list(by_dim)
    for dim, logical in enumerate(order or ()):
        strides[logical] = by_dim[dim]
    if view == fine:
        return (Piece(box, offset, tuple(strides)),)
    pieces = [Piece((), offset, ())]
    for (start, stop), size, stride, inner in zip(box, view, strides, _inner_shapes(view, fine), strict=True):
        assert prod(inner) == size
        steps = tuple(stride * step for step in row_major(inner))
        pieces = [
            Piece(
                piece.box + ranges,
                piece.offset
                + sum(first * step for (first, _), step in zip(ranges, steps, strict=True))
                - start * stride,
                piece.strides + steps,
            )
            for piece in pieces
            for ranges in _split_range(start, stop, inner)
        ]
    return tuple(pieces)


def fine_box(box: Box, view: Shape, fine: Shape) -> tuple[Box, ...]:
    """Boxes over `fine` that together are a box of `view`."""
    if view == fine:
        return (box,)
    boxes: list[Box] = [()]
    for (start, stop), inner in zip(box, _inner_shapes(view, fine), strict=True):
        boxes = [done + ranges for done in boxes for ranges in _split_range(start, stop, inner)]
    return tuple(boxes)


def _inner_shapes(view: Shape, fine: Shape) -> list[Shape]:
    """For each dim of a view, the dims of the finer shape that make it up; none for a dim of size 1."""
    shapes: list[Shape] = []
    end = len(fine)
    for size in reversed(view):
        begin = end
        while prod(fine[begin:end]) < size:
            begin -= 1
        shapes.append(fine[begin:end])
        end = begin
    return shapes[::-1]


def _split_range(start: int, stop: int, inner: Shape) -> list[Box]:
    """The elements [start, stop) of a dim, as boxes over the dims that make it up."""
    if start == stop:
        return []
    if len(inner) <= 1:
        return [((start, stop),) if inner else ()]
    size = prod(inner[1:])
    rest = full(inner[1:])
    if start % size == stop % size == 0:
        return [((start // size, stop // size), *rest)]
    first, last = start // size, (stop - 1) // size
    if first == last:
        return [((first, first + 1), *deeper) for deeper in _split_range(start % size, stop - first * size, inner[1:])]
    cuts = [start, *(i * size for i in (first + (start % size > 0), last + (stop % size == 0))), stop]
    return [box for a, b in zip(cuts, cuts[1:], strict=False) if a < b for box in _split_range(a, b, inner)]


def placed_box(box: Box, at: Shape, order: tuple[int, ...] | None) -> Box:
    """Where a part lies in its stored tensor, as a box of that tensor's view."""
    sizes: Sequence[int] = extents(box)
    if order is not None:
        sizes = [sizes[dim] for dim in order]
    return tuple((a, a + size) for a, size in zip(at, sizes, strict=True))
