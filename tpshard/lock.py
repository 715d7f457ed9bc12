"""A lock on a name in a directory, so that two runs never write the same files."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from tpshard.errors import TargetError
from tpshard.files import Files, local_error, unlink_if_there


class Lock:
    """An exclusive lock, held inside the `with` block; the system drops it when the process ends, however it ends.

    TargetError when another process holds it. On a file system without locks it protects nothing and says nothing.
    """

    def __init__(self, files: Files, path: Path) -> None:
        self.files = files
        self.path = path
        self._fd = -1

    def __enter__(self) -> Lock:
        while True:
            try:
                self._fd = self.files.open_write(str(self.path))
            except OSError as error:
                raise local_error(error, "cannot write here", self.path.parent) from error
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.files.close(self._fd)
                raise TargetError(
                    "another run is writing here",
                    path=self.path.parent,
                    hint="wait until it ends, or give another output with -o",
                ) from None
            except OSError:
                return self
            # The holder before us may have removed the name that we opened: then lock the new one.
            if self.path.exists() and os.path.samestat(self.path.stat(), os.fstat(self._fd)):
                return self
            self.files.close(self._fd)

    def remove(self) -> None:
        """Remove the name, still holding the lock."""
        unlink_if_there(self.files, self.path)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.files.close(self._fd)
