"""Mistral's own form as input: params.json in place of config.json, and consolidated.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tpshard
from tests.helpers.by_hand import tensors_of, tensors_of_file
from tests.helpers.command import fails, succeeds
from tests.helpers.mistral_form import CUTS, in_fp8, published
from tests.helpers.served_cuts import held
from tests.helpers.toys import contents, read_all
from tpshard.execute.publish import Settings


@pytest.mark.parametrize(("kind", "files"), [("7b", 1), ("pixtral", 1), ("mixtral", 2), ("large 3", 2)])
def test_there_and_back(kind: str, files: int, quick: Settings, tmp_path: Path) -> None:
    import torch

    model = published(tmp_path / "model", kind, files)
    source = tensors_of(model)
    for tp in (2, 4):
        tpshard.split(model, tp, tmp_path / f"{tp}", settings=quick)
        for rank in range(tp):
            found = tensors_of_file(tmp_path / f"{tp}" / f"rank-{rank:05}-of-{tp:05}.safetensors")
            assert found.keys() == source.keys()
            for name, whole in source.items():
                wanted = held(name, whole, CUTS, rank, tp).contiguous()
                assert torch.equal(found[name].view(torch.uint8), wanted.view(torch.uint8)), f"{rank}: {name}"
    assert tpshard.check(tmp_path / "2", model, settings=quick).equal
    tpshard.reshard(tmp_path / "2", 4, tmp_path / "resharded", settings=quick)
    assert contents(tmp_path / "resharded") == contents(tmp_path / "4")
    tpshard.merge(tmp_path / "4", tmp_path / "merged", settings=quick)
    assert read_all(tmp_path / "merged") == read_all(model)
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {path.name for path in model.iterdir()}
    assert (tmp_path / "merged" / "params.json").read_bytes() == (model / "params.json").read_bytes()


def test_through_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "model", "7b")
    plan = succeeds("plan", "model", "--tp", 2, "--json").json
    assert plan["architecture"]["model_type"] == "mistral_native" and plan["possible_tp"] == [1, 2, 4, 8]
    succeeds("split", "model", "--tp", 2, "--dtype", "float32", "-o", "out")
    assert not Path("out/config.json").exists() and Path("out/params.json").exists()
    assert succeeds("check", "out", "--source", "model").code == 0
    assert succeeds("verify", "out", "--source", "model", "--tier", "bytes", "--json").json["verdict"] == "pass"
    refused = fails(4, "split", "model", "--tp", 2, "--format", "sglang", "-o", "sglang")
    assert "'mistral_native'" in refused["message"]


def test_fp8_scales_go_with_their_weights(quick: Settings, tmp_path: Path) -> None:
    """As in Mistral Large 3: one scale for each matrix, and one for what it is multiplied with."""
    model = in_fp8(published(tmp_path / "model", "7b"))
    tensors = read_all(model)
    tpshard.split(model, 2, tmp_path / "out", settings=quick)
    found = read_all(tmp_path / "out", "rank-00001-*.safetensors")
    assert found["layers.0.attention.wk.weight"].shape == (16, 64)
    assert found["layers.0.attention.wk.qscale_weight"] == tensors["layers.0.attention.wk.qscale_weight"]
    assert tpshard.check(tmp_path / "out", model, settings=quick).equal
    tpshard.merge(tmp_path / "out", tmp_path / "merged", settings=quick)
    assert read_all(tmp_path / "merged") == tensors


def test_a_config_json_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many repositories have both."""
    monkeypatch.chdir(tmp_path)
    model = published(tmp_path / "model", "7b")
    llama = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 8}
    (model / "config.json").write_text(json.dumps(llama | {"num_hidden_layers": 1, "vocab_size": 10}))
    assert "no llama rule matches the tensor" in fails(4, "plan", "model", "--tp", 2)["message"]
    for name in ("config.json", "params.json"):
        (model / name).unlink()
    assert fails(3, "plan", "model", "--tp", 2)["message"] == "no config.json beside the weights"


def test_another_kind_of_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = published(tmp_path / "model", "7b")
    (model / "params.json").write_text(json.dumps({"model_type": "mamba", "dim": 64, "n_layers": 2}))
    assert "no rules for model_type 'mamba'" in fails(4, "plan", "model", "--tp", 2)["message"]
