"""`make power`: how much verify notices, measured; writes docs/benchmarks/power.md and power.json.

Two parts, each on its own with --part: the catalogue of faults in every family, and correct splits of random models.
A part that is not run anew keeps the figures, and the date, of the run that is in the JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import checkpoints
import torch
import transformers

import tpshard
from power.catalogue import COSINE, TOKENS, TOP, VARIANTS, WIDTHS, measure
from power.splits import measure as measure_splits
from tpshard.verify.faults import FAULTS

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks" / "power"


def conditions(begun: float) -> dict[str, Any]:
    """When, with what, and how long a part ran, in seconds of one core."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu_seconds": round(time.process_time() - begun),
        "tpshard": tpshard.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def catalogue(variants: Sequence[str]) -> dict[str, Any]:
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        cases = measure(Path(folder), variants, say)
    return {**conditions(begun), "variants": list(variants), "cases": [asdict(case) for case in cases]}


def splits(count: int) -> dict[str, Any]:
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        drawn = measure_splits(Path(folder), count, say)
    return {**conditions(begun), "drawn": [asdict(each) for each in drawn]}


def versions(part: dict[str, Any]) -> str:
    return (
        f"{part['date']}, CPU ({part['machine']}), tpshard {part['tpshard']}, torch {part['torch']}, "
        f"transformers {part['transformers']}, Python {part['python']}, {part['cpu_seconds']} s of one core."
    )


def summary(cases: list[dict[str, Any]]) -> list[str]:
    """What each test noticed of the cases that change the function."""
    harmful = [case for case in cases if not FAULTS[case["fault"]].harmless]
    large = [case for case in harmful if FAULTS[case["fault"]].structural]
    total = len(harmful)

    def line(name: str, caught: list[dict[str, Any]], of: list[dict[str, Any]]) -> str:
        faults = {case["fault"] for case in of} - {case["fault"] for case in caught}
        partly = {case["fault"] for case in of if case not in caught} - faults
        return f"| {name} | {len(caught)} of {len(of)} | {len(of) - len(caught)} | {len(faults)} | {len(partly)} |"

    return [
        "| test | noticed | let through | faults never noticed | faults noticed in some models only |",
        "|---|---|---|---|---|",
        line("exact tier", [case for case in harmful if case["exact"]], harmful),
        line("native tier", [case for case in harmful if case["native"]], harmful),
        line("native tier, structural faults alone", [case for case in large if case["native"]], large),
        line(f"cosine ≥ {COSINE}", [case for case in harmful if case["cosine"] < COSINE], harmful),
        line(f"top-{TOP} containment", [case for case in harmful if not case["top"]], harmful),
        "",
        f"{total} of the {len(cases)} cases change the function; the other {len(cases) - total} put values into the "
        "vocabulary's padding, which",
        "no logit sees: `check --source`, the bytes tier, refuses those, and the exact tier rightly does not.",
    ]


