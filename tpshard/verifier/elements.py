"""Which of the source's elements each rank must hold, by the verifier's own partition, and whether it does.

A prompt meets what it meets; here every element of every parameter counts, bit for bit.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from tpshard.errors import DifferentError
from tpshard.verifier.ranks.pieces import rows_at
from tpshard.verifier.ranks.weights import Weights
from tpshard.verifier.report.verdict import layer_of

ACTIVATION_SCALES = (
    *("input_scale", "input_scale_ub", "input_global_scale", "input_zero_point", "activation_scale", "output_scale"),
    *(f"{kind}_{what}" for kind in "qkv" for what in ("scale", "zero_point")),
)
"""How the names end of what scales activations and the KV cache: one for all, or one a head, and these in order."""
EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the name of what is of one expert, which not every rank need have."""
BLOCK_BYTES = 1 << 24
"""Bytes of a tensor that are compared at a time."""


class Readable(Protocol):
    """A tensor that is read some rows at a time; one without dims has one row."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class Held:
    """A tensor of some weights, by its name."""

    weights: Weights
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.shape(self.name)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weights.rows(self.name, start, stop) if self.shape else self.weights.get(self.name).view(1)


@dataclass(frozen=True)
class Absent:
    """What a rank has of a tensor that it need not have."""

    shape: tuple[int, ...] = (0,)

    def rows(self, start: int, stop: int) -> Tensor:
        return torch.empty(0)


@dataclass(frozen=True)
class Share:
    """What a rank must hold of a tensor: all of it, or along `dim` the indices of `order`, -1 for a zero."""

    source: Readable
    dim: int = 0
    order: Tensor | None = None

    @property
    def padding(self) -> int:
        """How many of its last rows are no rows of the source."""
        return 0 if self.dim or self.order is None else int((self.order < 0).sum())

    def fits(self, held: Readable) -> bool:
        """Whether a rank's tensor is this."""
        return self.shape == held.shape and difference(held, self) is None

    @property
    def shape(self) -> tuple[int, ...]:
        full = self.source.shape
        return full if self.order is None else (*full[: self.dim], len(self.order), *full[self.dim + 1 :])

    def rows(self, start: int, stop: int) -> Tensor:
        if self.order is None:
            return self.source.rows(start, stop)
        order = self.order if self.dim else self.order[start:stop]
        at: tuple[slice | Tensor, ...] = (slice(None),) * self.dim
        index, read = order.clamp(min=0), self.source.rows
        part = read(start, stop)[(*at, index)] if self.dim else rows_at(read, index)
        # Of elements of one byte torch fills few kinds.
        filled = part.view(torch.uint8) if part.dtype.itemsize == 1 else part
        filled[(*at, order < 0)] = 0
        return part


@dataclass(frozen=True)
class RankShares:
    """How a parameter is spread over the ranks: along which dim, how much each rank has, how much there is.

    `alike` says that every rank has all of it. starts: where each begins, if not one behind another. experts: of a
    stack of experts that are cut, how these are spread besides, along its first dim.
    """

    dim: int
    sizes: tuple[int, ...]
    total: int
    alike: bool = False
    starts: tuple[int, ...] | None = None
    experts: "RankShares | None" = None

    @property
    def firsts(self) -> list[int]:
        """Where each rank's share begins."""
        return [self.first(rank) for rank in range(len(self.sizes))]

    def first(self, rank: int) -> int:
        """Where a rank's share begins in the unsharded parameter; neighbours hold the same where there are too few."""
        if self.starts is not None:
            return self.starts[rank]
        size, tp = self.sizes[0], len(self.sizes)
        groups, rest = divmod(self.total, size) if size else (0, 0)
        if groups and not rest and set(self.sizes) == {size} and tp > groups and tp % groups == 0:
            return rank * groups // tp * size
        return 0 if self.alike else sum(self.sizes[:rank])


