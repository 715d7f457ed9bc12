"""The built-in decoder as a backend: the sharded model beside the unsharded one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from tpshard.verifier.backend import Backend, Fed, Judge, Reference, T
from tpshard.verifier.builtin.decoder import Decoder, Probe
from tpshard.verifier.builtin.layers import Cache
from tpshard.verifier.builtin.partition import parameters
from tpshard.verifier.builtin.places import DecoderPlaces
from tpshard.verifier.builtin.probes import Recorder, Replayer
from tpshard.verifier.criteria import relative
from tpshard.verifier.elements import Parameter
from tpshard.verifier.families.family import Family
from tpshard.verifier.group import Group, Single
from tpshard.verifier.ranks.weights import Disturbed, Weights
from tpshard.verifier.report.verdict import Finding


@dataclass(frozen=True)
class DecoderBackend(Backend):
    """What is compared, and how: source and ranks hold the weights.

    `layers` None means all; others are left out of both sides. `block_bytes` bounds what is in memory of a matrix.
    `keep_ranks` says that the ranks are in memory even though the source is streamed. `wide` may hold the source in
    float64, so that it is not converted at every use.
    """

    family: Family
    layers: tuple[int, ...] | None = None
    block_bytes: int | None = None
    sequence_parallel: bool = False
    keep_ranks: bool = False
    wide: Weights | None = None

    @property
    def compared(self) -> tuple[int, ...]:
        return tuple(range(self.family.layers)) if self.layers is None else self.layers

    def reference(self, dtype: torch.dtype, probe: Probe | None = None, *, hold: bool = False) -> Decoder:
        """The unsharded model."""
        source = self.wide if self.wide is not None and dtype == torch.float64 else self.source
        blocks = self.block_bytes
        return Decoder(self.family, source, Single(), dtype, self.device, probe=probe, block_bytes=blocks, hold=hold)

    def sharded(self, group: Group, dtype: torch.dtype, probe: Probe | None = None, *, hold: bool = False) -> Decoder:
        """A rank's share of the sharded model; sequence-parallel, if asked for, only where no probe looks on."""
        parallel = self.sequence_parallel and probe is None and group.size > 1
        blocks, rank = None if self.keep_ranks else self.block_bytes, self.ranks[group.rank]
        return Decoder(self.family, rank, group, dtype, self.device, parallel, probe, blocks, hold)

    def disturbed(self) -> Self:
        return replace(self, source=Disturbed(self.source), wide=None)

    def with_layers(self, count: int) -> Self:
        return replace(self, layers=self.compared[:count], sequence_parallel=False)

    @property
    def keeps(self) -> torch.device | None:
        return self.device if self.block_bytes is None or self.keep_ranks else None

    def same_form(self) -> tuple[Self, Self]:
        """With every layer, whose shapes say which heads a rank has; what is not run is not read."""
        held, cut = super(DecoderBackend, replace(self, layers=None)).same_form()
        return replace(held, layers=self.layers), replace(cut, layers=self.layers)

    def parameters(self) -> Iterator[Parameter]:
        return parameters(self.family, self.source, self.ranks, self.compared)

    def places(self, layer: int | None = None) -> DecoderPlaces:
        return DecoderPlaces(self.family, self.ranks, self.compared[0] if layer is None else layer)

    def run(self, dtype: torch.dtype, steps: Sequence[Tensor], choices: Any = None) -> Reference:
        return Reference(self._through(self.reference(dtype, hold=len(steps) > 1), steps))

    def run_ranks(self, dtype: torch.dtype, steps: Sequence[Tensor], choices: Any, judge: Judge[T]) -> list[T]:
        return self.team.run(lambda group: judge(self._through(self.sharded(group, dtype, hold=len(steps) > 1), steps)))

    def _through(self, decoder: Decoder, steps: Sequence[Tensor]) -> Tensor:
        """All stages of a decoder; its logits."""
        moving = Pass(decoder, steps, self.compared)
        for stage in moving.stages:
            moving.advance(stage)
            self.progress.step()
        return moving.logits()

    def errors(self, dtype: torch.dtype, reference: Reference) -> list[float]:
        return self.run_ranks(dtype, self.steps, None, lambda logits: relative(logits, reference.logits))

    def teacher_tokens(self, tokens: int) -> list[Tensor]:
        """The prompt, then `tokens` greedy choices of the unsharded float64 model, one step each."""
        decoder, cache = self.reference(torch.float64), Cache()
        steps = [self.prompt]
        for _ in range(tokens):
            steps.append(decoder.forward(steps[-1], cache, self.compared)[:, -1:].argmax(-1))
        return steps

    def run_wide(self, steps: Sequence[Tensor]) -> Reference:
        """The unsharded model in float64 on all steps."""
        # One pass over the whole is the same mathematics, but where the sequence's length changes the frequencies.
        changing = self.family.rope is not None and self.family.rope.kind == "dynamic"
        return self.run(torch.float64, steps if changing else [torch.cat(list(steps), 1)])

    def feed(self, dtype: torch.dtype, limit: float) -> Fed:
        layers, team = self.compared, self.team
        recorder = Recorder()
        whole = Pass(self.reference(dtype, recorder), [self.prompt], layers)

        def work(group: Group) -> tuple[float, list[Finding]]:
            plain = Pass(self.sharded(group, dtype), [self.prompt], layers)
            replayer = Replayer(recorder.records, group.rank, limit)
            fed = Pass(self.sharded(group, dtype, replayer), [self.prompt], layers)
            for stage in whole.stages:
                if group.rank == team.here[0]:  # once in a process
                    recorder.records.clear()
                    whole.advance(stage)
                    self.progress.step()
                group.barrier()
                plain.advance(stage)
                fed.advance(stage)
                self.progress.step(2)
                group.barrier()
            return relative(plain.logits(), whole.logits()), replayer.findings

        ranks = team.run(work)
        findings = [finding for step in zip(*(rank[1] for rank in ranks), strict=True) for finding in step]
        return [rank[0] for rank in ranks], findings


