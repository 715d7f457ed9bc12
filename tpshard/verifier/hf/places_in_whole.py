"""Where in the source's parameters a rank's shares lie, and a model whose parameters have them there, among zeros."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from tpshard.errors import DifferentError
from tpshard.verifier.elements import BLOCK_BYTES, Held, Parameter, RankShares, Readable
from tpshard.verifier.hf.parameters import StoredParts
from tpshard.verifier.hf.partition import HeldParts, held_by, of_tables
from tpshard.verifier.hf.skeleton import Frame
from tpshard.verifier.hf.streamed import Streamed, as_parameter, in_memory, in_parts
from tpshard.verifier.ranks.pieces import rows_at
from tpshard.verifier.ranks.weights import Weights

_REPEATING = 1 << 16
"""Of parameters with as many indices, and as many bytes for each, at most, it is looked whether indices repeat."""


@dataclass(frozen=True)
class PlacedShare:
    """A rank's share of a parameter: index `there[i]` of the whole along `dim` is the rank's `here[i]`.

    at: the indices of the whole that the rank holds. own: of all indices, whether this rank is the first to hold them.
    sure: whether no two indices of the source are alike, so that it is known which of them a rank holds; others are put
    wherever they fit.
    """

    dim: int
    total: int
    there: Tensor
    here: Tensor
    at: Tensor
    own: Tensor
    sure: bool = True

    @property
    def held(self) -> Tensor:
        """Of all indices, whether the rank has them."""
        return torch.zeros(self.total, dtype=torch.bool).index_fill_(0, self.at, True)

    def whole(self, key: str, part: Tensor) -> Tensor:
        """A rank's tensor in the shape of the unsharded one. DifferentError where it has not the share's size."""
        if len(self.here) and part.shape[self.dim] <= int(self.here.max()):
            raise DifferentError(f"{key} has fewer indices than its share", tensor=key)
        shape = (*part.shape[: self.dim], self.total, *part.shape[self.dim + 1 :])
        if not isinstance(part, Streamed):
            return self._placed(part, self.there, self.here, shape)
        read = part.arrival.rows
        if self.dim:
            return part.remade(
                shape,
                lambda start, stop: self._placed(read(start, stop), self.there, self.here, (stop - start, *shape[1:])),
            )

        def rows(start: int, stop: int) -> Tensor:
            some = ((self.there >= start) & (self.there < stop)).nonzero().flatten()
            mine, at = rows_at(read, self.here[some]), torch.arange(len(some))
            return self._placed(mine, self.there[some] - start, at, (stop - start, *shape[1:]))

        return part.remade(shape, rows)

    def _placed(self, part: Tensor, there: Tensor, here: Tensor, shape: Sequence[int]) -> Tensor:
        full = part.new_zeros(shape)
        if not torch.equal(here, torch.arange(part.shape[self.dim])):
            part = part.index_select(self.dim, here.to(part.device))
        return full.index_copy_(self.dim, there.to(part.device), part)

    def alone(self, whole: Tensor) -> Tensor:
        """Something that has all indices, with those of other ranks zero."""
        shape = [1] * whole.dim()
        shape[self.dim] = self.total
        held = self.held.to(whole.device).view(shape)
        if not isinstance(whole, Streamed):
            return whole * held
        read, rows = whole.arrival.rows, self.dim == 0
        return whole.remade(whole.shape, lambda start, stop: read(start, stop) * (held[start:stop] if rows else held))

    def only(self, whole: Tensor, dim: int = -1) -> Tensor:
        """The indices of the rank of something that has all."""
        return whole.index_select(dim, self.at.to(whole.device))


Shares = Mapping[str, Sequence[PlacedShare]]
"""By parameter, the share of each rank; nothing of those that every rank has whole."""


def shares_of(frame: Frame, source: Weights, ranks: Sequence[Weights]) -> dict[str, list[PlacedShare]]:
    """Where the ranks' shares lie in the source, by what they hold.

    Every class lays features one behind another, heads within blocks of a fused projection, so a rank's share keeps the
    source's order, and ranks follow each other. DifferentError where it is another order, or no share.
    """
    whole, held = frame.recipes(source), [frame.recipes(rank) for rank in ranks]
    cuts = frame.cuts_by(whole, held, source, ranks)
    ends = {key.rpartition(".")[0] for key in (frame.head, frame.embedding)}
    found = {}
    for key, cut in cuts.items():
        if not frame.needed(key):
            continue
        sides = [_readable(weights, each[key]) for weights, each in zip((source, *ranks), (whole, *held), strict=True)]
        padded = key.rpartition(".")[0] in ends
        orders = of_tables(whole[key], held_by(key, held), source, ranks) if padded else None
        parameter = Parameter(key, sides[0], sides[1:], orders, padded, known=padded, starts=cut.starts)
        found[key] = _shares(key, parameter, cut)
    return found


def _readable(weights: Weights, parts: StoredParts) -> Readable:
    return (
        HeldParts(weights, parts) if parts.stacked or parts.joined or parts.turned else Held(weights, parts.stored[0])
    )


def _shares(key: str, parameter: Parameter, cut: RankShares) -> list[PlacedShare]:
    orders = [share.order for share in parameter.shares()]
    total, alike = parameter.source.shape[cut.dim], _alike(parameter.source, cut.dim)
    found, taken, last = [], torch.zeros(total, dtype=torch.bool), -1
    for rank, order in enumerate(orders):
        assert order is not None
        here = (order >= 0).nonzero().flatten()
        there = order[here]
        if alike is None and len(there):
            if bool((there.diff() <= 0).any()):
                raise DifferentError(f"{key} of rank {rank} is in another order than the source has", tensor=key)
            if int(there[0]) < last:
                raise DifferentError(f"{key} of rank {rank} lies before that of rank {rank - 1}", tensor=key)
            last = int(there[0])
        own = torch.zeros(total, dtype=torch.bool).index_fill_(0, there, True) & ~taken
        taken |= own
        everywhere = (there, here) if alike is None else _wherever(there, here, alike)
        found.append(PlacedShare(cut.dim, total, *everywhere, at=there, own=own, sure=alike is None))
    return found


def _alike(source: Readable, dim: int) -> Tensor | None:
    """Of each index along a dim, the first one that is the same; None where all differ, or nobody looked."""
    shape = source.shape
    if shape[dim] > _REPEATING or torch.Size(shape).numel() * 8 > _REPEATING * shape[dim]:
        return None
    places: dict[bytes, int] = {}
    first = [places.setdefault(each, index) for index, each in enumerate(_digests(source, dim))]
    return None if len(places) == len(first) else torch.tensor(first)


def _digests(source: Readable, dim: int) -> Iterator[bytes]:
    """What tells the values of each index along a dim from others, of which some are wide at a time."""
    shape = source.shape
    step = max(1, BLOCK_BYTES * shape[dim] // (8 * torch.Size(shape).numel()))
    whole = source.rows(0, shape[0]).movedim(dim, 0) if dim else None
    for start in range(0, shape[dim], step):
        stop = min(start + step, shape[dim])
        some = source.rows(start, stop) if whole is None else whole[start:stop]
        values = some.double().reshape(stop - start, -1) + 0.0  # without the zero's sign
        yield from (blake2b(each.tobytes(), digest_size=16).digest() for each in values.cpu().numpy())


def _wherever(there: Tensor, here: Tensor, alike: Tensor) -> tuple[Tensor, Tensor]:
    """All indices that are the same as one that a rank holds, and where the rank holds it."""
    at = torch.full_like(alike, -1)
    at[alike[there]] = here
    origin = at[alike]
    everywhere = (origin >= 0).nonzero().flatten()
    return everywhere, origin[everywhere]


def put_in_place(model: nn.Module, shares: Shares, rank: int, is_table: Callable[[str], bool]) -> None:
    """Give the parameters that a rank has in part the shape that they have in the unsharded model.

    Of one that is streamed, what is read is put in its place then.
    """
    done = set()  # layers may share a module
    for key, each in shares.items():
        owner, _, leaf = key.rpartition(".")
        module: Any = model.get_submodule(owner)
        if (id(module), leaf) in done:
            continue
        done.add((id(module), leaf))
        held = module._parameters if leaf in module._parameters else module._buffers
        full = each[rank].whole(key, in_memory(held[leaf]))
        held[leaf] = as_parameter(in_parts(key, full, table=is_table(key))) if leaf in module._parameters else full
