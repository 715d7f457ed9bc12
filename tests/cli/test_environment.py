"""`tpshard env`: what it says is so, and a machine without devices or torch has an answer too."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command import succeeds
from tpshard import __version__
from tpshard.cli import environment


def test_env_says_what_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    found = succeeds("env", "--json").json
    assert (found["tpshard"], found["python"]) == (__version__, platform.python_version())
    assert found["cores"] == len(os.sched_getaffinity(0))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found["memory"]["total"] == pages and 0 < found["memory"]["available"] < pages
    assert found["disk"]["path"] == str(tmp_path)
    assert abs(found["disk"]["free"] - shutil.disk_usage(tmp_path).free) < 10**9
    assert found["torch"]["version"] == torch.__version__ and found["torch"]["devices"] == torch.cuda.device_count()
    assert found["packages"]["rich"] and all(extra["installed"] for extra in found["extras"])
    text = succeeds("env").out
    assert f"tpshard {__version__}" in text and f"torch {torch.__version__}" in text and "cores: " in text


def test_env_needs_no_torch(tmp_path: Path) -> None:
    """With no package but ours: torch and the rest cannot be found."""
    script = (
        "import importlib.util as u, sys, json\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name in ('torch', 'transformers') else find(name, *rest)\n"
        "from pathlib import Path\nfrom tpshard.cli.environment import environment, lines\n"
        "found = environment(Path())\nassert 'torch' not in sys.modules\n"
        "print(json.dumps([found['torch'], [e['installed'] for e in found['extras']], lines(found)]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    torch, installed, lines = json.loads(done.stdout)
    assert torch is None and installed == [False, False]
    assert "torch: not installed" in lines and any(line.startswith("transformers: missing") for line in lines)


def test_a_broken_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(environment, "_torch_facts", broken)
    found = environment.environment(Path())
    assert found["torch"]["error"].startswith("ImportError: libcudart")
    assert any("does not load" in line for line in environment.lines(found))


def test_devices_are_read_without_torch() -> None:
    text = "NVIDIA H200, 143771, 570.86.15\nNVIDIA GB10, [N/A], 580.95\n"
    first, second = environment.parse_gpus(text)
    assert first == {"name": "NVIDIA H200", "memory": 143771 * 2**20, "driver": "570.86.15"}
    assert second["memory"] is None
    found: dict[str, Any] = environment.environment(Path()) | {"gpus": [first, second], "torch": None}
    lines = environment.lines(found)
    assert "GPU 0: NVIDIA H200, 150.8 GB, driver 570.86.15" in lines and any("memory unknown" in x for x in lines)
