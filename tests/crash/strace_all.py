"""Fault injection into the real command: SIGKILL, ENOSPC and EIO at every system call that touches its output.

strace first lists the calls of an undisturbed run, then repeats the run once for each call and fault. After each of
them the output must be absent, the old one, complete or resumable, and the same command must end with the same bytes.
A call that fails by itself, such as opening what is not there yet, is one of them.

    python -m tests.crash.strace_all [--jobs 2] [--sample 20] [SCENE ...]
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS.parent))

from tests.crash.scene import Scene, scenes, tree  # noqa: E402
from tpshard.errors import TpshardError  # noqa: E402
from tpshard.execute.publish import Settings  # noqa: E402

CALLS = (
    "write", "writev", "pwrite64", "pwritev", "pwritev2", "copy_file_range", "sendfile", "splice", "fallocate",
    "ftruncate", "truncate", "fsync", "fdatasync", "sync_file_range", "syncfs", "open", "openat", "openat2", "creat",
    "mkdir", "mkdirat", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "unlink",
    "unlinkat", "rmdir",
)  # fmt: skip
FAULTS = {"killed": "signal=SIGKILL", "ENOSPC": "error=ENOSPC", "EIO": "error=EIO"}
LIMIT = 300  # seconds for one run


@dataclass(frozen=True)
class Command:
    """A scene as a command line. exact: without threads, every call of the listing must be hit.

    With threads the calls come in another order each time, and some only in some runs: those that came are counted.
    """

    scene: Scene
    arguments: tuple[str, ...]
    exact: bool

    @property
    def name(self) -> str:
        """How it is called on the command line of this script."""
        return self.scene.name if self.exact else f"{self.scene.name}-threads"

    def argv(self, root: Path) -> list[str]:
        """The command for an output under `root`."""
        program = [str(TESTS / "crash" / "driver.py")] if self.exact else ["-m", "tpshard"]
        more = ["--overwrite"] if self.scene.overwrite else []
        return [sys.executable, *program, *self.arguments, *more, "-o", str(self.scene.out(root))]


@dataclass(frozen=True)
class Call:
    """The n-th call of a name in its thread that mentions a path, which is relative to the root."""

    name: str
    path: str
    n: int


@dataclass(frozen=True)
class Result:
    """What a fault led to: where the command ended, or what is wrong with it; both None when the call did not come."""

    outcome: str | None = None
    wrong: str | None = None


def commands(base: Path, scale: int = 1) -> list[Command]:
    """Every way to write, exactly; and those with most going on at once, as the command runs for users."""
    found = scenes(base, scale)
    source, shards = str(base / "tiny-0"), str(base / "shards")
    split = ("split", source, "--tp", "2")
    arguments = {
        "split": split,
        "ranks": (*split, "--ranks", "0,1"),
        "last-rank": (*split, "--ranks", "1"),
        "merge": ("merge", shards),
        "reshard": ("reshard", shards, "--tp", "2"),
        "overwrite": split,
        "reshard-ranks": ("reshard", shards, "--tp", "2", "--ranks", "0,1"),
        "reshard-overwrite": ("reshard", shards, "--tp", "2"),
        "merge-overwrite": ("merge", shards),
        "resume": split,
        "resume-ranks": (*split, "--ranks", "0,1"),
        "merge-resume": ("merge", shards),
        "in-place": split,
    }
    exact = [Command(found[name], given, True) for name, given in arguments.items()]
    most = ("split", "ranks", "resume", "overwrite")
    return exact + [Command(found[name], (*arguments[name], "--workers", "2"), False) for name in most]


def strace(command: Command, root: Path, *options: str) -> tuple[int, str]:
    """Run a command under strace on a fresh root: exit code and log. What it says is in files beside the root."""
    command.scene.prepare(root)
    log = root.parent / "log"
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": str(TESTS.parent)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(root.parent.parent / "bytecode")}
    with (root.parent / "stdout").open("wb") as stdout, (root.parent / "stderr").open("wb") as stderr:
        done = subprocess.run(
            ["strace", "-f", "-y", "-s", "0", "-o", str(log), *options, *command.argv(root)],
            stdout=stdout,
            stderr=stderr,
            env=environment,
            cwd=command.scene.out(root) if command.scene.in_place else None,  # which no rename may take away
            timeout=LIMIT,
        )
    return done.returncode, log.read_text(errors="replace")


def calls(log: str, root: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Thread, name and paths, relative to the root, of every call of a log that touches the output, stdout or stderr.

    With what failed by itself: strace counts all calls of a thread when it looks for the n-th.
    """
    for line in log.splitlines():
        match = re.match(r"(\d+) +(\w+)\((.*)", line)
        if match is None:
            continue
        mentioned = re.findall(r'"([^"]*)"|<(/[^>]*)>', match[3].replace("AT_FDCWD<", "<cwd "))
        paths = [a or b for a, b in mentioned]
        ours = [os.path.relpath(path, root) for path in paths if path.startswith(str(root.parent))]
        if ours:
            yield match[1], match[2], ours


def listing(command: Command, root: Path) -> list[Call]:
    """The calls of an undisturbed run."""
    names = ",".join(f"?{name}" for name in CALLS)
    code, log = strace(command, root, "-e", f"trace={names}")
    if code != 0 or command.scene.state(root) != "complete":
        raise SystemExit(f"{command.name}: an undisturbed run under strace exits with {code}\n{log[-2000:]}")
    seen: Counter[tuple[str, str, str]] = Counter()
    found: dict[Call, None] = {}  # threads may have calls in common
    for thread, name, paths in calls(log, root):
        for path in set(paths):
            seen[thread, name, path] += 1
        found[Call(name, paths[0], seen[thread, name, paths[0]])] = None
    return list(found)


