"""Plans: the join of a source layout and a target layout, as steps that the executor can run.

Split, merge and reshard are the same function with other layouts. A plan is made of headers alone, and proves that
every element of every output comes from exactly one place and that every source tensor is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from tpshard.box import Box, Shape, corner, extents, full, place, tiles, volume
from tpshard.errors import CorruptError
from tpshard.header import DTYPE_BITS, build_header, nbytes
from tpshard.layout import Layout, LogicalTensor, StoredTensor


@dataclass(frozen=True, slots=True)
class Placed:
    """A stored tensor in a file: its bytes begin at the absolute offset `begin`."""

    stored: StoredTensor
    file: str
    begin: int


@dataclass(frozen=True)
class OutputFile:
    """A file to be written: name, header bytes, total size in bytes, and tensors in file order."""

    name: str
    header: bytes
    size: int
    tensors: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """Boxes of one logical tensor inside one stored tensor: `(logical box, corner in the stored tensor)` each."""

    file: str
    begin: int
    dtype: str
    shape: Shape
    pieces: tuple[tuple[Box, Shape], ...]


@dataclass(frozen=True, slots=True)
class Transfer:
    """Move one logical tensor: read `sources`, which tile it; `replicas` must hold the same; write `targets`."""

    name: str
    shape: Shape
    sources: tuple[Region, ...]
    replicas: tuple[Region, ...]
    targets: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Fill:
    """Write zeros into a box of one stored tensor (padding): the target's one piece, whole and with its corner."""

    name: str
    target: Region


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
    boxes: dict[str, set[Box]] = {tensor.name: set() for tensor in logical}
    for rank in layout:
        for stored in rank:
            for part in stored.parts:
                boxes[part.tensor].add(part.box)
    for tensor in logical:
        assert tiles(full(tensor.shape), list(boxes[tensor.name])), f"{tensor.name} is not covered exactly"


def join(logical: Sequence[LogicalTensor], sources: Iterable[Placed], outputs: Sequence[OutputFile]) -> Plan:
    """The plan that fills `outputs` from `sources`; both layouts speak of the same logical tensors.

    CorruptError when the sources do not hold all of a tensor that is needed. That the targets are tiled exactly is our
    own duty and asserted.
    """
    shapes = {tensor.name: tensor.shape for tensor in logical}
    held = _regions(sources)
    wanted = _regions(placed for output in outputs for placed in output.tensors)
    position: dict[str, int] = {}  # of a stored tensor's name; all ranks list the same names in the same order
    steps: list[tuple[int, Step]] = []
    done: set[str] = set()
    for output in outputs:
        for placed in output.tensors:
            stored = placed.stored
            boxes = [place(part.box, part.at) for part in stored.parts] + list(stored.fills)
            assert tiles(full(stored.shape), boxes), f"{stored.name}: parts and padding do not tile {stored.shape}"
            at = position.setdefault(stored.name, len(position))
            for part in stored.parts:
                if part.tensor not in done:
                    done.add(part.tensor)
                    sources_of = held.get(part.tensor, [])
                    transfer = _transfer(part.tensor, shapes[part.tensor], sources_of, wanted[part.tensor])
                    steps.append((at, transfer))
            for box in stored.fills:
                steps.append((at, Fill(stored.name, _region(placed, [(full(extents(box)), corner(box))]))))
    steps.sort(key=lambda item: item[0])
    return Plan(tuple(outputs), tuple(step for _, step in steps))


def _region(placed: Placed, pieces: Iterable[tuple[Box, Shape]]) -> Region:
    return Region(placed.file, placed.begin, placed.stored.dtype, placed.stored.shape, tuple(pieces))


def _regions(tensors: Iterable[Placed]) -> dict[str, list[Region]]:
    """Regions by logical tensor, in the order of `tensors`."""
    regions: dict[str, list[Region]] = {}
    for placed in tensors:
        pieces: dict[str, list[tuple[Box, Shape]]] = {}
        for part in placed.stored.parts:
            pieces.setdefault(part.tensor, []).append((part.box, part.at))
        for name, boxes in pieces.items():
            regions.setdefault(name, []).append(_region(placed, boxes))
    return regions


def _transfer(name: str, shape: Shape, held: Sequence[Region], wanted: Sequence[Region]) -> Transfer:
    sources: list[Region] = []
    replicas: list[Region] = []
    covered: set[Box] = set()
    for region in held:
        first = tuple(piece for piece in region.pieces if piece[0] not in covered)
        again = tuple(piece for piece in region.pieces if piece[0] in covered)
        covered.update(box for box, _ in first)
        if first:
            sources.append(Region(region.file, region.begin, region.dtype, region.shape, first))
        if again:
            replicas.append(Region(region.file, region.begin, region.dtype, region.shape, again))
    if not tiles(full(shape), list(covered)):
        raise CorruptError(
            f"the ranks do not hold {name} exactly",
            tensor=name,
            expected=f"all of shape {list(shape)}, once or as equal replicas",
            found=f"{sum(map(volume, covered))} elements in {len(covered)} boxes",
        )
    return Transfer(name, shape, tuple(sources), tuple(replicas), tuple(wanted))
