"""Megatron-core's `torch_dist`: `release/` with one archive for each rectangle of a tensor, and the tracker beside it.

Tensors are whole in it and say nothing of ranks, so Megatron loads it at any tensor, pipeline and expert parallel size;
tp is how many files it is written as, by how many ranks at a time. Source: megatron/core/dist_checkpointing, and what
`GPTModel.sharded_state_dict` asks for.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from tpshard.formats.base import CUT_ANEW, Format
from tpshard.formats.dcp import archive_at, archives
from tpshard.formats.dcp_metadata import Described, StoredChunk, StoredObject, metadata_pickle
from tpshard.formats.megatron_args import arguments, pickled
from tpshard.formats.megatron_layout import (
    EXPERTS,
    NO_QUANTISED,
    MegatronLayout,
    MegatronParameter,
    megatron_layout,
    padded_vocab,
    require_no_shares,
)
from tpshard.formats.split import Options, RankLayouts, Split
from tpshard.formats.torch_archive import object_archive, require_storage
from tpshard.planning.box import Box, corner
from tpshard.planning.deal import deal, require_even
from tpshard.planning.join import OutputFile, parts_by_size, uncollected
from tpshard.planning.layout import StoredTensor
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.planning.window import stack, window
from tpshard.storage.names import DCP_METADATA, MEGATRON_COMMON, MEGATRON_METADATA, MEGATRON_TRACKER

_FOLDER = "release"
_FILE = re.compile(rf"{_FOLDER}/__(0|[1-9]\d*)_(0|[1-9]\d*)\.distcp")
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_NO_STATE = object_archive(b"\x80\x02]Na.")
"""`[None]`: what a linear layer without Transformer Engine, or without FP8, has as its extra state."""
_STATEFUL = re.compile(r"(?:decoder|mtp)\.layers\..*\b(?:linear_\w+|eh_proj)\.weight")


class Megatron(Format):
    """`release/__0_0.distcp`: rank and number of a file, as torch names them."""

    side_names = frozenset(
        {MEGATRON_TRACKER, *(f"{_FOLDER}/{name}" for name in (DCP_METADATA, MEGATRON_COMMON, MEGATRON_METADATA))}
    )
    container = True
    folder = _FOLDER
    no_advice = CUT_ANEW
    no_quantised = NO_QUANTISED

    def lay(self, model: Model, options: Options) -> RankLayouts:
        """Every rectangle is a stored tensor, by Megatron's name and where it begins: `name#layer,row,column`."""
        require_no_shares(options)
        layout = megatron_layout(model, padded_vocab(model, options.tp, options.pad_vocab_to))
        mesh = Mesh(options.tp)
        require_even(layout.axes, mesh, "Megatron divides evenly: use one of those; it loads at any tp that it takes")
        dealt = deal(layout.axes, mesh)
        shapes = {tensor.name: tensor.shape for tensor in model.tensors}
        ranks: list[tuple[StoredTensor, ...]] = []
        taken: list[set[Box]] = [set() for _ in layout.parameters]
        for rank in range(options.tp):
            row = []
            for parameter, boxes in zip(layout.parameters, taken, strict=True):
                require_storage(parameter.name, parameter.stored.dtype)
                for box in parameter.boxes(dealt, rank):
                    if box not in boxes:
                        boxes.add(box)
                        row.append(_rectangle(layout, parameter, box, shapes))
            ranks.append(tuple(row))
        return RankLayouts(tuple(ranks), dealt, layout.dropped)

    def file_name(self, rank: int, mesh: Mesh, part: int, parts: int) -> str:
        """As torch's writer names them, in the folder of the iteration."""
        return f"{_FOLDER}/__{rank}_{part}.distcp"

    def parse_name(self, name: str) -> Mapping[str, int] | None:
        """Rank and part."""
        found = _FILE.fullmatch(name)
        return {"rank": int(found[1]), "part": int(found[2])} if found else None

    def files(self, split: Split, rank: int) -> tuple[OutputFile, ...]:
        """One archive after the other; behind those of rank 0's first file the extra state that all layers share."""
        parts = parts_by_size(split.layout[rank], split.options.max_file_size)
        found = []
        for part, tensors in enumerate(parts):
            more = _NO_STATE if rank == part == 0 else b""
            found.append(archives(split, rank, self.file_name(rank, split.options.mesh, part, 0), tensors, more))
        return tuple(found)

    @uncollected
    def derived(self, split: Split) -> dict[str, bytes]:
        """The tracker, and what lies beside the tensors: where they are, of which kind, and Megatron's arguments."""
        found: dict[str, list[StoredChunk]] = {}
        dtypes: dict[str, str] = {}
        for rank in range(split.options.tp):
            for file in split.files(rank):
                for placed in file.tensors:
                    key, _, at = placed.stored.name.partition("#")
                    begin, length = archive_at(split, rank, placed)
                    offsets = tuple(int(number) for number in at.split(","))
                    where = StoredChunk(offsets, placed.stored.shape, _name(file), begin, length)
                    found.setdefault(key, []).append(where)
                    dtypes[key] = placed.stored.dtype
        tensors = [Described(key, dtypes[key], _shape(chunks), chunks) for key, chunks in found.items()]
        first = split.files(0)[0]
        state = (_name(first), first.size - len(_NO_STATE), len(_NO_STATE))
        objects = [StoredObject(name, *state) for name in _extra_states(tensors)]
        names = [tensor.name for tensor in tensors]
        vocab = _shape(found["embedding.word_embeddings.weight"])[0]
        args = arguments(split.model, names, vocab, split.options.mesh, ckpt_format="torch_dist")
        return {
            MEGATRON_TRACKER: f"{_FOLDER}\n".encode(),
            f"{_FOLDER}/{DCP_METADATA}": metadata_pickle(tensors, split.set_id, objects),
            f"{_FOLDER}/{MEGATRON_METADATA}": json.dumps(_BACKENDS).encode(),
            f"{_FOLDER}/{MEGATRON_COMMON}": object_archive(b"\x80\x02}(" + pickled(args) + b"u."),
        }


