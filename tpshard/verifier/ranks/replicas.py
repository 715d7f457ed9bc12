"""What vLLM takes from each rank of a set, and a comparison with the source from one: it must be the same on all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tpshard.errors import DifferentError
from tpshard.verifier.ranks.open import FileWeights
from tpshard.verifier.ranks.weights import equal

if TYPE_CHECKING:
    from tpshard.verifier.ranks.vllm_names import Names

SCALES = ("_k_scale", "_v_scale", "_q_scale", "_prob_scale")


def some_experts(ranks: Sequence[FileWeights], name: str) -> bool:
    """Whether each rank holds some experts whole: then the router counts more of them than a rank's tensor has."""
    router = f"{name.partition('.experts.')[0]}.router.weight"
    return router in ranks[0].names() and ranks[0].shape(router)[0] > ranks[0].shape(name)[0]


def require_replicas(ranks: Sequence[FileWeights], names: Names) -> None:
    """DifferentError where what an engine takes from each rank, and we take from one, is not the same on all."""
    for rank, weights in enumerate(ranks):
        for name in weights.names():
            module, _, suffix = name.rpartition(".")
            if suffix in SCALES and bool((weights.get(name) != 1.0).any()):
                raise DifferentError(f"{name} of rank {rank} scales an unquantised cache", tensor=name, expected=1.0)
            if module.endswith(names.whole) and not equal(weights, ranks[0], name):
                raise DifferentError(f"{name} of rank {rank}, which all ranks hold whole, is not rank 0's", tensor=name)
            summed = rank and name.endswith(names.once) and not some_experts(ranks, name)
            if summed and bool(weights.get(name).any()):
                raise DifferentError(f"{name} of rank {rank} is added to rank 0's", tensor=name, expected="zeros")
