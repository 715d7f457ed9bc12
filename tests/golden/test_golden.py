"""What the commands write is, byte for byte, what was recorded in `small.json`.

After a change that is meant to change it: `python tests/golden/record.py small tests/golden/small.json`, and say in the
commit what changed. How the files are read, `record.py` tells; it also compares two versions on far more.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import making, record

RECORDED = record.read_record(Path(__file__).with_name("small.json"))


@pytest.fixture(autouse=True)
def same_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in record.SURROUNDINGS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", making.small_names())
def test_nothing_that_is_written_changed(name: str, tmp_path: Path) -> None:
    recorded = {case: entry for case, entry in RECORDED.items() if case.startswith(f"{name} / ")}
    found = record.record_small(name, making.write_small(name, tmp_path / name))
    assert recorded and record.differences(recorded, found) == []


def test_every_recorded_case_is_of_a_checkpoint_that_is_made() -> None:
    assert {case.split(" / ")[0] for case in RECORDED} == set(making.small_names())


def test_a_difference_is_told_by_case_and_file() -> None:
    old = {"a / split": {"code": 0, "files": {"x": "1", "y": "2"}}, "b / split": {"code": 0}}
    new = {"a / split": {"code": 0, "files": {"x": "1", "y": "3"}}, "c / split": {"code": 0}}
    assert record.differences(old, new) == [
        'a / split: files y: "2" -> "3"',
        "b / split: only in the old record",
        "c / split: only in the new record",
    ]
