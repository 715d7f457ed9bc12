"""A rank's rows of a parameter that several tensors make one behind another, and that an engine cuts as one."""

from collections.abc import Sequence

from tpshard.errors import UnsupportedError
from tpshard.formats.engine_tables import EngineFamily
from tpshard.planning.box import slab
from tpshard.planning.layout import LogicalTensor, Part, StoredTensor
from tpshard.planning.model import Model
from tpshard.storage.tensor_names import numbered

VOCAB_MULTIPLE = 64
"""Both engines pad vocabularies to a multiple of this before they cut them (their DEFAULT_VOCAB_PADDING_SIZE)."""


def shares_in_line(
    family: EngineFamily, model: Model, tensors: Sequence[LogicalTensor], tp: int
) -> dict[str, tuple[StoredTensor, ...]]:
    """Each rank's shares of the tensors whose cut is that of what they make: `joint` or `rows`."""
    shares = dict[str, tuple[StoredTensor, ...]]()
    for (cut, _), in_line in _in_line(family, model, tensors).items():
        shares |= _joint(in_line, tp, VOCAB_MULTIPLE if cut == "joint" else 1)
    return shares


def _in_line(
    family: EngineFamily, model: Model, tensors: Sequence[LogicalTensor]
) -> dict[tuple[str, str], list[LogicalTensor]]:
    """By cut and parameter, in order, the tensors of which a parameter's rows are cut as one, wherever one ends."""
    found: dict[tuple[str, str], list[tuple[int, LogicalTensor]]] = {}
    for tensor in tensors:
        name = model.full_name(tensor.name)
        kind = family.kind(name)
        if kind.cut in ("joint", "rows"):
            place, into = (kind.fused[0].place, kind.fused[0].name) if kind.fused else (0, kind.renamed)
            found.setdefault((kind.cut, into.format(*numbered(name)[1])), []).append((place, tensor))
    return {key: [each for _, each in sorted(held, key=lambda one: one[0])] for key, held in found.items()}


def _joint(tensors: Sequence[LogicalTensor], tp: int, multiple: int) -> dict[str, tuple[StoredTensor, ...]]:
    """The shares of vocabularies that follow one another, cut as one: a rank may have nothing of some."""
    total = -(-sum(tensor.shape[0] for tensor in tensors) // multiple) * multiple
    if total % tp:
        found, name = f"{total} rows on {tp} ranks", tensors[0].name
        raise UnsupportedError("vocabularies that are cut as one do not divide", tensor=name, found=found, hint="--tp")
    size, first, shares = total // tp, 0, {}
    for tensor in tensors:
        rows, *rest = tensor.shape
        held = []
        for rank in range(tp):
            low, high = (min(max(end - first, 0), rows) for end in (rank * size, (rank + 1) * size))
            parts = (
                (Part(tensor.name, slab(tensor.shape, 0, low, high), (0,) * len(tensor.shape)),) if low < high else ()
            )
            padded = (rank + 1) * size - max(first + rows, rank * size) if tensor is tensors[-1] else 0
            shape = (high - low + max(padded, 0), *rest)
            fills = (slab(shape, 0, high - low, shape[0]),) if padded > 0 else ()
            held.append(StoredTensor(tensor.name, tensor.dtype, shape, parts, fills))
        shares[tensor.name] = tuple(held)
        first += rows
    return shares
