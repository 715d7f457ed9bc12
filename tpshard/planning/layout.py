"""Layouts: for every stored tensor of every rank, which logical box lies where in it.

A *deal* gives each rank a range of units of each axis; a layout follows from the deal and the tensors' cuts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from math import isfinite, prod
from typing import NamedTuple, overload

from tpshard.errors import UnsupportedError
from tpshard.planning.axes import Axis, Cut
from tpshard.planning.box import Box, Shape, full, slab, volume
from tpshard.planning.deal import Deal, Range, deal, listing, possible_tp
from tpshard.planning.intervals import intervals
from tpshard.planning.mesh import Mesh
from tpshard.storage.safetensors import DTYPE_BITS, nbytes


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor of the unsharded model: what the source holds and what merge gives back."""

    name: str
    dtype: str
    shape: Shape
    cut: Cut


SCALED = "*_scale_inv"
"""The numbers in FP8, each times the scale of its block: the tensor of that name and what follows the star."""
FUNCTIONS = {"-exp": "F32", SCALED: "BF16"}
"""What a stored number may be of the source's, and the dtype of the result."""
TIMES = "* "
"""What stands before a number by which all are multiplied, in the dtype that is stored: another kind of function."""


def is_result(function: str, dtype: str) -> bool:
    """Whether a function's results may be stored in a dtype."""
    if not isinstance(function, str) or not function.startswith(TIMES):
        return FUNCTIONS.get(function) == dtype
    try:
        return isfinite(float(function.removeprefix(TIMES))) and dtype in ("F64", "F32", "F16", "BF16")
    except ValueError:
        return False


class Part(NamedTuple):
    """A box of a logical tensor, and its corner in the stored tensor.

    view: the shape in which box sees the logical tensor, if not its own; same elements in the same order.
    order: dim d of the stored tensor is dim order[d] of the box; None when they are the same.
    """

    tensor: str
    box: Box
    at: Shape
    view: Shape | None = None
    order: tuple[int, ...] | None = None


class StoredTensor(NamedTuple):
    """One tensor of one rank: parts of logical tensors, and boxes of a constant (padding).

    view: the shape in which parts and fills see it, if not its own. value: the bytes of one element of the fills;
    none for zeros. function: by which it is computed from its parts (`is_result`), so that it gives nothing back.
    """

    name: str
    dtype: str
    shape: Shape
    parts: tuple[Part, ...]
    fills: tuple[Box, ...] = ()
    view: Shape | None = None
    value: bytes = b""
    function: str = ""


Layout = Sequence[tuple[StoredTensor, ...]]
"""One tuple of stored tensors per rank; all ranks list the same names in the same order."""


class RankShare(NamedTuple):
    """What one rank has of a row: a stored tensor whose own name and tensors count for nothing.

    owners: for each of its parts, of which of the row's tensors it is.
    """

    stored: StoredTensor
    owners: tuple[int, ...]


_Placed = tuple["RowKind", int]
"""A kind of row, and which of such a row's tensors."""


@dataclass(frozen=True, eq=False)
class RowKind:
    """What every rank has of rows that are alike, None for a rank without. Kinds are told apart by identity."""

    shares: tuple[RankShare | None, ...]

    @property
    def dtype(self) -> str:
        """The dtype that the ranks store, the same on each."""
        return next(share.stored.dtype for share in self.shares if share is not None)

    @cached_property
    def nbytes(self) -> tuple[int, ...]:
        """Bytes of each rank's stored tensor."""
        return tuple(nbytes(each.stored.dtype, each.stored.shape) if each else 0 for each in self.shares)

    @property
    def holders(self) -> Sequence[int]:
        """The ranks that have one."""
        return [rank for rank, share in enumerate(self.shares) if share is not None]

    def shape(self, rank: int) -> Shape:
        """The shape that a rank stores."""
        share = self.shares[rank]
        assert share is not None
        return share.stored.shape

    @cached_property
    def order(self) -> Sequence[int]:
        """Which of a row's tensors the parts are of, in their order."""
        return list(dict.fromkeys(chain.from_iterable(share.owners for share in self.shares if share is not None)))

    @cached_property
    def padding(self) -> int:
        """The elements of all ranks' fills."""
        return sum(volume(box) for each in self.shares if each for box in each.stored.fills)

    @cached_property
    def parts(self) -> Mapping[int, tuple[tuple[Part, ...], ...]]:
        """For each of a row's tensors, the parts that each rank has of it; of what is computed from it, none."""
        found: dict[int, list[list[Part]]] = {}
        for rank, share in enumerate(self.shares):
            given = share is not None and not share.stored.function
            for owner, part in zip(share.owners, share.stored.parts, strict=True) if share and given else ():
                found.setdefault(owner, [[] for _ in self.shares])[rank].append(part)
        return {owner: tuple(map(tuple, ranks)) for owner, ranks in found.items()}

    @cached_property
    def places(self) -> tuple[tuple[_Placed], ...]:
        """For each of a row's tensors, where it lies, should it lie nowhere else."""
        return tuple(((self, owner),) for owner in range(max(self.parts, default=-1) + 1))


