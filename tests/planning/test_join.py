"""Plans from shapes alone: what is written where, in which order, and what cannot be planned."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tpshard.errors import CorruptError
from tpshard.planning.axes import Axis, Cut
from tpshard.planning.box import full, volume
from tpshard.planning.deal import deal
from tpshard.planning.join import (
    Fill,
    OutputFile,
    Placed,
    Plan,
    Transfer,
    _covers,
    _flow,
    _is_filled,
    alignment_order,
    assert_coverage,
    join,
    output_file,
    parts_by_size,
)
from tpshard.planning.layout import LogicalTensor, Part, StoredTensor, shard, whole
from tpshard.planning.mesh import Mesh
from tpshard.storage.safetensors import parse_header

AXES = {"kv": Axis("kv", 2, 3, replicate=True), "ffn": Axis("ffn", 8, 1), "vocab": Axis("vocab", 10, 1, pad=True)}
MODEL = (
    LogicalTensor("embed", "BF16", (10, 4), Cut("column", 0, ("vocab",))),
    LogicalTensor("k", "BF16", (6, 4), Cut("column", 0, ("kv",))),
    LogicalTensor("up", "BF16", (8, 4), Cut("column", 0, ("ffn",))),
    LogicalTensor("down", "BF16", (4, 8), Cut("row", 1, ("ffn",))),
    LogicalTensor("norm", "BF16", (4,), Cut("replicate")),
)


def split_to(tp: int) -> list[OutputFile]:
    layout = shard(MODEL, AXES, deal(AXES, Mesh(tp)))
    return [output_file(f"rank{rank}", stored, {}) for rank, stored in enumerate(layout)]


def placed(files: list[OutputFile]) -> list[Placed]:
    return [each for file in files for each in file.tensors]


def source() -> list[OutputFile]:
    return [output_file("source", [whole(tensor) for tensor in MODEL], {})]


def positions(plan: Plan, output: OutputFile) -> list[int]:
    """The offsets of an output's tensors, in the order in which the plan writes them."""
    found = []
    for step in plan.steps:
        for region in step.targets if isinstance(step, Transfer) else (step.target,):
            if region.file == output.name:
                found.append(region.begin)
    return found


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_file_is_written_front_to_back(tp: int) -> None:
    plan = join(MODEL, placed(source()), split_to(tp))
    for output in plan.outputs:
        offsets = positions(plan, output)
        assert offsets == sorted(offsets)
        assert set(offsets) == {each.begin for each in output.tensors}


