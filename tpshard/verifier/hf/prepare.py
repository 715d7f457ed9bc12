"""What is decided before transformers' classes compute a number: prompt, layers, memory; and the tiers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from tpshard.errors import CorruptError, DifferentError, TpshardError, UnsupportedError
from tpshard.verifier.backend import Canaries, EngineRun, JudgeTier, OpenedSet
from tpshard.verifier.canaries import exact_canaries, native_canaries
from tpshard.verifier.families.configs import describe
from tpshard.verifier.hf.backend import TransformersBackend
from tpshard.verifier.hf.skeleton import Frame, covers, frame_of, model_config, same_model
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
    sides, tokens = opened.team.together(lambda: _prepare(opened, options))
    import transformers

    return EngineRun(
        engine="transformers",
        prompt_tokens=sides.prompt.numel(),
        tokens=tokens,
        layers=sides.compared,
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
        require_floats(weights, frame.stored(weights, buffers=False))
    need, free = _memory(opened, frame, ids.numel()), usable(device, opened.sharing)
    opened.say(f"transformers' own {_kind(config)} model: about {need / 1e9:.1f} GB of memory")
    require_memory(need, free, device, "--layers looks at fewer layers, --float32 --tier exact takes half")
    return TransformersBackend(opened.source, shards.ranks, opened.team, ids, device, frame), tokens


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


def _memory(opened: OpenedSet, frame: Frame, tokens: int) -> int:
    """Peak bytes: the source and the ranks that run here in float64, and the larger of them once more as it is read."""
    here = opened.team.here
    held = (opened.source, *(opened.shards.ranks[rank] for rank in here))
    logits = tokens * int(frame.config.vocab_size)
    return 8 * sum(elements(weights, frame.stored(weights)) for weights in held) + 8 * logits * (2 + len(here))


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