def table(cases: list[dict[str, Any]]) -> list[str]:
    """A row per fault."""
    lines = [
        "| fault | cases | exact | module and rank named | block named | native | cosine lets through "
        f"| top-{TOP} lets through |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, fault in FAULTS.items():
        mine = [case for case in cases if case["fault"] == name]
        named = Counter(case["named"] for case in mine)
        mark = " (changes nothing)" if fault.harmless else "" if fault.structural else " (small)"
        through = sum(case["cosine"] >= COSINE for case in mine), sum(case["top"] for case in mine)
        counts = [
            len(mine), sum(case["exact"] for case in mine), named["module"], named["block"],
            sum(case["native"] for case in mine), *through,
        ]  # fmt: skip
        lines.append(f"| {name}{mark} | " + " | ".join(map(str, counts)) + " |")
    return lines


def exceptions(cases: list[dict[str, Any]]) -> list[str]:
    """Every case that the exact tier missed, and every one that it caught under a wrong name."""
    harmful = [case for case in cases if not FAULTS[case["fault"]].harmless]
    missed = [case for case in harmful if not case["exact"]]
    wrong = [case for case in harmful if case["exact"] and case["named"] == "no"]
    lines = ["", f"Faults that change the function and that the exact tier did not notice: {len(missed) or 'none'}."]
    lines += [f"- {case['fault']} in {case['variant']} at tp {case['tp']}" for case in missed]
    lines += ["", f"Noticed, but with another module named than the one that was changed: {len(wrong) or 'none'}."]
    grouped = Counter((case["fault"], re_rank(case["reason"])) for case in wrong)
    lines += [f"- {fault}, {count} times: “{reason}”" for (fault, reason), count in sorted(grouped.items())]
    return lines


def re_rank(reason: str) -> str:
    """A reason without its figure, so that equal ones can be counted."""
    return reason.split(", by ")[0]


def split_lines(part: dict[str, Any]) -> list[str]:
    drawn = part["drawn"]
    verdicts = Counter(each["verdict"] for each in drawn)
    shares = Counter("even" if each["shares"] == "even" else "uneven" for each in drawn)
    dtypes = Counter(each["dtype"] for each in drawn)
    ratios = sorted(each["ratio"] for each in drawn)
    widths = Counter(each["tp"] for each in drawn)
    lines = [
        f"{len(drawn)} random models of {len({each['family'] for each in drawn})} families: random heads, KV heads, "
        "head sizes, MLP, vocabulary and layers;",
        "tp " + ", ".join(f"{tp} ({count})" for tp, count in sorted(widths.items())) + "; "
        + ", ".join(f"{name} ({count})" for name, count in sorted(dtypes.items())) + "; "
        + ", ".join(f"{name} shares ({count})" for name, count in sorted(shares.items())) + ";",
        "weights and prompt from the seed; with and without sequence parallelism, streaming and `--float32`.",
        "Exact and native tier with all their canaries, 4 tokens decoded.",
        "",
        "| verdict | splits |",
        "|---|---|",
        *(f"| {name} | {verdicts[name]} |" for name in ("pass", "fail", "inconclusive")),
        "",
        f"The native tier's ratio (limit 1.5) was {ratios[0]:.2f} to {ratios[-1]:.2f}, "
        f"its median {ratios[len(ratios) // 2]:.2f}.",
    ]
    bad = [each for each in drawn if each["verdict"] != "pass"]
    if bad:
        lines += ["", "Not passed, though the split is correct:", ""]
        lines += [
            f"- seed {each['seed']} ({each['family']}, {each['dtype']}, tp {each['tp']}, shares {each['shares']}): "
            f"{each['verdict']}, {each['reason']}"
            for each in bad
        ]
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The page; a part that was never measured says so."""
    lines = ["# What verify notices, measured", "", "Made by `make power`; nothing in it is written by hand.", ""]
    part = result.get("catalogue")
    lines += ["## Faults", ""]
    if part is None:
        lines += ["Not measured.", ""]
    else:
        cases, families = part["cases"], {checkpoints.VARIANTS[name].model_type for name in part["variants"]}
        lines += [
            versions(part),
            "",
            f"{len(FAULTS)} faults × {len(part['variants'])} models of {len(families)} families × tp "
            + " and ".join(map(str, WIDTHS)) + f": {len(cases)} cases, those that apply.",
            "Small random models in bfloat16, shards by `tpshard split`, one layer damaged, a prompt of 2 × 16 tokens.",
            f"*exact* compares in float64. *native* runs in bfloat16, the prompt and {TOKENS} decoded tokens.",
            f"*cosine* (of all logits of the prompt, as one vector, ≥ {COSINE}) and *top-{TOP}* (at every position each "
            f"side's first choice is",
            f"among the other's first {TOP}) compare the sharded bfloat16 logits with the unsharded bfloat16 ones.",
            "The last two columns count what such a test would have let through. In larger models one layer weighs less, "
            "and they let through more.",
            "",
            *summary(cases),
            "",
            "*Small* faults, such as one element's sign, are not asked of the native tier: it measures in the dtype's own "
            "error.",
            "A bias that every rank adds once after the sum belongs to no rank: the exact tier then names the block.",
            "",
            *table(cases),
            *exceptions(cases),
            "",
        ]
    lines += ["## Correct splits", ""]
    part = result.get("splits")
    lines += ["Not measured."] if part is None else [versions(part), "", *split_lines(part)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("catalogue", "splits"), help="run only this one [default: both]")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated names of test checkpoints")
    parser.add_argument("--count", type=int, default=200, help="number of random splits")
    parser.add_argument("--output", type=Path, default=DOCS, help="write PREFIX.md and PREFIX.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    new: dict[str, Any] = {}
    if options.part != "splits":
        new["catalogue"] = catalogue(options.variants.split(","))
    if options.part != "catalogue":
        new["splits"] = splits(options.count)
    stored = options.output.with_suffix(".json")
    result = (json.loads(stored.read_text()) if stored.exists() else {}) | new
    stored.write_text(json.dumps(result, separators=(",", ":"), sort_keys=True) + "\n")
    text = markdown(result)
    options.output.with_suffix(".md").write_text(text)
    print(text)
    cases = result.get("catalogue", {}).get("cases", [])
    missed = any(not case["exact"] and not FAULTS[case["fault"]].harmless for case in cases)
    refused = any(each["verdict"] != "pass" for each in result.get("splits", {}).get("drawn", []))
    sys.exit(1 if missed or refused else 0)


if __name__ == "__main__":
    main()
