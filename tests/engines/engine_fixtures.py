"""The two processes of vLLM that all tests of the engines ask; a plugin of pytest."""

from collections.abc import Iterator

import pytest

from tests.engines.running import Generator, Loader, installed


@pytest.fixture(scope="session")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    """The process that loads."""
    started = Loader(tmp_path_factory.mktemp("loader") / "log")
    yield started
    started.end()


@pytest.fixture(scope="session")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    """The process that starts engines."""
    if len(installed()) > 1:
        pytest.skip("the kernels are another version's, so no engine is started")
    started = Generator(tmp_path_factory.mktemp("generator") / "log")
    yield started
    started.end()
