"""What mkdocs calls to build the site, and `python docs/build.py SITE`, which looks whether it fetches anything."""

from __future__ import annotations

import ast
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "tpshard"
CLI = "reference/cli.md"
PYTHON = "reference/python-api.md"
PUBLIC = {
    "api/convert": ("plan", "split", "merge", "reshard"),
    "api/check": ("check",),
    "api/inspect": ("inspect",),
    "api/load": ("load_rank",),
    "api/verify": ("verify",),
    "verifier/options": ("VerifyOptions",),
    "api/advise": ("advise",),
    "report/advice": ("Advice", "TpChoice"),
    "execute/publish": ("Settings",),
    "report/capacity": ("Workload",),
    "report/results": ("PlanReport", "WriteReport", "RankPart", "CheckReport", "Difference", "InspectReport"),
    "storage/safetensors": ("TensorInfo",),
    "verifier/report/verdict": ("Verdict", "Tier", "Place", "Finding", "Canary"),
}
"""By module, what a program calls, and what it gets."""
COMPLETION = """What `--help` prints.

`tpshard --install-completion` teaches the shell that it is called from (bash, zsh, fish or PowerShell) to complete
commands and options, from its next start on; `tpshard --show-completion` prints what it would add."""
CHANGES = "changelog.md"
MENU: dict[str, tuple[str, ...]] = {
    "Start": ("index.md", "install.md", "tutorial.md"),
    "Release models": ("how-to/ci.md", "how-to/sign.md", "how-to/reproduce.md"),
    "Serve models": ("how-to/engines.md", "how-to/two-nodes.md", "how-to/cluster.md", "explanation/numbers.md"),
    "Large and new models": ("how-to/large-models.md", "how-to/own-architecture.md"),
    "Look up": (
        CLI,
        "reference/formats.md",
        "reference/architectures.md",
        "reference/exit-codes.md",
        "reference/json.md",
        "reference/manifest.md",
        "reference/rules.md",
        "reference/python.md",
        PYTHON,
        CHANGES,
    ),
    "Understand": (
        "explanation/parallelism.md",
        "explanation/gqa.md",
        "explanation/bf16.md",
        "explanation/verdict.md",
        "explanation/design.md",
        "explanation/other-tools.md",
        "explanation/limits.md",
    ),
}
"""The site's menu, by what a reader wants to do; measurements follow, the newest first."""


def cli_reference() -> str:
    """The help of every command, as the command line prints it."""
    import typer

    from tpshard.cli.main import app

    pages = ["# Command line", COMPLETION]

    def add(command: Any, name: str, parent: Any) -> None:
        context = command.make_context(name, [], parent=parent, resilient_parsing=True, terminal_width=100)
        pages.append(f"## {context.command_path}\n\n```text\n{command.get_help(context).strip()}\n```")
        for sub in sorted(getattr(command, "commands", {})):
            add(command.commands[sub], sub, context)

    add(typer.main.get_command(app), "tpshard", None)
    return "\n\n".join(pages) + "\n"


def _defined(module: str) -> list[ast.FunctionDef | ast.ClassDef]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    return [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def _parameters(of: ast.arguments) -> list[str]:
    """Each parameter with its type and default."""
    plain = [*of.posonlyargs, *of.args]
    pairs = [*zip(plain, [None] * (len(plain) - len(of.defaults)) + of.defaults, strict=True), None]
    pairs += zip(of.kwonlyargs, of.kw_defaults, strict=True)
    texts = []
    for pair in pairs if of.kwonlyargs else pairs[:-1]:
        default = f" = {ast.unparse(pair[1])}" if pair and pair[1] else ""
        texts.append(ast.unparse(pair[0]) + default if pair else "*")
    return texts + ([f"**{ast.unparse(of.kwarg)}"] if of.kwarg else [])


def _entry(node: ast.FunctionDef | ast.ClassDef) -> str:
    """A function's signature and docstring; a class's fields, docstring and what else it has."""
    more = []
    if isinstance(node, ast.FunctionDef):
        result = ast.unparse(node.returns) if node.returns else "None"
        lines = [f"def {node.name}(", *(f"    {each}," for each in _parameters(node.args)), f") -> {result}"]
    else:
        lines = [f"class {node.name}:"]
        lines += [f"    {ast.unparse(each)}" for each in node.body if isinstance(each, ast.AnnAssign)]
        for each in node.body:
            if isinstance(each, ast.FunctionDef) and not each.name.startswith("_"):
                name = each.name if each.decorator_list else f"{each.name}()"
                more.append(f"- `{name}`: {ast.get_docstring(each)}")
    code = "\n".join(lines)
    return "\n\n".join([f"## `{node.name}`", f"```python\n{code}\n```", ast.get_docstring(node) or "", "\n".join(more)])


def python_reference() -> str:
    """Signatures and docstrings of what is public, read from the source: torch need not be there."""
    from tpshard import errors

    pages = ["# Python API", "From the source. [Python](python.md) says how it is used."]
    for module, names in PUBLIC.items():
        found = {node.name: node for node in _defined(module)}
        pages += [_entry(found[name]) for name in names]
    rows = ["| class | `code` | exit code | |", "|---|---|---|---|"]
    for node in _defined("errors"):
        if not isinstance(node, ast.ClassDef):
            continue
        kind = getattr(errors, node.name)
        about = (ast.get_docstring(node) or "").split("\n")[0]
        rows.append(f"| `{node.name}` | `{kind.code}` | {kind.exit_code} | {about} |")
    return "\n\n".join([*pages, "## `errors`", "\n".join(rows)]) + "\n"


def on_config(config: Any) -> Any:
    """The navigation; a page that no menu has is an error."""
    front, *measured = sorted(
        (path.relative_to(DOCS).as_posix() for path in DOCS.glob("benchmarks/*.md")), reverse=True
    )
    menu = {**MENU, "Measurements": (front, *measured)}
    listed = {page for pages in menu.values() for page in pages} - {CLI, PYTHON, CHANGES}
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    if listed != there:
        raise ValueError(f"MENU and the pages differ: {', '.join(sorted(listed ^ there))}")
    config.nav = [{section: list(pages)} for section, pages in menu.items()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Put the pages of the command line, of the functions and of the changes among the others."""
    from mkdocs.structure.files import File

    changes = (DOCS.parent / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    for page, content in ((CLI, cli_reference()), (PYTHON, python_reference()), (CHANGES, changes)):
        files.append(File.generated(config, page, content=content))
    return files


class _Fetched(HTMLParser):
    """What a browser asks for when it opens a page: not links, which wait to be clicked."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") == "canonical":
            return
        names = ("src", "srcset", "data", "poster") if tag != "link" else ("href",)
        self.found += [value for name in names if (value := given.get(name))]


def fetched(site: Path) -> list[str]:
    """What pages, style sheets and drawings of a site take from other servers."""
    found = []
    for page in sorted(site.rglob("*.html")):
        parser = _Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        found += [f"{page.name}: {url}" for url in parser.found if re.match(r"(\w+:)?//", url)]
    for sheet in [*sorted(site.rglob("*.css")), *sorted(site.rglob("*.svg"))]:
        urls = re.findall(r"(?:url\(|@import |href=)[\"']?((?:https?:)?//[^\"')]*)", sheet.read_text(encoding="utf-8"))
        found += [f"{sheet.name}: {url}" for url in urls]
    return found


if __name__ == "__main__":
    site = Path(sys.argv[1])
    if others := fetched(site):
        sys.exit("the site fetches from other servers:\n" + "\n".join(others))
    print(f"{len(list(site.rglob('*.html')))} pages in {site}, nothing fetched from elsewhere")
