"""Where an output goes: what is refused, resumed, replaced or left alone, and what another run is kept from."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

import tpshard
from tests.crash.processes import PATIENCE, halting, reached, wait_for
from tests.crash.scene import Scene, Tree, by_hosts, fine_grained, looks_complete, scenes, tree
from tests.crash.seams import Died, Faulty, Meanwhile, Recorder, one_thread, survived
from tpshard.cli.main import main
from tpshard.errors import CorruptError, LocalIOError, TargetError, TpshardError, UsageError
from tpshard.execute.publish import Settings
from tpshard.storage.files import Files
from tpshard.storage.lock import Lock
from tpshard.storage.names import LOCK, SUMS

QUICK = Settings(workers=2, fsync=False)
OVER = replace(QUICK, overwrite=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="module")
def stage(base: Path) -> dict[str, Scene]:
    return scenes(base)


@pytest.fixture
def source(stage: dict[str, Scene], base: Path) -> Path:
    return base / "tiny-0"


@pytest.fixture
def whole(stage: dict[str, Scene]) -> Tree:
    """What a split of `source` at tp 2 must be."""
    return stage["split"].expected


def begun(source: Path, out: Path, tp: int = 2, **options: Any) -> None:
    """An unfinished run: killed when some of it is journalled."""
    with fine_grained(), one_thread(), pytest.raises(Died):
        tpshard.split(source, tp, out, settings=Settings(workers=1, files=Faulty(80, None)), **options)


def exit_code(*arguments: str) -> int:
    """Of the command line."""
    with pytest.raises(SystemExit) as exited:
        main(list(arguments))
    assert isinstance(exited.value.code, int)
    return exited.value.code


# Another run at the same time, in another process


def test_a_second_process_is_refused(source: Path, whole: Tree, tmp_path: Path) -> None:
    root, gate = tmp_path / "root", tmp_path / "gate"
    command = ["split", str(source), "--tp", "2", "-o", str(root / "out")]
    first = halting(gate, 2, 0, *command)
    wait_for(lambda: len(list((root / "out.partial").glob("*.safetensors.partial"))) == 2, first)
    assert exit_code(*command) == 9
    assert exit_code(*command, "--overwrite") == 9
    gate.touch()
    assert first.wait(PATIENCE) == 0, first.communicate()
    assert tree(root) == {f"out/{name}": data for name, data in whole.items()}
    assert exit_code(*command) == 9, "finished"


def test_processes_with_other_ranks_go_on(source: Path, tmp_path: Path) -> None:
    out, gates = tmp_path / "out", [tmp_path / "first", tmp_path / "second"]
    split = ["split", str(source), "--tp", "4", "-o", str(out)]
    first = halting(gates[0], 2, 0, *split, "--ranks", "0,2")
    wait_for(lambda: any(out.glob("rank-00002-*.safetensors.partial")), first)
    assert exit_code(*split, "--ranks", "1-2") == 9
    assert exit_code(*split, "--ranks", "2") == 9
    assert not list(out.glob("*rank-00001*")), "what was refused left something behind"
    second = halting(gates[1], 1, 0, *split, "--ranks", "1")
    wait_for(lambda: any(out.glob("rank-00001-*.safetensors.partial")), second)
    assert exit_code(*split, "--ranks", "3") == 0
    assert first.poll() is None and second.poll() is None, "all three ran at the same time"
    assert exit_code("check", str(out)) == 3, "ranks are missing"
    for process, gate in zip((second, first), reversed(gates), strict=True):
        gate.touch()
        assert process.wait(PATIENCE) == 0, process.communicate()
    tpshard.split(source, 4, tmp_path / "direct", settings=QUICK)
    assert tree(out) == by_hosts(tree(tmp_path / "direct"))
    finished = tree(out)
    assert exit_code(*split, "--ranks", "3") == 0 and tree(out) == finished, "there is nothing left to do"


@pytest.mark.parametrize("ranks", [(), ("--ranks", "0,1")], ids=["whole", "ranks"])
@pytest.mark.parametrize("fsync", [(), ("--no-fsync",)], ids=["fsync", "no-fsync"])
def test_a_run_of_another_host_is_never_taken_for_dead(
    source: Path, whole: Tree, tmp_path: Path, ranks: tuple[str, ...], fsync: tuple[str, ...]
) -> None:
    """While it lives nothing is taken from it. When it is killed, what only its host's memory had is written again."""
    root, gate = tmp_path / "root", tmp_path / "gate"
    command = ["split", str(source), "--tp", "2", "-o", str(root / "out"), *ranks, *fsync, "--workers", "1"]
    work = root / ("out" if ranks else "out.partial")
    first = halting(gate, 2, 1, *command, host="another")
    wait_for(lambda: reached(gate), first)
    assert any(json.loads(path.read_bytes())["offset"] for path in work.glob(".*.journal"))
    seen = tree(root)
    assert exit_code(*command) == 9
    assert exit_code(*command[:-2], "--workers", "2") == 9
    assert tree(root) == seen, "another host's files were touched"
    first.kill()
    first.communicate()
    if fsync:  # what was not synced is lost where the host is, and the journals with a later boot say so
        for path in work.glob("*.partial"):
            path.write_bytes(bytes(path.stat().st_size))
    assert exit_code(*command) == 0
    assert tree(root) == {f"out/{name}": data for name, data in (by_hosts(whole) if ranks else whole).items()}


