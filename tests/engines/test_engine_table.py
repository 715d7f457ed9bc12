"""The tool that reads entries off vLLM, without vLLM: what the ranks of a small LLaMA held is recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tpshard
from tests.engines.running import Loader, Ranks, written
from tests.engines.table import __main__ as tool
from tests.engines.table import entry
from tests.engines.table.coded import write
from tests.engines.table.known import parsed, parsed_nested
from tests.engines.table.replay import FILE, Record, Replay, entry_of
from tests.engines.table.toml import as_toml
from tpshard.errors import UnsupportedError
from tpshard.formats.engine_tables import load_table
from tpshard.formats.sharded_state import ShardedState
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
    for module in (tool, entry):
        monkeypatch.setattr(module, "engine_version", lambda: load_table(FORMAT.path).versions[0])


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
    parts = ", ".join(f"model.layers.0.self_attn.{part}_proj.weight" for part in "qvk")
    assert f"{QKV[0]}, made of {parts}: other elements, on rank 0 of 2" in said


def test_another_name_is_named(record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for load in record:
        for rank in load["ranks"]:
            for name in [each for each in rank if "o_proj" in each]:
                rank[name.replace("o_proj", "out")] = rank.pop(name)
    said = differences(record, tmp_path, capsys)
    made = "made of model.layers.0.self_attn.o_proj.weight"
    assert f"model.layers.0.self_attn.o_proj.weight, {made}: the files have it, and vLLM has not" in said
    assert f"model.layers.0.self_attn.out.weight, {made}: vLLM has it, and the files have not" in said


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
    assert "vLLM has model.layers.0.new in llama, of which it has nothing" in differences(record, tmp_path, capsys)


def test_what_the_table_refuses_is_not_equal(
    record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: object) -> None:
        raise UnsupportedError("no such class")

    monkeypatch.setattr(ShardedState, "lay", refusing)
    said = differences(record, tmp_path, capsys)
    assert "the table refuses all that vLLM loads" in said and "the table refuses llama: no such class" in said


def test_a_class_that_does_not_tie_where_the_table_does_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = list(tool.checkpoints("llama", tmp_path / "made"))
    found = entry.read_entry(made, Laid("lm_head.weight"), tmp_path / "read")
    assert tool.report(found, compare=True) > 0
    said = capsys.readouterr().out
    assert "does not load: llama-tied-bias: its class does not tie the head to the embedding" in said
    assert "lm_head.weight, made of model.embed_tokens.weight: other elements, on rank 0 of 2" in said


def test_a_class_that_takes_the_embedding_for_the_head_has_none(record: Record, tmp_path: Path) -> None:
    """As LFM2's: also where the checkpoint has a head of its own, what stands there is the embedding."""
    for load in record[:2]:
        for rank in load["ranks"]:
            rank["lm_head.weight"] = rank.pop("model.embed_tokens.weight")
    found = entry_of(Replay(record), tmp_path)
    assert (found.entry["head"], found.entry["tied"]) == ("", "lm_head")
    assert found.entry.get("renamed", {}) == {} and "refused" not in found.entry


def test_an_entry_of_a_nested_model_is_read_as_the_tables_are() -> None:
    own = {"model_types": ["llava"], "texts": {"llama": "llama"}, "text": "language_model.", "place": "vision_tower"}
    text = "\n\n".join(
        [as_toml("llava", {"axes": []}, room="towers"), as_toml("llava", {**own, "towers": ["llava"]}, room="nested")]
    )
    assert parsed_nested(text, "llava").texts == {"llama": "llama"}


def test_mistrals_own_form_stays_one(tmp_path: Path) -> None:
    made = next(iter(tool.checkpoints("mistral_native", tmp_path / "made")))
    (first, *_) = write(made.shapes, {**made.config, "tie_word_embeddings": True}, made.directory, tmp_path).directories
    assert {file.name for file in first.iterdir()} == {"params.json", "tekken.json", "consolidated.safetensors"}
    said = json.loads((made.directory / "params.json").read_text())
    assert json.loads((first / "params.json").read_text()) == said | {"tied_embeddings": True}


