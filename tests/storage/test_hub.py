"""tpshard.storage.hub against a Hub on this machine: what is fetched, what is not, and what every failure says."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from tests.helpers.hub_server import HubServer
from tpshard.errors import CorruptError, HubError, LocalIOError, TpshardError, UnsafeError, UnsupportedError, UsageError
from tpshard.storage import hub, hub_errors
from tpshard.storage.names import SIDE_PATTERNS, fits

REPO = "org/tiny"
WEIGHTS = bytes(range(256)) * 2000


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as running:
        running.patch(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield running


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A repository with everything that published ones have beside what is wanted."""
    return write(
        tmp_path / "source",
        {
            "model.safetensors": WEIGHTS,
            "config.json": b"{}",
            "generation_config.json": b'{"top_k": 1}',
            "tokenizer.json": b'{"version": "1.0"}',
            "tokenizer_config.json": b'{"a": 1}',
            "chat_template.jinja": b"{{ messages }}",
            "preprocessor_config.json": b'{"b": 1}',
            "LICENSE": b"do as you please",
            "README.md": b"# tiny",
            ".gitattributes": b"*.safetensors filter=lfs",
            "modeling_tiny.py": b"raise SystemExit",
            "pytorch_model.bin": b"pickle",
            "training_args.bin": b"pickle too",
            "tf_model.h5": b"h5",
            "flax_model.msgpack": b"flax",
            "model.gguf": b"gguf",
            "onnx/model.onnx": b"onnx",
            "original/consolidated.00.pth": b"pth",
            "original/model.safetensors": b"not this one",
        },
    )


WANTED = {
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "LICENSE",
    "README.md",
    "modeling_tiny.py",
}


def write(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def names(path: Path) -> set[str]:
    return {entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_file()}


def set_offline(monkeypatch: pytest.MonkeyPatch, offline: bool = True) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)


PATTERNS = ("*.safetensors", "*.safetensors.index.json", *SIDE_PATTERNS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt2", True),
        ("meta-llama/Llama-3.1-8B", True),
        ("a/b_c.d-e", True),
        ("_x/y", True),
        ("", False),
        ("/gpt2", False),
        ("gpt2/", False),
        ("./gpt2", False),
        ("../gpt2", False),
        ("~/gpt2", False),
        ("a/b/c", False),
        ("a//b", False),
        ("a--b/c", False),
        ("a..b", False),
        ("-a/b", False),
        ("a/b.", False),
        ("a b", False),
        ("a\\b", False),
        ("C:", False),
        ("modèle", False),
        ("x" * 97, False),
        ("model.safetensors", False),
        ("dir/model.safetensors.index.json", False),
        ("org/repo.git", False),
    ],
)
def test_is_repo_id(text: str, expected: bool) -> None:
    assert hub.is_repo_id(text) is expected


@pytest.mark.parametrize(
    "name",
    "model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json config.json LICENSE LICENSE.txt "
    "generation_config.json tokenizer.json tokenizer_config.json tokenizer.model tokenizer.model.v3 added_tokens.json "
    "special_tokens_map.json vocab.json vocab.txt merges.txt spiece.model sentencepiece.bpe.model qwen.tiktoken "
    "tekken.json chat_template.json chat_template.jinja processor_config.json preprocessor_config.json "
    "quantize_config.json LICENCE.md license.txt License NOTICE NOTICE.txt COPYING USE_POLICY.md".split(),
)
def test_patterns_match(name: str) -> None:
    assert fits(name, PATTERNS)


@pytest.mark.parametrize(
    "name",
    "README.md .gitattributes modeling_llama.py tokenizer.py tokenization_qwen.py pytorch_model.bin training_args.bin "
    "consolidated.00.pth model.gguf model.onnx tf_model.h5 flax_model.msgpack model.pt trainer_state.json "
    "pytorch_model.bin.index.json adapter_config.json config.json.bak xconfig.json sentencepiece.mode".split(),
)
def test_patterns_do_not_match(name: str) -> None:
    assert not fits(name, PATTERNS)


# --- download ---


