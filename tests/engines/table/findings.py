"""What readings of checkpoints of one type say together: an entry of the table, and what the table cannot say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.engines.table.coded import ONE
from tests.engines.table.cuts import How, dealt, explanations
from tests.engines.table.names import fused, pattern, renamed, shortened
from tests.engines.table.reading import CannotSay, Reading, Recipe, kind_of
from tpshard.formats.engine_patterns import BEHIND, STACK
from tpshard.formats.sharded_state import _SCALES
from tpshard.storage.tensor_names import numbered

LEFT_OUT = "vLLM's class has none and would leave it out"
_OWN = "its class makes one while it loads a checkpoint and not for sharded_state"


@dataclass
class Findings:
    """What has been read so far, by kind of name. problems: what the table cannot say."""

    layer: str
    head_of: str
    embedding_of: str = ""
    pairs: dict[str, str] = field(default_factory=dict)
    fused: dict[str, list[str]] = field(default_factory=dict)
    stacks: dict[str, list[str]] = field(default_factory=dict)
    stands_in: dict[str, str] = field(default_factory=dict)
    hows: dict[str, set[How]] = field(default_factory=dict)
    float32: dict[str, bool] = field(default_factory=dict)
    computed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    extra: bool = False
    drafts: set[str] = field(default_factory=set)
    scales: set[str] = field(default_factory=set)
    attends: set[str] | None = None
    tied: str = ""
    head: str = ""
    every_stage: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)

    def add(self, reading: Reading) -> None:
        """Take in one more."""
        model = reading.model
        names = {tensor.name: model.full_name(tensor.name) for tensor in model.tensors}
        embedding = next((f"{to}.weight" for to in model.tied.values()), self.embedding_of)
        if self.is_tied(reading) or self._has_no_head(reading, names, embedding):
            self.tied = _module(reading.parameter_of[_key(names, embedding)])
            names = {name: full for name, full in names.items() if full != embedding}
        for into, recipe in reading.recipes.items():
            self._name(into, recipe, names)
        deal = dealt(reading)
        known: dict[object, set[How]] = {}
        for tensor in model.tensors:
            name = names.get(tensor.name)
            if name is None or tensor.name not in reading.parameter_of:
                continue
            kind, held = kind_of(name), reading.held(tensor.name)
            key = (kind, tensor.shape, tensor.cut)
            if key not in known:
                known[key] = explanations(reading, tensor.name, deal)
            if known[key]:
                self.hows[kind] = self.hows.get(kind, known[key]) & known[key]
            if not known[key] or not self.hows[kind]:
                self._cannot(f"{name}: no cut of the table gives what the ranks of tp {reading.tp} have of it")
            own = held.dtype == torch.float32 and not held.function
            if self.float32.setdefault(kind, own) != own:
                self._cannot(f"{name} is held as float32 in some layers and not in others")
            if self.computed.setdefault(kind, held.function) != held.function:
                self._cannot(f"{name} is computed in some layers and not in others")
            if name == self.head_of:
                self.head = _module(reading.parameter_of[tensor.name])
        self._left_out(reading, names)
        self._made(reading, names)

    @staticmethod
    def is_tied(reading: Reading) -> bool:
        """Whether the checkpoint has no head because its embedding is the head."""
        stored = {reading.model.full_name(tensor.name) for tensor in reading.model.tensors}
        return any(f"{head}.weight" not in stored for head in reading.model.tied)

    def _has_no_head(self, reading: Reading, names: Mapping[str, str], embedding: str) -> bool:
        """Whether the class takes the embedding for the head also where the checkpoint has one of its own."""
        held = {full for name, full in names.items() if name in reading.parameter_of}
        return embedding in held and self.head_of in names.values() and self.head_of not in held

    def _name(self, into: str, recipe: Recipe, names: Mapping[str, str]) -> None:
        groups = [[names[tensor] for tensor in group if tensor in names] for group in recipe.groups]
        if not groups[0]:
            return  # the embedding of a tied head
        if len(groups) == 1 and len(groups[0]) == 1 and not recipe.stacked:
            ours, theirs = kind_of(groups[0][0]), kind_of(into)
            if numbered(groups[0][0])[1] != numbered(into)[1]:
                self._cannot(f"{groups[0][0]} and {into} have other numbers")
            if self.pairs.setdefault(ours, theirs) != theirs:
                self._cannot(f"{ours} is {theirs} in some layers and {self.pairs[ours]} in others")
            return
        try:
            target, sources = fused(kind_of(into), [kind_of(each) for each in groups[0]], *_expert(groups, recipe))
        except CannotSay as problem:
            self._cannot(str(problem))
            return
        every = self.stacks if recipe.dim else self.fused
        known = every.setdefault(target, sources)
        fewer, all_of_them = sorted((known, sources), key=lambda each: len(set(each)))
        if known != sources and len(set(fewer)) < len(fewer) == len(all_of_them):
            every[target] = all_of_them
            self.stands_in |= {part: other for part, other in zip(all_of_them, fewer, strict=True) if part != other}
        elif known != sources:
            self._cannot(f"{into} is made of {', '.join(sources)} in some layers, and of others in others")

    def _left_out(self, reading: Reading, names: Mapping[str, str]) -> None:
        layers = reading.model.layers
        for tensor in reading.model.tensors:
            name = names.get(tensor.name)
            if name is None or tensor.name in reading.parameter_of or tensor.cut.kind == "buffer":
                continue
            if name == self.head_of:
                continue  # the entry has no `head`, which says it
            position = numbered(name)[1]
            if layers and name.startswith(layers.within) and position and position[0] >= layers.count:
                self.extra = True
            elif "mtp" in name:
                self.drafts.add(
                    ".".join(name.split(".")[: name.split(".").index("mtp") + 1]) if ".mtp." in f".{name}" else name
                )
            else:
                self.refused[pattern(kind_of(name))] = LEFT_OUT

    def _made(self, reading: Reading, names: Mapping[str, str]) -> None:
        """What is in the ranks and not in the checkpoint."""
        scaled: dict[str, set[str]] = {}
        for name, constant in reading.constants.items():
            module, _, last = name.rpartition(".")
            if last in _SCALES and constant == ONE:
                scaled.setdefault(module, set()).add(last)
            elif name in reading.added:
                self.refused[name] = _OWN
            else:
                self._cannot(f"vLLM has {name}, of which the checkpoint has nothing")
        for name in reading.added:
            if name in reading.parameter_of:
                self.refused[pattern(kind_of(names[reading.recipes[name].groups[0][0]]))] = _OWN
        if any(len(each) != len(_SCALES) for each in scaled.values()):
            self._cannot("some attention layers have not all scales of the cache")
        self.scales |= {pattern(kind_of(module)) for module in scaled}
        self._attending(reading, names, {numbered(module)[1][0] for module in scaled})

    def _attending(self, reading: Reading, names: Mapping[str, str], those: set[int]) -> None:
        """Patterns of what only the layers with scales have, the shortest."""
        prefix = f"{self.layer.removesuffix('*')}"
        layers: dict[int, set[str]] = {}
        for name in names.values():
            if name.startswith(prefix):
                rest = name.removeprefix(prefix).split(".")
                found = layers.setdefault(int(rest[0]), set())
                found |= {kind_of(".".join(rest[1 : 1 + size])) for size in range(1, len(rest))}
        others = set(layers) - those - set(range(reading.model.layers.count if reading.model.layers else 0, 10**6))
        if not others or not those:
            return
        only = set.intersection(*(layers[each] for each in those & set(layers)))
        only -= set.union(*(layers[each] for each in others))
        self.attends = only if self.attends is None else self.attends & only
        if not self.attends:
            self._cannot("the layers with scales of the cache have no tensor that the others have not")

    def _cannot(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def entry(self) -> dict[str, Any]:
        """The entry, as it stands in the table; `model_types` is left to the caller."""
        in_parts = {each for every in (self.fused, self.stacks) for sources in every.values() for each in sources}
        alone = [name for name in self.pairs if any(_fits(each, name) for each in in_parts)]
        fused_names = {
            f"{target}?" if any(_fits(each, name) for name in alone for each in sources) else target: sources
            for target, sources in self.fused.items()
        }
        try:
            names = renamed({name: into for name, into in self.pairs.items()})
        except CannotSay as problem:
            self._cannot(str(problem))
            names = {}
        hows = {kind: min(how, key=_preference) for kind, how in self.hows.items() if how}
        cuts: dict[str, list[str]] = {}
        for kind, how in hows.items():
            if how.cut:
                cuts.setdefault(how.cut, []).append(_modules(kind))
        flags = {
            key: sorted(pattern(kind) for kind, how in hows.items() if getattr(how, key))
            for key in ("transposed", "either", "squeezed")
        }
        computed: dict[str, list[str]] = {}
        for kind, function in self.computed.items():
            if function:
                computed.setdefault(function, []).append(pattern(kind))
        found: dict[str, Any] = {
            "layer": self.layer,
            "head": self.head,
            "tied": self.tied,
            "every_stage": list(self.every_stage),
            "scales": sorted(self.scales),
            "attends": [f".{min(self.attends, key=lambda each: (each.count('.'), each))}"] if self.attends else [],
            "extra_layers": "num_hidden_layers" if self.extra else "",
            "drafts": sorted(self.drafts),
            **flags,
            "float32": sorted(pattern(kind) for kind, own in self.float32.items() if own),
            "fused": fused_names,
            "stacks": self.stacks,
            "stands_in": self.stands_in,
            "renamed": names,
            "cuts": {cut: sorted(set(patterns)) for cut, patterns in cuts.items()},
            "computed": computed,
            "refused": self.refused,
        }
        short = {key: shortened(value, self.layer) for key, value in found.items() if key != "layer"}
        return {"layer": self.layer, **{key: value for key, value in short.items() if value or key == "head"}}


def _preference(how: How) -> tuple[bool, bool, bool, int, str]:
    cut = how.cut or ""
    order = ("", "replicate", "grouped", "first", "even")
    return how.either, how.transposed, how.squeezed, order.index(cut) if cut in order else len(order), cut


def _expert(groups: list[list[str]], recipe: Recipe) -> tuple[int | None, str]:
    """Which number of stacked tensors' names is that of the expert, and what stands for it: another for later ones."""
    if not recipe.stacked:
        return None, STACK
    numbers = [numbered(group[0])[1] for group in groups]
    changing = [place for place, each in enumerate(zip(*numbers, strict=True)) if len(set(each)) > 1]
    if len(changing) != 1:
        raise CannotSay(f"{groups[0][0]} and others are not stacked by their number")
    first = numbers[0][changing[0]]
    if [each[changing[0]] for each in numbers] != list(range(first, first + len(numbers))):
        raise CannotSay(f"{groups[0][0]} and others are not stacked by their number")
    return changing[0], BEHIND if first else STACK


def _fits(pattern_of_source: str, kind: str) -> bool:
    from tpshard.formats.engine_patterns import match

    return match(pattern_of_source, kind)


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _modules(kind: str) -> str:
    """The pattern of the module that a tensor is of."""
    return pattern(kind).removesuffix(".weight").removesuffix(".bias")


def _key(names: Mapping[str, str], full: str) -> str:
    return next(name for name, each in names.items() if each == full)


def layer_pattern(reading: Reading) -> str:
    """Where the layers are, in the checkpoint's full names."""
    assert reading.model.layers is not None
    return f"{pattern(kind_of(reading.model.layers.within + '0'))}"
