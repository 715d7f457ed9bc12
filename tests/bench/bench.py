"""`make bench`: tpshard beside the tools that do part of its job, in one run, as ratios of medians.

The page cache is warm, free memory was touched just before, command start-up is included, outputs are removed and
written back before each command. `shards` has recorded checksums, which merge and reshard hold what they read against;
`unsummed` has none. A reshard that reads and records checksums hashes twice what a split hashes.
Timings never decide a test; this prints them, with the machine and the date, and writes JSON and Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.bench.synthetic import (
    DEEPSEEK_V3,
    GPT2_LARGE,
    LLAMA_1B,
    LLAMA_8B,
    LLAMA_405B,
    deepseek_tensors,
    gpt2_tensors,
    write,
    write_llama,
)

BIN = Path(sys.executable).parent
TPSHARD = str(BIN / "tpshard")


@dataclass(frozen=True)
class Command:
    """A shell command and what it writes, relative to the working directory."""

    shell: str
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ratio:
    """One line of the result: `ours` divided by `theirs`, both medians in seconds. cpu: the same of processor time."""

    name: str
    ours: float
    theirs: float
    limit: float
    cpu: float | None

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def commands(tp: int, workers: int) -> dict[str, Command]:
    flags = f"--workers {workers} -q > /dev/null"
    fast = f"--checksum none --no-fsync {flags}"
    other = tp // 2
    plan = f"{TPSHARD} plan deepseek --tp 8"
    formats = {
        f"split, {name}, none, no fsync": Command(f"{TPSHARD} split {model} {options} -o out {fast}", ("out",))
        for name, (model, options) in splits(tp).items()
    }
    return {
        "cp": Command("cp -r model copy", ("copy",)),
        "cp, sync": Command("cp -r model copy && sync copy/*", ("copy",)),
        "split, none": Command(f"{TPSHARD} split model --tp {tp} -o out --checksum none {flags}", ("out",)),
        "split, none, no fsync": Command(f"{TPSHARD} split model --tp {tp} -o out {fast}", ("out",)),
        "split, sha256": Command(f"{TPSHARD} split model --tp {tp} -o out {flags}", ("out",)),
        "usual way": Command(f"{sys.executable} {Path(__file__).parent}/usual_way.py model {tp} out", ("out",)),
        "split, sha256, no fsync": Command(f"{TPSHARD} split model --tp {tp} -o out --no-fsync {flags}", ("out",)),
        "merge, none, no fsync": Command(f"{TPSHARD} merge unsummed -o out --no-fsync {flags}", ("out",)),
        "merge, sha256, no fsync": Command(f"{TPSHARD} merge shards -o out --no-fsync {flags}", ("out",)),
        "reshard, none, no fsync": Command(f"{TPSHARD} reshard unsummed --tp {other} -o out {fast}", ("out",)),
        "reshard, sha256, no fsync": Command(
            f"{TPSHARD} reshard shards --tp {other} -o out --no-fsync {flags}", ("out",)
        ),
        "check --source": Command(f"{TPSHARD} check shards --source model --workers {workers} -q > /dev/null"),
        "verify --tier bytes": Command(f"{TPSHARD} verify shards --source model --tier bytes -q > /dev/null"),
        "cmp": Command("cmp model/model.safetensors twin/model.safetensors"),
        "tpshard --help": Command(f"{TPSHARD} --help > /dev/null"),
        "plan 405B": Command(f"{TPSHARD} plan model405 --tp 8 --json > /dev/null"),
        **formats,
        **{f"plan DeepSeek-V3, {name}": Command(f"{plan} --format {name} --json > /dev/null") for name in PLANNED},
    }


def splits(tp: int) -> dict[str, tuple[str, str]]:
    """Splits that do more than the native one of LLaMA, by name: of which model, and with which options.

    vLLM's fuses q, k and v, and of GPT-2 transposes; Meta's and DCP's write archives, Meta's in another rotary order.
    """
    formats = {name: ("model", f"--tp {tp} --format {name}") for name in ("vllm", "sglang", "meta", "dcp", "dcp-hf")}
    return {
        **formats,
        "hf": ("model", "--tp 1 --format hf"),
        "padded": ("model", f"--tp {tp} --pad-vocab-to {LLAMA_1B['vocab_size'] + 64 * tp}"),
        "GPT-2": ("gpt2", f"--tp {tp}"),
        "GPT-2, vllm": ("gpt2", f"--tp {tp} --format vllm"),
    }


PLANNED = ("native", "vllm", "dcp", "dcp-hf")
LOADERS, LOADS = "loaders", 5
PAIRS = [
    ("split, none", "cp, sync", 1.0),
    ("split, none, no fsync", "cp", 1.1),
    ("split, sha256", "cp, sync", 1.5),
    ("split, none, no fsync", "usual way", 0.3),
    ("merge, none, no fsync", "split, none, no fsync", 1.3),
    ("merge, sha256, no fsync", "split, sha256, no fsync", 1.3),
    ("reshard, none, no fsync", "split, none, no fsync", 1.3),
    ("reshard, sha256, no fsync", "split, sha256, no fsync", 2.0),
    *(
        (f"split, {name}, none, no fsync", "split, none, no fsync", 1.3)
        for name, (model, _) in splits(4).items()
        if model == "model"
    ),
    ("split, GPT-2, vllm, none, no fsync", "split, GPT-2, none, no fsync", 1.3),
    *((f"plan DeepSeek-V3, {name}", "plan DeepSeek-V3, native", 2.0) for name in PLANNED[1:]),
    ("check --source", "cmp", 1.3),
    ("verify --tier bytes", "check --source", 1.5),
    ("tpshard.load_rank, check=False", "safetensors load_file", 1.0),
    ("tpshard.load_rank, check=False", "fastsafetensors", 1.0),
    ("tpshard.load_rank", "sha256 of the file", 1.1),
]


def touch(memory: int) -> None:
    """Touch and free so many bytes: a virtual machine's host takes free pages back, and the command that gets them
    first would pay for their return.
    """
    code = "import sys; b = bytearray(int(sys.argv[1])); b[::4096] = bytes(len(b[::4096]))"
    subprocess.run([sys.executable, "-c", code, str(memory)], check=True)


def run(command: Command, place: Path, memory: int) -> tuple[float, float]:
    """Seconds of one run after `touch(memory)`, and of processor time; what it wrote is removed and flushed away."""
    touch(memory)
    begin, cpu = time.perf_counter(), os.times()
    subprocess.run(command.shell, shell=True, cwd=place, check=True)
    seconds, used = time.perf_counter() - begin, os.times()
    for name in command.writes:
        shutil.rmtree(place / name)
    if command.writes:
        os.sync()
    return seconds, used.children_user + used.children_system - cpu.children_user - cpu.children_system


def peak_memory(shell: str, place: Path) -> int:
    """Peak resident bytes of a command, which runs in one process."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1], shell=True, check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    out = subprocess.run([sys.executable, "-c", code, f"exec {shell}"], cwd=place, check=True, capture_output=True)
    shutil.rmtree(place / "out")
    os.sync()
    return int(out.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)


