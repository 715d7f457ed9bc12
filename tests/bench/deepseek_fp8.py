"""DeepSeek-V3 as it is published, in FP8 blocks: plans of the whole, and a split and a check of a 20 GB slice of it.

Run as `python -m tests.bench.deepseek_fp8 --dir DIR`. The whole is headers over files of holes and takes no room. The
slice has the whole's widths and all 256 experts in its one sparse layer; its bytes are pseudo-random, and it and its
shards take 41 GB. Prints a table with machine and date; memory is the largest resident set, without the page cache.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.bench.bench import TPSHARD, machine
from tests.bench.synthetic import DEEPSEEK_V3, FP8_IN_BLOCKS, deepseek_tensors, in_blocks, write

TP = 8
WHOLE = {**DEEPSEEK_V3, "quantization_config": FP8_IN_BLOCKS}
SLICE = {**WHOLE, "num_hidden_layers": 9, "first_k_dense_replace": 8, "num_nextn_predict_layers": 0}
_MEASURE = """
import json, resource, subprocess, sys, time
begin = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, time.perf_counter() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""
"""Run by a small process of its own: a child's largest resident set is never less than its parent's."""


@dataclass(frozen=True)
class Used:
    """Seconds, processor seconds and the largest resident set of a command."""

    seconds: float
    processor: float
    resident: int


def run(*command: str) -> Used:
    """Run a tpshard command to its end."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, TPSHARD, *command], capture_output=True, text=True, check=True
    )
    code, seconds, processor, resident = json.loads(done.stdout)
    if code:
        raise RuntimeError(f"exit code {code}: {' '.join(command)}\n{done.stderr[-2000:]}")
    return Used(seconds, processor, resident)


def plans(place: Path) -> dict[str, Used]:
    """Plans of the whole, from headers alone."""
    whole = str(place / "whole")
    write(place / "whole", WHOLE, in_blocks(deepseek_tensors(WHOLE)), data=False)
    commands = {
        f"plan --tp {TP}": ("plan",),
        f"plan --tp {TP} --json": ("plan", "--json"),
        f"plan --tp {TP} --format vllm": ("plan", "--format", "vllm"),
        f"split --tp {TP} --ranks 0 --dry-run": ("split", "--ranks", "0", "--dry-run"),
    }
    return {name: run(verb, whole, "--tp", str(TP), *more) for name, (verb, *more) in commands.items()}


def splits(place: Path, *, data: bool) -> tuple[dict[str, Used], int]:
    """A split of the slice and a check of it against the source, and the bytes of its tensors."""
    source, out = str(place / "slice"), str(place / "out")
    size = write(place / "slice", SLICE, slice_tensors(), data=data)
    os.sync()
    found = {}
    for name, more in ((f"split --tp {TP}", ()), (f"split --tp {TP} --checksum none", ("--checksum", "none"))):
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        found[name] = run("split", source, "--tp", str(TP), "-o", out, "-q", *more)
        if not more:
            found["check --source"] = run("check", out, "--source", source, "-q")
    return found, size


def slice_tensors() -> list[tuple[str, str, tuple[int, ...]]]:
    """The slice's tensors; none of a layer beyond the last."""
    beyond = f"model.layers.{SLICE['num_hidden_layers']}."
    return [each for each in in_blocks(deepseek_tensors(SLICE)) if not each[0].startswith(beyond)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, help="where to work; 41 GB [default: a temporary one]")
    parser.add_argument(
        "--sparse", action="store_true", help="a slice of holes, which takes no room but for its shards"
    )
    parser.add_argument("--plans", action="store_true", help="the plans alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        place = Path(temporary)
        planned = plans(place)
        split, size = ({}, 0) if options.plans else splits(place, data=not options.sparse)
    host = machine()
    memory = int(str(host["memory_bytes"])) / 2**30
    print(
        f"{datetime.date.today()}: {host['cpu']}, {host['cores']} cores, {memory:.0f} GiB, {host['system']}, ", end=""
    )
    print(f"Python {host['python']}, load {host['load']:.1f}\n")
    count = len(in_blocks(deepseek_tensors(WHOLE)))
    print(f"| {count:,} tensors | seconds | of processor time | resident |\n|---|---|---|---|")
    for name, used in planned.items():
        print(f"| `{name}` | {used.seconds:.1f} | {used.processor:.1f} | {used.resident / 1e6:.0f} MB |")
    if split:
        what = f"{len(slice_tensors()):,} tensors, {size / 1e9:.2f} GB"
        print(f"\n| {what} | seconds | GB/s | of processor time | resident |\n|---|---|---|---|---|")
    for name, used in split.items():
        rate = f"{size / used.seconds / 1e9:.2f}"
        print(f"| `{name}` | {used.seconds:.0f} | {rate} | {used.processor:.0f} | {used.resident / 1e6:.0f} MB |")


if __name__ == "__main__":
    main()
