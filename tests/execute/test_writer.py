"""The writer: the same bytes however it is run, journals believed only where they are right, syncs in order."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import tpshard
from tests.crash.processes import PATIENCE, halting, wait_for
from tests.crash.scene import Tree, fine_grained, tiny, tree, undisturbed
from tests.crash.seams import Died, Recorder, Watched, one_thread
from tpshard.cli.main import main
from tpshard.errors import CorruptError, LocalIOError
from tpshard.execute.publish import Settings
from tpshard.execute.writer import Writer, read_journal
from tpshard.storage.files import Files
from tpshard.storage.names import journal_path

NAMES = [f"rank-{rank:05}-of-00002.safetensors" for rank in range(2)]
QUICK = Settings(workers=2, fsync=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """What a split of `source` at tp 2 must be."""
    return undisturbed(
        lambda out, settings: tpshard.split(source, 2, out, settings=settings), tmp_path_factory.mktemp("expected")
    )


@pytest.fixture(autouse=True)
def small_steps() -> Iterator[None]:
    """Journals with something in them, though the files are small."""
    with fine_grained():
        yield


class Stop(Watched):
    """Raises at the first call that a condition names."""

    def __init__(self, condition: Callable[[str, tuple[Any, ...]], bool], error: BaseException) -> None:
        self.condition = condition
        self.error = error
        self.stopped = False

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.stopped and isinstance(self.error, Died):
            raise Died
        if not self.stopped and self.condition(name, arguments):
            self.stopped = True
            raise self.error


def kill_when_half_written(source: Path, out: Path, error: BaseException | None = None) -> dict[str, int]:
    """A run that ends when both files have journals of something: the offsets that these vouch for."""
    work = out.with_name(f"{out.name}.partial")

    def offsets() -> dict[str, int]:
        return {name: read_journal(journal_path(work, name)).get("offset", 0) for name in NAMES}

    files = Stop(lambda name, _: name == "pwritev" and min(offsets().values()) > 2000, error or Died())
    with one_thread(), pytest.raises(type(files.error)):
        tpshard.split(source, 2, out, settings=Settings(workers=1, files=files))
    assert files.stopped
    return offsets()


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_same_bytes_for_any_number_of_workers(source: Path, expected: Tree, tmp_path: Path, workers: int) -> None:
    for run in range(2):
        tpshard.split(source, 2, tmp_path / f"{run}", settings=replace(QUICK, workers=workers))
        assert tree(tmp_path / f"{run}") == expected


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("error", [Died(), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_what_is_journalled_is_not_written_again(
    source: Path, expected: Tree, tmp_path: Path, workers: int, error: BaseException
) -> None:
    out = tmp_path / "out"
    if isinstance(error, OSError):
        with pytest.raises(LocalIOError):
            kill_when_half_written(source, out, error)
    else:
        kill_when_half_written(source, out, error)
    work = tmp_path / "out.partial"
    vouched = {name: read_journal(journal_path(work, name))["offset"] for name in NAMES}
    assert all(2000 < offset < len(expected[name]) for name, offset in vouched.items())
    files = Opened()
    progress: list[int] = []
    tpshard.split(source, 2, out, settings=Settings(workers=workers, files=files, progress=progress.append))
    for name, offset in vouched.items():
        header = 8 + int.from_bytes(expected[name][:8], "little")
        written = [begin for begin, _ in files.written[str(work / f"{name}.partial")] if begin >= header]
        assert min(written) >= offset, "bytes that were safe are written again"
    assert tree(out) == expected
    assert sum(progress) == sum(len(expected[name]) for name in NAMES)


class Opened(Recorder):
    """Remembers which files are read, which ranges of which are written, and the order of writes, syncs and renames."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: dict[int, str] = {}
        self.read: set[str] = set()
        self.written: dict[str, list[tuple[int, int]]] = {}
        self.order: list[tuple[str, str]] = []

    def open_read(self, path: str) -> int:
        fd = super().open_read(path)
        self.paths[fd] = path
        return fd

    def open_write(self, path: str) -> int:
        fd = super().open_write(path)
        self.paths[fd] = path
        return fd

    def preadv(self, fd: int, buffers: Any, offset: int) -> int:
        self.read.add(self.paths[fd])
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        count = super().pwritev(fd, buffers, offset)
        self.written.setdefault(self.paths[fd], []).append((offset, offset + count))
        self.order.append(("write", self.paths[fd]))
        return count

    def fsync(self, fd: int) -> None:
        self.order.append(("sync", self.paths[fd]))

    def datasync(self, fd: int) -> None:
        self.order.append(("sync", self.paths[fd]))

    def replace(self, source: str, target: str) -> None:
        super().replace(source, target)
        self.order.append(("rename", source))

    def mkdir(self, path: str) -> None:
        super().mkdir(path)
        self.order.append(("mkdir", path))

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self.order.append(("rename", source))


