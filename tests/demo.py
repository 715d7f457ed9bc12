"""`make demo`: the main job on a small LLaMA checkpoint in the real layout, command by command."""

from __future__ import annotations

import filecmp
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.synthetic import write_llama

TINY = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1001}  # fmt: skip


def run(place: Path, command: str) -> None:
    """Print a command, then run it as the user would."""
    print(f"\n$ {command}", flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(shlex.split(command), cwd=place, check=True, env={**os.environ, "PATH": path})


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        size = write_llama(place / "tiny-llama", TINY, data=True, shard_bytes=4_000_000)
        files = sorted(path.name for path in (place / "tiny-llama").iterdir())
        print(f"A LLaMA checkpoint of {size:,} bytes, random weights, bf16, 8 heads, 2 KV heads, vocab 1001:")
        print("  " + "  ".join(files))
        run(place, "tpshard plan tiny-llama --tp 4")
        run(place, "tpshard split tiny-llama --tp 4")
        run(place, "tpshard check tiny-llama-tp4 --source tiny-llama")
        run(place, "tpshard merge tiny-llama-tp4 -o tiny-llama-again")
        same = [filecmp.cmp(place / "tiny-llama" / name, place / "tiny-llama-again" / name, False) for name in files]
        print()
        for name, equal in zip(files, same, strict=True):
            print(f"{'equal    ' if equal else 'DIFFERENT'} {name}")
        if not all(same):
            sys.exit("the merged checkpoint is not the source")
        print("The demo ran: split at tp 4, every byte checked, merged back to the same files.")


main()
