"""Open a shard set: manifest, rank files, and what each stored tensor is; every contradiction is refused.

Everything is read from the manifest and the files' headers. The rules that made the set are not needed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpshard.checkpoint import MANIFEST, load_json, read_bytes, safe_path, side_paths
from tpshard.errors import CorruptError, UnsupportedError, UsageError
from tpshard.formats.native import FORMAT_VERSION, Options, _dump, rank_stem
from tpshard.header import TensorInfo, read_header
from tpshard.layout import Layout, LogicalTensor, Part, StoredTensor, whole
from tpshard.model import Model
from tpshard.planning import Placed
from tpshard.rules import Axis, Cut
from tpshard.writer import PARTIAL

_SAME = "copy it from where the rank files come from: it is the same on every host"
_REMAKE = "copy it again from where the rank's file comes from, or write the rank again"
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
                f"the shard set is not complete: rank {', '.join(map(str, missing))} missing, its files or its record",
                path=self.directory,
                expected=f"ranks 0 to {self.tp - 1}",
                found=f"{self.tp - len(missing)} of {self.tp}",
                hint=f"`tpshard split` with the same options, --ranks {','.join(map(str, missing))} and "
                f"-o {self.directory} writes what is missing",
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
        unfinished = directory.with_name(directory.name + PARTIAL)
        raise UsageError(
            "no such directory",
            path=directory,
            found=f"an unfinished run in {unfinished}" if unfinished.is_dir() else None,
            hint="give the directory that `tpshard split` wrote",
        )
    if not is_shard_set(directory):
        if not any(directory.glob("rank-*")):
            raise UsageError(
                f"not a shard set: no {MANIFEST} here",
                path=directory,
                hint="give the directory that `tpshard split` wrote; it takes an unsharded checkpoint",
            )
        raise CorruptError(
            f"{MANIFEST} is missing",
            path=directory,
            hint=_SAME,
        )
    path = safe_path(directory, MANIFEST)
    manifest = load_json(read_bytes(path), path)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is not int or version < 1 or manifest.get("format") != "tpshard":
        raise CorruptError("not a manifest of tpshard", path=path, expected='"format": "tpshard" and a format_version')
    if version > FORMAT_VERSION:
        raise UnsupportedError(
            f"the set was written by a newer tpshard ({manifest.get('tool')})",
            path=path,
            expected=f"format_version {FORMAT_VERSION} or below",
            found=version,
            hint="upgrade tpshard",
        )
    try:
        digest = _digest(manifest)
        if manifest.get("set") != digest:
            raise CorruptError(
                "the manifest was changed or is damaged: its set is not the digest of its content",
                path=path,
                expected=f"set {digest}",
                found=f"set {manifest.get('set')}",
                hint=_SAME,
            )
        model, options, layout = _parse(manifest)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CorruptError("the manifest is damaged", path=path, found=reason, hint=_SAME) from None
    names = sorted(entry.name for entry in directory.iterdir())
    files = _rank_files(directory, names, manifest["set"], options.tp)
    for rank, found in files.items():
        _check_tensors(rank, found, layout[rank])
    records = {rank: record for rank in files if (record := _record(directory, rank, options.tp, manifest["set"]))}
    return ShardSet(directory, manifest, model, options, layout, files, records, side_paths(directory, names))


def _digest(manifest: Mapping[str, Any]) -> str:
    """What `set` must be: a digest of all that follows from headers and options."""
    head = ("format", "format_version", "set", "tool")
    body = {key: value for key, value in manifest.items() if key not in head}
    return hashlib.sha256(_dump(body)).hexdigest()[:32]


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
        expected = {"set": set_id, "tp": str(width), "rank": str(rank), "part": str(part), "parts": str(parts)}
        wrong = [key for key, value in expected.items() if said.get(f"tpshard.{key}") != value]
        if "set" in wrong or width != tp:
            raise CorruptError(
                f"{name} is not of this set",
                path=path,
                expected=f"set {set_id}, tp {tp}",
                found=f"set {said.get('tpshard.set')}, tp {said.get('tpshard.tp')}",
                hint="keep one set in one directory",
            )
        if wrong:
            raise CorruptError(
                f"{name} does not hold what its name says",
                path=path,
                expected=f"{wrong[0]} {expected[wrong[0]]}",
                found=f"{wrong[0]} {said.get(f'tpshard.{wrong[0]}')}",
                hint="files may have been exchanged: give each the name that its content says",
            )
        files.setdefault(rank, []).append(RankFile(path, path.stat().st_size, header.tensors))
        parts_of[rank] = parts
    return {rank: tuple(found) for rank, found in files.items() if len(found) == parts_of[rank]}


def _check_tensors(rank: int, files: tuple[RankFile, ...], expected: tuple[StoredTensor, ...]) -> None:
    found: dict[str, TensorInfo] = {}
    for info in (info for file in files for info in file.tensors):
        if info.name in found:
            raise CorruptError(f"{info.name} is in two files of rank {rank}", path=info.file, tensor=info.name)
        found[info.name] = info
    for stored in expected:
        if stored.name not in found:
            raise CorruptError(
                f"rank {rank} lacks {stored.name}",
                path=files[0].path,
                tensor=stored.name,
                expected=f"{stored.dtype} {list(stored.shape)}",
            )
        info = found.pop(stored.name)
        if (info.dtype, info.shape) != (stored.dtype, stored.shape):
            raise CorruptError(
                f"rank {rank}: {stored.name} is not what the manifest says",
                path=info.file,
                tensor=stored.name,
                expected=f"{stored.dtype} {list(stored.shape)}",
                found=f"{info.dtype} {list(info.shape)}",
            )
    for name, info in found.items():
        raise CorruptError(f"rank {rank} holds {name}, which the manifest does not list", path=info.file, tensor=name)


def _record(directory: Path, rank: int, tp: int, set_id: str) -> Mapping[str, Any] | None:
    """A rank's record: None when there is none, CorruptError when it is not one of this set and rank."""
    name = f"{rank_stem(rank, tp)}.json"
    if not (directory / name).exists():
        return None
    path = safe_path(directory, name)
    record = load_json(read_bytes(path), path)
    if not isinstance(record, dict) or not isinstance(record.get("parts"), list):
        raise CorruptError("not a rank's record", path=path, expected="set, rank, tp and parts", hint=_REMAKE)
    for key, value in {"set": set_id, "rank": rank, "tp": tp}.items():
        if record.get(key) != value:
            raise CorruptError(
                "the record is of another set or rank",
                path=path,
                expected=f"{key} {value}",
                found=f"{key} {record.get(key)}",
                hint="keep one set in one directory; records may have been exchanged",
            )
    for part in record["parts"]:
        fields = part if isinstance(part, dict) else {}
        sha256 = fields.get("sha256", 0)
        whole_size = type(fields.get("size")) is int
        if not (isinstance(fields.get("file"), str) and whole_size and (sha256 is None or isinstance(sha256, str))):
            raise CorruptError(
                "the rank's record is damaged", path=path, expected="file, size and sha256", found=part, hint=_REMAKE
            )
    return record
