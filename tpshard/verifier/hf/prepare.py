"""What is decided before transformers' classes compute a number: prompt, layers, memory; and the tiers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tpshard.errors import TpshardError, UnsupportedError, UsageError
from tpshard.verifier.backend import Canaries, EngineRun, JudgeTier, OpenedSet
from tpshard.verifier.canaries import exact_canaries, native_canaries
from tpshard.verifier.families.configs import describe
from tpshard.verifier.hf.backend import TransformersBackend
from tpshard.verifier.hf.config import covers, has_towers, model_config, same_model, text_config
from tpshard.verifier.hf.masked_backend import UNUSED, MaskedBackend
from tpshard.verifier.hf.pictures import pictures_for, with_placeholder
from tpshard.verifier.hf.skeleton import Frame, fill, frame_of, skeleton, skip_layers
from tpshard.verifier.memory import require_memory, usable
from tpshard.verifier.model_types import TRIED
from tpshard.verifier.options import VerifyOptions
from tpshard.verifier.prompt import decide, require_finite
from tpshard.verifier.ranks.open import elements, main_dtype, require_floats
from tpshard.verifier.report.verdict import Canary, Tier
from tpshard.verifier.tiers import exact, native
from tpshard.verifier.weights_tier import judge_weights

_UNTRIED = "transformers' {} model was never tried here, and it cannot be told whether the shards are wrong or we are"


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
    towers = has_towers(opened.config)
    (sides, tokens), alone = opened.team.together(lambda: _prepare(opened, options))
    import transformers

    return EngineRun(
        engine="transformers",
        prompt_tokens=sides.prompt.numel(),
        tokens=tokens,
        layers=sides.compared,
        begin=lambda: _begin(sides, tokens, opened, options),
        # The library's code may stumble over a rank's shapes, which must not pass.
        unsure=(UnsupportedError,),
        settings={"runs": "the whole model" if sides.frame.pictures else "the text model"} if towers else {},
        volatile={"transformers": str(transformers.__version__)},
        warnings=[alone] if alone else [],
    )


def _prepare(opened: OpenedSet, options: VerifyOptions) -> tuple[tuple[TransformersBackend, int], str]:
    """Both sides of the model with its towers where transformers can run that, else of the text model, and why."""
    alone = ""
    if has_towers(opened.config) and not opened.shards.stored:
        try:
            return _sides(opened, options, whole=True), ""
        except UsageError:
            raise
        except Exception as error:
            said = " ".join(str(error).split())[:200] or repr(error)
            alone = f"the model with its towers cannot be run here ({said}): its text model is run alone"
    return _sides(opened, options, whole=False), alone


def _sides(opened: OpenedSet, options: VerifyOptions, *, whole: bool) -> tuple[TransformersBackend, int]:
    shards, device = opened.shards, opened.device
    config = model_config(opened.config, whole=whole)
    # An engine's files may have the head apart that the source ties: `claims` knows.
    other = model_config(shards.config, whole=whole)
    same = same_model(config, other, ("tie_word_embeddings",) if shards.stored else ())
    with _unlike_others(config):
        text = text_config(config)
        frame = frame_of(config)
        depth, vocab = frame.depth, text.vocab_size
        positions = int(getattr(text, "max_position_embeddings", 0) or getattr(text, "max_seq_len", 0))
        ids, layers, tokens = decide(opened, options, same=same, vocab=vocab, layers=depth, positions=positions)
        frame = frame if layers is None else replace(frame, layers=layers)
        frame.require_described(opened.source, opened.config.get("architectures"))
        frame = replace(frame.of_source(opened.source), aside=shards.aside)
    for weights in (opened.source, *shards.ranks):
        require_floats(weights, frame.stored(weights))
    need, free = _memory(opened, frame, ids.numel()), usable(device, opened.sharing)
    opened.say(f"transformers' own {_kind(config)} model: about {need / 1e9:.1f} GB of memory")
    require_memory(need, free, device, "--layers looks at fewer layers, --float32 --tier exact takes half")
    if whole:
        frame, tokens = _with_pictures(opened, frame, ids, options.seed, tokens, positions)
        ids = frame.pictures.ids.to(device)  # type: ignore[union-attr]
    if frame.tried:
        return TransformersBackend(opened.source, shards.ranks, opened.team, ids, device, frame), tokens
    sparing = not shards.stored
    return MaskedBackend(opened.source, shards.ranks, opened.team, ids, device, frame, sparing=sparing), tokens


def _with_pictures(
    opened: OpenedSet, frame: Frame, ids: Tensor, seed: int, tokens: int, positions: int
) -> tuple[Frame, int]:
    """The frame with noise for pixels in a form that its class takes, and how many tokens may follow.

    UnsupportedError where none is known.
    """
    frame = replace(frame, config=with_placeholder(frame.config, frame.text.vocab_size))
    model: Any = skeleton(frame.config, torch.float32, opened.device)
    fill(model, frame, opened.source, torch.float32, opened.device)
    skip_layers(model, frame.layers)
    found = pictures_for(model, ids, seed, frame.text.vocab_size)
    if found is None:
        raise UnsupportedError("its class takes pictures in a form that is not known here")
    length = found.ids.shape[1]
    if positions and length > positions:
        raise UnsupportedError(
            "a picture takes more places than the model has positions", expected=positions, found=length
        )
    return replace(frame, pictures=found), min(tokens, positions - length) if positions else tokens


def _kind(config: Any) -> str:
    return type(config).__name__.removesuffix("Config")


@contextmanager
def _unlike_others(config: Any) -> Iterator[None]:
    """What code that expects classes like those which were tried stumbles over in another, as an UnsupportedError."""
    try:
        yield
    except (TpshardError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if config.model_type in TRIED:
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UnsupportedError(
            f"{_UNTRIED.format(_kind(config))}: {said}", hint="--tier bytes compares the files"
        ) from error


def _sure(sides: MaskedBackend, judge: Callable[[MaskedBackend], tuple[Tier, Canaries | None]]) -> JudgeTier:
    """A tier that runs a class which was never tried: a difference is the shards' if a right cut would make none."""
    config = sides.frame.config

    def judged() -> tuple[Tier, Canaries | None]:
        with _unlike_others(config):
            placed = sides.placed()
            tier, canaries = judge(placed)
            if tier.status == "fail" and tier.name == "exact":
                return _judged(placed, tier), None
        return tier, canaries if canaries is None else partial(_injected, config, canaries)

    return judged


