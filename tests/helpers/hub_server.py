"""A Hub on 127.0.0.1 for tests: directories served as repositories, with a log of requests and faults on demand.

It answers what huggingface_hub asks for a model (description, tree, resolve) and, like the real Hub, redirects the
content of large files to another host without asking for the token there.

    with HubServer() as server:
        commit = server.add("org/tiny", directory)
        server.fault("status", match="/resolve/", status=503, times=2)
        subprocess.run([...], env=server.env(tmp_path / "home"))
        assert server.sent("model.safetensors") < 100_000
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import pytest

LARGE = ("*.safetensors", "*.bin", "*.pth", "*.onnx", "*.gguf", "*.h5", "*.msgpack", "tokenizer.model")


Kind = Literal[
    "status", "ignore_range", "other_range", "truncate", "slow", "stall", "swap", "more", "resize", "meanwhile", "html",
    "json", "gzip",
]  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A served file; `large` ones have a sha256 as their tag and come from the other host."""

    path: Path
    size: int
    sha256: str
    blob_id: str
    large: bool

    @property
    def tag(self) -> str:
        return self.sha256 if self.large else self.blob_id


@dataclass
class Repo:
    """Commits, and the branches and tags that name them. With a `token`, nothing is served without it; `gated`
    repositories describe themselves to everyone and give their files to nobody."""

    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False


@dataclass
class Request:
    """One answered request. `sent` counts the bytes of the body that went out; `peer` tells connections apart."""

    host: Literal["hub", "cdn"]
    method: str
    path: str
    range: str | None
    status: int
    authorized: bool
    peer: int
    sent: int = 0


@dataclass
class Fault:
    """What goes wrong, for the next `times` requests (None: all) whose method and path hold `match`."""

    kind: Kind
    match: str
    times: int | None
    status: int
    seconds: float
    headers: dict[str, str]
    action: Callable[[], object]


