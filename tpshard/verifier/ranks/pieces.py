"""Tensors that are read out of others as they are needed: chosen rows, transposed ones, chosen columns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tpshard.storage.safetensors import TensorInfo
from tpshard.storage.torch_pickle import DTYPES
from tpshard.verifier.ranks.open import FileWeights


def rows_at(read: Callable[[int, int], Tensor], index: Tensor) -> Tensor:
    """The rows of `index` in its order, of a tensor whose rows `read` gives; neighbours are read at once."""
    wanted = index.sort().values
    ends = ((wanted.diff() > 1).nonzero().flatten() + 1).tolist()
    runs = [(int(wanted[i]), int(wanted[j - 1]) + 1) for i, j in pairwise([0, *ends, len(wanted)]) if j > i]
    if not runs:
        return read(0, 0)
    firsts = torch.cat([torch.arange(first, last) for first, last in runs])
    return torch.cat([read(first, last) for first, last in runs])[torch.searchsorted(firsts, index)]


_LAST_BITS = 2.0**-22
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Stored:
    """A stored tensor as it is."""

    weights: FileWeights
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.shape(self.name)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weights.rows(self.name, start, stop)


@dataclass(frozen=True)
class Rows:
    """Rows of another piece, each of `index` [n] once and in that order."""

    piece: "RankPiece"
    index: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.index), *self.piece.shape[1:])

    def rows(self, start: int, stop: int) -> Tensor:
        return rows_at(self.piece.rows, self.index[start:stop])


@dataclass(frozen=True)
class Turned:
    """A stored tensor with its last two dims exchanged; of a matrix, all is read for any of its rows."""

    piece: "RankPiece"

    @property
    def shape(self) -> tuple[int, ...]:
        *outer, rows, columns = self.piece.shape
        return (*outer, columns, rows)

    def rows(self, start: int, stop: int) -> Tensor:
        if len(self.shape) > 2:
            return self.piece.rows(start, stop).mT.contiguous()
        return self.piece.rows(0, self.piece.shape[0])[:, start:stop].T.contiguous()


@dataclass(frozen=True)
class Columns:
    """Columns `first` to `last` of another piece (its last dim)."""

    piece: "RankPiece"
    first: int
    last: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.piece.shape[:-1], self.last - self.first)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.piece.rows(start, stop)[..., self.first : self.last]


@dataclass(frozen=True)
class Joined:
    """Pieces one behind another along a dim."""

    pieces: Sequence["RankPiece"]
    dim: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.pieces[0].shape)
        shape[self.dim] = sum(piece.shape[self.dim] for piece in self.pieces)
        return tuple(shape)

    def rows(self, start: int, stop: int) -> Tensor:
        if self.dim:
            return torch.cat([piece.rows(start, stop) for piece in self.pieces], self.dim)
        read, begin = [], 0
        for piece in self.pieces:
            end = begin + piece.shape[0]
            first, last = max(start, begin), min(stop, end)
            if first < last:
                read.append(piece.rows(first - begin, last - begin))
            begin = end
        return torch.cat(read) if read else self.pieces[0].rows(0, 0)


@dataclass(frozen=True)
class Stacked:
    """Pieces of one shape as the items of a stack."""

    pieces: Sequence["RankPiece"]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.pieces), *self.pieces[0].shape)

    def rows(self, start: int, stop: int) -> Tensor:
        every = [piece.rows(0, piece.shape[0]) for piece in self.pieces[start:stop]]
        return torch.stack(every) if every else self.pieces[0].rows(0, 0).new_empty((0, *self.shape[1:]))


@dataclass(frozen=True)
class Logarithm:
    """What another piece is minus the exponential of.

    Where that is the source's number but for the last bits of a float32, which depend on the processor, it is the
    source's.
    """

    piece: "RankPiece"
    source: "RankPiece"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.piece.shape

    def rows(self, start: int, stop: int) -> Tensor:
        found = self.piece.rows(start, stop)
        if self.source.shape != self.shape:
            return (-found).log()
        source = self.source.rows(start, stop)
        expected = source.double().exp()
        same = (found.double() + expected).abs() <= _LAST_BITS * expected
        return source.to(found.dtype).where(same, (-found).log())


@dataclass(frozen=True)
class Quotient:
    """What another piece is times a number: the source's number where that makes what is stored, bit for bit.

    A source in a wider dtype is rounded before it is multiplied, as it is for all that is not.
    """

    piece: "RankPiece"
    source: "RankPiece"
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.piece.shape

    def rows(self, start: int, stop: int) -> Tensor:
        found = self.piece.rows(start, stop)
        if self.source.shape != self.shape:
            return found / self.factor
        source = self.source.rows(start, stop).to(found.dtype)
        quotient = found / self.factor
        same = quotient == source  # although the product is another: its quotient may be rounded to the same number
        neighbour = (source.view(_BITS[source.element_size()]) ^ 1).view(source.dtype)
        return source.where(source * self.factor == found, neighbour.where(same, quotient))


RankPiece = Stored | Rows | Turned | Columns | Joined | Stacked | Logarithm | Quotient
"""A tensor that is made of stored ones: it has a shape, and gives its rows from one to another."""


def stored(piece: RankPiece) -> TensorInfo:
    """A stored tensor that a piece is made of."""
    while not isinstance(piece, Stored):
        piece = piece.pieces[0] if isinstance(piece, Joined | Stacked) else piece.piece
    return piece.weights.infos[piece.name]


class PieceWeights(FileWeights):
    """One rank's tensors, each a piece of what its files store.

    `infos` have the pieces' own names, shapes and sizes, and the file and dtype of what they are made of; a place in
    that file they do not have.
    """

    def __init__(self, pieces: Mapping[str, RankPiece]) -> None:
        super().__init__(_info(name, piece) for name, piece in pieces.items())
        self.pieces = pieces

    def get(self, name: str) -> Tensor:
        piece = self.pieces[name]
        if isinstance(piece, Stored):
            return piece.weights.get(piece.name)
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.pieces[name].rows(start, stop)


def _info(name: str, piece: RankPiece) -> TensorInfo:
    info = stored(piece)
    nbytes = torch.Size(piece.shape).numel() * DTYPES[info.dtype].itemsize
    return TensorInfo(name, info.dtype, piece.shape, info.file, 0, nbytes)
