"""Patterns of an engine's table: a pattern fits a tensor, or a module and all in it.

`*` is one component of a name, and so are those that stand for experts. `shard_#` is one with a number at its end.
"""

import re
from collections.abc import Mapping
from functools import lru_cache

STACK, BEHIND = "#", "##"
"""The component of a pattern that stands for every expert of a layer, and for those behind the first ones."""


def exchanged(patterns: Mapping[str, str], name: str) -> str:
    """A name with what the longest fitting pattern says in place of what it fits; the same name where none does."""
    found = max((p for p in patterns if match(p, name)), key=lambda p: p.count("."), default=None)
    return name if found is None else renamed(found, name, patterns[found])


def match(pattern: str, name: str) -> bool:
    """Whether a pattern fits a tensor's name."""
    return _compile(pattern).fullmatch(name) is not None


def renamed(pattern: str, name: str, target: str) -> str:
    """The name that a target with the `*` of a pattern has for one that the pattern fits.

    What follows in the name stays; a target that ends with `_` takes it without the dot.
    """
    stars, _, length = stars_of(pattern)
    parts = name.split(".")
    values = iter([parts[place] for place in stars])
    begun = ".".join(next(values) if part == "*" else part for part in target.split("."))
    rest = ".".join(("", *parts[length:]))
    return begun + (rest.removeprefix(".") if target.endswith("_") else rest)


@lru_cache(maxsize=4096)
def stars_of(pattern: str) -> tuple[tuple[int, ...], int | None, int]:
    """Which components of a pattern are `*`, which one stands for experts, and how many there are."""
    parts = pattern.split(".")
    stars = tuple(place for place, part in enumerate(parts) if part == "*")
    stacks = [place for place, part in enumerate(parts) if part in (STACK, BEHIND)]
    return stars, stacks[0] if stacks else None, len(parts)


def number_in(pattern: str, name: str) -> int | None:
    """The number of a part that a pattern with such a component fits; None of other patterns."""
    found = _compile(pattern).fullmatch(name)
    return int(found[1]) if found is not None and found.groups() else None


def fits_any(patterns: tuple[str, ...], name: str) -> bool:
    """Whether one of the patterns fits a tensor's name."""
    return any(match(pattern, name) for pattern in patterns)


@lru_cache(maxsize=4096)
def _compile(pattern: str) -> re.Pattern[str]:
    parts = []
    for part in pattern.split("."):
        if part == "*":
            parts.append(r"[^.]+")
        elif part in (STACK, BEHIND):
            parts.append(r"\d+")
        else:
            assert "*" not in part, f"{pattern}: a star is a whole component"
            begun, number = (part[:-1], r"(\d+)") if part.endswith(STACK) else (part, "")
            plain = "".join(p if p.startswith("[") else re.escape(p) for p in re.split(r"(\[[^]]*\])", begun))
            parts.append(plain + number)
    return re.compile(r"\.".join(parts) + r"(?:\..+)?")
