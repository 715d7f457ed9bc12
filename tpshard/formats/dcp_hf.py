"""The Hugging Face flavour of torch.distributed.checkpoint: safetensors files that say which rectangles they hold.

A file holds one rectangle of a tensor at most, and a tensor's size is where its last rectangle ends: there is no place
for a share of several boxes, nor for padding. What several ranks hold is stored once, by the lowest of them.
Source: torch/distributed/checkpoint/{hf_storage,_hf_utils,_consolidate_hf_safetensors}.py.
"""

import re
from collections.abc import Mapping, Sequence

from tpshard.errors import UnsupportedError
from tpshard.formats.base import CUT_ANEW, Format, saved_offsets
from tpshard.formats.dcp import chunk, chunks, even_or_less
from tpshard.formats.split import Options, RankLayouts, Split
from tpshard.planning.layout import StoredTensor
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model

_FILE = re.compile(r"shard-(\d{5})-model-(\d{5})-of-(\d{5})\.safetensors")
_UNREAD = {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"}
"""Dtypes that safetensors' torch side has no name for: torch's reader fails on a file that has one."""


class DcpHf(Format):
    """`shard-00001-model-00001-of-00001.safetensors`: rank and file, both from 1, and how many files the rank has."""

    no_advice = CUT_ANEW

    def lay(self, model: Model, options: Options) -> RankLayouts:
        """One rectangle a rank and tensor; UnsupportedError for a tensor whose share is several."""
        rows: list[list[StoredTensor]] = [[] for _ in range(options.tp)]
        dealt = even_or_less(model, options)
        for tensor, by_rank in chunks(model, dealt):
            name = model.complete_name(tensor.name)
            if tensor.dtype in _UNREAD:
                raise UnsupportedError(
                    f"torch reads no {tensor.dtype} from safetensors files", tensor=name, hint="use --format native"
                )
            for rank, (row, boxes) in enumerate(zip(rows, by_rank, strict=True)):
                if len(boxes) > 1:
                    raise UnsupportedError(
                        f"{name} is fused: rank {rank} has {len(boxes)} pieces of it, and a file can hold only one",
                        tensor=name,
                        expected="one rectangle for each rank",
                        found=f"{len(boxes)} on rank {rank} of {options.tp}",
                        hint="use --format dcp, which holds any number of them",
                    )
                row.extend(chunk(name, tensor, box) for box in boxes)
        return RankLayouts(tuple(map(tuple, rows)), dealt)

    def file_name(self, rank: int, mesh: Mesh, part: int, parts: int) -> str:
        """As torch's _gen_file_name."""
        return f"shard-{rank + 1:05}-model-{part + 1:05}-of-{parts:05}.safetensors"

    def parse_name(self, name: str) -> Mapping[str, int] | None:
        """Rank, part and number of parts, counted from 0 as everywhere here."""
        found = _FILE.fullmatch(name)
        if found is None or "00000" in found.groups():
            return None
        return {"rank": int(found[1]) - 1, "part": int(found[2]) - 1, "parts": int(found[3])}

    def metadata(self, split: Split, tensors: Sequence[StoredTensor]) -> dict[str, str]:
        """Where each rectangle begins."""
        return saved_offsets(tensors)


FORMAT = DcpHf()
