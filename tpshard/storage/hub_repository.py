"""A repository's files on the Hub at one commit: listed, read by ranges, held against what the Hub says of them.

huggingface_hub is imported here, in `hub` and in `hub_errors` alone, and only when a repository is asked for.
"""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

from tpshard.errors import HubError
from tpshard.storage.carried import Listing, listing_of
from tpshard.storage.hub_errors import TransientError, attempt

SMALL_LIMIT = 20_000_000
"""Bytes of a file that is read whole over the network."""
INDEX_LIMIT = 200_000_000
"""Bytes of an index of weight files: about 100 for each tensor, and each expert of each layer has several."""


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


def damaged(name: str, repo_id: str, expected: str, found: str) -> HubError:
    hint = "run the command again; if that does not help, the Hub's copy is damaged, or a proxy changes it"
    return HubError(f"{name} of {repo_id} is not what the Hub says it is", expected=expected, found=found, hint=hint)
