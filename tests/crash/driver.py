"""The tpshard command with blocks and flushes of a few bytes, and without threads: its calls come in one order."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from crash.scene import fine_grained  # noqa: E402
from crash.seams import one_thread  # noqa: E402

from tpshard.cli import main  # noqa: E402

with fine_grained(), one_thread():
    main()
