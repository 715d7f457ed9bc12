"""A verdict, or the error in its place, as JSON, JUnit XML, Markdown and HTML."""

import json
import re
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from tpshard.errors import LocalIOError, TpshardError, UsageError
from tpshard.units import printable
from tpshard.verifier.report.page import error_page, to_html
from tpshard.verifier.report.verdict import SCHEMA_VERSION, Verdict
from tpshard.verifier.report.wording import caught, reasons, rows


def to_json(verdict: Verdict) -> str:
    """The JSON contract, keys sorted."""
    return json.dumps(verdict.to_json(), indent=2, sort_keys=True) + "\n"


def _case(suite: str, name: str, status: str, said: str) -> str:
    body = ""
    if status in ("fail", "inconclusive", "missed"):
        body = f"<failure type={quoteattr(status)}>{escape(printable(said))}</failure>"
    elif status not in ("pass", "caught"):
        body = f"<skipped message={quoteattr(printable(said))}/>"
    return f'    <testcase classname="tpshard.verify{suite}" name={quoteattr(printable(name))}>{body}</testcase>'


def to_junit(verdict: Verdict) -> str:
    """A test suite with a case per tier and per canary; the reason of a failure is its body."""
    cases = [
        _case("", t.name, t.status, t.reason or ("" if t.status == "skipped" else t.status)) for t in verdict.tiers
    ]
    for canary in verdict.canaries:
        said = "this fault was injected and not noticed" if canary.status == "missed" else canary.status
        cases.append(_case(".canaries", f"canary {canary.tier} {canary.name}", canary.status, said))
    failures, skipped = (sum(mark in case for case in cases) for mark in ("<failure ", "<skipped "))
    counts = f'tests="{len(cases)}" failures="{failures}" errors="0" skipped="{skipped}"'
    head = f'<testsuites {counts}>\n  <testsuite name="tpshard verify" {counts}>'
    return "\n".join(['<?xml version="1.0" encoding="UTF-8"?>', head, *cases, "  </testsuite>", "</testsuites>", ""])


def to_markdown(verdict: Verdict) -> str:
    """A summary for a CI step."""
    lines = [f"## tpshard verify: {verdict.verdict}", ""]
    if verdict.reason:
        lines += [_md(verdict.reason), ""]
    shards, source, model_type = map(_md, (verdict.shards, verdict.source, verdict.model_type))
    lines += [f"{shards} ({verdict.mesh_text}) against {source} ({model_type})", ""]
    lines += ["| tier | status | figures | worst place |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(map(_md, row)) + " |" for row in rows(verdict)]
    lines += ["", *(f"- {_md(reason)}" for reason in reasons(verdict))]
    lines += ["", caught(verdict) + "."] if verdict.canaries else []
    lines += [f"- warning: {_md(warning)}" for warning in verdict.warnings]
    return "\n".join(lines) + "\n"


def _md(text: str) -> str:
    """Text as Markdown shows it, whatever names are in it: no tags, links or emphasis, and no line break."""
    return re.sub(r"([\\`*\[\]|!~])", r"\\\1", escape(printable(text), quote=False))


def _error_markdown(error: TpshardError, shards: str) -> str:
    lines = ["## tpshard verify: error", "", f"{_md(shards)}: {_md(str(error))}"]
    return "\n".join([*lines, *([f"\nhint: {_md(error.hint)}"] if error.hint else [])]) + "\n"


def error_json(error: TpshardError) -> dict[str, Any]:
    """The object in place of a verdict's where nothing could be judged."""
    return {"schema_version": SCHEMA_VERSION, "command": "verify", "error": error.to_json(), "verdict": "error"}


def _error_junit(error: TpshardError, shards: str) -> str:
    counts = 'tests="1" failures="0" errors="1" skipped="0"'
    told = printable(str(error)) + (f"\nhint: {printable(error.hint)}" if error.hint else "")
    body = f"<error type={quoteattr(error.code)}>{escape(told)}</error>"
    case = f'<testcase classname="tpshard.verify" name={quoteattr(printable(shards))}>{body}</testcase>'
    suite = f'<testsuite name="tpshard verify" {counts}>{case}</testsuite>'
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites {counts}>\n  {suite}\n</testsuites>\n'


KINDS: Mapping[str, tuple[Callable[[Verdict], str], Callable[[TpshardError, str], str]]] = {
    ".json": (to_json, lambda error, shards: json.dumps(error_json(error), indent=2, sort_keys=True) + "\n"),
    ".xml": (to_junit, _error_junit),
    ".md": (to_markdown, _error_markdown),
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
