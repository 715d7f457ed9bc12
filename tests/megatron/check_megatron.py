"""What megatron-core itself saves and loads, and what it computes. `make test-megatron` runs it: it needs Megatron.

Three questions for each family: is what Megatron saved merged to the model that it was given, bit for bit; does it load
what we write, bit for bit, whatever its own parallel sizes; and does it then compute what transformers computes.
What needs Transformer Engine is not here: latent attention, grouped experts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoints import make
from tests.helpers.command import succeeds
from tests.helpers.toys import read_all

PYTHON = os.environ.get("MEGATRON_PYTHON", "")
WORKER = Path(__file__).with_name("worker.py")
DENSE = ("--tp 1", "--tp 2", "--pp 3")
MOE = ("--tp 1", "--tp 2", "--ep 2")


@dataclass(frozen=True)
class Case:
    """A variant of the tests' models. saved, loaded: at which of Megatron's sizes; computed: whether its logits are."""

    name: str
    saved: tuple[str, ...]
    loaded: tuple[str, ...]
    computed: bool = True
    config: tuple[tuple[str, Any], ...] = ()


CASES = (
    Case("llama-gqa", ("--tp 2", "--pp 3", "--tp 2 --singly", "--tp 2 --legacy"), DENSE),
    Case("llama-tied", ("--pp 3",), DENSE),
    Case("llama-bf16", ("--tp 2",), ("--tp 2",), computed=False),
    Case("mistral", ("--tp 2",), DENSE),
    Case("qwen2-tied", ("--tp 2", "--pp 3", "--pp 3 --legacy"), DENSE),
    Case("qwen3", ("--tp 2",), DENSE),
    Case("mixtral", ("--ep 2", "--tp 2", "--ep 2 --legacy"), MOE),
    Case("qwen3_moe", ("--ep 2",), MOE),
    Case("qwen2_moe", ("--ep 2",), MOE, config=(("mlp_only_layers", []),)),
    Case("gpt2", ("--tp 2",), ("--tp 1", "--tp 2", "--pp 2")),
    # Its norms multiply by 1 + weight, which only Transformer Engine's do: the weights are right, the numbers not.
    Case("nemotron", ("--tp 2",), ("--tp 1", "--tp 2", "--pp 2"), computed=False),
)
every = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PYTHON, "MEGATRON_PYTHON must be an interpreter with megatron-core: `make test-megatron` sets it"
    monkeypatch.chdir(tmp_path)


def megatron(command: str, model: str, directory: str, options: str) -> str:
    """Run Megatron; what it says."""
    arguments = [os.path.abspath(PYTHON) if "/" in PYTHON else PYTHON, str(WORKER), command, model, directory]
    ran = subprocess.run([*arguments, *options.split()], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


@every
def test_what_megatron_saved_is_merged(case: Case) -> None:
    make(case.name, Path("model"), **dict(case.config))
    for number, options in enumerate(case.saved):
        saved = f"saved-{number}"
        megatron("save", "model", saved, options)
        succeeds("merge", saved, "-o", f"merged-{number}", "--vocab-size", 251)
        assert read_all(Path(f"merged-{number}")) == read_all(Path("model"))
        shutil.copy("model/config.json", saved)
        succeeds("merge", saved, "-o", f"again-{number}")
        assert read_all(Path(f"again-{number}")) == read_all(Path("model"))


@every
def test_megatron_loads_what_is_written(case: Case) -> None:
    make(case.name, Path("model"), **dict(case.config))
    succeeds("split", "model", "--tp", 2, "--format", "megatron", "-o", "written")
    for options in case.loaded:
        said = megatron("load", "model", "written", f"{options} --padded 256")
        assert "parameters are equal, bit for bit" in said


@pytest.mark.parametrize("case", [case for case in CASES if case.computed], ids=lambda case: case.name)
def test_megatron_computes_what_transformers_does(case: Case) -> None:
    make(case.name, Path("model"), **dict(case.config))
    succeeds("split", "model", "--tp", 1, "--format", "megatron", "-o", "written")
    said = json.loads(megatron("logits", "model", "written", "--padded 256").splitlines()[-1])
    assert said["largest"] > 0.1 and said["difference"] <= 5e-6 * said["largest"], said
    assert said["otherwise"] > 1e-3 * said["largest"], "a weight with its rows in another order is not seen"
