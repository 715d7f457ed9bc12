"""Functions of numbers, of which an engine stores the results.

Each result is the float32 nearest to the true one, the same on every host; an engine's own may be the one beside it.
"""

import math
import struct
import sys
from array import array
from collections.abc import Sequence

from tpshard.planning.layout import FUNCTIONS

_BEYOND = math.log(struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]) + 1e-7
"""What exp makes infinite in float32."""


def computed(function: str, block: memoryview, dtype: str) -> memoryview:
    """A block of a tensor as what the function makes of it, in F32. Shape [n] → [n]."""
    assert function in FUNCTIONS
    results = array("f", [-math.inf if x > _BEYOND else -math.exp(x) for x in _numbers(block, dtype)])
    if sys.byteorder == "big":
        results.byteswap()
    return memoryview(results).cast("B")


def _numbers(block: memoryview, dtype: str) -> Sequence[float]:
    if dtype == "BF16":  # the upper half of a float32
        wide = bytearray(2 * len(block))
        wide[2::4], wide[3::4] = block[::2], block[1::2]
        return struct.unpack(f"<{len(block) // 2}f", wide)
    letter, size = {"F16": ("e", 2), "F32": ("f", 4), "F64": ("d", 8)}[dtype]
    return struct.unpack(f"<{len(block) // size}{letter}", block)
