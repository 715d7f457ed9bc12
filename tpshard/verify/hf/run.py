"""From opened files to a verdict by the model's own class in transformers."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tpshard.errors import CorruptError, LocalIOError, UnsupportedError, UsageError
from tpshard.verify.engines import require_replicas
from tpshard.verify.families import describe
from tpshard.verify.group import Processes, Threads
from tpshard.verify.hf.canaries import exact_canaries, native_canaries
from tpshard.verify.hf.model import covers, frame_of, library_version, model_config, quiet, same_model
from tpshard.verify.hf.sides import Sides
from tpshard.verify.hf.tiers import exact, native
from tpshard.verify.machine import FILL, available
from tpshard.verify.prepare import another_model, chosen_layers, prompt_of, require_one_each
from tpshard.verify.run import TIERS, judged
from tpshard.verify.shards import FileWeights, ShardSet, elements, not_finite, require_floats
from tpshard.verify.verdict import Canary, Tier, Verdict, layer_of

ENGINES = ("auto", "tpshard", "transformers")


def engine_of(asked: str, config: Mapping[str, Any]) -> str:
    """Whose code runs this model: our decoder's where it covers it, unless another was asked for.

    UnsupportedError where auto finds neither.
    """
    if asked not in ENGINES:
        raise UsageError(f"unknown engine {asked!r}", expected=", ".join(ENGINES))
    if asked != "auto":
        return asked
    try:
        describe(config)
    except UnsupportedError:
        if not covers(config):
            raise
        return "transformers"
    return "tpshard"


@dataclass(frozen=True)
class Case:
    """What is compared, and what was decided before a number is computed."""

    opened: ShardSet
    sides: Sides
    tokens: int
    short: bool
    seed: int
    float32: bool


def prepare(
    opened: ShardSet,
    config: Mapping[str, Any],
    source: FileWeights,
    team: Threads | Processes,
    device: torch.device,
    prompt: Tensor | None,
    tokens: int,
    seed: int,
    float32: bool,
    layers: Sequence[int] | None,
    sharing: int,
    say: Callable[[str], None],
) -> Case:
    """Decide prompt, layers and number of tokens, and say what memory it will take.

    UsageError where shards and source are of different models; LocalIOError where memory cannot suffice.
    """
    read, other = model_config(config), model_config(opened.config)
    if not same_model(read, other):
        raise another_model(opened, config.get("model_type"))
    require_one_each(opened, team)
    ids = prompt_of(prompt, read.vocab_size, seed)
    positions = int(getattr(read, "max_position_embeddings", 0) or getattr(read, "max_seq_len", 0) or ids.shape[1])
    if ids.shape[1] > positions:
        raise UsageError("the prompt is longer than the model's positions", expected=positions, found=ids.shape[1])
    fitting = min(tokens, positions - ids.shape[1])
    frame = frame_of(read, chosen_layers(layers, read.num_hidden_layers))
    sides = Sides(frame, source, opened.ranks, team, ids.to(device), device)
    _floats(sides)
    need = _memory(sides)
    free = int(available(device) * FILL) // sharing
    say(f"transformers' own {type(read).__name__.removesuffix('Config')} model: about {need / 1e9:.1f} GB of memory")
    if need > free:
        raise LocalIOError(
            "there is not enough memory for this",
            expected=f"{need:,} bytes",
            found=f"{free:,} bytes to use on {device}",
            hint="--layers looks at fewer layers, --float32 --tier exact takes half",
        )
    return Case(opened, sides, fitting, fitting != tokens, seed, float32)


def _used(sides: Sides, weights: FileWeights) -> list[str]:
    """The stored tensors that make the model's parameters."""
    return sorted({name for recipe in sides.frame.recipes(weights).values() for name in recipe.stored})


def _floats(sides: Sides) -> None:
    for weights in (sides.source, *sides.ranks):
        assert isinstance(weights, FileWeights)
        require_floats(weights, _used(sides, weights))


def _memory(sides: Sides) -> int:
    """Peak bytes: the source and the ranks that run here in float64, and the larger of them once more as it is read."""
    assert isinstance(sides.source, FileWeights)
    total = elements(sides.source, _used(sides, sides.source))
    for rank in sides.team.here:
        weights = sides.ranks[rank]
        assert isinstance(weights, FileWeights)
        total += elements(weights, _used(sides, weights))
    logits = sides.prompt.numel() * int(sides.frame.config.vocab_size)
    return 8 * total + 8 * logits * (2 + len(sides.team.here))


def all_finite(case: Case) -> None:
    """CorruptError where a tensor that is used is NaN or infinite; rank 0 looks at the source."""
    sides = case.sides
    here = sides.team.here
    for weights in (*([sides.source] if 0 in here else []), *(sides.ranks[rank] for rank in here)):
        assert isinstance(weights, FileWeights)
        bad = not_finite(weights, _used(sides, weights))
        if bad is not None:
            raise CorruptError("a weight is NaN or infinite", tensor=bad[0], path=bad[1])


