"""Judge a shard set: recorded checksums, or every byte against the source."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from tpshard.api.beside import written_beside
from tpshard.api.check_megatron import as_found
from tpshard.api.options import CheckOptions
from tpshard.api.progress import followed
from tpshard.errors import CorruptError, DifferentError, UsageError
from tpshard.execute.publish import Settings
from tpshard.execute.run import Comparer, Convert, Loader, conversion, run
from tpshard.formats.plan import plan_split
from tpshard.formats.split import Split
from tpshard.inputs.checkpoint import open_checkpoint
from tpshard.inputs.model import from_checkpoint, placed_in
from tpshard.inputs.open import open_set
from tpshard.inputs.shard_set import ShardSet, is_shard_set
from tpshard.planning.join import OutputFile, Placed, Transfer, join
from tpshard.report.results import CheckReport, Difference
from tpshard.storage.checksums import read_sums
from tpshard.storage.files import Handles
from tpshard.storage.json_differences import KeyDifference, key_differences
from tpshard.storage.local import Content, content_of, load_json, read_bytes, read_range, safe_path
from tpshard.storage.names import CONFIG, MANIFEST, SUMS, is_megatron
from tpshard.storage.pool import Pool
from tpshard.storage.safetensors import DTYPE_BITS, TensorInfo
from tpshard.storage.source import RankFile

_CHANGED = (
    f"copy the file again from where the set comes from, or split again; if it was changed on purpose, remove {SUMS}"
)


def check_records(shards: ShardSet, settings: Settings) -> tuple[list[Difference], list[str]]:
    """Files against their records: size and sha256. Returns the differences and what could not be judged."""
    work, notes = list[tuple[str, str, int]](), []
    for rank, record in sorted(shards.records.items()):
        listed = {part["file"]: part for part in record["parts"]}
        for file in shards.files[rank]:
            part = listed.pop(name := shards.name_of(file), None)
            if part is None or part["size"] != file.size:
                expected = "not recorded" if part is None else part["size"]
                message = f"{name} does not have its recorded size"
                raise CorruptError(message, path=file.path, expected=expected, found=file.size)
            if part["sha256"] is None:
                notes.append(f"{name} was not compared beyond its header: it has no recorded checksum")
            else:
                work.append((str(file.path), part["sha256"], file.size))
        if listed:
            raise CorruptError(f"{next(iter(listed))} is recorded but not there", path=shards.directory)
    settings.start(sum(size for _, _, size in work))
    pool, reader = Pool(settings.workers), Handles(settings.files)

    def judge(item: tuple[str, str, int]) -> Difference | None:
        path, expected, size = item
        buffer = memoryview(bytearray(1 << 20))
        digest = hashlib.sha256()
        for offset in range(0, size, len(buffer)):
            if pool.stopped.is_set():
                return None
            chunk = buffer[: min(len(buffer), size - offset)]
            reader.read_into(path, [chunk], offset)
            digest.update(chunk)
            settings.progress(len(chunk))
        if digest.hexdigest() == expected:
            return None
        message = f"sha256 is {digest.hexdigest()}, recorded is {expected}"
        return Difference(path.rpartition("/")[2], None, message)

    try:
        differences = [difference for difference in pool.map(judge, work) if difference is not None]
    finally:
        reader.close()
    return sorted(differences, key=lambda d: d.file), notes


def read_listed(shards: ShardSet) -> Mapping[str, str] | None:
    """sha256 by name, as SHA256SUMS has it; None of a set without one."""
    if not all((shards.directory / name).is_file() for name in (SUMS, MANIFEST)):
        return None
    path = safe_path(shards.directory, SUMS)
    try:
        return read_sums(read_bytes(path))
    except ValueError as error:
        bad = repr(str(error))
        raise CorruptError(f"{SUMS} is damaged", path=path, expected="HEX  NAME", found=bad, hint=_CHANGED) from None


def check_sums(shards: ShardSet, listed: Mapping[str, str]) -> None:
    """The small files against SHA256SUMS; and the records' checksums, which it repeats.

    CorruptError when it and a file contradict each other.
    """
    directory = shards.directory
    weights = {part["file"]: part["sha256"] for record in shards.records.values() for part in record["parts"]}
    needed = [MANIFEST]
    if lists_records(shards, listed):
        recorded = (name for name, digest in weights.items() if digest is not None)
        needed = [*recorded, *(shards.split.record_name(rank) for rank in shards.records), MANIFEST]
    for name in needed:
        if name not in listed:
            raise CorruptError(f"{SUMS} does not list {name}", path=directory / SUMS, hint=_CHANGED)
    for name, expected in listed.items():
        there = directory / name
        if name not in weights and not there.is_file():
            raise CorruptError(f"{name} is listed in {SUMS} but is not there", path=there, hint=_CHANGED)
        found = weights[name] if name in weights else hashlib.sha256(read_bytes(safe_path(directory, name))).hexdigest()
        if found not in (expected, None):  # None: the record has no checksum, which is said elsewhere
            what = f"the record and {SUMS} disagree about {name}" if name in weights else f"{name} was changed"
            raise CorruptError(what, path=there, expected=f"sha256 {expected}", found=f"sha256 {found}", hint=_CHANGED)


def lists_records(shards: ShardSet, listed: Mapping[str, str] | None) -> bool:
    """Whether SHA256SUMS is that of a whole output: where several hosts wrote, it has the small files alone."""
    return listed is not None and any(shards.split.record_name(rank) in listed for rank in range(shards.size))


def check_framing(shards: ShardSet, expected: Split) -> list[Difference]:
    """All bytes of the ranks' files that are no tensor's (headers, pickles, directories of archives), made anew."""
    differences = []
    for rank, files in sorted(shards.files.items()):
        there = {shards.name_of(file): file for file in files}
        for output in expected.files(rank):
            if (file := there.pop(output.name, None)) is None:
                differences.append(Difference(output.name, None, "the file is not there"))
            elif (at := _first_other(file, output)) is not None:
                message = f"the bytes around the tensors are not those that split writes, first at byte {at:,}"
                differences.append(Difference(output.name, None, message))
        differences += [Difference(name, None, "split writes no such file") for name in there]
    return differences


def _first_other(file: RankFile, output: OutputFile) -> int | None:
    """The first byte outside of all tensors at which a file is another than it must be."""
    for offset, data in ((0, output.header), *output.literals):
        found = read_range(file.path, offset, offset + len(data))
        if found != data:
            return offset + _first_difference(found, data)
    return None if file.size == output.size else min(file.size, output.size)


def _first_difference(one: bytes | bytearray, other: bytes) -> int:
    """Where two texts that are not equal part."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def check_beside(shards: ShardSet, expected: Mapping[str, Content]) -> tuple[list[Difference], list[str]]:
    """The small files against those that a split of the source writes: config.json key by key, others whole.

    Returns the differences and what is not there: an earlier version may have left it out.
    """
    differences, absent = [], []
    for name, content in expected.items():
        path, data = shards.directory / name, content_of(content)
        if not path.is_file():
            if name == CONFIG:
                differences.append(Difference(name, None, "the file is not there"))
            else:
                absent.append(f"{name} of the source is not there")
        elif (found := read_bytes(safe_path(shards.directory, name))) != data:
            changed = [str(each) for each in _changed_keys(path, data, found)] if name == CONFIG else []
            whole = f"not what split writes for this source, first at byte {_first_difference(found, data):,}"
            messages = changed or [whole]
            differences += [Difference(name, None, message) for message in messages]
    return differences, absent


