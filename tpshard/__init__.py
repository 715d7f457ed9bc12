"""tpshard: cut a checkpoint for tensor parallelism, put it back together, and prove that both are right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tpshard import errors
    from tpshard.report.advice import advise
    from tpshard.api.convert import check, inspect, merge, plan, reshard, split
    from tpshard.api.load import load_rank
    from tpshard.report.capacity import Workload
    from tpshard.execute.publish import Settings
    from tpshard.api.verify import verify

__all__ = [
    "Settings",
    "Workload",
    "__version__",
    "advise",
    "check",
    "errors",
    "inspect",
    "load_rank",
    "merge",
    "plan",
    "reshard",
    "split",
    "verify",
]
_ELSEWHERE = {"Settings": "publish", "Workload": "numbers", "advise": "advice", "load_rank": "loader"}


def __getattr__(name: str) -> Any:
    """Import what is public on first use: `import tpshard` itself costs nothing, and only load_rank imports torch."""
    import importlib

    if name in ("errors", "verify"):  # modules; the latter can be called (see there), and importing it puts it here
        return importlib.import_module(f"tpshard.{name}")
    if name in __all__:
        return getattr(importlib.import_module(f"tpshard.{_ELSEWHERE.get(name, 'api')}"), name)
    raise AttributeError(f"module 'tpshard' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is public, also before its first use."""
    return sorted({*globals(), *__all__})
