"""Deals and layouts from shapes alone: the law (a unit is never cut), replicas, uneven shares, padding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpshard.errors import UnsupportedError, UsageError
from tpshard.planning.axes import Axis, Cut
from tpshard.planning.box import full, tiles
from tpshard.planning.deal import Deal, deal, largest_tp, listing, padded, possible_tp, why_not
from tpshard.planning.intervals import intervals
from tpshard.planning.join import assert_coverage
from tpshard.planning.layout import LogicalTensor, Part, StoredTensor, shard, whole
from tpshard.planning.mesh import Mesh
from tpshard.planning.strides import placed_box

HEADS = Axis("heads", 32, 128, group="kv")
KV = Axis("kv", 8, 128, replicate=True)
FFN = Axis("ffn", 14336, 1)
VOCAB = Axis("vocab", 50257, 1, pad=True)


def axes_of(*axes: Axis) -> dict[str, Axis]:
    return {axis.name: axis for axis in axes}


def sizes(ranges: Sequence[tuple[int, int]]) -> list[int]:
    return [stop - start for start, stop in ranges]


def dealt(axis: Axis, tp: int, shares: Sequence[Any] | None = None, *others: Axis) -> list[tuple[int, int]]:
    weights = None if shares is None else [Fraction(str(share)) for share in shares]
    return list(deal(axes_of(axis, *others), Mesh(tp), weights, None).ranges[axis.name])


# The law.


def test_a_head_is_never_cut_although_its_elements_would_divide() -> None:
    heads = Axis("heads", 12, 64)
    assert heads.count * heads.unit % 8 == 0
    with pytest.raises(UnsupportedError) as error:
        deal(axes_of(heads, Axis("ffn", 3072, 1), VOCAB), Mesh(8))
    assert error.value.message == "12 heads on 8 ranks: 12 is not a multiple of 8"
    assert error.value.expected == "tp 1, 2, 3, 4, 6 or 12"
    assert error.value.found == "tp 8"
    assert "--uneven" in str(error.value.hint)


@pytest.mark.parametrize("tp", [2, 3, 4, 8])
def test_gpt2_xl_has_25_heads(tp: int) -> None:
    with pytest.raises(UnsupportedError, match=f"25 heads on {tp} ranks: 25 is not a multiple of {tp}") as error:
        deal(axes_of(Axis("heads", 25, 64), Axis("ffn", 6400, 1), VOCAB), Mesh(tp))
    assert error.value.expected == "tp 1, 5 or 25"


@pytest.mark.parametrize("tp", [3, 5, 6, 7, 12])
def test_kv_heads_are_repeated_evenly_or_not_at_all(tp: int) -> None:
    heads, kv = Axis("heads", 120, 8, group="kv"), Axis("kv", 8, 8, replicate=True)
    with pytest.raises(UnsupportedError, match=f"8 kv on {tp} ranks: 8 is not a multiple of {tp}") as error:
        deal(axes_of(kv, heads), Mesh(tp))
    assert ("a multiple of 8" in error.value.message) == (tp > 8)
    assert error.value.expected == "tp 1, 2, 4, 8, 24, 40 or 120"


def test_the_values_that_work_are_those_that_divide_every_axis() -> None:
    axes = axes_of(HEADS, KV, FFN, VOCAB)
    assert possible_tp(axes) == [1, 2, 4, 8, 16, 32]
    assert largest_tp(axes) == 32
    for tp in range(1, 33):
        refused = any(why_not(axis, tp) for axis in axes.values())
        assert refused != (tp in possible_tp(axes))
        if not refused:
            deal(axes, Mesh(tp))


def test_the_last_rank_takes_the_rest() -> None:
    """gpt-oss' 2880 features in blocks of 32, of which an engine gives every rank as many, rounded up."""
    axes = {"ffn": Axis("ffn", 2880, unit=1, step=32, rest_last=True)}
    shares = {tp: [last - first for first, last in deal(axes, Mesh(tp)).ranges["ffn"]] for tp in (2, 4, 8)}
    assert shares == {2: [1440, 1440], 4: [736, 736, 736, 672], 8: [384] * 7 + [192]}
    assert why_not(axes["ffn"], 16) == "2880 ffn on 16 ranks: 6 times 32 on each leave none for the last"
    assert set(range(1, 11)) <= set(possible_tp(axes)) and 16 not in possible_tp(axes)


