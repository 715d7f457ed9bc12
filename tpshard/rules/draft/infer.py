"""A first draft of rules for a model that has none: decided where names and shapes of known families agree, else asked.

A module is given a rule only when every reading of its name and shape that fits comes to the same cut. What stays open
has no rule in the draft, and a tensor without a rule is refused: a draft is never silently wrong. In particular a
matrix is never replicated, nor a fused one cut, by a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpshard.rules import expression
from tpshard.rules.architecture import Architecture
from tpshard.rules.draft.known import (
    WIDTH,
    Definition,
    Known,
    Module,
    closeness,
    definitions,
    known,
    layer_stem,
    modules,
    of_module,
    tail,
)
from tpshard.storage.safetensors import TensorInfo

Effect = tuple[str, int | None, int, int]
"""What a rule does to a tensor: kind, dim, and the axis' count and unit."""
_NORM = re.compile(r"norm|(^|_)ln(_|$)")


@dataclass(frozen=True)
class Choice:
    """What a draft says of a module: `rule` (a key of the rules file), or None where it is one of the candidates.

    axis: of the rule. conv1d: its weight is stored [in, out].
    """

    module: Module
    rule: str | None = None
    axis: Definition | None = None
    conv1d: bool = False
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sketch:
    """All choices for a checkpoint, and which known families it was compared with, the closest first."""

    choices: tuple[Choice, ...]
    stem: str
    families: tuple[str, ...]
    closest: float

    @property
    def undecided(self) -> list[Choice]:
        """The modules without a rule."""
        return [choice for choice in self.choices if choice.rule is None]


@dataclass(frozen=True)
class _Reading:
    kind: str
    axis: Definition
    conv1d: bool

    @property
    def dim(self) -> int:
        return int((self.kind == "row") != self.conv1d)

    @property
    def effect(self) -> Effect:
        return self.kind, self.dim, self.axis.count, self.axis.unit


def sketch(config: Mapping[str, Any], found: Sequence[Module], architectures: Sequence[Architecture]) -> Sketch:
    """Decide what names and shapes decide, by comparison with `architectures`."""
    stem = layer_stem(found)
    tails = {tail(module.name, stem) for module in found}
    entries = known(architectures)
    shares = closeness(entries, tails)
    families = sorted(shares, key=lambda family: -shares[family])
    entries.sort(key=lambda entry: families.index(entry.family))
    axes = sorted(definitions(architectures, config), key=lambda axis: families.index(axis.family))
    reader = _Reader(entries, axes, _width(config), stem, len(set().union(*(m.numbers for m in found))))
    linear = _orientation(reader, found)
    choices = {module.name: reader.matrix(module, linear) for module in found}
    choices |= {c.module.name: c for c in reader.pairs(list(choices.values()), linear)}
    choices |= {c.module.name: replace(c, rule=None, axis=None) for c in _contradicting(list(choices.values()))}
    chosen = [choice.axis for choice in choices.values() if choice.axis]
    choices |= {m.name: reader.vector(m, chosen) for m in found if not _is_matrix(m)}
    ordered = tuple(choices[module.name] for module in found)
    return Sketch(ordered, stem, tuple(families), shares[families[0]] if families else 0.0)


def _width(config: Mapping[str, Any]) -> int | None:
    try:
        return expression.evaluate_count(WIDTH, config)
    except expression.ExpressionError:
        return None


def _is_matrix(module: Module) -> bool:
    return any(len(shape) > 1 for shape in module.shapes.get("weight", ())) or "weight" not in module.shapes


def _orientation(reader: _Reader, found: Iterable[Module]) -> bool | None:
    """Whether matrices are stored [out, in] as nn.Linear has it; None where none or not all of them tell."""
    seen = set()
    for module in found:
        shape, bias = module.shape(), module.shape("bias")
        if shape is None or len(shape) != 2 or shape[0] == shape[1]:
            continue
        if bias in ((shape[0],), (shape[1],)):
            seen.add(bias == (shape[1],))
        seen |= {r.conv1d for r in reader.readings(module, reader.votes(module)[0]) if not r.axis.keys.get("pad")}
    return next(iter(seen)) is False if len(seen) == 1 else None


