"""Faults put into the loaded shards on purpose: a tier that would not notice them may not say pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from tpshard.errors import DifferentError
from tpshard.verifier.builtin.exact import Setup, through
from tpshard.verifier.builtin.faults import FAULTS
from tpshard.verifier.criteria import EXACT_LIMIT, FLOAT32_LIMIT, exceeded, native_metrics, no_tf32, relative
from tpshard.verifier.fault_catalogue import BETWEEN_RANKS, CANARIES, VISIBLE
from tpshard.verifier.ranks.weights import Weights
from tpshard.verifier.report.verdict import Canary

T = TypeVar("T")


def _small(setup: Setup) -> Setup:
    """The model cut down to embedding, its first layer that is compared, and head: enough to see a fault there."""
    return replace(setup, layers=setup.which()[:1], sequence_parallel=False)


def _mutants(setup: Setup, *, structural: bool) -> Iterator[tuple[str, list[Weights]]]:
    for name in CANARIES:
        fault = FAULTS[name]
        if (len(setup.ranks) > 1 or name not in BETWEEN_RANKS) and (fault.structural or not structural):
            mutant = fault.mutant(setup.family, setup.ranks, setup.which()[0])
            if mutant is not None:
                yield name, mutant


def _judged(setup: Setup, ranks: Sequence[Weights], judge: Callable[[Tensor], T], dtype: torch.dtype) -> list[T] | None:
    """`judge` of each rank's logits; None when these shards cannot be run at all, which is to be caught as well."""
    mutated = replace(setup, ranks=ranks)
    try:
        return mutated.team.run(
            lambda group: judge(through(mutated.sharded(group, dtype), [setup.prompt], setup.which(), setup.progress))
        )
    except DifferentError:
        return None


def _error(setup: Setup, ranks: Sequence[Weights], dtype: torch.dtype, wanted: Tensor) -> float:
    errors = _judged(setup, ranks, lambda logits: relative(logits, wanted), dtype)
    return math.inf if errors is None else max(errors)


def exact_canaries(setup: Setup, *, float32: bool = False) -> list[Canary]:
    """Every applicable canary against the exact tier's end-to-end criterion."""
    dtype = torch.float32 if float32 else torch.float64
    limit = FLOAT32_LIMIT if float32 else EXACT_LIMIT
    small = _small(setup)
    with no_tf32(), torch.no_grad():
        wanted = through(small.reference(dtype), [setup.prompt], small.which(), small.progress)
        canaries = []
        for name, ranks in _mutants(small, structural=False):
            error = _error(small, ranks, dtype, wanted)
            canaries.append(Canary(name, "exact", "caught" if error > limit else "missed", error))
    return canaries


def native_canaries(setup: Setup, dtype: torch.dtype) -> list[Canary]:
    """Every applicable structural canary against the native tier's criteria on the prompt."""
    small = _small(setup)
    canaries = []
    with torch.no_grad():
        r = through(small.reference(torch.float64), [setup.prompt], small.which(), small.progress)
        n = through(small.reference(dtype), [setup.prompt], small.which(), small.progress)
        noise = relative(n, r)
        for name, ranks in _mutants(small, structural=True):
            metrics = _judged(small, ranks, lambda logits: native_metrics(r, n, logits, dtype), dtype)
            status = "caught"
            if metrics is not None and not any(exceeded(rank) for rank in metrics):
                effect = _error(small, ranks, torch.float64, r)
                status = "missed" if effect > VISIBLE * noise else "too small"
            worst = math.inf if metrics is None else max(rank["ratio"] for rank in metrics)
            canaries.append(Canary(name, "native", status, worst))
    return canaries
