"""`verify --stream` of a class that runs among zeros, Laguna with experts: memory, and time beside all in memory.

Run as `python -m tests.bench.stream_zeros --dir DIR`. transformers' class makes the model of random numbers, which is
removed again. Memory is the largest resident set, without the page cache.
"""

from __future__ import annotations

import argparse
import datetime
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.bench.bench import machine
from tests.bench.deepseek_fp8 import Used, run

TP = 2


def make(path: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Write the model; its bytes, and the elements of what an operation needs at most: a matrix, or an expert's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("laguna", **config), dtype=torch.bfloat16)
    shapes = [(name, each.shape) for name, each in model.named_parameters() if ".layers." in name]
    model.save_pretrained(path)
    largest = max(math.prod(shape[1:] if len(shape) == 3 else shape) for _, shape in shapes)
    return sum(file.stat().st_size for file in path.glob("*.safetensors")), largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, help="where to work [default: a temporary one]")
    parser.add_argument("--hidden", type=int, default=2048, help="the width [default: 2048]")
    parser.add_argument("--layers", type=int, default=2, help="with experts, behind one that is dense [default: 2]")
    parser.add_argument("--experts", type=int, default=32, help="of half the width [default: 32]")
    parser.add_argument("--vocab", type=int, default=65536, help="rows of embedding and head [default: 65536]")
    parser.add_argument("--tiers", nargs="*", default=["weights", "exact"], help="measured one by one")
    parser.add_argument("--in-memory", action="store_true", help="without --stream as well")
    options = parser.parse_args()
    config = {
        **{"hidden_size": options.hidden, "intermediate_size": 2 * options.hidden, "vocab_size": options.vocab},
        **{"num_hidden_layers": options.layers + 1, "num_attention_heads": options.hidden // 128, "head_dim": 128},
        **{"num_key_value_heads": 4, "num_experts": options.experts, "num_experts_per_tok": 4},
        **{"moe_intermediate_size": options.hidden // 2, "shared_expert_intermediate_size": options.hidden // 2},
        **{"max_position_embeddings": 4096, "tie_word_embeddings": False},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }
    found: dict[tuple[str, str], Used] = {}
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        model, out = str(Path(temporary) / "model"), str(Path(temporary) / "out")
        size, largest = make(Path(model), config)
        run("split", model, "--tp", str(TP), "-o", out, "-q", "--no-fsync", "--checksum", "none")
        for tier in options.tiers:
            for how in ("--stream", "--no-stream") if options.in_memory else ("--stream",):
                given = ("--tokens", "0", "--device", "cpu", "--tier", tier, "--quiet")
                found[tier, how] = run("verify", out, "--source", model, how, *given)
                print(f"{tier} {how}: {found[tier, how]}", flush=True)
    host = machine()
    memory, bound = int(str(host["memory_bytes"])) / 2**30, (24 * max(largest, 1 << 23) + 1e9) / 1e6
    where = f"{host['cpu']}, {host['cores']} cores, {memory:.0f} GiB, {host['system']}, Python {host['python']}"
    print(f"{datetime.date.today()}: {where}, load {host['load']:.1f}\n")
    print(f"{size / 1e9:.2f} GB; the largest block in float64 {8 * largest / 1e6:.0f} MB; the bound {bound:.0f} MB\n")
    print("| `--tier` | | seconds | of processor time | resident |\n|---|---|---|---|---|")
    for (tier, how), used in found.items():
        print(f"| `{tier}` | `{how}` | {used.seconds:.0f} | {used.processor:.0f} | {used.resident / 1e6:.0f} MB |")


if __name__ == "__main__":
    main()
