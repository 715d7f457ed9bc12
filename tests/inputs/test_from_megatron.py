"""Checkpoints that megatron-core wrote (tests/megatron/recorded), and what can be wrong with one."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from tests.helpers.command import fails, llama, succeeds, tpshard
from tests.helpers.toys import read_all, write_checkpoint
from tests.megatron.recorded import FOLDER, PADDED, RECORDED

VOCAB = 10


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def copied(name: str) -> Path:
    """A recorded checkpoint where it may be changed; its one iteration."""
    shutil.copytree(FOLDER / name, "megatron")
    (iteration,) = (path for path in Path("megatron").iterdir() if path.is_dir())
    return iteration


def with_args(iteration: Path, change: Callable[[argparse.Namespace], Any]) -> None:
    """Change the arguments in common.pt."""
    common = torch.load(iteration / "common.pt", weights_only=False)
    change(common["args"])
    torch.save(common, iteration / "common.pt")


@pytest.mark.parametrize("name", RECORDED)
def test_the_model_is_the_one_that_megatron_was_given(name: str) -> None:
    """By Megatron's arguments alone, by a config.json beside, and by the directory of the iteration."""
    iteration = copied(name)
    expected = RECORDED[name].tensors()
    succeeds("merge", "megatron", "-o", "merged", "--vocab-size", VOCAB)
    model = RECORDED[name].write(Path("model"))
    assert Path("merged/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    made = json.loads(Path("merged", "config.json").read_text())
    given = json.loads((model / "config.json").read_text())
    assert made["vocab_size"] == VOCAB and "num_hidden_layers" in made
    assert {key: made.get(key) for key in given} == given
    shutil.copy("model/config.json", "megatron")
    Path("megatron/tokenizer.json").write_text("{}")
    succeeds("merge", "megatron", "-o", "again")
    assert read_all(Path("again")) == expected
    names = {path.name for path in Path("again").iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors"}
    assert Path("again/config.json").read_bytes() == Path("model/config.json").read_bytes()
    succeeds("merge", iteration, "-o", "once", "--vocab-size", VOCAB)
    assert read_all(Path("once")) == expected


@pytest.mark.parametrize("name", RECORDED)
def test_it_is_split_without_being_merged_first(name: str) -> None:
    copied(name)
    model = RECORDED[name].write(Path("model"))
    shutil.copy(model / "config.json", "megatron")
    succeeds("reshard", "megatron", "--tp", 2, "-o", "two")
    succeeds("check", "two", "--source", "model")


def test_norms_may_have_the_names_of_other_layers() -> None:
    """Files that plain torch wrote, with the names of a module's state dict and whole, stacked tensors."""
    iteration = copied("llama-tp2")
    state = read_dcp(iteration)
    names = {
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.input_layernorm.weight",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight",
    }
    state = {names.get(name, name): tensor for name, tensor in state.items()}
    for path in iteration.glob("*.distcp"):
        path.unlink()
    dcp.save(state | {"optimizer.state.exp_avg.x": torch.ones(3)}, checkpoint_id=iteration)
    succeeds("merge", "megatron", "-o", "merged", "--vocab-size", VOCAB)
    assert read_all(Path("merged")) == RECORDED["llama-tp2"].tensors()


def read_dcp(iteration: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by torch's own reader."""
    metadata = dcp.FileSystemReader(iteration).read_metadata().state_dict_metadata
    tensors = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in metadata.items() if hasattr(m, "size")}
    dcp.load(tensors, checkpoint_id=iteration)
    return tensors


def test_arguments_among_the_objects() -> None:
    """As versions after 0.16 save them: no common.pt, and two fields alone in metadata.json."""
    iteration = copied("llama-tp2")
    common = (iteration / "common.pt").rename(iteration / "__9_0.distcp")
    (iteration / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    metadata = dcp.FileSystemReader(iteration).read_metadata()
    name = "common_state/shard_0_1"
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(name)] = _StorageInfo(common.name, 0, common.stat().st_size)
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))
    succeeds("merge", "megatron", "-o", "merged", "--vocab-size", VOCAB)
    assert read_all(Path("merged")) == RECORDED["llama-tp2"].tensors()


@pytest.mark.parametrize("name", RECORDED)
def test_it_is_checked_against_the_model(name: str) -> None:
    """Its padding is not zeros, and nobody's business."""
    copied(name)
    model = RECORDED[name].write(Path("model"))
    shutil.copy(model / "config.json", "megatron")
    succeeds("check", "megatron", "--source", "model")
    shown = json.loads(succeeds("inspect", "megatron", "--json").out)
    assert shown["kind"] == "checkpoint" and len(shown["files"]) >= 2
    other = RECORDED[name].tensors()
    norm = other["model.norm.weight"]
    other["model.norm.weight"] = replace(norm, data=bytes(len(norm.data)))
    write_checkpoint(Path("other"), json.loads((model / "config.json").read_text()), other)
    result = tpshard("check", "megatron", "--source", "other")
    assert result.code == 1 and "decoder.final_layernorm.weight" in result.out + result.err


# --- what is refused ---