# Locks


def test_a_lock_excludes_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with Lock(Files(), path):
        with pytest.raises(TargetError, match="another run is writing here"), Lock(Files(), path):
            pass
        assert path.exists()
    with Lock(Files(), path) as lock:
        lock.remove()
        assert not path.exists()


class Late(Files):
    """Does something between opening a lock's file and locking it, once."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action: Callable[[], object] | None = action

    def open_write(self, path: str) -> int:
        fd = super().open_write(path)
        if self.action is not None:
            action, self.action = self.action, None
            action()
        return fd


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path: Path) -> None:
    """Whoever waited for it must not hold a file without a name, which would keep out nobody."""
    path = tmp_path / "lock"
    holder = Lock(Files(), path)
    holder.__enter__()

    def end() -> None:
        holder.remove()
        holder.__exit__(None, None, None)

    with Lock(Late(end), path):
        assert path.exists()
        with pytest.raises(TargetError), Lock(Files(), path):
            pass


def test_a_lock_that_became_a_record_is_none(tmp_path: Path) -> None:
    path, record = tmp_path / "lock", tmp_path / "record"
    holder = Lock(Files(), path)
    holder.__enter__()
    holder.write(b"content", fsync=True)

    def end() -> None:
        holder.rename(record)
        holder.__exit__(None, None, None)

    with Lock(Late(end), path):
        assert path.read_bytes() == b"" and record.read_bytes() == b"content"
        with pytest.raises(TargetError), Lock(Files(), path):
            pass


def test_a_directory_that_moves_away_meanwhile(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with (
        pytest.raises(TargetError, match="final name"),
        Lock(Late(lambda: work.rename(tmp_path / "out")), work / "lock"),
    ):
        pass


def test_without_locks_the_run_goes_on(source: Path, whole: Tree, tmp_path: Path) -> None:
    """Some network file systems have none."""
    with mock.patch.object(fcntl, "flock", side_effect=OSError("no locks")):
        tpshard.split(source, 2, tmp_path / "out", settings=QUICK)
    assert tree(tmp_path / "out") == whole


# What is there already


@pytest.mark.parametrize("options", [{"tp": 4}, {"max_file_size": 3000}, {"pad_vocab_to": 64}, {"dtype": "bfloat16"}])
def test_other_options_do_not_resume(source: Path, whole: Tree, tmp_path: Path, options: dict[str, Any]) -> None:
    out = tmp_path / "out"
    begun(source, out)
    before = tree(tmp_path)
    given = {"tp": 2} | options
    with pytest.raises(TargetError, match="other options, or of another source") as raised:
        tpshard.split(source, out=out, settings=QUICK, **given)
    assert "--overwrite" in str(raised.value.hint)
    assert tree(tmp_path) == before, "the unfinished run was touched"
    tpshard.split(source, out=out, settings=OVER, **given)
    direct = tmp_path / "direct"
    tpshard.split(source, out=direct, settings=QUICK, **given)
    assert tree(out) == tree(direct) and sorted(os.listdir(tmp_path)) == ["direct", "out"]


def test_no_checksums_are_other_options(source: Path, tmp_path: Path) -> None:
    begun(source, tmp_path / "out")
    with pytest.raises(TargetError, match="other options"):
        tpshard.split(source, 2, tmp_path / "out", settings=replace(QUICK, checksum=False))


def test_other_workers_and_no_fsync_do_resume(source: Path, whole: Tree, tmp_path: Path) -> None:
    begun(source, tmp_path / "out")
    assert (
        exit_code("split", str(source), "--tp", "2", "-o", str(tmp_path / "out"), "--workers", "7", "--no-fsync") == 0
    )
    assert tree(tmp_path / "out") == whole


def test_other_options_in_a_shared_directory(source: Path, whole: Tree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(source, out, ranks=[0, 1])
    for given in ({"tp": 4}, {"tp": 2, "max_file_size": 3000}):
        with pytest.raises(TargetError, match="another set"):
            tpshard.split(source, out=out, ranks=[0], settings=QUICK, **given)
    with pytest.raises(TargetError, match="other options") as raised:
        tpshard.split(source, 2, out, ranks=[0], settings=replace(QUICK, checksum=False))
    assert "rank-00000-of-00002" in str(raised.value.hint) and "--overwrite" not in str(raised.value.hint)
    with pytest.raises(UsageError, match="--ranks"):
        tpshard.split(source, 2, out, ranks=[0], settings=OVER)


def test_a_record_that_cannot_be_read_is_not_written_over(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tpshard.split(source, 2, out, ranks=[0], settings=QUICK)
    record = out / "rank-00000-of-00002.json"
    record.write_text("{")
    with pytest.raises(CorruptError, match="record cannot be read"):
        tpshard.split(source, 2, out, ranks=[0, 1], settings=QUICK)
    record.unlink()
    record.mkdir()
    with pytest.raises(LocalIOError, match="cannot read") as caught:
        tpshard.split(source, 2, out, ranks=[0, 1], settings=QUICK)
    assert caught.value.path == str(record)


def test_ranks_begun_together_are_finished_one_by_one(source: Path, whole: Tree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(source, out, ranks=[0, 1])
    for rank in (1, 0):
        tpshard.split(source, 2, out, ranks=[rank], settings=QUICK)
    assert tree(out) == by_hosts(whole)


@pytest.mark.parametrize("verb", ["split", "merge", "reshard"])
def test_a_finished_output_is_left_alone(stage: dict[str, Scene], tmp_path: Path, verb: str) -> None:
    scene = stage[verb]
    scene.run(tmp_path, QUICK)
    files = Recorder()
    with pytest.raises(TargetError, match="the output exists") as raised:
        scene.run(tmp_path, replace(QUICK, files=files))
    assert "--overwrite" in str(raised.value.hint) and not files.calls
    assert tree(tmp_path) == {f"out/{name}": data for name, data in scene.expected.items()}


@pytest.mark.parametrize("stranger", ["notes.txt", "sub/file", "model.safetensors", "weights.safetensors", ".hidden"])
def test_overwrite_spares_what_tpshard_did_not_write(stage: dict[str, Scene], tmp_path: Path, stranger: str) -> None:
    scene = stage["overwrite"]
    scene.prepare(tmp_path / "root")
    path = scene.out(tmp_path / "root") / stranger
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"mine")
    before = tree(tmp_path)
    with pytest.raises(TargetError, match="tpshard did not write") as raised:
        scene.run(tmp_path / "root", OVER)
    assert raised.value.found == stranger
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("place", "state"), [("out", "old"), ("out.replaced", "complete")])
def test_sums_that_cannot_be_read_are_no_strangers(
    stage: dict[str, Scene], tmp_path: Path, place: str, state: str
) -> None:
    """What a disk does not give now is not somebody else's: the run fails, and the next one ends it."""
    scene, read, broken = stage["overwrite"], Path.read_bytes, tmp_path / place / SUMS
    scene.prepare(tmp_path)

    def reading(path: Path) -> bytes:
        if path == broken:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    with mock.patch.object(Path, "read_bytes", reading), pytest.raises(LocalIOError, match="cannot read") as raised:
        scene.run(tmp_path, OVER)
    assert raised.value.path == str(broken) and scene.state(tmp_path) == state
    assert ("the old out is untouched" in str(raised.value.hint)) == (state == "old")
    scene.again(tmp_path, OVER)


