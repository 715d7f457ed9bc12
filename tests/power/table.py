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
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import tpshard
from tests.helpers import checkpoints
from tests.power.catalogue import COSINE, TOKENS, TOP, VARIANTS, WIDTHS, Case, measure
from tests.power.splits import Drawn
from tests.power.splits import measure as measure_splits
from tpshard.verifier.fault_catalogue import FAULTS

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks" / "power"
PARTS = ("catalogue", "splits")
TIERS = ("weights", "exact", "native")


def conditions(begun: float) -> dict[str, Any]:
    """When, with what, and how long a part ran, in seconds of one core."""
    import transformers

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
        cases, left_out = measure(Path(folder), variants, say)
    return judged(cases, variants, conditions(begun)) | {"left_out": left_out}


def judged(cases: Sequence[Case], variants: Sequence[str], ran: dict[str, Any]) -> dict[str, Any]:
    """What is kept of all cases."""
    applied = sorted({case.fault for case in cases})
    faults = {name: counted([case for case in cases if case.fault == name]) for name in applied}
    harmful = [case for case in cases if not FAULTS[case.fault].harmless]
    return {
        **ran,
        "variants": list(variants),
        "formats": Counter(case.format for case in cases),
        "faults": faults,
        "missed": {tier: [asdict(case) for case in harmful if not getattr(case, tier)] for tier in TIERS},
        "misnamed": [asdict(case) for case in harmful if not case.named],
    }


def counted(cases: list[Case]) -> dict[str, int]:
    """How many cases of one fault each test noticed, and how many the verdict named."""
    return {
        "cases": len(cases),
        **{key: sum(getattr(case, key) for case in cases) for key in (*TIERS, "named")},
        "cosine": sum(case.cosine < COSINE for case in cases),
        "top": sum(not case.top for case in cases),
    }


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


def summary(faults: dict[str, dict[str, int]]) -> list[str]:
    """What each test noticed of the cases that change the function."""
    harmful = [counts for name, counts in faults.items() if not FAULTS[name].harmless]

    def line(title: str, key: str) -> str:
        total, noticed = (sum(counts[what] for counts in harmful) for what in ("cases", key))
        never = sum(counts[key] == 0 for counts in harmful)
        partly = sum(0 < counts[key] < counts["cases"] for counts in harmful)
        return f"| {title} | {noticed} of {total} | {total - noticed} | {never} | {partly} |"

    silent = sum(counts["cases"] for name, counts in faults.items() if FAULTS[name].harmless)
    return [
        "| test | noticed | let through | faults never noticed | faults noticed in some models only |",
        "|---|---|---|---|---|",
        *(line(f"{tier} tier", tier) for tier in TIERS),
        line(f"cosine ≥ {COSINE}", "cosine"),
        line(f"top-{TOP} containment", "top"),
        "",
        f"Left out here: {silent} cases in which the vocabulary's padding is not zero. No logit sees that, and the",
        "source has no such rows, so these tiers let it pass; `check --source` does not, which is the bytes tier.",
    ]


