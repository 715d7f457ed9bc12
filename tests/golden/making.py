"""The checkpoints that `record.py` splits: a large set made with the tests' helpers, a small one made of hashes alone.

The large set needs torch and transformers, and is the same as long as their versions are. The small set is the config,
the names, the dtypes and the shapes in `small_models.json`, with bytes that SHAKE-256 draws from each name, so that it
is the same everywhere and for ever.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SMALL_MODELS = HERE / "small_models.json"
BYTES = {"BF16": 2, "F16": 2, "F32": 4}

# Variants that differ from another one in what verify computes, not in their tensors.
SAME_TENSORS = ("-rope-", "-sliding", "-scaled", "-seq-residual")
REWRITTEN: dict[str, tuple[str, dict[str, bool]]] = {
    "gpt2+strip_prefix": ("gpt2", {"strip_prefix": True}),
    "gpt2+buffers": ("gpt2", {"buffers": True}),
    "bloom+strip_prefix": ("bloom", {"strip_prefix": True}),
    "llama-gqa+buffers": ("llama-gqa", {"buffers": True}),
    "llama-gqa+old_keys": ("llama-gqa", {"old_keys": True}),
    "llama-gqa+base_only": ("llama-gqa", {"base_only": True}),
    "llama-tied+tied_head_stored": ("llama-tied", {"tied_head_stored": True}),
    "qwen3+strip_prefix": ("qwen3", {"strip_prefix": True}),
    "falcon-new+old_keys": ("falcon-new", {"old_keys": True}),
    "gpt_neox+buffers": ("gpt_neox", {"buffers": True}),
    "opt+strip_prefix": ("opt", {"strip_prefix": True}),
}
MULTIMODAL = ("gemma3", "llava", "qwen2_5_vl")
EVEN_VOCAB = ("llama", "deepseek_v3", "deepseek_v2-lite")
"""Made once more with a vocabulary of 256: some layouts pad nothing, so that they refuse one of 251."""


def helper(*names: str) -> ModuleType:
    """A module of the tests' helpers, by the names that it has or had; the first that is there."""
    for path in (HERE.parent, HERE.parents[1]):
        if str(path) not in sys.path:
            sys.path.append(str(path))
    candidates = [f"{package}{name}" for package in ("tests.helpers.", "") for name in names]
    for candidate in candidates:
        try:
            return import_module(candidate)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{candidate}.".startswith(f"{error.name}."):
                raise
    raise ModuleNotFoundError(f"none of {', '.join(candidates)}")


def make_all(directory: Path) -> list[str]:
    """Make every checkpoint that is not there yet, and return the names of all."""
    directory.mkdir(parents=True, exist_ok=True)
    wanted = {
        **{f"small-{name}": None for name in small_names()},
        **{name: ("variant", name) for name in variants()},
        **{f"{name}+even_vocab": ("even", name) for name in EVEN_VOCAB},
        **{name: ("rewritten", name) for name in REWRITTEN},
        **{f"multimodal-{name}": ("multimodal", name) for name in MULTIMODAL},
        "llama-gqa+pickled": ("pickled", "llama-gqa"),
        "llama-gqa+files": ("files", "llama-gqa"),
        "qwen3_moe+files": ("files", "qwen3_moe"),
    }
    for name, how in wanted.items():
        if (directory / name).exists():
            continue
        unfinished = directory.parent / f"{directory.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        if how is None:
            write_small(name.removeprefix("small-"), unfinished)
        else:
            make_one(how[0], how[1], directory, unfinished)
        unfinished.rename(directory / name)
        print(name, file=sys.stderr)
    return sorted(wanted)


def variants() -> list[str]:
    """The tests' variants, without those whose tensors another one has too."""
    every: dict[str, Any] = helper("checkpoints").VARIANTS
    return [name for name in every if not any(part in name for part in SAME_TENSORS)]


def make_one(kind: str, name: str, directory: Path, out: Path) -> None:
    """Make one checkpoint of the large set; rewritten ones are made of those in `directory`."""
    checkpoints = helper("checkpoints")
    if kind == "variant":
        checkpoints.make(name, out)
    elif kind == "even":
        checkpoints.make(name, out, vocab_size=256)
    elif kind == "multimodal":
        helper("multimodal_checkpoints", "multimodal").make(name, out)
    elif kind == "pickled":
        checkpoints.pickled(directory / name, out)
    elif kind == "files":
        checkpoints.sharded(directory / name, out)
    else:
        source, how = REWRITTEN[name]
        checkpoints.published(directory / source, out, **how)


def small_names() -> list[str]:
    """The checkpoints of the small set."""
    return sorted(json.loads(SMALL_MODELS.read_text()))


def write_small(name: str, directory: Path) -> Path:
    """Write one checkpoint of the small set."""
    model = json.loads(SMALL_MODELS.read_text())[name]
    tensors = {tensor: (dtype, tuple(shape)) for tensor, (dtype, *shape) in model["tensors"].items()}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(model["config"], indent=2) + "\n")
    (directory / "tokenizer_config.json").write_text("{}\n")
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return directory


def safetensors_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A safetensors file of tensors of these dtypes and shapes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape) in tensors.items():
        stored = drawn(name, dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(stored)]}
        data += stored
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def drawn(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Numbers from -1 to 1 that depend on the name alone, so that a part at a wrong place shows."""
    count = math.prod(shape)
    integers = np.frombuffer(hashlib.shake_256(name.encode()).digest(2 * count), dtype="<i2")
    numbers = integers.astype("<f4") / 32768
    if dtype == "BF16":
        return (numbers.view("<u4") >> 16).astype("<u2").tobytes()
    return numbers.astype("<f2" if dtype == "F16" else "<f4").tobytes()
