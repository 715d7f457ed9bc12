"""Shares that are fused and stacked: layers that are alike are laid out once, and others by themselves."""

from __future__ import annotations

from tpshard.formats.engine_layout import ParameterParts, joined
from tpshard.planning.box import full
from tpshard.planning.layout import LayoutRows, Part, StoredTensor

SHAPE = (1, 4)


def share(name: str) -> tuple[StoredTensor, ...]:
    return (StoredTensor(name, "F32", SHAPE, (Part(name, full(SHAPE), (0, 0)),)),)


def test_experts_that_begin_elsewhere_are_laid_out_by_themselves() -> None:
    """Of the same shares, as many experts: where the second one begins tells the recipes apart."""
    shares, shapes = {name: share(name) for name in "abc"}, dict.fromkeys("abc", SHAPE)
    recipes = {
        "first": ParameterParts((("a", "b"), ("c",)), stacked=True),
        "second": ParameterParts((("a",), ("b", "c")), stacked=True),
    }
    first, second = LayoutRows(joined(recipes, shares, shapes, tp=1), 1)[0]
    assert [(part.tensor, part.at[:2]) for part in first.parts] == [("a", (0, 0)), ("b", (0, 1)), ("c", (1, 0))]
    assert [(part.tensor, part.at[:2]) for part in second.parts] == [("a", (0, 0)), ("b", (1, 0)), ("c", (1, 1))]


def test_layers_that_are_alike_share_a_layout_but_not_their_tensors() -> None:
    shares, shapes = dict.fromkeys("abcd", share("a")), dict.fromkeys("abcd", SHAPE)
    recipes = {"first": ParameterParts((("a", "b"),)), "second": ParameterParts((("c", "d"),))}
    first, second = LayoutRows(joined(recipes, shares, shapes, tp=1), 1)[0]
    assert [part.tensor for part in first.parts] == ["a", "b"] and [part.tensor for part in second.parts] == ["c", "d"]
    assert [part.at for part in first.parts] == [part.at for part in second.parts] == [(0, 0), (1, 0)]
