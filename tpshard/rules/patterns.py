"""Matching of tensor names with an architecture's patterns: the one rule of each, and whether any tensor is missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

from tpshard.errors import CorruptError, UnsupportedError, UsageError
from tpshard.rules import expression
from tpshard.rules.architecture import EITHER, ONE, Architecture, Rule, asks_layer, compile_pattern
from tpshard.rules.quantisation.schemes import Companion, companion_of, split_name, stand_ins
from tpshard.storage.safetensors import TensorInfo
from tpshard.storage.tensor_names import numbered

HEADS = ("score", "score.*", "classifier", "qa_outputs", "v_head", "v_head.summary")
"""Heads of other tasks than predicting tokens, which any architecture may have: sequences and tokens are classified
(transformers), rewarded (Qwen2.5's are two modules, InternLM2's is a v_head), or given a value (TRL).

They are small, and whole on every rank.
"""


@dataclass(slots=True, eq=False)
class Pattern:
    """A pattern of a rule, and what it has matched so far.

    condition: on the layer. indices: of a required pattern, by name with `*` for numbers, the experts of each layer.
    """

    text: str
    rule: Rule
    compiled: re.Pattern[str]
    required: bool
    condition: str | None
    seen: bool = False
    indices: dict[str, dict[int, set[int]]] = field(default_factory=dict)


Matched = tuple[Rule, Companion, tuple[str, ...] | None]
"""The rule of a tensor's module, what the tensor is to the module, and the axis of each of its dims."""


_Found = tuple[Matched, tuple[str, str], set[int]]
"""What matches a name, how it begins and how what they match begins in place of that, and where to note experts."""


class Candidate(NamedTuple):
    """A pattern that matches the names of a kind.

    places: which components of a name are the layer and the expert. alone: whether a name has no other numbers. place:
    of the name that matches among those which stand in for the tensor's own, 0 for that.
    """

    pattern: Pattern
    places: tuple[int, ...]
    alone: bool
    place: int

    def numbers(self, full: str) -> list[int]:
        """The numbers of layer and expert in a name."""
        components = full.split(".")
        return [int(components[each]) for each in self.places]

    def rest(self, full: str) -> str:
        """The name that matches in place of one, with `*` for layer and expert."""
        return _masked((full, *stand_ins(full))[self.place], self.places)


def _candidate(pattern: Pattern, known: str, place: int) -> Candidate:
    found = pattern.compiled.fullmatch(known)
    assert found is not None
    places = tuple(known.count(".", 0, found.start(group)) for group in range(1, len(found.groups()) + 1))
    return Candidate(pattern, places, len(numbered(known)[1]) == len(places), place)


def _masked(name: str, places: Collection[int]) -> str:
    """A name with `*` for some of its components."""
    return ".".join("*" if place in places else part for place, part in enumerate(name.split(".")))


def tell_numbers(patterns: Iterable[str]) -> bool:
    """Whether a component of a pattern, other than `*`, can tell one number from another."""
    components = {part for pattern in patterns for part in pattern.removesuffix("?").split(".")}
    return any(not re.search(r"[^\d*]", re.sub(r"\[[^]]*\]", "", part)) for part in components - {"*"})


