"""Checkpoints of real shapes made in bounded memory: headers alone, or with random bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tpshard.header import build_header, nbytes

LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000}  # fmt: skip
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}  # fmt: skip
LLAMA_405B = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
              "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}  # fmt: skip


def llama_tensors(config: dict[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor of an untied bf16 LLaMA, in file order."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    tensors = [("model.embed_tokens.weight", "BF16", (vocab, hidden))]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, shape in [
            ("input_layernorm", (hidden,)),
            ("mlp.down_proj", (hidden, ffn)),
            ("mlp.gate_proj", (ffn, hidden)),
            ("mlp.up_proj", (ffn, hidden)),
            ("post_attention_layernorm", (hidden,)),
            ("self_attn.k_proj", (kv, hidden)),
            ("self_attn.o_proj", (hidden, q)),
            ("self_attn.q_proj", (q, hidden)),
            ("self_attn.v_proj", (kv, hidden)),
        ]:
            tensors.append((f"{prefix}{name}.weight", "BF16", shape))
    return [*tensors, ("model.norm.weight", "BF16", (hidden,)), ("lm_head.weight", "BF16", (vocab, hidden))]


def write_llama(path: Path, config: dict[str, Any], *, data: bool, shard_bytes: int = 5_000_000_000) -> int:
    """Write a LLaMA checkpoint; the bytes are random, or a hole when only headers matter. Returns bytes of tensors."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16", **config}))
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    size = total = 0
    for tensor in llama_tensors(config):
        length = nbytes(tensor[1], tensor[2])
        if groups[-1] and size + length > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += length
        total += length
    weight_map = {}
    block = os.urandom(1 << 24)
    for index, group in enumerate(groups, 1):
        single = len(groups) == 1
        name = "model.safetensors" if single else f"model-{index:05}-of-{len(groups):05}.safetensors"
        weight_map |= {tensor[0]: name for tensor in group}
        header = build_header(group, {"format": "pt"})
        left = sum(nbytes(dtype, shape) for _, dtype, shape in group)
        with (path / name).open("wb") as file:
            file.write(header)
            if not data:
                file.truncate(len(header) + left)
                continue
            while left:
                left -= file.write(block[: min(left, len(block))])
    if len(groups) > 1:
        index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2, sort_keys=True) + "\n")
    return total
