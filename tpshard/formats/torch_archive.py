"""The container that torch.save writes, made without torch: a zip file that compresses nothing, around a pickle.

Only the bytes between the tensors are made here; the tensors' own are streamed to their offsets like those of any
other file. The layout follows torch's caffe2/serialize (PyTorchStreamWriter): every storage begins at a multiple of
64, to which a field named `FB` in its local header pads. The checksums of the storages stay 0, as with torch's own
`torch.serialization.set_crc32_options(False)`: torch does not look at them, and they would cost reading everything.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.planning.box import Shape
from tpshard.planning.join import OutputFile, Placed
from tpshard.planning.layout import StoredTensor
from tpshard.planning.strides import row_major
from tpshard.storage.safetensors import nbytes
from tpshard.storage.torch_names import TORCH_NAMES

ALIGN = 64
"""Where storages begin in an archive: at multiples of this."""
_LARGE = 0xFFFFFFFF


@dataclass
class _Entry:
    name: bytes
    offset: int
    size: int
    crc: int


class _Zip:
    """Bytes of a zip file at their offsets, with holes where storages lie."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.entries: list[_Entry] = []
        self.literals: list[tuple[int, bytes]] = []
        self.end = 0

    def add(self, name: str, data: bytes) -> None:
        begin = self.hole(name, len(data), zlib.crc32(data))
        self._literal(begin, data)

    def hole(self, name: str, size: int, crc: int = 0) -> int:
        """A record whose bytes come from elsewhere; its first byte's offset."""
        full = f"{self.folder}/{name}".encode()
        large = struct.pack("<HHQQ", 1, 16, size, size) if size >= _LARGE else b""
        bare = self.end + 30 + len(full) + len(large) + 4
        padding = -bare % ALIGN
        extra = large + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        shown = _LARGE if large else size
        head = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 0, 0, 0, 0, 0, crc, shown, shown, len(full), len(extra))
        self.entries.append(_Entry(full, self.end, size, crc))
        self._literal(self.end, head + full + extra)
        begin = bare + padding
        self.end = begin + size
        return begin

    def _literal(self, offset: int, data: bytes) -> None:
        if self.literals and self.literals[-1][0] + len(self.literals[-1][1]) == offset:
            before, held = self.literals[-1]
            self.literals[-1] = (before, held + data)
        else:
            self.literals.append((offset, data))
        self.end = max(self.end, offset + len(data))

    def close(self) -> None:
        """Add the directory of the archive."""
        begin, rows = self.end, []
        for entry in self.entries:
            wide = [value for value in (entry.size, entry.size, entry.offset) if value >= _LARGE]
            extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
            size, offset = min(entry.size, _LARGE), min(entry.offset, _LARGE)
            fields = (0, 0, 0, 0, 0, 0, entry.crc, size, size, len(entry.name), len(extra), 0, 0, 0, 0, offset)
            rows.append(struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", *fields) + entry.name + extra)
        listing = b"".join(rows)
        count = len(self.entries)
        tail = b""
        if begin >= _LARGE or count >= 0xFFFF:
            end = begin + len(listing)
            tail += struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(listing), begin)
            tail += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
        few = min(count, 0xFFFF)
        tail += struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, few, few, len(listing), min(begin, _LARGE), 0)
        self._literal(begin, listing + tail)


def archive_file(
    name: str, tensors: Sequence[StoredTensor], keys: Sequence[str] = (), around: tuple[bytes, bytes] = (b"", b"")
) -> OutputFile:
    """A file as torch.save writes a dict of tensors, each with a storage of its own.

    keys: the dict's, where they are not the tensors' names. around: of the pickle of what the dict lies in, the opcodes
    before and behind it. UnsupportedError for a dtype that torch's pickles have no storage class for.
    """
    archive = _Zip(name.rpartition("/")[2].rpartition(".")[0])
    archive.add("data.pkl", b"\x80\x02" + around[0] + _pickle(tensors, keys) + around[1] + b".")
    archive.add("byteorder", b"little")
    placed = []
    for number, tensor in enumerate(tensors):
        placed.append(Placed(tensor, name, archive.hole(f"data/{number}", nbytes(tensor.dtype, tensor.shape))))
    archive.add("version", b"3\n")
    archive.close()
    (_, header), *others = archive.literals
    return OutputFile(name, header, archive.end, tuple(placed), tuple(others))


