"""What counts as equal."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tpshard.verifier.report.verdict import Finding, Place, layer_of

EXACT_LIMIT, FLOAT32_LIMIT = 1e-12, 1e-5
ROUNDINGS = 4
"""How many times as far as one rounding of each weight moves them the logits of right shards may lie apart."""
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


def distances(reference: Tensor, unsharded: Tensor, sharded: Tensor) -> dict[str, float]:
    """How far both sides are from the reference R; logits [B, S, vocab] of all positions.

    Relative Frobenius errors, the mean divergence of the next token's distribution, and how often the first choice is
    R's.
    """
    found = {}
    r = reference.double()
    for side, logits in (("unsharded", unsharded), ("sharded", sharded)):
        x = logits.double()
        log_r, log_x = r.log_softmax(-1), x.log_softmax(-1)
        found[f"{side}_error"] = relative(x, r)
        divergence = float((log_r.exp() * (log_r - log_x)).sum(-1).mean())
        found[f"kl_{side}"] = divergence if math.isfinite(divergence) else math.inf
        found[f"top1_{side}"] = float((r.argmax(-1) == x.argmax(-1)).double().mean())
    return found
