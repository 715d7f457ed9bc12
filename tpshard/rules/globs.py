"""Patterns of rules files as regular expressions for the names of tensors."""

import re
from collections.abc import Iterator

from tpshard.rules.quantisation.schemes import SUFFIXES

NUMBER = r"(?:0|[1-9][0-9]*)"  # of a layer or an expert, without leading zeros


def _fixed(component: str) -> Iterator[str]:
    """The parts of a component's expression. What lies between two `*` is taken where it comes first, and for good.

    So time grows with the lengths of pattern and name, and not with a power of them, as in `fnmatch`.
    """
    first, *rest = (
        "".join(piece if piece.startswith("[") else re.escape(piece) for piece in re.split(r"(\[[^]]*\])", fixed))
        for fixed in re.split(r"\*+(?![^\[]*\])", component)
    )
    yield first
    yield from (f"(?>[^.]*?{fixed})" for fixed in rest[:-1])
    yield from (f"[^.]*{fixed}" for fixed in rest[-1:])


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression for the names of all tensors of the modules that a pattern matches.

    `*` and `[..]` match inside one dotted component. A component that is `*` alone is a number and a captured group:
    the layer first, then the expert. `**` at the end is whatever lies below.
    """
    parts = []
    captured = 0
    for component in pattern.split("."):
        if component == "**":
            parts.append(".+")
        elif component == "*" and captured < 2:
            parts.append(rf"({NUMBER})")
            captured += 1
        else:
            parts.append("".join(_fixed(component)))
    suffixes = "|".join(SUFFIXES)
    return re.compile(r"\.".join(parts) + rf"(?:\.(?:{suffixes}))?")
