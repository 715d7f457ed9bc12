"""The exact and the native tier over models of transformers, with the built-in decoder's criteria and findings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from tpshard.verifier.criteria import (
    EXACT_LIMIT,
    FLOAT32_LIMIT,
    NATIVE_LIMITS,
    first_difference,
    native_metrics,
    native_tier,
    no_tf32,
    place,
    relative,
    worst_ratio,
)
from tpshard.verifier.group import Group, Single
from tpshard.verifier.hf.overrides import Pinned
from tpshard.verifier.hf.parallel import is_experts
from tpshard.verifier.hf.probes import Feeder, Recorder, blocks, every_expert
from tpshard.verifier.hf.sides import Side, Sides
from tpshard.verifier.report.verdict import Finding, Place, Tier

Choices = Mapping[str, Sequence[Tensor]]
CHOICE = " (what it chooses from)"


def logits_of(sides: Sides, models: Mapping[int, Side], steps: list[Tensor], choices: Choices) -> list[Tensor]:
    """Every rank's logits of all steps; experts are chosen as the reference chose them."""
    return sides.team.run(lambda group: models[group.rank].run(group, steps, Pinned(choices)))


def errors_of(sides: Sides, models: Mapping[int, Side], pins: Pinned, wanted: Tensor) -> list[float]:
    """Every rank's end-to-end error on the prompt: of its logits, or of what a router chose from."""

    def work(group: Group) -> float:
        side, mine = models[group.rank], Pinned(pins.made)
        error = relative(side.run(group, [sides.prompt], mine), wanted)
        return max([error, *mine.differences(pins, side.routers).values()])

    return sides.team.run(work)


def compare_modules(
    sides: Sides, whole: Side, models: Mapping[int, Side], limit: float, *, always: bool = False
) -> tuple[list[float], list[Finding]]:
    """The ranks' models beside the unsharded one: end to end, and every module fed what the unsharded one took.

    Returns every rank's end-to-end error, and every rank's finding for each module in the order of computation.
    `always` looks also inside of modules that agree.
    """
    names = blocks(whole, sides.frame.layers)
    recorder, pins = Recorder(whole, names), Pinned()
    with recorder.looking():
        wanted = whole.run(Single(), [sides.prompt], pins)
    names = [name for name in recorder.records if name in set(names)]
    experts = [name for name in recorder.records if is_experts(whole.modules[name])]
    with whole.precision():
        reached = {name: every_expert(whole, recorder.records[name], name) for name in experts}

    def work(group: Group) -> list[Finding]:
        side, mine = models[group.rank], Pinned(pins.made)
        feeder = Feeder(whole, recorder.records, side, names, limit, always)
        with feeder.looking():
            side.run(group, [sides.prompt], mine)
        differences = mine.differences(pins, side.routers)
        chosen = [Finding(f"{name}{CHOICE}", group.rank, error) for name, error in differences.items()]
        more = [_experts(side, group, name, *reached[name]) for name in experts]
        return [*feeder.findings, *chosen, *more]

    errors = errors_of(sides, models, pins, wanted)
    findings = [finding for step in zip(*sides.team.run(work), strict=True) for finding in step]
    return errors, findings


def _experts(side: Side, group: Group, name: str, args: tuple[Tensor, ...], wanted: Tensor) -> Finding:
    given = tuple(x.to(side.dtype) if x.is_floating_point() else x for x in args)
    with side.precision():
        return Finding(f"{name} (every expert)", group.rank, relative(side.modules[name](*given), wanted))


def tables(sides: Sides, whole: Side, models: Mapping[int, Side]) -> list[Finding]:
    """Every row of the embedding and of learned positions, of which a prompt alone would look up a few."""

    def work(group: Group) -> list[Finding]:
        side, found = models[group.rank], []
        for name, module in side.modules.items():
            if isinstance(module, torch.nn.Embedding):
                rows, all_rows = module.weight, whole.modules[name].weight
                assert isinstance(all_rows, Tensor)
                cut = side.cuts.get(f"{name}.weight")
                first = 0 if cut is None else cut.first(group.rank)
                wanted = all_rows[first : first + len(rows)]
                found.append(Finding(f"{name} (every row)", group.rank, relative(rows[: len(wanted)], wanted)))
        return found

    return [finding for step in zip(*sides.team.run(work), strict=True) for finding in step]


