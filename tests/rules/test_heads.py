"""Heads of other tasks, and models without a head: of every architecture, by one mechanism."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.command import fails, succeeds
from tests.helpers.head_checkpoints import WITH_HEADS, random_floats, with_head
from tests.helpers.toys import read_all, read_rank, write_checkpoint
from tpshard.rules.architecture import all_builtin
from tpshard.rules.patterns import HEADS

Made = Callable[..., Path]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", WITH_HEADS)
def test_there_and_back(case: str, made: Made, tmp_path: Path) -> None:
    model, head = with_head(case, made, tmp_path / "model")
    out = tmp_path / "out"
    _, _, said = succeeds("split", model, "--tp", 2, "-o", out, "--no-fsync").err.partition("whole on every rank: ")
    assert set(said.partition("\n")[0].split(", ")) - {""} == head.keys()
    succeeds("check", out, "--source", model)
    succeeds("merge", out, "-o", tmp_path / "merged", "--no-fsync")
    assert read_all(tmp_path / "merged") == read_all(model)
    assert all(head.items() <= read_rank(out, rank, 2).items() for rank in range(2))
    found = succeeds("verify", out, "--source", model, "--tier", "weights", "--json").json
    assert (found["verdict"], {name for tier in found["tiers"] for name in tier["not_run"]}) == ("pass", head.keys())


def test_a_model_without_a_head_runs(made: Made, tmp_path: Path) -> None:
    model, _ = with_head("none, by transformers' class", made, tmp_path / "model")
    succeeds("split", model, "--tp", 2, "-o", tmp_path / "out", "--no-fsync")
    assert succeeds("verify", tmp_path / "out", "--tier", "exact", "--tokens", 1, "--json").json["verdict"] == "pass"


def test_inside_a_larger_model_a_head_is_said_too(made: Made, tmp_path: Path) -> None:
    tensors = {f"language_model.{name}": tensor for name, tensor in read_all(made("llama-gqa")).items()}
    score = random_floats((2, 64))
    text = json.loads((made("llama-gqa") / "config.json").read_text())
    config = {"model_type": "some_vl", "text_config": text}
    for place in ("score.weight", "language_model.score.weight"):
        model = write_checkpoint(tmp_path / place, config, tensors | {place: score})
        assert f"a head of another task, whole on every rank: {place}" in succeeds("plan", model, "--tp", 2).err


def test_every_architecture_may_lack_its_head_and_have_another() -> None:
    for architecture in all_builtin():
        patterns = {pattern for rule in architecture.rules for pattern in rule.patterns}
        assert patterns.isdisjoint((*architecture.tied, *HEADS)), architecture.name


def test_a_tensor_that_is_no_head_is_refused(made: Made, tmp_path: Path) -> None:
    tensors = read_all(made("llama-gqa"))
    extra = random_floats((2, 64))
    config = json.loads((made("llama-gqa") / "config.json").read_text())
    for name in ("score.0.1.weight", "model.score.weight", "model.layers.0.score.weight", "scores.weight"):
        model = write_checkpoint(tmp_path / name, config, tensors | {name: extra})
        assert fails(4, "plan", model, "--tp", 2)["tensor"] == name


def test_an_engine_is_not_given_a_head_that_it_was_not_compared_with(made: Made, tmp_path: Path) -> None:
    for engine, case in (("vllm", "tokens"), ("vllm", "reward"), ("sglang", "sequences")):
        model, _ = with_head(case, made, tmp_path / f"{engine}-{case}")
        assert "score." in fails(4, "plan", model, "--tp", 2, "--format", engine)["message"]


def test_a_classifier_of_sequences_is_as_vllm_holds_it(made: Made, tmp_path: Path) -> None:
    """Its head whole on every rank, and in F32; a bias is made while vLLM loads a checkpoint, and refused."""
    model, head = with_head("sequences", made, tmp_path / "model")
    out = tmp_path / "out"
    succeeds("split", model, "--tp", 2, "--format", "vllm", "-o", out, "--no-fsync")
    for rank in range(2):
        held = read_all(out, f"model-rank-{rank}-*.safetensors")
        assert held["score.weight"] == head["score.weight"] and head["score.weight"].dtype == "F32"
        assert "lm_head.weight" not in held and held["model.embed_tokens.weight"].shape == (128, 64)
    succeeds("check", out, "--source", model)
    succeeds("merge", out, "-o", tmp_path / "merged", "--no-fsync")
    assert read_all(tmp_path / "merged") == read_all(model)
    biased = read_all(model) | {"score.bias": random_floats((2,))}
    config = json.loads((model / "config.json").read_text())
    other = write_checkpoint(tmp_path / "biased", config, biased)
    assert "score.bias" in fails(4, "plan", other, "--tp", 2, "--format", "vllm")["message"]
