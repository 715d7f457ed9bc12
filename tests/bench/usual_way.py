"""What people write today: open the checkpoint with safetensors, slice for each rank, save_file."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

ROW = ("o_proj.weight", "down_proj.weight")


def main(model: Path, tp: int, out: Path) -> None:
    out.mkdir()
    for rank in range(tp):
        tensors = {}
        for path in sorted(model.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    part = file.get_slice(name)
                    shape = part.get_shape()
                    if len(shape) == 1:
                        tensors[name] = part[:]
                        continue
                    dim = 1 if name.endswith(ROW) else 0
                    size = shape[dim] // tp
                    cut = slice(rank * size, (rank + 1) * size)
                    tensors[name] = (part[:, cut] if dim else part[cut]).contiguous()
        save_file(tensors, out / f"rank-{rank}.safetensors", {"format": "pt"})


main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
