"""How an engine names and fuses its parameters: tables such as `vllm.toml`, one family per kind of model.

The comment at the head of `vllm.toml` explains the language. A pattern fits a tensor, or a module and all in it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tpshard.formats.engine_entries import as_of, below, merged
from tpshard.formats.engine_patterns import BEHIND, exchanged, fits_any, match, number_in, renamed, stars_of
from tpshard.storage.tensor_names import numbered

SCALES = ("_k_scale", "_prob_scale", "_q_scale", "_v_scale")
"""The buffers of vLLM's attention that an unquantised KV cache has."""


class FusedInto(NamedTuple):
    """A parameter that tensors are parts of, as the table has it: their place in it, and its name for their numbers.

    stacked: which of their numbers is the expert's, where experts are stacked. dim: along which they are fused.
    behind: whether they are the experts behind the first ones. counted: whether the place is a number of theirs.
    """

    target: str
    place: int
    name: str
    stacked: int | None
    dim: int
    behind: bool = False
    counted: bool = False


class NameKind(NamedTuple):
    """What an engine's table says of tensors whose names differ in numbers alone.

    layer: which of their numbers is the layer's. refusal: why the engine cannot take them. cut: the engine's, where it
    is not the architecture's. fused: what they are parts of. renamed: what they are called, for their numbers.
    """

    layer: int | None
    attends: bool
    draft: bool
    refusal: str | None
    cut: str | None
    transposed: bool
    squeezed: bool
    side_by_side: bool
    plain: bool
    scaled: bool
    either: bool
    float32: bool
    shaped: tuple[int, ...]
    function: str
    unrepeated: bool
    unread: bool
    kept: bool
    fused: tuple[FusedInto, ...]
    renamed: str


@dataclass(frozen=True)
class EngineFamily:
    """One family of an engine's table. Names are patterns, with `layer` before those that began with a dot."""

    layer: str = ""
    head: str = ""
    tied: str = ""
    extra_layers: str = ""
    first_experts: str = ""
    needs: Mapping[str, str] = field(default_factory=dict)
    says: Mapping[str, str] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    started: Mapping[str, str] = field(default_factory=dict)
    scales: tuple[str, ...] = ()
    scales_where: Mapping[str, str] = field(default_factory=dict)
    attends: tuple[str, ...] = ()
    buffers: bool = True
    drafts: tuple[str, ...] = ()
    unrepeated: tuple[str, ...] = ()
    alone_repeated: tuple[str, ...] = ()
    rest_last: tuple[str, ...] = ()
    least: Mapping[str, int] = field(default_factory=dict)
    shaped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    squeezed: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    either: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stands_in: Mapping[str, str] = field(default_factory=dict)
    padded: Mapping[str, int] = field(default_factory=dict)
    counted: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    scale_names: tuple[str, ...] = SCALES
    side_by_side: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    renamed_where: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    spelled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cuts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    computed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    slots: Mapping[str, int] = field(default_factory=dict)
    ones: Mapping[str, str] = field(default_factory=dict)
    every_stage: tuple[str, ...] = ()
    moved: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def kind(self, name: str) -> NameKind:
        """What the table says of a tensor, looked up once for all names that differ in numbers alone."""
        kind, _ = numbered(name)  # no pattern has a number of its own
        found = self._kinds.get(kind)
        if found is None:
            found = self._kinds[kind] = self._kind(kind)
        return found

    @cached_property
    def _kinds(self) -> dict[str, NameKind]:
        return {}

    def _kind(self, name: str) -> NameKind:
        fused = (
            (dim, target, *each)
            for dim, targets in enumerate((self.fused, self.stacks))
            for target, patterns in targets.items()
            for each in enumerate(patterns)
        )
        parts = [part.replace("{", "{{").replace("}", "}}") for part in name.split(".")]
        places = [place for place, part in enumerate(parts) if part == "0"]
        for number, place in enumerate(places):
            parts[place] = f"{{{number}}}"
        by_numbers = ".".join(parts)
        return NameKind(
            layer=places.index(stars_of(self.layer)[0][0]) if match(self.layer, name) else None,
            attends=fits_any(self.attends, name),
            draft=fits_any(self.drafts, name),
            refusal=next((reason for pattern, reason in self.refused.items() if match(pattern, name)), None),
            cut=next((cut for cut, patterns in self.cuts.items() if fits_any(patterns, name)), None),
            transposed=fits_any(self.transposed, name),
            squeezed=fits_any(self.squeezed, name),
            side_by_side=fits_any(self.side_by_side, name),
            plain=fits_any(self.plain, name),
            scaled=fits_any(self.scaled, name),
            either=fits_any(self.either, name),
            float32=fits_any(self.float32, name),
            shaped=next((dims for pattern, dims in self.shaped.items() if match(pattern, name)), ()),
            function=next((each for each, patterns in self.computed.items() if fits_any(patterns, name)), ""),
            unrepeated=fits_any(self.unrepeated, name),
            unread=fits_any(self.unread, name),
            kept=fits_any(tuple(self.kept), name),
            fused=tuple(
                FusedInto(
                    target,
                    place if (own := number_in(pattern, name)) is None else own,
                    renamed(pattern, by_numbers, target.rstrip("?")),
                    None if (stack := stars_of(pattern)[1]) is None else places.index(stack),
                    dim,
                    BEHIND in pattern.split("."),
                    own is not None,
                )
                for dim, target, place, pattern in fused
                if match(pattern, name)
            ),
            renamed=exchanged(self.renamed, by_numbers),
        )

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a tensor is in; None outside the layers."""
        place = self.kind(name).layer
        return None if place is None else numbered(name)[1][place]

    def attending(self, names: Iterable[str]) -> list[int]:
        """The numbers of the layers that tensors are in, of those that attend."""
        counted = (name for name in names if not self.attends or self.kind(name).attends)
        return sorted({layer for name in counted if (layer := self.layer_of(name)) is not None})

    def parts(self, target: str, dim: int) -> tuple[str, ...]:
        """The patterns of what is fused into a parameter along a dim, in order."""
        return (self.fused, self.stacks)[dim][target]

    def refusal(self, name: str) -> str | None:
        """Why the engine cannot take a tensor."""
        return self.kind(name).refusal

    def rename(self, name: str) -> str:
        """A tensor's name in the engine; the longest pattern counts."""
        return self.kind(name).renamed.format(*numbered(name)[1])

    def place(self, name: str) -> str:
        """Where the engine's class has what all of the above calls so; the longest pattern of `moved` counts."""
        return exchanged(self.moved, name)


