"""`--format megatron-legacy`: the state dicts as torch reads them, against those that torch's slices make.

What Megatron itself makes of them is in tests/megatron.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.by_hand import with_one_more
from tests.helpers.checkpoints import make
from tests.helpers.command import fails, llama, llama_tensors, succeeds, tpshard
from tests.helpers.grids import some
from tests.helpers.toys import read_all
from tests.inputs.test_megatron_legacy import LAYERS, written

LEGACY = ("--format", "megatron-legacy", "-o", "out")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def loaded(path: Path) -> dict[str, Any]:
    """A rank's file as Megatron loads it: of the classes that it allows, a Namespace is enough."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def states(directory: str) -> dict[str, dict[str, Tensor]]:
    """The models of all ranks, by the names of their folders, without what layers of FP8 keep."""
    files = sorted(Path(directory).glob("release/*/model_optim_rng.pt"))
    models = {path.parent.name: loaded(path)["model"] for path in files}
    return {rank: {n: t for n, t in model.items() if not n.endswith("_extra_state")} for rank, model in models.items()}


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits; some of the numbers are none."""
    return one.shape == other.shape and torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_each_rank_has_what_slices_of_the_source_make(tp: int, pp: int) -> None:
    """At tp 4 each of the two KV groups lies on two ranks, cut wherever that is."""
    written(tp, pp, 1)
    succeeds("split", "model", "--tp", tp, "--pp", pp, "--pad-vocab-to", 16, *LEGACY)
    found, wanted = states("out"), states("megatron")
    assert found.keys() == wanted.keys()
    for rank, model in wanted.items():
        assert found[rank].keys() == model.keys()
        assert all(alike(found[rank][name], tensor) for name, tensor in model.items())
    assert Path("out/latest_checkpointed_iteration.txt").read_text() == "release\n"
    succeeds("check", "out", "--source", "model")


def test_what_a_file_says_of_itself() -> None:
    llama(Path("model"), tensors=llama_tensors(num_hidden_layers=LAYERS), num_hidden_layers=LAYERS)
    result = succeeds("split", "model", "--tp", 2, "--pp", 3, "--pp-layers", "1,1,2", *LEGACY)
    assert "--decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 2" in result.err
    file = loaded(Path("out/release/mp_rank_01_002/model_optim_rng.pt"))
    assert (file["checkpoint_version"], file["iteration"]) == (3.0, 0)
    args = vars(file["args"])
    shown = ("num_layers", "tensor_model_parallel_size", "pipeline_model_parallel_size", "padded_vocab_size")
    assert [args[key] for key in shown] == [LAYERS, 2, 3, 256]
    ends = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "ckpt_format")
    assert [args[key] for key in ends] == [1, 2, "torch"]
    assert args["untie_embeddings_and_output_weights"] is True
    assert sorted(name for name in file["model"] if name.endswith("layer_norm_weight")) == [
        f"decoder.layers.{layer}.{module}.layer_norm_weight"
        for layer in range(2)
        for module in ("mlp.linear_fc1", "self_attention.linear_qkv")
    ]


def test_a_tied_embedding_is_on_the_last_stage_too() -> None:
    """Under the head's name; of one stage there is no head."""
    make("qwen2-tied", Path("model"))
    succeeds("split", "model", "--tp", 2, "--pp", 3, *LEGACY)
    found = states("out")
    for rank in ("00", "01"):
        embedding = found[f"mp_rank_{rank}_000"]["embedding.word_embeddings.weight"]
        assert alike(found[f"mp_rank_{rank}_002"]["output_layer.weight"], embedding)
        assert not [name for name in found[f"mp_rank_{rank}_001"] if "decoder.layers." not in name]
    file = loaded(Path("out/release/mp_rank_00_000/model_optim_rng.pt"))
    assert file["args"].untie_embeddings_and_output_weights is False
    succeeds("split", "model", "--tp", 2, *LEGACY, "--overwrite")
    assert not any("output_layer.weight" in model for model in states("out").values())


