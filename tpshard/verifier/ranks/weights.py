"""Where the decoder's tensors come from: stored names resolved, shapes read as out and in, values cast."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

COMPARED = 1 << 25
"""Elements that are compared at a time."""


def move(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """A tensor on a device, in a dtype (None: its own).

    In two steps: in one, torch would convert on the CPU and send the wider form over the bus.
    """
    there = tensor.to(device)
    return there if dtype is None else there.to(dtype)


def named(name: str, names: Collection[str]) -> str | None:
    """A name as others have it who may leave out its base prefix, or a part of it; None where they do not have it."""
    dot = "."
    while dot:
        if name in names:
            return name
        _, dot, name = name.partition(".")
    return None


class Weights(Protocol):
    """The stored tensors of one rank, or of the whole model."""

    def names(self) -> Collection[str]:
        """The names of all stored tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A stored shape, known without reading the tensor."""

    def get(self, name: str) -> Tensor:
        """A stored tensor, in its stored dtype."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows (dim 0) of a stored tensor, without reading the others."""


@dataclass(frozen=True)
class InMemory:
    """Tensors that are already loaded, by name."""

    tensors: Mapping[str, Tensor]

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def get(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop]


@dataclass(frozen=True)
class Borrowed:
    """One rank's tensors, some of them taken from another's, unread until they are needed."""

    weights: Weights
    lenders: Mapping[str, Weights]

    def names(self) -> Collection[str]:
        return self.weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.lenders.get(name, self.weights).shape(name)

    def get(self, name: str) -> Tensor:
        return self.lenders.get(name, self.weights).get(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.lenders.get(name, self.weights).rows(name, start, stop)


@dataclass(frozen=True)
class Disturbed:
    """Tensors whose floating-point elements are each moved, up or down, by one rounding of float64."""

    weights: Weights

    def names(self) -> Collection[str]:
        return self.weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(name)

    def get(self, name: str) -> Tensor:
        return self._moved(self.weights.get(name), 0)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._moved(self.weights.rows(name, start, stop), start * math.prod(self.weights.shape(name)[1:]))

    def _moved(self, tensor: Tensor, first: int) -> Tensor:
        """Of a tensor's elements from `first` on: each goes where its place sends it, whatever is read with it."""
        if not tensor.is_floating_point():
            return tensor
        moved = tensor.double().clone(memory_format=torch.contiguous_format)
        flat = moved.view(-1)
        for start in range(0, len(flat), _MOVED):
            some = flat[start : start + _MOVED]
            places = torch.arange(first + start, first + start + len(some), device=some.device)
            some *= 1 + _signs(places) * torch.finfo(torch.float64).eps
        return moved


_MOVED = 1 << 20
"""Elements that are moved at a time."""


def _signs(places: Tensor) -> Tensor:
    """1 or -1 for each integer, as if at random: the rounds of a generator that mixes a counter."""
    mixed = places * 0x2545F4914F6CDD1D
    for shift, factor in ((29, 0x369DEA0F31A53F85), (32, 0x27BB2EE687B0B0FD)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed < 0).double() * 2 - 1


def replaced(weights: Weights, changes: Mapping[str, Tensor]) -> Borrowed:
    """Another's tensors, some of them replaced."""
    return Borrowed(weights, dict.fromkeys(changes, InMemory(changes)))


def blocks(weights: Weights, name: str, step: int) -> Iterator[Tensor]:
    """A stored tensor, `step` rows at a time; at once where it has no dims."""
    if not (shape := weights.shape(name)):
        yield weights.get(name)
    for start in range(0, shape[0] if shape else 0, step):
        yield weights.rows(name, start, min(start + step, shape[0]))


def equal(one: Weights, other: Weights, name: str) -> bool:
    """Whether both have the same tensor of this name, looked at some rows at a time: an embedding is large."""
    if name not in other.names() or (shape := one.shape(name)) != other.shape(name):
        return False
    step = max(1, COMPARED // max(1, math.prod(shape[1:])))
    pairs = zip(blocks(one, name, step), blocks(other, name, step), strict=True)
    return all(torch.equal(mine.cpu(), theirs.cpu()) for mine, theirs in pairs)
