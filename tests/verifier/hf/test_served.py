"""The families that are served with many GPUs, as published: `verify` proves their shards by transformers' class."""

from __future__ import annotations

from pathlib import Path

import pytest

import tpshard
from tests.helpers.command import succeeds
from tests.helpers.grids import some
from tests.helpers.served_checkpoints import make
from tpshard.execute.publish import Settings

PROVED = ("gemma4", "gemma4_unified", "glm46v", "kimi_k25", "mistral3 with mistral4")


@pytest.mark.parametrize("name", some(PROVED, ("gemma4_unified",)))
def test_the_text_model_is_proved(name: str, quick: Settings, tmp_path: Path) -> None:
    model = make(name, tmp_path / "model")
    tpshard.split(model, 2, tmp_path / "out", settings=quick)
    found = succeeds("verify", tmp_path / "out", "--source", model, "--tier", "weights,exact", "--json").json
    assert found["verdict"] == "pass", found["reason"]
    assert found["settings"]["engine"] == "transformers"
    assert any(part in name for part in ("vision", "visual") for name in found["not_run"])
