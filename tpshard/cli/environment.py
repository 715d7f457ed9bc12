"""What this machine can do: devices, memory, disk, versions, and which extras are installed.

Nothing here needs torch. Where it is installed it is asked what it sees, and that alone takes more than a moment.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tpshard import __version__
from tpshard.report.results import SCHEMA_VERSION

EXTRAS = {
    "torch": (("torch",), "casts, pickle input, load_rank, verify"),
    "transformers": (("transformers",), "verify against transformers' own code"),
}
"""What can be installed beside tpshard: the packages, and what needs them."""
PACKAGES = ("huggingface-hub", "typer", "rich", "safetensors", "numpy", "transformers")
"""Packages whose versions matter in a report of a bug."""
_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")


def environment(directory: Path) -> dict[str, Any]:
    """The `env` object of the JSON contract. directory: on the disk that is asked for its room."""
    gpus = _gpus()
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "env",
        "tpshard": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": _cores(),
        "memory": _memory(),
        "disk": {"path": str(directory), "free": shutil.disk_usage(directory).free},
        "gpus": gpus,
        "torch": _torch(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "extras": [
            {"name": name, "installed": all(map(importlib.util.find_spec, needed)), "for": purpose}
            for name, (needed, purpose) in EXTRAS.items()
        ],
    }


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> dict[str, int | None]:
    """Bytes of memory: all of it, and what is available now where the system says it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {"total": total, "available": None}
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return {"total": total, "available": found[0] if found else None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus(query: tuple[str, ...] = _QUERY) -> list[dict[str, Any]]:
    """NVIDIA devices by their driver's own tool, torch or no torch; none where the tool is missing or fails."""
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """Lines of `name, MiB, driver`; memory is null where the driver does not say it, as with unified memory."""
    gpus = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.rsplit(",", 2)]
        if len(fields) == 3:
            memory = int(fields[1]) * 2**20 if fields[1].isdecimal() else None
            gpus.append({"name": fields[0], "memory": memory, "driver": fields[2]})
    return gpus


def _torch() -> dict[str, Any] | None:
    """What torch says of itself, of its devices and of the libraries that ranks talk through; None without torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    try:
        return _torch_facts()
    except Exception as error:  # an installation that is broken is what this command is there to tell
        return {"version": _version("torch"), "error": f"{type(error).__name__}: {error}".split("\n")[0]}


def _torch_facts() -> dict[str, Any]:
    """Versions, devices and the backends of process groups with their versions, where they have one."""
    import torch

    group = torch.distributed
    backends: dict[str, str | None] = {}
    if group.is_available():
        backends |= {"gloo": None} if group.is_gloo_available() else {}
        if group.is_nccl_available():
            backends["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": torch.cuda.device_count(),
        "backends": backends,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people: a line per fact."""
    from tpshard.units import human_bytes

    memory, torch = found["memory"], found["torch"]
    available = "" if memory["available"] is None else f", {human_bytes(memory['available'])} available"
    texts = [
        f"tpshard {found['tpshard']}, Python {found['python']}, {found['platform']}",
        f"cores: {found['cores']}",
        f"memory: {human_bytes(memory['total'])}{available}",
        f"disk: {human_bytes(found['disk']['free'])} free in {found['disk']['path']}",
    ]
    for index, gpu in enumerate(found["gpus"]):
        size = "memory unknown" if gpu["memory"] is None else human_bytes(gpu["memory"])
        texts.append(f"GPU {index}: {gpu['name']}, {size}, driver {gpu['driver']}")
    if not found["gpus"]:
        texts.append("GPU: none that nvidia-smi knows")
    if torch is None:
        texts.append("torch: not installed")
    elif "error" in torch:
        texts.append(f"torch {torch['version']}: does not load ({torch['error']})")
    else:
        cuda = f"CUDA {torch['cuda']}, {torch['devices']} devices" if torch["cuda"] else "without CUDA"
        backends = ", ".join(name if v is None else f"{name} {v}" for name, v in torch["backends"].items())
        texts.append(f"torch {torch['version']}: {cuda}; process groups: {backends or 'none'}")
    texts.append("packages: " + ", ".join(f"{name} {version}" for name, version in found["packages"].items()))
    for extra in found["extras"]:
        texts.append(f"{extra['name']}: {'installed' if extra['installed'] else 'missing'} ({extra['for']})")
    return texts
