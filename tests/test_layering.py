"""The table of rooms: who may import whom. Imports count wherever they stand, also inside a function.

Two walls follow from it: planning and byte moving import no torch, and the verifier shares nothing with what it judges.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import tpshard
from tests.helpers.paths import TESTS

PACKAGE = Path(tpshard.__file__).parent
ROOMS: dict[str, tuple[str, ...]] = {
    "storage": (),
    "planning": ("storage.safetensors", "storage.tensor_names"),
    "rules": ("planning.axes", "planning.experts", "planning.stages", "storage.safetensors", "storage.tensor_names"),
    "formats": ("planning", "storage"),
    "execute": ("planning", "storage"),
    "inputs": ("rules", "formats", "planning", "storage"),
    "report": ("inputs", "formats", "planning", "storage"),
    "verifier": ("inputs.checkpoint", "storage"),
    "api": ("report", "verifier", "inputs", "execute", "formats", "rules", "planning", "storage"),
    "cli": ("api", "report", "verifier.report"),
}
"""What each room may import beside itself; everybody may import `errors` and `units`."""
EVERYBODY = ("tpshard.errors", "tpshard.units")
WITH_TORCH = ("tpshard.execute.device", "tpshard.execute.cast", "tpshard.storage.torch_pickle")
"""The modules outside the verifier that import torch when they are imported."""
LINES = 400


def modules(folder: Path = PACKAGE) -> dict[str, Path]:
    """Every module below a package's folder by its dotted name."""
    names = {path: path.relative_to(folder.parent).with_suffix("").parts for path in folder.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in names.items()}


MODULES = modules()


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not functions' bodies, not `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_import(child)


def _without_types(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from _without_types(child)


def imported(path: Path, nodes: Callable[[ast.AST], Iterable[ast.AST]] = ast.walk) -> set[str]:
    """The modules that a file imports, `a.b` for `from a import b` where `b` is a module of ours."""
    found = set()
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            ours = names & MODULES.keys()
            found |= ours or {str(node.module)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            found |= {ast.literal_eval(arg) for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def room(module: str) -> str:
    """The room of one of our modules; empty for those that lie in none."""
    name = module.split(".")[1] if module.count(".") else ""
    return name if name in ROOMS else ""


def may_import(importer: str, other: str) -> bool:
    """Whether the table lets a module in a room import another of ours."""
    allowed = [f"tpshard.{each}" for each in (room(importer), *ROOMS[room(importer)])]
    return other in EVERYBODY or other == "tpshard" or any(f"{other}.".startswith(f"{each}.") for each in allowed)


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room(name)))
def test_every_import_is_in_the_table(module: str) -> None:
    ours = {name for name in imported(MODULES[module]) if name.split(".")[0] == "tpshard"}
    assert {name for name in ours if not may_import(module, name)} == set()


def test_every_module_is_in_a_room() -> None:
    outside = {name for name in MODULES if not room(name)}
    assert outside == {"tpshard", "tpshard.__main__", *EVERYBODY}
    assert {room(name) for name in MODULES if room(name)} == ROOMS.keys()


def circles(graph: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """The sets of modules that reach each other."""
    reached = {name: reachable(graph, name) for name in graph}
    together = {name: frozenset(o for o in reached[name] if name in reached.get(o, ())) for name in graph}
    return {each for each in together.values() if each}


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """All that a module imports, and all that this imports in turn."""
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        for name in graph.get(ahead.pop(), set()) - seen:
            seen.add(name)
            ahead.append(name)
    return seen


GRAPH = {name: imported(path, _without_types) & MODULES.keys() - {"tpshard"} for name, path in MODULES.items()}


def test_no_circle() -> None:
    assert circles(GRAPH) == set()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {frozenset("abc")}


def test_the_verifier_reaches_nothing_that_made_the_shards() -> None:
    """Followed from import to import: a verifier that classified with the same rules would miss their mistakes."""
    reached = {other for name in MODULES if room(name) == "verifier" for other in reachable(GRAPH, name)}
    assert {name for name in reached if room(name) not in ("", "verifier", "storage", "inputs")} == set()
    assert {name for name in reached if room(name) == "inputs"} == {"tpshard.inputs.checkpoint"}


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room(name) != "verifier"))
def test_torch_is_imported_where_it_is_needed(module: str) -> None:
    heavy = {name.split(".")[0] for name in imported(MODULES[module], _at_import)}
    assert heavy.isdisjoint({"transformers", "safetensors", "numpy", "tqdm", "huggingface_hub"})
    assert ("torch" in heavy) is (module in WITH_TORCH)
    if room(module) != "verifier" and module not in WITH_TORCH:
        assert imported(MODULES[module], _at_import).isdisjoint(WITH_TORCH)


