"""A rank's share of a tensor as an engine has it: cut its way, transposed, fused with others, stacked over experts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from types import MappingProxyType
from typing import Any

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.formats.engine_functions import computed, function_of
from tpshard.formats.engine_rows import shares_in_line
from tpshard.formats.engine_stacks import by_turns, side_by_side
from tpshard.formats.engine_tables import EngineFamily
from tpshard.planning.axes import Axis, Cut
from tpshard.planning.box import Box, Shape, full, slab
from tpshard.planning.deal import Deal, Range, deal, why_not
from tpshard.planning.layout import SCALED, LogicalTensor, Part, RankShare, Row, RowKind, StoredTensor, shard
from tpshard.planning.model import CASTABLE, Model
from tpshard.planning.window import window
from tpshard.storage.tensor_names import numbered

Share = StoredTensor
"""A rank's share of one logical tensor, before it is named, fused or stacked: the names in it count for nothing."""


@dataclass(frozen=True)
class ParameterParts:
    """What one of the engine's parameters is made of: lists of tensors to fuse, one list for every stacked expert.

    dim: along which they are fused. flat: an expert has one number, and no dim for it. multiple: of which the size of
    that dim is one, with zeros behind what is fused.
    """

    groups: tuple[tuple[str, ...], ...]
    stacked: bool = False
    dim: int = 0
    flat: bool = False
    multiple: int = 1

    @property
    def tensors(self) -> tuple[str, ...]:
        """All of them, in order."""
        return tuple(chain.from_iterable(self.groups))


def shares_of(
    family: EngineFamily, model: Model, tensors: Sequence[LogicalTensor], dealt: Deal, scaled: Collection[str] = ()
) -> dict[str, tuple[Share, ...]]:
    """Each tensor's share of every rank, cut and turned as the engine has it; tensors that are alike have one.

    scaled: those that it multiplies by their scales.
    """
    kinds = {tensor.name: family.kind(model.full_name(tensor.name)) for tensor in tensors}
    shares = shares_in_line(family, model, tensors, dealt.mesh.tp)
    known: dict[object, tuple[Share, ...]] = {}
    for tensor in tensors:
        if tensor.name in shares:
            continue
        kind = kinds[tensor.name]
        turned = kind.transposed or (kind.either and _is_turned(tensor))
        function = SCALED if tensor.name in scaled else function_of(kind.function, model.config)
        how = (turned, kind.squeezed, kind.side_by_side, function)
        key = (tensor.shape, tensor.cut, tensor.dtype, kind.cut, kind.float32, kind.shaped, *how)
        if kind.function and tensor.dtype not in CASTABLE:
            what = f"{tensor.name} is stored as {tensor.dtype}, of which nothing is computed"
            raise UnsupportedError(what, tensor=tensor.name, hint="use --format native")
        if key not in known:
            cast = replace(tensor, dtype="F32") if kind.float32 and tensor.dtype in CASTABLE else tensor
            held = _cut(cast, None if _is_of_all(tensor) else kind.cut, model.axes, dealt)
            held = _at_least(family.least, tensor, held) if family.least and dealt.mesh.tp > 1 else held
            held = tuple(_squeezed(share, tensor.shape) for share in held) if kind.squeezed else held
            held = tuple(map(side_by_side, held)) if kind.side_by_side else held
            held = tuple(_shaped(share, kind.shaped) for share in held) if kind.shaped else held
            held = tuple(map(transposed, held)) if turned else held
            known[key] = tuple(computed(share, function, model) for share in held) if function else held
        shares[tensor.name] = known[key]
    return shares


def _is_of_all(tensor: LogicalTensor) -> bool:
    """Whether it says something of all of a quantised matrix, its one scale or its shape, and so is whole."""
    return not tensor.cut.segments and (prod(tensor.shape) == 1 or tensor.dtype == "I64")


def _is_turned(tensor: LogicalTensor) -> bool:
    """Whether a matrix, or each of a stack, is stored as [in, out]: its cut says which dim is which."""
    last = len(tensor.shape) - 1
    return tensor.cut.dim == (last if tensor.cut.kind == "column" else last - 1)