def test_overwrite_spares_an_ordinary_checkpoint(source: Path, base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base / "tiny-1", tmp_path / "other")
    before = tree(other)
    with pytest.raises(TargetError, match="tpshard did not write"):
        tpshard.split(source, 2, other, settings=OVER)
    assert tree(other) == before


def test_overwrite_replaces_what_tpshard_wrote(stage: dict[str, Scene], base: Path, tmp_path: Path) -> None:
    """Of another tp, of another model with other side files; and a merge replaces a merge with other files."""
    other = shutil.copytree(base / "tiny-1", tmp_path / "other")
    (other / "merges.txt").write_text("x")
    tpshard.split(other, 4, tmp_path / "out", settings=QUICK)
    stage["split"].run(tmp_path, OVER)
    assert tree(tmp_path / "out") == stage["split"].expected
    tpshard.merge(base / "shards", tmp_path / "merged", max_file_size=3000, settings=QUICK)
    tpshard.merge(base / "shards", tmp_path / "merged", settings=OVER)
    assert tree(tmp_path / "merged") == stage["merge"].expected
    assert sorted(os.listdir(tmp_path)) == ["merged", "other", "out"]


@pytest.mark.parametrize("verb", ["split", "overwrite"])
@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
def test_directories_of_others_beside_the_output(stage: dict[str, Scene], tmp_path: Path, verb: str, name: str) -> None:
    """Even if they hold a shard set: it may have been moved there."""
    scene, root = stage[verb], tmp_path / "root"
    scene.prepare(root)
    theirs = root / name
    theirs.mkdir()
    for file, data in stage["overwrite"].before.items():
        (theirs / file).parent.mkdir(exist_ok=True)
        (theirs / file).write_bytes(data)
    before = tree(theirs)
    if (verb, name) == ("split", "out.replaced"):
        scene.run(root, OVER)
        assert tree(root / "out") == scene.expected
    else:
        with pytest.raises(TargetError) as raised:
            scene.run(root, OVER)
        assert raised.value.path == str(theirs) and "move it away" in str(raised.value.hint)
        assert scene.state(root) == ("old" if scene.before else "absent")
    assert tree(theirs) == before


