"""Open a shard set: manifest, rank files, and what each stored tensor is; every contradiction is refused.

Everything is read from the manifest and the files' headers. The rules that made the set are not needed.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tpshard.errors import CorruptError, UnsupportedError, UsageError
from tpshard.formats import FORMATS, format_of
from tpshard.formats.manifest import FORMAT_VERSION, digest_of
from tpshard.formats.split import Options, Split
from tpshard.formats.torch_archive import check_literals
from tpshard.inputs.recorded import SAME, parse
from tpshard.planning.join import Placed
from tpshard.planning.layout import Layout, StoredTensor
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.storage.carried import LeftOut, select
from tpshard.storage.foreign import recognised
from tpshard.storage.local import Directory, load_json, read_bytes, read_header, safe_path
from tpshard.storage.names import LOCK, MANIFEST, PARTIAL, SUMS
from tpshard.storage.safetensors import TensorInfo, nbytes
from tpshard.storage.source import RankFile

_ONE_SET = "keep one set in one directory"
_REMAKE = "copy it again from where the rank's file comes from, or write the rank again"


@dataclass(frozen=True)
class ShardSet:
    """A shard set on disk. files, records: by rank; a rank without a record is not complete.

    side_files: what travels with the weights, by name. left_out: what lies there and does not.
    made: small files that the directory does not have, but an ordinary checkpoint needs.
    """

    directory: Path
    manifest: Mapping[str, Any]
    split: Split
    files: Mapping[int, tuple[RankFile, ...]]
    records: Mapping[int, Mapping[str, Any]]
    side_files: Mapping[str, Path]
    left_out: tuple[LeftOut, ...] = ()
    made: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        """The unsharded model, as far as the set holds it."""
        return self.split.kept

    @property
    def options(self) -> Options:
        """What the set was made with."""
        return self.split.options

    @property
    def layout(self) -> Layout:
        """Every rank's stored tensors."""
        return self.split.layout

    @property
    def mesh(self) -> Mesh:
        """The ranks."""
        return self.options.mesh

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.mesh.size

    @property
    def recorded(self) -> dict[str, str]:
        """sha256 of the ranks' files by path, as far as it was recorded when they were written."""
        parts = (part for record in self.records.values() for part in record["parts"] if part["sha256"])
        return {str(self.directory / part["file"]): part["sha256"] for part in parts}

    def name_of(self, file: RankFile) -> str:
        """The name of a rank's file, with the folder that it lies in."""
        return file.path.relative_to(self.directory).as_posix()

    def missing(self) -> list[int]:
        """Ranks that are not there, or not complete."""
        return [rank for rank in range(self.size) if rank not in self.records]

    def require_complete(self) -> None:
        """CorruptError when a rank is missing."""
        if missing := self.missing():
            raise CorruptError(
                f"the shard set is not complete: rank {', '.join(map(str, missing))} missing, its files or its record",
                path=self.directory,
                expected=f"ranks 0 to {self.size - 1}",
                found=f"{self.size - len(missing)} of {self.size}",
                hint=_resume(self.directory) or f"{_again(self.directory, missing)} writes what is missing",
            )

    def placed(self) -> list[Placed]:
        """Every stored tensor of every rank, where it lies."""
        infos = [{info.name: info for file in self.files[rank] for info in file.tensors} for rank in range(self.size)]
        pairs = ((stored, of[stored.name]) for of, rank in zip(infos, self.layout, strict=True) for stored in rank)
        return [Placed(stored, info.file, info.begin) for stored, info in pairs]


def _again(directory: Path, ranks: Iterable[int]) -> str:
    return f"`tpshard split` with the same options, --ranks {','.join(map(str, ranks))} and -o {directory}"


def _resume(directory: Path) -> str | None:
    """The way out of a directory that a run has begun and not finished; None for another one."""
    if not (directory / LOCK).exists():
        return None
    out = str(directory).removesuffix(PARTIAL)
    return f"give the same `tpshard split` command again, with -o {out}: it goes on where the unfinished run stopped"


def is_shard_set(path: Path) -> bool:
    """Whether a directory says that it is a shard set."""
    return (path / MANIFEST).is_file()


