"""Boxes: n-dimensional half-open ranges of a tensor, and their coarsest form in bytes."""

from collections.abc import Iterable, Sequence
from math import prod

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
"""One `(start, stop)` per dim, half open; `()` is the box of a scalar."""


def full(shape: Shape) -> Box:
    """The box that covers a tensor of `shape`."""
    return tuple((0, size) for size in shape)


def slab(shape: Shape, dim: int, start: int, stop: int) -> Box:
    """The box of a tensor of `shape` that is whole but along one dim."""
    return (*full(shape[:dim]), (start, stop), *full(shape[dim + 1 :]))


def extents(box: Box) -> Shape:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """The number of elements in a box."""
    return prod(stop - start for start, stop in box)


def corner(box: Box) -> Shape:
    """The first index of a box along each dim."""
    return tuple(start for start, _ in box)


def intersect(a: Box, b: Box) -> Box | None:
    """The box common to `a` and `b`, or None when they share no element."""
    common = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return None if any(start >= stop for start, stop in common) else common


def tiles(container: Box, boxes: Sequence[Box]) -> bool:
    """Whether `boxes` cover `container` exactly: every element once, none outside.

    Boxes without elements are ignored.
    """
    boxes = [box for box in boxes if volume(box)]
    if any(intersect(container, box) != box for box in boxes):
        return False
    return sum(map(volume, boxes)) == volume(container) and not _any_overlap(boxes)


def _any_overlap(boxes: Sequence[Box]) -> bool:
    """Whether two of `boxes` share an element: a sweep along the dim on which most of them differ."""
    if len(boxes) < 2 or not boxes[0]:
        return len(boxes) > 1
    dim = max(range(len(boxes[0])), key=lambda d: len({box[d] for box in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda b: b[dim]):
        active = [other for other in active if other[dim][1] > box[dim][0]]
        if any(intersect(other, box) for other in active):
            return True
        active.append(box)
    return False


def mergeable(shape: Shape, pieces: Iterable[tuple[Box, Sequence[int]]]) -> list[tuple[int, int]]:
    """Group adjacent dims that no piece tells apart: `[first, last]` dims of each group.

    A piece is a box of the logical tensor and the strides of its dims where it is stored. Dims d and d + 1 act as one
    dim when every piece is whole along d + 1, and stored so: a column split of `[out, in]` becomes one dim, a row split
    stays two.
    """
    whole = [True] * len(shape)
    for box, strides in pieces:
        for dim, (size, (start, stop)) in enumerate(zip(shape, box, strict=True)):
            if start != 0 or stop != size or (dim and strides[dim - 1] != size * strides[dim]):
                whole[dim] = False
    groups: list[tuple[int, int]] = []
    for dim in range(len(shape)):
        if groups and whole[dim]:
            groups[-1] = (groups[-1][0], dim)
        else:
            groups.append((dim, dim))
    return groups


def merge_shape(shape: Shape, groups: Sequence[tuple[int, int]]) -> Shape:
    """`shape` with each group of dims as one dim."""
    return tuple(prod(shape[first : last + 1]) for first, last in groups)


def merge_box(box: Box, shape: Shape, groups: Sequence[tuple[int, int]]) -> Box:
    """`box` of a tensor of `shape`, with each group of dims (of which only the first may be cut) as one dim."""
    merged = []
    for first, last in groups:
        inner = prod(shape[first + 1 : last + 1])
        start, stop = box[first]
        merged.append((start * inner, stop * inner))
    return tuple(merged)
