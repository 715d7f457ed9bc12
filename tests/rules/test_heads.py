"""Heads of other tasks, and models without a head: of every architecture, by one mechanism."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines import engine_heads
from tests.helpers.command import fails, succeeds
from tests.helpers.grids import some
from tests.helpers.head_checkpoints import WITH_HEADS, random_floats, with_head
from tests.helpers.toys import Tensor, read_all, read_rank, write_checkpoint
from tpshard.rules.architecture import all_builtin
from tpshard.rules.patterns import HEADS

Made = Callable[..., Path]
REFUSED_FOR_VLLM = {
    "tokens": "score.bias: its class makes it while it loads",
    "classifier": "classifier.weight: its classes have the head as score",
    "reward, of one module": "LlamaForRewardModel from sharded_state: it makes a model without a head of it",
    "value beside logits": "the class that its config names has no such head in vLLM",
    "jamba, sequences": "JambaForSequenceClassification from sharded_state: its class has the head of the",
    "llama, questions": "LlamaForQuestionAnswering from sharded_state: it has no classes of decoders for this task",
    "gemma3, none": "Gemma3TextModel from sharded_state: its class has names of its own, which were not compared",
}
WITHOUT = ("none", "none, by transformers' class", "in both directions, none", "tied", "own")
"""Models without a head; the last has one that its class does not take, the one before says that it would be tied."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", WITH_HEADS)
def test_there_and_back(case: str, made: Made, tmp_path: Path) -> None:
    model, head = with_head(case, made, tmp_path / "model")
    out = tmp_path / "out"
    _, _, said = succeeds("split", model, "--tp", 2, "-o", out, "--no-fsync").err.partition("which no rule cuts: ")
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
        assert f"a head of another task, which no rule cuts: {place}" in succeeds("plan", model, "--tp", 2).err


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


@pytest.mark.parametrize(("case", "said"), REFUSED_FOR_VLLM.items())
def test_what_vllm_does_not_load_is_refused_with_the_reason(case: str, said: str, made: Made, tmp_path: Path) -> None:
    out = tmp_path / "model"
    model = with_head(case, made, out)[0] if case in WITH_HEADS else engine_heads.make(case, out)
    assert said in fails(4, "plan", model, "--tp", 2, "--format", "vllm")["message"]


def test_an_engine_is_not_given_a_head_that_it_was_not_compared_with(made: Made, tmp_path: Path) -> None:
    model, _ = with_head("sequences", made, tmp_path / "model")
    assert "score." in fails(4, "plan", model, "--tp", 2, "--format", "sglang")["message"]
    model, _ = with_head("none", made, tmp_path / "none")
    assert "not compared: Qwen3Model" in fails(4, "plan", model, "--tp", 2, "--format", "sglang")["message"]
    model, _ = with_head("none", made, tmp_path / "stages")
    refused = fails(4, "plan", model, "--tp", 1, "--pp", 2, "--format", "vllm")
    assert "Qwen3Model on each stage of a pipeline" in refused["message"]


@pytest.mark.parametrize("case", some(WITHOUT, ["tied", "own"]))
def test_a_model_without_a_head_is_as_vllm_holds_it(case: str, made: Made, tmp_path: Path) -> None:
    """Its embedding under its own name, also where it is tied; a head that is there lies beside."""
    model, _ = with_head(case if case in WITH_HEADS else "none", made, tmp_path / "model")
    if case == "tied":
        write_checkpoint(model, read_config(model) | {"tie_word_embeddings": True}, read_all(model))
    if case == "own":
        stored = read_all(model)
        write_checkpoint(model, read_config(model), stored | {"lm_head.weight": stored["model.embed_tokens.weight"]})
    out = tmp_path / "out"
    assert "with --runner pooling" in succeeds(*split_for_vllm(model, out)).err
    for rank in range(2):
        held = read_all(out, f"model-rank-{rank}-*.safetensors")
        assert "lm_head.weight" not in held and held["model.embed_tokens.weight"].shape == (128, 64)
    succeeds("check", out, "--source", model)
    succeeds("merge", out, "-o", tmp_path / "merged", "--no-fsync")
    assert read_all(tmp_path / "merged") == read_all(model)
    assert succeeds("verify", out, "--source", model, "--tier", "weights", "--json").json["verdict"] == "pass"


def test_a_reward_model_is_as_vllm_holds_it(made: Made, tmp_path: Path) -> None:
    """The head's matrices are cut by the ranks' hidden features, and in F32."""
    model, head = with_head("reward", made, tmp_path / "model")
    out = tmp_path / "out"
    succeeds(*split_for_vllm(model, out))
    first, second = (read_all(out, f"model-rank-{rank}-*.safetensors") for rank in range(2))
    for name, axis in (("score.0.weight", 0), ("score.0.bias", 0), ("score.2.weight", 1)):
        halves = [numbers(held[name]) for held in (first, second)]
        assert np.array_equal(np.concatenate(halves, axis), numbers(head[name])), name
    assert first["score.2.bias"] == second["score.2.bias"] == head["score.2.bias"]
    succeeds("check", out, "--source", model)
    succeeds("merge", out, "-o", tmp_path / "merged", "--no-fsync")
    assert read_all(tmp_path / "merged") == read_all(model)


def numbers(tensor: Tensor) -> np.ndarray[Any, Any]:
    assert tensor.dtype == "F32"
    return np.frombuffer(tensor.data, "<f4").reshape(tensor.shape)


def split_for_vllm(model: Path, out: Path) -> tuple[Any, ...]:
    return ("split", model, "--tp", 2, "--format", "vllm", "-o", out, "--no-fsync")


def read_config(model: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((model / "config.json").read_text())
    return found


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
