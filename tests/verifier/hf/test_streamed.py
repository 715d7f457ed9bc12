"""Weights of transformers' classes, read by the operation that needs them: the same results, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers import transformers_runs as library
from tests.helpers.grids import some
from tests.helpers.newer_checkpoints import NEWER
from tpshard.verifier.fault_catalogue import FAULTS
from tpshard.verifier.hf import streamed
from tpshard.verifier.hf.backend import TransformersBackend
from tpshard.verifier.hf.prepare import largest_block
from tpshard.verifier.report.verdict import Tier
from tpshard.verifier.tiers import exact, native

Made = Callable[..., Path]
FAMILIES = (*library.ONE_OF_EACH, *NEWER)
# Experts in a stack and one by one, turned, multiplied all in one product, with biases; a fused q, k and v, Conv1D,
# mixers, a norm over the heads of all ranks, an indexer, a table for each layer.
UNLIKE = (("deepseek_v3", 2), ("gpt_oss", 4), ("llama4_text", 2), ("gpt2", 4), ("granitemoehybrid", 2), ("olmo2", 4))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 rows, of which the tests' tables have several."""
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 1 << 10)


def both(tier: Callable[[TransformersBackend], Tier], one: TransformersBackend) -> tuple[Tier, Tier]:
    """A tier with all weights in memory, and streamed."""
    with torch.no_grad():
        return tier(one), tier(replace(one, most=largest_block(one.frame)))


def in_dtype(one: TransformersBackend) -> Tier:
    steps, wide = one.teach(2)
    return native(one, torch.bfloat16, steps, wide)


@pytest.mark.parametrize(("name", "tp"), some([(name, tp) for name in FAMILIES for tp in (2, 4)], UNLIKE))
def test_results_are_those_of_weights_in_memory(name: str, tp: int, made: Made, tmp_path: Path) -> None:
    one = library.opened(made(name), tp, tmp_path / "out")
    for tier in (exact, in_dtype):
        kept, read = both(tier, one)
        assert kept.status == "pass" and read == kept  # every figure of every module, to its last bit


@pytest.mark.parametrize(("name", "tp"), some([(name, tp) for name in FAMILIES for tp in (2, 4)], UNLIKE[:3]))
def test_faults_are_found_equally(name: str, tp: int, made: Made, tmp_path: Path) -> None:
    one = library.opened(made(name), tp, tmp_path / "out")
    places = one.places(one.frame.layers[-1])
    for fault in (
        "sign-of-an-element-of-down",
        "heads-swapped-in-a-rank",
        "gate-and-up-exchanged",
        "head-shifted-by-a-rank",
    ):
        if (damaged := FAULTS[fault].mutant(places)) is not None:
            kept, read = both(exact, one.with_ranks(damaged))
            assert kept.status == "fail" and read == kept, fault
