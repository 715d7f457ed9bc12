"""Killed or failing at any call, the output is absent, the old one, complete, or resumable; nothing is ever lost.

Every test goes through the seam of `tpshard.storage.files` and visits the calls of a run, one by one.
tests/crash/strace_all.py does the same to the real command.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

import tpshard.execute.run
import tpshard.storage.files
from tests.crash.scene import Scene, fine_grained, scenes, tree
from tests.crash.seams import READS, Died, Faulty, Meanwhile, PowerLoss, Recorder, Watched, one_thread, survived
from tests.helpers.grids import ALL, some, without
from tpshard.errors import LocalIOError, TargetError
from tpshard.execute.publish import Settings

QUICK = Settings(workers=1, fsync=False)
MOST = 1000  # calls; every run here has fewer

ALWAYS = {"open_write", "pwritev", "truncate", "datasync", "fsync", "replace", "unlink"}
# The calls that a scene makes besides those of every run: that each was hit proves that nothing was left out.
MADE = {
    "split": {"mkdir", "rename"},
    "split-parts": {"mkdir", "rename"},
    "ranks": {"mkdir"},
    "last-rank": set(),
    "merge": {"mkdir", "rename"},
    "reshard": {"mkdir", "rename"},
    "overwrite": {"mkdir", "rename", "rmdir"},
    "in-place": {"mkdir"},
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Scene]]:
    """The scenes, on small blocks and in one thread, so that call n is the same in every run."""
    with fine_grained(), one_thread():
        yield scenes(tmp_path_factory.mktemp("scenes"))


def until_undisturbed() -> Iterator[int]:
    """1, 2, 3 …, for a loop that breaks at the first run that was over before call n; every fifth if not of all."""
    yield from range(1, MOST, 1 if ALL else 5)
    pytest.fail(f"more than {MOST} calls")


def calls(scene: Scene, root: Path, *, reads: bool = False) -> Iterator[int]:
    """The numbers of a run's calls, and one more.

    Of reads and writes of data in a row the first and the last; every fourth of these, and the first of a name.
    """
    scene.prepare(root)
    recorder = Recorder()
    scene.run(root, Settings(workers=1, files=recorder, overwrite=scene.overwrite))
    names = [name for name, _ in recorder.calls if reads or name not in READS]
    kinds = ["", *("data" if name in ("preadv", "pwritev") else name for name in names), ""]
    every = range(1, len(names) + 1)
    edges = [n for n in every if kinds[n] != "data" or {kinds[n - 1], kinds[n + 1]} != {"data"}]
    yield from some(every, {*edges[::4], *(names.index(name) + 1 for name in names)})
    yield len(names) + 1
    pytest.fail(f"more than {len(names)} calls")


# split and reshard are written and renamed as split-parts and merge are.
@pytest.mark.parametrize("name", without(MADE, {"split", "reshard"}))
def test_killed_at_any_call(stage: dict[str, Scene], tmp_path: Path, name: str) -> None:
    scene, root, hit = stage[name], tmp_path / "root", set()
    for n in calls(scene, root):
        scene.prepare(root)
        files = Faulty(n, None)
        with survived() as ended:
            scene.run(root, Settings(workers=1, files=files, overwrite=scene.overwrite))
        if files.hit is None:
            break
        assert isinstance(ended[0], Died)
        hit.add(files.hit)
        scene.state(root)
        scene.again(root, replace(QUICK, overwrite=scene.overwrite))
    assert hit == ALWAYS | MADE[name]


FAILING = [("split", "ENOSPC"), ("ranks", "EIO"), ("merge", "EIO"), ("reshard", "EIO"), ("overwrite", "EIO")]


@pytest.mark.parametrize(("name", "number"), without(FAILING, [("reshard", "EIO"), ("ranks", "EIO")]))
def test_failing_at_any_call(stage: dict[str, Scene], tmp_path: Path, name: str, number: str) -> None:
    scene, root, hit = stage[name], tmp_path / "root", set()
    for n in calls(scene, root, reads=True):
        scene.prepare(root)
        files = Faulty(n, getattr(errno, number))
        with survived() as ended:
            scene.run(root, Settings(workers=1, files=files, overwrite=scene.overwrite))
        if files.hit is None:
            break
        hit.add(files.hit)
        error = ended[0]
        assert isinstance(error, LocalIOError), f"call {n}, {files.hit}: {error!r}"
        ours = Path(str(error.path)).is_relative_to(root)
        assert error.message.startswith("cannot write" if ours else ("cannot read", "cannot open")), str(error)
        assert "\n" not in str(error)
        state = scene.state(root)
        if scene.overwrite:
            assert state in ("old", "complete"), f"call {n}, {files.hit}: the old output is {state}"
            assert ("the old out is untouched" in str(error.hint)) == (state == "old")
        scene.again(root, replace(QUICK, overwrite=scene.overwrite))
    assert hit == ALWAYS | MADE[name] | {"open_read", "preadv", "size"}


@pytest.mark.parametrize(
    "name", without(["split", "ranks", "merge", "overwrite", "in-place"], {"split", "merge", "in-place"})
)
def test_power_lost_at_any_call(stage: dict[str, Scene], tmp_path: Path, name: str) -> None:
    """And lost again, at some call of the run that resumes."""
    scene, root, resumed, visited = stage[name], tmp_path / "root", 0, 0
    for n in calls(scene, root):
        scene.prepare(root)
        files = PowerLoss(n, root)
        with survived():
            scene.run(root, Settings(workers=1, files=files, overwrite=scene.overwrite))
        if files.hit is None:
            break
        visited += 1
        files.crash(seed=n)
        scene.state(root)
        files = PowerLoss(random.Random(n).randint(1, n), root)
        with survived() as ended:
            scene.run(root, Settings(workers=1, files=files, overwrite=scene.overwrite))
        if not (ended and isinstance(ended[0], TargetError)):
            files.crash(seed=-n)
            resumed += 1
        scene.state(root)
        scene.again(root, replace(QUICK, fsync=True, files=Watched(), overwrite=scene.overwrite))
    assert resumed > visited / 2 > (15 if ALL else 10)


def test_power_lost_without_fsync(stage: dict[str, Scene], tmp_path: Path) -> None:
    """What was not synced is not trusted on a machine that has started anew, nor by a run that syncs."""
    scene, root = stage["split"], tmp_path / "root"
    for n in until_undisturbed():
        scene.prepare(root)
        files = PowerLoss(n, root)
        with survived():
            scene.run(root, replace(QUICK, files=files))
        if files.hit is None:
            break
        files.crash(seed=n)
        if not scene.out(root).exists():  # --no-fsync promises nothing of a finished output
            boot = "another" if n % 2 else tpshard.storage.files.boot_id()
            with mock.patch("tpshard.execute.writer.boot_id", return_value=boot):
                scene.again(root, replace(QUICK, fsync=not n % 2, files=Watched()))


@pytest.mark.parametrize("name", without(["split", "ranks", "overwrite"], {"split"}))
def test_the_same_command_during_another(stage: dict[str, Scene], tmp_path: Path, name: str) -> None:
    """At any call of the first the second is refused, unless it comes before the first has its lock."""
    scene, root, ends = stage[name], tmp_path / "root", []
    settings = replace(QUICK, overwrite=scene.overwrite)
    for n in until_undisturbed():
        scene.prepare(root)
        second: list[str] = []
        files = Meanwhile(n, lambda second=second: second.append(outcome(scene, root, settings)))
        first = outcome(scene, root, replace(settings, files=files))
        if not second:
            break
        ends.append((first, *second))
        scene.again(root, settings)
    early = [end for end in ends if end[1] == "finished"]
    assert scene.overwrite or early == [("refused", "finished")] * len(early)
    assert ends[len(early) :] == [("finished", "refused")] * (len(ends) - len(early))
    assert len(early) < 5


def outcome(scene: Scene, root: Path, settings: Settings) -> str:
    """How a run ends that is not killed."""
    try:
        scene.run(root, settings)
    except TargetError:
        return "refused"
    return "finished"


@pytest.mark.parametrize("killed", [False, True])
def test_another_host_during_a_run(stage: dict[str, Scene], tmp_path: Path, killed: bool) -> None:
    """Hosts that share a directory disturb each other at no call; nor does it matter if one is killed there."""
    both, first, last, root = stage["ranks"], stage["first-rank"], stage["last-rank"], tmp_path / "root"
    for n in until_undisturbed():
        both.prepare(root)
        other = mock.Mock(side_effect=lambda: last.run(root, QUICK))
        files = Faulty(n, None) if killed else Meanwhile(n, other)
        with survived() as ended:
            first.run(root, replace(QUICK, files=files))
        if killed and ended:
            other()
            if both.state(root) == "unfinished":
                first.run(root, QUICK)
        if not other.called:
            break
        assert both.state(root) == "complete"
        assert tree(root).keys() == {f"out/{name}" for name in both.expected}, "something is left over"


def test_workers_die_at_any_call(stage: dict[str, Scene], tmp_path: Path) -> None:
    """With threads the n-th call is another one each time; every number of calls is visited all the same."""
    scene, root = stage["split"], tmp_path / "root"
    with mock.patch("tpshard.execute.writer.run", tpshard.execute.run.run):
        for n in until_undisturbed():
            scene.prepare(root)
            files = Faulty(n, None if n % 2 else errno.EIO)
            with survived() as ended:
                scene.run(root, Settings(workers=3, files=files))
            if files.hit is None:
                break
            assert isinstance(ended[0], Died if n % 2 else LocalIOError)
            scene.state(root)
            scene.again(root, replace(QUICK, workers=2))
