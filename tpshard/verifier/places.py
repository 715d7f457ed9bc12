"""Where the parts of a model lie in each rank's stored tensors, and shards that are damaged there on purpose."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol

import torch
from torch import Tensor

from tpshard.verifier.ranks.weights import Borrowed, InMemory, Weights, equal


@dataclass(frozen=True)
class Stretch:
    """Some indices along one dim of a stored tensor (None: all), and all along the others."""

    name: str
    dim: int = 0
    indices: slice | None = None

    @property
    def index(self) -> tuple[slice, ...]:
        return () if self.indices is None else (*repeat(slice(None), self.dim), self.indices)


class Places(Protocol):
    """Where a backend finds the parts of one layer (and of embedding and head), by stored names.

    Roles of tensors are out, down, up, norm, q_norm, k_norm, embed, head, positions, final_norm; of experts and of
    layers without attention: router, choice_bias, sinks, convolution, decay, qk_norm, latent. A backend gives an empty
    list for what its models do not have.
    """

    ranks: Sequence[Weights]
    names: Collection[str]
    """All stored tensors that the model is made of."""
    kv_heads: int
    vocab: int
    rope_order: Tensor | None
    """The rotated dims of a head in the order of the other kind of rotation, halves against pairs."""

    def tensors(self, role: str, *, bias: bool = False) -> list[str]:
        """The weights, or the biases, of a role."""

    def axis(self, role: str, name: str) -> int:
        """The dim of a weight along which tensor parallelism cuts its role."""

    def heads(self, rank: int) -> list[list[Stretch]]:
        """For each of a rank's heads, what moves it when it is exchanged with another's."""

    def part(self, rank: int, kind: str, *, bias: bool = False) -> list[Stretch]:
        """What makes a rank's "q", "k" or "v"."""

    def gates(self, rank: int) -> list[tuple[Stretch, Stretch]]:
        """A rank's gates beside what they gate."""

    def experts(self) -> list[tuple[Stretch, Stretch]]:
        """The first expert's down matrix beside the second's."""

    def dealt_experts(self) -> list[tuple[int, list[Stretch]]]:
        """Each rank's first expert and its experts' matrices, as many as every rank has; none where all have all."""

    def twin(self, name: str) -> str | None:
        """The same tensor in another layer."""


@dataclass(frozen=True)
class _Edited:
    """A tensor of some weights, changed whenever it is read: a fault in every expert is kept nowhere."""

    weights: Weights
    name: str
    change: Callable[[Tensor], Tensor]

    def names(self) -> Collection[str]:
        return (self.name,)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(name)

    def get(self, name: str) -> Tensor:
        return self.change(_copy(self.weights.get(name))).contiguous()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.get(name)[start:stop]


@dataclass(frozen=True)
class _Shifted(_Edited):
    """A tensor whose elements are moved by one along a dim; `change` moves those of any rows along another than 0."""

    dim: int = 0

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if self.dim:
            return self.change(_copy(self.weights.rows(name, start, stop))).contiguous()
        if start or stop == start:
            return _copy(self.weights.rows(name, max(start - 1, 0), max(stop - 1, 0)))
        count = self.shape(name)[0]
        ends = self.weights.rows(name, count - 1, count), self.weights.rows(name, 0, stop - 1)
        return torch.cat([end.cpu() for end in ends])


@dataclass(frozen=True)
class _Patched:
    """A tensor of some weights with a stretch that is taken from a tensor of others, of the same shape."""

    weights: Weights
    stretch: Stretch
    lender: Weights
    lent: Stretch

    def names(self) -> Collection[str]:
        return (self.stretch.name,)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(name)

    def get(self, name: str) -> Tensor:
        tensor = _copy(self.weights.get(name))
        tensor[self.stretch.index] = self.lender.get(self.lent.name).cpu()[self.lent.index]
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if not all(each.dim or each.indices is None for each in (self.stretch, self.lent)):
            return self.get(name)[start:stop]
        rows = _copy(self.weights.rows(name, start, stop))
        rows[self.stretch.index] = self.lender.rows(self.lent.name, start, stop).cpu()[self.lent.index]
        return rows


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True)


def _shape(weights: Weights, stretch: Stretch) -> torch.Size:
    return torch.empty(weights.shape(stretch.name), device="meta")[stretch.index].shape


class DamagedShards:
    """Shards whose tensors can be changed, or be taken from other ranks; nothing large is kept of what is changed."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.ranks = places.ranks
        self.tp = len(places.ranks)
        self.lenders: list[dict[str, Weights]] = [{} for _ in self.ranks]

    def read(self, rank: int, name: str) -> Tensor:
        """A copy of a tensor, with the changes so far."""
        return _copy(self._now(rank, name).get(name))

    def _now(self, rank: int, name: str) -> Weights:
        """What has a tensor with the changes so far."""
        return self.lenders[rank].get(name, self.ranks[rank])

    def write(self, rank: int, name: str, tensor: Tensor) -> None:
        self.lenders[rank][name] = InMemory({name: tensor.contiguous()})

    def put(self, rank: int, stretch: Stretch, value: Tensor) -> None:
        """Write a stretch of a tensor; nothing where the value has another shape."""
        tensor = self.read(rank, stretch.name)
        if tensor[stretch.index].shape == value.shape:
            tensor[stretch.index] = value
            self.write(rank, stretch.name, tensor)

    def edit(self, names: Sequence[str], change: Callable[[Tensor], Tensor], rank: int | None = None) -> None:
        """Apply a change to tensors of one rank, or of all."""
        for name in names:
            for r in range(self.tp) if rank is None else [rank % self.tp]:
                self.lenders[r][name] = _Edited(self._now(r, name), name, change)

    def shift(self, rank: int, name: str, dim: int) -> None:
        """Move a tensor's elements by one along a dim."""
        self.lenders[rank][name] = _Shifted(self._now(rank, name), name, lambda tensor: tensor.roll(1, dim), dim)

    def swap(self, rank: int, mine: Sequence[Stretch], other: int, theirs: Sequence[Stretch]) -> None:
        """Exchange stretches of two ranks, or of one, where their shapes agree."""
        for one, two in zip(mine, theirs, strict=False):
            first, second = self._now(rank, one.name), self._now(other, two.name)
            if _shape(first, one) == _shape(second, two):
                for at, into, lender, lent in ((rank, one, second, two), (other, two, first, one)):
                    self.lenders[at][into.name] = _Patched(self._now(at, into.name), into, lender, lent)

    def borrow(self, order: Sequence[int], names: Collection[str]) -> None:
        """Give each rank another's tensors: whole files whatever their shapes, single ones where they fit."""
        whole = len(names) == len(self.places.names)
        for rank, lender in enumerate(order):
            for name in names:
                if whole or self.ranks[rank].shape(name) == self.ranks[lender].shape(name):
                    self.lenders[rank][name] = self.ranks[lender]

    def ranks_if_different(self) -> list[Weights] | None:
        """The damaged ranks; None when not one bit is different."""
        ranks = list(map(Borrowed, self.ranks, self.lenders))
        same = all(equal(rank.weights, lender, name) for rank in ranks for name, lender in rank.lenders.items())
        return None if same else [*ranks]
