"""What this machine has, and what a verification needs of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tpshard.errors import LocalIOError, UsageError
from tpshard.verify.family import Family
from tpshard.verify.shards import FileWeights

BLOCK_BYTES = 1 << 26
# Of the memory that is free, how much verify plans to fill; the rest is for everyone else.
FILL = 0.7


@dataclass(frozen=True)
class Need:
    """Estimated peak bytes when all weights are kept, and when they are streamed through in blocks."""

    resident: int
    streamed: int

    def choose(self, stream: bool | None, device: torch.device) -> bool:
        """Whether to stream: as asked, or because memory asks for it. LocalIOError when even that is too much."""
        free = int(available(device) * FILL)
        stream = self.resident > free if stream is None else stream
        if (self.streamed if stream else self.resident) > free:
            raise LocalIOError(
                "there is not enough memory for this",
                expected=f"{self.streamed if stream else self.resident:,} bytes",
                found=f"{free:,} bytes to use on {device}",
                hint="free memory, or use another machine" if stream else "--stream needs less",
            )
        return stream


def estimate(
    family: Family, source: FileWeights, ranks: Sequence[FileWeights], *, here: int, native: bool, positions: int
) -> Need:
    """What a run needs beyond the interpreter: `here` ranks in this process, `positions` of all prompts together."""
    whole, shard = source.elements, max(rank.elements for rank in ranks) * here
    kept = 8 * (whole + shard)
    if native:
        kept = max(kept, 8 * whole + source.nbytes + sum(rank.nbytes for rank in ranks[:here]))
    logits = 8 * positions * family.vocab * (here + 4)
    # Streaming keeps a layer in the checkpoint's dtype for decoding, and records one layer's activations.
    layer = source.nbytes // family.layers if native else 0
    return Need(kept + logits, 8 * BLOCK_BYTES + 2 * layer + logits)


def available(device: torch.device) -> int:
    """Free bytes on a GPU, or what the kernel can give without swapping, within a container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass  # not Linux: all of the machine's memory
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        cached = Path("/sys/fs/cgroup/memory.stat").read_text().split()
        free = min(free, limit - used + int(cached[cached.index("file") + 1]))
    except (OSError, ValueError):
        pass  # no container, or one without a limit
    return free


def pick_device(name: str) -> torch.device:
    """auto is the first GPU, or the CPU where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}", expected="auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("there is no GPU that torch can use here", found=name, hint="--device cpu")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)
