"""Files of a directory: what may be read, and read safely."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from tpshard.errors import CorruptError, LocalIOError, UnsafeError
from tpshard.storage.carried import Listing, hidden
from tpshard.storage.names import LOCK, MANIFEST, SIDE_PATTERNS, fits
from tpshard.storage.safetensors import Header
from tpshard.storage.source import fetch_header

Content = bytes | Path
"""A small file: its bytes, or where they are, so that not all are in memory at once."""


@dataclass(frozen=True)
class Directory:
    """A directory as a source: an unsharded checkpoint, or a snapshot in the Hub's cache.

    follow: its files may be symlinks to anywhere.
    """

    root: Path
    follow: bool = False
    requests: ClassVar[int] = 1
    _paths: dict[str, Path] = field(default_factory=dict, repr=False, compare=False)

    @property
    def place(self) -> str:
        return str(self.root)

    def names(self) -> set[str]:
        """The names of all that is in the directory, subdirectories as well."""
        return {entry.name for entry in entries(self.root)}

    def listing(self) -> Listing:
        """All files, in folders as well; nothing behind a symlink that leads out of the directory."""
        sizes: dict[str, int] = {}
        unread: dict[str, str] = {}
        _list(self.root, "", sizes, unread, self.follow)
        return Listing(sizes, unread)

    def path(self, name: str) -> Path:
        """The file's path, which may be read: see `safe_path`."""
        if name not in self._paths:
            self._paths[name] = safe_path(self.root, name, self.follow)
        return self._paths[name]

    def size(self, name: str) -> int:
        return self.path(name).stat().st_size

    def digest(self, name: str) -> str | None:
        return blob_digest(self.path(name))

    def read(self, name: str, begin: int, end: int) -> bytes:
        return bytes(read_range(self.path(name), begin, end))

    def read_small(self, name: str) -> bytes:
        return read_bytes(self.path(name))


def load_json(raw: bytes, path: object) -> Any:
    """Strict JSON: a key written twice, or anything that is not JSON, is a CorruptError."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(items)
        if len(data) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CorruptError(f"the key {twice!r} is written twice", path=path)
        return data

    if raw.startswith(b"version https://git-lfs"):
        raise CorruptError("a Git-LFS pointer instead of the file", path=path, hint="run `git lfs pull` there")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
    except RecursionError:
        raise CorruptError("not valid JSON: nested too deeply", path=path) from None
    except ValueError as error:
        raise CorruptError(f"not valid JSON: {error}", path=path, found=repr(raw[:40])) from None


def content_of(content: Content) -> bytes:
    """The bytes of a small file that is in memory or on disk."""
    return content if isinstance(content, bytes) else read_bytes(content)


def content_size(content: Content) -> int:
    """The bytes that a small file has."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _list(root: Path, below: str, sizes: dict[str, int], unread: dict[str, str], follow: bool) -> None:
    """Add the files in a folder (`below` ends in `/`) and in its folders; no symlink to a folder is followed."""
    for entry in sorted(entries(root / below)):
        name = below + entry.name
        if entry.is_dir():
            holds_set = (entry / MANIFEST).exists() or (entry / LOCK).exists()
            reason = hidden(entry.name) or ("a shard set" if holds_set else None)
            if reason or entry.is_symlink():
                unread[f"{name}/"] = reason or "a symlink to a folder"
            else:
                _list(root, f"{name}/", sizes, unread, follow)
        elif reason := hidden(entry.name):
            unread[name] = reason
        else:
            try:
                sizes[name] = safe_path(root, name, follow).stat().st_size
            except (UnsafeError, CorruptError, OSError):
                if below == "" and fits(name, SIDE_PATTERNS):
                    raise  # without it the model is another one
                linked = "a symlink that leads out of the directory, or to nothing"
                unread[name] = linked if entry.is_symlink() else "not a file"


def entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError as error:
        raise LocalIOError(f"cannot list: {error.strerror}", path=directory) from None


def read_bytes(path: Path) -> bytes:
    """A small file's content; CorruptError when it is missing, LocalIOError when it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CorruptError(f"{path.name} is missing", path=path) from None
    except OSError as error:
        raise LocalIOError(f"cannot read: {error.strerror}", path=path) from None


def read_range(path: str | os.PathLike[str], begin: int, end: int) -> bytearray:
    """The bytes `begin` to `end` of a local file, fewer where it ends before. LocalIOError when it cannot be read."""
    data, done = bytearray(end - begin), 0
    with _readable(path), open(path, "rb", buffering=0) as file, memoryview(data) as view:
        file.seek(begin)
        while count := file.readinto(view[done:]):
            done += count
    del data[done:]
    return data


def read_header(path: str | os.PathLike[str]) -> Header:
    """The validated header of a local file.

    CorruptError for what the file holds, LocalIOError for what the system refuses.
    """
    with _readable(path):
        size = os.stat(path).st_size
    return fetch_header(partial(read_range, path), str(path), size)


@contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a name that no system has, such as one with a NUL
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        hint = "check the path and its permissions"
        raise LocalIOError(f"cannot read the file: {reason}", path=path, hint=hint) from error


def safe_path(directory: Path, name: str, follow: bool | None = None) -> Path:
    """A file of the model; UnsafeError when a symlink leads out of the model's directory and the Hub's cache.

    follow: it may lead anywhere; None: it may not, and no option allows it.
    """
    path = directory / name
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    allowed = [root, hub_cache()]
    if root.parent.name == "snapshots":  # of a cache elsewhere: its files are symlinks into the blobs beside it
        allowed.append(root.parent.parent / "blobs")
    if not follow and not any(real.is_relative_to(place) for place in allowed):
        what = f"{name} is a symlink that leaves the model's directory"
        hint = "copy the file into the model's directory if you trust it"
        if follow is not None:
            hint = "if you trust where it leads, --follow-symlinks reads it"
        raise UnsafeError(what, path=path, expected="a file of the model or of the Hub's cache", found=real, hint=hint)
    if not real.is_file():
        found = "something else" if real.exists() else f"a symlink to nothing: {real}" if path.is_symlink() else None
        raise CorruptError(f"{name} is not there", path=path, expected="a file", found=found)
    return path


def hub_cache() -> Path:
    """The Hub's cache directory, as huggingface_hub finds it, without importing it."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.realpath(os.path.expanduser(cache)))


def cached_repo(directory: Path) -> tuple[str | None, str | None]:
    """Repo id and revision when the directory is a snapshot in a Hub cache."""
    real = Path(os.path.realpath(directory))
    repo = real.parent.parent.name
    if real.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/"), real.name
    return None, None


def blob_digest(path: Path) -> str | None:
    """The sha256 under which the Hub's cache keeps a large file."""
    real = Path(os.path.realpath(path))
    return real.name if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name) else None
