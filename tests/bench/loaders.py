"""One rank loaded by `load_rank` and by other loaders of the same file, in one process, taking turns.

    python -m tests.bench.loaders SHARDS [cpu|cuda]

prints the seconds of each load as JSON. Needs torch; a loader that is not installed is left out.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import tpshard

REPEAT = 5
OURS, UNCHECKED, HASHED = "tpshard.load_rank", "tpshard.load_rank, check=False", "sha256 of the file"
Tensors = Mapping[str, torch.Tensor]
Load = Callable[[], tuple[Tensors, Callable[[], None]]]
"""A load: the tensors, and what to call when they are no longer needed."""


def ways(shards: Path, device: torch.device) -> dict[str, Load]:
    """The loaders that are installed, by name; each loads rank 0, whole.

    Ours also without comparing the recorded checksum, which no other compares; and what hashing the file takes alone.
    On a CPU safetensors gives tensors that map the file, which is no load; their copies are what others give.
    """
    path = next(iter(sorted(shards.glob("rank-00000-of-*.safetensors"))))
    place = "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"
    found: dict[str, Load] = {
        OURS: lambda: (tpshard.load_rank(shards, 0, place), _nothing),
        UNCHECKED: lambda: (tpshard.load_rank(shards, 0, place, check=False), _nothing),
        HASHED: lambda: hashed(path),
    }
    try:
        from safetensors.torch import load_file

        if device.type == "cpu":
            found["load_file, mapped"] = lambda: (load_file(path), _nothing)
            found["safetensors load_file"] = lambda: (
                {name: tensor.clone() for name, tensor in load_file(path).items()},
                _nothing,
            )
        else:
            found["safetensors load_file"] = lambda: (load_file(path, device=place), _nothing)
    except ImportError:
        pass
    try:
        found["fastsafetensors"] = fast(path, place)
    except ImportError:
        pass
    return found


def hashed(path: Path) -> tuple[Tensors, Callable[[], None]]:
    """What comparing a checksum takes alone."""
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    return {}, _nothing


def _nothing() -> None:
    pass


def fast(path: Path, place: str) -> Load:
    """fastsafetensors' loader of one file, through its own threads and buffers."""
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    def load() -> tuple[Tensors, Callable[[], None]]:
        loader = SafeTensorsFileLoader(SingleGroup(), place, nogds=True)
        loader.add_filenames({0: [str(path)]})
        held = loader.copy_files_to_device()

        def close() -> None:
            held.close()
            loader.close()

        return {name: held.get_tensor(name) for name in held.key_to_rank_lidx}, close

    return load


def timed(load: Load, device: torch.device) -> float:
    """Seconds until every page of the tensors is there."""
    gc.collect()
    _wait(device)
    begun = time.perf_counter()
    tensors, close = load()
    if device.type == "cpu":
        for tensor in tensors.values():
            tensor.view(-1).view(torch.uint8)[::4096].sum()
    _wait(device)
    seconds = time.perf_counter() - begun
    del tensors
    close()
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(shards: Path, device: torch.device) -> dict[str, Any]:
    """Seconds of each loader's loads after a first one that warms up; the text of the error of one that fails."""
    loads, seconds = ways(shards, device), dict[str, Any]()
    for name, load in loads.items():
        try:
            timed(load, device)
            seconds[name] = []
        except Exception as error:  # another's loader: whatever it raises is its figure
            if name == OURS:
                raise
            seconds[name] = f"failed: {type(error).__name__}: {error}"
    for _ in range(REPEAT):
        for name, load in loads.items():
            if isinstance(seconds[name], list):
                seconds[name].append(timed(load, device))
    return seconds


if __name__ == "__main__":
    where = sys.argv[2] if len(sys.argv) > 2 else "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps({"device": where, "seconds": measure(Path(sys.argv[1]), torch.device(where))}))
