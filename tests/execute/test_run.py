"""The executor on real files: any number of workers, bounded memory, errors that stop everything and say where."""

from __future__ import annotations

import os
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from tests.helpers.toys import Tensor, bits_of, of_bits, random_tensor, write
from tpshard.errors import CorruptError, DifferentError, LocalIOError
from tpshard.execute import blocks as lower
from tpshard.execute.blocks import FlatStep, flatten, operations
from tpshard.execute.run import Comparer, Loader, first_difference, run
from tpshard.planning.axes import Axis, Cut
from tpshard.planning.box import Box
from tpshard.planning.deal import deal
from tpshard.planning.join import OutputFile, Placed, Plan, join, output_file
from tpshard.planning.layout import LogicalTensor, StoredTensor, shard, whole
from tpshard.planning.mesh import Mesh
from tpshard.storage.files import Files, Handles, write_exactly
from tpshard.storage.local import read_header

TP = 4
AXES = {
    "kv": Axis("kv", 2, 4, replicate=True),
    "ffn": Axis("ffn", 16, 1),
    "vocab": Axis("vocab", 10, 1, pad=True),
}
MODEL = (
    LogicalTensor("embed", "F32", (10, 8), Cut("column", 0, ("vocab",))),
    LogicalTensor("k", "F32", (8, 8), Cut("column", 0, ("kv",))),
    LogicalTensor("up", "F32", (16, 8), Cut("column", 0, ("ffn",))),
    LogicalTensor("down", "F32", (8, 16), Cut("row", 1, ("ffn",))),
    LogicalTensor("norm", "F32", (8,), Cut("replicate")),
    LogicalTensor("empty", "F32", (0, 3), Cut("replicate")),
    LogicalTensor("scale", "F32", (), Cut("buffer")),
)


class Counted(Files):
    """Files that count what is open."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.open_now = 0

    def open_read(self, path: str) -> int:
        self.opened.append(path)
        self.open_now += 1
        return super().open_read(path)

    def close(self, fd: int) -> None:
        self.open_now -= 1
        super().close(fd)


def placed_in(path: Path, stored: Sequence[StoredTensor]) -> list[Placed]:
    begins = {info.name: info.begin for info in read_header(path).tensors}
    return [Placed(tensor, str(path), begins[tensor.name]) for tensor in stored]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    path = tmp_path / "model.safetensors"
    write(path, {tensor.name: random_tensor(rng, tensor.dtype, tensor.shape) for tensor in MODEL})
    return path


def outputs_in(directory: Path, layout: Sequence[Sequence[StoredTensor]]) -> list[OutputFile]:
    """Files of the right size, full of ones, with their headers; the plan's names are their paths."""
    files = []
    for rank, stored in enumerate(layout):
        output = output_file(str(directory / f"rank{rank}"), stored, {})
        Path(output.name).write_bytes(output.header + b"\xff" * (output.size - len(output.header)))
        files.append(output)
    return files


def split_plan(source: Path, directory: Path) -> Plan:
    layout = shard(MODEL, AXES, deal(AXES, Mesh(TP)))
    return join(MODEL, placed_in(source, [whole(tensor) for tensor in MODEL]), outputs_in(directory, layout))


class Write:
    """The simplest action: write every block where it belongs."""

    def __init__(self) -> None:
        self.files = Files()

    def __call__(self, step: FlatStep, block: Box, buffer: memoryview, turn: int) -> None:
        for flat in step.targets:
            fd = os.open(flat.file, os.O_RDWR)
            for offset, parts in operations(flat, block, buffer):
                write_exactly(self.files, fd, parts, offset)
            os.close(fd)


