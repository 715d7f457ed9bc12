"""tpshard's own format: one safetensors file per rank under the source's tensor names."""

import re
from collections.abc import Mapping, Sequence

from tpshard.formats.base import Format, saved_offsets
from tpshard.formats.split import Options, RankLayouts, Split
from tpshard.planning.deal import deal
from tpshard.planning.layout import StoredTensor, shard
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.storage.names import rank_stem

_NAME = re.compile(r"rank-(\d{5})-of-(\d{5})(?:-part-(\d{5})-of-(\d{5}))?\.safetensors")


class Native(Format):
    """`rank-00000-of-00004.safetensors`, with `-part-00000-of-00003` where a rank has several files."""

    own_names = True

    def lay(self, model: Model, options: Options) -> RankLayouts:
        """Every tensor cut as its rule says, in the model's order."""
        dealt = deal(model.axes, Mesh(options.tp), options.weights(), options.pad_vocab_to)
        return RankLayouts(shard(model.tensors, model.axes, dealt), dealt)

    def file_name(self, rank: int, tp: int, part: int, parts: int) -> str:
        """Numbered parts only where there are several."""
        middle = f"-part-{part:05}-of-{parts:05}" if parts > 1 else ""
        return f"{rank_stem(rank, tp)}{middle}.safetensors"

    def parse_name(self, name: str) -> Mapping[str, int] | None:
        """All four numbers."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        numbers = (int(group or default) for group, default in zip(match.groups(), (0, 1, 0, 1), strict=True))
        return dict(zip(("rank", "tp", "part", "parts"), numbers, strict=True))

    def metadata(self, split: Split, tensors: Sequence[StoredTensor]) -> dict[str, str]:
        """torch's description of rectangles: of all tensors of a set or of none, or its reader fails."""
        return saved_offsets(tensors) if split.layouts.is_rectangles else {}


FORMAT = Native()
