"""Models whose tensors are another architecture's: `--rules NAME`, and the refusal that suggests it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tpshard
from tests.helpers.command import LLAMA, fails, llama_tensors, succeeds
from tests.helpers.toys import Tensor, random_tensor, read_all, read_rank, write_checkpoint
from tpshard.cli.options import _rules, architectures


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def checkpoint(name: str, more: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    return write_checkpoint(Path(name), LLAMA | {"model_type": "Yi"} | changes, llama_tensors() | (more or {}))


def extra() -> Tensor:
    return random_tensor(np.random.default_rng(1), "F32", (4, 4))


def hint(model: Path) -> str:
    return str(fails(4, "plan", model, "--tp", 2)["hint"])


def test_a_built_in_architecture_by_name_splits_what_has_its_tensors() -> None:
    model, plain = checkpoint("yi"), checkpoint("plain", model_type="llama")
    result = succeeds("split", model, "--tp", 2, "--rules", "llama", "-o", "out")
    assert "tpshard check out --source yi --rules llama" in result.err
    succeeds("check", "out", "--source", model, "--rules", "llama")
    succeeds("merge", "out", "-o", "merged")
    assert read_all(Path("merged")) == read_all(model)
    tpshard.split(plain, 2, "of-plain")
    for rank in range(2):
        assert read_rank(Path("out"), rank, 2) == read_rank(Path("of-plain"), rank, 2)
    architecture = json.loads(Path("out/tpshard.json").read_text())["architecture"]
    assert (architecture["model_type"], architecture["rules"]) == ("Yi", "llama")


def test_a_model_type_is_a_name_too_and_a_path_is_a_file() -> None:
    model = checkpoint("yi")
    ranks = [tpshard.plan(model, 2, rules=rules).to_json()["ranks"] for rules in ("ministral", "llama")]
    assert ranks[0] == ranks[1]
    Path("llama").write_text("no rules")
    succeeds("plan", model, "--tp", 2, "--rules", "llama")
    for given in ("./llama", Path("llama").absolute()):
        assert "bad rules file" in fails(2, "plan", model, "--tp", 2, "--rules", given)["message"]
    assert "(closest: llama" in fails(2, "plan", model, "--tp", 2, "--rules", "lama")["message"]


def test_the_refusal_suggests_the_rules_that_fit_every_tensor() -> None:
    assert "every tensor fits --rules llama" in hint(checkpoint("yi"))
    assert "every tensor fits --rules mistral" in hint(checkpoint("named", architectures=["MistralForCausalLM"]))
    classes = {"architectures": ["LlamaForCausalLM"]}
    other = hint(checkpoint("other", {"model.layers.0.extra.weight": extra()}, **classes))
    assert "a class of llama, whose rules do not fit: no llama rule matches the tensor model.layers.0.extra" in other
    assert "fits --rules" not in other and "archs draft" in other


def test_the_text_model_of_a_larger_one() -> None:
    tensors = {f"language_model.{name}": tensor for name, tensor in llama_tensors().items()}
    config = {"model_type": "seeing", "text_config": LLAMA | {"model_type": "new"}}
    model = write_checkpoint(Path("model"), config, tensors | {"vision.weight": extra()})
    assert "every tensor fits --rules llama" in hint(model)
    succeeds("split", model, "--tp", 2, "--rules", "llama", "-o", "out")
    succeeds("check", "out", "--source", model, "--rules", "llama")
    succeeds("merge", "out", "-o", "merged")
    assert read_all(Path("merged")) == read_all(model)
    assert json.loads(Path("out/tpshard.json").read_text())["architecture"]["text"]["replicated"] == ["vision"]


def test_completion_has_names_files_and_directories() -> None:
    for name in ("llama-mine.toml", "llama.txt"):
        Path(name).touch()
    Path("llamas").mkdir()
    assert _rules("llama") == [*architectures("llama"), "llama-mine.toml", "llamas/"]
    assert {"llama", "llama4_text"} <= set(architectures("llama"))