class HubServer:
    """The server; a context manager. Faults and repositories may be added while it runs."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._servers = {host: _listener(self, host) for host in ("hub", "cdn")}
        self._threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
            for server in self._servers.values()
        ]

    def __enter__(self) -> HubServer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.closing.set()
        for server in self._servers.values():
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()

    def url(self, host: str = "hub") -> str:
        # Two names of this machine, because clients tell hosts apart by name, and some leave the port out.
        name = "127.0.0.1" if host == "hub" else "localhost"
        return f"http://{name}:{self._servers[host].server_address[1]}"

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a subprocess that is to use this server, with its cache and token under `home`."""
        inherited = {key: value for key, value in os.environ.items() if not _steers_client(key)}
        return {**inherited, **self.settings(home), **more}

    def settings(self, home: Path) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url(),
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def patch(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Make huggingface_hub in this process, which read its environment when it was imported, use this server."""
        for key in filter(_steers_client, list(os.environ)):
            monkeypatch.delenv(key)
        for key, value in self.settings(home).items():
            monkeypatch.setenv(key, value)
        constants: dict[str, object] = {
            "ENDPOINT": self.url(),
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url() + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        for name, constant in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", constant)

    def add(self, repo_id: str, directory: Path, revision: str = "main") -> str:
        """Serve what `directory` holds now as a new commit of `repo_id`, to which `revision` points; its hash.

        Files are read again when they are asked for: a directory that changes afterwards serves a damaged commit.
        """
        files = {}
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                name, size = path.relative_to(directory).as_posix(), path.stat().st_size
                large = any(fnmatchcase(path.name, pattern) for pattern in LARGE)
                with path.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                # Of a large file git holds a pointer, which nothing here reads: any stable tag does.
                content = sha256.encode() if large else path.read_bytes()
                blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                files[name] = Entry(path, size, sha256, blob_id, large)
        commit = hashlib.sha1(json.dumps([(name, files[name].sha256) for name in files]).encode()).hexdigest()
        repo = self.repos.setdefault(repo_id, Repo())
        repo.commits[commit] = files
        repo.refs[revision] = commit
        return commit

    def fault(
        self,
        kind: Kind,
        match: str = "",
        *,
        times: int | None = None,
        status: int = 500,
        seconds: float = 5.0,
        headers: dict[str, str] | None = None,
        action: Callable[[], object] = lambda: None,
    ) -> None:
        """Misbehave for the next `times` requests whose `METHOD path` holds `match`.

        `status` answers with `status` and `headers`; `truncate` sends half the body and hangs up; `slow` waits
        `seconds` first, and `stall` in the middle of the body; `swap` sends another first byte, `more` one byte more,
        and `resize` describes files as a byte longer; `meanwhile` calls `action` and answers rightly; `html` and `json`
        answer like a login page and like some other service; `gzip` compresses for a client that allows it and then,
        as some content networks do, ignores its range.
        """
        self.faults.append(Fault(kind, match, times, status, seconds, headers or {}, action))

    def requests(self, match: str = "") -> list[Request]:
        """The answered requests whose `METHOD path` holds `match`, in order."""
        with self.lock:
            return [entry for entry in self.log if match in f"{entry.method} {entry.path}"]

    def sent(self, match: str = "") -> int:
        """Bytes of content sent for such requests."""
        return sum(entry.sent for entry in self.requests(match))

    def take_fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.match in line and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None


def _steers_client(key: str) -> bool:
    return key.startswith(("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")) or key.lower().endswith("_proxy")


def _listener(hub: HubServer, host: str) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"hub": hub, "host": host})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    host: Literal["hub", "cdn"]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the log is `HubServer.log`."""

    def _serve(self) -> None:
        self.fault = self.hub.take_fault(f"{self.command} {unquote(self.path)}")
        if self.fault is not None:
            if self.fault.kind == "slow":
                self.hub.closing.wait(self.fault.seconds)
            elif self.fault.kind == "meanwhile":
                self.fault.action()
            elif self.fault.kind == "status":
                return self._answer(self.fault.status, self.fault.headers)
            elif self.fault.kind == "html":
                return self._answer(200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")
            elif self.fault.kind == "json":
                return self._answer(200, {"Content-Type": "application/json"}, b'{"service": "another"}')
        path = unquote(urlsplit(self.path).path)
        if self.host == "cdn":
            entries = [e for repo in self.hub.repos.values() for files in repo.commits.values() for e in files.values()]
            entry = next(entry for entry in entries if path == f"/blob/{entry.sha256}/{entry.path.name}")
            self._content(entry, {"ETag": f'"{entry.tag}"'})
        elif match := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/(.+))?", path):
            self._describe(*match.groups())
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+|refs/pr/\d+)/(.+)", path):
            self._resolve(*match.groups())
        else:
            self._answer(404, {})

    def _files(self, repo_id: str, revision: str | None) -> tuple[str, dict[str, Entry]] | None:
        """Commit and files of a revision; answers with the Hub's error, and gives None, where there are none."""
        repo = self.hub.repos.get(repo_id)
        authorization = self.headers.get("Authorization")
        if repo is not None and repo.token is not None and authorization not in (None, f"Bearer {repo.token}"):
            message = "Invalid credentials in Authorization header"
            self._answer(401, {"X-Error-Message": message})
            return None
        if repo is None or (repo.token is not None and authorization is None):
            # The Hub hides from strangers what is private: the same answer as for what is not there.
            self._answer(401 if authorization is None else 404, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repo.refs.get(revision or "main", revision or "main")
        if commit not in repo.commits:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, repo.commits[commit]

    def _describe(self, repo_id: str, what: str | None, revision: str | None) -> None:
        if (found := self._files(repo_id, revision)) is None:
            return
        commit, files = found
        if self.fault is not None and self.fault.kind == "resize":
            files = {name: replace(file, size=file.size + 1) for name, file in files.items()}
        if what == "tree":
            listing: Any = [
                {"type": "file", "path": name, "size": file.size, "oid": file.blob_id}
                | ({"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.large else {})
                for name, file in files.items()
            ]
        else:
            siblings: list[dict[str, Any]] = [
                {"rfilename": name, "size": file.size, "blobId": file.blob_id}
                | ({"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": 134}} if file.large else {})
                for name, file in files.items()
            ]
            if "blobs=" not in self.path:
                siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
            listing = {"id": repo_id, "modelId": repo_id, "sha": commit, "private": False, "siblings": siblings}
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        if (found := self._files(repo_id, revision)) is None:
            return
        commit, files = found
        if self.hub.repos[repo_id].gated:
            status = 401 if self.headers.get("Authorization") is None else 403
            return self._answer(status, {"X-Error-Code": "GatedRepo"})
        if (entry := files.get(name)) is None:
            return self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry.tag}"'}
        if entry.large:
            large = {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.sha256}"'}
            location = f"{self.hub.url('cdn')}/blob/{entry.sha256}/{entry.path.name}"
            return self._answer(302, {**headers, **large, "Location": location})
        self._content(entry, headers)

    def _content(self, entry: Entry, headers: dict[str, str]) -> None:
        if self.fault is not None and self.fault.kind == "gzip" and "gzip" in self.headers.get("Accept-Encoding", ""):
            headers = {**headers, "Content-Encoding": "gzip"}
            return self._answer(200, headers, gzip.compress(entry.path.read_bytes()))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or (self.fault is not None and self.fault.kind == "ignore_range"):
            return self._answer(200, {**headers, "Accept-Ranges": "bytes"}, (entry.path, 0, entry.size))
        begin, end = int(wanted[1]), min(int(wanted[2] or entry.size) + 1, entry.size)
        if begin >= end:
            return self._answer(416, {"Content-Range": f"bytes */{entry.size}"})
        if self.fault is not None and self.fault.kind == "other_range":
            begin -= 1
            end -= 1
        headers = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{entry.size}"}
        self._answer(206, headers, (entry.path, begin, end))

    def _answer(self, status: int, headers: dict[str, str], body: bytes | tuple[Path, int, int] = b"") -> None:
        """Log and send. The body is bytes, or a range of a file, which is read while it is sent."""
        length = len(body) if isinstance(body, bytes) else body[2] - body[1]
        kind = self.fault.kind if self.fault is not None else None
        if status in (200, 206) and kind in ("swap", "more"):
            whole = body if isinstance(body, bytes) else b"".join(self._pieces(body, length))
            body = whole + b"?" if kind == "more" else bytes([whole[0] ^ 1]) + whole[1:]
            length = len(body)
        authorized = self.headers.get("Authorization") is not None
        wanted, peer = self.headers.get("Range"), self.client_address[1]
        # Logged and counted before it is sent, so that a client that has an answer finds it in the log.
        entry = Request(self.host, self.command, unquote(self.path), wanted, status, authorized, peer)
        with self.hub.lock:
            self.hub.log.append(entry)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        try:
            self.end_headers()
            if self.command == "GET":
                for piece in self._pieces(body, length):
                    entry.sent += len(piece)
                    self.wfile.write(piece)
        except OSError:  # the client hung up
            self.close_connection = True

    def _pieces(self, body: bytes | tuple[Path, int, int], length: int) -> Iterator[bytes]:
        if self.fault is not None and self.fault.kind == "truncate":
            length //= 2
            self.close_connection = True
        if isinstance(body, bytes):
            yield body[:length]
            return
        stalls = self.fault is not None and self.fault.kind == "stall"
        path, begin, _ = body
        with path.open("rb") as file:
            file.seek(begin)
            if stalls:
                yield file.read(length // 2)
                length -= length // 2
                self.hub.closing.wait(self.fault.seconds if self.fault else 0)
            while length > 0:
                piece = file.read(min(length, 1 << 16))
                length -= len(piece)
                yield piece