def test_values_are_listed_as_one_says_them() -> None:
    assert [listing(values) for values in ([1], [1, 2], [1, 2, 4])] == ["1", "1 or 2", "1, 2 or 4"]


# KV heads.


@pytest.mark.parametrize(
    ("count", "tp", "first"),
    [
        (2, 4, [0, 0, 1, 1]),  # repeated, never tiled 0, 1, 0, 1
        (1, 3, [0, 0, 0]),
        (2, 6, [0, 0, 0, 1, 1, 1]),
        (4, 8, [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
@pytest.mark.parametrize("uneven", [False, True])
def test_kv_heads_fewer_than_ranks_are_repeated_contiguously(
    count: int, tp: int, first: list[int], uneven: bool
) -> None:
    shares = (1,) * tp if uneven else None
    ranges = deal(axes_of(Axis("kv", count, 8, replicate=True)), Mesh(tp), shares, None).ranges["kv"]
    assert ranges == tuple((head, head + 1) for head in first)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 12), st.booleans())
def test_no_rank_holds_a_query_head_without_its_key_and_value(kv: int, group: int, tp: int, uneven: bool) -> None:
    axes = axes_of(Axis("heads", kv * group, 4, group="kv"), Axis("kv", kv, 4, replicate=True))
    try:
        ranges = deal(axes, Mesh(tp), (1,) * tp if uneven else None)
    except UnsupportedError:
        if uneven:  # refused only where a rank would get nothing, or no whole number of copies of a head
            assert (kv < tp and (tp % kv or group < tp // kv)) or kv * group < tp
        else:
            assert kv * group % tp or (kv % tp and tp % kv)
        return
    for (start, stop), (first, last) in zip(ranges.ranges["heads"], ranges.ranges["kv"], strict=True):
        assert {head // group for head in range(start, stop)} == set(range(first, last))


# Uneven shares.


@pytest.mark.parametrize(("tp", "expected"), [(2, [13, 12]), (3, [9, 8, 8]), (4, [7, 6, 6, 6]), (25, [1] * 25)])
def test_uneven_shares_are_larger_first(tp: int, expected: list[int]) -> None:
    assert sizes(dealt(Axis("heads", 25, 64), tp, [1] * tp)) == expected


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (20, ["0.5", "0.3", "0.2"], [10, 6, 4]),
        (25, ["0.5", "0.3", "0.2"], [13, 7, 5]),  # 12.5, 7.5, 5: the remainder goes to the first of equals
        (10, [5, 3, 2], [5, 3, 2]),  # weights need not sum to 1
        (7, ["0.5", "0.3", "0.2"], [4, 2, 1]),
        (3, ["0.98", "0.01", "0.01"], [1, 1, 1]),  # no rank without a unit
        (10, ["0.98", "0.01", "0.01"], [8, 1, 1]),
        (100, ["1/3", "1/3", "1/3"], [34, 33, 33]),
    ],
)
def test_shares_weigh_the_ranks(count: int, shares: list[Any], expected: list[int]) -> None:
    weights = [Fraction(str(share)) for share in shares]
    assert sizes(deal(axes_of(Axis("ffn", count, 1)), Mesh(len(shares)), weights, None).ranges["ffn"]) == expected


@given(st.integers(1, 60), st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_weighted_ranges_cover_the_axis_and_are_close_to_their_weight(count: int, weights: list[int]) -> None:
    axis = Axis("ffn", count, 1)
    if count < len(weights):
        with pytest.raises(UnsupportedError, match=f"{count} ffn on {len(weights)} ranks: a unit is never cut"):
            dealt(axis, len(weights), weights)
        return
    ranges = dealt(axis, len(weights), weights)
    assert [ranges[0][0], *[stop for _, stop in ranges]] == [*[start for start, _ in ranges], count]
    assert min(sizes(ranges)) >= 1
    exact = [Fraction(count * weight, sum(weights)) for weight in weights]
    if min(exact) >= 1:
        assert all(abs(size - value) < 1 for size, value in zip(sizes(ranges), exact, strict=True))


@pytest.mark.parametrize(
    ("heads", "kv", "shares", "expected_heads", "expected_kv"),
    [
        (32, 8, [1, 1, 1], [12, 12, 8], [3, 3, 2]),  # whole groups of 4
        (32, 8, ["0.5", "0.3", "0.2"], [16, 8, 8], [4, 2, 2]),
        (10, 2, [1, 1, 1, 1], [3, 2, 3, 2], [1, 1, 1, 1]),  # two ranks share a group
        (10, 2, [2, 1, 3, 1], [3, 2, 4, 1], [1, 1, 1, 1]),
        (8, 8, [1, 1, 1], [3, 3, 2], [3, 3, 2]),
        (8, 1, [3, 1], [6, 2], [1, 1]),
        (9, 3, [1, 1, 1, 1], [3, 2, 2, 2], [1, 1, 2, 1]),  # q heads 5 and 6 need KV heads 1 and 2
        (8, 2, [1, 1, 1], [3, 3, 2], [1, 2, 1]),
        (12, 4, ["0.5", "0.2", "0.1", "0.1", "0.1"], [6, 3, 1, 1, 1], [2, 1, 1, 1, 1]),
    ],
)
def test_query_heads_are_dealt_by_kv_group(
    heads: int, kv: int, shares: list[Any], expected_heads: list[int], expected_kv: list[int]
) -> None:
    q, k = Axis("heads", heads, 64, group="kv"), Axis("kv", kv, 64, replicate=True)
    assert sizes(dealt(q, len(shares), shares, k)) == expected_heads
    assert sizes(dealt(k, len(shares), shares, q)) == expected_kv


def test_kv_heads_that_neighbours_need_too_lie_on_both() -> None:
    q, k = Axis("heads", 64, 128, group="kv"), Axis("kv", 8, 128, replicate=True)
    for tp in range(9, 65):
        mine, its = dealt(q, tp, [1] * tp, k), dealt(k, tp, [1] * tp, q)
        assert sum(sizes(mine)) == 64 and min(sizes(mine)) >= 1
        assert its == [(first // 8, (last - 1) // 8 + 1) for first, last in mine]
    with pytest.raises(UnsupportedError, match="64 heads on 65 ranks: a unit is never cut"):
        dealt(q, 65, [1] * 65, k)


def test_uneven_shares_do_not_help_where_nothing_says_who_needs_a_unit() -> None:
    with pytest.raises(UnsupportedError, match="2 kv units cannot be repeated evenly on 3 ranks") as error:
        dealt(Axis("kv", 2, 8, replicate=True), 3, [1, 1, 1])
    assert error.value.expected == "a tp of at most 2, or a multiple of it"


# Padding.


@pytest.mark.parametrize(("tp", "size"), [(1, 50257), (2, 50258), (4, 50260), (7, 50260), (8, 50264)])
def test_a_vocab_that_does_not_divide_grows_to_the_next_multiple(tp: int, size: int) -> None:
    assert padded(VOCAB, tp, None) == size
    assert sizes(dealt(VOCAB, tp)) == [size // tp] * tp
    assert padded(FFN, tp, None) == FFN.count


def test_a_vocab_is_padded_as_asked() -> None:
    assert padded(VOCAB, 4, 50304) == 50304
    for wrong, better in ((50256, 50260), (50303, 50304), (0, 50260)):
        with pytest.raises(UsageError, match=f"cannot pad vocab of 50257 to {wrong}") as error:
            padded(VOCAB, 4, wrong)
        assert error.value.hint == f"for example --pad-vocab-to {better}"


@pytest.mark.parametrize(
    ("count", "tp", "pad_to", "real", "zero"),
    [
        (10, 4, None, [3, 3, 3, 1], [0, 0, 0, 2]),
        (5, 4, None, [2, 2, 1, 0], [0, 0, 1, 2]),
        (10, 4, 16, [4, 4, 2, 0], [0, 0, 2, 4]),
        (2, 3, 9, [2, 0, 0], [1, 3, 3]),
    ],
)
def test_padding_is_rows_of_zeros_at_the_end_of_the_last_ranks(
    count: int, tp: int, pad_to: int | None, real: list[int], zero: list[int]
) -> None:
    axes = axes_of(Axis("vocab", count, 1, pad=True))
    tensor = LogicalTensor("embed.weight", "F32", (count, 3), Cut("column", 0, ("vocab",)))
    layout = shard([tensor], axes, deal(axes, Mesh(tp), None, pad_to))
    assert [sum(p.box[0][1] - p.box[0][0] for p in rank[0].parts) for rank in layout] == real
    assert [sum(stop - start for (start, stop), _ in rank[0].fills) for rank in layout] == zero
    for (stored,), rows in zip(layout, real, strict=True):
        assert stored.shape == (sum(stored_rows := [rows, sum(b[0][1] - b[0][0] for b in stored.fills)]), 3)
        assert all(fill == ((rows, sum(stored_rows)), (0, 3)) for fill in stored.fills)
        assert all(part.at == (0, 0) for part in stored.parts)


# Where each unit lies.


def boxes(stored: StoredTensor, dim: int) -> list[tuple[int, int, int]]:
    """Start and stop of each part along the cut dim, and where it begins in the rank's tensor."""
    return [(*part.box[dim], part.at[dim]) for part in stored.parts]


def layout_of(
    shape: tuple[int, ...], cut: Cut, axes: dict[str, Axis], tp: int, dtype: str = "F32"
) -> list[StoredTensor]:
    tensor = LogicalTensor("t", dtype, shape, cut)
    layout = shard([tensor], axes, deal(axes, Mesh(tp)))
    assert_coverage([tensor], layout)
    return [stored for (stored,) in layout]


def test_falcon_with_two_kv_groups_on_four_ranks() -> None:
    """8 query heads in 2 groups, head_dim 8: a group is 4 q, 1 k, 1 v = 48 rows; two ranks share its k and v."""
    axes = axes_of(Axis("heads", 8, 8, group="kv"), Axis("kv", 2, 8, replicate=True))
    ranks = layout_of((96, 64), Cut("column", 0, ("heads", "kv", "kv"), "kv"), axes, 4)
    assert [boxes(stored, 0) for stored in ranks] == [
        [(0, 16, 0), (32, 48, 16)],
        [(16, 32, 0), (32, 48, 16)],
        [(48, 64, 0), (80, 96, 16)],
        [(64, 80, 0), (80, 96, 16)],
    ]
    assert {stored.shape for stored in ranks} == {(32, 64)}


def test_fused_qkv_of_gpt2_is_three_blocks() -> None:
    ranks = layout_of((96, 288), Cut("column", 1, ("heads",) * 3), axes_of(Axis("heads", 12, 8)), 4)
    assert boxes(ranks[1], 1) == [(24, 48, 0), (120, 144, 24), (216, 240, 48)]
    assert ranks[1].shape == (96, 72)


def test_qkv_interleaved_per_head_is_one_plain_slice() -> None:
    ranks = layout_of((96, 32), Cut("column", 0, ("heads",) * 3, "heads"), axes_of(Axis("heads", 4, 8)), 2)
    assert [boxes(stored, 0) for stored in ranks] == [[(0, 48, 0)], [(48, 96, 0)]]


def test_a_whole_tensor_is_one_part() -> None:
    tensor = LogicalTensor("norm.weight", "F32", (3, 4), Cut("replicate"))
    assert whole(tensor) == StoredTensor("norm.weight", "F32", (3, 4), (Part("norm.weight", ((0, 3), (0, 4)), (0, 0)),))
    assert tuple(shard([tensor], {}, deal({}, Mesh(3)))) == ((whole(tensor),),) * 3


def test_replicas_are_equal_boxes_whatever_stands_beside_them() -> None:
    """Two axes repeated differently and stored side by side: a part of one must not grow into the other on one rank."""
    axes = axes_of(Axis("kv", 1, 2, replicate=True), Axis("state", 2, 2, replicate=True), Axis("ffn", 4, 1))
    ranks = layout_of((10,), Cut("column", 0, ("kv", "state", "ffn")), axes, 4)
    assert [boxes(stored, 0) for stored in ranks] == [
        [(0, 2, 0), (2, 4, 2), (6, 7, 4)],
        [(0, 2, 0), (2, 4, 2), (7, 8, 4)],
        [(0, 2, 0), (4, 6, 2), (8, 9, 4)],
        [(0, 2, 0), (4, 6, 2), (9, 10, 4)],
    ]


def test_what_an_interleaved_rank_holds() -> None:
    """Groups [q q k v] and [q q k v], 3 groups on 2 ranks: 2 groups and 1."""
    axes = axes_of(Axis("heads", 6, 2, group="kv"), Axis("kv", 3, 2, replicate=True))
    dealt: Deal = deal(axes, Mesh(2), (1, 1))
    cut = Cut("column", 0, ("heads", "kv", "kv"), "kv")
    assert intervals(cut, axes, dealt, 0) == (((0, 16, 0),), (), 16)
    assert intervals(cut, axes, dealt, 1) == (((16, 24, 0),), (), 8)


@pytest.mark.parametrize(
    ("dtype", "shape", "dim", "tp", "works"),
    [
        ("F4", (6, 3), 0, 2, False),  # 3 rows of 12 bits
        ("F4", (4, 3), 0, 2, True),
        ("F4", (4, 6), 1, 2, False),  # 3 columns of 4 bits
        ("F4", (4, 8), 1, 2, True),
        ("F6_E2M3", (4, 2), 0, 2, True),
        ("F6_E3M2", (4, 2), 0, 4, False),
        ("F8_E4M3", (6, 3), 0, 2, True),
    ],
)
def test_a_dtype_below_a_byte_is_cut_where_bytes_end(
    dtype: str, shape: tuple[int, ...], dim: int, tp: int, works: bool
) -> None:
    axes = axes_of(Axis("ffn", shape[dim], 1))
    cut = Cut("column", dim, ("ffn",))
    if works:
        assert prod(layout_of(shape, cut, axes, tp, dtype)[0].shape) * tp == prod(shape)
    else:
        with pytest.raises(UnsupportedError, match="falls inside a byte of") as error:
            layout_of(shape, cut, axes, tp, dtype)
        assert error.value.tensor == "t"


def test_padding_ends_on_a_byte_too() -> None:
    axes = axes_of(Axis("vocab", 4, 1, pad=True))
    tensor = LogicalTensor("embed.weight", "F4", (4, 1), Cut("column", 0, ("vocab",)))
    assert shard([tensor], axes, deal(axes, Mesh(1), None, 6))[0][0].shape == (6, 1)
    with pytest.raises(UnsupportedError, match="a cut at 0:5 of dim 0 falls inside a byte of F4"):
        shard([tensor], axes, deal(axes, Mesh(1), None, 5))


# Companions: tensors of which one element stands for several of the axis.


def companion(axes: dict[str, Axis], cut: Cut) -> LogicalTensor:
    """A tensor of three columns that is cut by rows, or whose columns are the module's."""
    size = sum(axes[name].count * axes[name].unit for name in cut.segments)
    size = -(-size // cut.ratio)
    return LogicalTensor("m.scale", "F32", (size, 3) if cut.dim == 0 else (3, size), cut)


@st.composite
def companions(draw: st.DrawFn) -> tuple[dict[str, Axis], Cut, int]:
    """Axes, the cut of a module's companion, and a tp; often such that they fit together."""
    tp, ratio = draw(st.integers(1, 4)), draw(st.integers(2, 6))

    def units(most: int) -> int:
        return draw(st.integers(1, most)) * draw(st.sampled_from([1, tp]))

    def elements() -> int:
        return draw(st.integers(1, 3)) * draw(st.sampled_from([1, ratio]))

    kv = Axis("kv", units(3), elements(), replicate=draw(st.booleans()))
    heads = Axis("heads", kv.count * draw(st.integers(1, 3)), kv.unit, group="kv")
    vocab = Axis("vocab", draw(st.integers(1, 20)), elements(), pad=True)
    segments = draw(st.sampled_from([("ffn",), ("ffn", "ffn"), ("vocab",), ("heads", "kv", "kv"), ("kv", "ffn")]))
    interleave = "kv" if "heads" in segments and draw(st.booleans()) else None
    cut = Cut("column", draw(st.sampled_from([0, 1])), segments, interleave, ratio)
    return axes_of(heads, kv, Axis("ffn", units(6), elements()), vocab), cut, tp


def holds_a_part_of_an_element(layout: Sequence[Sequence[StoredTensor]], cut: Cut, size: int) -> bool:
    """Whether a rank of a module's layout holds some of the rows that make an element, and not all; or of padding."""
    dim, ratio = cut.dim or 0, cut.ratio
    for (stored,) in layout:
        rows = {row for part in stored.parts for row in range(*part.box[dim])}
        if any(
            0 < len(rows & set(range(e, min(e + ratio, size)))) < min(ratio, size - e) for e in range(0, size, ratio)
        ):
            return True
        if any(fill[dim][1] % ratio for fill in stored.fills):
            return True
    return False


@given(companions(), st.booleans())
def test_companions_are_cut_where_the_module_is_or_not_at_all(
    drawn: tuple[dict[str, Axis], Cut, int], uneven: bool
) -> None:
    axes, cut, tp = drawn
    try:
        ranges = deal(axes, Mesh(tp), (1,) * tp if uneven else None)
    except UnsupportedError:
        return
    dim, ratio = cut.dim or 0, cut.ratio
    module, scale = companion(axes, replace(cut, ratio=1)), companion(axes, cut)
    whole_layout = shard([module], axes, ranges)
    size = module.shape[dim]
    try:
        layout = shard([scale], axes, ranges)
    except UnsupportedError as error:
        assert error.tensor == "m.scale" and f"which stands for {ratio}" in error.message
        assert error.exit_code == 4 and error.found == f"tp {tp}"
        possible = [int(number) for number in re.findall(r"\d+", str(error.expected).partition("tp")[2])]
        assert 1 in possible and (uneven or tp not in possible)
        for other in possible_tp(axes):
            if other in possible:
                shard([scale], axes, deal(axes, Mesh(other)))
            else:
                with pytest.raises(UnsupportedError):
                    shard([scale], axes, deal(axes, Mesh(other)))
        repeated = any(axes[name].replicate for name in cut.segments)
        assert repeated or holds_a_part_of_an_element(whole_layout, cut, size)
        return
    assert not holds_a_part_of_an_element(whole_layout, cut, size)
    assert_coverage([scale], layout)
    for (share,), (of_module,) in zip(layout, whole_layout, strict=True):
        assert tiles(full(share.shape), [placed_box(part.box, part.at, None) for part in share.parts] + [*share.fills])
        stretched = [(start * ratio, min(stop * ratio, size), at * ratio) for start, stop, at in boxes(share, dim)]
        assert stretched == boxes(of_module, dim)
        assert share.shape[dim] == -(-of_module.shape[dim] // ratio)


def test_a_scale_of_blocks_says_which_tp_works() -> None:
    """11008 = 86 x 128: with 2 ranks each has 43 blocks, with 4 a block would be cut."""
    axes = axes_of(Axis("ffn", 11008, 1), Axis("heads", 32, 128))
    scale = companion(axes, Cut("row", 1, ("ffn",), ratio=128))
    assert [rank[0].shape for rank in shard([scale], axes, deal(axes, Mesh(2)))] == [(3, 43)] * 2
    with pytest.raises(UnsupportedError) as error:
        shard([scale], axes, deal(axes, Mesh(4)))
    assert error.value.message == (
        "m.scale: a cut at 2752 of 11008 ffn of 1 falls inside an element, which stands for 128"
    )
    assert (error.value.expected, error.value.found) == ("cuts at multiples of 128, as with tp 1 or 2", "tp 4")


def test_the_last_block_may_be_a_part_of_one() -> None:
    """300 heads of 2 in blocks of 128: two ranks have 2 blocks, and 2 and a part, which are stored as 3."""
    axes = axes_of(Axis("heads", 300, 2))
    scale = companion(axes, Cut("column", 0, ("heads",), ratio=128))
    assert scale.shape == (5, 3)
    shares = shard([scale], axes, Deal(Mesh(2), axes, {"heads": ((0, 128), (128, 300))}))
    assert [boxes(stored, 0) for (stored,) in shares] == [[(0, 2, 0)], [(2, 5, 0)]]
    assert_coverage([scale], shares)
    axes = axes_of(Axis("vocab", 250, 1, pad=True))
    scale = companion(axes, Cut("column", 0, ("vocab",), ratio=4))
    shares = shard([scale], axes, deal(axes, Mesh(2), None, 264))
    assert [boxes(stored, 0) for (stored,) in shares] == [[(0, 33, 0)], [(33, 63, 0)]]
    assert shares[1][0].fills == (((30, 33), (0, 3)),)
    with pytest.raises(UnsupportedError, match="a cut at 254 of 250 vocab of 1 falls inside an element"):
        shard([scale], axes, deal(axes, Mesh(1), None, 254))
