"""The progress bar of the Python functions, drawn by tqdm: a widget in a notebook, a line on stderr elsewhere."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from tpshard.execute.publish import Settings


@contextmanager
def followed(verb: str, settings: Settings | None, progress: bool) -> Iterator[Settings]:
    """The settings to run a verb with; with `progress` a bar in bytes follows it and is closed also after an error."""
    given = settings or Settings()
    if not progress:
        yield given
        return
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    bar: Any = None
    lock = threading.Lock()

    def start(total: int) -> None:
        nonlocal bar
        given.start(total)
        bar = stack.enter_context(tqdm(total=total, desc=verb, unit="B", unit_scale=True))

    def add(count: int) -> None:
        given.progress(count)
        with lock:
            bar.update(count)

    with ExitStack() as stack:
        yield replace(given, start=start, progress=add)
