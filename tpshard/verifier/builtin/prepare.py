"""What is decided and loaded before a number is computed: prompt, layers, memory, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tpshard.errors import CorruptError, UsageError
from tpshard.verifier.backend import Canaries, EngineRun, JudgeTier, LoadRank, OpenedSet
from tpshard.verifier.builtin.backend import DecoderBackend
from tpshard.verifier.builtin.memory import BLOCK_BYTES, Load, estimate, load
from tpshard.verifier.builtin.store import Store
from tpshard.verifier.canaries import exact_canaries, native_canaries
from tpshard.verifier.families.configs import describe
from tpshard.verifier.families.family import Family
from tpshard.verifier.group import Processes
from tpshard.verifier.options import Say, VerifyOptions
from tpshard.verifier.progress import Progress, steps_of
from tpshard.verifier.prompt import another_model, chosen_layers, prompt_ids, prompt_of, require_one_each
from tpshard.verifier.ranks.open import (
    FileWeights,
    RankSet,
    needed,
    not_finite,
    open_shards,
    open_source,
    parameters,
    resident,
)
from tpshard.verifier.ranks.translate import translated
from tpshard.verifier.ranks.weights import Weights, move, replaced
from tpshard.verifier.report.verdict import Tier
from tpshard.verifier.tiers import exact, native
from tpshard.verifier.weights_tier import judge_weights

TAUGHT_BYTES = 1 << 30
"""A source that is not kept in memory, and is larger than this, is not read once a token to choose the next one."""


def _finite(weights: FileWeights, layers: Sequence[int]) -> None:
    bad = not_finite(weights, needed(weights, layers))
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


@dataclass(frozen=True)
class Case:
    """Shards and source, opened and found to be of one model, and all that was decided before a number is computed."""

    opened: RankSet
    setup: DecoderBackend
    load: Load
    tokens: int
    seed: int
    float32: bool
    taught: bool = True
    """Whether the tokens to decode are the reference's own choices, else they come from the seed."""


def open_both(shards: Path, source: Path, allow_pickle: bool) -> tuple[RankSet, Mapping[str, Any], FileWeights]:
    opened = open_shards(Path(shards))
    config, weights = open_source(Path(source), cast=opened.cast, allow_pickle=allow_pickle)
    return translated(opened, weights.names()), config, weights


def prepare(opened: OpenedSet, options: VerifyOptions) -> Case:
    """Find out whether shards and source are of one model, and decide prompt, layers and tokens."""
    found, weights, team = opened.shards, opened.source, opened.team
    family = describe(opened.config)
    if describe(found.config) != family:
        raise another_model(found, family.model_type)
    require_one_each(found, team)
    ids = prompt_of(opened.prompt, family.vocab, options.seed)
    setup = DecoderBackend(
        family=family,
        source=weights,
        ranks=found.ranks,
        team=team,
        prompt=ids.to(opened.device),
        device=opened.device,
        layers=chosen_layers(options.layers, family.layers),
        sequence_parallel=options.sequence_parallel,
    )
    return Case(
        opened=found,
        setup=setup,
        load=load(weights, found.ranks, setup.which(), team.here),
        tokens=_room(family, weights, ids.shape[1], options.tokens),
        seed=options.seed,
        float32=options.float32,
    )


def choose(case: Case, opened: OpenedSet, options: VerifyOptions) -> Case:
    """Decide what is kept in memory, the same on all ranks, and say how much that is."""
    setup = case.setup
    team, where, source = setup.team, setup.device, setup.source
    assert isinstance(source, FileWeights)
    apart = isinstance(team, Processes)
    batch, length = setup.prompt.shape
    need = estimate(
        setup.family,
        case.load,
        here=len(team.here),
        native="native" in options.computed,
        positions=batch * (length + case.tokens),
        widened=where.type == "cpu" and not apart,
        apart=apart,
    )
    streamed = any(team.run(lambda group: need.choose(options.stream, where, opened.sharing)))
    amount = need.streamed if streamed else need.resident
    how = "streaming all weights" if streamed else "keeping the shards" if apart else "keeping all weights"
    opened.say(f"{how}: about {amount / 1e9:.1f} GB of memory on {where.type} in each process (an estimate)")
    setup = replace(
        setup,
        block_bytes=BLOCK_BYTES if streamed or apart else None,
        keep_ranks=apart and not streamed,
    )
    taught = (not streamed and not apart) or case.load.source.nbytes <= TAUGHT_BYTES
    return replace(case, setup=setup, taught=taught)


def all_finite(case: Case) -> None:
    """The source is looked at by rank 0 alone, shards by the process that runs them."""
    setup = case.setup
    here = setup.team.here
    if 0 in here:
        assert isinstance(setup.source, FileWeights)
        _finite(setup.source, setup.which())
    for rank in here:
        _finite(case.opened.ranks[rank], setup.which())


