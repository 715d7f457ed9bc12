"""Commands in processes of their own that need not import torch first: a server that has imported it forks for each.

`start` gives a folder with `python` and `tpshard`, to be put into PATH or in the place of `sys.executable`. They hand
their arguments, directory, environment and open files to the server, and end as the process ends that it forked.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]
PRELOADED = (
    "tpshard.cli.main", "tpshard.api.verify", "tpshard.verifier.run", "tpshard.verifier.builtin.prepare",
    "tpshard.verifier.hf.prepare", "torch.distributed", "transformers.models.llama.modeling_llama",
)  # fmt: skip
_CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps([{before!r} + sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(asked).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(asked)
    code = int(server.recv(8))
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextmanager
def start() -> Iterator[Path]:
    """The folder of the commands, while the server runs."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))  # short: the address of a socket has at most 107 bytes
    address = str(folder / "socket")
    for name, before in {"python": [], "tpshard": ["-m", "tpshard"]}.items():
        (folder / name).write_text(_CLIENT.format(python=sys.executable, address=address, before=before))
        (folder / name).chmod(stat.S_IRWXU)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.helpers.warm", address]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdin is not None and server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield folder
        server.communicate()  # the end of its input is the end of it, also when this process is killed
    shutil.rmtree(folder)


def serve(address: str) -> None:
    """Fork for every connection, until stdin ends."""
    for name in PRELOADED:
        import_module(name)
    gc.freeze()  # what a collection touches a forked process would have to copy
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while 0 not in select.select([listening, 0], [], [])[0]:
            asking, _ = listening.accept()
            with asking:
                size, files, _, _ = socket.recv_fds(asking, 8, 3)
                if not os.fork():
                    listening.close()
                    _tend(asking, int.from_bytes(size, "little"), files, Path(address).with_name("python"))
                for file in files:
                    os.close(file)
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    with suppress(ChildProcessError):
        while True:
            os.wait()


def _tend(asking: socket.socket, size: int, files: list[int], python: Path) -> None:
    """Fork the process that was asked for and say how it ended; kill it when whoever asked is gone."""
    with asking.makefile("rb", buffering=0) as stream:
        asked = b""
        while len(asked) < size:
            asked += stream.read(size - len(asked))
    process = os.fork()
    if not process:
        asking.close()
        _become(*json.loads(asked), files, python)
    for file in [0, 1, 2, *files]:
        os.close(file)
    threading.Thread(target=lambda: (asking.recv(1), os.kill(process, signal.SIGKILL)), daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with suppress(BrokenPipeError):
        asking.sendall(str(code).encode())
    os._exit(0)


def _become(
    arguments: list[str], directory: str, environment: dict[str, str], files: list[int], python: Path
) -> NoReturn:
    """Run as an interpreter that was started so, to the end."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = str(python)
    sys.path[:0] = ["", *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    code = _code(arguments)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


def _code(arguments: list[str]) -> int:
    """Run `-m MODULE …`, `-c TEXT …`, a file, or what stdin holds, as an interpreter does; the exit code."""
    try:
        match arguments:
            case ["-u", *rest]:
                return _code(rest)
            case ["-m", module, *rest]:
                sys.argv = [module, *rest]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case ["-c", text, *rest]:
                sys.argv = ["-c", *rest]
                exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
            case [file, *rest]:
                sys.argv = [file, *rest]
                runpy.run_path(file, run_name="__main__")
            case []:
                exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
