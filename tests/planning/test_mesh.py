"""The mesh: ranks and coordinates are one thing, and experts' places follow from them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpshard.planning.axes import Axis
from tpshard.planning.deal import deal
from tpshard.planning.mesh import Mesh


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    ep, moe_tp = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return Mesh(tp=ep * moe_tp, pp=draw(st.integers(1, 4)), ep=ep)


@given(meshes())
def test_a_rank_is_its_coordinate(mesh: Mesh) -> None:
    coordinates = [mesh.coordinate(rank) for rank in range(mesh.size)]
    assert coordinates == [(pp, tp) for pp in range(mesh.pp) for tp in range(mesh.tp)], "tp varies fastest"
    assert [mesh.rank(*coordinate) for coordinate in coordinates] == list(range(mesh.size))


@given(meshes())
def test_each_stage_has_every_place_among_the_experts_once(mesh: Mesh) -> None:
    places = [(mesh.coordinate(rank)[0], *mesh.expert_place(rank)) for rank in range(mesh.size)]
    moe_tp = mesh.tp // mesh.ep
    assert places == [(pp, ep, cut) for pp in range(mesh.pp) for ep in range(mesh.ep) for cut in range(moe_tp)]


@given(meshes(), st.integers(1, 5))
def test_an_axis_is_dealt_along_its_kind_of_parallelism(mesh: Mesh, times: int) -> None:
    axes = {
        "heads": Axis("heads", mesh.tp * times, 8),
        "layers": Axis("layers", mesh.pp * times, 1, along="pp"),
        "experts": Axis("experts", mesh.ep * times, 1, along="ep"),
    }
    dealt = deal(axes, mesh)
    for rank in range(mesh.size):
        pp, tp = mesh.coordinate(rank)
        ep, _ = mesh.expert_place(rank)
        for name, place in (("heads", tp), ("layers", pp), ("experts", ep)):
            assert dealt.of(name, rank) == (place * times, (place + 1) * times)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (2, 0, 1), (2, 1, 0), (4, 1, 3), (2, 1, 4)])
def test_what_is_no_mesh(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no mesh"):
        Mesh(*sizes)
