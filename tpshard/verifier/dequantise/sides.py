"""Source and shards of a quantised model, both read as the weights that they make."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tpshard.errors import DifferentError, UnsupportedError
from tpshard.inputs.checkpoint import read_quantisation
from tpshard.storage.local import Directory
from tpshard.storage.names import CONFIG
from tpshard.verifier.dequantise.find import Recipe, recipes
from tpshard.verifier.dequantise.view import DequantisedWeights
from tpshard.verifier.ranks.open import FileWeights, RankSet


def dequantised(
    opened: RankSet, source: FileWeights, config: Mapping[str, Any], path: Path
) -> tuple[RankSet, FileWeights]:
    """Shards and source, both as they were given where nothing is quantised.

    How a module is quantised is read off the source; what a rank has of it, off the rank's own files alone.
    UnsupportedError for shards in a format in which the modules have other names.
    """
    directory = path if path.is_dir() else path.parent
    found = recipes(source, read_quantisation(config, directory / CONFIG, Directory(directory)) or {})
    if not found:
        return opened, source
    if opened.format != "native":
        hint = "`tpshard verify --tier bytes` compares them; `tpshard reshard --format native` makes what it runs"
        what = f"verify does not dequantise sets in the format {opened.format}"
        raise UnsupportedError(what, path=opened.directory, expected="the format native", hint=hint)
    ranks = [DequantisedWeights(rank, _held(found, rank)) for rank in opened.ranks]
    for number, (rank, files) in enumerate(zip(ranks, opened.ranks, strict=True)):
        _require_shapes(number, rank, files, found, source)
    return replace(opened, ranks=tuple(ranks), stored=opened.ranks), DequantisedWeights(source, found)


def _held(found: Mapping[str, Recipe], rank: FileWeights) -> dict[str, Recipe]:
    """Those of the source's weights that a rank has values of."""
    return {name: recipe for name, recipe in found.items() if recipe.stored["values"] in rank.names()}


def _require_shapes(
    number: int, rank: DequantisedWeights, files: FileWeights, found: Mapping[str, Recipe], source: FileWeights
) -> None:
    """DifferentError where the shape that a rank states of a weight is neither the source's nor that of its own."""
    for name, recipe in rank.recipes.items():
        stated = recipe.stored.get("shape")
        if stated is None or stated not in files.names():
            continue
        mine, whole = files.get(stated).tolist(), source.get(found[name].stored["shape"]).tolist()
        if mine not in (whole, list(rank.shape(name))):
            expected = f"{whole} or {list(rank.shape(name))}"
            raise DifferentError(f"rank {number} states another shape", tensor=stated, expected=expected, found=mine)
