"""The process of vLLM that all tests of the engines ask."""

from collections.abc import Iterator

import pytest

from tests.engines.running import Engine


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One process of vLLM for all tests."""
    started = Engine(tmp_path_factory.mktemp("engine") / "log")
    yield started
    started.end()