def open_shards(directory: Path) -> ShardSet:
    """Open a shard set; CorruptError when files of another set or width, or a damaged one, are among its files."""
    if not directory.is_dir():
        unfinished = Path(f"{directory}{PARTIAL}")
        found = f"an unfinished run in {unfinished}" if unfinished.is_dir() else None
        hint = _resume(unfinished) or "give the directory that `tpshard split` wrote"
        raise UsageError("no such directory", path=directory, found=found, hint=hint)
    if not is_shard_set(directory):
        if not any(directory.glob("rank-*")):
            if error := recognised({entry.name for entry in directory.iterdir()}, directory, "a set of tpshard"):
                raise error
            hint = "give the directory that `tpshard split` wrote; it takes an unsharded checkpoint"
            missing = f"not a shard set: no {MANIFEST} here"
            raise UsageError(missing, path=directory, hint=_resume(directory) or hint)
        raise CorruptError(f"{MANIFEST} is missing", path=directory, hint=SAME)
    path = safe_path(directory, MANIFEST)
    raw = read_bytes(path)
    manifest = load_json(raw, path)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is not int or version < 1 or manifest.get("format") != "tpshard":
        raise CorruptError("not a manifest of tpshard", path=path, expected='"format": "tpshard" and a format_version')
    if version > FORMAT_VERSION:
        newer = f"the set was written by a newer tpshard ({manifest.get('tool')})"
        expected = f"format_version {FORMAT_VERSION} or below"
        raise UnsupportedError(newer, path=path, expected=expected, found=version, hint="upgrade tpshard")
    try:
        digest = digest_of(manifest)
        if manifest.get("set") != digest:
            what = "the manifest was changed or is damaged: its set is not the digest of its content"
            found = f"set {manifest.get('set')}"
            raise CorruptError(what, path=path, expected=f"set {digest}", found=found, hint=SAME)
        split = parse(manifest, raw, directory)
        _check_derived(directory, split)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CorruptError("the manifest is damaged", path=path, found=reason, hint=SAME) from None
    names = sorted(entry.name for entry in directory.iterdir())
    if (folder := split.format.folder) and (directory / folder).is_dir():
        names += sorted(entry.relative_to(directory).as_posix() for entry in (directory / folder).rglob("*"))
    files = _rank_files(directory, names, split)
    for rank, parts in files.items():
        _check_tensors(rank, parts, split.layout[rank])
    size = split.options.mesh.size
    records = {rank: record for rank in files if (record := _record(directory, rank, split))}
    ours = {MANIFEST, SUMS, *split.format.side_names, *(split.record_name(rank) for rank in range(size))}
    opened = ShardSet(directory, manifest, split, files, records, {})
    ours |= {opened.name_of(file) for parts in files.values() for file in parts}
    carried, left_out = beside(directory, ours)
    return replace(opened, side_files=carried, left_out=left_out)


def beside(directory: Path, ours: Collection[str]) -> tuple[dict[str, Path], tuple[LeftOut, ...]]:
    """The files of a set that travel with its weights, and those that do not. ours: names of the set's own."""
    selection = select(Directory(directory).listing(), ours, "the set")
    shown = (each for each in selection.left_out if each.file not in ours and each.file != LOCK)
    return {name: safe_path(directory, name) for name in selection.carried}, tuple(shown)


def _check_derived(directory: Path, split: Split) -> None:
    for name, data in split.format.derived(split).items():
        if read_bytes(safe_path(directory, name)) != data:
            raise CorruptError(f"{name} is not the one of this set", path=directory / name, hint=SAME)


def _rank_files(directory: Path, names: list[str], split: Split) -> dict[int, tuple[RankFile, ...]]:
    """The files of each rank that has all of its own."""
    files: dict[int, list[RankFile]] = {}
    parts_of: dict[int, int] = {}
    open_file = _open_container if split.format.container else _open_safetensors
    for name in names:
        numbers = split.format.place(name, split.options.mesh)
        if numbers is None:
            _refuse_other(directory, name, split)
            continue
        rank = split.options.mesh.rank(numbers.get("stage", 0), numbers["rank"])
        path = safe_path(directory, name)
        tensors, parts_of[rank] = open_file(path, {**numbers, "rank": rank}, split)
        files.setdefault(rank, []).append(RankFile(path, path.stat().st_size, tensors))
    return {rank: tuple(found) for rank, found in files.items() if len(found) == parts_of[rank]}


def _open_container(path: Path, numbers: Mapping[str, int], split: Split) -> tuple[tuple[TensorInfo, ...], int]:
    """The tensors of a file that is no safetensors file, and how many files its rank has.

    CorruptError when it is not of the set, or anything in it that is no tensor is not as written.
    """
    rank, size = numbers["rank"], split.options.mesh.size
    outputs = split.files(rank) if rank < size else ()
    output = next((output for output in outputs if path.as_posix().endswith(f"/{output.name}")), None)
    if output is None:
        expected = f"the files of ranks 0 to {size - 1}"
        raise CorruptError(f"{path.name} is no file of this set", path=path, expected=expected, hint=_ONE_SET)
    with _can_be_written_again(path, rank):
        check_literals(output, path)
    tensors = tuple(
        TensorInfo(of.name, of.dtype, of.shape, str(path), begin, begin + nbytes(of.dtype, of.shape))
        for of, _, begin in output.tensors
    )
    return tensors, len(outputs)


