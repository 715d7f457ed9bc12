"""The exact and the native tier, over any backend."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tpshard.verifier.backend import Backend, Reference
from tpshard.verifier.criteria import (
    CHOICE,
    EXACT_LIMIT,
    FLOAT32_LIMIT,
    ROUNDINGS,
    distances,
    first_difference,
    no_tf32,
    place,
    relative,
)
from tpshard.verifier.options import silent
from tpshard.verifier.report.verdict import Tier
from tpshard.verifier.weights_tier import compare_weights


def exact(backend: Backend, steps: Sequence[Tensor] | None = None, *, float32: bool = False) -> Tier:
    """Both sides in float64 (or float32): through the KV cache, and every module fed the unsharded one's input.

    steps: of tokens; None: the prompt alone. Where every module alone agrees, the logits may differ by ROUNDINGS times
    what a rounding of each weight makes of the unsharded model's: outliers, as trained models have them, amplify what
    sums in another order leave. Float32 rounds more than its limit allows where weights lie far apart: a
    difference in shards of which every element is known to be the source's is inconclusive there.
    """
    steps = backend.steps if steps is None else steps
    dtype = torch.float32 if float32 else torch.float64
    limit = FLOAT32_LIMIT if float32 else EXACT_LIMIT
    with no_tf32():
        whole = backend.run(dtype, steps)
        decoded = backend.run_ranks(dtype, steps, whole.choices, lambda logits: relative(logits, whole.logits))
        prompt, modules = backend.feed(dtype, limit)
    error = max(*decoded, *prompt)
    worst = max(modules, key=lambda finding: finding.error)
    first = first_difference(modules, limit)
    metrics = {"relative_error": error, "worst_module_error": worst.error}
    if first is None and limit < error and not float32:
        metrics["rounding_error"] = relative(backend.disturbed().run(dtype, steps, whole.choices).logits, whole.logits)
        limit = max(limit, ROUNDINGS * metrics["rounding_error"])
    failed = first is not None or not error <= limit
    routers = {finding.module.removesuffix(CHOICE) for finding in modules if finding.module.endswith(CHOICE)}
    if routed := [finding.error for finding in modules if finding.module in routers]:
        metrics["router_error"] = max(routed)
    tier = Tier("exact", "pass", {"relative_error": limit}, metrics, place(worst), first, tuple(modules))
    if not failed:
        return tier
    status, reason = "fail", f"the logits differ by {error:.1e} (limit {limit:.0e}), though every module alone agrees"
    if first is not None:
        reason = f"{first.module} of rank {first.rank} differs first, by {first.error:.1e} (limit {limit:.0e})"
    if float32:
        weights = compare_weights(backend, (), silent)
        if weights.status == "pass" and not weights.by_running:
            status = "inconclusive"
            reason += "; every weight is the source's, so float32 rounds too much here: leave out --float32"
    return replace(tier, status=status, reason=reason)


def native(backend: Backend, dtype: torch.dtype, steps: Sequence[Tensor], wide: Reference) -> Tier:
    """In the checkpoint's dtype, through the KV cache: bit for bit what the source gives, cut and run the same way.

    Each side chooses for itself (experts). `wide` is the unsharded model in float64 on all steps: how far it is from
    both is reported, and judges nothing.
    """
    plain = backend.run(dtype, steps).logits
    held, cut = backend.same_form()

    def judge(logits: Tensor) -> tuple[str, dict[str, float]]:
        return digest(logits), distances(wide.logits, plain, logits)

    judged = held.run_ranks(dtype, steps, None, judge)
    wanted, again = (cut.run_ranks(dtype, steps, None, digest) for _ in range(2))
    differing = [rank for rank, (bits, _) in enumerate(judged) if bits != wanted[rank]]
    metrics = max((each for _, each in judged), key=lambda each: each["sharded_error"])
    tier = Tier("native", "pass", {"differences": 0}, {"differences": len(differing), **metrics})
    if not bool(plain.isfinite().all()):
        reason = f"the unsharded model itself gives values that are not finite in {str(dtype).removeprefix('torch.')}"
        return replace(tier, status="inconclusive", reason=reason)
    if wanted != again:
        reason = f"{unsteady(cut, dtype)} does not repeat itself on this device: the source gives other bits each time"
        return replace(tier, status="inconclusive", reason=reason)
    if not differing:
        return tier
    found = compare_weights(backend, (), silent)
    why = found.reason or "though every weight is the source's"
    reason = f"rank {differing[0]} gives other bits than the source that is cut the same way: {why}"
    return replace(tier, status="fail", reason=reason, first=found.first)


def digest(logits: Tensor) -> str:
    """The sha256 of all bits."""
    return hashlib.sha256(logits.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()


def unsteady(backend: Backend, dtype: torch.dtype) -> str:
    """The first module that gives other values when it is run again on the same input."""
    (_, one), (_, other) = (backend.feed(dtype, float("inf")) for _ in range(2))
    pairs = zip(one, other, strict=True)
    return next((first.module for first, second in pairs if first.error != second.error), "decoding")
