"""Repositories on the Hugging Face Hub: what is in one, and snapshots in the shared cache.

Endpoint, token, cache and offline mode are huggingface_hub's own (HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE).
"""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpshard.errors import HubError, UnsafeError, UnsupportedError, UsageError
from tpshard.storage.carried import LeftOut, Listing, Selection, listing_of, select
from tpshard.storage.files import require_space
from tpshard.storage.foreign import recognised
from tpshard.storage.hub_errors import NoRepositoryError, UnreachableError, attempt, not_a_hub
from tpshard.storage.hub_repository import RemoteFile, RemoteRepo, damaged
from tpshard.storage.local import Directory
from tpshard.storage.names import CONFIG, PICKLE_PATTERN, fits, side_files
from tpshard.storage.pool import Pool
from tpshard.storage.weights import ReadFile, files_to_download

_PART = re.compile(r"\b[\w.-]{1,96}\b", re.ASCII)
_FILE_ENDINGS = (".safetensors", ".json", ".bin", ".git")


@dataclass(frozen=True)
class Snapshot:
    """A repository's files at one commit, in the shared cache; `note` says why the cache answered for the Hub.

    left_out: what of the repository was not downloaded.
    """

    path: Path
    repo_id: str
    revision: str
    note: str | None = None
    left_out: tuple[LeftOut, ...] = ()


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form of a repository's name, `name` or `owner/name`; says nothing of its existence."""
    if "--" in text or ".." in text or text.endswith(_FILE_ENDINGS):
        return False
    parts = text.split("/")
    return len(parts) <= 2 and all(_PART.fullmatch(part) for part in parts)


@contextmanager
def named(text: str) -> Iterator[None]:
    """For a text that no path has, and may be a misspelt one: that is said first where the Hub does not know it either.

    So it is where the Hub does not answer.
    """
    try:
        yield
    except (UnreachableError, NoRepositoryError) as error:
        error.message = f"there is no file or directory {text}; as a repository on the Hub: {error.message}"
        raise


def describe(repo_id: str, revision: str | None) -> RemoteRepo:
    """The files of a repository at the commit that `revision` (branch, tag, hash; None: `main`) is now: one request.

    Raises HubError, also in offline mode: headers cannot be read from a cache that may not have them.
    """
    from huggingface_hub import HfApi, constants

    _check_repo_id(repo_id)

    def ask() -> RemoteRepo:
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)
        except (KeyError, TypeError) as error:  # JSON, but not a model's description
            raise not_a_hub() from error
        files = []
        for entry in info.siblings or ():
            if entry.size is None:
                raise not_a_hub()
            of_large, of_small = (entry.lfs.sha256, None) if entry.lfs else (None, entry.blob_id)
            files.append(RemoteFile(entry.rfilename, entry.size, of_large, of_small))
        if info.sha is None:
            raise not_a_hub()
        return RemoteRepo(repo_id, info.sha, tuple(files))

    return attempt(ask, repo_id, revision)


def download(repo_id: str, revision: str | None, *, allow_pickle: bool = False) -> Snapshot:
    """Fetch weights, config, tokenizer and licence of a repository into the shared cache, and nothing else.

    Pickle weights are fetched only with `allow_pickle`, and only where there are no safetensors. Files that the cache
    has already are not fetched again. When the Hub cannot be reached, a complete snapshot in the cache is taken.
    What is fetched is held against the Hub's sizes and digests, and taken out of the cache where it differs.
    Raises HubError, UnsafeError (only pickle weights), UnsupportedError (no weights), LocalIOError: also, before the
    weights are asked for, when the cache's disk has no room for them.
    """
    from glob import escape

    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        repo = describe(repo_id, revision)
    except UnreachableError as error:
        return _from_cache(repo_id, revision, allow_pickle, error)

    def index(name: str) -> bytes:
        with _checked(repo, (name,)):
            path = Path(hf_hub_download(repo_id, name, revision=repo.revision))
        return path.read_bytes()

    def fetch(part: tuple[str, ...]) -> Path:
        # The revision as it was given, not the commit: the cache then remembers it for offline use, ours and others'.
        with _checked(repo, part):
            path = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[escape(name) for name in part]))
        if path.name != repo.revision:
            what = f"{repo_id} changed while it was downloaded"
            raise HubError(what, expected=repo.revision, found=path.name, hint="run the command again")
        return path

    with _quiet():
        chosen, weights = attempt(lambda: _select(repo_id, repo.listing(), allow_pickle, index), repo_id, revision)
        side = chosen.carried
        _require_space(repo, {*side, *weights})
        # The weights last: a cache that has them all then has everything, whenever a download was interrupted.
        attempt(lambda: fetch(side), repo_id, revision)
        path = attempt(lambda: fetch(weights), repo_id, revision)
    for file in repo.files:
        if file.name in side or file.name in weights:
            _check_cached(path / file.name, file, repo_id)
    return Snapshot(path, repo_id, repo.revision, left_out=chosen.left_out)


def _check_repo_id(repo_id: str) -> None:
    if not is_repo_id(repo_id):
        what = f"{repo_id!r} is not the name of a Hub repository"
        raise UsageError(what, hint="name a directory or a file that exists, or a repository as owner/name")


