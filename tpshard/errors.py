"""Errors that the user can act on. A bug of ours is an `assert`, never one of these."""

import errno
from typing import Any, ClassVar


class TpshardError(Exception):
    """An error with a cause, a place and a way out.

    `message` is one line. `path`, `tensor`, `expected` and `found` say where; `hint` says what to do (default: the
    class's `way_out`).
    `code` and `exit_code` belong to the class and are part of the documented contract (docs/reference/exit-codes.md).
    """

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 70
    way_out: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        path: object = None,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        self.tensor = tensor
        self.expected = expected
        self.found = found
        self.hint = self.way_out if hint is None else hint

    def __str__(self) -> str:
        parts = [self.message]
        if self.tensor is not None and self.tensor not in self.message:
            parts.append(f"tensor {self.tensor}")
        if self.path is not None and self.path not in self.message:
            parts.append(self.path)
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.found is not None:
            parts.append(f"found {self.found}")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The `error` object of the JSON contract."""
        return {
            "code": self.code,
            "message": self.message,
            "path": self.path,
            "tensor": self.tensor,
            "expected": None if self.expected is None else str(self.expected),
            "found": None if self.found is None else str(self.found),
            "hint": self.hint,
        }


class DifferentError(TpshardError):
    """Two things that must be equal were judged and are not."""

    code = "different"
    exit_code = 1
    way_out = "`tpshard check` with --source names every tensor that differs"


class UsageError(TpshardError):
    """The command or the call cannot be meant as it stands."""

    code = "usage"
    exit_code = 2
    way_out = "the command with --help explains its arguments and options"


class CorruptError(TpshardError):
    """An input file is damaged, incomplete, or contradicts another."""

    code = "corrupt"
    exit_code = 3
    way_out = "copy or download the files again"


class UnsupportedError(TpshardError):
    """The model, or this tensor-parallel size for it, is not supported."""

    code = "unsupported"
    exit_code = 4
    way_out = "`tpshard archs` lists what is supported"


class UnsafeError(TpshardError):
    """Refused because it could run code or touch files outside the model."""

    code = "unsafe"
    exit_code = 5
    way_out = "use only files that you trust"


class LocalIOError(TpshardError):
    """The operating system refused to read or write: disk full, permission, I/O error."""

    code = "io"
    exit_code = 6
    way_out = "check the disk, the path and its permissions"


class HubError(TpshardError):
    """The Hugging Face Hub, or the network on the way to it, failed."""

    code = "hub"
    exit_code = 7
    way_out = "check the network and try again"


class TargetError(TpshardError):
    """The output exists, is locked by another run, or belongs to another run."""

    code = "target"
    exit_code = 9
    way_out = "give another directory with -o"


class Interrupted(TpshardError):
    """The user stopped the command."""

    code = "interrupted"
    exit_code = 130


def local_error(error: OSError, doing: str, path: object = None) -> LocalIOError:
    """An OSError as the user should read it."""
    where = path if path is not None else error.filename
    hints = {
        errno.ENOSPC: "free some space, or give another disk with -o; the same command then resumes",
        errno.EDQUOT: "your quota on this disk is used up; the same command resumes when there is room",
        errno.EACCES: "check the permissions of the directory",
        errno.EPERM: "check the permissions of the directory",
        errno.EROFS: "the disk is mounted read-only: give another directory with -o",
        errno.EIO: "the disk reports an error; see the system's log",
        errno.EMFILE: "too many open files: raise the limit with `ulimit -n`",
    }
    reason = error.strerror or str(error)
    return LocalIOError(f"{doing}: {reason}", path=where, hint=hints.get(error.errno or 0))
