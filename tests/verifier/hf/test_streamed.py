"""Weights of transformers' classes, read by the operation that needs them: the same results, in less memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import transformers_runs as library
from tests.helpers.checkpoints import VARIANTS
from tests.helpers.grids import some
from tests.helpers.newer_checkpoints import NEWER
from tpshard.verifier.fault_catalogue import FAULTS
from tpshard.verifier.hf import streamed
from tpshard.verifier.hf.backend import TransformersBackend
from tpshard.verifier.hf.beside import UnshardedRun
from tpshard.verifier.hf.prepare import largest_block
from tpshard.verifier.model_types import TRIED
from tpshard.verifier.ranks.weights import Weights
from tpshard.verifier.report.verdict import Tier, layer_of
from tpshard.verifier.tiers import exact, native

Made = Callable[..., Path]
FAMILIES = (*library.ONE_OF_EACH, *(name for name in NEWER if VARIANTS[name].model_type in TRIED))
SHARED = [(name, 4, 2) for name in ("mixtral", "gpt_oss", "llama4_text", "qwen3_moe-stacked")]
GRID = [(name, tp, 1) for name in FAMILIES for tp in (2, 4)] + SHARED


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


@pytest.mark.parametrize(("name", "tp", "ep"), some(GRID, [("deepseek_v3", 2, 1), ("gpt_oss", 4, 2)]))
def test_results_are_those_of_weights_in_memory(name: str, tp: int, ep: int, made: Made, tmp_path: Path) -> None:
    one = library.opened(made(name), tp, tmp_path / "out", ep=ep)
    for tier in (exact, in_dtype):
        kept, read = both(tier, one)
        assert kept.status == "pass" and read == kept  # every figure of every module, to its last bit


@pytest.mark.parametrize(("name", "tp", "ep"), some(GRID, [("gpt_oss", 2, 1), ("llama4_text", 4, 2)]))
def test_faults_are_found_equally(name: str, tp: int, ep: int, made: Made, tmp_path: Path) -> None:
    one = library.opened(made(name), tp, tmp_path / "out", ep=ep)
    places = one.places(one.frame.layers[-1])
    for fault in ("sign-of-an-element-of-down", "out-scaled-by-tp"):
        if (damaged := FAULTS[fault].mutant(places)) is not None:
            kept, read = both(exact, one.with_ranks(damaged))
            assert kept.status == "fail" and read == kept, fault


@dataclass(frozen=True)
class Counted:
    """Weights that note how many elements were asked for at once."""

    weights: Weights
    asked: list[int] = field(default_factory=list)

    def names(self) -> Collection[str]:
        return self.weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(name)

    def get(self, name: str) -> Tensor:
        self.asked.append(math.prod(self.shape(name)))
        return self.weights.get(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        self.asked.append((stop - start) * math.prod(self.shape(name)[1:]))
        return self.weights.rows(name, start, stop)


# The second multiplies all experts in one product.
@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text"])
def test_no_more_is_read_at_once_than_a_matrix_and_no_more_kept_than_two_layers(
    name: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = library.opened(made(name), 2, tmp_path / "out")
    source, ranks = Counted(one.source), [Counted(rank) for rank in one.ranks]
    most = largest_block(one.frame)
    stacks = [shape for shape in one.frame.shapes.values() if len(shape) == 3]
    assert most < min(math.prod(shape) for shape in stacks) and most < math.prod(one.frame.shapes[one.frame.head])
    kept: list[int] = []
    leave = UnshardedRun.leave

    def noted(beside: UnshardedRun, layer: str) -> None:
        leave(beside, layer)
        kept.append(len({layer_of(name) for name in beside.recorder.records} - {None}))

    monkeypatch.setattr(UnshardedRun, "leave", noted)
    with torch.no_grad():
        assert exact(replace(one, source=source, ranks=ranks, most=most)).status == "pass"
    assert max(map(max, (source.asked, *(rank.asked for rank in ranks)))) <= most
    assert max(kept) <= 2 and kept[-1] == 0
