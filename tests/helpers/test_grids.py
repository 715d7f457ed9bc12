"""Grids: the default cases are of the grid and in its order, each row and each column is met, and all is all."""

from __future__ import annotations

import pytest

from tests.helpers import grids


@pytest.fixture(params=[False, True], ids=["some", "all"])
def every(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(grids, "ALL", request.param)
    return bool(request.param)


def test_what_is_chosen_runs_in_the_order_of_the_grid(every: bool) -> None:
    assert grids.some("abcd", {"c", "a"}) == (list("abcd") if every else ["a", "c"])
    assert grids.without("abcd", {"c"}) == (list("abcd") if every else ["a", "b", "d"])


def test_a_case_that_the_grid_lacks_is_refused(every: bool) -> None:
    with pytest.raises(AssertionError, match="not of the grid: \\['e'\\]"):
        grids.some("abcd", {"a", "e"})


def test_one_in_some_is_spread_over_the_grid(every: bool) -> None:
    assert grids.one_in(3, "abcdefg") == (list("abcdefg") if every else ["a", "d", "g"])


def test_each_row_and_each_column_is_met(every: bool) -> None:
    found = grids.in_turn("abcde", (2, 4))
    assert {row for row, _ in found} == set("abcde") and {column for _, column in found} == {2, 4}
    assert len(found) == (10 if every else 5)
