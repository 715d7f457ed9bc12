"""Megatron-core's parameters of a model, whole: what each is made of, and along which of its dims ranks divide it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

from tpshard.errors import UnsupportedError, UsageError
from tpshard.formats.engine_layout import joined, recipes_of, transposed
from tpshard.formats.engine_patterns import STACK
from tpshard.formats.engine_tables import EngineFamily, load_table
from tpshard.formats.split import Options
from tpshard.planning.axes import Axis
from tpshard.planning.box import Box, Shape, full, slab
from tpshard.planning.deal import Deal, padded
from tpshard.planning.layout import LayoutRows, LogicalTensor, Part, StoredTensor, whole
from tpshard.planning.model import Model

_TABLE = Path(__file__).parent / "tables" / "megatron.toml"
QKV, EXPERTS, ONE_EXPERT = ".self_attention.linear_qkv.", ".mlp.experts.experts.", ".mlp.experts.local_experts."
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_OF_PREDICTOR = ("enorm", "hnorm", "eh_proj", "final_layernorm")
"""What a layer that predicts a further token has beside what every layer has."""
_EH_PROJ, _PREDICTED = ".eh_proj.weight", "predicted rows"
_ENDS = ("embed_tokens", "shared_head.head")
_SHARED_ENDS = "of a layer that predicts a further token, for which Megatron uses the model's own embedding and head"
NO_QUANTISED = "Megatron's quantised layers keep their weights in other forms"
"""Why neither of Megatron's formats holds quantised models."""
VOCAB_MULTIPLE = 128
"""Megatron pads vocabularies to a multiple of this on each rank, unless it is told otherwise."""
_BIASED = ("self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
"""Modules of which all have a bias in Megatron, or none."""


@dataclass(frozen=True)
class Divided:
    """A stretch of a dim that ranks divide: the units of an axis, from an element on."""

    dim: int
    axis: str
    unit: int
    begin: int = 0


@dataclass(frozen=True)
class MegatronParameter:
    """One of Megatron's parameters, whole, of one layer where it is in one.

    name: with the layer's number. divided: along what ranks divide it; nothing where they do not. experts: how many
    are stacked along its first dim, 0 for none.
    """

    name: str
    stored: StoredTensor
    divided: tuple[Divided, ...] = ()
    experts: int = 0

    @property
    def layer(self) -> int | None:
        """The number of its layer."""
        found = _LAYER.match(self.name)
        return int(found[1]) if found else None

    @property
    def stacked_name(self) -> str:
        """Its name where layers are stacked."""
        return _LAYER.sub("decoder.layers.", self.name)

    def boxes(self, dealt: Deal, rank: int) -> Iterator[Box]:
        """What a rank has of it, one box for each expert and stretch; the same for ranks that share an axis."""
        shape = self.stored.shape
        for expert in range(self.experts) if self.experts else (None,):
            of = full(shape) if expert is None else ((expert, expert + 1), *full(shape[1:]))
            for each in self.divided:
                first, last = dealt.of(each.axis, rank)
                if first < last:
                    begin, end = (each.begin + unit * each.unit for unit in (first, last))
                    yield (*of[: each.dim], (begin, end), *of[each.dim + 1 :])
            if not self.divided:
                yield of


@dataclass(frozen=True)
class MegatronLayout:
    """Megatron's parameters of a model. vocab: rows of the embedding, padding with them.

    singly: whether layers differ, so that each has keys of its own; else those of all layers are stacked.
    dropped: tensors that it has no place for, with the reason.
    """

    parameters: tuple[MegatronParameter, ...]
    axes: Mapping[str, Axis]
    vocab: int
    dropped: Mapping[str, str]

    @cached_property
    def layers(self) -> int:
        """The number of layers."""
        return 1 + max((each.layer for each in self.parameters if each.layer is not None), default=-1)

    @cached_property
    def singly(self) -> bool:
        kinds: dict[int, set[str]] = {}
        for each in self.parameters:
            if each.layer is not None:
                kinds.setdefault(each.layer, set()).add(each.stacked_name)
        return len(set(map(frozenset, kinds.values()))) > 1


def families() -> Mapping[str, EngineFamily]:
    """Families of Megatron's table by model_type."""
    return load_table(_TABLE).families


def family_of(model_type: object) -> EngineFamily:
    """The family of a model_type; UnsupportedError for one whose names in Megatron are not known."""
    if model_type not in families():
        what = f"the names that Megatron has for model_type {model_type!r} are not known"
        raise UnsupportedError(what, expected=", ".join(sorted(families())), found=model_type)
    return replace(families()[str(model_type)])  # one that remembers the names of this model alone


def require_no_shares(options: Options) -> None:
    """UsageError where other than equal shares are asked for."""
    if options.uneven or options.shares is not None:
        what, hint = "Megatron divides tensors evenly", "leave them out, or use --format native"
        raise UsageError(what, found="--uneven or --shares", hint=hint)


def padded_vocab(model: Model, tp: int, pad_to: int | None) -> int:
    """Rows of the embedding and of the head: as Megatron pads them at this tp, or as it was asked for."""
    axis = next(axis for axis in model.axes.values() if axis.pad)
    if pad_to is not None:
        return padded(axis, tp, pad_to)
    multiple = VOCAB_MULTIPLE * tp
    return -(-axis.count // multiple) * multiple


def predictor_of(layer: int, rest: str) -> str:
    """The name of a parameter of a layer that predicts a further token, the first of which is 0."""
    inside = "" if rest.startswith(tuple(f"{each}." for each in _OF_PREDICTOR)) else "transformer_layer."
    return f"mtp.layers.{layer}.{inside}{rest}"


def megatron_layout(model: Model, vocab: int, *, stacked: bool = True) -> MegatronLayout:
    """Megatron's parameters of a model, the vocabulary padded to `vocab` rows. UnsupportedError for what it has not.

    stacked: whether the experts of a layer are one parameter, as in torch_dist; else each has its own.
    """
    if model.architecture.get("text"):
        raise UnsupportedError("Megatron's GPTModel is a text model alone", hint="use --format native")
    family = family_of(model.architecture.get("model_type"))
    family = family if stacked else _one_by_one(family)
    dropped, layers = _dropped(family, model), _own_layers(family, model)
    tensors = {tensor.name: tensor for tensor in model.tensors if tensor.name not in dropped}
    named = {name: model.full_name(name) for name in tensors}
    for name, full_name in named.items():
        if reason := family.refusal(full_name):
            raise UnsupportedError(f"Megatron cannot hold {name}: {reason}", tensor=name, hint="use --format native")
    recipes = recipes_of(family, named)
    shares = {name: (_turned(family, named[name], tensor),) for name, tensor in tensors.items()}
    axes, fused = dict(model.axes), dict(recipes)
    by_group = {into: fused.pop(into) for into in recipes if QKV in into and ".layer_norm_" not in into}
    rows = joined(fused, shares, {name: tensor.shape for name, tensor in tensors.items()}, 1, {})
    held = {stored.name: stored for stored in LayoutRows(rows, 1)[0]}
    sparse = {int(found[1]) for into in recipes if ".mlp.router." in into and (found := _LAYER.match(into))}
    parameters = []
    for into, recipe in recipes.items():
        first = tensors[recipe.groups[0][0]]
        name = _of_predictor(_norm_of_experts(into, sparse), layers)
        if not name.startswith(("decoder.", "embedding.", "output_layer.", "mtp.")):
            what = f"Megatron's {model.architecture.get('model_type')} has no place for {first.name}"
            raise UnsupportedError(what, tensor=first.name, hint="use --format native")
        if into in by_group:
            of = [tensors[tensor] for tensor in recipe.groups[0]]
            stored, group = _by_group(name, of, [shares[tensor.name][0] for tensor in of], axes)
            axes[group.name] = group
            parameters.append(MegatronParameter(name, stored, (Divided(0, group.name, group.unit),)))
            continue
        stored, experts = held[into]._replace(name=name), len(recipe.groups) if recipe.stacked else 0
        parameters.append(MegatronParameter(name, stored, _divided(recipe.groups[0], tensors, stored, axes), experts))
        axis = model.axes[first.cut.segments[0]] if first.cut.segments else None
        if axis is not None and axis.pad:
            axes[axis.name] = replace(axis, count=vocab, pad=False)
            parameters[-1] = replace(parameters[-1], stored=_padded(stored, vocab))
    _require_biases(parameters)
    return MegatronLayout(tuple(parameters), axes, vocab, dropped)


def _own_layers(family: EngineFamily, model: Model) -> int | None:
    """The number of the model's layers, where others follow that predict further tokens."""
    layers = model.config.get(family.extra_layers) if family.extra_layers else None
    return layers if isinstance(layers, int) else None


def _dropped(family: EngineFamily, model: Model) -> dict[str, str]:
    dropped, layers = {}, _own_layers(family, model)
    for tensor in model.tensors:
        full_name = model.full_name(tensor.name)
        layer = family.layer_of(full_name)
        if tensor.cut.kind == "buffer":
            dropped[tensor.name] = "a buffer that Megatron computes itself"
        elif layers is not None and layer is not None and layer >= layers:
            if full_name.endswith(tuple(f".{layer}.{each}.weight" for each in _ENDS)):
                dropped[tensor.name] = _SHARED_ENDS
    return dropped


def _of_predictor(name: str, layers: int | None) -> str:
    """A parameter's name, of a layer behind the model's own that of one which predicts a further token."""
    found = _LAYER.match(name)
    if layers is None or found is None or int(found[1]) < layers:
        return name
    return predictor_of(int(found[1]) - layers, name[found.end() :])


def _one_by_one(family: EngineFamily) -> EngineFamily:
    """The family with parameters of single experts."""
    fused = {
        target.replace(EXPERTS, f"{ONE_EXPERT}*."): tuple(each.replace(STACK, "*") for each in sources)
        for target, sources in family.fused.items()
    }
    return replace(family, fused=fused)


def _norm_of_experts(name: str, sparse: set[int]) -> str:
    """A norm's name: the one before a mixture of experts is a module of its own."""
    found = _LAYER.match(name)
    if found and int(found[1]) in sparse:
        return name.replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")
    return name


def _turned(family: EngineFamily, full_name: str, tensor: LogicalTensor) -> StoredTensor:
    stored = whole(tensor)
    return transposed(stored) if family.kind(full_name).transposed and len(tensor.shape) == 2 else stored


def _divided(
    names: Sequence[str], tensors: Mapping[str, LogicalTensor], stored: StoredTensor, axes: dict[str, Axis]
) -> tuple[Divided, ...]:
    """Along what ranks divide a parameter: as the architecture's rules cut the tensors that it is fused of."""
    if stored.name.endswith(_EH_PROJ):
        axes[_PREDICTED] = Axis(_PREDICTED, stored.shape[0], 1)
        return (Divided(0, _PREDICTED, 1),)
    found, begin = [], 0
    for name in names:
        cut = tensors[name].cut
        if cut.dim is None:
            return ()
        axis = axes[cut.segments[0]]
        weight = len(tensors[name].shape) > 1
        dim = len(stored.shape) - (2 if weight and cut.kind == "column" else 1)
        found.append(Divided(dim, axis.name, axis.unit, begin))
        begin += axis.count * axis.unit
    return tuple(found)


def _by_group(
    name: str, tensors: Sequence[LogicalTensor], shares: Sequence[StoredTensor], axes: Mapping[str, Axis]
) -> tuple[StoredTensor, Axis]:
    """q, k and v as Megatron stores them, of each KV group its heads of q, its k and its v; and the axis of groups.

    tensors: three, or one that has the three behind one another.
    """
    segments = [(each, axes[axis]) for each in range(len(tensors)) for axis in tensors[each].cut.segments]
    groups = min(axis.count for _, axis in segments)
    begins = [0] * len(tensors)
    parts: list[Part] = []
    size = 0
    for each, axis in segments:
        share, rows = shares[each], axis.count // groups * axis.unit
        (part,) = share.parts
        dim = part.order[0] if part.order else 0
        for group in range(groups):
            start = begins[each] + group * rows
            box = slab(tensors[each].shape, dim, start, start + rows)
            parts.append(part._replace(box=box, at=(group, size, *(0 for _ in share.shape[1:]))))
        begins[each] += axis.count * axis.unit
        size += rows
    placed = [part._replace(at=(part.at[0] * size + part.at[1], *part.at[2:])) for part in parts]
    along = segments[-1][1]
    stored = StoredTensor(name, shares[0].dtype, (groups * size, *shares[0].shape[1:]), tuple(placed))
    assert sum(prod(share.shape) for share in shares) == prod(stored.shape)
    return stored, Axis(f"{along.name} groups", groups, size, replicate=along.replicate)


def _padded(stored: StoredTensor, rows: int) -> StoredTensor:
    """An embedding or a head with rows of zeros behind its own."""
    shape: Shape = (rows, *stored.shape[1:])
    fills = (slab(shape, 0, stored.shape[0], rows),) if rows > stored.shape[0] else ()
    return stored._replace(shape=shape, fills=fills)


def _require_biases(parameters: Sequence[MegatronParameter]) -> None:
    names = {each.name.removesuffix(".bias") for each in parameters if each.name.endswith(".bias")}
    for each in parameters:
        found = _LAYER.match(each.name)
        if found and any(each.name == f"{found[0]}{module}.weight" for module in _BIASED):
            layer = [f"{found[0]}{module}" for module in _BIASED]
            if 0 < len(names.intersection(layer)) < len(layer):
                what = f"Megatron has a bias in all of {', '.join(_BIASED)} or in none"
                has = ", ".join(sorted(names.intersection(layer)))
                raise UnsupportedError(what, found=f"in {has} alone", hint="use --format native")
