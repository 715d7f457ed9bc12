"""Write the outputs of a plan so that nothing is lost: journalled, synced, renamed.

Every file grows under a partial name beside its final one. A journal beside it says which run it belongs to and how
much of it is safely on disk; the same command picks up there. A final name is only ever given to a complete file.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tpshard.errors import UnsupportedError, local_error
from tpshard.execute.blocks import FlatStep, operations
from tpshard.execute.run import Convert, Loader, Progress, run
from tpshard.planning.box import Box
from tpshard.planning.join import OutputFile, Plan, Transfer
from tpshard.storage.checksums import require_digest
from tpshard.storage.files import (
    Files,
    Handles,
    about,
    boot_id,
    overwrite_small,
    read_exactly,
    sync_directory,
    unlink_if_there,
    write_exactly,
)
from tpshard.storage.names import PARTIAL, journal_path
from tpshard.storage.safetensors import nbytes

FLUSH = 64 << 20
"""Bytes of one file that may be written before they are flushed and journalled."""
_JOURNAL = 512  # bytes of a journal: one sector, so that it is never half of another one
_HASH = 8 << 20  # bytes hashed before a worker looks for other work
_READ = 256 << 10  # stays in a core's own cache


@dataclass(eq=False)
class _Hashed:
    """A file that is hashed behind the copy, as far as steps are complete. Offsets count from the start of the file."""

    path: str
    size: int
    ends: list[tuple[int, int]]  # (steps that must be complete, end offset), in file order
    complete: int = 0  # all bytes before this are written, or were read
    hashed: int = 0
    hasher: Any = field(default_factory=hashlib.sha256)
    busy: bool = False  # a worker is hashing it
    sha256: str | None = None
    reached: int = 0  # how many of `ends` are complete


@dataclass(eq=False)
class _File(_Hashed):
    """One output file in progress."""

    output: OutputFile = field(kw_only=True)
    directory: Path = field(kw_only=True)
    fd: int = -1
    done: bool = False  # it has its final name
    durable: int = 0  # the journal vouches for the bytes before this

    @property
    def framing(self) -> int:
        """Bytes that are no tensor's."""
        return len(self.output.header) + sum(len(data) for _, data in self.output.literals)

    @property
    def final(self) -> Path:
        return self.directory / self.output.name

    @property
    def partial(self) -> Path:
        return Path(self.path)

    @property
    def journal(self) -> Path:
        return journal_path(self.directory, self.output.name)


def read_journal(path: Path) -> dict[str, Any]:
    """A journal's content; empty when there is none or it is not whole.

    LocalIOError when it cannot be read: it may say that the files beside it are another run's.
    """
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    except OSError as error:
        raise local_error(error, "cannot read", path) from error
    whole = isinstance(data, dict) and isinstance(data.get("offset"), int) and isinstance(data.get("run"), str)
    return data if whole else {}


