"""What people write today to make a checkpoint for FSDP: load it whole, `torch.distributed.checkpoint.save`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file


def main(model: Path, out: Path) -> None:
    state: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        state |= load_file(path)
    dcp.save(state, checkpoint_id=out, no_dist=True)


main(Path(sys.argv[1]), Path(sys.argv[2]))
