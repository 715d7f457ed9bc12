"""How long a verification will take on this machine: one block of the source's largest matrix, measured and scaled."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tpshard.verify.canaries import CANARIES
from tpshard.verify.machine import Load
from tpshard.verify.shards import FileWeights, elements

BLOCK_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class Pace:
    """Seconds per element of a weight matrix, to fetch it from its file as float64, and to multiply with it.

    `wide` and `native` multiply all prompts at once, in float64 and in the stored dtype; the steps are one token's.
    """

    fetch: float
    wide: float
    native: float
    wide_step: float
    native_step: float


def _seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    """The better of two runs: the first one also wakes the machine."""
    taken = []
    for _ in range(2):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begun)
    return min(taken)


def measure(weights: FileWeights, names: list[str], prompt: Tensor, device: torch.device) -> Pace:
    """The pace of a block of the largest of the named matrices; `prompt` [B, S] says how much is multiplied."""
    name = max((name for name in names if len(weights.shape(name)) == 2), key=lambda n: elements(weights, [n]))
    rows, width = weights.shape(name)
    count = min(rows, max(1, BLOCK_ELEMENTS // width))

    def fetch() -> Tensor:
        return weights.rows(name, 0, count).to(device=device, dtype=torch.float64)

    wide = fetch()
    native = weights.rows(name, 0, count).to(device)
    batch, size = prompt.shape[0], prompt.numel()

    def multiply(weight: Tensor, positions: int) -> float:
        x = torch.ones(positions, width, dtype=weight.dtype, device=device)
        return _seconds(lambda: x @ weight.T, device) / wide.numel()

    return Pace(
        fetch=_seconds(fetch, device) / wide.numel(),
        wide=multiply(wide, size),
        native=multiply(native, size),
        wide_step=multiply(wide, batch),
        native_step=multiply(native, batch),
    )


def exact_seconds(pace: Pace, load: Load, *, kept: bool) -> float:
    """The exact tier: the source once, the ranks alone and fed, and a small model for each canary."""
    each = pace.wide + (0 if kept else pace.fetch)
    small = load.shards * min(1.0, 2 / load.layers)
    once = pace.fetch * (load.source + load.shards) if kept else 0.0
    return once + each * (load.source + 2 * load.shards + small * len(CANARIES))


def native_seconds(pace: Pace, load: Load, tokens: int, *, kept: bool) -> float:
    """The native tier: R and N, T through the cache, both module by module, tokens chosen, canaries."""
    fetch = 0.0 if kept else pace.fetch
    step = tokens * pace.native_step
    once = pace.fetch * (load.source + load.shards) if kept else 0.0
    choose = tokens * pace.wide_step * load.source if kept else 0.0
    wide = 3 * load.source * (pace.wide + fetch)
    narrow = 3 * load.source + 3 * load.shards
    small = load.shards * min(1.0, 2 / load.layers) * len(CANARIES)
    return once + choose + wide + (narrow + small) * (pace.native + fetch) + step * (load.source + load.shards)
