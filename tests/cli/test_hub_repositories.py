"""The commands on a Hub repository, against a Hub on this machine: what is asked for, what is fetched, what is said."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.checkpoints import pickled
from tests.helpers.command import fails, llama, succeeds, tpshard
from tests.helpers.grids import without
from tests.helpers.hub_server import HubServer
from tests.helpers.toys import read_all
from tpshard.storage import hub

REPO = "org/tiny"
LARGE = {"hidden_size": 256, "intermediate_size": 512}


@pytest.fixture(autouse=True)
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with HubServer() as running:
        running.patch(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield running


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with all that published repositories carry beside it."""
    model = llama(tmp_path / "source", parts=2, **LARGE)
    for name in ("README.md", "modeling_tiny.py", "training_args.bin", "tf_model.h5", ".gitattributes"):
        (model / name).write_text(f"not wanted: {name}")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "chat_template.jinja"):
        (model / name).write_text(json.dumps(name))  # the cache keeps equal files once
    (model / "original").mkdir()
    (model / "original" / "consolidated.00.pth").write_text("not wanted")
    return model


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def fetched(server: HubServer) -> set[str]:
    """The names of the files of which content was asked for."""
    found = {entry.path.rpartition("/")[2] for entry in server.requests("GET") if "/api/" not in entry.path}
    server.log.clear()
    return found


def test_plan_reads_headers_alone(server: HubServer, source: Path, tmp_path: Path) -> None:
    commit = server.add(REPO, source)
    plan = succeeds("plan", REPO, "--tp", 4, "--json").json
    weights = [path for path in source.glob("*.safetensors")]
    assert sum(path.stat().st_size for path in weights) > 4_000_000
    assert 0 < server.sent(".safetensors") - server.sent("index.json") <= len(weights) * (1 << 16)
    wanted = {path.name for path in weights} | {"config.json", "model.safetensors.index.json"}
    assert fetched(server) == wanted
    assert not list((tmp_path / "home").rglob("*.safetensors")) and not list(Path().iterdir())
    assert (plan["source"]["repo_id"], plan["source"]["revision"]) == (REPO, commit)
    local = succeeds("plan", source, "--tp", 4, "--json").json
    for key in ("model_type", "architecture", "mesh", "tensors", "ranks", "padded", "replicated", "possible_tp"):
        assert plan[key] == local[key], key
    assert plan["source"]["headers_sha256"] == local["source"]["headers_sha256"]


def test_a_draft_reads_headers_alone(server: HubServer, tmp_path: Path) -> None:
    server.add(REPO, llama(tmp_path / "foreign", model_type="mine", **LARGE))
    assert succeeds("archs", "draft", REPO, "--json").json["refusal"] is None
    assert 0 < server.sent(".safetensors") <= 1 << 16
    assert not list((tmp_path / "home").rglob("*.safetensors")) and not list(Path().iterdir())