def test_files_fit_a_sitting() -> None:
    sizes = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: size for name, size in sizes.items() if size > LINES} == {}


def test_a_class_has_a_name_of_its_own() -> None:
    classes = Counter(
        node.name
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert {name for name, count in classes.items() if count > 1} == set()


def test_no_two_files_of_the_tests_have_one_name() -> None:
    names = Counter(path.name for path in TESTS.rglob("*.py"))
    assert {name for name, count in names.items() if count > 1} == {"__init__.py"}


def test_the_scan_sees_every_kind_of_import(tmp_path: Path) -> None:
    """The table would hold against nothing if the scan were blind."""
    source = (
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\n"
        "def f():\n    from g import h\n    importlib.import_module('i')\n"
        "try:\n    import j\nexcept ImportError: pass\nfrom tpshard.planning import box\n"
    )
    path = tmp_path / "module.py"
    path.write_text(source)
    assert imported(path) == {"a.b", "c", "e", "g", "i", "j", "tpshard.planning.box"}
    assert imported(path, _without_types) == {"a.b", "c", "g", "i", "j", "tpshard.planning.box"}
    assert imported(path, _at_import) == {"a.b", "c", "j", "tpshard.planning.box"}
    assert not may_import("tpshard.planning.join", "tpshard.rules.classify")
    assert not may_import("tpshard.rules.classify", "tpshard.planning.join")
    assert may_import("tpshard.rules.classify", "tpshard.planning.axes")


def modules_after(script: str, *arguments: str) -> set[str]:
    """Run Python code in a process of its own; the modules that it has then."""
    code = f"{script}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_verify_does_not_load_what_it_verifies() -> None:
    """Nor does anything that it imports."""
    loaded = modules_after("\n".join(f"import {name}" for name in sorted(MODULES) if room(name) == "verifier"))
    assert "tpshard.verifier.builtin.layers" in loaded
    rooms = {room(name) for name in loaded if name.startswith("tpshard.")}
    assert rooms <= {"", "verifier", "storage", "inputs"}


@pytest.mark.parametrize(
    ("script", "needed"),
    [
        ("import tpshard", "tpshard"),
        ("import tpshard.cli.main", "tpshard.cli.main"),
        ("import tpshard\ntpshard.verify", "tpshard.api.verify"),
        ("import tpshard, sys\ntpshard.plan(sys.argv[1], 4)", "tpshard.planning.layout"),
        (
            "import tpshard, sys\nmodel, out = sys.argv[1:]\ntpshard.split(model, 4, out)\n"
            "tpshard.check(out)\ntpshard.check(out, model)\n"
            "tpshard.reshard(out, 2, out + '-2')\ntpshard.merge(out, out + '-merged')\ntpshard.inspect(out)",
            "tpshard.execute.run",
        ),
    ],
)
def test_torch_stays_away(script: str, needed: str, made: Callable[..., Path], tmp_path: Path) -> None:
    loaded = modules_after(script, str(made("llama-gqa")), str(tmp_path / "out"))
    assert needed in loaded
    assert not loaded & {"torch", "numpy", "transformers", "safetensors", "tqdm"}


def test_a_split_does_not_import_what_only_a_plan_shows(made: Callable[..., Path], tmp_path: Path) -> None:
    """It takes less than a second, and imports count."""
    model, out = str(made("llama-gqa")), str(tmp_path / "out")
    loaded = modules_after("import tpshard, sys\ntpshard.split(sys.argv[1], 4, sys.argv[2])", model, out)
    assert "tpshard.report.results" in loaded and "tpshard.report.capacity" not in loaded
    plan = "import tpshard, sys\ntpshard.plan(sys.argv[1], 4).to_json()"
    assert "tpshard.report.capacity" in modules_after(plan, model)


def test_a_cast_is_what_needs_torch(made: Callable[..., Path], tmp_path: Path) -> None:
    script = "import tpshard, sys\ntpshard.split(sys.argv[1], 2, sys.argv[2], dtype='bfloat16')"
    assert "torch" in modules_after(script, str(made("llama-gqa")), str(tmp_path / "out"))


@pytest.mark.parametrize("command", [["--help"], ["archs"], ["plan", "MODEL", "--tp", "4"]])
def test_the_commands_start_without_torch(command: list[str], made: Callable[..., Path]) -> None:
    arguments = [str(made("llama-gqa")) if word == "MODEL" else word for word in command]
    script = (
        "import sys, contextlib, io\nfrom tpshard.cli.main import main\nsys.argv[0] = 'tpshard'\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n    main()\n"
        "assert out.getvalue()"
    )
    loaded = modules_after(script, *arguments)
    assert "tpshard.cli.main" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "huggingface_hub", "tqdm"}