def _judged(sides: MaskedBackend, tier: Tier) -> Tier:
    """A tier that found a difference: the shards', or of a cut that nobody has seen."""
    first = tier.first
    if first is not None and first.module.endswith(UNUSED):
        name = first.module.removesuffix(UNUSED)
        reason = f"rank {first.rank} holds more of {name} than its part of the model uses: what it goes with is cut, or"
        return replace(tier, reason=f"{reason} is cut elsewhere")
    if sides.certain(first):
        return tier
    where = first.module.removeprefix("input of ") if first else ""
    while where and not any(key.startswith(f"{where}.") for key in sides.shares):
        where = where.rpartition(".")[0]
    where = where or "a module"
    reason = f"{where} is cut in a way that nobody here has seen: {tier.reason}"
    return replace(tier, status="inconclusive", reason=reason)


def _injected(config: Any, canaries: Canaries) -> list[Canary]:
    with _unlike_others(config):
        return canaries()


def _memory(opened: OpenedSet, frame: Frame, tokens: int) -> int:
    """Peak bytes: the source and the ranks that run here in float64, and the larger of them once more as it is read."""
    here = opened.team.here
    # What is put in its place among zeros is as large as the whole.
    ranks = (opened.shards.ranks[rank] if frame.tried else opened.source for rank in here)
    held = (opened.source, *ranks)
    logits = tokens * int(frame.text.vocab_size)
    return 8 * sum(elements(weights, frame.stored(weights)) for weights in held) + 8 * logits * (2 + len(here))


def _begin(
    sides: TransformersBackend, tokens: int, opened: OpenedSet, options: VerifyOptions
) -> Mapping[str, JudgeTier]:
    sides.team.together(lambda: require_finite(opened, sides.frame.stored))
    float32 = options.float32

    taught = cache(lambda: sides.teach(tokens))

    def judge_exact(sides: TransformersBackend) -> tuple[Tier, Canaries]:
        tier = exact(sides.counting("exact", opened.say), taught()[0], float32=float32)
        return tier, partial(exact_canaries, sides, float32=float32)

    def judge_native(sides: TransformersBackend) -> tuple[Tier, Canaries | None]:
        rank = opened.shards.ranks[0]
        dtype = main_dtype(rank, sides.frame.stored(rank))
        tier = native(sides.counting("native", opened.say), dtype, *taught())
        return tier, partial(native_canaries, sides, dtype) if len(sides.ranks) > 1 else None

    def judge_elements() -> tuple[Tier, Canaries | None]:
        with _unlike_others(sides.frame.config):
            return judge_weights(sides, options.allow_not_run, opened.say)

    run = {"exact": judge_exact, "native": judge_native}
    judges: dict[str, JudgeTier] = {"weights": judge_elements}
    judges |= {
        name: _sure(sides, judge) if isinstance(sides, MaskedBackend) else partial(judge, sides)
        for name, judge in run.items()
    }
    return {name: judge for name, judge in judges.items() if name in options.computed}
