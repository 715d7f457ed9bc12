"""Architecture rules: which tensor is cut along which dim, in which units.

Rules are data (`architectures/*.toml`, or a file of the user's own). This module reads them, evaluates them for one
config and gives every tensor of a checkpoint its `Cut`. It knows no tp: how many ranks there are comes later.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tpshard import expression
from tpshard.errors import CorruptError, UnsupportedError, UsageError
from tpshard.header import TensorInfo
from tpshard.schemes import AXES, SUFFIXES, stored_axes

Kind = Literal["column", "row", "replicate", "buffer"]
SPLIT_AXIS = {"column": "out", "row": "in"}
_DIRECTORY = Path(__file__).parent / "architectures"


@dataclass(frozen=True, slots=True)
class Axis:
    """A feature axis of a model: `count` units of `unit` elements each; only `count` may be divided.

    replicate: units are repeated when there are more ranks than units (KV heads).
    pad: zero units may be added at the end (vocab).
    group: the axis by whose units this one is dealt (heads by KV group), so that no rank holds q without its k and v.
    """

    name: str
    count: int
    unit: int
    replicate: bool = False
    pad: bool = False
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """How one tensor is split: along `dim`, whose elements are the segments' units in a row.

    `segments` are axis names (a fused q, k, v is three). With `interleave`, the segments are stored interleaved per
    unit of that axis. Replicated tensors have `dim` None and no segments.
    """

    kind: Kind
    dim: int | None = None
    segments: tuple[str, ...] = ()
    interleave: str | None = None

    @property
    def rule(self) -> str:
        """The rule as the user reads it: `column heads kv kv / kv`."""
        return " ".join([self.kind, *self.segments, *(["/", self.interleave] if self.interleave else [])])


@dataclass(frozen=True, slots=True)
class _Rule:
    kind: Kind
    axes: tuple[str, ...]
    interleave: str | None
    condition: str | None
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """One TOML file of rules, checked but not yet evaluated for a config."""

    name: str
    text: str
    model_types: tuple[str, ...]
    prefix: str
    layers: str
    tied: Mapping[str, str]
    defaults: Mapping[str, Any]
    axes: Mapping[str, Mapping[str, Any]]
    rules: tuple[_Rule, ...]
    dims: Mapping[str, tuple[str, ...]]
    extra_layers: str | None
    experts: str | None
    found: Mapping[str, str]

    @property
    def digest(self) -> str:
        """sha256 of the file's text: names the exact rules that a shard set was made with."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Classified:
    """Rules evaluated for one checkpoint: the axes, and every tensor's cut by name.

    full_names: of tensors whose name lacks the prefix, their name with it.
    """

    axes: Mapping[str, Axis]
    cuts: Mapping[str, Cut]
    tied: Mapping[str, str]
    full_names: Mapping[str, str]


def _is_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_expression(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _table_of(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(valid, value.values()))


# What a key may hold, and how to say so.
_TOP_KEYS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "model_types": (_is_list, "a list of strings"),
    "prefix": (lambda value: isinstance(value, str), "a string"),
    "layers": (_is_expression, "an expression"),
    "extra_layers": (_is_expression, "an expression"),
    "experts": (_is_expression, "an expression"),
    "found": (_table_of(lambda value: isinstance(value, str)), "a table of strings"),
    "conditions": (_table_of(lambda value: isinstance(value, str)), "a table of strings"),
    "tied": (_table_of(lambda value: isinstance(value, str)), "a table of strings"),
    "defaults": (lambda value: isinstance(value, dict), "a table"),
    "axes": (_table_of(lambda value: isinstance(value, dict)), "a table of tables"),
    "rules": (_table_of(_is_list), "a table of lists of strings"),
    "dims": (_table_of(lambda value: _is_list(value) and set(value) <= set(AXES)), f"lists of {', '.join(AXES)}"),
}
_AXIS_KEYS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "count": (_is_expression, "an expression"),
    "unit": (_is_expression, "an expression"),
    "replicate": (lambda value: isinstance(value, bool), "true or false"),
    "pad": (lambda value: isinstance(value, bool), "true or false"),
    "group": (lambda value: isinstance(value, str), "the name of an axis"),
}