def table(faults: dict[str, dict[str, int]]) -> list[str]:
    """A row per fault."""
    lines = [
        f"| fault | cases | weights | exact | native | named | cosine lets through | top-{TOP} lets through |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, counts in sorted(faults.items()):
        mark = " (changes nothing)" if FAULTS[name].harmless else ""
        cells = [counts[key] for key in ("cases", *TIERS, "named")]
        cells += [counts["cases"] - counts[key] for key in ("cosine", "top")]
        lines.append(f"| {name}{mark} | " + " | ".join(map(str, cells)) + " |")
    return lines


def exceptions(part: dict[str, Any]) -> list[str]:
    """Every case that a tier missed or that the verdict did not name."""
    lines = [""]
    for tier in TIERS:
        cases = part["missed"][tier]
        lines += [f"Faults that change the function and that the {tier} tier did not notice: {len(cases) or 'none'}."]
        lines += [""]
        lines += [
            f"- {case['fault']} in {case['variant']} ({case['format']}) at tp {case['tp']}; "
            f"it changes the logits by {case['error']:.1e}"
            for case in cases
        ]
        lines += [""] * bool(cases)
    wrong = part["misnamed"]
    lines += [f"Not named, or under another name than what was changed: {len(wrong) or 'none'}."]
    lines += [""] * bool(wrong)
    grouped = Counter((case["fault"], case["reason"]) for case in wrong)
    lines += [f"- {fault}, {count} times: “{reason}”" for (fault, reason), count in sorted(grouped.items())]
    if left_out := part.get("left_out"):
        lines += ["", "Left out, for the format refuses them:", "", *(f"- {line}" for line in left_out)]
    return lines


def split_lines(drawn: Sequence[Drawn]) -> list[str]:
    def counts(values: Iterable[object]) -> str:
        return ", ".join(f"{value} ({count})" for value, count in sorted(Counter(values).items()))

    shares = counts("even" if each.shares == "even" else "uneven" for each in drawn)
    outliers = [each.outliers for each in drawn if each.outliers > 1]
    lines = [
        f"{len(drawn)} random models of {len({each.family for each in drawn})} families: random heads, KV heads, "
        "head sizes, MLP, vocabulary and layers;",
        f"tp {counts(each.tp for each in drawn)}; {counts(each.dtype for each in drawn)}; shares {shares};",
        "weights and prompt from the seed; with and without sequence parallelism, streaming and `--float32`.",
        f"In {len(outliers)} of them, 3 rows and 3 columns of every matrix are multiplied by {counts(outliers)}.",
        "Weights, exact and native tier with all their canaries, 4 tokens decoded.",
        "",
        "| verdict | splits | of them with outliers |",
        "|---|---|---|",
    ]
    for name in ("pass", "fail", "inconclusive"):
        of = [each for each in drawn if each.verdict == name]
        lines.append(f"| {name} | {len(of)} | {sum(each.outliers > 1 for each in of)} |")
    if bad := [each for each in drawn if each.verdict != "pass"]:
        lines += ["", "Not passed, though the split is correct:", ""]
        lines += [
            f"- seed {each.seed} ({each.family}, {each.dtype}, tp {each.tp}, shares {each.shares}, "
            f"outliers × {each.outliers}): {each.verdict}, {each.reason}"
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
        total = sum(counts["cases"] for counts in part["faults"].values())
        formats = ", ".join(f"{name} ({count})" for name, count in part["formats"].items())
        families = {checkpoints.VARIANTS[name].model_type for name in part["variants"]}
        lines += [
            versions(part),
            "",
            f"{len(part['faults'])} faults × {len(part['variants'])} models of {len(families)} families × tp "
            f"{' and '.join(map(str, WIDTHS))}: {total} cases, those that apply.",
            f"By format, where those other than native have one model of each family: {formats}.",
            "Small random models in bfloat16, shards by `tpshard split`, one layer damaged, a prompt of 2 × 16 tokens.",
            "*weights* compares every stored element. *exact* compares in float64, the prompt and "
            f"{TOKENS} decoded tokens.",
            "*native* runs the same in bfloat16 and compares all bits. *named* counts the cases in which the verdict",
            "names the tensor and the rank that were changed, or the ranks whose files were exchanged.",
            f"*cosine* (of all logits of the prompt as one vector, ≥ {COSINE}) and *top-{TOP}* (at every position each "
            "side's first choice",
            f"is among the other's first {TOP}) compare the sharded bfloat16 logits with the unsharded bfloat16 ones.",
            "The last two columns of the second table count what such a test would have let through.",
            "",
            *summary(part["faults"]),
            "",
            *table(part["faults"]),
            *exceptions(part),
            "",
        ]
    lines += ["## Correct splits", ""]
    part = result.get("splits")
    if part is None:
        lines += ["Not measured."]
    else:
        lines += [versions(part), "", *split_lines([Drawn(**each) for each in part["drawn"]])]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="run only this one [default: all]")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated names of test checkpoints")
    parser.add_argument("--count", type=int, default=625, help="number of random splits")
    parser.add_argument("--output", type=Path, default=DOCS, help="write PREFIX.md and PREFIX.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    new: dict[str, Any] = {}
    if options.part in (None, "catalogue"):
        new["catalogue"] = catalogue(options.variants.split(","))
    if options.part in (None, "splits"):
        new["splits"] = splits(options.count)
    stored = options.output.with_suffix(".json")
    result = (json.loads(stored.read_text()) if stored.exists() else {}) | new
    stored.write_text(json.dumps(result, separators=(",", ":"), sort_keys=True) + "\n")
    text = markdown(result)
    options.output.with_suffix(".md").write_text(text)
    print(text)
    missed = result.get("catalogue", {}).get("missed", {})
    refused = [each for each in result.get("splits", {}).get("drawn", []) if not Drawn(**each).right]
    sys.exit(bool(missed.get("weights") or missed.get("exact") or refused))


if __name__ == "__main__":
    main()
