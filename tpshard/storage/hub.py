"""Repositories on the Hugging Face Hub: what is in one, byte ranges of it, snapshots in the shared cache.

Here, in `hub_cache` and in `hub_errors` alone huggingface_hub is imported, and only when a repository is asked for.
Endpoint, token, cache and offline mode are huggingface_hub's own (HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE).
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tpshard.errors import HubError, UnsafeError, UnsupportedError, UsageError
from tpshard.storage.carried import LeftOut, Listing, Selection, listing_of, select
from tpshard.storage.foreign import recognised
from tpshard.storage.hub_cache import CachedCommit, RemoteFile, damaged, quiet, recorded_listing
from tpshard.storage.hub_errors import NoRepositoryError, TransientError, UnreachableError, attempt, not_a_hub
from tpshard.storage.local import Directory
from tpshard.storage.names import CONFIG, PICKLE_PATTERN, fits, side_files
from tpshard.storage.weights import ReadFile, files_to_download

SMALL_LIMIT = 20_000_000
"""Bytes of a file that is read whole over the network."""
INDEX_LIMIT = 200_000_000
"""Bytes of an index of weight files: about 100 for each tensor, and each expert of each layer has several."""

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


@dataclass(frozen=True)
class RemoteRepo:
    """The files of a repository at one commit, as a source; `revision` is the commit's hash.

    All that reads raises HubError.
    """

    repo_id: str
    revision: str
    files: tuple[RemoteFile, ...]
    requests: ClassVar[int] = 8

    @property
    def place(self) -> str:
        return self.repo_id

    def names(self) -> set[str]:
        return {file.name for file in self.files if "/" not in file.name}

    def listing(self) -> Listing:
        return listing_of((file.name, file.size) for file in self.files)

    def path(self, name: str) -> None:
        """None: nothing of it is on this machine."""

    def size(self, name: str) -> int:
        return self._file(name).size

    def digest(self, name: str) -> str | None:
        return self._file(name).sha256

    def _file(self, name: str) -> RemoteFile:
        for file in self.files:
            if file.name == name:
                return file
        raise HubError(f"{self.repo_id} has no file {name} at {self.revision}")

    def read(self, name: str, begin: int, end: int) -> bytes:
        """The bytes `begin` to `end` (exclusive, within the file) of a file.

        A server that sends the whole file instead is refused before its body is read.
        """
        size = self.size(name)
        assert 0 <= begin < end <= size, f"{name}: {begin} to {end} of {size} bytes"

        def read() -> bytes:
            with _get(self, name, {"Range": f"bytes={begin}-{end - 1}"}) as (status, headers, chunks):
                if status != 206:
                    what = f"the Hub does not serve byte ranges of {name}"
                    hint = f"download the repository first: hf download {self.repo_id} --revision {self.revision}"
                    raise HubError(what, expected="HTTP 206", found=f"HTTP {status}", hint=hint)
                expected = f"bytes {begin}-{end - 1}/{size}"
                found = headers.get("Content-Range")
                if found not in (expected, f"bytes {begin}-{end - 1}/*"):
                    raise HubError(f"the Hub sent another range of {name}", expected=expected, found=found)
                return _exactly(chunks, end - begin, name)

        return attempt(read, self.repo_id, self.revision)

    def read_small(self, name: str) -> bytes:
        """A whole file, checked against the Hub's digest."""
        file = self._file(name)
        limit = INDEX_LIMIT if name.endswith(".index.json") else SMALL_LIMIT
        if file.size > limit:
            what = f"{name} in {self.repo_id} is too large to be what its name says"
            hint = "look at the repository: this may be another file under that name"
            raise HubError(what, expected=f"at most {limit} bytes", found=f"{file.size} bytes", hint=hint)

        def read() -> bytes:
            with _get(self, name, {}) as (_, _, chunks):
                return _exactly(chunks, file.size, name)

        content = attempt(read, self.repo_id, self.revision)
        if differs := file.why_not(io.BytesIO(content), len(content)):
            raise damaged(name, self.repo_id, *differs)
        return content


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

    cache = CachedCommit(repo.repo_id, repo.revision, repo.files)

    def index(name: str) -> bytes:
        with cache.checked((name,)):
            path = Path(hf_hub_download(repo_id, name, revision=repo.revision))
        return path.read_bytes()

    def fetch(part: tuple[str, ...]) -> Path:
        # The revision as it was given, not the commit: the cache then remembers it for offline use, ours and others'.
        with cache.checked(part):
            path = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[escape(name) for name in part]))
        if path.name != repo.revision:
            what = f"{repo_id} changed while it was downloaded"
            raise HubError(what, expected=repo.revision, found=path.name, hint="run the command again")
        return path

    with quiet():
        chosen, weights = attempt(lambda: _select(repo_id, repo.listing(), allow_pickle, index), repo_id, revision)
        side = chosen.carried
        cache.require_space({*side, *weights})
        # The weights last: a cache that has them all then has everything, whenever a download was interrupted.
        attempt(lambda: fetch(side), repo_id, revision)
        path = attempt(lambda: fetch(weights), repo_id, revision)
    cache.require_whole({*side, *weights})
    return Snapshot(path, repo_id, repo.revision, left_out=chosen.left_out)


def _check_repo_id(repo_id: str) -> None:
    if not is_repo_id(repo_id):
        what = f"{repo_id!r} is not the name of a Hub repository"
        raise UsageError(what, hint="name a directory or a file that exists, or a repository as owner/name")


@contextmanager
def _get(repo: RemoteRepo, name: str, headers: dict[str, str]) -> Iterator[tuple[int, Any, Iterator[bytes]]]:
    """Status, headers and body of a file, the body unread, over huggingface_hub's shared connections."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(repo.repo_id, name, revision=repo.revision)
    # Compressed on the way, a body's length would no longer be the file's.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", **headers}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    session: Any = get_session()
    # huggingface_hub speaks requests below 1.0, httpx from 1.0 on, httpx2 from 2.0 on; the latter two look the same.
    if callable(getattr(session, "stream", None)):
        opened = session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True)
    else:
        opened = session.get(url, headers=headers, timeout=timeout, stream=True)
    with opened as response:
        hf_raise_for_status(response)
        body = response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(1 << 16)
        yield response.status_code, response.headers, body


def _exactly(chunks: Iterator[bytes], length: int, name: str) -> bytes:
    """The body, which must have `length` bytes; nothing is read past the first chunk that exceeds it."""
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > length:
            raise HubError(f"the Hub sent more of {name} than was asked for", expected=f"{length} bytes")
    if len(content) < length:
        what, hint = f"the Hub broke off while sending {name}", "run the command again"
        raise TransientError(what, expected=f"{length} bytes", found=f"{len(content)} bytes", hint=hint)
    return bytes(content)


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
    tree = recorded_listing(repo_id, path.name)
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
