"""The commands as a user meets them: help, exit codes, JSON, names of outputs, what is said and what is not."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tpshard as package
from tests.conftest import Get
from tests.helpers.command import CODES, LLAMA, Result, fails, llama, llama_tensors, succeeds, tpshard, tree
from tests.helpers.paths import DOCS
from tests.helpers.toys import Tensor, contents, random_tensor, read_all, read_rank, write_checkpoint
from tpshard import __version__
from tpshard.api import convert as api
from tpshard.cli import console
from tpshard.cli import main as cli
from tpshard.cli.check import DIFFERENCES
from tpshard.errors import TpshardError
from tpshard.execute.publish import Settings
from tpshard.storage.local import read_header
from tpshard.units import human_bytes

COMMANDS = ("plan", "split", "merge", "reshard", "check", "inspect")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    yield


@pytest.fixture
def model() -> Path:
    return llama(Path("model"))


def split(model: Path, out: str, tp: int = 4, *options: object) -> Path:
    succeeds("split", model, "--tp", tp, "-o", out, "--no-fsync", *options)
    return Path(out)


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "tpshard", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


# --- help ---


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_defaults(command: str) -> None:
    result = succeeds(command, "--help")
    assert result.err == ""
    examples = [line.strip() for line in result.out.splitlines() if line.startswith(f"    tpshard {command} ")]
    assert examples, result.out
    for example in examples:  # the parser knows every option of it
        for option in re.findall(r"(?<=\s)-{1,2}[a-z-]+", example):
            assert option in result.out.split("Options:")[1]
    options = {name for name in re.findall(r"^  (?:-\w, )?(--[a-z-]+)", result.out, re.M)}
    assert {"--json", "--quiet", "--help"} <= options
    text = " ".join(result.out.split())
    for option, default in {
        "--out": "[default: ./MODEL-merged]" if command == "merge" else "[default: ./MODEL-tpN, or ./MODEL-tpN-FORMAT]",
        "--max-file-size": "[default: as in the source]" if command == "merge" else "[default: 50GB]",
        "--workers": "[default: one per core, at most 8]",
        "--checksum": "[default: sha256]",
        "--ranks": "[default: all]",
        "--dtype": "[default: as stored]",
        "--revision": "[default: main]",
        "--rules": "[default: by model_type]",
        "--pad-vocab-to": "[default: the next multiple of tp]",
    }.items():
        assert (default in text) or option not in options, (command, option)


def test_help_of_all() -> None:
    result = succeeds("--help")
    assert all(f"  {command} " in result.out for command in (*COMMANDS, "archs"))
    for page in (result.out, succeeds("archs", "--help").out):
        assert "..." not in page.split("Commands:")[1], "a command's first line is too long for the list"
    for code in ("1 judged different", "3 corrupt input", "70 bug", "130 interrupted"):
        assert code in " ".join(result.out.split())


def test_no_command_is_a_question() -> None:
    result = tpshard()
    assert (result.code, result.out) == (2, "") and "Usage: " in result.err
    assert result.err.strip() == succeeds("--help").out.strip()


def test_version() -> None:
    assert succeeds("--version").out == f"tpshard {__version__}\n"


# --- usage ---


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "nonsense"),
        (["plan"], "MODEL"),
        (["plan", "model"], "--tp"),
        (["plan", "model", "extra", "--tp", "2"], "extra"),
        (["plan", "model", "--tp", "2", "--no-such-option"], "--no-such-option"),
        (["plan", "model", "--tp", "0"], "--tp"),
        (["plan", "model", "--tp", "-1"], "--tp"),
        (["plan", "model", "--tp", "two"], "--tp"),
        (["plan", "model", "--tp", "2.5"], "--tp"),
        (["plan", "model", "--tp", "100000"], "--tp"),
        (["plan", "model", "--tp", "9" * 5000], "--tp"),
        (["plan", "model", "--tp", "2", "--dtype", "int8"], "--dtype"),
        (["plan", "model", "--tp", "2", "--shares", "1"], "--shares"),
        (["plan", "model", "--tp", "2", "--shares", "1,0"], "--shares"),
        (["plan", "model", "--tp", "2", "--shares", "1,-1"], "--shares"),
        (["plan", "model", "--tp", "2", "--shares", "a,b"], "--shares"),
        (["plan", "model", "--tp", "2", "--shares", "nan,inf"], "--shares"),
        (["plan", "model", "--tp", "2", "--shares", "1/0,1"], "--shares"),
        (["plan", "model", "--tp", "2", "--pad-vocab-to", "9"], "pad"),
        (["plan", "model", "--tp", "4", "--pad-vocab-to", "13"], "pad"),
        (["plan", "model", "--tp", "4", "--pad-vocab-to", "x"], "--pad-vocab-to"),
        (["plan", "model", "--tp", "2", "--max-file-size", "0"], "--max-file-size"),
        (["plan", "model", "--tp", "2", "--max-file-size", "-5GB"], "--max-file-size"),
        (["plan", "model", "--tp", "2", "--max-file-size", "5 parsecs"], "--max-file-size"),
        (["plan", "model", "--tp", "2", "--max-file-size", "infGB"], "--max-file-size"),
        (["plan", "model", "--tp", "2", "--rules", "nothing.toml"], "nothing.toml"),
        (["split", "model", "--tp", "2", "--ranks", "2"], "--ranks does not take these"),
        (["split", "model", "--tp", "2", "--ranks", "1-0"], "--ranks"),
        (["split", "model", "--tp", "2", "--ranks", "-1"], "--ranks"),
        (["split", "model", "--tp", "2", "--ranks", ""], "--ranks"),
        (["split", "model", "--tp", "2", "--ranks", "0,x"], "--ranks"),
        (["split", "model", "--tp", "2", "--ranks", "0-99999999999999"], "--ranks"),
        (["split", "model", "--tp", "2", "--workers", "0"], "--workers"),
        (["split", "model", "--tp", "2", "--checksum", "md5"], "--checksum"),
        (["check", "model", "--tp", "0"], "--tp"),
        (["inspect", "nothing"], "no such file"),
        (["archs", "nonsense"], "nonsense"),
    ],
)
def test_usage(model: Path, arguments: list[str], says: str) -> None:
    error = fails(2, *arguments)
    assert says in error["message"] + (error["path"] or "")


def test_an_option_without_its_value(model: Path) -> None:
    result = tpshard("plan", model, "--json", "--tp")
    assert result.code == 2 and len(result.err.splitlines()) == 2
    assert result.json["error"]["code"] == "usage" and "--tp" in result.json["error"]["message"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("5GB", 5 * 10**9),
        ("1.5 kB", 1500),
        ("2KiB", 2048),
        ("3mib", 3 << 20),
        ("1e3", 1000),
        (" 7TB ", 7 * 10**12),
    ],
)
def test_sizes(model: Path, text: str, size: int) -> None:
    succeeds("split", model, "--tp", 2, "--max-file-size", text, "-o", "out", "--no-fsync")
    assert json.loads(Path("out/tpshard.json").read_text())["options"]["max_file_size"] == size


def test_ranks_of_every_form(model: Path) -> None:
    split(model, "out", 4, "--ranks", "0, 2-3")
    assert {path.name for path in Path("out").glob("*.safetensors")} == {
        f"rank-0000{rank}-of-00004.safetensors" for rank in (0, 2, 3)
    }


def test_the_output_is_the_source(model: Path) -> None:
    shards = split(model, "set")
    for arguments in (("split", model, "--tp", 2, "-o", model), ("split", model, "--tp", 2, "-o", "./x/../model")):
        Path("x").mkdir(exist_ok=True)
        assert "source itself" in fails(2, *arguments)["message"]
    Path("link").symlink_to("model")
    assert "source itself" in fails(2, "split", model, "--tp", 2, "-o", "link", "--overwrite")["message"]
    for verb in (("merge", shards), ("reshard", shards, "--tp", 2)):
        assert "source itself" in fails(2, *verb, "-o", shards, "--overwrite")["message"]
        assert "-o" in fails(2, *verb, "-o", shards)["hint"]


def test_the_source_is_inside_the_output(model: Path) -> None:
    Path("outer").mkdir()
    model.rename("outer/model")
    assert "inside the output" in fails(2, "split", "outer/model", "--tp", 2, "-o", "outer", "--overwrite")["message"]


def test_a_shard_set_is_not_split(model: Path) -> None:
    shards = split(model, "set")
    for source in (shards, shards / "rank-00000-of-00004.safetensors"):
        for verb in ("plan", "split"):
            error = fails(2, verb, source, "--tp", 2)
            assert "shard set" in error["message"] and "merge" in error["hint"] and "reshard" in error["hint"]


# --- the target ---


def test_the_output_exists(model: Path) -> None:
    shards = split(model, "set")
    before = contents(shards)
    for arguments in (("split", model, "--tp", 4), ("split", model, "--tp", 2), ("reshard", shards, "--tp", 2)):
        out = "set" if arguments[0] == "split" else "two"
        if out == "two":
            split(model, "two", 2)
        error = fails(9, *arguments, "-o", out)
        assert error["path"] == out and "--overwrite" in error["hint"]
    assert contents(shards) == before
    succeeds("split", model, "--tp", 2, "-o", "set", "--overwrite", "--no-fsync")
    assert read_rank(Path("set"), 1, 2) and not Path("set/rank-00003-of-00004.safetensors").exists()


def test_the_output_is_a_file(model: Path) -> None:
    Path("out").write_text("mine")
    assert "not a directory" in fails(9, "split", model, "--tp", 2, "-o", "out")["message"]
    assert "not a directory" in fails(9, "split", model, "--tp", 2, "-o", "out", "--overwrite")["message"]
    assert Path("out").read_text() == "mine"


def test_files_of_somebody_else_are_not_replaced(model: Path) -> None:
    split(model, "out")
    Path("out/thesis.tex").write_text("mine")
    error = fails(9, "split", model, "--tp", 4, "-o", "out", "--overwrite")
    assert error["found"] == "thesis.tex" and Path("out/thesis.tex").exists()


def test_ranks_that_are_there_already(model: Path) -> None:
    """As when a job is queued again: its work is done."""
    split(model, "out", 4)
    assert "already there" in succeeds("split", model, "--tp", 4, "-o", "out", "--ranks", "1").err
    split(model, "part", 4, "--ranks", "0")
    assert "already there" in succeeds("split", model, "--tp", 4, "-o", "part", "--ranks", "0").err
    assert fails(9, "split", model, "--tp", 4, "-o", "part", "--ranks", "1", "--dtype", "float16")["path"]


def test_a_disk_that_refuses(model: Path) -> None:
    Path("file").write_text("")
    assert fails(6, "split", model, "--tp", 2, "-o", "file/out")["code"] == "io"
    assert fails(6, "split", model, "--tp", 2, "-o", "/proc/nothing/out")["code"] == "io"
    assert fails(6, "split", model, "--tp", 2, "-o", "x" * 300)["code"] == "io"


def test_a_disk_that_is_too_small(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the first byte."""
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=real(path).f_frsize))
    error = fails(6, "split", model, "--tp", 2)
    assert error["message"] == "not enough room" and "-o" in error["hint"] and "--ranks" in error["hint"]
    assert error["expected"].endswith(" kB free") and error["found"] == human_bytes(real(".").f_frsize)
    assert fails(6, "split", model, "--tp", 1, "--format", "hf")["hint"] == error["hint"].partition(", or write")[0]


