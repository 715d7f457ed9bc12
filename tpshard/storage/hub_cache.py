"""The shared cache of huggingface_hub: what it has of a repository, room for more, and whether what came is right."""

import hashlib
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tpshard.errors import HubError
from tpshard.storage.carried import Listing, listing_of
from tpshard.storage.files import require_space
from tpshard.storage.pool import Pool


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: bytes, its digest where the Hub stores it as a large file, else git's name of it."""

    name: str
    size: int
    sha256: str | None
    blob_id: str | None = None

    def why_not(self, content: BinaryIO, size: int) -> tuple[str, str] | None:
        """What was expected and what was found, where content is not that of the file; None where it is."""
        if size != self.size:
            return f"{self.size} bytes", f"{size} bytes"
        if self.sha256 is not None:
            kind, expected, digest = "sha256", self.sha256, hashlib.sha256()
        elif self.blob_id is not None:
            kind, expected, digest = "git blob", self.blob_id, hashlib.sha1(b"blob %d\0" % size)
        else:
            return None
        while piece := content.read(1 << 20):
            digest.update(piece)
        return None if digest.hexdigest() == expected else (f"{kind} {expected}", digest.hexdigest())


@dataclass(frozen=True)
class CachedCommit:
    """What the cache has, and shall have, of a repository's files at one commit."""

    repo_id: str
    revision: str
    files: tuple[RemoteFile, ...]

    @property
    def folder(self) -> Path:
        """Where the cache keeps the repository."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.repo_id.replace('/', '--')}"

    def path(self, name: str) -> Path:
        """Where a file is, once it is there."""
        return self.folder / "snapshots" / self.revision / name

    def require_space(self, names: Collection[str]) -> None:
        """LocalIOError when the disk of the cache has no room for what of these files it does not have yet."""

        def held(file: RemoteFile) -> int:
            places = [self.path(file.name)]
            if file.sha256:  # of another commit, or begun by a version of huggingface_hub that goes on with it
                places += [self.folder / "blobs" / f"{file.sha256}{ending}" for ending in ("", ".incomplete")]
            return max(place.stat().st_size if place.exists() else 0 for place in places)

        needed = sum(max(0, file.size - held(file)) for file in self.files if file.name in names)
        hint = "free some space, or set HF_HOME to a directory on another disk"
        require_space(self.folder.parent, needed, doing=f" to download {self.repo_id}", hint=hint)

    @contextmanager
    def checked(self, names: Collection[str]) -> Iterator[None]:
        """Hold what is fetched in the `with` block, also by one that fails, against what the Hub said of it.

        HubError for a file that is not so; it is taken out of the cache. What the cache had before is not read again.
        """
        fetched = [file for file in self.files if file.name in names and not self.path(file.name).exists()]
        try:
            yield
        except Exception:
            self._check(fetched)
            raise
        self._check(fetched)

    def _check(self, fetched: list[RemoteFile]) -> None:
        def differs(file: RemoteFile) -> tuple[str, str] | None:
            path = self.path(file.name)
            if not path.exists():
                return None
            with path.open("rb") as content:
                return file.why_not(content, os.fstat(content.fileno()).st_size)

        found = [(file.name, why) for file, why in zip(fetched, Pool(4).map(differs, fetched), strict=True) if why]
        for name, _ in found:
            self.path(name).resolve().unlink(missing_ok=True)  # two names may have one blob
            self.path(name).unlink(missing_ok=True)
        for name, (expected, there) in found:
            raise damaged(name, self.repo_id, expected, there)

    def require_whole(self, names: Collection[str]) -> None:
        """HubError for a file that is not there, or is of another size than the Hub says."""
        for file in self.files:
            if file.name not in names:
                continue
            path = self.path(file.name)
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                what = f"{file.name} of {self.repo_id} was not downloaded"
                raise HubError(what, path=path, hint="run the command again")
            if size != file.size:
                what = f"{file.name} of {self.repo_id} is damaged in the cache"
                hint = f"delete {path.resolve()} and run the command again"
                raise HubError(what, path=path, expected=f"{file.size} bytes", found=f"{size} bytes", hint=hint)


def damaged(name: str, repo_id: str, expected: str, found: str) -> HubError:
    """The error for a file that arrived with another size or content than the Hub describes."""
    hint = "run the command again; if that does not help, the Hub's copy is damaged, or a proxy changes it"
    return HubError(f"{name} of {repo_id} is not what the Hub says it is", expected=expected, found=found, hint=hint)


def recorded_listing(repo_id: str, commit: str) -> Listing | None:
    """The repository's files at a commit, where the cache recorded them (huggingface_hub 2.0 on)."""
    import huggingface_hub

    listing = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if listing is None:
        return None
    try:
        return listing_of((entry.path, entry.size) for entry in listing(repo_id, revision=commit))
    except huggingface_hub.errors.CachedRepoTreeNotFoundError:
        return None


@contextmanager
def quiet() -> Iterator[None]:
    """huggingface_hub's own progress bars and warnings switched off; what it fails of is told in the end."""
    from huggingface_hub import constants, utils

    hub: Any = utils  # these names are public, but not declared so
    verbosity = hub.logging.get_verbosity()
    bars = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not hub.are_progress_bars_disabled()
    if bars:
        hub.disable_progress_bars()
    hub.logging.set_verbosity_error()
    try:
        yield
    finally:
        hub.logging.set_verbosity(verbosity)
        if bars:
            hub.enable_progress_bars()
