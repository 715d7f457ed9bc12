"""Deals: which units of each axis a rank has. A unit is never cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import gcd, lcm
from typing import TYPE_CHECKING

from tpshard.errors import UnsupportedError, UsageError
from tpshard.planning.axes import Axis
from tpshard.planning.mesh import Mesh

if TYPE_CHECKING:
    from fractions import Fraction


Range = tuple[int, int]
"""A half-open range of units."""


@dataclass(frozen=True)
class Deal:
    """Which units of each axis the ranks of a mesh have.

    axes: as they were dealt; an engine may pad or repeat others than the model's rules do. ranges: of each axis, one
    for each place along the kind of parallelism that the axis is dealt along.
    """

    mesh: Mesh
    axes: Mapping[str, Axis]
    ranges: Mapping[str, tuple[Range, ...]]

    def of(self, axis: str, rank: int) -> Range:
        """A rank's range of units of an axis."""
        return self.ranges[axis][self.mesh.place(rank, self.axes[axis].along)]

    @cached_property
    def ends(self) -> Mapping[str, tuple[int, ...]]:
        """Where the ranges of an axis begin and end, if any two of them overlap in part; else nothing.

        That is of units that are repeated: what is of experts may be dealt otherwise to each of their places.
        """
        return {name: _ends(ranges) if self.axes[name].replicate else () for name, ranges in self.ranges.items()}


def deal(
    axes: Mapping[str, Axis], mesh: Mesh, shares: Sequence[Fraction | int] | None = None, pad_to: int | None = None
) -> Deal:
    """Give each rank its range of units of each axis.

    shares: relative weights of the ranks, or None for even shares, where a count that does not divide is refused.
    pad_to: size that padded axes grow to (default: the next multiple of tp).
    UnsupportedError names the axis and the values of tp that work.
    """
    if shares is None:
        require_even(axes, mesh, "use one of those, or deal unequal shares with --uneven")
    ranges = {name: _deal_axis(axis, axes, mesh.width(axis.along), shares, pad_to) for name, axis in axes.items()}
    return Deal(mesh, axes, ranges)


def require_even(axes: Mapping[str, Axis], mesh: Mesh, hint: str) -> None:
    """UnsupportedError, with the values of tp that work, for an axis that cannot be dealt evenly."""
    for axis in axes.values():
        if reason := why_not(axis, mesh.width(axis.along)):
            possible = "tp " + listing(possible_tp(axes))
            of = axis.step_of or None
            raise UnsupportedError(reason, tensor=of, expected=possible, found=f"tp {mesh.tp}", hint=hint)


