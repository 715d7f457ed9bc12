"""A verdict, or the error in its place, as JSON, JUnit XML, Markdown and HTML."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from tpshard.errors import LocalIOError, TpshardError, UsageError
from tpshard.verifier.report.page import error_page, to_html
from tpshard.verifier.report.verdict import SCHEMA_VERSION, Verdict
from tpshard.verifier.report.wording import caught, reasons, rows


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


def to_markdown(verdict: Verdict) -> str:
    """A summary for a CI step."""
    lines = [f"## tpshard verify: {verdict.verdict}", ""]
    if verdict.reason:
        lines += [verdict.reason, ""]
    lines += [f"`{verdict.shards}` (tp {verdict.tp}) against `{verdict.source}` ({verdict.model_type})", ""]
    lines += ["| tier | status | figures | worst place |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows(verdict)]
    lines += ["", *(f"- {reason}" for reason in reasons(verdict))]
    lines += ["", caught(verdict) + "."] if verdict.canaries else []
    lines += [f"- warning: {warning}" for warning in verdict.warnings]
    return "\n".join(lines) + "\n"


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


KINDS: Mapping[str, tuple[Callable[[Verdict], str], Callable[[TpshardError, str], str]]] = {
    ".json": (to_json, lambda error, shards: json.dumps(error_json(error), indent=2, sort_keys=True) + "\n"),
    ".xml": (to_junit, _error_junit),
    ".md": (to_markdown, lambda error, shards: f"## tpshard verify: error\n\n`{shards}`: {_told(error)}\n"),
    ".html": (to_html, error_page),
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
