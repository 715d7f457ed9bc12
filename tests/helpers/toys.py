"""Checkpoints of a few bytes, written and read here by the definition of the formats, not by tpshard's code.

`read` knows safetensors from its specification alone (a length, JSON, bytes), so that what tpshard writes is never
judged by what tpshard reads. `bits_of` sees a tensor as bits, which makes dtypes below a byte like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpshard.storage.safetensors import build_header

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Every dtype of safetensors 0.8."""

Bits = NDArray[np.uint8]


@dataclass(frozen=True)
class Tensor:
    """A tensor as it is stored: dtype, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def random_tensor(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> Tensor:
    """A tensor of random bits; ValueError when its last element does not end on a byte."""
    bits = BITS[dtype] * int(np.prod(shape, dtype=np.int64))
    if bits % 8:
        raise ValueError(f"{dtype} {list(shape)} does not end on a byte")
    return Tensor(dtype, tuple(shape), rng.bytes(bits // 8))


def bits_of(tensor: Tensor) -> Bits:
    """The tensor as an array of its shape with one more dim, the bits of an element."""
    flat: Bits = np.unpackbits(np.frombuffer(tensor.data, dtype=np.uint8), bitorder="little")
    return flat.reshape(*tensor.shape, BITS[tensor.dtype])


def of_bits(dtype: str, bits: Bits) -> Tensor:
    """The tensor of an array as `bits_of` makes them."""
    assert bits.size % 8 == 0
    return Tensor(dtype, bits.shape[:-1], np.packbits(bits.reshape(-1), bitorder="little").tobytes())


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of these tensors, in this order."""
    header = build_header([(name, t.dtype, t.shape) for name, t in tensors.items()], {"format": "pt"})
    path.write_bytes(header + b"".join(tensor.data for tensor in tensors.values()))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in the header's order."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    data = raw[8 + length :]
    found = {}
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[name] = Tensor(entry["dtype"], tuple(entry["shape"]), data[begin:end])
    return found


def read_all(directory: Path, pattern: str = "*.safetensors") -> dict[str, Tensor]:
    """The tensors of all files of a directory that match; a name in two files fails."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob(pattern)):
        tensors = read(path)
        assert not set(tensors) & set(found)
        found |= tensors
    return found


def read_rank(directory: Path, rank: int, tp: int) -> dict[str, Tensor]:
    """The tensors of one rank of a shard set."""
    return read_all(directory, f"rank-{rank:05}-of-{tp:05}*.safetensors")


def metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file."""
    raw = path.read_bytes()
    found: dict[str, str] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__", {})
    return found


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], files: Sequence[Sequence[str]] = ()
) -> Path:
    """A checkpoint directory: one file, or one for each group of names in `files`, with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if len(files) < 2:
        write(directory / "model.safetensors", tensors)
        return directory
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        write(directory / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    size = sum(len(tensor.data) for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, by name."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
