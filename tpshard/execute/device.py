"""Files onto a device: each byte read once, reads overlapped with copies to the device and with hashing."""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import Queue
from typing import Any

from tpshard.errors import UnsupportedError
from tpshard.storage.checksums import require_digest
from tpshard.storage.files import Files, Handles
from tpshard.storage.pool import Pool
from tpshard.storage.source import RankFile
from tpshard.storage.torch_pickle import DTYPES  # first: it says what to do when torch is missing

import torch  # isort: skip  # noqa: E402

STAGE = 16 << 20
"""Bytes of one staging buffer, pinned where it is copied to a GPU."""
READERS = 4
"""Threads that read: one alone copies from the page cache more slowly than memory, or the bus, would take it."""


def load_files(
    files: Sequence[RankFile], device: str | torch.device, recorded: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """The tensors of a rank's files by name, on a device, as stored.

    One allocation a file on the device, of which the tensors are views in the file's own layout, but for those that lie
    there unaligned. For a GPU, threads read the file into pinned buffers while others of them are copied.
    recorded: sha256 by path; what is read of such a file is held against it. CorruptError when it is another one,
    UnsupportedError without the device.
    """
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("no GPU is there", expected=str(target), found="cpu", hint="use device='cpu'")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors.update(_load_file(file, target, recorded.get(str(file.path))))
    return tensors


def _load_file(file: RankFile, device: torch.device, sha256: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    infos, path = file.tensors, str(file.path)
    begin = infos[0].begin if infos else file.size
    data = torch.empty(file.size - begin, dtype=torch.uint8, device=device)
    reader = Handles(Files())
    digest = _Digest(skipped=sha256 is None)

    def read(buffer: memoryview, offset: int) -> None:
        try:
            reader.read_into(path, [buffer], begin + offset)
        except BaseException:
            digest.give_up()
            raise
        digest.update(buffer, offset)

    try:
        if sha256 is not None:
            header = memoryview(bytearray(begin))
            reader.read_into(path, [header], 0)
            digest.sha256.update(header)
        if len(data):
            (_to_memory if device.type == "cpu" else _to_gpu)(read, data)
    finally:
        reader.close()
    if sha256 is not None:
        require_digest(path, expected=sha256, found=digest.sha256.hexdigest())
    for info in infos:
        if info.dtype not in DTYPES:
            raise UnsupportedError(f"torch has no dtype for {info.dtype}", tensor=info.name, path=file.path)
        dtype = DTYPES[info.dtype]
        flat = data[info.begin - begin : info.end - begin]
        if (info.begin - begin) % dtype.itemsize:  # the format packs tensors; torch has no view of such
            flat = flat.clone()
        yield info.name, flat.view(dtype).view(info.shape)


class _Digest:
    """sha256 of what several threads read: each hashes its stretch when all before it is hashed.

    Stretches are begun in order, so whoever waits for its turn waits for one that is being read.
    """

    def __init__(self, *, skipped: bool) -> None:
        self.sha256 = hashlib.sha256()
        self._skipped = skipped  # nothing is hashed, or no more since a read failed
        self._hashed = 0
        self._changed = threading.Condition()

    def update(self, stretch: memoryview, offset: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._skipped or self._hashed == offset)
        if self._skipped:
            return
        self.sha256.update(stretch)
        with self._changed:
            self._hashed += len(stretch)
            self._changed.notify_all()

    def give_up(self) -> None:
        """Let nobody wait any longer: there is no digest."""
        with self._changed:
            self._skipped = True
            self._changed.notify_all()


Read = Callable[[memoryview, int], None]
"""Fill a buffer with a file's data from an offset on."""


def _to_memory(read: Read, data: torch.Tensor) -> None:
    """Fill `data`, several stretches at once."""
    array = data.numpy().data
    Pool(READERS).map(lambda at: read(array[at : at + STAGE], at), range(0, len(array), STAGE))


def _to_gpu(read: Read, data: torch.Tensor) -> None:
    """Fill `data` on a GPU, through pinned buffers and a stream of our own."""
    size = data.numel()
    buffers = [torch.empty(min(STAGE, size), dtype=torch.uint8, pin_memory=True) for _ in range(READERS + 1)]
    stream: Any = torch.cuda.Stream(data.device)  # type: ignore[no-untyped-call]
    # The memory of `data` may have belonged to a tensor that kernels in flight still read.
    stream.wait_stream(torch.cuda.current_stream(data.device))

    def fill(index: int, offset: int, count: int) -> None:
        read(buffers[index].numpy().data[:count], offset)

    def send(index: int, offset: int, count: int) -> Callable[[], object]:
        with torch.cuda.stream(stream):
            data[offset : offset + count].copy_(buffers[index][:count], non_blocking=True)
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        wait: Callable[[], object] = event.synchronize
        return wait

    try:
        staged(size, min(STAGE, size), len(buffers), fill, send)
    finally:
        stream.synchronize()


def staged(
    size: int,
    stage: int,
    buffers: int,
    read: Callable[[int, int, int], None],
    send: Callable[[int, int, int], Callable[[], object]],
) -> None:
    """Move `size` bytes through numbered buffers: `read(buffer, offset, count)` on threads, `send(…)` on this one.

    `send` begins a copy and returns what waits for its end; a buffer is read into again only after that. The first
    error ends it; on return no thread is reading. Not a `Pool`: copies to the device are begun and waited for in the
    order in which buffers fill, by this thread alone.
    """
    assert buffers > 1, "one is copied while another one is read"
    offsets = iter(range(0, size, stage))
    free: Queue[int | None] = Queue()
    filled: Queue[tuple[int, int, int] | BaseException] = Queue()
    turn = threading.Lock()

    def work() -> None:
        try:
            while (index := free.get()) is not None:
                with turn:
                    offset = next(offsets, None)
                if offset is None:
                    return
                count = min(stage, size - offset)
                read(index, offset, count)
                filled.put((index, offset, count))
        except BaseException as error:
            filled.put(error)

    readers = [threading.Thread(target=work, daemon=True) for _ in range(max(1, buffers - 1))]
    for index in range(buffers):
        free.put(index)
    for reader in readers:
        reader.start()
    copying: deque[tuple[int, Callable[[], object]]] = deque()
    try:
        for _ in range(0, size, stage):
            item = filled.get()
            if isinstance(item, BaseException):
                raise item
            copying.append((item[0], send(*item)))
            if len(copying) > 1:  # one copy goes on while the readers get the others' buffers back
                index, wait = copying.popleft()
                wait()
                free.put(index)
    finally:
        for _, wait in copying:
            wait()
        for _ in readers:
            free.put(None)
        for reader in readers:
            reader.join()
