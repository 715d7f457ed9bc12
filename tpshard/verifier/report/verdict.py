"""What verify finds and concludes, and its JSON contract. Needs no torch."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 2
EXIT_CODES = {"pass": 0, "fail": 1, "inconclusive": 8}


@dataclass(frozen=True)
class Finding:
    """One module of one rank, fed the reference's input: its relative error, and what inside it differs first."""

    module: str
    rank: int
    error: float
    inside: str | None = None


@dataclass(frozen=True)
class Place:
    """Where something differs most, or first."""

    module: str
    layer: int | None
    rank: int | None
    error: float


@dataclass(frozen=True)
class NotRun:
    """Tensors that were compared and that nothing computes with: all below a prefix, `*` for its numbers.

    cut: whether ranks have parts of them, which can be the wrong ones, and nothing but a run would show it.
    """

    prefix: str
    tensors: int
    bytes: int
    why: str
    cut: bool = False


@dataclass(frozen=True)
class Tier:
    """What a tier found. `status` is pass, fail, inconclusive or skipped; `reason` a sentence when it is not pass.

    not_run: tensors that nothing computes with, and that weights compares; `apart` groups them by prefix. by_running:
    cut tensors of which the tier only knows that the ranks hold all of them: that each holds its own is for the next
    tier to say.
    """

    name: str
    status: str
    thresholds: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    worst: Place | None = None
    first: Place | None = None
    findings: tuple[Finding, ...] = ()
    reason: str | None = None
    not_run: tuple[str, ...] = ()
    by_running: tuple[str, ...] = ()
    apart: tuple[NotRun, ...] = ()


LAYER = re.compile(r"(?:^|(?<=\.))(?:layers|h|blocks)\.(\d+)\.")
"""A layer in a module's name."""


def layer_of(module: str) -> int | None:
    """The layer number in a module's name, None outside the layers."""
    match = LAYER.search(module)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class Canary:
    """One fault as judged by a tier: caught or missed."""

    name: str
    tier: str
    status: str
    error: float


@dataclass(frozen=True)
class Verdict:
    """The outcome of all tiers; `volatile` holds what differs between two runs on the same input."""

    model_type: str
    tp: int
    source: str
    shards: str
    tiers: tuple[Tier, ...]
    canaries: tuple[Canary, ...]
    bytes_per_rank: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    volatile: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """fail if any tier failed; inconclusive if any could not be sure, or none ran; else pass.

        A tier that was skipped because nobody asked for it says nothing.
        """
        statuses = {tier.status for tier in self.tiers} - {"skipped"}
        if "fail" in statuses:
            return "fail"
        return "pass" if statuses == {"pass"} else "inconclusive"

    @property
    def mesh_text(self) -> str:
        """The ranks for people: `tp 4`, and the stages where there are several."""
        return f"tp {self.tp}" + (f", pp {self.settings['pp']}" if "pp" in self.settings else "")

    @property
    def not_run(self) -> tuple[NotRun, ...]:
        """Tensors that no tier computes with, by prefix."""
        return tuple(each for tier in self.tiers for each in tier.apart)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    @property
    def reason(self) -> str | None:
        """Why it is not pass: a failed tier's reason, else an unsure one's; bytes, which know no module, come last."""
        told = [tier for tier in self.tiers if tier.status in ("fail", "inconclusive") and tier.reason is not None]
        told.sort(key=lambda tier: (tier.status == "inconclusive", tier.name == "bytes"))
        return told[0].reason if told else None if self.verdict == "pass" else "no tier was run"

    def to_json(self) -> dict[str, Any]:
        """The documented object."""
        found = asdict(self)
        found |= {"schema_version": SCHEMA_VERSION, "command": "verify", "verdict": self.verdict, "reason": self.reason}
        found["not_run"] = [
            {"prefix": each.prefix, "tensors": each.tensors, "bytes": each.bytes, "why": each.why}
            for each in self.not_run
        ]
        found["ranks"] = [{"rank": rank, "bytes": size} for rank, size in enumerate(found.pop("bytes_per_rank"))]
        for tier in found["tiers"]:
            tier["modules"] = tier.pop("findings")
            del tier["apart"]
            for finding in tier["modules"]:
                del finding["inside"]
        return dict(_plain(found))


def _plain(value: Any) -> Any:
    """A value as JSON has it: keys sorted, numbers that it cannot hold as strings."""
    if isinstance(value, Mapping):
        return {key: _plain(value[key]) for key in sorted(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value
