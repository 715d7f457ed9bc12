"""What of a grid of cases runs: `make test` some that together catch the same faults, `make test-all` every one."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
ALL = bool(os.environ.get("TPSHARD_TEST_ALL"))
"""Whether every case of every grid runs."""


def some(every: Iterable[T], chosen: Collection[T]) -> list[T]:
    """Those of a grid that are chosen, in its order; all of it under `make test-all`."""
    cases = list(every)
    strangers = [case for case in chosen if case not in cases]
    assert not strangers, f"chosen, but not of the grid: {strangers}"
    return cases if ALL else [case for case in cases if case in chosen]


def one_in(step: int, cases: Sequence[T]) -> list[T]:
    """Every `step`-th case, from the first on; all under `make test-all`."""
    return list(cases) if ALL else list(cases[::step])


def without(every: Iterable[T], left_out: Collection[T]) -> list[T]:
    """A grid without the cases that say nothing new; a case that is added to it runs. All under `make test-all`."""
    cases = list(every)
    return some(cases, [case for case in cases if case not in left_out])


def in_turn(rows: Sequence[T], columns: Sequence[object]) -> list[tuple[T, object]]:
    """Every row with one of the columns, each in its turn; every row with every column under `make test-all`."""
    grid = [(row, column) for row in rows for column in columns]
    return some(grid, [(row, columns[i % len(columns)]) for i, row in enumerate(rows)])
