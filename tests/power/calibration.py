"""What the native tier measures of correct splits: the noise that its limits must lie above."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.power.splits import FAMILIES, chosen, split_model
from tpshard.verifier.builtin.backend import DecoderBackend
from tpshard.verifier.criteria import NATIVE_LIMITS, native_metrics
from tpshard.verifier.families.configs import describe
from tpshard.verifier.group import Threads
from tpshard.verifier.prompt import prompt_ids
from tpshard.verifier.ranks.open import open_shards, open_source, resident

TOKENS = 16
WIDTHS = {"at most 24": (0, 24), "25 to 64": (25, 64), "at least 65": (65, 1 << 30), "all": (0, 1 << 30)}
"""The models by their hidden size: a token's error in a narrow one is a handful of roundings."""


@dataclass(frozen=True)
class Noise:
    """One correct split of one random model: the three criteria of the native tier, the largest over ranks."""

    seed: int
    family: str
    dtype: str
    hidden: int
    tp: int
    ratio: float
    token_ratio: float
    kl_ratio: float


def draw(seed: int, folder: Path) -> Noise | None:
    """One random model, split and run; None when those sizes cannot be split so."""
    family = FAMILIES[seed % len(FAMILIES)]
    rng = random.Random(f"noise {seed}")
    dtype, tp, how, name, sizes = chosen(rng, family)
    with split_model(folder, seed, dtype, tp, how, name, sizes) as made:
        if made is None:
            return None
        model, out = made
        opened = open_shards(out)
        config, source = open_source(model)
        kind, cpu, native = describe(config), torch.device("cpu"), getattr(torch, dtype)
        ranks = [resident(rank, native, cpu) for rank in opened.ranks]
        prompt = prompt_ids(kind.vocab, seed, 2, 16)
        setup = DecoderBackend(resident(source, native, cpu), ranks, Threads(tp), prompt, cpu, kind)
        steps = setup.teacher_tokens(TOKENS)
        r, n = setup.run_wide(steps).logits, setup.run(native, steps).logits
        metrics = setup.run_ranks(native, steps, None, lambda logits: native_metrics(r, n, logits, native))
    worst = {name: max(each[name] for each in metrics) for name in NATIVE_LIMITS}
    assert all(math.isfinite(value) for value in worst.values()), f"seed {seed}"
    return Noise(seed, family, dtype, kind.hidden, tp, **worst)


def measure(folder: Path, count: int, say: Callable[[str], None] = lambda line: None) -> list[Noise]:
    """The first `count` seeds, from 0 on, whose model can be split as drawn."""
    found: list[Noise] = []
    seed = 0
    with torch.no_grad():
        while len(found) < count:
            noise = draw(seed, folder)
            seed += 1
            if noise is not None:
                found.append(noise)
                if len(found) % 100 == 0:
                    say(f"{len(found)} of {count} splits for the native limits")
    return found


def summary(found: Sequence[Noise]) -> dict[str, Any]:
    """The distribution of each criterion, by hidden size, and the splits with the largest."""
    criteria: dict[str, Any] = {}
    for name, (low, high) in WIDTHS.items():
        chosen = [noise for noise in found if low <= noise.hidden <= high]
        criteria[name] = {"splits": len(chosen)}
        for criterion in NATIVE_LIMITS if chosen else ():
            values = sorted(getattr(noise, criterion) for noise in chosen)
            at = {"median": 50, "95th": 95, "99th": 99}
            criteria[name][criterion] = {key: round(values[len(values) * of // 100], 3) for key, of in at.items()}
            criteria[name][criterion]["largest"] = round(values[-1], 3)
    worst = sorted(found, key=lambda noise: max(getattr(noise, n) / limit for n, limit in NATIVE_LIMITS.items()))
    return {"splits": len(found), "criteria": criteria, "worst": [asdict(noise) for noise in worst[::-1][:5]]}
