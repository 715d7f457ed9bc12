"""How the crash tests make many calls of little work, in one order. Cheap to import: a thousand commands do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tpshard.execute.blocks import flatten
from tpshard.execute.run import Background, Loader
from tpshard.planning.join import Step

SIZES = {
    "tpshard.execute.writer.FLUSH": 2500,
    "tpshard.execute.writer._HASH": 2000,
    "tpshard.execute.writer._READ": 1500,
    "tpshard.execute.blocks.BLOCK": 1200,
}
"""Blocks, flushes and hashes of a few bytes, so that small files have journals with something in them."""


def in_order(
    steps: Sequence[Step],
    loader: Loader,
    action: Callable[..., None],
    *,
    workers: int,
    skip: Callable[[int], bool] = lambda index: False,
    background: Background | None = None,
    on_complete: Callable[[int], None] = lambda complete: None,
) -> None:
    """What `tpshard.execute.run` does, by one thread in one order, so that the n-th call is always the same one."""
    try:
        for index, step in enumerate(steps):
            if not skip(index):
                flat = flatten(step)
                for turn, block in enumerate(flat.blocks()):
                    action(flat, block, loader.load(flat, block), turn)
            on_complete(index + 1)
            while background is not None and background.step(index + 1):
                pass
        assert background is None or background.finished(len(steps))
    finally:
        loader.reader.close()
