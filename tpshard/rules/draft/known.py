"""What the known architectures say of a module by its name: the material that a draft of new rules is compared with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from tpshard.planning.axes import Kind
from tpshard.rules import expression
from tpshard.rules.architecture import Architecture
from tpshard.rules.schemes import split_name
from tpshard.storage.safetensors import TensorInfo

WIDTH = "hidden_size or n_embd or n_embed or d_model"
"""The width of the model, in the keys of all configs that are known."""


@dataclass(frozen=True)
class Module:
    """The tensors of one module in all layers: `name` with `*` for each number.

    shapes: those of each suffix (weight, bias; "" for a bare parameter). numbers: the first number of each name, which
    is the layer; experts: the second.
    """

    name: str
    shapes: Mapping[str, frozenset[tuple[int, ...]]]
    numbers: frozenset[int]
    experts: frozenset[int]

    def shape(self, suffix: str = "weight") -> tuple[int, ...] | None:
        """The one shape of a suffix in all layers, or None."""
        found = self.shapes.get(suffix, frozenset())
        return next(iter(found)) if len(found) == 1 else None


@dataclass(frozen=True)
class Known:
    """One pattern of a known architecture: the rule of modules with this `tail`."""

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
        return " ".join([self.kind, *self.axes, *(["/", self.interleave] if self.interleave else [])])


@dataclass(frozen=True)
class Definition:
    """An axis as a known architecture defines it, and its size for the config at hand."""

    name: str
    family: str
    count: int
    unit: int
    keys: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Elements of the whole axis."""
        return self.count * self.unit


def modules(tensors: Iterable[TensorInfo]) -> list[Module]:
    """The tensors by module, in the order of the first of each."""
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
        for name, by_suffix in shapes.items()
    ]


def layer_stem(found: Sequence[Module]) -> str:
    """What stands before the layer's number, in most modules; "" where nothing is numbered."""
    stems = [module.name.partition("*")[0] for module in found if "*" in module.name.split(".")]
    return max(stems, key=stems.count, default="")


def tail(name: str, stem: str) -> tuple[tuple[str, ...], bool]:
    """A module's name below its layer, or below the model's prefix; whether it is in a layer."""
    if stem and name.startswith(f"{stem}*."):
        return tuple(name[len(stem) + 2 :].split(".")), True
    return tuple(name.removeprefix(base(stem)).split(".")), False


def base(stem: str) -> str:
    """`model.` of `model.layers.`"""
    return stem.rstrip(".").rpartition(".")[0] + "." if stem.count(".") > 1 else ""


def known(architectures: Iterable[Architecture]) -> list[Known]:
    """Every pattern of the architectures."""
    found = []
    for architecture in architectures:
        patterns = [(rule, pattern) for rule in architecture.rules for pattern in rule.patterns]
        for rule, pattern in patterns:
            plain = pattern.removesuffix("?")
            stem = plain.partition("*")[0] if "*" in plain.split(".") else ""
            parts, layered = (
                tail(plain, stem) if stem else (tuple(plain.removeprefix(architecture.prefix).split(".")), False)
            )
            required = plain == pattern and rule.kind != "buffer"
            found.append(Known(architecture.name, parts, layered, rule.kind, rule.axes, rule.interleave, required))
    return found


def of_module(entries: Sequence[Known], parts: tuple[str, ...], layered: bool) -> tuple[list[Known], bool]:
    """The patterns with this tail, else with its last component; whether the whole tail was known."""
    alike = [entry for entry in entries if entry.layered == layered]
    whole = [e for e in alike if len(e.tail) == len(parts) and all(map(fnmatchcase, parts, e.tail))]
    if whole:
        return whole, True
    return [e for e in alike if e.tail[-1] != "*" and fnmatchcase(parts[-1], e.tail[-1])], False


def closeness(entries: Sequence[Known], tails: set[tuple[tuple[str, ...], bool]]) -> dict[str, float]:
    """Of each family: the share of modules in common, of those that it needs or that are here."""
    found = {}
    for family in dict.fromkeys(entry.family for entry in entries):
        own = [entry for entry in entries if entry.family == family and entry.kind != "buffer"]
        common = {t for t in tails if any(_alike(entry, *t) for entry in own)}
        lacking = [entry for entry in own if entry.required and not any(_alike(entry, *t) for t in tails)]
        found[family] = len(common) / max(1, len(tails) + len(lacking))
    return found


def _alike(entry: Known, parts: tuple[str, ...], layered: bool) -> bool:
    return entry.layered == layered and len(entry.tail) == len(parts) and all(map(fnmatchcase, parts, entry.tail))


def definitions(architectures: Iterable[Architecture], config: Mapping[str, Any]) -> list[Definition]:
    """Every axis that any architecture defines and that has a size for this config, its silence not filled in."""
    found = []
    for architecture in architectures:
        for name, keys in architecture.axes.items():
            try:
                count = expression.evaluate_count(str(keys["count"]), config)
                unit = expression.evaluate_count(str(keys.get("unit", 1)), config)
            except expression.ExpressionError:
                continue
            found.append(Definition(name, architecture.name, count, unit, keys))
    return found


def counts(architectures: Iterable[Architecture], key: str, config: Mapping[str, Any], value: int) -> list[str]:
    """The expressions for `layers` or `experts` that have this value, each once."""
    found = dict.fromkeys(str(text) for a in architectures if (text := getattr(a, key)) is not None)
    result = []
    for text in found:
        try:
            if expression.evaluate_count(text, config) == value:
                result.append(re.sub(r"\s+", " ", text))
        except expression.ExpressionError:
            continue
    return result
