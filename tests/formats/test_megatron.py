"""`--format megatron`: the files as torch's own readers see them, against slices of the source's tensors.

What Megatron itself makes of them is in tests/megatron.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

import tpshard as api
from tests.helpers.checkpoints import make
from tests.helpers.command import fails, llama, succeeds
from tests.inputs.test_from_megatron import read_dcp
from tpshard.errors import LocalIOError
from tpshard.execute.publish import Settings
from tpshard.storage.files import Files


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stacked(source: dict[str, Tensor], name: str, layers: int) -> Tensor:
    return torch.stack([source[f"model.layers.{layer}.{name}"] for layer in range(layers)])


def expected(source: dict[str, Tensor], layers: int, groups: int, rows: int) -> dict[str, Tensor]:
    """Megatron's global tensors of a LLaMA: its fused ones by torch's cat, layers by its stack."""
    at = "decoder.layers."
    q, k, v = (stacked(source, f"self_attn.{p}_proj.weight", layers) for p in "qkv")
    grouped = [t.reshape(layers, groups, -1, t.shape[-1]) for t in (q, k, v)]
    gate, up = (stacked(source, f"mlp.{p}_proj.weight", layers) for p in ("gate", "up"))

    def filled(name: str) -> Tensor:
        return torch.cat([source[name], torch.zeros(rows - len(source[name]), source[name].shape[1])])

    return {
        "embedding.word_embeddings.weight": filled("model.embed_tokens.weight"),
        "output_layer.weight": filled("lm_head.weight"),
        "decoder.final_layernorm.weight": source["model.norm.weight"],
        f"{at}self_attention.linear_qkv.weight": torch.cat(grouped, 2).reshape(layers, -1, q.shape[-1]),
        f"{at}self_attention.linear_qkv.layer_norm_weight": stacked(source, "input_layernorm.weight", layers),
        f"{at}self_attention.linear_proj.weight": stacked(source, "self_attn.o_proj.weight", layers),
        f"{at}mlp.linear_fc1.weight": torch.cat([gate, up], 1),
        f"{at}mlp.linear_fc1.layer_norm_weight": stacked(source, "post_attention_layernorm.weight", layers),
        f"{at}mlp.linear_fc2.weight": stacked(source, "mlp.down_proj.weight", layers),
    }


@pytest.mark.parametrize(("tp", "rows"), [(1, 256), (2, 256), (4, 512)])
def test_torch_reads_megatrons_global_tensors(tp: int, rows: int) -> None:
    """At tp 4 two ranks share each of the 2 KV groups, and the vocabulary is padded further."""
    make("llama-gqa", Path("model"))
    succeeds("split", "model", "--tp", tp, "--format", "megatron", "-o", "out")
    found, wanted = read_dcp(Path("out/release")), expected(load_file("model/model.safetensors"), 3, 2, rows)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {path.name for path in Path("out/release").glob("*.distcp")} == {f"__{rank}_0.distcp" for rank in range(tp)}
    succeeds("check", "out", "--source", "model")
    succeeds("check", "out")


def test_what_lies_beside_the_tensors() -> None:
    make("llama-gqa", Path("model"))
    succeeds("split", "model", "--tp", 2, "--format", "megatron", "-o", "out")
    assert Path("out/latest_checkpointed_iteration.txt").read_text() == "release\n"
    assert json.loads(Path("out/release/metadata.json").read_text())["sharded_backend"] == "torch_dist"
    with torch.serialization.safe_globals([argparse.Namespace]):  # as Megatron allows it: no class of its own is in it
        common = torch.load("out/release/common.pt", weights_only=True)
    assert common["checkpoint_version"] == 3.0
    args = vars(common["args"])
    shown = ("num_layers", "num_query_groups", "kv_channels", "swiglu", "norm_epsilon", "padded_vocab_size")
    assert [args[key] for key in shown] == [3, 2, 8, True, 1e-06, 256]
    metadata = FileSystemReader("out/release").read_metadata()
    states = sorted(name for name in metadata.state_dict_metadata if "_extra_state" in name)
    assert len(states) == 5 * 3 and states[0] == "decoder.layers.mlp.linear_fc1._extra_state/shard_0_3"
    places = {index.fqn: place for index, place in metadata.storage_data.items()}
    place = places[states[0]]
    with Path("out/release", place.relative_path).open("rb") as file:
        file.seek(place.offset)
        assert torch.load(file, weights_only=True) == [None]


@pytest.mark.parametrize(
    "name",
    [
        "llama-mha-bias",
        "qwen2-tied",
        "qwen3",
        "gpt2",
        "nemotron",
        "mixtral",
        "qwen2_moe",
        "deepseek_v2-lite",
        "deepseek_v3",
    ],
)
def test_it_comes_back_by_the_manifest_and_without_it(name: str) -> None:
    """Layers that differ (deepseek, qwen2_moe) have keys of their own."""
    make(name, Path("model"))
    succeeds("split", "model", "--tp", 2, "--format", "megatron", "-o", "out")
    succeeds("check", "out", "--source", "model")
    succeeds("merge", "out", "-o", "merged")
    source = Path("model/model.safetensors").read_bytes()
    assert Path("merged/model.safetensors").read_bytes() == source
    Path("out/tpshard.json").unlink()
    succeeds("merge", "out", "-o", "again")
    assert Path("again/model.safetensors").read_bytes() == source
    keys = [key for key in read_dcp(Path("out/release")) if key.startswith("decoder.layers.")]
    singly = name in ("qwen2_moe", "deepseek_v2-lite", "deepseek_v3")
    assert all(key.removeprefix("decoder.layers.").partition(".")[0].isdecimal() == singly for key in keys)


def test_any_other_set_becomes_one_and_it_becomes_any_other() -> None:
    llama(Path("model"), vocab_size=8)
    succeeds("split", "model", "--tp", 4, "-o", "four")
    succeeds("reshard", "four", "--tp", 2, "--format", "megatron", "-o", "megatron")
    succeeds("split", "model", "--tp", 2, "--format", "megatron", "-o", "direct")
    for path in Path("direct").rglob("*"):
        assert path.is_dir() or path.read_bytes() == Path("megatron", path.relative_to("direct")).read_bytes()
    succeeds("reshard", "megatron", "--tp", 4, "-o", "back")
    for path in Path("four").glob("rank-*"):
        assert path.read_bytes() == Path("back", path.name).read_bytes()


class Full(Files):
    """A disk that is full after so many writes."""

    def __init__(self, writes: int) -> None:
        self.left = writes

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().pwritev(fd, buffers, offset)


def test_a_run_that_failed_is_finished_by_the_same_one() -> None:
    llama(Path("model"))
    api.split("model", 2, "expected", format="megatron")
    for writes in range(0, 90, 11):
        with contextlib.suppress(LocalIOError):
            api.split("model", 2, "out", format="megatron", settings=Settings(files=Full(writes)))
    assert Path("out.partial/release").is_dir() and not Path("out").exists()
    api.split("model", 2, "out", format="megatron")
    for path in Path("expected").rglob("*"):
        assert path.is_dir() or path.read_bytes() == Path("out", path.relative_to("expected")).read_bytes()
    assert len([*Path("out").rglob("*")]) == len([*Path("expected").rglob("*")])


def test_ranks_that_several_hosts_write_into_a_folder() -> None:
    """And files in that folder are replaced, and those of somebody else are not."""
    llama(Path("model"))
    command = ("split", "model", "--tp", 2, "--format", "megatron", "-o", "out")
    succeeds(*command, "--ranks", 1)
    assert Path("out/release/__1_0.distcp").exists() and not Path("out/release/__0_0.distcp").exists()
    assert "rank 0 missing" in fails(3, "merge", "out", "-o", "merged")["message"]
    succeeds(*command, "--ranks", 0)
    succeeds("merge", "out", "-o", "merged")
    succeeds(*command, "--overwrite")
    Path("out/release/notes.txt").write_text("mine")
    assert fails(9, *command, "--overwrite")["found"] == "release/notes.txt"


def test_a_damaged_set() -> None:
    llama(Path("model"))
    succeeds("split", "model", "--tp", 2, "--format", "megatron", "-o", "out")
    shutil.copytree("out", "other")
    path = Path("out/release/.metadata")
    path.write_bytes(path.read_bytes().replace(b"linear_qkv", b"linear_qkw"))
    assert "release/.metadata" in fails(3, "merge", "out", "-o", "merged")["message"]
    Path("other/release/__1_0.distcp").unlink()
    assert "rank 1 missing" in fails(3, "check", "other")["message"]


def test_what_megatron_cannot_hold() -> None:
    make("llama-gqa", Path("model"))
    megatron = ("--format", "megatron", "-o", "out")
    assert "evenly" in fails(2, "split", "model", "--tp", 2, "--uneven", *megatron)["message"]
    assert "8 heads" in fails(4, "split", "model", "--tp", 3, *megatron)["message"]
    assert "multiple" in fails(2, "split", "model", "--tp", 2, "--pad-vocab-to", 253, *megatron)["expected"]
    make("gemma", Path("gemma"))
    assert "not known" in fails(4, "split", "gemma", "--tp", 2, *megatron)["message"]
    make("llama-mha-bias", Path("biased"), mlp_bias=False)
    assert "has a bias in all of" in fails(4, "split", "biased", "--tp", 2, *megatron)["message"]
    succeeds("split", "model", "--tp", 2, "--pad-vocab-to", 252, *megatron)
    assert len(read_dcp(Path("out/release"))["output_layer.weight"]) == 252
