"""gpt-oss in MXFP4 with so many blocks of 32 in an expert's intermediate size: the fixture with fewer of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.quantised.fixture_table import FIXTURES


def with_blocks(blocks: int, directory: Path) -> Path:
    """A copy of the fixture, which has 8 of them."""
    shutil.copytree(FIXTURES / "mxfp4-gpt-oss", directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if ".gate_up_proj_" in name:
            tensors[name] = tensors[name][:, : 64 * blocks].contiguous()
        elif ".down_proj_" in name and not name.endswith("_bias"):
            tensors[name] = tensors[name][:, :, :blocks].contiguous()
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 32 * blocks}))
    return directory
