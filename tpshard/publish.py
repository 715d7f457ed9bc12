"""Give a finished output its place: staging directory, locks, free space, resume, and the last rename.

An output appears whole: it is written into `OUT.partial` and renamed. Only where several hosts write into one
directory (`--ranks`), or OUT cannot be renamed over, are files written into OUT itself, each complete before it gets
its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tpshard.errors import LocalIOError, TargetError, TpshardError, UsageError
from tpshard.execute import Convert, Loader, Progress
from tpshard.files import Files, local_error, sync_directory, write_small
from tpshard.lock import Lock
from tpshard.planning import Plan
from tpshard.writer import PARTIAL, Writer, journal_path, read_journal

LOCK = ".tpshard.lock"


@dataclass(frozen=True)
class Settings:
    """How to write: everything that does not change the bytes."""

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

    shared: the directory may be written by several runs at once, one per claim. claims: names of the locks.
    records: small files that follow from the checksums, written last.
    """

    plan: Plan
    small: Mapping[str, bytes]
    identity: Mapping[str, object]
    records: Callable[[Mapping[str, str | None]], Mapping[str, bytes]]
    convert: Convert | None = None
    shared: bool = False
    claims: Sequence[str] = (LOCK,)
    verb: str = "split"


def run_id(job: Job, settings: Settings) -> str:
    """Names a run: the same source bytes, the same outputs, the same options that change bytes."""
    sources: dict[str, tuple[int, int]] = {}
    for step in job.plan.steps:
        for region in getattr(step, "sources", ()):
            if region.file not in sources:
                status = os.stat(region.file)
                sources[region.file] = (status.st_size, status.st_mtime_ns)
    text = json.dumps(
        {
            "verb": job.verb,
            "identity": dict(job.identity),
            "checksum": settings.checksum,
            "outputs": [[f.name, f.size, hashlib.sha256(f.header).hexdigest()] for f in job.plan.outputs],
            "sources": sorted(sources.items()),
        },
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def publish(job: Job, out: Path, settings: Settings) -> dict[str, str | None]:
    """Write a job's files to `out`; sha256 by file name. TargetError when `out` is not ours to write."""
    existed = out.exists()
    try:
        return _publish(job, out, settings)
    except OSError as error:
        raise local_error(error, "cannot write") from error
    except TpshardError as error:
        if existed and settings.overwrite and isinstance(error, LocalIOError):
            error.hint = f"{error.hint + '; ' if error.hint else ''}the old {out.name} is untouched"
        raise


def _publish(job: Job, out: Path, settings: Settings) -> dict[str, str | None]:
    files = settings.files
    in_place = job.shared or (out.is_dir() and _is_empty(out) and not _can_replace(out))
    if in_place and settings.overwrite:
        raise UsageError(
            "--overwrite replaces a whole set: it does not go with --ranks", path=out, hint="remove it first"
        )
    if not in_place:
        _check_target(out, job, settings.overwrite)
    if not out.parent.exists():
        out.parent.mkdir(parents=True)
    work = out if in_place else out.with_name(out.name + PARTIAL)
    if not work.exists():
        with contextlib.suppress(FileExistsError):
            files.mkdir(str(work))
    elif not work.is_dir():
        raise TargetError("the output exists and is not a directory", path=work, hint="give another with -o")
    run = run_id(job, settings)
    with ExitStack() as stack:
        locks = [stack.enter_context(Lock(files, work / claim)) for claim in job.claims]
        if in_place:
            _check_shared(work, job)
        else:
            _check_leftovers(work, job, run, settings)
        plan = job.plan
        writer = Writer(
            plan, work, run, files=files, checksum=settings.checksum, fsync=settings.fsync, progress=settings.progress
        )
        _check_space(work, writer.remaining() + sum(map(len, job.small.values())))
        settings.start(plan.nbytes)
        tag = f".{job.claims[0].strip('.')}" if in_place else ""
        for name, data in job.small.items():
            if not in_place or not (work / name).exists():
                write_small(files, work / name, data, fsync=settings.fsync, tag=tag)
        digests = writer.write(Loader(files, job.convert), settings.workers)
        for name, data in job.records(digests).items():
            write_small(files, work / name, data, fsync=settings.fsync, tag=tag)
        writer.remove_journals()
        for lock in locks:
            lock.remove()
        if settings.fsync:
            sync_directory(files, work)
        if not in_place:
            _swap(files, work, out)
            if settings.fsync:
                sync_directory(files, out.parent)
    return digests


def _expected(job: Job) -> set[str]:
    """Every name that a run of this job may have left in its directory."""
    finals = {output.name for output in job.plan.outputs}
    small = set(job.small) | set(job.records({name: None for name in finals}))
    journals = {journal_path(Path(), name).name for name in finals}
    names = finals | {name + PARTIAL for name in finals} | journals | small | set(job.claims)
    return names | {f".{name}.tmp" for name in small | journals}


def _check_leftovers(work: Path, job: Job, run: str, settings: Settings) -> None:
    """What an earlier run left in the staging directory is of this run, or is removed with --overwrite."""
    expected = _expected(job)
    names = {entry.name for entry in work.iterdir()}
    foreign = sorted(names - expected)
    for output in job.plan.outputs:
        journal = read_journal(journal_path(work, output.name))
        if journal and journal["run"] != run:
            foreign.append(output.name)
    if not foreign:
        return
    if not settings.overwrite:
        raise TargetError(
            "an unfinished run with other options, or of another source, left its files here",
            path=work,
            found=foreign[0],
            hint="repeat that command to finish it, or start anew with --overwrite",
        )
    for name in names - set(job.claims):
        if (work / name).is_dir():
            raise TargetError("a directory is in the way", path=work / name, hint="move it away")
        settings.files.unlink(str(work / name))


def _check_shared(work: Path, job: Job) -> None:
    """A directory that several hosts write into must be of this very set."""
    for name in ("tpshard.json",):
        path = work / name
        if name in job.small and path.exists() and path.read_bytes() != job.small[name]:
            raise TargetError(
                "this directory holds another set",
                path=path,
                hint="every host must give the same model, revision and options; or give another directory with -o",
            )


def _check_target(out: Path, job: Job, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and _is_empty(out)):
        return
    if not out.is_dir():
        raise TargetError("the output exists and is not a directory", path=out, hint="give another with -o")
    if not overwrite:
        raise TargetError(
            "the output exists", path=out, hint="replace it with --overwrite, or give another directory with -o"
        )
    ours = _expected(job) | {"tpshard.json", "model.safetensors.index.json"}
    for entry in sorted(out.iterdir()):
        known = entry.name in ours or entry.match("rank-*-of-*") or entry.match("model*.safetensors")
        if not known or entry.is_dir():
            raise TargetError(
                "the output holds files that tpshard did not write, and is not replaced",
                path=out,
                found=entry.name,
                hint="move them away, or give another directory with -o",
            )


def _is_empty(directory: Path) -> bool:
    return not any(directory.iterdir())


def _can_replace(directory: Path) -> bool:
    return not os.path.ismount(directory) and os.access(directory.parent, os.W_OK)


def _check_space(work: Path, needed: int) -> None:
    status = os.statvfs(work)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise LocalIOError(
            f"not enough room: {needed:,} bytes are needed and {free:,} are free",
            path=work,
            expected=f"{needed} bytes",
            found=f"{free} bytes",
            hint="free some space, or give another disk with -o",
        )


def _swap(files: Files, work: Path, out: Path) -> None:
    """Give the finished directory its name; what it replaces is removed after it."""
    old = out.with_name(out.name + ".replaced")
    if out.exists() and not _is_empty(out):
        if old.exists():
            shutil.rmtree(old)
        files.rename(str(out), str(old))
    files.rename(str(work), str(out))
    if old.exists():
        shutil.rmtree(old)
