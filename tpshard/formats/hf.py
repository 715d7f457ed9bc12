"""The ordinary Hugging Face layout: one safetensors file, or several with an index."""

import json
from collections.abc import Mapping, Sequence

from tpshard.errors import UsageError
from tpshard.formats.base import CUT_ANEW, Format
from tpshard.formats.split import Options, RankLayouts
from tpshard.planning.deal import deal
from tpshard.planning.join import OutputFile, alignment_order, output_file, parts_by_size
from tpshard.planning.layout import LogicalTensor, whole
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.storage.safetensors import nbytes


def outputs(
    tensors: Sequence[LogicalTensor], file_of: Mapping[str, str], max_file_size: int | None
) -> tuple[list[OutputFile], dict[str, bytes]]:
    """The weight files and, where there are several, the index.

    Tensors are grouped as they were in the source's files, or anew with at most `max_file_size` bytes each.
    """
    if max_file_size is None:
        files = sorted(set(file_of.values()))
        groups = [[whole(t) for t in tensors if file_of[t.name] == file] for file in files]
    else:
        groups = parts_by_size([whole(tensor) for tensor in alignment_order(tensors)], max_file_size)
    count = len(groups)
    stem = "consolidated" if all(file.startswith("consolidated") for file in file_of.values()) else "model"
    names = [_file_name(part, count, stem) for part in range(count)]
    written = [output_file(name, group, {"format": "pt"}) for name, group in zip(names, groups, strict=True)]
    if count == 1:
        return written, {}
    weight_map = {placed.stored.name: file.name for file in written for placed in file.tensors}
    total = sum(nbytes(tensor.dtype, tensor.shape) for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    name = f"{stem}.safetensors.index.json"
    return written, {name: (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()}


def _file_name(part: int, parts: int, stem: str = "model") -> str:
    """As transformers names them, which count from 1; Mistral's own files have another stem."""
    return f"{stem}-{part + 1:05}-of-{parts:05}.safetensors" if parts > 1 else f"{stem}.safetensors"


class HuggingFace(Format):
    """The unsharded layout as a format: one rank that holds everything. It is written by `outputs`."""

    has_ranks = False
    no_advice = CUT_ANEW

    def lay(self, model: Model, options: Options) -> RankLayouts:
        """Every tensor whole; UsageError for more than one rank."""
        if options.tp != 1:
            what, hint = "the ordinary layout has no ranks", "give --tp 1, or another --format"
            raise UsageError(what, expected="--tp 1", found=f"--tp {options.tp}", hint=hint)
        return RankLayouts((tuple(map(whole, model.tensors)),), deal(model.axes, Mesh(1)))

    def file_name(self, rank: int, mesh: Mesh, part: int, parts: int) -> str:
        """As transformers names them."""
        return _file_name(part, parts)

    def parse_name(self, name: str) -> Mapping[str, int] | None:
        """None: an ordinary checkpoint has no rank files."""
        return None


FORMAT = HuggingFace()
