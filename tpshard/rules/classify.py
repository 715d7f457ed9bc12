"""Classification: which tensor is cut along which dim, in which units.

It evaluates an architecture's rules for one config and gives every tensor of a checkpoint its `Cut`. The number of
ranks plays no part in it.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.planning.axes import SPLIT_AXIS, Axis, Cut
from tpshard.rules import expression
from tpshard.rules.architecture import Architecture, Rule, compile_pattern
from tpshard.rules.patterns import Matcher, contradiction
from tpshard.rules.presence import check_biases, float32_on_purpose
from tpshard.rules.quantisation.schemes import Companion
from tpshard.storage.safetensors import TensorInfo


@dataclass(frozen=True)
class Classification:
    """An architecture's rules evaluated for one checkpoint: the axes, and every tensor's cut by name.

    tied: module → module. full_names: for tensors whose name lacks the prefix, the name with it. float32: the tensors
    that are float32 on purpose.
    """

    axes: Mapping[str, Axis]
    cuts: Mapping[str, Cut]
    tied: Mapping[str, str]
    full_names: Mapping[str, str]
    float32: Collection[str] = ()


def classify(
    architecture: Architecture,
    config: Mapping[str, Any],
    tensors: Iterable[TensorInfo],
    names: Mapping[str, str] | None = None,
) -> Classification:
    """Give every tensor its cut. names: for tensors that the rules know by another name, that name.

    UnsupportedError when a tensor has no rule; CorruptError when the checkpoint lacks a tensor that the architecture
    has in every layer, or when the config's counts contradict a shape.
    """
    tensors, names = tuple(tensors), names or {}
    known = [names.get(tensor.name, tensor.name) for tensor in tensors]
    with _fitting(architecture):
        config = _with_found(architecture, config, known)
        matcher = Matcher(architecture, config)
        matches = list(map(matcher.match, tensors, known))
        used = {name for p in matcher.patterns if p.seen for name in (*p.rule.axes, p.rule.interleave) if name}
        used |= {group for name in used if (group := architecture.axes[name].get("group"))}
        axes = {name: _axis(name, data, config) for name, data in architecture.axes.items() if name in used}
        cuts: dict[str, Cut] = {}
        for tensor, match in zip(tensors, matches, strict=True):
            cuts[tensor.name] = _cut(tensor, *match)
            _check_sum(tensor, cuts[tensor.name], axes, architecture.name)
        matcher.check_complete()
        rule_names = {name: full for full, name in matcher.names.items()}
        check_biases(architecture, config, (rule_names[name] for name, cut in cuts.items() if cut.kind != "buffer"))
        float32 = float32_on_purpose(architecture, config, tensors, rule_names)
    tied = dict(architecture.tied) if config.get("tie_word_embeddings") else {}
    full_names = {name: full for full, name in matcher.names.items() if full != name}
    return Classification(axes=axes, cuts=cuts, tied=tied, full_names=full_names, float32=float32)


@contextmanager
def _fitting(architecture: Architecture) -> Iterator[None]:
    """CorruptError where an expression has no value for the config."""
    try:
        yield
    except expression.ExpressionError as error:
        raise CorruptError(f"the config does not fit the {architecture.name} rules: {error}") from None


def recognise(
    architecture: Architecture, config: Mapping[str, Any], names: Iterable[str], exact: bool = False
) -> tuple[list[str], list[str]]:
    """From names alone, the required patterns that match none of `names`, and the names that have no rule.

    exact: names must have the prefix that a checkpoint may omit.
    """
    names = tuple(names)
    with _fitting(architecture):
        matcher = Matcher(architecture, _with_found(architecture, config, names))
        found = {name: matcher.find(name, "" if exact else architecture.prefix)[1] for name in names}
    seen = {pattern.text for candidates in found.values() for pattern, _, _ in candidates}
    missing = [p.text for p in matcher.patterns if p.required and not p.condition and p.text not in seen]
    return missing, [name for name, candidates in found.items() if not candidates]


def _with_found(architecture: Architecture, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The config, with defaults for keys that it lacks and the keys of [found], which depend on the tensors."""
    config = {**architecture.defaults, **config}
    for key, pattern in architecture.found.items():
        compiled = compile_pattern(pattern)
        config[key] = any(compiled.fullmatch(full) for name in names for full in (name, architecture.prefix + name))
    return config


def _axis(name: str, data: Mapping[str, Any], config: Mapping[str, Any]) -> Axis:
    count, unit = (expression.evaluate_count(str(data.get(key, 1)), config) for key in ("count", "unit"))
    return Axis(name, count, unit, data.get("replicate", False), data.get("pad", False), data.get("group"))


def _cut(tensor: TensorInfo, rule: Rule, companion: Companion, dims: tuple[str, ...]) -> Cut:
    """The cut of one tensor, from its module's rule: along the dim of the rule's axis, at that axis' ratio.

    A companion that never has the axis is whole on every rank (a row-parallel bias, added once after the sum).
    """
    axis = SPLIT_AXIS.get(rule.kind)
    if axis is None:
        return Cut(rule.kind)
    if axis in dims:
        return Cut(rule.kind, dims.index(axis), rule.axes, rule.interleave, companion.ratio.get(axis, 1))
    if dims and not companion.has(axis):
        return Cut("replicate")
    raise UnsupportedError(
        f"{tensor.name} cannot be split by {rule.kind}: no dim of it is known to be `{axis}`",
        path=tensor.file,
        tensor=tensor.name,
        found=f"shape {list(tensor.shape)}, dims {', '.join(dims) or 'unknown'}",
        hint="name the axis of each of its dims under [dims] in a rules file of your own",
    )


def _check_sum(tensor: TensorInfo, cut: Cut, axes: Mapping[str, Axis], architecture: str) -> None:
    if cut.dim is None:
        return
    terms = [f"{name} {axes[name].count} x {axes[name].unit}" for name in cut.segments]
    expected = sum(axes[name].count * axes[name].unit for name in cut.segments)
    if cut.ratio != 1:
        expected = -(-expected // cut.ratio)
        terms[-1] += f", {cut.ratio} of them an element"
    if tensor.shape[cut.dim] != expected:
        hint = "config.json and the weights are of different models, or these rules do not fit this one"
        raise contradiction(tensor, cut.dim, expected, f"{' + '.join(terms)}, {architecture} rules", hint)
    if cut.interleave and any(axes[name].count % axes[cut.interleave].count for name in cut.segments):
        what = f"{tensor.name}: {' + '.join(terms)} cannot be interleaved per {cut.interleave}"
        multiples = f"counts that are multiples of {axes[cut.interleave].count}"
        raise CorruptError(what, tensor=tensor.name, expected=multiples)
