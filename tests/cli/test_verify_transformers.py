"""`tpshard verify` where transformers' own model class runs the ranks."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import make
from tests.helpers.command import succeeds, tpshard
from tests.helpers.grids import some
from tpshard.api import convert as api
from tpshard.execute.publish import Settings
from tpshard.verifier.hf import prepare, streamed

CPU = ("--device", "cpu", "--tokens", "2")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small Mixtral and its split for two ranks, beside each other."""
    folder = tmp_path_factory.mktemp("pair")
    model = make("mixtral", folder / "model", dtype="bfloat16")
    api.split(model, 2, folder / "model-tp2", settings=Settings(fsync=False, workers=1))
    return model, folder / "model-tp2"


def test_a_model_that_the_decoder_lacks_passes_in_all_tiers(pair: tuple[Path, Path]) -> None:
    found = tpshard("verify", pair[1], *CPU, "--json").json
    assert found["verdict"] == "pass", found["reason"]
    assert [(tier["name"], tier["status"]) for tier in found["tiers"]] == [
        ("bytes", "pass"),
        ("weights", "pass"),
        ("exact", "pass"),
        ("native", "pass"),
    ]
    assert found["settings"]["engine"] == "transformers" and "transformers" in found["volatile"]
    assert {canary["status"] for canary in found["canaries"]} == {"caught"} and len(found["canaries"]) >= 10
    exact = found["tiers"][2]
    assert exact["metrics"]["router_error"] <= 1e-12 and exact["worst"]["layer"] is not None
    assert any(module["module"] == "model.layers.0.mlp.gate" for module in exact["modules"])
    assert found["warnings"] == []


def test_exchanged_files_are_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shards = Path(shutil.copytree(pair[1], tmp_path / "shards"))
    one, two = (shards / f"rank-{rank:05}-of-00002.safetensors" for rank in (0, 1))
    one.rename(shards / "x")
    two.rename(one)
    (shards / "x").rename(two)
    result = tpshard("verify", shards, "--source", pair[0], *CPU, "--tier", "weights,exact")
    assert result.code == 1
    assert result.out.splitlines()[0].endswith("the files of ranks 0 and 1 are exchanged")


@pytest.mark.parametrize("how", some(["--stream", "--no-stream"], ["--stream"]))
def test_several_processes_and_some_layers(pair: tuple[Path, Path], warm_processes: None, how: str) -> None:
    options = ("--tier", "exact,native", "--layers", "0,-1", "--nproc-per-node", "2", how)
    found = tpshard("verify", pair[1], *CPU, *options, "--json").json
    assert found["verdict"] == "pass", found["reason"]
    assert (found["settings"]["processes"], found["settings"]["layers"]) == (2, [0, 2])


def test_a_model_that_the_decoder_has_by_either_engine(tmp_path: Path) -> None:
    model = make("llama-bf16", tmp_path / "model")
    api.split(model, 2, tmp_path / "model-tp2", settings=Settings(fsync=False, workers=1))
    for engine, used in (("auto", "tpshard"), ("tpshard", "tpshard"), ("transformers", "transformers")):
        found = tpshard("verify", tmp_path / "model-tp2", *CPU, "--engine", engine, "--json").json
        assert (found["verdict"], found["settings"]["engine"]) == ("pass", used)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--engine", "tpshard", "--tier", "exact"), 4, "verify does not know the model type 'mixtral'"),
        (("--engine", "tpshard"), 4, "verify does not know the model type 'mixtral'"),
        (("--engine", "vllm"), 2, "vllm"),
        (("--tier", "exact", "--sequence-parallel"), 4, "--sequence-parallel is not for --engine transformers"),
        (("--tier", "exact", "--layers", "7"), 2, "there is no layer 7"),
    ],
)
def test_what_is_refused(pair: tuple[Path, Path], options: tuple[str, ...], code: int, said: str) -> None:
    result = tpshard("verify", pair[1], *CPU, *options)
    assert (result.code, result.out) == (code, "") and said in result.err
    if "does not know" in said:
        assert "--engine transformers" in result.err and "--rules NAME" in result.err


def test_streamed_it_is_the_same(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 1 << 10)
    kept, read = (tpshard("verify", pair[1], *CPU, option, "--json").json for option in ("--no-stream", "--stream"))
    assert (kept["settings"].pop("streamed"), read["settings"].pop("streamed")) == (False, True)
    assert kept.pop("volatile").keys() == read.pop("volatile").keys() and read == kept
    assert read["verdict"] == "pass" and len(read["canaries"]) >= 10


def test_it_is_streamed_where_memory_is_short(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "usable", lambda *_: 3_000_000)
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 1 << 10)
    short = tpshard("verify", pair[1], *CPU, "--tier", "exact", "--layers", "0", "--json")
    assert short.json["verdict"] == "pass" and short.json["settings"]["streamed"] is True
    assert "each of 2 tokens reads all weights again" in short.err
    refused = tpshard("verify", pair[1], *CPU, "--tier", "exact", "--no-stream")
    assert refused.code == 6 and "--stream needs less" in refused.err


def test_a_class_that_takes_all_experts_at_once_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4's, if its one product of all experts were not taken apart."""
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 1 << 10)
    monkeypatch.delitem(streamed._IN_PARTS, torch.bmm)
    model, shards = make("llama4_text", tmp_path / "model"), tmp_path / "shards"
    succeeds("split", model, "--tp", 2, "-o", shards, "-q", "--no-fsync")
    result = tpshard("verify", shards, "--source", model, *CPU, "--stream", "--tier", "exact")
    assert (result.code, result.out) == (4, "")
    for said in ("experts.gate_up_proj at once", "GB", "--no-stream keeps all weights in memory"):
        assert said in result.err


def test_without_transformers(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    asked = tpshard("verify", pair[1], *CPU, "--tier", "exact")
    assert asked.code == 4 and "pip install transformers, or --tier bytes" in asked.err
    left = tpshard("verify", pair[1], *CPU)
    assert left.code == 0 and "exact: a mixtral model needs transformers: pip install" in left.out


def test_another_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = make("mixtral", tmp_path / "other", num_key_value_heads=4)
    result = tpshard("verify", pair[1], "--source", other, *CPU, "--tier", "exact")
    assert result.code == 2 and "the shards are of another model than the source" in result.err


def test_not_a_number(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(pair[0], tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.2.block_sparse_moe.experts.5.w1.weight"
    tensors[name][3, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = tpshard("verify", pair[1], "--source", model, *CPU, "--tier", "exact")
    assert result.code == 3 and name in result.err


@pytest.mark.parametrize("variant", ["gpt_oss", "phi3", "olmo2", "apertus"])
def test_models_as_they_are_published(variant: str, tmp_path: Path) -> None:
    """A padding token that no rank's rows reach (gpt-oss, Phi-4, OLMo 2), tensors without dims (Apertus)."""
    model, shards = make(variant, tmp_path / "model", pad_token_id=250), tmp_path / "shards"
    succeeds("split", model, "--tp", 2, "-o", shards, "-q", "--no-fsync")
    result = succeeds("verify", shards, "--source", model, "--tokens", 1, "--json")
    assert [(tier["name"], tier["status"]) for tier in result.json["tiers"]] == [
        ("bytes", "pass"), ("weights", "pass"), ("exact", "pass"), ("native", "pass")
    ]  # fmt: skip
