"""For `make test-action`: the workflow of docs/how-to/ci.md on a runner, nektos/act, on this machine.

The two steps that talk to the Hub are replaced: a small model is copied, and what would be published is marked by a
file. ACT_ARGS: more arguments for act. ACTION_INPUTS: more inputs for the action, as JSON, such as a `torch-index`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SHARD = "rank-00001-of-00004.safetensors"
SPOIL = f"p = 'shards/{SHARD}'; d = bytearray(open(p, 'rb').read()); d[-1] ^= 1; open(p, 'wb').write(d)"


@dataclass(frozen=True)
class Ran:
    """How a job ended, what the runner said, whether something was published."""

    code: int
    log: str
    published: bool


@pytest.fixture
def job(made: Callable[..., Path], tmp_path: Path) -> Callable[[bool], Ran]:
    """Run the documented workflow; spoiled: with a step of the action more, which changes a byte after the split."""

    def run(spoiled: bool) -> Ran:
        action = tmp_path / "action"
        action.mkdir()
        for name in ("action", "tpshard"):
            shutil.copytree(ROOT / name, action / name)
        for name in ("action.yml", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, action)
        if spoiled:
            steps: dict[str, Any] = yaml.safe_load((action / "action.yml").read_text())
            after = [step.get("id") for step in steps["runs"]["steps"]].index("split") + 1
            steps["runs"]["steps"].insert(after, {"shell": "bash", "run": f'python -c "{SPOIL}"'})
            (action / "action.yml").write_text(yaml.safe_dump(steps, sort_keys=False))
        place = tmp_path / "work"
        (place / ".github/workflows").mkdir(parents=True)
        mark = tmp_path / "published"
        (place / ".github/workflows/release.yml").write_text(workflow(made("llama-bf16"), mark))
        subprocess.run(["git", "init", "--quiet"], cwd=place, check=True)
        command = ["act", "workflow_dispatch", "--platform", "ubuntu-latest=-self-hosted", "--secret", "HF_TOKEN=none"]
        command += ["--local-repository", f"OWNER/tpshard@COMMIT={action}"]
        command += ["--artifact-server-path", str(tmp_path / "artifacts"), "--artifact-server-addr", "127.0.0.1"]
        command += shlex.split(os.environ.get("ACT_ARGS", ""))
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""}
        done = subprocess.run(command, cwd=place, env=environment, text=True, capture_output=True)
        return Ran(done.returncode, done.stdout + done.stderr, mark.exists())

    return run


def workflow(model: Path, mark: Path) -> str:
    """The documented workflow, without the Hub."""
    page = (ROOT / "docs/how-to/ci.md").read_text()
    found = re.search(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    assert found is not None
    steps: dict[Any, Any] = yaml.safe_load(found[1])
    download, action, _, publish = steps["jobs"]["release"]["steps"]
    assert "hf download" in download["run"] and "hf upload" in publish["run"]
    download["run"] = f"cp -r {shlex.quote(str(model))} model"
    publish["run"] = f"touch {shlex.quote(str(mark))}"
    action["with"] |= json.loads(os.environ.get("ACTION_INPUTS", "{}"))
    steps["on"] = steps.pop(True)  # YAML 1.1 reads `on` as a truth
    return yaml.safe_dump(steps, sort_keys=False)


def test_a_good_release_is_published(job: Callable[[bool], Ran]) -> None:
    ran = job(False)
    assert ran.code == 0 and ran.published, ran.log
    assert "Summary - ## tpshard check: pass" in ran.log and "Summary - ## tpshard verify: pass" in ran.log
    assert "::set-output:: verdict=pass" in ran.log and "Success - Main Keep the reports" in ran.log


def test_one_changed_byte_stops_the_release_and_the_summary_says_where(job: Callable[[bool], Ran]) -> None:
    ran = job(True)
    assert ran.code != 0 and not ran.published, ran.log
    assert "Summary - ## tpshard check: fail" in ran.log and f"| `{SHARD}` | `" in ran.log
    assert "Failure - Main Check every byte" in ran.log and "Main Verify the function" not in ran.log
    assert "::set-output:: verdict=fail" in ran.log and "Success - Main Keep the reports" in ran.log