def test_download_fetches_only_what_is_wanted_into_the_shared_cache(
    server: HubServer, source: Path, tmp_path: Path
) -> None:
    commit = server.add(REPO, source)
    snapshot = hub.download(REPO, None)
    folder = tmp_path / "home" / "hub" / "models--org--tiny"
    assert replace(snapshot, left_out=()) == hub.Snapshot(folder / "snapshots" / commit, REPO, commit)
    assert names(snapshot.path) == WANTED
    assert (folder / "refs" / "main").read_text() == commit
    for name in WANTED:
        assert (snapshot.path / name).read_bytes() == (source / name).read_bytes()
        assert (snapshot.path / name).is_symlink() and (snapshot.path / name).resolve().parent == folder / "blobs"
    left_out = {"pytorch_model.bin", "training_args.bin", "tf_model.h5", "flax_model.msgpack", "model.gguf"}
    left_out |= {"onnx/model.onnx", "original/consolidated.00.pth", "original/model.safetensors", ".gitattributes"}
    assert {each.file for each in snapshot.left_out} == left_out
    fetched = {entry.path.rpartition("/")[2] for entry in server.requests("GET") if "/api/" not in entry.path}
    assert fetched == WANTED
    assert server.sent("model.safetensors") == len(WEIGHTS)


def test_second_download_fetches_nothing(server: HubServer, source: Path) -> None:
    server.add(REPO, source)
    first = hub.download(REPO, None)
    server.log.clear()
    assert hub.download(REPO, "main") == first
    assert server.requests() and all("/api/" in entry.path for entry in server.requests())


def test_download_after_a_new_commit_fetches_what_changed(server: HubServer, source: Path) -> None:
    old = server.add(REPO, source)
    assert hub.download(REPO, None).revision == old
    write(source, {"config.json": b'{"new": true}'})
    new = server.add(REPO, source)
    server.log.clear()
    snapshot = hub.download(REPO, None)
    assert snapshot.revision == new != old
    assert (snapshot.path / "config.json").read_bytes() == b'{"new": true}'
    assert server.sent("model.safetensors") == 0 and server.sent("config.json") == len(b'{"new": true}')


def test_revision_is_a_branch_a_tag_or_a_commit(server: HubServer, source: Path) -> None:
    old_config, new_config = b'{"old": true}', b'{"new": true}'
    write(source, {"config.json": old_config})
    server.add(REPO, source, "v1")
    old = server.add(REPO, source, "refs/pr/7")
    copy = write(source.with_name("copy"), {"model.safetensors": WEIGHTS, "config.json": new_config})
    new = server.add(REPO, copy)
    for revision in ("v1", "refs/pr/7", old):
        snapshot = hub.download(REPO, revision)
        assert snapshot.revision == old and (snapshot.path / "config.json").read_bytes() == old_config
        assert hub.describe(REPO, revision).revision == old
    assert hub.download(REPO, "main").revision == new == hub.describe(REPO, None).revision


def test_download_takes_the_indexed_shards_and_no_other_form_of_the_weights(server: HubServer, tmp_path: Path) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": b"shard %d" % i for i in (1, 2)}
    index = json.dumps({"weight_map": {"a": min(shards), "b": max(shards), "c": min(shards)}}).encode()
    files = {**shards, "model.safetensors.index.json": index, "config.json": b"{}"}
    others = {
        "consolidated.safetensors": b"the same weights again",
        "model.fp16-00001-of-00001.safetensors": b"and again",
        "pytorch_model-00001-of-00001.bin": b"and again",
        "pytorch_model.bin.index.json": b"{}",
    }
    server.add(REPO, write(tmp_path / "sharded", {**files, **others}))
    assert names(hub.download(REPO, None, allow_pickle=True).path) == set(files)


def test_download_takes_the_single_file_where_an_index_is_there_too(server: HubServer, source: Path) -> None:
    server.add(REPO, write(source, {"model.safetensors.index.json": b'{"weight_map": {"a": "x.safetensors"}}'}))
    index = "model.safetensors.index.json"  # looked into: are its files there?
    assert names(hub.download(REPO, None).path) == {*WANTED, index}


def test_download_takes_safetensors_of_any_name_when_there_are_no_others(server: HubServer, tmp_path: Path) -> None:
    files = {"weights[1].safetensors": b"1", "weights1.safetensors": b"2", "config.json": b"{}"}
    server.add(REPO, write(tmp_path / "loose", files))
    assert names(hub.download(REPO, None).path) == set(files)


