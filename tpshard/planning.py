"""Plans: the join of a source layout and a target layout, as steps that the executor can run.

Split, merge and reshard are the same function with other layouts. A plan is made of headers alone, and proves that
every element of every output comes from exactly one place and that every source tensor is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from tpshard.box import Box, Shape, corner, extents, full, tiles, volume
from tpshard.errors import CorruptError
from tpshard.header import DTYPE_BITS, build_header, nbytes
from tpshard.layout import Layout, LogicalTensor, Part, StoredTensor
from tpshard.views import Piece, common_view, fine_box, pieces_of, placed_box, row_major


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


class Transfer(NamedTuple):
    """Move one logical tensor: read `sources`, which tile it; `replicas` must hold the same; write `targets`."""

    name: str
    shape: Shape
    sources: tuple[Region, ...]
    replicas: tuple[Region, ...]
    targets: tuple[Region, ...]

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
    parts: dict[str, dict[tuple[Box, Shape | None], None]] = {tensor.name: {} for tensor in logical}
    for rank in layout:
        for stored in rank:
            for part in stored.parts:
                parts[part.tensor][part.box, part.view] = None
    for tensor in logical:
        held = parts[tensor.name]
        fine = common_view(tensor.shape, (view for _, view in held))
        boxes = {each for box, view in held for each in fine_box(box, view or tensor.shape, fine)}
        assert _tile(fine, frozenset(boxes)), f"{tensor.name} is not covered exactly"


@lru_cache(maxsize=4096)
def _tile(shape: Shape, boxes: frozenset[Box]) -> bool:
    return tiles(full(shape), list(boxes))


def join(logical: Sequence[LogicalTensor], sources: Iterable[Placed], outputs: Sequence[OutputFile]) -> Plan:
    """The plan that fills `outputs` from `sources`; both layouts speak of the same logical tensors.

    CorruptError when the sources do not hold all of a tensor that is needed. That the targets are tiled exactly is our
    own duty and asserted.
    """
    shapes = {tensor.name: tensor.shape for tensor in logical}
    held = _by_tensor(sources)
    wanted = _by_tensor(placed for output in outputs for placed in output.tensors)
    # Of a stored tensor's name: the ranks list theirs in the same order, and one that others lack after its neighbour.
    position: dict[str, int] = {}
    at = -1
    steps: list[tuple[int, Step]] = []
    done: set[str] = set()
    for output in outputs:
        for placed in output.tensors:
            stored = placed.stored
            _assert_filled(stored)
            at = position.setdefault(stored.name, at + 1)
            for part in stored.parts:
                if part.tensor not in done:
                    done.add(part.tensor)
                    name = part.tensor
                    steps.append((at, _transfer(name, shapes[name], held.get(name, ()), wanted[name])))
            for box in stored.fills:
                strides = row_major(stored.view or stored.shape)
                offset = sum(start * stride for start, stride in zip(corner(box), strides, strict=True))
                target = _region(placed, (Piece(full(extents(box)), offset, strides),))
                steps.append((at, Fill(stored.name, target, stored.value)))
    steps.sort(key=lambda item: item[0])
    return Plan(tuple(outputs), tuple(step for _, step in steps))


def _assert_filled(stored: StoredTensor) -> None:
    boxes = [box for box in (*(placed_box(part) for part in stored.parts), *stored.fills) if volume(box)]
    once = frozenset(boxes)
    assert len(once) == len(boxes) and _tile(stored.view or stored.shape, once), (
        f"{stored.name}: parts and padding do not tile {stored.shape}"
    )


_Held = Sequence[tuple[Placed, tuple[Part, ...]]]
"""Where a logical tensor lies: stored tensors, with those of their parts that are of it."""


def _region(placed: Placed, pieces: tuple[Piece, ...]) -> Region:
    stored = placed.stored
    return Region(placed.file, placed.begin, placed.begin + nbytes(stored.dtype, stored.shape), stored.dtype, pieces)


def _by_tensor(tensors: Iterable[Placed]) -> dict[str, list[tuple[Placed, tuple[Part, ...]]]]:
    """Where each logical tensor lies, in the order of `tensors`."""
    found: dict[str, list[tuple[Placed, tuple[Part, ...]]]] = {}
    for placed in tensors:
        parts = placed.stored.parts
        names = dict.fromkeys(part.tensor for part in parts)
        for name in names:
            own = parts if len(names) == 1 else tuple(part for part in parts if part.tensor == name)
            found.setdefault(name, []).append((placed, own))
    return found


def _transfer(name: str, shape: Shape, held: _Held, wanted: _Held) -> Transfer:
    fine = common_view(shape, (part.view for _, parts in (*held, *wanted) for part in parts))
    sources: list[Region] = []
    replicas: list[Region] = []
    covered: set[Box] = set()
    for placed, parts in held:
        pieces = _all_pieces(placed.stored, parts, shape, fine)
        first = tuple(piece for piece in pieces if piece.box not in covered)
        again = tuple(piece for piece in pieces if piece.box in covered)
        covered.update(piece.box for piece in first)
        if first:
            sources.append(_region(placed, pieces if not again else first))
        if again:
            replicas.append(_region(placed, pieces if not first else again))
    if not _tile(fine, frozenset(covered)):
        raise CorruptError(
            f"the ranks do not hold {name} exactly",
            tensor=name,
            expected=f"all of shape {list(shape)}, once or as equal replicas",
            found=f"{sum(map(volume, covered))} elements in {len(covered)} boxes",
        )
    targets = tuple(_region(placed, _all_pieces(placed.stored, parts, shape, fine)) for placed, parts in wanted)
    return Transfer(name, fine, tuple(sources), tuple(replicas), targets)


def _all_pieces(stored: StoredTensor, parts: tuple[Part, ...], shape: Shape, fine: Shape) -> tuple[Piece, ...]:
    if len(parts) == 1:  # the cached tuple itself: equal layers share it
        return pieces_of(stored, parts[0], shape, fine)
    return tuple(piece for part in parts for piece in pieces_of(stored, part, shape, fine))
