"""`tpshard verify` as a user meets it: output, reports, exit codes, and under torchrun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import tpshard as package
from tests.helpers.checkpoints import make
from tests.helpers.command import Result, tpshard
from tpshard.api import convert as api
from tpshard.execute.publish import Settings

CPU = ("--device", "cpu", "--tokens", "2")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small LLaMA and its split for two ranks, beside each other."""
    folder = tmp_path_factory.mktemp("pair")
    model = make("llama-bf16", folder / "model")
    api.split(model, 2, folder / "model-tp2", settings=Settings(fsync=False, workers=1))
    return model, folder / "model-tp2"


def exchanged(shards: Path, to: Path) -> Path:
    copy = Path(shutil.copytree(shards, to))
    one, two = (copy / f"rank-{rank:05}-of-00002.safetensors" for rank in (0, 1))
    one.rename(copy / "x")
    two.rename(one)
    (copy / "x").rename(two)
    return copy


def refused(code: int, *arguments: object) -> dict[str, Any]:
    """A command that must fail before it computes, as text and as JSON; the error object."""
    text = tpshard("verify", *arguments)
    assert (text.code, text.out) == (code, "")
    lines = text.err.splitlines()
    assert lines[-2].startswith("error: ") and lines[-1].startswith("hint: "), text.err
    found = tpshard("verify", *arguments, "--json").json
    assert (found["verdict"], found["command"]) == ("error", "verify")
    error: dict[str, Any] = found["error"]
    assert error["message"] in lines[-2]
    return error


