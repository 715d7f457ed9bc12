"""One module per on-disk format, each a `Format`: which tensors a rank has, and the files that hold them."""

from __future__ import annotations

from importlib import import_module

from tpshard.errors import UsageError
from tpshard.formats.base import Format

FORMATS = ("native", "sglang", "vllm")
"""Names as `--format` takes them; each is a module of this package with a `FORMAT`."""


def format_of(name: str) -> Format:
    """The format of a name; UsageError when there is none. Only the modules that are asked for are imported."""
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}", expected=", ".join(FORMATS), found=name)
    module = import_module(f"tpshard.formats.{name.replace('-', '_')}")
    found: Format = module.FORMAT
    return found
