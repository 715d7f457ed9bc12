"""What depends on each index of a model's parameters, by gradients; of those that are streamed none is kept."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tpshard.verifier.hf.streamed import Streamed


class _Read(torch.autograd.Function):
    """Rows that are read, whose gradient is given to who wants it and kept by nobody."""

    @staticmethod
    def forward(
        ctx: Any, handle: Tensor, rows: Callable[[int, int], Tensor], start: int, stop: int, add: Callable[..., None]
    ) -> Tensor:
        ctx.add = add
        return rows(start, stop).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.add(*grads)
        return (None,) * 5


class Gradients:
    """The largest gradient of each index of each parameter, along each of its dims.

    Parameters in memory have one gradient, and those that are streamed one for every time that rows of them are read;
    what was read is not kept for it but read again.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self.largest = {name: [torch.zeros(n, dtype=p.dtype) for n in p.shape] for name, p in parameters.items()}
        self._handle = torch.zeros((), dtype=torch.float64, requires_grad=True)
        self._read: dict[int, tuple[StorageWeakRef, Callable[[], Tensor]]] = {}

    @contextmanager
    def wanted(self) -> Iterator[None]:
        """Operations are noted for the time of a `with`."""
        streamed = {name: p for name, p in self.parameters.items() if isinstance(p, Streamed)}
        kept = [p for name, p in self.parameters.items() if name not in streamed]
        for parameter in kept:
            parameter.requires_grad_(True)
        for name, each in streamed.items():
            each.reader = partial(self._reader, name)
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._put_away, self._again):
                yield
        finally:
            for parameter in kept:
                parameter.requires_grad_(False)
            for each in streamed.values():
                each.reader = None

    def find(self, total: Tensor) -> None:
        """The gradients of a number that was computed while they were wanted."""
        kept = {name: p for name, p in self.parameters.items() if not isinstance(p, Streamed)}
        grads = torch.autograd.grad(total, [self._handle, *kept.values()], allow_unused=True)[1:]
        for name, grad in zip(kept, grads, strict=True):
            if grad is not None:
                self._add(name, 0, grad)

    def of_no_use(self, rows: Callable[[int, int], Tensor], start: int, stop: int) -> Tensor:
        """The reader of what is computed with while nobody asks for its gradients."""
        part = rows(start, stop)
        return self._noted(part, lambda: rows(start, stop))

    def _reader(self, name: str, rows: Callable[[int, int], Tensor], start: int, stop: int) -> Tensor:
        if not torch.is_grad_enabled():
            return rows(start, stop)
        part: Tensor = _Read.apply(self._handle, rows, start, stop, partial(self._add, name, start))  # type: ignore[no-untyped-call]
        return self._noted(part, lambda: rows(start, stop))

    def _noted(self, part: Tensor, again: Callable[[], Tensor]) -> Tensor:
        storage = part.untyped_storage()
        self._read[storage._cdata] = StorageWeakRef(storage), again  # type: ignore[no-untyped-call]
        return part

    def _put_away(self, saved: Tensor) -> Any:
        """What the backward pass finds of a tensor: of one that was read, how to read it again."""
        storage = saved.untyped_storage() if saved.layout == torch.strided else None
        _, again = self._read.get(storage._cdata if storage is not None else 0, (None, None))
        return saved if again is None else (again, saved.shape, saved.stride(), saved.storage_offset())

    def _again(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        again, shape, stride, offset = saved
        tensor: Tensor = again()
        return tensor.as_strided(shape, stride, offset)

    def _add(self, name: str, start: int, grad: Tensor) -> None:
        """Of some rows."""
        if not grad.numel():
            return
        sizes = grad.detach().abs().nan_to_num_(0.0, posinf=math.inf)
        for dim, found in enumerate(self.largest[name]):
            most = sizes.movedim(dim, 0).flatten(1).amax(-1) if sizes.dim() > 1 else sizes
            at = found[start : start + len(most)] if dim == 0 else found
            torch.maximum(at, most.to(at), out=at)
