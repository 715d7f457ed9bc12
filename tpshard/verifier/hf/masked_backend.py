"""The backend for classes of which nobody knows where they read a rank's heads and widths: see `masked`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from tpshard.errors import UnsupportedError
from tpshard.verifier.backend import Fed
from tpshard.verifier.criteria import CHOICE
from tpshard.verifier.elements import RankShares
from tpshard.verifier.group import Group, Single, Threads
from tpshard.verifier.hf.backend import TransformersBackend, _experts
from tpshard.verifier.hf.masked import MaskedLink, Sums, connect, kinds_of
from tpshard.verifier.hf.masked_feed import MaskedFeeder, Records, Uses, recording
from tpshard.verifier.hf.overrides import Pinned, precision
from tpshard.verifier.hf.parallel import is_experts
from tpshard.verifier.hf.places_in_whole import PlacedShare, Shares, put_in_place, shares_of
from tpshard.verifier.hf.probes import blocks, every_expert
from tpshard.verifier.hf.sides import Side
from tpshard.verifier.hf.skeleton import fill, layers_of, skeleton, skip_layers
from tpshard.verifier.ranks.weights import Weights
from tpshard.verifier.report.verdict import Finding, Place

UNUSED = " (what nothing of the rank needs)"
"""Ends the name of a finding of a parameter that a rank has more of than its features need."""


class MaskedSide(Side):
    """A model of which nobody knows where it chooses experts: in a router, or around it."""

    @cached_property
    def routers(self) -> dict[str, nn.Module]:
        around = {name: module for name, module in self.modules.items() if hasattr(module, "experts")}
        return self._named("Router") | around


@dataclass(frozen=True)
class MaskedBackend(TransformersBackend):
    """Both sides of a comparison; a rank's parameters lie in their places among zeros.

    shares: where, found in what the ranks hold before anything is run; damaged ranks are put in the same places. exact:
    whether ranks must hold no more than they need: an engine's class may.
    """

    shares: Shares = field(default_factory=dict)
    sparing: bool = True

    def placed(self) -> Self:
        """The same, which knows where the ranks' shares lie. DifferentError where they are none."""
        return replace(self, shares=self.team.together(lambda: shares_of(self.frame, self.source, self.ranks)))

    def _side(self, weights: Weights, dtype: torch.dtype, cuts: Mapping[str, RankShares], rank: int | None) -> Side:
        if rank is None:
            side = super()._side(weights, dtype, cuts, rank)
            more = (self.frame.pictures, side.layers, side.count)
            return MaskedSide(side.model, side.dtype, {}, None, side.link, side.progress, *more)
        return self._placed(weights, dtype, rank, self.shares, whole=False)

    def _placed(self, weights: Weights, dtype: torch.dtype, rank: int, shares: Shares, *, whole: bool) -> Side:
        """A rank's model; whole: of weights that have everything, of which it gets its shares."""
        model: Any = skeleton(self.frame.config, dtype, self.device)
        fill(model, self.frame, weights, dtype, self.device, None if whole else rank, self.most)
        mine = {key: each for key, each in shares.items() if self.frame.needed(key)}
        put_in_place(model, mine, rank, self.frame.is_table)
        link = MaskedLink()
        connect(model, mine, rank, link)
        skip_layers(model, self.frame.layers)
        every, step = layers_of(model), self.progress.step
        more = (self.frame.pictures, dict(every[i] for i in self.frame.layers), step)
        return MaskedSide(model, dtype, {}, rank, link, partial(step, 2), *more)

    def feed(self, dtype: torch.dtype, limit: float) -> Fed:
        whole, models = self.reference(dtype), self.here(dtype)
        names, records, pins, wanted = self._recorded(whole)
        sums = kinds_of(whole.model, self.shares)
        experts = self._every_expert(whole, records, dtype)
        alive = self._uses(whole, MaskedFeeder(whole, records, whole, names, limit, {}, sums), Single(), sums, pins)

        def work(group: Group) -> list[Finding]:
            side, mine = models[group.rank], Pinned(pins.made)
            feeder = MaskedFeeder(whole, records, side, names, limit, self.shares, sums)
            with feeder.looking():
                side.run(group, [self.prompt], mine)
            differences = mine.differences(pins, side.routers)
            chosen = [Finding(f"{name}{CHOICE}", group.rank, error) for name, error in differences.items()]
            more = [_experts(side, group, name, *reached) for name, reached in experts.items()]
            again = MaskedFeeder(whole, records, side, names, limit, self.shares, sums)
            uses = self._uses(side, again, group, sums, pins)
            spare = uses.unused(alive, self.shares, group.rank) if self.sparing else ()
            every = {name for name, _ in spare}
            order = [f for f in (*feeder.findings, *chosen, *more)]
            unused = {name: Finding(f"{name}{UNUSED}", group.rank, math.inf) for name in every}
            clean = [Finding(f"{name}{UNUSED}", group.rank, 0.0) for name in uses.alive if name not in unused]
            return [*order, *sorted((*unused.values(), *clean), key=lambda finding: finding.module)]

        errors = self._errors(models, pins, wanted)
        return errors, self.findings(work)

    def _recorded(self, whole: Side) -> tuple[list[str], Records, Pinned, Tensor]:
        """The modules that are compared, in order, what each took and gave, the choices, and the logits."""
        pins, names = Pinned(), self._compared(whole)
        with recording(whole, names) as records:
            wanted = whole.run(Single(), self.steps, pins)
        chosen = set(names)
        return [name for name in records if name in chosen], dict(records), pins, wanted

    def _compared(self, whole: Side) -> list[str]:
        """As `blocks`; of a list of modules its items, since nobody calls a list.

        Nothing that is inside a sum over ranks: what it is given there is a rank's summand.
        """
        found, waiting = list[str](), blocks(whole, self.frame.layers)
        inside = tuple(f"{name}." for name in kinds_of(whole.model, self.shares).summed)
        while waiting:
            name = waiting.pop(0)
            module = whole.modules[name]
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                waiting = [f"{name}.{part}" for part, _ in module.named_children()] + waiting
            elif not name.startswith(inside):
                found.append(name)
        return found

    def _every_expert(
        self, whole: Side, records: Records, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[Tensor, ...], Tensor]]:
        """Arguments that reach every expert, where a class's experts take what those do that were tried."""
        found = {}
        for name in records:
            if is_experts(whole.modules[name]):
                try:
                    with precision(dtype):
                        found[name] = every_expert(whole.modules[name], records[name][-1])
                except (RuntimeError, TypeError, ValueError, IndexError, StopIteration):
                    continue
        return found

    def _uses(self, side: Side, feeder: MaskedFeeder, group: Group, sums: Sums, pins: Pinned) -> Uses:
        """What a side's summands depend on, every compared module by itself."""
        try:
            with feeder.looking(compare=False):
                return Uses.of(side, sums, lambda: side.run(group, [self.prompt], Pinned(pins.made)))
        except RuntimeError as error:
            what = f"what ranks need cannot be told: {str(error).splitlines()[0]}"
            raise UnsupportedError(what, hint="--tier bytes compares the files") from error

    def certain(self, first: Place | None) -> bool:
        """Whether a difference in a module is the shards': whether ranks that hold what their features need make none.

        These are ranks with the same inputs of each row-parallel module, and all that these are computed from.
        """
        if first is None or first.layer is None:
            return first is not None
        if first.module.endswith((UNUSED, CHOICE)):
            return True
        try:
            return self._makes_none(first)
        except (RuntimeError, TypeError, ValueError, IndexError, UnsupportedError):
            return False

    def _makes_none(self, first: Place) -> bool:
        """See `certain`; what a class stumbles over is raised."""
        whole = self.reference(torch.float64)
        names, records, pins, _ = self._recorded(whole)
        sums = kinds_of(whole.model, self.shares)
        name = next((n for n in names if f"{first.module}.".removeprefix("input of ").startswith(f"{n}.")), None)
        if name is None:
            return False
        if not any(key.startswith(f"{name}.") for key in self.shares):
            return True  # every rank has it whole, and was given what the unsharded one took
        culprit = whole.modules.get(first.module.removeprefix("input of "))
        if culprit is not None and is_experts(culprit):
            return True
        if self._lacks_row(whole, name, names, records, sums, pins):
            return True
        right = self._right(whole, name, names, records, sums, pins)
        return right is not None and self._computes(whole, right, names, records, sums, pins, name)

    def _lacks_row(
        self, whole: Side, name: str, names: Sequence[str], records: Records, sums: Sums, pins: Pinned
    ) -> bool:
        """Whether a linear module that every rank has whole is given a part of its inputs by each, and all by all."""
        models = self.here(torch.float64)

        def work(group: Group) -> dict[str, Tensor]:
            feeder = MaskedFeeder(whole, records, models[group.rank], names, math.inf, self.shares, sums)
            with feeder.looking():
                models[group.rank].run(group, [self.prompt], Pinned(pins.made))
            return {key: each.cpu() for key, each in feeder.agreeing.items() if key.startswith(f"{name}.")}

        ranks = self.team.run(work)
        of_all = [torch.stack([rank[key] for rank in ranks]) for key in ranks[0]]
        return any(bool(each.any(0).all()) and not bool(each.all()) for each in of_all)

    def _right(
        self, whole: Side, name: str, names: Sequence[str], records: Records, sums: Sums, pins: Pinned
    ) -> dict[str, list[PlacedShare]] | None:
        """The shares that ranks need of what is below a module; None where each needs all of everything."""
        tp, apart = len(self.ranks), False
        right = {key: list(each) for key, each in self.shares.items()}
        below = [key for key in self.shares if key.startswith(f"{name}.") and key.rpartition(".")[0] not in sums.summed]
        per_rank = []
        for rank in range(tp):
            feeder = MaskedFeeder(whole, records, whole, names, math.inf, {}, sums)
            with feeder.looking(compare=False):
                run = partial(whole.run, Single(), [self.prompt], Pinned(pins.made))
                per_rank.append(Uses.of(whole, sums, run, self.shares, rank))
        for key in below:
            dim, total = self.shares[key][0].dim, self.shares[key][0].total
            needs = [uses.alive[key][dim].cpu() for uses in per_rank]
            if not all(bool(need.any()) for need in needs):
                continue
            apart |= not all(bool(need.all()) for need in needs)
            taken, each = torch.zeros(total, dtype=torch.bool), []
            for need in needs:
                at = need.nonzero().flatten()
                each.append(PlacedShare(dim, total, at, at, at, need & ~taken))
                taken |= need
            right[key] = each
        return right if apart else None

    def _computes(
        self,
        whole: Side,
        right: Shares,
        names: Sequence[str],
        records: Records,
        sums: Sums,
        pins: Pinned,
        name: str,
    ) -> bool:
        """Whether ranks with these shares of the source's own weights give what a module gives."""
        of_source = {
            key: [replace(share, there=share.at, here=share.at) for share in each] for key, each in right.items()
        }
        tp = len(self.ranks)
        sides = [self._placed(self.source, torch.float64, rank, of_source, whole=True) for rank in range(tp)]

        def work(group: Group) -> bool:
            feeder = MaskedFeeder(whole, records, sides[group.rank], names, math.inf, of_source, sums)
            with feeder.looking():
                sides[group.rank].run(group, [self.prompt], Pinned(pins.made))
            return all(finding.error <= 1e-12 for finding in feeder.findings if finding.module == name)

        return all(Threads(tp).run(work))
