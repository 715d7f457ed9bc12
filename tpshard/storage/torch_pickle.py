"""Weights that torch pickled: where the bytes of each tensor lie in the file, without loading them."""

import hashlib
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from tpshard.errors import CorruptError, TpshardError, UnsafeError, UnsupportedError
from tpshard.storage.safetensors import Header, TensorInfo
from tpshard.storage.source import SourceFile

try:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
except ImportError:
    raise UnsupportedError("this needs torch, which is not installed", hint="pip install torch") from None

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_AGAIN = "load it with torch.load(weights_only=True) and torch.save it again"


def read_pickle(path: Path, name: str) -> tuple[Header, SourceFile]:
    """The tensors of a `pytorch_model*.bin` as infos that point into the file: nothing is loaded.

    Only torch's weights_only unpickler reads it, so it can call nothing. Under fake tensors that reader reports where
    in the archive each storage lies, and the bytes are then moved like those of any other file.
    UnsafeError for a pickle that calls a function, CorruptError for a damaged file.
    """
    with path.open("rb") as file:
        records = archive_records(file, path)
    try:
        with FakeTensorMode(), warnings.catch_warnings(action="ignore"):
            data = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise _unpickling_error(error, path) from None
    except Exception as error:  # damaged bytes make it fail in every way, with failed assertions too
        reason = str(error).split("\n")[0][:200]
        raise CorruptError("not an archive of tensors that torch can read", path=path, found=reason) from None
    if not isinstance(data, dict):
        raise CorruptError("not a state dict", path=path, expected="names and tensors", found=type(data).__name__)
    tensors = []
    for key, value in data.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CorruptError(
                "not a state dict of tensors alone",
                path=path,
                expected="names and tensors",
                found=f"{key!r}: {type(value).__name__}",
                hint="take the model's state dict out of it with torch.load(weights_only=True), and torch.save that",
            )
        tensors.append(info_in_archive(key, value, path, records))
    tensors.sort(key=lambda info: (info.begin, info.name))
    described = repr([(t.name, t.dtype, t.shape, t.begin) for t in tensors]).encode()
    digest = hashlib.sha256(described).hexdigest()
    return Header(tuple(tensors), {}, 0, digest), SourceFile(name, path.stat().st_size, digest)


def archive_records(file: BinaryIO, path: Path) -> dict[int, int]:
    """The records of a torch archive (a zip file that compresses nothing): offset of the bytes → how many.

    CorruptError for what is no archive, or a damaged one; UnsupportedError for one that torch.save does not write.
    """
    head = file.read(64)
    if not head.startswith(b"PK\x03\x04"):
        raise _not_an_archive(head, path)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            orders = {archive.read(e) for e in entries if e.filename.endswith("/byteorder")}
        records = {}
        for entry in entries:
            file.seek(entry.header_offset + 26)  # the local header: lengths of name and extra field, then those
            name, extra = struct.unpack("<HH", file.read(4))
            records[entry.header_offset + 30 + name + extra] = entry.file_size
    except (zipfile.BadZipFile, struct.error, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise CorruptError("the archive is damaged or cut off", path=path, found=error) from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UnsupportedError("the archive is compressed", path=path, expected="as torch.save writes it", hint=_AGAIN)
    # From this record on torch computes where storages lie, as if each followed the one before it.
    stored = [entry.filename for entry in sorted(entries, key=lambda entry: entry.header_offset)]
    keys = [int(name.rpartition("/")[2]) for name in stored if re.search(r"/data/\d+$", name)]
    if keys != sorted(keys) and any(name.endswith("/.format_version") for name in stored):
        raise CorruptError("the tensors lie in another order than torch.save writes", path=path, hint=_AGAIN)
    # Before torch sees it: under fake tensors its byte swap crashes the process.
    if orders - {b"little"}:
        raise UnsupportedError("the archive is not little-endian", path=path, found=orders.pop(), hint=_AGAIN)
    return records


def _not_an_archive(head: bytes, path: Path) -> TpshardError:
    if head.startswith(b"version https://git-lfs"):
        return CorruptError("a Git-LFS pointer, not the weights", path=path, hint="run `git lfs pull` there")
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        message = "a pickle from before torch 1.6, of which all must be loaded to read any"
        return UnsupportedError(message, path=path, hint=_AGAIN)
    return CorruptError("not a torch archive", path=path, expected="a zip file", found=repr(head[:16]))


def _unpickling_error(error: pickle.UnpicklingError, path: Path) -> TpshardError:
    """What the weights_only unpickler refused: something that would run, or bytes that are no pickle."""
    text = " ".join(str(error).split())
    if re.search(r"Unsupported operand|String is too long", text):
        return CorruptError("the pickle is damaged", path=path, found=text[-100:])
    refused = re.search(r"GLOBAL ([\w.]+)", text)
    return UnsafeError(
        "the pickle asks to call a function or a class, and is not read",
        path=path,
        expected="tensors alone",
        found=refused[1].rstrip(".") if refused else text.rpartition("error: ")[2][:200],
        hint="ask its author for safetensors files",
    )


def info_in_archive(name: str, tensor: torch.Tensor, path: Path, records: Mapping[int, int]) -> TensorInfo:
    """Where the bytes of a tensor lie that was loaded under fake tensors, in an archive that holds these records.

    Offsets count from the archive's first byte. UnsupportedError for a tensor that does not lie row-major,
    CorruptError for one that does not lie within a record.
    """
    plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    if not plain or tensor.dtype not in _NAMES:
        what = f"{name} is not a plain tensor of a dtype that safetensors has"
        hint = "save the checkpoint as safetensors"
        raise UnsupportedError(what, path=path, tensor=name, found=f"{tensor.dtype}, {tensor.layout}", hint=hint)
    if not tensor.is_contiguous():
        raise UnsupportedError(
            f"{name} is stored as a strided view", path=path, tensor=name, hint="save the checkpoint as safetensors"
        )
    if tensor.numel() == 0:
        return TensorInfo(name, _NAMES[tensor.dtype], tuple(tensor.shape), str(path), 0, 0)
    first = int(tensor.storage_offset()) * tensor.element_size()
    last = first + tensor.numel() * tensor.element_size()
    offset: int | None = tensor.untyped_storage()._checkpoint_offset
    # None for a tensor without bytes. Computed offsets are wrong for an archive that was packed anew.
    if offset is None or last > records.get(offset, -1):
        raise CorruptError(
            f"{name} is not where torch looks for it in the archive",
            path=path,
            tensor=name,
            expected=f"a record of at least {last} bytes at offset {offset}",
            hint=_AGAIN,
        )
    return TensorInfo(name, _NAMES[tensor.dtype], tuple(tensor.shape), str(path), offset + first, offset + last)
