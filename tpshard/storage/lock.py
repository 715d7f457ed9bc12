"""A lock on a name in a directory, so that two runs never write the same files."""

import fcntl
import os
from pathlib import Path
from types import TracebackType

from tpshard.errors import TargetError, local_error
from tpshard.storage.files import Files, about, unlink_if_there, write_exactly


class Lock:
    """An exclusive lock, held inside the `with` block; the system drops it when the process ends, however it ends.

    TargetError when another process holds it. On a file system without locks it protects nothing and says nothing.
    """

    def __init__(self, files: Files, path: Path) -> None:
        self.files = files
        self.path = path
        self._fd = -1

    def __enter__(self) -> "Lock":
        while True:
            try:
                self._fd = self.files.open_write(str(self.path))
            except FileNotFoundError:
                what = "another run has just given this directory its final name, or removed it"
                hint = "look whether the output is there; if not, give the command again"
                raise TargetError(what, path=self.path.parent, hint=hint) from None
            except OSError as error:
                raise local_error(error, "cannot write here", self.path.parent) from error
            if self._take():
                return self
            self.files.close(self._fd)

    def _take(self) -> bool:
        """Lock what was opened; False when it is no longer what the name means."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.files.close(self._fd)
            what, hint = "another run is writing here", "wait until it ends, or give another output with -o"
            raise TargetError(what, path=self.path.parent, hint=hint) from None
        except OSError:
            return True
        # The holder before us may have removed or renamed what we opened: then lock the new one.
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def write(self, data: bytes, *, fsync: bool) -> None:
        """Put the content of a small file into the lock's own file, which `rename` then gives its name."""
        with about(self.path):
            self.files.truncate(self._fd, 0)
            write_exactly(self.files, self._fd, [memoryview(data)], 0)
            if fsync:
                self.files.fsync(self._fd)

    def rename(self, path: Path) -> None:
        """Give the lock's file its final name, still holding the lock: in one step that appears and the lock's goes."""
        self.files.replace(str(self.path), str(path))
        self.path = path

    def remove(self) -> None:
        """Remove the name, still holding the lock."""
        unlink_if_there(self.files, self.path)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.files.close(self._fd)