def _check_keys(
    data: Mapping[str, Any], known: Mapping[str, tuple[Callable[[Any], bool], str]], needed: set[str]
) -> str | None:
    """What is wrong with a table of a rules file, or None."""
    if unknown := set(data) - set(known):
        return f"unknown keys: {', '.join(sorted(unknown))}"
    if missing := needed - set(data):
        return f"missing keys: {', '.join(sorted(missing))}"
    wrong = next((key for key, value in data.items() if not known[key][0](value)), None)
    return f"{wrong} must be {known[wrong][1]}" if wrong else None


def parse_architecture(text: str, path: str) -> Architecture:
    """Read an architecture file. UsageError when it is not one: an unknown key is refused, never ignored."""

    def refuse(message: str) -> UsageError:
        return UsageError(f"bad rules file: {message}", path=path, hint="see `tpshard archs show llama` for the form")

    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise refuse(str(error)) from None
    if wrong := _check_keys(data, _TOP_KEYS, {"model_types", "layers", "axes", "rules"}):
        raise refuse(wrong)
    for name, axis in data["axes"].items():
        if wrong := _check_keys(axis, _AXIS_KEYS, {"count"}):
            raise refuse(f"axis {name}: {wrong}")
        if (group := axis.get("group", name)) not in data["axes"] or "group" in data["axes"][group]:
            raise refuse(f"axis {name}: group {group!r} is not an axis, or has a group itself")
    rules = []
    named: dict[str, str] = {}
    for name, condition in data.get("conditions", {}).items():
        named[name] = f"({_spelled_out(condition, named)})"
    for key, patterns in data["rules"].items():
        head, _, condition = key.partition(" if ")
        words, _, interleave = head.partition("/")
        kind, *axes = words.split()
        interleave = interleave.strip()
        if kind not in ("column", "row", "replicate", "buffer") or (kind in SPLIT_AXIS) != bool(axes):
            raise refuse(f"rule {key!r}: expected `column AXIS…`, `row AXIS…`, `replicate` or `buffer`")
        for axis_name in [*axes, *([interleave] if interleave else [])]:
            if axis_name not in data["axes"]:
                raise refuse(f"rule {key!r}: {axis_name!r} is not an axis")
        condition = _spelled_out(condition.strip(), named)
        rules.append(_Rule(kind, tuple(axes), interleave or None, condition or None, tuple(patterns)))
    for text_ in [
        *named.values(),
        *(str(data[key]) for key in ("layers", "extra_layers", "experts") if key in data),
        *(rule.condition for rule in rules if rule.condition),
        *(str(axis[k]) for axis in data["axes"].values() for k in ("count", "unit") if k in axis),
    ]:
        try:
            expression.parse(text_)
        except expression.ExpressionError as error:
            raise refuse(str(error)) from None
    dims = data.get("dims", {})
    for pattern in [*(p for rule in rules for p in rule.patterns), *dims, *data.get("found", {}).values()]:
        try:
            _compile(pattern.removesuffix("?"))
        except re.error as error:
            raise refuse(f"pattern {pattern!r}: {error}") from None
        if "experts" not in data and pattern.removesuffix("?").split(".").count("*") > 1:
            raise refuse(f"pattern {pattern!r} is of experts, and no key `experts` says how many there are")
    for rule in rules:
        unlayered = [pattern for pattern in rule.patterns if "*" not in pattern.removesuffix("?").split(".")]
        if unlayered and _asks_layer(rule.condition):
            raise refuse(f"pattern {unlayered[0]!r} has no layer, and its condition {rule.condition!r} asks for one")
    return Architecture(
        name=Path(path).stem,
        text=text,
        model_types=tuple(data["model_types"]),
        prefix=data.get("prefix", ""),
        layers=str(data["layers"]),
        tied=data.get("tied", {}),
        defaults=data.get("defaults", {}),
        axes=data["axes"],
        rules=tuple(rules),
        dims={pattern: tuple(axes) for pattern, axes in dims.items()},
        extra_layers=str(data["extra_layers"]) if "extra_layers" in data else None,
        experts=str(data["experts"]) if "experts" in data else None,
        found=data.get("found", {}),
    )


def _spelled_out(condition: str, named: Mapping[str, str]) -> str:
    """A condition with the named conditions in their places."""
    return re.sub(r"\w+", lambda word: named.get(word[0], word[0]), condition)


def _asks_layer(condition: str | None) -> bool:
    """Whether a condition asks for the layer's number: its rule may hold in some layers and not in others."""
    return condition is not None and "layer" in expression.names(condition)


