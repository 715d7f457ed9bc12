"""`progress=True`: one bar of bytes on stderr, and no bar where none is asked for."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tpshard
from tests.helpers import checkpoints
from tpshard import Settings
from tpshard.errors import TargetError

QUICK = Settings(fsync=False, workers=2)


def bars(text: str) -> list[str]:
    """What a terminal would show: the last state of each bar."""
    return [line.rpartition("\r")[2] for line in text.split("\n") if line.strip()]


@pytest.mark.parametrize("format", ["native", "vllm"])
def test_a_bar_that_ends_at_its_total(format: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = checkpoints.make("llama", tmp_path / "model")
    shards = tmp_path / "set"
    verbs: dict[str, Callable[[bool], object]] = {
        "split": lambda progress: tpshard.split(model, 2, shards, format=format, settings=QUICK, progress=progress),
        "check": lambda progress: tpshard.check(shards, model, settings=QUICK, progress=progress),
        "reshard": lambda progress: tpshard.reshard(
            shards, 1, tmp_path / f"one-{progress}", settings=QUICK, progress=progress
        ),
        "merge": lambda progress: tpshard.merge(shards, tmp_path / f"m-{progress}", settings=QUICK, progress=progress),
    }
    for verb, call in verbs.items():
        call(True)
        out, err = capfd.readouterr()
        (bar,) = bars(err)
        found = re.match(rf"{verb}: 100%\|.*\| ([\d.]+k?)/([\d.]+k?) \[", bar)
        assert out == "" and found and found[1] == found[2], bar
    tpshard.check(shards, progress=True)
    assert "check: 100%" in capfd.readouterr().err
    for verb in ("check", "reshard", "merge"):
        verbs[verb](False)
    assert capfd.readouterr() == ("", "")


def test_the_bar_is_closed_after_an_error_and_settings_are_still_called(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = checkpoints.make("llama", tmp_path / "model")
    totals: list[int] = []

    def broken(count: int) -> None:
        raise KeyboardInterrupt

    settings = Settings(fsync=False, workers=1, start=totals.append, progress=broken)
    with pytest.raises(KeyboardInterrupt):
        tpshard.split(model, 2, tmp_path / "set", settings=settings, progress=True)
    err = capfd.readouterr().err
    assert len(totals) == 1 and len(bars(err)) == 1 and err.endswith("\n") and "split:   0%" in err


def test_no_bar_of_what_is_refused_before_it_begins(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = checkpoints.make("llama", tmp_path / "model")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").write_text("")
    with pytest.raises(TargetError):
        tpshard.split(model, 2, tmp_path / "set", progress=True)
    assert capfd.readouterr() == ("", "")


def test_tqdm_is_imported_where_a_bar_is_asked_for(tmp_path: Path) -> None:
    model = checkpoints.make("llama", tmp_path / "model")
    code = "import sys, tpshard\ntpshard.split(sys.argv[1], 2, sys.argv[2], progress=sys.argv[3] == '1')\n"
    code += "print('tqdm' in sys.modules, 'torch' in sys.modules)"
    for asked in (0, 1):
        command = [sys.executable, "-c", code, str(model), str(tmp_path / f"set-{asked}"), str(asked)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(bool(asked)), "False"] and bool(done.stderr) is bool(asked)
