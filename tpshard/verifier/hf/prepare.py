"""What is decided before transformers' classes compute a number: prompt, layers, memory; and the tiers."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from tpshard.errors import TpshardError, UnsupportedError, UsageError
from tpshard.storage.tensor_names import numbered
from tpshard.verifier.backend import Canaries, EngineRun, JudgeTier, OpenedSet
from tpshard.verifier.canaries import exact_canaries, native_canaries
from tpshard.verifier.families.configs import describe
from tpshard.verifier.hf import streamed
from tpshard.verifier.hf.backend import TransformersBackend
from tpshard.verifier.hf.config import covers, has_towers, model_config, parted, same_model, text_config, uncovered
from tpshard.verifier.hf.masked_backend import UNUSED, MaskedBackend
from tpshard.verifier.hf.own_code import adapters_of
from tpshard.verifier.hf.pictures import pictures_for, with_placeholder
from tpshard.verifier.hf.skeleton import Frame, fill, frame_of, skeleton, skip_layers
from tpshard.verifier.hf.streamed import TooLargeError
from tpshard.verifier.memory import require_memory, return_what_is_freed, usable
from tpshard.verifier.model_types import TRIED
from tpshard.verifier.options import VerifyOptions
from tpshard.verifier.prompt import decide, require_finite
from tpshard.verifier.ranks.open import elements, main_dtype, require_floats
from tpshard.verifier.report.verdict import Canary, Tier
from tpshard.verifier.tiers import exact, native
from tpshard.verifier.weights_tier import judge_weights, with_idle_said

_UNTRIED = "transformers' {} model was never tried here, and it cannot be told whether the shards are wrong or we are"
_LESS = "--layers looks at fewer layers, --float32 --tier exact takes half"


def engine_of(asked: str, config: Mapping[str, Any]) -> str:
    """Whose code runs this model: our decoder's where it covers it, unless another was asked for.

    UnsupportedError where auto finds neither.
    """
    if asked != "auto":
        return asked
    try:
        describe(config)
    except UnsupportedError as error:
        if not covers(config):
            raise uncovered(config) or error from None
        return "transformers"
    return "tpshard"


def ready(opened: OpenedSet, options: VerifyOptions) -> EngineRun:
    """Decide prompt, layers, number of tokens and what is kept in memory, and say how much that is where a tier runs.

    UnsupportedError for what only the built-in decoder does, cutting the sequence, and for a class that cannot be
    streamed. UsageError where shards and source are of different models; LocalIOError where memory cannot suffice.
    """
    if options.sequence_parallel:
        raise UnsupportedError("--sequence-parallel is not for --engine transformers", hint="leave it out")
    towers, team = has_towers(opened.config), opened.team
    if options.stream:
        return_what_is_freed()
    (sides, tokens), alone = team.together(lambda: _prepare(opened, options))
    streams = any(team.run(lambda group: _streams(opened, sides, tokens, options.stream)))
    if streams:
        return_what_is_freed()
    if {"exact", "native"} & set(options.computed):
        sides = team.together(lambda: _kept(opened, sides, tokens, streams))
    import transformers

    adapters = adapters_of(sides.frame.config)
    at_once = f"adapters ({', '.join(adapters)}) are run added to their matrices, all at once" if adapters else ""
    return EngineRun(
        engine="transformers",
        prompt_tokens=sides.prompt.numel(),
        tokens=tokens,
        layers=sides.compared,
        streamed=streams,
        begin=lambda: _begin(sides, tokens, opened, options),
        # The library's code may stumble over a rank's shapes, which must not pass.
        unsure=(UnsupportedError,),
        settings={"runs": "the whole model" if sides.frame.pictures else "the text model"} if towers else {},
        volatile={"transformers": str(transformers.__version__)},
        warnings=[each for each in (alone, at_once) if each],
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
            if not parted(opened.config):
                raise
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
        for weights in (opened.source, *shards.ranks):
            require_floats(weights, frame.stored(weights, numbers=False))
        frame, source, ranks = frame.converted(opened.source, shards.ranks)
        frame = replace(frame.of_source(source), aside=shards.aside)
    backend: TransformersBackend = TransformersBackend(source, ranks, opened.team, ids, device, frame)
    if not frame.tried:
        backend = MaskedBackend(source, ranks, opened.team, ids, device, frame, sparing=not shards.stored)
    if whole:
        most = largest_block(frame) if _streams(opened, backend, tokens, options.stream) else None
        require_memory(_need(opened, backend, tokens, most), usable(device, opened.sharing), device, _LESS)
        frame, tokens = _with_pictures(backend, options.seed, tokens, positions, most)
        ids = frame.pictures.ids.to(device)  # type: ignore[union-attr]
        backend = replace(backend, frame=frame, prompt=ids)
    return backend, tokens


def _with_pictures(
    sides: TransformersBackend, seed: int, tokens: int, positions: int, most: int | None
) -> tuple[Frame, int]:
    """The frame with noise for pixels in a form that its class takes, and how many tokens may follow.

    UnsupportedError where none is known.
    """
    frame = replace(sides.frame, config=with_placeholder(sides.frame.config, sides.frame.text.vocab_size))
    model: Any = skeleton(frame.config, torch.float32, sides.device)
    fill(model, frame, sides.source, torch.float32, sides.device, None, most)
    skip_layers(model, frame.layers)
    found = pictures_for(model, sides.prompt, seed, frame.text.vocab_size)
    if found is None:
        raise UnsupportedError("its class takes pictures in a form that is not known here")
    length = found.ids.shape[1]
    if positions and length > positions:
        raise UnsupportedError(
            "a picture takes more places than the model has positions", expected=positions, found=length
        )
    return replace(frame, pictures=found), min(tokens, positions - length) if positions else tokens


def _streams(opened: OpenedSet, sides: TransformersBackend, tokens: int, asked: bool | None) -> bool:
    """Whether weights are streamed: as asked, or because memory asks for it."""
    if asked is not None:
        return asked
    return _need(opened, sides, tokens, None) > usable(sides.device, opened.sharing)


def _kept(opened: OpenedSet, sides: TransformersBackend, tokens: int, streams: bool) -> TransformersBackend:
    """The sides, with all weights in memory or streamed. LocalIOError where that is too much.

    UnsupportedError where the class takes more at once than streaming reads.
    """
    most = largest_block(sides.frame) if streams else None
    need, own = _need(opened, sides, tokens, most), f"transformers' own {_kind(sides.frame.config)} model"
    how = own if most is None else f"streaming the weights of {own}"
    opened.say(f"{how}: about {need / 1e9:.1f} GB of memory")
    if tokens and streams:
        opened.say(f"each of {tokens} tokens reads all weights again; --tokens 0 runs the prompt alone")
    hint = "free memory, or use another machine" if streams else f"--stream needs less, {_LESS}"
    require_memory(need, usable(sides.device, opened.sharing), sides.device, hint)
    sides = replace(sides, most=most)
    for layer in _looked_at(sides.frame, most) if most is not None else ():
        one = sides.only(layer)
        one = one if sides.frame.pictures else replace(one, prompt=sides.prompt[:1, :1])
        try:
            one.run(torch.float64, one.steps)
        except TooLargeError:
            raise
        except Exception:  # is met again, and told, by the tiers
            pass
    return sides


def largest_block(frame: Frame) -> int:
    """The most elements that an operation of a class that is streamed reads at once: a matrix, or an expert's.

    Of a table it reads rows, or blocks of them.
    """
    shapes = [shape for key, shape in frame.shapes.items() if frame.needed(key) and not frame.is_table(key)]
    return max(streamed.BLOCK_BYTES // 8, *(math.prod(shape[1:] if len(shape) == 3 else shape) for shape in shapes))


def _looked_at(frame: Frame, most: int) -> list[int]:
    """A layer of each kind that holds more than an operation reads at once."""
    kinds: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for key, shape in frame.shapes.items():
        if (layer := frame.layer(key)) is not None and layer in frame.layers and math.prod(shape) > most:
            kinds.setdefault(layer, []).append((numbered(key)[0], shape))
    return list({tuple(kind): layer for layer, kind in reversed(kinds.items())}.values())


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


def _need(opened: OpenedSet, sides: TransformersBackend, tokens: int, most: int | None) -> int:
    """Peak bytes. In memory: the source and the ranks that run here in float64, and the larger of them once more as it
    is read. Streamed: what an operation reads, makes of it and finds of its gradients."""
    beside = _logits(opened, sides, tokens) + (0 if sides.frame.tried else _activations(sides))
    if most is not None:
        return 3 * 8 * most + beside
    # What is put in its place among zeros is as large as the whole.
    ranks = (opened.shards.ranks[rank] if sides.frame.tried else opened.source for rank in opened.team.here)
    held = (opened.source, *ranks)
    return 8 * sum(elements(weights, sides.frame.stored(weights)) for weights in held) + beside


def _activations(sides: TransformersBackend) -> int:
    """Bytes of what each matrix takes and gives for the prompt: recorded, and twice in what gradients are made of."""
    shapes = (shape for key, shape in sides.frame.shapes.items() if sides.frame.needed(key) and len(shape) > 1)
    return 3 * 8 * sides.prompt.numel() * sum(sum(shape[-2:]) for shape in shapes)


def _logits(opened: OpenedSet, sides: TransformersBackend, tokens: int) -> int:
    """Bytes of all logits, and of what is made of them to compare them."""
    batch, length = sides.prompt.shape
    vocab = sides.frame.shapes[sides.frame.head][0]
    return 8 * batch * (length + tokens) * vocab * (len(opened.team.here) + 8)


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
    asked = {name: judge for name, judge in judges.items() if name in options.computed}
    return with_idle_said(asked, sides, options.allow_not_run)