def load_architecture(path: Path) -> Architecture:
    """Read one architecture file from disk."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the rules file: {error}", path=path) from None
    return parse_architecture(text, str(path))


def builtin_names() -> list[str]:
    """Names of the built-in architecture files."""
    return sorted(path.stem for path in _DIRECTORY.glob("*.toml"))


def all_builtin() -> list[Architecture]:
    """Every built-in architecture."""
    return [load_architecture(_DIRECTORY / f"{name}.toml") for name in builtin_names()]


def builtin_or_none(name: str) -> Architecture | None:
    """A built-in architecture by file name or model_type."""
    path = _DIRECTORY / f"{name}.toml"
    if re.fullmatch(r"[\w.-]+", name) and path.is_file():
        return load_architecture(path)
    return next((architecture for architecture in all_builtin() if name in architecture.model_types), None)


def builtin(name: str) -> Architecture:
    """A built-in architecture by file name or model_type; UnsupportedError when there is none."""
    if architecture := builtin_or_none(name):
        return architecture
    raise UnsupportedError(
        f"no rules for model_type {name!r}{_closest(name)}",
        hint="`tpshard archs draft MODEL` writes rules to start from, --rules FILE takes them; `tpshard archs` lists "
        "the built-in ones",
    )


def _closest(name: str) -> str:
    import difflib

    known = {name for architecture in all_builtin() for name in (architecture.name, *architecture.model_types)}
    near = difflib.get_close_matches(name, sorted(known))
    return f" (closest: {', '.join(near)})" if near else ""


def find_architecture(config: Mapping[str, Any], rules: Path | None, config_path: object) -> Architecture:
    """The architecture for a config: the user's file if given, else the built-in one of its model_type."""
    model_type = config.get("model_type")
    if rules is not None:
        architecture = load_architecture(rules)
        if model_type not in architecture.model_types:
            raise UsageError(
                "the rules file is for another architecture",
                path=rules,
                expected=f"model_types with {model_type!r}",
                found=", ".join(architecture.model_types),
            )
        return architecture
    if not isinstance(model_type, str):
        raise UnsupportedError(
            "config.json names no model_type", path=config_path, hint="give rules of your own with --rules FILE"
        )
    return builtin(model_type)


def classify(
    architecture: Architecture,
    config: Mapping[str, Any],
    tensors: Iterable[TensorInfo],
    names: Mapping[str, str] | None = None,
) -> Classified:
    """Give every tensor its cut. names: what the rules call a tensor that has another name in the checkpoint.

    UnsupportedError when a tensor has no rule; CorruptError when the checkpoint lacks a tensor that the architecture
    has in every layer, or when the config's counts contradict a shape.
    """
    tensors = tuple(tensors)
    names = names or {}
    try:
        config = _with_found(architecture, config, [names.get(tensor.name, tensor.name) for tensor in tensors])
        return _classify(architecture, config, tensors, names)
    except expression.ExpressionError as error:
        raise _misfit(architecture, error) from None


def _classify(
    architecture: Architecture, config: Mapping[str, Any], tensors: Sequence[TensorInfo], names: Mapping[str, str]
) -> Classified:
    matcher = _Matcher(architecture, config)
    matches = [matcher.match(tensor, names.get(tensor.name, tensor.name)) for tensor in tensors]
    used = {name for p in matcher.patterns if p.seen for name in (*p.rule.axes, p.rule.interleave) if name}
    used |= {group for name in used if (group := architecture.axes[name].get("group"))}
    axes = {name: _axis(name, data, config) for name, data in architecture.axes.items() if name in used}
    cuts: dict[str, Cut] = {}
    for tensor, (rule, dims) in zip(tensors, matches, strict=True):
        cut = _cut(tensor, rule, dims)
        _check_sum(tensor, cut, axes, architecture.name)
        cuts[tensor.name] = cut
    matcher.check_complete()
    tied = dict(architecture.tied) if config.get("tie_word_embeddings") else {}
    full_names = {name: full for full, name in matcher.names.items() if full != name}
    return Classified(axes=axes, cuts=cuts, tied=tied, full_names=full_names)


