"""A process for each rank: started here, or joined where torchrun or SLURM started them."""

from __future__ import annotations

import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tpshard.errors import LocalIOError, TpshardError, UsageError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from tpshard.verifier.group import Processes

T = TypeVar("T")
JOIN = timedelta(minutes=5)
"""How long ranks wait for each other at the start; after that, as long as the slowest of them computes."""
WORK = timedelta(hours=24)
LAST_WORD = timedelta(seconds=20)
"""How long the other ranks stay after they are done, so that rank 0 can say what came of it."""
_POLL = 0.1
_BEFORE = 2.0
_FAILED = "tpshard/failed"
_SPOKEN = "tpshard/spoken"
_met: Store | None = None
"""Where this process met the others, kept until it ends."""


@dataclass(frozen=True)
class Surroundings:
    """The group of processes in which this one was started, and by what; `url` is where the ranks meet."""

    starter: str
    rank: int
    size: int
    local_rank: int
    url: str


def surroundings(environment: Mapping[str, str] = os.environ) -> Surroundings | None:
    """The group that torchrun or SLURM put this process in, None when it is on its own."""
    get = environment.get
    try:
        if get("RANK") and get("WORLD_SIZE") and get("MASTER_ADDR"):
            rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            return _group("torchrun", rank, size, int(get("LOCAL_RANK") or rank), "env://")
        size = int(get("SLURM_STEP_NUM_TASKS") or get("SLURM_NTASKS") or 1)
        if get("SLURM_PROCID") and size > 1:
            rank = int(environment["SLURM_PROCID"])
            host = get("MASTER_ADDR") or first_host(get("SLURM_STEP_NODELIST") or get("SLURM_JOB_NODELIST") or "")
            port = get("MASTER_PORT") or str(20000 + int(get("SLURM_JOB_ID") or 0) % 20000)
            url = f"tcp://{host}:{port}?rank={rank}&world_size={size}"
            return _group("SLURM", rank, size, int(get("SLURM_LOCALID") or rank), url)
    except ValueError as error:
        message = "the environment of torchrun or SLURM is not as it should be"
        hint = "unset RANK, WORLD_SIZE and SLURM_PROCID to run alone"
        raise UsageError(message, found=str(error), hint=hint) from None
    return None


def _group(starter: str, rank: int, size: int, local: int, url: str) -> Surroundings | None:
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size}")
    return Surroundings(starter, rank, size, local, url) if size > 1 else None


