"""The command in a process of its own, which waits half-way until it is let on."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 300
"""Seconds until a process that does not do what it should has hung."""
_SCRIPT = """
    import json, os, sys, time
    sys.path.insert(0, {tests!r})
    from tests.crash.scene import fine_grained
    from tpshard.cli.main import main
    from tpshard.storage.files import Files

    write, vouched = Files.pwritev, []

    def wait_and_write(self, fd, buffers, offset):
        if bytes(buffers[0][:8]) == b'{{"run": ':
            count = write(self, fd, buffers, offset)
            vouched.append(json.loads(bytes(buffers[0]))["offset"])
            return count
        while len(vouched) >= {files} and max(vouched) >= {vouched} and not os.path.exists({gate!r}):
            time.sleep(0.01)
        return write(self, fd, buffers, offset)

    Files.pwritev = wait_and_write
    with fine_grained():
        main(sys.argv[1:])
"""


def halting(gate: Path, files: int, vouched: int, *arguments: str) -> subprocess.Popen[str]:
    """Start the command; it waits for `gate` when it has begun so many files and journalled so many bytes of one."""
    tests = str(Path(__file__).parents[2])
    script = textwrap.dedent(_SCRIPT).format(tests=tests, files=files, vouched=vouched, gate=str(gate))
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until something has happened in a process that must not end before."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
