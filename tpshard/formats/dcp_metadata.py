"""`.metadata` of torch.distributed.checkpoint, a pickle of its dataclasses, made without torch.

So its bytes are the same whichever version of torch a host has, or none. The classes, their fields and how torch
pickles them: torch/distributed/checkpoint/metadata.py, the same from 2.6 on.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tpshard.box import Shape
from tpshard.formats.torch_archive import pickle_integer, pickle_text

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_VERSION = "1.0.0"
"""torch's CURRENT_DCP_VERSION."""


class Chunk(NamedTuple):
    """A rectangle of a tensor, and the bytes of a file that hold it."""

    offsets: Shape
    sizes: Shape
    file: str
    begin: int
    length: int


class Described(NamedTuple):
    """A tensor and all its chunks."""

    name: str
    dtype: str
    shape: Shape
    chunks: Sequence[Chunk]


class _Class(NamedTuple):
    module: str
    name: str


class _Call(NamedTuple):
    function: _Class
    arguments: _Sequence


class _Object(NamedTuple):
    """An instance that gets its state by `__setstate__`, or as its attributes."""

    type: _Class
    state: _Sequence | Mapping[str, _Value]


class _Sequence(NamedTuple):
    """A tuple; named apart from the others here, which are tuples too."""

    items: Iterable[_Value]


class _Map(NamedTuple):
    items: Iterable[tuple[_Value, _Value]]


_Value = str | int | bool | None | list["_Value"] | Mapping[str, "_Value"] | _Class | _Call | _Object | _Sequence | _Map


def _class(name: str) -> _Class:
    return _Class("torch.distributed.checkpoint.metadata", name)


def metadata_pickle(tensors: Sequence[Described], set_id: str) -> bytes:
    """The pickled Metadata of these tensors. set_id: what torch has a random `save_id` for."""
    meta: Mapping[str, _Value] = {"checkpoint_id": None, "save_id": set_id, "load_id": None, "modules": []}
    state: Mapping[str, _Value] = {
        "state_dict_metadata": _Map((tensor.name, _tensor(tensor)) for tensor in tensors),
        "planner_data": _Map((tensor.name, _Sequence([tensor.name])) for tensor in tensors),
        "storage_data": _Map(
            (_index(tensor.name, number, chunk), _place(chunk))
            for tensor in tensors
            for number, chunk in enumerate(tensor.chunks)
        ),
        "storage_meta": _Object(_class("StorageMeta"), meta),
        "version": _VERSION,
    }
    pickle = _Pickle()
    pickle.write(_Object(_class("Metadata"), state))
    return b"\x80\x02" + pickle.out.getvalue() + b"."


def _tensor(tensor: Described) -> _Object:
    layout = _Call(_Class("torch.serialization", "_get_layout"), _Sequence(["torch.strided"]))
    contiguous = _Call(_class("_MEM_FORMAT_ENCODING"), _Sequence([0]))
    properties = _Sequence([_Class("torch", _DTYPES[tensor.dtype]), layout, False, contiguous, False])
    return _Object(
        _class("TensorStorageMetadata"),
        {
            "properties": _Object(_class("TensorProperties"), properties),
            "size": _size(tensor.shape),
            "chunks": [
                _Object(_class("ChunkStorageMetadata"), {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)})
                for chunk in tensor.chunks
            ],
        },
    )


def _index(name: str, number: int, chunk: Chunk) -> _Object:
    return _Object(_class("MetadataIndex"), {"fqn": name, "index": number, "offset": _size(chunk.offsets)})


def _place(chunk: Chunk) -> _Object:
    where: Mapping[str, _Value] = {"relative_path": chunk.file, "offset": chunk.begin, "length": chunk.length}
    return _Object(_Class("torch.distributed.checkpoint.filesystem", "_StorageInfo"), where)


def _size(shape: Shape) -> _Call:
    return _Call(_Class("torch", "Size"), _Sequence([_Sequence(shape)]))


class _Pickle:
    """Writes values as opcodes of protocol 2, as in CPython's pickletools; a class or a text once, then by number."""

    def __init__(self) -> None:
        self.out = io.BytesIO()
        self.memo: dict[bytes, int] = {}

    def write(self, value: _Value) -> None:
        out = self.out
        match value:
            case None:
                out.write(b"N")
            case False:
                out.write(b"\x89")
            case int():
                out.write(pickle_integer(value))
            case str():
                self._once(pickle_text(value))
            case _Class(module, name):
                self._once(f"c{module}\n{name}\n".encode())
            case _Call(function, arguments):
                self.write(function)
                self.write(arguments)
                out.write(b"R")
            case _Object(kind, state):
                self.write(kind)
                out.write(b")\x81")
                self.write(state)
                out.write(b"b")
            case _Sequence(items):
                self._all(b"(", items, b"t")
            case list():
                self._all(b"](", value, b"e")
            case _Map(pairs):
                self._all(b"}(", (each for pair in pairs for each in pair), b"u")
            case Mapping():
                self.write(_Map(value.items()))
            case _:
                raise AssertionError(f"not to be pickled: {value!r}")

    def _all(self, before: bytes, items: Iterable[_Value], after: bytes) -> None:
        self.out.write(before)
        for item in items:
            self.write(item)
        self.out.write(after)

    def _once(self, code: bytes) -> None:
        number = self.memo.get(code)
        if number is None:
            number = self.memo[code] = len(self.memo)
            self.out.write(code + b"r" + struct.pack("<I", number))
        else:
            self.out.write(b"j" + struct.pack("<I", number))
