"""Files of a directory: what may be read, and read safely."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tpshard.errors import CorruptError, LocalIOError, UnsafeError
from tpshard.storage.names import side_files


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


def side_paths(directory: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """The side files among `names`, as paths that may be read: see `safe_path`."""
    return tuple(safe_path(directory, name) for name in side_files(names))


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
        raise CorruptError("the file is missing", path=path, hint="download the checkpoint again") from None
    except OSError as error:
        raise LocalIOError(f"cannot read: {error.strerror}", path=path) from None


def safe_path(directory: Path, name: str) -> Path:
    """A file of the model; UnsafeError when a symlink leads out of the model's directory and the Hub's cache."""
    path = directory / name
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    allowed = [root, hub_cache()]
    if root.parent.name == "snapshots":  # of a cache elsewhere: its files are symlinks into the blobs beside it
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise UnsafeError(
            f"{name} is a symlink that leaves the model's directory",
            path=path,
            expected="a file of the model or of the Hub's cache",
            found=real,
            hint="copy the file into the model's directory if you trust it",
        )
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
