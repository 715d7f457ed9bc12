"""Quantised checkpoints, kept quantised: every format is split, checked and merged bit for bit, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.command import succeeds
from tests.helpers.quantised import FORMATS, make
from tests.helpers.toys import read_all, read_rank


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tp", [2, 4])
def test_split_check_and_merge(name: str, tp: int) -> None:
    model = make(Path("model"), name)
    succeeds("split", model, "--tp", tp, "-o", "out")
    succeeds("check", "out", "--source", model)
    succeeds("merge", "out", "-o", "back")
    assert read_all(Path("back")) == read_all(model)
    for file in ("config.json", "model.safetensors.index.json"):
        if file == "config.json":
            assert (Path("back") / file).read_bytes() == (model / file).read_bytes()
    shapes = {name: tensor.shape for name, tensor in read_rank(Path("out"), 0, tp).items()}
    print({k: v for k, v in shapes.items() if "layers.0." in k and ("down" in k or "gate" in k)})
