"""The one seam to the operating system: every call that touches a disk goes through `Files`.

Tests replace it to fail or stop at the n-th call; nothing else in the package opens, writes, renames or syncs.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from tpshard.errors import CorruptError, LocalIOError, local_error
from tpshard.units import human_bytes

IOV_MAX = 1024
"""Most buffers that one `preadv` or `pwritev` takes (Linux and macOS)."""


class Files:
    """System calls, one method each, so that a subclass can count them and fail."""

    def open_read(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def open_write(self, path: str) -> int:
        """Open for writing, created with the umask's mode; what is there stays."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def close(self, fd: int) -> None:
        os.close(fd)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def datasync(self, fd: int) -> None:
        os.fdatasync(fd) if hasattr(os, "fdatasync") else os.fsync(fd)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def replace(self, source: str, target: str) -> None:
        os.replace(source, target)

    def rename(self, source: str, target: str) -> None:
        """Rename a directory; the target must be absent or an empty directory."""
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def mkdir(self, path: str) -> None:
        os.mkdir(path)


class Handles:
    """Local files by path, each opened once and on first use: the `Reader` of what lies on this machine."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._lock = threading.Lock()
        self._fds: dict[str, int] = {}

    def get(self, path: str) -> int:
        """The read handle of a path."""
        if (fd := self._fds.get(path)) is not None:
            return fd
        with self._lock:
            if path not in self._fds:
                try:
                    self._fds[path] = self.files.open_read(path)
                except OSError as error:
                    raise local_error(error, "cannot open", path) from error
            return self._fds[path]

    def read_into(self, file: str, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill `buffers` from `offset` on. CorruptError when the file ends before, LocalIOError."""
        fd = self.get(file)
        try:
            read_exactly(self.files, fd, buffers, offset, file)
        except OSError as error:
            raise local_error(error, "cannot read", file) from error

    def close(self) -> None:
        """Close all handles."""
        for fd in self._fds.values():
            self.files.close(fd)
        self._fds.clear()


def read_exactly(files: Files, fd: int, buffers: Sequence[memoryview], offset: int, path: str) -> None:
    """Fill `buffers` from `offset` on. CorruptError when the file ends before."""
    for some in _batches(buffers):
        while some:
            count = files.preadv(fd, some, offset)
            if count == 0:
                raise CorruptError("the file ends before its data does", path=path, hint="was it changed while in use?")
            offset += count
            some = _rest(some, count)


def write_exactly(files: Files, fd: int, buffers: list[memoryview], offset: int) -> None:
    """Write all of `buffers` at `offset`."""
    for some in _batches(buffers):
        while some:
            count = files.pwritev(fd, some, offset)
            offset += count
            some = _rest(some, count)


def _batches(buffers: Sequence[memoryview]) -> Iterator[Sequence[memoryview]]:
    if len(buffers) <= IOV_MAX:
        yield buffers
        return
    for i in range(0, len(buffers), IOV_MAX):
        yield buffers[i : i + IOV_MAX]


def _rest(buffers: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    """What is left of `buffers` after their first `count` bytes: nearly always nothing."""
    if count == sum(map(len, buffers)):
        return []
    for i, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[i + 1 :]]
        count -= len(buffer)
    return []


def write_small(files: Files, path: Path, data: bytes, *, fsync: bool, tag: str = "") -> None:
    """Write a small file so that it is there whole or not at all. `tag` keeps writers of one path apart."""
    temporary = f"{path.parent}/.{path.name}{tag}.tmp"
    with about(path):
        fd = files.open_write(temporary)
        try:
            files.truncate(fd, 0)
            write_exactly(files, fd, [memoryview(data)], 0)
            if fsync:
                files.fsync(fd)
        finally:
            files.close(fd)
        files.replace(temporary, str(path))


def overwrite_small(files: Files, path: Path, data: bytes) -> None:
    """Write a small file over itself, in one call; `data` has the same length each time.

    Not through a rename: file systems flush what a rename replaces something with, and its removal then waits for that.
    """
    with about(path):
        fd = files.open_write(str(path))
        try:
            write_exactly(files, fd, [memoryview(data)], 0)
        finally:
            files.close(fd)


def sync_directory(files: Files, path: Path) -> None:
    """Make renames inside a directory durable, where the file system can."""
    with about(path):
        fd = files.open_read(str(path))
        try:
            files.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        finally:
            files.close(fd)


def make_directory(files: Files, path: Path, *, fsync: bool) -> bool:
    """Make a directory, and those above it; whether it was not there before."""
    if path.exists():
        return False
    make_directory(files, path.parent, fsync=fsync)
    try:
        files.mkdir(str(path))
    except FileExistsError:
        return False
    if fsync:
        sync_directory(files, path.parent)
    return True


def require_space(directory: Path, needed: int, *, doing: str = "", hint: str) -> None:
    """LocalIOError when the disk of a directory, which need not be there yet, has less than `needed` bytes free."""
    while not directory.exists():
        directory = directory.parent
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        figures = human_bytes(needed), human_bytes(free)
        if figures[0] == figures[1]:
            figures = f"{needed} bytes", f"{free} bytes"
        raise LocalIOError(
            f"not enough room{doing}", path=directory, expected=f"{figures[0]} free", found=figures[1], hint=hint
        )


def boot_id() -> str:
    """Changes when the machine starts anew, and with it what was not synced is lost; empty where it is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@contextlib.contextmanager
def about(path: object) -> Iterator[None]:
    """Name the file in an OSError of a call that only knew its descriptor."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def unlink_if_there(files: Files, path: Path) -> None:
    """Remove a file; that it is not there is fine."""
    with contextlib.suppress(FileNotFoundError):
        files.unlink(str(path))
