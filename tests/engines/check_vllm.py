"""`--format vllm` against vLLM itself: every parameter of every architecture, and the tokens of five.

Run by `make test-engines`, which makes the engines' environment; ENGINE_PYTHON is its interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tpshard
from tests.engines import engine_models as models
from tpshard.errors import CorruptError, UnsupportedError

HERE = Path(__file__).parent
STARTED = ("llama", "gpt2", "opt", "qwen3", "mixtral")


class Engine:
    """A process that has vLLM imported, and forks to answer."""

    def __init__(self, log: Path) -> None:
        self.log = log
        command = [os.environ["ENGINE_PYTHON"], str(HERE / "held.py")]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def held(
        self, model: Path, tp: int, load_format: str, out: Path, *, roomy: bool = False
    ) -> list[dict[str, torch.Tensor]]:
        """What each rank's model holds after loading; RuntimeError with what vLLM said when it does not load.

        roomy: parameters may be larger than what is loaded.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        job = {"model": str(model), "tp": tp, "load_format": load_format, "out": str(out), "roomy": roomy}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"vLLM's process ended: {self.log.read_text()[-2000:]}"
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return [load_file(out / f"rank-{rank}.safetensors") for rank in range(tp)]


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One process of vLLM for all tests."""
    started = Engine(tmp_path_factory.mktemp("engine") / "log")
    yield started
    assert started.process.stdin is not None
    started.process.stdin.close()
    started.process.wait(30)


def differences(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> list[str]:
    """Every name, dtype, shape and bit in which two sets of ranks differ."""
    found = []
    for rank, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        found += [f"rank {rank}: {name} is only in one" for name in sorted(set(a) ^ set(b))]
        for name in sorted(set(a) & set(b)):
            if (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape):
                found.append(f"rank {rank}: {name}: {a[name].dtype} {a[name].shape}, {b[name].dtype} {b[name].shape}")
            elif not torch.equal(bits(a[name]), bits(b[name])):
                found.append(f"rank {rank}: {name}: other bits")
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes."""
    return tensor.reshape(-1).view(torch.uint8)


def written(directory: Path, tp: int) -> list[dict[str, torch.Tensor]]:
    """Our files, by rank."""
    return [load_file(directory / f"model-rank-{rank}-part-0.safetensors") for rank in range(tp)]


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", models.LOADED)
def test_ours_is_what_vllm_holds(name: str, tp: int, engine: Engine, tmp_path: Path) -> None:
    source = models.make(name, tmp_path / "source")
    theirs = engine.held(source, tp, "auto", tmp_path / "theirs")
    shards = tmp_path / "shards"
    tpshard.split(source, tp, shards, format="vllm")
    assert differences(written(shards, tp), theirs) == []
    assert differences(engine.held(shards, tp, "sharded_state", tmp_path / "loaded"), theirs) == []
    assert not tpshard.check(shards, source).differences
    tpshard.merge(shards, tmp_path / "merged")
    assert differences([everything(tmp_path / "merged")], [everything(source)]) == []


def everything(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", models.REFUSED)
def test_refused_is_what_vllm_does_not_load_whole(name: str, engine: Engine, tmp_path: Path) -> None:
    source = models.make(name, tmp_path / "source")
    with pytest.raises((UnsupportedError, CorruptError)):
        tpshard.split(source, 4, tmp_path / "shards", format="vllm")
    try:
        theirs = engine.held(source, 4, "auto", tmp_path / "theirs")
    except RuntimeError:
        return  # vLLM refuses it too, or leaves a parameter unset, or adds one that sharded_state cannot have
    assert left_out(source, theirs), "vLLM holds all of it: there is no reason to refuse it"


@pytest.mark.parametrize("name", models.NOT_RUN)
def test_refused_is_what_vllm_cannot_run(name: str, tmp_path: Path) -> None:
    source = models.make(name, tmp_path / "source")
    with pytest.raises(UnsupportedError):
        tpshard.split(source, 2, tmp_path / "shards", format="vllm")
    with pytest.raises(AssertionError, match="EngineCore|Engine core"):
        generate(source, "auto")


def left_out(source: Path, ranks: list[dict[str, torch.Tensor]]) -> list[str]:
    """Vectors of the source that are nowhere in the ranks, judged by their first four elements."""
    held = b"".join(bits(tensor).numpy().tobytes() for rank in ranks for tensor in rank.values())
    return [
        name
        for file in source.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if bits(tensor.reshape(-1)[:4]).numpy().tobytes() not in held
    ]


@pytest.mark.parametrize("name", STARTED)
def test_tokens_of_the_started_engine(name: str, tmp_path: Path) -> None:
    source = models.make(name, tmp_path / "source")
    tpshard.split(source, 2, tmp_path / "shards", format="vllm")
    unsharded = generate(source, "auto")
    assert all(len(each["tokens"]) == len(each["logprobs"]) > 1 for each in unsharded)
    assert generate(tmp_path / "shards", "sharded_state") == unsharded


def generate(model: Path, load_format: str) -> list[dict[str, Any]]:
    """Greedy tokens and their logprobs, of an engine at tp 2."""
    command = [os.environ["ENGINE_PYTHON"], str(HERE / "generate.py"), str(model), "2", load_format]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    results = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, ended.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(results[0].removeprefix("RESULT "))
    return found


def test_a_wrong_width_loads_without_an_error_so_check_stands_before_it(engine: Engine, tmp_path: Path) -> None:
    source = models.make("llama", tmp_path / "source")
    tpshard.split(source, 4, tmp_path / "shards", format="vllm")
    with pytest.raises(RuntimeError, match="loading tensor of shape"):  # vLLM warns; held.py takes that for an error
        engine.held(tmp_path / "shards", 2, "sharded_state", tmp_path / "loaded")
    with safe_open(tmp_path / "shards" / "model-rank-0-part-0.safetensors", "pt") as file:
        assert file.metadata()["tpshard.tp"] == "4"
