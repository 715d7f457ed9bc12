"""What `gpu/check.py` measures of the machine and of loaders, and its table."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tpshard
from tests.bench.loaders import measure

REPEAT = 5
CHUNK = 1 << 28
NATIVE = ("differences", "sharded_error", "unsharded_error", "kl_sharded")
"""What the table shows of the native tier."""


def version(package: str) -> str:
    """A package's version, or that it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def are(count: int) -> str:
    return {0: "is none", 1: "is one"}.get(count, f"are {count}")


def environment(device: torch.device) -> dict[str, Any]:
    """Date, hardware and versions; of GPUs nothing where none is used."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tpshard": tpshard.__version__,
        **{name: version(name) for name in ("transformers", "safetensors", "fastsafetensors")},
        "gpu": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": f"{torch.cuda.device_count()} × {properties.name}",
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        }
    return facts


def timed(work: Callable[[], Any], device: torch.device) -> list[float]:
    """Seconds of each repetition after a first one that warms up; what it returned is freed before the next."""
    seconds = []
    for _ in range(REPEAT + 1):
        gc.collect()
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        kept = work()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
        del kept
    return seconds[1:]


def bus(device: torch.device) -> float:
    """Bytes a second of a copy from pinned memory to the device: what no loader can beat."""
    host = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(CHUNK, dtype=torch.uint8, device=device)

    def copy() -> None:
        for _ in range(4):
            there.copy_(host, non_blocking=True)

    return 4 * CHUNK / min(timed(copy, device))


def reading(path: Path, device: torch.device) -> float:
    """Bytes a second of reading a file that lies in the page cache into memory, on one thread."""
    buffer = bytearray(1 << 26)

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    return path.stat().st_size / min(timed(read, device))


def loader(shards: Path, device: torch.device) -> dict[str, Any]:
    """One rank's load in bytes a second, beside the bus, the page cache, and other loaders of the same file."""
    if device.type != "cuda":
        return {"status": "not run", "reason": "no GPU is used"}
    path = next(iter(sorted(shards.glob("rank-00000-of-*.safetensors"))))
    size = sum(part.stat().st_size for part in shards.glob("rank-00000-of-*.safetensors"))
    limit = bus(device)
    rates: dict[str, Any] = {}
    for name, seconds in measure(shards, device).items():
        if isinstance(seconds, str):
            rates[name] = seconds
            continue
        median = size / statistics.median(seconds)
        rates[name] = {"best": size / min(seconds), "median": median, "of_bus": median / limit}
    return {
        "status": "done",
        "bytes": size,
        "bus_bytes_per_second": limit,
        "page_cache_bytes_per_second": reading(path, device),
        "loaders": rates,
    }


def number(value: Any, form: str = ".3g") -> str:
    return format(value, form) if isinstance(value, int | float) else "" if value is None else str(value)


def markdown(result: dict[str, Any]) -> str:
    """One table of all steps, then the loaders."""
    facts = result["environment"]
    gpu = facts["gpu"]
    memory = f" with {facts['gpu_memory_bytes'] / 2**30:.0f} GiB" if gpu else ""
    lines = [
        f"# GPU check of {facts['date']}",
        "",
        f"{gpu}{memory}, CUDA {facts['cuda']}, NCCL {facts['nccl']}."
        if gpu
        else "**No GPU was used: nothing here is a figure of one.**",
        f"{facts['cpu']}, {facts['memory_bytes'] / 2**30:.0f} GiB; Python {facts['python']}, torch {facts['torch']}, "
        f"transformers {facts['transformers']}, safetensors {facts['safetensors']}, tpshard {facts['tpshard']}.",
        f"{'Small models, to try the script. ' if result['small'] else ''}{result.get('seconds', 0)} s in all; "
        "32 tokens decoded, prompts of 2 × 16 tokens.",
        "",
        f"| step | status | seconds | exact error | {' | '.join(NATIVE)} | canaries | streamed | peak, GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        native = row.get("native") or {}
        peaks = [peak for peak in row.get("peaks", [row.get("peak_gpu_bytes")]) if peak]
        cells = [
            row["step"], row.get("status", ""), number(row["seconds"]), number(row.get("exact"), ".1e"),
            *(number(native.get(name), ".2g") for name in NATIVE),
            row.get("canaries", ""), {True: "yes", False: "no"}.get(row.get("streamed"), ""),
            ", ".join(f"{peak / 1e9:.2f}" for peak in peaks),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    for row in result["rows"]:
        if row.get("status") not in ("pass", "done") and row.get("reason"):
            lines += ["", f"- {row['step']}: {row['status']}: {row['reason']}"]
    lines += ["", *forwards(result["rows"]), *loaders(result["rows"]), *result["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def forwards(rows: list[dict[str, Any]]) -> list[str]:
    """verify beside transformers' own forward pass."""
    measured = [row for row in rows if "load_seconds" in row]
    if not measured:
        return []
    lines = [
        "| model | transformers: load | first forward | second forward | verify, tp 4 in threads | ÷ load and first |",
        "|---|---|---|---|---|---|",
    ]
    for row in measured:
        cells = [row["model"], number(row["load_seconds"]), number(row["first_forward_seconds"])]
        cells += [number(row["second_forward_seconds"]), number(row["verify_seconds"])]
        lines.append("| " + " | ".join([*cells, number(row["verify_to_load_and_forward"])]) + " |")
    return [*lines, ""]


def loaders(rows: list[dict[str, Any]]) -> list[str]:
    """Loaders beside the bus limit."""
    lines = []
    for row in rows:
        if "loaders" not in row:
            continue
        lines += [
            f"One rank of {row['model']}, {row['bytes'] / 1e9:.2f} GB, in the page cache, {REPEAT} loads and a first. "
            f"Pinned host-to-device copy: {row['bus_bytes_per_second'] / 1e9:.1f} GB/s; reading the file alone, one "
            f"thread: {row['page_cache_bytes_per_second'] / 1e9:.1f} GB/s.",
            "",
            "| loader | median GB/s | best GB/s | of the bus |",
            "|---|---|---|---|",
        ]
        for name, rate in row["loaders"].items():
            figures = [rate, "", ""]
            if isinstance(rate, dict):
                figures = [f"{rate['median'] / 1e9:.2f}", f"{rate['best'] / 1e9:.2f}", f"{rate['of_bus']:.0%}"]
            lines.append(f"| {name} | " + " | ".join(figures) + " |")
        lines.append("")
    return lines
