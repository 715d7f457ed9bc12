"""The one core module that imports torch: pickle input and casts."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path

from tpshard.checkpoint import SourceFile
from tpshard.errors import CorruptError, UnsafeError, UnsupportedError
from tpshard.header import Header, TensorInfo

try:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
except ImportError:
    raise UnsupportedError("this needs torch, which is not installed", hint="pip install 'tpshard[torch]'") from None

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
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def convert(block: memoryview, source: str, target: str) -> memoryview:
    """Cast a block of bytes from one dtype to another, rounding as torch does. Shape [n] → [n]."""
    tensor = torch.frombuffer(block, dtype=DTYPES[source]).to(DTYPES[target])
    return tensor.view(torch.uint8).numpy().data


def read_pickle(path: Path, name: str) -> tuple[Header, SourceFile]:
    """The tensors of a `pytorch_model*.bin` as infos that point into the file: nothing is loaded.

    Only torch's weights_only unpickler reads it, so it can call nothing. Under fake tensors that reader reports where
    in the archive each storage lies, and the bytes are then moved like those of any other file.
    UnsafeError for a pickle that calls a function, CorruptError for a damaged file.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            head = file.read(16)
        if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):
            raise UnsupportedError(
                "a pickle from before torch 1.6, which cannot be read without loading all of it",
                path=path,
                hint="load it once with torch.load(weights_only=True) and torch.save it again",
            )
        raise CorruptError("not a torch archive", path=path, expected="a zip file", found=repr(head[:8]))
    try:
        with FakeTensorMode():
            data = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise UnsafeError(
            "the pickle holds more than tensors and is not read",
            path=path,
            found=reason,
            hint="ask for safetensors files",
        ) from None
    except (RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
        raise CorruptError(f"torch cannot read it: {str(error).splitlines()[0]}", path=path) from None
    if not isinstance(data, dict):
        raise CorruptError("not a state dict", path=path, found=type(data).__name__)
    tensors = []
    size = path.stat().st_size
    for key, value in data.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CorruptError("not a state dict of tensors", path=path, found=f"{key!r}: {type(value).__name__}")
        tensors.append(_info(key, value, path, size))
    tensors.sort(key=lambda info: (info.begin, info.name))
    described = repr([(t.name, t.dtype, t.shape, t.begin) for t in tensors]).encode()
    digest = hashlib.sha256(described).hexdigest()
    return Header(tuple(tensors), {}, 0, digest), SourceFile(name, size, digest)


def _info(name: str, tensor: torch.Tensor, path: Path, size: int) -> TensorInfo:
    offset = tensor.untyped_storage()._checkpoint_offset
    if not tensor.is_contiguous():
        raise UnsupportedError(
            f"{name} is stored as a strided view", path=path, tensor=name, hint="save the checkpoint as safetensors"
        )
    if tensor.dtype not in _NAMES or offset is None:
        raise UnsupportedError(f"{name} has a dtype or storage that safetensors cannot hold", path=path, tensor=name)
    begin = offset + int(tensor.storage_offset()) * tensor.element_size()
    end = begin + tensor.numel() * tensor.element_size()
    if end > size:
        raise CorruptError(f"{name} lies beyond the end of the file", path=path, tensor=name)
    return TensorInfo(name, _NAMES[tensor.dtype], tuple(tensor.shape), str(path), begin, end)
