"""What runs a model for a verification: tpshard's own decoder, or transformers' classes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from tpshard.verifier.elements import Parameter, same_form
from tpshard.verifier.group import Group, Processes, Threads
from tpshard.verifier.options import Say, silent
from tpshard.verifier.places import Places
from tpshard.verifier.progress import Progress, steps_of
from tpshard.verifier.ranks.open import FileWeights, RankSet
from tpshard.verifier.ranks.weights import Disturbed, Weights
from tpshard.verifier.report.verdict import Canary, Finding, Tier

T = TypeVar("T")
Canaries = Callable[[], list[Canary]]
Judge = Callable[[Tensor], T]
"""Judges a rank's logits."""
Fed = tuple[list[float], list[Finding]]
"""Every rank's end-to-end error, and all findings in the order of computation."""
JudgeTier = Callable[[], tuple[Tier, Canaries | None]]
"""A tier, and what injects its canaries; None where it has none, and no need of them."""


@dataclass(frozen=True)
class OpenedSet:
    """Shards and source, opened; who runs the ranks, and where.

    `prompt` [batch, length] replaces ids from the seed. `sharing` processes share the device. `say` takes
    lines about the progress.
    """

    shards: RankSet
    config: Mapping[str, Any]
    source: FileWeights
    path: Path
    team: Threads | Processes
    device: torch.device
    prompt: Tensor | None = None
    sharing: int = 1
    say: Say = silent


@dataclass(frozen=True)
class Reference:
    """The unsharded model's logits [B, S, vocab], and what it chose where a rank must choose the same (experts)."""

    logits: Tensor
    choices: Any = None


@dataclass(frozen=True)
class Backend(ABC):
    """Both sides of a comparison, and how to run them: shards (`ranks`) and the unsharded model.

    `team` runs the ranks; `progress` counts what is done. Methods that give a list give every rank's result, in rank
    order, in every process.
    """

    source: Weights
    ranks: Sequence[Weights]
    team: Threads | Processes
    prompt: Tensor
    device: torch.device
    progress: Progress = field(default_factory=lambda: Progress("", 1), kw_only=True)

    @property
    def steps(self) -> list[Tensor]:
        """The prompt alone, as steps of tokens."""
        return [self.prompt]

    def with_ranks(self, ranks: Sequence[Weights]) -> Self:
        """The same with other shards."""
        return replace(self, ranks=ranks)

    def disturbed(self) -> Self:
        """The same with each weight of the source moved by one rounding of float64."""
        return replace(self, source=Disturbed(self.source))

    def same_form(self) -> tuple[Self, Self]:
        """The same with the ranks' tensors, and with the source cut for the ranks, in one form."""
        held, cut = same_form(self.parameters(), len(self.ranks), self.keeps)
        return self.with_ranks(held), self.with_ranks(cut)

    def findings(self, work: Callable[[Group], list[Finding]]) -> list[Finding]:
        """The findings of every rank: the first of each, then the second of each, and so on."""
        return [finding for step in zip(*self.team.run(work), strict=True) for finding in step]

    def counting(self, tier: str, say: Say) -> Self:
        """The same, which says how much of a tier is done."""
        steps = steps_of(tier, len(self.compared), len(self.team.here))
        return replace(self, progress=Progress(f"{tier} tier", steps, say))

    @property
    @abstractmethod
    def compared(self) -> Sequence[int]:
        """The layers that are compared; others are left out of both sides."""

    @property
    @abstractmethod
    def keeps(self) -> torch.device | None:
        """Where ranks' tensors are kept once they were read; None: they are read anew each time."""

    @abstractmethod
    def parameters(self) -> Iterable[Parameter]:
        """Every tensor of the model beside what each rank has of it, in the order of computation."""

    @abstractmethod
    def with_layers(self, count: int) -> Self:
        """The same with so many layers: canaries are put in one."""

    @abstractmethod
    def places(self, layer: int | None = None) -> Places:
        """Where parts lie in a layer's stored tensors; None: the first layer that is compared."""

    @abstractmethod
    def run(self, dtype: torch.dtype, steps: Sequence[Tensor], choices: Any = None) -> Reference:
        """The unsharded model on steps of tokens, which go through its KV cache one after the other."""

    @abstractmethod
    def run_ranks(self, dtype: torch.dtype, steps: Sequence[Tensor], choices: Any, judge: Judge[T]) -> list[T]:
        """`judge` of each rank's logits. DifferentError or UnsupportedError where shards cannot be run."""

    @abstractmethod
    def errors(self, dtype: torch.dtype, reference: Reference) -> list[float]:
        """Each rank's end-to-end error on the prompt, of its logits and of what it chose from."""

    @abstractmethod
    def feed(self, dtype: torch.dtype, limit: float) -> Fed:
        """The ranks beside the unsharded model, every module fed what the unsharded one took.

        Above `limit` a finding says what differs inside.
        """


@dataclass(frozen=True)
class EngineRun:
    """A backend that has decided all that comes before the first number.

    `begin` looks for what is not finite, loads what is kept, and gives the tiers to run in order. `unsure` are the
    backend's own errors, which say nothing of the shards. It adds `settings`, `volatile` and `warnings` to those of
    every verdict.
    """

    engine: str
    prompt_tokens: int
    tokens: int
    layers: Sequence[int] | None
    begin: Callable[[], Mapping[str, JudgeTier]]
    streamed: bool = False
    unsure: tuple[type[Exception], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    volatile: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
