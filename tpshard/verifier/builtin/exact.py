"""A sharded forward pass beside the unsharded one, and the exact tier, which judges it in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tpshard.verifier.builtin.decoder import Decoder, Probe
from tpshard.verifier.builtin.layers import Cache
from tpshard.verifier.builtin.probes import Recorder, Replayer
from tpshard.verifier.criteria import EXACT_LIMIT, FLOAT32_LIMIT, first_difference, no_tf32, place, relative
from tpshard.verifier.families.family import Family
from tpshard.verifier.group import Group, Processes, Single, Threads
from tpshard.verifier.progress import Progress
from tpshard.verifier.ranks.weights import Weights
from tpshard.verifier.report.verdict import Finding, Place, Tier


@dataclass(frozen=True)
class Setup:
    """What is compared, and how: source and ranks hold the weights, `team` runs the ranks.

    `layers` None means all; others are left out of both sides. `block_bytes` bounds what is in memory of a matrix.
    `keep_ranks` says that the ranks are in memory even though the source is streamed. `wide` may hold the source in
    float64, so that it is not converted at every use. `progress` counts the stages that are done.
    """

    family: Family
    source: Weights
    ranks: Sequence[Weights]
    team: Threads | Processes
    prompt: Tensor
    device: torch.device
    layers: tuple[int, ...] | None = None
    block_bytes: int | None = None
    sequence_parallel: bool = False
    keep_ranks: bool = False
    wide: Weights | None = None
    progress: Progress = field(default_factory=lambda: Progress("", 1))

    def which(self) -> tuple[int, ...]:
        return tuple(range(self.family.layers)) if self.layers is None else self.layers

    def reference(self, dtype: torch.dtype, probe: Probe | None = None, *, hold: bool = False) -> Decoder:
        """The unsharded model."""
        source = self.wide if self.wide is not None and dtype == torch.float64 else self.source
        return self._decoder(source, Single(), dtype, probe, hold, self.block_bytes)

    def sharded(self, group: Group, dtype: torch.dtype, probe: Probe | None = None, *, hold: bool = False) -> Decoder:
        """A rank's share of the sharded model; sequence-parallel, if asked for, only where no probe looks on."""
        block_bytes = None if self.keep_ranks else self.block_bytes
        return self._decoder(self.ranks[group.rank], group, dtype, probe, hold, block_bytes)

    def _decoder(
        self,
        weights: Weights,
        group: Group,
        dtype: torch.dtype,
        probe: Probe | None,
        hold: bool,
        block_bytes: int | None,
    ) -> Decoder:
        return Decoder(
            self.family,
            weights,
            group,
            dtype=dtype,
            device=self.device,
            sequence_parallel=self.sequence_parallel and probe is None and group.size > 1,
            probe=probe,
            block_bytes=block_bytes,
            hold=hold and block_bytes is not None,
        )


class Pass:
    """A decoder on its way through the model, stage by stage, with one or several steps of tokens in each.

    Stages are the embedding, each layer, and the head. Going through all steps in one stage before the next reads
    every weight once, and gives what a decoding with a KV cache gives, since the tokens are known beforehand.
    """

    def __init__(self, decoder: Decoder, steps: Sequence[Tensor], layers: Sequence[int]) -> None:
        self.decoder = decoder
        self.layers = layers
        self.steps = steps
        self.cache = Cache()
        ends = [sum(s.shape[1] for s in steps[: i + 1]) for i in range(len(steps))]
        self.positions = [
            torch.arange(end - s.shape[1], end, device=s.device) for s, end in zip(steps, ends, strict=True)
        ]
        self.streams: list[Tensor] = []

    def advance(self, stage: int) -> None:
        """Run stage 0 (embedding), 1 … n (the layers), or n + 1 (head)."""
        if self.decoder.store.hold is not None:
            self.decoder.store.hold.clear()
        if stage == 0:
            pairs = zip(self.steps, self.positions, strict=True)
            self.streams = [self.decoder.embed(ids, at) for ids, at in pairs]
        elif stage <= len(self.layers):
            i = self.layers[stage - 1]
            pairs = zip(self.streams, self.positions, strict=True)
            self.streams = [self.decoder.layer(i, x, at, self.cache) for x, at in pairs]
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


def through(
    decoder: Decoder, steps: Sequence[Tensor], layers: Sequence[int], progress: Progress | None = None
) -> Tensor:
    """All stages of a decoder; its logits."""
    moving = Pass(decoder, steps, layers)
    for stage in moving.stages:
        moving.advance(stage)
        if progress is not None:
            progress.step()
    return moving.logits()