def _cut(tensor: LogicalTensor, how: str | None, axes: Mapping[str, Axis], dealt: Deal) -> tuple[Share, ...]:
    """The shares of a tensor as an engine cuts it. how: None for the architecture's own cut."""
    cut = tensor.cut
    if how == "even of whole":
        how = None if cut.segments else "even"
    if how == "grouped":
        return tuple(_grouped(tensor, axes, dealt, rank) for rank in range(dealt.mesh.size))
    if how == "even columns":
        how, cut = ("even", Cut("row", 1)) if len(tensor.shape) > 1 else (None, Cut("replicate"))
    elif how not in (None, "paired") and not cut.segments:
        cut = Cut("column", 0)  # of what the architecture leaves whole
    if how == "even":
        axis = _even(tensor, cut, dealt.mesh.tp)
        axes = {axis.name: axis}
        dealt = deal(axes, dealt.mesh)
        cut = replace(cut, segments=(axis.name,), interleave=None)
    elif how in ("replicate", "first"):
        cut = Cut("replicate")
    elif how not in (None, "paired"):
        cut = replace(cut, segments=tuple(how.split()[1:]), interleave=None)
    held = tuple(stored for (stored,) in shard([replace(tensor, cut=cut)], axes, dealt))
    if how == "paired":
        return tuple(_paired(tensor, axes, share) for share in held)
    if how == "first":
        zeros = held[0]._replace(parts=(), fills=(full(tensor.shape),))
        return (held[0], *(zeros for _ in held[1:]))
    return held


def _even(tensor: LogicalTensor, cut: Cut, tp: int) -> Axis:
    """An axis of everything that is stored along the cut dim, whatever it is."""
    assert cut.dim is not None
    rows = int(tensor.shape[cut.dim] * cut.ratio)
    axis = Axis(f"{rows} rows", rows, unit=1)
    if reason := why_not(axis, tp):
        raise UnsupportedError(reason, tensor=tensor.name, found=f"tp {tp}")
    return axis


