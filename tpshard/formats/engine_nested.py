"""A model that nests a text model, as an engine has it: its text below a prefix, and the towers beside it.

What the engine has is data (`vllm_nested.toml`, which explains the language). From it and the text model's family come
a family for the whole, and the model under the names that the family speaks of, with its towers cut.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.formats.engine_entries import below, merged
from tpshard.formats.engine_patterns import fits_any, match
from tpshard.formats.engine_tables import EngineFamily
from tpshard.planning.axes import Axis, Cut
from tpshard.planning.layout import LogicalTensor
from tpshard.planning.model import Model
from tpshard.storage.names import QUANTISED_KEYS
from tpshard.storage.tensor_names import numbered

_HOW = {"column": (1, 1), "halves": (2, 1), "thirds": (3, 1), "gathered": (1, 3), "row": (1, 1)}
"""How a tower's tensors are cut: how many segments one has, and how often a segment has the axis' units."""

_SAID = ("needs", "says", "lacks", "started")
_SETTINGS = ("extra_layers", "scale_names", "first_experts", "rest_last", "alone_repeated", "least")
_NO_NAMES = ("buffers", *_SAID, *_SETTINGS)
_NAMES_AS_KEYS, _NAMES_AS_VALUES = ("refused", "slots", "shaped", "padded", "counted"), ("cuts", "computed")
"""What a family has that is no names, names that are keys alone, and values alone; elsewhere all are names."""


@dataclass(frozen=True)
class TowerAxis:
    """What tensors of a tower are cut along; the keys are those of the table."""

    name: str
    of: str = "vision_config"
    count: str = ""
    named: Mapping[str, int] = field(default_factory=dict)
    default: int = 0
    column: tuple[str, ...] = ()
    halves: tuple[str, ...] = ()
    thirds: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    row: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tower:
    """A tower, or what of a model is in no tower; the keys are those of the table."""

    vision: tuple[str, ...] = ()
    layer: str = ""
    axes: tuple[TowerAxis, ...] = ()
    or_whole: bool = False
    begins: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    unplaced: Mapping[str, str] = field(default_factory=dict)
    ones: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NestedFamily:
    """A kind of model that nests a text model; the keys are those of the table. own: what is in no tower.

    quantised: the methods of quantisation that were compared with what the engine holds.
    """

    texts: Mapping[str, str]
    text: str
    towers: tuple[Tower, ...]
    own: Tower
    depth: str = ""
    default_depth: int = -1
    layers: int | None = None
    required: Mapping[str, str] = field(default_factory=dict)
    quantised: tuple[str, ...] = ()


class AsEngineHas(NamedTuple):
    """A model whose full names are those that its family speaks of. unplaced: tensors that the engine has no place for.

    Of a text model alone, the model is the one that was given.
    """

    family: EngineFamily
    model: Model
    unplaced: frozenset[str] = frozenset()


def within(prefix: str, family: EngineFamily) -> EngineFamily:
    """A text model's family with all names below a prefix."""

    def full(value: Any) -> Any:
        if isinstance(value, str):
            return prefix + value if value else value
        if isinstance(value, tuple):
            return tuple(map(full, value))
        return {full(key): full(each) for key, each in value.items()}

    changed: dict[str, Any] = {}
    for key in (each.name for each in fields(EngineFamily) if each.name not in _NO_NAMES):
        value = getattr(family, key)
        if key in _NAMES_AS_KEYS:
            changed[key] = {full(name): each for name, each in value.items()}
        elif key in _NAMES_AS_VALUES:
            changed[key] = {each: full(names) for each, names in value.items()}
        else:
            changed[key] = full(value)
    return replace(family, **changed)


def text_type(nested: Mapping[str, NestedFamily], model: Model) -> str:
    """The model_type whose names a model has, or the text model in it. nested: by the model_type of the whole."""
    found = str((model.architecture.get("text") or model.architecture)["model_type"])
    whole = nested.get(str(model.architecture["model_type"]))
    return whole.texts.get(found, found) if whole else found


