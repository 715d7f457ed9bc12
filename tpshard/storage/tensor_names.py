"""Tensors' names that differ in numbers alone: layers are alike, and so are experts.

What follows from a name is worked out for its kind, which is the name with 0 for every number in it.
"""

from functools import lru_cache
from sys import intern


@lru_cache(maxsize=1 << 17)
def numbered(name: str) -> tuple[str, tuple[int, ...]]:
    """A name's kind, and the numbers in it: components of digits without leading zeros.

    >>> numbered("model.layers.3.mlp.experts.17.up_proj.weight")
    ('model.layers.0.mlp.experts.0.up_proj.weight', (3, 17))
    """
    parts = name.split(".")
    numbers = []
    for place, part in enumerate(parts):
        if part.isdecimal() and part.isascii() and (part[0] != "0" or part == "0"):
            numbers.append(int(part))
            parts[place] = "0"
    return intern(".".join(parts)), tuple(numbers)


def with_numbers(kind: str, texts: tuple[object, ...]) -> str:
    """A name of a kind, with other numbers.

    >>> with_numbers("model.layers.0.weight", (3,))
    'model.layers.3.weight'
    """
    following = iter(texts)
    return ".".join(str(next(following)) if part == "0" else part for part in kind.split("."))
