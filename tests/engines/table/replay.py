"""What vLLM held of a small LLaMA, recorded, so that the tool is tested where there is no vLLM.

`ENGINE_PYTHON=.venv-engines/bin/python python -m tests.engines.table.replay` records it anew.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.engines.running import Loader, Ranks
from tests.engines.table.coded import DIGITS, ONE, ZERO, Numbers, decoded
from tests.engines.table.entry import Entry, read_entry
from tests.engines.table.reading import Checkpoint

FILE = Path(__file__).with_name("replay.json")
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
LAYER = {
    "input_layernorm": (64,), "post_attention_layernorm": (64,), "self_attn.q_proj": (256, 64),
    "self_attn.k_proj": (64, 64), "self_attn.v_proj": (64, 64), "self_attn.o_proj": (64, 256),
    "mlp.gate_proj": (64, 64), "mlp.up_proj": (64, 64), "mlp.down_proj": (64, 64),
}  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (100, 64), "model.norm.weight": (64,), "lm_head.weight": (100, 64),
    **{f"model.layers.{layer}.{name}.weight": shape for layer in range(2) for name, shape in LAYER.items()},
}  # fmt: skip
_VALUES = {ZERO: 0.0, ONE: 1.0}

Record = list[dict[str, Any]]
"""Of each load, in order: what each rank holds, {parameter: [dtype, shape, numbers]}, and what came while it loaded."""


def entry_of(loader: Loader, scratch: Path) -> Entry:
    """What the tool makes of the checkpoint."""
    (directory := scratch / "model").mkdir()
    return read_entry([Checkpoint("llama", directory, SHAPES, CONFIG)], loader, scratch)


class Recording(Loader):
    """vLLM, and what it answers."""

    def __init__(self, log: Path) -> None:
        super().__init__(log)
        self.record: Record = []

    def held(self, model: Path, tp: int, load_format: str, out: Path, **how: Any) -> Ranks:
        """As the loader's."""
        found = super().held(model, tp, load_format, out, **how)
        others = [Path(each) for each in how.get("again", {}).values()]
        ranks = []
        for rank, own in enumerate(found):
            passes = [own, *(load_file(each / f"rank-{rank}.safetensors") for each in others)]
            ranks.append({name: _said([each[name] for each in passes], told=bool(others)) for name in sorted(own)})
        with safe_open(out / "rank-0.safetensors", "pt") as opened:
            self.record.append({"ranks": ranks, "added": json.loads(opened.metadata()["added"])})
        return found


class Replay(Loader):
    """Answers as vLLM did."""

    def __init__(self, record: Record) -> None:
        self.record = iter(record)

    def held(
        self,
        model: Path,
        tp: int,
        load_format: str,
        out: Path,
        *,
        again: Mapping[str, str] = MappingProxyType({}),
        **how: Any,
    ) -> Ranks:
        """As the loader's."""
        answer, places = next(self.record), [out, *map(Path, again.values())]
        for place, directory in enumerate(places):
            directory.mkdir(parents=True, exist_ok=True)
            for rank, held in enumerate(answer["ranks"]):
                tensors = {name: _digit(place, *said) for name, said in held.items()}
                metadata = {"added": json.dumps(answer["added"])}
                save_file(tensors, directory / f"rank-{rank}.safetensors", metadata=metadata)
        return [load_file(out / f"rank-{rank}.safetensors") for rank in range(len(answer["ranks"]))]


def _said(passes: list[torch.Tensor], *, told: bool) -> list[Any]:
    """A parameter; of one pass alone its shape. Numbers are [first, how many, how often, how far apart]."""
    held = decoded(passes)
    assert not held.function
    runs = _runs(held.numbers.reshape(-1)) if told else [[ZERO, held.numbers.size, 1, 0]]
    return [str(held.dtype).removeprefix("torch."), list(held.numbers.shape), runs]


def _runs(numbers: Numbers) -> list[list[int]]:
    """Numbers that count up, and constants, which stay; ranges of the same length at equal distances are one."""
    found: list[list[int]] = []
    for number in map(int, numbers):
        if found and number == (found[-1][0] + found[-1][1] if number > 0 else found[-1][0]):
            found[-1][1] += 1
        else:
            found.append([number, 1])
    runs: list[list[int]] = []
    for first, count in found:
        if runs and runs[-1][1] == count and runs[-1][2] > 0 and first > 0 < runs[-1][0]:
            begun, _, times, apart = runs[-1]
            if times == 1 or first == begun + times * apart:
                runs[-1][2:] = [times + 1, apart if times > 1 else first - begun]
                continue
        runs.append([first, count, 1, 0])
    return runs


def _digit(place: int, dtype: str, shape: list[int], runs: list[list[int]]) -> torch.Tensor:
    """A parameter with the checkpoint of one digit."""
    values = []
    for first, count, times, apart in runs:
        for each in range(times):
            if first > 0:
                numbers = np.arange(first + each * apart, first + each * apart + count)
                values.append(DIGITS[numbers // len(DIGITS) ** place % len(DIGITS)])
            else:
                values.append(np.full(count, _VALUES[first]))
    made: torch.Tensor = torch.from_numpy(np.concatenate(values)).to(getattr(torch, dtype)).reshape(shape)
    return made


def main() -> None:
    """Record."""
    with tempfile.TemporaryDirectory() as scratch:
        loader = Recording(Path(scratch) / "log")
        entry_of(loader, Path(scratch))
        loader.end()
    lines = [json.dumps(each) for each in loader.record]
    FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
