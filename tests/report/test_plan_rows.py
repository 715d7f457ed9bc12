"""Rows of a plan: what is alike becomes one of them, in the table and in `--json --grouped`."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tpshard
from tests.bench.synthetic import DEEPSEEK_V3, write_deepseek
from tests.helpers.command import fails, succeeds
from tests.helpers.command import tpshard as run
from tpshard.api import convert
from tpshard.report.plan_rows import fold

SMALL = DEEPSEEK_V3 | {"num_hidden_layers": 5, "n_routed_experts": 8}
"""A DeepSeek-V3 of fewer layers and experts, as headers alone."""
FORMATS = ("native", "vllm", "deepseek", "dcp")


def folded(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The rows that become of these, without the names that each stands for."""
    return [(pattern, cell) for pattern, _, cell in fold(rows)]


def test_layers_that_are_alike_are_one_row() -> None:
    rows = [("embed", "a")]
    rows += [(f"layers.{layer}.{name}", cell) for layer in range(12) for name, cell in (("q", "x"), ("norm", "y"))]
    assert folded(rows) == [("embed", "a"), ("layers.{0-11}.q", "x"), ("layers.{0-11}.norm", "y")]


def test_layers_that_differ_are_rows_of_their_own() -> None:
    rows = [(f"h.{layer}.q", "wide" if layer in (2, 5) else "narrow") for layer in range(7)]
    assert folded(rows) == [("h.{0-1,3-4,6}.q", "narrow"), ("h.{2,5}.q", "wide")]
    assert folded([("h.3.q", "x")]) == [("h.3.q", "x")]


def test_experts_and_layers_that_are_alike_are_one_row() -> None:
    rows = [(f"layers.{layer}.experts.{expert}.w{n}", "x") for layer in range(3) for expert in range(4) for n in (1, 2)]
    assert folded(rows) == [("layers.{0-2}.experts.{0-3}.w1", "x"), ("layers.{0-2}.experts.{0-3}.w2", "x")]
    del rows[rows.index(("layers.1.experts.2.w1", "x"))]
    assert folded(rows)[:2] == [
        ("layers.{0,2}.experts.{0-3}.w1", "x"),
        ("layers.{0-2}.experts.{0-3}.w2", "x"),
    ]
    assert folded([("0.w", "x"), ("1.w", "x"), ("w2.x", "x")]) == [("{0-1}.w", "x"), ("w2.x", "x")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The headers of SMALL."""
    path: Path = tmp_path_factory.mktemp("plan_rows") / "model"
    write_deepseek(path, SMALL)
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_the_text_of_a_plan_is_its_json(model: Path, format: str) -> None:
    text = "".join(tpshard.plan(model, 4, format=format).json_text())
    assert text == json.dumps(tpshard.plan(model, 4, format=format).to_json())
    assert succeeds("plan", model, "--tp", 4, "--format", format, "--json").out == text + "\n"


def without_name(entry: dict[str, Any]) -> str:
    """What must be equal in entries that become one."""
    return json.dumps({key: value for key, value in entry.items() if key not in ("name", "count", "from")})


@pytest.mark.parametrize("format", FORMATS)
def test_grouped_entries_say_what_each_of_theirs_says(model: Path, format: str) -> None:
    arguments = ("plan", model, "--tp", 4, "--format", format, "--json")
    every, grouped = succeeds(*arguments).json, succeeds(*arguments, "--grouped").json
    for table in ("tensors", "stored") if "stored" in every else ("tensors",):
        members: dict[str, int] = {}
        for entry in every[table]:
            members[without_name(entry)] = members.get(without_name(entry), 0) + 1
        counted: dict[str, int] = {}
        for entry in grouped[table]:
            counted[without_name(entry)] = counted.get(without_name(entry), 0) + entry["count"]
        assert counted == members
        assert len(grouped[table]) < len(every[table]) / 2
    assert {**every, "tensors": 0, "stored": 0} == {**grouped, "tensors": 0, "stored": 0}
    pattern = "model.layers.{3-5}.mlp.experts.{0-7}.up_proj.weight"
    assert format != "native" or pattern in [entry["name"] for entry in grouped["tensors"]]


def test_what_grouped_entries_are_made_of_is_folded_too(model: Path) -> None:
    stored = succeeds("plan", model, "--tp", 4, "--format", "vllm", "--json", "--grouped").json["stored"]
    entry = next(each for each in stored if each["name"].endswith("w13_weight"))
    experts = "model.layers.{3-4}.mlp.experts.{0-7}"
    assert entry["from"] == [f"{experts}.gate_proj.weight", f"{experts}.up_proj.weight"]


def test_grouped_is_for_json(model: Path) -> None:
    refused = run("plan", model, "--tp", 2, "--grouped")
    assert refused.code == 2 and "--json" in refused.err


def test_no_step_is_planned_for_a_disk_that_is_too_small(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for an output that is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert, "join", lambda *sides: pytest.fail("the steps were planned"))
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    assert fails(6, "split", model, "--tp", 4, "-o", "out")["message"] == "not enough room"
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    assert fails(9, "split", model, "--tp", 4, "-o", "there")["message"] == "the output exists"
