"""`verify --stream` of a layer of DeepSeek-V3's shape with 32 experts, by transformers' class: time and memory.

Run as `python -m tests.bench.stream --dir DIR`. Widths and vocabulary are the published model's; the bytes are normal
random numbers of a pool, elsewhere in it for each tensor. The model and its two ranks take 14 GB, which are removed
again. Memory is the largest resident set, without the page cache.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.bench.bench import machine
from tests.bench.deepseek_fp8 import Used, run
from tests.bench.synthetic import DEEPSEEK_V3, deepseek_tensors
from tpshard.storage.safetensors import build_header

TP = 2
LAYER: dict[str, Any] = {
    **DEEPSEEK_V3,
    **{"num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 32, "num_nextn_predict_layers": 0},
    **{"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "max_position_embeddings": 4096},
}
POOL = 1 << 24
"""Random numbers that weights are taken from."""


def tensors(config: dict[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """The layer's tensors, and what is outside of layers; none of a layer beyond."""
    return [each for each in deepseek_tensors(config) if not each[0].startswith("model.layers.1.")]


def values(name: str, count: int, pool: Tensor) -> Iterator[Tensor]:
    """A tensor's elements in pieces: norms are about one, everything else is of the pool, from a place of its own."""
    at = zlib.crc32(name.encode()) % POOL
    while count:
        piece = pool[at : at + count]
        yield 1 + piece if "norm" in name else piece
        count, at = count - len(piece), 0


def make(path: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Write the model; its bytes, and the elements of what an operation needs at most: a matrix, or an expert's."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["DeepseekV3ForCausalLM"], **config}))
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02
    every = tensors(config)
    with (path / "model.safetensors").open("wb") as file:
        file.write(build_header(every, {"format": "pt"}))
        for name, dtype, shape in every:
            as_stored = torch.bfloat16 if dtype == "BF16" else torch.float32
            for piece in values(name, math.prod(shape), pool):
                file.write(memoryview(piece.to(as_stored).view(torch.uint8).numpy()))
        size = file.tell()
    largest = max(math.prod(shape) for name, _, shape in every if name.startswith("model.layers."))
    return size, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, help="where to work; 14 GB [default: a temporary one]")
    parser.add_argument("--tokens", type=int, default=0, help="tokens that are decoded [default: 0]")
    parser.add_argument("--experts", type=int, default=32, help="a multiple of 8 [default: 32]")
    parser.add_argument("--vocab", type=int, default=LAYER["vocab_size"], help="rows of embedding and head")
    parser.add_argument("--tiers", nargs="*", default=["weights", "exact", "native"], help="measured one by one")
    options = parser.parse_args()
    groups = options.experts // 4
    config = {**LAYER, "n_routed_experts": options.experts, "n_group": groups, "topk_group": min(4, groups)}
    config["vocab_size"] = options.vocab
    found: dict[str, Used] = {}
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        model, out = str(Path(temporary) / "model"), str(Path(temporary) / "out")
        size, largest = make(Path(model), config)
        run("split", model, "--tp", str(TP), "-o", out, "-q", "--no-fsync", "--checksum", "none")
        common = ("verify", out, "--source", model, "--stream", "--tokens", str(options.tokens), "--device", "cpu")
        for tiers in options.tiers:
            found[tiers] = run(*common, "--tier", tiers, "--quiet")
            print(f"{tiers}: {found[tiers]}", flush=True)
    host = machine()
    memory, bound = int(str(host["memory_bytes"])) / 2**30, (24 * largest + 1e9) / 1e6
    where = f"{host['cpu']}, {host['cores']} cores, {memory:.0f} GiB, {host['system']}, Python {host['python']}"
    print(f"{datetime.date.today()}: {where}, load {host['load']:.1f}\n")
    what = (
        f"{len(tensors(config))} tensors, {size / 1e9:.2f} GB; the largest block in float64 {8 * largest / 1e6:.0f} MB"
    )
    print(f"{what}, 3 of them and 1 GB are {bound:.0f} MB\n")
    print("| `--tier` | seconds | of processor time | resident |\n|---|---|---|---|")
    for name, used in found.items():
        print(f"| `{name}` | {used.seconds:.0f} | {used.processor:.0f} | {used.resident / 1e6:.0f} MB |")


if __name__ == "__main__":
    main()
