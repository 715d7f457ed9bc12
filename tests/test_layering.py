"""The two walls: bytes are planned and moved without torch, and the verifier shares nothing with what it verifies."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tpshard

PACKAGE = Path(tpshard.__file__).parent
MODULES = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
WITH_TORCH = {"tpshard.storage.torch_pickle", "tpshard.api.load", "tpshard.verifier.launch", "tpshard.verifying"} | {
    "tpshard.cli.torch_facts"
}
"""The modules outside `verify` that may import torch, and be imported only where something needs it."""
BEHIND_THE_WALL = {"architecture", "matching", "rules", "schemes", "layout", "planning", "lower", "execute", "box"} | {
    "formats",
    "model",
    "api",
    "nested",
    "lexicon",
    "draft",
    "drafting",
}


def imported(path: Path, module: str, *, whole_file: bool = True) -> Iterator[str]:
    """The modules that a file imports; without `whole_file` only those that importing it imports."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if whole_file else _at_import(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            yield from (ast.literal_eval(arg) for arg in node.args if isinstance(arg, ast.Constant))


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not functions' bodies, not `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_import(child)


VERIFY = sorted(name for name in MODULES if f"{name}.".startswith("tpshard.verify."))
CORE = sorted(MODULES.keys() - WITH_TORCH - set(VERIFY))


@pytest.mark.parametrize("module", CORE)
def test_no_core_module_imports_torch(module: str) -> None:
    for name in imported(MODULES[module], module):
        assert name.split(".")[0] not in ("torch", "transformers", "safetensors"), name


@pytest.mark.parametrize("module", CORE)
def test_what_needs_torch_is_imported_only_when_it_is_needed(module: str) -> None:
    for name in imported(MODULES[module], module, whole_file=False):
        late = (*WITH_TORCH, "tpshard.verify", "numpy")
        assert not any(name == other or name.startswith(f"{other}.") for other in late), name


@pytest.mark.parametrize("module", VERIFY)
def test_the_verifier_imports_nothing_of_the_split(module: str) -> None:
    for name in imported(MODULES[module], module):
        parts = name.split(".")
        assert parts[0] != "tpshard" or len(parts) < 2 or parts[1] not in BEHIND_THE_WALL, name


def test_the_scan_sees_every_kind_of_import(tmp_path: Path) -> None:
    """The walls would hold against nothing if the scan were blind."""
    source = (
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\n"
        "def f():\n    from g import h\n    importlib.import_module('i')\n"
        "try:\n    import j\nexcept ImportError: pass\n"
    )
    path = tmp_path / "module.py"
    path.write_text(source)
    assert set(imported(path, "module")) == {"a.b", "c", "c.d", "e", "g", "g.h", "i", "j"}
    assert set(imported(path, "module", whole_file=False)) == {"a.b", "c", "c.d", "j"}
    assert {"tpshard.planning.layout", "tpshard.formats.native"} <= set(
        CORE
    ) and "tpshard.verifier.builtin.layers" in VERIFY


def modules_after(script: str, *arguments: str) -> set[str]:
    """Run Python code in a process of its own; the modules that it has then."""
    code = f"{script}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_verify_does_not_load_what_it_verifies() -> None:
    """Nor does anything that it imports."""
    script = "\n".join(f"import {name}" for name in VERIFY if not name.endswith("__main__"))
    loaded = modules_after(script)
    assert "tpshard.verifier.builtin.layers" in loaded
    assert not {name for name in loaded if name.startswith("tpshard.") and name.split(".")[1] in BEHIND_THE_WALL}


@pytest.mark.parametrize(
    ("script", "needed"),
    [
        ("import tpshard", "tpshard"),
        ("import tpshard.cli", "tpshard.cli"),
        ("import tpshard\ntpshard.verify", "tpshard.verify"),
        ("import tpshard, sys\ntpshard.plan(sys.argv[1], 4)", "tpshard.planning.layout"),
        (
            "import tpshard, sys\nmodel, out = sys.argv[1:]\ntpshard.split(model, 4, out)\n"
            "tpshard.check(out)\ntpshard.check(out, model)\n"
            "tpshard.reshard(out, 2, out + '-2')\ntpshard.merge(out, out + '-merged')\ntpshard.inspect(out)",
            "tpshard.execute",
        ),
    ],
)
def test_torch_stays_away(script: str, needed: str, made: Callable[..., Path], tmp_path: Path) -> None:
    loaded = modules_after(script, str(made("llama-gqa")), str(tmp_path / "out"))
    assert needed in loaded
    assert not loaded & {"torch", "numpy", "transformers", "safetensors"}


def test_a_split_does_not_import_what_only_a_plan_shows(made: Callable[..., Path], tmp_path: Path) -> None:
    """It takes less than a second, and imports count."""
    model, out = str(made("llama-gqa")), str(tmp_path / "out")
    loaded = modules_after("import tpshard, sys\ntpshard.split(sys.argv[1], 4, sys.argv[2])", model, out)
    assert "tpshard.report" in loaded and "tpshard.report.capacity" not in loaded
    assert "tpshard.report.capacity" in modules_after(
        "import tpshard, sys\ntpshard.plan(sys.argv[1], 4).to_json()", model
    )


def test_a_cast_is_what_needs_torch(made: Callable[..., Path], tmp_path: Path) -> None:
    script = "import tpshard, sys\ntpshard.split(sys.argv[1], 2, sys.argv[2], dtype='bfloat16')"
    assert "torch" in modules_after(script, str(made("llama-gqa")), str(tmp_path / "out"))


@pytest.mark.parametrize("command", [["--help"], ["archs"], ["plan", "MODEL", "--tp", "4"]])
def test_the_commands_start_without_torch(command: list[str], made: Callable[..., Path]) -> None:
    arguments = [str(made("llama-gqa")) if word == "MODEL" else word for word in command]
    script = (
        "import sys, contextlib, io\nfrom tpshard import cli\nsys.argv[0] = 'tpshard'\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n    cli.main()\n"
        "assert out.getvalue()"
    )
    loaded = modules_after(script, *arguments)
    assert "tpshard.cli" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "huggingface_hub"}
