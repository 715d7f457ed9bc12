"""`tpshard verify` where transformers' own model class runs the ranks."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.checkpoints import make
from tests.helpers.command import succeeds, tpshard
from tpshard.api import convert as api
from tpshard.execute.publish import Settings

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


def test_several_processes_and_some_layers(pair: tuple[Path, Path], warm_processes: None) -> None:
    found = tpshard(
        "verify", pair[1], *CPU, "--tier", "exact,native", "--layers", "0,-1", "--nproc-per-node", "2", "--json"
    ).json
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
        (("--tier", "exact", "--stream"), 4, "--stream is not for --engine transformers"),
        (("--tier", "exact", "--sequence-parallel"), 4, "--sequence-parallel is not for --engine transformers"),
        (("--tier", "exact", "--layers", "7"), 2, "there is no layer 7"),
    ],
)
def test_what_is_refused(pair: tuple[Path, Path], options: tuple[str, ...], code: int, said: str) -> None:
    result = tpshard("verify", pair[1], *CPU, *options)
    assert (result.code, result.out) == (code, "") and said in result.err


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