def test_foreign_files_in_unfinished_output(source: Path, whole: Tree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(source, out)
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    for settings in (QUICK, OVER):
        with pytest.raises(TargetError, match="tpshard did not write"):
            tpshard.split(source, 2, out, settings=settings)
        assert tree(tmp_path) == before
    (tmp_path / "out.partial" / "notes.txt").unlink()
    tpshard.split(source, 2, out, settings=QUICK)
    assert tree(tmp_path) == {f"out/{name}": data for name, data in whole.items()}


def test_a_shared_directory_of_others(source: Path, whole: Tree, base: Path, tmp_path: Path) -> None:
    home = shutil.copytree(base / "tiny-1", tmp_path / "home")
    before = tree(home)
    with pytest.raises(TargetError, match="other files and no shard set") as raised:
        tpshard.split(source, 2, home, ranks=[0], settings=QUICK)
    assert raised.value.found == "folder-1/more.txt"
    assert tree(home) == before


def test_what_appears_meanwhile_is_never_replaced(stage: dict[str, Scene], tmp_path: Path) -> None:
    """Somebody else makes the output, or puts a file into the old one, at any call of the run."""
    for name in ("split", "overwrite"):
        scene, root, refused = stage[name], tmp_path / name, 0
        for n in range(1, 1000):
            scene.prepare(root)
            theirs = scene.out(root) / "notes.txt"

            def intrude(theirs: Path = theirs) -> None:
                theirs.parent.mkdir(exist_ok=True)
                theirs.write_bytes(b"mine")

            files = Meanwhile(n, intrude)
            with survived() as ended:
                scene.run(root, Settings(workers=1, fsync=False, overwrite=scene.overwrite, files=files))
            if files.seen < n:
                break
            assert theirs.exists() or (scene.overwrite and b"mine" in tree(root).values()), f"call {n}"
            assert not ended or isinstance(ended[0], TpshardError)
            refused += bool(ended) and isinstance(ended[0], TargetError)
            if not ended:
                assert {k: v for k, v in tree(scene.out(root)).items() if k != "notes.txt"} == scene.expected
        assert n > 20 and refused > n // 2


def test_a_symlink_as_target_stays_one(source: Path, whole: Tree, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "there").symlink_to(tmp_path / "disk" / "real")
    (tmp_path / "disk" / "empty").mkdir()
    (tmp_path / "too").symlink_to(tmp_path / "disk" / "empty")
    for name in ("there", "too"):
        tpshard.split(source, 2, tmp_path / name, settings=QUICK)
        assert (tmp_path / name).is_symlink() and tree(tmp_path / name) == whole
        tpshard.split(source, 2, tmp_path / name, settings=OVER)
        assert (tmp_path / name).is_symlink() and tree(tmp_path / name) == whole
    assert sorted(os.listdir(tmp_path / "disk")) == ["empty", "real"]


def test_a_file_as_target_is_left_alone(source: Path, tmp_path: Path) -> None:
    for name in ("out", "out.partial"):
        (tmp_path / name).write_bytes(b"mine")
        for settings in (QUICK, OVER):
            with pytest.raises(TargetError, match="not a directory"):
                tpshard.split(source, 2, tmp_path / "out", settings=settings)
        assert tree(tmp_path) == {name: b"mine"}
        (tmp_path / name).unlink()


def test_directories_above_the_target_are_made(source: Path, whole: Tree, tmp_path: Path) -> None:
    tpshard.split(source, 2, tmp_path / "a" / "b" / "out", settings=Settings(workers=2))
    assert tree(tmp_path) == {f"a/b/out/{name}": data for name, data in whole.items()}


# In place


def test_an_empty_directory_is_replaced(source: Path, whole: Tree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    begun(source, out)
    assert not os.listdir(out), "nothing appears in it before all is there"
    tpshard.split(source, 2, out, settings=QUICK)
    assert tree(tmp_path) == {f"out/{name}": data for name, data in whole.items()}


@pytest.fixture(params=["mounted", "read-only parent", "current directory"])
def fixed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that cannot be renamed over."""
    out = tmp_path / "out"
    out.mkdir()
    if request.param == "mounted":
        (out / "lost+found").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    elif request.param == "read-only parent":
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    else:
        monkeypatch.chdir(out)
        return Path(".")
    return out


def content(directory: Path) -> Tree:
    return {name: data for name, data in tree(directory).items() if name != "lost+found/"}


@pytest.mark.parametrize("verb", ["split", "merge"])
@pytest.mark.parametrize("fixed", ["mounted"], indirect=True)
def test_in_place_at_any_call(stage: dict[str, Scene], fixed: Path, verb: str) -> None:
    """It never looks complete when it is not, and resumes."""
    scene = stage[verb]
    weights = {name for name in scene.expected if name.endswith(".safetensors")}
    with fine_grained(), one_thread():
        for n in range(1, 1000):
            for path in fixed.iterdir():
                if path.is_file():
                    path.unlink()
                elif path.name != "lost+found":
                    shutil.rmtree(path)
            files = Faulty(n, None)
            with survived():
                scene.command(fixed, Settings(workers=1, files=files))
            if files.hit is None:
                break
            if not scene.expected.items() <= content(fixed).items():
                assert not looks_complete(fixed) if verb == "split" else weights - content(fixed).keys()
            if content(fixed) != scene.expected:  # else there was nothing more to do than to sync
                scene.command(fixed, replace(QUICK, overwrite=bool(n % 2)))
            assert content(fixed) == scene.expected
            assert os.listdir(fixed.parent) == ["out"]
    assert n > 50


def test_in_place(source: Path, whole: Tree, fixed: Path) -> None:
    begun(source, fixed)
    assert (fixed / LOCK).exists() and not looks_complete(fixed)
    tpshard.split(source, 2, fixed, settings=QUICK)
    assert content(fixed) == whole and os.listdir(fixed.resolve().parent) == ["out"]
    with pytest.raises(TargetError, match="the output exists"):
        tpshard.split(source, 2, fixed, settings=QUICK)
    with pytest.raises(TargetError, match="cannot be replaced as a whole"):
        tpshard.split(source, 2, fixed, settings=OVER)
    assert content(fixed) == whole


def test_other_options_do_not_resume_in_place(source: Path, whole: Tree, fixed: Path) -> None:
    begun(source, fixed)
    before = tree(fixed)
    with pytest.raises(TargetError, match="other options"):
        tpshard.split(source, 4, fixed, settings=QUICK)
    assert tree(fixed) == before
    tpshard.split(source, 2, fixed, settings=QUICK)
    assert content(fixed) == whole


# The disk and its rules


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_and_directories_get_the_umasks_modes(source: Path, tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        tpshard.split(source, 2, tmp_path / "staged" / "out", settings=QUICK)
        tpshard.split(source, 2, tmp_path / "shared", ranks=[0, 1], settings=QUICK)
    finally:
        os.umask(old)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_the_source_is_never_modified(stage: dict[str, Scene], base: Path, tmp_path: Path) -> None:
    def state() -> dict[str, tuple[int, int, bytes]]:
        directories = [base / "tiny-0", base / "shards"]
        paths = [*directories, *(path for directory in directories for path in directory.iterdir())]
        return {
            str(path): (path.stat().st_mode, path.stat().st_mtime_ns, b"" if path.is_dir() else path.read_bytes())
            for path in paths
        }

    before = state()
    for name, scene in stage.items():
        scene.prepare(tmp_path / name)
        scene.run(tmp_path / name, replace(QUICK, overwrite=scene.overwrite))
    assert state() == before


@pytest.fixture
def changing(source: Path, tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A copy of the source, and what changes it: other values of the same dtypes and shapes."""
    copy = shutil.copytree(source, tmp_path / "source")
    file = copy / "model-00002-of-00002.safetensors"

    def change() -> None:
        data = file.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        file.write_bytes(data[:header] + bytes(byte ^ 0xFF for byte in data[header:]))
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))

    yield copy, change


