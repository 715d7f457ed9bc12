"""One call from files to a verdict, whoever runs the model."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tpshard.errors import DifferentError, LocalIOError
from tpshard.verifier.builtin.engine import ready
from tpshard.verifier.builtin.prepare import open_both
from tpshard.verifier.engine import Asked, Judge, Opened, Ready
from tpshard.verifier.group import Processes, Threads
from tpshard.verifier.memory import pick_device
from tpshard.verifier.ranks.translate import require_replicas, stored_in
from tpshard.verifier.report.verdict import Canary, Tier, Verdict

_LESS = {
    "tpshard": "--stream needs less, --layers looks at fewer",
    "transformers": "--layers looks at fewer layers",
}
"""By engine, the way out where memory does not suffice."""


def verify(shards: Path, source: Path, *, team: Threads | Processes | None = None, **options: Any) -> Verdict:
    """Judge whether shards, run tensor-parallel, compute the function of the unsharded model.

    `team` runs the ranks: threads of this process by default. `options` are the fields of `Asked`.
    Raises UsageError, CorruptError, UnsupportedError or LocalIOError for what cannot be judged at all.
    """
    started = time.monotonic()
    asked = Asked(**options)
    where = pick_device(asked.device)
    group = team or Threads(1)
    found, config, weights = group.together(lambda: open_both(shards, source, asked.allow_pickle))
    opened = Opened(found, config, weights, Path(source), team or Threads(len(found.ranks)), where)
    from tpshard.verifier.hf import engine as library

    engine = opened.team.together(lambda: library.engine_of(asked.engine, config))
    try:
        engaged = (library.ready if engine == "transformers" else ready)(opened, asked)
        tiers, canaries, seconds = _tiers(engaged, opened, asked)
    except torch.OutOfMemoryError as error:
        raise LocalIOError(f"out of memory: {str(error).splitlines()[0]}", hint=_LESS[engine]) from None
    return _verdict(engaged, opened, asked, tiers, canaries, seconds, started)


def _tiers(engaged: Ready, opened: Opened, asked: Asked) -> tuple[list[Tier], list[Canary], dict[str, float]]:
    """All that was asked for, in order, with the seconds that each took."""
    team = opened.team
    done: list[Tier] = []
    canaries: list[Canary] = []
    seconds: dict[str, float] = {}
    if asked.first is not None:
        begun = time.monotonic()
        done.append(team.once(asked.first))
        seconds[done[0].name] = time.monotonic() - begun
    for name, judge in engaged.begin().items():
        begun = time.monotonic()
        asked.say(engaged.lines[name])
        try:
            tier, injected = _judged(name, opened, judge)
        except engaged.unsure as error:
            tier, injected = Tier(name, "inconclusive", reason=str(error)), []
        seconds[name] = time.monotonic() - begun
        done.append(tier)
        canaries += injected
    return done, canaries, seconds


def _judged(name: str, opened: Opened, judge: Judge) -> tuple[Tier, list[Canary]]:
    """A tier and its canaries: shards that cannot be run are different, a tier that is blind is inconclusive.

    A tier that saw a difference is not blind, and nothing is injected.
    """

    def work() -> tuple[Tier, list[Canary] | None]:
        if 0 in opened.team.here:
            require_replicas(opened.shards)
        tier, inject = judge()
        return tier, inject() if inject is not None and tier.status == "pass" else None

    try:
        tier, canaries = opened.team.together(work)
    except DifferentError as error:
        return Tier(name, "fail", reason=str(error)), []
    if canaries is None:
        return _named(tier, opened), []
    missed = [canary.name for canary in canaries if canary.status == "missed"]
    blind = not any(canary.status == "caught" for canary in canaries)
    if missed or blind:
        reason = "faults injected on purpose were not noticed: " + ", ".join(missed)
        if not missed:
            reason = "no fault could be injected that this tier would notice"
        tier = replace(tier, status="inconclusive", reason=reason)
    return tier, canaries


def _named(tier: Tier, opened: Opened) -> Tier:
    """The tier, whose reason names what differs first as it is stored as well, where that is another name."""
    first = tier.first
    if first is None or first.rank is None or not (tier.reason or "").startswith(first.module):
        return tier
    stored = stored_in(opened.shards, first.module, first.rank)
    return tier if stored is None else replace(tier, reason=f"{tier.reason}; it is stored in {stored}")


def _verdict(
    engaged: Ready,
    opened: Opened,
    asked: Asked,
    tiers: list[Tier],
    canaries: list[Canary],
    seconds: Mapping[str, float],
    started: float,
) -> Verdict:
    shards, team, device = opened.shards, opened.team, opened.device
    short = f"{engaged.tokens} tokens, not {asked.tokens}: the model has no more positions"
    return Verdict(
        model_type=engaged.model_type,
        tp=team.size,
        source=opened.path.name,
        shards=shards.directory.name,
        tiers=tuple(tiers),
        canaries=tuple(canaries),
        bytes_per_rank=tuple(rank.nbytes for rank in shards.ranks),
        warnings=(*shards.warnings, *([short] if engaged.tokens != asked.tokens else []), *engaged.warnings),
        settings={
            "engine": engaged.engine,
            "tiers": [tier.name for tier in tiers],
            "prompt_tokens": engaged.prompt_tokens,
            "tokens": engaged.tokens,
            "seed": asked.seed,
            "float32": asked.float32,
            "layers": None if asked.layers is None else list(engaged.layers or ()),
            "sequence_parallel": asked.sequence_parallel,
            "streamed": engaged.streamed,
            "processes": team.size if isinstance(team, Processes) else 1,
            **engaged.settings,
        },
        volatile={
            "seconds": round(time.monotonic() - started, 3),
            "tier_seconds": {name: round(value, 3) for name, value in seconds.items()},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "python": platform.python_version(),
            **engaged.volatile,
        },
    )
