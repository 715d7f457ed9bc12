"""`.metadata` of torch.distributed.checkpoint, a pickle of its dataclasses, made without torch.

So its bytes are the same whichever version of torch a host has, or none. The classes, their fields and how torch
pickles them: torch/distributed/checkpoint/metadata.py, the same from 2.6 on.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tpshard.box import Shape
from tpshard.formats.torch_archive import pickle_integer, pickle_integers, pickle_text

_CLASSES = b"torch.distributed.checkpoint.metadata"
_DTYPES = {
    "F64": b"float64",
    "F32": b"float32",
    "F16": b"float16",
    "BF16": b"bfloat16",
    "I64": b"int64",
    "I32": b"int32",
    "I16": b"int16",
    "I8": b"int8",
    "U8": b"uint8",
    "BOOL": b"bool",
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


def metadata_pickle(tensors: Sequence[Described], set_id: str) -> bytes:
    """The pickled Metadata of these tensors. set_id: what torch has a random `save_id` for."""
    known = _Known()
    names = [known(pickle_text(tensor.name)) for tensor in tensors]
    placed = [
        (_index(known, name, number, chunk), _place(known, chunk))
        for name, tensor in zip(names, tensors, strict=True)
        for number, chunk in enumerate(tensor.chunks)
    ]
    modules = (b"modules", b"]")
    ids = ((b"checkpoint_id", b"N"), (b"save_id", pickle_text(set_id)), (b"load_id", b"N"))
    body = known.object(
        _CLASSES,
        b"Metadata",
        (b"state_dict_metadata", _map(zip(names, (_tensor(known, tensor) for tensor in tensors), strict=True))),
        (b"planner_data", _map((name, name + b"\x85") for name in names)),  # a tuple of one
        (b"storage_data", _map(placed)),
        (b"storage_meta", known.object(_CLASSES, b"StorageMeta", *ids, modules)),
        (b"version", pickle_text(_VERSION)),
    )
    return b"".join((b"\x80\x02", *known.code, body, b"."))


class _Known:
    """What is written once, before all else, and referred to by number.

    So the rest can be put together in any order. Opcodes of protocol 2, as in CPython's pickletools.
    """

    def __init__(self) -> None:
        self.code: list[bytes] = []
        self.numbers: dict[bytes, bytes] = {}
        self.sizes: dict[Shape, bytes] = {}
        self.rectangles: dict[tuple[Shape, Shape], bytes] = {}

    def __call__(self, code: bytes) -> bytes:
        """A reference to the value of `code`."""
        found = self.numbers.get(code)
        if found is None:
            number = struct.pack("<I", len(self.numbers))
            self.code.append(code + b"r" + number + b"0")  # made, remembered, and taken off the stack again
            found = self.numbers[code] = b"j" + number
        return found

    def type(self, module: bytes, name: bytes) -> bytes:
        """A class, or whatever else a module has by name."""
        return self(b"c" + module + b"\n" + name + b"\n")

    def size(self, shape: Shape) -> bytes:
        """A torch.Size."""
        found = self.sizes.get(shape)
        if found is None:
            found = self.sizes[shape] = self(self.type(b"torch", b"Size") + pickle_integers(shape) + b"\x85R")
        return found

    def object(self, module: bytes, name: bytes, *fields: tuple[bytes, bytes]) -> bytes:
        """An object with these attributes."""
        state = _map((self(pickle_text(key.decode())), value) for key, value in fields)
        return self.type(module, name) + b")\x81" + state + b"b"


def _map(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def _tensor(known: _Known, tensor: Described) -> bytes:
    layout = known(known.type(b"torch.serialization", b"_get_layout") + pickle_text("torch.strided") + b"\x85R")
    contiguous = known(known.type(_CLASSES, b"_MEM_FORMAT_ENCODING") + pickle_integer(0) + b"\x85R")
    dtype = known.type(b"torch", _DTYPES[tensor.dtype])
    # dtype, layout, requires_grad, memory_format, pin_memory: what __setstate__ takes
    state = b"(" + dtype + layout + b"\x89" + contiguous + b"\x89t"
    chunks = b"".join(_rectangle(known, chunk.offsets, chunk.sizes) for chunk in tensor.chunks)
    return known.object(
        _CLASSES,
        b"TensorStorageMetadata",
        (b"properties", known.type(_CLASSES, b"TensorProperties") + b")\x81" + state + b"b"),
        (b"size", known.size(tensor.shape)),
        (b"chunks", b"](" + chunks + b"e"),
    )


def _rectangle(known: _Known, offsets: Shape, sizes: Shape) -> bytes:
    """Written out for every chunk, but made once for chunks that are alike, as those of layers are."""
    found = known.rectangles.get((offsets, sizes))
    if found is None:
        fields = ((b"offsets", known.size(offsets)), (b"sizes", known.size(sizes)))
        found = known.rectangles[offsets, sizes] = known.object(_CLASSES, b"ChunkStorageMetadata", *fields)
    return found


def _index(known: _Known, name: bytes, number: int, chunk: Chunk) -> bytes:
    fields = ((b"fqn", name), (b"index", pickle_integer(number)), (b"offset", known.size(chunk.offsets)))
    return known.object(_CLASSES, b"MetadataIndex", *fields)


def _place(known: _Known, chunk: Chunk) -> bytes:
    return known.object(
        b"torch.distributed.checkpoint.filesystem",
        b"_StorageInfo",
        (b"relative_path", known(pickle_text(chunk.file))),
        (b"offset", pickle_integer(chunk.begin)),
        (b"length", pickle_integer(chunk.length)),
    )
