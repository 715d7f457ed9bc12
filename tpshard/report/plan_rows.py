"""The rows of a plan, made once for all tensors that are alike, and folded: layers and experts become one row."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, starmap
from math import prod
from typing import Any, TypeVar

from tpshard.formats.split import Split
from tpshard.planning.axes import Axis
from tpshard.planning.box import volume
from tpshard.planning.layout import LogicalTensor, Row, RowKind
from tpshard.storage.safetensors import nbytes
from tpshard.storage.tensor_names import numbered, with_numbers

_Key = TypeVar("_Key", bound=Hashable)
_encode = json.JSONEncoder().encode

Share = tuple[int, tuple[int, ...], int]
"""What a rank holds of a logical tensor: the rank, shape, and bytes with padding."""


@dataclass(frozen=True, eq=False)
class TensorKind:
    """What a plan says of tensors that are alike: all but the name. fields: as JSON has them.

    first: one of them. shares: of the ranks that hold it, none of what is dropped.
    """

    first: LogicalTensor
    shares: tuple[Share, ...]
    fields: Mapping[str, Any]

    @cached_property
    def text(self) -> str:
        """The fields as JSON, without the brace that begins an object."""
        return _encode(self.fields)[1:]


@dataclass(frozen=True)
class TensorRows:
    """The tensors of a split's model in its order, each with its kind."""

    split: Split
    _kinds: dict[object, TensorKind] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, TensorKind]]:
        places, dropped = self.split.layouts.rows.places, self.split.layouts.dropped
        for tensor in self.split.model.tensors:
            name = tensor.name
            key = (tensor.dtype, tensor.shape, tensor.cut, where := places.get(name, ()), dropped.get(name))
            if key not in self._kinds:
                self._kinds[key] = self._kind(tensor, where, dropped.get(name))
            yield name, self._kinds[key]

    def _kind(self, tensor: LogicalTensor, where: Sequence[tuple[RowKind, int]], dropped: str | None) -> TensorKind:
        shares = () if dropped is not None else tuple(self._shares(tensor, where))
        return TensorKind(tensor, shares, _fields(tensor, self.split.model.axes, shares, dropped))

    def _shares(self, tensor: LogicalTensor, where: Sequence[tuple[RowKind, int]]) -> Iterator[Share]:
        """What ranks hold of a tensor: as it is stored, or the boxes of it that lie in stored tensors."""
        mesh = self.split.options.mesh
        for rank in range(mesh.size):
            if self.split.layouts.placement and all(kind.shares[rank] is None for kind, _ in where):
                continue
            if self.split.format.own_names:
                ((kind, _),) = where
                yield rank, kind.shape(rank), kind.nbytes[rank]
                continue
            count = sum(volume(part.box) for kind, owner in where for part in kind.parts[owner][rank])
            shape, dim = tensor.shape, tensor.cut.dim
            if dim is not None and count != prod(shape):
                shape = (*shape[:dim], count * shape[dim] // max(1, prod(shape)), *shape[dim + 1 :])
            yield rank, shape, nbytes(tensor.dtype, (count,))


def _fields(
    tensor: LogicalTensor, axes: Mapping[str, Axis], shares: Sequence[Share], dropped: str | None
) -> dict[str, Any]:
    """One tensor of a plan, but for its name. dropped: why the format has no room for it."""
    cut = tensor.cut
    segments = [axes[name] for name in cut.segments]
    rule = "drop" if dropped is not None else "replicate" if cut.kind == "buffer" else cut.kind
    return {
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "rule": rule,
        "dim": cut.dim,
        "segments": [{"axis": axis.name, "count": axis.count, "unit": axis.unit} for axis in segments],
        "interleave": cut.interleave,
        "ranks": list(starmap(_held, shares)),
        **({} if dropped is None else {"reason": dropped}),
    }


def _held(rank: int, shape: tuple[int, ...], size: int) -> dict[str, Any]:
    return {"rank": rank, "shape": list(shape), "bytes": size}


def tensors_json(rows: TensorRows) -> list[dict[str, Any]]:
    """Every tensor of a plan; tensors that are alike share what their entries hold."""
    return [{"name": name, **kind.fields} for name, kind in rows]


def tensors_text(rows: TensorRows) -> Iterator[str]:
    """The same as JSON, one by one."""
    return (f'{{"name": {_encode(name)}, {kind.text}' for name, kind in rows)


def tensors_grouped(rows: TensorRows) -> list[dict[str, Any]]:
    """The tensors of a plan, one entry for layers and experts that are alike."""
    kinds: dict[str, TensorKind] = {}
    folded = fold((name, kinds.setdefault(kind.text, kind)) for name, kind in rows)
    return [{"name": pattern, "count": len(names), **kind.fields} for pattern, names, kind in folded]


def made_of(row: Row) -> list[str]:
    """The tensors that a stored one is made of, in the order in which it has them."""
    return [row.tensors[owner] for owner in row.kind.order]


def stored_shapes(rows: Iterable[Row]) -> Iterator[tuple[str, list[str], list[tuple[int, ...]]]]:
    """Of each stored tensor the name, what it is made of, and the shapes that ranks have of it."""
    return ((row.name, made_of(row), [row.kind.shape(rank) for rank in row.kind.holders]) for row in rows)


def stored_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The tensors that the files have, where they are not the model's own: from which of those each is made."""
    ranks = _ranks_of()
    return [
        {"name": row.name, "dtype": row.kind.dtype, "from": made_of(row), "ranks": ranks(row.kind)[0]} for row in rows
    ]


def stored_text(rows: Iterable[Row]) -> Iterator[str]:
    """The same as JSON, one by one."""
    ranks = _ranks_of()
    for row in rows:
        whence, held = _encode(made_of(row)), ranks(row.kind)[1]
        yield f'{{"name": {_encode(row.name)}, "dtype": "{row.kind.dtype}", "from": {whence}, "ranks": {held}}}'


def stored_grouped(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The same, one entry for layers that are alike; what they are made of is folded too."""
    ranks, named = _ranks_of(), {row.name: row for row in rows}
    entries = []
    for pattern, names, kind in fold((row.name, row.kind) for row in named.values()):
        whence = fold((name, None) for each in names for name in made_of(named[each]))
        head = {"name": pattern, "count": len(names), "dtype": kind.dtype, "from": [name for name, _, _ in whence]}
        entries.append({**head, "ranks": ranks(kind)[0]})
    return entries


def _ranks_of() -> Callable[[RowKind], tuple[list[dict[str, Any]], str]]:
    """A function that says what the ranks hold of a kind of row, as JSON and as its text; made once for each kind."""
    known: dict[RowKind, tuple[list[dict[str, Any]], str]] = {}

    def ranks(kind: RowKind) -> tuple[list[dict[str, Any]], str]:
        if kind not in known:
            held = [_held(rank, kind.shape(rank), kind.nbytes[rank]) for rank in kind.holders]
            known[kind] = held, _encode(held)
        return known[kind]

    return ranks


def fold(rows: Iterable[tuple[str, _Key]]) -> list[tuple[str, list[str], _Key]]:
    """Make one row of rows whose names differ in numbers alone: `model.layers.{0-31}.mlp.experts.{0-7}.w1`.

    A row is a name, and what must be the same; with the names that it stands for. Order is that of the first row of
    each kind. Experts are folded in each layer, then layers.
    """
    numbers = ((*numbered(name), [name], key) for name, key in rows)
    return [(with_numbers(kind, texts), names, key) for kind, texts, names, key in _fold(_fold(numbers, 1), 0)]


_Texts = tuple[int | str | None, ...]
"""What stands in a name in place of its numbers: numbers still, or the text of a span of them."""


def _fold(
    rows: Iterable[tuple[str, _Texts, list[str], _Key]], which: int
) -> Iterator[tuple[str, _Texts, list[str], _Key]]:
    """Fold the first number of the names, or the second; one that ends a name is no layer's and no expert's."""
    groups: dict[tuple[str, _Texts, _Key], tuple[list[int], list[list[str]]]] = {}
    for kind, texts, names, key in rows:
        number = texts[which] if which < len(texts) - f".{kind}".endswith(".0") else None
        apart = texts if number is None else (*texts[:which], None, *texts[which + 1 :])
        numbers, folded = groups.setdefault((kind, apart, key), ([], []))
        if isinstance(number, int):
            numbers.append(number)
        folded.append(names)
    for (kind, apart, key), (numbers, folded) in groups.items():
        texts = (*apart[:which], _span(numbers), *apart[which + 1 :]) if numbers else apart
        yield kind, texts, list(chain.from_iterable(folded)), key


def _span(numbers: list[int]) -> str:
    """`{0-31}`, `{0-3,5}` or `7`."""
    text = ranges(numbers)
    return text if len(numbers) == 1 else "{" + text + "}"


def by_reason(cut: Iterable[tuple[int, str]]) -> list[str]:
    """The tp that would cut a unit, by what does not divide: `tp 3, 5-7 (8 heads do not divide)`."""
    shown: dict[str, list[int]] = {}
    for tp, units in cut:
        shown.setdefault(units, []).append(tp)
    return [f"tp {ranges(tps).replace(',', ', ')} ({units} do not divide)" for units, tps in shown.items()]


def ranges(numbers: list[int]) -> str:
    """`0-31`, `0-3,5` or `7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
