"""The tpshard command with blocks and flushes of a few bytes, and without threads: its calls come in one order."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.crash.fine import SIZES, in_order  # noqa: E402
from tpshard.cli.main import run  # noqa: E402
from tpshard.execute import blocks as lower  # noqa: E402
from tpshard.execute import writer

for name, size in SIZES.items():
    module, _, variable = name.rpartition(".")
    setattr(sys.modules[module], variable, size)
assert lower.BLOCK == SIZES["tpshard.execute.blocks.BLOCK"]
writer.run = in_order

run()
