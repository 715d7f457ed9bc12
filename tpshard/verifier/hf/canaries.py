"""Faults put into the loaded shards on purpose, as the built-in decoder's canaries are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tpshard.errors import DifferentError, UnsupportedError
from tpshard.verifier.criteria import EXACT_LIMIT, FLOAT32_LIMIT, exceeded, native_metrics, no_tf32, relative
from tpshard.verifier.fault_catalogue import BETWEEN_RANKS, CANARIES, VISIBLE
from tpshard.verifier.group import Single
from tpshard.verifier.hf.faults import FAULTS
from tpshard.verifier.hf.overrides import Pinned
from tpshard.verifier.hf.sides import Sides
from tpshard.verifier.hf.tiers import Choices, errors_of, logits_of
from tpshard.verifier.report.verdict import Canary, layer_of

OF_STATES = ("convolution-of-another-rank", "decay-of-another-rank")
"""What layers without attention have; these need a second rank."""
OF_ROUTERS = ("choice-bias-shifted",)


def small(sides: Sides) -> Sides:
    """The model cut down to embedding, head, and the first of its layers that hold the most tensors: experts, say."""
    counts = Counter(layer_of(key) for key in sides.frame.shapes)
    return sides.with_layers(tuple(sorted(sides.frame.layers, key=lambda layer: -counts[layer])[:1]))


def mutants(sides: Sides, *, structural: bool) -> Iterator[tuple[str, Sides]]:
    """The canaries that apply, as damaged shards; `structural` leaves the others out."""
    names = sorted({name for recipe in sides.frame.recipes(sides.source).values() for name in recipe.stored})
    for name in (*CANARIES, *OF_STATES, *OF_ROUTERS):
        fault = FAULTS[name]
        if (len(sides.ranks) > 1 or name not in (*BETWEEN_RANKS, *OF_STATES)) and (fault.structural or not structural):
            damaged = fault.mutant(sides.frame.config, sides.source, sides.ranks, sides.frame.layers[0], names)
            if damaged is not None:
                yield name, replace(sides, ranks=damaged)


def _logits(mutant: Sides, dtype: torch.dtype, choices: Choices) -> list[Tensor]:
    """The damaged ranks' logits; none where they cannot be run at all, which is to be caught as well."""
    try:
        return logits_of(mutant, mutant.here(dtype), [mutant.prompt], choices)
    except (DifferentError, UnsupportedError):
        return []


def _error(mutant: Sides, dtype: torch.dtype, pins: Pinned, wanted: Tensor) -> float:
    """The largest end-to-end error of the damaged ranks, infinite where they cannot be run at all."""
    try:
        return max(errors_of(mutant, mutant.here(dtype), pins, wanted))
    except (DifferentError, UnsupportedError):
        return math.inf


def exact_canaries(sides: Sides, *, float32: bool = False) -> list[Canary]:
    """Every applicable canary against the exact tier's end-to-end criterion."""
    dtype = torch.float32 if float32 else torch.float64
    limit = FLOAT32_LIMIT if float32 else EXACT_LIMIT
    cut, pins, canaries = small(sides), Pinned(), []
    with no_tf32():
        wanted = cut.reference(dtype).run(Single(), [sides.prompt], pins)
        for name, mutant in mutants(cut, structural=False):
            error = _error(mutant, dtype, pins, wanted)
            canaries.append(Canary(name, "exact", "caught" if error > limit else "missed", error))
    return canaries


def native_canaries(sides: Sides, dtype: torch.dtype) -> list[Canary]:
    """Every applicable structural canary against the native tier's criteria on the prompt."""
    cut, pins, canaries = small(sides), Pinned(), []
    r = cut.reference(torch.float64).run(Single(), [sides.prompt], pins)
    n = cut.reference(dtype).run(Single(), [sides.prompt], Pinned(pins.made))
    noise = relative(n, r)
    for name, mutant in mutants(cut, structural=True):
        metrics = [native_metrics(r, n, t, dtype) for t in _logits(mutant, dtype, pins.made)]
        status = "caught"
        if metrics and not any(exceeded(rank) for rank in metrics):
            wide = _logits(mutant, torch.float64, pins.made)
            effect = max((relative(each, r) for each in wide), default=math.inf)
            status = "missed" if effect > VISIBLE * noise else "too small"
        canaries.append(Canary(name, "native", status, max((rank["ratio"] for rank in metrics), default=math.inf)))
    return canaries