def _contradicting(choices: Sequence[Choice]) -> list[Choice]:
    """The projections of attention, where they were read as heads of two kinds or as groups that do not divide."""
    found = [choice for choice in choices if choice.axis and choice.axis.name in ("heads", "kv")]
    axes = {(c.axis.name, c.axis.count, c.axis.unit) for c in found if c.axis}
    counts = {name: count for name, count, _ in axes}
    divides = counts.get("heads", 0) % counts.get("kv", 1) == 0
    return found if len(axes) > len(counts) or len({unit for _, _, unit in axes}) > 1 or not divides else []


@dataclass(frozen=True)
class _Reader:
    """Reads modules by what the known families say. width: of the model; layers: how many there are."""

    entries: Sequence[Known]
    axes: Sequence[Definition]
    width: int | None
    stem: str
    layers: int

    def votes(self, module: Module, suffix: str = "") -> tuple[list[Known], bool]:
        """The known patterns that a module's name is like, and whether all of its name is known."""
        return of_module(self.entries, *tail(module.name + suffix, self.stem))

    def readings(self, module: Module, votes: Iterable[Known]) -> list[_Reading]:
        """Every way to cut a matrix by one of `votes` that its shape, its bias and the config allow."""
        shape, bias = module.shape(), module.shape("bias")
        if shape is None or len(shape) != 2 or ("bias" in module.shapes and bias is None):
            return []
        found = []
        for vote in votes:
            if vote.kind not in ("column", "row") or len(vote.axes) != 1:
                continue
            for axis in self.axes:
                for conv1d in (False, True):
                    reading = _Reading(vote.kind, axis, conv1d)
                    other, out = shape[1 - reading.dim], shape[int(conv1d)]
                    vocab = bool(axis.keys.get("pad"))
                    if (
                        axis.name == vote.axes[0]
                        and shape[reading.dim] == axis.size
                        and (other == self.width or vocab)
                        and bias in (None, (out,))
                        and not (vocab and conv1d)
                    ):
                        found.append(reading)
        return found

    def matrix(self, module: Module, linear: bool | None) -> Choice:
        """A module with a matrix, or with what is neither: decided when all that fits has one effect."""
        if "weight" not in module.shapes:
            return self._bare(module)
        votes, _ = self.votes(module)
        open_votes = [vote for vote in votes if len(vote.axes) != 1]  # replicated, or fused: never by a guess
        readings = self.readings(module, votes)
        if len({reading.conv1d for reading in readings}) > 1:
            readings = [reading for reading in readings if linear and not reading.conv1d]
        if not votes and not tail(module.name, self.stem)[1]:
            vocab = Known("", (), False, "column", ("vocab",), None, True)
            readings = [r for r in self.readings(module, [vocab]) if module.shape() == (r.axis.size, self.width)]
        candidates = self._candidates(module, votes)
        if open_votes or len({reading.effect for reading in readings}) != 1:
            return Choice(module, candidates=candidates)
        best = readings[0]
        return Choice(module, f"{best.kind} {best.axis.name}", best.axis, best.conv1d, candidates)

    def pairs(self, choices: Sequence[Choice], linear: bool | None) -> list[Choice]:
        """Modules of unknown names that are plainly a feed-forward: beside each other, width to ffn and back."""
        decided = []
        parents: dict[str, list[Choice]] = {}
        for choice in choices:
            if (shape := choice.module.shape()) is not None and len(shape) == 2:
                parents.setdefault(choice.module.name.rpartition(".")[0], []).append(choice)
        for parent, group in parents.items():
            if not tail(f"{parent}.x", self.stem)[1] or any(c.rule or self.votes(c.module)[0] for c in group):
                continue
            kinds: list[Known] = [Known("", (), True, kind, ("ffn",), None, True) for kind in ("column", "row")]
            read = []
            for choice in group:
                readings = self.readings(choice.module, kinds)
                if choice.module.shape("bias") is None:
                    readings = [r for r in readings if linear is not None and r.conv1d is not linear]
                read.append(readings)
            effects = [{reading.effect for reading in readings} for readings in read]
            if all(len(effect) == 1 for effect in effects):
                kinds_found = sorted(readings[0].kind for readings in read)
                if kinds_found.count("row") == 1 and len(kinds_found) > 1:
                    for choice, readings in zip(group, read, strict=True):
                        best = readings[0]
                        rule = f"{best.kind} {best.axis.name}"
                        decided.append(Choice(choice.module, rule, best.axis, best.conv1d))
        return decided

    def vector(self, module: Module, chosen: Sequence[Definition]) -> Choice:
        """A norm's weight: replicated over the width, or over one head; over all heads, cut like them."""
        votes, whole = self.votes(module)
        shapes = set().union(*module.shapes.values())
        candidates = tuple(dict.fromkeys(["replicate", *(vote.rule for vote in votes)]))
        if len(shapes) != 1 or set(module.shapes) - {"weight", "bias"}:
            return Choice(module, candidates=candidates)
        (size,) = next(iter(shapes))
        parts, layered = tail(module.name, self.stem)
        named = _NORM.search(parts[-1]) or (whole and {vote.kind for vote in votes} == {"replicate"})
        if named and size == self.width and (not layered or len(parts) == 1):
            return Choice(module, "replicate")
        heads = [axis for axis in chosen if axis.name in ("heads", "kv")]
        effects: dict[Effect, Choice] = {}
        for vote in votes if whole else ():
            if vote.kind == "replicate" and size in {a.unit for a in heads} and size not in {a.size for a in heads}:
                effects["replicate", None, 0, 0] = Choice(module, "replicate")
            for axis in heads if vote.kind == "column" else ():
                if vote.axes == (axis.name,) and axis.size == size != axis.unit:
                    effects["column", 0, axis.count, axis.unit] = Choice(module, vote.rule, axis)
        return next(iter(effects.values())) if len(effects) == 1 else Choice(module, candidates=candidates)

    def _bare(self, module: Module) -> Choice:
        """A parameter without a module: only buffers that are known by name and shape are decided."""
        suffix = "" if "" in module.shapes else ".bias"
        votes, whole = self.votes(module, suffix)
        ranks = {len(shape) for shapes in module.shapes.values() for shape in shapes}
        table = module.name.endswith("inv_freq") or not ranks & {1, 2}
        if whole and {vote.kind for vote in votes} == {"buffer"} and table:
            return Choice(module, "buffer")
        return Choice(module, candidates=tuple(dict.fromkeys([*(vote.rule for vote in votes), "replicate"])))

    def _candidates(self, module: Module, votes: Sequence[Known]) -> tuple[str, ...]:
        """Rules of alike names first, then any whose segments add up to a dim."""
        shapes = [shape for shapes in module.shapes.values() for shape in shapes if len(shape) > 1]
        sizes = {(axis.family, axis.name): axis.size for axis in self.axes}

        def fits(entry: Known) -> bool:
            size = sum(sizes.get((entry.family, name), 0) for name in entry.axes)
            return any(sorted(shape[-2:]) == sorted((size, self.width or 0)) for shape in shapes)

        fitting = [entry.rule for entry in self.entries if "vocab" not in entry.axes and fits(entry)]
        return tuple(dict.fromkeys([*(vote.rule for vote in votes), *fitting, "replicate"]))


def draft_modules(tensors: Iterable[TensorInfo]) -> list[Module]:
    """The modules of a checkpoint, in an order that does not depend on that of the files."""
    return sorted(modules(tensors), key=lambda module: module.name)
