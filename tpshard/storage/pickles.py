"""Pickles and torch archives read without torch, and without building anything that they name.

Every class and function in a pickle is looked up in a closed list, and stands for a `Built`: its name, what it was
called with, and its attributes. So nothing that a pickle names is imported or run.
"""

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

from tpshard.errors import CorruptError, TpshardError, UnsafeError, UnsupportedError
from tpshard.storage.safetensors import DTYPE_BITS
from tpshard.storage.torch_names import TORCH_NAMES

STORAGES = {f"torch.{name}": dtype for dtype, (_, name) in TORCH_NAMES.items()}
"""The dtype of a pickled storage."""

Classes = Mapping[str, Collection[str]]
"""What a pickle may name: by module, the names in it."""
TENSOR: Classes = {
    "torch": {name for names in TORCH_NAMES.values() for name in names} | {"Size"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "collections": {"OrderedDict"},
}
"""What the pickle of a tensor names, or of a dict of tensors."""
_CORE = "megatron.core."
MEGATRON: Classes = {
    "argparse": {"Namespace"},
    "types": {"SimpleNamespace"},
    "pathlib": {"PosixPath"},
    "collections": {"OrderedDict"},
    "_io": {"BytesIO"},
    "signal": {"Signals"},
    "_codecs": {"encode"},
    "numpy": {"dtype", "ndarray"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.dtypes": {"UInt32DType"},
    "torch": {"device", "Generator"},
    "torch._C": {"Generator"},
    f"{_CORE}enums": {"ModelType", "Fp8Recipe", "Fp4Recipe"},
    f"{_CORE}transformer.enums": {
        "AttnBackend", "AttnMaskType", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope",
    },
    f"{_CORE}optimizer.optimizer_config": {"OptimizerConfig"},
    f"{_CORE}rerun_state_machine": {"RerunDiagnostic", "RerunMode", "RerunState"},
}  # fmt: skip
"""What Megatron itself allows in the pickles of its checkpoints (megatron/core/safe_globals.py)."""


class Built:
    """What a pickle builds of something that it names. args: what that is called with; fields: the attributes."""

    name: ClassVar[str]
    args: tuple[Any, ...]
    fields: dict[Any, Any]

    def __new__(cls, *args: Any, **named: Any) -> Self:
        self = super().__new__(cls)
        self.args, self.fields = args, dict(named)
        return self

    def __init__(self, *args: Any, **named: Any) -> None:
        """Nothing: `__new__` has taken the arguments."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.fields.update(state)
        else:
            self.fields["state"] = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.fields[key] = value

    def __hash__(self) -> int:
        return id(self)

    def get(self, key: str, default: Any = None) -> Any:
        """An attribute."""
        return self.fields.get(key, default)


class _OrderedDict(dict[Any, Any]):
    """What stands for an OrderedDict: state dicts of modules are such, with an attribute of no use here."""

    def __setstate__(self, state: Any) -> None:
        """Nothing is remembered."""


@lru_cache(maxsize=1024)
def _stub(module: str, name: str) -> type[Built]:
    return type(name, (Built,), {"name": f"{module}.{name}"})


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, classes: Classes) -> None:
        super().__init__(io.BytesIO(content))
        self.classes = classes

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.classes.get(module, ()):
            raise UnsafeError("the pickle names what no checkpoint needs", found=f"{module}.{name}")
        return _OrderedDict if name == "OrderedDict" else tuple if name == "Size" else _stub(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return pid


def read_pickled(content: bytes, classes: Classes, path: object) -> Any:
    """What a pickle holds; UnsafeError where it names more than `classes`, CorruptError where it is damaged."""
    try:
        require_memo(content)
        return _Unpickler(content, classes).load()
    except TpshardError as error:
        error.path = str(path)
        raise
    except Exception as error:  # damaged bytes make pickle fail in every way
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CorruptError("the pickle is damaged", path=path, found=reason) from None


def require_memo(content: bytes) -> None:
    """ValueError for a pickle that remembers something at a place which it is too short for.

    Python's reader would make room for all places up to that one, gigabytes of it.
    """
    for opcode, place, _ in pickletools.genops(content):
        if "PUT" in opcode.name and int(place or 0) > len(content):
            raise ValueError(f"place {place} of what a pickle of {len(content)} bytes remembers")


class Window(io.RawIOBase):
    """A stretch of a file, as a file."""

    def __init__(self, path: Path, begin: int, length: int) -> None:
        self.file = path.open("rb", buffering=0)
        self.begin, self.length, self.at = begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.length)[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.begin + self.at)
        view = memoryview(buffer)[: max(0, self.length - self.at)]
        count = self.file.readinto(view)
        self.at += count or 0
        return count or 0

    def close(self) -> None:
        self.file.close()
        super().close()


class Archive:
    """What torch.save wrote, at a stretch of a file: its pickle, and where in the file each storage lies.

    storages: by key, the offset of the first byte in the file, and how many there are.
    """

    def __init__(self, path: Path, begin: int = 0, length: int | None = None) -> None:
        """CorruptError for what is no archive, UnsupportedError for one that torch.save does not write."""
        self.path = path
        length = path.stat().st_size - begin if length is None else length
        try:
            with io.BufferedReader(Window(path, begin, length), 4096) as window, zipfile.ZipFile(window) as archive:
                entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
                    raise UnsupportedError("the archive is compressed", expected="as torch.save writes it")
                self.content = archive.read(entries["data.pkl"])
                if "byteorder" in entries and (order := archive.read(entries["byteorder"])) != b"little":
                    raise UnsupportedError("the archive is not little-endian", found=order[:16])
                self.storages: dict[str, tuple[int, int]] = {}
                for name, entry in entries.items():
                    if name.startswith("data/"):
                        window.seek(entry.header_offset + 26)  # lengths of the local header's name and extra field
                        name_length, extra = struct.unpack("<HH", window.read(4))
                        at = entry.header_offset + 30 + name_length + extra
                        if at + entry.file_size > length:
                            raise CorruptError("the archive ends within a tensor")
                        self.storages[name[5:]] = begin + at, entry.file_size
        except TpshardError as error:
            raise type(error)(error.message, path=path, expected=error.expected, found=error.found) from None
        except (zipfile.BadZipFile, struct.error, KeyError, NotImplementedError, ValueError, EOFError) as error:
            raise CorruptError("not an archive of torch.save, or a damaged one", path=path, found=error) from None

    def load(self, classes: Classes) -> Any:
        """What the pickle holds; a tensor is a `Built`, which `place` takes."""
        both = {module: {*TENSOR.get(module, ()), *classes.get(module, ())} for module in (*TENSOR, *classes)}
        return read_pickled(self.content, both, self.path)

    def place(self, name: str, tensor: Any) -> tuple[str, tuple[int, ...], int]:
        """dtype and shape of a tensor of this archive, and where in the file its bytes begin.

        UnsupportedError for a tensor that does not lie row-major, CorruptError for one outside of its storage.
        """
        if not (isinstance(tensor, Built) and tensor.name == "torch._utils._rebuild_tensor_v2"):
            found = type(tensor).__name__
            raise UnsupportedError(f"{name} is not a plain tensor", path=self.path, tensor=name, found=found)
        try:
            (_, storage, key, *_), offset, shape, strides, *_ = tensor.args
            dtype = STORAGES[storage.name]
            begin, size = self.storages[key]
            shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{name} is not a tensor as torch.save writes it"
            raise CorruptError(what, path=self.path, tensor=name, found=repr(error)[:200]) from None
        expected, step = [], 1
        for extent in reversed(shape):
            expected.append(step)
            step *= extent
        if step and any(a != b for a, b, n in zip(strides, reversed(expected), shape, strict=True) if n != 1):
            raise UnsupportedError(f"{name} is stored as a strided view", path=self.path, tensor=name, found=strides)
        width = DTYPE_BITS[dtype] // 8
        if min(shape, default=0) < 0 or offset < 0 or (offset + step) * width > size:
            raise CorruptError(f"{name} reaches beyond its storage", path=self.path, tensor=name, found=shape)
        return dtype, shape, begin + offset * width
