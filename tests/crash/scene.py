"""What the crash tests share: a tiny real checkpoint, the commands that write, and what must be true after each crash.

A scene is one command that can be repeated: an output directory, what was there before, and what must be there in the
end, byte for byte.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import tpshard
from tests.crash.fine import SIZES
from tests.crash.seams import CALLS, READS, Faulty, Recorder, one_thread, survived
from tests.helpers.checkpoints import make, sharded
from tpshard.errors import TargetError, TpshardError
from tpshard.execute.publish import Settings
from tpshard.storage.names import LOCK, SUMS

SMALL = {
    "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "vocab_size": 29,
}  # fmt: skip
Tree = dict[str, bytes]
_PATCHING = threading.Lock()
"""Several faults are looked at at the same time, and a patch that two threads make stays when both are done."""
WRITES = [call for call in CALLS if call not in READS]


def tiny(root: Path, seed: int = 0, scale: int = 1) -> Path:
    """A LLaMA of 13 kB in two files, with a folder: replicated KV heads at tp 4, a padded vocab at tp 2 and 4.

    scale: how many times as wide it is, and so more than as many times as large.
    """
    widths = {name: SMALL[name] * scale for name in ("hidden_size", "intermediate_size")}
    made = make("llama-gqa", root / f"made-{seed}", seed, **{**SMALL, **widths})
    model = sharded(made, root / f"tiny-{seed}", max_shard_size=_size(made) // 2)
    (model / f"folder-{seed}").mkdir()
    (model / f"folder-{seed}" / "more.txt").write_text("more")
    return model


def _size(model: Path) -> int:
    return (model / "model.safetensors").stat().st_size


def tree(directory: Path) -> Tree:
    """Every file under a directory, hidden ones too, by relative path; an empty directory ends in `/`."""
    found: Tree = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[name + "/"] = b""
    return found


def by_hosts(whole: Tree) -> Tree:
    """What hosts write together, each its own ranks: none of them knows every checksum, all know the small files'."""
    lines = whole[SUMS].splitlines(keepends=True)
    return {**whole, SUMS: b"".join(line for line in lines if b"  rank-" not in line)}


@contextmanager
def fine_grained() -> Iterator[None]:
    """The sizes of `crash.fine`."""
    with ExitStack() as stack:
        for name, size in SIZES.items():
            stack.enter_context(mock.patch(name, size))
        yield


@dataclass(frozen=True)
class Scene:
    """A command that writes `out` under a root of its own.

    shared: other runs write into the same directory. in_place: `out` is there, empty, and cannot be renamed over.
    begun: what a run that was killed has left in `out.partial`.
    """

    name: str
    command: Callable[[Path, Settings], object]
    expected: Tree
    before: Tree = field(default_factory=dict)
    begun: Tree = field(default_factory=dict)
    overwrite: bool = False
    shared: bool = False
    in_place: bool = False

    def out(self, root: Path) -> Path:
        """Where the command writes."""
        return root / "out"

    def prepare(self, root: Path) -> None:
        """Make the root as it is before the command."""
        shutil.rmtree(root, ignore_errors=True)
        (self.out(root) if self.in_place else root).mkdir(parents=True)
        before = {self.out(root) / name: data for name, data in self.before.items()}
        begun = {self.out(root).with_name("out.partial") / name: data for name, data in self.begun.items()}
        for path, data in (before | begun).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def run(self, root: Path, settings: Settings) -> None:
        """Run the command."""
        if not self.in_place:
            self.command(self.out(root), settings)
            return
        with _PATCHING, mock.patch("tpshard.execute.target.replaceable", return_value=False):
            self.command(self.out(root), settings)

    def state(self, root: Path) -> str:
        """absent, old, complete or unfinished; AssertionError when the output is none of them, or pretends to be.

        An output that is renamed into place is never unfinished. One that grows where it is may be whole while its
        journals are still there; before that `check` and `merge` must tell.
        """
        out = self.out(root)
        if not out.exists():
            return "absent"
        if self.in_place and not any(out.iterdir()):
            return "old"
        found = {name: data for name, data in tree(out).items() if name != LOCK}  # empty, and taken away next time
        if found == self.expected:
            assert looks_complete(out) or self.name.startswith(("merge", "first-rank"))
            return "complete"
        if found == self.before:
            return "old"
        growing = self.shared or self.in_place
        assert growing, f"{self.name}: {sorted(found)} is neither the old output nor the new one"
        whole = self.expected.items() <= found.items()
        assert looks_complete(out) == whole, f"{self.name}: {sorted(found)} looks {'un' if whole else ''}finished"
        return "unfinished"

    def again(self, root: Path, settings: Settings) -> None:
        """The same command once more: it finishes, or says that it had finished; and nothing else is left."""
        before = self.state(root)
        try:
            self.run(root, settings)
        except TargetError as error:
            assert before == "complete", f"{self.name}: refused from {before}: {error}"
        found = tree(root)
        assert found == {f"out/{name}": data for name, data in self.expected.items()}, differences(found, self.expected)


