"""Open a shard set: manifest, rank files, and what each stored tensor is; every contradiction is refused.

Everything is read from the manifest and the files' headers. The rules that made the set are not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpshard.checkpoint import MANIFEST, load_json, safe_path, side_files
from tpshard.errors import CorruptError, LocalIOError, UnsupportedError, UsageError
from tpshard.formats.native import FORMAT_VERSION, Options, rank_stem
from tpshard.header import TensorInfo, read_header
from tpshard.layout import Layout, LogicalTensor, Part, StoredTensor, whole
from tpshard.model import Model
from tpshard.planning import Placed
from tpshard.rules import Axis, Cut

_RANK_FILE = re.compile(r"rank-(\d{5})-of-(\d{5})(?:-part-(\d{5})-of-(\d{5}))?\.safetensors")


@dataclass(frozen=True)
class RankFile:
    """One file of a rank, as its header describes it."""

    path: Path
    size: int
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class ShardSet:
    """A shard set on disk. files, records: by rank; a rank without a record is not complete."""

    directory: Path
    manifest: Mapping[str, Any]
    model: Model
    options: Options
    layout: Layout
    files: Mapping[int, tuple[RankFile, ...]]
    records: Mapping[int, Mapping[str, Any]]
    side_files: tuple[Path, ...]

    @property
    def tp(self) -> int:
        """The number of ranks."""
        return self.options.tp

    def missing(self) -> list[int]:
        """Ranks that are not there, or not complete."""
        return [rank for rank in range(self.tp) if rank not in self.records]

    def require_complete(self) -> None:
        """CorruptError when a rank is missing."""
        if missing := self.missing():
            raise CorruptError(
                f"the shard set is not complete: rank {', '.join(map(str, missing))} missing",
                path=self.directory,
                expected=f"ranks 0 to {self.tp - 1}",
                found=f"{self.tp - len(missing)} of {self.tp}",
                hint=f"write them with `tpshard split … --tp {self.tp} --ranks {','.join(map(str, missing))}`",
            )

    def placed(self) -> list[Placed]:
        """Every stored tensor of every rank, where it lies."""
        found = []
        for rank in range(self.tp):
            infos = {info.name: info for file in self.files[rank] for info in file.tensors}
            for stored in self.layout[rank]:
                info = infos[stored.name]
                found.append(Placed(stored, info.file, info.begin))
        return found


def is_shard_set(path: Path) -> bool:
    """Whether a directory says that it is a shard set."""
    return (path / MANIFEST).is_file()


def open_shards(directory: Path) -> ShardSet:
    """Open a shard set; CorruptError when files of another set or width, or a damaged one, are among its files."""
    if not directory.is_dir():
        raise UsageError("no such directory", path=directory, hint="give the directory that `tpshard split` wrote")
    if not is_shard_set(directory):
        ranks = sorted(name.name for name in directory.glob("rank-*"))
        raise CorruptError(
            f"no {MANIFEST} here: not a shard set",
            path=directory,
            found=", ".join(ranks[:3]) or None,
            hint="give the directory that `tpshard split` wrote",
        )
    path = directory / MANIFEST
    try:
        manifest = load_json(path.read_bytes(), path)
    except OSError as error:
        raise LocalIOError(f"cannot read: {error.strerror}", path=path) from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or manifest.get("format") != "tpshard":
        raise CorruptError(f"{MANIFEST} is not a manifest of tpshard", path=path)
    if version > FORMAT_VERSION:
        raise UnsupportedError(
            f"the set was written by a newer tpshard ({manifest.get('tool')})",
            path=path,
            expected=f"format_version {FORMAT_VERSION} or below",
            found=version,
            hint="upgrade tpshard",
        )
    try:
        model, options, layout = _parse(manifest)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CorruptError(f"the manifest is damaged: {type(error).__name__}: {error}", path=path) from None
    names = sorted(entry.name for entry in directory.iterdir())
    files = _rank_files(directory, names, manifest["set"], options.tp)
    for rank, found in files.items():
        _check_tensors(rank, found, layout[rank])
    records = {rank: record for rank in files if (record := _record(directory, rank, options.tp, manifest["set"]))}
    sides = tuple(directory / name for name in side_files(set(names)))
    return ShardSet(directory, manifest, model, options, layout, files, records, sides)


def _parse(manifest: Mapping[str, Any]) -> tuple[Model, Options, Layout]:
    tp = manifest["mesh"]["tp"]
    if manifest["mesh"] != {"tp": tp, "pp": 1, "ep": 1} or not isinstance(tp, int) or tp < 1:
        raise ValueError(f"mesh {manifest['mesh']}")
    chosen = manifest["options"]
    shares = chosen["shares"]
    options = Options(
        tp=tp,
        uneven=chosen["uneven"],
        shares=None if shares is None else tuple(shares),
        pad_vocab_to=chosen["pad_vocab_to"],
        max_file_size=chosen["max_file_size"],
    )
    tensors = []
    ranks: list[list[StoredTensor]] = [[] for _ in range(tp)]
    file_of = {}
    for entry in manifest["tensors"]:
        cut = Cut(entry["rule"], entry.get("dim"), tuple(entry.get("segments", ())), entry.get("interleave"))
        tensor = LogicalTensor(entry["name"], entry["dtype"], tuple(entry["shape"]), cut)
        tensors.append(tensor)
        file_of[tensor.name] = entry["file"]
        for rank in range(tp):
            ranks[rank].append(_stored(tensor, entry["ranks"][rank]) if "ranks" in entry else whole(tensor))
    model = Model(
        tensors=tuple(tensors),
        axes={name: Axis(**axis) for name, axis in manifest["axes"].items()},
        tied=manifest["tied"],
        file_of=file_of,
        source=manifest["source"],
        architecture=manifest["architecture"],
        dtype=chosen["dtype"],
    )
    return model, options, tuple(tuple(rank) for rank in ranks)


def _stored(tensor: LogicalTensor, entry: Mapping[str, Any]) -> StoredTensor:
    def box(sides: list[list[int]]) -> tuple[tuple[int, int], ...]:
        return tuple((start, stop) for start, stop in sides)

    parts = tuple(Part(tensor.name, box(part["box"]), tuple(part["at"])) for part in entry["parts"])
    fills = tuple(box(fill) for fill in entry.get("padding", ()))
    return StoredTensor(tensor.name, tensor.dtype, tuple(entry["shape"]), parts, fills)


def _rank_files(directory: Path, names: list[str], set_id: str, tp: int) -> dict[int, tuple[RankFile, ...]]:
    files: dict[int, list[RankFile]] = {}
    parts_of: dict[int, int] = {}
    for name in names:
        match = _RANK_FILE.fullmatch(name)
        if match is None:
            continue
        path = safe_path(directory, name)
        header = read_header(path)
        said = header.metadata
        rank, width, part, parts = (
            int(group or default) for group, default in zip(match.groups(), (0, 1, 0, 1), strict=True)
        )
        expected = {"set": set_id, "tp": str(tp), "rank": str(rank), "part": str(part), "parts": str(parts)}
        for key, value in expected.items():
            found = said.get(f"tpshard.{key}")
            if found != value or width != tp:
                raise CorruptError(
                    f"{name} is not of this set",
                    path=path,
                    expected=f"{key} {value}, tp {tp}",
                    found=f"{key} {found}, tp {width}",
                    hint="keep one set in one directory; two rank files may have been exchanged"
                    if key == "rank"
                    else "keep one set in one directory",
                )
        files.setdefault(rank, []).append(RankFile(path, path.stat().st_size, header.tensors))
        parts_of[rank] = parts
    return {rank: tuple(found) for rank, found in files.items() if len(found) == parts_of[rank]}


def _check_tensors(rank: int, files: tuple[RankFile, ...], expected: tuple[StoredTensor, ...]) -> None:
    found = {info.name: info for file in files for info in file.tensors}
    for stored in expected:
        info = found.pop(stored.name, None)
        if info is None:
            raise CorruptError(f"rank {rank} lacks {stored.name}", path=files[0].path, tensor=stored.name)
        if (info.dtype, info.shape) != (stored.dtype, stored.shape):
            raise CorruptError(
                f"rank {rank}: {stored.name} is not what the manifest says",
                path=info.file,
                tensor=stored.name,
                expected=f"{stored.dtype} {list(stored.shape)}",
                found=f"{info.dtype} {list(info.shape)}",
            )
    if found:
        raise CorruptError(
            f"rank {rank} holds {next(iter(found))}, which the manifest does not list", path=files[0].path
        )


def _record(directory: Path, rank: int, tp: int, set_id: str) -> Mapping[str, Any] | None:
    path = directory / f"{rank_stem(rank, tp)}.json"
    if not path.is_file():
        return None
    record = load_json(path.read_bytes(), path)
    if not isinstance(record, dict) or not isinstance(record.get("parts"), list):
        raise CorruptError("not a rank's record", path=path)
    if record.get("set") != set_id:
        raise CorruptError("the record is of another set", path=path, expected=set_id, found=record.get("set"))
    return record
