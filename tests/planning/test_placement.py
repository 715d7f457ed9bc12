"""Experts that are dealt whole and cut for the ranks that share them: every element once, every share a box."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpshard.errors import UnsupportedError
from tpshard.planning.axes import Axis, Cut
from tpshard.planning.deal import deal
from tpshard.planning.experts import Experts
from tpshard.planning.join import assert_coverage
from tpshard.planning.layout import LogicalTensor, shard
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.planning.placement import placement

WIDTH = 4
COLUMN, ROW = Cut("column", 0, ("ffn",)), Cut("row", 1, ("ffn",))


def model(experts: int, units: int) -> Model:
    """One layer: a dense matrix and experts, one by one and stacked, all of them along one axis."""
    size = units * WIDTH
    tensors = [
        LogicalTensor("dense", "F32", (size, 3), COLUMN),
        *(LogicalTensor(f"experts.{n}.up", "F32", (size, 3), COLUMN) for n in range(experts)),
        *(LogicalTensor(f"experts.{n}.down", "F32", (3, size), ROW) for n in range(experts)),
        LogicalTensor("stack.down", "F32", (experts, 3, size), Cut("row", 2, ("ffn",))),
        LogicalTensor("stack.up", "F32", (experts, 2 * size, 3), Cut("column", 1, ("ffn", "ffn"))),
        LogicalTensor("stack.bias", "F32", (experts, 3), Cut("replicate")),
    ]
    axes = {"ffn": Axis("ffn", units, WIDTH)}
    return Model(tuple(tensors), axes, {}, {}, {}, {}, experts=Experts(experts, ("experts.",), ("stack.",)))


@given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 5), st.data())
def test_every_element_is_dealt(ep: int, moe_tp: int, more: int, spare: int, data: st.DataObject) -> None:
    tp, experts = ep * moe_tp, ep + more
    of, mesh = model(experts, tp + spare), Mesh(tp, ep=ep)
    shares = data.draw(st.lists(st.integers(1, 5), min_size=tp, max_size=tp))
    placed = placement(of, mesh, None)
    tensors, dealt = placed.dealt(of.tensors, deal(placed.axes, mesh, shares), shares)
    rows = shard(tensors, dealt.axes, dealt, placed.ranks)
    assert_coverage(of.tensors, rows)
    ranges = [range(*each) for each in of.experts.ranges(ep)] if of.experts else []
    for rank in range(tp):
        held, mine = {each.name: each for each in rows[rank]}, ranges[rank // moe_tp]
        assert {name for name in held if name.startswith("experts.")} == {
            f"experts.{n}.{matrix}" for n in mine for matrix in ("up", "down")
        }
        weights = shares[rank // moe_tp * moe_tp :][:moe_tp]
        first, last = deal(of.axes, Mesh(moe_tp), weights).ranges["ffn"][rank % moe_tp]
        width = held[f"experts.{mine[0]}.up"].shape[0]
        assert width == (last - first) * WIDTH, "its place's ranks divide each expert by their weights"
        assert held["stack.down"].shape == (len(mine), 3, width) and held["stack.up"].shape == (len(mine), 2 * width, 3)
        assert held["stack.bias"].shape == (len(mine), 3)
        assert all(len(each.parts) == 1 for name, each in held.items() if name != "stack.up")


def test_ranks_that_share_experts_must_divide_them() -> None:
    of, mesh = model(4, 6), Mesh(8, ep=2)
    placed = placement(of, mesh, None)
    with pytest.raises(UnsupportedError, match="6 ffn of experts on 4 ranks: 6 is not a multiple of 4") as error:
        placed.dealt(of.tensors, deal({}, mesh))
    assert error.value.expected == "ep 4" and error.value.found == "ep 2"
