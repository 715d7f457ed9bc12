"""A box of a stored tensor as a stored tensor of its own, and several such behind one another."""

from collections.abc import Mapping, Sequence

from tpshard.planning.box import Box, Shape, corner, extents, intersect
from tpshard.planning.layout import Part, StoredTensor
from tpshard.planning.strides import placed_box


def window(stored: StoredTensor, box: Box) -> StoredTensor:
    """What lies in a box of a stored tensor, under its name."""
    assert stored.view is None
    at = corner(box)
    parts = []
    for part in stored.parts:
        place = placed_box(part.box, part.at, part.order)
        if (common := intersect(place, box)) is None:
            continue
        inner = list(part.box)
        for dim, ((start, stop), (first, _)) in enumerate(zip(common, place, strict=True)):
            source = part.order[dim] if part.order else dim
            begin = part.box[source][0] + start - first
            inner[source] = (begin, begin + stop - start)
        parts.append(part._replace(box=tuple(inner), at=_less(corner(common), at)))
    fills = []
    for fill in stored.fills:
        if (common := intersect(fill, box)) is not None:
            fills.append(tuple((start - a, stop - a) for (start, stop), a in zip(common, at, strict=True)))
    return stored._replace(shape=extents(box), parts=tuple(parts), fills=tuple(fills))


def stack(name: str, held: Sequence[StoredTensor], shapes: Mapping[str, Shape]) -> StoredTensor:
    """Tensors of one shape along a new first dim. shapes: of the logical tensors, by name."""
    parts: list[Part] = []
    fills: list[Box] = []
    for index, each in enumerate(held):
        for part in each.parts:
            view = (1, *(part.view or shapes[part.tensor]))
            order = None if part.order is None else (0, *(dim + 1 for dim in part.order))
            parts.append(Part(part.tensor, ((0, 1), *part.box), (index, *part.at), view, order))
        fills += [((index, index + 1), *fill) for fill in each.fills]
    return StoredTensor(name, held[0].dtype, (len(held), *held[0].shape), tuple(parts), tuple(fills))


def _less(one: Shape, other: Shape) -> Shape:
    return tuple(a - b for a, b in zip(one, other, strict=True))


def behind(held: Sequence[StoredTensor], dim: int) -> StoredTensor:
    """Tensors one behind another along a dim, under the name of the first."""
    parts: list[Part] = []
    fills: list[Box] = []
    begin = 0
    for each in held:
        before = tuple(begin if place == dim else 0 for place in range(len(each.shape)))
        parts += [part._replace(at=tuple(a + b for a, b in zip(part.at, before, strict=True))) for part in each.parts]
        fills += [tuple((a + at, b + at) for (a, b), at in zip(fill, before, strict=True)) for fill in each.fills]
        begin += each.shape[dim]
    shape = held[0].shape
    return held[0]._replace(shape=(*shape[:dim], begin, *shape[dim + 1 :]), parts=tuple(parts), fills=tuple(fills))