def test_headers_are_asked_for_side_by_side(server: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model has a hundred files: one request after the other would take a minute."""
    server.add(REPO, source)
    both = threading.Barrier(2, timeout=60)
    read = hub.RemoteRepo.read

    def wait(*arguments: Any) -> bytes:
        both.wait()
        return read(*arguments)

    monkeypatch.setattr(hub.RemoteRepo, "read", wait)
    succeeds("plan", REPO, "--tp", 2)


def test_of_several_damaged_headers_the_first_is_named(
    server: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever answer comes first."""
    read, second = hub.RemoteRepo.read, threading.Event()

    def in_turn(repo: hub.RemoteRepo, name: str, begin: int, end: int) -> bytes:
        if "00001" in name:
            assert second.wait(60)
        else:
            second.set()
        return read(repo, name, begin, end)

    for path in source.glob("*.safetensors"):
        path.write_bytes(b"\0" * 8 + path.read_bytes()[8:])
    server.add(REPO, source)
    monkeypatch.setattr(hub.RemoteRepo, "read", in_turn)
    assert "model-00001-of-00002.safetensors" in fails(3, "plan", REPO, "--tp", 2)["path"]


def test_the_download_must_fit(server: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(REPO, source)
    full = SimpleNamespace(f_bavail=1, f_bfree=1, f_blocks=1, f_frsize=4096)
    monkeypatch.setattr("os.statvfs", lambda path: full)
    error = fails(6, "split", REPO, "--tp", 2)
    assert "not enough room to download org/tiny" in error["message"] and error["found"] == "4.1 kB"
    assert not [name for name in fetched(server) if name.endswith(".safetensors")]
    succeeds("plan", REPO, "--tp", 2)  # writes nothing


def test_plan_and_split_are_of_one_set(server: HubServer, source: Path) -> None:
    """What the plan says from headers over the network is what the split writes from the cache."""
    server.add(REPO, source)
    plan = succeeds("plan", REPO, "--tp", 2, "--json").json
    assert succeeds("split", REPO, "--tp", 2, "--json", "--no-fsync").json["set"] == plan["set"]


def test_a_header_that_is_longer_than_the_first_read(server: HubServer, tmp_path: Path) -> None:
    model = llama(tmp_path / "deep", num_hidden_layers=80)
    assert int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little") > 1 << 16
    server.add(REPO, model)
    assert len(succeeds("plan", REPO, "--tp", 2, "--json").json["tensors"]) == 80 * 9 + 3


def test_split_fetches_what_is_wanted_and_writes_it(server: HubServer, source: Path) -> None:
    commit = server.add(REPO, source)
    result = succeeds("split", REPO, "--tp", 2, "--no-fsync")
    assert result.out == "tiny-tp2\n"
    side = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"}
    side |= {"chat_template.jinja", "README.md", "modeling_tiny.py"}
    index = "model.safetensors.index.json"
    assert fetched(server) == side | {index} | {path.name for path in source.glob("*.safetensors")}
    ranks = {f"rank-0000{rank}-of-00002.{end}" for rank in range(2) for end in ("safetensors", "json")}
    assert {path.name for path in Path("tiny-tp2").iterdir()} == side | ranks | {"tpshard.json", "SHA256SUMS"}
    written = json.loads(Path("tiny-tp2/tpshard.json").read_text())["source"]
    assert (written["name"], written["repo_id"], written["revision"]) == (REPO, REPO, commit)
    succeeds("check", "tiny-tp2", "--source", REPO)
    succeeds("check", "tiny-tp2", "--source", source)
    assert not [name for name in fetched(server) if name.endswith(".safetensors")]  # from the cache
    assert succeeds("merge", "tiny-tp2", "--no-fsync").out == "tiny-merged\n"
    assert read_all(Path("tiny-merged")) == read_all(source)


def test_the_digests_of_the_hub_are_recorded(server: HubServer, source: Path) -> None:
    server.add(REPO, source)
    succeeds("split", REPO, "--tp", 2, "--no-fsync")
    files = json.loads(Path("tiny-tp2/tpshard.json").read_text())["source"]["files"]
    digests = {entry.path.name: entry.sha256 for entry in next(iter(server.repos[REPO].commits.values())).values()}
    assert files and all(file["sha256"] == digests[file["name"]] for file in files)


def test_the_revision_is_recorded_as_the_commit(server: HubServer, source: Path) -> None:
    old = server.add(REPO, source, "v1")
    new = server.add(REPO, llama(source.with_name("other"), seed=3, parts=2, **LARGE))
    assert old != new
    for revision, commit in (("v1", old), (new, new)):
        result = succeeds("split", REPO, "--tp", 2, "--revision", revision, "-o", f"of-{revision}", "--no-fsync")
        source_of = json.loads(Path(f"of-{revision}/tpshard.json").read_text())["source"]
        assert (source_of["repo_id"], source_of["revision"]) == (REPO, commit)
        assert f"next: tpshard check of-{revision} --source {REPO} --revision {revision}\n" in result.err
        plan = succeeds("plan", REPO, "--tp", 2, "--revision", revision, "--json").json
        assert plan["source"]["revision"] == commit
    assert succeeds("plan", REPO, "--tp", 2, "--json").json["source"]["revision"] == new
    assert tpshard("check", "of-v1", "--source", REPO).code == 1


@pytest.mark.parametrize("verb", ["plan", "split"])
def test_not_on_the_hub(server: HubServer, source: Path, verb: str) -> None:
    server.add(REPO, source)
    error = fails(7, verb, "org/nothing", "--tp", 2)
    assert "no repository org/nothing" in error["message"] and "spelling" in error["hint"]
    error = fails(7, verb, REPO, "--tp", 2, "--revision", "v9")
    assert "no revision v9" in error["message"] and "branch" in error["hint"]


@pytest.mark.parametrize("verb", ["plan", "split"])
def test_a_hub_that_fails(server: HubServer, source: Path, verb: str) -> None:
    server.add(REPO, source)
    server.repos[REPO].gated = True
    assert "gated" in fails(7, verb, REPO, "--tp", 2)["message"]
    server.repos[REPO].gated = False
    server.fault("status", status=503)
    assert "HTTP 503" in fails(7, verb, REPO, "--tp", 2)["message"]
    server.faults.clear()
    server.fault("html")
    assert fails(7, verb, REPO, "--tp", 2)["code"] == "hub"


@pytest.mark.parametrize("verb", ["plan", "split"])
def test_offline_without_a_copy(server: HubServer, source: Path, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(REPO, source)
    go_offline(monkeypatch)
    error = fails(7, verb, REPO, "--tp", 2)
    assert "HF_HUB_OFFLINE" in error["message"] and not server.log


def test_offline_with_a_copy(server: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = server.add(REPO, source)
    succeeds("split", REPO, "--tp", 2, "-o", "online", "--no-fsync")
    server.log.clear()
    go_offline(monkeypatch)
    result = succeeds("split", REPO, "--tp", 2, "-o", "offline", "--no-fsync", "--json")
    assert "HF_HUB_OFFLINE" in result.err and result.json["warnings"]
    plan = succeeds("plan", REPO, "--tp", 2, "--json").json
    assert plan["source"]["revision"] == commit and plan["warnings"] == result.json["warnings"]
    check = succeeds("check", "offline", "--source", REPO, "--json")
    assert "HF_HUB_OFFLINE" in check.err and check.json["warnings"] == result.json["warnings"]
    assert not server.log
    for path in Path("online").iterdir():
        assert (Path("offline") / path.name).read_bytes() == path.read_bytes()


def test_an_interrupted_connection_with_a_copy(server: HubServer, source: Path) -> None:
    server.add(REPO, source)
    succeeds("split", REPO, "--tp", 2, "-o", "first", "--no-fsync")
    server.fault("status", status=500)
    result = succeeds("split", REPO, "--tp", 2, "-o", "second", "--no-fsync")
    assert result.err.startswith("warning: ") and "cached snapshot" in result.err


# --- a Hub that lies ---


def refused() -> dict[str, Any]:
    """The error of a split that fails for the Hub and writes nothing; given once, for the cache is then another one."""
    result = tpshard("split", REPO, "--tp", 2, "-o", "out", "--no-fsync", "--json")
    assert result.code == 7 and result.err.count("\n") == 2 and not any(Path().iterdir()), result.err
    error: dict[str, Any] = result.json["error"]
    return error


def moved(location: str) -> dict[str, Any]:
    return {"kind": "status", "status": 302, "headers": {"Location": location}}


DIFFERS = "is not what the Hub says it is"
LIES: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "short body": ({"kind": "truncate"}, ("broke",), "run the command again"),
    "one byte more": ({"kind": "more"}, ("broke",), "run the command again"),
    "another byte": ({"kind": "swap"}, (DIFFERS,), "a proxy changes it"),
    "stalled": ({"kind": "stall", "seconds": 600}, ("did not answer in time",), "HF_HUB_DOWNLOAD_TIMEOUT"),
    "login page": ({"kind": "html"}, (DIFFERS, "broke off while sending"), "run the command again"),
    "moved to nowhere": (moved("http://127.0.0.1:1/x"), ("cannot connect",), "check the network"),
    "moved in a circle": (moved("/loop"), ("did not answer as a Hugging Face Hub",), "HF_ENDPOINT"),
    "moved to a file": (moved("file:///etc/passwd"), ("cannot connect",), "HF_ENDPOINT"),
    "moved to what is another's": (moved("/else"), (DIFFERS, "broke off while sending"), "run the command again"),
}
"""What goes wrong with a file, words of which the message has one, and the way out."""


LIES_IN_SMALL_FILES = ("moved to nowhere", "moved in a circle", "moved to a file", "one byte more", "stalled")


@pytest.mark.parametrize(
    ("name", "of"),
    without(product(LIES, ("weights", "small files")), [*product(LIES_IN_SMALL_FILES, ("small files",))]),
)
def test_a_hub_that_lies_about_a_file(
    server: HubServer, source: Path, tmp_path: Path, name: str, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights come from another host, the small files from the Hub itself. Nothing wrong is kept."""
    (source / "NOTICE").write_bytes((source / "LICENSE").read_bytes())  # of equal files the cache keeps one
    server.add(REPO, source)
    fault, words, hint = LIES[name]
    if name == "stalled":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    server.fault(match="GET /blob/" if of == "weights" else f"GET /{REPO}/resolve", **fault)
    server.fault("status", "GET /loop", status=302, headers={"Location": "/loop"})
    server.fault("html", "GET /else")
    for _ in range(2):  # what the first one left in the cache deceives nobody
        error = refused()
        assert any(word in error["message"] for word in words) and hint in error["hint"], error
        kept = {path.name: path.read_bytes() for path in (tmp_path / "home").glob("hub/*/snapshots/*/*")}
        assert all((source / name).read_bytes() == content for name, content in kept.items())
    server.faults.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 60)
    succeeds("split", REPO, "--tp", 2, "-o", "out", "--no-fsync")
    succeeds("check", "out", "--source", source)


@pytest.mark.parametrize("verb", ["plan", "split"])
def test_a_hub_that_describes_another_size(server: HubServer, source: Path, verb: str) -> None:
    server.add(REPO, source)
    server.fault("resize", "GET /api/")
    error = fails(7, verb, REPO, "--tp", 2)
    assert "bytes" in error["expected"] and error["expected"] != error["found"]


def test_a_hub_that_moves_on_in_the_middle(server: HubServer, source: Path) -> None:
    """Between the small files and the weights; a plan keeps to the commit that it began with."""
    old = server.add(REPO, source)

    def push() -> None:
        (source / "tokenizer.json").write_text(f"{len(server.log)}")
        server.add(REPO, source)

    server.fault("meanwhile", "GET /org/tiny/resolve", times=1, action=push)
    error = refused()
    assert "changed while it was downloaded" in error["message"] and error["hint"] == "run the command again"
    assert (error["expected"], error["found"]) == (old, server.repos[REPO].refs["main"])
    assert succeeds("split", REPO, "--tp", 2, "-o", "out", "--json", "--no-fsync").code == 0
    assert json.loads(Path("out/tpshard.json").read_text())["source"]["revision"] == server.repos[REPO].refs["main"]
    before = server.repos[REPO].refs["main"]
    server.fault("meanwhile", f"GET /{REPO}/resolve", times=1, action=push)
    assert succeeds("plan", REPO, "--tp", 2, "--json").json["source"]["revision"] == before


# --- what a repository can get wrong ---


def test_pickles_on_the_hub(server: HubServer, tmp_path: Path) -> None:
    llama(tmp_path / "twin")
    server.add(REPO, pickled(tmp_path / "twin", tmp_path / "pickled"))
    for verb in ("plan", "split"):
        assert "--allow-pickle" in fails(5, verb, REPO, "--tp", 2)["hint"]
    assert "pytorch_model.bin" not in fetched(server)
    result = succeeds("split", REPO, "--tp", 2, "--allow-pickle", "--no-fsync")
    assert f"next: tpshard check tiny-tp2 --source {REPO} --allow-pickle\n" in result.err
    succeeds("check", "tiny-tp2", "--source", tmp_path / "twin")
    plan = succeeds("plan", REPO, "--tp", 2, "--allow-pickle", "--json").json
    assert plan["source"]["repo_id"] == REPO and len(plan["tensors"]) == 21


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_in_the_place_of_a_file(server: HubServer, tmp_path: Path, name: str) -> None:
    model = llama(tmp_path / "source")
    (model / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n" + b" " * 40)
    server.add(REPO, model)
    for verb in ("plan", "split"):
        error = fails(3, verb, REPO, "--tp", 2)
        assert "Git-LFS pointer" in error["message"] and name in error["path"]


def test_an_index_that_points_outside(server: HubServer, source: Path) -> None:
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../../secret.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    server.add(REPO, source)
    for verb in ("plan", "split"):
        assert "outside" in fails(5, verb, REPO, "--tp", 2)["message"]


def test_a_shard_that_the_hub_lacks(server: HubServer, source: Path) -> None:
    (source / "model-00002-of-00002.safetensors").unlink()
    server.add(REPO, source)
    for verb in ("plan", "split"):
        assert "model-00002-of-00002.safetensors" in fails(3, verb, REPO, "--tp", 2)["message"]


def test_a_repository_without_a_config(server: HubServer, source: Path) -> None:
    (source / "config.json").unlink()
    server.add(REPO, source)
    for verb in ("plan", "split"):
        assert "config.json" in fails(3, verb, REPO, "--tp", 2)["message"]


def test_quantised_on_the_hub(server: HubServer, source: Path) -> None:
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    server.add(REPO, source)
    for verb in ("plan", "split"):
        assert "quantised by modelopt" in fails(3, verb, REPO, "--tp", 2)["message"]


def test_another_kind_of_repository(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_text("gguf")
    (tmp_path / "gguf" / "config.json").write_text('{"model_type": "llama"}')
    server.add(REPO, tmp_path / "gguf")
    for verb in ("plan", "split"):
        assert "model.gguf" in fails(4, verb, REPO, "--tp", 2)["found"]


def test_a_directory_of_the_same_name_wins(server: HubServer, source: Path) -> None:
    server.add(REPO, source)
    llama(Path(REPO), vocab_size=12)
    assert succeeds("plan", REPO, "--tp", 2, "--json").json["source"]["repo_id"] is None
    assert not server.log


def test_the_real_command_with_a_token(server: HubServer, source: Path, tmp_path: Path) -> None:
    """A private repository, in a process of its own that finds everything in its environment."""
    commit = server.add(REPO, source)
    server.repos[REPO].token = "hf_secret"
    command = [sys.executable, "-m", "tpshard", "split", REPO, "--tp", "2", "--no-fsync", "--json"]

    def run(**env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, env=server.env(tmp_path / "new", **env))

    refused = run()
    assert refused.returncode == 7 and json.loads(refused.stdout)["error"]["code"] == "hub"
    assert "HF_TOKEN" in refused.stderr and not Path("tiny-tp2").exists()
    done = run(HF_TOKEN="hf_secret")
    assert done.returncode == 0 and json.loads(done.stdout)["output"] == "tiny-tp2", done.stderr
    assert json.loads(Path("tiny-tp2/tpshard.json").read_text())["source"]["revision"] == commit
    assert "hf_secret" not in refused.stderr + done.stderr + Path("tiny-tp2/tpshard.json").read_text()