def as_engine_has(nested: NestedFamily, text: EngineFamily, model: Model, tp: int = 1) -> AsEngineHas:
    """A model and its family. text: the family of its text model.

    CorruptError where a count of the config contradicts a shape; UnsupportedError for a tower that is not known.
    """
    around = config_around(model)
    parts = (_cut_or_whole(_tower(nested, model), around, tp), nested.own)
    begins = {old: new for part in reversed(parts) for old, new in part.begins.items()}
    names = {tensor.name: _full_name(nested, model, begins, tensor.name) for tensor in model.tensors}
    family = within(nested.text, text)
    family = replace(
        family,
        fused={**family.fused, **parts[0].fused, **parts[1].fused},
        renamed={**family.renamed, **parts[0].renamed, **parts[1].renamed},
        ones={**family.ones, **parts[0].ones, **parts[1].ones},
    )
    axes, tensors = dict(model.axes), []
    for tensor in model.tensors:
        beside = not is_text(model, tensor.name) or _begun(begins, tensor.name)
        cut = _cut(parts, around, axes, tensor, names[tensor.name]) if beside else None
        tensors.append(replace(tensor, cut=cut) if cut else tensor)
    head = {name: nested.text + name.rpartition(".")[2] for name in model.tied}  # a head lies beside its base model
    tied = {head[name]: names[f"{to}.weight"].removesuffix(".weight") for name, to in model.tied.items()}
    config = text_config_of(model)
    whole = replace(model, tensors=tuple(tensors), axes=axes, tied=tied, full_names=names, config=config)
    return AsEngineHas(family, whole, frozenset(_unplaced(nested, parts, around, names)))


def text_config_of(model: Model) -> Mapping[str, Any]:
    """The config of the text model, which `text_config` or the like nests; the whole one where none does.

    What is said of quantised modules for all of the model is said of the text too.
    """
    said = {key: model.config[key] for key in QUANTISED_KEYS if model.config.get(key)}
    return {**_part(model.config, model.architecture["text"]["config"] or ""), **said}


def config_around(model: Model) -> Mapping[str, Any]:
    """The config that nests those of the text model and of the towers: the whole one, or the one of a part of it."""
    return _part(model.config, (model.architecture["text"]["config"] or "").rpartition(".")[0])