def test_a_vocabulary_whose_size_nobody_states() -> None:
    copied("llama-tp2")
    error = fails(2, "merge", "megatron", "-o", "out")
    assert f"padded to {PADDED} rows" in error["message"] and "merge` with --vocab-size" in error["hint"]
    assert "1 to 16" in str(fails(3, "merge", "megatron", "-o", "out", "--vocab-size", PADDED + 1))


def test_a_tracker_that_names_an_iteration_that_is_not_there() -> None:
    copied("llama-tp2")
    Path("megatron/latest_checkpointed_iteration.txt").write_text("8\n")
    error = fails(3, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)
    assert error["expected"] == "iter_0000008" and error["found"] == "iter_0000007"
    assert "megatron/iter_0000007 itself" in error["hint"]
    Path("megatron/latest_checkpointed_iteration.txt").write_text("last")
    assert "not the number" in fails(3, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)["message"]


def test_a_hybrid_model() -> None:
    iteration = copied("llama-tp2")
    with_args(iteration, lambda args: setattr(args, "hybrid_layer_pattern", "M*M-"))
    assert "hybrid" in fails(4, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)["message"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"multi_latent_attention": True}, "latent attention"),
        ({"normalization": "LayerNorm"}, "fit no family"),
        ({"add_qkv_bias": True, "qk_layernorm": True}, "fit no family"),
    ],
)
def test_arguments_that_do_not_tell_the_model(changes: dict[str, object], says: str) -> None:
    iteration = copied("llama-tp2")
    with_args(iteration, lambda args: vars(args).update(changes))
    error = fails(4, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)
    assert says in error["message"] and "config.json" in error["hint"]


def test_arguments_of_the_wrong_kind() -> None:
    iteration = copied("llama-tp2")
    with_args(iteration, lambda args: setattr(args, "num_query_groups", [2]))
    assert "arguments" in fails(3, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)["message"]


def test_pieces_that_are_not_all_of_a_tensor() -> None:
    iteration = copied("llama-tp2")
    metadata = dcp.FileSystemReader(iteration).read_metadata()
    metadata.state_dict_metadata["output_layer.weight"].size = torch.Size([17, 16])
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))
    error = fails(3, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)
    assert error["tensor"] == "output_layer.weight" and error["expected"] == "[17, 16]"


def test_no_arguments_at_all() -> None:
    iteration = copied("llama-tp2")
    (iteration / "common.pt").unlink()
    error = fails(4, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)
    assert "no arguments" in error["message"] and "config.json" in error["hint"]


@pytest.mark.parametrize(
    ("code", "config", "says"),
    [
        (4, {"model_type": "falcon"}, "not known"),
        (3, {"model_type": "qwen3"}, "contradicts"),
        (3, {"num_hidden_layers": 3}, "layers 2 missing"),
        (3, {"num_attention_heads": 8}, "not those of the config"),
        (3, {"intermediate_size": 12}, "contradicts"),
        (3, {"num_key_value_heads": 5}, "not those of the config"),
    ],
)
def test_a_config_of_another_model(code: int, config: dict[str, object], says: str) -> None:
    copied("llama-tp2")
    given = json.loads((RECORDED["llama-tp2"].write(Path("model")) / "config.json").read_text())
    Path("megatron/config.json").write_text(json.dumps(given | config))
    assert says in str(fails(code, "merge", "megatron", "-o", "out"))


def test_a_tensor_that_is_not_known() -> None:
    iteration = copied("llama-tp2")
    state = read_dcp(iteration)
    dcp.save(state | {"mtp.layers.0.eh_proj.weight": torch.ones(3, 3)}, checkpoint_id=iteration)
    error = fails(4, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)
    assert error["tensor"] == "mtp.layers.0.eh_proj.weight" and "Megatron-Bridge" in error["hint"]


def test_a_pickle_that_names_something_else() -> None:
    iteration = copied("llama-tp2")
    torch.save({"args": print}, iteration / "common.pt")
    assert fails(5, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)["found"].endswith(".print")


def test_files_that_are_damaged() -> None:
    iteration = copied("llama-tp2")
    kept = (iteration / ".metadata").read_bytes()
    (iteration / ".metadata").write_bytes(kept[: len(kept) // 2])
    assert "damaged" in fails(3, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)["message"]
    (iteration / ".metadata").write_bytes(b"\x80\x02}.")
    assert "not the metadata" in fails(3, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)["message"]
    (iteration / ".metadata").write_bytes(kept)
    file = iteration / "__0_1.distcp"
    file.write_bytes(file.read_bytes()[:-3000])
    assert "archive" in fails(3, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)["message"]
    file.unlink()
    assert "__0_1.distcp is not there" in fails(3, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)["message"]


def test_other_forms_of_megatron() -> None:
    iteration = copied("llama-tp2")
    (iteration / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert fails(4, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)["found"] == "zarr"


def test_what_is_only_for_megatron() -> None:
    copied("llama-tp2")
    error = fails(2, "check", "megatron")
    assert "no checksums" in error["message"] and "--source" in error["hint"]
    succeeds("split", llama(Path("model")), "--tp", 2, "-o", "two")
    assert "--vocab-size" in fails(2, "merge", "two", "-o", "out", "--vocab-size", VOCAB)["message"]
    error = fails(4, "split", "megatron", "--tp", 2, "-o", "out")
    assert "Megatron" in error["message"] and "tpshard merge" in error["hint"]