def written(plan: Plan) -> dict[str, bytes]:
    return {Path(output.name).name: Path(output.name).read_bytes() for output in plan.outputs}


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("block", [4, 24, 1 << 20])
def test_the_bytes_are_the_same_for_any_workers_and_blocks(
    source: Path, tmp_path: Path, workers: int, block: int
) -> None:
    plan = split_plan(source, tmp_path)
    with patch.object(lower, "BLOCK", block):
        run(plan.steps, Loader(Handles(Files()), None), Write(), workers=workers)
    tensors = {
        tensor.name: bits_of(Tensor(tensor.dtype, tensor.shape, data_of(source, tensor.name))) for tensor in MODEL
    }
    pad = np.zeros((2, 8, 32), dtype=np.uint8)
    embed = np.concatenate([tensors["embed"], pad])
    for rank, (name, raw) in enumerate(written(plan).items()):
        expected = {
            "embed": embed[3 * rank : 3 * rank + 3],
            "k": tensors["k"][4 * (rank // 2) : 4 * (rank // 2) + 4],
            "up": tensors["up"][4 * rank : 4 * rank + 4],
            "down": tensors["down"][:, 4 * rank : 4 * rank + 4],
            "norm": tensors["norm"],
            "empty": tensors["empty"],
            "scale": tensors["scale"],
        }
        header = plan.outputs[rank].header
        assert raw == header + b"".join(of_bits("F32", bits).data for bits in expected.values()), name


def data_of(path: Path, name: str) -> bytes:
    info = next(info for info in read_header(path).tensors if info.name == name)
    return path.read_bytes()[info.begin : info.end]


def merge_plan(source: Path, directory: Path) -> tuple[Plan, Plan]:
    """A split that is run, and the plan that merges it again into one file."""
    split = split_plan(source, directory)
    run(split.steps, Loader(Handles(Files()), None), Write(), workers=2)
    ranks = [placed for output in split.outputs for placed in output.tensors]
    merged = output_file(str(directory / "merged"), [whole(tensor) for tensor in MODEL], {})
    Path(merged.name).write_bytes(merged.header + b"\xff" * (merged.size - len(merged.header)))
    return split, join(MODEL, ranks, [merged])


def test_each_file_is_opened_once_and_closed(source: Path, tmp_path: Path) -> None:
    _, merge = merge_plan(source, tmp_path)
    files = Counted()
    with patch.object(lower, "BLOCK", 16):
        run(merge.steps, Loader(Handles(files), None), Write(), workers=3)
    assert sorted(Path(path).name for path in files.opened) == ["rank0", "rank1", "rank2", "rank3"]
    assert files.open_now == 0
    assert (tmp_path / "merged").read_bytes() == source.read_bytes().replace(
        b'"__metadata__":{"format":"pt"},', b"", 1
    ) or data_of(tmp_path / "merged", "k") == data_of(source, "k")


@pytest.mark.parametrize(("rank", "tensor"), [(1, "k"), (2, "norm"), (3, "scale")])
def test_replicas_that_differ_are_named(source: Path, tmp_path: Path, rank: int, tensor: str) -> None:
    split, merge = merge_plan(source, tmp_path)
    path = Path(split.outputs[rank].name)
    placed = next(placed for placed in split.outputs[rank].tensors if placed.stored.name == tensor)
    raw = bytearray(path.read_bytes())
    raw[placed.begin + 3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DifferentError, match=f"^{tensor}: ranks that hold the same part of it differ") as error:
        run(merge.steps, Loader(Handles(Files()), None), Write(), workers=2)
    assert (error.value.tensor, error.value.path) == (tensor, str(path))


def test_a_source_that_ends_early_is_named(source: Path, tmp_path: Path) -> None:
    plan = split_plan(source, tmp_path)
    os.truncate(source, source.stat().st_size - 20)
    with pytest.raises(CorruptError, match="the file ends before its data does") as error:
        run(plan.steps, Loader(Handles(Files()), None), Write(), workers=2)
    assert error.value.path == str(source)


def test_a_source_that_is_gone_is_named(source: Path, tmp_path: Path) -> None:
    plan = split_plan(source, tmp_path)
    source.unlink()
    with pytest.raises(LocalIOError, match="cannot open: No such file") as error:
        run(plan.steps, Loader(Handles(Files()), None), Write(), workers=2)
    assert error.value.path == str(source)


def test_a_source_that_cannot_be_read_is_named(source: Path, tmp_path: Path) -> None:
    class Broken(Files):
        def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            raise OSError(5, "Input/output error")

    with pytest.raises(LocalIOError, match="cannot read: Input/output error") as error:
        run(split_plan(source, tmp_path).steps, Loader(Handles(Broken()), None), Write(), workers=2)
    assert error.value.path == str(source)
    assert "the system's log" in str(error.value.hint)


def test_the_system_may_read_less_than_it_was_asked_for(source: Path, tmp_path: Path) -> None:
    class Slow(Files):
        def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            return super().preadv(fd, [buffers[0][:3]], offset)

    plan = split_plan(source, tmp_path)
    run(plan.steps, Loader(Handles(Slow()), None), Write(), workers=2)
    slow = written(plan)
    run(plan.steps, Loader(Handles(Files()), None), Write(), workers=2)
    assert slow == written(plan)


class Stop(Exception):
    """Raised by a test's action."""


@pytest.mark.parametrize("workers", [1, 4])
def test_an_error_of_one_worker_stops_all(source: Path, tmp_path: Path, workers: int) -> None:
    plan = split_plan(source, tmp_path)
    done: list[int] = []
    before = threading.active_count()

    def action(step: FlatStep, block: Box, buffer: memoryview, turn: int) -> None:
        done.append(turn)
        if turn == 5:
            raise Stop("block 5")

    with patch.object(lower, "BLOCK", 4), pytest.raises(Stop, match="block 5"):
        run(plan.steps, Loader(Handles(Files()), None), action, workers=workers)
    assert len(done) < 100  # of more than 200 blocks
    assert threading.active_count() == before


def test_an_interrupt_stops_the_workers(source: Path, tmp_path: Path) -> None:
    plan = split_plan(source, tmp_path)
    started = threading.Event()
    before = threading.active_count()

    def action(step: FlatStep, block: Box, buffer: memoryview, turn: int) -> None:
        started.set()
        threading.Event().wait(0.002)

    def interrupt(complete: int) -> None:
        if started.is_set():
            raise KeyboardInterrupt

    with patch.object(lower, "BLOCK", 4), pytest.raises(KeyboardInterrupt):
        run(plan.steps, Loader(Handles(Files()), None), action, workers=2, on_complete=interrupt)
    assert threading.active_count() == before


class Log:
    """Remembers which blocks were acted on, and what was complete when the executor said so."""

    def __init__(self, plan: Plan, pause: Callable[[int], float] = lambda turn: 0.0) -> None:
        self.steps = [flatten(step) for step in plan.steps]
        self.done: dict[str, int] = {}
        self.lock = threading.Lock()
        self.pause = pause
        self.reports: list[int] = []

    def __call__(self, step: FlatStep, block: Box, buffer: memoryview, turn: int) -> None:
        threading.Event().wait(self.pause(turn))
        with self.lock:
            self.done[self.key(step)] = self.done.get(self.key(step), 0) + 1

    @staticmethod
    def key(step: FlatStep) -> str:
        return f"{step.name} {len(step.sources)}"

    def report(self, complete: int) -> None:
        """What is said to be complete is: each of its blocks was acted on."""
        self.reports.append(complete)
        with self.lock:
            for step in self.steps[:complete]:
                assert self.done.get(self.key(step), 0) == len(list(step.blocks())), step.name


def test_what_is_complete_has_no_gaps(source: Path, tmp_path: Path) -> None:
    plan = split_plan(source, tmp_path)
    with patch.object(lower, "BLOCK", 16):
        log = Log(plan, pause=lambda turn: 0.004 if turn % 7 == 0 else 0.0)
        run(plan.steps, Loader(Handles(Files()), None), log, workers=3, on_complete=log.report)
    assert log.reports[-1] == len(plan.steps) and log.reports == sorted(log.reports)


def test_a_skipped_step_is_complete_and_not_read(source: Path, tmp_path: Path) -> None:
    plan = split_plan(source, tmp_path)
    log = Log(plan)
    reports: list[int] = []
    run(
        plan.steps, Loader(Handles(Files()), None), log, workers=2, skip=lambda index: plan.steps[index].name != "up",
        on_complete=reports.append,
    )  # fmt: skip
    assert list(log.done) == ["up 1"]
    assert reports[-1] == len(plan.steps)


def test_work_in_the_background_goes_on_until_it_is_finished(source: Path, tmp_path: Path) -> None:
    plan = split_plan(source, tmp_path)

    class Follow:
        """Follows the copy one step a call, and then has three more calls to make."""

        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.seen = 0
            self.more = 3

        def step(self, complete: int) -> bool:
            with self.lock:
                if self.seen < complete:
                    self.seen += 1
                    return True
                if complete == len(plan.steps) and self.more:
                    self.more -= 1
                    return True
                return False

        def finished(self, complete: int) -> bool:
            return complete == len(plan.steps) and not self.more

    follow = Follow()
    run(plan.steps, Loader(Handles(Files()), None), Write(), workers=3, background=follow)
    assert (follow.seen, follow.more) == (len(plan.steps), 0)


def test_a_cast_is_made_block_by_block(source: Path, tmp_path: Path) -> None:
    narrow = [LogicalTensor(t.name, "U8", t.shape, t.cut) for t in MODEL]
    layout = shard(narrow, AXES, deal(AXES, Mesh(TP)))
    plan = join(narrow, placed_in(source, [whole(tensor) for tensor in MODEL]), outputs_in(tmp_path, layout))
    calls: list[tuple[int, str, str]] = []

    def first_byte(block: memoryview, given: str, wanted: str, tensor: str) -> memoryview:
        calls.append((len(block), given, wanted))
        return memoryview(bytes(block[::4]))

    with patch.object(lower, "BLOCK", 32):
        run(plan.steps, Loader(Handles(Files()), first_byte), Write(), workers=2)
    assert all(0 < size <= 32 and names == ("F32", "U8") for size, *names_ in calls if (names := tuple(names_)))
    up = np.frombuffer(data_of(source, "up"), dtype=np.uint8)[::4].reshape(16, 8)
    for rank in range(TP):
        assert data_of(tmp_path / f"rank{rank}", "up") == up[4 * rank : 4 * rank + 4].tobytes()
    assert data_of(tmp_path / "rank3", "embed")[8:] == bytes(16)  # one row, then padding


def test_a_comparer_finds_the_first_byte_that_differs(source: Path, tmp_path: Path) -> None:
    plan = split_plan(source, tmp_path)
    run(plan.steps, Loader(Handles(Files()), None), Write(), workers=2)
    seen: list[int] = []

    def judge() -> dict[tuple[str, str], int]:
        comparer = Comparer(Handles(Files()), seen.append)
        with patch.object(lower, "BLOCK", 24):
            run(plan.steps, Loader(Handles(Files()), None), comparer, workers=2)
        comparer.reader.close()
        return {(tensor, Path(file).name): offset for (tensor, file), offset in comparer.differences.items()}

    assert judge() == {}
    assert sum(seen) == sum(info.nbytes for info in read_header(source).tensors) + 2 * 8 * 4  # with the padding
    wrong: dict[tuple[str, str], int] = {}
    for rank, name, at in ((0, "down", 17), (3, "embed", 95), (1, "k", 0)):
        begin = next(p.begin for p in plan.outputs[rank].tensors if p.stored.name == name)
        path = tmp_path / f"rank{rank}"
        raw = bytearray(path.read_bytes())
        raw[begin + at] ^= 0x80
        raw[begin + at + 8 if name == "down" else begin + at] ^= 1
        path.write_bytes(raw)
        wrong[name, path.name] = begin + at
    assert judge() == wrong


def test_the_first_difference_is_an_offset_in_the_file(source: Path) -> None:
    (placed,) = placed_in(source, [whole(MODEL[2])])
    plan = join([MODEL[2]], [placed], [output_file("none", [whole(MODEL[2])], {})])
    step = flatten(plan.steps[0])
    (flat,) = step.sources
    buffer = bytearray(data_of(source, "up"))
    buffer[77] ^= 4
    reader = Handles(Files())
    block = ((0, 1), (0, 128))
    assert first_difference(reader, flat, block, memoryview(buffer)) == placed.begin + 77
    buffer[77] ^= 4
    assert first_difference(reader, flat, block, memoryview(buffer)) is None
    reader.close()


def test_handles_open_a_path_once_for_all_threads(source: Path) -> None:
    files = Counted()
    handles = Handles(files)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(handles.get(str(source)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(set(found)), len(files.opened)) == (8, 1, 1)
    handles.close()
    assert files.open_now == 0


@pytest.mark.parametrize(("rule", "shape"), [("column", (4096, 4096)), ("row", (4096, 4096)), ("row", (16, 1 << 20))])
def test_memory_does_not_grow_with_the_tensor(rule: Any, shape: tuple[int, int], tmp_path: Path) -> None:
    """64 MB (of zeros that take no disk) to 4 ranks: a block and its slices for each of two workers."""
    dim = 0 if rule == "column" else 1
    axes = {"ffn": Axis("ffn", shape[dim], 1)}
    tensor = LogicalTensor("w", "F32", shape, Cut(rule, dim, ("ffn",)))
    header = output_file("source", [whole(tensor)], {}).header
    path = tmp_path / "source"
    path.write_bytes(header)
    os.truncate(path, len(header) + 4 * shape[0] * shape[1])
    outputs = [
        output_file(str(tmp_path / f"rank{rank}"), stored, {})
        for rank, stored in enumerate(shard([tensor], axes, deal(axes, Mesh(4))))
    ]
    for output in outputs:
        Path(output.name).touch()
        os.truncate(output.name, output.size)
    plan = join([tensor], [Placed(whole(tensor), str(path), len(header))], outputs)
    comparer = Comparer(Handles(Files()), lambda count: None)
    tracemalloc.start()
    run(plan.steps, Loader(Handles(Files()), None), comparer, workers=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    comparer.reader.close()
    assert comparer.differences == {}
    assert peak < 16 << 20
