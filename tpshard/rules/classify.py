"""Classification: which tensor is cut along which dim, in which units.

It evaluates an architecture's rules for one config and gives every tensor of a checkpoint its `Cut`. The number of
ranks plays no part in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import TYPE_CHECKING, Any

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.planning.axes import SPLIT_AXIS, Axis, Cut
from tpshard.planning.experts import Experts
from tpshard.planning.stages import Layers
from tpshard.rules import expression
from tpshard.rules.architecture import EITHER, Architecture, Rule
from tpshard.rules.config_axes import AxesOfConfig
from tpshard.rules.globs import compile_pattern
from tpshard.rules.patterns import Matcher, contradiction, tell_numbers
from tpshard.rules.presence import check_biases, float32_on_purpose
from tpshard.rules.quantisation.schemes import WHOLE, Companion, ratio_of
from tpshard.storage.safetensors import TensorInfo
from tpshard.storage.tensor_names import numbered

if TYPE_CHECKING:
    from fractions import Fraction


@dataclass(frozen=True)
class Classification:
    """An architecture's rules evaluated for one checkpoint: the axes, and every tensor's cut by name.

    tied: module → module. full_names: for tensors whose name lacks the prefix, the name with it. float32: the tensors
    that are float32 on purpose. heads: those of heads of another task than the architecture's.
    layers: under the rules' names.
    """

    axes: Mapping[str, Axis]
    cuts: Mapping[str, Cut]
    tied: Mapping[str, str]
    full_names: Mapping[str, str]
    float32: Collection[str] = ()
    heads: tuple[str, ...] = ()
    layers: Layers | None = None
    experts: Experts | None = None


def classify(
    architecture: Architecture,
    config: Mapping[str, Any],
    tensors: Iterable[TensorInfo],
    names: Mapping[str, str] | None = None,
    quantised: Mapping[str, Companion] | None = None,
) -> Classification:
    """Give every tensor its cut. names: for tensors that the rules know by another name, that name.

    quantised: what the tensors of quantised modules are to these, by name. The axes that such modules are cut along are
    dealt by whole groups, blocks and packs.

    UnsupportedError when a tensor has no rule; CorruptError when the checkpoint lacks a tensor that the architecture
    has in every layer, or when the config's counts contradict a shape.
    """
    tensors, names = tuple(tensors), names or {}
    known = [names.get(tensor.name, tensor.name) for tensor in tensors]
    with _fitting(architecture):
        config = _with_found(architecture, config, known)
        matcher = Matcher(architecture, config, quantised)
        matches = list(map(matcher.match, tensors, known))
        axes_of = AxesOfConfig(architecture, config)
        rules = [axes_of.rule(rule, name) for (rule, *_), name in zip(matches, known, strict=True)]
        axes = axes_of.all()
        cuts: dict[str, Cut] = {}
        known_cuts: dict[tuple[int, int, tuple[int, ...], str], Cut] = {}  # layers are alike
        for tensor, rule, match in zip(tensors, rules, matches, strict=True):
            key = id(rule), id(match), tensor.shape, tensor.dtype
            if key not in known_cuts:
                known_cuts[key] = _cut(tensor, rule, *match[1:], axes, architecture.name)
            cuts[tensor.name] = known_cuts[key]
        matcher.check_complete()
        rule_names = {name: full for full, name in matcher.names.items()}
        heads = tuple(t.name for t, (rule, *_) in zip(tensors, matches, strict=True) if rule is matcher.heads[0].rule)
        told = (name for name, cut in cuts.items() if cut.kind != "buffer" and name not in heads)
        check_biases(architecture, config, map(rule_names.__getitem__, told))
        float32 = float32_on_purpose(architecture, config, tensors, rule_names)
    axes = _with_steps(axes, cuts)
    tied = dict(architecture.tied) if config.get("tie_word_embeddings") else {}
    full_names = {name: full for full, name in matcher.names.items() if full != name}
    layers = Layers(architecture.within(matcher.names), matcher.layers, tuple(dict.fromkeys(architecture.before)))
    return Classification(axes, cuts, tied, full_names, float32, heads, layers, _experts(architecture, config))


def _experts(architecture: Architecture, config: Mapping[str, Any]) -> Experts | None:
    """The routed experts, where the rules count them and the config has some; none that lie in one dim of a tensor."""
    if any(rule.each_expert for rule in architecture.rules):
        return None
    count = expression.count_or_none(architecture.experts, config) if architecture.experts else None
    return Experts(count, *architecture.expert_kinds()) if count else None


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
        found = {name: matcher.find(name, exact=exact)[1] for name in names}
    seen = {each.pattern.text for candidates in found.values() for each in candidates}
    missing = [p.text for p in matcher.patterns if p.required and not p.condition and p.text not in seen]
    return missing, [name for name, candidates in found.items() if not candidates]


def _with_found(architecture: Architecture, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The config, with defaults for keys that it lacks and the keys of [found], which depend on the tensors."""
    config = {**architecture.defaults, **config}
    beginnings = (("", ""), *architecture.beginnings)
    if architecture.found and not tell_numbers(architecture.found.values()):
        names = list(dict.fromkeys(numbered(name)[0] for name in names))
    for key, pattern in architecture.found.items():
        compiled = compile_pattern(pattern)
        begun = (new + name[len(old) :] for name in names for old, new in beginnings if name.startswith(old))
        config[key] = any(map(compiled.fullmatch, begun))
    return config