@pytest.mark.parametrize("ranks", [None, [0, 1]])
def test_a_source_that_changed_is_not_mixed(
    changing: tuple[Path, Callable[[], None]], tmp_path: Path, ranks: list[int] | None
) -> None:
    source, change = changing
    out = tmp_path / "out"
    begun(source, out, ranks=ranks)
    change()
    with pytest.raises(TargetError, match="of another source"):
        tpshard.split(source, 2, out, ranks=ranks, settings=QUICK)
    if ranks is None:
        tpshard.split(source, 2, out, settings=OVER)
    else:
        for name in [*out.glob("rank-*"), *out.glob(".rank-*")]:  # as the hint says
            name.unlink()
        tpshard.split(source, 2, out, ranks=ranks, settings=QUICK)
    assert tpshard.check(out, source).equal


def test_a_source_that_changes_during_the_run(changing: tuple[Path, Callable[[], None]], tmp_path: Path) -> None:
    source, change = changing
    files = Meanwhile(30, change)
    with pytest.raises(CorruptError, match="changed while it was read"):
        tpshard.split(source, 2, tmp_path / "out", settings=replace(QUICK, files=files))
    assert files.seen > 30 and not (tmp_path / "out").exists()


def test_a_source_that_is_cut_short_during_the_run(changing: tuple[Path, Callable[[], None]], tmp_path: Path) -> None:
    """What is being written anew is first empty: the read that fails then has the same words."""
    source, _ = changing
    files = Meanwhile(30, lambda: os.truncate(source / "model-00002-of-00002.safetensors", 8))
    with pytest.raises(CorruptError, match="changed while it was read") as raised:
        tpshard.split(source, 2, tmp_path / "out", settings=replace(QUICK, files=files))
    assert "ends before its data does" in str(raised.value.__cause__)


