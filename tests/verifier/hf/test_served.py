"""The families that are served with many GPUs, as published: `verify` proves their shards by transformers' class."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tpshard
from tests.engines import engine_models
from tests.helpers import served_checkpoints, served_forms
from tests.helpers.checkpoints import make
from tests.helpers.command import succeeds
from tests.helpers.command import tpshard as command
from tests.helpers.further_checkpoints import FURTHER
from tests.helpers.grids import some
from tpshard.execute.publish import Settings

PROVED = (
    "gemma4",
    "gemma4_unified",
    "glm46v",
    "kimi_k25",
    "mistral3 with mistral4",
    "kimi_linear",
    "minimax_m3_vl",
    "minimax_m3_vl, numbers for layers",
    "bailing_hybrid, Ling 3.0",
)


@pytest.mark.parametrize("name", some(PROVED, ("gemma4_unified",)))
def test_published_forms(name: str, quick: Settings, tmp_path: Path) -> None:
    require_proved(served_checkpoints.make(name, tmp_path / "model"), quick, tmp_path)


@pytest.mark.parametrize("name", some(list(FURTHER), ("inkling", "qwen4_exp")))
def test_further_families(name: str, quick: Settings, tmp_path: Path) -> None:
    require_proved(make(name, tmp_path / "model"), quick, tmp_path)


@pytest.mark.parametrize("published", some([True, False], [True]))
def test_a_router_whose_one_choice_is_scaled_to_1(published: bool, quick: Settings, tmp_path: Path) -> None:
    """Its gradients are rounding alone: no rank holds too much of it."""
    require_proved(served_forms.make("glm5_next", tmp_path / "model", published=published), quick, tmp_path)


@pytest.mark.parametrize("format", ["native", "vllm"])
def test_experts_that_compute_nothing_have_no_matrices(format: str, quick: Settings, tmp_path: Path) -> None:
    """As published: transformers' class makes some for them, and reads none. Another rank's expert is found."""
    model, out = engine_models.make("longcat_flash", tmp_path / "model", {"head_dim": 16}), tmp_path / "out"
    require_proved(model, quick, tmp_path, format=format)
    (file,) = out.glob("rank-00001-*.safetensors" if format == "native" else "model-rank-1-*.safetensors")
    tensors = load_file(file)
    name = next(each for each in sorted(tensors) if each.endswith(("experts.3.down_proj.weight", "w2_weight")))
    tensors[name] = tensors[name].flip(-1).contiguous()
    with safe_open(file, "pt") as opened:
        save_file(tensors, file, metadata=opened.metadata())
    found = command("verify", out, "--source", model, "--tier", "exact", "--json")
    assert found.code == 1 and "mlp.experts" in found.json["reason"], found.json["reason"]


def require_proved(model: Path, quick: Settings, tmp_path: Path, *, format: str = "native") -> None:
    tpshard.split(model, 2, tmp_path / "out", format=format, settings=quick)
    asked = ("verify", tmp_path / "out", "--source", model, "--tier", "weights", "--tier", "exact", "--json")
    found = succeeds(*asked).json
    assert found["verdict"] == "pass", found["reason"]
    assert [tier["name"] for tier in found["tiers"]] == ["weights", "exact"]
    assert found["settings"]["engine"] == "transformers"