def recognise(
    architecture: Architecture, config: Mapping[str, Any], names: Iterable[str], exact: bool = False
) -> tuple[list[str], list[str]]:
    """By names alone: the required patterns that match none of `names`, and those of `names` without a rule.

    exact: a name must have the prefix that a checkpoint may leave out.
    """
    names = tuple(names)
    try:
        matcher = _Matcher(architecture, _with_found(architecture, config, names))
        found = {name: matcher.find(name, "" if exact else architecture.prefix)[1] for name in names}
    except expression.ExpressionError as error:
        raise _misfit(architecture, error) from None
    seen = {pattern.text for candidates in found.values() for pattern, _, _ in candidates}
    missing = [p.text for p in matcher.patterns if p.required and not p.condition and p.text not in seen]
    return missing, [name for name, candidates in found.items() if not candidates]


def _with_found(architecture: Architecture, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The config with what it means when it is silent, and with what the checkpoint is found to hold."""
    config = {**architecture.defaults, **config}
    for key, pattern in architecture.found.items():
        compiled = _compile(pattern)
        config[key] = any(compiled.fullmatch(full) for name in names for full in (name, architecture.prefix + name))
    return config


def _misfit(architecture: Architecture, error: Exception) -> CorruptError:
    return CorruptError(f"the config does not fit the {architecture.name} rules: {error}")


def _axis(name: str, data: Mapping[str, Any], config: Mapping[str, Any]) -> Axis:
    return Axis(
        name=name,
        count=expression.evaluate_count(str(data["count"]), config),
        unit=expression.evaluate_count(str(data.get("unit", 1)), config),
        replicate=data.get("replicate", False),
        pad=data.get("pad", False),
        group=data.get("group"),
    )


def _cut(tensor: TensorInfo, rule: _Rule, dims: tuple[str, ...]) -> Cut:
    axis = SPLIT_AXIS.get(rule.kind)
    if axis is None:
        return Cut(rule.kind)
    if axis not in dims:
        # A row-parallel bias has no `in`: every rank has it whole, and it is added once, after the sum.
        if rule.kind == "row" and dims and tensor.name.endswith("bias"):
            return Cut("replicate")
        raise UnsupportedError(
            f"{tensor.name} cannot be split by {rule.kind}: no dim of it is known to be `{axis}`",
            path=tensor.file,
            tensor=tensor.name,
            found=f"shape {list(tensor.shape)}, dims {', '.join(dims) or 'unknown'}",
            hint="name the axis of each of its dims under [dims] in a rules file of your own",
        )
    return Cut(rule.kind, dims.index(axis), rule.axes, rule.interleave)


def _check_sum(tensor: TensorInfo, cut: Cut, axes: Mapping[str, Axis], architecture: str) -> None:
    if cut.dim is None:
        return
    terms = [f"{name} {axes[name].count} x {axes[name].unit}" for name in cut.segments]
    expected = sum(axes[name].count * axes[name].unit for name in cut.segments)
    if tensor.shape[cut.dim] != expected:
        raise CorruptError(
            f"config.json contradicts the tensor {tensor.name}",
            path=tensor.file,
            tensor=tensor.name,
            expected=f"dim {cut.dim} of size {expected} ({' + '.join(terms)}, {architecture} rules)",
            found=f"shape {list(tensor.shape)}",
            hint="config.json and the weights are of different models, or these rules do not fit this one",
        )
    if cut.interleave and any(axes[name].count % axes[cut.interleave].count for name in cut.segments):
        raise CorruptError(
            f"{tensor.name}: {' + '.join(terms)} cannot be interleaved per {cut.interleave}",
            tensor=tensor.name,
            expected=f"counts that are multiples of {axes[cut.interleave].count}",
        )


@dataclass(slots=True, eq=False)
class _Pattern:
    """A pattern of a rule, and what it has matched so far."""

    text: str
    rule: _Rule
    compiled: re.Pattern[str]
    required: bool
    condition: str | None  # on the layer
    seen: bool = False
    # Where it is required: of every name without its numbers, the layers, and the experts in each.
    indices: dict[str, dict[int, set[int]]] = field(default_factory=dict)


class _Matcher:
    """Matches tensor names against the rules that hold for a config, and remembers what was matched."""

    def __init__(self, architecture: Architecture, config: Mapping[str, Any]) -> None:
        self.architecture = architecture
        self.config = config
        self.layers = expression.evaluate_count(architecture.layers, config)
        extra = architecture.extra_layers
        self.extra_layers = expression.evaluate_count(extra, config, least=0) if extra else 0
        self.patterns: list[_Pattern] = []
        for rule in architecture.rules:
            condition = rule.condition if _asks_layer(rule.condition) else None
            if rule.condition is None or condition or expression.evaluate(rule.condition, config):
                for text in rule.patterns:
                    required = not text.endswith("?") and rule.kind != "buffer"
                    compiled = _compile(text.removesuffix("?"))
                    self.patterns.append(_Pattern(text, rule, compiled, required, condition))
        self.dims = [(pattern, _compile(pattern.removesuffix("?"))) for pattern in architecture.dims]
        self.seen_dims: set[str] = set()
        self.names: dict[str, str] = {}  # name with the prefix -> name in the checkpoint
        # Layers are alike, and experts, so the patterns that fit a name are looked up once per name with its numbers
        # blanked out, unless a component of a pattern other than `*` can tell one number from another.
        components = {part for pattern in self.patterns for part in pattern.text.removesuffix("?").split(".")}
        numbered = any(not re.search(r"[^\d*]", re.sub(r"\[[^]]*\]", "", part)) for part in components - {"*"})
        self._index = re.compile(r"(?!)" if numbered else rf"(?<![^.]){_INDEX}(?![^.])")
        self._memo: dict[str, list[_Pattern]] = {}
        self._holding: dict[tuple[str, int], bool] = {}

    def find(self, name: str, prefix: str) -> tuple[str, list[_Match]]:
        """The patterns that match a name, as it is or after `prefix`, and the name that they match."""
        for full in dict.fromkeys((name, prefix + name)):
            key = self._index.sub("0", full)
            if key not in self._memo:
                self._memo[key] = [pattern for pattern in self.patterns if pattern.compiled.fullmatch(full)]
            matches = [(pattern, *_numbers(pattern, full)) for pattern in self._memo[key]]
            candidates = [match for match in matches if not match[0].condition or self._holds(match[0], match[1][0])]
            if candidates:
                return full, candidates
        return name, []

    def match(self, tensor: TensorInfo, known_as: str) -> tuple[_Rule, tuple[str, ...]]:
        """The one rule of a tensor, which the rules know by another name perhaps, and the axis of each of its dims."""
        name = tensor.name
        full, candidates = self.find(known_as, self.architecture.prefix)
        if not candidates:
            raise UnsupportedError(
                f"no {self.architecture.name} rule matches the tensor {name}",
                path=tensor.file,
                tensor=name,
                found=f"shape {list(tensor.shape)}",
                hint="a tensor is never guessed: write a rule for it and give the file with --rules FILE",
            )
        if len(candidates) > 1:
            raise UsageError(
                f"{len(candidates)} rules match the tensor {name}: {', '.join(p.text for p, _, _ in candidates)}",
                tensor=name,
                hint="make the patterns of the rules file disjoint",
            )
        if full in self.names:
            raise CorruptError(
                f"{name} and {self.names[full]} are one tensor, with the prefix and without",
                path=tensor.file,
                tensor=name,
                expected=f"one of them, with or without {self.architecture.prefix!r}",
            )
        self.names[full] = name
        pattern, numbers, rest = candidates[0]
        pattern.seen = True
        if pattern.required and numbers:
            pattern.indices.setdefault(rest, {}).setdefault(numbers[0], set()).update(numbers[1:])
        return pattern.rule, self._dims(full, tensor)

    def _holds(self, pattern: _Pattern, layer: int) -> bool:
        """Whether a pattern's rule holds in a layer."""
        if not pattern.condition:
            return True
        key = (pattern.condition, layer)
        if key not in self._holding:
            self._holding[key] = bool(expression.evaluate(pattern.condition, {**self.config, "layer": layer}))
        return self._holding[key]

    def _dims(self, full: str, tensor: TensorInfo) -> tuple[str, ...]:
        suffix = full.rpartition(".")[2]
        if suffix != "bias":
            for pattern, compiled in self.dims:
                if compiled.fullmatch(full):
                    self.seen_dims.add(pattern)
                    dims = self.architecture.dims[pattern]
                    if len(dims) != len(tensor.shape):
                        raise CorruptError(
                            f"{tensor.name} has {len(tensor.shape)} dims",
                            tensor=tensor.name,
                            expected=f"{len(dims)} dims: {', '.join(dims)}",
                            found=f"shape {list(tensor.shape)}",
                        )
                    dim = dims.index("expert") if "expert" in dims and self.architecture.experts else None
                    if dim is not None and tensor.shape[dim] != self._experts:
                        raise CorruptError(
                            f"config.json contradicts the tensor {tensor.name}",
                            path=tensor.file,
                            tensor=tensor.name,
                            expected=f"dim {dim} of size {self._experts} (experts, {self.architecture.name} rules)",
                            found=f"shape {list(tensor.shape)}",
                        )
                    return dims
        return stored_axes(suffix, len(tensor.shape))

    @cached_property
    def _experts(self) -> int:
        """The experts of a layer, asked for only where a tensor is of one: a config of a dense model may have none."""
        assert self.architecture.experts is not None
        return expression.evaluate_count(self.architecture.experts, self.config)

    def check_complete(self) -> None:
        """CorruptError when a required pattern matched nothing, or not in every layer, or not for every expert."""
        last = max((layer for p in self.patterns for layers in p.indices.values() for layer in layers), default=0)
        count = self.layers + (self.extra_layers if last >= self.layers else 0)
        # Rules of some layers alone come last: `layers`, which may be any number, is then known to be the tensors'.
        for pattern in sorted(self.patterns, key=lambda pattern: pattern.condition is not None):
            anywhere = not pattern.condition or any(self._holds(pattern, layer) for layer in range(count))
            if pattern.required and not pattern.seen and anywhere:
                raise CorruptError(
                    f"no tensor matches {pattern.text}, which every {self.architecture.name} model has",
                    expected=pattern.text,
                    hint="is the checkpoint complete, and is model_type in config.json right?",
                )
            for rest, layers in pattern.indices.items():
                _check_run(rest, "layers", layers, count, partial(self._holds, pattern))
                for layer, experts in layers.items() if rest.count("*") > 1 else ():
                    _check_run(rest.replace("*", str(layer), 1), "experts", experts, self._experts)
        for text in self.architecture.dims:
            if not text.endswith("?") and text not in self.seen_dims:
                raise UsageError(
                    f"[dims] of the {self.architecture.name} rules: no tensor matches {text}",
                    expected="a tensor that a rule matches and that is no bias",
                    hint="a pattern that may match nothing ends with `?`",
                )


def _check_run(
    rest: str, what: str, found: Collection[int], count: int, holds: Callable[[int], bool] = lambda index: True
) -> None:
    """CorruptError unless the numbers found are those below `count` that hold."""
    missing = list(islice((index for index in range(count) if index not in found and holds(index)), 6))
    extra = sorted(index for index in found if index >= count)
    if missing or extra:
        raise CorruptError(
            f"{rest}: {what} " + (f"{_short(missing)} missing" if missing else f"{_short(extra)} beyond the config"),
            tensor=rest.replace("*", str((missing or extra)[0]), 1),
            expected=f"{what} 0 to {count - 1}",
            found=f"{len(found)} {what}",
        )


_Match = tuple[_Pattern, list[int], str]
"""A pattern that matches a name, the layer and expert in it, and the name with `*` for them."""


def _numbers(pattern: _Pattern, full: str) -> tuple[list[int], str]:
    """The layer and expert in a name that the pattern matches, and the name with `*` for them."""
    found = pattern.compiled.fullmatch(full)
    assert found is not None
    rest = full
    numbers = found.groups()
    for group in range(len(numbers), 0, -1):
        start, end = found.span(group)
        rest = f"{rest[:start]}*{rest[end:]}"
    return [int(number) for number in numbers], rest


_INDEX = r"(?:0|[1-9][0-9]*)"  # a layer's number, as nobody writes it otherwise


def _short(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")


def _compile(pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression over whole tensor names.

    `*` and `[..]` match inside one dotted component; a component that is `*` alone is a number and a captured group,
    the layer first, then the expert.
    """
    parts = []
    captured = 0
    for component in pattern.split("."):
        if component == "*" and captured < 2:
            parts.append(rf"({_INDEX})")
            captured += 1
        else:
            pieces = re.split(r"(\*|\[[^]]*\])", component)
            parts.append("".join(r"[^.]*" if p == "*" else p if p.startswith("[") else re.escape(p) for p in pieces))
    suffixes = "|".join(SUFFIXES)
    return re.compile(r"\.".join(parts) + rf"(?:\.(?:{suffixes}))?")
