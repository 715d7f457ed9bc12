"""What is decided before transformers' classes compute a number: prompt, layers, memory; and the tiers."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from tpshard.errors import CorruptError, DifferentError, TpshardError, UnsupportedError
from tpshard.storage.tensor_names import numbered
from tpshard.verifier.backend import Canaries, EngineRun, JudgeTier, OpenedSet
from tpshard.verifier.canaries import exact_canaries, native_canaries
from tpshard.verifier.families.configs import describe
from tpshard.verifier.hf import streamed
from tpshard.verifier.hf.backend import TransformersBackend
from tpshard.verifier.hf.skeleton import Frame, covers, frame_of, model_config, same_model
from tpshard.verifier.hf.streamed import TooLargeError
from tpshard.verifier.memory import require_memory, usable
from tpshard.verifier.model_types import TRIED
from tpshard.verifier.options import VerifyOptions
from tpshard.verifier.prompt import decide, require_finite
from tpshard.verifier.ranks.open import elements, main_dtype, require_floats
from tpshard.verifier.report.verdict import Canary, Tier, layer_of
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
    """Decide prompt, layers, number of tokens and what is kept in memory, and say how much that is.

    UnsupportedError for what only the built-in decoder does, cutting the sequence, and for a class that cannot be
    streamed. UsageError where shards and source are of different models; LocalIOError where memory cannot suffice.
    """
    if options.sequence_parallel:
        raise UnsupportedError("--sequence-parallel is not for --engine transformers", hint="leave it out")
    team = opened.team
    sides, tokens = team.together(lambda: _prepare(opened, options))
    streams = any(team.run(lambda group: _streams(opened, sides, tokens, options.stream)))
    sides = team.together(lambda: _kept(opened, sides, tokens, streams))
    import transformers

    return EngineRun(
        engine="transformers",
        prompt_tokens=sides.prompt.numel(),
        tokens=tokens,
        layers=sides.compared,
        streamed=streams,
        begin=lambda: _begin(sides, tokens, opened, options),
        # The library's code may stumble over a rank's shapes, which must not pass.
        unsure=(UnsupportedError,),
        volatile={"transformers": str(transformers.__version__)},
    )


def _prepare(opened: OpenedSet, options: VerifyOptions) -> tuple[TransformersBackend, int]:
    shards, device = opened.shards, opened.device
    config = model_config(opened.config)
    # An engine's files may have the head apart that the source ties: `claims` knows.
    same = same_model(config, model_config(shards.config), ("tie_word_embeddings",) if shards.stored else ())
    with _unlike_others(config):
        depth, vocab = config.num_hidden_layers, config.vocab_size
        positions = int(getattr(config, "max_position_embeddings", 0) or getattr(config, "max_seq_len", 0))
        ids, layers, tokens = decide(opened, options, same=same, vocab=vocab, layers=depth, positions=positions)
        frame = frame_of(config, layers)
        frame.require_described(opened.source, opened.config.get("architectures"))
        frame = replace(frame.of_source(opened.source), aside=shards.aside)
    for weights in (opened.source, *shards.ranks):
        require_floats(weights, frame.stored(weights))
    return TransformersBackend(opened.source, shards.ranks, opened.team, ids, device, frame), tokens


def _streams(opened: OpenedSet, sides: TransformersBackend, tokens: int, asked: bool | None) -> bool:
    """Whether weights are streamed: as asked, or because memory asks for it."""
    return _resident(opened, sides, tokens) > usable(sides.device, opened.sharing) if asked is None else asked


def _kept(opened: OpenedSet, sides: TransformersBackend, tokens: int, streams: bool) -> TransformersBackend:
    """The sides, with all weights in memory or streamed. LocalIOError where that is too much.

    UnsupportedError where the class takes more at once than streaming reads.
    """
    most = largest_block(sides.frame) if streams else None
    need = 3 * 8 * most + _logits(opened, sides, tokens) if most is not None else _resident(opened, sides, tokens)
    how = f"streaming the weights of transformers' own {_kind(sides.frame.config)} model"
    if most is None:
        how = f"transformers' own {_kind(sides.frame.config)} model"
    opened.say(f"{how}: about {need / 1e9:.1f} GB of memory")
    if tokens and streams:
        opened.say(f"each of {tokens} tokens reads all weights again; --tokens 0 runs the prompt alone")
    less = "--layers looks at fewer layers, --float32 --tier exact takes half"
    hint = "free memory, or use another machine" if streams else f"--stream needs less, {less}"
    require_memory(need, usable(sides.device, opened.sharing), sides.device, hint)
    sides = replace(sides, most=most)
    for layer in _looked_at(sides.frame, most) if most is not None else ():
        one = replace(sides.only(layer), prompt=sides.prompt[:1, :1])
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
    return max(streamed.BLOCK_BYTES // 8, *(math.prod(shape[1:] if len(shape) > 2 else shape) for shape in shapes))


def _looked_at(frame: Frame, most: int) -> list[int]:
    """A layer of each kind that holds more than an operation reads at once."""
    kinds: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for key, shape in frame.shapes.items():
        if (layer := layer_of(key)) is not None and layer in frame.layers and math.prod(shape) > most:
            kinds.setdefault(layer, []).append((numbered(key)[0], shape))
    return list({tuple(kind): layer for layer, kind in reversed(kinds.items())}.values())


def _kind(config: Any) -> str:
    return type(config).__name__.removesuffix("Config")


@contextmanager
def _unlike_others(config: Any, *, differing: bool = True) -> Iterator[None]:
    """What code that expects classes like those which were tried stumbles over in another, as an UnsupportedError.

    differing: whether a difference, too, may be of the class and not of the files.
    """
    ours = (DifferentError, CorruptError) if differing else ()
    try:
        yield
    except Exception as error:
        foreseen = isinstance(error, (TpshardError, OSError, torch.OutOfMemoryError)) and not isinstance(error, ours)
        if foreseen or config.model_type in TRIED:
            raise
        said = str(error) if isinstance(error, TpshardError) else f"{type(error).__name__}: {error}"
        what = f"{_UNTRIED.format(_kind(config))}: {' '.join(said.split())[:300]}"
        raise UnsupportedError(what, hint="--tier bytes compares the files") from error


def _unsure(config: Any, judge: JudgeTier) -> JudgeTier:
    """A tier that runs a class which was never tried: equal is equal, but a difference may be of how it was run."""

    def judged() -> tuple[Tier, Canaries | None]:
        with _unlike_others(config):
            tier, canaries = judge()
        if tier.status == "fail":
            reason = f"{tier.reason}; {_UNTRIED.format(_kind(config))}"
            return replace(tier, status="inconclusive", reason=reason), None
        return tier, canaries if canaries is None else partial(_injected, config, canaries)

    return judged


def _injected(config: Any, canaries: Canaries) -> list[Canary]:
    with _unlike_others(config):
        return canaries()


def _resident(opened: OpenedSet, sides: TransformersBackend, tokens: int) -> int:
    """Peak bytes: the source and the ranks that run here in float64, and the larger of them once more as it is read."""
    held = (opened.source, *(opened.shards.ranks[rank] for rank in opened.team.here))
    kept = sum(elements(weights, sides.frame.stored(weights)) for weights in held)
    return 8 * kept + _logits(opened, sides, tokens)


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

    def judge_exact() -> tuple[Tier, Canaries]:
        tier = exact(sides.counting("exact", opened.say), taught()[0], float32=float32)
        return tier, partial(exact_canaries, sides, float32=float32)

    def judge_native() -> tuple[Tier, Canaries | None]:
        rank = opened.shards.ranks[0]
        dtype = main_dtype(rank, sides.frame.stored(rank))
        tier = native(sides.counting("native", opened.say), dtype, *taught())
        return tier, partial(native_canaries, sides, dtype) if len(sides.ranks) > 1 else None

    def judge_elements() -> tuple[Tier, Canaries | None]:
        with _unlike_others(sides.frame.config, differing=False):
            return judge_weights(sides, options.allow_not_run, opened.say)

    judges: dict[str, JudgeTier] = {"weights": judge_elements, "exact": judge_exact, "native": judge_native}
    if not sides.frame.tried:
        judges |= {name: _unsure(sides.frame.config, judges[name]) for name in ("exact", "native")}
    return {name: judge for name, judge in judges.items() if name in options.computed}
