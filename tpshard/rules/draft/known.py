"""What the built-in architectures say about a module with a given name: what a draft of new rules is compared with."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from tpshard.planning.axes import Kind, rule_key
from tpshard.rules import expression
from tpshard.rules.architecture import Architecture
from tpshard.rules.quantisation.schemes import split_name
from tpshard.storage.safetensors import TensorInfo

WIDTH = "hidden_size or n_embd or n_embed or d_model"
"""The width of the model, under the key that each known family of configs has for it."""


@dataclass(frozen=True)
class Module:
    """The tensors of one module across all layers; `name` has `*` in place of each number.

    shapes: by suffix ("" for a parameter without one), every shape that occurs. numbers: the layers, which are the
    first number of each name; experts: the second numbers.
    """

    name: str
    shapes: Mapping[str, frozenset[tuple[int, ...]]]
    numbers: frozenset[int]
    experts: frozenset[int]

    def shape(self, suffix: str = "weight") -> tuple[int, ...] | None:
        """The shape of a suffix, if it is the same in all layers."""
        found = self.shapes.get(suffix, frozenset())
        return next(iter(found)) if len(found) == 1 else None


@dataclass(frozen=True)
class KnownPattern:
    """A pattern of a built-in architecture, with the rule that it gives to modules with this `tail`."""

    family: str
    tail: tuple[str, ...]
    layered: bool
    kind: Kind
    axes: tuple[str, ...]
    interleave: str | None
    required: bool

    @property
    def rule(self) -> str:
        """The rule's key in a rules file, without its condition."""
        return rule_key(self.kind, self.axes, self.interleave)


@dataclass(frozen=True)
class AxisDefinition:
    """An axis as a built-in architecture defines it, evaluated for the config at hand."""

    name: str
    family: str
    count: int
    unit: int
    keys: Mapping[str, Any]

    @property
    def size(self) -> int:
        """The number of elements of the whole axis."""
        return self.count * self.unit

    @property
    def cut(self) -> tuple[str, int, int]:
        """What tells one axis from another: name, count and unit."""
        return self.name, self.count, self.unit


def modules(tensors: Iterable[TensorInfo]) -> list[Module]:
    """The modules of a checkpoint, sorted by name, whatever the order of its files."""
    shapes: dict[str, dict[str, set[tuple[int, ...]]]] = {}
    numbers: dict[str, list[set[int]]] = {}
    for tensor in tensors:
        parts = tensor.name.split(".")
        found = [int(part) for part in parts if part.isdecimal()]
        name, suffix = split_name(".".join("*" if part.isdecimal() else part for part in parts))
        shapes.setdefault(name, {}).setdefault(suffix, set()).add(tensor.shape)
        for number, seen in zip(found, numbers.setdefault(name, [set(), set()]), strict=False):
            seen.add(number)
    return [
        Module(name, {suffix: frozenset(s) for suffix, s in by_suffix.items()}, *map(frozenset, numbers[name]))
        for name, by_suffix in sorted(shapes.items())
    ]


def layer_stem(found: Sequence[Module]) -> str:
    """What precedes the layer's number in the names of most modules; "" when no name has a number."""
    stems = [module.name.partition("*")[0] for module in found if "*" in module.name.split(".")]
    return max(stems, key=stems.count, default="")


def tail(name: str, stem: str) -> tuple[tuple[str, ...], bool]:
    """The components of a module's name below its layer or the model's prefix, and whether it is in a layer."""
    if stem and name.startswith(f"{stem}*."):
        return tuple(name[len(stem) + 2 :].split(".")), True
    return tuple(name.removeprefix(model_prefix(stem)).split(".")), False


def model_prefix(stem: str) -> str:
    """The model's prefix, from what precedes a layer's number: `model.` for `model.layers.`."""
    return stem.rstrip(".").rpartition(".")[0] + "." if stem.count(".") > 1 else ""


def known_patterns(architectures: Iterable[Architecture]) -> list[KnownPattern]:
    """Every pattern of every architecture."""
    found = []
    for architecture in architectures:
        for rule, pattern in ((each, pattern) for each in architecture.rules for pattern in each.patterns):
            plain = pattern.removesuffix("?")
            stem = plain.partition("*")[0] if "*" in plain.split(".") else ""
            where = tail(plain, stem) if stem else tail(plain.removeprefix(architecture.prefix), "")
            required = plain == pattern and rule.kind != "buffer"
            found.append(KnownPattern(architecture.name, *where, rule.kind, rule.axes, rule.interleave, required))
    return found


def patterns_like(
    entries: Sequence[KnownPattern], parts: tuple[str, ...], layered: bool
) -> tuple[list[KnownPattern], bool]:
    """The patterns that have this tail, or else its last component, and whether it was the whole tail."""
    if whole := [entry for entry in entries if _alike(entry, parts, layered)]:
        return whole, True
    alike = (entry for entry in entries if entry.layered == layered and entry.tail[-1] != "*")
    return [entry for entry in alike if fnmatchcase(parts[-1], entry.tail[-1])], False


def closeness(entries: Sequence[KnownPattern], tails: set[tuple[tuple[str, ...], bool]]) -> dict[str, float]:
    """For each family, the modules in common as a share of those that are here or that the family requires."""
    found = {}
    for family in dict.fromkeys(entry.family for entry in entries):
        own = [entry for entry in entries if entry.family == family and entry.kind != "buffer"]
        common = {t for t in tails if any(_alike(entry, *t) for entry in own)}
        lacking = [entry for entry in own if entry.required and not any(_alike(entry, *t) for t in tails)]
        found[family] = len(common) / max(1, len(tails) + len(lacking))
    return found


def _alike(entry: KnownPattern, parts: tuple[str, ...], layered: bool) -> bool:
    return entry.layered == layered and len(entry.tail) == len(parts) and all(map(fnmatchcase, parts, entry.tail))


def axis_definitions(architectures: Iterable[Architecture], config: Mapping[str, Any]) -> list[AxisDefinition]:
    """Every axis of every architecture that this config gives a size, without the architectures' defaults."""
    found = []
    for architecture in architectures:
        for name, keys in architecture.axes.items():
            count, unit = (expression.count_or_none(str(keys.get(key, 1)), config) for key in ("count", "unit"))
            if count is not None and unit is not None:
                found.append(AxisDefinition(name, architecture.name, count, unit, keys))
    return found


def count_expressions(
    architectures: Iterable[Architecture], key: str, config: Mapping[str, Any], value: int
) -> list[str]:
    """The distinct expressions for `layers` or `experts` (`key`) that evaluate to `value`."""
    found = dict.fromkeys(str(text) for a in architectures if (text := getattr(a, key)) is not None)
    return [re.sub(r"\s+", " ", text) for text in found if expression.count_or_none(text, config) == value]
