"""Which ranks of a mesh hold a tensor: those of its stage, and of an expert those that have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from typing import TYPE_CHECKING

from tpshard.errors import UnsupportedError
from tpshard.planning.axes import Axis, Cut
from tpshard.planning.deal import Deal, Range, deal, listing, why_not
from tpshard.planning.experts import AXIS, Experts
from tpshard.planning.layout import LogicalTensor
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.planning.stages import Stages

if TYPE_CHECKING:
    from fractions import Fraction


@dataclass(frozen=True)
class Placement:
    """Where the tensors of a model are.

    stages: None where there is one. experts: with the ranges of them that places along ep have; None where they are cut
    like the rest.
    """

    model: Model
    mesh: Mesh
    stages: Stages | None = None
    experts: tuple[Experts, tuple[Range, ...]] | None = None

    def ranks(self, name: str) -> tuple[int, ...]:
        """The ranks that hold a tensor."""
        full_name = self.model.full_name(name)
        stages = self.stages.of(name, full_name) if self.stages else (0,)
        number = self.experts[0].number(full_name) if self.experts else None
        return _ranks(self.mesh, stages, None if self.experts is None else self.experts[1], number)

    @property
    def ranges(self) -> dict[str, list[list[int]]]:
        """The layers of each stage and the experts of each place along ep, as the manifest and reports have them."""
        found = {"stages": self.stages and self.stages.ranges, "expert_ranges": self.experts and self.experts[1]}
        return {key: [list(each) for each in ranges] for key, ranges in found.items() if ranges}

    @cached_property
    def axes(self) -> Mapping[str, Axis]:
        """The axes that are dealt: without those that whole experts alone have."""
        if self.experts is None:
            return self.model.axes
        names = {name for each in self.model.tensors if not self.of_experts(each) for name in _axes_of(each.cut)}
        names |= {group for name in names if (group := self.model.axes[name].group)}
        return {name: axis for name, axis in self.model.axes.items() if name in names}

    def dealt(
        self, tensors: Sequence[LogicalTensor], others: Deal, shares: Sequence[Fraction | int] | None = None
    ) -> tuple[list[LogicalTensor], Deal]:
        """Tensors with the cuts that they have where experts are whole, and the deal with the axes of these.

        others: of the axes that are dealt to all ranks of a stage. shares: as in `deal`. UnsupportedError where ranks
        that share experts cannot cut them evenly.
        """
        if self.experts is None:
            return list(tensors), others
        experts, ranges = self.experts
        cuts = [self._cut(tensor) for tensor in tensors]
        names = {name for cut in dict.fromkeys(cuts) for name in _axes_of(cut)}
        axes = {
            _within(name): replace(axis, name=_within(name))
            for name, axis in self.model.axes.items()
            if _within(name) in names
        }
        within = self._ranges_within(axes, shares)
        axes[AXIS] = Axis(AXIS, experts.count, 1, along="ep")
        with_experts = Deal(others.mesh, {**others.axes, **axes}, {**others.ranges, AXIS: ranges, **within})
        return [replace(tensor, cut=cut) for tensor, cut in zip(tensors, cuts, strict=True)], with_experts

    def of_experts(self, tensor: LogicalTensor) -> bool:
        """Whether a tensor is of an expert, or of all, and experts are whole."""
        if self.experts is None:
            return False
        experts, full_name = self.experts[0], self.model.full_name(tensor.name)
        return experts.number(full_name) is not None or experts.are_stacked(full_name, tensor.shape)

    def _cut(self, tensor: LogicalTensor) -> Cut:
        """A tensor's cut, where experts are whole if they are."""
        if self.experts is None or not self.of_experts(tensor):
            return tensor.cut
        alone = self.experts[0].number(self.model.full_name(tensor.name)) is not None
        return _cut_within(tensor.cut, self.mesh.ep == self.mesh.tp, None if alone else AXIS)

    def _ranges_within(
        self, axes: Mapping[str, Axis], shares: Sequence[Fraction | int] | None
    ) -> dict[str, tuple[Range, ...]]:
        """Of axes that ranks which share experts deal among themselves, a range for each rank of a stage."""
        size = self.mesh.tp // self.mesh.ep
        if shares is None:
            self._require_even(axes, size)
        firsts = range(0, self.mesh.tp, size)
        deals = [deal(axes, Mesh(size), shares and shares[first : first + size]) for first in firsts]
        return {name: tuple(chain.from_iterable(each.ranges[name] for each in deals)) for name in axes}

    def _require_even(self, axes: Mapping[str, Axis], size: int) -> None:
        """UnsupportedError, with the values of ep that work, where `size` ranks cannot cut experts evenly."""
        reason, axis = next(((why, axis) for axis in axes.values() if (why := why_not(axis, size))), (None, None))
        if reason is None or axis is None:
            return
        tp, most = self.mesh.tp, self.model.experts.count if self.model.experts else 1
        possible = [ep for ep in range(1, most + 1) if tp % ep == 0]
        possible = [ep for ep in possible if not any(why_not(each, tp // ep) for each in axes.values())]
        raise UnsupportedError(
            f"{reason}; each expert is cut for tp / ep ranks",
            tensor=axis.step_of or None,
            expected=f"ep {listing(possible)}" if possible else "a smaller tp",
            found=f"ep {self.mesh.ep}",
            hint="use one of those, or deal unequal shares with --uneven",
        )


def _within(axis: str) -> str:
    """The name that an axis has where ranks that share experts cut them: others may be cut along it by all ranks."""
    return f"{axis} of experts"


@lru_cache(maxsize=4096)
def _cut_within(cut: Cut, whole: bool, stack: str | None) -> Cut:
    """The cut of what is of experts, for the ranks that share them. whole: whether there is one."""
    if whole:
        return Cut("replicate", stack=stack)
    interleave = cut.interleave and _within(cut.interleave)
    return replace(cut, segments=tuple(map(_within, cut.segments)), interleave=interleave, stack=stack)


def _axes_of(cut: Cut) -> tuple[str, ...]:
    return (*cut.segments, *((cut.interleave,) if cut.interleave else ()))


@lru_cache(maxsize=4096)
def _ranks(
    mesh: Mesh, stages: tuple[int, ...], ranges: tuple[Range, ...] | None, number: int | None
) -> tuple[int, ...]:
    every = (rank for rank in range(mesh.size) if mesh.coordinate(rank)[0] in stages)
    if ranges is None or number is None:
        return tuple(every)
    return tuple(rank for rank in every if number in range(*ranges[mesh.place(rank, "ep")]))


def placement(model: Model, mesh: Mesh, layers: Sequence[int] | None) -> Placement:
    """Where the tensors of a model are on a mesh. layers: how many each stage has, None for as many.

    UnsupportedError for a model without experts, or where experts would be both whole and cut.
    """
    found = Placement(model, mesh, model.stages(mesh.pp, layers) if mesh.pp > 1 else None)
    if mesh.ep == 1:
        return found
    if model.experts is None:
        what = "the model has no routed experts, or its rules do not say how many"
        raise UnsupportedError(what, expected="ep 1", found=f"ep {mesh.ep}", hint="leave --ep out")
    if model.experts.count < mesh.ep:
        what = f"{model.experts.count} experts on {mesh.ep} ranks: an expert is never cut"
        raise UnsupportedError(what, expected=f"ep of at most {model.experts.count}", found=f"ep {mesh.ep}")
    return replace(found, experts=(model.experts, model.experts.ranges(mesh.ep)))
