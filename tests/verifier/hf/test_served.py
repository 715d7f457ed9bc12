"""The families that are served with many GPUs, as published: `verify` proves their shards by transformers' class."""

from __future__ import annotations

from pathlib import Path

import pytest

import tpshard
from tests.helpers import served_checkpoints, served_forms
from tests.helpers.checkpoints import make
from tests.helpers.command import succeeds
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


def require_proved(model: Path, quick: Settings, tmp_path: Path) -> None:
    tpshard.split(model, 2, tmp_path / "out", settings=quick)
    command = ("verify", tmp_path / "out", "--source", model, "--tier", "weights", "--tier", "exact", "--json")
    found = succeeds(*command).json
    assert found["verdict"] == "pass", found["reason"]
    assert [tier["name"] for tier in found["tiers"]] == ["weights", "exact"]
    assert found["settings"]["engine"] == "transformers"
