"""Subclasses of `Files` that fail, die, lose power or only count, at a chosen call; and a run without threads."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tests.crash.fine import in_order
from tpshard.storage.files import Files

CALLS = (
    "open_read", "open_write", "preadv", "pwritev", "truncate", "datasync", "fsync", "replace", "rename", "unlink",
    "rmdir", "mkdir", "size",
)  # fmt: skip
"""Every call of the seam but `close`: the system closes what a dead process had open."""
READS = ("open_read", "preadv", "size")
"""The calls that leave the disk as it is: to die there is to die at the next other call."""


class Died(BaseException):
    """The process is gone: nothing may be written after this."""


class Watched(Files):
    """Calls `before` in front of every call but close. Syncs are not passed on: no test waits for a disk."""

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Look, or raise."""

    def datasync(self, fd: int) -> None:
        pass

    def fsync(self, fd: int) -> None:
        pass

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in CALLS:
            return method

        def watched(*arguments: Any) -> Any:
            self.before(name, arguments)
            return method(*arguments)

        return watched


@dataclass
class Recorder(Watched):
    """Remembers every call."""

    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.calls.append((name, arguments))

    def count(self, *names: str) -> int:
        """How many calls there were of these names."""
        return sum(name in names for name, _ in self.calls)


@dataclass
class Faulty(Watched):
    """Fails at the n-th call: with an errno, once, or for good, as when the process is killed. A write is torn."""

    n: int
    fault: int | None  # an errno; None kills, and then reads do not count
    seen: int = 0
    dead: bool = False
    hit: str | None = None  # the name of the call
    lock: threading.Lock = field(default_factory=threading.Lock)

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        with self.lock:
            if self.dead:
                raise Died
            if self.fault is None and name in READS:
                return
            self.seen += 1
            if self.seen != self.n:
                return
            self.hit = name
            if name == "pwritev":
                fd, buffers, offset = arguments
                data = b"".join(buffers)
                os.pwrite(fd, data[: len(data) // 2], offset)
            if self.fault is None:
                self.dead = True
                raise Died
            raise OSError(self.fault, os.strerror(self.fault), *(a for a in arguments[:1] if isinstance(a, str)))


@dataclass
class Meanwhile(Watched):
    """Does something else in front of the n-th call that is not a read: another host, another user."""

    n: int
    action: Callable[[], object]
    seen: int = 0

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.seen += name not in READS
        if self.seen == self.n and name not in READS:
            self.action()


class _Inode:
    """A file's content as the disk has it for sure, and the ranges written since the last sync."""

    def __init__(self, durable: bytes = b"") -> None:
        self.durable = durable
        self.last = durable  # as the process saw it when the file lost its name, or at the crash
        self.dirty: list[tuple[int, int]] = []

    def surviving(self, fate: str, chance: random.Random) -> bytes:
        """What of it is on disk: all that was synced, and of each later write what `fate` says."""
        if fate == "old":
            return self.durable
        data = bytearray(self.durable.ljust(len(self.last), b"\0")[: len(self.last)])
        for begin, end in self.dirty:
            if fate == "mixed" and chance.random() < 0.5:
                data[begin:end] = self.last[begin:end]
        return bytes(data)


_Names = dict[str, _Inode | None]  # a directory is None


class PowerLoss(Faulty):
    """A machine that loses power at the n-th call. `crash` leaves under `root` what a disk may then hold.

    The model is that of a journalling file system. Renames, creations and removals become durable in the order in
    which they were made: those before the last sync of a directory for certain, and any number of those after it. Data
    is durable once its file was synced; else it may be there, be zeros, or the file may have its old length.
    """

    def __init__(self, n: int, root: Path) -> None:
        super().__init__(n, None)
        self.root = root
        self.names: _Names = {
            str(path): None if path.is_dir() else _Inode(path.read_bytes()) for path in sorted(root.rglob("*"))
        }
        self.durable = dict(self.names)
        self.log: list[Callable[[_Names], _Names]] = []  # the changes that are not durable yet
        self.open: dict[int, _Inode | None] = {}

    def _change(self, change: Callable[[_Names], _Names]) -> None:
        self.log.append(change)
        self.names = change(self.names)

    def open_read(self, path: str) -> int:
        fd = super().open_read(path)
        self.open[fd] = None
        return fd

    def open_write(self, path: str) -> int:
        fd = super().open_write(path)
        if path not in self.names:
            inode = _Inode()
            self._change(lambda names: names | {path: inode})
        self.open[fd] = self.names[path]
        return fd

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = super().pwritev(fd, buffers, offset)
        inode = self.open[fd]
        assert inode is not None
        inode.dirty.append((offset, offset + count))
        return count

    def fsync(self, fd: int) -> None:
        inode = self.open[fd]
        if inode is None:
            self.durable = dict(self.names)
            self.log.clear()
        else:
            inode.durable = os.pread(fd, os.fstat(fd).st_size, 0)
            inode.dirty.clear()

    def datasync(self, fd: int) -> None:
        PowerLoss.fsync(self, fd)

    def replace(self, source: str, target: str) -> None:
        self._keep(target)
        super().replace(source, target)
        self._change(lambda names: _moved(names, source, target))

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self._change(lambda names: _moved(names, source, target))

    def unlink(self, path: str) -> None:
        self._keep(path)
        super().unlink(path)
        self._change(lambda names: _without(names, path))

    def rmdir(self, path: str) -> None:
        super().rmdir(path)
        self._change(lambda names: _without(names, path))

    def mkdir(self, path: str) -> None:
        super().mkdir(path)
        self._change(lambda names: names | {path: None})

    def _keep(self, path: str) -> None:
        inode = self.names.get(path)
        if inode is not None:
            inode.last = Path(path).read_bytes()

    def crash(self, seed: int) -> None:
        """Put under `root` what the disk holds when the power is back; `seed` picks one of the possible states."""
        chance = random.Random(seed)
        for path in self.names:
            self._keep(path)
        names = self.durable
        for change in self.log[: chance.choice([0, len(self.log), chance.randint(0, len(self.log))])]:
            names = change(names)
        fate = chance.choice(["zeros", "old", "mixed"])
        shutil.rmtree(self.root)
        self.root.mkdir()
        for path, inode in sorted(names.items()):
            if inode is None:
                Path(path).mkdir()
            else:
                Path(path).write_bytes(inode.surviving(fate, chance))


def _moved(names: _Names, source: str, target: str) -> _Names:
    """The names after a rename of a file, or of a directory and all in it."""
    gone = {path for path in names if path == source or path.startswith(source + "/")}
    kept = {path: inode for path, inode in names.items() if path not in gone}
    return kept | {target + path.removeprefix(source): names[path] for path in gone}


def _without(names: _Names, gone: str) -> _Names:
    return {path: inode for path, inode in names.items() if path != gone}


@contextmanager
def one_thread() -> Iterator[None]:
    """Run plans with `in_order`."""
    with mock.patch("tpshard.execute.writer.run", in_order):
        yield


@contextmanager
def survived() -> Iterator[list[BaseException]]:
    """Collects what a run died or failed of."""
    ended: list[BaseException] = []
    try:
        yield ended
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, AssertionError)):
            raise
        ended.append(error)
