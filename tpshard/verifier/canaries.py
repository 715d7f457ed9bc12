"""Faults put into the loaded shards on purpose: a tier that would not notice them may not say pass."""

from __future__ import annotations

import math

import torch

from tpshard.errors import DifferentError, UnsupportedError
from tpshard.verifier.backend import Backend, Reference
from tpshard.verifier.criteria import EXACT_LIMIT, FLOAT32_LIMIT, exceeded, native_metrics, no_tf32, relative
from tpshard.verifier.fault_catalogue import VISIBLE, canaries_of
from tpshard.verifier.report.verdict import Canary


def _errors(backend: Backend, dtype: torch.dtype, reference: Reference) -> list[float]:
    """Each rank's end-to-end error; infinite where the shards cannot be run at all, which is to be caught as well."""
    try:
        return backend.errors(dtype, reference)
    except (DifferentError, UnsupportedError):
        return [math.inf]


def exact_canaries(backend: Backend, *, float32: bool = False) -> list[Canary]:
    """Every applicable canary against the exact tier's end-to-end criterion."""
    dtype, limit = (torch.float32, FLOAT32_LIMIT) if float32 else (torch.float64, EXACT_LIMIT)
    small, canaries = backend.with_layers(1), []
    with no_tf32(), torch.no_grad():
        reference = small.run(dtype, small.steps)
        for name, ranks in canaries_of(small.places(), structural=False):
            error = max(_errors(small.with_ranks(ranks), dtype, reference))
            canaries.append(Canary(name, "exact", "caught" if error > limit else "missed", error))
    return canaries


def native_canaries(backend: Backend, dtype: torch.dtype) -> list[Canary]:
    """Every applicable structural canary against the native tier's criteria on the prompt."""
    small, canaries = backend.with_layers(1), []
    with torch.no_grad():
        wide = small.run(torch.float64, small.steps)
        r, n = wide.logits, small.run(dtype, small.steps, wide.choices).logits
        noise = relative(n, r)
        for name, ranks in canaries_of(small.places(), structural=True):
            mutant = small.with_ranks(ranks)
            try:
                judged = mutant.run_ranks(dtype, small.steps, wide.choices, lambda t: native_metrics(r, n, t, dtype))
            except (DifferentError, UnsupportedError):
                judged = []
            status = "caught"
            if judged and not any(exceeded(rank) for rank in judged):
                effects = mutant.run_ranks(torch.float64, small.steps, wide.choices, lambda logits: relative(logits, r))
                status = "missed" if max(effects) > VISIBLE * noise else "too small"
            worst = max((rank["ratio"] for rank in judged), default=math.inf)
            canaries.append(Canary(name, "native", status, worst))
    return canaries