def test_a_source_that_was_copied_elsewhere_and_linked_resumes(source: Path, whole: Tree, tmp_path: Path) -> None:
    """Another spelling of the same files is the same source."""
    begun(source, tmp_path / "out")
    (tmp_path / source.name).symlink_to(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(source.parent)
        tpshard.split(Path(source.name), 2, tmp_path / "out", settings=QUICK)
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize("ranks", [None, [0, 1]])
def test_free_space_is_checked_before_the_first_byte(
    source: Path, whole: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: list[int] | None
) -> None:
    beside = {SUMS, *(name for name in whole if name.startswith("rank-") and name.endswith(".json"))}
    checked = {name: data for name, data in by_hosts(whole).items() if name not in beside}
    needed = sum(map(len, checked.values()))
    free = [needed - 1]
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=free[0], f_frsize=1))
    files = Recorder()
    with pytest.raises(LocalIOError, match="not enough room") as raised:
        tpshard.split(source, 2, tmp_path / "out", ranks=ranks, settings=replace(QUICK, files=files))
    assert files.count("pwritev", "truncate") == 0
    assert raised.value.expected == f"{needed} bytes free" and raised.value.found == f"{needed - 1} bytes"
    assert tree(tmp_path) == {}, "a refused run leaves nothing behind"
    free[0] += 1
    tpshard.split(source, 2, tmp_path / "out", ranks=ranks, settings=QUICK)
    assert tree(tmp_path / "out") == (by_hosts(whole) if ranks else whole)