class Pass:
    """A decoder on its way through the model, stage by stage, with one or several steps of tokens in each.

    Stages are the embedding, each layer, and the head. Going through all steps in one stage before the next reads
    every weight once, and gives what a decoding with a KV cache gives, since the tokens are known beforehand.
    """

    def __init__(self, decoder: Decoder, steps: Sequence[Tensor], layers: Sequence[int]) -> None:
        self.decoder = decoder
        self.layers = layers
        self.cache = Cache()
        self.streams = list(steps)
        ends = accumulate(ids.shape[1] for ids in steps)
        self.positions = [
            torch.arange(end - ids.shape[1], end, device=ids.device) for ids, end in zip(steps, ends, strict=True)
        ]

    def advance(self, stage: int) -> None:
        """Run stage 0 (embedding), 1 … n (the layers), or n + 1 (head)."""
        if self.decoder.store.hold is not None:
            self.decoder.store.hold.clear()
        pairs = zip(self.streams, self.positions, strict=True)
        if stage == 0:
            self.streams = [self.decoder.embed(ids, at) for ids, at in pairs]
        elif stage <= len(self.layers):
            self.streams = [self.decoder.layer(self.layers[stage - 1], x, at, self.cache) for x, at in pairs]
        else:
            # Steps are joined: the head looks at each position alone. Under sequence parallelism they cannot be,
            # since each step was cut along the sequence for itself.
            joined = self.streams if self.decoder.scatter else [torch.cat(self.streams, 1)]
            self.streams = [self.decoder.head(x) for x in joined]

    @property
    def stages(self) -> range:
        return range(len(self.layers) + 2)

    def logits(self) -> Tensor:
        """Logits of all steps [B, S, vocab], once all stages are done."""
        return torch.cat(self.streams, 1)
