"""Run a plan: threads that move blocks, in bounded memory, and tell how far every output is complete.

Workers take blocks in plan order, so at most a few tensors are in flight; everything before them is complete in
every output file. That prefix is what is flushed, journalled and hashed behind the copy, and what a resumed run skips.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

from tpshard.errors import DifferentError
from tpshard.execute.blocks import BLOCK, Flat, FlatStep, flatten, operations
from tpshard.execute.functions import BlockScales, computed
from tpshard.planning.box import Box, full
from tpshard.planning.join import Step
from tpshard.planning.layout import StoredTensor
from tpshard.storage.pool import Pool
from tpshard.storage.source import Reader


class Convert(Protocol):
    """Casts the blocks of tensors."""

    def __call__(self, block: memoryview, source: str, target: str, tensor: str) -> memoryview:
        """The block's bytes in another dtype."""

    def notes(self) -> list[str]:
        """What a user should know of all casts so far."""


Progress = Callable[[int], None]
"""Called with the number of bytes that were moved since the last call, from any thread."""


Action = Callable[[FlatStep, Box, memoryview, int], None]
"""What is done with a block of a step once its bytes are in the buffer; the last is the number of the block."""


class Loader:
    """Reads blocks from the sources, checks that replicas agree, casts where the target has another dtype."""

    def __init__(self, reader: Reader, convert: Convert | None) -> None:
        self.reader = reader
        self.convert = convert
        self._local = threading.local()

    def load(self, step: FlatStep, block: Box) -> memoryview:
        """The block's bytes, row-major, in the target's dtype; valid until this thread's next call."""
        item = step.targets[0].item if not step.sources else step.sources[0].item
        size = item
        for start, stop in block:
            size *= stop - start
        if not step.sources:
            return memoryview(step.value * (size // item) if step.value else bytes(size))
        buffer = self._buffer(size)
        for flat in step.sources:
            self._read(flat, block, buffer)
        for flat in step.replicas:
            self._compare(step, flat, block, buffer)
        if step.function:
            assert step.source_dtype is not None
            return computed(step.function, buffer, step.source_dtype, step.target_dtype, self._scales(step, block))
        if step.source_dtype != step.target_dtype:
            assert self.convert is not None and step.source_dtype is not None
            return self.convert(buffer, step.source_dtype, step.target_dtype, step.name)
        return buffer

    def _scales(self, step: FlatStep, block: Box) -> BlockScales | None:
        """What a block's numbers are multiplied with."""
        if step.scales is None:
            return None
        scales = step.scales.step
        buffer = memoryview(bytearray(prod(scales.shape) * scales.sources[0].item))
        for flat in scales.sources:
            self._read(flat, full(scales.shape), buffer)
        assert scales.source_dtype is not None
        return BlockScales(step.scales.of, step.scales.shape, buffer, scales.source_dtype, step.shape, block)

    def _buffer(self, size: int) -> memoryview:
        buffer: bytearray | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            self._local.buffer = buffer = bytearray(max(size, BLOCK))
        return memoryview(buffer)[:size]

    def _read(self, flat: Flat, block: Box, buffer: memoryview) -> None:
        for offset, parts in operations(flat, block, buffer, reading=True):
            self.reader.read_into(flat.file, parts, offset)

    def _compare(self, step: FlatStep, flat: Flat, block: Box, buffer: memoryview) -> None:
        if first_difference(self.reader, flat, block, buffer) is not None:
            what = f"{step.name}: ranks that hold the same part of it differ"
            hint = "`tpshard check` names the file whose checksum is wrong"
            raise DifferentError(what, path=flat.file, tensor=step.name, expected="equal replicas", hint=hint)


def first_difference(reader: Reader, flat: Flat, block: Box, buffer: memoryview) -> int | None:
    """The file offset of the first byte of a region that is not as in the block's buffer, or None."""
    for offset, parts in operations(flat, block, buffer):
        expected = b"".join(parts)
        found = bytearray(len(expected))
        reader.read_into(flat.file, [memoryview(found)], offset)
        if expected != found:
            return offset + next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    return None


@dataclass
class _Queue:
    """Blocks in plan order, and how many steps are complete without a gap."""

    steps: Sequence[Step]
    skip: Callable[[int], bool]
    lock: threading.Lock = field(default_factory=threading.Lock)
    low: int = 0
    turn: int = 0

    def __post_init__(self) -> None:
        self._open: dict[int, int] = {}  # step -> blocks in flight, + 1 while more may come
        self._blocks = self._generate()

    def _generate(self) -> Iterator[tuple[int, FlatStep, Box]]:
        for index, step in enumerate(self.steps):
            self._open[index] = 1
            if not self.skip(index):
                flat = flatten(step)
                for block in flat.blocks():
                    self._open[index] += 1
                    yield index, flat, block
            self._leave(index)

    def take(self) -> tuple[int, FlatStep, Box, int] | None:
        with self.lock:
            item = next(self._blocks, None)
            self.turn += 1
            return None if item is None else (*item, self.turn)

    def done(self, index: int) -> None:
        with self.lock:
            self._leave(index)

    def _leave(self, index: int) -> None:
        self._open[index] -= 1
        while self._open.get(self.low) == 0:
            del self._open[self.low]
            self.low += 1


class Background(Protocol):
    """Work that follows the copy (hashing). `step` does a little of it and says whether it did any."""

    def step(self, complete: int) -> bool: ...

    def finished(self, complete: int) -> bool: ...


def run(
    steps: Sequence[Step],
    loader: Loader,
    action: Action,
    *,
    workers: int,
    skip: Callable[[int], bool] = lambda index: False,
    background: Background | None = None,
    on_complete: Callable[[int], None] = lambda complete: None,
) -> None:
    """Take every block of every step through `loader` and `action`, on `workers` threads.

    on_complete is called from this thread, now and then and at the end, with the number of steps that are complete.
    The first error of any worker stops all of them and is raised here; so is KeyboardInterrupt.
    """
    queue = _Queue(steps, skip)
    pool = Pool(workers)

    def work() -> None:
        while not pool.stopped.is_set():
            if background is not None and background.step(queue.low):
                continue
            item = queue.take()
            if item is not None:
                index, flat, block, turn = item
                action(flat, block, loader.load(flat, block), turn)
                queue.done(index)
            elif background is None or background.finished(queue.low):
                return
            else:
                pool.stopped.wait(0.001)  # another worker has the last blocks

    try:
        pool.run(work, meanwhile=lambda: on_complete(queue.low))
    finally:
        loader.reader.close()
    assert queue.low == len(steps)
    on_complete(queue.low)


class Comparer:
    """The action of `check --source`: compare every target with the block, and remember where they differ.

    differences: (tensor, file) → file offset of the first byte that differs, as far as was looked.
    """

    def __init__(self, reader: Reader, progress: Progress) -> None:
        self.reader = reader
        self.progress = progress
        self.differences: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def __call__(self, step: FlatStep, block: Box, buffer: memoryview, turn: int) -> None:
        for flat in step.targets:
            offset = first_difference(self.reader, flat, block, buffer)
            if offset is not None:
                with self._lock:
                    key = (step.name, flat.file)
                    self.differences[key] = min(offset, self.differences.get(key, offset))
        self.progress(len(buffer))


def conversion(
    sources: Iterable[StoredTensor], targets: Iterable[StoredTensor], *, refuse: bool = False
) -> Convert | None:
    """torch's cast, if any tensor's dtype changes: only then is torch imported. refuse: values that become infinite."""
    dtypes = {part.tensor: stored.dtype for stored in sources if not stored.function for part in stored.parts}
    moved = (stored for stored in targets if not stored.function)
    if all(dtypes.get(part.tensor, stored.dtype) == stored.dtype for stored in moved for part in stored.parts):
        return None
    from tpshard.execute.cast import Cast

    return Cast(refuse)
