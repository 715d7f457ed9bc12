"""The exact and the native tier, over any backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from tpshard.verifier.backend import Backend, Reference
from tpshard.verifier.criteria import (
    CHOICE,
    EXACT_LIMIT,
    FLOAT32_LIMIT,
    NATIVE_LIMITS,
    first_difference,
    native_metrics,
    native_tier,
    no_tf32,
    place,
    worst_ratio,
)
from tpshard.verifier.report.verdict import Finding, Place, Tier


def exact(backend: Backend, *, float32: bool = False) -> Tier:
    """Both sides in float64 (or float32): end to end, and every module fed the reference's input."""
    dtype, limit = (torch.float32, FLOAT32_LIMIT) if float32 else (torch.float64, EXACT_LIMIT)
    with no_tf32():
        tables = backend.tables(torch.float64)
        errors, modules = backend.feed(dtype, limit, wide=dtype)
    findings = tables + modules
    worst = max(findings, key=lambda finding: finding.error)
    first = first_difference(findings, limit)
    failed = first is not None or max(errors) > limit
    metrics = {"relative_error": max(errors), "worst_module_error": worst.error}
    routers = {finding.module.removesuffix(CHOICE) for finding in modules if finding.module.endswith(CHOICE)}
    routed = [finding.error for finding in modules if finding.module in routers]
    if routed:
        metrics["router_error"] = max(routed)
    status, reason = ("fail", _reason(backend, tables, first, max(errors), limit)) if failed else ("pass", None)
    thresholds = {"relative_error": limit}
    return Tier("exact", status, thresholds, metrics, place(worst), first, tuple(findings), reason)


def _reason(backend: Backend, tables: Sequence[Finding], first: Place | None, error: float, limit: float) -> str:
    exchanged = exchanged_ranks(backend, limit, {finding.rank for finding in tables if finding.error > limit})
    if exchanged is not None:
        return f"the files of ranks {exchanged[0]} and {exchanged[1]} are exchanged"
    if first is None:
        return f"the logits differ by {error:.1e} (limit {limit:.0e}), though every module alone agrees"
    return f"{first.module} of rank {first.rank} differs first, by {first.error:.1e} (limit {limit:.0e})"


def exchanged_ranks(backend: Backend, limit: float, suspects: set[int]) -> tuple[int, int] | None:
    """The two ranks that, put in each other's place, make embedding, head and a layer equal the reference.

    None if none do. Suspects are ranks whose rows of the embedding are not theirs; one of the two must be among them.
    The layer tells whole files from an embedding alone, and by what is inside of its modules.
    """
    ends = backend.with_layers(0)
    wanted = ends.run(torch.float64, ends.steps) if suspects else None
    for one, other in combinations(range(len(backend.ranks)), 2):
        if wanted is None or not {one, other} & suspects:
            continue
        ranks = list(backend.ranks)
        ranks[one], ranks[other] = ranks[other], ranks[one]
        if max(ends.with_ranks(ranks).errors(torch.float64, wanted)) <= limit:
            layer = backend.with_layers(1).with_ranks(ranks)
            _, findings = layer.feed(torch.float64, limit, wide=torch.float64, always=True)
            if not any(finding.error > limit or finding.inside is not None for finding in findings):
                return one, other
    return None


def native(backend: Backend, dtype: torch.dtype, steps: Sequence[Tensor], wide: Reference) -> Tier:
    """In the checkpoint's dtype, through the KV cache: the sharded error against the unsharded one's.

    `wide` is the unsharded model in float64 on all steps.
    """
    r, n = wide.logits, backend.run(dtype, steps, wide.choices).logits
    ranks = backend.run_ranks(dtype, steps, wide.choices, lambda logits: native_metrics(r, n, logits, dtype))
    _, unsharded = backend.alone().feed(dtype, math.inf, wide=torch.float64)
    _, sharded = backend.feed(dtype, math.inf, wide=torch.float64)
    tier = native_tier(ranks, *worst_ratio(unsharded, sharded, dtype))
    # The logits say nothing of these, since choices are pinned; a router is every rank's whole, and computes alike.
    limit = NATIVE_LIMITS["ratio"]
    off = next((f for f in tier.findings if f.module.endswith(CHOICE) and not f.error <= limit), None)
    if off is None or tier.status == "fail":
        return tier
    reason = f"{off.module} of rank {off.rank} is {off.error:.3g} times the unsharded model's error (limit {limit:g})"
    return replace(tier, status="fail", first=place(off), reason=reason)
