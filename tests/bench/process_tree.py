"""Time and memory of a command with all processes that it starts (Linux: read from /proc)."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PAUSE = 0.01
PROC = Path("/proc")


@dataclass(frozen=True)
class Run:
    """Seconds from start to end, and the largest sums over the processes that were alive at one moment, in bytes.

    `resident` counts pages of mapped files as well, and pages that processes share once for each; `anonymous` only what
    the processes have allocated.
    """

    seconds: float
    resident: int
    anonymous: int


def measure(shell: str, place: Path, environment: Mapping[str, str], log: Path) -> Run:
    """Run a command to its end, output into `log`; RuntimeError with the log's end when it fails."""
    resident = anonymous = 0
    with log.open("w") as output:
        begun = time.perf_counter()
        process = subprocess.Popen(
            shell, shell=True, cwd=place, env=dict(environment), stdout=output, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            found = [_memory(pid) for pid in _tree(process.pid)]
            resident = max(resident, sum(one[0] for one in found))
            anonymous = max(anonymous, sum(one[1] for one in found))
            time.sleep(PAUSE)
        seconds = time.perf_counter() - begun
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {shell}\n{log.read_text()[-2000:]}")
    return Run(seconds, resident, anonymous)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for children in (PROC / str(pid) / "task").glob("*/children"):
        try:
            inner = children.read_text().split()
        except OSError:  # ended meanwhile
            continue
        for child in inner:
            yield from _tree(int(child))


def _memory(pid: int) -> tuple[int, int]:
    """Resident and anonymous bytes of a process; zeros when it has ended."""
    try:
        text = (PROC / str(pid) / "status").read_text()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in text.splitlines() if line.startswith(("VmRSS", "RssAnon")))
    resident, anonymous = (int(fields.get(key, "0").split()[0]) * 1024 for key in ("VmRSS", "RssAnon"))
    return resident, anonymous
