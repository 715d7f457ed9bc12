"""Where an engine's class has modules, which what else a layer has may decide."""

from collections.abc import Collection, Iterator, Sequence

from tpshard.formats.engine_patterns import exchanged, match
from tpshard.formats.engine_tables import EngineFamily
from tpshard.planning.layout import Row
from tpshard.storage.tensor_names import numbered


def with_scales(family: EngineFamily, names: Collection[str]) -> Iterator[str]:
    """The modules that have scales: of the layers that attend among those that tensors are in, and for each of some."""
    elsewhere = {
        layer: place for pattern, place in family.scales_where.items() for layer in _layers(family, names, pattern)
    }
    for layer in family.attending(names) if family.scales else ():
        for pattern in (elsewhere[layer],) if layer in elsewhere else family.scales:
            yield pattern.replace("*", str(layer))
    for pattern, module in family.scaled_by.items():
        ends = (exchanged({pattern: module}, name).split(".") for name in names if match(pattern, name))
        yield from dict.fromkeys(".".join(each[: module.count(".") + 1]) for each in ends)


def in_places(family: EngineFamily, names: Collection[str], rows: Sequence[Row]) -> list[Row]:
    """The rows where the engine's class has them, which what else a layer has may decide. names: of the tensors."""
    for pattern, moved in family.moved_where.items():
        layers = _layers(family, names, pattern)
        rows = [
            row._replace(name=exchanged(moved, row.name)) if family.layer_of(row.name) in layers else row
            for row in rows
        ]
    return [row._replace(name=family.place(row.name)) for row in rows] if family.moved else list(rows)


def _layers(family: EngineFamily, names: Collection[str], pattern: str) -> set[int | None]:
    """The layers that have something that a pattern fits."""
    return {family.layer_of(name) for name in names if match(pattern, numbered(name)[0])}
