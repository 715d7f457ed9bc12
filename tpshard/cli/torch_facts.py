"""What torch says of its installation: asked by `tpshard env`, and imported by nothing else."""

from __future__ import annotations

from typing import Any

import torch


def facts() -> dict[str, Any]:
    """Versions, devices and the backends of process groups with their versions, where they have one."""
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
