"""What mkdocs calls to build the site, and `python docs/build.py SITE`, which looks whether it fetches anything."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
CLI = "reference/cli.md"
COMPLETION = """What `--help` prints.

`tpshard --install-completion` teaches the shell that it is called from (bash, zsh, fish or PowerShell) to complete
commands and options, from its next start on; `tpshard --show-completion` prints what it would add."""
SECTIONS = ("how-to", "reference", "explanation", "benchmarks")


def cli_reference() -> str:
    """The help of every command, as the command line prints it."""
    import typer

    from tpshard.cli import app

    pages = ["# Command line", COMPLETION]

    def add(command: Any, name: str, parent: Any) -> None:
        context = command.make_context(name, [], parent=parent, resilient_parsing=True, terminal_width=100)
        pages.append(f"## {context.command_path}\n\n```text\n{command.get_help(context).strip()}\n```")
        for sub in sorted(getattr(command, "commands", {})):
            add(command.commands[sub], sub, context)

    add(typer.main.get_command(app), "tpshard", None)
    return "\n\n".join(pages) + "\n"


def on_config(config: Any) -> Any:
    """The navigation: every page that is there, by section and name."""
    config.nav = ["index.md", "tutorial.md"]
    for section in SECTIONS:
        pages = {path.relative_to(DOCS).as_posix() for path in (DOCS / section).glob("*.md")}
        pages |= {CLI} if section == "reference" else set()
        front = {f"{section}/README.md"}
        config.nav.append({section.capitalize(): [*sorted(pages & front), *sorted(pages - front)]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Put the page of the command line among the others."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, CLI, content=cli_reference()))
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
