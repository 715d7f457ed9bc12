"""What counts as equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import itemgetter

import torch
from torch import Tensor

from tpshard.verifier.report.verdict import Finding, Place, Tier, layer_of

EXACT_LIMIT, FLOAT32_LIMIT = 1e-12, 1e-5
NATIVE_LIMITS = {"ratio": 1.5, "token_ratio": 3.0, "kl_ratio": 2.0}
CHOICE = " (what it chooses from)"
"""Ends the name of a finding that is not of what a module gives."""


def place(finding: Finding) -> Place:
    return Place(finding.inside or finding.module, layer_of(finding.module), finding.rank, finding.error)


def first_difference(findings: Sequence[Finding], limit: float) -> Place | None:
    """The first module above the limit; of its ranks, one that differs inside itself before one that merely sums."""
    for i, finding in enumerate(findings):
        if finding.error > limit:
            same = [f for f in findings[i:] if f.module == finding.module and f.error > limit]
            return place(next((f for f in same if f.inside is not None), finding))
    return None


class no_tf32:
    """Keep float32 products at full precision on GPUs, for the time of a `with`."""

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self.before)


def native_metrics(reference: Tensor, unsharded: Tensor, sharded: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """How far T is from R, measured by how far N is; logits [B, S, vocab] of all positions.

    A floor of one rounding of the dtype, relative to R, keeps noise that happens to be small from being a yardstick.
    Per token, N's error counts as no less than its mean over tokens.
    """
    r, n, t = (x.double() for x in (reference, unsharded, sharded))
    if not bool(t.isfinite().all()):
        return {"ratio": math.inf, "token_ratio": math.inf, "kl_ratio": math.inf}
    floor = float(torch.finfo(dtype).eps) / 4
    n_error, t_error = (n - r).norm(), (t - r).norm()
    token_n, token_t, token_r = ((x).norm(dim=-1) for x in (n - r, t - r, r))
    typical = token_n.pow(2).mean().sqrt()
    token_ratio = token_t / (torch.maximum(token_n, typical) + floor * token_r)
    log_r, log_n, log_t = (x.log_softmax(-1) for x in (r, n, t))
    kl_n, kl_t = ((log_r.exp() * (log_r - x)).sum(-1).mean() for x in (log_n, log_t))
    kl_floor = floor**2 * float(r.pow(2).mean())
    return {
        "ratio": float(t_error / (n_error + floor * r.norm())),
        "token_ratio": float(token_ratio.max()),
        "worst_token": float(token_ratio.flatten().argmax() % token_ratio.shape[1]),
        "kl_ratio": float(kl_t / (kl_n.clamp(min=0) + kl_floor)),
        "sharded_error": float(t_error / r.norm()),
        "unsharded_error": float(n_error / r.norm()),
        "kl_sharded": float(kl_t),
        "kl_unsharded": float(kl_n),
        "top1_sharded": float((r.argmax(-1) == t.argmax(-1)).double().mean()),
        "top1_unsharded": float((r.argmax(-1) == n.argmax(-1)).double().mean()),
    }


def native_tier(ranks: Sequence[Mapping[str, float]], worst: Place, findings: Sequence[Finding]) -> Tier:
    """The tier that every rank's metrics, and the worst module of all, come to."""
    failed = next((metrics for metrics in ranks if exceeded(metrics)), None)
    shown, status, reason = failed or max(ranks, key=itemgetter("ratio")), "pass", None
    if failed:
        status, name = "fail", exceeded(shown)[0]
        reason = f"{name} is {shown[name]:.3g} (limit {NATIVE_LIMITS[name]:g}); worst: {worst.module}"
        reason += f" of rank {worst.rank}, {worst.error:.3g} times the unsharded model's error"
    return Tier("native", status, NATIVE_LIMITS, shown, worst, findings=tuple(findings), reason=reason)


def worst_ratio(
    unsharded: Sequence[Finding], sharded: Sequence[Finding], dtype: torch.dtype
) -> tuple[Place, list[Finding]]:
    """The sharded modules' errors as multiples of the unsharded ones', and the place of the largest."""
    floor = float(torch.finfo(dtype).eps) / 4
    yardstick = {finding.module: finding.error + floor for finding in unsharded}
    ratios = [replace(finding, error=finding.error / yardstick[finding.module]) for finding in sharded]
    return place(max(ratios, key=lambda finding: finding.error)), ratios


def exceeded(metrics: Mapping[str, float]) -> list[str]:
    """The native criteria that do not hold; one that is not a number does not hold."""
    return [name for name, limit in NATIVE_LIMITS.items() if not metrics[name] <= limit]


def relative(x: Tensor, reference: Tensor) -> float:
    """Relative Frobenius error in float64; infinite where x is not finite or the shapes differ."""
    if x.shape != reference.shape:
        return math.inf
    reference = reference.double()
    error = float((x.double() - reference).norm())
    if not math.isfinite(error):
        return math.inf
    norm = float(reference.norm())
    return error / norm if norm else (math.inf if error else 0.0)
