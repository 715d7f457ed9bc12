"""action.yml, its steps run as a runner runs them: a good release passes, one changed byte stops it and is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).parent.parent
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS: dict[str, dict[str, Any]] = {step["id"]: step for step in ACTION["runs"]["steps"] if "run" in step}
EXPRESSION = re.compile(r"\$\{\{ *(.*?) *\}\}")


@dataclass
class Job:
    """What a job of a workflow has: a workspace, the action's inputs, and what its steps have said so far."""

    place: Path
    commands: Path
    inputs: dict[str, str]
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    log: str = ""

    @property
    def summary(self) -> str:
        return (self.place / "summary.md").read_text()

    def value(self, expression: str) -> str:
        """`github.action_path`, an input, or the first output of several that is not empty."""
        for term in expression.split("||"):
            kind, *names = term.strip().split(".")
            if kind == "inputs":
                found = self.inputs[names[0]]
            elif kind == "steps":
                step, of, name = names
                assert of == "outputs" and step in STEPS
                found = self.outputs.get(step, {}).get(name, "")
            else:
                assert term == "github.action_path"
                found = str(ROOT)
            if found:
                return found
        return ""

    def fill(self, text: str) -> str:
        return EXPRESSION.sub(lambda match: self.value(match[1]), text)

    def step(self, name: str) -> int:
        """Run a step; its exit code."""
        step = STEPS[name]
        script, said = self.place / f"{name}.sh", self.place / f"{name}.output"
        script.write_text(self.fill(step["run"]))
        said.touch()
        environment = {
            **os.environ,
            **{key: self.fill(text) for key, text in step["env"].items()},
            "PATH": os.pathsep.join(map(str, [self.commands, Path(sys.executable).parent, os.environ["PATH"]])),
            "PYTHONPATH": str(ROOT),
            "GITHUB_OUTPUT": str(said),
            "GITHUB_STEP_SUMMARY": str(self.place / "summary.md"),
        }
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
        done = subprocess.run(command, cwd=self.place, env=environment, text=True, capture_output=True)
        self.log += done.stdout + done.stderr
        self.outputs[name] = dict(line.split("=", 1) for line in said.read_text().splitlines())
        return done.returncode

    def run(self, *names: str) -> dict[str, int]:
        """Run steps up to the first that fails; their exit codes."""
        codes = {}
        for name in names:
            codes[name] = self.step(name)
            if codes[name]:
                break
        return codes

    def output(self, name: str) -> str:
        """An output of the action."""
        return self.fill(ACTION["outputs"][name]["value"])


@pytest.fixture
def job(tmp_path: Path, made: Callable[..., Path], warm: Path) -> Callable[..., Job]:
    """A job on a small LLaMA, in bf16 with 2 KV heads, for 2 ranks."""

    def start(**inputs: str) -> Job:
        defaults = {name: entry.get("default", "") for name, entry in ACTION["inputs"].items()}
        required = {name for name, entry in ACTION["inputs"].items() if entry.get("required")}
        given = {"model": str(made("llama-bf16")), "tp": "2", "tiers": "bytes,exact", **inputs}
        assert required <= set(given) <= set(defaults)
        return Job(tmp_path, warm, {**defaults, **given})

    return start


def test_every_action_is_pinned_to_a_commit_and_no_input_is_put_into_a_script() -> None:
    uses = [step["uses"] for step in ACTION["runs"]["steps"] if "uses" in step]
    uses += re.findall(r"uses: (\S+@\S+)", (ROOT / "docs/how-to/ci.md").read_text())
    others = [name for name in uses if not name.startswith("OWNER/")]
    assert len(others) >= 2 and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", name) for name in others), others
    for step in STEPS.values():
        assert step["shell"] == "bash" and "${{" not in step["run"]
    assert [name for name in STEPS] == ["install", "plan", "split", "check", "verify"]


def test_a_good_release_passes_and_leaves_its_reports(job: Callable[..., Job]) -> None:
    release = job()
    assert release.run("plan", "split", "check", "verify") == dict.fromkeys(["plan", "split", "check", "verify"], 0)
    assert release.output("verdict") == "pass"
    assert (release.place / release.output("shards") / "tpshard.json").is_file()
    assert json.loads((release.place / release.output("plan")).read_text())["mesh"]["tp"] == 2
    assert json.loads((release.place / release.output("json")).read_text())["verdict"] == "pass"
    suites = ElementTree.parse(release.place / release.output("junit")).getroot()
    assert suites.get("failures") == "0" and int(suites.get("tests", "0")) > 2
    assert (release.place / release.output("markdown")).read_text() in release.summary
    assert release.summary.startswith("## tpshard check: pass") and "## tpshard verify: pass" in release.summary
    assert "::error" not in release.log