def _part(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The config at a path in another; an empty one where there is none."""
    found: Any = config
    for key in path.split(".") if path else ():
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def with_flag(config: Mapping[str, Any], path: str | None, key: str, value: object) -> dict[str, Any]:
    """A config with a key, and with the same key in the text model's config at a path."""
    inner, _, rest = (path or "").partition(".")
    if inner and isinstance(config.get(inner), dict):
        config = {**config, inner: with_flag(config[inner], rest, key, value)}
    return {**config, key: value}


def is_text(model: Model, name: str) -> bool:
    """Whether a tensor of a model that nests a text model is the text model's."""
    others = model.architecture["text"]["replicated"]
    return not any(name == other or name.startswith(f"{other}.") for other in others)


def _full_name(nested: NestedFamily, model: Model, begins: Mapping[str, str], name: str) -> str:
    """The name that the family's patterns are for. What begins as the table says is not the text's."""
    if is_text(model, name) and not _begun(begins, name):
        return nested.text + model.full_name(name)
    for old, new in begins.items():
        if name == old or name.startswith(f"{old}."):
            name = new + name.removeprefix(old)
    return name


def _begun(begins: Mapping[str, str], name: str) -> bool:
    return any(name == old or name.startswith(f"{old}.") for old in begins)


def _tower(nested: NestedFamily, model: Model) -> Tower:
    if len(nested.towers) == 1:
        return nested.towers[0]
    kind = str(_part(config_around(model), "vision_config").get("model_type"))
    for tower in nested.towers:
        if kind in tower.vision:
            return tower
    expected = ", ".join(name for tower in nested.towers for name in tower.vision)
    what = "the names of this tower are not known"
    raise UnsupportedError(what, expected=expected, found=f"vision_config of {kind}", hint="use --format native")


def _cut_or_whole(tower: Tower, config: Mapping[str, Any], tp: int) -> Tower:
    """The tower, whole on every rank where the engine has it so since its heads do not divide."""
    if not tower.or_whole or _units(tower.axes[0], config) % tp == 0:
        return tower
    return replace(tower, axes=())


def _cut(
    parts: tuple[Tower, ...], config: Mapping[str, Any], axes: dict[str, Axis], tensor: LogicalTensor, name: str
) -> Cut | None:
    """How a tensor beside the text is cut, None where it is whole. axes: those of the model, to which new ones come."""
    for axis in (axis for part in parts for axis in part.axes):
        for how, (segments, times) in _HOW.items():
            if not fits_any(getattr(axis, how), name):
                continue
            dim = int(how == "row")
            if dim >= len(tensor.shape):
                return None  # the bias behind a sum
            size = tensor.shape[dim] // segments
            count = times * _units(axis, config) if axis.count else size
            if count < 1 or tensor.shape[dim] % (segments * count):
                what = f"config.json contradicts the shape of {tensor.name}"
                hint, found = "config.json and the weights are of different models", f"shape {list(tensor.shape)}"
                expected = f"{segments * count} {axis.name} in dim {dim}"
                raise CorruptError(what, tensor=tensor.name, expected=expected, found=found, hint=hint)
            named = axis.name if times == 1 else f"{axis.name} of q, k and v"
            for key in (named, *(f"{named} {number}" for number in range(2, 100))):  # mergers may be of several widths
                if axes.setdefault(key, made := Axis(key, count, size // count)) == made:
                    return Cut("row" if dim else "column", dim, (key,) * segments)
    return None


def _units(axis: TowerAxis, config: Mapping[str, Any]) -> int:
    """How many units an axis has, by a number of the config or by a name in it."""
    found: Any = _part(config, axis.of).get(axis.count, axis.default)
    where = f"{axis.of}.{axis.count}"
    if axis.named and str(found) not in axis.named:
        what = f"how many {axis.name} a tower {found!r:.40} has is not known"
        expected = ", ".join(axis.named)
        raise UnsupportedError(what, expected=expected, found=where, hint="use --format native")
    if not axis.named and type(found) is not int:
        what, hint = f"config.json does not say how many {axis.name} there are", "take the published config.json"
        raise CorruptError(what, expected=f"a count in {where}", found=f"{found!r:.40}", hint=hint)
    return axis.named[found] if axis.named else int(found)


def _unplaced(
    nested: NestedFamily, parts: tuple[Tower, ...], config: Mapping[str, Any], names: Mapping[str, str]
) -> Iterator[str]:
    """What the engine has no place for: parts that it does not run, and layers behind the one it takes features of."""
    deepest = _deepest(nested, config)
    for name, full_name in names.items():
        kind, numbers = numbered(full_name)
        in_layer = any(part.layer and match(part.layer, kind) for part in parts)
        behind = deepest is not None and in_layer and numbers[0] >= deepest
        if behind or any(match(pattern, kind) for part in parts for pattern in part.unplaced):
            yield name


def _deepest(nested: NestedFamily, config: Mapping[str, Any]) -> int | None:
    """How many layers of the tower the engine makes; None for all."""
    total = _part(config, "vision_config").get("num_hidden_layers", nested.layers)
    if not nested.depth or type(total) is not int:
        return None
    outer, _, key = nested.depth.rpartition(".")
    chosen = _part(config, outer).get(key, nested.default_depth)
    if type(chosen) is not int or (nested.layers and chosen >= 0):
        what = "how the engine holds a model that takes features of several layers was not compared"
        raise UnsupportedError(what, expected=f"one number in {nested.depth}", found=chosen, hint="use --format native")
    return total + chosen + 1 if chosen < 0 else chosen


@lru_cache(maxsize=4)
def load_nested(path: Path) -> Mapping[str, NestedFamily]:
    """The kinds of an engine's table by model_type. It is our own file: what is wrong with it is our bug."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    families: dict[str, NestedFamily] = {}
    for name, entry in data["nested"].items():
        keys = merged(data["nested"], name)
        place, towers, keys["texts"] = keys.pop("place"), keys.pop("towers"), _texts(data["nested"], name)
        own = {key: keys.pop(key) for key in ("axes", "begins", "fused", "renamed", "unplaced", "ones") if key in keys}
        made = tuple(_parsed(below(place, merged(data["towers"], tower))) for tower in towers)
        family = NestedFamily(towers=made, own=_parsed(below("", own)), **keys)
        for model_type in entry["model_types"]:
            methods = tuple(method for method, types in data.get("quantised", {}).items() if model_type in types)
            families[model_type] = replace(family, quantised=methods)
    return families


def _texts(entries: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, str]:
    """A kind's text models: its own, or those of the kind that it is like, and not both."""
    entry = entries[name]
    return dict(entry["texts"]) if "texts" in entry else _texts(entries, entry["like"])


def _parsed(entry: Mapping[str, Any]) -> Tower:
    axes = tuple(TowerAxis(**axis) for axis in entry.get("axes", ()))
    return Tower(**{**entry, "axes": axes})