def _changed_keys(path: Path, expected: bytes, found: bytes) -> Iterable[KeyDifference]:
    ours, theirs = load_json(expected, path), load_json(found, path)
    return key_differences(ours, theirs) if isinstance(theirs, dict) else ()


def check_source(
    shards: ShardSet,
    expected: Split,
    sources: Sequence[Placed],
    convert: Convert | None,
    settings: Settings,
    *,
    padding: bool = True,
) -> list[Difference]:
    """Every byte of every rank against the source, by rules evaluated anew; the manifest's boxes are not used.

    padding: whether it must be what tpshard writes there. Returns the differences, one for each tensor and file.
    """
    differences, outputs = [], []
    for rank in range(shards.size):
        infos = {info.name: info for file in shards.files[rank] for info in file.tensors}
        placed = []
        for stored in expected.layout[rank]:
            info = infos.pop(stored.name, None)
            if info is None:
                differences.append(Difference(f"rank {rank}", stored.name, "the tensor is not there"))
            elif (info.dtype, info.shape) != (stored.dtype, stored.shape):
                message = f"expected {stored.dtype} {list(stored.shape)}, found {info.dtype} {list(info.shape)}"
                differences.append(Difference(info.file.rpartition("/")[2], stored.name, message))
            else:
                placed.append(Placed(stored, info.file, info.begin))
        for name in infos:
            differences.append(Difference(f"rank {rank}", name, "the source has no such tensor"))
        outputs.append(OutputFile(f"rank {rank}", b"", 0, tuple(placed)))
    plan = join(expected.kept.tensors, sources, outputs)
    steps = [step for step in plan.steps if padding or isinstance(step, Transfer)]
    settings.start(sum(step.nbytes for step in steps))
    reader = Handles(settings.files)
    comparer = Comparer(reader, settings.progress)
    run(steps, Loader(reader, convert), comparer, workers=settings.workers)
    held = {str(file.path): file.tensors for files in shards.files.values() for file in files}
    for (source, file), offset in sorted(comparer.differences.items()):
        info = next(info for info in held[file] if info.begin <= offset < info.begin + info.nbytes)
        message = f"differs from the source, first at element {_element(info, offset)} (byte {offset:,} of the file)"
        if source != info.name:
            message += f", which is of {source}"
        differences.append(Difference(file.rpartition("/")[2], info.name, message))
    return differences


