"""tpshard: cut a checkpoint for tensor parallelism, put it back together, and prove that both are right."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tpshard import errors
    from tpshard.api.advise import advise
    from tpshard.api.check import check
    from tpshard.api.convert import merge, plan, reshard, split
    from tpshard.api.inspect import inspect
    from tpshard.api.load import load_rank
    from tpshard.api.verify import verify
    from tpshard.execute.publish import Settings
    from tpshard.report.capacity import Workload

_MODULES = {
    "Settings": "execute.publish",
    "Workload": "report.capacity",
    "advise": "api.advise",
    "check": "api.check",
    "inspect": "api.inspect",
    "load_rank": "api.load",
    "merge": "api.convert",
    "plan": "api.convert",
    "reshard": "api.convert",
    "split": "api.convert",
    "verify": "api.verify",
}
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


def __getattr__(name: str) -> Any:
    """Import what is public on first use: `import tpshard` itself costs nothing, and only load_rank imports torch."""
    import importlib

    if name == "errors":
        return importlib.import_module("tpshard.errors")
    if name in _MODULES:
        return getattr(importlib.import_module(f"tpshard.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'tpshard' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is public, also before its first use."""
    return sorted({*globals(), *__all__})
