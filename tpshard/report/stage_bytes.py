"""What the ranks of any pipeline stage hold in a format, from layouts of one layer of each kind.

Layers are alike, so only one of each kind is laid out, once for each tp and ep; what a stage holds is a sum of these.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tpshard.errors import UnsupportedError
from tpshard.formats import format_of
from tpshard.formats.plan import require_held
from tpshard.formats.split import Options, RankLayouts
from tpshard.planning.deal import Deal
from tpshard.planning.layout import Row
from tpshard.planning.model import Model
from tpshard.planning.stages import Stages
from tpshard.storage.names import NOT_LOADED
from tpshard.storage.tensor_names import numbered

_MOST = 3
"""Stages that are laid out: the first, one between, and the last."""


@dataclass(frozen=True)
class LikeLayers:
    """A model with one layer of each kind. like: of each layer of the whole one, the number of that which is here."""

    model: Model
    like: tuple[int, ...]


def like_layers(model: Model) -> LikeLayers:
    """Leave out layers that have the tensors of an earlier one, and the same in the config's lists for each layer.

    A model of which nobody says where its layers are stays whole.
    """
    layers = model.layers
    if layers is None:
        return LikeLayers(model, ())
    config = model.config if model.text_config is None else model.text_config
    said = [each for each in config.values() if isinstance(each, list) and len(each) == layers.count]
    contents: list[set[object]] = [{str(each[number]) for each in said} for number in range(layers.count)]
    positions = [layers.position(model.full_name(tensor.name)) for tensor in model.tensors]
    for tensor, position in zip(model.tensors, positions, strict=True):
        if 0 <= position < layers.count:
            name = model.full_name(tensor.name)[len(layers.within) + len(str(position)) :]
            contents[position].add((name, tensor.dtype, tensor.shape, tensor.cut))
    first: dict[frozenset[object], int] = {}
    like = tuple(first.setdefault(frozenset(each), number) for number, each in enumerate(contents))
    kept = {*first.values(), -1, layers.count}
    left_out = [each.name for each, position in zip(model.tensors, positions, strict=True) if position not in kept]
    return LikeLayers(model.without(frozenset(left_out)), like)


@dataclass(frozen=True)
class RankBytes:
    """Bytes of tensors of the ranks of a stage, at one tp and ep.

    alone: of each rank, outside of layers, where there is one stage. ends: the same of the first stage, of one between,
    and of the last; empty where there can be no stages, for the reason that `refusal` says. layers: of each kind of
    layer, by the number of its first. like: of each layer, of which kind it is. deal: which units the ranks have.
    """

    alone: tuple[int, ...]
    ends: tuple[tuple[int, ...], ...]
    layers: Mapping[int, tuple[int, ...]]
    like: tuple[int, ...]
    deal: Deal
    refusal: str = ""

    def of(self, stages: Stages | None) -> list[int]:
        """Bytes of every rank of a mesh, stage by stage. stages: None where there is one."""
        if stages is None:
            return self._with(self.alone, self.like)
        last = len(stages.ranges) - 1
        found: list[int] = []
        for stage, (begin, end) in enumerate(stages.ranges):
            outside = self.ends[0 if stage == 0 else -1 if stage == last else 1]
            found += self._with(outside, self.like[begin:end])
        return found

    def _with(self, outside: Sequence[int], like: Sequence[int]) -> list[int]:
        found = list(outside)
        for kind, count in Counter(like).items():
            found = [held + size * count for held, size in zip(found, self.layers[kind], strict=True)]
        return found


def rank_bytes(reduced: LikeLayers, tp: int, ep: int, format: str) -> RankBytes:
    """Lay out a model with one layer of each kind. UnsupportedError where the format cannot hold it on such ranks."""
    model, like = reduced.model, reduced.like
    layout = _laid(model, Options(tp, format=format, ep=ep))
    outside, beside = [0] * tp, 0
    layers: dict[int, list[int]] = {number: [0] * tp for number in sorted(set(like))}
    for row in layout.rows.rows:
        number = _layer(row, model)
        if number not in layers:
            held = outside
        elif row.name.startswith(f"{NOT_LOADED}."):  # of whatever stage, it lies with the first rank
            beside += row.kind.nbytes[0] * like.count(number)
            continue
        else:
            held = layers[number]
        for rank, size in enumerate(row.kind.nbytes):
            held[rank] += size
    outside[0] += beside
    assert layout.deal is not None
    by_layer = {number: tuple(held) for number, held in layers.items()}
    ends, refusal = _ends(model, tp, ep, format, min(_MOST, len(like)), beside)
    return RankBytes(tuple(outside), ends, by_layer, like, layout.deal, refusal)


def _ends(model: Model, tp: int, ep: int, format: str, pp: int, beside: int) -> tuple[tuple[tuple[int, ...], ...], str]:
    """What the ranks of each of `pp` stages have outside of layers, or why there are no stages."""
    try:
        layout = _laid(model, Options(tp, format=format, pp=max(2, pp), ep=ep))
    except UnsupportedError as error:
        return (), error.message
    found = [[0] * tp for _ in range(pp)]
    found[0][0] += beside
    for row in layout.rows.rows:
        if model.layers is None or not 0 <= _layer(row, model) < model.layers.count:
            for rank, size in enumerate(row.kind.nbytes):
                found[rank // tp][rank % tp] += size
    return tuple(map(tuple, found)), ""


def _laid(model: Model, options: Options) -> RankLayouts:
    form = format_of(options.format)
    require_held(form, model, options)
    return form.lay(model, options)


def _layer(row: Row, model: Model) -> int:
    """The layer that a stored tensor is of: by what it is made of, or by its own name."""
    layers = model.layers
    if layers is None:
        return -1
    if row.tensors:
        return layers.position(model.full_name(row.tensors[0]))
    _, numbers = numbered(row.name)
    return numbers[0] if numbers else layers.count