@dataclass(frozen=True)
class TensorArchive:
    """What torch.save writes of one tensor: all bytes but its own at their offsets, where those begin, the total."""

    literals: tuple[tuple[int, bytes], ...]
    begin: int
    size: int


@lru_cache(maxsize=4096)
def tensor_archive(dtype: str, shape: Shape, note: bytes) -> TensorArchive:
    """The archive of a tensor alone. note: a record that torch does not look at."""
    archive = _Zip("archive")
    archive.add("data.pkl", b"\x80\x02" + _tensor(dtype, shape, 0) + b".")
    archive.add("byteorder", b"little")
    archive.add("tpshard", note)
    begin = archive.hole("data/0", nbytes(dtype, shape))
    archive.add("version", b"3\n")
    archive.close()
    return TensorArchive(tuple(archive.literals), begin, archive.end)


def object_archive(pickled: bytes) -> bytes:
    """What torch.save writes of something without tensors, whose pickle this is."""
    archive = _Zip("archive")
    archive.add("data.pkl", pickled)
    archive.add("byteorder", b"little")
    archive.add("version", b"3\n")
    archive.close()
    ((_, data),) = archive.literals
    return data


def require_storage(name: str, dtype: str) -> None:
    """UnsupportedError for a dtype that torch's pickles have no storage class for."""
    if dtype not in TORCH_NAMES:
        what = f"{name} has the dtype {dtype}, which this format cannot hold"
        hint = "cast it with --dtype, or use --format native"
        raise UnsupportedError(what, tensor=name, expected=", ".join(TORCH_NAMES), hint=hint)


def check_literals(output: OutputFile, path: Path) -> None:
    """CorruptError when a file has another size than it must have, or other bytes where no tensor lies."""
    size = path.stat().st_size
    if size != output.size:
        raise CorruptError("the archive does not have its size", path=path, expected=output.size, found=size)
    with path.open("rb") as file:
        for offset, data in ((0, output.header), *output.literals):
            file.seek(offset)
            if file.read(len(data)) != data:
                what = "the archive is not the one of this set: its directory or its pickle differs"
                hint = "copy it again from where it comes from, or write the rank again"
                raise CorruptError(what, path=path, hint=hint)


def _pickle(tensors: Sequence[StoredTensor], keys: Sequence[str]) -> bytes:
    """The opcodes of `{name: tensor}`, of protocol 2, as in CPython's pickletools."""
    out = io.BytesIO()
    out.write(b"}(")
    for number, tensor in enumerate(tensors):
        require_storage(tensor.name, tensor.dtype)
        key = keys[number] if keys else tensor.name
        out.write(pickle_text(key) + _tensor(tensor.dtype, tensor.shape, number))
    out.write(b"u")
    return out.getvalue()


def _tensor(dtype: str, shape: Shape, number: int) -> bytes:
    """A tensor whose storage is the record `data/number`."""
    storage = pickle_text("storage") + f"ctorch\n{TORCH_NAMES[dtype][1]}\n".encode() + pickle_text(str(number))
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (b"(" + storage + pickle_text("cpu") + pickle_integer(prod(shape)) + b"tQ")
        + (pickle_integer(0) + pickle_integers(shape) + pickle_integers(row_major(shape)))
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def pickle_text(text: str) -> bytes:
    """A string."""
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def pickle_integer(value: int) -> bytes:
    """A whole number below 2^63, not negative."""
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def pickle_integers(values: Sequence[int]) -> bytes:
    """A tuple of whole numbers."""
    return b"(" + b"".join(map(pickle_integer, values)) + b"t"


def pickle_value(value: object) -> bytes:
    """None, a boolean, a number, a string, a list or a dict of such."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return pickle_integer(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return pickle_text(value)
    if isinstance(value, list):
        return b"](" + b"".join(map(pickle_value, value)) + b"e"
    assert isinstance(value, dict)
    return b"}(" + b"".join(pickle_value(part) for pair in value.items() for part in pair) + b"u"