def test_digests_of_a_resumed_run(source: Path, expected: Tree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_when_half_written(source, out)
    tpshard.split(source, 2, out, settings=QUICK)
    for name in NAMES:
        record = json.loads((out / name).with_suffix(".json").read_bytes())
        content = (out / name).read_bytes()
        assert record["parts"] == [{"file": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}]


def test_without_checksums_nothing_is_hashed(source: Path, expected: Tree, tmp_path: Path) -> None:
    files = Opened()
    tpshard.split(source, 2, tmp_path / "out", settings=replace(QUICK, checksum=False, files=files))
    for name in NAMES:
        record = json.loads((tmp_path / "out" / name).with_suffix(".json").read_bytes())
        assert record["parts"][0]["sha256"] is None
        assert (tmp_path / "out" / name).read_bytes() == expected[name]
    assert files.read == {str(path) for path in source.glob("*.safetensors")}


def test_without_fsync_no_call_waits_for_the_disk(source: Path, expected: Tree, tmp_path: Path) -> None:
    files = Recorder()
    tpshard.split(source, 2, tmp_path / "out", settings=replace(QUICK, files=files))
    assert files.count("fsync", "datasync") == 0 and files.count("pwritev") > 10
    assert tree(tmp_path / "out") == expected


def test_every_file_is_synced_before_its_name(source: Path, tmp_path: Path) -> None:
    """And the directory before its own; and that one's parent last."""
    files = Opened()
    out, work = tmp_path / "out", tmp_path / "out.partial"
    tpshard.split(source, 2, out, settings=Settings(workers=2, files=files))
    renamed = [path for kind, path in files.order if kind == "rename"]
    # rank files, records, small files with SHA256SUMS twice (of these, then of all), the directory
    assert len(renamed) == 2 + 2 + 6 + 1
    for path in renamed[:-1]:
        last = max(i for i, entry in enumerate(files.order) if entry == ("write", path))
        named = max(i for i, entry in enumerate(files.order) if entry == ("rename", path))
        assert ("sync", path) in files.order[last:named], path
    final = files.order.index(("rename", str(work)))
    assert files.order[final - 1] == ("sync", str(work))
    assert files.order[final + 1] == ("sync", str(tmp_path))


def test_a_shared_directory_and_its_records_are_synced(source: Path, tmp_path: Path) -> None:
    """Its own name at once, since others rely on it; the files' names before the record says that they are there."""
    files = Opened()
    out = tmp_path / "a" / "out"
    tpshard.split(source, 2, out, ranks=[0, 1], settings=Settings(workers=2, files=files))
    made = [("mkdir", str(tmp_path / "a")), ("sync", str(tmp_path)), ("mkdir", str(out)), ("sync", str(out.parent))]
    assert files.order[:4] == made
    first = files.order.index(("rename", str(out / ".rank-00000-of-00002.lock")))
    assert files.order[first - 1] == ("sync", str(out))
    assert files.order[first + 1 :] == [("rename", str(out / ".rank-00001-of-00002.lock")), ("sync", str(out))]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\0" * 512, b"[]", b"null", b"\xff\xfe", b'{"run": 1}', b'{"offset": 5}', b'{"run": "x"}']
)
def test_a_damaged_journal_is_not_believed(source: Path, expected: Tree, tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "out"
    kill_when_half_written(source, out)
    work = tmp_path / "out.partial"
    journal_path(work, NAMES[0]).write_bytes(content)
    spoil(work / f"{NAMES[0]}.partial")
    tpshard.split(source, 2, out, settings=QUICK)
    assert tree(out) == expected


def test_a_journal_that_cannot_be_read_is_not_taken_for_none(source: Path, tmp_path: Path) -> None:
    """It may be another run's."""
    out = tmp_path / "out"
    kill_when_half_written(source, out)
    journal = journal_path(tmp_path / "out.partial", NAMES[0])
    journal.unlink()
    journal.mkdir()
    before = tree(tmp_path)
    with pytest.raises(LocalIOError, match="cannot read") as caught:
        tpshard.split(source, 2, out, settings=QUICK)
    assert caught.value.path == str(journal) and tree(tmp_path) == before


def spoil(path: Path) -> None:
    """Other bytes of the same length."""
    path.write_bytes(bytes(byte ^ 0xFF for byte in path.read_bytes()))


@pytest.mark.parametrize("left", ["nothing", "half", "more"])
def test_a_journal_without_its_file_is_not_believed(source: Path, expected: Tree, tmp_path: Path, left: str) -> None:
    """Not even after the run that found it so was killed as soon as the file had its full length again."""
    out = tmp_path / "out"
    kill_when_half_written(source, out)
    partial = tmp_path / "out.partial" / f"{NAMES[1]}.partial"
    if left == "nothing":
        partial.unlink()
    else:
        os.truncate(partial, 1000 if left == "half" else 100_000)
        spoil(partial)
    opened: list[bool] = []

    def full_length(name: str, arguments: tuple[Any, ...]) -> bool:
        opened.append(name == "open_write" and arguments[0] == str(partial))
        return any(opened) and name == "pwritev"

    files = Stop(full_length, Died())
    with one_thread(), pytest.raises(Died):
        tpshard.split(source, 2, out, settings=Settings(workers=1, files=files))
    assert partial.stat().st_size == len(expected[NAMES[1]])
    tpshard.split(source, 2, out, settings=QUICK)
    assert tree(out) == expected


def test_an_older_final_file_is_not_taken_for_this_runs(source: Path, expected: Tree, tmp_path: Path) -> None:
    """A run of an older source that was killed when its journals were gone, then one killed in front of a rename."""
    out, work = tmp_path / "out", tmp_path / "out.partial"
    kill_when_half_written(source, out)
    shutil.copy(work / f"{NAMES[0]}.partial", work / NAMES[0])
    os.truncate(work / NAMES[0], len(expected[NAMES[0]]))
    spoil(work / NAMES[0])
    files = Stop(lambda name, arguments: name == "replace" and arguments[1] == str(work / NAMES[0]), Died())
    with one_thread(), pytest.raises(Died):
        tpshard.split(source, 2, out, settings=Settings(workers=1, files=files))
    assert read_journal(journal_path(work, NAMES[0]))["offset"] == len(expected[NAMES[0]])
    tpshard.split(source, 2, out, settings=QUICK)
    assert tree(out) == expected


def writes_records(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a call is the first after the last rank file has its name."""
    return name == "open_write" and arguments[0].endswith(".rank-00000-of-00002.json.tmp")


def test_what_is_finished_is_not_opened_again(source: Path, expected: Tree, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.partial"
    files = Stop(writes_records, Died())
    with pytest.raises(Died):
        tpshard.split(source, 2, out, settings=Settings(workers=2, files=files))
    assert all((work / name).exists() for name in NAMES)
    again = Opened()
    tpshard.split(source, 2, out, settings=Settings(workers=2, files=again))
    assert not any("safetensors" in path for path in again.written)
    assert tree(out) == expected


def test_free_space_counts_what_is_there(source: Path, expected: Tree, tmp_path: Path) -> None:
    """A finished file needs no room any more; one that no journal vouches for needs all of it."""
    total = sum(len(expected[name]) for name in NAMES)
    seen: list[int] = []
    original = Writer.remaining

    def remaining(writer: Writer) -> int:
        seen.append(original(writer))
        return seen[-1]

    out, work = tmp_path / "out", tmp_path / "out.partial"
    files = Stop(writes_records, Died())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "remaining", remaining)
        with pytest.raises(Died):
            tpshard.split(source, 2, out, settings=Settings(workers=1, files=files))
        journal_path(work, NAMES[0]).unlink()
        tpshard.split(source, 2, out, settings=QUICK)
    assert seen == [total, len(expected[NAMES[0]])]


def test_a_source_that_cannot_be_read(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(self: Files, fd: int, buffers: object, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with mock.patch.object(Files, "preadv", fail), pytest.raises(SystemExit) as exited:
        main(["split", str(source), "--tp", "2", "-o", str(tmp_path / "out")])
    assert exited.value.code == LocalIOError.exit_code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert f"error: cannot read: Input/output error; {source}/model-0000" in printed.err
    tpshard.split(source, 2, tmp_path / "out", settings=QUICK)


def test_a_source_that_ends_early(source: Path, tmp_path: Path) -> None:
    """Cut off by somebody else after its header was read."""
    copy = shutil.copytree(source, tmp_path / "copy")
    file = copy / "model-00001-of-00002.safetensors"

    class Cutting(Files):
        def mkdir(self, path: str) -> None:
            super().mkdir(path)
            if path.endswith(".partial"):
                os.truncate(file, 2000)

    with pytest.raises(CorruptError, match="ends before its data does") as raised:
        tpshard.split(copy, 2, tmp_path / "out", settings=replace(QUICK, files=Cutting()))
    assert raised.value.path == str(file)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_what_resumes(source: Path, expected: Tree, tmp_path: Path) -> None:
    out, work, gate = tmp_path / "out", tmp_path / "out.partial", tmp_path / "gate"
    process = halting(gate, 2, 1, "split", str(source), "--tp", "2", "-o", str(out), "--workers", "2")

    def vouched() -> dict[str, int]:
        return {name: read_journal(journal_path(work, name)).get("offset", 0) for name in NAMES}

    wait_for(lambda: any(vouched().values()), process)
    process.send_signal(signal.SIGINT)
    time.sleep(2)  # until it has stopped to hand out work, on a busy machine too
    gate.touch()
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert stdout == "" and "interrupted" in stderr and "resumes" in stderr and "Traceback" not in stderr
    assert not out.exists()
    safe = vouched()
    files = Opened()
    tpshard.split(source, 2, out, settings=Settings(workers=2, files=files))
    for name, offset in safe.items():
        header = 8 + int.from_bytes(expected[name][:8], "little")
        written = files.written.get(str(work / f"{name}.partial"), [])
        assert all(begin >= offset for begin, _ in written if begin >= header)
    assert tree(out) == expected
