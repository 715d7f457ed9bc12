"""A first draft of rules for a model that has none, inferred from the names and shapes of known families.

A module is given a rule only when every interpretation of its name and shape leads to the same cut. Any other module is
left without a rule, and a tensor without a rule is refused: a draft is never silently wrong. In particular, no matrix
is replicated and no fused matrix is cut by a guess.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpshard.planning.axes import SPLIT_AXIS
from tpshard.rules import expression
from tpshard.rules.architecture import Architecture
from tpshard.rules.draft.known import (
    WIDTH,
    AxisDefinition,
    KnownPattern,
    Module,
    axis_definitions,
    closeness,
    known_patterns,
    layer_stem,
    patterns_like,
    tail,
)
from tpshard.rules.quantisation.schemes import PLAIN, SUFFIXES

Effect = tuple[str, int | None, int, int]
"""What a rule does to a tensor: its kind and dim, and the count and unit of its axis."""
_VOCAB = KnownPattern("", (), False, "column", ("vocab",), None, True)
_FEED_FORWARD = [replace(_VOCAB, layered=True, kind=kind, axes=("ffn",)) for kind in ("column", "row")]
_NORM = re.compile(r"norm|(^|_)ln(_|$)")


@dataclass(frozen=True)
class Decision:
    """The rule that a draft gives to a module, or the candidates when it gives none.

    rule: a key of the rules file, or None. axis: the rule's. conv1d: whether the weight is stored `[in, out]`.
    """

    module: Module
    rule: str | None = None
    axis: AxisDefinition | None = None
    conv1d: bool = False
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sketch:
    """The decisions for all modules of a checkpoint.

    stem: what precedes a layer's number. families: those it was compared with, the closest first. closest: the share of
    modules in common with the first.
    """

    decisions: tuple[Decision, ...]
    stem: str
    families: tuple[str, ...]
    closest: float

    @property
    def undecided(self) -> list[Decision]:
        """The modules without a rule."""
        return [decision for decision in self.decisions if decision.rule is None]


@dataclass(frozen=True)
class _Reading:
    """One way to understand a matrix: cut along this axis, and stored `[in, out]` (conv1d) or not."""

    kind: str
    axis: AxisDefinition
    conv1d: bool

    @property
    def dim(self) -> int:
        axes = PLAIN["weight"].forms[1]
        return (axes[::-1] if self.conv1d else axes).index(SPLIT_AXIS[self.kind])

    @property
    def effect(self) -> Effect:
        return self.kind, self.dim, self.axis.count, self.axis.unit

    def decide(self, module: Module, candidates: tuple[str, ...] = ()) -> Decision:
        return Decision(module, f"{self.kind} {self.axis.name}", self.axis, self.conv1d, candidates)


def sketch(config: Mapping[str, Any], found: Sequence[Module], architectures: Sequence[Architecture]) -> Sketch:
    """Decide on every module that names and shapes settle, by comparison with `architectures`."""
    stem = layer_stem(found)
    tails = {tail(module.name, stem) for module in found}
    entries = known_patterns(architectures)
    shares = closeness(entries, tails)
    families = sorted(shares, key=lambda family: -shares[family])
    entries.sort(key=lambda entry: families.index(entry.family))
    axes = sorted(axis_definitions(architectures, config), key=lambda axis: families.index(axis.family))
    reader = _Reader(entries, axes, expression.count_or_none(WIDTH, config), stem)
    linear = _orientation(reader, found)
    decisions = {module.name: reader.matrix(module, linear) for module in found}
    decisions |= {c.module.name: c for c in reader.pairs(list(decisions.values()), linear)}
    decisions |= {c.module.name: replace(c, rule=None, axis=None) for c in _contradicting(list(decisions.values()))}
    chosen = [decision.axis for decision in decisions.values() if decision.axis]
    decisions |= {m.name: reader.vector(m, chosen) for m in found if not _is_matrix(m)}
    ordered = tuple(decisions[module.name] for module in found)
    return Sketch(ordered, stem, tuple(families), shares[families[0]] if families else 0.0)


def _is_matrix(module: Module) -> bool:
    return any(len(shape) > 1 for shape in module.shapes.get("weight", ())) or "weight" not in module.shapes


def _orientation(reader: "_Reader", found: Iterable[Module]) -> bool | None:
    """Whether matrices are stored `[out, in]` as in nn.Linear; None when no matrix shows it or they disagree."""
    seen = set()
    for module in found:
        shape, bias = module.shape(), module.shape("bias")
        if shape is None or len(shape) != 2 or shape[0] == shape[1]:
            continue
        if bias in ((shape[0],), (shape[1],)):
            seen.add(bias == (shape[1],))
        seen |= {r.conv1d for r in reader.readings(module, reader.votes(module)[0]) if not r.axis.keys.get("pad")}
    return next(iter(seen)) is False if len(seen) == 1 else None


def _contradicting(decisions: Sequence[Decision]) -> list[Decision]:
    """Attention's projections, if they were taken for heads of two kinds or for groups that do not divide."""
    found = [decision for decision in decisions if decision.axis and decision.axis.name in ("heads", "kv")]
    axes = {(c.axis.name, c.axis.count, c.axis.unit) for c in found if c.axis}
    counts = {name: count for name, count, _ in axes}
    divides = counts.get("heads", 0) % counts.get("kv", 1) == 0
    return found if len(axes) > len(counts) or len({unit for _, _, unit in axes}) > 1 or not divides else []


