"""What a backend is given to judge, and what it has ready for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpshard.verifier.group import Processes, Threads
from tpshard.verifier.options import Say, silent
from tpshard.verifier.ranks.open import FileWeights, ShardSet
from tpshard.verifier.report.verdict import Canary, Tier

LoadRank = Callable[[int, torch.device], Mapping[str, Tensor] | None]
"""A rank's tensors on a device, as stored; None where its files are not of the form that the loader knows."""
Canaries = Callable[[], list[Canary]]
Judge = Callable[[], tuple[Tier, Canaries | None]]
"""A tier, and what injects its canaries; None where it has none, and no need of them."""


@dataclass(frozen=True)
class OpenedSet:
    """Shards and source, opened; who runs the ranks, and where.

    `prompt` [batch, length] replaces ids from the seed. `sharing` processes share the device. `load_rank` loads what is
    kept on a GPU. `say` takes lines about the progress.
    """

    shards: ShardSet
    config: Mapping[str, Any]
    source: FileWeights
    path: Path
    team: Threads | Processes
    device: torch.device
    prompt: Tensor | None = None
    sharing: int = 1
    load_rank: LoadRank | None = None
    say: Say = silent


@dataclass(frozen=True)
class EngineRun:
    """An engine that has decided all that comes before the first number.

    `begin` looks for what is not finite, loads what is kept, and gives the tiers to run in order. `lines` say what a
    tier will take. `unsure` are errors of the engine's own, which say nothing of the shards. `settings` and `volatile`
    are what this engine adds to those of every verdict.
    """

    engine: str
    model_type: str
    prompt_tokens: int
    tokens: int
    layers: Sequence[int] | None
    begin: Callable[[], Mapping[str, Judge]]
    lines: Mapping[str, str]
    streamed: bool = False
    warnings: tuple[str, ...] = ()
    unsure: tuple[type[Exception], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    volatile: Mapping[str, Any] = field(default_factory=dict)
