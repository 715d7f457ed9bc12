"""The native tier: in the checkpoint's own dtype, the sharded error measured by the unsharded one's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tpshard.verifier.builtin.exact import Setup, lockstep, through
from tpshard.verifier.builtin.layers import Cache
from tpshard.verifier.criteria import native_metrics, native_tier, worst_ratio
from tpshard.verifier.group import Group, Threads
from tpshard.verifier.report.verdict import Finding, Place, Tier


def teacher_tokens(setup: Setup, tokens: int) -> list[Tensor]:
    """The prompt, then `tokens` greedy choices of the unsharded float64 model, one step each."""
    decoder, cache = setup.reference(torch.float64), Cache()
    steps = [setup.prompt]
    for _ in range(tokens):
        steps.append(decoder.forward(steps[-1], cache, setup.which())[:, -1:].argmax(-1))
    return steps


def native_logits(setup: Setup, dtype: torch.dtype, steps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """R and N: the unsharded logits of all steps in float64 and in the native dtype."""
    # One pass over the whole is the same mathematics, but where the sequence's length changes the frequencies.
    changing = setup.family.rope is not None and setup.family.rope.kind == "dynamic"
    whole = steps if changing else [torch.cat(list(steps), 1)]
    r = through(setup.reference(torch.float64), whole, setup.which(), setup.progress)
    return r, through(setup.reference(dtype, hold=True), steps, setup.which(), setup.progress)


def native(setup: Setup, dtype: torch.dtype, steps: Sequence[Tensor]) -> Tier:
    """In the checkpoint's dtype, through the KV cache: the sharded error against the unsharded one's."""
    r, n = native_logits(setup, dtype, steps)

    def work(group: Group) -> dict[str, float]:
        logits = through(setup.sharded(group, dtype, hold=True), steps, setup.which(), setup.progress)
        return native_metrics(r, n, logits, dtype)

    ranks = setup.team.run(work)
    return native_tier(ranks, *worst_module(setup, dtype))


def worst_module(setup: Setup, dtype: torch.dtype) -> tuple[Place, list[Finding]]:
    """The module whose error, fed float64's input, is largest against that of the unsharded model in the same dtype.

    The findings' errors are those ratios.
    """
    alone = replace(setup, ranks=[setup.source], team=Threads(1), sequence_parallel=False, keep_ranks=False)
    _, unsharded = lockstep(alone, dtype, math.inf, wide=torch.float64)
    _, sharded = lockstep(setup, dtype, math.inf, wide=torch.float64)
    return worst_ratio(unsharded, sharded, dtype)
