"""Every command that README and docs show: run here, page by page, or marked with the reason why not.

Each fenced block names its language. One in bash has a comment before it: `<!-- run -->`, `<!-- run: KIND -->` with a
kind that this file knows, or `<!-- not run: REASON -->`; one in python may, and is a program of its own. The
blocks of a page are one script, as a reader types them.
`<!-- file: NAME -->` before a block of another language saves it under that name. What pages take for granted lies
where they run: see `place`.
"""

from __future__ import annotations

import html
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import typer

import tpshard
from tests.helpers.checkpoints import make
from tpshard.api import convert as api
from tpshard.cli.main import app
from tpshard.errors import TpshardError
from tpshard.execute.publish import Settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>\S*)\n(?P<text>.*?)^(?P=indent)(?P=fence)$", re.M | re.S
)
MARK = re.compile(r"<!-- (?P<what>run|not run|file)(: (?P<detail>[^>]+?))? -->\n *$")
SHELL = ("bash", "sh", "shell", "console")
KINDS = {None, "signing"}
GENERATED = ("cli.md", "python-api.md")
"""Pages that docs/build.py makes."""


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, its text, and the mark before it."""

    page: Path
    line: int
    language: str
    text: str
    what: str | None
    detail: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in FENCE.finditer(text):
        mark = MARK.search(text, 0, found.start() + len(found["indent"]))
        body = "".join(line.removeprefix(found["indent"]) for line in found["text"].splitlines(keepends=True))
        what, detail = (mark["what"], mark["detail"]) if mark else (None, None)
        yield Block(page, text.count("\n", 0, found.start()) + 1, found["language"], body, what, detail)


def script(found: list[Block], kind: Callable[[str | None], bool]) -> str:
    """The commands of a page's blocks, with what saves its files."""
    parts = []
    for block in found:
        if block.what == "file":
            assert block.detail is not None
            parts.append(f"cat > {shlex.quote(block.detail)} <<'END_OF_FILE'\n{block.text}END_OF_FILE\n")
        elif block.what == "run" and kind(block.detail):
            text = block.text if block.language == "bash" else f"python <<'END_OF_FILE'\n{block.text}END_OF_FILE\n"
            parts.append(f"echo '# {block}'\n{text}")
    return "".join(parts)