def _deal_axis(
    axis: Axis, axes: Mapping[str, Axis], tp: int, shares: Sequence[Fraction | int] | None, pad_to: int | None
) -> tuple[Range, ...]:
    count = padded(axis, tp, pad_to)
    group = axes[axis.group] if axis.group else None
    if unequally_repeated(axis, tp):
        if group is not None and group.replicate and group.count == count:
            return _deal_axis(group, axes, tp, shares, pad_to)
        return _needed(axis, axes, tp, shares, pad_to)
    if axis.replicate and count < tp:
        return tuple((r * count // tp, r * count // tp + 1) for r in range(tp))  # ranks 0 and 1 hold unit 0
    if axis.rest_last:
        share = _rounded_up(axis, tp) * axis.step
        return tuple((min(r * share, count), min((r + 1) * share, count)) for r in range(tp))
    if shares is None:
        return tuple((r * count // tp, (r + 1) * count // tp) for r in range(tp))
    if group is None or group.count == count or count % group.count or unequally_repeated(group, tp):
        return _ranges(_apportion(axis, count, shares, _common_step(axis, axes)))
    per_group = count // group.count
    if group.count >= tp:
        return tuple((a * per_group, b * per_group) for a, b in _deal_axis(group, axes, tp, shares, pad_to))
    together = tp // group.count  # ranks that share one group divide its units among themselves
    sizes = [
        size
        for g in range(group.count)
        for size in _apportion(axis, per_group, shares[g * together : (g + 1) * together], axis.step)
    ]
    return _ranges(sizes)


def unequally_repeated(axis: Axis, tp: int) -> bool:
    """Whether there are fewer units than ranks, and some are on more ranks than others."""
    return axis.replicate and axis.count < tp and tp % axis.count > 0


def equal_repeats(axis: Axis) -> str:
    """The values of tp at which no unit is on more ranks than another."""
    return f"a tp of at most {axis.count}, or a multiple of it"


def _needed(
    axis: Axis, axes: Mapping[str, Axis], tp: int, shares: Sequence[Fraction | int] | None, pad_to: int | None
) -> tuple[Range, ...]:
    """Of units that cannot be repeated evenly: each rank has those that its units of other axes need (KV for q heads).

    So a unit may lie on several ranks, and a rank may have two of which each neighbour has one.
    """
    dealt_by = [each for each in axes.values() if each.group == axis.name and not each.replicate]
    if not dealt_by or any(each.count % axis.count for each in dealt_by):
        what = f"{axis.count} {axis.name} units cannot be repeated evenly on {tp} ranks"
        raise UnsupportedError(what, expected=equal_repeats(axis), found=f"tp {tp}", hint="use one of those")
    needed: list[Range] = [(axis.count, 0)] * tp
    for each in dealt_by:
        size = each.count // axis.count
        for rank, (first, last) in enumerate(_deal_axis(each, axes, tp, shares, pad_to)):
            low, high = needed[rank]
            needed[rank] = min(low, first // size), max(high, -(-last // size))
    return tuple(needed)


def _ends(ranges: Sequence[Range]) -> tuple[int, ...]:
    apart = sorted(set(ranges))
    if all(one[1] <= other[0] for one, other in pairwise(apart)):
        return ()
    return tuple(sorted({end for each in apart for end in each}))


def _rounded_up(axis: Axis, tp: int) -> int:
    """Steps of an axis for each rank but the last, of those that leave the rest to it."""
    return -(-axis.count // (axis.step * tp))


def _common_step(axis: Axis, axes: Mapping[str, Axis]) -> int:
    """By how many units an axis is dealt unevenly, so that axes of one count, or dealt by one group, stay together."""
    steps = [each.step for each in axes.values() if each.count == axis.count or each.name == axis.name]
    for each in axes.values():
        if each.group == axis.name and each.count % axis.count == 0:
            steps.append(each.step // gcd(each.step, each.count // axis.count))
    return lcm(*steps)


def _apportion(axis: Axis, count: int, shares: Sequence[Fraction | int], step: int) -> list[int]:
    """Divide `count` units by weight: each rank at least one, largest remainder first, then the lower rank.

    They are dealt `step` at a time; what the last step lacks the last rank lacks.
    """
    if step > 1:
        steps = _apportion(replace(axis, step=step), -(-count // step), shares, 1)
        return [*(size * step for size in steps[:-1]), steps[-1] * step - (-count % step)]
    if count < len(shares):
        what = f"{axis} on {len(shares)} ranks: a unit is never cut"
        raise UnsupportedError(what, expected=f"tp of at most {count}", found=f"tp {len(shares)}")
    total = sum(shares)
    ideal = [count * share for share in shares]  # in units of 1 / total, so that it is exact
    sizes = [max(1, int(value // total)) for value in ideal]
    while sum(sizes) < count:
        rank = max(range(len(sizes)), key=lambda r: (ideal[r] - sizes[r] * total, -r))
        sizes[rank] += 1
    while sum(sizes) > count:
        rank = min((r for r in range(len(sizes)) if sizes[r] > 1), key=lambda r: (ideal[r] - sizes[r] * total, r))
        sizes[rank] -= 1
    return sizes


def _ranges(sizes: Sequence[int]) -> tuple[Range, ...]:
    return tuple(pairwise(accumulate(sizes, initial=0)))


def padded(axis: Axis, tp: int, pad_to: int | None) -> int:
    """The axis' count with padding; UsageError when pad_to is too small or does not divide."""
    if not axis.pad:
        return axis.count
    whole = tp * axis.step
    if pad_to is None:
        return axis.count if tp == 1 else -(-axis.count // whole) * whole
    if pad_to < axis.count or pad_to % whole:
        what = f"cannot pad {axis.name} of {axis.count} to {pad_to}"
        hint = f"for example --pad-vocab-to {-(-max(axis.count, pad_to) // whole) * whole}"
        of = f"tp {tp}" + (f" x {axis.step}" if axis.step > 1 else "")
        raise UsageError(what, expected=f"a multiple of {of} that is at least {axis.count}", found=pad_to, hint=hint)
    return pad_to


def why_not(axis: Axis, tp: int) -> str | None:
    """Why an axis cannot be dealt evenly to tp ranks, or None when it can."""
    if axis.pad or tp == 1 or axis.count % (tp * axis.step) == 0:
        return None
    if axis.rest_last:
        share = _rounded_up(axis, tp)
        none_left = share * (tp - 1) * axis.step >= axis.count
        each = f"{share} times {axis.step} on each"
        return f"{axis.count} {axis.name} on {tp} ranks: {each} leave none for the last" if none_left else None
    if axis.step > 1:
        why = f"{axis.step} at a time end where groups or blocks do in {axis.step_of}"
        return (
            f"{axis.count} {axis.name} on {tp} ranks: {why}, and {axis.count} is not a multiple of {tp} x {axis.step}"
        )
    if axis.replicate and tp % axis.count == 0:
        return None
    also = f", and {tp} is not a multiple of {axis.count}" if axis.replicate and tp > axis.count else ""
    return f"{axis.count} {axis.name} on {tp} ranks: {axis.count} is not a multiple of {tp}{also}"


def possible_tp(axes: Mapping[str, Axis]) -> list[int]:
    """Every tp that divides all axes evenly, 1 included."""
    return [tp for tp in range(1, largest_tp(axes) + 1) if all(why_not(axis, tp) is None for axis in axes.values())]


def largest_tp(axes: Mapping[str, Axis]) -> int:
    """No tp above this can work: the smallest count of steps that is neither padded nor repeated."""
    fixed = (axis for axis in axes.values() if not axis.pad and (not axis.replicate or axis.step > 1))
    return min((max(1, axis.count // axis.step) for axis in fixed), default=1)


def listing(values: Sequence[int]) -> str:
    """`1, 2, 3 or 4`."""
    texts = [str(value) for value in values]
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
