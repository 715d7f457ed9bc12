"""Parameters that are read by the operation which needs them, and that nobody keeps: rows, experts, or the whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tpshard.errors import UnsupportedError
from tpshard.verifier.hf.parameters import StoredParts
from tpshard.verifier.ranks.pieces import rows_at
from tpshard.verifier.ranks.weights import Weights, move

BLOCK_BYTES = 1 << 26
"""Bytes of a table of the vocabulary that are multiplied at a time."""
_TOGETHER = 64
"""Rows of a table come in multiples of this, so that each block begins where memory does for the processor."""
_READ_OF = "tpshard_read_of"
"""The attribute of a row that says of which parameter it is."""


class TooLargeError(UnsupportedError):
    """A class takes more of a parameter at once than may be in memory."""


@dataclass(frozen=True)
class Arrival:
    """How a parameter arrives: `rows(start, stop)` gives some of it, along dim 0, as they are computed with.

    name: of the parameter. most: the elements that may be in memory at once; None: all. in_blocks: whether products go
    through blocks of its rows, which gives other last bits than one product.
    """

    name: str
    rows: Callable[[int, int], Tensor]
    most: int | None = None
    in_blocks: bool = False


Reader = Callable[[Callable[[int, int], Tensor], int, int], Tensor]
"""What reads rows in the place of who asked for them: `reader(rows, start, stop)`."""


class Streamed(Tensor):
    """A tensor with a shape and no memory: an operation gets what it reads, the result is an ordinary tensor.

    Rows of an embedding, experts of a stack and blocks of a head are read alone; whatever else is done with it gets the
    whole, once, which is a TooLargeError where that is too much. reader: through which it is read, for a time.
    """

    arrival: Arrival
    reader: "Reader | None" = None

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, arrival: Arrival) -> "Streamed":
        made: Streamed = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        made.arrival = arrival
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func in _OF_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if (reading := _IN_PARTS.get(func)) is not None:
            found = reading(*args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*_whole(tuple(args)), **_whole(dict(kwargs or {})))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_whole(tuple(args)), **_whole(dict(kwargs or {})))

    def at(self, start: int, stop: int) -> Tensor:
        """Some rows."""
        read = self.arrival.rows
        return read(start, stop) if self.reader is None else self.reader(read, start, stop)

    def whole(self) -> Tensor:
        """All rows."""
        most, count = self.arrival.most, self.numel()
        if most is not None and count > most:
            what = f"this class computes with all of {self.arrival.name} at once, which is not read so"
            size, least = (f"{n * self.element_size() / 1e9:.1f} GB" for n in (count, most))
            hint = "--no-stream keeps all weights in memory, --layers looks at fewer layers, --tier weights runs none"
            raise TooLargeError(what, expected=f"blocks of {least} at most", found=size, hint=hint)
        return self.at(0, self.shape[0])

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Streamed":
        """The same with each of its rows changed, as `change` makes it of any number of rows."""
        shape = change(torch.empty(self.shape, dtype=self.dtype, device="meta")).shape
        rows = self.arrival.rows
        return self.remade(shape, lambda start, stop: change(rows(start, stop)))

    def remade(self, shape: Sequence[int], rows: Callable[[int, int], Tensor]) -> "Streamed":
        """Another in its place, which is made of it: as much of that may be in memory, and it is read as this is."""
        return Streamed(shape, self.dtype, self.device, replace(self.arrival, rows=rows))


def changed(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor of which each row is changed alone; one that is read later is changed then."""
    return tensor.changed(change) if isinstance(tensor, Streamed) else change(tensor)


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """A tensor as a module holds it."""
    if isinstance(tensor, Streamed):
        return cast(nn.Parameter, tensor)
    return nn.Parameter(tensor, requires_grad=False)


def arriving(
    key: str,
    parts: StoredParts,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device,
    *,
    table: bool,
    most: int | None,
) -> Tensor:
    """A parameter of a model as it is computed with.

    table: whether it is of the vocabulary. most: the elements of it that may be in memory at once, of one that is
    streamed; None: it is read here. Experts are taken out of their stack one by one, and a large table's rows in
    blocks, either way: an operation gives the same bits whether its operands were in memory or not.
    """
    shape = parts.shape(weights)

    def read(start: int, stop: int) -> Tensor:
        rows = parts.rows(weights, start, stop)
        return move(rows, device, dtype if rows.is_floating_point() else None)

    if most is not None and len(shape) > 1:
        return in_parts(key, Streamed(shape, dtype, device, Arrival(key, read, most)), table=table)
    tensor = parts.tensor(weights)
    return in_parts(key, move(tensor, device, dtype if tensor.is_floating_point() else None), table=table)