class Matcher:
    """Matches tensor names with the rules that hold for a config, and keeps track of what was matched."""

    def __init__(
        self, architecture: Architecture, config: Mapping[str, Any], quantised: Mapping[str, Companion] | None = None
    ) -> None:
        self.architecture = architecture
        self.quantised = quantised or {}
        self.config = config
        self.layers = expression.evaluate_count(architecture.layers, config)
        extra = architecture.extra_layers
        self.extra_layers = expression.evaluate_count(extra, config, least=0) if extra else 0
        self.patterns: list[Pattern] = []
        for rule in architecture.rules:
            condition = rule.condition if asks_layer(rule.condition) else None
            if rule.condition is None or condition or expression.evaluate(rule.condition, config):
                for text in rule.patterns:
                    required = not text.endswith("?") and rule.kind != "buffer"
                    compiled = compile_pattern(text.removesuffix("?"))
                    self.patterns.append(Pattern(text, rule, compiled, required, condition))
        whole = Rule("replicate", (), None, None, HEADS)
        self.heads = [Pattern(text, whole, compile_pattern(text), False, None) for text in HEADS]
        self.dims = [(pattern, compile_pattern(pattern.removesuffix("?"))) for pattern in architecture.dims]
        self.seen_dims: set[str] = set()
        self.names: dict[str, str] = {}  # name with the prefix -> name in the checkpoint
        # The patterns that fit a name are looked up once for its kind, unless they tell one number from another.
        self._one_by_one = tell_numbers(pattern.text for pattern in self.patterns)
        self._candidates: dict[tuple[str, bool], list[tuple[tuple[str, str], list[Candidate]]]] = {}
        self._matched: dict[tuple[object, ...], _Found] = {}
        self._apart: set[str] = set()  # kinds of names that have more numbers than a layer's and an expert's
        self._rows: dict[tuple[object, ...], Matched] = {}
        self._holding: dict[tuple[str, int], bool] = {}

    def find(self, name: str, *, exact: bool = False) -> tuple[tuple[str, str], list[Candidate]]:
        """The patterns that match a name; and how it begins, and how what they match begins in place of that.

        They match the name itself or, unless `exact`, what it is with the architecture's prefix. A companion of a
        quantised module is matched under the name that its weight would have without.
        """
        key = name if self._one_by_one else numbered(name)[0], exact
        if key not in self._candidates:
            self._candidates[key] = list(self._alternatives(*key))
        for (old, new), candidates in self._candidates[key]:
            full = new + name[len(old) :]
            held = [
                each
                for each in candidates
                if not each.pattern.condition or self._holds(each.pattern, each.numbers(full)[0])
            ]
            if held:
                return (old, new), held
        return ("", ""), []

    def _alternatives(self, name: str, exact: bool) -> Iterator[tuple[tuple[str, str], list[Candidate]]]:
        """The patterns that match a name, or else the name with the prefix, or else one that stands in for either."""
        for old, new in (("", ""), *(() if exact else self.architecture.beginnings)):
            full = new + name[len(old) :]
            for place, known in enumerate((full, *stand_ins(full))) if name.startswith(old) else ():
                own = [pattern for pattern in self.patterns if pattern.compiled.fullmatch(known)]
                if found := own or [head for head in self.heads if head.compiled.fullmatch(known)]:
                    yield (old, new), [_candidate(pattern, known, place) for pattern in found]

    def match(self, tensor: TensorInfo, known_as: str) -> Matched:
        """The one rule of a tensor's module, what the tensor is to the module, and the axis of each of its dims.

        Tensors that are alike have the same object. known_as: the tensor's name as the rules have it, the prefix
        perhaps excepted.
        """
        name, companion = tensor.name, self.quantised.get(tensor.name)
        kind, numbers = numbered(known_as)
        key = known_as if self._one_by_one or kind in self._apart else kind, numbers[:1], tensor.shape, id(companion)
        found = self._matched.get(key)
        if found is not None:
            found[2].update(numbers[1:])
        else:
            found, alone = self._match(tensor, known_as, companion)
            if alone:
                self._matched[key] = found
            else:
                self._apart.add(kind)
        matched, (old, new), _ = found
        full = new + known_as[len(old) :]
        if full in self.names:
            what = f"{name} and {self.names[full]} are one tensor, with the prefix and without"
            expected = f"one of them, with or without {self.architecture.prefix!r}"
            raise CorruptError(what, path=tensor.file, tensor=name, expected=expected)
        self.names[full] = name
        return matched

    def _match(self, tensor: TensorInfo, known_as: str, companion: Companion | None) -> tuple[_Found, bool]:
        """What is found of a tensor, and whether that holds for every name of its kind in this layer."""
        name = tensor.name
        beginning, candidates = self.find(known_as)
        if not candidates or (companion is None and any(each.place for each in candidates)):
            what = f"no {self.architecture.name} rule matches the tensor {name}"
            hint = "a tensor is never guessed: write a rule for it and give the file with --rules FILE"
            raise UnsupportedError(what, path=tensor.file, tensor=name, found=f"shape {list(tensor.shape)}", hint=hint)
        if len(candidates) > 1:
            texts = ", ".join(each.pattern.text for each in candidates)
            what = f"{len(candidates)} rules match the tensor {name}: {texts}"
            raise UsageError(what, tensor=name, hint="make the patterns of the rules file disjoint")
        (candidate,) = candidates
        full = beginning[1] + known_as[len(beginning[0]) :]
        pattern, numbers, rest = candidate.pattern, candidate.numbers(full), candidate.rest(full)
        row = companion or companion_of(full)
        key = id(pattern), rest, full.rpartition(".")[2], id(row), tensor.shape
        if key not in self._rows:
            self._rows[key] = pattern.rule, row, self._dims(full, row, tensor)
        experts: set[int] = set()
        if row.role in ("plain", "values"):  # a scale is no sign that the weight is there
            pattern.seen = True
            if pattern.required and numbers:
                experts = pattern.indices.setdefault(rest, {}).setdefault(numbers[0], experts)
                experts.update(numbers[1:])
        return (self._rows[key], beginning, experts), candidate.alone

    def _holds(self, pattern: Pattern, layer: int) -> bool:
        """Whether a pattern's rule holds in a layer."""
        if not pattern.condition:
            return True
        key = (pattern.condition, layer)
        if key not in self._holding:
            self._holding[key] = bool(expression.evaluate(pattern.condition, {**self.config, "layer": layer}))
        return self._holding[key]

    def _dims(self, full: str, companion: Companion, tensor: TensorInfo) -> tuple[str, ...] | None:
        """The axes of a tensor's dims. [dims] is of the companions that have both features, and of bare parameters."""
        name, shape = tensor.name, list(tensor.shape)
        known = self.dims if companion.has("out", "in") or not split_name(full)[1] else []
        names = (full, *stand_ins(full))
        pattern = next((p for p, compiled in known if any(compiled.fullmatch(each) for each in names)), None)
        if pattern is None:
            return companion.axes(len(shape))
        self.seen_dims.add(pattern)
        dims = self.architecture.dims[pattern]
        either = dims[-1:] if dims[-1] == EITHER else ()
        dims = dims[: len(dims) - len(either)]
        if companion.role != "plain" and (
            not companion.turns or (companion.role == "scale" and len(dims) != len(shape))
        ):
            return companion.axes(len(shape))
        if len(dims) != len(shape):
            dims = tuple(dim for dim in dims if dim != ONE)
        if len(dims) != len(shape) or any(size != 1 for dim, size in zip(dims, shape, strict=True) if dim == ONE):
            expected = f"{len(dims)} dims: {', '.join(dims)}"
            raise CorruptError(f"{name} has {len(shape)} dims", tensor=name, expected=expected, found=f"shape {shape}")
        if "expert" in dims and self.architecture.experts and shape[dims.index("expert")] != self._experts:
            raise contradiction(tensor, dims.index("expert"), self._experts, f"experts, {self.architecture.name} rules")
        return (*dims, *either)

    @cached_property
    def _experts(self) -> int:
        """The number of experts in a layer, evaluated on demand: the config of a dense model may not have it."""
        assert self.architecture.experts is not None
        return expression.evaluate_count(self.architecture.experts, self.config)

    def check_complete(self) -> None:
        """CorruptError when a required pattern matched nothing, or not in every layer or not for every expert."""
        last = max((layer for p in self.patterns for layers in p.indices.values() for layer in layers), default=0)
        count = self.layers + (self.extra_layers if last >= self.layers else 0)
        # Rules that hold in some layers come last: by then `layers`, which may be any number, is known to be right.
        for pattern in sorted(self.patterns, key=lambda pattern: pattern.condition is not None):
            anywhere = not pattern.condition or any(self._holds(pattern, layer) for layer in range(count))
            if pattern.required and not pattern.seen and anywhere:
                what = f"no tensor matches {pattern.text}, which every {self.architecture.name} model has"
                hint = "is the checkpoint complete, and is model_type in config.json right?"
                raise CorruptError(what, expected=pattern.text, hint=hint)
            for rest, layers in pattern.indices.items():
                _check_run(rest, "layers", layers, count, partial(self._holds, pattern))
                for layer, experts in layers.items() if rest.count("*") > 1 else ():
                    _check_run(rest.replace("*", str(layer), 1), "experts", experts, self._experts)
        for text in self.architecture.dims:
            if not text.endswith("?") and text not in self.seen_dims:
                what = f"[dims] of the {self.architecture.name} rules: no tensor matches {text}"
                expected = "a tensor that a rule matches and that is no bias"
                raise UsageError(what, expected=expected, hint="a pattern that may match nothing ends with `?`")


def _check_run(
    rest: str, what: str, found: Collection[int], count: int, holds: Callable[[int], bool] = lambda index: True
) -> None:
    """CorruptError unless the numbers found are exactly those below `count` for which `holds` is true."""
    missing = list(islice((index for index in range(count) if index not in found and holds(index)), 6))
    extra = sorted(index for index in found if index >= count)
    if missing or extra:
        raise CorruptError(
            f"{rest}: {what} " + (f"{_short(missing)} missing" if missing else f"{_short(extra)} beyond the config"),
            tensor=rest.replace("*", str((missing or extra)[0]), 1),
            expected=f"{what} 0 to {count - 1}",
            found=f"{len(found)} {what}",
        )


def contradiction(tensor: TensorInfo, dim: int, size: int, terms: str, hint: str | None = None) -> CorruptError:
    """The error for a tensor that has not the size which the config gives it. terms: what makes up the size."""
    what, expected = f"config.json contradicts the tensor {tensor.name}", f"dim {dim} of size {size} ({terms})"
    found = f"shape {list(tensor.shape)}"
    return CorruptError(what, path=tensor.file, tensor=tensor.name, expected=expected, found=found, hint=hint)


def _short(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
