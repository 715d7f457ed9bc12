"""A verdict in words and short figures, as the terminal and every report put them."""

import math
from collections.abc import Sequence
from typing import Any

from tpshard.units import human_bytes
from tpshard.verifier.report.verdict import Place, Verdict


def figure(value: float) -> str:
    """Three digits, or an exponent."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _where(place: Place | None) -> str:
    if place is None:
        return ""
    rank = "" if place.rank is None else f", rank {place.rank}"
    return f"{place.module}{rank} ({figure(place.error)})"


def rows(verdict: Verdict) -> list[tuple[str, str, str, str]]:
    """Per tier: name, status, the judged figures with their limits, the worst place."""
    found = []
    for tier in verdict.tiers:
        judged = [
            f"{name} {figure(tier.metrics[name])} (limit {figure(limit)})"
            for name, limit in tier.thresholds.items()
            if name in tier.metrics
        ]
        found.append((tier.name, tier.status, ", ".join(judged), _where(tier.first or tier.worst)))
    return found


def reasons(verdict: Verdict) -> list[str]:
    """What each tier that did not pass says, unless it is the verdict's own reason; and what was proved in part."""
    said = [f"{t.name}: {t.reason}" for t in verdict.tiers if t.reason is not None and t.reason != verdict.reason]
    return said + _notes(verdict)


def caught(verdict: Verdict) -> str:
    """How many canaries were noticed."""
    counts = [canary.status for canary in verdict.canaries]
    return f"{counts.count('caught')} of {len(counts)} faults injected on purpose were noticed"


def _notes(verdict: Verdict) -> list[str]:
    """What was proved in part: tensors that nothing computes with, and those whose order only a run can judge."""
    said = [
        f"not run: {each.prefix} ({each.tensors} {'tensors' if each.tensors > 1 else 'tensor'}, "
        f"{human_bytes(each.bytes)}): {each.why}"
        for each in verdict.not_run
    ]
    if running := [name for tier in verdict.tiers for name in tier.by_running]:
        what = "held by the ranks together; that each holds its own is proved by running"
        said.append(f"{len(running)} tensors are {what}: {_some(running)}")
    return said


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def plain(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return "all" if value is None else str(value)
