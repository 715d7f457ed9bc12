"""Checkpoints of real shapes made in bounded memory: headers alone, or with random bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpshard.storage.safetensors import build_header, nbytes

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


# GPT-2 large, with a vocabulary that any tp divides.
GPT2_LARGE = {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 1024,
              "vocab_size": 50304}  # fmt: skip


def gpt2_tensors(config: dict[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor of a tied bf16 GPT-2, in file order."""
    width = config["n_embd"]
    tensors: list[tuple[str, tuple[int, ...]]] = []
    for layer in range(config["n_layer"]):
        for module, shape in [
            ("attn.c_attn", (width, 3 * width)),
            ("attn.c_proj", (width, width)),
            ("ln_1", (width,)),
            ("ln_2", (width,)),
            ("mlp.c_fc", (width, 4 * width)),
            ("mlp.c_proj", (4 * width, width)),
        ]:
            tensors += [(f"h.{layer}.{module}.bias", shape[-1:]), (f"h.{layer}.{module}.weight", shape)]
    tensors += [("ln_f.bias", (width,)), ("ln_f.weight", (width,))]
    tensors += [("wpe.weight", (config["n_positions"], width)), ("wte.weight", (config["vocab_size"], width))]
    return [(f"transformer.{name}", "BF16", shape) for name, shape in tensors]


# The published one, with the layer that predicts a further token: 46,183 tensors.
DEEPSEEK_V3 = {"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
               "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "q_lora_rank": 1536,
               "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
               "first_k_dense_replace": 3, "moe_intermediate_size": 2048, "n_routed_experts": 256,
               "num_experts_per_tok": 8, "n_shared_experts": 1, "num_nextn_predict_layers": 1,
               "tie_word_embeddings": False}  # fmt: skip


def deepseek_tensors(config: dict[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor of a bf16 DeepSeek-V3 with one layer beyond the last, in file order."""
    hidden, vocab, heads = config["hidden_size"], config["vocab_size"], config["num_attention_heads"]
    q, latent, key = config["q_lora_rank"], config["kv_lora_rank"], config["qk_nope_head_dim"]
    rope, value = config["qk_rope_head_dim"], config["v_head_dim"]

    def feed_forward(module: str, width: int) -> list[tuple[str, tuple[int, ...]]]:
        shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        return [(f"{module}.{name}", shape) for name, shape in shapes.items()]

    layers = []
    for layer in range(config["num_hidden_layers"] + 1):
        modules: list[tuple[str, tuple[int, ...]]] = [
            ("input_layernorm", (hidden,)),
            ("post_attention_layernorm", (hidden,)),
            ("self_attn.q_a_proj", (q, hidden)),
            ("self_attn.q_a_layernorm", (q,)),
            ("self_attn.q_b_proj", (heads * (key + rope), q)),
            ("self_attn.kv_a_proj_with_mqa", (latent + rope, hidden)),
            ("self_attn.kv_a_layernorm", (latent,)),
            ("self_attn.kv_b_proj", (heads * (key + value), latent)),
            ("self_attn.o_proj", (hidden, heads * value)),
        ]
        if layer < config["first_k_dense_replace"]:
            modules += feed_forward("mlp", config["intermediate_size"])
        else:
            width, experts = config["moe_intermediate_size"], config["n_routed_experts"]
            modules += [("mlp.gate", (experts, hidden))]
            for expert in range(experts):
                modules += feed_forward(f"mlp.experts.{expert}", width)
            modules += feed_forward("mlp.shared_experts", width * config["n_shared_experts"])
            layers.append((f"model.layers.{layer}.mlp.gate.e_score_correction_bias", "F32", (experts,)))
        if layer == config["num_hidden_layers"]:
            modules += [("eh_proj", (hidden, 2 * hidden)), ("embed_tokens", (vocab, hidden))]
            modules += [("shared_head.head", (vocab, hidden)), ("shared_head.norm", (hidden,))]
            modules += [("enorm", (hidden,)), ("hnorm", (hidden,))]
        layers += [(f"model.layers.{layer}.{name}.weight", "BF16", shape) for name, shape in modules]
    ends: list[tuple[str, str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", "BF16", (vocab, hidden)),
        ("model.norm.weight", "BF16", (hidden,)),
        ("lm_head.weight", "BF16", (vocab, hidden)),
    ]
    return ends[:1] + layers + ends[1:]


FP8_IN_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
"""quantization_config as DeepSeek publishes it."""
_NOT_QUANTISED = ("embed_tokens", "lm_head", "mlp.gate", "eh_proj", "shared_head.head")


def in_blocks(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> list[tuple[str, str, tuple[int, ...]]]:
    """The tensors of a DeepSeek-V3 as it is published, in FP8: matrices, each with a scale for 128 x 128 of its values.

    Embeddings, heads, routers and what joins the layer beyond the last stay as they are.
    """
    found = []
    for name, dtype, shape in tensors:
        module = name.removesuffix(".weight")
        if len(shape) < 2 or module.endswith(_NOT_QUANTISED):
            found.append((name, dtype, shape))
            continue
        found.append((name, "F8_E4M3", shape))
        found.append((f"{name}_scale_inv", "F32", tuple(-(-size // 128) for size in shape)))
    return found


def write_llama(path: Path, config: dict[str, Any], *, data: bool, shard_bytes: int = 5_000_000_000) -> int:
    """Write a LLaMA checkpoint, see `write`."""
    return write(path, {"model_type": "llama", **config}, llama_tensors(config), data=data, shard_bytes=shard_bytes)


def write_deepseek(path: Path, config: dict[str, Any]) -> int:
    """Write the headers of a DeepSeek-V3, see `write`."""
    return write(path, config, deepseek_tensors(config), data=False)


def write_gpt2(path: Path, config: dict[str, Any]) -> int:
    """Write a GPT-2 in one file, see `write`."""
    return write(path, config, gpt2_tensors(config), data=True, shard_bytes=1 << 60)


def write(
    path: Path,
    config: dict[str, Any],
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    *,
    data: bool,
    shard_bytes: int = 5_000_000_000,
) -> int:
    """Write a checkpoint; the numbers are random, or a hole when only headers matter. Returns bytes of tensors."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", **config}))
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    size = total = 0
    for tensor in tensors:
        length = nbytes(tensor[1], tensor[2])
        if groups[-1] and size + length > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += length
        total += length
    weight_map = {}
    block = _numbers(1 << 24)
    begin = 0
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
            while left:  # each time from elsewhere in the block, so that few stretches of the file are alike
                begin = (begin + 2 * 1_000_003) % len(block)
                left -= file.write(block[begin : begin + left])
    if len(groups) > 1:
        index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2, sort_keys=True) + "\n")
    return total


def _numbers(size: int) -> bytes:
    """Random bytes of which each pair is a bf16, and each four an F32, between 2⁻⁷ and 2⁻⁶ or their negatives."""
    block = bytearray(os.urandom(size))
    signs = bytes(0x3C | (byte & 0x80) for byte in range(256))
    block[1::2] = block[1::2].translate(signs)
    return bytes(block)