def test_one_changed_byte_of_a_shard_stops_the_release_and_the_summary_says_where(job: Callable[..., Job]) -> None:
    release = job()
    assert release.run("plan", "split") == {"plan": 0, "split": 0}
    shard = release.place / "shards" / "rank-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    tensor = list(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))[-1]
    assert release.run("check", "verify") == {"check": 1}
    assert release.output("verdict") == "fail"
    assert f"| `{shard.name}` | `{tensor}` | differs from the source" in release.summary
    told = [line for line in release.log.splitlines() if line.startswith("::error")]
    assert len(told) == 1 and f",file=shards/{shard.name}::" in told[0] and tensor in told[0]
    found = json.loads((release.place / release.output("json")).read_text())["differences"]
    assert [(each["file"], each["tensor"]) for each in found] == [(shard.name, tensor)]
    failure = ElementTree.parse(release.place / release.output("junit")).getroot().find(".//failure")
    assert failure is not None and tensor in (failure.text or "")


def test_a_changed_byte_that_check_is_kept_from_seeing_fails_in_verify(job: Callable[..., Job]) -> None:
    release = job(tiers="bytes")
    assert release.run("plan", "split", "check") == {"plan": 0, "split": 0, "check": 0}
    shard = release.place / "shards" / "rank-00000-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert release.run("verify") == {"verify": 1}
    assert release.output("verdict") == "fail" and release.output("json").endswith("verify.json")
    assert "::error title=tpshard verify%3A bytes fail" in release.log
    assert "## tpshard verify: fail" in release.summary and shard.name in release.summary


@pytest.mark.parametrize(
    ("inputs", "code", "what"),
    [({"tp": "3"}, 4, "unsupported"), ({"model": "nowhere/at/all"}, 2, "usage"), ({"options": "--no"}, 2, "usage")],
)
def test_what_cannot_be_split_ends_with_its_own_code_and_the_way_out(
    job: Callable[..., Job], inputs: dict[str, str], code: int, what: str
) -> None:
    release = job(**inputs)
    assert release.run("plan", "split") == {"plan": code}
    assert release.output("verdict") == "error"
    assert f"::error title=tpshard plan%3A {what}::" in release.log and "; hint: " in release.summary


def test_inputs_reach_the_commands(job: Callable[..., Job]) -> None:
    release = job(format="vllm", options="--dtype float16 --max-file-size 1MB", tiers="none", output="out dir")
    assert release.run("plan", "split", "check", "verify") == dict.fromkeys(["plan", "split", "check", "verify"], 0)
    manifest = json.loads((release.place / "out dir" / "tpshard.json").read_text())
    assert manifest["options"]["format"] == "vllm" and manifest["options"]["dtype"] == "float16"
    assert manifest["options"]["max_file_size"] == 1_000_000
    assert release.output("verdict") == "pass" and release.output("json").endswith("check.json")
    assert "verify" not in release.summary


def test_text_from_a_model_cannot_forge_an_annotation_or_leave_its_table(tmp_path: Path) -> None:
    """And a command that was killed before it said anything is an error."""
    difference = {"file": "a,b:c", "tensor": "x|y\n::error::forged", "message": "100%"}
    said = {"path": "shards", "source": "m", "mesh": {"tp": 2}, "differences": [difference]}
    (tmp_path / "check.json").write_text(json.dumps(said))
    environment = {**os.environ, "GITHUB_STEP_SUMMARY": str(tmp_path / "s"), "GITHUB_OUTPUT": str(tmp_path / "o")}

    def tell(command: str, code: str) -> str:
        arguments = [sys.executable, str(ROOT / "action/tell.py"), command, str(tmp_path), code]
        return subprocess.run(arguments, env=environment, check=True, text=True, capture_output=True).stdout

    place = "title=tpshard check%3A a%2Cb%3Ac,file=shards/a%2Cb%3Ac"
    assert tell("check", "1") == f"::error {place}::a,b:c: x|y%0A::error::forged: 100%25\n"
    assert "| `a,b:c` | `x\\|y ::error::forged` | 100% |" in (tmp_path / "s").read_text()
    assert "ended with exit code 137 and left no result" in tell("verify", "137")
    assert "verdict=error" in (tmp_path / "o").read_text()