def test_stdout_that_refuses_and_that_left(model: Path) -> None:
    with open("/dev/full", "w") as full:
        for arguments, code in (
            (["archs", "--json"], 6),
            (["plan", "model", "--tp", "2"], 6),
            (["--help"], 6),
            (["plan", "model", "--tp", "3", "--json"], 4),
        ):
            command = [sys.executable, "-m", "tpshard", *arguments]
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
            assert result.returncode == code and result.stderr.startswith("error: "), result.stderr
            assert len(result.stderr.splitlines()) == 2
    piped = f"{shlex.quote(sys.executable)} -m tpshard plan model --tp 2 | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", piped], capture_output=True, text=True)
    assert result.stdout in ("141\n", "0\n") and result.stderr == ""


# --- bugs and interrupts ---


def test_a_bug_of_ours_shows_a_traceback_and_asks_for_a_report(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        assert arguments == "never", "parts do not tile"

    monkeypatch.setattr("tpshard.api.convert.plan_with", broken)
    result = tpshard("plan", model, "--tp", 2, "--json")
    assert result.code == 70 and "Traceback" in result.err and "in broken" in result.err
    assert "please report it" in result.err and __version__ in result.err
    error = result.json["error"]
    assert error["code"] == "internal" and "AssertionError: parts do not tile" in error["message"]
    assert tpshard("plan", model, "--tp", 2).out == ""


@pytest.mark.parametrize("verb", COMMANDS)
def test_interrupted(model: Path, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    function = verb if verb == "inspect" else f"{verb}_with"
    monkeypatch.setattr(f"tpshard.{package._MODULES[verb]}.{function}", interrupted)
    tp = ["--tp", "2"] if verb in ("plan", "split", "reshard") else []
    result = tpshard(verb, "x", *tp, "--json")
    assert result.code == 130 and result.json["error"]["code"] == "interrupted"
    assert ("resumes" in result.err) is (verb in ("split", "merge", "reshard"))
    assert "Traceback" not in result.err and result.err.startswith("error: interrupted\n")


SLOW = """
import signal, sys, time
from tpshard.storage.files import Files
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
write = Files.pwritev
def slow(self, fd, buffers, offset):
    time.sleep(0.03)
    return write(self, fd, buffers, offset)
Files.pwritev = slow
from tpshard.cli.main import main
main(sys.argv[1:])
"""


@contextmanager
def slowly(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The command in a process that writes slowly, once its first file is growing; ended at the end of the block."""
    command = [sys.executable, "-c", SLOW, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not list(Path().glob("*/*.safetensors.partial")):
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            time.sleep(0.2)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_leaves_a_state_that_resumes(model: Path, as_json: bool) -> None:
    with slowly("split", model, "--tp", 4, *(["--json"] if as_json else [])) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "error: interrupted\nhint: the same command resumes where it stopped\n"
    assert (json.loads(out)["error"]["code"] == "interrupted") if as_json else out == ""
    assert not Path("model-tp4").exists() and Path("model-tp4.partial").is_dir()
    error = fails(9, "split", model, "--tp", 2, "-o", "model-tp4")
    assert "unfinished run" in error["message"] and "repeat that command" in error["hint"]
    succeeds("split", model, "--tp", 4)
    assert not Path("model-tp4.partial").exists()
    assert contents(Path("model-tp4")) == contents(split(model, "again"))


def test_a_second_run_on_the_same_target(model: Path) -> None:
    with slowly("split", model, "--tp", 4) as process:
        error = fails_beside("split", model, "--tp", 4)
        assert "another run is writing here" in error["message"] and "-o" in error["hint"]
        assert process.poll() is None
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    succeeds("check", out.strip(), "--source", model)


def fails_beside(*arguments: object) -> dict[str, Any]:
    """The error of a command that fails with 9 while another one writes."""
    result = tpshard(*arguments, "--json")
    assert result.code == 9 and len(result.err.splitlines()) == 2
    error: dict[str, Any] = result.json["error"]
    return error


# --- the JSON contract ---

MESH = {"tp": int, "pp": int, "ep": int}
SOURCE = {"name": str, "repo_id": (str, None), "revision": (str, None), "headers_sha256": str,
          "files": [{"name": str, "size": int}]}  # fmt: skip
WRITTEN = {
    "schema_version": int, "command": str, "output": str, "mesh": MESH, "set": str, "bytes": int,
    "ranks": [{"rank": int, "parts": [{"file": str, "size": int, "sha256": (str, None)}]}],
    "left_out": [{"file": str, "reason": str}], "warnings": [str],
}  # fmt: skip
VERSION = {"engine": str, "version": str, "compared": str}
CONTRACT: dict[str, Any] = {
    "plan": {
        "schema_version": int, "command": str, "model_type": str, "source": SOURCE,
        "architecture": {"model_type": str, "rules": str, "rules_sha256": str}, "mesh": MESH, "set": str,
        "format": str, "tensors": [{
            "name": str, "dtype": str, "shape": [int], "rule": ("column", "row", "replicate", "drop"),
            "dim": (int, None), "segments": [{"axis": str, "count": int, "unit": int}], "interleave": (str, None),
            "ranks": [{"rank": int, "shape": [int], "bytes": int}],
        }],
        "ranks": [{"rank": int, "bytes": int}],
        "numbers": {
            "batch": int, "seq": int, "gpu_memory": (int, None), "usable": float,
            "kv_cache": {
                "layers": int, "caches": int, "axis": (str, None), "latent": (int, None), "dtype": str,
                "window": (int, None),
            },
            "ranks": [{"rank": int, "weights": int, "kv_cache": int, "total": int}],
            "stages": [{
                "stage": int, "weights": int, "kv_cache": int, "total": int, "all_reduces": int,
                "bytes_per_token": int, "bytes_per_step": int, "bytes_per_prompt": int,
            }],
            "communication": {
                "all_reduces": int, "hidden": int, "dtype": str, "bytes_per_token": int, "bytes_per_step": int,
                "bytes_per_prompt": int,
            },
        },
        "padded": [{"axis": str, "count": int, "padded": int}],
        "replicated": [str], "tied": dict, "possible_tp": [int], "impossible_tp": [{"tp": int, "reason": str}],
        "left_out": [{"file": str, "reason": str}], "warnings": [str],
    },
    "split": WRITTEN, "merge": WRITTEN, "reshard": WRITTEN,
    "check": {
        "schema_version": int, "command": str, "path": str, "source": (str, None), "mesh": MESH, "set": str,
        "equal": bool, "differences": [{"file": str, "tensor": (str, None), "message": str}], "unchecked": [str],
        "warnings": [str],
    },
    "inspect": {
        "schema_version": int, "command": str, "kind": str, "path": str, "model_type": str, "mesh": MESH, "set": str,
        "source": SOURCE, "bytes": int, "missing_ranks": [int],
        "tensors": [{"name": str, "dtype": str, "shape": [int], "bytes": int, "file": str}],
    },
    "archs": {
        "schema_version": int, "command": str,
        "architectures": [{
            "name": str, "model_types": [str],
            "supported": [
                {"model_type": str, "verify": str, "engines": [str], "quantised": [str], "versions": [VERSION]}
            ],
        }],
        "nesting": [
            {"model_type": str, "texts": [str], "engines": [str], "quantised": [str], "versions": [VERSION]}
        ],
    },
}  # fmt: skip


def conforms(value: object, schema: object, where: str = "") -> None:
    """Assert that a value has exactly the keys and types of a schema; a tuple lists alternatives."""
    if isinstance(schema, tuple):
        assert any(value == s if s is None or isinstance(s, str) else type(value) is s for s in schema), (where, value)
    elif isinstance(schema, dict):
        assert isinstance(value, dict) and list(value) == list(schema), (where, value)
        for key, inner in schema.items():
            conforms(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), (where, value)
        for item in value:
            conforms(item, schema[0], f"{where}[]")
    else:
        assert type(value) is schema, (where, value)


def test_the_json_of_every_command(model: Path) -> None:
    found = {
        "plan": succeeds("plan", model, "--tp", 4, "--json").json,
        "split": succeeds("split", model, "--tp", 4, "--json", "-o", "set", "--no-fsync").json,
        "merge": succeeds("merge", "set", "--json", "--no-fsync").json,
        "reshard": succeeds("reshard", "set", "--tp", 2, "--json", "--no-fsync").json,
        "check": succeeds("check", "set", "--json").json,
        "inspect": succeeds("inspect", "set", "--json").json,
        "archs": succeeds("archs", "--json").json,
    }
    for command, value in found.items():
        assert value["command"] == command
        conforms(value, CONTRACT[command], command)
    conforms(succeeds("split", model, "--tp", 2, "--dry-run", "--json").json, CONTRACT["plan"])
    conforms(succeeds("check", "set", "--source", model, "--json").json, CONTRACT["check"])


def test_the_values_of_a_plan(model: Path) -> None:
    plan = succeeds("plan", model, "--tp", 4, "--json").json
    assert plan["model_type"] == "llama" and plan["mesh"] == {"tp": 4, "pp": 1, "ep": 1}
    assert plan["possible_tp"] == [1, 2, 4] and [entry["tp"] for entry in plan["impossible_tp"]] == [3]
    assert plan["padded"] == [{"axis": "vocab", "count": 10, "padded": 12}] and plan["replicated"] == ["kv"]
    tensors = {tensor["name"]: tensor for tensor in plan["tensors"]}
    assert list(tensors) == list(llama_tensors())
    head, down = tensors["lm_head.weight"], tensors["model.layers.0.mlp.down_proj.weight"]
    assert (head["rule"], head["dim"], head["shape"]) == ("column", 0, [10, 16])
    assert head["segments"] == [{"axis": "vocab", "count": 10, "unit": 1}]
    assert head["ranks"] == [{"rank": rank, "shape": [3, 16], "bytes": 192} for rank in range(4)]
    assert (down["rule"], down["dim"], down["ranks"][3]["shape"]) == ("row", 1, [16, 2])
    assert tensors["model.norm.weight"]["rule"] == "replicate" and tensors["model.norm.weight"]["dim"] is None
    for rank in range(4):
        held = sum(tensor["ranks"][rank]["bytes"] for tensor in plan["tensors"])
        assert plan["ranks"][rank] == {"rank": rank, "bytes": held}


def test_the_values_of_a_split(model: Path) -> None:
    result = succeeds("split", model, "--tp", 2, "-o", "set", "--json", "--no-fsync").json
    assert result["output"] == "set" and result["bytes"] == sum(p.stat().st_size for p in Path("set").glob("rank-*s"))
    for entry in result["ranks"]:
        record = json.loads(Path(f"set/rank-0000{entry['rank']}-of-00002.json").read_text())
        assert entry["parts"] == record["parts"]


def test_inspect_of_every_kind(model: Path) -> None:
    shards = split(model, "set")
    checkpoint = succeeds("inspect", model, "--json").json
    assert checkpoint["kind"] == "checkpoint" and checkpoint["model_type"] == "llama"
    assert checkpoint["parameters"] == sum(int(np.prod(t.shape)) for t in llama_tensors().values())
    assert checkpoint["files"] == [{"name": "model.safetensors", "size": checkpoint["bytes"]}]
    file = succeeds("inspect", shards / "rank-00002-of-00004.safetensors", "--json").json
    assert file["kind"] == "file" and file["metadata"]["tpshard.rank"] == "2"
    assert succeeds("inspect", shards, "--json").json["kind"] == "shards"
    for path in (model, shards, model / "model.safetensors"):
        text = succeeds("inspect", path).out
        assert "model.layers.{0-1}.mlp.down_proj.weight" in text and str(path) in text
        assert "model.layers.1.mlp.down_proj.weight" in succeeds("inspect", path, "--all").out
    assert "mesh: tp 4" in succeeds("inspect", shards).out


# --- what is said ---


def test_split_prints_the_path_and_says_what_to_do_next(model: Path) -> None:
    spaced = Path("a model")
    model.rename(spaced)
    Path("my rules.toml").write_text(succeeds("archs", "show", "llama").out)
    result = succeeds("split", spaced, "--tp", 2, "--rules", "my rules.toml", "--no-fsync")
    assert result.out == "a model-tp2\n"
    said, following = result.err.splitlines()
    assert said.startswith("split: ") and "kB in a model-tp2" in said
    assert following == "next: tpshard check 'a model-tp2' --source 'a model' --rules 'my rules.toml'"
    succeeds(*shlex.split(following.removeprefix("next: tpshard ")))


def test_what_to_do_next_works_after_reshard(model: Path) -> None:
    result = succeeds("reshard", split(model, "set"), "--tp", 2, "--no-fsync")
    succeeds(*shlex.split(result.err.splitlines()[-1].removeprefix("next: tpshard ")))


@pytest.mark.parametrize("command", [("merge", "set"), ("reshard", "set", "--tp", 2)], ids=["merge", "reshard"])
def test_a_damaged_set_is_not_passed_on(model: Path, command: tuple[object, ...]) -> None:
    """A flipped bit of a part that one rank alone holds: nothing but its checksum knows."""
    path = split(model, "set") / "rank-00001-of-00004.safetensors"
    data = path.read_bytes()
    [at] = [info.begin for info in read_header(path).tensors if info.name == "model.layers.0.mlp.up_proj.weight"]
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    refused = tpshard(*command, "-o", "out", "--no-fsync", "--json")
    assert refused.code == 3 and not Path("out").exists() and not Path("out.partial").exists()
    assert refused.json["error"]["path"] == str(path) and refused.json["error"]["expected"].startswith("sha256 ")
    path.write_bytes(data)
    succeeds(*command, "-o", "out", "--no-fsync")


def test_merge_says_that_no_checksums_were_recorded(model: Path) -> None:
    split(model, "set", 4, "--checksum", "none")
    assert "written without checksums" in succeeds("merge", "set", "--no-fsync").err.splitlines()[-1]


def test_what_to_do_next_of_some_ranks(model: Path) -> None:
    result = succeeds("split", model, "--tp", 4, "--ranks", "0-1", "--no-fsync")
    assert result.err.splitlines()[-1].startswith("next, when all ranks are there: tpshard check ")


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_quiet(model: Path, flag: str) -> None:
    assert succeeds("split", model, "--tp", 2, flag, "--no-fsync") == Result(0, "model-tp2\n", "")
    assert succeeds("merge", "model-tp2", flag, "--no-fsync").err == ""
    assert tpshard("split", model, "--tp", 2, flag).err.startswith("error: the output exists")


def test_the_text_of_a_plan(model: Path) -> None:
    out = succeeds("plan", model, "--tp", 4).out
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines() if ".weight" in line}
    assert rows["model.layers.{0-1}.mlp.down_proj.weight"] == "F32 [16, 8] row ffn [16, 2]"
    assert rows["lm_head.weight"] == "F32 [10, 16] column vocab [3, 16]"
    assert rows["model.norm.weight"] == "F32 [16] replicate [16]"
    assert len(rows) == 12 and len(succeeds("plan", model, "--tp", 4, "--all").out.splitlines()) > 21
    for line in (
        "ranks 0-3, each: 3.5 kB weights + 262.1 kB KV cache = 265.7 kB",
        "padded: vocab from 10 to 12, with zeros",
        "replicated: 2 kv on 4 ranks, each on 2 ranks in a row",
        "possible tp: 1, 2, 4",
    ):
        assert line in out.splitlines(), out
    assert "not possible: tp 3 (4 heads do not divide)" in out.splitlines()


def test_one_line_says_which_tp_are_not_possible() -> None:
    model = llama(Path("model"), num_attention_heads=16, num_key_value_heads=8, hidden_size=64, intermediate_size=48)
    lines = succeeds("plan", model, "--tp", 2).out.splitlines()
    assert lines[-2:] == [
        "possible tp: 1, 2, 4, 8, 16",
        "not possible: tp 3, 5-7, 9-15 (16 heads do not divide)",
    ]


@pytest.mark.parametrize("stars", ["*" * 5000 + "x?", "*a" * 2500 + "x?"])
def test_a_pattern_of_many_stars_takes_no_time(model: Path, stars: str) -> None:
    text = succeeds("archs", "show", "llama").out
    assert '"model.norm"' in text
    Path("rules.toml").write_text(text.replace('"model.norm"', f'"model.norm", "model.layers.*.{stars}"'))
    plan = succeeds("plan", model, "--tp", 2, "--rules", "rules.toml", "--json").json
    assert plan["tensors"] == succeeds("plan", model, "--tp", 2, "--json").json["tensors"]


def test_the_plan_of_a_tied_model(made: Get) -> None:
    assert "tied: lm_head = model.embed_tokens" in succeeds("plan", made("llama-tied"), "--tp", 2).out


def test_uneven_shares_are_shown_for_each_rank(model: Path) -> None:
    out = succeeds("plan", model, "--tp", 2, "--shares", "3,1").out
    assert "[6, 16] [2, 16]" in out


def test_dry_run_is_the_plan_and_writes_nothing(model: Path) -> None:
    before = tree(Path())
    for options in ([], ["--json"], ["--dtype", "float16"], ["--shares", "0.75,0.25"]):
        assert succeeds("split", model, "--tp", 2, "--dry-run", *options) == succeeds(
            "plan", model, "--tp", 2, *options
        )
    assert tree(Path()) == before


@pytest.mark.parametrize("options", [[], ["--source", "model"]])
def test_check_says_what_it_judged(model: Path, options: list[str]) -> None:
    split(model, "set")
    out = succeeds("check", "set", *options).out
    assert out == f"set: 4 ranks, equal to {'every byte of model' if options else 'its recorded checksums'}\n"


def test_check_says_what_differs(model: Path) -> None:
    """As text on stdout, the first ones; as JSON all of them, and one line on stderr."""
    split(model, "set")
    wrong = llama(Path("wrong"), seed=1)
    for source, against in (([], "its recorded checksums"), (["--source", wrong], "wrong")):
        if not source:
            path = Path("set/rank-00001-of-00004.safetensors")
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        text, found = tpshard("check", "set", *source), tpshard("check", "set", *source, "--json", "-q")
        differences = found.json["differences"]
        lines = [f"{each['file']}: {each['tensor'] or 'content'}: {each['message']}" for each in differences]
        more = len(lines) - DIFFERENCES
        assert (text.code, found.code, text.err) == (1, 1, "") and (more > 0) == bool(source)
        assert text.out.splitlines() == [
            *lines[:DIFFERENCES],
            *([f"and {more} more (--json lists them)"] if source else []),
            f"set: 4 ranks, DIFFERENT from {against}",
        ]
        rest = f", and {len(lines) - 1} more" if source else ""
        assert found.err == f"different: {lines[0]}{rest}\n"


def test_the_source_is_never_modified(model: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in model.iterdir()}
    shards = split(model, "set")
    succeeds("check", shards, "--source", model)
    tpshard("split", model, "--tp", 3)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in model.iterdir()} == before


def test_progress_of_every_command_that_moves_bytes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal: lines that grow towards the total, on stderr, and none when quiet."""
    monkeypatch.setattr(console, "_PLAIN_EVERY", 0.0)
    line = re.compile(r"(\w+): ([\d.]+) (k?B) of ([\d.]+ k?B), [\d.]+ [kMG]?B/s, \d+ s left")
    for arguments in (
        ("split", model, "--tp", 4, "-o", "set", "--no-fsync"),
        ("merge", "set", "--no-fsync"),
        ("reshard", "set", "--tp", 2, "--no-fsync"),
        ("check", "set"),
        ("check", "set", "--source", model),
    ):
        found = [match for text in succeeds(*arguments).err.splitlines() if (match := line.fullmatch(text))]
        assert len(found) >= 4 and {match[1] for match in found} == {arguments[0]}
        done = [float(match[2]) * (1000 if match[3] == "kB" else 1) for match in found]
        assert done == sorted(done) and len({match[4] for match in found}) == 1
        assert not line.search(tpshard(*arguments, "-q", *([] if arguments[0] == "check" else ["-o", "quiet"])).err)
        shutil.rmtree("quiet", ignore_errors=True)


@pytest.mark.parametrize("format", ["native", "vllm", "dcp", "meta"])
def test_progress_ends_at_its_total(model: Path, format: str) -> None:
    """Also where ranks hold the same units, a vocab is padded and tensors are fused."""
    tp = 2 if format in ("meta", "dcp") else 4
    for call in (
        lambda settings: api.split(model, tp, "set", format=format, settings=settings),
        lambda settings: package.check("set", settings=settings),
        lambda settings: package.check("set", model, settings=settings),
        lambda settings: api.reshard("set", 1, "one", format=format, settings=settings),
        lambda settings: api.merge("set", "merged", settings=settings),
    ):
        totals: list[int] = []
        moved: list[int] = []
        call(Settings(start=totals.append, progress=moved.append, fsync=False))
        assert [sum(moved)] == totals and totals[0] > 0


def test_the_documented_exit_codes() -> None:
    """The table of the documentation, the classes of errors.py, and what the tests expect are one."""
    page = DOCS / "reference" / "exit-codes.md"
    documented = {int(code): name for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", page.read_text(), re.M)}
    classes = {kind.exit_code: kind.code for kind in (TpshardError, *TpshardError.__subclasses__())}
    assert classes.items() <= documented.items() and CODES.items() <= documented.items()


# --- names of outputs ---


@pytest.mark.parametrize(
    "given", ["model", "model/", "./model", "../{here}/model/", "{absolute}", "model/model.safetensors"]
)
def test_the_name_of_the_output(model: Path, given: str) -> None:
    text = given.format(here=Path.cwd().name, absolute=model.absolute())
    assert succeeds("split", text, "--tp", 2, "--no-fsync").out == "model-tp2\n"
    assert Path("model-tp2/tpshard.json").exists()
    assert succeeds("reshard", "model-tp2", "--tp", 4, "--no-fsync").out == "model-tp4\n"
    assert succeeds("merge", "model-tp4/", "--no-fsync").out == "model-merged\n"


@pytest.mark.parametrize("given", [".", "./", "../model"])
def test_the_name_of_the_output_from_inside(model: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    assert succeeds("split", given, "--tp", 2, "--no-fsync").out == "model-tp2\n"
    assert Path("model-tp2/tpshard.json").exists()


def test_outputs_do_not_depend_on_where_they_are_made(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split(model, "one")
    Path("elsewhere").mkdir()
    absolute = model.absolute()
    monkeypatch.chdir("elsewhere")
    split(absolute, "two", 4, "--workers", 1)
    assert contents(Path("two")) == contents(Path("../one"))


# --- archs ---


def test_archs() -> None:
    out = succeeds("archs").out
    own = out.partition("\n\n")[0].splitlines()[1:]  # below the columns' names, above what nests them
    names = list(dict.fromkeys(line.split()[0] for line in own))
    assert names == sorted(names) and {"llama", "gpt2", "opt", "falcon"} <= set(names)
    assert succeeds("archs", "list").out == out
    listed = succeeds("archs", "list", "--json").json
    assert [entry["name"] for entry in listed["architectures"]] == names
    assert succeeds("archs", "--json").json == listed
    for name in names:
        assert tomllib.loads(succeeds("archs", "show", name).out)["model_types"]
    assert succeeds("archs", "show", "RefinedWeb").out == succeeds("archs", "show", "falcon").out
    shown = succeeds("archs", "show", "llama", "--json").json
    assert shown["text"] == succeeds("archs", "show", "llama").out and len(shown["sha256"]) == 64
    assert "closest" in fails(4, "archs", "show", "lama")["message"]


def test_rules_of_ones_own(model: Path) -> None:
    text = succeeds("archs", "show", "llama").out
    Path("mine.toml").write_text(text.replace('model_types = ["llama", "llama_bidirec"]', 'model_types = ["mine"]'))
    llama(Path("other"), model_type="mine")
    assert fails(4, "plan", "other", "--tp", 2)
    split(Path("other"), "set", 2, "--rules", "mine.toml")
    assert json.loads(Path("set/tpshard.json").read_text())["architecture"]["rules"] == "mine"
    succeeds("check", "set", "--source", "other", "--rules", "mine.toml")
    succeeds("merge", "set", "--no-fsync")  # neither merge nor reshard needs the rules
    succeeds("reshard", "set", "--tp", 4, "--no-fsync")
    assert fails(2, "plan", model, "--tp", 2, "--rules", "mine.toml")["path"] == "mine.toml"


# --- dtypes ---


@pytest.mark.parametrize("dtype", ["BF16", "BOOL", "C64", "F16", "F32", "F64"])
def test_every_dtype_of_plain_weights_travels_untouched(dtype: str) -> None:
    tensors = llama_tensors(dtype=dtype)
    model = write_checkpoint(Path("model"), LLAMA, tensors)
    for tp in (1, 2):
        split(model, f"set{tp}", tp)
        succeeds("check", f"set{tp}", "--source", model)
        succeeds("merge", f"set{tp}", "-o", f"merged{tp}", "--no-fsync")
        assert read_all(Path(f"merged{tp}")) == tensors
        assert {t.dtype for t in read_rank(Path(f"set{tp}"), 0, tp).values()} == {dtype}


@pytest.mark.parametrize("target", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("key", ["torch_dtype", "dtype", None])
def test_dtype_casts_floats_and_nothing_else(target: str, key: str | None) -> None:
    """Weights in float; a buffer, an integer and an FP8 tensor stay as they are; config.json follows."""
    import torch
    from safetensors.torch import load_file

    rng = np.random.default_rng(0)
    stay = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": random_tensor(rng, "F32", (2,)),
        "model.layers.0.input_layernorm.weight": random_tensor(rng, "I32", (16,)),
        "model.layers.1.input_layernorm.weight": random_tensor(rng, "F8_E4M3", (16,)),
    }
    floats = {
        name: Tensor("F32", t.shape, rng.standard_normal(t.shape, np.float32).tobytes())
        for name, t in llama_tensors().items()
        if name not in stay
    }
    config = {name: value for name, value in LLAMA.items() if name != "torch_dtype"} | ({key: "float32"} if key else {})
    tensors = dict(sorted((floats | stay).items()))
    model = write_checkpoint(Path("model"), config, tensors)
    result = succeeds("split", model, "--tp", 2, "--dtype", target, "-o", "set", "--no-fsync")
    succeeds("check", "set", "--source", model)
    succeeds(*shlex.split(result.err.splitlines()[-1].removeprefix("next: tpshard ")))
    succeeds("merge", "set", "-o", "merged", "--no-fsync")
    for directory in ("set", "merged"):
        written = json.loads(Path(directory, "config.json").read_text())
        assert written == config | {key or "dtype": target}
    given, found = load_file("model/model.safetensors"), load_file("merged/model.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in found.items():
        wanted = given[name] if name in stay else given[name].to(getattr(torch, target))
        assert tensor.dtype == wanted.dtype and torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8)), name


def test_no_cast_leaves_the_config_alone(model: Path) -> None:
    split(model, "set", 2)
    assert Path("set/config.json").read_bytes() == (model / "config.json").read_bytes()


# --- the real command ---


def test_the_installed_command(model: Path) -> None:
    result = run("split", model, "--tp", 2, "--no-fsync", "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["output"] == "model-tp2"
    result = run("split", model, "--tp", 2, "--json")
    assert result.returncode == 9 and json.loads(result.stdout)["error"]["code"] == "target"
    assert len(result.stderr.splitlines()) == 2 and "\x1b" not in result.stderr


def test_names_that_are_not_text() -> None:
    name = os.fsdecode(b"mod\xffel")
    llama(Path(name))
    result = run("split", name, "--tp", 2, "--no-fsync")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    succeeds("check", f"{name}-tp2", "--source", name)


@pytest.mark.parametrize("close", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_are_closed(model: Path, close: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m tpshard split model --tp 2 --no-fsync {close}"
    assert subprocess.run(["bash", "-c", command], capture_output=True).returncode == 0
    succeeds("check", "model-tp2", "--source", model)


def test_main_takes_arguments_and_exits(model: Path) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", str(model), "--tp", "2", "--json", "-q"])
    assert end.value.code == 0


def test_what_a_user_types_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """-h, short names of dtypes, a memory with its unit; outputs of two formats do not want one name."""
    monkeypatch.chdir(tmp_path)
    llama(Path("model"), vocab_size=12)
    assert succeeds("-h").out == succeeds("--help").out and "--tp" in succeeds("split", "-h").out
    for short, name in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")):
        plans = [succeeds("plan", "model", "--tp", 2, "--dtype", each, "--json").json for each in (short, name)]
        assert plans[0] == plans[1]
    for memory in ("80", "80GB", "80 gb", "80G"):
        plan = succeeds("plan", "model", "--tp", 2, "--gpu-memory", memory, "--json").json
        assert plan["numbers"]["gpu_memory"] == 80 * 10**9
    assert fails(2, "plan", "model", "--tp", 2, "--gpu-memory", "80TB")["expected"] == "gigabytes, as in 80 or 80GB"
    outputs = [succeeds("split", "model", "--tp", 2, *form, "-q").out.strip() for form in ((), ("--format", "vllm"))]
    assert outputs == ["model-tp2", "model-tp2-vllm"]


def test_the_list_says_what_is_done_for_each_model_type() -> None:
    own, _, nesting = succeeds("archs", "list").out.partition("\n\n")
    lines = [line.split() for line in own.splitlines()]
    assert lines[0] == ["architecture", "verify", "engines", "versions", "quantised", "model_types"]
    rows = {(line[0], line[-1]): line[1:-1] for line in lines[1:]}
    assert rows["qwen3", "qwen3"] == [
        *("tpshard", "vllm", "sglang", "megatron", "0.32", "0.33,", "sglang", "0.5", "read", "vllm")
    ]
    assert rows["bloom", "bloom"] == ["tpshard", "vllm", "0.32", "0.33", "vllm"]
    assert rows["baichuan", "baichuan"] == ["transformers", "-", "-", "-"]
    assert ["kimi_k25", "vllm", "0.32", "0.33", "fp8", "compressed-tensors", "deepseek_v3,", "kimi_k2"] in map(
        str.split, nesting.splitlines()
    )
    listed = {entry["name"]: entry["supported"] for entry in succeeds("archs", "--json").json["architectures"]}
    kimi = {"model_type": "kimi_k2", "verify": "transformers", "engines": ["vllm", "vllm-speculator"]}
    versions = [(engine, version) for engine in ("vllm", "vllm-speculator") for version in ("0.32", "0.33")]
    compared = [{"engine": engine, "version": version, "compared": "run"} for engine, version in versions]
    assert {**kimi, "quantised": ["vllm-speculator"], "versions": compared} in listed["deepseek_v3"]