def loaders(shards: Path) -> dict[str, Any] | None:
    """One rank's load by us and by others, on a GPU if there is one, without start-up; None without torch."""
    if not find_spec("torch"):
        return None
    command = [sys.executable, "-m", "tests.bench.loaders", shards.resolve()]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for name, seconds in [*found["seconds"].items()]:
        if isinstance(seconds, str):
            print(f"{name}: {seconds}", file=sys.stderr)
            del found["seconds"][name]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, help="where to work; 12 GB, 44 GB with --memory [default: a temporary one]")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", action="append", help=f"a command by name, or {LOADERS}; may be given several times")
    parser.add_argument("--memory", action="store_true", help="also measure memory, on a model 8 times as large")
    parser.add_argument("--output", type=Path, help="write PREFIX.json and PREFIX.md")
    options = parser.parse_args()
    if options.dir:
        options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        place = Path(temporary)
        size = write_llama(place / "model", LLAMA_1B, data=True, shard_bytes=1 << 60)
        shutil.copytree(place / "model", place / "twin")
        write(place / "gpt2", GPT2_LARGE, gpt2_tensors(GPT2_LARGE), data=True, shard_bytes=1 << 60)
        write_llama(place / "model405", LLAMA_405B, data=False)
        write(place / "deepseek", DEEPSEEK_V3, deepseek_tensors(DEEPSEEK_V3), data=False)
        for split in ("-o shards", "-o unsummed --checksum none"):
            subprocess.run(f"{TPSHARD} split model --tp 4 {split} -q > /dev/null", shell=True, cwd=place, check=True)
        os.sync()
        chosen = {n: c for n, c in commands(4, 2).items() if not options.only or n in options.only}
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        cpu: dict[str, list[float]] = {name: [] for name in chosen}
        for _ in range(options.repeat):
            for name, command in chosen.items():
                took, used = run(command, place, 2 * size if command.writes else 0)
                seconds[name].append(took)
                cpu[name].append(used)
        loaded = loaders(place / "shards") if not options.only or LOADERS in options.only else None
        result = report(seconds | (loaded["seconds"] if loaded else {}), cpu, size)
        result["loaders_on"] = loaded and loaded["device"]
        if options.memory:
            shutil.rmtree(place / "twin")
            deep = {**LLAMA_1B, "num_hidden_layers": 8 * LLAMA_1B["num_hidden_layers"]}
            result["memory"] = {}
            for name, config in (("model", None), ("8B", LLAMA_8B), ("8 x layers", deep)):
                path = place / name.replace(" ", "")
                if config is not None:
                    write_llama(path, config, data=False)
                shell = f"{TPSHARD} split {path.name} --tp 4 -o out --workers 2 -q"
                result["memory"][name] = peak_memory(shell, place)
                if config is not None:
                    shutil.rmtree(path)
            result["memory_of_formats"] = {
                name: peak_memory(f"{TPSHARD} split {model} {flags} -o out --workers 2 -q", place)
                for name, (model, flags) in splits(4).items()
            }
    text = markdown(result)
    print(text)
    if options.output:
        options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(text)


