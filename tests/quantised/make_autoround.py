"""auto-round's checkpoints in the packings of AutoGPTQ, AutoAWQ and its own, rounded to the nearest on a CPU.

auto-round 0.15.1, transformers 5.17.0, torch 2.13.0; the dequantised weights by GPTQModel 7.6.0.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM

from tests.quantised.common import DENSE, EXPERTS, SMALL, keep_fixture, numbers_as_words, random_model, tensors_of
from tests.quantised.make_gptqmodel import reference

GROUPS = {"bits": 4, "group_size": 32, "sym": True, "data_type": "int", "act_bits": 16}


def fixture(
    name: str,
    packing: str,
    scheme: Mapping[str, Any],
    model_type: str = "llama",
    config: Mapping[str, Any] = SMALL,
    layers: Mapping[str, Any] | None = None,
) -> None:
    if sys.argv[1:] and name not in sys.argv[1:]:
        return
    with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as folder:
        random_model(model_type, config, torch.float16).save_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
        rounding = AutoRound(
            model,
            numbers_as_words(),
            scheme={**GROUPS, **scheme},
            layer_config=dict(layers or {}),
            iters=0,
            disable_opt_rtn=True,
            low_gpu_mem_usage=False,
            device_map="cpu",
        )
        rounding.quantize_and_save(folder, format=packing)
        saved = next(Path(folder).rglob("config.json")).parent
        kept = keep_fixture(name, saved)
    reference(name)
    print(name, sorted({key.rpartition(".")[2] for key in tensors_of(kept)}), flush=True)


def main() -> None:
    fixture("autoround-gptq", "auto_gptq", {}, config=DENSE | {"num_hidden_layers": 1})
    fixture("autoround-awq", "auto_awq", {"sym": False}, config=DENSE | {"num_hidden_layers": 1})
    several = {"model.layers.0.self_attn.o_proj": {"bits": 8}, "model.layers.0.mlp.down_proj": {"bits": 16}}
    fixture("autoround-mixed-bits", "auto_round", {}, layers=several)
    fixture("autoround-awq-qwen3-moe", "auto_awq", {"sym": False}, "qwen3_moe", EXPERTS)
    fixture("autoround-gptq-qwen3-moe", "auto_gptq", {}, "qwen3_moe", EXPERTS)


if __name__ == "__main__":
    main()
