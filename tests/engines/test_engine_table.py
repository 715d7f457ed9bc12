"""The tool that reads entries off vLLM, without vLLM: what the ranks of a small LLaMA held is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engines.table import __main__ as tool
from tests.engines.table.known import parsed, parsed_nested
from tests.engines.table.replay import FILE, Record, Replay, entry_of
from tests.engines.table.toml import as_toml
from tpshard.formats.engine_tables import load_table
from tpshard.formats.vllm import FORMAT

ENTRY = """\
[families.llama]
model_types = ["llama"]
layer = "model.layers.*"
head = "lm_head"
tied = "lm_head"
scales = [".self_attn.attn"]

[families.llama.fused]
".mlp.gate_up_proj" = [".mlp.gate_proj", ".mlp.up_proj"]
".self_attn.qkv_proj" = [".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj"]
"""
QKV = tuple(f"model.layers.{layer}.self_attn.qkv_proj.weight" for layer in range(2))


@pytest.fixture
def record() -> Record:
    made: Record = json.loads(FILE.read_text())
    return made


@pytest.fixture(autouse=True)
def of_the_first_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "engine_version", lambda: load_table(FORMAT.path).versions[0])


def differences(record: Record, scratch: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the tool says of a record beside the table, below the line that says whether they agree."""
    found = tool.report(entry_of(Replay(record), scratch), compare=True)
    agrees, _, rest = capsys.readouterr().out.partition("\n")
    assert agrees == f"llama: {'not equal' if found else 'equal'}"
    return rest


def test_the_entry_is_the_tables(record: Record, tmp_path: Path) -> None:
    found = entry_of(Replay(record), tmp_path)
    assert found.problems == [] and found.not_loaded == []
    assert tool.text_of(found) + "\n" == ENTRY
    known = load_table(FORMAT.path).families["llama"]
    read = parsed({key: value for key, value in found.entry.items() if key != "model_types"})
    for key in ("layer", "head", "tied", "scales", "fused", "renamed", "cuts", "transposed", "float32", "stands_in"):
        assert getattr(read, key) == getattr(known, key), key


def test_what_agrees_with_the_table_is_equal(
    record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert differences(record, tmp_path, capsys) == ""


def test_parts_in_another_order_are_named(record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (rank for load in record[:4] for rank in load["ranks"]):
        for name in QKV:
            dtype, shape, (q, (k, rows, two, apart)) = rank[name]
            rank[name] = dtype, shape, [q, [k + apart, rows, two, -apart]]
    said = differences(record, tmp_path, capsys)
    assert "model.layers.0.self_attn.k_proj.weight: fused: read" in said and "known" in said


def test_another_name_is_named(record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for load in record:
        for rank in load["ranks"]:
            for name in [each for each in rank if "o_proj" in each]:
                rank[name.replace("o_proj", "out")] = rank.pop(name)
    said = differences(record, tmp_path, capsys)
    assert "model.layers.0.self_attn.o_proj.weight: renamed: read 'model.layers.0.self_attn.out.weight'" in said


def test_ranks_whose_shares_are_exchanged_are_named(
    record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for load in record[:4]:
        first, second = load["ranks"][:2]
        for name in [each for each in first if "down_proj" in each]:
            first[name], second[name] = second[name], first[name]
    said = differences(record, tmp_path, capsys)
    assert "cannot say: model.layers.0.mlp.down_proj.weight: no cut of the table gives" in said


def test_a_parameter_that_the_checkpoint_has_nothing_of_is_named(
    record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for load in record:
        for rank in load["ranks"]:
            rank["model.layers.0.new"] = ["float32", [2], [[-1, 2, 1, 0]]]
    assert "vLLM has model.layers.0.new, of which the checkpoint has nothing" in differences(record, tmp_path, capsys)


def test_a_class_that_takes_the_embedding_for_the_head_has_none(record: Record, tmp_path: Path) -> None:
    """As LFM2's: also where the checkpoint has a head of its own, what stands there is the embedding."""
    for load in record[:2]:
        for rank in load["ranks"]:
            rank["lm_head.weight"] = rank.pop("model.embed_tokens.weight")
    found = entry_of(Replay(record), tmp_path)
    assert (found.entry["head"], found.entry["tied"]) == ("", "lm_head")
    assert found.entry.get("renamed", {}) == {} and "refused" not in found.entry


def test_an_entry_of_a_nested_model_is_read_as_the_tables_are() -> None:
    entry = {"model_types": ["llava"], "texts": {"llama": "llama"}, "text": "language_model.", "place": "vision_tower"}
    text = "\n\n".join(
        [as_toml("llava", {"axes": []}, room="towers"), as_toml("llava", {**entry, "towers": ["llava"]}, room="nested")]
    )
    assert parsed_nested(text, "llava").texts == {"llama": "llama"}
