"""Parameters that transformers makes of stored tensors by more than joining them: cut apart, sorted, turned round.

Nothing says how a rank's part of a stored tensor becomes its part of a parameter. So the part is put in its place, in
the source's shape and among zeros, and transformers' own conversion goes over that; and over the places, which says
what of the parameter the rank has.
"""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tpshard.errors import DifferentError, UnsupportedError
from tpshard.verifier.ranks.weights import Weights


@dataclass(frozen=True)
class Conversion:
    """Stored tensors, by what they match of a converter, and the first of the parameters that it makes of them."""

    converter: Any
    model: Any
    key: str
    parts: Mapping[str, Sequence[str]]

    @property
    def stored(self) -> list[str]:
        return [name for names in self.parts.values() for name in names]

    @property
    def keys(self) -> list[str]:
        """The parameters that it makes."""
        first, *others = self.converter.target_patterns
        return [self.key, *(self.key.replace(first, other) for other in others)]

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that these stored tensors make."""
        each = deepcopy(self.converter)
        for pattern, names in self.parts.items():
            for name in names:
                each.add_tensor(self.key, name, pattern, tensors[name])
        found = each.convert(self.key, model=self.model, config=self.model.config)
        return {key: made[0] if isinstance(made, list) else made for key, made in found.items()}


@dataclass(frozen=True)
class _Stretch:
    """Where in a stored tensor of the source a rank's tensor lies: at these indices along a dim. None: it has all."""

    dim: int
    at: Tensor | None


