"""What is decided before transformers' classes compute a number: prompt, layers, memory; and the tiers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from tpshard.errors import CorruptError, LocalIOError, UnsupportedError, UsageError
from tpshard.verifier.backend import Canaries, EngineRun, JudgeTier, OpenedSet
from tpshard.verifier.canaries import exact_canaries, native_canaries
from tpshard.verifier.families.configs import describe
from tpshard.verifier.hf.backend import TransformersBackend
from tpshard.verifier.hf.skeleton import covers, frame_of, library_version, model_config, quiet, same_model
from tpshard.verifier.memory import FILL, available
from tpshard.verifier.options import VerifyOptions
from tpshard.verifier.progress import Progress, steps_of
from tpshard.verifier.prompt import another_model, chosen_layers, prompt_of, require_one_each
from tpshard.verifier.ranks.open import FileWeights, elements, not_finite, require_floats
from tpshard.verifier.report.verdict import Tier, layer_of
from tpshard.verifier.tiers import exact, native
from tpshard.verifier.weights_tier import judge_weights


def engine_of(asked: str, config: Mapping[str, Any]) -> str:
    """Whose code runs this model: our decoder's where it covers it, unless another was asked for.

    UnsupportedError where auto finds neither.
    """
    if asked != "auto":
        return asked
    try:
        describe(config)
    except UnsupportedError:
        if not covers(config):
            raise
        return "transformers"
    return "tpshard"


def ready(opened: OpenedSet, options: VerifyOptions) -> EngineRun:
    """Decide prompt, layers and number of tokens, and say what memory it will take.

    UnsupportedError for what only the built-in decoder does: streaming, and cutting the sequence. UsageError where
    shards and source are of different models; LocalIOError where memory cannot suffice.
    """
    for wanted, option in ((options.stream, "--stream"), (options.sequence_parallel, "--sequence-parallel")):
        if wanted:
            raise UnsupportedError(f"{option} is not for --engine transformers", hint="leave it out")
    quiet()
    sides, tokens = opened.team.together(lambda: _prepare(opened, options))
    left = unused(sides)
    return EngineRun(
        engine="transformers",
        model_type=str(opened.config.get("model_type")),
        prompt_tokens=sides.prompt.numel(),
        tokens=tokens,
        layers=sides.frame.layers,
        begin=lambda: _begin(sides, tokens, opened, options),
        warnings=(f"{len(left)} tensors that transformers' model does not use were not run: {left[0]}, …",)
        if left
        else (),
        # The library's code may stumble over a rank's shapes, which must not pass.
        unsure=(UnsupportedError,),
        volatile={"transformers": library_version()},
    )


def _prepare(opened: OpenedSet, options: VerifyOptions) -> tuple[TransformersBackend, int]:
    found, team, device = opened.shards, opened.team, opened.device
    read, other = model_config(opened.config), model_config(found.config)
    if not same_model(read, other):
        raise another_model(found, opened.config.get("model_type"))
    require_one_each(found, team)
    ids = prompt_of(opened.prompt, read.vocab_size, options.seed)
    positions = int(getattr(read, "max_position_embeddings", 0) or getattr(read, "max_seq_len", 0) or ids.shape[1])
    if ids.shape[1] > positions:
        raise UsageError("the prompt is longer than the model's positions", expected=positions, found=ids.shape[1])
    frame = frame_of(read, chosen_layers(options.layers, read.num_hidden_layers))
    sides = TransformersBackend(frame, opened.source, found.ranks, team, ids.to(device), device)
    _floats(sides)
    need = _memory(sides)
    free = int(available(device) * FILL) // opened.sharing
    kind = type(read).__name__.removesuffix("Config")
    opened.say(f"transformers' own {kind} model: about {need / 1e9:.1f} GB of memory")
    if need > free:
        raise LocalIOError(
            "there is not enough memory for this",
            expected=f"{need:,} bytes",
            found=f"{free:,} bytes to use on {device}",
            hint="--layers looks at fewer layers, --float32 --tier exact takes half",
        )
    return sides, min(options.tokens, positions - ids.shape[1])


def _begin(
    sides: TransformersBackend, tokens: int, opened: OpenedSet, options: VerifyOptions
) -> Mapping[str, JudgeTier]:
    sides.team.together(lambda: all_finite(sides))

    def counting(tier: str) -> TransformersBackend:
        steps = steps_of(tier, len(sides.frame.layers), len(sides.team.here))
        return replace(sides, progress=Progress(f"{tier} tier", steps, opened.say))

    judges: dict[str, JudgeTier] = {
        "weights": partial(judge_weights, sides, options.allow_not_run, opened.say),
        "exact": lambda: (
            exact(counting("exact"), float32=options.float32),
            partial(exact_canaries, sides, float32=options.float32),
        ),
        "native": lambda: _native(counting("native"), tokens),
    }
    return {name: judge for name, judge in judges.items() if name in options.computed}


def _used(sides: TransformersBackend, weights: FileWeights) -> list[str]:
    """The stored tensors that make the model's parameters."""
    return sorted({name for recipe in sides.frame.recipes(weights).values() for name in recipe.stored})


def _floats(sides: TransformersBackend) -> None:
    for weights in (sides.source, *sides.ranks):
        assert isinstance(weights, FileWeights)
        require_floats(weights, _used(sides, weights))


def _memory(sides: TransformersBackend) -> int:
    """Peak bytes: the source and the ranks that run here in float64, and the larger of them once more as it is read."""
    assert isinstance(sides.source, FileWeights)
    total = elements(sides.source, _used(sides, sides.source))
    for rank in sides.team.here:
        weights = sides.ranks[rank]
        assert isinstance(weights, FileWeights)
        total += elements(weights, _used(sides, weights))
    logits = sides.prompt.numel() * int(sides.frame.config.vocab_size)
    return 8 * total + 8 * logits * (2 + len(sides.team.here))


def all_finite(sides: TransformersBackend) -> None:
    """CorruptError where a tensor that is used is NaN or infinite; rank 0 looks at the source."""
    here = sides.team.here
    for weights in (*([sides.source] if 0 in here else []), *(sides.ranks[rank] for rank in here)):
        assert isinstance(weights, FileWeights)
        bad = not_finite(weights, _used(sides, weights))
        if bad is not None:
            raise CorruptError("a weight is NaN or infinite", tensor=bad[0], path=bad[1])


def unused(sides: TransformersBackend) -> list[str]:
    """Stored weights of the source that transformers' model has no place for, and that nothing here looks at."""
    assert isinstance(sides.source, FileWeights)
    used = set(_used(sides, sides.source))
    layers = sides.frame.layers
    return [
        name
        for name in sides.source.names()
        if name not in used and name.endswith((".weight", ".bias")) and layer_of(name) in (None, *layers)
    ]


def _native(sides: TransformersBackend, tokens: int) -> tuple[Tier, Canaries]:
    """The native tier in the dtype of most of the shards' tensors, and its canaries."""
    rank = sides.ranks[0]
    assert isinstance(rank, FileWeights)
    dtype = Counter(rank.dtype(name) for name in _used(sides, rank)).most_common(1)[0][0]
    steps, wide = sides.teach(tokens)
    return native(sides, dtype, steps, wide), partial(native_canaries, sides, dtype)
