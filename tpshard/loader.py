"""Load one rank's tensors onto a device: each byte read once, reads overlapped with copies to the device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

from tpshard.errors import CorruptError, UnsupportedError, UsageError
from tpshard.files import Files, local_error, read_exactly
from tpshard.formats.shards import RankFile, open_shards
from tpshard.torch_io import DTYPES  # first: it says what to do when torch is missing

import torch  # isort: skip  # noqa: E402

STAGE = 64 << 20
"""Bytes of one staging buffer; a GPU load has two pinned ones."""


def load_rank(directory: str | Path, rank: int, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of one rank of a shard set, by name, on `device`.

    One allocation a file on the device, of which the tensors are views in the file's own layout. On a GPU the file is
    read into two pinned buffers in turn while the other one is copied.
    UsageError for a rank that the set has not, CorruptError when it is not complete.
    """
    shards = open_shards(Path(directory))
    if not 0 <= rank < shards.tp:
        raise UsageError(f"no rank {rank} in this set", path=directory, expected=f"0 to {shards.tp - 1}", found=rank)
    if rank not in shards.files:
        raise CorruptError(f"rank {rank} is missing", path=directory, hint="`tpshard check` tells what else is")
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("no GPU is there", expected=str(target), found="cpu", hint="use device='cpu'")
    tensors: dict[str, torch.Tensor] = {}
    for file in shards.files[rank]:
        tensors.update(_load_file(file, target))
    return tensors


def _load_file(file: RankFile, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    infos = file.tensors
    if not infos:
        return
    begin = infos[0].begin
    data = torch.empty(file.size - begin, dtype=torch.uint8, device=device)
    files = Files()
    try:
        fd = files.open_read(str(file.path))
        try:
            if device.type == "cpu":
                array = data.numpy().data
                for offset in range(0, len(array), STAGE):
                    read_exactly(files, fd, [array[offset : offset + STAGE]], begin + offset, str(file.path))
            else:
                _stream(files, fd, begin, data, str(file.path))
        finally:
            files.close(fd)
    except OSError as error:
        raise local_error(error, "cannot read", file.path) from error
    for info in infos:
        if info.dtype not in DTYPES:
            raise UnsupportedError(f"torch has no dtype for {info.dtype}", tensor=info.name, path=file.path)
        flat = data[info.begin - begin : info.end - begin]
        yield info.name, flat.view(DTYPES[info.dtype]).view(info.shape)


def _stream(files: Files, fd: int, begin: int, data: torch.Tensor, path: str) -> None:
    """Read a file into pinned buffers on a thread, and copy each to the device as it is filled."""
    size = data.numel()
    buffers = [torch.empty(min(STAGE, size), dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    free: Queue[int] = Queue()
    filled: Queue[tuple[int, int, int] | BaseException | None] = Queue()
    for index in range(len(buffers)):
        free.put(index)

    def read() -> None:
        try:
            for offset in range(0, size, STAGE):
                index = free.get()
                count = min(STAGE, size - offset)
                view = buffers[index].numpy().data[:count]
                read_exactly(files, fd, [view], begin + offset, path)
                filled.put((index, offset, count))
            filled.put(None)
        except BaseException as error:
            filled.put(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    stream: Any = torch.cuda.Stream(data.device)  # type: ignore[no-untyped-call]
    copying: list[tuple[int, Any]] = []
    while (item := filled.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        index, offset, count = item
        with torch.cuda.stream(stream):
            data[offset : offset + count].copy_(buffers[index][:count], non_blocking=True)
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        copying.append((index, event))
        if len(copying) == len(buffers):  # the reader needs one back: wait for the older copy
            oldest, done = copying.pop(0)
            done.synchronize()
            free.put(oldest)
    stream.synchronize()
    thread.join()