_Kept = tuple[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Converted:
    """The source, or a rank, with parameters in the place of the stored tensors that they are made of.

    places: of a rank, by stored tensor; a tensor that is not there is none of the rank's.
    """

    weights: Weights
    source: Weights
    made: Mapping[str, Conversion]
    places: Mapping[str, _Stretch] | None = None
    kept: list[_Kept] = field(default_factory=list)
    held: dict[str, dict[str, _Stretch]] = field(default_factory=dict)

    @cached_property
    def _hidden(self) -> set[str]:
        return {name for conversion in self.made.values() for name in conversion.stored}

    @cached_property
    def _names(self) -> list[str]:
        stored = set(self.weights.names())
        there = [key for key, each in self.made.items() if stored.intersection(each.stored)]
        return [*(name for name in self.weights.names() if name not in self._hidden), *there]

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.made:
            return self.weights.shape(name)
        conversion = self.made[name]
        shapes = {each: torch.empty(self.source.shape(each), device="meta") for each in conversion.stored}
        shape = list(conversion.of(shapes)[name].shape)
        if self.places is not None and (place := self._part(name)).at is not None:
            shape[place.dim] = len(place.at)
        return tuple(shape)

    def get(self, name: str) -> Tensor:
        if name not in self.made:
            return self.weights.get(name)
        conversion = self.made[name]
        if not self.kept or self.kept[0][0] != conversion.key:
            self.kept[:] = [(conversion.key, conversion.of({each: self._whole(each) for each in conversion.stored}))]
        made = self.kept[0][1][name]
        if self.places is None or (place := self._part(name)).at is None:
            return made
        return made.index_select(place.dim, place.at)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.get(name)[start:stop] if name in self.made else self.weights.rows(name, start, stop)

    def _whole(self, name: str) -> Tensor:
        """A stored tensor in the source's shape: what a rank has not is zero."""
        if self.places is None:
            return self.weights.get(name)
        if name not in self.places:
            return torch.zeros(self.source.shape(name), dtype=self.source.rows(name, 0, 1).dtype)
        place, tensor = self.places[name], self.weights.get(name)
        if place.at is None:
            return tensor
        full = tensor.new_zeros(self.source.shape(name))
        return full.index_copy_(place.dim, place.at, tensor.narrow(place.dim, 0, len(place.at)))

    def _part(self, key: str) -> _Stretch:
        """What of a parameter the rank has. UnsupportedError where that is no range of indices along one dim."""
        conversion = self.made[key]
        if conversion.key not in self.held:
            assert self.places is not None
            marks = {name: self._mark(name, self.places.get(name)) for name in conversion.stored}
            self.held[conversion.key] = {made: _indices(made, mark) for made, mark in conversion.of(marks).items()}
        return self.held[conversion.key][key]

    def _mark(self, name: str, place: _Stretch | None) -> Tensor:
        shape = self.source.shape(name)
        if place is None:
            return torch.zeros(shape, dtype=torch.bool)
        if place.at is None:
            return torch.ones(shape, dtype=torch.bool)
        return torch.zeros(shape, dtype=torch.bool).index_fill_(place.dim, place.at, True)


def _indices(key: str, mark: Tensor) -> _Stretch:
    if bool(mark.all()):
        return _Stretch(0, None)
    for dim in range(mark.dim()):
        along = mark.movedim(dim, 0).flatten(1) if mark.dim() > 1 else mark.unsqueeze(1)
        if bool((along.all(1) == along.any(1)).all()):
            return _Stretch(dim, along.all(1).nonzero().flatten())
    raise UnsupportedError(f"{key} is cut in more than one of its dims", tensor=key)


def converted(
    conversions: Sequence[Conversion], keys: Collection[str], source: Weights, ranks: Sequence[Weights]
) -> tuple[frozenset[str], Weights, list[Weights]]:
    """The parameters that are made, and source and ranks that have them.

    keys: the class's parameters; a conversion that makes another is left out. DifferentError where a rank's tensor is
    no part of the source's.
    """
    made: dict[str, Conversion] = {}
    for conversion in conversions:
        shapes = {name: torch.empty(source.shape(name), device="meta") for name in conversion.stored}
        found = conversion.of(shapes)
        if found.keys() <= set(keys):
            made |= dict.fromkeys(found, conversion)
    names = sorted({name for each in made.values() for name in each.stored})
    places = [{name: _place(name, source, rank) for name in names if name in rank.names()} for rank in ranks]
    held: list[Weights] = [Converted(rank, source, made, place) for rank, place in zip(ranks, places, strict=True)]
    return frozenset(made), Converted(source, source, made), held


def _place(name: str, source: Weights, rank: Weights) -> _Stretch:
    """Where a rank's tensor lies in the source's, by what it holds. An element that is another hides no place."""
    full, shape = source.shape(name), rank.shape(name)
    if full == shape:
        return _Stretch(0, None)
    dims = [dim for dim, (mine, all_) in enumerate(zip(shape, full, strict=False)) if mine != all_]
    if len(full) != len(shape) or len(dims) != 1:
        raise DifferentError(f"{name} does not have the model's shape", tensor=name, expected=full, found=shape)
    beside = f"{name.removesuffix('bias')}weight"
    if name.endswith(".bias") and beside in source.names() and beside in rank.names():
        if (like := _place(beside, source, rank)).at is not None and len(like.at) == shape[0]:
            return _Stretch(0, like.at)  # a bias may have a number often
    tensors = [weights.get(name) for weights in (source, rank)]
    if tensors[0].dtype != tensors[1].dtype:
        tensors = [tensor.double() for tensor in tensors]
    whole, part = (_slices(tensor, dims[0]) for tensor in tensors)
    return _Stretch(dims[0], _order(name, whole, part))


def _order(name: str, whole: Sequence[bytes], part: Sequence[bytes]) -> Tensor:
    """The indices, in order, that a rank holds. What it holds in another order is then seen to be elsewhere."""
    places: dict[bytes, list[int]] = {}
    for index, piece in enumerate(whole):
        places.setdefault(piece, []).append(index)
    part = list(part)
    while part and part[-1] not in places and not any(part[-1]):
        part.pop()  # padding
    found, last = list[int](), -1
    for piece in part:
        at = places.get(piece, [last + 1])
        last = next((index for index in at if index > last), at[0])
        found.append(last)
    every = sorted(set(found))
    if len(every) != len(part) or (every and every[-1] >= len(whole)):
        raise DifferentError(f"{name} holds what the source does not have", tensor=name)
    return torch.tensor(every, dtype=torch.long)


def _slices(tensor: Tensor, dim: int) -> list[bytes]:
    rows = tensor.movedim(dim, 0)
    rows = (rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)).contiguous().view(torch.uint8)
    return [row.numpy().tobytes() for row in rows]
