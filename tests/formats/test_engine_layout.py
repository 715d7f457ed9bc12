"""Shares that are fused and stacked: layers that are alike are laid out once, and others by themselves."""

from __future__ import annotations

import pytest

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.formats.engine_layout import ParameterParts, joined, recipes_of, shares_of
from tpshard.formats.engine_places import with_scales
from tpshard.formats.engine_tables import EngineFamily
from tpshard.planning.axes import Axis, Cut
from tpshard.planning.box import Box, full
from tpshard.planning.deal import deal
from tpshard.planning.layout import LayoutRows, LogicalTensor, Part, StoredTensor
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model

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


def held(family: EngineFamily, tensor: LogicalTensor, tp: int) -> list[tuple[tuple[int, ...], Box, tuple[Box, ...]]]:
    """Of every rank: the shape, the box of the tensor that it has, and what is filled."""
    axes = {"ffn": Axis("ffn", 8, 1)}
    model = Model((tensor,), axes, tied={}, file_of={}, source={}, architecture={})
    shares = shares_of(family, model, [tensor], deal(axes, Mesh(tp)))[tensor.name]
    return [(each.shape, each.parts[0].box, each.fills) for each in shares]


def test_what_is_narrower_than_the_engine_has_it_is_followed_by_zeros() -> None:
    family = EngineFamily(least={"ffn": 6})
    up = LogicalTensor("up", "F32", (8, 3), Cut("column", 0, ("ffn",)))
    down = LogicalTensor("down", "F32", (3, 8), Cut("row", 1, ("ffn",)))
    other = LogicalTensor("norm", "F32", (3,), Cut("replicate"))
    assert held(family, up, 2) == [
        ((6, 3), ((0, 4), (0, 3)), (((4, 6), (0, 3)),)),
        ((6, 3), ((4, 8), (0, 3)), (((4, 6), (0, 3)),)),
    ]
    assert held(family, down, 2)[1] == ((3, 6), ((0, 3), (4, 8)), (((0, 3), (4, 6)),))
    assert held(family, up, 1) == [((8, 3), ((0, 8), (0, 3)), ())]
    assert held(EngineFamily(least={"ffn": 4}), up, 2)[0] == ((4, 3), ((0, 4), (0, 3)), ())
    assert held(family, other, 2)[0] == ((3,), ((0, 3),), ())


def test_quantised_tensors_are_not_padded_to_what_the_engine_has_at_least() -> None:
    with pytest.raises(UnsupportedError, match="was not compared"):
        held(EngineFamily(least={"ffn": 6}), LogicalTensor("up", "F8_E4M3", (8, 3), Cut("column", 0, ("ffn",))), 2)


def test_dims_that_are_1_are_left_out_and_the_others_cut() -> None:
    family = EngineFamily(squeezed=("log",))
    log = LogicalTensor("log", "F32", (1, 1, 8, 1), Cut("column", 2, ("ffn",)))
    assert held(family, log, 8) == [((1,), ((rank, rank + 1),), ()) for rank in range(8)]


def test_of_two_lists_for_one_parameter_the_longer_counts_where_all_of_it_is_there() -> None:
    family = EngineFamily(fused={"*.qk": ("*.q", "*.k"), "*.qk?": ("*.q", "*.k", "*.a")})
    names = {name: name for name in ("0.a", "0.k", "0.q", "1.k", "1.q")}
    assert {into: recipe.tensors for into, recipe in recipes_of(family, names).items()} == {
        "0.qk": ("0.q", "0.k", "0.a"),
        "1.qk": ("1.q", "1.k"),
    }
    with pytest.raises(CorruptError, match="not all tensors"):
        recipes_of(family, {"0.k": "0.k"})


def test_of_two_lists_with_the_same_tensors_the_longer_counts_and_its_rows_are_rounded_up() -> None:
    family = EngineFamily(fused={"*.qa?": ("*.q", "*.a"), "*.qag??": ("*.q", "*.a", "*.g")}, padded={"*.qag??": 8})
    names = {name: name for name in ("0.a", "0.g", "0.q", "1.a", "1.q", "2.g")}
    recipes = recipes_of(family, names)
    assert {into: (recipe.tensors, recipe.multiple) for into, recipe in recipes.items()} == {
        "0.qag": (("0.q", "0.a", "0.g"), 8),
        "1.qa": (("1.q", "1.a"), 1),
        "2.g": (("2.g",), 1),
    }
    shares, shapes = dict.fromkeys(names, share("a")), dict.fromkeys(names, SHAPE)
    (first, *_) = LayoutRows(joined({"0.qag": recipes["0.qag"]}, shares, shapes, tp=1), 1)[0]
    assert (first.shape, first.fills) == ((8, 4), (((3, 8), (0, 4)),))


def test_rows_that_are_stored_by_turns_are_two_columns_of_half_as_many_rows() -> None:
    family = EngineFamily(cuts={"grouped": ("up",)})
    up = LogicalTensor("up", "F32", (2, 16, 3), Cut("column", 1, ("ffn", "ffn"), interleave="ffn"))
    model = Model((up,), {"ffn": Axis("ffn", 8, 1)}, tied={}, file_of={}, source={}, architecture={})
    share = shares_of(family, model, [up], deal(model.axes, Mesh(2)))["up"][1]
    assert share.shape == (2, 8, 3)
    assert [(part.box, part.at, part.view) for part in share.parts] == [
        (((0, 2), (4, 8), (0, 3)), (0, 0, 0), (2, 8, 6)),
        (((0, 2), (4, 8), (3, 6)), (0, 4, 0), (2, 8, 6)),
    ]


def test_a_stack_of_matrices_may_be_one() -> None:
    down = LogicalTensor("down", "F32", (2, 3, 8), Cut("row", 2, ("ffn",)))
    model = Model((down,), {"ffn": Axis("ffn", 8, 1)}, tied={}, file_of={}, source={}, architecture={})
    family = EngineFamily(side_by_side=("down",))
    share = shares_of(family, model, [down], deal(model.axes, Mesh(2)))["down"][1]
    assert (share.shape, share.view) == ((3, 8), (3, 2, 4))
    (part,) = share.parts
    assert (part.box, part.at, part.order) == (((0, 2), (0, 3), (4, 8)), (0, 0, 0), (1, 0, 2))


def test_layers_have_their_scales_where_the_table_says() -> None:
    family = EngineFamily(
        layer="layers.*",
        scales=("layers.*.attn",),
        scales_where={"layers.*.index": "layers.*", "layers.*.turns.*": "layers.*.attn.*"},
        attends=("layers.*.q",),
    )
    names = ["layers.0.q", "layers.1.q", "layers.1.index", "layers.2.mlp", "head"]
    assert list(with_scales(family, names)) == ["layers.0.attn", "layers.1"]
    several = ["layers.10.q", "layers.2.turns.1.up", "layers.2.turns.1.down", "layers.2.turns.3.up"]
    assert list(with_scales(family, several)) == ["layers.2.attn.1", "layers.2.attn.3", "layers.10.attn"]


def test_a_vector_may_have_dims_around_its_own() -> None:
    family = EngineFamily(layer="layers.*", shaped={"layers.*.log": (1, 1, 0, 1)})
    log = LogicalTensor("layers.3.log", "F32", (8,), Cut("column", 0, ("ffn",)))
    assert held(family, log, 2)[1] == ((1, 1, 4, 1), ((4, 8),), ())