def unused(case: Case) -> list[str]:
    """Stored weights of the source that transformers' model has no place for, and that nothing here looks at."""
    sides = case.sides
    assert isinstance(sides.source, FileWeights)
    used = set(_used(sides, sides.source))
    layers = sides.frame.layers
    return [
        name
        for name in sides.source.names()
        if name not in used and name.endswith((".weight", ".bias")) and layer_of(name) in (None, *layers)
    ]


def _replicas(case: Case) -> None:
    if 0 in case.sides.team.here:
        require_replicas(case.opened)


def _judge_exact(case: Case) -> tuple[Tier, list[Canary]]:
    """The exact tier and its canaries."""
    _replicas(case)
    return exact(case.sides, float32=case.float32), exact_canaries(case.sides, float32=case.float32)


def _judge_native(case: Case) -> tuple[Tier, list[Canary]]:
    """The native tier in the dtype of most of the shards' tensors, and its canaries."""
    _replicas(case)
    rank = case.sides.ranks[0]
    assert isinstance(rank, FileWeights)
    dtype = Counter(rank.dtype(name) for name in _used(case.sides, rank)).most_common(1)[0][0]
    return native(case.sides, dtype, case.tokens), native_canaries(case.sides, dtype)


def verify(
    opened: ShardSet,
    config: Mapping[str, Any],
    source: FileWeights,
    team: Threads | Processes,
    device: torch.device,
    *,
    tiers: Sequence[str],
    tokens: int,
    seed: int,
    float32: bool,
    layers: Sequence[int] | None,
    stream: bool | None,
    sequence_parallel: bool,
    prompt: Tensor | None,
    sharing: int,
    first: Callable[[], Tier] | None,
    say: Callable[[str], None],
    names: tuple[str, str],
) -> Verdict:
    """Judge opened shards by transformers' own class; `names` are those of source and shards in the verdict.

    UnsupportedError for what only the built-in decoder does: streaming, and cutting the sequence.
    """
    for asked, option in ((stream, "--stream"), (sequence_parallel, "--sequence-parallel")):
        if asked:
            raise UnsupportedError(f"{option} is not for --engine transformers", hint="leave it out")
    started = time.monotonic()
    quiet()
    case = team.together(
        lambda: prepare(opened, config, source, team, device, prompt, tokens, seed, float32, layers, sharing, say)
    )
    try:
        done, canaries, seconds = _tiers(case, tiers, first, say)
    except torch.OutOfMemoryError as error:
        hint = "--layers looks at fewer layers"
        raise LocalIOError(f"out of memory: {str(error).splitlines()[0]}", hint=hint) from None
    left = unused(case)
    warnings = [*opened.warnings]
    if case.short:
        warnings.append(f"{case.tokens} tokens, not {tokens}: the model has no more positions")
    if left:
        warnings.append(f"{len(left)} tensors that transformers' model does not use were not run: {left[0]}, …")
    return Verdict(
        model_type=str(config.get("model_type")),
        tp=team.size,
        source=names[0],
        shards=names[1],
        tiers=tuple(done),
        canaries=tuple(canaries),
        bytes_per_rank=tuple(rank.nbytes for rank in opened.ranks),
        warnings=tuple(warnings),
        settings={
            "engine": "transformers",
            "tiers": [tier.name for tier in done],
            "prompt_tokens": case.sides.prompt.numel(),
            "tokens": case.tokens,
            "seed": seed,
            "float32": float32,
            "layers": None if layers is None else list(case.sides.frame.layers),
            "sequence_parallel": False,
            "streamed": False,
            "processes": team.size if isinstance(team, Processes) else 1,
        },
        volatile={
            "seconds": round(time.monotonic() - started, 3),
            "tier_seconds": {name: round(value, 3) for name, value in seconds.items()},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "transformers": library_version(),
            "python": platform.python_version(),
        },
    )


def _tiers(
    case: Case, tiers: Sequence[str], first: Callable[[], Tier] | None, say: Callable[[str], None]
) -> tuple[list[Tier], list[Canary], dict[str, float]]:
    """All that was asked for, in order, with the seconds that each took."""
    team = case.sides.team
    done: list[Tier] = []
    canaries: list[Canary] = []
    seconds: dict[str, float] = {}
    if first is not None:
        begun = time.monotonic()
        done.append(team.once(first))
        seconds[done[0].name] = time.monotonic() - begun
    team.together(lambda: all_finite(case))
    for name in [tier for tier in TIERS if tier in tiers]:
        begun = time.monotonic()
        say(f"{name} tier")
        judge = _judge_exact if name == "exact" else _judge_native
        try:
            tier, birds = judged(name, team, partial(judge, case))
        except UnsupportedError as error:
            # The library's code stumbled over these shapes: that says nothing of the shards, and must not pass.
            tier, birds = Tier(name, "inconclusive", reason=str(error)), []
        seconds[name] = time.monotonic() - begun
        done.append(tier)
        canaries += birds
    return done, canaries, seconds
