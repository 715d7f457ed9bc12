"""Faults put into the loaded shards on purpose: a tier that would not notice them may not say pass."""

import math

import torch

from tpshard.errors import DifferentError, UnsupportedError
from tpshard.verifier.backend import Backend, Reference
from tpshard.verifier.criteria import EXACT_LIMIT, FLOAT32_LIMIT, no_tf32
from tpshard.verifier.fault_catalogue import canaries_of
from tpshard.verifier.report.verdict import Canary
from tpshard.verifier.tiers import digest


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
        for name, ranks in canaries_of(small.places()):
            error = max(_errors(small.with_ranks(ranks), dtype, reference))
            canaries.append(Canary(name, "exact", "caught" if error > limit else "missed", error))
    return canaries


def native_canaries(backend: Backend, dtype: torch.dtype) -> list[Canary]:
    """Shards that are loaded under another rank's number: not to be asked for where there is one rank."""
    small, _ = backend.with_layers(1).same_form()
    rolled = small.with_ranks([*small.ranks[1:], small.ranks[0]])
    with torch.no_grad():
        wanted = small.run_ranks(dtype, small.steps, None, digest)
        try:
            caught = rolled.run_ranks(dtype, small.steps, None, digest) != wanted
        except (DifferentError, UnsupportedError):
            caught = True
    return [Canary("another-ranks-shard", "native", "caught" if caught else "missed", 0.0)]