def _rectangle(
    layout: MegatronLayout, parameter: MegatronParameter, box: Box, shapes: Mapping[str, tuple[int, ...]]
) -> StoredTensor:
    """A box of a parameter as a tensor of its own."""
    held = window(parameter.stored, box)
    if parameter.layer is None or layout.singly:
        return held._replace(name=f"{parameter.name}#{','.join(map(str, corner(box)))}")
    at = (parameter.layer, *corner(box))
    return stack(f"{parameter.stacked_name}#{','.join(map(str, at))}", [held], shapes)


def _name(file: OutputFile) -> str:
    return file.name.rpartition("/")[2]


def _shape(chunks: Sequence[StoredChunk]) -> tuple[int, ...]:
    """The shape of a tensor: where its last rectangles end."""
    ends = ([at + size for at, size in zip(each.offsets, each.sizes, strict=True)] for each in chunks)
    return tuple(map(max, zip(*ends, strict=True)))


def _extra_states(tensors: Sequence[Described]) -> Iterator[str]:
    """The names of the extra states of all linear layers, and of Transformer Engine's attention."""
    for tensor in tensors:
        if not _STATEFUL.fullmatch(tensor.name):
            continue
        stacked = not re.match(r"\w+\.layers\.\d+\.", tensor.name)
        counts = tensor.shape[: (1 if stacked else 0) + (1 if EXPERTS in tensor.name else 0)]
        module = tensor.name.removesuffix(".weight")
        modules = [module]
        if module.endswith("self_attention.linear_proj"):
            modules.append(f"{module.removesuffix('linear_proj')}core_attention")
        for each in modules:
            for at in _indices(counts):
                yield f"{each}._extra_state/shard_{'.'.join(map(str, at))}_{'.'.join(map(str, counts or (1,)))}"


def _indices(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    if not counts:
        yield (0,)
    elif len(counts) == 1:
        yield from ((index,) for index in range(counts[0]))
    else:
        yield from ((one, other) for one in range(counts[0]) for other in range(counts[1]))


FORMAT = Megatron()
