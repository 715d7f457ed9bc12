"""The built-in decoder as an engine: what it decides before a number is computed, and its tiers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from tpshard.verifier.builtin.canaries import exact_canaries, native_canaries
from tpshard.verifier.builtin.exact import exact
from tpshard.verifier.builtin.native import native, teacher_tokens
from tpshard.verifier.builtin.prepare import Case, all_finite, all_kept, choose, keep, prepare
from tpshard.verifier.engine import Canaries, EngineRun, Judge, LoadRank, OpenedSet
from tpshard.verifier.options import COMPUTED_TIERS, Say, VerifyOptions
from tpshard.verifier.progress import Progress, steps_of
from tpshard.verifier.prompt import prompt_ids
from tpshard.verifier.ranks.open import FileWeights, needed, parameters, resident
from tpshard.verifier.report.verdict import Tier


def ready(opened: OpenedSet, options: VerifyOptions) -> EngineRun:
    """Decide prompt, layers, tokens and what is kept in memory, the same on all ranks."""
    team = opened.team
    case = team.together(lambda: prepare(opened, options))
    case = team.together(lambda: choose(case, opened, options))
    setup = case.setup
    lines = {name: f"{name} tier" for name in COMPUTED_TIERS}
    return EngineRun(
        engine="tpshard",
        model_type=setup.family.model_type,
        prompt_tokens=setup.prompt.numel(),
        tokens=case.tokens,
        layers=setup.layers,
        begin=lambda: _begin(case, opened, options),
        lines={**lines, "transformers": "transformers as the reference"},
        streamed=setup.block_bytes is not None and not setup.keep_ranks,
        settings={"tokens_from": "the reference" if case.taught else "the seed"},
    )


def _begin(case: Case, opened: OpenedSet, options: VerifyOptions) -> Mapping[str, Judge]:
    team = opened.team
    team.together(lambda: all_finite(case))
    kept = team.together(lambda: keep(case, opened.load_rank)) if case.setup.keep_ranks else case
    judges: dict[str, Judge] = {
        name: partial(judge, _counting(kept, name, opened.say), opened.load_rank)
        for name, judge in zip(COMPUTED_TIERS, (_exact, _native), strict=True)
        if name in options.computed
    }
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
        chosen = setup.team.once(lambda: [step.tolist() for step in teacher_tokens(setup, case.tokens)])
        steps = [torch.tensor(step, device=setup.device) for step in chosen]
    else:
        more = prompt_ids(setup.family.vocab, case.seed + 1, len(setup.prompt), max(case.tokens, 1))
        steps = [setup.prompt, *(more[:, i : i + 1].to(setup.device) for i in range(case.tokens))]
    return native(setup, dtype, steps), partial(native_canaries, setup, dtype)
