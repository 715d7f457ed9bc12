"""Checkpoints of torch.distributed.checkpoint, read without torch: which rectangle of a tensor lies where.

Source: torch/distributed/checkpoint/{metadata,filesystem,planner}.py, and what Megatron adds to the pickle.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from tpshard.errors import CorruptError, TpshardError
from tpshard.storage.local import read_bytes, safe_path
from tpshard.storage.names import DCP_METADATA
from tpshard.storage.pickles import Archive, Built, Classes, read_pickled
from tpshard.storage.safetensors import TensorInfo, nbytes
from tpshard.storage.torch_names import TORCH_NAMES

_DCP = "torch.distributed.checkpoint"
_CLASSES: Classes = {
    "torch": {name for name, _ in TORCH_NAMES.values()} | {"Size", "device", "float8_e4m3fn", "float8_e5m2"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "Path"},
    f"{_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_DCP}.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.planner": {
        "BytesIOWriteData", "LoadItemType", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "megatron.core.dist_checkpointing.strategies.checkpointable": {"MCoreMetadata", "MCoreSavePlan"},
}  # fmt: skip
Shape = tuple[int, ...]
_DTYPES = {f"torch.{name}": dtype for dtype, (name, _) in TORCH_NAMES.items()}


class DcpChunk(NamedTuple):
    """A rectangle of a tensor: where it begins in it, and where its bytes are (`info` has its own shape)."""

    at: Shape
    info: TensorInfo


@dataclass(frozen=True)
class DcpTensor:
    """A tensor of a checkpoint: dtype, shape, and its rectangles."""

    dtype: str
    shape: Shape
    chunks: tuple[DcpChunk, ...]


class DcpPlace(NamedTuple):
    """Bytes of a file."""

    file: str
    begin: int
    length: int


@dataclass(frozen=True)
class DcpListing:
    """What `.metadata` says: tensors, of which the files are not yet looked at, and where objects lie, by name."""

    directory: Path
    tensors: Mapping[str, tuple[str, Shape, Mapping[Shape, Shape]]]
    places: Mapping[tuple[str, Shape], DcpPlace]
    objects: Mapping[str, DcpPlace]

    def archive(self, stretch: DcpPlace) -> Archive:
        """What torch.save wrote there."""
        path = safe_path(self.directory, stretch.file)
        return Archive(path, stretch.begin, stretch.length)

    def described(self, wanted: Callable[[str], bool]) -> dict[str, DcpTensor]:
        """The tensors whose names are wanted, with all their rectangles found in the files.

        CorruptError where `.metadata` and a file disagree.
        """
        found = {}
        for name, (dtype, shape, sizes) in self.tensors.items():
            if wanted(name):
                self._require_sizes(name, shape, sizes)
                chunks = tuple(self._chunk(name, dtype, at, size) for at, size in sizes.items())
                found[name] = DcpTensor(dtype, shape, chunks)
        return found

    def _require_sizes(self, name: str, shape: Shape, sizes: Mapping[Shape, Shape]) -> None:
        """CorruptError for rectangles that lie outside of their tensor, or are more or less than it has."""
        inside = all(
            len(at) == len(size) == len(shape)
            and all(a >= 0 and s >= 0 and a + s <= n for a, s, n in zip(at, size, shape, strict=True))
            for at, size in sizes.items()
        )
        if not inside or sum(map(prod, sizes.values())) != prod(shape):
            what = "a tensor's pieces are not of the size that .metadata gives it"
            found = ", ".join(f"{list(size)} at {list(at)}" for at, size in list(sizes.items())[:4])
            place = self.directory / DCP_METADATA
            raise CorruptError(what, path=place, tensor=name, expected=list(shape), found=found or "no piece")

    def _chunk(self, name: str, dtype: str, at: Shape, size: Shape) -> DcpChunk:
        if (stretch := self.places.get((name, at))) is None:
            what = ".metadata does not say where a part of a tensor lies"
            raise CorruptError(what, path=self.directory / DCP_METADATA, tensor=name, found=f"nothing for {list(at)}")
        archive = self.archive(stretch)
        has_dtype, shape, begin = archive.place(name, archive.load({}))
        if (has_dtype, shape) != (dtype, size):
            expected, there = f"{dtype} {list(size)}", f"{has_dtype} {list(shape)}"
            what = "the archive is not what .metadata says"
            raise CorruptError(what, path=archive.path, tensor=name, expected=expected, found=there)
        unique = f"{name}#{','.join(map(str, at))}"
        return DcpChunk(at, TensorInfo(unique, dtype, shape, str(archive.path), begin, begin + nbytes(dtype, shape)))


def read_listing(directory: Path) -> DcpListing:
    """What `.metadata` says. UnsafeError where the pickle names anything but torch's and Megatron's own classes."""
    path = safe_path(directory, DCP_METADATA)
    metadata = read_pickled(read_bytes(path), _CLASSES, path)
    try:
        return _listed(directory, metadata)
    except TpshardError:
        raise
    except Exception as error:  # of another structure than torch's it fails in every way
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CorruptError("not the metadata of a distributed checkpoint", path=path, found=reason) from None


def _listed(directory: Path, metadata: Built) -> DcpListing:
    tensors: dict[str, tuple[str, Shape, dict[Shape, Shape]]] = {}
    objects: dict[str, DcpPlace] = {}
    places: dict[tuple[str, Shape], DcpPlace] = {}
    for name, each in metadata.fields["state_dict_metadata"].items():
        if "chunks" in each.fields:
            chunks = {_sizes(c.fields["offsets"]): _sizes(c.fields["sizes"]) for c in each.fields["chunks"]}
            properties = each.fields["properties"]
            dtype = properties.fields["state"][0] if "state" in properties.fields else properties.fields["dtype"]
            tensors[name] = _dtype(dtype), _sizes(each.fields["size"]), chunks
    for index, place in metadata.fields["storage_data"].items():
        file, begin, length = (place.fields[key] for key in ("relative_path", "offset", "length"))
        if Path(file).name != file or begin < 0 or length < 0:
            what = ".metadata puts a tensor outside of the checkpoint's files"
            raise CorruptError(what, path=directory / DCP_METADATA, tensor=index.fields["fqn"], found=file)
        name, offset, stretch = index.fields["fqn"], index.get("offset"), DcpPlace(file, int(begin), int(length))
        if name in tensors:
            places[name, _sizes(offset)] = stretch
        else:
            objects[name] = stretch
    return DcpListing(directory, tensors, places, objects)


def _sizes(values: Any) -> Shape:
    return tuple(int(value) for value in values)


def _dtype(value: Any) -> str:
    """The dtype of safetensors for a pickled one of torch; its own name for one that pickles have no storage for."""
    name = value.name
    return _DTYPES.get(name, str(name))
