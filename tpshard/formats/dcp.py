"""torch.distributed.checkpoint's own files: `__0_0.distcp`, one archive for every chunk of a tensor, and `.metadata`.

A chunk is a rectangle of a tensor; a rank may hold several of one tensor, so a fused one is no problem. What several
ranks hold is stored once, by the lowest of them, as torch's writer may do it: its readers know of no replicas.
Source: torch/distributed/checkpoint/{filesystem,metadata,planner_helpers}.py.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from tpshard.errors import UnsupportedError
from tpshard.formats.base import CUT_ANEW, Format
from tpshard.formats.dcp_metadata import Described, StoredChunk, metadata_pickle
from tpshard.formats.split import Options, RankLayouts, Split
from tpshard.formats.torch_archive import ALIGN, TensorArchive, require_storage, tensor_archive
from tpshard.planning.box import Box, Shape, corner, extents
from tpshard.planning.deal import Deal, deal, equal_repeats, unequally_repeated
from tpshard.planning.join import OutputFile, Placed, parts_by_size, uncollected
from tpshard.planning.layout import Layout, LogicalTensor, Part, StoredTensor, shard
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.storage.names import DCP_METADATA

_FILE = re.compile(r"__(0|[1-9]\d*)_(0|[1-9]\d*)\.distcp")


def even_or_less(model: Model, options: Options) -> Deal:
    """The deal of a model without padding; UnsupportedError for padding, or for units that some ranks share."""
    if options.pad_vocab_to is not None:
        what = "torch.distributed.checkpoint describes the model's own tensors: it has no place for padding"
        hint = "leave it out: the last ranks get less, as torch's DTensor does it; or use --format native"
        raise UnsupportedError(what, found=f"--pad-vocab-to {options.pad_vocab_to}", hint=hint)
    dealt = deal(model.axes, Mesh(options.tp), options.weights())
    shared = next((axis for axis in model.axes.values() if unequally_repeated(axis, options.tp)), None)
    if shared is not None:
        what = f"torch's files hold every rectangle once, and do not say which ranks share {shared}"
        raise UnsupportedError(
            what, expected=equal_repeats(shared), found=f"tp {options.tp}", hint="use --format native"
        )
    return dealt


def chunks(model: Model, dealt: Deal) -> Iterator[tuple[LogicalTensor, list[list[Box]]]]:
    """For every tensor, the boxes that each rank stores: none twice, and nothing of padding."""
    known: dict[object, list[list[Box]]] = {}  # layers are alike
    for tensor in model.tensors:
        key = (tensor.shape, tensor.cut, tensor.dtype)
        if key not in known:
            known[key] = _once(shard([tensor], model.axes, dealt))
        yield tensor, known[key]


def _once(held: Layout) -> list[list[Box]]:
    """Of the one tensor that each rank holds, the boxes that no rank before it has."""
    taken: set[Box] = set()
    by_rank = []
    for (stored,) in held:
        boxes = [part.box for part in stored.parts if part.box not in taken]
        taken.update(boxes)
        by_rank.append(boxes)
    return by_rank


def chunk(name: str, tensor: LogicalTensor, box: Box) -> StoredTensor:
    """A box of a tensor as a tensor of its own."""
    shape, at = _extents(box)
    return StoredTensor(name, tensor.dtype, shape, (Part(tensor.name, box, at),))


@lru_cache(maxsize=4096)
def _extents(box: Box) -> tuple[Shape, Shape]:
    """The shape of a box, and the corner of a tensor of that shape. Cached, so that equal layers share them."""
    return extents(box), (0,) * len(box)


class Dcp(Format):
    """`__0_0.distcp`: rank and number of a file, as torch names them."""

    side_names = frozenset({DCP_METADATA})
    no_advice = CUT_ANEW
    container = True

    def lay(self, model: Model, options: Options) -> RankLayouts:
        """Every chunk is a stored tensor; `name#0`, `name#1` where a rank has several of a tensor."""
        rows: list[list[StoredTensor]] = [[] for _ in range(options.tp)]
        dealt = even_or_less(model, options)
        for tensor, by_rank in chunks(model, dealt):
            require_storage(tensor.name, tensor.dtype)
            name = model.complete_name(tensor.name)
            several = any(len(boxes) > 1 for boxes in by_rank)
            for row, boxes in zip(rows, by_rank, strict=True):
                for number, box in enumerate(boxes):
                    row.append(chunk(f"{name}#{number}" if several else name, tensor, box))
        return RankLayouts(tuple(map(tuple, rows)), dealt)

    def file_name(self, rank: int, mesh: Mesh, part: int, parts: int) -> str:
        """torch's threads each have a file; here several are there only above the file size."""
        return f"__{rank}_{part}.distcp"

    def parse_name(self, name: str) -> Mapping[str, int] | None:
        """Rank and part."""
        found = _FILE.fullmatch(name)
        return {"rank": int(found[1]), "part": int(found[2])} if found else None

    def files(self, split: Split, rank: int) -> tuple[OutputFile, ...]:
        """One archive after the other, each aligned like its tensor; each says of which set and rank it is."""
        parts = parts_by_size(split.layout[rank], split.options.max_file_size)
        names = [self.file_name(rank, split.options.mesh, part, len(parts)) for part in range(len(parts))]
        return tuple(archives(split, rank, name, tensors) for name, tensors in zip(names, parts, strict=True))

    @uncollected
    def derived(self, split: Split) -> dict[str, bytes]:
        """`.metadata`: of every chunk its place in the tensor and in the files."""
        found: dict[str, list[StoredChunk]] = {}
        for rank in range(split.options.tp):
            for file in split.files(rank):
                for placed in file.tensors:
                    (part,) = placed.stored.parts
                    begin, length = archive_at(split, rank, placed)
                    where = StoredChunk(corner(part.box), extents(part.box), file.name, begin, length)
                    found.setdefault(part.tensor, []).append(where)
        tensors = [
            Described(split.model.complete_name(tensor.name), tensor.dtype, tensor.shape, found[tensor.name])
            for tensor in split.kept.tensors
        ]
        return {DCP_METADATA: metadata_pickle(tensors, split.set_id)}


def _archive(split: Split, rank: int, stored: StoredTensor) -> TensorArchive:
    return tensor_archive(stored.dtype, stored.shape, f"{split.set_id} {rank}\n".encode())


def archive_at(split: Split, rank: int, placed: Placed) -> tuple[int, int]:
    """Where in its file the archive of a tensor begins, and its bytes."""
    archive = _archive(split, rank, placed.stored)
    return placed.begin - archive.begin, archive.size


def archives(split: Split, rank: int, name: str, tensors: Sequence[StoredTensor], more: bytes = b"") -> OutputFile:
    """A file with an archive for each tensor, aligned like it, and behind them what else it holds."""
    end = 0
    placed, literals = [], []
    for stored in tensors:
        archive = _archive(split, rank, stored)
        placed.append(Placed(stored, name, end + archive.begin))
        # Not joined with its neighbours': all archives of one dtype and shape share these bytes.
        literals += [(end + offset, data) for offset, data in archive.literals]
        padding = -archive.size % ALIGN
        literals.append((end + archive.size, b"\0" * padding))
        end += archive.size + padding
    literals.append((end, more))
    header = literals.pop(0)[1]
    return OutputFile(name, header, end + len(more), tuple(placed), tuple(literals))


FORMAT = Dcp()
