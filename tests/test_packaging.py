"""What a wheel and an sdist must hold; `make dist` builds both and tries them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path, PurePath

from tpshard import __version__

ROOT = Path(__file__).parent.parent
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_file_of_the_package_is_in_the_wheel() -> None:
    data = SETUP["tool"]["setuptools"]["package-data"]
    files = [path for path in (ROOT / "tpshard").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len([path for path in files if path.suffix == ".toml"]) > 40
    for path in files:
        package = ".".join(path.relative_to(ROOT).parent.parts)
        packed = path.suffix == ".py" or any(PurePath(path.name).match(each) for each in data.get(package, ()))
        assert packed, f"{path.relative_to(ROOT)} is not in the wheel"


def test_the_version_is_the_same_everywhere() -> None:
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (Unreleased|" + re.escape(__version__) + ")", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and len(text) > 11_000
    assert SETUP["project"]["license"] == "Apache-2.0"