def _paired(tensor: LogicalTensor, axes: Mapping[str, Axis], share: Share) -> Share:
    """The share with the even rows of each unit before its odd ones.

    Seen as half as many rows, each twice as long, a matrix has its even rows to the left and its odd ones to the right.
    """
    (segment,), (rows, width) = tensor.cut.segments, tensor.shape
    unit = axes[segment].unit
    if tensor.cut.ratio != 1 or unit % 2:
        what = f"the rows of {tensor.name} are stored in blocks that no pair of rows is"
        raise UnsupportedError(what, tensor=tensor.name, hint="use --format native")
    view, parts = (rows // 2, 2 * width), []
    for part in share.parts:
        (first, last), _ = part.box
        for start in range(first, last, unit):
            for odd in (0, 1):
                box = ((start // 2, (start + unit) // 2), (odd * width, (odd + 1) * width))
                parts.append(Part(tensor.name, box, (part.at[0] + start - first + odd * unit // 2, 0), view))
    return share._replace(parts=tuple(parts))


def _grouped(tensor: LogicalTensor, axes: Mapping[str, Axis], dealt: Deal, rank: int) -> Share:
    """The share of a tensor that is stored interleaved, as its segments one after another."""
    cut = tensor.cut
    assert cut.dim is not None and cut.interleave is not None
    repeats = axes[cut.interleave].count
    units = [_stored_unit(tensor, axes[name]) for name in cut.segments]
    sizes = [axes[name].count // repeats * unit for name, unit in zip(cut.segments, units, strict=True)]
    if set(sizes) == {1} and cut.dim == len(tensor.shape) - 2:
        return by_turns(tensor, dealt, rank)
    parts: list[Part] = []
    stored = 0
    for index, (name, unit) in enumerate(zip(cut.segments, units, strict=True)):
        first, last = dealt.of(name, rank)
        per_group = axes[name].count // repeats
        for group in range(repeats):
            low, high = max(first, group * per_group), min(last, (group + 1) * per_group)
            if low >= high:
                continue
            start = group * sum(sizes) + sum(sizes[:index]) + (low - group * per_group) * unit
            length = (high - low) * unit
            box = slab(tensor.shape, cut.dim, start, start + length)
            parts.append(Part(tensor.name, box, tuple(stored if dim == cut.dim else 0 for dim in range(len(box)))))
            stored += length
    shape = (*tensor.shape[: cut.dim], stored, *tensor.shape[cut.dim + 1 :])
    return StoredTensor(tensor.name, tensor.dtype, shape, tuple(parts))


def _stored_unit(tensor: LogicalTensor, axis: Axis) -> int:
    """How many of what a tensor stores along its cut dim a unit is; UnsupportedError where it is no whole number."""
    if axis.unit % tensor.cut.ratio:
        what = f"{tensor.name} is stored in blocks that no unit of {axis.name} is"
        raise UnsupportedError(what, tensor=tensor.name, hint="use --format native")
    return axis.unit // tensor.cut.ratio


def transposed(share: Share) -> Share:
    """The share with its last two dims exchanged."""
    last = len(share.shape) - 1
    order = (*range(last - 1), last, last - 1)

    def turned(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[dim] for dim in order)

    parts = tuple(part._replace(at=turned(part.at), order=order) for part in share.parts)
    fills = tuple(tuple(box[dim] for dim in order) for box in share.fills)
    return share._replace(shape=turned(share.shape), parts=parts, fills=fills)


def _squeezed(share: Share, shape: Shape) -> Share:
    """The share without the dims in which the tensor is 1. shape: the tensor's."""
    kept = [dim for dim, size in enumerate(shape) if size != 1]

    def left(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[dim] for dim in kept)

    parts = (part._replace(box=left(part.box), at=left(part.at), view=left(shape)) for part in share.parts)
    return share._replace(shape=left(share.shape), parts=tuple(parts))


def _shaped(share: Share, dims: tuple[int, ...]) -> Share:
    """The share of a vector with dims of 1 beside its own, which is 0 in `dims`."""
    (length,) = share.shape
    return share._replace(shape=tuple(size or length for size in dims), view=share.shape)


def _at_least(least: Mapping[str, int], tensor: LogicalTensor, held: tuple[Share, ...]) -> tuple[Share, ...]:
    """The shares with zeros behind them, where the engine has more of an axis than a rank has of it."""
    sizes = {least[name] for name in tensor.cut.segments if name in least}
    if not sizes:
        return held
    (dim, size) = (tensor.cut.dim, sizes.pop())
    assert dim is not None and len(tensor.cut.segments) == 1, f"{tensor.name}: several segments with a least width"
    if tensor.dtype not in CASTABLE:
        what = f"{tensor.name} is stored as {tensor.dtype}, and how its padded experts are held was not compared"
        raise UnsupportedError(what, tensor=tensor.name, hint="use --format native")

    def padded(share: Share) -> Share:
        if share.shape[dim] >= size:
            return share
        shape = tuple(size if each == dim else share.shape[each] for each in range(len(share.shape)))
        box = tuple((share.shape[each], size) if each == dim else (0, shape[each]) for each in range(len(shape)))
        return share._replace(shape=shape, fills=(*share.fills, box))

    return tuple(map(padded, held))


def first_experts(family: EngineFamily, model: Model) -> int | None:
    """How many experts of a layer are in the first of two stacks; None where there is one."""
    counted = model.config.get(family.first_experts) if family.first_experts else None
    counted = counted[0] if isinstance(counted, list) and counted else counted
    return counted if isinstance(counted, int) else None


def recipes_of(
    family: EngineFamily, named: Mapping[str, str], alone: Collection[str] = (), first: int | None = None
) -> dict[str, ParameterParts]:
    """The engine's parameters by name, in the order of the first tensor of each. named: tensor → full name.

    alone: tensors that count for all that are fused with theirs. first: how many experts the first of two stacks has.
    """
    found: dict[tuple[str, str, int], dict[int | None, dict[int, str]]] = {}
    counted = set[tuple[str, str]]()
    for name, full_name in named.items():
        _, numbers = numbered(full_name)
        for target, place, into, stacked, dim, behind, is_counted in family.kind(full_name).fused:
            group = None if stacked is None else numbers[stacked]
            if first is not None and group is not None and behind != (group >= first):
                continue
            key = (into.format(*numbers), target, dim)
            found.setdefault(key, {}).setdefault(group, {})[place] = name
            counted |= {key[:2]} if is_counted else set()
    recipes: dict[str, ParameterParts] = {}
    members: dict[str, str] = {}
    shortest_first = sorted(found.items(), key=lambda item: len(family.parts(*item[0][1:])))
    for (into, target, dim), groups in shortest_first:
        patterns = family.parts(target, dim)
        whole = len(patterns) if (into, target) not in counted else 1 + max(map(max, groups.values()))
        for parts in groups.values():
            for place, pattern in enumerate(patterns):
                other = family.stands_in.get(pattern)
                if place not in parts and other is not None:
                    parts[place] = parts[patterns.index(other)]
        lacking = [
            group for group in groups.values() if len(group) < whole and not any(n in alone for n in group.values())
        ]
        if lacking and target.endswith("?"):
            continue
        if lacking:
            raise CorruptError(
                f"not all tensors that make {into} are there",
                tensor=into,
                expected=", ".join(patterns),
                found=", ".join(lacking[0].values()),
            )
        ordered = sorted(groups.items(), key=lambda item: item[0] or 0)
        made = tuple(tuple(g[i] for i in sorted(g)) for _, g in ordered)
        recipes[into] = ParameterParts(made, None not in groups, dim, multiple=family.padded.get(target, 1))
        members |= {name: into for group in groups.values() for name in group.values()}
    result: dict[str, ParameterParts] = {}
    for name, full_name in named.items():
        if name in members:
            result[members[name]] = recipes[members[name]]
        else:
            renamed = family.rename(full_name)
            assert renamed not in result, f"{name} and {result[renamed]} are one parameter"
            result[renamed] = ParameterParts(((name,),))
    return result


def joined(
    recipes: Mapping[str, ParameterParts],
    shares: Mapping[str, tuple[Share, ...]],
    shapes: Mapping[str, Shape],
    tp: int,
    experts: Mapping[str, Sequence[Range]] = MappingProxyType({}),
) -> list[Row]:
    """The parameters by their recipes: shares fused along one dim, experts stacked before the first.

    experts: which of them each rank has, of parameters whose experts are not on all.
    """
    rows = []
    known: dict[object, RowKind] = {}  # layers are alike
    for name, recipe in recipes.items():
        tensors = recipe.tensors
        how = (recipe.stacked, recipe.dim, recipe.flat, recipe.multiple, tuple(map(len, recipe.groups)))
        key = (how, *[id(shares[tensor]) for tensor in tensors])
        if key not in known:
            held = [_join(name, recipe, rank, shares, shapes) for rank in range(tp)]
            if name in experts:
                held = [_rows(share, *span) for share, span in zip(held, experts[name], strict=True)]
            known[key] = RowKind(tuple(held))
        rows.append(Row(name, tensors, known[key]))
    return rows


def _rows(held: RankShare, first: int, last: int) -> RankShare:
    """What of a parameter lies in some of its rows."""
    stored = held.stored
    owned = [part._replace(tensor=str(owner)) for part, owner in zip(stored.parts, held.owners, strict=True)]
    seen = stored.view or stored.shape  # the first dim is one of both: it counts experts
    inside = window(stored._replace(shape=seen, view=None, parts=tuple(owned)), ((first, last), *full(seen)[1:]))
    owners = tuple(int(part.tensor) for part in inside.parts)
    view = stored.view and inside.shape
    return RankShare(inside._replace(shape=(last - first, *stored.shape[1:]), view=view), owners)


def _join(
    name: str, recipe: ParameterParts, rank: int, shares: Mapping[str, tuple[Share, ...]], shapes: Mapping[str, Shape]
) -> RankShare:
    """What a rank has of a recipe's parameter."""
    held = [shares[tensor][rank] for tensor in recipe.tensors]
    first = held[0]
    if len(held) == 1 and not recipe.stacked and recipe.multiple == 1:
        return RankShare(first, (0,) * len(first.parts))
    if len({share.dtype for share in held}) > 1:
        raise UnsupportedError(f"the tensors that make {name} have different dtypes", tensor=name, hint="cast: --dtype")
    parts: list[Part] = []
    fills: list[Box] = []
    owners: list[int] = []
    members = iter(enumerate(held))
    dim = recipe.dim
    for expert, group in enumerate(recipe.groups):
        begin = 0
        for tensor in group:
            index, share = next(members)
            owners += [index] * len(share.parts)
            for part in share.parts:
                at = (*part.at[:dim], part.at[dim] + begin, *part.at[dim + 1 :])
                if recipe.stacked:
                    assert part.order is None
                    parts.append(Part("", ((0, 1), *part.box), (expert, *at), (1, *(part.view or shapes[tensor]))))
                else:
                    parts.append(part._replace(at=at))
            for box in share.fills:
                start, stop = box[dim]
                filled = (*box[:dim], (start + begin, stop + begin), *box[dim + 1 :])
                fills.append(((expert, expert + 1), *filled) if recipe.stacked else filled)
            begin += share.shape[dim]
    if begin % recipe.multiple:
        assert not recipe.stacked
        padded = -(-begin // recipe.multiple) * recipe.multiple
        fills.append(slab((*first.shape[:dim], padded, *first.shape[dim + 1 :]), dim, begin, padded))
        begin = padded
    shape = (*first.shape[:dim], begin, *first.shape[dim + 1 :])
    shape = (len(recipe.groups), *shape) if recipe.stacked else shape
    stored, view = (shape[:1], shape) if recipe.flat else (shape, None)
    function = next((share.function for share in held if share.function), "")
    made = StoredTensor(name, first.dtype, stored, tuple(parts), tuple(fills), view, function=function)
    return RankShare(made, tuple(owners))
