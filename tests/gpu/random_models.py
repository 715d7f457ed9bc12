"""Checkpoints of real shapes with random bf16 weights, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.bench.synthetic import LLAMA_1B, llama_tensors
from tpshard.storage.safetensors import build_header

Shape = tuple[str, tuple[int, ...]]

LLAMA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32000,
}  # fmt: skip
LLAMA_SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 251,
}  # fmt: skip
LLAMA = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "hidden_act": "silu", "tie_word_embeddings": False}
GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
GPT2_SMALL = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 251}
OPT = {
    "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 2048, "vocab_size": 50272, "word_embed_proj_dim": 768,
}  # fmt: skip
OPT_SMALL = OPT | {
    "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "vocab_size": 251, "word_embed_proj_dim": 64,
}  # fmt: skip


def gpt2_tensors(config: dict[str, Any]) -> Iterator[Shape]:
    """Names and shapes of a tied GPT-2, whose projections are stored [in, out]."""
    width = config["n_embd"]
    yield "transformer.wte.weight", (config["vocab_size"], width)
    yield "transformer.wpe.weight", (config["n_positions"], width)
    for layer in range(config["n_layer"]):
        at = f"transformer.h.{layer}."
        for name, into, out in [
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ]:
            yield f"{at}{name}.weight", (into, out)
            yield f"{at}{name}.bias", (out,)
        for norm in ("ln_1", "ln_2"):
            yield from ((f"{at}{norm}.{suffix}", (width,)) for suffix in ("weight", "bias"))
    yield from ((f"transformer.ln_f.{suffix}", (width,)) for suffix in ("weight", "bias"))


def opt_tensors(config: dict[str, Any]) -> Iterator[Shape]:
    """Names and shapes of a tied OPT; its positions have two rows more than the config says."""
    width, ffn = config["hidden_size"], config["ffn_dim"]
    yield "model.decoder.embed_tokens.weight", (config["vocab_size"], width)
    yield "model.decoder.embed_positions.weight", (config["max_position_embeddings"] + 2, width)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.decoder.layers.{layer}."
        linear = [(f"self_attn.{name}_proj", width, width) for name in ("q", "k", "v", "out")]
        for name, out, into in [*linear, ("fc1", ffn, width), ("fc2", width, ffn)]:
            yield f"{at}{name}.weight", (out, into)
            yield f"{at}{name}.bias", (out,)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            yield from ((f"{at}{norm}.{suffix}", (width,)) for suffix in ("weight", "bias"))
    yield from ((f"model.decoder.final_layer_norm.{suffix}", (width,)) for suffix in ("weight", "bias"))


def shapes(name: str, small: bool) -> tuple[dict[str, Any], list[Shape]]:
    """Config and tensors of llama-1b, llama-7b, gpt2 or opt, or of a small llama, gpt2 or opt."""
    if name.startswith("llama"):
        sizes = LLAMA_SMALL if small else LLAMA_7B if name == "llama-7b" else LLAMA_1B
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **LLAMA, **sizes}
        return config, [(tensor, shape) for tensor, _, shape in llama_tensors(config)]
    if name == "gpt2":
        config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **(GPT2_SMALL if small else GPT2)}
        return config, list(gpt2_tensors(config))
    assert name == "opt"
    config = {"model_type": "opt", "architectures": ["OPTForCausalLM"], **(OPT_SMALL if small else OPT)}
    return config, list(opt_tensors(config))


def write(path: Path, name: str, *, small: bool, device: torch.device) -> int:
    """Write one safetensors file and its config; values are drawn on `device`. Returns its bytes.

    The spread is 0.02 in models of real width and 0.08 in small ones, norms lie around 1: logits stay finite, and a
    mistake in any tensor shows.
    """
    config, tensors = shapes(name, small)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}, indent=1))
    generator = torch.Generator(device).manual_seed(0)
    spread = 0.08 if small else 0.02
    with (path / "model.safetensors").open("wb") as file:
        file.write(build_header([(tensor, "BF16", shape) for tensor, shape in tensors], {"format": "pt"}))
        for tensor, shape in tensors:
            center = 1.0 if len(shape) == 1 and tensor.endswith("weight") else 0.0
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32) * spread + center
            file.write(values.to(torch.bfloat16).cpu().view(torch.uint8).numpy().data)
        return file.tell()
