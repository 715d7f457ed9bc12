"""What megatron-core itself saves and loads, and what it computes. `make test-megatron` runs it: it needs Megatron.

Three questions for each family: is what Megatron saved merged to the model that it was given, bit for bit; does it load
what we write, bit for bit, whatever its own parallel sizes; and does it then compute what transformers computes.
What needs Transformer Engine is not here: grouped experts. Latent attention is, with two small stubs in its place.
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

from tests.helpers.by_hand import with_one_more
from tests.helpers.checkpoints import make
from tests.helpers.command import succeeds
from tests.helpers.toys import read_all

PYTHON = os.environ.get("MEGATRON_PYTHON", "")
WORKER = Path(__file__).with_name("worker.py")
DENSE = ("--tp 1", "--tp 2", "--pp 3")
MOE = ("--tp 1", "--tp 2", "--ep 2")


@dataclass(frozen=True)
class Case:
    """A variant of the tests' models. saved, loaded: at which of Megatron's sizes; computed: whether its logits are.

    legacy: at which sizes files of ranks are loaded, by what `split` is told. predicts: whether a layer follows that
    predicts a further token.
    """

    name: str
    saved: tuple[str, ...]
    loaded: tuple[str, ...]
    legacy: tuple[str, ...] = ("--tp 2",)
    computed: bool = True
    config: tuple[tuple[str, Any], ...] = ()
    predicts: bool = False

    @property
    def id(self) -> str:
        return f"{self.name}{'-predicts' if self.predicts else ''}"


WHOLE = "--tp 2 --ep 2"
LATENT = ("--tp 1", "--tp 2", "--pp 3", "--ep 2")
# Megatron adds up as many of a group's scores as it chooses experts of it, transformers two.
V3 = (("num_nextn_predict_layers", 0), ("num_experts_per_tok", 4))
CASES = (
    Case(
        "llama-gqa",
        ("--tp 2", "--pp 3", "--tp 2 --singly", "--tp 2 --legacy", "--tp 4 --legacy"),
        DENSE,
        ("--tp 1", "--tp 2", "--pp 3", "--tp 4", "--tp 2 --pp 3"),
    ),
    Case("llama-tied", ("--pp 3",), DENSE, ("--tp 1", "--pp 3")),
    Case("llama-bf16", ("--tp 2",), ("--tp 2",), computed=False),
    Case("mistral", ("--tp 2",), DENSE),
    Case("qwen2-tied", ("--tp 2", "--pp 3", "--pp 3 --legacy"), DENSE, ("--tp 2 --pp 3",)),
    Case("qwen3", ("--tp 2",), DENSE, ("--pp 3",)),
    Case(
        "mixtral",
        ("--ep 2", "--tp 2", "--ep 2 --legacy", "--tp 2 --etp 1 --ep 2 --legacy", "--tp 2 --etp 1 --ep 4 --legacy"),
        MOE,
        ("--tp 1", "--tp 2", WHOLE),
    ),
    Case("qwen3_moe", ("--ep 2",), MOE, (WHOLE,)),
    Case("qwen2_moe", ("--ep 2",), MOE, (WHOLE,), config=(("mlp_only_layers", []),)),
    Case(
        "gpt2",
        ("--tp 2", "--pp 2 --vpp 2 --legacy"),
        ("--tp 1", "--tp 2", "--pp 2"),
        ("--tp 2 --pp 2",),
        config=(("n_layer", 4),),
    ),
    # Its norms multiply by 1 + weight, which only Transformer Engine's do: the weights are right, the numbers not.
    Case("nemotron", ("--tp 2",), ("--tp 1", "--tp 2", "--pp 2"), computed=False),
    # Latent attention, with stubs.py in place of two of Transformer Engine's layers.
    Case("deepseek_v2-lite", ("--tp 2", "--tp 2 --legacy"), LATENT, (WHOLE, "--pp 3")),
    Case("deepseek_v3", ("--tp 2", "--pp 3 --legacy"), LATENT, (WHOLE, "--pp 3"), config=V3),
    Case(
        "deepseek_v3",
        ("--tp 2", "--pp 3 --legacy"),
        ("--tp 2", "--pp 3"),
        ("--tp 2", "--pp 3"),
        computed=False,
        config=V3,
        predicts=True,
    ),
)
every = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PYTHON, "MEGATRON_PYTHON must be an interpreter with megatron-core: `make test-megatron` sets it"
    monkeypatch.chdir(tmp_path)


def megatron(*commands: str) -> list[str]:
    """Run Megatron; what each of the commands says."""
    python = os.path.abspath(PYTHON) if "/" in PYTHON else PYTHON
    lines = "".join(f"{command}\n" for command in commands)
    limit = 600 * len(commands)
    ran = subprocess.run([python, str(WORKER)], input=lines, capture_output=True, text=True, timeout=limit)
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = ran.stdout.split("---\n")[:-1]
    assert len(said) == len(commands)
    return said


def model_of(case: Case) -> None:
    """The case's model, and of one that predicts further tokens all that Megatron has a place for."""
    make(case.name, Path("base" if case.predicts else "model"), **dict(case.config))
    if case.predicts:
        with_one_more(Path("base"), Path("model"), num_nextn_predict_layers=1)


def expected(case: Case) -> dict[str, Any]:
    """What must come back of it: all but what its predicting layer has of its own that Megatron's share."""
    ends = ("embed_tokens.weight", "shared_head.head.weight") if case.predicts else ()
    return {
        name: each
        for name, each in read_all(Path("model")).items()
        if not name.startswith("model.layers.3.") or not name.endswith(ends)
    }


@every
def test_what_megatron_saved_is_merged(case: Case) -> None:
    model_of(case)
    megatron(*(f"save model saved-{number} {options}" for number, options in enumerate(case.saved)))
    for number in range(len(case.saved)):
        saved = f"saved-{number}"
        if "deepseek" not in case.name:  # of latent attention the arguments do not give all that a config.json needs
            succeeds("merge", saved, "-o", f"merged-{number}", "--vocab-size", 251)
            assert read_all(Path(f"merged-{number}")) == expected(case)
        shutil.copy("model/config.json", saved)
        succeeds("merge", saved, "-o", f"again-{number}")
        assert read_all(Path(f"again-{number}")) == expected(case)


@every
def test_megatron_loads_what_is_written_and_computes_what_transformers_does(case: Case) -> None:
    """Bit for bit; legacy files strictly, by torch's weights_only reader."""
    model_of(case)
    succeeds("split", "model", "--tp", 2, "--format", "megatron", "-o", "written")
    commands = [f"load model written {options} --padded 256" for options in case.loaded]
    for number, options in enumerate(case.legacy):
        more = ("--engine-version", "0.16") if case.predicts else ()
        mesh = options if "--tp" in options else f"--tp 1 {options}"
        succeeds("split", "model", *mesh.split(), "--format", "megatron-legacy", *more, "-o", f"legacy-{number}")
        padded = 512 if "--tp 4" in options else 256
        own = f"{options} --etp 1" if "--ep" in options else options
        commands.append(f"load model legacy-{number} --legacy {own} --padded {padded}")
    if case.computed:
        commands.append("logits model written --padded 256")
    for command, said in zip(commands, megatron(*commands), strict=True):
        assert "parameters are equal, bit for bit" in said, command
    if case.computed:
        found = json.loads(said.splitlines()[-1])
        assert found["largest"] > 0.1 and found["difference"] <= 5e-6 * found["largest"], found
        assert found["otherwise"] > 1e-3 * found["largest"], "a weight with its rows in another order is not seen"
