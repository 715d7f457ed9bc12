"""`make gpu-check` itself, on a CPU: it needs nothing but torch and transformers, and claims nothing of a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from tests.gpu.check import SMALL_MODELS, Check
from tests.gpu.figures import environment
from tests.helpers.grids import some

CPU = torch.device("cpu")
CHECK = Path(__file__).with_name("check.py")
# As on a bare machine: what the command line and the Hub need is not there.
BARE = """
import runpy, sys
for name in ("typer", "rich", "click"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_script_on_a_cpu(tmp_path: Path) -> None:
    models = some(SMALL_MODELS, ("llama",))
    where = ["--device", "cpu", "--output", str(tmp_path / "out")]
    command = [sys.executable, "-c", BARE, str(CHECK), "--small", *where, "--models", *models]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    rows = {row["step"]: row for row in result["rows"]}
    for model in models:
        row = rows[f"{model}: the CPU, tp 4 in threads"]
        assert row["status"] == "pass" and row["exact"] <= 1e-12 and row["native"]["differences"] == 0
        assert 0 < row["native"]["sharded_error"] < 0.1
        assert rows[f"{model}: made, split, bytes tier"]["status"] == "pass"
        assert rows[f"{model}: transformers, plain forward"]["status"] == "pass"
        reason = "the files of ranks 0 and 1 are exchanged"
        assert rows[f"{model}: control, two rank files exchanged"]["reason"] == reason
    assert rows["llama: the CPU, 2 gloo processes"]["verdicts"] == ["pass", "pass"]
    assert rows["llama: loaders"]["status"] == "not run" and result["environment"]["gpu"] is None
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "nothing here is a figure of one" in text and "GB/s" not in text and "NCCL was not run" in text


def test_no_figures_without_a_gpu(tmp_path: Path, warm: Path) -> None:
    command = [str(warm / "python"), str(CHECK), "--device", "cpu", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "models of real size need a GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_step_that_does_not_fit_or_fails_is_a_row(tmp_path: Path) -> None:
    check = Check(tmp_path, tmp_path / "out", torch.device("cpu"), True, 10, {"environment": environment(CPU)})
    check.result |= {"rows": [], "notes": [], "small": True}
    check.step("long", 11, lambda: {"status": "pass"})
    check.step("broken", 1, lambda: {"status": "pass", "never": 1 / 0})
    check.step("fine", 1, lambda: {"status": "pass"})
    rows = json.loads((tmp_path / "out" / "gpu.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["not run", "error", "pass"]
    assert "ZeroDivisionError" in (tmp_path / "out" / "gpu.md").read_text()