def _element(info: TensorInfo, offset: int) -> list[int]:
    """The index of the element that holds a byte of the file."""
    import numpy

    flat = (offset - info.begin) * 8 // DTYPE_BITS[info.dtype]
    return [int(i) for i in numpy.unravel_index(flat, info.shape)]


def check(
    shards: str | Path,
    source: str | Path | None = None,
    *,
    tp: int | None = None,
    revision: str | None = None,
    rules: str | Path | None = None,
    allow_pickle: bool = False,
    follow_symlinks: bool = False,
    settings: Settings | None = None,
    progress: bool = False,
) -> CheckReport:
    """Check a shard set: all ranks there and of one set, checksums; with a source, every byte against it.

    Small files are compared with SHA256SUMS where the set has one.

    tp: the width, in ranks of a stage, that the set must have; DifferentError for another one. revision, rules,
    allow_pickle, follow_symlinks: of the source, as in `plan`. A judged difference is in the report, not raised; a set
    that cannot be judged raises.
    """
    with followed("check", settings, progress) as how:
        return check_with(CheckOptions(shards, source, tp, revision, rules, allow_pickle, how, follow_symlinks))


def check_with(options: CheckOptions) -> CheckReport:
    """Check as the options ask for it."""
    foreign = not is_shard_set(Path(options.shards)) and is_megatron(Path(options.shards))
    if foreign and options.source is None:
        what, hint = "files that Megatron wrote have no checksums", "compare them with the model: --source MODEL"
        raise UsageError(what, path=options.shards, expected="a set that tpshard wrote", hint=hint)
    found = open_set(Path(options.shards), options.allow_pickle)
    if options.tp not in (None, found.mesh.tp):
        here, wanted = f"tp {found.mesh.tp}", f"tp {options.tp}"
        message = f"the shard set is for {here}, not {wanted}"
        hint = f"`tpshard reshard {found.directory} --tp {options.tp}` makes one"
        raise DifferentError(message, path=found.directory, expected=wanted, found=here, hint=hint)
    found.require_complete()
    listed, ours = read_listed(found), is_shard_set(found.directory)
    if listed is not None:
        check_sums(found, listed)
    why = f"there is no {SUMS}" if listed is None else f"it is not listed in {SUMS}"
    unjudged = {name: f"{name} was not compared: {why}" for name in found.side_files if ours}
    unjudged = {name: note for name, note in unjudged.items() if name not in (listed or ())}
    if options.source is None:
        differences, unchecked = check_records(found, options.settings)
        if ours:
            differences = check_framing(found, found.split) + differences
        return CheckReport(found, None, differences, [*unjudged.values(), *unchecked])
    how = {"allow_pickle": options.allow_pickle, "follow_symlinks": options.follow_symlinks}
    checkpoint = open_checkpoint(options.source, options.revision, **how)
    model = from_checkpoint(checkpoint, options.rules, found.model.dtype, cast_all=found.model.cast_all)
    planned, differences = as_found(found, model) if foreign else (plan_split(model, found.options), [])
    placed = placed_in(checkpoint, model)
    convert = conversion((place.stored for place in placed), chain.from_iterable(planned.layout))
    absent = list[str]()
    if not differences:
        differences = check_source(found, planned, placed, convert, options.settings, padding=not foreign)
    if ours:
        # The name of the set is a digest of the source's name as well, which may have changed since.
        framing = check_framing(found, replace(planned, recorded=found.split.recorded))
        expected = written_beside(planned, checkpoint)
        beside, absent = check_beside(found, expected)
        unjudged = {name: note for name, note in unjudged.items() if name not in expected}
        differences += framing + beside
        if not lists_records(found, listed):  # nothing else says that the checksums in the records are right
            quiet = replace(options.settings, start=lambda total: None, progress=lambda count: None)
            differences += check_records(found, quiet)[0]
    return CheckReport(found, checkpoint.name, differences, [*unjudged.values(), *absent], checkpoint.warnings)
