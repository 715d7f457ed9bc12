"""Sources: a directory, a snapshot in a cache and the Hub answer alike, so a checkpoint is the same from each."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.command import llama
from tests.helpers.hub_server import HubServer
from tpshard.errors import CorruptError, LocalIOError, UnsafeError
from tpshard.inputs.checkpoint import open_checkpoint, open_headers
from tpshard.storage import hub
from tpshard.storage.local import Directory
from tpshard.storage.safetensors import build_header
from tpshard.storage.source import Source, fetch_header, source_header

REPO = "org/tiny"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as running:
        running.patch(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield running


def test_a_directory_a_snapshot_and_the_hub_answer_alike(server: HubServer, tmp_path: Path) -> None:
    model = llama(tmp_path / "model", parts=2)
    server.add(REPO, model)
    snapshot = Directory(hub.download(REPO, None).path)
    sources: list[Source] = [Directory(model), snapshot, hub.describe(REPO, None)]
    name = "model-00001-of-00002.safetensors"
    content = (model / name).read_bytes()
    for source in sources:
        assert set(source.names()) == {path.name for path in model.iterdir()}
        assert source.size(name) == len(content)
        assert [source.read(name, *at) for at in ((0, 8), (5, 100))] == [content[:8], content[5:100]]
        assert source.read_small("config.json") == (model / "config.json").read_bytes()
        assert source.digest(name) in (None, hashlib.sha256(content).hexdigest())
    assert [source.digest(name) is not None for source in sources] == [False, True, True]
    local, cached, remote = (source.path(name) for source in sources)
    assert local == model / name and cached == snapshot.root / name and remote is None
    headers = [source_header(source, name) for source in sources]
    assert len({file.header_sha256 for _, file in headers}) == 1
    assert [header.tensors[0].file for header, _ in headers] == [str(local), str(cached), name]


def test_a_checkpoint_is_the_same_from_each(server: HubServer, tmp_path: Path) -> None:
    model = llama(tmp_path / "model", parts=2)
    server.add(REPO, model)
    local, remote = open_checkpoint(model), open_headers(REPO)
    assert open_checkpoint(REPO).files == remote.files
    for key in ("config", "file_of", "warnings"):
        assert getattr(local, key) == getattr(remote, key)
    assert [replace(info, file="") for info in local.tensors] == [replace(info, file="") for info in remote.tensors]
    assert (remote.directory, remote.side_files) == (None, {}) and local.directory == model


def test_an_empty_file_on_the_hub_is_no_weights(server: HubServer, tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"")
    server.add(REPO, model)
    with pytest.raises(CorruptError, match="too short"):
        open_headers(REPO)


@pytest.mark.parametrize("count", [1, 2000])
def test_a_header_is_fetched_in_one_read_or_in_two_that_do_not_overlap(count: int) -> None:
    header = build_header([(f"tensor.{i}", "F32", (1,)) for i in range(count)], {})
    size = len(header) + 4 * count
    asked: list[tuple[int, int]] = []

    def read(begin: int, end: int) -> bytes:
        asked.append((begin, end))
        return (header + bytes(4 * count))[begin:end]

    assert len(fetch_header(read, "file", size).tensors) == count
    first = min(size, 1 << 16)
    assert asked == ([(0, first)] if len(header) <= first else [(0, first), (first, len(header))])
    assert (len(asked) == 2) is (count == 2000)


def test_a_directory_reads_no_file_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    model = tmp_path / "model"
    model.mkdir()
    (model / "link").symlink_to(tmp_path / "secret")
    source = Directory(model)
    for read in (source.path, source.size, source.digest, source.read_small, lambda name: source.read(name, 0, 1)):
        with pytest.raises(UnsafeError, match="leaves the model's directory"):
            read("link")
        with pytest.raises(CorruptError, match="is not there"):
            read("absent")
    with pytest.raises(LocalIOError, match="cannot list"):
        Directory(tmp_path / "nowhere").names()
