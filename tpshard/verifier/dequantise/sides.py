"""Source and shards of a quantised model, both read as the weights that they make."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from tpshard.errors import DifferentError, UnsupportedError
from tpshard.inputs.checkpoint import read_quantisation
from tpshard.storage.local import Directory
from tpshard.storage.names import CONFIG
from tpshard.verifier.dequantise.find import Recipe, recipes
from tpshard.verifier.dequantise.view import DequantisedWeights, RoundedWeights
from tpshard.verifier.elements import Held, Parameter, Share
from tpshard.verifier.ranks.open import FileWeights, RankSet

_FORMATS = ("native", "dcp", "dcp-hf", "deepseek", "vllm")
"""The formats of which each tensor of a module can be told."""
_COMPUTED = ("F64", "F32", "F16", "BF16")
_UNPLACED = {"vllm": ("shape", "groups")}
"""What formats have no place for, by its role. Without groups, inputs are in the order of their scales."""


def quantised(opened: RankSet, source: FileWeights, config: Mapping[str, Any], path: Path) -> dict[str, Recipe]:
    """The quantised weights of a source. UnsupportedError for shards in a format that holds no such modules."""
    directory = path if path.is_dir() else path.parent
    found = recipes(source, read_quantisation(config, directory / CONFIG, Directory(directory)) or {})
    if found and opened.format not in _FORMATS:
        hint = "`tpshard verify --tier bytes` compares them; `tpshard reshard --format native` makes what it runs"
        what = f"verify does not dequantise sets in the format {opened.format}"
        raise UnsupportedError(what, path=opened.directory, expected=", ".join(_FORMATS), hint=hint)
    return found


def dequantised(
    opened: RankSet, source: FileWeights, found: Mapping[str, Recipe]
) -> tuple[RankSet, DequantisedWeights]:
    """Shards and source, both read as the weights that they make.

    How a module is quantised is known from the source; what a rank has of it, from the rank's own files alone.
    """
    unplaced = _UNPLACED.get(opened.format, ())
    whole = DequantisedWeights(source, found, FileWeights(source.infos.values()))
    ranks = [
        DequantisedWeights(_multiplied(found, rank, whole), _held(found, rank, unplaced), rank) for rank in opened.ranks
    ]
    for number, rank in enumerate(ranks):
        _require_shapes(number, rank, whole)
    return replace(opened, ranks=tuple(ranks), stored=opened.stored or opened.ranks), whole


def _held(found: Mapping[str, Recipe], rank: FileWeights, unplaced: Collection[str]) -> dict[str, Recipe]:
    """Those of the source's weights that a rank has values of, without what it need not have and has not."""
    held = {}
    for name, recipe in found.items():
        if recipe.stored["values"] in rank.names() and not _is_plain(rank, recipe):
            stored = {r: each for r, each in recipe.stored.items() if r not in unplaced or each in rank.names()}
            held[name] = replace(recipe, stored=stored)
    return held


def _multiplied(found: Mapping[str, Recipe], rank: FileWeights, source: DequantisedWeights) -> FileWeights:
    """A rank's tensors, with those that an engine holds multiplied by their scales as the source makes them."""
    plain = {name for name, recipe in found.items() if name in rank.names() and _is_plain(rank, recipe)}
    return RoundedWeights(rank, plain, source) if plain else rank


def _is_plain(rank: FileWeights, recipe: Recipe) -> bool:
    """Whether a rank has the weight itself in place of the values that make it."""
    return rank.infos[recipe.stored["values"]].dtype in _COMPUTED


def _require_shapes(number: int, rank: DequantisedWeights, source: DequantisedWeights) -> None:
    """DifferentError where the shape that a rank states of a weight is neither the source's nor that of its own."""
    for name, recipe in rank.recipes.items():
        stated = recipe.stored.get("shape")
        if stated is None:
            continue
        found = rank.module(name).get("shape").tolist()
        if found not in (whole := list(source.shape(name)), mine := list(rank.shape(name))):
            what, expected = f"{stated} of rank {number} states another shape", f"{whole} or {mine}"
            raise DifferentError(what, tensor=stated, expected=expected, found=found)


def stored(parameter: Parameter) -> Iterator[Parameter]:
    """The tensors that make a quantised weight, as they are stored; none of another parameter.

    Left out is what a rank may say in two ways (the groups, and the shape), which the weight itself is held to.
    """
    sides = [parameter.source, *parameter.ranks]
    held = [each for each in sides if isinstance(each, Held) and isinstance(each.weights, DequantisedWeights)]
    views = [each.weights for each in held if isinstance(each.weights, DequantisedWeights)]
    if len(held) < len(sides) or not all(each.name in view.recipes for each, view in zip(held, views, strict=True)):
        return
    for role, name in views[0].recipes[held[0].name].stored.items():
        if role not in ("groups", "shape"):
            source, *ranks = (Held(view.companions, name) for view in views)
            yield _cut_like(parameter, Parameter(name, source, ranks, padded=parameter.padded))


def _cut_like(weight: Parameter, companion: Parameter) -> Parameter:
    """A companion of a weight that is cut where the weight is: at the same fractions of the whole.

    Of a stack, ranks have it of the same experts; one number for all of them every rank has.
    """
    if weight.groups and companion.source.shape[:1] == weight.source.shape[:1]:
        orders = [(part.order, ranks) for part, ranks in weight.groups if isinstance(part, Share)]
        groups = [(Share(companion.source, 0, order), ranks) for order, ranks in orders]
        return replace(companion, groups=groups, known=weight.known)
    if weight.starts is None or weight.dim is None or companion.dim is None:
        return replace(companion, known=weight.known and weight.orders is None)
    whole, total = weight.source.shape[weight.dim], companion.source.shape[companion.dim]
    starts = [Fraction(start * total, whole) for start in weight.starts]
    if all(start.denominator == 1 for start in starts):
        return replace(companion, starts=list(map(int, starts)), known=weight.known)
    return replace(companion, known=False)