@pytest.mark.parametrize(("a", "b"), [(1, 4), (4, 1), (4, 2), (2, 8)])
def test_each_element_is_read_once_and_replicas_are_only_compared(a: int, b: int) -> None:
    plan = join(MODEL, placed(split_to(a)), split_to(b))
    transfers = [step for step in plan.steps if isinstance(step, Transfer)]
    assert [step.name for step in transfers] == [tensor.name for tensor in MODEL]
    for step, tensor in zip(transfers, MODEL, strict=True):
        read = [piece.box for region in step.sources for piece in region.pieces]
        again = [piece.box for region in step.replicas for piece in region.pieces]
        written = [piece.box for region in step.targets for piece in region.pieces]
        assert sum(map(volume, read)) == volume(full(tensor.shape))
        assert set(again) <= set(read)
        assert len(again) == {"norm": a - 1, "k": max(0, a - 2)}.get(tensor.name, 0)
        assert sum(map(volume, set(written))) == volume(full(tensor.shape))
        assert written.count(written[0]) == {"norm": b, "k": max(1, b // 2)}.get(tensor.name, 1)


def test_padding_is_filled_where_it_lies() -> None:
    plan = join(MODEL, placed(source()), split_to(8))  # 10 rows on 8 ranks of 2
    fills = [step for step in plan.steps if isinstance(step, Fill)]
    assert [(fill.target.file, fill.target.pieces) for fill in fills] == [
        (f"rank{rank}", ((((0, 2), (0, 4)), 0, (4, 1)),)) for rank in (5, 6, 7)
    ]
    assert plan.nbytes == sum(output.size for output in plan.outputs)


def test_a_file_is_what_its_header_says() -> None:
    (file,) = source()
    header = parse_header(file.header, "source", file.size)
    assert [(t.name, t.dtype, t.shape, t.begin) for t in header.tensors] == [
        (each.stored.name, each.stored.dtype, each.stored.shape, each.begin) for each in file.tensors
    ]
    assert header.tensors[-1].end == file.size


def test_larger_dtypes_come_first_so_that_all_are_aligned() -> None:
    dtypes = ["U8", "F32", "F4", "BF16", "I64", "BOOL", "F16", "F6_E2M3"]
    tensors = [LogicalTensor(dtype, dtype, (4,), Cut("replicate")) for dtype in dtypes]
    ordered = alignment_order(tensors)
    assert [t.name for t in ordered] == ["I64", "F32", "BF16", "F16", "U8", "BOOL", "F4", "F6_E2M3"]
    for each in output_file("file", [whole(tensor) for tensor in ordered], {}).tensors:
        assert each.begin % {"I64": 8, "F32": 4, "BF16": 2, "F16": 2}.get(each.stored.dtype, 1) == 0


@pytest.mark.parametrize(
    ("limit", "names"),
    [
        (10_000, [["embed", "k", "up", "down", "norm"]]),
        (128, [["embed", "k"], ["up", "down"], ["norm"]]),  # 80 + 48, 64 + 64, 8
        (127, [["embed"], ["k", "up"], ["down", "norm"]]),
        (1, [["embed"], ["k"], ["up"], ["down"], ["norm"]]),  # a tensor is never cut
    ],
)
def test_files_are_filled_up_to_a_size(limit: int, names: list[list[str]]) -> None:
    parts = parts_by_size([whole(tensor) for tensor in MODEL], limit)
    assert [[stored.name for stored in part] for part in parts] == names


def test_a_source_that_lacks_a_part_is_refused() -> None:
    ranks = split_to(4)
    for lost in range(4):
        held = [each for file in ranks if file.name != f"rank{lost}" for each in file.tensors]
        with pytest.raises(CorruptError, match="the ranks do not hold embed exactly") as error:
            join(MODEL, held, source())
        assert error.value.tensor == "embed"
    with pytest.raises(CorruptError, match="the ranks do not hold norm exactly"):
        join(MODEL, [each for each in placed(ranks) if each.stored.name != "norm"], source())


def test_a_source_that_holds_a_part_twice_but_otherwise_is_refused() -> None:
    """Overlapping boxes that are not the same box are no replicas."""
    up = MODEL[2]
    parts = [Part("up", ((0, 5), (0, 4)), (0, 0)), Part("up", ((4, 8), (0, 4)), (0, 0))]
    held = [Placed(StoredTensor("up", "BF16", (4, 4), (part,)), f"rank{i}", 0) for i, part in enumerate(parts)]
    with pytest.raises(CorruptError, match="the ranks do not hold up exactly") as error:
        join([up], held, [output_file("out", [whole(up)], {})])
    assert error.value.found == "36 elements in 2 boxes"


def test_a_layout_with_a_hole_or_an_overlap_is_our_bug() -> None:
    layout = shard(MODEL, AXES, deal(AXES, Mesh(4)))
    assert_coverage(MODEL, layout)
    with pytest.raises(AssertionError, match="embed is not covered exactly"):
        assert_coverage(MODEL, layout[:3])
    moved = layout[0][2]._replace(parts=(Part("up", ((1, 3), (0, 4)), (0, 0)),))
    with pytest.raises(AssertionError, match="up is not covered exactly"):
        assert_coverage(MODEL, ((*layout[0][:2], moved, *layout[0][3:]), *layout[1:]))


def test_an_output_that_is_not_filled_is_our_bug() -> None:
    up = whole(MODEL[2])
    for parts in ((Part("up", ((0, 7), (0, 4)), (0, 0)),), (Part("up", ((0, 7), (0, 4)), (1, 0)), *up.parts)):
        with pytest.raises(AssertionError, match="parts and padding do not tile"):
            join(MODEL, placed(source()), [output_file("out", [up._replace(parts=parts)], {})])


def test_layers_that_are_alike_are_planned_once() -> None:
    """Any number of layers costs the geometry of one, and all of them share it."""
    layers = [replace(tensor, name=f"{layer}.{tensor.name}") for layer in range(50) for tensor in MODEL]
    layout = shard(layers, AXES, deal(AXES, Mesh(4)))
    outputs = [output_file(f"rank{rank}", tensors, {}) for rank, tensors in enumerate(layout)]
    for geometry in (_flow, _covers, _is_filled):
        geometry.cache_clear()
    assert_coverage(layers, layout)
    steps = join(layers, [Placed(whole(tensor), "model", 0) for tensor in layers], outputs).steps
    assert _flow.cache_info().misses == _covers.cache_info().misses == len(MODEL)
    assert _is_filled.cache_info().misses <= 4 * len(MODEL)
    first, last = (next(step for step in steps if step.name == f"{layer}.up") for layer in (0, 49))
    assert isinstance(first, Transfer) and isinstance(last, Transfer)
    assert all(a.pieces is b.pieces for a, b in zip(first.targets, last.targets, strict=True))


def test_a_stored_tensor_of_many_others_gives_each_its_own_parts() -> None:
    """A stack of experts: whose parts come in any order."""
    experts = [LogicalTensor(f"e{i}", "BF16", (2, 3), Cut("replicate")) for i in range(6)]
    parts = [Part(f"e{i}", ((r, r + 1), (0, 3)), (2 * i + r, 0)) for r in (1, 0) for i in (3, 0, 5, 1, 4, 2)]
    stack = output_file("out", [StoredTensor("stack", "BF16", (12, 3), tuple(parts))], {})
    plan = join(experts, [Placed(whole(each), each.name, 0) for each in experts], [stack])
    for step in plan.steps:
        assert isinstance(step, Transfer)
        ((_, *_, pieces),) = step.targets
        index = int(step.name[1:])
        assert [(piece.box[0], piece.offset) for piece in pieces] == [((1, 2), 6 * index + 3), ((0, 1), 6 * index)]
    assert sorted(step.name for step in plan.steps) == [each.name for each in experts]