def looks_complete(out: Path) -> bool:
    """Whether `check` has nothing to complain about."""
    try:
        return tpshard.check(out, settings=Settings(workers=1)).equal
    except TpshardError:
        return False


def differences(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> str:
    """What is missing, left over or different, in words."""
    wanted = {f"out/{name}": data for name, data in expected.items()}
    missing, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    other = [name for name in wanted.keys() & found.keys() if wanted[name] != found[name]]
    return f"missing {missing}, left over {more}, different {other}"


def undisturbed(command: Callable[[Path, Settings], object], root: Path) -> Tree:
    """What a command writes that nothing disturbs."""
    out = root / "undisturbed"
    shutil.rmtree(out, ignore_errors=True)
    command(out, Settings(workers=2, fsync=False))
    found = tree(out)
    shutil.rmtree(out)
    return found


def half_way(command: Callable[[Path, Settings], object], root: Path, left: str) -> Tree:
    """What a command leaves under this name that is killed in its middle; its journals vouch for something."""
    place = root / "half-way"
    recorder = Recorder()
    with fine_grained(), one_thread():
        command(place / "whole", Settings(workers=1, files=recorder))
        with survived():
            command(place / "out", Settings(workers=1, files=Faulty(recorder.count(*WRITES) * 2 // 3, None)))
    found = tree(place / left)
    assert any(b'"offset": 0' not in data for name, data in found.items() if data.startswith(b'{"run": ')), sorted(
        found
    )
    shutil.rmtree(place)
    return found


def scenes(root: Path, scale: int = 1) -> dict[str, Scene]:
    """One scene for every way to write: staged, shared, in place, replacing, going on."""
    source, other = tiny(root, 0, scale), tiny(root, 1, scale)
    quick = Settings(workers=2, fsync=False)
    shards, others = root / "shards", root / "others"
    tpshard.split(source, 4, shards, settings=quick)
    tpshard.split(other, 4, others, settings=quick)

    def split(out: Path, settings: Settings) -> object:
        return tpshard.split(source, 2, out, settings=settings)

    def ranks(out: Path, settings: Settings) -> object:
        return tpshard.split(source, 2, out, ranks=[0, 1], settings=settings)

    def first_rank(out: Path, settings: Settings) -> object:
        return tpshard.split(source, 2, out, ranks=[0], settings=settings)

    def last_rank(out: Path, settings: Settings) -> object:
        return tpshard.split(source, 2, out, ranks=[1], settings=settings)

    def merge(out: Path, settings: Settings) -> object:
        return tpshard.merge(shards, out, settings=settings)

    def reshard(out: Path, settings: Settings) -> object:
        return tpshard.reshard(shards, 2, out, settings=settings)

    def reshard_ranks(out: Path, settings: Settings) -> object:
        return tpshard.reshard(shards, 2, out, ranks=[0, 1], settings=settings)

    def parts(out: Path, settings: Settings) -> object:
        return tpshard.split(source, 2, out, max_file_size=_size(root / "made-0") // 4, settings=settings)

    whole = undisturbed(split, root)
    old = tree(others)
    old_model = undisturbed(lambda out, settings: tpshard.merge(others, out, settings=settings), root)
    old_model = {name: data for name, data in old_model.items() if "/" not in name}  # no list says that they are ours
    merged = undisturbed(merge, root)
    first = undisturbed(first_rank, root)
    found = [
        Scene("split", split, whole),
        Scene("split-parts", parts, undisturbed(parts, root)),
        Scene("ranks", ranks, by_hosts(whole), shared=True),
        Scene("first-rank", first_rank, first, shared=True),
        Scene("last-rank", last_rank, by_hosts(whole), before=first, shared=True),
        Scene("merge", merge, merged),
        Scene("reshard", reshard, whole),
        Scene("overwrite", split, whole, before=old, overwrite=True),
        Scene("reshard-ranks", reshard_ranks, by_hosts(whole), shared=True),
        Scene("reshard-overwrite", reshard, whole, before=old, overwrite=True),
        Scene("merge-overwrite", merge, merged, before=old_model, overwrite=True),
        Scene("resume", split, whole, begun=half_way(split, root, "out.partial")),
        Scene("resume-ranks", ranks, by_hosts(whole), before=half_way(ranks, root, "out"), shared=True),
        Scene("merge-resume", merge, merged, begun=half_way(merge, root, "out.partial")),
        Scene("in-place", split, whole, in_place=True),
    ]
    return {scene.name: scene for scene in found}
