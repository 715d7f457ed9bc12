"""Every fault of the catalogue in real shards of every family: who notices, who names it, who lets it through.

Checkpoints are small, random and bf16, split by `tpshard.split` and judged by what `tpshard verify` is made of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import tpshard
from tests.helpers import checkpoints
from tpshard.execute.publish import Settings
from tpshard.verifier.builtin.backend import DecoderBackend
from tpshard.verifier.builtin.store import Store
from tpshard.verifier.criteria import NATIVE_LIMITS, exceeded, native_metrics
from tpshard.verifier.families.configs import describe
from tpshard.verifier.fault_catalogue import FAULTS
from tpshard.verifier.group import Threads
from tpshard.verifier.prompt import prompt_ids
from tpshard.verifier.ranks.open import open_shards, open_source, resident
from tpshard.verifier.ranks.weights import Weights
from tpshard.verifier.report.verdict import Tier
from tpshard.verifier.tiers import exact

WIDTHS = (2, 4)
DTYPE = torch.bfloat16
TOKENS = 8
COSINE, TOP = 0.99, 5
# All of every family but those that differ in dtype alone. Their 251 tokens are padded at both widths, and two KV heads
# are replicated at tp 4.
VARIANTS = tuple(name for name, variant in checkpoints.DECODED.items() if variant.dtype == "float32")


@dataclass(frozen=True)
class Case:
    """One fault in one shard set. `named` is module, block (attention or MLP around it) or no.

    `error` is the exact tier's end-to-end error, `excess` the largest of the native criteria in units of its limit,
    `cosine` and `top` what the usual tests would have looked at.
    """

    fault: str
    variant: str
    tp: int
    error: float
    exact: bool
    named: str
    reason: str
    excess: float
    cosine: float
    top: bool

    @property
    def native(self) -> bool:
        return self.excess > 1


def cosine(x: Tensor, y: Tensor) -> float:
    """Cosine similarity of all logits of a prompt, taken as one vector."""
    return float(torch.cosine_similarity(x.double().flatten(), y.double().flatten(), dim=0))


def top_contained(x: Tensor, y: Tensor, count: int = TOP) -> bool:
    """Whether at every position each side's first choice is among the other's first `count`."""

    def inside(one: Tensor, other: Tensor) -> bool:
        return bool((one.argmax(-1, keepdim=True) == other.topk(count, -1).indices).any(-1).all())

    return inside(x, y) and inside(y, x)


def changed(clean: Sequence[Weights], mutant: Sequence[Weights]) -> dict[str, set[int]]:
    """What differs, and in which ranks: modules by their names, biases by their own as well."""
    found: dict[str, set[int]] = {}
    for rank, (before, after) in enumerate(zip(clean, mutant, strict=True)):
        for name in before.names():
            if not torch.equal(after.get(name), before.get(name)):
                found.setdefault(name.removesuffix(".weight"), set()).add(rank)
                found.setdefault(name.rpartition(".")[0], set()).add(rank)
    return found


def named(setup: DecoderBackend, mutant: Sequence[Weights], tier: Tier) -> str:
    """How well a failed exact tier names the fault: the changed module of a changed rank, its block, or not."""
    files = re.fullmatch(r"the files of ranks (\d+) and (\d+) are exchanged", tier.reason or "")
    if files is not None:
        order = list(range(len(mutant)))
        one, other = int(files[1]), int(files[2])
        order[one], order[other] = other, one
        same = all(
            torch.equal(weights.get(name), setup.ranks[source].get(name))
            for weights, source in zip(mutant, order, strict=True)
            for name in weights.names()
        )
        return "module" if same else "no"
    if tier.first is None:
        return "no"
    modules = changed(setup.ranks, mutant)
    core = re.sub(r"^(input|[qkv]) of ", "", tier.first.module).removesuffix(" (every row)")
    if core in modules and tier.first.rank in modules[core] and not tier.first.module.startswith("input of "):
        return "module"
    around = blocks(setup)
    core = core.removesuffix(".bias")
    return "block" if around.get(core, core) in {around.get(module) for module in modules} else "no"


def blocks(setup: DecoderBackend) -> Mapping[str, str]:
    """The attention or MLP that each matrix, and each norm inside attention, belongs to, by full names."""
    family = setup.family
    store = Store(setup.source, family, DTYPE, setup.device)
    found = {}
    for i in range(family.layers):
        at = family.layer.format(i)
        inside = {
            family.attention: [*family.qkv, family.out, family.q_norm, family.k_norm],
            family.mlp: [family.gate, family.up, family.down],
        }
        for block, modules in inside.items():
            found |= {store.full(at + module): store.full(at + block) for module in modules if module is not None}
    return found


def open_case(variant: str, tp: int, folder: Path) -> DecoderBackend:
    """Make a variant in bf16, split it, and load both sides."""
    model, out = folder / variant, folder / f"{variant}-tp{tp}"
    if not model.exists():
        checkpoints.make(variant, model, dtype="bfloat16")
    tpshard.split(model, tp, out, settings=Settings(workers=1, fsync=False))
    opened = open_shards(out)
    config, source = open_source(model)
    family, cpu = describe(config), torch.device("cpu")
    ranks = [resident(rank, DTYPE, cpu) for rank in opened.ranks]
    return DecoderBackend(
        resident(source, DTYPE, cpu), ranks, Threads(tp), prompt_ids(family.vocab, 0, 2, 16), cpu, family
    )


def judge(variant: str, tp: int, folder: Path, say: Callable[[str], None]) -> list[Case]:
    """All faults that apply to one variant at one width; the correct split must pass first."""
    setup = open_case(variant, tp, folder)
    steps = setup.teacher_tokens(TOKENS)
    r, n = setup.run_wide(steps).logits, setup.run(DTYPE, steps).logits
    plain = setup.run(DTYPE, setup.steps).logits

    def run(ranks: Sequence[Weights]) -> tuple[Tier, float, Tensor]:
        held = replace(setup, ranks=ranks)
        logits = held.run_ranks(DTYPE, steps, None, lambda each: each)
        metrics = [native_metrics(r, n, each, DTYPE) for each in logits]
        excess = max(each[name] / limit for each in metrics for name, limit in NATIVE_LIMITS.items())
        assert any(map(exceeded, metrics)) is (excess > 1)
        return exact(held), excess, logits[0][:, : setup.prompt.shape[1]]

    tier, excess, logits = run(setup.ranks)
    assert tier.status == "pass" and excess <= 1, f"{variant} at tp {tp} is refused: {tier.reason}"
    assert cosine(logits, plain) >= COSINE
    cases = []
    for fault in FAULTS.values():
        mutant = fault.mutant(setup.places(setup.family.layers // 2))
        if mutant is None:
            continue
        tier, excess, logits = run(mutant)
        case = Case(
            fault=fault.name,
            variant=variant,
            tp=tp,
            error=tier.metrics["relative_error"],
            exact=tier.status == "fail",
            named=named(setup, mutant, tier) if tier.status == "fail" else "no",
            reason=tier.reason or "",
            excess=excess,
            cosine=cosine(logits, plain),
            top=top_contained(logits, plain),
        )
        cases.append(case)
    missed = sum(not case.exact for case in cases)
    say(f"{variant} tp {tp}: {len(cases)} faults, {missed} not noticed by the exact tier")
    return cases


def measure(
    folder: Path, variants: Sequence[str] = VARIANTS, say: Callable[[str], None] = lambda line: None
) -> list[Case]:
    """All faults in all variants at all widths."""
    with torch.no_grad():
        return [case for variant in variants for tp in WIDTHS for case in judge(variant, tp, folder, say)]
