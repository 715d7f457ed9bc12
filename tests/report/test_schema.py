"""The schemas that tpshard ships: what commands print and write is what they say. `Result.json` holds every other
test's output against them as well."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Get
from tests.helpers import multimodal_checkpoints as multimodal
from tests.helpers.command import llama, succeeds, tpshard
from tests.helpers.paths import ROOT
from tests.helpers.schemas import conforms, name_of, validator
from tpshard.api import convert as api
from tpshard.report.schema import METRICS, names, schema

FORMATS = ("native", "vllm", "sglang", "meta", "dcp", "dcp-hf", "megatron", "megatron-legacy", "hf")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def shards() -> Path:
    """A set of two ranks beside its source, `model`."""
    succeeds("split", llama(Path("model")), "--tp", 2, "-o", "set", "--no-fsync")
    return Path("set")


def objects(of: Any) -> Iterator[dict[str, Any]]:
    """Every schema of an object inside a schema."""
    if isinstance(of, dict):
        if of.get("type") == "object":
            yield of
        for value in of.values():
            yield from objects(value)
    elif isinstance(of, list):
        for value in of:
            yield from objects(value)


@pytest.mark.parametrize("name", names())
def test_a_schema_is_one_and_says_everything(name: str) -> None:
    found = json.loads(succeeds("schema", name).out)
    assert found == schema(name) == json.loads(succeeds("schema", name, "--json").out)
    type(validator(name)).check_schema(found)
    assert set(re.findall(r"#/\$defs/(\w+)", json.dumps(found))) == set(found["$defs"])
    for each in objects(found):
        if "properties" in each:
            assert each["additionalProperties"] is False and set(each["required"]) <= set(each["properties"])
        else:
            assert isinstance(each["additionalProperties"], dict) and each["additionalProperties"]


def test_the_names_are_listed() -> None:
    assert succeeds("schema").out.split() == succeeds("schema", "--json").json["schemas"] == names()
    unknown = tpshard("schema", "plans", "--json")
    assert unknown.code == 2 and "archs-draft" in unknown.json["error"]["expected"]


@pytest.mark.parametrize(
    "name",
    ["llama-gqa", "llama-tied", "gpt2", "bloom-12-heads", "falcon-mqa", "mixtral-stacked", "deepseek_v3", "gpt_oss"],
)
def test_a_plan_and_its_manifest(made: Get, name: str) -> None:
    options = ("--gpu-memory", 1, "--bandwidth", 10)
    found = succeeds("plan", made(name), "--tp", 2, *options, "--json").json
    assert {"free", "fits"} <= set(found["numbers"]["ranks"][0]) and found["tensors"]
    conforms(json.loads(api.plan(made(name), 2).split.manifest), "manifest")


@pytest.mark.parametrize("format", FORMATS)
def test_a_plan_and_its_manifest_in_each_format(format: str) -> None:
    report = api.plan(llama(Path("model")), 1 if format == "hf" else 2, format=format)
    conforms(report.to_json(), "plan")
    manifest = json.loads(report.split.manifest)
    conforms(manifest, "manifest")
    assert ("stored" in manifest) == (format != "native")


def test_a_plan_that_pads_replicates_and_drops(made: Get, tmp_path: Path) -> None:
    for report in (
        api.plan(llama(Path("model")), 4, format="vllm"),
        api.plan(llama(Path("other"), vocab_size=11), 2, shares=["3", "1"]),
        api.plan(multimodal.make("llava", tmp_path / "llava"), 2),
        api.plan(multimodal.make("qwen2_vl", tmp_path / "qwen2_vl"), 2),
    ):
        conforms(report.to_json(), "plan")
        conforms(json.loads(report.split.manifest), "manifest")


@pytest.mark.parametrize("options", [(), ("--format", "vllm", "--checksum", "none"), ("--max-file-size", "1kB")])
def test_what_split_writes(options: tuple[str, ...]) -> None:
    succeeds("split", llama(Path("model")), "--tp", 4, "-o", "set", "--no-fsync", *options)
    conforms(json.loads(Path("set/tpshard.json").read_bytes()), "manifest")
    records = sorted(Path("set").glob("rank-*.json"))
    assert len(records) == 4
    for path in records:
        conforms(json.loads(path.read_bytes()), "record")


def test_every_command_prints_what_its_schema_says(shards: Path) -> None:
    unknown = llama(Path("unknown"), model_type="unheard_of")
    commands = {
        "plan": [("plan", "model", "--tp", 2)],
        "split": [("split", "model", "--tp", 2, "--no-fsync"), ("split", "model", "--tp", 4, "--checksum", "none")],
        "merge": [("merge", shards, "--no-fsync")],
        "reshard": [("reshard", shards, "--tp", 1, "--no-fsync")],
        "check": [("check", shards), ("check", shards, "--source", "model")],
        "inspect": [("inspect", path) for path in ("model", "set", "model/model.safetensors")],
        "verify": [("verify", shards, "--tier", "bytes"), ("verify", "model", "--tier", "bytes")],
        "advise": [("advise", "model", "--gpus", 8, "--gpu-memory", size) for size in (80, "0.000001")],
        "env": [("env",)],
        "archs": [("archs",), ("archs", "list")],
        "archs-show": [("archs", "show", "llama")],
        "archs-draft": [("archs", "draft", unknown), ("archs", "draft", unknown, "-o", "mine.toml")],
        "schema": [("schema",)],
        "error": [("plan", "model", "--tp", 3), ("split", "nowhere", "--tp", 2), ("check", "model"), ("nonsense",)],
    }
    assert set(commands) == set(names()) - {"manifest", "record"}
    for name, several in commands.items():
        for arguments in several:
            assert name_of(tpshard(*arguments, "--json").json) == name, arguments
    assert {found["kind"] for found in (tpshard(*each, "--json").json for each in commands["inspect"])} == {
        "checkpoint", "shards", "file",
    }  # fmt: skip


@pytest.mark.parametrize("damage", [None, "byte", "file"])
def test_the_report_of_verify(shards: Path, damage: str | None) -> None:
    last = shards / "rank-00001-of-00002.safetensors"
    if damage == "byte":
        content = bytearray(last.read_bytes())
        content[-1] ^= 1
        last.write_bytes(content)
    elif damage == "file":
        last.unlink()
    tpshard("verify", shards, "--tier", "bytes", "--report", "report.json")
    report = json.loads(Path("report.json").read_bytes())
    conforms(report, "verify")
    assert report["verdict"] == {None: "pass", "byte": "fail", "file": "error"}[damage]


PLACES: dict[str, Callable[[Any], Any]] = {
    "the object": lambda plan: plan,
    "a tensor": lambda plan: plan["tensors"][0],
    "a rank of a tensor": lambda plan: plan["tensors"][0]["ranks"][0],
    "a definition": lambda plan: plan["numbers"]["kv_cache"],
}


@pytest.mark.parametrize("place", PLACES)
def test_a_field_without_a_schema_is_noticed(place: str) -> None:
    plan = api.plan(llama(Path("model")), 2).to_json()
    more, fewer, other = (copy.deepcopy(plan) for _ in range(3))
    PLACES[place](more)["new"] = 1
    PLACES[place](fewer).popitem()
    key = next(iter(PLACES[place](other)))
    PLACES[place](other)[key] = {"of": "another kind"}
    for changed in (more, fewer, other):
        with pytest.raises(AssertionError, match="^plan: "):
            conforms(changed, "plan")


def test_every_field_is_documented() -> None:
    pages = "".join((ROOT / "docs/reference" / name).read_text() for name in ("json.md", "manifest.md"))
    words = set(re.findall(r"\w+", pages))
    fields = {name for each in objects(list(map(schema, names()))) for name in each.get("properties", ())}
    fields |= set(METRICS)
    assert fields <= words, sorted(fields - words)
    assert set(re.findall(r"^tpshard schema (\S+)", pages, re.M)) <= set(names())


def test_every_metric_that_is_documented_has_a_place() -> None:
    table = (ROOT / "docs/reference/json.md").read_text().split("| tier | `metrics` | |\n")[1].split("\n\n")[0]
    named = {name for row in table.splitlines()[1:] for name in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert named == set(METRICS)