def needed_kv(q: Sequence[int], group: int) -> list[tuple[int, int]]:
    """The first KV head and the number of them that ranks need for their q heads, `group` of which attend to one."""
    firsts = list(accumulate(q, initial=0))
    return [(first // group, -(-last // group) - first // group) for first, last in pairwise(firsts)]


@dataclass(frozen=True)
class Parameter:
    """A tensor of the model: the source's, and what each rank has in its place.

    orders: the indices along the cut dim that each rank must hold, where they are no ranges. starts: where the ranges
    begin, where they are not one behind another. padded: whether ranks may hold zeros behind the last index. runs:
    whether the backend computes with it. known: whether the backend knows how it is cut; else ranges are tried, and
    then where each index is found. parts: of how many equal parts each rank has a range. groups: where ranks have
    some part of it and nothing of the rest (experts): such parts, and the ranks that share each. beside: of a bias, the
    weight with whose outputs it goes: where a number is there often, no search says which one is meant.
    """

    name: str
    source: Readable
    ranks: Sequence[Readable]
    orders: Sequence[Tensor] | None = None
    padded: bool = False
    runs: bool = True
    known: bool = True
    starts: Sequence[int] | None = None
    parts: int = 1
    groups: Sequence[tuple[Readable, Sequence[int]]] = ()
    beside: "Parameter | None" = None

    @cached_property
    def dim(self) -> int | None:
        """The dim along which it is cut; None where every rank has all of it. DifferentError for shapes of no cut."""
        if self.groups:
            some = 0 if any(isinstance(part, Share) for part, _ in self.groups) else None
            return next((group.dim for group in self._of_groups if group.dim is not None), some)
        full, shapes = self.source.shape, [rank.shape for rank in self.ranks]
        pairs = [zip(shape, full, strict=False) for shape in shapes]
        dims = {dim for each in pairs for dim, (mine, whole) in enumerate(each) if mine != whole}
        if len(dims) > 1 or any(len(shape) != len(full) for shape in shapes):
            raise self._differs("does not have the model's shape", list(full), ", ".join(map(str, map(list, shapes))))
        return next(iter(dims), None)

    def shares(self) -> list[Share]:
        """What each rank must hold; DifferentError where the ranks' tensors cannot be shares of the whole."""
        if self.groups:
            found = dict[int, Share]()
            for group, (_, holders) in zip(self._of_groups, self.groups, strict=True):
                found |= zip(holders, group.shares(), strict=True)
            return [found.get(rank, Share(Absent())) for rank in range(len(self.ranks))]
        if self.dim is None:
            return [Share(self.source) for _ in self.ranks]
        return [Share(self.source, self.dim, order) for order in self._own]

    @cached_property
    def _of_groups(self) -> list["Parameter"]:
        return [
            replace(self, source=part, ranks=[self.ranks[rank] for rank in holders], groups=())
            for part, holders in self.groups
        ]

    @cached_property
    def _own(self) -> list[Tensor]:
        """The indices of each rank; where nobody knows, ranges are tried, those of two halves, and last a search."""
        assert self.dim is not None
        if (orders := self._of_outputs()) is not None:
            return orders
        total = self.source.shape[self.dim]
        parts = (self.parts,) if self.known else (1, 2)
        tried = [list(self.orders)] if self.orders else [self._ranges(self.dim, count) for count in parts]
        if not self.known:
            held_by = [rank.shape[self.dim] for rank in self.ranks]
            tried = [orders for orders in tried if [len(order) for order in orders] == held_by]
            tried = [orders for orders in tried if self.padded or int(torch.cat(orders).min()) >= 0]
        for orders in tried:
            shares = [Share(self.source, self.dim, order) for order in orders]
            if self.known or all(share.fits(held) for held, share in zip(self.ranks, shares, strict=True)):
                held = torch.cat(orders)
                short = [len(order) for order in orders] != [rank.shape[self.dim] for rank in self.ranks]
                if short or len(set(held[held >= 0].tolist())) != total or (not self.padded and bool((held < 0).any())):
                    sizes = ", ".join(str(rank.shape[self.dim]) for rank in self.ranks)
                    raise self._differs("is not held once by the ranks together", total, sizes)
                return orders
        return self._searched(self.dim, tried)

    def _of_outputs(self) -> list[Tensor] | None:
        """The indices of the weight beside, if ranks have as many outputs of it."""
        weight = self.beside
        if self.known or weight is None or weight.groups or weight.dim != 0 or len(weight.source.shape) < 2:
            return None
        alike = all(mine.shape[0] == other.shape[0] for mine, other in zip(self.ranks, weight.ranks, strict=True))
        return weight._own if alike and self.source.shape[0] == weight.source.shape[0] else None

    def _searched(self, dim: int, tried: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Where the source has what each rank holds: every index, and each as often as it likes.

        Ranks that hold as many indices as there are hold each of them once. Where values repeat, as in a norm, and one
        of them is there too often, some element is wrong: the nearest order that was `tried` says which.
        """
        wide = len({each.rows(0, 0).dtype for each in (self.source, *self.ranks)}) > 1
        source = list(_slices(self.source, dim, wide))
        places: dict[bytes, int] = {}
        first = [places.setdefault(piece, index) for index, piece in enumerate(source)]
        if self.padded:
            places.setdefault(bytes(len(source[0])), -1)
        orders = []
        for rank, held in enumerate(self.ranks):
            indices = [places.get(piece) for piece in _slices(held, dim, wide)]
            if None in indices:
                what = f"holds at index {indices.index(None)} of dim {dim} what the source does not have"
                raise self._differs(f"of rank {rank} {what}", None, None)
            orders.append(torch.tensor(indices))
        found = torch.cat(orders).tolist()
        lacking = set(places.values()) - set(found) - {-1}
        if lacking:
            raise self._differs(f"is not held by any rank at index {min(lacking)} of dim {dim}", None, None)
        if len(found) == len(source) and Counter(found) != Counter(first):
            wanted = torch.tensor(first)
            apart = [sum(int((wanted[o] != f).sum()) for o, f in zip(each, orders, strict=True)) for each in tried]
            return list(tried[apart.index(min(apart))])
        return orders

    def _ranges(self, dim: int, parts: int) -> list[Tensor]:
        """One range after another of each part; where ranks hold more than there is, neighbours hold the same."""
        sizes = tuple(rank.shape[dim] // parts for rank in self.ranks)
        total = self.source.shape[dim] // parts
        starts = tuple(self.starts) if self.starts is not None and parts == 1 else None
        shares = RankShares(dim, sizes, total, starts=starts)
        firsts = [sum(sizes[:rank]) if self.padded else shares.first(rank) for rank in range(len(sizes))]
        ranges = [torch.arange(first, first + size) for first, size in zip(firsts, sizes, strict=False)]
        return [
            torch.cat([torch.where(each < total, each + part * total, -1) for part in range(parts)]) for each in ranges
        ]

    def _differs(self, message: str, expected: object, found: object) -> DifferentError:
        return DifferentError(f"{self.name} {message}", tensor=self.name, expected=expected, found=found)


def idle(
    source: Weights,
    ranks: Sequence[Weights],
    used: Collection[str],
    layers: Collection[int],
    count: int,
    aside: Mapping[str, int],
) -> Iterator[Parameter]:
    """The tensors beside the `used` ones, as far as every rank has them: of `layers`, and outside of layers.

    Where these are all `count` layers, those of layers that follow as well, which predict further tokens. aside: those
    of which it is known how they are cut, and in how many parts.
    """
    for name in source.names():
        layer = layer_of(name)
        asked = layer is None or layer in layers or layer >= count == len(layers)
        having = [rank for rank, weights in enumerate(ranks) if name in weights.names()]
        if not asked or name in used or not having or (len(having) < len(ranks) and not EXPERT.search(name)):
            continue
        sides = [Held(rank, name) if name in rank.names() else Absent() for rank in ranks]
        scale, whole = name.endswith(ACTIVATION_SCALES), Held(source, name)
        known, parts = scale or name in aside, aside.get(name, 1)
        groups = [(whole, having)] if len(having) < len(ranks) else ()
        yield Parameter(name, whole, sides, padded=not known, runs=False, known=known, parts=parts, groups=groups)


def _slices(tensor: Readable, dim: int, wide: bool) -> Iterator[bytes]:
    """The bytes of every index of a tensor along a dim; wide: of its values in float64, where dtypes differ."""
    rows = tensor.rows(0, tensor.shape[0])
    whole = _bits((rows.double() if wide else rows).movedim(dim, 0))
    for index in range(len(whole)):
        yield whole[index].contiguous().numpy().tobytes()


def row_count(tensor: Readable) -> int:
    """How many rows a tensor has; one without dims has one."""
    return tensor.shape[0] if tensor.shape else 1


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, with the bytes of an element in the last dim."""
    return tensor.cpu().contiguous().unsqueeze(-1).view(torch.uint8)


@dataclass(frozen=True)
class FirstDifference:
    """The first element of a rank's tensor that is not the source's, and the values of both."""

    element: tuple[int, ...]
    expected: float
    found: float

    @property
    def size(self) -> float:
        """How far apart they are; infinite where one is not a number."""
        apart = abs(self.expected - self.found)
        return apart if math.isfinite(apart) else math.inf


def difference(held: Readable, share: Share) -> FirstDifference | None:
    """Where a rank's tensor is not, bit for bit, what it must be; of another dtype, it must hold the same values.

    What is beyond the model's last row is nobody's business here.
    """
    rows = row_count(held) - share.padding
    count = torch.Size(held.shape).numel()
    step = max(1, BLOCK_BYTES * rows // max(1, 8 * count))
    for start in range(0, rows if count else 0, step):
        found, wanted = held.rows(start, start + min(step, rows - start)), share.rows(start, min(start + step, rows))
        if found.dtype != wanted.dtype:
            found, wanted = found.double(), wanted.double()
        if not torch.equal(_bits(found), _bits(wanted)):
            first = (_bits(found) != _bits(wanted)).any(-1).nonzero()[0].tolist()
            return FirstDifference(
                (start + first[0], *first[1:]), float(wanted[tuple(first)]), float(found[tuple(first)])
            )
    return None


@dataclass(frozen=True)
class Readables:
    """Tensors as one rank's weights, whatever they are made of: all in the same form, so that products are the same.

    A product's last bits depend on strides and alignment, too: each tensor is a copy of its own. device: where what was
    read once is kept; None: it is read anew each time.
    """

    tensors: Mapping[str, Readable]
    device: torch.device | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def get(self, name: str) -> Tensor:
        if name in self.kept:
            return self.kept[name]
        tensor = self.tensors[name]
        found = _own(tensor.rows(0, row_count(tensor))).view(tensor.shape)
        if self.device is not None:
            found = self.kept[name] = found.to(self.device)
        return found

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return _own(self.get(name)[start:stop] if name in self.kept else self.tensors[name].rows(start, stop))


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def same_form(
    parameters: Iterable[Parameter], tp: int, device: torch.device | None
) -> tuple[list[Readables], list[Readables]]:
    """The ranks' tensors, and the source cut for each rank, under the same names."""
    held: list[dict[str, Readable]] = [{} for _ in range(tp)]
    cut: list[dict[str, Readable]] = [{} for _ in range(tp)]
    for parameter in parameters:
        for rank, (tensor, share) in enumerate(zip(parameter.ranks, parameter.shares(), strict=True)):
            if parameter.runs:
                held[rank][parameter.name], cut[rank][parameter.name] = tensor, share
    return [Readables(each, device) for each in held], [Readables(each, device) for each in cut]
