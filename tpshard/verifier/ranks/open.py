"""Shard sets and unsharded checkpoints on disk as weights that are read when they are needed, and no earlier."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tpshard.errors import CorruptError, UnsupportedError, UsageError
from tpshard.inputs.checkpoint import config_in, open_checkpoint
from tpshard.storage.local import load_json, read_bytes, read_header, read_range
from tpshard.storage.names import MANIFEST, record_name
from tpshard.storage.safetensors import TensorInfo
from tpshard.storage.torch_pickle import DTYPES, read_pickle
from tpshard.verifier.ranks.dcp import SHARDING, Chunk, Chunks, of_header, of_metadata
from tpshard.verifier.ranks.names import RankFiles, rank_files
from tpshard.verifier.ranks.stages import EMBEDDINGS, HEADS
from tpshard.verifier.ranks.weights import Borrowed, Weights, blocks, move, replaced
from tpshard.verifier.report.verdict import layer_of

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class FileWeights:
    """Tensors in files, read with positioned reads: nothing is mapped, and nothing kept.

    safetensors' own reader maps the file, so that all that was read of it counts as this process's memory until it is
    closed, and reads no torch archives.
    `cast` has the dtypes that floating tensors are rounded to first, of a source whose shards were cast when split.
    """

    dequantised: Collection[str] = ()
    """The tensors that are not stored as they are read here."""

    def __init__(self, infos: Iterable[TensorInfo], cast: Mapping[str, torch.dtype] | None = None) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self.cast = cast or {}
        for info in infos:
            if info.name in self.infos:
                other = self.infos[info.name].file
                raise CorruptError("a tensor is in two files", path=info.file, tensor=info.name, found=other)
            self.infos[info.name] = info

    def names(self) -> Collection[str]:
        return self.infos.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.infos[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's stored dtype."""
        return DTYPES[self.infos[name].dtype]

    @property
    def as_stored(self) -> "FileWeights":
        """The same tensors with the names and shapes that they have in their files."""
        return self

    @property
    def nbytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(info.nbytes for info in self.infos.values())

    def get(self, name: str) -> Tensor:
        info = self.infos[name]
        return self._read(info, info.begin, info.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        info = self.infos[name]
        width = info.nbytes // info.shape[0]
        return self._read(info, info.begin + start * width, (stop - start, *info.shape[1:]))

    def _read(self, info: TensorInfo, begin: int, shape: tuple[int, ...]) -> Tensor:
        dtype = DTYPES[info.dtype]
        length = torch.Size(shape).numel() * dtype.itemsize
        if not length:
            return torch.empty(shape, dtype=dtype)
        buffer = read_range(info.file, begin, begin + length)
        if len(buffer) < length:
            raise CorruptError("the file ends within a tensor", path=info.file, tensor=info.name)
        tensor = torch.frombuffer(buffer, dtype=dtype).view(shape)
        return tensor.to(self.cast.get(info.name, dtype)) if dtype in FLOATS else tensor


CASTS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What `--dtype` casts to, by the names that a manifest has for what is stored."""


@dataclass(frozen=True)
class RankSet:
    """A directory of rank files: the ranks in order, the config, and the dtypes that the manifest says of a cast set.

    The ranks have the names and shapes of their files, which `translate.translated` turns into the source's; it keeps
    them in `stored`. `chunks` are the rectangles in each rank's files, of a format that has them; `said` are the
    places that headers of other files state as well, for torch. `cast_name` names what a set was cast to. `stages` are
    the layers of each stage as the manifest has them, `on_stages` the stages that have a rank's tensors, and `copies`
    the tensors that two stages have; none where there is one stage. `aside` has the tensors of which it is known what
    ranks hold, though nobody runs them: ranges of so many equal parts of each.
    """

    directory: Path
    config: Mapping[str, Any]
    ranks: tuple[FileWeights, ...]
    cast: Mapping[str, torch.dtype] | None = None
    cast_name: str | None = None
    warnings: tuple[str, ...] = ()
    format: str = "native"
    stored: tuple[FileWeights, ...] = ()
    chunks: tuple[Chunks, ...] = ()
    said: tuple[Chunks, ...] = ()
    stages: tuple[tuple[int, int], ...] = ()
    on_stages: tuple[Mapping[str, tuple[int, ...]], ...] = ()
    copies: tuple[tuple[TensorInfo, TensorInfo], ...] = ()
    aside: Mapping[str, int] = field(default_factory=dict)


def _json(path: Path) -> Any:
    return load_json(read_bytes(path), path)


def open_shards(directory: Path) -> RankSet:
    """Open a shard set by reading headers alone.

    Ranks missing, of several widths, or files that cannot be parsed are CorruptErrors. What merely differs from the
    record (a size, a file that says it is another rank) is a warning: tensors are judged here, not files.
    """
    if not directory.is_dir():
        raise UsageError("no such directory of shards", path=directory, hint="make one with `tpshard split`")
    files = rank_files(directory)
    tp = files.tp
    manifest = _json(directory / MANIFEST) if (directory / MANIFEST).exists() else {}
    if (recorded := _said(manifest, "mesh", "tp", tp)) != tp:
        message = f"{MANIFEST} and the rank files disagree"
        raise CorruptError(message, path=directory, expected=f"tp {recorded}", found=f"tp {tp}")
    warnings: list[str] = []
    listed = of_metadata(directory) if files.format == "dcp" else {}
    config = config_in(directory)
    tied = isinstance(config, dict) and config.get("tie_word_embeddings") is True
    opened = [_open_rank(directory, files, rank, listed, warnings, tied) for rank in range(tp)]
    pp = len(files.ranks[0])
    return RankSet(
        directory=directory,
        config=config,
        ranks=tuple(each.weights for each in opened),
        cast=_casts(manifest, directory),
        cast_name=_said(manifest, "options", "dtype", None),
        warnings=tuple(warnings),
        format=files.format,
        chunks=tuple(each.chunks for each in opened) if files.format.startswith("dcp") else (),
        said=tuple(each.said for each in opened),
        stages=_stages(manifest, pp) if pp > 1 else (),
        on_stages=tuple(each.on_stages for each in opened),
        copies=tuple(copy for each in opened for copy in each.copies),
    )


class _OpenedRank(NamedTuple):
    """What the files of one rank hold; see `RankSet`."""

    weights: FileWeights
    chunks: Chunks
    said: Chunks
    on_stages: Mapping[str, tuple[int, ...]]
    copies: Sequence[tuple[TensorInfo, TensorInfo]]


def _stages(manifest: Any, pp: int) -> tuple[tuple[int, int], ...]:
    """The layers of each stage, as the manifest says them; CorruptError where it does not."""
    try:
        found = tuple((int(first), int(last)) for first, last in manifest["stages"])
    except (KeyError, TypeError, ValueError):
        found = ()
    if len(found) != pp:
        expected = f"`stages`, the layers of each of {pp}"
        raise CorruptError(f"{MANIFEST} does not say which layers the stages have", path=MANIFEST, expected=expected)
    return found


def _said(manifest: Any, part: str, key: str, default: Any) -> Any:
    """What a manifest says, which may be anything; the default where it says nothing."""
    inner = manifest.get(part, {}) if isinstance(manifest, dict) else None
    if not isinstance(inner, dict):
        expected, found = f"an object {part!r}", repr(inner)[:80]
        raise CorruptError(f"{MANIFEST} is damaged", path=MANIFEST, expected=expected, found=found)
    return inner.get(key, default)


def _casts(manifest: Any, directory: Path) -> Mapping[str, torch.dtype] | None:
    """The dtype of each floating tensor of a set that was cast when it was split; None of another one.

    That is what the source is rounded to: whoever says another dtype of a tensor than it has is found out.
    """
    name, known = _said(manifest, "options", "dtype", None), ("float64", "float32", "float16", "bfloat16")
    if name is None:
        return None
    if name not in known:
        raise CorruptError("not a dtype", path=directory / MANIFEST, expected=", ".join(known), found=repr(name))
    try:
        return {str(row["name"]): CASTS[row["dtype"]] for row in manifest["tensors"] if row["dtype"] in CASTS}
    except (KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        expected = "tensors with name and dtype"
        path = directory / MANIFEST
        raise CorruptError(f"{MANIFEST} is damaged", path=path, expected=expected, found=found) from None


def _open_rank(
    directory: Path,
    files: RankFiles,
    rank: int,
    listed: Mapping[str, list[Chunk]],
    warnings: list[str],
    tied: bool,
) -> _OpenedRank:
    chunks: list[Chunk] = []
    said: list[Chunk] = []
    held: dict[str, list[tuple[int, TensorInfo]]] = {}
    for stage, name in ((stage, name) for stage, names in enumerate(files.ranks[rank]) for name in names):
        path = directory / name
        if files.format == "dcp":
            chunks += listed.get(name, [])
            continue
        header = read_pickle(path, name)[0] if files.format == "meta" else read_header(path)
        if files.format == "dcp-hf":
            chunks += of_header(header, path)
        else:
            for info in header.tensors:
                held.setdefault(info.name, []).append((stage, info))
            said += of_header(header, path) if SHARDING in header.metadata else ()
        for key, number in (("rank", stage * files.tp + rank), ("tp", files.tp)):
            if (stated := header.metadata.get(f"tpshard.{key}", str(number))) != str(number):
                warnings.append(f"{name} says that it is of {key} {stated}")
    pp = len(files.ranks[rank])
    if tied and files.format == "vllm" and pp > 1:
        _as_one(held)
    records = [directory / record_name(stage * files.tp + rank, files.tp, pp) for stage in range(pp)]
    sizes = {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}
    for file, size in (each for record in records if record.exists() for each in _recorded(record)):
        if sizes.get(file, size) != size:
            warnings.append(f"{file} has {sizes[file]} bytes, its record says {size}")
    named = _numbered(chunks)
    weights = FileWeights([*_of_first_stage(held), *(chunk.info for each in named.values() for chunk in each)])
    copies = [(each[0][1], info) for each in held.values() for _, info in each[1:]]
    on = {name: tuple(stage for stage, _ in each) for name, each in held.items()} if pp > 1 else {}
    return _OpenedRank(weights, named, _numbered(said), on, copies)


def _as_one(held: dict[str, list[tuple[int, TensorInfo]]]) -> None:
    """Take a head that vLLM has on the last stage, where the embedding on the first is the head too, for a copy of it.

    Its files of one stage then have the one under the head's name.
    """
    embedding = next((name for name in held if name.endswith(EMBEDDINGS)), None)
    head = next((name for name in held if name.endswith(HEADS)), None)
    if embedding and head:
        held[embedding] += held.pop(head)


def _of_first_stage(held: Mapping[str, Sequence[tuple[int, TensorInfo]]]) -> Iterator[TensorInfo]:
    """Each tensor once; all of those that one stage has in two files, which `FileWeights` refuses."""
    for each in held.values():
        first = each[0][0]
        yield from (info for stage, info in each if stage == first)


def _recorded(record: Path) -> list[tuple[str, int]]:
    """The files of a rank's record with their sizes."""
    said = _json(record)
    try:
        return [(str(part["file"]), int(part["size"])) for part in said.get("parts", [])]
    except (AttributeError, TypeError, KeyError, ValueError, OverflowError):
        expected, hint = "parts with file and size", "copy it again from where the rank's file comes from"
        raise CorruptError("not a rank's record", path=record, expected=expected, hint=hint) from None


def _numbered(chunks: Iterable[Chunk]) -> Chunks:
    """Rectangles by their tensor; where a rank has several of one, each has a name of its own."""
    found: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        found.setdefault(chunk.info.name, []).append(chunk)
    for name, each in found.items():
        if len(each) > 1:
            found[name] = [Chunk(chunk.at, replace(chunk.info, name=f"{name}#{i}")) for i, chunk in enumerate(each)]
    return found


def parameters(weights: Weights) -> list[str]:
    """The names of weights and biases; masks and frequencies, which some files carry as well, are left out."""
    return [n for n in weights.names() if n.endswith((".weight", ".bias")) and len(weights.shape(n)) in (1, 2)]


def require_floats(weights: FileWeights, names: Iterable[str]) -> None:
    """UnsupportedError for the first of the named tensors that is not of a floating-point dtype."""
    for name in names:
        if weights.dtype(name) not in FLOATS:
            info = weights.infos[name]
            message, expected = "verify computes with floating-point weights only", "F64, F32, F16 or BF16"
            raise UnsupportedError(message, path=info.file, tensor=name, expected=expected, found=info.dtype)


def open_source(
    model: Path,
    *,
    cast: Mapping[str, torch.dtype] | None = None,
    allow_pickle: bool = False,
    follow_symlinks: bool = False,
) -> tuple[Any, FileWeights]:
    """Config and weights of an unsharded checkpoint, rounded to `cast` where the shards were."""
    checkpoint = open_checkpoint(model, allow_pickle=allow_pickle, follow_symlinks=follow_symlinks)
    return checkpoint.config, FileWeights(checkpoint.tensors, cast)


def main_dtype(weights: FileWeights, names: Iterable[str]) -> torch.dtype:
    """The dtype of most of the named tensors, as far as they are stored as they are read."""
    every = list(names)
    stored = [name for name in every if name not in weights.dequantised] or every
    return Counter(weights.dtype(name) for name in stored).most_common(1)[0][0]


def needed(weights: FileWeights, layers: Collection[int]) -> list[str]:
    """The parameters of these layers, and all that are outside of layers."""
    return [name for name in parameters(weights) if layer_of(name) is None or layer_of(name) in layers]


def elements(weights: FileWeights, names: Iterable[str]) -> int:
    """Elements of the named tensors together."""
    return sum(torch.Size(weights.shape(name)).numel() for name in names)


def not_finite(weights: FileWeights, names: Iterable[str], block_bytes: int = 1 << 24) -> tuple[str, str] | None:
    """The first of the named tensors, and its file, that holds NaN or Inf; read in blocks."""
    for name in names:
        info = weights.infos[name]
        step = max(1, block_bytes * info.shape[0] // max(1, info.nbytes)) if info.shape else 1
        if not all(map(_is_finite, blocks(weights, name, step))):
            return name, info.file
    return None


def _is_finite(block: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor Inf: both show in the extremes, found 30 times as fast as by isfinite."""
    return not block.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(block))


def resident(
    weights: FileWeights, dtype: torch.dtype | None, device: torch.device, names: Iterable[str] | None = None
) -> Borrowed:
    """The named tensors (all weights and biases) on a device, in one dtype (None: as stored); others stay in files."""
    chosen = parameters(weights) if names is None else names
    return replaced(weights, {name: move(weights.get(name), device, dtype) for name in chosen})
