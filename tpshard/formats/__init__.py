"""One module per on-disk format, each a `Format`: which tensors a rank has, and the files that hold them."""

from importlib import import_module

from tpshard.errors import UsageError
from tpshard.formats.base import Format

FORMATS = ("native", "vllm", "vllm-speculator", "sglang", "meta", "deepseek", "dcp", "dcp-hf", "megatron", "hf")
"""Names as `--format` takes them; each is a module of this package with a `FORMAT`."""
DEFAULT_FORMAT = FORMATS[0]


def format_of(name: str) -> Format:
    """The format of a name; UsageError when there is none. Only the modules that are asked for are imported."""
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}", expected=", ".join(FORMATS), found=name)
    module = import_module(f"tpshard.formats.{name.replace('-', '_')}")
    found: Format = module.FORMAT
    return found


def writes(name: str) -> bool:
    """Whether any format gives its files such a name."""
    formats = map(format_of, FORMATS)
    return any(each.parse_name(name) is not None or name in each.side_names for each in formats)
