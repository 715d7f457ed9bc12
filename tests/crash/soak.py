"""Random kills of the real command: SIGKILL at any time, once or several times, then the command again.

Each round takes one of `strace_all`'s commands, as users run it, on a checkpoint of some MB. After each kill the output
must be absent, the old one, complete or resumable; the command that is let finish must leave the same bytes as one that
nothing disturbed, and nothing else.

    python -m tests.crash.soak [KILLS] [SEED]
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.crash.scene import differences, tree
from tests.crash.strace_all import LIMIT, Command, commands
from tpshard.errors import TpshardError

SCALE = 16
"""How many times as wide as `scene.tiny` the checkpoint is: writing takes a while."""
MOST = 3  # kills of one round


def run(command: Command, root: Path, seconds: float | None) -> int:
    """Run a command, killed after so many seconds if it is still running; its exit code."""
    process = subprocess.Popen(
        [*command.argv(root), "--workers", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=command.scene.out(root) if command.scene.in_place else None,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        said = process.communicate(timeout=seconds or LIMIT)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[1]
        assert seconds is not None, f"still running after {LIMIT} s"
    assert b"Traceback" not in said, said.decode()
    return process.returncode


def round_of(command: Command, root: Path, seconds: float, kills: int, chance: random.Random) -> Iterator[str]:
    """Kill a command so many times, and let it finish; where each kill left it."""
    scene = command.scene
    scene.prepare(root)
    for _ in range(kills):
        code = run(command, root, seconds * chance.uniform(0.4, 1.1))
        state = scene.state(root)
        assert code in (-9, 0, 9), f"exit {code}"
        assert code == -9 or state == "complete", f"exit {code}, and the output is {state}"
        partial = " + partial" if scene.out(root).with_name("out.partial").exists() else ""
        yield f"killed, {state}{partial}" if code == -9 else "too late"
    before = scene.state(root)
    code = run(command, root, None)
    assert code == 0 or (code == 9 and before == "complete"), f"exit {code} from {before}"
    found = tree(root)
    assert found == {f"out/{name}": data for name, data in scene.expected.items()}, differences(found, scene.expected)


def main() -> None:
    """Kill as often as the first argument says, from the seed in the second; exit 1 when something was lost."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**6)
    chance, ends, wrong, rounds = random.Random(seed), Counter[str](), 0, 0
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tpshard-soak-") as directory:
        base = Path(directory).resolve()
        every = [replace(command, exact=False) for command in commands(base, SCALE) if command.exact]
        sources = [tree(base / name) for name in ("tiny-0", "shards")]
        seconds: dict[str, float] = {}
        while sum(count for end, count in ends.items() if end != "too late") < kills:
            command = chance.choice(every)
            root, rounds = base / "root", rounds + 1
            if command.scene.name not in seconds:
                command.scene.prepare(root)
                start = time.monotonic()
                assert run(command, root, None) == 0
                seconds[command.scene.name] = time.monotonic() - start
            try:
                for end in round_of(command, root, seconds[command.scene.name], chance.randint(1, MOST), chance):
                    ends[end] += 1
            except (AssertionError, TpshardError) as error:
                wrong += 1
                ends["killed, and wrong"] += 1
                print(f"round {rounds}, {command.scene.name}: {error}", flush=True)
        assert sources == [tree(base / name) for name in ("tiny-0", "shards")], "a source was modified"
    print(", ".join(f"{count} {end}" for end, count in ends.most_common()))
    killed = sum(count for end, count in ends.items() if end != "too late")
    print(f"{killed} kills in {rounds} rounds, {time.monotonic() - begun:.0f} s, seed {seed}: {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
