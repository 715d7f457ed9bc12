"""Every fault of the catalogue in real shards of every family: which tier notices, which fault is named by its tensor.

Checkpoints are small, random and bf16, split by `tpshard.split` and judged by what `tpshard verify` is made of. Faults
are put into what verify reads of a set, under the source's names, so that a format matters where it cuts, fuses or pads
otherwise: in each, one model of every family that it holds.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import tpshard
from tests.helpers import checkpoints
from tpshard.errors import UnsupportedError
from tpshard.execute.publish import Settings
from tpshard.verifier.builtin.backend import DecoderBackend
from tpshard.verifier.families.configs import describe
from tpshard.verifier.fault_catalogue import FAULTS
from tpshard.verifier.group import Threads
from tpshard.verifier.options import silent
from tpshard.verifier.prompt import prompt_ids
from tpshard.verifier.ranks.open import open_shards, open_source, resident
from tpshard.verifier.ranks.translate import translated
from tpshard.verifier.ranks.weights import Weights
from tpshard.verifier.report.verdict import Tier
from tpshard.verifier.tiers import digest, exact
from tpshard.verifier.weights_tier import compare_weights

WIDTHS = (2, 4)
DTYPE = torch.bfloat16
TOKENS = 2
COSINE, TOP = 0.99, 5
# All of every family but those that differ in dtype alone. Their 251 tokens are padded at both widths, and two KV heads
# are replicated at tp 4.
VARIANTS = tuple(name for name, variant in checkpoints.DECODED.items() if variant.dtype == "float32")
NATIVE = "native"
OTHERS = ("vllm", "meta", "dcp")
"""The other formats whose ranks hold other tensors than native ones; sglang has vllm's, dcp-hf dcp's, hf is unsharded.

deepseek's are its own class's, which the built-in decoder does not run.
"""


@dataclass(frozen=True)
class Case:
    """One fault in one shard set: whether each tier noticed it, and whether the verdict named what was changed.

    `error` is the exact tier's end-to-end error, `reason` the verdict's; `cosine` and `top` are what the usual tests
    would have looked at.
    """

    fault: str
    variant: str
    format: str
    tp: int
    weights: bool
    exact: bool
    native: bool
    named: bool
    error: float
    reason: str
    cosine: float
    top: bool


def cosine(x: Tensor, y: Tensor) -> float:
    """Cosine similarity of all logits of a prompt, taken as one vector."""
    return float(torch.cosine_similarity(x.double().flatten(), y.double().flatten(), dim=0))


def top_contained(x: Tensor, y: Tensor, count: int = TOP) -> bool:
    """Whether at every position each side's first choice is among the other's first `count`."""

    def inside(one: Tensor, other: Tensor) -> bool:
        return bool((one.argmax(-1, keepdim=True) == other.topk(count, -1).indices).any(-1).all())

    return inside(x, y) and inside(y, x)


def changed(clean: Sequence[Weights], mutant: Sequence[Weights]) -> set[tuple[str, int]]:
    """The stored tensors that differ, each with the rank in which it does."""
    pairs = enumerate(zip(clean, mutant, strict=True))
    return {
        (name, rank)
        for rank, (before, after) in pairs
        for name in before.names()
        if not torch.equal(after.get(name), before.get(name))
    }


def named(clean: Sequence[Weights], mutant: Sequence[Weights], tier: Tier) -> bool:
    """Whether a failed tier says what was changed: a tensor of a rank, or two ranks' files."""
    files = re.fullmatch(r"the files of ranks (\d+) and (\d+) are exchanged", tier.reason or "")
    if files is not None:
        order = list(range(len(clean)))
        one, other = int(files[1]), int(files[2])
        order[one], order[other] = other, one
        return not changed([clean[rank] for rank in order], mutant)
    return tier.first is not None and (tier.first.module, tier.first.rank) in changed(clean, mutant)


def open_case(variant: str, form: str, tp: int, folder: Path) -> DecoderBackend:
    """Make a variant in bf16, split it into a format, and load both sides."""
    model, out = folder / variant, folder / f"{variant}-{form}-tp{tp}"
    if not model.exists():
        checkpoints.make(variant, model, dtype="bfloat16")
    tpshard.split(model, tp, out, format=form, settings=Settings(workers=1, fsync=False))
    config, source = open_source(model)
    opened = translated(open_shards(out), source)
    family, cpu = describe(config), torch.device("cpu")
    ranks = [resident(rank, DTYPE, cpu) for rank in opened.ranks]
    return DecoderBackend(
        resident(source, DTYPE, cpu), ranks, Threads(tp), prompt_ids(family.vocab, 0, 2, 16), cpu, family
    )


def judge(variant: str, form: str, tp: int, folder: Path, say: Callable[[str], None]) -> list[Case]:
    """All faults that apply to one variant in one format at one width; the correct split must pass first."""
    setup = open_case(variant, form, tp, folder)
    steps = setup.teacher_tokens(TOKENS)
    plain = setup.run(DTYPE, setup.steps).logits
    wanted = setup.same_form()[1].run_ranks(DTYPE, steps, None, digest)

    def run(ranks: Sequence[Weights]) -> tuple[list[Tier], bool, Tensor]:
        held = setup.with_ranks(ranks)
        logits = held.same_form()[0].run_ranks(DTYPE, steps, None, lambda each: each)
        tiers = [compare_weights(held, (), silent), exact(held, steps)]
        return tiers, [digest(each) for each in logits] != wanted, logits[0][:, : setup.prompt.shape[1]]

    tiers, differs, logits = run(setup.ranks)
    refused = [tier.reason for tier in tiers if tier.status != "pass"] + ["native"] * differs
    assert not refused, f"{variant} in {form} at tp {tp} is refused: {refused}"
    assert cosine(logits, plain) >= COSINE
    cases = []
    for fault in FAULTS.values():
        mutant = fault.mutant(setup.places(setup.family.layers // 2))
        if mutant is None:
            continue
        tiers, differs, logits = run(mutant)
        first = next((tier for tier in tiers if tier.status == "fail"), None)
        case = Case(
            fault=fault.name,
            variant=variant,
            format=form,
            tp=tp,
            weights=tiers[0].status == "fail",
            exact=tiers[1].status == "fail",
            native=differs,
            named=first is not None and named(setup.ranks, mutant, first),
            error=tiers[1].metrics["relative_error"],
            reason=first.reason or "" if first is not None else "",
            cosine=cosine(logits, plain),
            top=top_contained(logits, plain),
        )
        cases.append(case)
    missed = sum(not case.weights or not case.exact for case in cases)
    say(f"{variant} {form} tp {tp}: {len(cases)} faults, {missed} not noticed by both the weights and the exact tier")
    return cases


def measure(
    folder: Path, variants: Sequence[str] = VARIANTS, say: Callable[[str], None] = lambda line: None
) -> tuple[list[Case], list[str]]:
    """All faults in all variants at all widths, and in one variant of each family in the other formats.

    And the pairs that were left out, each with the reason: those that the format refuses.
    """
    cases, left_out = [], []
    one_of_each = {checkpoints.VARIANTS[name].model_type: name for name in reversed(variants)}
    pairs = [*((name, NATIVE) for name in variants), *itertools.product(reversed(one_of_each.values()), OTHERS)]
    with torch.no_grad():
        for (variant, form), tp in itertools.product(pairs, WIDTHS):
            try:
                cases += judge(variant, form, tp, folder, say)
            except UnsupportedError as error:
                left_out.append(f"{variant} in {form} at tp {tp}: {error.message}")
                say(f"left out: {left_out[-1]}")
    return cases, left_out
