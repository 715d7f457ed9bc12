"""`make power`: how much verify notices, measured; writes docs/benchmarks/power.md and power.json.

Three parts, each on its own with --part: the catalogue of faults in every family, correct splits of random models, and
the noise of correct splits, above which the native tier's limits lie.
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

import torch

import tpshard
from tests.helpers import checkpoints
from tests.power.calibration import TOKENS as NOISE_TOKENS
from tests.power.calibration import WIDTHS as HIDDEN
from tests.power.calibration import measure as measure_noise
from tests.power.calibration import summary as noise_summary
from tests.power.catalogue import COSINE, TOKENS, TOP, VARIANTS, WIDTHS, Case, measure
from tests.power.splits import measure as measure_splits
from tpshard.verifier.criteria import NATIVE_LIMITS
from tpshard.verifier.fault_catalogue import FAULTS

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks" / "power"


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
        cases = measure(Path(folder), variants, say)
    return judged(cases, variants, conditions(begun))


def judged(cases: Sequence[Case], variants: Sequence[str], ran: dict[str, Any]) -> dict[str, Any]:
    """What is kept of all cases."""
    faults = {name: counted([case for case in cases if case.fault == name]) for name in FAULTS}
    harmful = [case for case in cases if not FAULTS[case.fault].harmless]
    return {
        **ran,
        "variants": list(variants),
        "faults": faults,
        "missed_by_exact": [asdict(case) for case in harmful if not case.exact],
        "misnamed": [asdict(case) for case in harmful if case.exact and case.named == "no"],
        "missed_by_native": [asdict(case) for case in harmful if FAULTS[case.fault].structural and not case.native],
    }


def counted(cases: list[Case]) -> dict[str, Any]:
    """How many cases of one fault each test noticed, and how many were named; `least`: the smallest native excess."""
    return {
        "least": round(min((case.excess for case in cases), default=0.0), 3),
        "cases": len(cases),
        "exact": sum(case.exact for case in cases),
        "module": sum(case.named == "module" for case in cases),
        "block": sum(case.named == "block" for case in cases),
        "native": sum(case.native for case in cases),
        "cosine": sum(case.cosine < COSINE for case in cases),
        "top": sum(not case.top for case in cases),
    }


def splits(count: int) -> dict[str, Any]:
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        drawn = measure_splits(Path(folder), count, say)
    return {**conditions(begun), "drawn": [asdict(each) for each in drawn]}


def noise(count: int) -> dict[str, Any]:
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        found = measure_noise(Path(folder), count, say)
    return {**conditions(begun), **noise_summary(found)}


def versions(part: dict[str, Any]) -> str:
    return (
        f"{part['date']}, CPU ({part['machine']}), tpshard {part['tpshard']}, torch {part['torch']}, "
        f"transformers {part['transformers']}, Python {part['python']}, {part['cpu_seconds']} s of one core."
    )


def summary(faults: dict[str, dict[str, Any]]) -> list[str]:
    """What each test noticed of the cases that change the function."""
    harmful = {name: counts for name, counts in faults.items() if not FAULTS[name].harmless}
    large = {name: counts for name, counts in harmful.items() if FAULTS[name].structural}

    def line(title: str, key: str, of: dict[str, dict[str, Any]]) -> str:
        total, noticed = (sum(counts[what] for counts in of.values()) for what in ("cases", key))
        never = sum(counts["cases"] > 0 and counts[key] == 0 for counts in of.values())
        partly = sum(0 < counts[key] < counts["cases"] for counts in of.values())
        return f"| {title} | {noticed} of {total} | {total - noticed} | {never} | {partly} |"

    silent = sum(counts["cases"] for name, counts in faults.items() if FAULTS[name].harmless)
    return [
        "| test | noticed | let through | faults never noticed | faults noticed in some models only |",
        "|---|---|---|---|---|",
        line("exact tier", "exact", harmful),
        line("native tier", "native", harmful),
        line("native tier, structural faults alone", "native", large),
        line(f"cosine ≥ {COSINE}", "cosine", harmful),
        line(f"top-{TOP} containment", "top", harmful),
        "",
        f"Left out here: {silent} cases in which the vocabulary's padding is not zero. No logit sees that, so no tier",
        "of arithmetic may refuse it; `check --source` does, which is the bytes tier.",
    ]


def table(faults: dict[str, dict[str, Any]]) -> list[str]:
    """A row per fault."""
    lines = [
        "| fault | cases | exact | module and rank named | block named | native | least excess "
        f"| cosine lets through | top-{TOP} lets through |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, counts in sorted(faults.items()):
        mark = " (changes nothing)" if FAULTS[name].harmless else "" if FAULTS[name].structural else " (small)"
        cells = [counts[key] for key in ("cases", "exact", "module", "block", "native")]
        cells += [f"{counts['least']:.3g}"]
        cells += [counts["cases"] - counts[key] for key in ("cosine", "top")]
        lines.append(f"| {name}{mark} | " + " | ".join(map(str, cells)) + " |")
    return lines


def exceptions(part: dict[str, Any]) -> list[str]:
    """Every case that the exact tier missed or misnamed, and every structural one that the native tier missed."""
    lines = [""]
    for title, cases in [
        ("Faults that change the function and that the exact tier did not notice", part["missed_by_exact"]),
        ("Structural faults that the native tier did not notice", part["missed_by_native"]),
    ]:
        lines += [f"{title}: {len(cases) or 'none'}.", ""]
        lines += [
            f"- {case['fault']} in {case['variant']} at tp {case['tp']}; it changes the logits by {case['error']:.1e}"
            for case in cases
        ]
        lines += [""] * bool(cases)
    wrong = part["misnamed"]
    lines += [f"Noticed by the exact tier, but under another name than what was changed: {len(wrong) or 'none'}."]
    lines += [""] * bool(wrong)
    grouped = Counter((case["fault"], case["reason"].split(", by ")[0]) for case in wrong)
    return lines + [f"- {fault}, {count} times: “{reason}”" for (fault, reason), count in sorted(grouped.items())]


def split_lines(part: dict[str, Any]) -> list[str]:
    drawn = part["drawn"]
    verdicts = Counter(each["verdict"] for each in drawn)
    shares = Counter("even" if each["shares"] == "even" else "uneven" for each in drawn)
    dtypes = Counter(each["dtype"] for each in drawn)
    widths = Counter(each["tp"] for each in drawn)
    lines = [
        f"{len(drawn)} random models of {len({each['family'] for each in drawn})} families: random heads, KV heads, "
        "head sizes, MLP, vocabulary and layers;",
        "tp "
        + ", ".join(f"{tp} ({count})" for tp, count in sorted(widths.items()))
        + "; "
        + ", ".join(f"{name} ({count})" for name, count in sorted(dtypes.items()))
        + "; "
        + ", ".join(f"{name} shares ({count})" for name, count in sorted(shares.items()))
        + ";",
        "weights and prompt from the seed; with and without sequence parallelism, streaming and `--float32`.",
        "Exact and native tier with all their canaries, 4 tokens decoded.",
        "",
        "| verdict | splits |",
        "|---|---|",
        *(f"| {name} | {verdicts[name]} |" for name in ("pass", "fail", "inconclusive")),
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


def noise_lines(part: dict[str, Any]) -> list[str]:
    """The distribution of each native criterion among correct splits, by hidden size, beside its limit."""
    lines = [
        f"{part['splits']} correct splits of random models, drawn like those above with other seeds; prompts of 2 × 16 "
        f"tokens, {NOISE_TOKENS} decoded.",
        "The limits have to lie above all of this, with room for what was not drawn.",
        "",
        "| criterion | limit | hidden size | splits | median | 95th of 100 | 99th of 100 | largest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, limit in NATIVE_LIMITS.items():
        for hidden in HIDDEN:
            row = part["criteria"][hidden]
            cells = [f"{row[name][key]:.2f}" for key in ("median", "95th", "99th", "largest")] if name in row else [""]
            lines.append(f"| {name} | {limit:g} | {hidden} | {row['splits']} | " + " | ".join(cells) + " |")
    lines += ["", "Nearest to a limit:", ""]
    for each in part["worst"]:
        figures = ", ".join(f"{name} {each[name]:.2f}" for name in NATIVE_LIMITS)
        model = f"{each['family']}, {each['dtype']}, hidden size {each['hidden']}, tp {each['tp']}"
        lines.append(f"- seed {each['seed']} ({model}): {figures}")
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
        families = {checkpoints.VARIANTS[name].model_type for name in part["variants"]}
        lines += [
            versions(part),
            "",
            f"{len(part['faults'])} faults × {len(part['variants'])} models of {len(families)} families × tp "
            f"{' and '.join(map(str, WIDTHS))}: {total} cases, those that apply.",
            "Small random models in bfloat16, shards by `tpshard split`, one layer damaged, a prompt of 2 × 16 tokens.",
            f"*exact* compares in float64. *native* runs in bfloat16, the prompt and {TOKENS} decoded tokens.",
            f"*cosine* (of all logits of the prompt as one vector, ≥ {COSINE}) and *top-{TOP}* (at every position each "
            "side's first choice",
            f"is among the other's first {TOP}) compare the sharded bfloat16 logits with the unsharded bfloat16 ones.",
            "The last two columns of the second table count what such a test would have let through.",
            "",
            *summary(part["faults"]),
            "",
            "*Small* faults, such as one element's sign, are not asked of the native tier: rounding is its yardstick.",
            "*Least excess* is, of the fault's least visible case, the largest native criterion in units of its limit:",
            "above 1 is noticed.",
            "",
            *table(part["faults"]),
            *exceptions(part),
            "",
        ]
    lines += ["## Correct splits", ""]
    part = result.get("splits")
    lines += ["Not measured."] if part is None else [versions(part), "", *split_lines(part)]
    lines += ["", "## The native tier's limits", ""]
    part = result.get("noise")
    lines += ["Not measured."] if part is None else [versions(part), "", *noise_lines(part)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("catalogue", "splits", "noise"), help="run only this one [default: all]")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated names of test checkpoints")
    parser.add_argument("--count", type=int, default=200, help="number of random splits")
    parser.add_argument("--noise", type=int, default=900, help="number of splits for the native limits")
    parser.add_argument("--output", type=Path, default=DOCS, help="write PREFIX.md and PREFIX.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    new: dict[str, Any] = {}
    if options.part in (None, "catalogue"):
        new["catalogue"] = catalogue(options.variants.split(","))
    if options.part in (None, "splits"):
        new["splits"] = splits(options.count)
    if options.part in (None, "noise"):
        new["noise"] = noise(options.noise)
    stored = options.output.with_suffix(".json")
    result = (json.loads(stored.read_text()) if stored.exists() else {}) | new
    stored.write_text(json.dumps(result, separators=(",", ":"), sort_keys=True) + "\n")
    text = markdown(result)
    options.output.with_suffix(".md").write_text(text)
    print(text)
    missed = result.get("catalogue", {}).get("missed_by_exact")
    refused = any(each["verdict"] != "pass" for each in result.get("splits", {}).get("drawn", []))
    sys.exit(1 if missed or refused else 0)


if __name__ == "__main__":
    main()
