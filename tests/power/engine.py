"""`make power-engine`: what is noticed where transformers' own classes run; writes docs/benchmarks/power-engine.

Every fault in one small model of every architecture at both widths, judged by the logits alone: the modules' outputs,
each fed the reference's input, see no less.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.helpers import checkpoints
from tests.helpers import transformers_runs as library
from tests.power.table import conditions
from tpshard.errors import DifferentError
from tpshard.verifier.criteria import EXACT_LIMIT
from tpshard.verifier.fault_catalogue import FAULTS

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks" / "power-engine.md"


@dataclass(frozen=True)
class Case:
    """One fault in one shard set, or none (""): its end-to-end error in float64, over the limit or not."""

    fault: str
    architecture: str
    tp: int
    error: float

    @property
    def noticed(self) -> bool:
        return self.error > EXACT_LIMIT


def judge(name: str, tp: int, folder: Path) -> list[Case]:
    """The correct split, then every fault that applies, in the last layer."""
    model = folder / name
    if not model.exists():
        checkpoints.make(name, model, dtype="bfloat16")
    sides = library.opened(model, tp, folder / f"{name}-tp{tp}")
    kind = checkpoints.VARIANTS[name].model_type
    wanted, pins = library.reference(sides)
    cases = [Case("", kind, tp, library.error(sides, wanted, pins))]
    last = sides.frame.config.num_hidden_layers - 1
    for fault in FAULTS.values():
        if fault.harmless:
            continue
        damaged = fault.mutant(sides.places(last))
        if damaged is not None:
            try:
                error = library.error(replace(sides, ranks=damaged), wanted, pins)
            except DifferentError:
                error = math.inf  # shards that cannot be run at all are noticed
            cases.append(Case(fault.name, kind, tp, error))
    return cases


def measure(folder: Path, names: Sequence[str], say: Callable[[str], None]) -> list[Case]:
    found = []
    with torch.no_grad():
        for name in names:
            for tp in library.WIDTHS:
                cases = judge(name, tp, folder)
                missed = [case.fault for case in cases[1:] if not case.noticed]
                say(f"{name} tp {tp}: {len(cases) - 1} faults, {len(missed)} not noticed {missed}")
                found += cases
    return found


def markdown(cases: Sequence[Case], part: Mapping[str, Any]) -> str:
    """The tables of all cases; `part` says when and with what they were measured."""
    correct = [case for case in cases if not case.fault]
    faulty = [case for case in cases if case.fault]
    kinds = sorted({case.architecture for case in cases})
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
        "tokens, everything in float64. *Least error*: of the fault's least visible case, the relative error of the",
        f"logits; the limit is {EXACT_LIMIT:.0e}.",
        "",
        f"Noticed: {sum(case.noticed for case in faulty)} of {len(faulty)}. Correct splits refused: "
        f"{sum(case.noticed for case in correct)} of {len(correct)}; the largest error of a correct split is "
        f"{max(case.error for case in correct):.1e}.",
        "",
        "| fault | cases | noticed | least error |",
        "|---|---|---|---|",
    ]
    for name in FAULTS:
        of = [case for case in faulty if case.fault == name]
        if of:
            lines.append(
                f"| {name} | {len(of)} | {sum(case.noticed for case in of)} | {min(case.error for case in of):.1e} |"
            )
    lines += ["", "| architecture | cases | noticed | error of correct splits |", "|---|---|---|---|"]
    for kind in kinds:
        of = [case for case in faulty if case.architecture == kind]
        largest = max(case.error for case in correct if case.architecture == kind)
        lines.append(f"| {kind} | {len(of)} | {sum(case.noticed for case in of)} | {largest:.1e} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="*", default=list(library.ONE_OF_EACH))
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        cases = measure(Path(folder), options.variants, lambda line: print(line, file=sys.stderr, flush=True))
    options.out.write_text(markdown(cases, conditions(begun)))


if __name__ == "__main__":
    main()
