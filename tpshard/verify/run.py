"""One call from files to a verdict."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tpshard.errors import CorruptError, DifferentError, UsageError
from tpshard.verify.canaries import Canary, exact_canaries, native_canaries
from tpshard.verify.compare import Setup, Tier, exact
from tpshard.verify.families import describe
from tpshard.verify.family import Family
from tpshard.verify.group import Processes, Threads
from tpshard.verify.machine import BLOCK_BYTES, estimate, pick_device
from tpshard.verify.native import native, teacher_tokens
from tpshard.verify.shards import FileWeights, not_finite, open_shards, open_source, parameters, resident
from tpshard.verify.verdict import Verdict
from tpshard.verify.weights import Store, Weights

TIERS = ("exact", "native")
REFERENCES = ("tpshard", "transformers")
PROMPT, BATCH = 16, 2


def prompt_ids(vocab: int, seed: int, batch: int, length: int) -> Tensor:
    """Token ids [batch, length] from a seed, one from each of as many equal stretches of the vocabulary."""
    count = batch * length
    generator = torch.Generator().manual_seed(seed)
    within = torch.rand(count, generator=generator, dtype=torch.float64)
    order = torch.randperm(count, generator=generator)
    ids = ((order + within) * vocab / count).long().clamp(max=vocab - 1)
    return ids.view(batch, length)


def _layers(family: Family, layers: Sequence[int] | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    for i in layers:
        if not -family.layers <= i < family.layers:
            raise UsageError(f"there is no layer {i}", expected=f"{-family.layers} to {family.layers - 1}")
    return tuple(sorted({i % family.layers for i in layers}))


def _finite(weights: FileWeights) -> None:
    bad = not_finite(weights)
    if bad is not None:
        raise CorruptError("a weight is NaN or infinite", tensor=bad[0], path=bad[1])


def _room(family: Family, source: Weights, length: int, tokens: int) -> int:
    """How many of `tokens` fit after a prompt of `length`, in a model with learned positions."""
    if family.positions is None:
        return tokens
    store = Store(source, family, torch.float64, torch.device("cpu"))
    positions = store.matrix_shape(family.positions)[0] - family.position_offset
    if length > positions:
        raise UsageError("the prompt is longer than the model's positions", expected=positions, found=length)
    return min(tokens, positions - length)


def _judge(name: str, work: Callable[[], tuple[Tier, list[Canary]]]) -> tuple[Tier, list[Canary]]:
    """A tier and its canaries: shards that cannot be run are different, a tier that is blind is inconclusive."""
    try:
        tier, canaries = work()
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
    prompt: Tensor | None = None,
    team: Threads | Processes | None = None,
    allow_pickle: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Judge whether shards, run tensor-parallel, compute the function of the unsharded model.

    `team` runs the ranks: threads of this process by default. `prompt` [batch, length] replaces ids from the seed.
    `stream` None decides by memory. `reference` "transformers" adds that library's own model as a reference.
    Raises UsageError, CorruptError, UnsupportedError or LocalIOError for what cannot be judged at all.
    """
    started = time.monotonic()
    _options(tiers, reference)
    where = pick_device(device)
    opened = open_shards(Path(shards))
    config, weights = open_source(Path(source), cast=opened.cast, allow_pickle=allow_pickle)
    family = describe(config)
    if describe(opened.config) != family:
        raise UsageError(
            "the shards are of another model than the source",
            path=opened.directory,
            expected=f"the {family.model_type} that {source} holds",
            found=f"a {opened.config.get('model_type')} of other sizes or settings",
            hint="give the model that was split with --source",
        )
    team = team or Threads(len(opened.ranks))
    if team.size != len(opened.ranks):
        raise UsageError("one process per rank is needed", expected=len(opened.ranks), found=team.size)
    mine = range(team.size) if isinstance(team, Threads) else range(team.group.rank, team.group.rank + 1)
    ids = prompt_ids(family.vocab, seed, BATCH, PROMPT) if prompt is None else prompt
    fitting = _room(family, weights, ids.shape[1], tokens)
    positions = ids.shape[0] * (ids.shape[1] + fitting)
    need = estimate(
        family, weights, opened.ranks, here=len(mine), native="native" in tiers, positions=positions
    )
    streamed = need.choose(stream, where)
    amount = need.streamed if streamed else need.resident
    say(f"{'streaming the weights' if streamed else 'keeping all weights'}: about {amount / 1e9:.1f} GB of memory")
    for file in (weights, *(opened.ranks[rank] for rank in mine)):
        _finite(file)
    setup = Setup(
        family=family,
        source=weights,
        ranks=opened.ranks,
        team=team,
        prompt=ids.to(where),
        device=where,
        layers=_layers(family, layers),
        block_bytes=BLOCK_BYTES if streamed else None,
        sequence_parallel=sequence_parallel,
    )
    done, canaries, seconds = [], [], {}
    for name in [tier for tier in TIERS if tier in tiers]:
        begun = time.monotonic()
        say(f"{name} tier")
        if name == "exact":
            tier, birds = _judge(name, lambda: _exact(setup, mine, float32))
        else:
            tier, birds = _judge(name, lambda: _native(setup, mine, fitting, seed))
        seconds[name] = time.monotonic() - begun
        done.append(tier)
        canaries += birds
    if reference == "transformers":
        from tpshard.verify.outside import against_transformers

        done.append(_judge(reference, lambda: (against_transformers(setup, Path(source)), canaries))[0])
    short = [] if fitting == tokens else [f"{fitting} tokens, not {tokens}: the model has no more positions"]
    return Verdict(
        model_type=family.model_type,
        tp=team.size,
        source=Path(source).name,
        shards=Path(shards).name,
        tiers=tuple(done),
        canaries=tuple(canaries),
        bytes_per_rank=tuple(rank.nbytes for rank in opened.ranks),
        warnings=(*opened.warnings, *short),
        settings={
            "tiers": [tier.name for tier in done],
            "prompt_tokens": ids.numel(),
            "tokens": fitting,
            "seed": seed,
            "float32": float32,
            "layers": None if setup.layers is None else list(setup.layers),
            "sequence_parallel": sequence_parallel,
            "streamed": streamed,
        },
        volatile={
            "seconds": round(time.monotonic() - started, 3),
            "tier_seconds": {name: round(value, 3) for name, value in seconds.items()},
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )


def _kept(setup: Setup, mine: range, dtype: torch.dtype) -> list[Weights]:
    """The ranks that this process runs, loaded; the others stay in their files."""
    return [resident(w, dtype, setup.device) if rank in mine else w for rank, w in enumerate(setup.ranks)]


def _exact(setup: Setup, mine: range, float32: bool) -> tuple[Tier, list[Canary]]:
    dtype = torch.float32 if float32 else torch.float64
    if setup.block_bytes is None:
        source = resident(setup.source, dtype, setup.device)
        setup = replace(setup, source=source, ranks=_kept(setup, mine, dtype))
    with torch.no_grad():
        return exact(setup, float32=float32), exact_canaries(setup, float32=float32)


def _native(setup: Setup, mine: range, tokens: int, seed: int) -> tuple[Tier, list[Canary]]:
    first = setup.ranks[mine[0]]
    assert isinstance(first, FileWeights)
    dtype = Counter(first.dtype(name) for name in parameters(first)).most_common(1)[0][0]
    with torch.no_grad():
        if setup.block_bytes is None:
            setup = replace(
                setup,
                source=resident(setup.source, dtype, setup.device),
                wide=resident(setup.source, torch.float64, setup.device),
                ranks=_kept(setup, mine, dtype),
            )
            steps = teacher_tokens(setup, tokens)
        else:
            # To choose tokens, the reference would have to be read once for each; so they come from the seed.
            more = prompt_ids(setup.family.vocab, seed + 1, len(setup.prompt), tokens) if tokens else setup.prompt
            steps = [setup.prompt, *(more[:, i : i + 1].to(setup.device) for i in range(tokens))]
        return native(setup, dtype, steps), native_canaries(setup, dtype)