def test_whole_experts_are_numbered_within_a_rank() -> None:
    make("mixtral", Path("model"))
    result = succeeds("split", "model", "--tp", 2, "--ep", 2, *LEGACY)
    assert "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1" in result.err
    source, found = load_file("model/model.safetensors"), states("out")
    assert found.keys() == {"mp_rank_00_000", "mp_rank_01_001"}
    count = sum(name.startswith("model.layers.0.") and name.endswith(".w1.weight") for name in source)
    for rank, model in enumerate(found.values()):
        for local in range(count // 2):
            at = f"model.layers.1.block_sparse_moe.experts.{rank * count // 2 + local}."
            into = f"decoder.layers.1.mlp.experts.local_experts.{local}."
            gate, up, down = (source[f"{at}{w}.weight"] for w in ("w1", "w3", "w2"))
            assert alike(model[f"{into}linear_fc1.weight"], torch.cat([gate, up]))
            assert alike(model[f"{into}linear_fc2.weight"], down)
        assert f"decoder.layers.1.mlp.experts.local_experts.{count // 2}.linear_fc2.weight" not in model


ROUND = [
    (name, mesh)
    for name in (
        "llama-mha-bias",
        "qwen3",
        "gpt2",
        "nemotron",
        "mixtral",
        "qwen2_moe",
        "deepseek_v2-lite",
        "deepseek_v3",
    )
    for mesh in ("--tp 1", "--tp 2", "--tp 2 --pp 2 --pp-layers 1,", "--tp 2 --ep 2")
    if "--ep" not in mesh or "moe" in name or "mixtral" in name or "deepseek" in name
]


@pytest.mark.parametrize(
    ("name", "mesh"),
    some(
        ROUND,
        [
            ("gpt2", "--tp 2 --pp 2 --pp-layers 1,"),
            ("nemotron", "--tp 2"),
            ("qwen2_moe", "--tp 2 --ep 2"),
            ("deepseek_v3", "--tp 2 --ep 2"),
            ("deepseek_v2-lite", "--tp 2 --pp 2 --pp-layers 1,"),
        ],
    ),
)
def test_it_comes_back_by_the_manifest_and_without_it(name: str, mesh: str) -> None:
    make(name, Path("model"))
    options = mesh.split()
    if options[-1] == "1,":
        layers = 2 if name == "gpt2" else 3
        options[-1] += str(layers - 1)
    succeeds("split", "model", *options, *LEGACY)
    succeeds("check", "out", "--source", "model")
    succeeds("merge", "out", "-o", "merged")
    source = Path("model/model.safetensors").read_bytes()
    assert Path("merged/model.safetensors").read_bytes() == source
    Path("out/tpshard.json").unlink()
    succeeds("merge", "out", "-o", "again")
    assert Path("again/model.safetensors").read_bytes() == source


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("megatron", ()),
        ("megatron-legacy", ("--engine-version", "0.16")),
        ("megatron-legacy", ("--pp", 3, "--ep", 2, "--engine-version", "0.20")),
    ],
)
def test_a_layer_that_predicts_a_further_token(form: str, options: tuple[object, ...]) -> None:
    """All of it but its own embedding and head, which Megatron has not."""
    make("deepseek_v3", Path("base"), num_nextn_predict_layers=0)
    model = with_one_more(Path("base"), Path("model"), num_nextn_predict_layers=1)
    succeeds("split", model, "--tp", 2, "--format", form, *options, "-o", "out")
    succeeds("check", "out", "--source", model)
    expected = read_all(model)
    for name in ("embed_tokens", "shared_head.head"):
        del expected[f"model.layers.3.{name}.weight"]
    succeeds("merge", "out", "-o", "merged")
    assert read_all(Path("merged")) == expected
    Path("out/tpshard.json").unlink()
    succeeds("merge", "out", "-o", "again")
    assert read_all(Path("again")) == expected
    if form == "megatron-legacy":
        rank = states("out")[f"mp_rank_01{'_002_001' if '--pp' in options else ''}"]
        inner = "transformer_layer" if "0.16" in options else "mtp_model_layer"
        assert {name.split(".")[3] for name in rank if name.startswith("mtp.layers.0.")} == {
            "enorm", "hnorm", "eh_proj", "final_layernorm", inner,
        }  # fmt: skip
        source = load_file(model / "model.safetensors")
        assert alike(rank["mtp.layers.0.eh_proj.weight"], source["model.layers.3.eh_proj.weight"].chunk(2)[1])
        assert "embedding.word_embeddings.weight" in rank


