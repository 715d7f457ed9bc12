"""`.metadata` of torch.distributed.checkpoint, a pickle of its dataclasses, made without torch.

So its bytes are the same whichever version of torch a host has, or none. The classes, their fields and how torch
pickles them: torch/distributed/checkpoint/metadata.py, the same from 2.6 on.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tpshard.formats.torch_archive import pickle_integer, pickle_integers, pickle_text
from tpshard.planning.box import Shape
from tpshard.storage.torch_names import TORCH_NAMES

_CLASSES = "torch.distributed.checkpoint.metadata"
_VERSION = "1.0.0"
"""torch's CURRENT_DCP_VERSION."""


class StoredChunk(NamedTuple):
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
    chunks: Sequence[StoredChunk]


class StoredObject(NamedTuple):
    """Something that is no tensor, and the bytes of a file that hold its archive."""

    name: str
    file: str
    begin: int
    length: int


def metadata_pickle(tensors: Sequence[Described], set_id: str, objects: Sequence[StoredObject] = ()) -> bytes:
    """The pickled Metadata of these tensors. set_id: what torch has a random `save_id` for."""
    known = _Known()
    names = [known.text(tensor.name) for tensor in tensors]
    placed = [
        (_index(known, name, number, chunk), _place(known, chunk))
        for name, tensor in zip(names, tensors, strict=True)
        for number, chunk in enumerate(tensor.chunks)
    ]
    described = [*zip(names, (_tensor(known, tensor) for tensor in tensors), strict=True)]
    if objects:
        described += [
            (known.text(each.name), known.type(_CLASSES, "BytesStorageMetadata") + b")\x81") for each in objects
        ]
        placed += [(_object_index(known, each), _place(known, each)) for each in objects]
    body = known.object(
        _CLASSES,
        "Metadata",
        state_dict_metadata=_map(described),
        planner_data=_map((name, name + b"\x85") for name, _ in described),  # a tuple of one
        storage_data=_map(placed),
        storage_meta=known.object(
            _CLASSES, "StorageMeta", checkpoint_id=b"N", save_id=pickle_text(set_id), load_id=b"N", modules=b"]"
        ),
        version=pickle_text(_VERSION),
    )
    return b"".join((b"\x80\x02", *known.code, body, b"."))


class _Known:
    """What is written once, before all else, and referred to by number.

    So the rest can be put together in any order. Opcodes of protocol 2, as in CPython's pickletools.
    """

    def __init__(self) -> None:
        self.code: list[bytes] = []
        self.numbers: dict[bytes, bytes] = {}
        self.texts: dict[str, bytes] = {}
        self.sizes: dict[Shape, bytes] = {}
        self.forms: dict[str, bytes] = {}

    def __call__(self, code: bytes) -> bytes:
        """A reference to the value of `code`."""
        if code not in self.numbers:
            number = struct.pack("<I", len(self.numbers))
            self.code.append(code + b"r" + number + b"0")  # made, remembered, and taken off the stack again
            self.numbers[code] = b"j" + number
        return self.numbers[code]

    def text(self, text: str) -> bytes:
        """A string."""
        if text not in self.texts:
            self.texts[text] = self(pickle_text(text))
        return self.texts[text]

    def type(self, module: str, name: str) -> bytes:
        """A class, or whatever else a module has by name."""
        return self(f"c{module}\n{name}\n".encode())

    def size(self, shape: Shape) -> bytes:
        """A torch.Size."""
        if shape not in self.sizes:
            self.sizes[shape] = self(self.type("torch", "Size") + pickle_integers(shape) + b"\x85R")
        return self.sizes[shape]

    def object(self, module: str, name: str, **fields: bytes) -> bytes:
        """An object with these attributes. All of a class are of one form: a checkpoint has one for every chunk."""
        if name not in self.forms:
            keys = [self.text(key).replace(b"%", b"%%") + b"%b" for key in fields]
            begin = self.type(module, name).replace(b"%", b"%%")
            self.forms[name] = b"".join((begin, b")\x81}(", *keys, b"ub"))
        return self.forms[name] % tuple(fields.values())


def _map(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def _tensor(known: _Known, tensor: Described) -> bytes:
    layout = known(known.type("torch.serialization", "_get_layout") + pickle_text("torch.strided") + b"\x85R")
    contiguous = known(known.type(_CLASSES, "_MEM_FORMAT_ENCODING") + pickle_integer(0) + b"\x85R")
    dtype = known.type("torch", TORCH_NAMES[tensor.dtype][0])
    # dtype, layout, requires_grad, memory_format, pin_memory: what __setstate__ takes
    state = b"(" + dtype + layout + b"\x89" + contiguous + b"\x89t"
    chunks = [
        known.object(_CLASSES, "ChunkStorageMetadata", offsets=known.size(chunk.offsets), sizes=known.size(chunk.sizes))
        for chunk in tensor.chunks
    ]
    return known.object(
        _CLASSES,
        "TensorStorageMetadata",
        properties=known.type(_CLASSES, "TensorProperties") + b")\x81" + state + b"b",
        size=known.size(tensor.shape),
        chunks=b"".join((b"](", *chunks, b"e")),
    )


def _index(known: _Known, name: bytes, number: int, chunk: StoredChunk) -> bytes:
    return known.object(
        _CLASSES, "MetadataIndex", fqn=name, index=pickle_integer(number), offset=known.size(chunk.offsets)
    )


def _object_index(known: _Known, each: StoredObject) -> bytes:
    return known.object(_CLASSES, "MetadataIndex", fqn=known.text(each.name), index=b"N", offset=b"N")


def _place(known: _Known, chunk: StoredChunk | StoredObject) -> bytes:
    return known.object(
        "torch.distributed.checkpoint.filesystem",
        "_StorageInfo",
        relative_path=known.text(chunk.file),
        offset=pickle_integer(chunk.begin),
        length=pickle_integer(chunk.length),
    )
