"""A verdict as JSON, JUnit XML, Markdown and self-contained HTML."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from tpshard.errors import LocalIOError, TpshardError, UsageError
from tpshard.verify.verdict import SCHEMA_VERSION, Place, Tier, Verdict, layer_of


def to_json(verdict: Verdict) -> str:
    """The JSON contract, keys sorted."""
    return json.dumps(verdict.to_json(), indent=2, sort_keys=True) + "\n"


def to_junit(verdict: Verdict) -> str:
    """A test suite with a case per tier and per canary; the reason of a failure is its body."""
    cases = []
    failures = skipped = 0
    for tier in verdict.tiers:
        body = ""
        if tier.status in ("fail", "inconclusive"):
            failures += 1
            body = f"<failure type={quoteattr(tier.status)}>{escape(tier.reason or tier.status)}</failure>"
        elif tier.status == "skipped":
            skipped += 1
            body = f"<skipped message={quoteattr(tier.reason or '')}/>"
        cases.append(f'    <testcase classname="tpshard.verify" name={quoteattr(tier.name)}>{body}</testcase>')
    for canary in verdict.canaries:
        body = ""
        if canary.status == "missed":
            failures += 1
            body = '<failure type="missed">this fault was injected and not noticed</failure>'
        elif canary.status != "caught":
            skipped += 1
            body = f"<skipped message={quoteattr(canary.status)}/>"
        name = quoteattr(f"canary {canary.tier} {canary.name}")
        cases.append(f'    <testcase classname="tpshard.verify.canaries" name={name}>{body}</testcase>')
    counts = f'tests="{len(cases)}" failures="{failures}" errors="0" skipped="{skipped}"'
    head = f'<testsuites {counts}>\n  <testsuite name="tpshard verify" {counts}>'
    return "\n".join(['<?xml version="1.0" encoding="UTF-8"?>', head, *cases, "  </testsuite>", "</testsuites>", ""])


def _figure(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _where(place: Place | None) -> str:
    if place is None:
        return ""
    rank = "" if place.rank is None else f", rank {place.rank}"
    return f"{place.module}{rank} ({_figure(place.error)})"


def rows(verdict: Verdict) -> list[tuple[str, str, str, str]]:
    """Per tier: name, status, the judged figures with their limits, the worst place."""
    found = []
    for tier in verdict.tiers:
        judged = [
            f"{name} {_figure(tier.metrics[name])} (limit {_figure(limit)})"
            for name, limit in tier.thresholds.items()
            if name in tier.metrics
        ]
        found.append((tier.name, tier.status, ", ".join(judged), _where(tier.first or tier.worst)))
    return found


def caught(verdict: Verdict) -> str:
    count = sum(canary.status == "caught" for canary in verdict.canaries)
    return f"{count} of {len(verdict.canaries)} faults injected on purpose were noticed"


def to_markdown(verdict: Verdict) -> str:
    """A summary for a CI step."""
    lines = [f"## tpshard verify: {verdict.verdict}", ""]
    if verdict.reason:
        lines += [verdict.reason, ""]
    lines += [f"`{verdict.shards}` (tp {verdict.tp}) against `{verdict.source}` ({verdict.model_type})", ""]
    lines += ["| tier | status | figures | worst place |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows(verdict)]
    lines += ["", caught(verdict) + "."]
    lines += [f"- warning: {warning}" for warning in verdict.warnings]
    return "\n".join(lines) + "\n"


def _plot(tier: Tier, tp: int) -> str:
    """Error of every module of every rank, on a logarithmic axis, as inline SVG."""
    findings = [f for f in tier.findings if math.isfinite(f.error)]
    if not findings:
        return ""
    modules = list(dict.fromkeys(f.module for f in tier.findings))
    limits = [limit for name, limit in tier.thresholds.items() if name in ("relative_error", "ratio")]
    values = [max(f.error, 1e-18) for f in findings] + limits
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    width, height, left = 900, 260, 60

    def x(i: float) -> float:
        return left + (width - left - 10) * (i + 0.5) / len(modules)

    def y(error: float) -> float:
        return 10 + (height - 40) * (high - math.log10(max(error, 1e-18))) / (high - low)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="error per module and rank">']
    step = max(1, (high - low) // 8)
    for power in range(low, high + 1, step):
        at = y(10.0**power)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 10}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>')
    for limit in limits:
        parts.append(f'<line class="limit" x1="{left}" x2="{width - 10}" y1="{y(limit):.1f}" y2="{y(limit):.1f}"/>')
    last = None
    for i, module in enumerate(modules):
        layer = layer_of(module)
        if layer is not None and layer != last and (layer % max(1, len(modules) // 60) == 0):
            parts.append(f'<text x="{x(i):.1f}" y="{height - 12}" text-anchor="middle">{layer}</text>')
        last = layer
    index = {module: i for i, module in enumerate(modules)}
    for f in findings:
        hue = round(360 * f.rank / max(tp, 1))
        title = escape(f"{f.module}, rank {f.rank}: {_figure(f.error)}")
        parts.append(
            f'<circle cx="{x(index[f.module]):.1f}" cy="{y(f.error):.1f}" r="3" fill="hsl({hue} 70% 45%)">'
            f"<title>{title}</title></circle>"
        )
    return "".join(parts) + "</svg>"


_STYLE = """
:root { color-scheme: light dark; font-family: system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8884; vertical-align: top; }
.pass { color: #197a36; } .fail { color: #c0262d; } .inconclusive { color: #a15c00; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: currentColor; }
.grid { stroke: #8884; } .limit { stroke: #c0262d; stroke-dasharray: 6 4; }
"""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def to_html(verdict: Verdict) -> str:
    """One page that needs no network: verdict, tiers, error per module and rank, ranks, canaries, environment."""
    what = f"{verdict.shards} (tp {verdict.tp}) against {verdict.source} ({verdict.model_type})"
    parts = [f"<p>{escape(what)}</p>"]
    if verdict.reason:
        parts.append(f"<p><strong>{escape(verdict.reason)}</strong></p>")
    parts += [f"<p>Warning: {escape(warning)}</p>" for warning in verdict.warnings]
    parts.append(_table(("tier", "status", "figures", "worst place"), [*rows(verdict)]))
    for tier in verdict.tiers:
        plot = _plot(tier, verdict.tp)
        if plot:
            kind = "relative error" if tier.name == "exact" else "error in units of the unsharded model's"
            parts.append(
                f"<h2>{escape(tier.name)}: {kind} per module</h2>{plot}"
                "<p>One dot per module and rank; numbers below are layers; dashed: the limit.</p>"
            )
    sizes = [(str(rank), f"{size:,}") for rank, size in enumerate(verdict.bytes_per_rank)]
    parts.append("<h2>Bytes per rank</h2>" + _table(("rank", "bytes"), [*sizes]))
    birds = [(c.tier, c.name, c.status, _figure(c.error)) for c in verdict.canaries]
    parts.append(f"<h2>Canaries</h2><p>{escape(caught(verdict))}.</p>")
    parts.append(_table(("tier", "fault", "status", "error"), [*birds]))
    about = [(key, str(value)) for key, value in [*verdict.settings.items(), *verdict.volatile.items()]]
    parts.append("<h2>Settings and environment</h2>" + _table(("what", "value"), [*about]))
    return _page(verdict.verdict, "".join(parts))


def _page(verdict: str, body: str) -> str:
    title = f"tpshard verify: {verdict}"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    top = f'<h1>tpshard verify: <span class="{verdict}">{verdict}</span></h1>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{top}{body}</body></html>\n'


def error_json(error: TpshardError) -> dict[str, Any]:
    """The object in place of a verdict's where nothing could be judged."""
    return {"schema_version": SCHEMA_VERSION, "command": "verify", "error": error.to_json(), "verdict": "error"}


def _error_junit(error: TpshardError, shards: str) -> str:
    counts = 'tests="1" failures="0" errors="1" skipped="0"'
    body = f"<error type={quoteattr(error.code)}>{escape(_told(error))}</error>"
    case = f'<testcase classname="tpshard.verify" name={quoteattr(shards)}>{body}</testcase>'
    suite = f'<testsuite name="tpshard verify" {counts}>{case}</testsuite>'
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites {counts}>\n  {suite}\n</testsuites>\n'


def _told(error: TpshardError) -> str:
    return str(error) if error.hint is None else f"{error}\nhint: {error.hint}"


def _error_html(error: TpshardError, shards: str) -> str:
    about = [(key, str(value)) for key, value in error.to_json().items() if value is not None]
    body = f"<p>{escape(shards)}</p><p><strong>{escape(error.message)}</strong></p>" + _table(
        ("what", "value"), [*about]
    )
    return _page("error", body)


KINDS: Mapping[str, tuple[Callable[[Verdict], str], Callable[[TpshardError, str], str]]] = {
    ".json": (to_json, lambda error, shards: json.dumps(error_json(error), indent=2, sort_keys=True) + "\n"),
    ".xml": (to_junit, _error_junit),
    ".md": (to_markdown, lambda error, shards: f"## tpshard verify: error\n\n`{shards}`: {_told(error)}\n"),
    ".html": (to_html, _error_html),
}
"""By a file's ending: the report of a verdict, and of an error, given the name of the shards."""


def check_kind(path: Path) -> None:
    """UsageError for an ending of which there is no report, before anything is run."""
    if path.suffix not in KINDS:
        raise UsageError("unknown kind of report", path=path, expected="a file ending in " + ", ".join(KINDS))


def write(verdict: Verdict, path: Path) -> None:
    """Write the report that the file's ending asks for."""
    check_kind(path)
    _write(KINDS[path.suffix][0](verdict), path)


def write_error(error: TpshardError, shards: str, path: Path) -> None:
    """Write the report of a verification that ended in an error."""
    check_kind(path)
    _write(KINDS[path.suffix][1](error, shards), path)


def _write(text: str, path: Path) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LocalIOError(f"cannot write the report: {error.strerror}", path=path) from error
