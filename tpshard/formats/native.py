"""tpshard's own format: one safetensors file per rank under the source's tensor names."""

import re
from collections.abc import Mapping, Sequence

from tpshard.formats.base import Format, saved_offsets
from tpshard.formats.split import Options, RankLayouts, Split
from tpshard.planning.deal import deal
from tpshard.planning.layout import StoredTensor, shard
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.planning.placement import placement
from tpshard.storage.names import RANK_STEM, rank_stem

_NAME = re.compile(rf"{RANK_STEM}(?:-part-(\d{{5}})-of-(\d{{5}}))?\.safetensors")


class Native(Format):
    """`rank-00000-of-00004.safetensors`, with `-part-00000-of-00003` where there are several, and stages likewise."""

    own_names = True
    has_stages = True
    has_experts = True

    def lay(self, model: Model, options: Options) -> RankLayouts:
        """Every tensor cut as its rule says, in the model's order, on the ranks that have its layer and its expert."""
        mesh = options.mesh
        if mesh.pp == mesh.ep == 1:
            dealt = deal(model.axes, mesh, options.weights(), options.pad_vocab_to)
            return RankLayouts(shard(model.tensors, model.axes, dealt), dealt)
        placed = placement(model, mesh, options.pp_layers)
        axes = placed.axes
        dealt = deal(axes, mesh, options.weights(), options.pad_vocab_to)
        tensors, dealt = placed.dealt(model.tensors, dealt, options.weights())
        return RankLayouts(shard(tensors, dealt.axes, dealt, placed.ranks), dealt, placement=placed)

    def file_name(self, rank: int, mesh: Mesh, part: int, parts: int) -> str:
        """Numbered parts only where there are several."""
        middle = f"-part-{part:05}-of-{parts:05}" if parts > 1 else ""
        return f"{rank_stem(rank, mesh.tp, mesh.pp)}{middle}.safetensors"

    def parse_name(self, name: str) -> Mapping[str, int] | None:
        """All of them."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        numbers = (int(group or usual) for group, usual in zip(match.groups(), (0, 1, 0, 1, 0, 1), strict=True))
        return dict(zip(("rank", "ranks", "stage", "stages", "part", "parts"), numbers, strict=True))

    def metadata(self, split: Split, tensors: Sequence[StoredTensor]) -> dict[str, str]:
        """torch's description of rectangles: of all tensors of a set or of none, or its reader fails."""
        return saved_offsets(tensors) if split.layouts.is_rectangles else {}


FORMAT = Native()
