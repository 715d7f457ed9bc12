"""The command in a process of its own, which waits half-way until it is let on."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 300
"""Seconds until a process that does not do what it should has hung."""
_SCRIPT = """
    import json, os, socket, sys, time
    sys.path.insert(0, {tests!r})
    import tpshard.execute.writer
    from tests.crash.scene import fine_grained
    from tpshard.cli.main import main
    from tpshard.storage.files import Files

    if host := {host!r}:  # whatever a program may ask for to tell hosts apart
        name = os.uname_result((os.uname().sysname, host, *os.uname()[2:]))
        os.uname, socket.gethostname = lambda: name, lambda: host
        tpshard.storage.files.boot_id = tpshard.execute.writer.boot_id = lambda: host
        os.getpid = lambda: {pid}

    write, vouched = Files.pwritev, []

    def wait_and_write(self, fd, buffers, offset):
        if bytes(buffers[0][:8]) == b'{{"run": ':
            count = write(self, fd, buffers, offset)
            vouched.append(json.loads(bytes(buffers[0]))["offset"])
            return count
        while len(vouched) >= {files} and max(vouched) >= {vouched} and not os.path.exists({gate!r}):
            open({gate!r} + ".reached", "w").close()
            time.sleep(0.01)
        return write(self, fd, buffers, offset)

    Files.pwritev = wait_and_write
    with fine_grained():
        main(sys.argv[1:])
"""


def halting(gate: Path, files: int, vouched: int, *arguments: str, host: str = "") -> subprocess.Popen[str]:
    """Start the command; it waits for `gate` when it has begun so many files and journalled so many bytes of one.

    host: the name and the boot id of another host that it runs on, with the process id of this one.
    """
    known = {"tests": str(Path(__file__).parents[2]), "gate": str(gate), "host": host, "pid": os.getpid()}
    script = textwrap.dedent(_SCRIPT).format(files=files, vouched=vouched, **known)
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def reached(gate: Path) -> bool:
    """Whether the process that waits for `gate` is there."""
    return gate.with_name(gate.name + ".reached").exists()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until something has happened in a process that must not end before."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
