"""load_rank: the tensors of one rank, as safetensors itself reads them."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import load_file

import tpshard
from tpshard import loader
from tpshard.errors import CorruptError, UnsupportedError, UsageError


@pytest.mark.parametrize("limit", [None, 30_000])
@pytest.mark.parametrize("variant", ["llama-bf16", "opt-f16", "gpt2"])
def test_equals_what_safetensors_reads(
    tmp_path: Path, variant: str, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "STAGE", 4096)
    model = checkpoints.make(variant, tmp_path / "model")
    tpshard.split(model, 2, tmp_path / "out", max_file_size=limit)
    for rank in range(2):
        loaded = tpshard.load_rank(tmp_path / "out", rank)
        expected: dict[str, torch.Tensor] = {}
        for path in (tmp_path / "out").glob(f"rank-{rank:05}*.safetensors"):
            expected.update(load_file(path))
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_refuses_a_rank_that_is_not_there(tmp_path: Path) -> None:
    model = checkpoints.make("llama", tmp_path / "model")
    tpshard.split(model, 4, tmp_path / "out", ranks=[0])
    with pytest.raises(UsageError, match="no rank 4"):
        tpshard.load_rank(tmp_path / "out", 4)
    with pytest.raises(CorruptError, match="rank 2 is missing"):
        tpshard.load_rank(tmp_path / "out", 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    model = checkpoints.make("llama", tmp_path / "model")
    tpshard.split(model, 2, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="no GPU"):
        tpshard.load_rank(tmp_path / "out", 0, "cuda")