class Laid(Loader):
    """In place of vLLM, ranks that hold what our files have: what the table says can be read off them.

    unset: how the names end of parameters that are not loaded.
    """

    def __init__(self, unset: str) -> None:
        self.unset = unset

    def held(
        self,
        model: Path,
        tp: int,
        load_format: str,
        out: Path,
        *,
        pp: int = 1,
        again: Mapping[str, str] = MappingProxyType({}),
        **how: Any,
    ) -> Ranks:
        if pp > 1:
            raise RuntimeError("stages were not laid out")
        for source, into in {str(model): str(out), **again}.items():
            tpshard.split(source, tp, f"{into}-split", format="vllm")
            Path(into).mkdir(parents=True)
            for rank, tensors in enumerate(written(Path(f"{into}-split"), tp)):
                tensors |= {
                    name: torch.full_like(tensor, 7)
                    for name, tensor in tensors.items()
                    if name.endswith(self.unset or "nothing")
                }
                save_file(tensors, Path(into) / f"rank-{rank}.safetensors", metadata={"added": "[]"})
        return [load_file(out / f"rank-{rank}.safetensors") for rank in range(tp)]


WORDS: dict[str, dict[str, Any]] = {
    "zamba2": {
        "spelled": {
            f".shared_transformer.{module}.*": ["A", "B"]
            for module in (
                "feed_forward.gate_up_proj_adapter_list",
                *(f"self_attn.linear_{letter}_adapter_list" for letter in "kqv"),
            )
        },
        "scales_where": {
            ".shared_transformer.self_attn.linear_k_adapter_list.*": ".shared_transformer.self_attn.dpa_list.*"
        },
    },
    "bailing_hybrid": {
        "renamed_where": {
            ".attention.kv_a_layernorm": {".attention.dense.weight": ".self_attn.mla_attn.o_proj.weight"}
        },
        "scales": [".self_attn.mla_attn.mla_attn"],
    },
    "kimi_linear": {"least": {"moe_ffn": 256}},
    "glm5_next": {"shaped": {".self_attn.A_log": [1, 1, 0, 1]}},
    "minimax_m3_vl": {"scales_where": {".self_attn.index_k_norm": ".self_attn"}, "scales": [".self_attn.attn"]},
    "longcat_flash": {
        "scales_where": {".self_attn.*": ".self_attn.*.mla_attn.mla_attn"},
        "computed": {
            f"* root hidden_size / {norm}_lora_rank if mla_scale_{norm}_lora": [
                f".self_attn.*.{norm}_a_layernorm.weight"
            ]
            for norm in ("q", "kv")
        },
    },
    "qwen4_exp": {
        "cuts": {"rows": [".ple.ple_embedding.ngram_embedding.shard_#"]},
        "counted": {".ple.ple_embedding.ngram_embedding": "split_ngram_parts"},
        "kept": {
            f".ple.ple_embedding.{buffer}": ".ple"
            for buffer in ("layer_multipliers", "ngram_heads_offsets", "ngram_heads_vocab_sizes")
        },
        "padded": {f".{module}_hyper_connection.input_mix_weight_down_block_inject": 8 for module in ("attn", "mlp")},
    },
    "inkling_mm_model": {
        "side_by_side": [".mlp.shared_experts.shared_w2_weight"],
        "padded": {".mlp.gate.weight": 8},
    },
    "dots3_note": {
        "renamed_where": {
            ".self_attn.indexer": {
                f".self_attn.{module}.weight": f".self_attn.mla_attn.{module}.weight"
                for module in ("o_proj", "q_a_layernorm", "q_b_proj")
            }
        },
    },
    "mistral_native": {"cuts": {"paired": [".attention.wk", ".attention.wq"]}},
    "kimi_k3": {"or_whole": True, "padded": {".self_attn.in_proj_qkvgfab": 16}},
    "NemotronH_Nano_VL_V2": {
        "ones": {f".model.encoder.layers.*.ls{each}": ".model.encoder.layers.*.attn.proj.bias" for each in (1, 2)}
    },
    "laguna": {"unread": [".mlp.experts.e_score_correction_bias"]},
}
"""By type, words of the table that its entry has."""


@pytest.mark.parametrize("model_type", WORDS)
def test_what_the_table_says_is_read_off_its_files(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named, made = next(iter(tool.by_class(list(tool.checkpoints(model_type, tmp_path / "made"))).items()))
    unset = WORDS[model_type].get("unread", [""])[0].rpartition(".")[2]
    # Of one checkpoint alone, other keys say as many parts, and heads divide.
    enough = made[: 2 if {"counted", "or_whole"} & WORDS[model_type].keys() else 1]
    found = entry.read_entry(enough, Laid(unset), tmp_path / "read", named)
    assert tool.report(found, compare=True, quiet=True) == 0
    assert capsys.readouterr().out.splitlines() == [f"{named}: equal"]
    read = {key: each for part in (*found.towers.values(), *found.texts.values()) for key, each in part.items()}
    read = read if found.nested else dict(found.entry)
    assert {key: read[key] for key in WORDS[model_type]} == WORDS[model_type]