class Writer:
    """Writes the outputs of one plan into one directory. The caller holds the lock on it."""

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        runs: Mapping[str, str],
        *,
        files: Files,
        checksum: bool,
        fsync: bool,
        progress: Progress,
        recorded: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """runs: by output file, the name of the run that a journal must bear to be resumed.

        recorded: sha256 of source files, which they are held against as they are read.
        """
        self.plan = plan
        self.runs = runs
        self.files = files
        self.checksum = checksum
        self.fsync = fsync
        self.progress = progress
        last: dict[tuple[str, int], int] = {}
        read: dict[str, dict[int, int]] = {path: {} for path in recorded}
        for index, step in enumerate(plan.steps, 1):
            for region in step.targets if isinstance(step, Transfer) else (step.target,):
                last[region.file, region.begin] = index
            for region in (*step.sources, *step.replicas) if isinstance(step, Transfer) else ():
                if region.file in read:
                    read[region.file][region.end] = index
        self.outputs = [
            _File(
                str(directory / (output.name + PARTIAL)),
                output.size,
                _ends(output, last),
                output=output,
                directory=directory,
            )
            for output in plan.outputs
        ]
        self.reader = Handles(files)
        self.recorded, self.discarded = recorded, False
        self.sources = [_source(path, ends) for path, ends in read.items() if ends]
        self.hashed: list[_Hashed] = [*(self.outputs if checksum else ()), *self.sources]
        self._by_name = {file.output.name: file for file in self.outputs}
        self._lock = threading.Lock()

    def remaining(self) -> int:
        """Bytes of disk that the run still needs. Opens nothing."""
        total = 0
        for file in self.outputs:
            if not self._is_done(file, read_journal(file.journal)):
                held = file.partial.stat().st_blocks * 512 if file.partial.exists() else 0
                total += max(0, file.output.size - held)
        return total

    def _vouched(self, file: _File, journal: Mapping[str, Any]) -> int:
        """The bytes that a journal of this run says are safe; none that a lost power supply may have taken."""
        if journal.get("run") != self.runs[file.output.name]:
            return 0
        safe = journal.get("boot") is None or (not self.fsync and journal["boot"] == boot_id())
        return min(journal["offset"], file.output.size) if safe else 0

    def _is_done(self, file: _File, journal: Mapping[str, Any]) -> bool:
        """Whether the final name is this run's. While the partial one is there too, it is an older run's."""
        size = file.output.size
        return (
            self._vouched(file, journal) == size
            and not file.partial.exists()
            and file.final.exists()
            and file.final.stat().st_size == size
        )

    def write(self, convert: Convert | None, workers: int) -> dict[str, str | None]:
        """Write what is not there yet. Returns sha256 by file name, None without checksums.

        LocalIOError when the system refuses: what is written so far stays, and the same run resumes.
        """
        try:
            for file in self.outputs:
                self._open(file)
            self.progress(sum(file.durable or file.framing for file in self.outputs))
            run(
                self.plan.steps,
                Loader(self.reader, convert),
                self._put,
                workers=workers,
                skip=self._is_written,
                background=_Hasher(self) if self.hashed else None,
                on_complete=self._flush,
            )
            self._check_sources()
            for file in self.outputs:
                self._finish(file)
        except UnsupportedError:  # a cast that loses too much: other options will be given, and nothing resumed
            self._discard()
            raise
        except OSError as error:
            raise local_error(error, "cannot write") from error
        finally:
            for file in self.outputs:
                if file.fd >= 0:
                    self.files.close(file.fd)
                    file.fd = -1
        return {file.output.name: file.sha256 for file in self.outputs}

    def _open(self, file: _File) -> None:
        journal = read_journal(file.journal)
        size = file.output.size
        if self._is_done(file, journal):
            file.done = True
            file.sha256 = journal.get("sha256")
            file.durable = file.complete = file.hashed = size
            return
        if file.partial.exists() and file.partial.stat().st_size == size:
            file.durable = self._vouched(file, journal)
        if journal and file.durable == 0:
            # Gone before the partial file has its size again, or it would vouch for what is not yet written.
            unlink_if_there(self.files, file.journal)
            if self.fsync:
                sync_directory(self.files, file.journal.parent)
        file.complete = file.durable
        with about(file.partial):
            file.fd = self.files.open_write(str(file.partial))
            self.files.truncate(file.fd, size)
            for offset, data in ((0, file.output.header), *file.output.literals):
                write_exactly(self.files, file.fd, [memoryview(data)], offset)
        self._note(file)

    def _note(self, file: _File) -> None:
        """Write the journal: the bytes before `durable` are safe; without fsync, as long as the machine runs."""
        note = {
            "run": self.runs[file.output.name],
            "offset": file.durable,
            "sha256": file.sha256,
            "boot": None if self.fsync else boot_id(),
        }
        overwrite_small(self.files, file.journal, json.dumps(note).encode().ljust(_JOURNAL))

    def _is_written(self, index: int) -> bool:
        step = self.plan.steps[index]
        regions = step.targets if isinstance(step, Transfer) else (step.target,)
        return all(r.end <= self._by_name[r.file].durable for r in regions)

    def _put(self, step: FlatStep, block: Box, buffer: memoryview, turn: int) -> None:
        written = 0
        start = turn % len(step.targets)  # two workers rarely want the same file's lock
        for flat in step.targets[start:] + step.targets[:start]:
            file = self._by_name[flat.file]
            if file.done or flat.end <= file.durable:
                continue
            with about(file.partial):
                for offset, parts in operations(flat, block, buffer):
                    write_exactly(self.files, file.fd, parts, offset)
                    written += sum(map(len, parts))
        self.progress(written)

    def advance(self, steps: int) -> None:
        """Note what `steps` complete steps leave behind in every file."""
        with self._lock:
            for file in (*self.outputs, *self.sources):
                while file.reached < len(file.ends) and file.ends[file.reached][0] <= steps:
                    file.complete = max(file.complete, file.ends[file.reached][1])
                    file.reached += 1

    def _flush(self, steps: int) -> None:
        self.advance(steps)
        for file in self.outputs:
            if not file.done and file.complete - file.durable >= FLUSH:
                complete = file.complete
                if self.fsync:
                    with about(file.partial):
                        self.files.datasync(file.fd)
                file.durable = complete
                self._note(file)

    def _finish(self, file: _File) -> None:
        if file.done:
            return
        with about(file.partial):
            size = self.files.size(file.fd)
            assert size == file.complete == file.output.size, f"{file.output.name}: {size}, complete {file.complete}"
            if self.fsync:
                self.files.fsync(file.fd)
            fd, file.fd = file.fd, -1
            self.files.close(fd)  # some network file systems tell only here that they could not write
        file.durable = size
        self._note(file)
        self.files.replace(str(file.partial), str(file.final))
        file.done = True

    def remove_journals(self) -> None:
        """Remove the journals: the run is complete and will not be resumed."""
        for file in self.outputs:
            unlink_if_there(self.files, file.journal)

    def _check_sources(self) -> None:
        """CorruptError for a source file that is not what was recorded when it was written; nothing of it is kept."""
        for source in self.sources:
            if source.sha256 != self.recorded[source.path]:
                self._discard()
                require_digest(source.path, expected=self.recorded[source.path], found=source.sha256)

    def _discard(self) -> None:
        """Keep nothing of what was written."""
        self.discarded = True
        for file in self.outputs:
            unlink_if_there(self.files, file.journal)
            unlink_if_there(self.files, file.partial)

    def claim(self, steps: int) -> _Hashed | None:
        """A file with bytes to hash that no other worker is hashing; the one with most of them."""
        self.advance(steps)
        with self._lock:
            waiting = [file for file in self.hashed if not file.busy and self._to_hash(file)]
            file = max(waiting, key=lambda f: f.complete - f.hashed, default=None)
            if file is not None:
                file.busy = True
            return file

    def _to_hash(self, file: _Hashed) -> bool:
        backlog = file.complete - file.hashed
        return backlog >= _HASH or (backlog > 0 and file.complete == file.size)


