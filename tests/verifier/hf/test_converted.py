"""What transformers makes of stored tensors by more than names, and what a rank has of it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tpshard.errors import DifferentError
from tpshard.verifier.hf.converted import Conversion, Converted, converted
from tpshard.verifier.ranks.weights import InMemory, Weights

KEYS = ("a.q.weight", "a.k.weight", "a.q.bias", "a.k.bias")
FUSED = {"a.fused.weight": torch.arange(16.0).view(8, 2), "a.fused.bias": torch.zeros(8)}


def fused(leaf: str) -> Conversion:
    """Two matrices of four rows in one, or their biases."""
    from transformers.core_model_loading import Chunk, WeightConverter

    pattern, targets = f"fused.{leaf}", [f"q.{leaf}", f"k.{leaf}"]
    converter = WeightConverter(pattern, targets, [Chunk(dim=0)])
    return Conversion(converter, SimpleNamespace(config=None), f"a.q.{leaf}", {pattern: [f"a.fused.{leaf}"]})


def held_by(*rows: Sequence[int]) -> list[Weights]:
    """Ranks with these rows of both, converted."""
    ranks = [InMemory({name: tensor[list(each)] for name, tensor in FUSED.items()}) for each in rows]
    made, whole, held = converted([fused("weight"), fused("bias")], KEYS, InMemory(FUSED), ranks)
    assert made == {*KEYS} == {*whole.names()}
    assert torch.equal(whole.get("a.k.weight"), FUSED["a.fused.weight"][4:])
    return held


def rows_of(weights: Weights, name: str) -> list[list[float]]:
    found: Tensor = weights.get(name)
    assert weights.shape(name) == tuple(found.shape)
    return [list(map(float, row)) for row in found]


def test_a_rank_has_its_part_of_each() -> None:
    """Of biases that are all alike it is told by the weight."""
    one, two = held_by([0, 1, 4, 5], [2, 3, 6, 7])
    assert rows_of(one, "a.q.weight") == [[0, 1], [2, 3]]
    assert rows_of(one, "a.k.weight") == [[8, 9], [10, 11]]
    assert rows_of(two, "a.k.weight") == [[12, 13], [14, 15]]
    assert one.shape("a.q.bias") == two.shape("a.k.bias") == (2,)


def test_cut_as_one_a_rank_has_one_of_them() -> None:
    one, two = held_by([0, 1, 2, 3], [4, 5, 6, 7])
    assert rows_of(one, "a.q.weight") == rows_of(InMemory({"q": FUSED["a.fused.weight"][:4]}), "q")
    assert (one.shape("a.k.weight"), two.shape("a.q.weight")) == ((0, 2), (0, 2))


def test_another_order_is_not_made_right() -> None:
    one, _ = held_by([4, 5, 0, 1], [2, 3, 6, 7])
    assert rows_of(one, "a.q.weight") == [[8, 9], [10, 11]]


def test_another_element_hides_no_place() -> None:
    ranks = [InMemory({name: tensor[:4].clone() for name, tensor in FUSED.items()}) for _ in range(2)]
    ranks[0].tensors["a.fused.weight"][1, 0] = 99
    _, _, held = converted([fused("weight")], KEYS, InMemory(FUSED), ranks)
    assert rows_of(held[0], "a.q.weight") == [[0, 1], [99, 3], [4, 5], [6, 7]]


def test_what_is_no_part_of_the_source_is_refused() -> None:
    strange = InMemory({"a.fused.weight": torch.full((9, 2), 7.0)})
    with pytest.raises(DifferentError, match="what the source does not have"):
        converted([fused("weight")], KEYS, InMemory(FUSED), [strange])
    with pytest.raises(DifferentError, match="does not have the model's shape"):
        converted([fused("weight")], KEYS, InMemory(FUSED), [InMemory({"a.fused.weight": torch.zeros(4, 1)})])


def test_a_rank_that_lacks_a_tensor_lacks_the_parameters() -> None:
    _, _, held = converted([fused("weight")], KEYS, InMemory(FUSED), [InMemory({})])
    assert isinstance(held[0], Converted) and not held[0].names()