def lockstep(
    setup: Setup, dtype: torch.dtype, limit: float, *, wide: torch.dtype, always: bool = False
) -> tuple[list[float], list[Finding]]:
    """The sharded model in `dtype` beside the unsharded one in `wide`, a stage at a time, so that no more is kept.

    Returns every rank's end-to-end error, and every rank's finding for each module in the order of computation.
    `always` looks also inside of modules that agree.
    """
    layers, team = setup.which(), setup.team
    recorder = Recorder()
    whole = Pass(setup.reference(wide, recorder), [setup.prompt], layers)

    def work(group: Group) -> tuple[float, list[Finding]]:
        plain = Pass(setup.sharded(group, dtype), [setup.prompt], layers)
        replayer = Replayer(recorder.records, group.rank, limit, always=always)
        fed = Pass(setup.sharded(group, dtype, replayer), [setup.prompt], layers)
        for stage in whole.stages:
            if team.leads(group):
                recorder.records.clear()
                whole.advance(stage)
                setup.progress.step()
            group.barrier()
            plain.advance(stage)
            fed.advance(stage)
            setup.progress.step(2)
            group.barrier()
        return relative(plain.logits(), whole.logits()), replayer.findings

    ranks = team.run(work)
    findings = [finding for step in zip(*(rank[1] for rank in ranks), strict=True) for finding in step]
    return [rank[0] for rank in ranks], findings


def table_findings(setup: Setup) -> list[Finding]:
    """Every row of the embedding and of learned positions, of which a prompt alone would look up a few."""
    family = setup.family

    def work(group: Group) -> list[Finding]:
        whole, mine = setup.reference(torch.float64), setup.sharded(group, torch.float64)
        rows = min(mine.vocab_rows, family.vocab - mine.first_vocab)
        tables = [(family.embed, mine.first_vocab, rows)]
        if family.positions is not None:
            tables.append((family.positions, 0, whole.store.matrix_shape(family.positions)[0]))
        findings = []
        for module, first, count in tables:
            pairs = zip(
                whole.store.table(module, first, first + count), mine.store.table(module, 0, count), strict=True
            )
            apart = max((relative(rows, wanted) for wanted, rows in pairs), default=0.0)
            findings.append(Finding(f"{mine.store.full(module)} (every row)", group.rank, apart))
        return findings

    return [finding for step in zip(*setup.team.run(work), strict=True) for finding in step]


def exact(setup: Setup, *, float32: bool = False) -> Tier:
    """Both sides in float64 (or float32): end to end, and every module fed the reference's input."""
    dtype = torch.float32 if float32 else torch.float64
    limit = FLOAT32_LIMIT if float32 else EXACT_LIMIT
    with no_tf32():
        tables = table_findings(setup)
        errors, findings = lockstep(setup, dtype, limit, wide=dtype)
    findings = tables + findings
    worst = max(findings, key=lambda f: f.error)
    first = first_difference(findings, limit)
    failed = first is not None or max(errors) > limit
    return Tier(
        name="exact",
        status="fail" if failed else "pass",
        thresholds={"relative_error": limit},
        metrics={"relative_error": max(errors), "worst_module_error": worst.error},
        worst=place(worst),
        first=first,
        findings=tuple(findings),
        reason=_exact_reason(setup, first, max(errors), limit) if failed else None,
    )


def _exact_reason(setup: Setup, first: Place | None, error: float, limit: float) -> str:
    if first is None:
        return f"the logits differ by {error:.1e} (limit {limit:.0e}), though every module alone agrees"
    exchanged = exchanged_ranks(setup, limit)
    if exchanged is not None:
        return f"the files of ranks {exchanged[0]} and {exchanged[1]} are exchanged"
    return f"{first.module} of rank {first.rank} differs first, by {first.error:.1e} (limit {limit:.0e})"


def exchanged_ranks(setup: Setup, limit: float) -> tuple[int, int] | None:
    """The two ranks that, put in each other's place, make embedding, head and a layer equal the reference.

    None if none do. The layer tells whole files from an embedding alone, and by what is inside of its modules.
    """
    small = replace(setup, layers=(), sequence_parallel=False)
    wanted = through(small.reference(torch.float64), [setup.prompt], ())

    def error(ranks: Sequence[Weights]) -> float:
        trial = replace(small, ranks=ranks)
        return max(
            trial.team.run(
                lambda group: relative(through(trial.sharded(group, torch.float64), [setup.prompt], ()), wanted)
            )
        )

    if error(setup.ranks) <= limit:
        return None
    size = len(setup.ranks)
    for one in range(size):
        for other in range(one + 1, size):
            ranks = list(setup.ranks)
            ranks[one], ranks[other] = ranks[other], ranks[one]
            if error(ranks) <= limit and _layer_agrees(replace(setup, ranks=ranks), limit):
                return one, other
    return None


def _layer_agrees(setup: Setup, limit: float) -> bool:
    """Whether every rank's own heads, features and summands in the first compared layer are the reference's."""
    first = replace(setup, layers=setup.which()[:1], sequence_parallel=False)
    _, findings = lockstep(first, torch.float64, limit, wide=torch.float64, always=True)
    return not any(finding.error > limit or finding.inside is not None for finding in findings)
