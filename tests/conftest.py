"""What all tests share: hypothesis' profile, one thread for torch, and checkpoints that are made once."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers import warm as server
from tests.helpers.checkpoints import make, published
from tests.helpers.grids import ALL
from tpshard.execute.publish import Settings

# Before anything imports torch: small models are not worth its threads, and sums then have one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# TPSHARD_FUZZ=5000 looks at so many random examples, other ones in every run; else the same few each time.
FUZZ = int(os.environ.get("TPSHARD_FUZZ", "0"))
settings.register_profile(
    "tpshard",
    max_examples=FUZZ or (50 if ALL else 20),
    derandomize=not FUZZ,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tpshard")

Get = Callable[..., Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """The directory of a variant of `checkpoints`, made once; with keywords, rewritten as `published` does.

    Read-only: tests that change a checkpoint copy it. The workers of pytest-xdist share one cache.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "checkpoints"
    root.mkdir(exist_ok=True)

    def get(name: str, **rewrite: bool) -> Path:
        path = root / "+".join([name, *sorted(key for key, wanted in rewrite.items() if wanted)])
        if not path.exists():
            new = tmp_path_factory.mktemp("making") / path.name
            if rewrite:
                published(get(name), new, **rewrite)
            else:
                make(name, new)
            try:
                new.rename(path)
            except OSError:  # another worker was first
                shutil.rmtree(new)
        return path

    return get


@pytest.fixture(scope="session")
def quick() -> Settings:
    """Settings for outputs that need not survive a crash."""
    return Settings(workers=2, fsync=False)


@pytest.fixture(scope="session")
def warm() -> Iterator[Path]:
    """The folder of a `python` and a `tpshard` that start with torch imported; see `tests.helpers.warm`."""
    with server.start() as folder:
        yield folder


@pytest.fixture
def warm_processes(warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What starts Python in a process of its own starts one that has imported torch."""
    monkeypatch.setattr(sys, "executable", str(warm / "python"))