@dataclass(frozen=True)
class Constant:
    """Parameters that the engine wants where a checkpoint has none: their names, dtype ("" for the model's), value.

    shape: of each, where there is no companion `like` that has their shape; all of it but dim `without`. not_in: how
    the modules are called that want none. unless: what quantization_config says where an unquantised cache has none.
    """

    names: tuple[str, ...]
    value: float
    dtype: str = ""
    shape: tuple[int, ...] = ()
    like: str = ""
    without: int | None = None
    not_in: tuple[str, ...] = ()
    unless: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ConfigNeed:
    """The values of a key of quantization_config that the engine takes, and why no others, `unless` others say else."""

    key: str
    values: tuple[Any, ...]
    reason: str
    unless: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """What an engine has of one quantisation method.

    buffers: of every attention layer. modules, experts: of every module, and of stacked experts, that has a companion
    `like`. lists: a key of quantization_config that must name the "quantised" or the "plain" modules. own_file: whether
    the engine also reads what the tool's own file says of it.
    """

    needs: tuple[ConfigNeed, ...] = ()
    buffers: tuple[Constant, ...] = ()
    modules: tuple[Constant, ...] = ()
    experts: tuple[Constant, ...] = ()
    lists: Mapping[str, str] = field(default_factory=dict)
    own_file: bool = False


@dataclass(frozen=True)
class QuantisedModules:
    """What an engine makes of the companions of quantised modules, by the suffix of their names.

    Those that are not named are fused along their first dim. scalars: one number, or a first dim like any. second:
    fused along the second dim. bytes: the last two dims are one. columns: a matrix of one column where the weight is
    INT8. cache: scales of the attention's keys and values.
    last: of the tensors to fuse the last counts; last_of_integers: where the weight is INT8; last_of_experts_without:
    of experts that do not have another companion beside it. unplaced: of no use to the engine. refused: with the
    reason. whole_experts: by method, the kinds of modules in models of which whole experts were compared.
    """

    scalars: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    bytes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    cache: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    last_of_integers: tuple[str, ...] = ()
    unplaced: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    last_of_experts_without: Mapping[str, str] = field(default_factory=dict)
    whole_experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    methods: Mapping[str, Method] = field(default_factory=dict)