def _open_safetensors(path: Path, numbers: Mapping[str, int], split: Split) -> tuple[tuple[TensorInfo, ...], int]:
    """The tensors of a safetensors file, and how many files its rank has; CorruptError when it is not of the set."""
    mesh = split.options.mesh
    with _can_be_written_again(path, numbers["rank"]):
        header = read_header(path)
    said = {key.removeprefix("tpshard."): value for key, value in header.metadata.items() if key.startswith("tpshard.")}
    if said.get("set") != split.set_id or not _is_of(numbers, mesh):
        expected, found = f"set {split.set_id}, tp {mesh.tp}", f"set {said.get('set')}, tp {said.get('tp')}"
        raise CorruptError(f"{path.name} is not of this set", path=path, expected=expected, found=found, hint=_ONE_SET)
    for key in ("tp", "rank", "part", "parts"):
        value = mesh.tp if key == "tp" else numbers.get(key)
        if value is not None and said.get(key) != str(value):
            what, found = f"{path.name} does not hold what its name says", f"{key} {said.get(key)}"
            hint = "files may have been exchanged: give each the name that its content says"
            raise CorruptError(what, path=path, expected=f"{key} {value}", found=found, hint=hint)
    parts = said.get("parts", "")
    return header.tensors, int(parts) if parts.isdecimal() else 0


def _is_of(numbers: Mapping[str, int], mesh: Mesh) -> bool:
    """Whether a file's name is that of a rank of this mesh, as far as it says so."""
    return (numbers.get("ranks", mesh.tp), numbers.get("stages", mesh.pp)) == (mesh.tp, mesh.pp)


@contextmanager
def _can_be_written_again(path: Path, rank: int) -> Iterator[None]:
    try:
        yield
    except CorruptError as error:
        error.hint = f"{error.hint}; or remove it, and {_again(path.parent, [rank])} writes it again"
        raise


def _refuse_other(directory: Path, name: str, split: Split) -> None:
    """CorruptError for a rank file of another format: an engine would take it for one of this set."""
    for other in FORMATS:
        if other != split.options.format and format_of(other).parse_name(name) is not None:
            what, expected = f"{name} is a rank's file of another format", f"files of the format {split.options.format}"
            found = f"a name of the format {other}"
            raise CorruptError(what, path=directory / name, expected=expected, found=found, hint=_ONE_SET)


def _check_tensors(rank: int, files: tuple[RankFile, ...], expected: tuple[StoredTensor, ...]) -> None:
    found: dict[str, TensorInfo] = {}
    for info in (info for file in files for info in file.tensors):
        if info.name in found:
            raise CorruptError(f"{info.name} is in two files of rank {rank}", path=info.file, tensor=info.name)
        found[info.name] = info
    for stored in expected:
        held = found.pop(name := stored.name, None)
        if held and (held.dtype, held.shape) == (stored.dtype, stored.shape):
            continue
        listed = f"{stored.dtype} {list(stored.shape)}"
        if held is None:
            raise CorruptError(f"rank {rank} lacks {name}", path=files[0].path, tensor=name, expected=listed)
        what, has = f"rank {rank}: {name} is not what the manifest says", f"{held.dtype} {list(held.shape)}"
        raise CorruptError(what, path=held.file, tensor=name, expected=listed, found=has)
    for name, info in found.items():
        raise CorruptError(f"rank {rank} holds {name}, which the manifest does not list", path=info.file, tensor=name)


def _record(directory: Path, rank: int, split: Split) -> Mapping[str, Any] | None:
    """A rank's record: None when there is none, CorruptError when it is not one of this set and rank."""
    name = split.record_name(rank)
    if not (directory / name).exists():
        return None
    path = safe_path(directory, name)
    record = load_json(read_bytes(path), path)
    if not isinstance(record, dict) or not isinstance(record.get("parts"), list):
        raise CorruptError("not a rank's record", path=path, expected="set, rank, tp and parts", hint=_REMAKE)
    for key, value in {"set": split.set_id, "rank": rank, "tp": split.options.tp}.items():
        if (said := record.get(key)) != value:
            what, hint = "the record is of another set or rank", f"{_ONE_SET}; records may have been exchanged"
            raise CorruptError(what, path=path, expected=f"{key} {value}", found=f"{key} {said}", hint=hint)
    for part in record["parts"]:
        match part:
            case {"file": str(), "size": int() as size, "sha256": str() | None} if not isinstance(size, bool):
                continue
        damaged, expected = "the rank's record is damaged", "file, size and sha256"
        raise CorruptError(damaged, path=path, expected=expected, found=part, hint=_REMAKE)
    return record
