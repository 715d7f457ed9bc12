"""Architecture files: the rules for a family of models as data, read and checked but not yet evaluated for a config.

They are `architectures/*.toml`, or a file of the user's own.
"""

import hashlib
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from tpshard.errors import UnsupportedError, UsageError
from tpshard.planning.axes import SPLIT_AXIS, Kind
from tpshard.rules import expression
from tpshard.rules.globs import compile_pattern
from tpshard.rules.quantisation.schemes import AXES

ONE = "one"
"""A dim of one element, which some files have and others have not: all of a tensor's or none."""
EITHER = "or turned"
"""Behind the dims of a tensor: the last two may be stored in the other order, and sizes say which it is."""
_DIRECTORY = Path(__file__).parent / "architectures"


@dataclass(frozen=True, slots=True)
class Rule:
    """How modules are cut: all those that one of `patterns` matches, where `condition` holds.

    each_expert: the axes lie there once for each expert, one behind another.
    """

    kind: Kind
    axes: tuple[str, ...]
    interleave: str | None
    condition: str | None
    patterns: tuple[str, ...]
    each_expert: bool = False


@dataclass(frozen=True, slots=True)
class Conditional:
    """Modules of which something is said where a condition holds: those that one of `patterns` matches."""

    condition: str
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """An architecture file; docs/reference/rules.md describes its keys."""

    name: str
    text: str
    model_types: tuple[str, ...]
    prefix: str
    other_prefixes: tuple[str, ...]
    layers: str
    before: tuple[str, ...]
    tied: Mapping[str, str]
    defaults: Mapping[str, Any]
    axes: Mapping[str, Mapping[str, Any]]
    rules: tuple[Rule, ...]
    dims: Mapping[str, tuple[str, ...]]
    extra_layers: str | None
    experts: str | None
    found: Mapping[str, str]
    biases: tuple[Conditional, ...] | None
    float32: tuple[Conditional, ...]

    @property
    def beginnings(self) -> tuple[tuple[str, str], ...]:
        """How a name may begin that lacks the prefix or has another one, and how it begins in the rules."""
        return ("", self.prefix), *((other, self.prefix) for other in self.other_prefixes)

    def within(self, names: Collection[str]) -> str:
        """How the names of layers begin, up to their number: what most patterns of required modules begin with.

        names: of a checkpoint's tensors, as the rules have them; of several forms it is the one that some are in.
        """
        begun = [p.partition("*")[0] for rule in self.rules for p in rule.patterns if "*" in p and not p.endswith("?")]
        forms = sorted(dict.fromkeys(begun), key=begun.count, reverse=True)
        return next((form for form in forms if any(name.startswith(form) for name in names)), "")

    def expert_kinds(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """How the kinds of experts' names begin up to their number, and the kinds of modules that stack them."""
        patterns = [p.removesuffix("?").split(".") for rule in self.rules for p in rule.patterns]
        second = ((each, [place for place, part in enumerate(each) if part == "*"]) for each in patterns)
        within = {".".join(["0" if part == "*" else part for part in each[: at[1]]]) for each, at in second if at[1:]}
        stacked = {p.removesuffix("?").replace("*", "0") for p, dims in self.dims.items() if "expert" in dims}
        return tuple(sorted(f"{each}." for each in within)), tuple(sorted(stacked))

    @property
    def digest(self) -> str:
        """sha256 of the file's text, which identifies the exact rules that a shard set was made with."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def _is_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_expression(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _table_of(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(valid, value.values()))


_Keys = Mapping[str, tuple[Callable[[Any], bool], str]]
"""For each key, whether a value is valid, and what to call a valid one in a message."""
_TOP_KEYS: _Keys = {
    "model_types": (_is_list, "a list of strings"),
    "prefix": (_is(str), "a string"),
    "other_prefixes": (_is_list, "a list of strings"),
    "before": (_is_list, "a list of strings"),
    "one_stage": (_is(bool), "true or false"),
    **dict.fromkeys(("layers", "extra_layers", "experts"), (_is_expression, "an expression")),
    **dict.fromkeys(("found", "conditions", "tied", "copies"), (_table_of(_is(str)), "a table of strings")),
    "defaults": (_is(dict), "a table"),
    "axes": (_table_of(_is(dict)), "a table of tables"),
    "rules": (_table_of(_is_list), "a table of lists of strings"),
    **dict.fromkeys(("biases", "float32"), (_table_of(_is_list), "a table of lists of strings")),
    "dims": (
        _table_of(lambda value: _is_list(value) and {*value[:-1], *({*value[-1:]} - {EITHER})} <= {*AXES, ONE}),
        f"lists of {', '.join(AXES)} and {ONE}, and {EITHER} at the end",
    ),
}
_AXIS_KEYS: _Keys = {
    **dict.fromkeys(("count", "unit"), (_is_expression, "an expression")),
    **dict.fromkeys(("replicate", "pad"), (_is(bool), "true or false")),
    "group": (_is(str), "the name of an axis"),
}


def _check_keys(data: Mapping[str, Any], known: _Keys, needed: set[str], where: str = "") -> None:
    if unknown := set(data) - set(known):
        raise _InvalidRules(f"{where}unknown keys: {', '.join(sorted(unknown))}")
    if missing := needed - set(data):
        raise _InvalidRules(f"{where}missing keys: {', '.join(sorted(missing))}")
    for key, value in data.items():
        if not known[key][0](value):
            raise _InvalidRules(f"{where}{key} must be {known[key][1]}")


def parse_architecture(text: str, path: str) -> Architecture:
    """Parse an architecture file. UsageError for anything wrong in it, an unknown key included."""
    try:
        data = tomllib.loads(text)
        _check_tables(data)
        named: dict[str, str] = {}
        for name, condition in data.get("conditions", {}).items():
            named[name] = f"({_spelled_out(condition, named)})"
        data["axes"] = {name: _spelled_out_axis(axis, named) for name, axis in data["axes"].items()}
        rules = tuple(_rule(key, patterns, data["axes"], named) for key, patterns in data["rules"].items())
        biases, float32 = (_conditional(data.get(key, {}), named) for key in ("biases", "float32"))
        dims = {pattern: tuple(axes) for pattern, axes in data.get("dims", {}).items()}
        for copy, layer in data.get("copies", {}).items():
            rules += tuple(_copied_rule(rule, layer, copy) for rule in rules)
            biases, float32 = (tuple(_copied_names(each, layer, copy) for each in said) for said in (biases, float32))
            dims |= {pattern: dims[old] for old in dims for pattern in _copied([old], layer, copy)}
        _check_expressions(data, rules, (*named.values(), *(each.condition for each in (*biases, *float32))))
        _check_patterns(data, rules)
    except (tomllib.TOMLDecodeError, RecursionError, expression.ExpressionError, _InvalidRules) as error:
        hint = "see `tpshard archs show llama` for the form"
        raise UsageError(f"bad rules file: {error}", path=path, hint=hint) from None
    return Architecture(
        name=Path(path).stem,
        text=text,
        model_types=tuple(data["model_types"]),
        prefix=data.get("prefix", ""),
        other_prefixes=tuple(data.get("other_prefixes", ())),
        layers=str(data["layers"]),
        before=() if data.get("one_stage") else (*data.get("before", ()), *data.get("tied", {}).values()),
        tied=data.get("tied", {}),
        defaults=data.get("defaults", {}),
        axes=data["axes"],
        rules=rules,
        dims=dims,
        extra_layers=str(data["extra_layers"]) if "extra_layers" in data else None,
        experts=str(data["experts"]) if "experts" in data else None,
        found=data.get("found", {}),
        biases=biases if "biases" in data else None,
        float32=float32,
    )


class _InvalidRules(Exception):
    """Says what is wrong with a rules file."""


def _check_tables(data: Mapping[str, Any]) -> None:
    _check_keys(data, _TOP_KEYS, {"model_types", "layers", "axes", "rules"})
    for name, axis in data["axes"].items():
        _check_keys(axis, _AXIS_KEYS, {"count"}, f"axis {name}: ")
        if (group := axis.get("group", name)) not in data["axes"] or "group" in data["axes"][group]:
            raise _InvalidRules(f"axis {name}: group {group!r} is not an axis, or has a group itself")


def _rule(key: str, patterns: Sequence[str], axes: Collection[str], named: Mapping[str, str]) -> Rule:
    """Parse a rule's key, such as `column heads kv kv / kv if not old`."""
    head, _, condition = key.partition(" if ")
    head, each, rest = head.partition(f" {_EACH_EXPERT}")
    if rest.strip():
        raise _InvalidRules(f"rule {key!r}: nothing stands between `{_EACH_EXPERT}` and a condition")
    words, _, interleave = head.partition("/")
    kind, *segments = words.split()
    interleave = interleave.strip()
    if kind not in ("column", "row", "replicate", "buffer") or (kind in SPLIT_AXIS) != bool(segments):
        raise _InvalidRules(f"rule {key!r}: expected `column AXIS…`, `row AXIS…`, `replicate` or `buffer`")
    for axis in [*segments, *([interleave] if interleave else [])]:
        if axis not in axes:
            raise _InvalidRules(f"rule {key!r}: {axis!r} is not an axis")
    condition = _spelled_out(condition.strip(), named)
    return Rule(cast(Kind, kind), tuple(segments), interleave or None, condition or None, tuple(patterns), bool(each))


_EACH_EXPERT = "for each expert"


def _conditional(table: Mapping[str, Sequence[str]], named: Mapping[str, str]) -> tuple[Conditional, ...]:
    """A table that is keyed by conditions."""
    return tuple(Conditional(_spelled_out(key, named), tuple(patterns)) for key, patterns in table.items())


def _copied(patterns: Iterable[str], layer: str, copy: str) -> tuple[str, ...]:
    """Patterns of a layer as those of a copy of it, all of which may match nothing."""
    inside = (pattern.removesuffix("?").removeprefix(layer) for pattern in patterns if pattern.startswith(f"{layer}."))
    return tuple(f"{copy}{rest}?" for rest in inside)


def _copied_rule(rule: Rule, layer: str, copy: str) -> Rule:
    """A rule for the copies of a layer, which are of whatever kind of layer: their tensors say."""
    condition = None if asks_layer(rule.condition) else rule.condition
    return replace(rule, patterns=_copied(rule.patterns, layer, copy), condition=condition)


def _copied_names(said: Conditional, layer: str, copy: str) -> Conditional:
    """What is said of modules, and of these in the copies of a layer."""
    more = (pattern.removesuffix("?") for pattern in _copied(said.patterns, layer, copy))
    return replace(said, patterns=(*said.patterns, *more))


def _check_expressions(data: Mapping[str, Any], rules: Sequence[Rule], conditions: Sequence[str]) -> None:
    """ExpressionError for any expression that does not parse, used or not."""
    for text in [
        *conditions,
        *(str(data[key]) for key in ("layers", "extra_layers", "experts") if key in data),
        *(rule.condition for rule in rules if rule.condition),
        *(str(axis[key]) for axis in data["axes"].values() for key in ("count", "unit") if key in axis),
    ]:
        expression.parse(text)


def _check_patterns(data: Mapping[str, Any], rules: Sequence[Rule]) -> None:
    patterns = [pattern for rule in rules for pattern in rule.patterns]
    said = [pattern for key in ("biases", "float32") for each in data.get(key, {}).values() for pattern in each]
    for pattern in [*patterns, *said, *data.get("dims", {}), *data.get("found", {}).values()]:
        if "**" in pattern.removesuffix("?").split(".")[:-1]:
            raise _InvalidRules(f"pattern {pattern!r}: `**` stands at the end")
        try:
            compile_pattern(pattern.removesuffix("?"))
        except re.error as error:
            raise _InvalidRules(f"pattern {pattern!r}: {error}") from None
        if "experts" not in data and any(rule.each_expert for rule in rules):
            raise _InvalidRules(f"a rule is `{_EACH_EXPERT}`, and no key `experts` says how many there are")
        if "experts" not in data and pattern.removesuffix("?").split(".").count("*") > 1:
            raise _InvalidRules(f"pattern {pattern!r} is of experts, and no key `experts` says how many there are")
    for rule in rules:
        unlayered = [pattern for pattern in rule.patterns if "*" not in pattern.removesuffix("?").split(".")]
        if unlayered and asks_layer(rule.condition):
            what = f"pattern {unlayered[0]!r} has no layer, and its condition {rule.condition!r} asks for one"
            raise _InvalidRules(what)
        for axis in (*rule.axes, *([rule.interleave] if rule.interleave else [])):
            for place, least in (("layer", 1), ("expert", 2)):
                asked = any(place in expression.names(str(data["axes"][axis].get(key, 1))) for key in ("count", "unit"))
                short = [each for each in rule.patterns if each.removesuffix("?").split(".").count("*") < least]
                if asked and short:
                    raise _InvalidRules(f"pattern {short[0]!r} has no {place}, and its axis {axis} asks for one")


_NAME_OR_STRING = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\b(?P<name>[^\W\d]\w*)""")


def _spelled_out(condition: str, named: Mapping[str, str]) -> str:
    """A condition with the names of other conditions replaced by what they stand for."""
    return _NAME_OR_STRING.sub(lambda found: named.get(found["name"], found[0]), condition)


def _spelled_out_axis(axis: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, Any]:
    """An axis whose count and unit are spelled out; its group is the name of an axis, and stays."""
    return {
        key: _spelled_out(each, named) if key != "group" and isinstance(each, str) else each
        for key, each in axis.items()
    }


def asks_layer(condition: str | None) -> bool:
    """Whether a condition depends on the layer, so that its rule may hold in some layers and not in others."""
    return condition is not None and "layer" in expression.names(condition)


def load_architecture(path: Path) -> Architecture:
    """Read one architecture file from disk."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the rules file: {error}", path=path) from None
    return parse_architecture(text, str(path))


