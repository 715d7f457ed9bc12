"""Give a finished output its place: staging directory, locks, free space, resume, and the last rename.

An output appears whole: it is written into `OUT.partial` and renamed. Only where several hosts write into one
directory (`--ranks`), or OUT cannot be renamed over, are files written into OUT itself, each complete before it gets
its name. SHA256SUMS lists the small files before any of them is written; a run that writes the whole of an output
replaces it at the end by one that lists the records too, and the weights where their checksums are recorded.
"""

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from tpshard.errors import (
    CorruptError,
    TargetError,
    TpshardError,
    UnsupportedError,
    UsageError,
    local_error,
)
from tpshard.execute.run import Convert, Progress
from tpshard.execute.target import (
    Ours,
    check_leftovers,
    check_shared,
    check_target,
    end_finished,
    folders_of,
    is_empty,
    named,
    names_in,
    no_room,
    only_in_place,
    remove_all,
    strangers,
)
from tpshard.execute.writer import Writer
from tpshard.planning.join import OutputFile, Plan, Transfer
from tpshard.storage.checksums import read_sums, sums
from tpshard.storage.files import Files, make_directory, require_space, sync_directory, unlink_if_there, write_small
from tpshard.storage.local import Content, content_of, content_size
from tpshard.storage.lock import Lock
from tpshard.storage.names import LOCK, MANIFEST, PARTIAL, REPLACED, SUMS, journal_path


@dataclass(frozen=True)
class Settings:
    """How to write: everything that does not change the bytes.

    workers: threads (default: one per core, at most 8). checksum: record sha256. fsync: wait for the disk, so that a
    power loss costs nothing. overwrite: replace an existing output once the new one is complete. start: called once
    with the bytes that are to be moved; progress: with the bytes moved since its last call, from any thread.
    """

    workers: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))
    checksum: bool = True
    fsync: bool = True
    overwrite: bool = False
    progress: Progress = lambda count: None
    start: Callable[[int], None] = lambda total: None
    files: Files = field(default_factory=Files)


@dataclass(frozen=True)
class Job:
    """What to write: the plan's files, small files beside them, and what says that a run is the same.

    records: small files that follow from the checksums, written last. claims: names of the locks.
    ours: whether some format gives its files such a name: only those are replaced with --overwrite.
    recorded: sha256 of the files that are read, by path, where it is known.
    sums: whether the output has SHA256SUMS.
    shared: the directory may be written by several runs at once, one per claim; each claim becomes a record, in order.
    """

    plan: Plan
    small: Mapping[str, Content]
    identity: Mapping[str, object]
    records: Callable[[Mapping[str, str | None]], Mapping[str, bytes]]
    convert: Convert | None = None
    sums: bool = True
    shared: bool = False
    claims: Sequence[str] = (LOCK,)
    verb: str = "split"
    ours: Ours = lambda name: False
    recorded: Mapping[str, str] = field(default_factory=dict)


def run_ids(job: Job, settings: Settings) -> dict[str, str]:
    """Names the run of each output file: the same source bytes, the same options that change bytes.

    One name a file, so that what a host began with --ranks 0,1 can be finished as --ranks 0 and --ranks 1.
    """
    inputs: dict[str, set[str]] = {output.name: set() for output in job.plan.outputs}
    for step in job.plan.steps:
        if isinstance(step, Transfer):
            for target in step.targets:
                inputs[target.file].update(region.file for region in (*step.sources, *step.replicas))
    states = {path: _state(path) for path in set[str]().union(*inputs.values())}
    return {
        output.name: _digest(
            {
                "verb": job.verb,
                "identity": dict(job.identity),
                "checksum": settings.checksum,
                "output": [output.name, output.size, _literals(output)],
                "sources": sorted(states[path] for path in inputs[output.name]),
            }
        )
        for output in job.plan.outputs
    }


def _literals(output: OutputFile) -> str:
    return sha256(b"".join([output.header, *(data for _, data in output.literals)])).hexdigest()


def _state(path: str) -> tuple[str, int, int]:
    """What tells that a source file is still the same."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise local_error(error, "cannot read", path) from error
    return os.path.realpath(path), status.st_size, status.st_mtime_ns


def _digest(value: object) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def publish(job: Job, out: Path, settings: Settings) -> dict[str, str | None]:
    """Write a job's files to `out`; sha256 by file name. TargetError when `out` is not ours to write."""
    out = named(out)
    old = _inode(out) if settings.overwrite else None
    try:
        return _publish(job, out, settings)
    except (TargetError, UsageError):
        raise
    except OSError as error:
        failure: TpshardError = local_error(error, "cannot write")
        failure.__cause__ = error
    except TpshardError as error:
        failure = error
    if old is not None and old == _inode(out):
        failure.hint = f"{failure.hint + '; ' if failure.hint else ''}the old {out.name} is untouched"
    raise failure


