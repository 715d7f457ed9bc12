"""What a verdict is asked of, and what an engine has ready for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpshard.errors import UsageError
from tpshard.verifier.group import Processes, Threads
from tpshard.verifier.ranks.open import FileWeights, ShardSet
from tpshard.verifier.report.verdict import Canary, Tier

TIERS = ("exact", "native")
REFERENCES = ("tpshard", "transformers")

LoadRank = Callable[[int, torch.device], Mapping[str, Tensor] | None]
"""A rank's tensors on a device, as stored; None where its files are not of the form that the loader knows."""
Canaries = Callable[[], list[Canary]]
Judge = Callable[[], tuple[Tier, Canaries | None]]
"""A tier, and what injects its canaries; None where it has none, and no need of them."""


@dataclass(frozen=True)
class Asked:
    """How the shards are to be judged.

    `sharing` says how many processes share a device. `prompt` [batch, length] replaces ids from the seed. `stream` None
    decides by memory. `load_rank` loads what is kept on a GPU. `first` is a tier that comes before ours, judged by rank
    0 once all has been opened. `reference` "transformers" adds that library's own model as a reference. `engine` says
    whose code runs the ranks: tpshard's, transformers', or auto, which is transformers' where ours does not cover the
    model. `layers` None means all.
    """

    tiers: Sequence[str] = TIERS
    device: str = "auto"
    tokens: int = 32
    seed: int = 0
    float32: bool = False
    layers: Sequence[int] | None = None
    stream: bool | None = None
    sequence_parallel: bool = False
    reference: str = "tpshard"
    engine: str = "auto"
    prompt: Tensor | None = None
    sharing: int = 1
    load_rank: LoadRank | None = None
    first: Callable[[], Tier] | None = None
    allow_pickle: bool = False
    say: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        unknown = [tier for tier in self.tiers if tier not in TIERS]
        if unknown or not self.tiers:
            message = f"unknown tier {unknown[0]!r}" if unknown else "no tier to run"
            raise UsageError(message, expected=", ".join(TIERS))
        if self.reference not in REFERENCES:
            raise UsageError(f"unknown reference {self.reference!r}", expected=" or ".join(REFERENCES))


@dataclass(frozen=True)
class Opened:
    """Shards and source, opened; who runs the ranks, and where."""

    shards: ShardSet
    config: Mapping[str, Any]
    source: FileWeights
    path: Path
    team: Threads | Processes
    device: torch.device


@dataclass(frozen=True)
class Ready:
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