class _Hasher:
    """Hashes files behind the copy, from the page cache, in file order."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def step(self, complete: int) -> bool:
        file = self.writer.claim(complete)
        if file is None:
            return False
        buffer = memoryview(bytearray(_READ))
        stop = min(file.hashed + _HASH, file.complete)
        while file.hashed < stop:
            chunk = buffer[: min(_READ, stop - file.hashed)]
            if isinstance(file, _File):
                with about(file.path):
                    read_exactly(self.writer.files, file.fd, [chunk], file.hashed, file.path)
            else:
                self.writer.reader.read_into(file.path, [chunk], file.hashed)
            file.hasher.update(chunk)
            file.hashed += len(chunk)
        if file.hashed == file.size:
            file.sha256 = file.hasher.hexdigest()
        file.busy = False
        return True

    def finished(self, complete: int) -> bool:
        self.writer.advance(complete)
        return all(file.hashed == file.size for file in self.writer.hashed)


def _source(path: str, read: Mapping[int, int]) -> _Hashed:
    """A source file. read: where tensors end, and how many steps must be complete until one has been read."""
    ends: list[tuple[int, int]] = []
    for end in sorted(read):
        ends.append((max(read[end], ends[-1][0] if ends else 0), end))
    size = os.stat(path).st_size
    return _Hashed(path, size, [*ends, (ends[-1][0], size)])


def _ends(output: OutputFile, last: dict[tuple[str, int], int]) -> list[tuple[int, int]]:
    """For every prefix of a file: the steps that must be complete for it, and where it ends.

    What lies between tensors is written first of all, so that a prefix ends where the next tensor begins.
    """
    begins = [*(placed.begin for placed in output.tensors), output.size]
    ends = [(0, begins[0])]
    for placed, following in zip(output.tensors, begins[1:], strict=True):
        # A tensor without elements has no step of its own and the offset of its neighbour: it needs nothing.
        needed = last[placed.file, placed.begin] if nbytes(placed.stored.dtype, placed.stored.shape) else 0
        ends.append((max(ends[-1][0], needed), following))
    return ends