def _select(repo_id: str, listing: Listing, allow_pickle: bool, index: ReadFile) -> tuple[Selection, tuple[str, ...]]:
    """The files to have: those that travel, and the weights in one form. `index` reads an index file."""
    names = [name for name in listing.sizes if "/" not in name]
    weights = files_to_download(names, allow_pickle, index, repo_id)
    if not weights:
        if error := recognised(names, repo_id, "an ordinary Hugging Face checkpoint"):
            raise error
        found = sorted(name for name in names if not name.startswith("."))
        if any(fits(name, [PICKLE_PATTERN]) for name in names):
            what = f"{repo_id} has only pickle weights, and unpickling can run code"
            hint = "--allow-pickle reads them with weights_only=True, which refuses code"
            raise UnsafeError(what, expected="*.safetensors", found=PICKLE_PATTERN, hint=hint)
        raise UnsupportedError(
            f"{repo_id} has no weights in a format that is read here",
            expected="*.safetensors",
            found=", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "") or "no files",
        )
    return select(listing, weights, next((name for name in weights if name.endswith(".json")), weights[0])), weights


def _from_cache(repo_id: str, revision: str | None, allow_pickle: bool, reason: UnreachableError) -> Snapshot:
    """The snapshot that the cache has for `revision`, if nothing of it is missing; `reason` is raised otherwise."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:  # No pattern matches, so that older versions and newer alike return the folder, however full it is.
        path = Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        raise type(reason)(
            f"{reason.message}, and the cache has no snapshot of {repo_id} at {revision or 'main'}", hint=reason.hint
        ) from reason
    tree = _recorded_listing(repo_id, path.name)
    listing = Directory(path).listing() if tree is None else tree
    names = [name for name in listing.sizes if "/" not in name]

    def index(name: str) -> bytes:
        return (path / name).read_bytes()

    wanted, left_out = {CONFIG}, list[LeftOut]()
    try:
        if tree is None and not files_to_download(names, allow_pickle, index, repo_id):
            wanted.add("*.safetensors")
        else:
            chosen, weights = _select(repo_id, listing, allow_pickle, index)
            wanted.update(side_files(names), weights)
            left_out = [*chosen.left_out]
            left_out += [LeftOut(name, "not in the cache") for name in chosen.carried if not (path / name).is_file()]
    except FileNotFoundError as error:  # the index itself
        wanted.add(Path(error.filename).name)
    missing = sorted(name for name in wanted if not (path / name).is_file())
    if missing:
        raise type(reason)(
            f"{reason.message}, and the cached snapshot of {repo_id} is incomplete",
            path=path,
            found="no " + ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
            hint=reason.hint,
        ) from reason
    note = f"{reason.message}; using the cached snapshot {path.name}"
    return Snapshot(path, repo_id, path.name, note, tuple(left_out))


def _require_space(repo: RemoteRepo, names: Collection[str]) -> None:
    """LocalIOError when the disk of the cache has no room for what of these files it does not have yet."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)

    def held(file: RemoteFile) -> int:
        places = [_cached(repo, file.name)]
        if file.sha256:  # of another commit, or begun by a version of huggingface_hub that goes on with it
            blobs = places[0].parents[2] / "blobs"
            places += [blobs / f"{file.sha256}{ending}" for ending in ("", ".incomplete")]
        return max(place.stat().st_size if place.exists() else 0 for place in places)

    needed = sum(max(0, file.size - held(file)) for file in repo.files if file.name in names)
    hint = "free some space, or set HF_HOME to a directory on another disk"
    require_space(cache, needed, doing=f" to download {repo.repo_id}", hint=hint)


def _cached(repo: RemoteRepo, name: str) -> Path:
    """Where the cache has a file of the repository, once it is there."""
    from huggingface_hub import constants

    folder = f"models--{repo.repo_id.replace('/', '--')}"
    return Path(constants.HF_HUB_CACHE) / folder / "snapshots" / repo.revision / name


@contextmanager
def _checked(repo: RemoteRepo, names: Collection[str]) -> Iterator[None]:
    """Hold what is fetched in the `with` block, also by one that fails, against what the Hub said of it.

    HubError for a file that is not so; it is taken out of the cache. What the cache had before is not read again.
    """
    fetched = [file for file in repo.files if file.name in names and not _cached(repo, file.name).exists()]

    def differs(file: RemoteFile) -> tuple[str, str] | None:
        path = _cached(repo, file.name)
        if not path.exists():
            return None
        with path.open("rb") as content:
            return file.why_not(content, os.fstat(content.fileno()).st_size)

    def check() -> None:
        found = [(file.name, why) for file, why in zip(fetched, Pool(4).map(differs, fetched), strict=True) if why]
        for name, _ in found:
            _cached(repo, name).resolve().unlink()
            _cached(repo, name).unlink(missing_ok=True)
        for name, why in found:
            raise damaged(name, repo.repo_id, *why)

    try:
        yield
    except Exception:
        check()
        raise
    check()


def _recorded_listing(repo_id: str, commit: str) -> Listing | None:
    """The repository's files at a commit, where the cache recorded them (huggingface_hub 2.0 on)."""
    import huggingface_hub

    listing = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if listing is None:
        return None
    try:
        return listing_of((entry.path, entry.size) for entry in listing(repo_id, revision=commit))
    except huggingface_hub.errors.CachedRepoTreeNotFoundError:
        return None


def _check_cached(path: Path, file: RemoteFile, repo_id: str) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found == file.size:
        return
    if found is None:
        raise HubError(f"{file.name} of {repo_id} was not downloaded", path=path, hint="run the command again")
    what = f"{file.name} of {repo_id} is damaged in the cache"
    hint = f"delete {path.resolve()} and run the command again"
    raise HubError(what, path=path, expected=f"{file.size} bytes", found=f"{found} bytes", hint=hint)


@contextmanager
def _quiet() -> Iterator[None]:
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