def first_host(nodes: str) -> str:
    """The first host of SLURM's list, as in `node[01-04,7],other`; this one when there is no list."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    return match[1] + (match[2] or "") if match else "127.0.0.1"


def join(group: Surroundings, device: str, work: Callable[[Processes, int], T]) -> T:
    """`work` in the group, with NCCL where every rank has a GPU of its own, else gloo.

    It is also told how many of this host's processes share a device.
    """
    global _met
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from tpshard.verifier.group import Processes

    # Where "cuda" finds no GPU, it is `work` that refuses: all ranks can talk by then.
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if gpus:
        torch.cuda.set_device(group.local_rank % gpus)
    try:
        given = (group.rank, group.size) if group.url.startswith("file:") else (-1, -1)
        store, rank, size = next(rendezvous(group.url, *given, timeout=JOIN))
        store.set_timeout(JOIN)
        _met = store
        mine = _device(torch.cuda.current_device() if gpus else None)
        store.set(f"tpshard/device/{rank}", mine)
        devices = [store.get(f"tpshard/device/{other}").decode() for other in range(size)]
        backend = nccl_or_gloo(devices)
        store.set_timeout(WORK)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WORK)
    except (RuntimeError, ValueError, OSError) as error:
        hint = f"start all {group.size} with one torchrun or srun, or unset RANK and SLURM_PROCID to run alone"
        raise LocalIOError("the processes could not meet", found=str(error).split("\n")[0], hint=hint) from None
    try:
        return work(Processes(), devices.count(mine))
    except TpshardError as error:
        with suppress(RuntimeError):
            store.set(_FAILED, f"{rank}: {error}")
        raise
    except RuntimeError as error:  # maybe only because another is gone
        if first := _failed(store):
            raise LocalIOError(f"another process failed, rank {first}") from error
        raise
    finally:
        dist.destroy_process_group()


def _failed(store: Store) -> str:
    """Rank and words of a process that failed, empty when there is none."""
    try:
        return store.get(_FAILED).decode() if store.check([_FAILED]) else ""
    except RuntimeError:  # rank 0, which may hold the store, has ended
        return ""


def spoken() -> None:
    """By rank 0, when it has said what came of it: the others may end."""
    if _met is not None:
        with suppress(RuntimeError):  # they have ended already, and their starter with them
            _met.set(_SPOKEN, "")


def heard() -> bool:
    """By another rank, before it ends: whether rank 0 has said what came of it, which is waited for.

    torchrun and srun stop all that is left as soon as one process ends with an error.
    """
    if _met is None:  # all refuse alike before they meet, rank 0 at about the same time
        time.sleep(_BEFORE)
        return True
    try:
        _met.wait([_SPOKEN], LAST_WORD)
    except RuntimeError as error:  # DistError: the time is over, or rank 0, which may hold the store, has ended
        return "imeout" not in str(error)
    return True


def _device(index: int | None) -> str:
    """A name for a GPU, or for this host's memory, that two processes share only if they share the thing.

    By the GPU's own number, since SLURM may show each task one GPU, and then all of them are number 0.
    """
    if index is None:
        return f"cpu {socket.gethostname()}"
    import torch

    return f"gpu {socket.gethostname()} {torch.cuda.get_device_properties(index).uuid}"


def nccl_or_gloo(devices: Sequence[str]) -> str:
    """NCCL where every rank has a GPU of its own."""
    apart = len(set(devices)) == len(devices) and all(device.startswith("gpu ") for device in devices)
    return "nccl" if apart else "gloo"


def start(worker: str, options: Any, count: int, say: Callable[[str], None]) -> Any:
    """Start `count` processes on this host that verify together; rank 0's verdict, or its error, raised.

    worker: the module that each of them runs, with a folder, its rank and their number as arguments.
    """
    with tempfile.TemporaryDirectory(prefix="tpshard-") as folder, ExitStack() as stack:
        (Path(folder) / "options").write_bytes(pickle.dumps(options))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        workers = []
        for rank in range(count):
            with open(Path(folder) / f"stderr-{rank}", "wb") as errors:
                workers.append(_process(worker, folder, rank, count, environment, errors))
            stack.enter_context(workers[-1])
            stack.callback(workers[-1].wait)
            stack.callback(workers[-1].kill)

        def relay() -> None:
            for line in workers[0].stdout or ():
                say(line.decode().rstrip("\n"))

        lines = threading.Thread(target=relay, daemon=True)
        lines.start()
        bad = _wait(workers)
        if bad is not None:
            raise _ended(bad, workers[bad].returncode, Path(folder))
        lines.join()
        outcome = pickle.loads((Path(folder) / "result").read_bytes())
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def _process(
    worker: str, folder: str, rank: int, count: int, environment: Mapping[str, str], errors: Any
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", worker, folder, str(rank), str(count)],
        stdin=subprocess.PIPE,  # its end tells the worker that this process is gone
        stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
        stderr=errors,
        env=dict(environment),
    )


def _wait(workers: list[subprocess.Popen[bytes]]) -> int | None:
    """Until all have ended, or one has ended badly, since the others might wait for it for ever: that one's rank."""
    while True:
        codes = [worker.poll() for worker in workers]
        bad = [(code > 0, rank) for rank, code in enumerate(codes) if code]
        if bad:  # one that was killed before those that failed because of it
            return min(bad)[1]
        if None not in codes:
            return None
        time.sleep(_POLL)


def _ended(rank: int, code: int, folder: Path) -> Exception:
    """The error of a process that ended without a result."""
    if code < 0:
        hint = "the kernel does that when memory is short: --stream needs less"
        return LocalIOError(f"the process of rank {rank} was killed by signal {-code}", hint=hint)
    said = (folder / f"stderr-{rank}").read_text(errors="replace")
    return RuntimeError(f"the process of rank {rank} ended with {code}\n{said}")
