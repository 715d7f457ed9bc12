"""`make power-engine`: what is noticed where transformers' own classes run; writes docs/benchmarks/power-engine.

Every fault in one small model of every architecture at both widths. Of the exact tier the prompt's logits alone are
judged: decoding, and the modules' outputs, each fed the reference's input, see no less.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.helpers import checkpoints
from tests.helpers import transformers_runs as library
from tests.power.splits import DTYPES, OUTLIERS, Drawn, split_model
from tests.power.table import TIERS, conditions
from tpshard.errors import DifferentError
from tpshard.verifier.criteria import EXACT_LIMIT
from tpshard.verifier.fault_catalogue import FAULTS
from tpshard.verifier.options import VerifyOptions, silent
from tpshard.verifier.run import verify
from tpshard.verifier.tiers import digest
from tpshard.verifier.weights_tier import compare_weights

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks" / "power-engine.md"


@dataclass(frozen=True)
class Case:
    """One fault in one shard set, or none (""): who notices it, and its end-to-end error in float64."""

    fault: str
    architecture: str
    tp: int
    weights: bool
    error: float
    native: bool

    @property
    def exact(self) -> bool:
        return self.error > EXACT_LIMIT

    @property
    def noticed(self) -> bool:
        return self.weights or self.exact or self.native


def judge(name: str, tp: int, folder: Path) -> list[Case]:
    """The correct split, then every fault that applies, in the last layer."""
    model = folder / name
    if not model.exists():
        checkpoints.make(name, model, dtype="bfloat16")
    sides = library.opened(model, tp, folder / f"{name}-tp{tp}")
    kind = checkpoints.VARIANTS[name].model_type
    wanted, pins = library.reference(sides)
    faults: dict[str, Any] = {"": sides.ranks}
    last = sides.frame.config.num_hidden_layers - 1
    for fault in FAULTS.values():
        if not fault.harmless:
            faults[fault.name] = fault.mutant(sides.places(last))
    cases = []
    for fault_name, ranks in faults.items():
        if ranks is None:
            continue
        held, error, native = sides.with_ranks(ranks), math.inf, True
        weights = compare_weights(held, (), silent).status == "fail"
        try:
            error = library.error(held, wanted, pins)
            # Both forms anew for each fault: of a cut that nobody knows, the source is cut as the shards are.
            mine, cut = (side.run_ranks(torch.bfloat16, sides.steps, None, digest) for side in held.same_form())
            native = mine != cut
        except DifferentError:
            pass  # shards that cannot be run at all are noticed
        cases.append(Case(fault_name, kind, tp, weights, error, native))
    return cases


def draw(name: str, tp: int, folder: Path) -> Drawn:
    """A correct split of the model with outliers in its weights; the dtype depends on the name, like the outliers."""
    rng = random.Random(f"{name} {tp}")
    dtype, outliers = rng.choice(DTYPES), rng.choice(OUTLIERS)
    with split_model(folder, 0, dtype, tp, {}, name, {}, outliers) as made:
        assert made is not None
        verdict = verify(VerifyOptions(made[1], device="cpu", tokens=2, engine="transformers"), made[0])
    return Drawn(
        seed=0,
        family=verdict.model_type,
        dtype=dtype,
        tp=tp,
        shares="even",
        outliers=outliers,
        options={"variant": name},
        verdict=verdict.verdict,
        reason=verdict.reason or "",
        missed=[canary.name for canary in verdict.canaries if canary.status == "missed"],
    )


def measure(
    folder: Path, names: Sequence[str], say: Callable[[str], None] = lambda line: None
) -> tuple[list[Case], list[Drawn]]:
    """All faults, and a split with outliers, of each model at both widths."""
    found, drawn = [], []
    with torch.no_grad():
        for name in names:
            for tp in library.WIDTHS:
                cases = judge(name, tp, folder)
                missed = [case.fault for case in cases[1:] if not case.noticed]
                say(f"{name} tp {tp}: {len(cases) - 1} faults, {len(missed)} not noticed {missed}")
                drawn.append(draw(name, tp, folder))
                say(f"{name} tp {tp} {drawn[-1].dtype} × {drawn[-1].outliers}: {drawn[-1].verdict} {drawn[-1].reason}")
                found += cases
    return found, drawn


def markdown(cases: Sequence[Case], drawn: Sequence[Drawn], part: Mapping[str, Any]) -> str:
    """The tables of all cases; `part` says when and with what they were measured."""
    correct = [case for case in cases if not case.fault]
    faulty = [case for case in cases if case.fault]
    kinds = sorted({case.architecture for case in cases})
    unsure = [each for each in drawn if each.verdict != "pass"]
    lines = [
        "# What verify notices where transformers' own classes run",
        "",
        "Made by `make power-engine`; nothing in it is written by hand.",
        "",
        f"{part['date']}, CPU ({part['machine']}), tpshard {part['tpshard']}, torch {part['torch']}, transformers "
        f"{part['transformers']}, Python {part['python']}, {part['cpu_seconds']} s of one core.",
        "",
        f"{len(FAULTS)} faults × {len(kinds)} architectures × tp {' and '.join(map(str, library.WIDTHS))}: "
        f"{len(faulty)} cases, those that apply.",
        "Small random models in bfloat16, shards by `tpshard split`, the last layer damaged, a prompt of 2 × 12",
        "tokens. *weights* compares every stored element, *exact* the logits in float64, *native* all their bits in",
        "bfloat16. *Least error*: of the fault's least visible case, the relative error of the logits in float64; the",
        f"limit is {EXACT_LIMIT:.0e}. Where a class cuts a fused matrix, *weights* only says that the ranks together",
        "hold all of it, and *native* cuts the source as the shards are cut.",
        "",
        f"Noticed: {sum(case.noticed for case in faulty)} of {len(faulty)}. Correct splits refused: "
        f"{sum(case.noticed for case in correct)} of {len(correct)}; the largest error of a correct split is "
        f"{max(case.error for case in correct):.1e}.",
        "",
        f"{len(drawn)} more correct splits of models with outliers (3 rows and 3 columns of every matrix are "
        f"multiplied by {', '.join(map(str, OUTLIERS))}) in {', '.join(DTYPES)}: "
        f"{len(drawn) - len(unsure)} pass, {sum(each.verdict == 'fail' for each in unsure)} are refused.",
        *(
            f"- {each.options['variant']}, {each.dtype}, tp {each.tp}, × {each.outliers}: {each.verdict}, {each.reason}"
            for each in unsure
        ),
        "",
        "| fault | cases | weights | exact | native | least error |",
        "|---|---|---|---|---|---|",
    ]

    def counts(of: Sequence[Case]) -> str:
        return " | ".join(str(sum(getattr(case, tier) for case in of)) for tier in TIERS)

    for name in FAULTS:
        if of := [case for case in faulty if case.fault == name]:
            lines.append(f"| {name} | {len(of)} | {counts(of)} | {min(case.error for case in of):.1e} |")
    lines += ["", "| architecture | cases | weights | exact | native | error of correct splits |"]
    lines += ["|---|---|---|---|---|---|"]
    for kind in kinds:
        of = [case for case in faulty if case.architecture == kind]
        largest = max(case.error for case in correct if case.architecture == kind)
        lines.append(f"| {kind} | {len(of)} | {counts(of)} | {largest:.1e} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="*", default=list(library.ONE_OF_EACH))
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        cases, drawn = measure(Path(folder), options.variants, lambda line: print(line, file=sys.stderr, flush=True))
    options.out.write_text(markdown(cases, drawn, conditions(begun)))


if __name__ == "__main__":
    main()
