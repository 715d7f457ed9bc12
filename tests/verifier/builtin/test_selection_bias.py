"""A bias that only chooses experts: choices are pinned, so no logit depends on it, and it is compared by itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import tpshard
from tests.helpers.grids import some
from tpshard.execute.publish import Settings

BIASED = ["deepseek_v3", "deepseek_v32", "ernie4_5_moe", "minimax_m2", "nemotron_h", "afmoe"]
TIERS = ("exact", "native")


def reverse_choice_biases(file: Path) -> int:
    """Reverse every bias that only chooses, in one rank's file; how many there are."""
    with safe_open(file, "pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    biases = [name for name in tensors if name.endswith(("correction_bias", "expert_bias"))]
    save_file(tensors | {name: tensors[name].flip(-1).contiguous() for name in biases}, file, metadata)
    return len(biases)


COMPARED = some(
    [(name, tier, ranks) for name in BIASED for tier in TIERS for ranks in ((0, 1), (1,))],
    [(name, TIERS[i % 2], (1,) if i // 2 % 2 else (0, 1)) for i, name in enumerate(BIASED)],
)


@pytest.mark.parametrize(("name", "tier", "ranks"), COMPARED)
def test_it_is_compared(
    name: str, tier: str, ranks: tuple[int, ...], made: Callable[..., Path], quick: Settings, tmp_path: Path
) -> None:
    source, out = made(name), tmp_path / "out"
    tpshard.split(source, 2, out, settings=quick)
    assert all(reverse_choice_biases(out / f"rank-{rank:05}-of-00002.safetensors") for rank in ranks)
    verdict = tpshard.verify(out, source, tiers=(tier,), tokens=1)
    assert verdict.verdict == "fail"
    where = "bias" if tier == "native" else "(what it chooses from)"
    assert re.search(rf"{re.escape(where)}.* of rank {ranks[0]}", str(verdict.reason))


@pytest.mark.parametrize("name", BIASED)
def test_faults_in_it_are_among_the_canaries(
    name: str, made: Callable[..., Path], quick: Settings, tmp_path: Path
) -> None:
    source, out = made(name), tmp_path / "out"
    tpshard.split(source, 2, out, settings=quick)
    verdict = tpshard.verify(out, source, tiers=("exact",), tokens=1)
    assert verdict.verdict == "pass", verdict.reason
    caught = {canary.name for canary in verdict.canaries if canary.status == "caught"}
    # Canaries go into the layer with the most tensors, which is a Mamba layer of Nemotron-H's.
    assert ("choice-bias-shifted" in caught) == (name != "nemotron_h")