def test_an_old_output_and_no_room(stage: dict[str, Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = stage["overwrite"]
    scene.prepare(tmp_path / "root")
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(LocalIOError) as raised:
        scene.run(tmp_path / "root", OVER)
    assert "the old out is untouched" in str(raised.value.hint)
    assert tree(tmp_path / "root") == {f"out/{name}": data for name, data in scene.before.items()}


def test_a_failure_that_is_not_of_the_disk_spares_the_old_output_too(
    stage: dict[str, Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = stage["overwrite"]
    scene.prepare(tmp_path / "root")
    monkeypatch.setattr("tpshard.execute.publish.run_ids", mock.Mock(side_effect=[{"a": "1"}, {"a": "2"}]))
    monkeypatch.setattr("tpshard.execute.publish._prepare", mock.Mock(return_value=mock.Mock(write=lambda *_: {})))
    with pytest.raises(CorruptError) as raised:
        scene.run(tmp_path / "root", OVER)
    assert "the old out is untouched" in str(raised.value.hint)


def test_a_file_system_that_cannot_sync_directories(source: Path, whole: Tree, tmp_path: Path) -> None:
    class Odd(Files):
        def fsync(self, fd: int) -> None:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise OSError(22, "Invalid argument")

    tpshard.split(source, 2, tmp_path / "out", settings=Settings(workers=2, files=Odd()))
    assert tree(tmp_path / "out") == whole
