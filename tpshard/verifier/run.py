"""One call from files to a verdict, whoever runs the model."""

import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tpshard.errors import DifferentError, LocalIOError
from tpshard.verifier.backend import EngineRun, JudgeTier, OpenedSet
from tpshard.verifier.builtin.prepare import open_both, ready
from tpshard.verifier.group import Processes, Threads
from tpshard.verifier.memory import pick_device
from tpshard.verifier.options import Say, VerifyOptions, silent
from tpshard.verifier.ranks.claims import false_claims
from tpshard.verifier.ranks.stages import injected
from tpshard.verifier.ranks.translate import require_replicas, stored_in
from tpshard.verifier.report.verdict import Canary, Tier, Verdict

_LESS = "--stream needs less, --layers looks at fewer"
"""The way out where memory does not suffice."""
Judged = tuple[list[Tier], list[Canary], dict[str, float]]
"""Tiers, their canaries, and the seconds that each tier took."""


def verify(
    options: VerifyOptions,
    source: Path,
    *,
    prompt: Tensor | None = None,
    team: Threads | Processes | None = None,
    sharing: int = 1,
    first: Callable[[], Tier] | None = None,
    say: Say = silent,
) -> Verdict:
    """Judge whether shards, run tensor-parallel, compute the function of the unsharded model at `source`.

    `team` runs the ranks: threads of this process by default. `first` is a tier that comes before ours, judged by rank
    0 once all has been opened. The rest is as in `OpenedSet`.
    Raises UsageError, CorruptError, UnsupportedError or LocalIOError for what cannot be judged at all.
    """
    started = time.monotonic()
    where = pick_device(options.device)
    group = team or Threads(1)
    shards, config, weights = group.together(lambda: open_both(options, source))
    team = team or Threads(len(shards.ranks))
    opened = OpenedSet(shards, config, weights, source, team, where, prompt, sharing, say)
    from tpshard.verifier.hf import prepare as library

    engine = team.together(lambda: library.engine_of(options.engine, config))
    try:
        run = (library.ready if engine == "transformers" else ready)(opened, options)
        judged = _tiers(run, opened, first)
    except torch.OutOfMemoryError as error:
        raise LocalIOError(f"out of memory: {str(error).splitlines()[0]}", hint=_LESS) from None
    return _verdict(run, opened, options, judged, started)


def _tiers(run: EngineRun, opened: OpenedSet, first: Callable[[], Tier] | None) -> Judged:
    """All that was asked for, in order."""
    team = opened.team
    done, canaries, seconds = list[Tier](), list[Canary](), dict[str, float]()
    if first is not None:
        begun = time.monotonic()
        done.append(team.once(first))
        seconds[done[0].name] = time.monotonic() - begun
    judges = run.begin()
    wrong = team.together(lambda: false_claims(opened.shards, opened.config, opened.source.as_stored))
    for name, judge in judges.items():
        begun = time.monotonic()
        opened.say("transformers as the reference" if name == "transformers" else f"{name} tier")
        if wrong:  # an engine that believes it computes something else, whatever the tensors are
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            tier, injected = Tier(name, "fail", reason=f"{wrong[0]}{more}"), list[Canary]()
        else:
            tier, injected = _judged(name, opened, judge, run)
        seconds[name] = time.monotonic() - begun
        done.append(tier)
        canaries += injected
    return done, canaries, seconds


def _judged(name: str, opened: OpenedSet, judge: JudgeTier, run: EngineRun) -> tuple[Tier, list[Canary]]:
    """A tier and its canaries: shards that cannot be run are different, a tier that is blind is inconclusive.

    A tier that saw a difference is not blind, and nothing is injected.
    """

    def work() -> tuple[Tier, list[Canary] | None]:
        if 0 in opened.team.here:
            require_replicas(opened.shards)
        tier, inject = judge()
        if inject is None or tier.status != "pass":
            return tier, None
        return tier, [*(_in_stages(opened) if name == "weights" else ()), *inject()]

    try:
        tier, canaries = opened.team.together(work)
    except DifferentError as error:
        return Tier(name, "fail", reason=str(error)), []
    except run.unsure as error:
        return Tier(name, "inconclusive", reason=str(error)), []
    if canaries is None:
        return _named(tier, opened), []
    if missed := ", ".join(canary.name for canary in canaries if canary.status == "missed"):
        reason = f"faults injected on purpose were not noticed: {missed}"
        tier = replace(tier, status="inconclusive", reason=reason)
    elif not any(canary.status == "caught" for canary in canaries):
        reason = "no fault could be injected that this tier would notice"
        tier = replace(tier, status="inconclusive", reason=reason)
    return tier, canaries


def _in_stages(opened: OpenedSet) -> list[Canary]:
    """The canaries of a pipeline: what lies on another stage than it must."""
    shards = opened.shards
    seen = injected(shards.on_stages, shards.stages, opened.config, shards.copies) if shards.stages else {}
    return [
        Canary(name, "weights", "caught" if caught else "missed", float(not caught)) for name, caught in seen.items()
    ]


def _named(tier: Tier, opened: OpenedSet) -> Tier:
    """The tier, whose reason names what differs first as it is stored as well, where that is another name."""
    first = tier.first
    if first is None or first.rank is None or not (tier.reason or "").startswith(first.module):
        return tier
    stored = stored_in(opened.shards, first.module, first.rank)
    return tier if stored is None else replace(tier, reason=f"{tier.reason}; it is stored in {stored}")


def _verdict(run: EngineRun, opened: OpenedSet, options: VerifyOptions, judged: Judged, started: float) -> Verdict:
    shards, team, device = opened.shards, opened.team, opened.device
    tiers, canaries, seconds = judged
    short = f"{run.tokens} tokens, not {options.tokens}: the model has no more positions"
    return Verdict(
        model_type=str(opened.config.get("model_type")),
        tp=team.size,
        source=opened.path.name,
        shards=shards.directory.name,
        tiers=tuple(tiers),
        canaries=tuple(canaries),
        bytes_per_rank=tuple(rank.nbytes for rank in shards.ranks),
        warnings=(*shards.warnings, *run.warnings, *([short] if run.tokens != options.tokens else [])),
        settings={
            "engine": run.engine,
            "tiers": [tier.name for tier in tiers],
            "prompt_tokens": run.prompt_tokens,
            "tokens": run.tokens,
            "seed": options.seed,
            "float32": options.float32,
            "layers": None if options.layers is None else list(run.layers or ()),
            "sequence_parallel": options.sequence_parallel,
            **({"pp": len(shards.stages)} if shards.stages else {}),
            "streamed": run.streamed,
            "processes": team.size if isinstance(team, Processes) else 1,
            **run.settings,
        },
        volatile={
            "seconds": round(time.monotonic() - started, 3),
            "tier_seconds": {name: round(value, 3) for name, value in seconds.items()},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "python": platform.python_version(),
            **run.volatile,
        },
    )