class Row(NamedTuple):
    """A stored tensor as all ranks have it: its name, and the logical tensors that its parts are of."""

    name: str
    tensors: tuple[str, ...]
    kind: RowKind


class LayoutRows(Sequence[tuple[StoredTensor, ...]]):
    """A layout by stored tensors: layers are alike, so what ranks hold is there once for each kind of row.

    Each rank's own list of stored tensors is made when it is asked for.
    """

    def __init__(self, rows: Iterable[Row], size: int) -> None:
        self.rows = tuple(rows)
        self._size = size
        self._ranks: dict[int, tuple[StoredTensor, ...]] = {}

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, rank: int) -> tuple[StoredTensor, ...]: ...
    @overload
    def __getitem__(self, rank: slice) -> Sequence[tuple[StoredTensor, ...]]: ...
    def __getitem__(self, rank: int | slice) -> tuple[StoredTensor, ...] | Sequence[tuple[StoredTensor, ...]]:
        if isinstance(rank, slice):
            return [self[each] for each in range(*rank.indices(self._size))]
        if not 0 <= rank < self._size:
            raise IndexError(rank)
        if rank not in self._ranks:
            held = ((row, share) for row in self.rows if (share := row.kind.shares[rank]) is not None)
            self._ranks[rank] = tuple([_named(row, *share) for row, share in held])
        return self._ranks[rank]

    @cached_property
    def kinds(self) -> Mapping[RowKind, int]:
        """How many rows there are of each kind."""
        found: dict[RowKind, int] = {}
        for row in self.rows:
            found[row.kind] = found.get(row.kind, 0) + 1
        return found

    @cached_property
    def places(self) -> Mapping[str, tuple[_Placed, ...]]:
        """Where each logical tensor lies. Equal values are alike: such tensors are in rows of the same kinds."""
        found: dict[str, tuple[_Placed, ...]] = {}
        for row in self.rows:
            for name, place in zip(row.tensors, row.kind.places, strict=False):  # not all where tensors are empty
                found[name] = found[name] + place if name in found else place
        return found

    @cached_property
    def rank_bytes(self) -> tuple[int, ...]:
        """Bytes of the tensors that each rank stores."""
        return tuple(sum(kind.nbytes[rank] * count for kind, count in self.kinds.items()) for rank in range(self._size))


def _named(row: Row, stored: StoredTensor, owners: Sequence[int]) -> StoredTensor:
    parts = tuple([Part(row.tensors[owner], *part[1:]) for owner, part in zip(owners, stored.parts, strict=True)])
    return StoredTensor(row.name, stored.dtype, stored.shape, parts, *stored[4:])


def rows_of(layout: Layout) -> LayoutRows:
    """A layout by rows; rows of the same kind are found by comparing what the ranks hold."""
    if isinstance(layout, LayoutRows):
        return layout
    held_by: dict[str, list[StoredTensor | None]] = {}
    order: list[str] = []
    for rank, held in enumerate(layout):
        own = {stored.name: stored for stored in held}
        order = _joint(order, list(own))
        for name, stored in own.items():
            held_by.setdefault(name, [None] * len(layout))[rank] = stored
    kinds: dict[tuple[RankShare | None, ...], RowKind] = {}
    rows = []
    for name in order:
        ranks = held_by[name]
        tensors = tuple(dict.fromkeys(part.tensor for stored in ranks if stored for part in stored.parts))
        index = {tensor: owner for owner, tensor in enumerate(tensors)}
        shares = tuple(None if stored is None else _unnamed(stored, index) for stored in ranks)
        rows.append(Row(name, tensors, kinds.setdefault(shares, RowKind(shares))))
    return LayoutRows(rows, len(layout))


def _joint(order: Sequence[str], more: Sequence[str]) -> list[str]:
    """Names in an order that keeps both: what only `more` has comes after what stands before it there."""
    known = set(order)
    before = iter(order)
    joint: list[str] = []
    for name in more:
        if name in known:
            for each in before:
                joint.append(each)
                if each == name:
                    break
        else:
            joint.append(name)
    return [*joint, *before]


def _unnamed(stored: StoredTensor, index: Mapping[str, int]) -> RankShare:
    parts = tuple([Part("", *part[1:]) for part in stored.parts])
    return RankShare(stored._replace(name="", parts=parts), tuple([index[part.tensor] for part in stored.parts]))


def shard(
    tensors: Sequence[LogicalTensor],
    axes: Mapping[str, Axis],
    dealt: Deal,
    ranks_of: Callable[[str], tuple[int, ...]] | None = None,
) -> LayoutRows:
    """The layout of a split: every rank's tensors, in the order of `tensors`.

    ranks_of: which ranks hold a tensor, by name; None where all hold all.
    """
    every = tuple(range(dealt.mesh.size))
    known: dict[tuple[Shape, Cut, str, tuple[int, ...]], RowKind] = {}  # layers are alike
    rows = []
    for tensor in tensors:
        ranks = ranks_of(tensor.name) if ranks_of else every
        key = (tensor.shape, tensor.cut, tensor.dtype, ranks)
        if key not in known:
            _check_ratio(tensor, tensors, axes, dealt)
            known[key] = RowKind(tuple(_share(tensor, axes, dealt, rank) if rank in ranks else None for rank in every))
        rows.append(Row(tensor.name, (tensor.name,), known[key]))
    return LayoutRows(rows, len(every))


