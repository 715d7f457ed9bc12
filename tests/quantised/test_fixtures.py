"""The fixtures are what the table says: their dtypes and companions, their references and their size together."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.quantised.fixture_table import FIXTURES, HERE, REFERENCES, TABLE, Fixture, markdown, reference_of

LARGEST = 10_000_000
FLOATING = {"BF16", "F16", "F32"}


def dtypes_of(folder: Path) -> dict[str, str]:
    """Each tensor's dtype, from the headers."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        found |= {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return found


def companions(module: str, dtypes: Mapping[str, str]) -> dict[str, str]:
    suffixes = {name.removeprefix(module): dtype for name, dtype in dtypes.items() if name.startswith(module)}
    return {suffix: dtype for suffix, dtype in suffixes.items() if not suffix or suffix[0] in "._"}


@pytest.mark.parametrize("fixture", TABLE, ids=lambda fixture: fixture.name)
def test_a_fixture_holds_the_companions_of_its_row(fixture: Fixture) -> None:
    dtypes = dtypes_of(FIXTURES / fixture.name)
    modules = reference_of(fixture)["modules"]
    found = [companions(module, dtypes) for module in modules]
    kinds = [{suffix: dtype for suffix, dtype in kind.items() if suffix not in fixture.besides} for kind in found]
    assert [kind for kind in kinds if kind not in fixture.kinds] == []
    assert [kind for kind in fixture.kinds if kind not in kinds] == []
    besides = {suffix: {d for name, d in dtypes.items() if name.endswith(suffix)} for suffix in fixture.besides}
    assert besides == {suffix: {dtype} for suffix, dtype in fixture.besides.items()}
    named = {module + suffix for module, kind in zip(modules, found, strict=True) for suffix in kind}
    rest = {name: dtype for name, dtype in dtypes.items() if name not in named}
    assert set(rest.values()) <= FLOATING


def test_the_folders_and_the_readme_are_the_tables() -> None:
    names = [fixture.name for fixture in TABLE]
    assert sorted(names) == sorted(folder.name for folder in FIXTURES.iterdir())
    assert sorted(names) == sorted(file.stem for file in REFERENCES.glob("*.json"))
    assert markdown() in (HERE / "README.md").read_text()


def test_the_fixtures_stay_small() -> None:
    files = [file for folder in (FIXTURES, REFERENCES) for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= LARGEST
    assert {file.name for file in files if file.name.startswith("tokenizer")} == set()
