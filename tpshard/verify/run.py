"""One call from files to a verdict."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tpshard.errors import DifferentError, LocalIOError, UsageError
from tpshard.verify.canaries import exact_canaries, native_canaries
from tpshard.verify.compare import exact
from tpshard.verify.engines import stored_in
from tpshard.verify.group import Processes, Threads
from tpshard.verify.machine import pick_device
from tpshard.verify.native import native, teacher_tokens
from tpshard.verify.prepare import (
    Case,
    LoadRank,
    all_finite,
    all_kept,
    choose,
    duration,
    keep,
    open_both,
    prepare,
    prompt_ids,
    replicas,
)
from tpshard.verify.shards import FileWeights, needed, parameters, resident
from tpshard.verify.verdict import Canary, Tier, Verdict

Judge = Callable[[Case, LoadRank | None], tuple[Tier, list[Canary]]]
TIERS = ("exact", "native")
REFERENCES = ("tpshard", "transformers")


def judged(
    name: str, team: Threads | Processes, work: Callable[[], tuple[Tier, list[Canary]]]
) -> tuple[Tier, list[Canary]]:
    """A tier and its canaries: shards that cannot be run are different, a tier that is blind is inconclusive."""
    try:
        tier, canaries = team.together(work)
    except DifferentError as error:
        return Tier(name, "fail", reason=str(error)), []
    missed = [canary.name for canary in canaries if canary.status == "missed"]
    blind = not any(canary.status == "caught" for canary in canaries)
    if tier.status == "pass" and (missed or blind):
        reason = "faults injected on purpose were not noticed: " + ", ".join(missed)
        if not missed:
            reason = "no fault could be injected that this tier would notice"
        tier = replace(tier, status="inconclusive", reason=reason)
    return tier, canaries


def _options(tiers: Sequence[str], reference: str) -> None:
    unknown = [tier for tier in tiers if tier not in TIERS]
    if unknown or not tiers:
        raise UsageError(f"unknown tier {unknown[0]!r}" if unknown else "no tier to run", expected=", ".join(TIERS))
    if reference not in REFERENCES:
        raise UsageError(f"unknown reference {reference!r}", expected=" or ".join(REFERENCES))


def verify(
    shards: Path,
    source: Path,
    *,
    tiers: Sequence[str] = TIERS,
    device: str = "auto",
    tokens: int = 32,
    seed: int = 0,
    float32: bool = False,
    layers: Sequence[int] | None = None,
    stream: bool | None = None,
    sequence_parallel: bool = False,
    reference: str = "tpshard",
    engine: str = "auto",
    prompt: Tensor | None = None,
    team: Threads | Processes | None = None,
    sharing: int = 1,
    load_rank: LoadRank | None = None,
    first: Callable[[], Tier] | None = None,
    allow_pickle: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Judge whether shards, run tensor-parallel, compute the function of the unsharded model.

    `team` runs the ranks: threads of this process by default; `sharing` says how many processes share a device.
    `prompt` [batch, length] replaces ids from the seed. `stream` None decides by memory. `load_rank` loads what is kept
    on a GPU. `first` is a tier that comes before ours, judged by rank 0 once all has been opened. `reference`
    "transformers" adds that library's own model as a reference. `engine` says whose code runs the ranks: tpshard's,
    transformers', or auto, which is transformers' where ours does not cover the model.
    Raises UsageError, CorruptError, UnsupportedError or LocalIOError for what cannot be judged at all.
    """
    started = time.monotonic()
    _options(tiers, reference)
    where = pick_device(device)
    group = team or Threads(1)
    opened, config, weights = group.together(lambda: open_both(shards, source, allow_pickle))
    team = team or Threads(len(opened.ranks))
    from tpshard.verify.hf import run as library

    if team.together(lambda: library.engine_of(engine, config)) == "transformers":
        return library.verify(
            opened,
            config,
            weights,
            team,
            where,
            tiers=tiers,
            tokens=tokens,
            seed=seed,
            float32=float32,
            layers=layers,
            stream=stream,
            sequence_parallel=sequence_parallel,
            prompt=prompt,
            sharing=sharing,
            first=first,
            say=say,
            names=(Path(source).name, Path(shards).name),
        )
    try:
        case = team.together(
            lambda: prepare(
                opened, config, weights, team, where, prompt, tokens, seed, float32, layers, sequence_parallel
            )
        )
        case = team.together(lambda: choose(case, tiers, stream, sharing, say))
        done, canaries, seconds = [], list[Canary](), {}
        if first is not None:
            begun = time.monotonic()
            done.append(team.once(first))
            seconds[done[0].name] = time.monotonic() - begun
        team.together(lambda: all_finite(case))
        if case.setup.keep_ranks:
            case = team.together(lambda: keep(case, load_rank))
        for name in [tier for tier in TIERS if tier in tiers]:
            begun = time.monotonic()
            say(f"{name} tier: about {duration(case.seconds[name])} (an estimate)")
            judge = _exact if name == "exact" else _native
            tier, birds = judged(name, team, partial(_sound, judge, case, load_rank))
            seconds[name] = time.monotonic() - begun
            done.append(tier)
            canaries += birds
        if reference == "transformers":
            from tpshard.verify.outside import against_transformers

            say("transformers as the reference")
            outside = partial(against_transformers, case.setup, Path(source))
            done.append(judged(reference, team, lambda: (outside(), canaries))[0])
    except torch.OutOfMemoryError as error:
        raise LocalIOError(
            f"out of memory: {str(error).splitlines()[0]}", hint="--stream needs less, --layers looks at fewer"
        ) from None
    setup = case.setup
    return Verdict(
        model_type=setup.family.model_type,
        tp=team.size,
        source=Path(source).name,
        shards=Path(shards).name,
        tiers=tuple(done),
        canaries=tuple(canaries),
        bytes_per_rank=tuple(rank.nbytes for rank in opened.ranks),
        warnings=(
            *opened.warnings,
            *([f"{case.tokens} tokens, not {tokens}: the model has no more positions"] if case.short else []),
        ),
        settings={
            "engine": "tpshard",
            "tiers": [tier.name for tier in done],
            "prompt_tokens": setup.prompt.numel(),
            "tokens": case.tokens,
            "tokens_from": "the reference" if case.taught else "the seed",
            "seed": seed,
            "float32": float32,
            "layers": None if setup.layers is None else list(setup.layers),
            "sequence_parallel": sequence_parallel,
            "streamed": setup.block_bytes is not None and not setup.keep_ranks,
            "processes": team.size if isinstance(team, Processes) else 1,
        },
        volatile={
            "seconds": round(time.monotonic() - started, 3),
            "tier_seconds": {name: round(value, 3) for name, value in seconds.items()},
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )


def _sound(judge: Judge, case: Case, load_rank: LoadRank | None) -> tuple[Tier, list[Canary]]:
    """A tier of ranks that do not contradict each other; what differs first is named as it is stored as well."""
    replicas(case)
    tier, canaries = judge(case, load_rank)
    first = tier.first
    if first is not None and first.rank is not None and (tier.reason or "").startswith(first.module):
        stored = stored_in(case.opened, first.module, first.rank)
        tier = tier if stored is None else replace(tier, reason=f"{tier.reason}; it is stored in {stored}")
    return tier, canaries


def _exact(case: Case, load_rank: LoadRank | None) -> tuple[Tier, list[Canary]]:
    dtype = torch.float32 if case.float32 else torch.float64
    setup = case.setup if case.setup.block_bytes is not None else all_kept(case, dtype, load_rank)
    return exact(setup, float32=case.float32), exact_canaries(setup, float32=case.float32)


def _native(case: Case, load_rank: LoadRank | None) -> tuple[Tier, list[Canary]]:
    setup, weights = case.setup, case.opened.ranks[0]
    dtype = Counter(weights.dtype(name) for name in parameters(weights)).most_common(1)[0][0]
    if setup.block_bytes is None:
        source = setup.source
        assert isinstance(source, FileWeights)
        setup = all_kept(case, dtype, load_rank)
        if setup.device.type == "cpu":
            wide = resident(source, torch.float64, setup.device, needed(source, setup.which()))
            setup = replace(setup, wide=wide)
    if case.taught:
        # One process chooses: on another kind of GPU, logits that are nearly equal may change places.
        chosen = setup.team.once(lambda: [step.tolist() for step in teacher_tokens(setup, case.tokens)])
        steps = [torch.tensor(step, device=setup.device) for step in chosen]
    else:
        more = prompt_ids(setup.family.vocab, case.seed + 1, len(setup.prompt), max(case.tokens, 1))
        steps = [setup.prompt, *(more[:, i : i + 1].to(setup.device) for i in range(case.tokens))]
    return native(setup, dtype, steps), native_canaries(setup, dtype)
