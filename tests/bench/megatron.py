"""Memory and time of merging a Megatron checkpoint in the shape of 7B and 8B models, and of writing one.

    python -m tests.bench.megatron DIR [LAYERS]     needs 32 GB in DIR, which are removed again

The checkpoint has holes for weights. LAYERS: of them, where those are not all that the models have.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.bench.process_tree import measure
from tests.bench.synthetic import LLAMA_8B, llama_tensors
from tpshard.formats.plan import plan_split
from tpshard.formats.split import Options
from tpshard.inputs.checkpoint import open_checkpoint
from tpshard.inputs.model import from_checkpoint
from tpshard.storage.safetensors import build_header, nbytes

LLAMA_7B = LLAMA_8B | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}
TP = 8


def make(path: Path, config: dict[str, Any], form: str) -> None:
    """A Megatron checkpoint of `TP` ranks, all zeros, none of which take room on disk."""
    source = path.with_name("source")
    source.mkdir()
    tensors = llama_tensors(config)
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096} | config))
    header = build_header(tensors, {"format": "pt"})
    with (source / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(nbytes(dtype, shape) for _, dtype, shape in tensors))
    planned = plan_split(from_checkpoint(open_checkpoint(source)), Options(TP, format=form))
    for name, data in planned.format.derived(planned).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    for output in (file for rank in range(TP) for file in planned.files(rank)):
        (path / output.name).parent.mkdir(parents=True, exist_ok=True)
        with (path / output.name).open("wb") as file:
            for offset, data in ((0, output.header), *output.literals):
                file.seek(offset)
                file.write(data)
            file.truncate(output.size)
    shutil.copy(source / "config.json", path)


def main(folder: str, layers: str = "32") -> None:
    """Print a line for each model and form: merging it, and writing that form of what was merged."""
    for name, config in (("7B", LLAMA_7B), ("8B", LLAMA_8B)):
        for form in ("megatron", "megatron-legacy"):
            place = Path(folder) / f"{form}-{name}"
            place.mkdir()
            try:
                make(place / "megatron", config | {"num_hidden_layers": int(layers)}, form)
                print(f"{name}, {layers} layers, {form}")
                report("merge", "merge megatron -o merged", place, "merged")
                shutil.rmtree(place / "megatron")
                report("split", f"split merged --tp {TP} --format {form} -o split", place, "split")
            finally:
                shutil.rmtree(place)


def report(verb: str, command: str, place: Path, out: str) -> None:
    """Run a command of tpshard, and print what it took."""
    ran = measure(f"{sys.executable} -m tpshard {command} --no-fsync -q", place, os.environ, place / "log")
    size = sum(path.stat().st_size for path in (place / out).rglob("*") if path.is_file())
    used = f"{ran.seconds:.0f} s, peak {ran.resident / 1e6:.0f} MB resident, {ran.anonymous / 1e6:.0f} anonymous"
    print(f"  {verb}: {size / 1e9:.1f} GB, {used}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