def _publish(job: Job, out: Path, settings: Settings) -> dict[str, str | None]:
    files, fsync = settings.files, settings.fsync
    if job.shared and settings.overwrite:
        raise UsageError(
            "--overwrite replaces a whole set: it does not go with --ranks", path=out, hint="remove it first"
        )
    in_place = job.shared or only_in_place(out)
    if not in_place:
        _check_target(job, out, settings)
    work = out if in_place else out.with_name(out.name + PARTIAL)
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise TargetError("the output exists and is not a directory", path=work, hint="give another with -o")
    if not in_place and work.exists() and not is_empty(work) and not (work / LOCK).exists():
        what = "no run of tpshard left this directory, which the output would grow in"
        raise TargetError(what, path=work, hint="move it away, or give another output with -o")
    made = make_directory(files, work, fsync=fsync)
    locks: list[Lock] = []
    with ExitStack() as stack:
        try:
            for claim in job.claims:
                locks.append(stack.enter_context(Lock(files, work / claim)))
            if not in_place:
                _check_target(job, out, settings)  # the run that had the lock before us may have finished
            runs = run_ids(job, settings)
            writer = _prepare(job, work, runs, settings)
        except TpshardError:
            _withdraw(job, work, files, locks, made)
            raise
        settings.start(job.plan.nbytes)
        # Hosts that share a directory write the same small files, each under temporary names of its own.
        tag = f".{job.claims[0].strip('.')}" if job.shared else ""
        listed = {name: sha256(content_of(content)).hexdigest() for name, content in job.small.items()}
        if (job.shared or in_place) and _is_listed(listed, work):
            # Kept: it may list the weights as well, and the records that make the output look whole may be there.
            unlink_if_there(files, work / f".{SUMS}{tag}.tmp")  # what a killed run of ours left of writing the same
        elif job.sums:
            write_small(files, work / SUMS, sums(listed, {}), fsync=fsync, tag=tag)
        for name, content in job.small.items():
            _write_beside(files, work, name, content_of(content), listed[name], fsync=fsync, tag=tag)
        for folder in _folders(job):
            make_directory(files, work / folder, fsync=fsync)
        try:
            digests = writer.write(job.convert, settings.workers)
        except (CorruptError, UnsupportedError) as error:
            if writer.discarded:
                if not job.shared:
                    remove_all(files, work, {SUMS, *job.small} & names_in(work))
                _withdraw(job, work, files, locks, made)
            else:
                _check_unchanged(job, settings, runs, error)
            raise
        _check_unchanged(job, settings, runs)
        if not in_place:
            _check_target(job, out, settings)  # who knows what was put there meanwhile
        records = job.records(digests)
        if job.sums and not job.shared:  # the records come after it: where all of them are, an output is complete
            records = {SUMS: sums({**digests, **listed}, records), **records}
        _finish(job, work, out, locks, writer, records, settings)
    return digests


def _check_unchanged(job: Job, settings: Settings, runs: Mapping[str, str], cause: Exception | None = None) -> None:
    """CorruptError when the source is not what it was when the run began; `cause` is what that made of the run."""
    if run_ids(job, settings) != runs:
        message = "the source was changed while it was read"
        raise CorruptError(message, hint="start anew when nothing writes to it any more") from cause


def _prepare(job: Job, work: Path, runs: Mapping[str, str], settings: Settings) -> Writer:
    """Refuse what must not be written, before the first byte."""
    files = settings.files
    if job.shared:
        check_shared(work, _expected(job), job.ours, content_of(job.small[MANIFEST]), runs, _records(job))
    else:
        check_leftovers(files, work, _expected(job), job.ours, runs, set(job.claims), overwrite=settings.overwrite)
    writer = Writer(
        job.plan,
        work,
        runs,
        files=files,
        checksum=settings.checksum,
        fsync=settings.fsync,
        progress=settings.progress,
        recorded=job.recorded,
    )
    needed = writer.remaining() + sum(map(content_size, job.small.values()))
    require_space(work, needed, hint=no_room(job.verb))
    if job.shared:  # a rank's files were lost: it is not complete, and its record says so until it is written again
        for name in _records(job):
            unlink_if_there(files, work / name)
    return writer


