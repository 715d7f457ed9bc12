"""tpshard: cut a checkpoint for tensor parallelism, put it back together, and prove that both are right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tpshard.api import check, inspect, merge, plan, reshard, split
    from tpshard.loader import load_rank
    from tpshard.verifying import verify

__all__ = ["__version__", "check", "inspect", "load_rank", "merge", "plan", "reshard", "split", "verify"]


def __getattr__(name: str) -> Any:
    """Import verbs on first use: `import tpshard` itself costs nothing, and only load_rank imports torch."""
    import importlib

    if name == "verify":  # also a package, which can be called (see there): importing it puts it here
        return importlib.import_module("tpshard.verify")
    if name in __all__:
        return getattr(importlib.import_module("tpshard.loader" if name == "load_rank" else "tpshard.api"), name)
    raise AttributeError(f"module 'tpshard' has no attribute {name!r}")