def run(commands: str, place: Path, *before: Path) -> str:
    """Run a script as in a terminal that ends at the first failure; what it printed. `before` come first in PATH."""
    path = os.pathsep.join(map(str, [*before, Path(sys.executable).parent, os.environ["PATH"]]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", commands], cwd=place, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\nexit code {done.returncode}"
    return done.stdout


@pytest.fixture(scope="session")
def even(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with a vocab that divides, as Meta's and DeepSeek's code want it, by the name that pages give them."""
    place = tmp_path_factory.mktemp("even")
    variants = {"Llama-2-13b-hf": "llama-bf16", "DeepSeek-V3": "deepseek_v3"}
    return {name: make(variant, place / name, vocab_size=256) for name, variant in variants.items()}


@pytest.fixture
def place(made: Callable[..., Path], even: dict[str, Path], tmp_path: Path) -> Path:
    """A directory to work in: models, a split that somebody has published, checkpoints of Megatron with a config.json
    beside, a model of a family without rules."""
    for name, model in even.items():
        (tmp_path / name).symlink_to(model)
    (tmp_path / "Llama-3.1-8B").symlink_to(made("llama-bf16"))
    api.split(tmp_path / "Llama-3.1-8B", 4, tmp_path / "published", settings=Settings(fsync=False))
    api.split(tmp_path / "Llama-3.1-8B", 2, tmp_path / "checkpoints", format="megatron", settings=Settings(fsync=False))
    for file in ("tpshard.json", "SHA256SUMS", "rank-00000-of-00002.json", "rank-00001-of-00002.json"):
        (tmp_path / "checkpoints" / file).unlink()
    family = shutil.copytree(made("llama-bf16"), tmp_path / "new-family")
    config = json.loads((family / "config.json").read_text())
    (family / "config.json").write_text(json.dumps(config | {"model_type": "new_family"}))
    return tmp_path


def test_every_command_is_run_or_says_why_not() -> None:
    wrong = []
    for block in (block for page in PAGES for block in blocks(page)):
        if not block.language:
            wrong.append(f"{block}: name the block's language; `text` where it is none")
        elif block.language in SHELL and block.what not in ("run", "not run"):
            wrong.append(f"{block}: run it, or say why not: see tests/test_docs.py")
        elif block.language not in (*SHELL, "python") and block.what in ("run", "not run"):
            wrong.append(f"{block}: only bash and python are run")
        elif block.what == "run" and (block.language not in ("bash", "python") or block.detail not in KINDS):
            wrong.append(f"{block}: no block is run so")
        elif block.what == "not run" and not block.detail:
            wrong.append(f"{block}: not run, for which reason?")
        elif block.language == "text" and re.search(r"^(\$ )?(tpshard|pip|make|torchrun) ", block.text, re.M):
            wrong.append(f"{block}: commands are bash")
    assert not wrong, "\n".join(wrong)


RUN = [page for page in PAGES if any(b.what == "run" and b.detail != "signing" for b in blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_run(page: Path, place: Path, warm: Path) -> None:
    printed = run(script(list(blocks(page)), lambda kind: kind != "signing"), place, warm)
    assert printed.startswith("# ")
    if page.name == "tutorial.md":
        assert "equal to every byte of tiny" in printed and "PASS: tiny-tp2" in printed
        assert "rank-00001-of-00002.safetensors: " in printed and "exit code 1" in printed


def test_a_failing_command_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("1. x\n\n   <!-- run -->\n   ```bash\n   false\n   echo later\n   ```\n\n```bash\ntrue\n```\n")
    first, second = blocks(page)
    assert (first.what, first.text, first.line) == ("run", "false\necho later\n", 4) and second.what is None
    with pytest.raises(AssertionError, match="exit code 1"):
        run(first.text, tmp_path)


def loaded(name: str) -> ModuleType:
    """A script of docs/, imported."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build() -> ModuleType:
    return loaded("build")


def test_a_site_that_fetches_from_others_is_found_out(build: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="https://x/y">y</a><link rel="canonical" href="https://x/z"><img src="i.png">'
    )
    assert build.fetched(tmp_path) == []
    (tmp_path / "b.html").write_text('<link rel="stylesheet" href="https://f/css"><script src="//c/j.js"></script>')
    (tmp_path / "c.css").write_text('@import "https://f/other.css"; a { background: url(data:image/png;base64,) }')
    (tmp_path / "d.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg"><style>@font-face{src:url("//f/x")}</style>'
    )
    assert build.fetched(tmp_path) == [
        "b.html: https://f/css", "b.html: //c/j.js", "c.css: https://f/other.css", "d.svg: //f/x"
    ]  # fmt: skip


def test_the_picture_is_of_the_commands_that_its_script_runs() -> None:
    drawn = html.unescape((ROOT / "docs/images/run.svg").read_text()).replace("\xa0", " ")
    commands = loaded("picture").COMMANDS
    assert len(commands) > 3 and all(f"$ {command}<" in drawn for command in commands)


def test_the_shell_completes_commands(tmp_path: Path) -> None:
    # Two commands, so that bash does not become the first: typer looks for the shell among the parent processes.
    assert "complete -o default" in run("tpshard --show-completion && true", tmp_path)
    asked = "_TPSHARD_COMPLETE=complete_bash COMP_WORDS='tpshard re' COMP_CWORD=1 tpshard"
    assert run(asked, tmp_path).split() == ["reshard"]


def test_the_reference_has_every_command_and_option(build: ModuleType) -> None:
    sections = dict(re.findall(r"^## (tpshard[^\n]*)\n(.*?)(?=^## |\Z)", build.cli_reference(), re.M | re.S))
    seen = 0

    def look(command: typer.core.TyperCommand, name: str) -> None:
        nonlocal seen
        seen += 1
        for parameter in command.params:
            for option in getattr(parameter, "opts", []):
                assert not option.startswith("-") or option in sections[name], (name, option)
        for sub, inner in getattr(command, "commands", {}).items():
            look(inner, f"{name} {sub}")

    look(typer.main.get_command(app), "tpshard")  # type: ignore[arg-type]
    assert seen == len(sections) > 8


def test_the_reference_has_every_public_name_and_parameter(build: ModuleType) -> None:
    page = build.python_reference()
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert set(sections) >= set(tpshard.__all__) - {"__version__"}
    for name in ("plan", "split", "merge", "reshard", "check", "inspect", "load_rank", "advise", "verify", "Settings"):
        about = getattr(tpshard, name)
        for parameter in inspect.signature(about).parameters.values():
            if parameter.kind is not parameter.VAR_KEYWORD:
                assert re.search(rf"^    {parameter.name}: ", sections[name], re.M), (name, parameter.name)
    for kind in TpshardError.__subclasses__():
        assert f"`{kind.__name__}`" in sections["errors"] and f"`{kind.code}`" in sections["errors"]


def test_every_page_is_linked_to_something_that_is_there() -> None:
    for page in PAGES:
        text = FENCE.sub("", page.read_text())
        for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text):
            generated = (page.parent / target).resolve() in (ROOT / "docs/reference" / each for each in GENERATED)
            assert generated or (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
