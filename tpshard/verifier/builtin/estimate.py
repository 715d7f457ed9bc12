"""How long a verification will take on this machine: one block of the source's largest matrix, measured and scaled."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tpshard.verifier.builtin.memory import BLOCK_BYTES, Load, Side
from tpshard.verifier.ranks.open import FileWeights, elements
from tpshard.verifier.ranks.weights import move

BLOCK_ELEMENTS = BLOCK_BYTES // 8
LAYER_SECONDS = 1e-3
"""A layer of a rank on one step of tokens, however small: what Python and torch take for its operations."""


@dataclass(frozen=True)
class Pace:
    """Seconds per element of a weight matrix, to look for NaN in its file, to fetch it from there, to multiply with it.

    `wide` is in float64 and `native` in the stored dtype, all prompts at once; the steps are one token's. `widen` is
    what a GPU takes to make float64 of a kept weight; a CPU keeps it so.
    """

    look: float
    fetch_wide: float
    fetch_native: float
    widen: float
    wide: float
    native: float
    wide_step: float
    native_step: float


@dataclass(frozen=True)
class Work:
    """What is to be done at that pace, by the `here` ranks of a process.

    `kept`: weights stay in memory. `longer`: tokens decoded per token of the prompt. `taught`: the reference chooses
    them. `exact` and `native` are the numbers of canaries.
    """

    load: Load
    here: int
    kept: bool
    tokens: int
    longer: float
    taught: bool
    exact: int
    native: int


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
    native = weights.rows(name, 0, count).to(device)
    wide = native.double()
    batch, size = prompt.shape[0], prompt.numel()

    def fetch(dtype: torch.dtype) -> float:
        return _seconds(lambda: move(weights.rows(name, 0, count), device, dtype), device) / wide.numel()

    def look() -> Tensor:
        return weights.rows(name, 0, count).isfinite().all()

    def multiply(weight: Tensor, positions: int) -> float:
        x = torch.ones(positions, width, dtype=weight.dtype, device=device)
        return _seconds(lambda: x @ weight.T, device) / wide.numel()

    return Pace(
        look=_seconds(look, device) / wide.numel(),
        fetch_wide=fetch(torch.float64),
        fetch_native=fetch(native.dtype),
        widen=_seconds(native.double, device) / wide.numel() if device.type == "cuda" else 0.0,
        wide=multiply(wide, size),
        native=multiply(native, size),
        wide_step=multiply(wide, batch),
        native_step=multiply(native, batch),
    )


def _pass(side: Side, each: float, fetch: float = 0.0) -> float:
    """A forward pass over one step of tokens."""
    return (side.body + side.head) * (each + fetch)


def _small(side: Side, layers: int) -> Side:
    """The model that canaries are put into: one layer, embedding and head."""
    return Side(side.nbytes, side.elements, side.tables, side.body // layers, side.head)


def look_seconds(pace: Pace, work: Work) -> float:
    """Both sides looked at for what is not finite, before any tier."""
    return pace.look * (work.load.source.elements + work.load.shards.elements)


def exact_seconds(pace: Pace, work: Work) -> float:
    """Both sides' tables read; the source once, the ranks alone and fed; a small model for each canary."""
    source, shards, layers = work.load.source, work.load.shards, work.load.layers
    fetch = pace.widen if work.kept else pace.fetch_wide
    once = pace.fetch_wide * (source.elements + shards.elements) if work.kept else 0.0
    tables = pace.fetch_wide * (source.tables + shards.tables)
    passes = _pass(source, pace.wide, fetch) + 2 * _pass(shards, pace.wide, fetch)
    canaries = work.exact * _pass(_small(shards, layers), pace.wide, fetch)
    return once + tables + passes + canaries + LAYER_SECONDS * work.here * (2 * layers + work.exact)


def native_seconds(pace: Pace, work: Work) -> float:
    """R; N and T through the cache; both again module by module beside float64; canaries; and the tokens' choice."""
    source, shards, layers = work.load.source, work.load.shards, work.load.layers
    wide_fetch, fetch = (pace.widen, 0.0) if work.kept else (pace.fetch_wide, pace.fetch_native)
    once = 0.0
    if work.kept:
        once = pace.fetch_wide * source.elements + pace.fetch_native * (source.elements + shards.elements)
    r = _pass(source, pace.wide * (1 + work.longer), wide_fetch)
    cached = sum(
        side.body * (pace.native + work.tokens * pace.native_step + fetch)
        + side.head * (pace.native * (1 + work.longer) + fetch)
        for side in (source, shards)
    )
    modules = 2 * _pass(source, pace.wide, wide_fetch)
    modules += 2 * _pass(source, pace.native, fetch) + 2 * _pass(shards, pace.native, fetch)
    canaries = work.native * _pass(_small(shards, layers), pace.native, fetch)
    taught = _pass(source, pace.wide, wide_fetch) + work.tokens * _pass(source, pace.wide_step, wide_fetch)
    steps = (1 + work.tokens) * (1 + work.here + work.taught) + work.here * 4 + work.native
    return once + r + cached + modules + canaries + work.taught * taught + LAYER_SECONDS * layers * steps