def all_builtin() -> list[Architecture]:
    """Every built-in architecture, sorted by name."""
    return list(map(_builtin_file, _builtin_files()))


_builtin_file = cache(load_architecture)  # parsing takes milliseconds, and a reshard asks twice


def _builtin_files() -> list[Path]:
    return sorted(_DIRECTORY.glob("*.toml"), key=lambda path: path.stem)


def builtin_or_none(name: str) -> Architecture | None:
    """A built-in architecture by name or model_type, or None."""
    path = _DIRECTORY / f"{name}.toml"
    if re.fullmatch(r"[\w.-]+", name) and path.is_file():
        return _builtin_file(path)
    # Parsing TOML is slow, so only files that contain the name are parsed.
    for path in _builtin_files():
        if f'"{name}"' in path.read_text(encoding="utf-8") and name in (found := _builtin_file(path)).model_types:
            return found
    return None


def builtin(name: str) -> Architecture:
    """A built-in architecture by name or model_type; UnsupportedError when there is none."""
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


def given_architecture(rules: str | Path) -> tuple[Architecture, bool]:
    """The architecture that --rules gives, and whether it is a built-in one by name, for any model_type.

    A text is a name or model_type where there is such a built-in architecture, else a file; a Path is always a file.
    """
    if isinstance(rules, str) and (architecture := builtin_or_none(rules)):
        return architecture, True
    try:
        return load_architecture(Path(rules)), False
    except UsageError as error:
        if not isinstance(rules, str) or not re.fullmatch(r"\w+", rules) or Path(rules).exists():
            raise
        hint = "`tpshard archs list` names the built-in architectures"
        what = f"no rules file {rules!r}, and no built-in architecture of that name{_closest(rules)}"
        raise UsageError(what, hint=hint) from error


def find_architecture(config: Mapping[str, Any], rules: str | Path | None, config_path: object) -> Architecture:
    """The architecture for a config: the one that is given, else the built-in one for its model_type."""
    model_type = config.get("model_type")
    if rules is not None:
        architecture, by_name = given_architecture(rules)
        if not by_name and model_type not in architecture.model_types:
            what, known = "the rules file is for another architecture", ", ".join(architecture.model_types)
            hint = "of a built-in architecture, --rules takes the name for any model_type"
            raise UsageError(what, path=rules, expected=f"model_types with {model_type!r}", found=known, hint=hint)
        return architecture
    if not isinstance(model_type, str):
        hint = "give rules of your own with --rules FILE"
        raise UnsupportedError("config.json names no model_type", path=config_path, hint=hint)
    return builtin(model_type)
