"""Stacks of matrices that an engine has otherwise: next to each other, or with rows that were stored by turns apart."""

from tpshard.planning.deal import Deal
from tpshard.planning.layout import LogicalTensor, Part, StoredTensor


def side_by_side(share: StoredTensor) -> StoredTensor:
    """A stack of matrices as one: each behind the one before, along its second dim."""
    many, rows, columns = share.shape
    parts = tuple(part._replace(at=(part.at[1], part.at[0], part.at[2]), order=(1, 0, 2)) for part in share.parts)
    return share._replace(shape=(rows, many * columns), view=(rows, many, columns), parts=parts)


def by_turns(tensor: LogicalTensor, dealt: Deal, rank: int) -> StoredTensor:
    """The share of rows that are stored one of each segment by turns, as the segments one after another.

    Seen with a row of all segments as one row, a segment is so many columns of it.
    """
    dim, segments = tensor.cut.dim, tensor.cut.segments
    assert dim is not None and dim == len(tensor.shape) - 2
    before, rows, width = tensor.shape[:dim], tensor.shape[dim] // len(segments), tensor.shape[-1]
    view, parts, stored = (*before, rows, len(segments) * width), [], 0
    for index, name in enumerate(segments):
        first, last = dealt.of(name, rank)
        box = (*((0, size) for size in before), (first, last), (index * width, (index + 1) * width))
        parts.append(Part(tensor.name, box, (*(0 for _ in before), stored, 0), view))
        stored += last - first
    return StoredTensor(tensor.name, tensor.dtype, (*before, stored, width), tuple(parts))
