"""Which ranks of a mesh hold a tensor: those of its stage, and of an expert those that have it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from tpshard.errors import UnsupportedError
from tpshard.planning.axes import Axis, Cut
from tpshard.planning.deal import Deal, Range
from tpshard.planning.experts import AXIS, Experts
from tpshard.planning.layout import LogicalTensor
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.planning.stages import Stages

_BY_EXPERTS = Cut("column", 0, (AXIS,))


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

    @property
    def axes(self) -> Mapping[str, Axis]:
        """The axes that are dealt: without those that whole experts alone have."""
        if self.experts is None:
            return self.model.axes
        names = {name for each in self.model.tensors if not self.of_experts(each) for name in _axes_of(each.cut)}
        names |= {group for name in names if (group := self.model.axes[name].group)}
        return {name: axis for name, axis in self.model.axes.items() if name in names}

    def dealt(self, tensors: Sequence[LogicalTensor], deal: Deal) -> tuple[list[LogicalTensor], Deal]:
        """Tensors with the cuts that they have where experts are whole, and the deal with the axis of these."""
        if self.experts is None:
            return list(tensors), deal
        experts, ranges = self.experts
        axis = Axis(AXIS, experts.count, 1, along="ep")
        cuts = map(self._cut, tensors)
        with_experts = Deal(deal.mesh, {**deal.axes, AXIS: axis}, {**deal.ranges, AXIS: ranges})
        return [replace(tensor, cut=cut) for tensor, cut in zip(tensors, cuts, strict=True)], with_experts

    def of_experts(self, tensor: LogicalTensor) -> bool:
        """Whether a tensor is of an expert, or of all, and experts are whole."""
        return self._cut(tensor) is not tensor.cut

    def _cut(self, tensor: LogicalTensor) -> Cut:
        """A tensor's cut, where experts are whole if they are."""
        if self.experts is None:
            return tensor.cut
        experts, full_name = self.experts[0], self.model.full_name(tensor.name)
        if experts.number(full_name) is not None:
            return Cut("replicate")
        return _BY_EXPERTS if experts.are_stacked(full_name, tensor.shape) else tensor.cut


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
    if mesh.ep != mesh.tp:
        what = "experts are whole on a rank or cut like the rest: half of each is not laid out"
        raise UnsupportedError(what, expected=f"ep 1 or {mesh.tp}", found=f"ep {mesh.ep}", hint=f"use --ep {mesh.tp}")
    if model.experts.count < mesh.ep:
        what = f"{model.experts.count} experts on {mesh.ep} ranks: an expert is never cut"
        raise UnsupportedError(what, expected=f"ep of at most {model.experts.count}", found=f"ep {mesh.ep}")
    return replace(found, experts=(model.experts, model.experts.ranges(mesh.ep)))
