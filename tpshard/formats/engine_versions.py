"""The versions of an engine whose names a table knows, and how these were compared with the engine's classes."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

from tpshard.errors import UnsupportedError
from tpshard.formats.engine_tables import Table, load_table

Compared = Literal["run", "read"]
"""By running a version's classes, or by reading them alone."""


def table_of(path: Path, engine: str, version: str | None) -> Table:
    """The table as it is for a version, the first by default; UnsupportedError for one that it does not know."""
    table = load_table(path, version)
    if table.version not in table.versions:
        what = f"the names of {engine} {version} are not known"
        hint = f"names change between versions: split for {engine} {table.versions[0]} and load with that"
        raise UnsupportedError(what, expected=", ".join(table.versions), found=version, hint=hint)
    return table


def versions(path: Path, known: Callable[[Table], Collection[str]]) -> dict[str, dict[str, Compared]]:
    """Of each model_type that is known: the engine's versions, and how they were compared."""
    found: dict[str, dict[str, Compared]] = {}
    for version in load_table(path).versions:
        table = load_table(path, version)
        for each in sorted(set(known(table)) - table.refused_models.keys()):
            found.setdefault(each, {})[version] = "read" if each in table.read else "run"
    return found