@dataclass(frozen=True)
class Speculator:
    """The class that an engine makes of a family's layers which predict further tokens; the keys are the table's."""

    shares: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    owns: tuple[str, ...] = ()
    head: str = ""
    tied: str = ""
    numbered_from: str = ""
    as_layers: Mapping[str, str] = field(default_factory=dict)
    moved: Mapping[str, str] = field(default_factory=dict)
    cuts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    quantised: bool = False


@dataclass(frozen=True)
class Head:
    """What an engine's classes of other tasks have in place of a family's head; the keys are the table's."""

    module: str = ""
    spelled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    cuts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    started: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """An engine's table: families by model_type, and what it does not load at all.

    version: the one that this is of. read: model_types whose names were read in its sources, and not run. no_quantised:
    why it holds no quantised modules. heads: by what the names of classes end with, what they have in place of a head.
    classes: of model_types that are published with several classes, the model_type whose names each class has.
    refused_classes: classes that it does not load.
    kinds: of model_types whose configs name no class, a key of the config and the entry whose names it goes with.
    """

    versions: tuple[str, ...]
    version: str
    read: frozenset[str]
    families: Mapping[str, EngineFamily]
    refused_models: Mapping[str, str]
    quantised: QuantisedModules
    pipelines: frozenset[str] = frozenset()
    whole_experts: frozenset[str] = frozenset()
    speculators: Mapping[str, Speculator] = field(default_factory=dict)
    quantised_types: frozenset[str] = frozenset()
    no_quantised: str = ""
    classes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    refused_drafts: Mapping[str, str] = field(default_factory=dict)
    heads: Mapping[str, Head] = field(default_factory=dict)
    refused_classes: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@lru_cache(maxsize=8)
def load_table(path: Path, version: str | None = None) -> Table:
    """Read an engine's table as it is for one of its versions, the first by default.

    It is our own file: what is wrong with it is our bug.
    """
    data = as_of(tomllib.loads(path.read_text(encoding="utf-8")), version)
    families: dict[str, EngineFamily] = {}
    for name, entry in data["families"].items():
        family = _family(data["families"], name)
        family = replace(family, refused={**data["refused_names"], **family.refused})
        families |= {model_type: family for model_type in entry.get("model_types", ())}
    pipelines, experts, compared, read = (
        frozenset(data.get(key, ())) for key in ("pipelines", "whole_experts", "quantised_types", "read")
    )
    quantised, speculators = _quantised(data.get("quantised", {})), data.get("speculators", {})
    made = {name: _speculator(speculators, families, name) for name in speculators}
    drafts = {each: made[name] for name, entry in speculators.items() for each in entry.get("model_types", ())}
    refused = {name: reason for name, reason in data["refused_models"].items() if reason}
    versions = tuple(data["versions"])
    known = versions, version or versions[0], read, families, refused, quantised
    plain = {key: data.get(key, {}) for key in ("classes", "refused_classes", "kinds", "refused_drafts")}
    entries = data.get("heads", {})
    heads = {each: Head(**below("", merged(entries, each))) for each in entries}
    return Table(*known, pipelines, experts, drafts, compared, data.get("no_quantised", ""), heads=heads, **plain)


def _speculator(
    entries: Mapping[str, Mapping[str, Any]], families: Mapping[str, EngineFamily], name: str
) -> Speculator:
    entry = merged(entries, name)
    layers = {families[each].layer for each in entries[name].get("model_types", ())} or {""}
    assert len(layers) == 1, f"{name}: families with layers in different places"
    return Speculator(**below(layers.pop(), entry))


def _quantised(entry: Mapping[str, Any]) -> QuantisedModules:
    methods = {
        name: Method(
            tuple(ConfigNeed(**_frozen(each)) for each in method.get("needs", ())),
            **{
                key: tuple(Constant(**_frozen(each)) for each in method.get(key, ()))
                for key in ("buffers", "modules", "experts")
            },
            lists=method.get("lists", {}),
            own_file=method.get("own_file", False),
        )
        for name, method in entry.get("methods", {}).items()
    }
    return QuantisedModules(**{**_frozen(entry), "methods": methods})


def _frozen(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def _family(entries: Mapping[str, Mapping[str, Any]], name: str) -> EngineFamily:
    entry = merged(entries, name)
    entry = below(entry.get("layer", ""), entry)
    known = {each.name for each in fields(EngineFamily)}
    assert set(entry) <= known, f"unknown keys in {name}: {set(entry) - known}"
    family = EngineFamily(**entry)
    return replace(family, fused={target: sources for target, sources in family.fused.items() if sources})
