"""What readings of checkpoints of one type say together: an entry of the table, and what the table cannot say."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.engines.table.coded import ONE, OTHER, UNSET
from tests.engines.table.cuts import How, dealt, explanations
from tests.engines.table.names import fused, numbered_parts, pattern, renamed, shortened
from tests.engines.table.reading import CannotSay, Reading, Recipe, kind_of
from tpshard.formats.engine_patterns import BEHIND, STACK
from tpshard.formats.engine_tables import SCALES
from tpshard.storage.tensor_names import numbered


@dataclass
class Scaled:
    """Of one checkpoint, by kinds of names and their numbers: modules with scales, all that is within layers; these.

    kept: buffers that are in a parameter. renamed: parameters that are one tensor each, by their layers.
    """

    modules: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    kept: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    renamed: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    within: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    layers: set[int] = field(default_factory=set)


LEFT_OUT = "vLLM's class has none and would leave it out"
_OWN = "its class makes one while it loads a checkpoint and not for sharded_state"


@dataclass
class Findings:
    """What has been read so far, by kind of name. problems: what the table cannot say."""

    layer: str
    head_of: str
    embedding_of: str = ""
    pairs: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, set[str]] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    spelled: dict[str, dict[int, str]] = field(default_factory=dict)
    fused: dict[str, list[str]] = field(default_factory=dict)
    shorter: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[tuple[str, ...], set[tuple[int, int]]] = field(default_factory=dict)
    stacks: dict[str, list[str]] = field(default_factory=dict)
    stands_in: dict[str, str] = field(default_factory=dict)
    hows: dict[str, set[How]] = field(default_factory=dict)
    float32: dict[str, bool] = field(default_factory=dict)
    computed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    extra: bool = False
    first_experts: set[str] | None = None
    counted: dict[str, set[str]] = field(default_factory=dict)
    drafts: set[str] = field(default_factory=set)
    scaled: list[Scaled] = field(default_factory=list)
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
        self.scaled.append(self._scaled(reading, names.values()))
        unread = dict(self._unread(reading, names))
        for into, recipe in reading.recipes.items():
            self._name(into, recipe, names, model.config, reading.rows.get(into))
        for tensor, into in unread.items():
            self._name(into, Recipe(((tensor,),)), names, model.config)
            self.unread.add(pattern(kind_of(names[tensor])))
            self.float32[kind_of(names[tensor])] = reading.ranks[0][into].dtype == torch.float32
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
            known_as, _, switch = self.computed.setdefault(kind, held.function).partition(" if ")
            off = bool(switch) and not held.function and not model.config.get(switch)
            if not off and known_as != held.function.partition(" if ")[0]:
                self._cannot(f"{name} is computed in some layers and not in others")
            if name == self.head_of:
                self.head = _module(reading.parameter_of[tensor.name])
        self._left_out(reading, {name: full for name, full in names.items() if name not in unread})
        self._made(reading, names, unread.values())

    @staticmethod
    def is_tied(reading: Reading) -> bool:
        """Whether the checkpoint has no head because its embedding is the head."""
        stored = {reading.model.full_name(tensor.name) for tensor in reading.model.tensors}
        return any(f"{head}.weight" not in stored for head in reading.model.tied)

    def _has_no_head(self, reading: Reading, names: Mapping[str, str], embedding: str) -> bool:
        """Whether the class takes the embedding for the head also where the checkpoint has one of its own."""
        held = {full for name, full in names.items() if name in reading.parameter_of}
        last = self.head_of.removesuffix(".weight").rpartition(".")[2]
        made = any(name.endswith(f"{last}.weight") for name in reading.constants)  # of numbers that are no tensor's
        return embedding in held and self.head_of in names.values() and self.head_of not in held and not made

    def _unread(self, reading: Reading, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        """Tensors that the loader leaves out, and the parameters that it leaves unset and that are called so."""
        left = [name for name in reading.left_out if name in names]
        for into, constant in reading.constants.items():
            for name in left if constant == UNSET else ():
                alike = [(numbered(each)[1], each.rpartition(".")[2]) for each in (names[name], into)]
                if alike[0] == alike[1] and reading.coded.shapes[name] == reading.ranks[0][into].numbers.shape:
                    yield name, into

    def _name(
        self,
        into: str,
        recipe: Recipe,
        names: Mapping[str, str],
        config: Mapping[str, Any],
        rows: tuple[int, int] | None = None,
    ) -> None:
        groups = [[names[tensor] for tensor in group if tensor in names] for group in recipe.groups]
        if not groups[0]:
            return  # the embedding of a tied head
        if len(groups) == 1 and len(groups[0]) == 1 and not recipe.stacked:
            name = self._as_spelled(groups[0][0], into)
            ours, theirs = kind_of(name), kind_of(into)
            if numbered(name)[1] != numbered(into)[1]:
                self._cannot(f"{name} and {into} have other numbers")
            else:
                self._of_rows((theirs, ours), rows)
                self.scaled[-1].renamed.setdefault(theirs, set()).add(numbered(name)[1][:1])
                if self.pairs.setdefault(ours, theirs) != theirs:
                    self.elsewhere.setdefault(ours, {self.pairs[ours]}).add(theirs)
            return
        try:
            expert, stack = _expert(groups, recipe)
            if expert is not None and stack == BEHIND:
                self._first_experts(config, numbered(groups[0][0])[1][expert])
            target, sources = fused(kind_of(into), [kind_of(each) for each in groups[0]], expert, stack)
        except CannotSay as problem:
            self._cannot(str(problem))
            return
        if sources[0].endswith(STACK) and len(sources) == 1 and not recipe.stacked:
            keys = {key for key, value in config.items() if type(value) is int and value == len(groups[0])}
            self.counted[target] = self.counted.get(target, keys) & keys
        self._of_rows((target, *sources), rows)
        every = self.stacks if recipe.dim else self.fused
        known = every.setdefault(target, sources)
        fewer, all_of_them = sorted((known, sources), key=lambda each: len(set(each)))
        if known != sources and len(set(fewer)) < len(fewer) == len(all_of_them):
            every[target] = all_of_them
            self.stands_in |= {part: other for part, other in zip(all_of_them, fewer, strict=True) if part != other}
        elif known != sources and fewer == [each for each in all_of_them if each in fewer] and not recipe.dim:
            self.fused[target], self.shorter[target] = all_of_them, fewer
        elif known != sources:
            self._cannot(f"{into} is made of {', '.join(sources)} in some layers, and of others in others")

    def _of_rows(self, made: tuple[str, ...], rows: tuple[int, int] | None) -> None:
        """Keep how many rows a parameter has of what it is made of, and in all."""
        if rows:
            self.rows.setdefault(made, set()).add(rows)

    def _padded(self, fused_names: Mapping[str, list[str]]) -> dict[str, int]:
        """`padded`: the least multiple that gives the sizes that were read; others may give them too."""
        found: dict[str, int] = {}
        for target, sources in fused_names.items():
            sizes = self.rows.get((target.rstrip("?"), *sources), set())
            fits = (
                multiple
                for multiple in range(2, max((every for _, every in sizes), default=0) + 1)
                if all(-(-own // multiple) * multiple == every for own, every in sizes)
            )
            if any(own < every for own, every in sizes):
                if (least := next(fits, None)) is None:
                    self._cannot(f"of how many the size of {target} is a multiple is not clear")
                else:
                    found[target] = least
        return found

    def _first_experts(self, config: Mapping[str, Any], first: int) -> None:
        """Keep the keys of configs that say how many experts the first of two stacks has."""
        keys = {key for key, value in config.items() if "expert" in key and first in (value, *_first_of(value))}
        self.first_experts = keys if self.first_experts is None else self.first_experts & keys
        if not self.first_experts:
            self._cannot(f"no key of the config says that the first of two stacks has {first} experts")

    def _as_spelled(self, name: str, into: str) -> str:
        """The name with the engine's word where only the checkpoint has a number."""
        parts, theirs = name.split("."), into.split(".")
        places = [place for place, (a, b) in enumerate(zip(parts, theirs, strict=False)) if a.isdigit() > b.isdigit()]
        if len(parts) != len(theirs) or len(places) != 1:
            return name
        (place,) = places
        module = pattern(kind_of(".".join(parts[:place])))
        if self.spelled.setdefault(module, {}).setdefault(int(parts[place]), theirs[place]) != theirs[place]:
            return name
        return ".".join((*parts[:place], theirs[place], *parts[place + 1 :]))

    def _renamed_where(self) -> dict[str, dict[str, str]]:
        """`renamed_where`: of two parameters that a tensor is in, the one in layers that something tells.

        One whose layers have scales counts first. The other one stays in `pairs`.
        """
        attending = {numbers[:1] for each in self.scaled for those in each.modules.values() for numbers in those}
        found: dict[str, dict[str, str]] = {}
        for ours, every in self.elsewhere.items():

            def preferred(theirs: str) -> tuple[bool, int, str]:
                layers = set[tuple[int, ...]]().union(*(each.renamed.get(theirs, set()) for each in self.scaled))
                return not layers <= attending, -theirs.count("."), theirs

            tellers = {each: self._telling([each]) for each in sorted(every, key=preferred)}
            theirs = next((each for each, teller in tellers.items() if teller), None)
            if theirs is None or len(every) > 2:
                self._cannot(f"nothing tells which layers have {ours} elsewhere")
                continue
            found.setdefault(tellers[theirs] or "", {})[ours] = theirs
            (self.pairs[ours],) = every - {theirs}
        return found

    def _scaled(self, reading: Reading, names: Iterable[str]) -> Scaled:
        """The modules with scales, and all in the layers that may tell in which of these they are."""
        layers, made = reading.model.layers, Scaled()
        for name, constant in reading.constants.items():
            module, _, last = name.rpartition(".")
            if last in SCALES and constant == ONE:
                made.modules.setdefault(kind_of(module), set()).add(numbered(module)[1])
        prefix = self.layer.removesuffix("*")
        for tensor in reading.model.tensors:
            if tensor.cut.kind == "buffer" and tensor.name in reading.parameter_of:
                name = reading.model.full_name(tensor.name)
                made.kept.setdefault(kind_of(name), set()).add(numbered(name)[1])
        for name in names:
            parts = name.removeprefix(prefix).split(".")
            if name.startswith(prefix) and (layers is None or int(parts[0]) < layers.count):
                made.layers.add(int(parts[0]))
                for size in range(2, len(parts) + 1):
                    begun = prefix + ".".join(parts[:size])
                    made.within.setdefault(kind_of(begun), set()).add(numbered(begun)[1])
        for buffer in made.kept:
            made.within.pop(buffer, None)
        return made

    def _telling(self, modules: Collection[str]) -> str | None:
        """What stands in the checkpoint where modules have scales and nowhere else: nearest to one, and shortest."""
        found: set[str] | None = None
        for each in self.scaled:
            told = each.modules | each.kept | each.renamed
            numbers = set[tuple[int, ...]]().union(*(told.get(one, set()) for one in modules))
            only = {kind for kind, those in each.within.items() if those == numbers}
            absent = (
                {kind for other in self.scaled for kind in other.within} - each.within.keys() if not numbers else set()
            )
            found = only | absent if found is None else found & (only | absent)
        beside = min(modules).split(".")

        def preferred(kind: str) -> tuple[int, int, str]:
            same = next((n for n, pair in enumerate(zip(kind.split("."), beside, strict=False)) if len({*pair}) > 1), 9)
            return -same, kind.count("."), kind

        return min(found or (), key=preferred, default=None)

    def _scales(self) -> tuple[dict[str, str], list[str], str]:
        """`scales_where`, `scales` and `attends`."""
        every = sorted({module for each in self.scaled for module in each.modules})
        scales = [module for module in every if module.count(".0") == 1]  # others are several in a layer
        if len(every) > 1:
            scales = [each for each in scales if self._telling([each]) is None] or scales[-1:]
        elsewhere = {self._telling([each]) or "": each for each in every if each not in scales}
        if "" in elsewhere:
            self._cannot(f"nothing tells where a layer has the scales of {elsewhere.pop('')}")
        layers = [{numbers[0] for those in each.modules.values() for numbers in those} for each in self.scaled]
        attends = ""
        if scales and any(those and each.layers - those for each, those in zip(self.scaled, layers, strict=True)):
            attends = self._telling(every) or ""
            if not attends:
                self._cannot("the layers with scales of the cache have no tensor that the others have not")
        return elsewhere, scales, attends

    def _kept(self) -> dict[str, str]:
        """`kept`."""
        every = sorted({buffer for each in self.scaled for buffer in each.kept})
        found = {buffer: self._telling([buffer]) or "" for buffer in every}
        for buffer in (each for each in every if not found[each]):
            self._cannot(f"nothing tells which layers have {buffer}")
        return found

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

    def _made(self, reading: Reading, names: Mapping[str, str], unread: Collection[str]) -> None:
        """What is in the ranks and not in the checkpoint."""
        scaled: dict[str, set[str]] = {}
        for name, constant in reading.constants.items():
            module, _, last = name.rpartition(".")
            if last in SCALES and constant == ONE:
                scaled.setdefault(module, set()).add(last)
            elif name in reading.added:
                self.refused[name] = _OWN
            elif name not in unread:
                what = (
                    "with numbers that are none of the checkpoint's" if constant == OTHER else "of which it has nothing"
                )
                self._cannot(f"vLLM has {name} in {reading.name}, {what}")
        for name in reading.added:
            if name in reading.parameter_of:
                self.refused[pattern(kind_of(names[reading.recipes[name].groups[0][0]]))] = _OWN
        if any(len(each) != len(SCALES) for each in scaled.values()):
            self._cannot("some attention layers have not all scales of the cache")

    def _cannot(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def entry(self) -> dict[str, Any]:
        """The entry, as it stands in the table; `model_types` is left to the caller."""
        behind = [kind for kind, every in self.hows.items() if every and all(how.padded for how in every)]
        for kind in (kind for kind in behind if kind in self.pairs):
            theirs = self.pairs.pop(kind)
            self.fused[pattern(theirs)] = [pattern(kind)]
            self.rows[pattern(theirs), pattern(kind)] = self.rows.get((theirs, kind), set())
        in_parts = {each for every in (self.fused, self.stacks) for sources in every.values() for each in sources}
        alone = [name for name in self.pairs if any(_fits(each, name) for each in in_parts)]
        fused_names = {
            f"{target}?" if any(_fits(each, name) for name in alone for each in sources) else target: sources
            for target, sources in self.fused.items()
        }
        fused_names |= {f"{target}?": self.fused[target] for target in self.shorter}
        fused_names |= self.shorter
        renamed_where = self._renamed_where()
        told = [into for each in renamed_where.values() for into in each.values()]
        scales_where, scales, attends = self._scales()
        try:
            names = renamed({**dict(zip(told, told, strict=True)), **self.pairs})
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
            for key in ("transposed", "either", "squeezed", "side_by_side")
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
            "scales": [pattern(module) for module in scales],
            "kept": {pattern(buffer): pattern(beside) for buffer, beside in self._kept().items()},
            "counted": {target: min(keys) for target, keys in self.counted.items() if len(keys) == 1},
            "scales_where": {pattern(told): pattern(module) for told, module in scales_where.items()},
            "attends": [pattern(attends)] if attends else [],
            "first_experts": min(self.first_experts or [""]),
            "extra_layers": "num_hidden_layers" if self.extra else "",
            "drafts": sorted(self.drafts),
            **flags,
            "float32": sorted(pattern(kind) for kind, own in self.float32.items() if own),
            "unread": sorted(self.unread),
            "least": dict(each for how in hows.values() for each in how.least),
            "shaped": {pattern(kind): list(how.shaped) for kind, how in hows.items() if how.shaped},
            "spelled": {f"{module}": [words[each] for each in sorted(words)] for module, words in self.spelled.items()},
            "renamed_where": {
                pattern(teller): {pattern(name): pattern(into) for name, into in names_there.items()}
                for teller, names_there in renamed_where.items()
            },
            "fused": fused_names,
            "padded": self._padded(fused_names),
            "stacks": self.stacks,
            "stands_in": self.stands_in,
            "renamed": names,
            "cuts": {cut: numbered_parts(sorted(set(patterns))) for cut, patterns in cuts.items()},
            "computed": computed,
            "refused": self.refused,
        }
        short = {key: shortened(value, self.layer) for key, value in found.items() if key != "layer"}
        return {"layer": self.layer, **{key: value for key, value in short.items() if value or key == "head"}}


def _preference(how: How) -> tuple[bool, bool, bool, bool, int, str]:
    cut = how.cut or ""
    order = ("", "replicate", "grouped", "first", "even")
    return (
        bool(how.least or how.shaped),
        how.either,
        how.transposed,
        how.squeezed,
        order.index(cut) if cut in order else len(order),
        cut,
    )


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


def _first_of(value: object) -> list[object]:
    return value[:1] if isinstance(value, list) else []


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