def _finish(
    job: Job,
    work: Path,
    out: Path,
    locks: Sequence[Lock],
    writer: Writer,
    records: Mapping[str, bytes],
    settings: Settings,
) -> None:
    """Write the records, and remove what a resumed run would need; then one rename makes the output, or a rank, whole.

    The journals stay until every byte of the records is on disk: a full disk costs no second copy.
    """
    files, fsync = settings.files, settings.fsync
    if job.shared:
        for lock, data in zip(locks, records.values(), strict=True):
            lock.write(data, fsync=fsync)
    else:
        for name, data in records.items():
            write_small(files, work / name, data, fsync=fsync)
            if fsync and name == SUMS and work == out:  # else the records may be on disk, and it not
                sync_directory(files, work)
    writer.remove_journals()
    if fsync:
        for folder in _folders(job):
            sync_directory(files, work / folder)
        sync_directory(files, work)
    if job.shared:
        for lock, name in zip(locks, records, strict=True):
            lock.rename(work / name)
    else:
        if work != out:
            _swap(job, work, out, settings)
            locks[0].path = out / LOCK  # held until here: no other run may begin in a directory that moves
        if settings.overwrite:
            _remove_replaced(job, files, out)
        locks[0].remove()
    if fsync:
        sync_directory(files, out)


def _withdraw(job: Job, work: Path, files: Files, locks: Sequence[Lock], made: bool) -> None:
    """Leave nothing behind of a run that was refused before it wrote anything, or of which nothing is kept."""
    with contextlib.suppress(OSError):  # another run has come in, or has just finished
        if job.shared or names_in(work) <= set(job.claims):
            for lock in locks:
                lock.remove()
        if made:
            files.rmdir(str(work))


def _is_listed(small: Mapping[str, str], work: Path) -> bool:
    """Whether a directory has a SHA256SUMS that lists these files, and maybe others: that of a whole output."""
    try:
        return small.items() <= read_sums((work / SUMS).read_bytes()).items()
    except (FileNotFoundError, ValueError):
        return False


def _write_beside(files: Files, work: Path, name: str, data: bytes, digest: str, *, fsync: bool, tag: str) -> None:
    """Write a small file, in folders of its own where its name has some."""
    if sha256(data).hexdigest() != digest:
        hint = "start anew when nothing writes to it any more"
        raise CorruptError(f"{name} was changed while it was read", path=name, hint=hint)
    path = work / name
    make_directory(files, path.parent, fsync=fsync)
    write_small(files, path, data, fsync=fsync, tag=tag)
    if fsync and "/" in name:
        sync_directory(files, path.parent)


def _folders(job: Job) -> list[str]:
    """The folders in which output files lie."""
    return sorted(folders_of(output.name for output in job.plan.outputs))


def _records(job: Job) -> Mapping[str, bytes]:
    """The records as they are planned: without checksums."""
    return job.records({output.name: None for output in job.plan.outputs})


def _expected(job: Job) -> set[str]:
    """Every name that a run of this job may have left in its directory."""
    finals = {output.name for output in job.plan.outputs}
    small = {SUMS, *job.small, *_records(job)}
    journals = {str(journal_path(Path(), name)) for name in finals}
    names = finals | {name + PARTIAL for name in finals} | journals | small | set(job.claims)
    temporary = {str(Path(name).with_name(f".{Path(name).name}.tmp")) for name in small}
    return names | temporary | folders_of(small)


def _check_target(job: Job, out: Path, settings: Settings) -> None:
    end_finished(settings.files, out)
    check_target(out, _expected(job), job.ours, models=job.verb == "merge", overwrite=settings.overwrite)
    old = _replaced(out)
    if settings.overwrite and out.exists() and old.exists() and not _is_replaced(job, old):
        what = "this name is needed for the old output until the new one has its own"
        raise TargetError(what, path=old, hint="move it away, or give another output with -o")


def _swap(job: Job, work: Path, out: Path, settings: Settings) -> None:
    """Give the finished directory its name; what it replaces keeps another one until that is durable.

    Without --overwrite the rename fails when somebody has put something there since it was looked at.
    """
    files = settings.files
    if settings.overwrite and out.exists() and not is_empty(out):
        _remove_replaced(job, files, out)
        with Lock(files, out / LOCK) as lock:  # marks what is ours to remove
            files.rename(str(out), str(_replaced(out)))
            try:
                files.rename(str(work), str(out))
            except OSError:
                files.rename(str(_replaced(out)), str(out))
                lock.remove()
                raise
    else:
        files.rename(str(work), str(out))
    if settings.fsync:
        sync_directory(files, out.parent)


def _replaced(out: Path) -> Path:
    return out.with_name(out.name + REPLACED)


def _is_replaced(job: Job, old: Path) -> bool:
    """Whether a run that replaced an output left this directory, and nobody has put anything into it."""
    if not old.is_dir() or strangers(old, _expected(job), job.ours, models=job.verb == "merge"):
        return False
    return (old / LOCK).exists() or is_empty(old)


def _remove_replaced(job: Job, files: Files, out: Path) -> None:
    """Remove an old output that this run, or one that was killed, has replaced."""
    old = _replaced(out)
    if _is_replaced(job, old):
        remove_all(files, old, names_in(old))
        files.rmdir(str(old))


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