def test_a_model_type_of_its_own_is_computed_as_rules_say(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """By the name of a built-in architecture; without it nothing is guessed, and nothing is proved."""
    model = Path(shutil.copytree(pair[0], tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "aquila", "architectures": ["AquilaForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    assert tpshard("split", model, "--tp", 2, "-o", tmp_path / "out", "--rules", "llama").code == 0
    found = tpshard("verify", tmp_path / "out", *CPU, "--rules", "llama", "--json")
    assert found.code == 0 and found.json["verdict"] == "pass"
    assert {tier["name"]: tier["status"] for tier in found.json["tiers"]} == dict.fromkeys(
        ("bytes", "weights", "exact", "native"), "pass"
    )
    assert found.json["warnings"] == ["a model_type 'aquila' is computed as llama, because --rules says so"]
    broken = exchanged(tmp_path / "out", tmp_path / "exchanged")
    assert tpshard("verify", broken, *CPU, "--rules", "llama", "--tier", "exact").code == 1
    unknown = tpshard("verify", tmp_path / "out", *CPU, "--tier", "bytes,exact", "--json")
    assert unknown.code != 0 and "aquila" in unknown.out
    assert tpshard("verify", pair[1], *CPU, "--rules", "mistral", "--json").json["model_type"] == "llama"


def test_a_pass_on_a_terminal(pair: tuple[Path, Path]) -> None:
    result = tpshard("verify", pair[1], *CPU)
    assert result.code == 0, result.err
    first, head, *rows = result.out.splitlines()
    assert first == "PASS: model-tp2 (tp 2) against model"
    assert head.split() == ["tier", "status", "figures", "worst"]
    tiers = ("bytes", "weights", "exact", "native")
    assert [row.split()[:2] for row in rows[:4]] == [[name, "pass"] for name in tiers]
    assert "model." in rows[2] and "rank " in rows[2]
    assert rows[4].endswith("faults injected on purpose were noticed")
    assert "GB of memory" in result.err and "estimate" in result.err
    assert tpshard("verify", pair[1], *CPU, "--tier", "exact", "-q").err == ""


def test_a_failure_names_the_ranks_first_and_the_next_command_last(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shards = exchanged(pair[1], tmp_path / "shards")
    result = tpshard("verify", shards, "--source", pair[0], *CPU, "--tier", "bytes,weights,exact")
    assert result.code == 1
    assert result.out.splitlines()[0] == ("FAIL: shards (tp 2) against model: the files of ranks 0 and 1 are exchanged")
    # What the verdict's first line left out.
    assert [line.split(":")[0] for line in result.out.splitlines()[-2:]] == ["bytes", "exact"]
    assert result.err.splitlines()[-1] == f"next: tpshard check {shards} --source {pair[0]}"


def test_json_is_sorted_and_says_the_same_twice(pair: tuple[Path, Path]) -> None:
    found = [tpshard("verify", pair[1], *CPU, "--json").json for _ in range(2)]
    assert list(found[0]) == sorted(found[0]) and found[0]["verdict"] == "pass"
    assert [tier["name"] for tier in found[0]["tiers"]] == ["bytes", "weights", "exact", "native"]
    assert found[0].pop("volatile") and found[1].pop("volatile") and found[0] == found[1]


def test_reports_of_every_kind(pair: tuple[Path, Path], tmp_path: Path) -> None:
    paths = [tmp_path / f"report{ending}" for ending in (".json", ".xml", ".md", ".html")]
    options = [part for path in paths for part in ("--report", path)]
    assert tpshard("verify", pair[1], *CPU, "--tier", "bytes,exact", *options).code == 0
    assert json.loads(paths[0].read_text())["verdict"] == "pass"
    assert ElementTree.parse(paths[1]).getroot().get("failures") == "0"
    assert "verify: pass" in paths[2].read_text() and "<h1>tpshard verify" in paths[3].read_text()


def test_reports_of_an_error(pair: tuple[Path, Path], tmp_path: Path) -> None:
    paths = [tmp_path / f"report{ending}" for ending in (".json", ".xml", ".md", ".html")]
    options = [part for path in paths for part in ("--report", path)]
    shards = Path(shutil.copytree(pair[1], tmp_path / "shards"))
    (shards / "rank-00001-of-00002.safetensors").unlink()
    found = tpshard("verify", shards, "--source", pair[0], *CPU, *options, "--json")
    assert found.code == 3 and found.json["verdict"] == "error"
    assert json.loads(paths[0].read_text()) == found.json
    suites = ElementTree.parse(paths[1]).getroot()
    assert suites.get("errors") == "1" and "all but 1" in (suites.findtext(".//error") or "")
    assert paths[2].read_text().startswith("## tpshard verify: error\n\nshards: ranks are missing")
    assert "hint: " in paths[2].read_text() and "all but 1" in paths[3].read_text()
    kept = tmp_path / "kept.json"
    assert tpshard("verify", pair[1], "--report", kept, "--report", tmp_path / "no" / "a.md").code == 2
    assert "no such directory" in json.loads(kept.read_text())["error"]["message"]


def test_what_is_refused_before_anything_is_run(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, shards = pair
    assert "unknown kind of report" in refused(2, shards, "--report", tmp_path / "a.pdf")["message"]
    assert "no such directory for a report" in refused(2, shards, "--report", tmp_path / "no" / "a.md")["message"]
    assert not list(tmp_path.iterdir())
    assert "unknown tier" in refused(2, shards, "--tier", "exact,bits")["message"]
    assert "--layers" in refused(2, shards, "--layers", "first")["message"]
    assert "no layer 7" in refused(2, shards, "--layers", "7", "--device", "cpu")["message"]
    assert "no such directory" in refused(2, tmp_path / "no")["message"]
    assert "no such file" in refused(2, shards, "--source", tmp_path / "no")["message"]
    assert refused(2, shards, "--nproc-per-node", "3")["found"] == "3"
    for option in ("--tokens", "--seed", "--nproc-per-node"):
        assert tpshard("verify", shards, option, "-1").code == 2
    import torch

    if not torch.cuda.is_available():
        assert "no GPU" in refused(2, shards, "--device", "cuda")["message"]


def test_another_model_and_a_missing_rank(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = make("gpt2", tmp_path / "other")
    assert "another model" in refused(2, pair[1], "--source", other, "--device", "cpu")["message"]
    shards = Path(shutil.copytree(pair[1], tmp_path / "shards"))
    (shards / "rank-00001-of-00002.safetensors").unlink()
    assert refused(3, shards, "--source", pair[0], "--device", "cpu")["found"] == "all but 1"


@pytest.mark.parametrize(
    "options", [["--stream"], ["--float32", "--sequence-parallel"], ["--layers", "0,-1", "--seed", "3", "--no-stream"]]
)
def test_options_reach_the_tiers(pair: tuple[Path, Path], options: list[str]) -> None:
    found = tpshard("verify", pair[1], *CPU, "--tier", "exact", *options, "--json").json
    settings = found["settings"]
    assert found["verdict"] == "pass" and settings["streamed"] == ("--stream" in options)
    assert settings["sequence_parallel"] == settings["float32"] == ("--float32" in options)
    assert (settings["layers"], settings["seed"]) == (([0, 2], 3) if "--layers" in options else (None, 0))
    assert found["tiers"][0]["thresholds"]["relative_error"] == (1e-5 if "--float32" in options else 1e-12)


def test_a_reference_that_was_asked_for_and_cannot_judge_is_inconclusive(pair: tuple[Path, Path]) -> None:
    options = ["--tier", "exact", "--reference", "transformers"]
    assert tpshard("verify", pair[1], *CPU, *options).code == 0
    result = tpshard("verify", pair[1], *CPU, *options, "--layers", "0")
    assert result.code == 8 and result.out.startswith("INCONCLUSIVE: ")


def torchrun(*arguments: object, script: Path | None = None) -> Result:
    """`torchrun --nproc-per-node 2 -m tpshard verify`, or a script's; the output of both processes together."""
    root = Path(package.__file__).parent.parent
    what = ["-m", "tpshard", "verify"] if script is None else [str(script), "verify"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *what]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment)
    return Result(done.returncode, done.stdout, done.stderr)


SLOW = """
import os, sys, time
from tpshard.cli import verify
from tpshard.cli.main import main

if os.environ["RANK"] == "0":
    for name in ("_print", "_say_error"):
        def late(*given, speak=getattr(verify, name)):
            time.sleep(3)
            speak(*given)
        setattr(verify, name, late)
main()
"""
"""Rank 0 takes its time before it says what came of it."""

ALONE = """
import os, sys, time
from datetime import timedelta
from tpshard.errors import LocalIOError
from tpshard.verifier import launch
from tpshard.api import verify as judging

launch.LAST_WORD = timedelta(seconds=2)
verify = judging.judge
def judge(*given, **more):
    if os.environ["RANK"] == "1":
        raise LocalIOError("rank 1 has no memory left")
    if "busy" in sys.argv[0]:
        time.sleep(60)
    return verify(*given, **more)
judging.judge = judge
from tpshard.cli.main import main
main()
"""
"""Rank 1 fails by itself; rank 0 waits for it, or computes for long."""


def test_torchruns_processes_take_a_rank_each_and_one_of_them_speaks(
    pair: tuple[Path, Path], tmp_path: Path, warm_processes: None
) -> None:
    good = torchrun(pair[1], *CPU, "--json")
    assert good.code == 0, good.err
    assert good.json["verdict"] == "pass" and good.json["settings"]["processes"] == 2
    assert good.err.count("exact tier\n") == 1
    shards = exchanged(pair[1], tmp_path / "shards")
    # torchrun stops rank 0 as soon as another ends with an error, so that one waits for rank 0's word.
    (tmp_path / "slow.py").write_text(SLOW)
    slow = {"script": tmp_path / "slow.py"}
    bad = torchrun(shards, "--source", pair[0], *CPU, "--tier", "weights,exact", "--json", **slow)
    assert bad.code != 0 and bad.json["reason"] == "the files of ranks 0 and 1 are exchanged"
    (shards / "config.json").write_text("{")
    worse = torchrun(shards, "--source", pair[0], *CPU, "--json", **slow)
    assert worse.code != 0 and worse.json["error"]["code"] == "corrupt"
    assert worse.err.count("error: ") == 1


def test_what_fails_in_another_rank_alone_is_said(
    pair: tuple[Path, Path], tmp_path: Path, warm_processes: None
) -> None:
    for name in ("alone.py", "busy.py"):
        (tmp_path / name).write_text(ALONE)
    result = torchrun(pair[1], *CPU, "--json", script=tmp_path / "alone.py")
    assert result.code != 0 and result.json["error"]["code"] == "io", result.err
    assert result.json["error"]["message"] == "another process failed, rank 1: rank 1 has no memory left"
    result = torchrun(pair[1], *CPU, "--json", script=tmp_path / "busy.py")
    assert result.code != 0 and "error: rank 1 has no memory left\n" in result.err and not result.out


def test_slurms_tasks_find_each_other(pair: tuple[Path, Path], warm_processes: None) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(package.__file__).parent.parent
    tasks = []
    for rank in range(2):
        slurm = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2"}
        slurm |= {"SLURM_TASKS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "tpshard", "verify", str(pair[1]), *CPU, "--tier", "exact", "--json"]
        environment = os.environ | slurm | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        tasks.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    said = [task.communicate() for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert json.loads(said[0][0])["settings"]["processes"] == 2
    assert said[1][0] == ""
