"""Families that remote code alone runs: every rank's tensors by hand, there and back; verify does not run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.command import succeeds, tpshard
from tests.helpers.remote_checkpoints import REMOTE, checkpoint
from tests.helpers.toys import Tensor, read_all, read_rank


def numbers(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.frombuffer(tensor.data, "<f4").reshape(tensor.shape)


@pytest.mark.parametrize("model_type", REMOTE)
def test_there_and_back(model_type: str, tmp_path: Path) -> None:
    model, out = checkpoint(model_type, tmp_path / "model"), tmp_path / "out"
    succeeds("split", model, "--tp", 2, "-o", out, "--no-fsync")
    succeeds("check", out, "--source", model)
    succeeds("merge", out, "-o", tmp_path / "merged", "--no-fsync")
    source = read_all(model)
    assert read_all(tmp_path / "merged") == source
    for rank in range(2):
        held = read_rank(out, rank, 2)
        assert held.keys() == source.keys()
        for name, tensor in source.items():
            module, _, suffix = name.rpartition(".")
            blocks, expected = REMOTE[model_type][1][module][1], numbers(tensor)
            if blocks:
                starts = np.cumsum((0, *blocks))[:-1]
                rows = [
                    np.arange(a + n * rank // 2, a + n * (rank + 1) // 2) for a, n in zip(starts, blocks, strict=True)
                ]
                expected = expected[np.concatenate(rows)]
            elif blocks == () and suffix == "weight":
                expected = np.split(expected, 2, 1)[rank]
            assert np.array_equal(numbers(held[name]), expected), name


def test_of_what_nobody_runs_the_bytes_are_proved(tmp_path: Path) -> None:
    model, out = checkpoint("baichuan", tmp_path / "model"), tmp_path / "out"
    succeeds("split", model, "--tp", 2, "-o", out, "--no-fsync")
    assert tpshard("verify", out, "--source", model, "--tier", "bytes").code == 0
    result = tpshard("verify", out, "--source", model, "--tier", "exact")
    assert result.code == 4 and "this baichuan model, which has ALiBi in the place of" in result.err