@dataclass(frozen=True)
class _Reader:
    """Interprets modules as the known families have them. width: of the model."""

    entries: Sequence[KnownPattern]
    axes: Sequence[AxisDefinition]
    width: int | None
    stem: str

    def votes(self, module: Module, suffix: str = "") -> tuple[list[KnownPattern], bool]:
        """The known patterns for a module's name, and whether they match the whole of it."""
        return patterns_like(self.entries, *tail(module.name + suffix, self.stem))

    def readings(self, module: Module, votes: Iterable[KnownPattern]) -> list[_Reading]:
        """Every way to cut a matrix as one of `votes` says that its shape, its bias and the config allow."""
        shape, bias = module.shape(), module.shape("bias")
        if shape is None or len(shape) != 2 or ("bias" in module.shapes and bias is None):
            return []
        kinds = ((vote.kind, vote.axes[0]) for vote in votes if vote.kind in SPLIT_AXIS and len(vote.axes) == 1)
        ways = ((kind, axis) for kind, name in kinds for axis in self.axes if axis.name == name and axis.size in shape)
        found = []
        for reading in (_Reading(kind, axis, conv1d) for kind, axis in ways for conv1d in (False, True)):
            vocab = bool(reading.axis.keys.get("pad"))
            sizes = shape[reading.dim] == reading.axis.size and (vocab or shape[1 - reading.dim] == self.width)
            if sizes and bias in (None, (shape[int(reading.conv1d)],)) and not (vocab and reading.conv1d):
                found.append(reading)
        return found

    def matrix(self, module: Module, linear: bool | None) -> Decision:
        """Decide on a module that is no vector: it gets a rule when all readings that fit have the same effect."""
        if "weight" not in module.shapes:
            return self._bare(module)
        votes, _ = self.votes(module)
        open_votes = [vote for vote in votes if len(vote.axes) != 1]  # replicated or fused: never guessed
        readings = self.readings(module, votes)
        if len({reading.conv1d for reading in readings}) > 1:
            readings = [reading for reading in readings if linear and not reading.conv1d]
        if not votes and not tail(module.name, self.stem)[1]:
            readings = [r for r in self.readings(module, [_VOCAB]) if module.shape() == (r.axis.size, self.width)]
        candidates = self._candidates(module, votes)
        if open_votes or len({reading.effect for reading in readings}) != 1:
            return Decision(module, candidates=candidates)
        return readings[0].decide(module, candidates)

    def pairs(self, decisions: Sequence[Decision], linear: bool | None) -> list[Decision]:
        """Decide on modules of unknown names that form a feed-forward: siblings, from width to ffn and back."""
        decided = []
        parents: dict[str, list[Decision]] = {}
        for decision in decisions:
            if (shape := decision.module.shape()) is not None and len(shape) == 2:
                parents.setdefault(decision.module.name.rpartition(".")[0], []).append(decision)
        for parent, group in parents.items():
            if not tail(f"{parent}.x", self.stem)[1] or any(c.rule or self.votes(c.module)[0] for c in group):
                continue
            read = []
            for decision in group:
                readings = self.readings(decision.module, _FEED_FORWARD)
                if decision.module.shape("bias") is None:
                    readings = [r for r in readings if linear is not None and r.conv1d is not linear]
                read.append(readings)
            if all(len({reading.effect for reading in readings}) == 1 for readings in read):
                best = [readings[0] for readings in read]
                if len(best) > 1 and [reading.kind for reading in best].count("row") == 1:
                    decided += [reading.decide(d.module) for reading, d in zip(best, group, strict=True)]
        return decided

    def vector(self, module: Module, chosen: Sequence[AxisDefinition]) -> Decision:
        """Decide on a norm: replicated if it spans the width or one head, cut as the heads are if it spans all."""
        votes, whole = self.votes(module)
        shapes = set().union(*module.shapes.values())
        candidates = tuple(dict.fromkeys(["replicate", *(vote.rule for vote in votes)]))
        if len(shapes) != 1 or set(module.shapes) - SUFFIXES:
            return Decision(module, candidates=candidates)
        (size,) = next(iter(shapes))
        parts, layered = tail(module.name, self.stem)
        named = _NORM.search(parts[-1]) or (whole and {vote.kind for vote in votes} == {"replicate"})
        if named and size == self.width and (not layered or len(parts) == 1):
            return Decision(module, "replicate")
        heads = [axis for axis in chosen if axis.name in ("heads", "kv")]
        effects: dict[Effect, Decision] = {}
        for vote in votes if whole else ():
            if vote.kind == "replicate" and size in {a.unit for a in heads} and size not in {a.size for a in heads}:
                effects["replicate", None, 0, 0] = Decision(module, "replicate")
            for axis in heads if vote.kind == "column" else ():
                if vote.axes == (axis.name,) and axis.size == size != axis.unit:
                    effects["column", 0, axis.count, axis.unit] = Decision(module, vote.rule, axis)
        return next(iter(effects.values())) if len(effects) == 1 else Decision(module, candidates=candidates)

    def _bare(self, module: Module) -> Decision:
        """Decide on a parameter that is no weight: only buffers of a known name and shape get a rule."""
        suffix = "" if "" in module.shapes else ".bias"
        votes, whole = self.votes(module, suffix)
        ranks = {len(shape) for shapes in module.shapes.values() for shape in shapes}
        table = module.name.endswith("inv_freq") or not ranks & {1, 2}
        if whole and {vote.kind for vote in votes} == {"buffer"} and table:
            return Decision(module, "buffer")
        return Decision(module, candidates=tuple(dict.fromkeys([*(vote.rule for vote in votes), "replicate"])))

    def _candidates(self, module: Module, votes: Sequence[KnownPattern]) -> tuple[str, ...]:
        """Rules of similar names first, then all rules whose segments add up to one of the dims."""
        shapes = [shape for shapes in module.shapes.values() for shape in shapes if len(shape) > 1]
        sizes = {(axis.family, axis.name): axis.size for axis in self.axes}

        def fits(entry: KnownPattern) -> bool:
            size = sum(sizes.get((entry.family, name), 0) for name in entry.axes)
            return any(sorted(shape[-2:]) == sorted((size, self.width or 0)) for shape in shapes)

        fitting = [entry.rule for entry in self.entries if "vocab" not in entry.axes and fits(entry)]
        return tuple(dict.fromkeys([*(vote.rule for vote in votes), *fitting, "replicate"]))