def _kept_rank(case: Case, rank: int, dtype: torch.dtype | None, load_rank: LoadRank | None) -> Weights:
    """A rank's weights in memory on the device; by the caller's loader on a GPU, where that saves a copy."""
    weights, setup = case.opened.ranks[rank], case.setup
    names = needed(weights, setup.which())
    loaded = None
    # The loader takes whole files as they are, so not when some layers are enough, nor under an engine's names.
    native = case.opened.format == "native"
    if load_rank is not None and native and setup.device.type == "cuda" and setup.layers is None:
        loaded = load_rank(rank, setup.device)
    if loaded is None:
        return resident(weights, dtype, setup.device, names)
    return replaced(weights, {name: move(loaded[name], setup.device, dtype) for name in names})


def keep(case: Case, load_rank: LoadRank | None) -> Case:
    """The rank of this process loaded as it is stored, the others left in their files."""
    here = case.setup.team.here
    ranks = [_kept_rank(case, r, None, load_rank) if r in here else w for r, w in enumerate(case.setup.ranks)]
    return replace(case, setup=replace(case.setup, ranks=ranks))


def all_kept(case: Case, dtype: torch.dtype, load_rank: LoadRank | None) -> DecoderBackend:
    """Source and all ranks in memory: in `dtype` on a CPU, as stored on a GPU, where widening them costs nothing."""
    setup = case.setup
    source = setup.source
    assert isinstance(source, FileWeights)
    held = None if setup.device.type == "cuda" else dtype
    return replace(
        setup,
        source=resident(source, held, setup.device, needed(source, setup.which())),
        ranks=[_kept_rank(case, rank, held, load_rank) for rank in setup.team.here],
    )


def ready(opened: OpenedSet, options: VerifyOptions) -> EngineRun:
    """Decide prompt, layers, tokens and what is kept in memory, the same on all ranks."""
    team = opened.team
    case = team.together(lambda: prepare(opened, options))
    case = team.together(lambda: choose(case, opened, options))
    setup = case.setup
    return EngineRun(
        engine="tpshard",
        model_type=setup.family.model_type,
        prompt_tokens=setup.prompt.numel(),
        tokens=case.tokens,
        layers=setup.layers,
        begin=lambda: _begin(case, opened, options),
        streamed=setup.block_bytes is not None and not setup.keep_ranks,
        settings={"tokens_from": "the reference" if case.taught else "the seed"},
    )


def _begin(case: Case, opened: OpenedSet, options: VerifyOptions) -> Mapping[str, JudgeTier]:
    team = opened.team
    team.together(lambda: all_finite(case))
    kept = team.together(lambda: keep(case, opened.load_rank)) if case.setup.keep_ranks else case
    judges: dict[str, JudgeTier] = {
        name: partial(judge, _counting(kept, name, opened.say), opened.load_rank)
        for name, judge in (("exact", _exact), ("native", _native))
        if name in options.computed
    }
    if "weights" in options.computed:
        judges = {"weights": partial(judge_weights, case.setup, options.allow_not_run, opened.say), **judges}
    if options.reference == "transformers":
        from tpshard.verifier.builtin.against_transformers import against_transformers

        judges["transformers"] = lambda: (against_transformers(kept.setup, opened.path), None)
    return judges


def _counting(case: Case, tier: str, say: Say) -> Case:
    """The case, whose progress in a tier is told."""
    setup = case.setup
    progress = Progress(f"{tier} tier", steps_of(tier, len(setup.which()), len(setup.team.here)), say)
    return replace(case, setup=replace(setup, progress=progress))


def _exact(case: Case, load_rank: LoadRank | None) -> tuple[Tier, Canaries]:
    dtype = torch.float32 if case.float32 else torch.float64
    setup = case.setup if case.setup.block_bytes is not None else all_kept(case, dtype, load_rank)
    return exact(setup, float32=case.float32), partial(exact_canaries, setup, float32=case.float32)


def _native(case: Case, load_rank: LoadRank | None) -> tuple[Tier, Canaries]:
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
        chosen = setup.team.once(lambda: [step.tolist() for step in setup.teacher_tokens(case.tokens)])
        steps = [torch.tensor(step, device=setup.device) for step in chosen]
    else:
        more = prompt_ids(setup.family.vocab, case.seed + 1, len(setup.prompt), max(case.tokens, 1))
        steps = [setup.prompt, *(more[:, i : i + 1].to(setup.device) for i in range(case.tokens))]
    return native(setup, dtype, steps, setup.run_wide(steps)), partial(native_canaries, setup, dtype)