def test_pickle_weights_are_refused_unless_asked_for(server: HubServer, tmp_path: Path) -> None:
    shard = "pytorch_model-00001-of-00001.bin"
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    files = {shard: b"pickle", "pytorch_model.bin.index.json": index, "config.json": b"{}"}
    server.add(REPO, write(tmp_path / "pickled", {**files, "optimizer.bin": b"no"}))
    with pytest.raises(UnsafeError, match="only pickle weights") as caught:
        hub.download(REPO, None)
    assert caught.value.hint is not None and "--allow-pickle" in caught.value.hint
    assert server.requests("/resolve/") == []
    assert names(hub.download(REPO, None, allow_pickle=True).path) == set(files)


@pytest.mark.parametrize(("content", "named"), [({"a.onnx": b"x"}, "a.onnx"), ({"README.md": b"x"}, "README.md")])
def test_repository_without_weights(server: HubServer, tmp_path: Path, content: dict[str, bytes], named: str) -> None:
    server.add(REPO, write(tmp_path / "other", content))
    with pytest.raises(UnsupportedError, match="no weights") as caught:
        hub.download(REPO, None, allow_pickle=True)
    assert caught.value.found == named


@pytest.mark.parametrize("index", [b"not json", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}'])
def test_index_that_is_none(server: HubServer, tmp_path: Path, index: bytes) -> None:
    server.add(REPO, write(tmp_path / "odd", {"model.safetensors.index.json": index}))
    with pytest.raises(CorruptError, match=r"model.safetensors.index.json is not an index"):
        hub.download(REPO, None)


def test_shards_that_an_index_lists_in_vain_are_left_to_the_reader(server: HubServer, tmp_path: Path) -> None:
    index = b'{"weight_map": {"a": "gone.safetensors", "b": "../up.safetensors"}}'
    files = {"model.safetensors.index.json": index, "config.json": b"{}"}
    server.add(REPO, write(tmp_path / "odd", files))
    assert names(hub.download(REPO, None).path) == set(files)


def test_branch_that_moves_during_the_download(
    server: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = server.add(REPO, source)
    fetch = huggingface_hub.snapshot_download

    def after_a_push(*args: object, **kwargs: object) -> object:
        write(source, {"config.json": b'{"pushed": true}'})
        server.add(REPO, source)
        return fetch(*args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", after_a_push)
    with pytest.raises(HubError, match="changed while it was downloaded") as caught:
        hub.download(REPO, None)
    assert caught.value.expected == old


def test_damaged_file_in_the_cache_is_found(server: HubServer, source: Path) -> None:
    server.add(REPO, source)
    blob = (hub.download(REPO, None).path / "model.safetensors").resolve()
    blob.write_bytes(WEIGHTS[:-1])
    with pytest.raises(HubError, match="damaged in the cache") as caught:
        hub.download(REPO, None)
    assert caught.value.expected == f"{len(WEIGHTS)} bytes" and caught.value.found == f"{len(WEIGHTS) - 1} bytes"
    assert caught.value.hint is not None and str(blob) in caught.value.hint
    blob.unlink()
    assert (hub.download(REPO, None).path / "model.safetensors").read_bytes() == WEIGHTS


def test_no_progress_bars(server: HubServer, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    enable_progress_bars()  # another test of this process may have told transformers to disable them
    server.add(REPO, source)
    hub.download(REPO, None)
    quiet = capfd.readouterr()
    assert (quiet.out, quiet.err) == ("", "") and not are_progress_bars_disabled()


def test_cache_that_cannot_be_written(
    server: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO, source)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(LocalIOError, match="cannot use the cache: Not a directory"):
        hub.download(REPO, None)


# --- the cache in place of the Hub ---


def test_complete_snapshot_serves_when_offline_or_unreachable(
    server: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO, source)
    online = hub.download(REPO, None)
    set_offline(monkeypatch)
    server.log.clear()
    for revision in (None, "main", online.revision):
        cached = hub.download(REPO, revision)
        assert (cached.path, cached.revision) == (online.path, online.revision)
        assert cached.note is not None and cached.note.startswith("HF_HUB_OFFLINE is set")
    assert server.requests() == []
    set_offline(monkeypatch, False)
    server.fault("status", status=503)
    assert "HTTP 503" in (hub.download(REPO, None).note or "")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{unused_port()}")
    assert "cannot connect" in (hub.download(REPO, None).note or "")


def test_offline_without_a_snapshot(server: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(REPO, source)
    server.add(REPO, source, "v2")
    set_offline(monkeypatch)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set.* no snapshot of org/tiny at main") as caught:
        hub.download(REPO, None)
    assert caught.value.hint == "unset HF_HUB_OFFLINE, or download while online: hf download org/tiny"
    set_offline(monkeypatch, False)
    hub.download(REPO, "main")
    set_offline(monkeypatch)
    with pytest.raises(HubError, match=r"no snapshot of org/tiny at v2"):
        hub.download(REPO, "v2")


@pytest.mark.parametrize("lost", ["tokenizer.json", "model.safetensors", "config.json"])
@pytest.mark.parametrize("dangling", [True, False])
def test_offline_with_an_incomplete_snapshot_names_what_is_missing(
    server: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch, lost: str, dangling: bool
) -> None:
    server.add(REPO, source)
    path = hub.download(REPO, None).path / lost
    (path.resolve() if dangling else path).unlink()
    set_offline(monkeypatch)
    with pytest.raises(HubError, match="cached snapshot of org/tiny is incomplete") as caught:
        hub.download(REPO, None)
    assert caught.value.found == f"no {lost}"


def test_offline_with_files_that_another_tool_fetched_one_by_one(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    content = {shards[0]: b"1", shards[1]: b"2", "model.safetensors.index.json": index, "config.json": b"{}"}
    server.add(REPO, write(tmp_path / "sharded", {**content, "LICENSE": b"free"}))

    def found_offline() -> str:
        set_offline(monkeypatch)
        try:
            return str(hub.download(REPO, None).note)
        except HubError as error:
            return str(error.found)
        finally:
            set_offline(monkeypatch, False)

    for name, expected in (
        ("LICENSE", "no *.safetensors, config.json"),
        ("model.safetensors.index.json", f"no config.json, {shards[0]}, {shards[1]}"),
        (shards[1], f"no config.json, {shards[0]}"),
        (shards[0], "no config.json"),
        ("config.json", "HF_HUB_OFFLINE is set"),
    ):
        huggingface_hub.hf_hub_download(REPO, name)
        assert found_offline().startswith(expected)


def test_offline_with_an_index_gone_from_the_cache(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.safetensors.index.json"
    files = {"a.safetensors": b"1", name: b'{"weight_map": {"a": "a.safetensors"}}', "config.json": b"{}"}
    server.add(REPO, write(tmp_path / "sharded", files))
    (hub.download(REPO, None).path / name).unlink()
    set_offline(monkeypatch)
    with pytest.raises(HubError, match="incomplete") as caught:
        hub.download(REPO, None)
    assert caught.value.found == f"no {name}"


def test_refusals_are_not_answered_from_the_cache(server: HubServer, source: Path) -> None:
    server.add(REPO, source)
    hub.download(REPO, None)
    server.repos[REPO].token = "hf_other"
    with pytest.raises(HubError, match="there is no repository org/tiny"):
        hub.download(REPO, None)


# --- failures ---


def gate(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos[REPO].gated = True


def gate_with_login(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos[REPO].gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_mine")


def hide(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos[REPO].token = "hf_secret"


def hide_with_wrong_token(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos[REPO].token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_mine")


def remove(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos.clear()


def remove_with_login(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_mine")


def hang_up(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{unused_port()}")


def lose_dns(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid")


def faulty(kind: str, **options: object) -> Callable[[HubServer, pytest.MonkeyPatch], None]:
    def prepare(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        server.fault(kind, **options)  # type: ignore[arg-type]

    return prepare


def slow(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    server.fault("slow", seconds=600)  # until the server closes


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


LOGIN = "`hf auth login`, or set HF_TOKEN"
FAILURES = {
    "removed": (remove, "there is no repository org/tiny at http://127.0.0.1:.* private .HTTP 401", LOGIN),
    "removed, logged in": (remove_with_login, "there is no repository org/tiny .*HTTP 404", LOGIN),
    "private": (hide, "there is no repository org/tiny .* or it is private", LOGIN),
    "private, wrong token": (hide_with_wrong_token, "refused the token .HTTP 401. for org/tiny", LOGIN),
    "forbidden": (faulty("status", status=403), "denied access to org/tiny .HTTP 403", LOGIN),
    "refused": (hang_up, "cannot connect to http://127.0.0.1:", "HF_ENDPOINT"),
    "no DNS": (lose_dns, "cannot connect to http://hub.invalid", "check the network"),
    "500": (faulty("status", status=500), "failed .HTTP 500., also after retries", "later"),
    "429": (faulty("status", status=429), "limits the rate", LOGIN),
    "timeout": (slow, "did not answer in time", "HF_HUB_DOWNLOAD_TIMEOUT"),
    "login page": (faulty("html"), "did not answer as a Hugging Face Hub does", "HF_ENDPOINT"),
    "another service": (faulty("json"), "did not answer as a Hugging Face Hub does", "HF_ENDPOINT"),
    "cut off": (faulty("truncate"), "broke", "again"),
}


@pytest.mark.parametrize("action", [hub.describe, hub.download])
@pytest.mark.parametrize("name", FAILURES)
def test_failures_of_the_first_request(
    server: HubServer,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    action: Callable[[str, str | None], object],
) -> None:
    prepare, message, hint = FAILURES[name]
    server.add(REPO, source)
    prepare(server, monkeypatch)
    with pytest.raises(HubError, match=message) as caught:
        action(REPO, None)
    assert_clear(caught.value, hint)
    assert all("hf_" not in part for part in (str(caught.value), caught.value.hint or ""))


def assert_clear(error: TpshardError, hint: str) -> None:
    assert error.exit_code == 7 and error.code == "hub"
    assert "\n" not in error.message and len(error.message) < 320
    assert error.hint is not None and hint in error.hint


@pytest.mark.parametrize("prepare", [gate, gate_with_login])
def test_gated_repository(
    server: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch, prepare: Callable[..., None]
) -> None:
    server.add(REPO, source)
    prepare(server, monkeypatch)
    repo = hub.describe(REPO, None)  # a gated repository tells everyone what it holds
    for action in (
        lambda: hub.download(REPO, None),
        lambda: repo.read("model.safetensors", 0, 8),
        lambda: repo.read_small("config.json"),
    ):
        with pytest.raises(HubError, match="org/tiny is gated") as caught:
            action()
        assert_clear(caught.value, LOGIN)
        assert f"{server.url()}/org/tiny" in (caught.value.hint or "")


@pytest.mark.parametrize("action", [hub.describe, hub.download])
def test_revision_that_is_not_there(server: HubServer, source: Path, action: Callable[[str, str], object]) -> None:
    server.add(REPO, source)
    with pytest.raises(HubError, match="org/tiny has no revision v9") as caught:
        action(REPO, "v9")
    assert_clear(caught.value, "--revision")


@pytest.mark.parametrize("action", [hub.describe, hub.download])
def test_name_that_is_no_repository(server: HubServer, action: Callable[[str, None], object]) -> None:
    with pytest.raises(UsageError, match="'a/b/c' is not the name of a Hub repository"):
        action("a/b/c", None)
    assert server.requests() == []


def test_describe_when_offline_says_to_download_first(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    set_offline(monkeypatch)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set") as caught:
        hub.describe(REPO, None)
    assert_clear(caught.value, "hf download org/tiny")


@pytest.mark.parametrize("token", ["hf_se\x0bcret", "hf_sécret"])
def test_token_that_cannot_be_sent_is_not_printed(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match="the token cannot be sent") as caught:
        hub.describe(REPO, None)
    assert "cret" not in str(caught.value)
    assert server.requests() == []


def test_passing_failures_are_retried(server: HubServer, source: Path) -> None:
    commit = server.add(REPO, source)
    for status, match in ((500, "GET /api/models"), (503, "HEAD /org/tiny/resolve"), (502, "GET /blob/")):
        server.fault("status", match, times=2, status=status)
    server.fault("truncate", "GET /blob/", times=1)
    snapshot = hub.download(REPO, None)
    assert snapshot.revision == commit and (snapshot.path / "model.safetensors").read_bytes() == WEIGHTS
    server.fault("status", "GET /org/tiny/resolve", times=2, status=500)
    server.fault("truncate", "GET /blob/", times=1)
    assert hub.describe(REPO, None).read("model.safetensors", 5, 99) == WEIGHTS[5:99]


@pytest.mark.parametrize("kind", ["status", "truncate"])
def test_content_that_never_arrives_leaves_no_file(server: HubServer, source: Path, tmp_path: Path, kind: str) -> None:
    server.add(REPO, source)
    server.fault(kind, "GET /blob/", status=500)  # type: ignore[arg-type]
    with pytest.raises(HubError, match="HTTP 500|broke") as caught:
        hub.download(REPO, None)
    assert_clear(caught.value, "again")
    assert not [path for path in (tmp_path / "home").rglob("model.safetensors")]
    server.faults.clear()
    assert (hub.download(REPO, None).path / "model.safetensors").read_bytes() == WEIGHTS


def test_weights_are_fetched_last(server: HubServer, source: Path) -> None:
    server.add(REPO, source)
    server.fault("status", "GET /org/tiny/resolve", status=500)
    with pytest.raises(HubError, match="HTTP 500"):
        hub.download(REPO, None)
    assert server.sent("tokenizer.json") == server.sent("model.safetensors") == 0


@pytest.mark.parametrize(
    ("kind", "message"), [("status", "HTTP 503"), ("html", "did not answer as a Hugging Face Hub")]
)
def test_files_that_cannot_be_located(server: HubServer, source: Path, kind: str, message: str) -> None:
    server.add(REPO, source)
    server.fault(kind, "HEAD ", status=503)  # type: ignore[arg-type]
    with pytest.raises(HubError, match=message):
        hub.download(REPO, None)


def test_waits_between_attempts_and_gives_up(server: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.add(REPO, source)
    server.fault("status", "/api/", status=500)
    with pytest.raises(HubError):
        hub.describe(REPO, None)
    assert waits == list(hub_errors.RETRY_WAITS)
    assert len(server.requests("/api/")) == 1 + len(waits)


@pytest.mark.parametrize(("kind", "attempts"), [(hub_errors.TransientError, 4), (HubError, 1), (CorruptError, 1)])
def test_our_own_errors_are_retried_when_they_may_pass(
    monkeypatch: pytest.MonkeyPatch, kind: type[TpshardError], attempts: int
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    calls = []

    def fail() -> None:
        calls.append(1)
        raise kind("always")

    with pytest.raises(kind):
        hub_errors.attempt(fail, REPO, None)
    assert len(calls) == attempts


def test_failure_says_nothing_of_what_is_not_the_hubs() -> None:
    assert hub_errors.failure(KeyError("a bug of ours"), REPO, None) is None
    full = hub_errors.failure(OSError(errno.ENOSPC, "No space left on device", "/cache/blob"), REPO, None)
    assert isinstance(full, LocalIOError) and full.path == "/cache/blob"
    empty: dict[str, int] = {}
    with pytest.raises(KeyError):
        hub_errors.attempt(lambda: empty["a bug of ours"], REPO, None)


# --- ranges and small files ---


def test_describe_lists_every_file_with_sizes_and_digests_in_one_request(server: HubServer, source: Path) -> None:
    commit = server.add(REPO, source)
    repo = hub.describe(REPO, None)
    assert (repo.repo_id, repo.revision, len(server.log)) == (REPO, commit, 1)
    assert {file.name for file in repo.files} == names(source)
    assert set(repo.names()) == {path.name for path in source.iterdir() if path.is_file()}
    entries = server.repos[REPO].commits[commit]
    for file in repo.files:
        assert file.size == (source / file.name).stat().st_size
        assert file.sha256 == (entries[file.name].sha256 if entries[file.name].large else None)
    assert any(file.sha256 for file in repo.files)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_read_range_is_exact_and_sends_no_more(server: HubServer, source: Path, name: str) -> None:
    content = WEIGHTS if name == "model.safetensors" else b'{"hidden_size": 64}'
    server.add(REPO, write(source, {name: content}))
    repo = hub.describe(REPO, None)
    size = len(content)
    for begin, end in ((0, 1), (0, 8), (8, size), (size - 1, size), (3, 4), (0, size), (5, 13)):
        server.log.clear()
        assert repo.read(name, begin, end) == content[begin:end]
        assert server.sent() == end - begin
        assert server.requests()[-1].range == f"bytes={begin}-{end - 1}"


@pytest.mark.parametrize(("begin", "end"), [(0, 0), (5, 4), (-1, 4), (0, len(WEIGHTS) + 1)])
def test_read_range_outside_the_file_is_a_bug_of_the_caller(
    server: HubServer, source: Path, begin: int, end: int
) -> None:
    server.add(REPO, source)
    repo = hub.describe(REPO, None)
    with pytest.raises(AssertionError):
        repo.read("model.safetensors", begin, end)


def test_ranges_reuse_connections_and_may_be_read_by_threads(server: HubServer, source: Path) -> None:
    server.add(REPO, source)
    repo = hub.describe(REPO, None)
    for begin in range(20):
        repo.read("model.safetensors", begin, begin + 1)
    assert len({entry.peer for entry in server.log}) == 2  # one to the Hub, one to where it keeps large files
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda begin: repo.read("model.safetensors", begin, begin + 3), range(64)))
    assert read == [WEIGHTS[begin : begin + 3] for begin in range(64)]


def test_the_commit_is_pinned_once_described(server: HubServer, source: Path, tmp_path: Path) -> None:
    server.add(REPO, source)
    repo = hub.describe(REPO, None)
    server.add(REPO, write(tmp_path / "next", {"config.json": b"[]"}))
    assert repo.read_small("config.json") == b"{}"


def test_server_that_ignores_ranges_is_left_at_once(server: HubServer, tmp_path: Path) -> None:
    size = 1 << 26
    source = write(tmp_path / "large", {"config.json": b"{}"})
    with (source / "model.safetensors").open("wb") as file:
        file.truncate(size)
    server.add(REPO, source)
    server.fault("ignore_range")
    repo = hub.describe(REPO, None)
    server.log.clear()
    with pytest.raises(HubError, match="does not serve byte ranges of model.safetensors") as caught:
        repo.read("model.safetensors", 0, 65536)
    assert_clear(caught.value, f"hf download org/tiny --revision {repo.revision}")
    assert server.sent() < size // 4  # what the sockets' buffers hold


def test_another_range_than_asked_for(server: HubServer, source: Path) -> None:
    server.add(REPO, source)
    server.fault("other_range")
    repo = hub.describe(REPO, None)
    with pytest.raises(HubError, match="another range") as caught:
        repo.read("model.safetensors", 8, 16)
    assert caught.value.expected == f"bytes 8-15/{len(WEIGHTS)}"


def test_file_that_is_shorter_than_described(server: HubServer, source: Path) -> None:
    server.add(REPO, source)
    repo = hub.describe(REPO, None)
    server.add(REPO, write(source, {"model.safetensors": WEIGHTS[:10]}))
    longer = hub.RemoteRepo(REPO, server.repos[REPO].refs["main"], repo.files)
    with pytest.raises(HubError):
        longer.read("model.safetensors", 0, 20)
    with pytest.raises(HubError):
        longer.read("model.safetensors", 20, 30)


def test_body_that_is_longer_than_announced_is_not_read_on() -> None:
    taken = []

    def endless() -> Iterator[bytes]:
        while True:
            taken.append(1)
            yield b"12345"

    with pytest.raises(HubError, match="more of a.safetensors than was asked for"):
        hub._exactly(endless(), 8, "a.safetensors")
    assert len(taken) == 2


def test_body_that_is_shorter_than_announced_is_worth_another_attempt() -> None:
    assert hub._exactly(iter([b"12", b"345"]), 5, "a.safetensors") == b"12345"
    with pytest.raises(hub_errors.TransientError, match="broke off while sending a.safetensors") as caught:
        hub._exactly(iter([b"12", b"345"]), 8, "a.safetensors")
    assert (caught.value.expected, caught.value.found) == ("8 bytes", "5 bytes")


def test_content_is_not_compressed_on_the_way(server: HubServer, source: Path) -> None:
    config = b'{"hidden_size": 64}'
    server.add(REPO, write(source, {"config.json": config}))
    server.fault("gzip")
    repo = hub.describe(REPO, None)
    assert repo.read("config.json", 2, 8) == config[2:8]
    assert repo.read_small("config.json") == config
    assert (hub.download(REPO, None).path / "config.json").read_bytes() == config


def test_read_small_is_whole_bounded_and_checked(
    server: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO, write(source, {"tokenizer.model": b"sentence pieces"}))
    repo = hub.describe(REPO, None)
    assert repo.read_small("config.json") == b"{}"
    monkeypatch.setattr(hub, "SMALL_LIMIT", 15)
    assert repo.read_small("tokenizer.model") == b"sentence pieces"
    server.log.clear()
    monkeypatch.setattr(hub, "SMALL_LIMIT", 14)
    with pytest.raises(HubError, match="tokenizer.model in org/tiny is too large") as caught:
        repo.read_small("tokenizer.model")
    monkeypatch.setattr(hub, "SMALL_LIMIT", 15)
    assert (caught.value.found, server.log) == ("15 bytes", [])
    (source / "tokenizer.model").write_bytes(b"sentence  pieces"[:15])
    with pytest.raises(HubError, match="is not what the Hub says it is"):
        repo.read_small("tokenizer.model")
    with pytest.raises(HubError, match="org/tiny has no file model.safetensors.index.json"):
        repo.read_small("model.safetensors.index.json")


def test_an_index_may_be_larger_than_other_small_files(server: HubServer, source: Path) -> None:
    """That of a large mixture of experts lists hundreds of thousands of tensors."""
    index = "model.safetensors.index.json"
    server.add(REPO, write(source, {index: b" " * 30_000_000, "tokenizer.json": b" " * 30_000_000}))
    repo = hub.describe(REPO, None)
    assert len(repo.read_small(index)) == 30_000_000
    with pytest.raises(HubError, match="tokenizer.json in org/tiny is too large") as caught:
        repo.read_small("tokenizer.json")
    assert (caught.value.expected, caught.value.found) == ("at most 20000000 bytes", "30000000 bytes")
    large = replace(repo, files=(hub.RemoteFile(index, 200_000_001, None),))
    with pytest.raises(HubError, match="too large") as caught:
        large.read_small(index)
    assert caught.value.expected == "at most 200000000 bytes" and "look at" in str(caught.value.hint)


def test_download_that_does_not_fit_is_refused_before_it_begins(
    server: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO, source)
    needed = sum((source / name).stat().st_size for name in WANTED)
    free = needed - 1
    monkeypatch.setattr(
        "os.statvfs", lambda path: SimpleNamespace(f_bavail=free, f_bfree=free, f_blocks=free, f_frsize=1)
    )
    with pytest.raises(LocalIOError, match="not enough room to download org/tiny") as caught:
        hub.download(REPO, None)
    assert (caught.value.expected, caught.value.found) == (f"{needed} bytes free", f"{free} bytes")
    assert "HF_HOME" in str(caught.value.hint) and not server.requests("resolve")
    assert not (tmp_path / "home").exists()
    free = needed
    hub.download(REPO, None)
    free = 0
    hub.download(REPO, None)  # is there
    write(source, {"LICENSE": b"12345"})
    server.add(REPO, source)
    with pytest.raises(LocalIOError) as caught:
        hub.download(REPO, None)
    changed = sum((source / name).stat().st_size for name in WANTED - {"model.safetensors"})
    assert caught.value.expected == f"{changed} B free"  # of the weights the cache has the blob


def test_token_goes_to_the_hub_alone(server: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(REPO, source)
    server.repos[REPO].token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    repo = hub.describe(REPO, None)
    assert repo.read("model.safetensors", 0, 4) == WEIGHTS[:4]
    hub.download(REPO, None)
    assert {(entry.host, entry.authorized) for entry in server.log} == {("hub", True), ("cdn", False)}


def test_from_a_process_with_its_environment_alone(server: HubServer, source: Path, tmp_path: Path) -> None:
    server.repos.clear()
    commit = server.add(REPO, source)
    server.repos[REPO].token = "hf_secret"
    script = """if True:
        import sys
        from tpshard.storage import hub
        assert hub.is_repo_id("org/tiny") and "huggingface_hub" not in sys.modules
        repo = hub.describe("org/tiny", None)
        print(repo.revision, repo.read("model.safetensors", 254, 258).hex())
        print(hub.download("org/tiny", None).path)
        assert "torch" not in sys.modules
        """
    environment = server.env(tmp_path / "elsewhere", HF_TOKEN="hf_secret")
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    path = tmp_path / "elsewhere" / "hub" / "models--org--tiny" / "snapshots" / commit
    assert (done.stderr, done.stdout.splitlines()) == ("", [f"{commit} feff0001", str(path)])
    assert names(path) == WANTED
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    script = "from tpshard.storage import hub; print(hub.download('org/tiny', None).path)"
    server.log.clear()
    done = subprocess.run([sys.executable, "-c", script], env=offline, capture_output=True, text=True)
    assert (done.stderr, done.stdout.strip(), server.log) == ("", str(path), [])