def exact(sides: Sides, *, float32: bool = False) -> Tier:
    """Both sides in float64 (or float32): end to end, and every module fed the reference's input."""
    dtype = torch.float32 if float32 else torch.float64
    limit = FLOAT32_LIMIT if float32 else EXACT_LIMIT
    with no_tf32():
        whole, models = sides.reference(dtype), sides.here(dtype)
        looked_up = tables(sides, whole, models)
        errors, findings = compare_modules(sides, whole, models, limit)
    findings = looked_up + findings
    worst = max(findings, key=lambda finding: finding.error)
    first = first_difference(findings, limit)
    failed = first is not None or max(errors) > limit
    reason = None
    if failed:
        swapped = exchanged_ranks(sides, limit, [f.rank for f in looked_up if f.error > limit])
        if swapped is not None:
            reason = f"the files of ranks {swapped[0]} and {swapped[1]} are exchanged"
        elif first is None:
            reason = f"the logits differ by {max(errors):.1e} (limit {limit:.0e}), though every module alone agrees"
        else:
            reason = f"{first.module} of rank {first.rank} differs first, by {first.error:.1e} (limit {limit:.0e})"
    metrics = {"relative_error": max(errors), "worst_module_error": worst.error}
    routed = [finding.error for finding in findings if finding.module in whole.routers]
    if routed:
        metrics["router_error"] = max(routed)
    return Tier(
        name="exact",
        status="fail" if failed else "pass",
        thresholds={"relative_error": limit},
        metrics=metrics,
        worst=place(worst),
        first=first,
        findings=tuple(findings),
        reason=reason,
    )


def exchanged_ranks(sides: Sides, limit: float, suspects: Sequence[int]) -> tuple[int, int] | None:
    """The two suspects that, put in each other's place, make embedding, head and a layer equal the reference.

    None if none do. Suspects are ranks whose rows of the embedding are not theirs.
    """
    small = sides.with_layers(())
    wanted = small.reference(torch.float64).run(Single(), [sides.prompt], Pinned())
    for one, other in combinations(sorted(set(suspects)), 2):
        ranks = list(sides.ranks)
        ranks[one], ranks[other] = ranks[other], ranks[one]
        trial = replace(small, ranks=ranks)
        models = trial.here(torch.float64)
        logits = logits_of(trial, models, [sides.prompt], {})
        if all(relative(each, wanted) <= limit for each in logits) and _layer_agrees(
            replace(sides, ranks=ranks), limit
        ):
            return one, other
    return None


def _layer_agrees(sides: Sides, limit: float) -> bool:
    """Whether every rank's own heads, features and summands in the first compared layer are the reference's."""
    first = sides.with_layers(sides.frame.layers[:1])
    whole, models = first.reference(torch.float64), first.here(torch.float64)
    _, findings = compare_modules(first, whole, models, limit, always=True)
    return not any(finding.error > limit or finding.inside is not None for finding in findings)


def teach(sides: Sides, tokens: int) -> tuple[list[Tensor], Tensor, Choices]:
    """The prompt and greedy choices of the unsharded float64 model, one step each; its logits and its experts."""
    whole, pins = sides.reference(torch.float64), Pinned()
    steps = [sides.prompt]
    logits = whole.run(Single(), steps, pins, more=tokens)
    return steps, logits, pins.made


def native(sides: Sides, dtype: torch.dtype, tokens: int) -> Tier:
    """In the checkpoint's dtype, through the model's own KV cache: the sharded error against the unsharded one's."""
    steps, r, choices = teach(sides, tokens)
    n = sides.reference(dtype).run(Single(), steps, Pinned(choices))
    models = sides.here(dtype)
    ranks = [native_metrics(r, n, t, dtype) for t in logits_of(sides, models, steps, choices)]
    tier = native_tier(ranks, *_worst_module(sides, dtype, models))
    # The logits say nothing of these, since choices are pinned; a router is every rank's whole, and computes alike.
    limit = NATIVE_LIMITS["ratio"]
    off = next((f for f in tier.findings if f.module.endswith(CHOICE) and not f.error <= limit), None)
    if off is None or tier.status == "fail":
        return tier
    reason = f"{off.module} of rank {off.rank} is {off.error:.3g} times the unsharded model's error (limit {limit:g})"
    return replace(tier, status="fail", first=place(off), reason=reason)


def _worst_module(sides: Sides, dtype: torch.dtype, models: Mapping[int, Side]) -> tuple[Place, list[Finding]]:
    """The module whose error, fed float64's input, is largest against the unsharded model's; findings are ratios."""
    whole = sides.reference(torch.float64)
    single = sides.alone()
    _, unsharded = compare_modules(single, whole, {0: single.reference(dtype)}, math.inf)
    _, sharded = compare_modules(sides, whole, models, math.inf)
    return worst_ratio(unsharded, sharded, dtype)
