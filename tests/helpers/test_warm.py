"""Processes that a warm server forks are like others: arguments, directory, environment, files, exit code, death."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import tpshard


def run(command: list[object], place: Path, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=place, capture_output=True, text=True, **how)  # type: ignore[call-overload,no-any-return]


def test_what_a_process_is_given_arrives(warm: Path, tmp_path: Path) -> None:
    text = "import os, sys; print(sys.argv, os.getcwd(), os.environ['GIVEN'], sys.stdin.read(), file=sys.stderr)"
    done = run(
        [warm / "python", "-c", text, "a", "b c"], tmp_path, input="in", env=os.environ | {"GIVEN": "x" * 100_000}
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"['-c', 'a', 'b c'] {tmp_path} {'x' * 100_000} in\n"


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("print('out')", 0, ""),
    ],
)
def test_it_ends_as_the_process_ends(warm: Path, tmp_path: Path, text: str, code: int, said: str) -> None:
    (tmp_path / "file.py").write_text(text)
    for done in (
        run([warm / "python", "-c", text], tmp_path),
        run([warm / "python"], tmp_path, input=text),
        run([warm / "python", "file.py"], tmp_path),
        run([warm / "python", "-m", "file"], tmp_path),
    ):
        assert (done.returncode, done.stderr) == (code, said)
        assert done.stdout == ("out\n" if "out" in text else "")


def test_an_uncaught_error_is_told(warm: Path, tmp_path: Path) -> None:
    done = run([warm / "python", "-c", "1 / 0"], tmp_path)
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_the_command(warm: Path, tmp_path: Path) -> None:
    assert run([warm / "tpshard", "--version"], tmp_path).stdout == f"tpshard {tpshard.__version__}\n"
    done = run([warm / "tpshard", "plan", "no/such/place", "--tp", "2"], tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ")


def test_nothing_runs_on_when_the_one_who_asked_is_killed(warm: Path, tmp_path: Path) -> None:
    text = "import os; print(os.getpid(), flush=True); import time; time.sleep(600)"
    with subprocess.Popen([warm / "python", "-c", text], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        process.kill()
        assert process.stdout.read() == ""  # the forked process held the other end of the pipe, and is gone
    assert number != process.pid
