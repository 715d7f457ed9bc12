"""Where bytes come from: one interface for a directory, the Hub's cache and the Hub; an object store would be another.

Nothing that plans, or knows a format, may tell them apart.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from tpshard.storage.carried import Listing
from tpshard.storage.safetensors import Header, TensorInfo, header_length, parse_header

_FIRST = 1 << 16
"""Bytes that are read of a file at first: most headers are shorter."""


class Source(Protocol):
    """The files of one place, by their names. Several threads may read at once."""

    @property
    def place(self) -> str:
        """What errors call it."""

    @property
    def requests(self) -> int:
        """How many reads at a time are worth while: 1 where the bytes are near."""

    def names(self) -> Collection[str]:
        """The names of all files, without those in folders."""

    def listing(self) -> Listing:
        """All files, in folders as well."""

    def size(self, name: str) -> int:
        """A file's size in bytes."""

    def digest(self, name: str) -> str | None:
        """A file's sha256 where it is known without reading the file."""

    def read(self, name: str, begin: int, end: int) -> bytes:
        """The bytes `begin` to `end` (exclusive, within the file) of a file."""

    def read_small(self, name: str) -> bytes:
        """A whole file that is small enough to be held in memory."""

    def path(self, name: str) -> Path | None:
        """The file on this machine; None where there is none."""


class Reader(Protocol):
    """Reads files, known as `TensorInfo.file` says, into buffers. Several threads may read at once."""

    def read_into(self, file: str, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill `buffers`, one after the other, with the file's bytes from `offset` on."""

    def close(self) -> None:
        """Let go of everything; reading on opens it again."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One weight file: its name in the checkpoint, size in bytes, digest of its header, its own digest if known."""

    name: str
    size: int
    header_sha256: str
    sha256: str | None = None


@dataclass(frozen=True)
class RankFile:
    """One file of a rank, as its header describes it."""

    path: Path
    size: int
    tensors: tuple[TensorInfo, ...]


def fetch_header(read: Callable[[int, int], bytes | bytearray], file: str, file_size: int) -> Header:
    """The validated header of a file whose bytes `read(begin, end)` returns: in one read, or two where it is long.

    `file` becomes `TensorInfo.file`. CorruptError says what is wrong with it.
    """
    first = min(file_size, _FIRST)
    raw = bytes(read(0, first)) if first else b""
    data_begin = header_length(raw, file, file_size)
    if data_begin > first:
        raw += read(first, data_begin)
    return parse_header(raw, file, file_size)


def source_header(source: Source, name: str) -> tuple[Header, SourceFile]:
    """The validated header of a source's file, and what is to be remembered of the file."""
    size = source.size(name)
    header = fetch_header(partial(source.read, name), str(source.path(name) or name), size)
    return header, SourceFile(name, size, header.digest, source.digest(name))