def _share(tensor: LogicalTensor, axes: Mapping[str, Axis], dealt: Deal, rank: int) -> RankShare:
    share = _along_dim(tensor, axes, dealt, rank)
    return share if tensor.cut.stack is None else _of_stack(share, dealt.of(tensor.cut.stack, rank))


def _of_stack(share: RankShare, held: Range) -> RankShare:
    """Those of the first dim's indices that a rank has."""
    stored, owners = share
    parts = tuple(part._replace(box=(held, *part.box[1:])) for part in stored.parts)
    count = held[1] - held[0]
    fills = tuple(((0, count), *box[1:]) for box in stored.fills)
    return RankShare(stored._replace(shape=(count, *stored.shape[1:]), parts=parts, fills=fills), owners)


def _along_dim(tensor: LogicalTensor, axes: Mapping[str, Axis], dealt: Deal, rank: int) -> RankShare:
    cut, shape, dim = tensor.cut, tensor.shape, tensor.cut.dim
    if dim is None:
        return RankShare(whole(tensor), (0,))
    kept, fills, size = intervals(cut, axes, dealt, rank)
    if cut.ratio != 1:
        kept = tuple((start // cut.ratio, -(-stop // cut.ratio), at // cut.ratio) for start, stop, at in kept)
        fills = tuple((-(-start // cut.ratio), stop // cut.ratio) for start, stop in fills)
        size = -(-size // cut.ratio)
    _check_bytes(tensor, dim, [(start, stop) for start, stop, _ in kept] + [(0, size)])

    before, after = (0,) * dim, (0,) * (len(shape) - dim - 1)
    parts = [Part("", slab(shape, dim, start, stop), (*before, at, *after)) for start, stop, at in kept]
    zeros = tuple(slab(shape, dim, start, stop) for start, stop in fills)
    stored = StoredTensor("", tensor.dtype, (*shape[:dim], size, *shape[dim + 1 :]), tuple(parts), zeros)
    return RankShare(stored, (0,) * len(parts))


def _check_ratio(
    tensor: LogicalTensor, tensors: Sequence[LogicalTensor], axes: Mapping[str, Axis], dealt: Deal
) -> None:
    """UnsupportedError where ranks part inside an element that stands for several of the axis.

    It names the values of tp that work for all of `tensors`.
    """
    cut = tensor.cut
    if cut.ratio == 1 or (position := _inside_an_element(cut, axes, dealt)) is None:
        return
    cuts = {each.cut for each in tensors if each.cut.ratio != 1}
    deals = {tp: deal(axes, Mesh(tp)) for tp in possible_tp(axes)}
    possible = [tp for tp in deals if all(_inside_an_element(each, axes, deals[tp]) is None for each in cuts)]
    units = " + ".join(f"{axes[name].count} {name} of {axes[name].unit}" for name in cut.segments)
    raise UnsupportedError(
        f"{tensor.name}: a cut at {position} of {units} falls inside an element, which stands for {cut.ratio}",
        tensor=tensor.name,
        expected=f"cuts at multiples of {cut.ratio}, as with tp {listing(possible)}",
        found=f"tp {dealt.mesh.tp}",
    )


def _inside_an_element(cut: Cut, axes: Mapping[str, Axis], dealt: Deal) -> int | None:
    """The first boundary that is not on a whole element of the tensor; the end of the axis may be inside its last."""
    end = sum(axes[name].count * axes[name].unit for name in cut.segments)
    for rank in range(dealt.mesh.size):
        kept, fills, _ = intervals(cut, axes, dealt, rank)
        ends = [position for start, stop, _ in kept for position in (start, stop) if position != end]
        for position in (*ends, *(stop for _, stop in fills)):
            if position % cut.ratio:
                return position
    return None


def whole(tensor: LogicalTensor) -> StoredTensor:
    """A logical tensor stored as it is."""
    return StoredTensor(tensor.name, tensor.dtype, tensor.shape, (Part(tensor.name, *_everything(tensor.shape)),))


@lru_cache(maxsize=4096)
def _everything(shape: Shape) -> tuple[Box, Shape]:
    return full(shape), (0,) * len(shape)


def _check_bytes(tensor: LogicalTensor, dim: int, ranges: Sequence[tuple[int, int]]) -> None:
    """A dtype smaller than a byte is cut, and padded, only where bytes end."""
    bits = DTYPE_BITS[tensor.dtype] * prod(tensor.shape[dim + 1 :])
    row = bits * tensor.shape[dim]
    for start, stop in ranges:
        if (start * bits) % 8 or (stop * bits) % 8 or row % 8:
            what = f"{tensor.name}: a cut at {start}:{stop} of dim {dim} falls inside a byte of {tensor.dtype}"
            raise UnsupportedError(what, tensor=tensor.name, expected="cuts where bytes end", hint="use a smaller tp")
