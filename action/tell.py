"""Tell a workflow what one tpshard command found: annotations, the job's summary, the step's outputs.

    tell.py plan|split|check|verify REPORTS EXIT_CODE

Reads REPORTS/COMMAND.json. Annotations go to stdout, the rest to the files that GITHUB_STEP_SUMMARY and GITHUB_OUTPUT
name. For check it also writes check.md and check.xml; verify writes its own. Its own exit code says nothing about the
model: the step ends with that of the command.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

ANNOTATIONS = 10
"""More of one step are not shown."""
ROWS = 200
"""A summary has a limit of 1 MiB."""


@dataclass(frozen=True)
class Finding:
    """What is wrong, and where: a file of the output, a tensor or module in it."""

    title: str
    message: str
    file: str = ""


def annotation(finding: Finding) -> str:
    """A workflow command; what would end it early is escaped as the runner reads it."""
    title = _property(f"tpshard {finding.title}")
    place = f",file={_property(finding.file)}" if finding.file else ""
    return f"::error title={title}{place}::{_data(finding.message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def failures(command: str, result: dict[str, Any], code: int) -> list[Finding]:
    """Everything that is wrong with a command's result, in the order of its JSON."""
    if error := result.get("error"):
        hint = f"; hint: {error['hint']}" if error["hint"] else ""
        where = [error[key] for key in ("path", "tensor") if error[key] and error[key] not in error["message"]]
        return [Finding(f"{command}: {error['code']}", "; ".join([error["message"], *where]) + hint)]
    if command == "check":
        return [
            Finding(
                f"check: {each['file']}",
                f"{each['file']}: {each['tensor'] or 'content'}: {each['message']}",
                f"{result['path']}/{each['file']}",
            )
            for each in result["differences"]
        ]
    found = []
    for tier in result.get("tiers", ()):
        if tier["status"] in ("fail", "inconclusive"):
            first = tier["first"] or tier["worst"]
            place = f"; first at {first['module']}, rank {first['rank']}" if first else ""
            found.append(Finding(f"verify: {tier['name']} {tier['status']}", (tier["reason"] or "") + place))
    if code and not found:
        found.append(Finding(f"{command}: exit code {code}", result.get("reason") or f"ended with {code}"))
    return found


def check_markdown(result: dict[str, Any], found: Sequence[Finding]) -> str:
    """What check found, as verify reports its verdict."""
    lines = [f"## tpshard check: {verdict('check', result, found)}", ""]
    if "error" in result:
        return "\n".join([*lines, *(each.message for each in found), ""])
    relation = "is **different** from" if found else "is equal to"
    lines += [f"`{result['path']}` (tp {result['mesh']['tp']}): every byte {relation} `{result['source']}`", ""]
    if found:
        lines += ["| file | tensor | what |", "| --- | --- | --- |"]
        for each in result["differences"][:ROWS]:
            cells = (f"`{each['file']}`", f"`{each['tensor'] or 'content'}`", each["message"])
            lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
        if len(found) > ROWS:
            lines.append(f"\n… and {len(found) - ROWS:,} more; check.json has them all.")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def check_junit(name: str, found: Sequence[Finding]) -> str:
    """What check found, as one test case and its failure."""
    body = "".join(f"{each.message}\n" for each in found)
    inside = f'<failure type="different">{escape(body)}</failure>' if found else ""
    counts = f'tests="1" failures="{int(bool(found))}" errors="0" skipped="0"'
    case = f'<testcase classname="tpshard.check" name={quoteattr(name)}>{inside}</testcase>'
    suite = f'<testsuite name="tpshard check" {counts}>{case}</testsuite>'
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites {counts}>{suite}</testsuites>\n'


def summary(command: str, result: dict[str, Any], found: Sequence[Finding], reports: Path) -> str:
    """What this command adds to the job's summary; plan and split add nothing when all went well."""
    if command in ("check", "verify") and (reports / f"{command}.md").is_file():
        return (reports / f"{command}.md").read_text(encoding="utf-8") + "\n"
    return f"## tpshard {command}: error\n\n" + "".join(f"{each.message}\n\n" for each in found) if found else ""


def verdict(command: str, result: dict[str, Any], found: Sequence[Finding]) -> str:
    """pass, fail, inconclusive or error; of plan and split only error, or nothing yet."""
    if "verdict" in result:
        return str(result["verdict"])
    if "error" in result:
        return "fail" if result["error"]["code"] == "different" else "error"
    return ("fail" if found else "pass") if command == "check" else ""


def main(command: str, directory: str, exit_code: str) -> None:
    """Read the result, tell it."""
    reports, code = Path(directory), int(exit_code)
    path = reports / f"{command}.json"
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError):  # killed, say for want of memory, before it could write its result
        message = f"tpshard {command} ended with exit code {code} and left no result"
        result = {"error": {"code": "internal", "message": message, "path": None, "tensor": None, "hint": None}}
    found = failures(command, result, code)
    for each in found[:ANNOTATIONS]:
        print(annotation(each))
    if command == "check":
        (reports / "check.md").write_text(check_markdown(result, found), encoding="utf-8")
        (reports / "check.xml").write_text(check_junit(result.get("path", "shards"), found), encoding="utf-8")
    with open(os.environ["GITHUB_STEP_SUMMARY"], "a", encoding="utf-8") as file:
        file.write(summary(command, result, found, reports))
    files = {"json": path, "junit": path.with_suffix(".xml"), "markdown": path.with_suffix(".md")}
    with open(os.environ["GITHUB_OUTPUT"], "a", encoding="utf-8") as file:
        file.write(f"verdict={verdict(command, result, found)}\n")
        file.writelines(f"{name}={each}\n" for name, each in files.items() if each.is_file())


if __name__ == "__main__":
    main(*sys.argv[1:])