def _cut(
    tensor: TensorInfo,
    rule: Rule,
    companion: Companion,
    dims: tuple[str, ...] | None,
    axes: Mapping[str, Axis],
    architecture: str,
) -> Cut:
    """The cut of one tensor, from its module's rule: along the dim of the rule's axis, at that axis' ratio.

    A companion that never has the axis is whole on every rank (a row-parallel bias, added once after the sum), and so
    is a scale that is one for the whole of it.
    """
    axis = SPLIT_AXIS.get(rule.kind)
    if axis is None:
        return Cut(rule.kind)
    if companion.whole:
        return Cut("replicate")
    if dims and dims[-1] == EITHER:
        *dims_, one, other, _ = dims
        dims = (*dims_, one, other)
        size, turned = sum(axes[name].count * axes[name].unit for name in rule.axes), (*dims_, other, one)
        if tensor.shape[dims.index(axis)] != size == tensor.shape[turned.index(axis)]:
            dims = turned
    if dims is not None and axis in dims:
        dim = dims.index(axis)
        ratio = _ratio(tensor, companion, axis, dim, rule, axes)
        if ratio == WHOLE:
            return Cut("replicate")
        cut = Cut(rule.kind, dim, rule.axes, rule.interleave, 1 if ratio is None else ratio)
        _check_sum(tensor, cut, axes, architecture, companion)
        return cut
    if dims is not None and (companion.role in ("scale", "other") or not companion.has(axis)):
        return Cut("replicate")
    raise UnsupportedError(
        f"{tensor.name} cannot be split by {rule.kind}: no dim of it is known to be `{axis}`",
        path=tensor.file,
        tensor=tensor.name,
        found=f"shape {list(tensor.shape)}, dims {', '.join(dims or ()) or 'unknown'}",
        hint="name the axis of each of its dims under [dims] in a rules file of your own",
    )


def _ratio(
    tensor: TensorInfo, companion: Companion, axis: str, dim: int, rule: Rule, axes: Mapping[str, Axis]
) -> int | Fraction | None:
    """How many elements of the cut's axes one element of the dim stands for: WHOLE for all, None where none fits."""
    found, segments = tensor.shape[dim], [axes[name] for name in rule.axes]
    expected = sum(each.count * each.unit for each in segments)
    if companion.role == "scale" and len(tensor.shape) == 1 and found == len(segments) != expected:
        return WHOLE  # a scale for each of the modules that are stored as one
    return ratio_of(companion, axis, tensor.dtype, expected, found, segments[0].unit)


def _check_sum(tensor: TensorInfo, cut: Cut, axes: Mapping[str, Axis], architecture: str, companion: Companion) -> None:
    assert cut.dim is not None
    terms = [f"{name} {axes[name].count} x {axes[name].unit}" for name in cut.segments]
    expected = sum(axes[name].count * axes[name].unit for name in cut.segments)
    if cut.ratio != 1:
        expected = -(-expected // cut.ratio)
        terms[-1] += f", {cut.ratio} of them an element"
    elif companion.sizes:
        terms[-1] += f", in groups or blocks of {' or '.join(map(str, companion.sizes))}"
    if tensor.shape[cut.dim] != expected:
        hint = "config.json and the weights are of different models, or these rules do not fit this one"
        raise contradiction(tensor, cut.dim, expected, f"{' + '.join(terms)}, {architecture} rules", hint)
    if cut.interleave and any(axes[name].count % axes[cut.interleave].count for name in cut.segments):
        what = f"{tensor.name}: {' + '.join(terms)} cannot be interleaved per {cut.interleave}"
        multiples = f"counts that are multiples of {axes[cut.interleave].count}"
        raise CorruptError(what, tensor=tensor.name, expected=multiples)


def _with_steps(axes: Mapping[str, Axis], cuts: Mapping[str, Cut]) -> dict[str, Axis]:
    """The axes with the fewest of their units that end where elements of all companions end.

    An axis of which only the whole does (two matrices stored as one, which meet inside a block) has all its units as
    one step. Interleaved segments are dealt by whole repeats, unless each segment of a repeat ends with an element.
    """
    found = dict(axes)
    first = {cut: name for name, cut in reversed(list(cuts.items())) if cut.ratio != 1}
    for cut, tensor in first.items():
        repeats = axes[cut.interleave].count if cut.interleave else 1
        sizes = [axes[name].count // repeats * axes[name].unit for name in cut.segments]
        apart = all(size % cut.ratio == 0 for size in (sizes if cut.interleave else sizes[:-1]))
        for name in cut.segments:
            axis = found[name]
            if apart:
                step = _multiple(axis.unit, cut.ratio)
            elif cut.interleave:
                step = _multiple(sum(sizes), cut.ratio) * (axis.count // repeats)
            else:
                step = axis.count
            if axis.step % step:
                step = min(lcm(axis.step, step), axis.count)
                found[name] = replace(axis, step=step, step_of=tensor)
    return found


def _multiple(unit: int, ratio: int | Fraction) -> int:
    """The fewest units that are a whole number of elements."""
    return ratio.numerator // gcd(unit * ratio.denominator, ratio.numerator)