def test_any_other_set_becomes_one_and_it_becomes_any_other() -> None:
    llama(Path("model"), vocab_size=8)
    succeeds("split", "model", "--tp", 4, "-o", "four")
    succeeds("reshard", "four", "--tp", 2, "--pp", 2, "--format", "megatron-legacy", "-o", "legacy")
    succeeds("split", "model", "--tp", 2, "--pp", 2, *LEGACY)
    files = [path.relative_to("out") for path in Path("out").rglob("*") if path.is_file()]
    assert len(files) > 4
    assert all(Path("out", name).read_bytes() == Path("legacy", name).read_bytes() for name in files)
    succeeds("reshard", "legacy", "--tp", 4, "-o", "back")
    for path in Path("four").glob("rank-*"):
        assert path.read_bytes() == Path("back", path.name).read_bytes()


def test_ranks_that_several_hosts_write_into_folders() -> None:
    llama(Path("model"))
    command = ("split", "model", "--tp", 2, "--pp", 2, *LEGACY)
    succeeds(*command, "--ranks", "1,2")
    assert {path.name for path in Path("out/release").iterdir()} == {"mp_rank_01_000", "mp_rank_00_001"}
    assert "rank 0, 3 missing" in fails(3, "merge", "out", "-o", "merged")["message"]
    succeeds(*command, "--ranks", "0,3")
    succeeds("merge", "out", "-o", "merged")
    succeeds(*command, "--overwrite")
    Path("out/release/notes.txt").write_text("mine")
    assert fails(9, *command, "--overwrite")["found"] == "release/notes.txt"


def test_ranks_of_another_mesh_among_them() -> None:
    llama(Path("model"))
    succeeds("split", "model", "--tp", 2, *LEGACY)
    Path("out/release/mp_rank_02").mkdir()
    path = Path("out/release/mp_rank_01/model_optim_rng.pt")
    Path("out/release/mp_rank_02/model_optim_rng.pt").write_bytes(path.read_bytes())
    assert "no file of this set" in fails(3, "check", "out")["message"]
    Path("out/release/mp_rank_02/model_optim_rng.pt").unlink()
    path.write_bytes(Path("out/release/mp_rank_00/model_optim_rng.pt").read_bytes())
    assert tpshard("check", "out").code == 1


def test_what_megatron_cannot_hold() -> None:
    llama(Path("model"), tensors=llama_tensors(num_hidden_layers=6), num_hidden_layers=6)
    assert "evenly" in fails(2, "split", "model", "--tp", 2, "--uneven", *LEGACY)["message"]
    error = fails(4, "split", "model", "--tp", 1, "--pp", 4, "--pp-layers", "1,1,3,1", *LEGACY)
    assert "between the first and the last one" in error["message"] and "--format megatron" in error["hint"]
    assert "4 heads" in fails(4, "split", "model", "--tp", 3, *LEGACY)["message"]
    make("mixtral", Path("moe"), num_local_experts=6)
    assert "gives all of them as many" in fails(4, "split", "moe", "--tp", 4, "--ep", 4, *LEGACY)["message"]
    make("deepseek_v3", Path("base"), num_nextn_predict_layers=0)
    more = with_one_more(Path("base"), Path("more"), num_nextn_predict_layers=1)
    error = fails(2, "split", more, "--tp", 2, *LEGACY)
    assert "another name in newer versions" in error["message"] and "--engine-version" in error["hint"]
    assert "0.16, 0.20" in fails(4, "split", more, "--tp", 2, "--engine-version", "1", *LEGACY)["expected"]
