"""Ranks that exchange tensors: alone, as threads in lock-step, or as processes of torch.distributed."""

import pickle
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from tpshard.errors import TpshardError

T = TypeVar("T")
HEADER = 8
"""Numbers that precede every exchange between processes: the number of dims, and as many sizes."""


def slice_of(total: int, size: int, rank: int) -> tuple[int, int]:
    """First and last-plus-one element of a rank's contiguous slice; the first `total % size` ranks get one more."""
    whole, extra = divmod(total, size)
    start = rank * whole + min(rank, extra)
    return start, start + whole + (1 if rank < extra else 0)


class Group(ABC):
    """One rank's view of its group. Every collective must be called by all ranks, in the same order."""

    rank: int
    size: int

    @abstractmethod
    def exchange_object(self, value: Any) -> list[Any]:
        """Every rank's small Python value, in rank order."""

    def exchange(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order; shapes may differ, dtypes and numbers of dims may not."""
        return self.exchange_object(x)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, added in rank order so that it repeats bit for bit."""
        return reduce(add, self.exchange(x))

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """The ranks' tensors joined along a dim; their sizes there may differ."""
        return torch.cat(self.exchange(x), dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's slice (see `slice_of`) of the sum over ranks along a dim."""
        start, stop = slice_of(x.shape[dim], self.size, self.rank)
        return reduce(add, [part.narrow(dim, start, stop - start) for part in self.exchange(x)])

    def barrier(self) -> None:
        """Return once all ranks have come here."""
        self.exchange_object(None)


class Single(Group):
    """The group of one rank: every collective is the identity."""

    rank = 0
    size = 1

    def exchange_object(self, value: Any) -> list[Any]:
        return [value]


class _Stopped(Exception):
    """Another rank failed, so this one cannot go on."""


class _Baton:
    """Lets exactly one rank run at a time, in rank order, from one collective to the next.

    One running rank means no races, no oversubscribed cores, and the same order of work in every run. Slots are kept
    for two rounds: a rank that has gone on to its next collective must not overwrite what later ranks still read.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.turn = 0
        self.slots: list[list[Any]] = [[None] * size, [None] * size]
        self.ended: int | None = None  # after how many rounds the first finished rank ended
        self.error: BaseException | None = None
        self.changed = threading.Condition()

    def wait_for(self, rank: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.error is not None or self.turn == rank)
            if self.error is not None:
                raise _Stopped

    def pass_on(self) -> None:
        with self.changed:
            self.turn = (self.turn + 1) % self.size
            self.changed.notify_all()

    def finish(self, rounds: int) -> None:
        assert self.ended in (None, rounds), "ranks disagree on the number of collectives"
        self.ended = rounds
        self.pass_on()

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()


class _Thread(Group):
    def __init__(self, baton: _Baton, rank: int) -> None:
        self.baton = baton
        self.rank = rank
        self.size = baton.size
        self.rounds = 0

    def exchange_object(self, value: Any) -> list[Any]:
        baton = self.baton
        slots = baton.slots[self.rounds % 2]
        self.rounds += 1
        slots[self.rank] = value
        self._check()
        baton.pass_on()
        baton.wait_for(self.rank)
        self._check()
        return list(slots)

    def _check(self) -> None:
        ended = self.baton.ended
        assert ended is None or ended >= self.rounds, "ranks disagree on the number of collectives"


class Threads:
    """All ranks in one process, on one device, each running until its next collective before the next rank does."""

    def __init__(self, size: int) -> None:
        assert size >= 1
        self.size = size
        self.here = range(size)  # the ranks that this process runs: all

    def together(self, work: Callable[[], T]) -> T:
        """`work()`, without gradients: this is the only process."""
        with torch.no_grad():
            return work()

    once = together

    def run(self, work: Callable[[Group], T]) -> list[T]:
        """`work(group)` on every rank, without gradients; their results in rank order.

        An exception of a rank stops the others and is raised here.
        """
        if self.size == 1:
            return [self.together(lambda: work(Single()))]
        baton = _Baton(self.size)
        results: dict[int, T] = {}

        def body(rank: int) -> None:
            try:
                baton.wait_for(rank)
                group = _Thread(baton, rank)
                with torch.no_grad():
                    results[rank] = work(group)
                baton.finish(group.rounds)
            except _Stopped:
                pass
            except BaseException as error:  # raised again by the caller's thread
                baton.fail(error)

        threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in self.here]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if baton.error is not None:
            raise baton.error
        return [results[rank] for rank in self.here]


class Distributed(Group):
    """A process of torch.distributed (its default group must be up): NCCL, or gloo for any device and dtype.

    Sums over gloo are made here, from an all-gather of bytes: gloo itself lacks some dtypes, has no CUDA, and adds in
    an order of its own. Every collective begins with all ranks' shapes, so that a rank which failed can say so instead
    of leaving the others to wait.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        gpu = dist.get_backend() == "nccl"
        self.where = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")

    def announce(self, shape: Sequence[int] | None) -> list[tuple[int, ...]]:
        """Every rank's shape. None says that this rank failed, which ends the collective on all of them."""
        mine = [-1] if shape is None else [len(shape), *shape]
        assert len(mine) <= HEADER
        header = torch.tensor(mine + [0] * (HEADER - len(mine)), device=self.where)
        headers = [torch.empty_like(header) for _ in range(self.size)]
        dist.all_gather(headers, header)
        shapes = [each.tolist() for each in headers]
        if any(each[0] < 0 for each in shapes):
            raise _Stopped
        return [tuple(each[1 : 1 + each[0]]) for each in shapes]

    def exchange(self, x: Tensor) -> list[Tensor]:
        sizes = self.announce(x.shape)
        lengths = [torch.Size(each).numel() * x.element_size() for each in sizes]
        mine = torch.zeros(max(*lengths, 1), dtype=torch.uint8, device=self.where)
        if x.numel():
            mine[: lengths[self.rank]] = x.detach().contiguous().to(self.where).flatten().view(torch.uint8)
        others = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(others, mine)
        parts = zip(others, lengths, sizes, strict=True)
        return [raw[:length].view(x.dtype).reshape(size).to(x.device) for raw, length, size in parts]

    def exchange_object(self, value: Any) -> list[Any]:
        raw = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        return [pickle.loads(bytes(each.tolist())) for each in self.exchange(raw)]


class Processes:
    """The ranks of a torch.distributed group, of which this process is one."""

    def __init__(self) -> None:
        self.group = Distributed()
        self.size = self.group.size
        self.here = range(self.group.rank, self.group.rank + 1)  # the ranks that this process runs
        self.shared: BaseException | None = None  # an error that all ranks know already

    def run(self, work: Callable[[Group], T]) -> list[T]:
        """`work(group)` on this rank; every rank's result, in rank order, on every rank."""
        return self.together(lambda: self.group.exchange_object(work(self.group)))

    def together(self, work: Callable[[], T]) -> T:
        """`work()`, without gradients, in every process; the first error of any rank is raised on all of them."""
        failed: Exception | None = None
        try:
            with torch.no_grad():
                result = work()
            self.group.announce(())
            return result
        except _Stopped:
            pass
        except Exception as error:
            if error is self.shared:
                raise
            failed = error
            try:
                self.group.announce(None)
            except _Stopped:
                pass
            except RuntimeError:  # the group itself broke: nobody is there to be told
                raise error from None
        told = self.group.exchange_object(None if failed is None else _portable(failed, self.group.rank))
        self.shared = next(error for error in told if error is not None)
        raise self.shared

    def once(self, work: Callable[[], T]) -> T:
        """`work()` on rank 0 alone; its result on every rank."""
        return cast(T, self.run(lambda group: work() if group.rank == 0 else None)[0])


def _portable(error: Exception, rank: int) -> Exception:
    """An error that another process can raise: an unexpected one becomes a RuntimeError with its text."""
    if isinstance(error, (TpshardError, OSError, torch.OutOfMemoryError)):
        return error
    return RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")
