"""Checkpoints of a few thousand numbers that megatron-core itself wrote, and the models that it made them of.

    python -m tests.megatron.recorded PYTHON       writes them anew, with an interpreter that has megatron-core

They lie in tests/megatron/recorded, so that the default tests need no Megatron. The models are random bits of a seed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.command import LLAMA, llama_tensors
from tests.helpers.toys import Tensor, random_tensor, write_checkpoint

HERE = Path(__file__).parent
FOLDER = HERE / "recorded"
_MORE = {"max_position_embeddings": 32, "rms_norm_eps": 1e-06, "hidden_act": "silu"}


@dataclass(frozen=True)
class Recorded:
    """A model, as changes of the tests' LLaMA, and how Megatron was asked to save it."""

    config: dict[str, Any]
    options: tuple[str, ...]
    dtype: str = "F32"

    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors, in the order of their names."""
        config = LLAMA | self.config
        found = llama_tensors(7, self.dtype)
        rng = np.random.default_rng(8)
        hidden, layers = config["hidden_size"], range(config["num_hidden_layers"])
        if config.get("tie_word_embeddings"):
            del found["lm_head.weight"]
        for layer in layers if config["model_type"] == "qwen2" else ():
            for name, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2)):
                name = f"model.layers.{layer}.self_attn.{name}_proj.bias"
                found[name] = random_tensor(rng, self.dtype, (rows,))
        for layer in layers if config["model_type"] == "mixtral" else ():
            for name in [name for name in found if name.startswith(f"model.layers.{layer}.mlp.")]:
                del found[name]
            at, count = f"model.layers.{layer}.block_sparse_moe", config["num_local_experts"]
            found[f"{at}.gate.weight"] = random_tensor(rng, self.dtype, (count, hidden))
            width = config["intermediate_size"]
            for expert in range(count):
                for name, shape in (("w1", (width, hidden)), ("w2", (hidden, width)), ("w3", (width, hidden))):
                    found[f"{at}.experts.{expert}.{name}.weight"] = random_tensor(rng, self.dtype, shape)
        return dict(sorted(found.items()))

    def write(self, path: Path) -> Path:
        """The checkpoint that Megatron was given."""
        return write_checkpoint(path, LLAMA | _MORE | self.config, self.tensors())


RECORDED = {
    "llama-tp2": Recorded({}, ("--tp", "2", "--name", "iter_0000007")),
    "qwen2-tied-pp2": Recorded(
        {"model_type": "qwen2", "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
        ("--pp", "2", "--singly", "--name", "iter_0000007"),
        "BF16",
    ),
    "mixtral-ep2": Recorded(
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}, ("--ep", "2")
    ),
}  # fmt: skip
PADDED = 16
"""Rows of their embeddings, of which the model has 10."""


def main(python: str) -> None:
    """Write them all anew."""
    for name, recorded in RECORDED.items():
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        with tempfile.TemporaryDirectory() as folder:
            model = recorded.write(Path(folder) / "model")
            command = [python, str(HERE / "worker.py"), "save", str(model), name, *recorded.options]
            # A relative name: the files say where they were written.
            subprocess.run([*command, "--padded", str(PADDED)], cwd=FOLDER, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
