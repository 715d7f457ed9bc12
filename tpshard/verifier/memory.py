"""Devices and their memory."""

import ctypes
import os
from pathlib import Path

import torch

from tpshard.errors import LocalIOError, UsageError

# Of the memory that is free, how much verify plans to fill; the rest is for everyone else.
FILL = 0.7


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


def usable(device: torch.device, sharing: int = 1) -> int:
    """The bytes that one of `sharing` processes may fill on a device."""
    return int(available(device) * FILL) // sharing


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_LARGE = 8 << 20


def return_what_is_freed() -> None:
    """Let this process give blocks of 8 MB and more back to the system whenever they are freed.

    glibc keeps blocks of up to 32 MB for itself once some were freed; where weights come and go, holes among them add
    up to more than the weights. Elsewhere nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
        mallopt(parameter, _LARGE)


def require_memory(need: int, free: int, device: torch.device, hint: str) -> None:
    """LocalIOError where more bytes are needed than may be filled."""
    if need > free:
        found = f"{free:,} bytes to use on {device}"
        raise LocalIOError("there is not enough memory for this", expected=f"{need:,} bytes", found=found, hint=hint)


def pick_device(name: str) -> torch.device:
    """auto is the first GPU, or the CPU where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("there is no GPU that torch can use here", found=name, hint="--device cpu")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)
