"""Plans: the join of a source layout and a target layout, as steps that the executor can run.

Split, merge and reshard are the same function with other layouts. A plan is made of headers alone, and proves that
every element of every output comes from exactly one place and that every source tensor is used.
"""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import accumulate, chain
from typing import NamedTuple, ParamSpec, TypeVar

from tpshard.errors import CorruptError
from tpshard.planning.box import Box, Shape, corner, extents, full, tiles, volume
from tpshard.planning.layout import SCALED, Layout, LogicalTensor, Part, StoredTensor, rows_of
from tpshard.planning.strides import Piece, common_view, fine_box, pieces_of, placed_box, row_major
from tpshard.storage.safetensors import DTYPE_BITS, build_header, nbytes

_P = ParamSpec("_P")
_R = TypeVar("_R")


def uncollected(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a function without Python's cycle collector: plans are millions of tuples and no cycle.

    It would walk all of them again and again, which takes a third of the time.
    """

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        enabled = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            if enabled:
                gc.enable()

    return run


class Placed(NamedTuple):
    """A stored tensor in a file: its bytes begin at the absolute offset `begin`."""

    stored: StoredTensor
    file: str
    begin: int


@dataclass(frozen=True)
class OutputFile:
    """A file to be written: name, first bytes, total size in bytes, and tensors in file order.

    literals: other bytes that are no tensor's, by offset, where a container has some between or after the tensors.
    """

    name: str
    header: bytes
    size: int
    tensors: tuple[Placed, ...]
    literals: tuple[tuple[int, bytes], ...] = ()


class Region(NamedTuple):
    """Pieces of one logical tensor inside one stored tensor, whose bytes are [begin, end) of a file."""

    file: str
    begin: int
    end: int
    dtype: str
    pieces: tuple[Piece, ...]


class Scales(NamedTuple):
    """The scales of a tensor's blocks, and how to read them. of: the shape of that tensor."""

    of: Shape
    shape: Shape
    step: "Transfer"


class Transfer(NamedTuple):
    """Move one logical tensor: read `sources`, which tile it; `replicas` must hold the same; write `targets`.

    function: what the targets have of its numbers, if not themselves. scales: by which it multiplies them.
    """

    name: str
    shape: Shape
    sources: tuple[Region, ...]
    replicas: tuple[Region, ...]
    targets: tuple[Region, ...]
    function: str = ""
    scales: Scales | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the logical tensor, in the dtype of its targets."""
        return nbytes(self.targets[0].dtype, self.shape)


class Fill(NamedTuple):
    """Write a constant into a box of one stored tensor (padding): the target's one piece, whole and with its corner.

    value: the bytes of one element; none for zeros.
    """

    name: str
    target: Region
    value: bytes = b""

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return nbytes(self.target.dtype, extents(self.target.pieces[0].box))


Step = Transfer | Fill


@dataclass(frozen=True)
class Plan:
    """What to write, and steps in an order that fills every output front to back, give or take one tensor."""

    outputs: tuple[OutputFile, ...]
    steps: tuple[Step, ...]

    @property
    def nbytes(self) -> int:
        """Total size of the outputs in bytes, headers included."""
        return sum(output.size for output in self.outputs)


def alignment_order(tensors: Iterable[LogicalTensor]) -> list[LogicalTensor]:
    """The order of tensors in a file: larger dtypes first, else as given, so that every tensor is aligned."""
    return sorted(tensors, key=lambda tensor: -(DTYPE_BITS[tensor.dtype] // 8))


def output_file(name: str, tensors: Sequence[StoredTensor], metadata: Mapping[str, str]) -> OutputFile:
    """A safetensors file that holds `tensors` in this order."""
    header = build_header([(t.name, t.dtype, t.shape) for t in tensors], metadata)
    ends = list(accumulate((nbytes(t.dtype, t.shape) for t in tensors), initial=len(header)))
    placed = tuple(Placed(tensor, name, begin) for tensor, begin in zip(tensors, ends, strict=False))
    return OutputFile(name, header, ends[-1], placed)


def parts_by_size(tensors: Sequence[StoredTensor], limit: int) -> list[list[StoredTensor]]:
    """Cut a list of tensors into consecutive parts of at most `limit` bytes; one tensor is never cut."""
    parts: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        length = nbytes(tensor.dtype, tensor.shape)
        if parts[-1] and size + length > limit:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += length
    return parts


def assert_coverage(logical: Iterable[LogicalTensor], layout: Layout) -> None:
    """Assert that the ranks together hold every element of every tensor, equal boxes being replicas."""
    places = rows_of(layout).places
    checked = set()  # layers are alike
    for tensor in logical:
        key = (tensor.shape, where := places.get(tensor.name, ()))
        if key not in checked:
            parts = chain.from_iterable(ranks for kind, owner in where for ranks in kind.parts[owner])
            held = frozenset((part.box, part.view) for part in parts)
            assert _covers(tensor.shape, held), f"{tensor.name} is not covered exactly"
            checked.add(key)


@lru_cache(maxsize=4096)
def _covers(shape: Shape, held: frozenset[tuple[Box, Shape | None]]) -> bool:
    """Whether boxes of views of a tensor cover it exactly. Cached: layers are alike."""
    fine = common_view(shape, (view for _, view in held))
    boxes = {each for box, view in held for each in fine_box(box, view or shape, fine)}
    return _tile(fine, frozenset(boxes))


@lru_cache(maxsize=4096)
def _tile(shape: Shape, boxes: frozenset[Box]) -> bool:
    return tiles(full(shape), list(boxes))


@uncollected
def join(logical: Sequence[LogicalTensor], sources: Iterable[Placed], outputs: Sequence[OutputFile]) -> Plan:
    """The plan that fills `outputs` from `sources`; both layouts speak of the same logical tensors.

    CorruptError when the sources do not hold all of a tensor that is needed. That the targets are tiled exactly is our
    own duty and asserted.
    """
    shapes = {tensor.name: tensor.shape for tensor in logical}
    held = _by_tensor(placed for placed in sources if not placed.stored.function)
    wanted = _by_tensor(placed for output in outputs for placed in output.tensors)
    # Of a stored tensor's name: the ranks list theirs in the same order, and one that others lack after its neighbour.
    position: dict[str, int] = {}
    at = -1
    steps: list[tuple[int, Step]] = []
    done: set[tuple[str, str]] = set()
    for output in outputs:
        for placed in output.tensors:
            stored = placed.stored
            assert _is_filled(stored.view or stored.shape, _places(stored.parts), stored.fills), (
                f"{stored.name}: parts and padding do not tile {stored.shape}"
            )
            at = position.setdefault(stored.name, at + 1)
            for part in stored.parts:
                name, function = key = part.tensor, stored.function
                if key not in done:
                    done.add(key)
                    step = _transfer(name, shapes[name], held.get((name, ""), ()), wanted[key])
                    if function:
                        scales = _scales(name, shapes, held) if function == SCALED else None
                        step = step._replace(function=function, scales=scales)
                    steps.append((at, step))
            for box in stored.fills:
                strides = row_major(stored.view or stored.shape)
                offset = sum(start * stride for start, stride in zip(corner(box), strides, strict=True))
                target = _region(placed, (Piece(full(extents(box)), offset, strides),))
                steps.append((at, Fill(stored.name, target, stored.value)))
    steps.sort(key=lambda item: item[0])
    return Plan(tuple(outputs), tuple(step for _, step in steps))


_Place = tuple[Box, Shape, Shape | None, tuple[int, ...] | None]
"""A part without the tensor's name: box, corner, view and order."""


def _places(parts: Sequence[Part]) -> tuple[_Place, ...]:
    return tuple([part[1:] for part in parts])


@lru_cache(maxsize=4096)
def _is_filled(shape: Shape, places: tuple[_Place, ...], fills: tuple[Box, ...]) -> bool:
    """Whether parts and padding of a stored tensor tile it. Cached: layers are alike."""
    boxes = [box for box in (*(placed_box(box, at, order) for box, at, _, order in places), *fills) if volume(box)]
    once = frozenset(boxes)
    return len(once) == len(boxes) and _tile(shape, once)


_Held = Sequence[tuple[Placed, tuple[Part, ...]]]
"""Where a logical tensor lies: stored tensors, with those of their parts that are of it."""


def _region(placed: Placed, pieces: tuple[Piece, ...]) -> Region:
    stored = placed.stored
    return Region(placed.file, placed.begin, placed.begin + nbytes(stored.dtype, stored.shape), stored.dtype, pieces)


def _by_tensor(tensors: Iterable[Placed]) -> dict[tuple[str, str], list[tuple[Placed, tuple[Part, ...]]]]:
    """Where each logical tensor lies, and each function of it, in the order of `tensors`."""
    found: dict[tuple[str, str], list[tuple[Placed, tuple[Part, ...]]]] = {}
    for placed in tensors:
        own: dict[str, list[Part]] = {}
        for part in placed.stored.parts:
            own.setdefault(part.tensor, []).append(part)
        for name, parts in own.items():
            found.setdefault((name, placed.stored.function), []).append((placed, tuple(parts)))
    return found


def _transfer(name: str, shape: Shape, held: _Held, wanted: _Held) -> Transfer:
    flow = _flow(shape, _kinds(held), _kinds(wanted))
    if flow.found is not None:
        raise CorruptError(
            f"the ranks do not hold {name} exactly",
            tensor=name,
            expected=f"all of shape {list(shape)}, once or as equal replicas",
            found=flow.found,
        )
    sides = ((held, flow.sources), (held, flow.replicas), (wanted, flow.targets))
    sources, replicas, targets = [
        tuple([_region(placed, each) for (placed, _), each in zip(side, pieces, strict=True) if each])
        for side, pieces in sides
    ]
    return Transfer(name, flow.fine, sources, replicas, targets)


def _scales(name: str, shapes: Mapping[str, Shape], held: Mapping[tuple[str, str], _Held]) -> Scales | None:
    """Where the scales of a matrix' blocks lie, if it has some; CorruptError where they are not of equal blocks."""
    scales, of = f"{name}{SCALED[1:]}", shapes[name]
    if (shape := shapes.get(scales)) is None:
        return None
    if not is_grid(of, shape):
        what, expected = f"{scales} is not a grid of {name}", f"a shape that divides {list(of)}"
        raise CorruptError(what, tensor=scales, expected=expected, found=list(shape))
    return Scales(of, shape, _transfer(scales, shape, held.get((scales, ""), ()), ()))


def is_grid(shape: Shape, scales: Shape) -> bool:
    """Whether a matrix is as many equal blocks as it has scales.

    >>> is_grid((128, 256), (1, 2)), is_grid((192, 256), (2, 2)), is_grid((160, 256), (3, 2))
    (True, True, False)
    """
    return len(shape) == len(scales) == 2 and all(b and a % b == 0 for a, b in zip(shape, scales, strict=True))


_Kind = tuple[Shape, tuple[_Place, ...]]
"""What a stored tensor has of a logical one, without names: the shape in which parts see it, and the parts."""


def _kinds(held: _Held) -> tuple[_Kind, ...]:
    return tuple([(placed.stored.view or placed.stored.shape, _places(parts)) for placed, parts in held])


class _Flow(NamedTuple):
    """What of a logical tensor goes from where to where: for every stored tensor on a side its pieces, maybe none.

    found: what the sources hold, when that is not the tensor exactly.
    """

    fine: Shape
    sources: tuple[tuple[Piece, ...], ...]
    replicas: tuple[tuple[Piece, ...], ...]
    targets: tuple[tuple[Piece, ...], ...]
    found: str | None


@lru_cache(maxsize=4096)
def _flow(shape: Shape, held: tuple[_Kind, ...], wanted: tuple[_Kind, ...]) -> _Flow:
    """Cached, so that equal layers share their pieces."""
    fine = common_view(shape, (view for _, places in (*held, *wanted) for _, _, view, _ in places))

    def pieces(kind: _Kind) -> tuple[Piece, ...]:
        stored, places = kind
        return tuple(piece for place in places for piece in pieces_of(stored, *place, shape, fine))

    sources, replicas = [], []
    covered: set[Box] = set()
    for each in map(pieces, held):
        once = {piece.box: piece for piece in reversed(each) if piece.box not in covered}
        sources.append(tuple(piece for piece in each if once.get(piece.box) is piece))
        replicas.append(tuple(piece for piece in each if once.get(piece.box) is not piece))
        covered.update(once)
    whole = _tile(fine, frozenset(covered))
    found = None if whole else f"{sum(map(volume, covered))} elements in {len(covered)} boxes"
    return _Flow(fine, tuple(sources), tuple(replicas), tuple(map(pieces, wanted)), found)
