"""Sets of torch.distributed.checkpoint, read by themselves: which rectangle of which tensor lies where in which file.

A set holds every rectangle once, and says nothing of ranks but by its files. `dealt` makes ranks of it.
"""

import io
import json
import operator
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tpshard.errors import CorruptError, TpshardError, UnsafeError, UnsupportedError
from tpshard.storage.names import DCP_METADATA
from tpshard.storage.pickles import Window, require_memo
from tpshard.storage.safetensors import Header, TensorInfo
from tpshard.storage.torch_pickle import DTYPES, archive_records, info_in_archive

_METADATA = {"BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"}
_CLASSES = {
    "torch": {"Size", *(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())},
    "pathlib": {"PosixPath"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": _METADATA
    | {"TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}
"""What torch's writer puts into `.metadata`, and Megatron's; nothing else is built from it, and nothing called."""


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor: where it begins in it, and where it is stored (`info` has its own shape)."""

    at: tuple[int, ...]
    info: TensorInfo

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(at + size for at, size in zip(self.at, self.info.shape, strict=True))


SHARDING = "DCP_SHARDING_INFO"
"""The key of a safetensors file's metadata under which torch finds where the file's rectangles lie."""
Chunks = Mapping[str, Sequence[Chunk]]
"""The rectangles in one rank's files, by the name of their tensor."""


def of_header(header: Header, path: Path) -> Iterator[Chunk]:
    """The rectangles of a safetensors file of the Hugging Face flavour."""
    try:
        said = json.loads(header.metadata[SHARDING])
        places = {info.name: tuple(map(int, said[info.name]["saved_offsets"])) for info in header.tensors}
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"the file does not say where its tensors begin: {error!r}", path=path) from None
    for info in header.tensors:
        if len(places[info.name]) != len(info.shape):
            raise CorruptError("an offset does not have the tensor's dims", path=path, tensor=info.name)
        yield Chunk(places[info.name], info)


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise UnsafeError("the pickle asks for what no checkpoint needs", found=f"{module}.{name}")
        return super().find_class(module, name)


@dataclass(frozen=True)
class _Piece:
    """Where `.metadata` puts a rectangle of a tensor, the tensor's dtype, and the shapes of what begins there."""

    name: str
    at: tuple[int, ...]
    dtype: torch.dtype
    shapes: Sequence[tuple[int, ...]]
    file: str
    begin: int
    length: int


def of_metadata(directory: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, list[Chunk]]:
    """The rectangles that `.metadata` speaks of, by the name of their file; nothing of the tensors is read.

    wanted: of which tensors, by their names.
    UnsafeError where the pickle would build anything else, CorruptError where it and the files disagree, or where a
    tensor that it describes reaches further than its rectangles, or less far.
    """
    path = directory / DCP_METADATA
    try:
        content = path.read_bytes()
        require_memo(content)
        sizes, places = _listed(_Metadata(io.BytesIO(content)).load(), path)
        sizes = {name: size for name, size in sizes.items() if wanted(name)}
        places = [place for place in places if wanted(place.name)]
    except FileNotFoundError:
        raise CorruptError(".metadata is missing", path=path) from None
    except (TpshardError, OSError):
        raise
    except Exception as error:  # damaged bytes make pickle fail in every way
        raise CorruptError(f"not torch's metadata: {error}", path=path) from None
    chunks: dict[str, list[Chunk]] = {}
    for place in places:
        file = directory / place.file
        info = _archived(place.name, file, place.begin, place.length)
        alike = place.shapes == [info.shape] and len(place.at) == len(info.shape)
        if not alike or DTYPES[info.dtype] != place.dtype:
            message, expected = "the archive is not what .metadata says", f"{place.dtype} {place.shapes}"
            there = f"{info.dtype} {info.shape}"
            raise CorruptError(message, path=file, tensor=place.name, expected=expected, found=there)
        chunks.setdefault(place.file, []).append(Chunk(place.at, info))
    _require_sizes(path, sizes, chain.from_iterable(chunks.values()))
    return chunks


def _listed(metadata: Any, path: Path) -> tuple[dict[str, list[int]], list[_Piece]]:
    """Sizes of the tensors that `.metadata` describes, and the places of their rectangles.

    CorruptError for a rectangle of a tensor that it does not describe, or in a file elsewhere. Of another structure
    than torch's it fails in every way.
    """
    described = dict(metadata.state_dict_metadata)
    tensors = {name: each for name, each in described.items() if hasattr(each, "chunks")}  # the others are no tensors
    places = []
    for index, place in metadata.storage_data.items():
        if index.fqn not in described:
            message = ".metadata says where a tensor lies and not what it is"
            raise CorruptError(message, path=path, tensor=index.fqn, found=f"a place in {place.relative_path}")
        if (tensor := tensors.get(index.fqn)) is None:
            continue
        if Path(place.relative_path).name != place.relative_path:
            message = ".metadata puts a tensor into another directory"
            raise CorruptError(message, path=path, tensor=index.fqn, found=place.relative_path)
        dtype, shapes = tensor.properties.dtype, [_ints(c.sizes) for c in tensor.chunks if c.offsets == index.offset]
        begin, length = _ints((place.offset, place.length))
        places.append(_Piece(index.fqn, _ints(index.offset), dtype, shapes, place.relative_path, begin, length))
    return {name: list(_ints(tensor.size)) for name, tensor in tensors.items()}, places


def _ints(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(map(operator.index, values))


def _require_sizes(path: Path, sizes: Mapping[str, list[int]], chunks: Iterable[Chunk]) -> None:
    """CorruptError where a tensor's rectangles do not end where `.metadata` says that the tensor does.

    Torch makes a tensor of the size that is described, and leaves it unwritten where no rectangle lies.
    """
    found: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        found.setdefault(chunk.info.name, []).append(chunk)
    for name, expected in sizes.items():
        held = list(_size(found[name])) if name in found else "no pieces"
        if held != expected:
            message = "a tensor's pieces are not of the size that .metadata gives it"
            raise CorruptError(message, path=path, tensor=name, expected=expected, found=held)


def _archived(name: str, path: Path, begin: int, length: int) -> TensorInfo:
    """Where the bytes of the one tensor lie that torch.save wrote at an offset of a file."""
    try:
        with io.BufferedReader(Window(path, begin, length)) as window:
            records = archive_records(window, path)
            window.seek(0)
            with FakeTensorMode():
                tensor = torch.load(window, weights_only=True, map_location="cpu")
        if not isinstance(tensor, Tensor):
            raise UnsupportedError("not a tensor", found=type(tensor).__name__)
        info = info_in_archive(name, tensor, path, records)
    except TpshardError as error:  # without its hint, which is of files that torch.load reads
        raise type(error)(error.message, path=path, tensor=name, expected=error.expected, found=error.found) from None
    except Exception as error:  # damaged bytes make it fail in every way
        reason = str(error).split("\n")[0][:200]
        raise CorruptError("not an archive that torch can read", path=path, tensor=name, found=reason) from None
    if info.end > length:
        raise CorruptError("the archive ends within its tensor", path=path, tensor=name)
    return replace(info, begin=begin + info.begin, end=begin + info.end)


def dealt(files: Sequence[Chunks]) -> Iterator[tuple[str, int, list[list[Chunk]]]]:
    """Every tensor's rectangles for each rank, in order along the dim of which they are parts, and that dim.

    Torch goes by offsets and not by files, so ranks are told apart by the order of their first rectangles. What is
    there for fewer ranks than there are, neighbours share; so do they where the first of them has more rectangles than
    the others, the last ones: a fused k and v. CorruptError where rectangles do not make the tensor.
    """
    tp, begin = len(files), operator.attrgetter("at")
    for name in dict.fromkeys(name for held in files for name in held):
        dim = tiled(name, [chunk for held in files for chunk in held.get(name, ())])
        owned = sorted((sorted(held[name], key=begin) for held in files if name in held), key=lambda c: begin(c[0]))
        most = max(map(len, owned))
        full = [i for i, chunks in enumerate(owned) if len(chunks) == most]
        every = len(owned) // len(full)
        if tp % len(owned) or full != list(range(0, len(owned), every)):
            counts = ", ".join(str(len(held.get(name, ()))) for held in files)
            message = f"verify cannot deal {name} to {tp} ranks"
            raise UnsupportedError(message, tensor=name, found=f"pieces in each file: {counts}")
        shares = [chunks + owned[i - i % every][len(chunks) :] for i, chunks in enumerate(owned)]
        yield name, dim, [sorted(shares[rank * len(owned) // tp], key=begin) for rank in range(tp)]


def _size(chunks: Sequence[Chunk]) -> tuple[int, ...]:
    """The size of a tensor that rectangles make up, if they do: where the last of them end."""
    return tuple(map(max, zip(*(chunk.end for chunk in chunks), strict=True)))


def tiled(name: str, chunks: Sequence[Chunk]) -> int:
    """The dim along which rectangles that make up a tensor are its parts; 0 where there is one."""
    size = _size(chunks)
    cut = [dim for dim, n in enumerate(size) if any((chunk.at[dim], chunk.end[dim]) != (0, n) for chunk in chunks)]
    if len(cut) > 1:
        raise UnsupportedError(f"{name} is cut along several dims, which no tensor parallelism does", tensor=name)
    dim = cut[0] if cut else 0
    ends = sorted((chunk.at[dim : dim + 1], chunk.end[dim : dim + 1]) for chunk in chunks)
    starts = [(0,) if size else (), *(end for _, end in ends[:-1])]
    if [at for at, _ in ends] != starts:
        message = "a tensor's pieces leave a gap, or overlap"
        expected = f"pieces of {list(size)} one behind another along dim {dim}"
        found = ", ".join(f"{list(at)} to {list(end)}" for at, end in ends)
        raise CorruptError(message, path=chunks[0].info.file, tensor=name, expected=expected, found=found)
    return dim
