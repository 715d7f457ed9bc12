"""The command in a process of its own, slow enough to be met half-way."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SLOW = """
    import sys, time
    sys.path.insert(0, {tests!r})
    from crash.scene import fine_grained
    from tpshard.cli import main
    from tpshard.files import Files

    write = Files.pwritev
    def slow(self, fd, buffers, offset):
        time.sleep(0.1)
        return write(self, fd, buffers, offset)
    Files.pwritev = slow
    with fine_grained():
        main(sys.argv[1:])
"""


def slowly(*arguments: str) -> subprocess.Popen[str]:
    """The command in a process of its own, a tenth of a second for each write."""
    script = textwrap.dedent(SLOW).format(tests=str(Path(__file__).parent.parent))
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until something has happened in a process that must not end before."""
    for _ in range(600):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail("nothing happened")