def in_parts(key: str, tensor: Tensor, *, table: bool) -> Tensor:
    """A parameter of which operations take experts one by one, and a large table's rows in blocks."""
    in_blocks = table and tensor.dim() == 2 and tensor.numel() * tensor.element_size() > BLOCK_BYTES
    if isinstance(tensor, Streamed):
        tensor.arrival = replace(tensor.arrival, in_blocks=in_blocks)
    elif in_blocks or (tensor.dim() == 3 and "experts" in key):
        arrival = Arrival(key, lambda start, stop: tensor[start:stop], None, in_blocks)
        return Streamed(tensor.shape, tensor.dtype, tensor.device, arrival)
    return tensor


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor that parts are taken of, where it is in memory."""
    return tensor.whole() if isinstance(tensor, Streamed) and tensor.arrival.most is None else tensor


def zeros_like(tensor: Tensor) -> Tensor:
    """Zeros in a tensor's place."""
    if not isinstance(tensor, Streamed):
        return torch.zeros_like(tensor)
    dtype, device = tensor.dtype, tensor.device
    return tensor.remade(
        tensor.shape, lambda start, stop: torch.zeros((stop - start, *tensor.shape[1:]), dtype=dtype, device=device)
    )


def _whole(tree: Any) -> Any:
    return tree_map_only(Streamed, Streamed.whole, tree)


def _row(x: Any, index: Any) -> Tensor | None:
    """An expert, or a row, or what a further index takes of it."""
    if isinstance(index, tuple) and index:
        row = _row(x, index[0])
        return None if row is None else row[index[1:]]
    if isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point() and index.dtype != torch.bool:
        index = int(index)
    if not isinstance(index, int) or isinstance(index, bool) or not isinstance(x, Streamed):
        return None
    index = index + len(x) if index < 0 else index
    if not 0 <= index < len(x):
        raise IndexError(f"index {index} is out of bounds for {len(x)} rows")
    row = x.at(index, index + 1)[0]
    setattr(row, _READ_OF, x.arrival.name)
    return row


def _viewed(x: Tensor, *shape: Any) -> Tensor | None:
    """The same elements in another shape, where each of its rows is some whole rows: experts that lie in a matrix."""
    if not isinstance(x, Streamed) or not x.dim() or not x.numel():
        return None
    with torch._C.DisableTorchFunctionSubclass():
        found = torch.empty(x.shape, device="meta").view(*shape).shape
    some, rest = divmod(len(x), found[0]) if found else (0, 1)
    if rest or len(found) < 2 or not some:
        return None
    read = x.at
    return x.remade(found, lambda start, stop: read(start * some, stop * some).view(stop - start, *found[1:]))


def is_read_of(x: Any, parameter: Tensor | None) -> bool:
    """Whether a tensor is a row, or an expert, of this parameter."""
    return isinstance(parameter, Streamed) and getattr(x, _READ_OF, None) == parameter.arrival.name


def _embedded(ids: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor | None:
    """Rows of an embedding, each of them read once."""
    if not isinstance(weight, Streamed):
        return None
    wanted, where = torch.unique(ids, return_inverse=True)
    return F.embedding(where, rows_at(weight.at, wanted.cpu()))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """x W^T + b, of a table in blocks of its rows."""
    if not isinstance(weight, Streamed) or not weight.arrival.in_blocks:
        return None
    rows, width = weight.shape
    step = max(1, BLOCK_BYTES // max(1, width * weight.element_size()) // _TOGETHER) * _TOGETHER
    parts = [F.linear(x, weight.at(start, min(start + step, rows))) for start in range(0, rows, step)]
    product = torch.cat(parts, -1)
    return product if bias is None else product + bias


def _expert_by_expert(x: Tensor, experts: Tensor) -> Tensor | None:
    """A product for each expert."""
    if not isinstance(experts, Streamed) or isinstance(x, Streamed):
        return None
    return torch.cat([torch.bmm(x[i : i + 1], experts.at(i, i + 1)) for i in range(len(experts))])


_IN_PARTS: Mapping[Any, Callable[..., Tensor | None]] = {
    Tensor.__getitem__: _row,
    Tensor.view: _viewed,
    F.embedding: _embedded,
    F.linear: _linear,
    torch.bmm: _expert_by_expert,
    Tensor.bmm: _expert_by_expert,
}
"""What reads a part, and gives None where it needs the whole."""
_PROPERTIES = (
    *("shape", "dtype", "device", "ndim", "layout", "is_meta", "is_cuda", "is_cpu", "is_sparse", "is_quantized"),
    *("requires_grad", "is_leaf", "itemsize", "nbytes"),
)
_OF_SHAPE = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.element_size, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.numel),
}
"""What is known of a tensor without reading it."""
