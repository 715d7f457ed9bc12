"""transformers' classes as a backend: the unsharded model and the ranks' models, built from stored tensors."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from tpshard.verifier.backend import Backend, Fed, Judge, Reference, T
from tpshard.verifier.criteria import CHOICE, relative
from tpshard.verifier.elements import Parameter, RankShares
from tpshard.verifier.group import Group, Single
from tpshard.verifier.hf.beside import UnshardedRun
from tpshard.verifier.hf.overrides import Pinned, precision
from tpshard.verifier.hf.parallel import Link, connect
from tpshard.verifier.hf.partition import parameters
from tpshard.verifier.hf.places import StoredPlaces
from tpshard.verifier.hf.probes import Feeder, blocks
from tpshard.verifier.hf.sides import Side
from tpshard.verifier.hf.skeleton import Frame, fill, layers_of, skeleton, skip_layers
from tpshard.verifier.ranks.weights import Weights
from tpshard.verifier.report.verdict import Finding


@dataclass(frozen=True)
class TransformersBackend(Backend):
    """Both sides of a comparison, from which models are built.

    most: where weights are streamed, the elements of a parameter that may be in memory at once.
    """

    frame: Frame
    most: int | None = None

    @property
    def compared(self) -> tuple[int, ...]:
        return self.frame.layers

    def _side(self, weights: Weights, dtype: torch.dtype, cuts: Mapping[str, RankShares], rank: int | None) -> Side:
        """The unsharded model, or a rank's with its collectives."""
        model = skeleton(self.frame.config, dtype, self.device)
        fill(model, self.frame, weights, dtype, self.device, rank, self.most)
        link = Link() if rank is None else connect(model, self.frame.config, cuts, rank)
        skip_layers(model, self.frame.layers)
        every, step = layers_of(model), self.progress.step
        layers = dict(every[i] for i in self.frame.layers)
        return Side(model, dtype, cuts, rank, link, partial(step, 2), self.frame.pictures, layers, step)

    def reference(self, dtype: torch.dtype) -> Side:
        """The unsharded model."""
        return self._side(self.source, dtype, {}, None)

    def cuts(self) -> dict[str, RankShares]:
        return self.frame.cuts(self.source, self.ranks)

    def here(self, dtype: torch.dtype) -> dict[int, Side]:
        """The models of the ranks that this process runs."""
        cuts = self.cuts()
        return {rank: self._side(self.ranks[rank], dtype, cuts, rank) for rank in self.team.here}

    def with_layers(self, count: int) -> Self:
        """Of its layers, the first of those that hold the most tensors: experts, say."""
        counts = Counter(self.frame.layer(key) for key in self.frame.shapes)
        return self.only(*sorted(self.frame.layers, key=lambda layer: -counts[layer])[:count])

    def only(self, *layers: int) -> Self:
        """The same with these layers alone."""
        return replace(self, frame=replace(self.frame, layers=layers))

    @property
    def keeps(self) -> None:
        """Nowhere: each run builds its models."""

    def parameters(self) -> Iterator[Parameter]:
        return parameters(self.frame, self.source, self.ranks)

    def places(self, layer: int | None = None) -> StoredPlaces:
        at = self.frame.layers[0] if layer is None else layer
        return StoredPlaces(self.frame.text, self.source, self.ranks, at, self.frame.of_text(self.source))

    def run(self, dtype: torch.dtype, steps: Sequence[Tensor], choices: Any = None) -> Reference:
        pins = _pinned(choices)
        logits = self.reference(dtype).run(Single(), list(steps), pins)
        return Reference(logits, pins)

    def teach(self, tokens: int) -> tuple[list[Tensor], Reference]:
        """The prompt and greedy choices of the unsharded float64 model, one step each; its run on all of them."""
        pins, steps = Pinned(), self.steps
        logits = self.reference(torch.float64).run(Single(), steps, pins, more=tokens)
        return steps, Reference(logits, pins)

    def run_ranks(self, dtype: torch.dtype, steps: Sequence[Tensor], choices: Any, judge: Judge[T]) -> list[T]:
        models = self.here(dtype)
        return self.team.run(lambda group: judge(models[group.rank].run(group, list(steps), _pinned(choices))))

    def errors(self, dtype: torch.dtype, reference: Reference) -> list[float]:
        return self._errors(self.here(dtype), reference.choices, reference.logits)

    def _errors(self, models: Mapping[int, Side], pins: Pinned, wanted: Tensor) -> list[float]:
        def work(group: Group) -> float:
            side, mine = models[group.rank], Pinned(pins.made)
            error = relative(side.run(group, self.steps, mine), wanted)
            return max([error, *mine.differences(pins, side.routers).values()])

        return self.team.run(work)

    def feed(self, dtype: torch.dtype, limit: float) -> Fed:
        whole, models = self.reference(dtype), self.here(dtype)
        names = blocks(whole, self.frame.layers)

        def work(group: Group) -> list[Finding]:
            side, mine, more = models[group.rank], Pinned(beside.pins.made), list[Finding]()
            feeder = Feeder(whole, beside.record, side, names, limit)

            def leave(layer: str) -> None:
                more.extend(_experts(side, group, *each) for each in beside.experts.get(layer, ()))
                beside.leave(layer)

            with feeder.looking(), side.between(beside.reach, leave):
                side.run(group, [self.prompt], mine)
            beside.logits()
            differences = mine.differences(beside.pins, side.routers)
            chosen = [Finding(f"{name}{CHOICE}", group.rank, error) for name, error in differences.items()]
            return [*feeder.findings, *chosen, *more]

        with UnshardedRun(whole, names, self.steps, len(models)) as beside:
            findings = self.findings(work)
            wanted = beside.logits()
        return self._errors(models, beside.pins, wanted), findings


def _pinned(choices: Any) -> Pinned:
    return Pinned(None if choices is None else choices.made)


def _experts(side: Side, group: Group, name: str, args: tuple[Tensor, ...], wanted: Tensor) -> Finding:
    """A rank's experts on a token for each."""
    given = tuple(x.to(side.dtype) if x.is_floating_point() else x for x in args)
    with precision(side.dtype):
        return Finding(f"{name} (every expert)", group.rank, relative(side.modules[name].forward(*given), wanted))