def inject(command: Command, root: Path, call: Call, fault: str) -> Result:
    """Run with one fault, judge what it leaves, run again, judge the end."""
    path, killed = os.path.normpath(root / call.path), fault == "killed"
    options = ["-P", path, "-e", f"trace={call.name}", "-e", f"inject={call.name}:{FAULTS[fault]}:when={call.n}"]
    # strace stops only at the calls that it wants to see with --seccomp-bpf, but then (6.1) it sends no signals.
    code, log = strace(command, root, *([] if killed else ["--seccomp-bpf"]), *options)
    came = [number for number, line in enumerate(log.splitlines(), 1) if re.search(r"SIGKILL|\(INJECTED\)", line)]
    if not came:
        assert code == 0, f"nothing was injected, and the run exits with {code}"
        return Result()
    if command.exact:
        assert came[0] == call.n + killed, f"line {came[0]} of the log instead of {call.n}"
    stderr = (root.parent / "stderr").read_text()
    assert code == (-9 if killed else 6), f"exit code {code}: {stderr}"
    assert "Traceback" not in stderr, stderr
    assert killed or stderr.count("error: ") == 1, stderr
    state = command.scene.state(root)
    if command.scene.overwrite and not killed:
        assert state in ("old", "complete"), f"the old output is {state}"
        assert ("untouched" in stderr) == (state == "old"), stderr
    left = command.scene.out(root).with_name("out.partial").exists()
    command.scene.again(root, Settings(workers=1, fsync=False, overwrite=command.scene.overwrite))
    return Result(outcome=f"{state} + partial" if left else state)


def attack(command: Command, base: Path, jobs: int, sample: int | None) -> Tally:
    """Every fault at every call, or a random sample of them."""
    roots: SimpleQueue[Path] = SimpleQueue()
    for job in range(jobs):
        roots.put(base / f"job-{job}" / "root")
    first = roots.get()
    found = listing(command, first)
    roots.put(first)

    def one(call: Call, fault: str) -> Result:
        root = roots.get()
        try:
            result = inject(command, root, call, fault)
            return Result(wrong="the call did not come") if command.exact and result == Result() else result
        except (AssertionError, TpshardError, subprocess.TimeoutExpired) as error:
            return Result(wrong=f"{type(error).__name__}: {error}")
        finally:
            roots.put(root)

    work = [(call, fault) for fault in FAULTS for call in found]
    if sample is not None:
        work = random.sample(work, min(sample, len(work)))
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda item: one(*item), work))
    tally = Tally(Counter(call.name for call in found))
    for (call, fault), result in zip(work, results, strict=True):
        tally.outcomes[fault][result.outcome or ("WRONG" if result.wrong else "did not come")] += 1
        if result.wrong:
            tally.wrong.append(f"{command.name}: {fault} at {call.name} {call.path} #{call.n}: {result.wrong}")
    tally.show(command.name)
    return tally


@dataclass
class Tally:
    """How many calls there were of each name, and where each fault led."""

    calls: Counter[str]
    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: {fault: Counter() for fault in FAULTS})
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take another's numbers in."""
        self.calls += other.calls
        self.wrong += other.wrong
        for fault, counts in other.outcomes.items():
            self.outcomes[fault] += counts

    def show(self, what: str) -> None:
        """Print the numbers, and everything that is wrong."""
        kinds = ", ".join(f"{count} {name}" for name, count in self.calls.most_common())
        print(f"{what}: {self.calls.total()} calls ({kinds})")
        for fault, counts in self.outcomes.items():
            print(f"  {fault:6} {counts.total():4}: {', '.join(f'{n} {name}' for name, n in counts.most_common())}")
        for line in self.wrong:
            print(f"  {line}")
        sys.stdout.flush()


def usable() -> None:
    """Exit when there is no strace, or none that may trace."""
    if shutil.which("strace") is None:
        raise SystemExit("strace is not installed: this test needs it (apt-get install strace)")
    tried = subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-o", os.devnull, "-P", "/", "-e", "inject=fsync:error=EIO", "true"],
        capture_output=True,
        text=True,
    )
    if tried.returncode != 0:
        raise SystemExit(f"strace cannot trace here: {tried.stderr.strip()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack all scenes, or those that are named."""
    parser = argparse.ArgumentParser(description="Every fault at every system call of the real command.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time")
    parser.add_argument("--sample", type=int, help="only so many faults of each scene, chosen at random")
    parser.add_argument("scene", nargs="*", help="only these")
    given = parser.parse_args(arguments)
    usable()
    began, total = time.monotonic(), Tally(Counter())
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # else most of the time goes into waiting for fsync
    with tempfile.TemporaryDirectory(prefix="tpshard-crash-", dir=memory) as directory:
        base = Path(directory).resolve()
        every = commands(base)
        if unknown := set(given.scene) - {command.name for command in every}:
            raise SystemExit(f"no such scene: {', '.join(sorted(unknown))}")
        sources = [tree(base / name) for name in ("tiny-0", "shards")]
        for command in every:
            if not given.scene or command.name in given.scene:
                total.add(attack(command, base, given.jobs, given.sample))
        if sources != [tree(base / name) for name in ("tiny-0", "shards")]:
            total.wrong.append("a source was modified")
    print()
    total.show("all scenes")
    faults = sum(counts.total() - counts["did not come"] for counts in total.outcomes.values())
    print(f"{faults} faults in {time.monotonic() - began:.0f} s, {len(total.wrong)} wrong")
    return 1 if total.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