def report(seconds: dict[str, list[float]], cpu: dict[str, list[float]], size: int) -> dict[str, object]:
    medians, used = ({name: statistics.median(values) for name, values in each.items()} for each in (seconds, cpu))
    ratios = [
        Ratio(f"{a} ÷ {b}", medians[a], medians[b], limit, used[a] / used[b] if a in used and b in used else None)
        for a, b, limit in PAIRS
        if a in medians and b in medians
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "model_bytes": size,
        "seconds": seconds,
        "medians": medians,
        "cpu_seconds": cpu,
        "cpu_medians": used,
        "ratios": [{**asdict(ratio), "ratio": ratio.ratio} for ratio in ratios],
    }


def machine() -> dict[str, object]:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def markdown(result: dict[str, object]) -> str:
    host = result["machine"]
    assert isinstance(host, dict)
    gib = host["memory_bytes"] / 2**30
    seconds = result["seconds"]
    assert isinstance(seconds, dict)
    runs = max(map(len, seconds.values()), default=0)
    lines = [
        f"# Benchmark of {result['date']}",
        "",
        f"{host['cpu']}, {host['cores']} cores, {gib:.0f} GiB, {host['system']}, Python {host['python']}.",
        f"A LLaMA checkpoint of {result['model_bytes']:,} bytes (bf16), tp 4, 2 workers, page cache warm,",
        f"command start-up included, medians of {runs} interleaved runs.",
        "",
        "| command ÷ command | seconds | seconds | ratio | of processor time | aim |",
        "|---|---|---|---|---|---|",
    ]
    for ratio in result["ratios"]:  # type: ignore[attr-defined]
        aim, value = ratio["limit"], ratio["ratio"]
        cpu = "" if ratio["cpu"] is None else f"{ratio['cpu']:.2f}"
        times = f"{ratio['ours']:.2f} | {ratio['theirs']:.2f} | **{value:.2f}** | {cpu}"
        lines.append(f"| {ratio['name']} | {times} | ≤ {aim} |")
    medians = result["medians"]
    assert isinstance(medians, dict)
    used = result["cpu_medians"]
    assert isinstance(used, dict)
    lines += ["", "| command | median seconds | of processor time |", "|---|---|---|"]
    lines += [
        f"| {name} | {value:.3f} | {f'{used[name]:.3f}' if name in used else ''} |" for name, value in medians.items()
    ]
    if result.get("loaders_on"):
        lines += [
            "",
            f"Loaders: one rank of four onto the {result['loaders_on']}, {LOADS} loads in turn and a first one,",
            "without start-up. On a CPU safetensors maps the file; its ratio is that of copies, as the others give.",
        ]
    memory = result.get("memory")
    if isinstance(memory, dict):
        one, large, deep = (memory[name] / 1e6 for name in ("model", "8B", "8 x layers"))
        lines += [
            "",
            f"Peak resident memory of split: {one:.1f} MB. For the shape of Llama 3.1 8B {large:.1f} MB,",
            f"x {large / one:.2f}; for the same widths and 8 times as many layers {deep:.1f} MB, x {deep / one:.2f}:",
            "it grows with the number of tensors, not with their bytes.",
        ]
    formats = result.get("memory_of_formats")
    if isinstance(formats, dict):
        lines += ["", "| split | peak resident MB |", "|---|---|"]
        lines += [f"| {name} | {size / 1e6:.1f} |" for name, size in formats.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
