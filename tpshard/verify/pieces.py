"""Tensors that are read out of others as they are needed: chosen rows, transposed ones, chosen columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from tpshard.header import TensorInfo
from tpshard.torch_io import DTYPES
from tpshard.verify.shards import FileWeights


class Piece(Protocol):
    """A tensor that is made of stored ones."""

    @property
    def stored(self) -> TensorInfo:
        """A stored tensor that it is made of."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its own shape."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Its rows from `start` to `stop`."""


@dataclass(frozen=True)
class Rows:
    """Rows of a stored tensor, each of `index` [n] once and in that order, or all where it is None."""

    weights: FileWeights
    name: str
    index: Tensor | None = None

    @property
    def stored(self) -> TensorInfo:
        return self.weights.infos[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.weights.shape(self.name)
        return shape if self.index is None else (len(self.index), *shape[1:])

    def rows(self, start: int, stop: int) -> Tensor:
        if self.index is None:
            return self.weights.rows(self.name, start, stop)
        wanted, order = self.index[start:stop].sort()
        # Rows that are neighbours in the file are read at once.
        ends = ((wanted.diff() != 1).nonzero().flatten() + 1).tolist()
        runs = [(int(wanted[i]), j - i) for i, j in pairwise([0, *ends, len(wanted)]) if j > i]
        read = [self.weights.rows(self.name, first, first + count) for first, count in runs]
        if not read:
            return self.weights.rows(self.name, 0, 0)
        joined = torch.cat(read)
        return joined[order.argsort()]


@dataclass(frozen=True)
class Turned:
    """A stored matrix with its dims exchanged, which is read whole."""

    weights: FileWeights
    name: str

    @property
    def stored(self) -> TensorInfo:
        return self.weights.infos[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.shape(self.name)[::-1]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weights.get(self.name)[:, start:stop].T.contiguous()


@dataclass(frozen=True)
class Columns:
    """Columns `first` to `last` of one or several ranks' matrices of one name, side by side; rows `top` to `bottom`."""

    ranks: Sequence[FileWeights]
    name: str
    first: int
    last: int
    top: int
    bottom: int

    @property
    def stored(self) -> TensorInfo:
        return self.ranks[0].infos[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.bottom - self.top, len(self.ranks) * (self.last - self.first))

    def rows(self, start: int, stop: int) -> Tensor:
        whole = [weights.rows(self.name, self.top + start, self.top + stop) for weights in self.ranks]
        return torch.cat([rows[:, self.first : self.last] for rows in whole], 1)


class PieceWeights(FileWeights):
    """One rank's tensors, each a piece of what its files store.

    `infos` have the pieces' own names, shapes and sizes, and the file and dtype of what they are made of; a place in
    that file they do not have.
    """

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        super().__init__(_info(name, piece) for name, piece in pieces.items())
        self.pieces = pieces

    def get(self, name: str) -> Tensor:
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.pieces[name].rows(start, stop)


def _info(name: str, piece: Piece) -> TensorInfo:
    stored = piece.stored
    nbytes = torch.Size(piece.shape).numel() * DTYPES[stored.dtype].itemsize
    return TensorInfo(name, stored.dtype, piece.shape, stored.file, 0, nbytes)
