"""Experts of which each rank has some: whole, or cut for the ranks that share them.

Which experts a rank has follows from the shapes that the ranks store: ranks in a row share experts until their features
are all there are, and the ranks behind them have the experts that follow.
"""

from collections.abc import Sequence

Shapes = Sequence[tuple[int, ...]]


def cut_dim(shapes: Shapes, full: tuple[int, ...]) -> int:
    """The dim of a stack along which experts are cut for the ranks that share them; 0 where none is."""
    return max((dim for shape in shapes for dim in range(1, len(full)) if shape[dim] != full[dim]), default=0)


def firsts(shapes: Shapes, full: tuple[int, ...]) -> list[int] | None:
    """Each rank's first expert, by what ranks have of a matrix of each; None where these shapes are no deal."""
    dim = cut_dim(shapes, full)
    found, expert, feature, count = list[int](), 0, 0, 0
    for shape in shapes:
        if feature == 0:
            count = shape[0]
        if not count or shape[0] != count:
            return None
        found.append(expert)
        feature += shape[dim] if dim else 1
        if feature == (full[dim] if dim else 1):
            expert, feature = expert + count, 0
    return found if (expert, feature) == (full[0], 0) else None


def sharing(first_experts: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """By first expert, the ranks that have those experts together."""
    found: dict[int, tuple[int, ...]] = {}
    for rank, first in enumerate(first_experts):
        found[first] = (*found.get(first, ()), rank)
    return found


def starts(shapes: Shapes, full: tuple[int, ...], first_experts: Sequence[int]) -> list[int] | None:
    """Where each rank's share of its experts begins along the dim that is cut; None where shares do not add up."""
    dim, found = cut_dim(shapes, full), [0] * len(shapes)
    for ranks in sharing(first_experts).values():
        feature = 0
        for rank in ranks:
            found[rank] = feature
            feature += shapes[rank][dim] if dim else 0
        if len({shapes[rank][0] for rank in ranks}) > 1 or feature != (full[dim] if dim else 0):
            return None
    held = [shapes[ranks[0]][0] for ranks in sharing(first_experts).values()]
    return found if sum(held) == full[0] else None
