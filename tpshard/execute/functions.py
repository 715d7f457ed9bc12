"""Functions of numbers, of which an engine stores the results.

Of an exponential that is the float32 nearest to the true one, the same on every host; an engine's own may be the one
beside it. Of a product it is the bfloat16 nearest to the float32 nearest to the true one, as engines have it.
"""

import math
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tpshard.planning.box import Box, Shape
from tpshard.planning.layout import FUNCTIONS, SCALED

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

_BEYOND = math.log(struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]) + 1e-7
"""What exp makes infinite in float32."""


class BlockScales(NamedTuple):
    """The scales of all of a matrix, and which block of it is looked at.

    of: its shape. shape, numbers, dtype: of the scales. seen: the shape in which `block` sees it, the same elements in
    the same order.
    """

    of: Shape
    shape: Shape
    numbers: memoryview
    dtype: str
    seen: Shape
    block: Box


def computed(function: str, block: memoryview, dtype: str, scales: BlockScales | None = None) -> memoryview:
    """A block of a tensor as what the function makes of it, in the function's dtype. Shape [n] → [n].

    scales: what SCALED multiplies with; numbers that have none and are in the dtype of the result stay.
    """
    assert function in FUNCTIONS
    if function == SCALED:
        return _scaled(block, dtype, scales)
    results = array("f", [-math.inf if x > _BEYOND else -math.exp(x) for x in _numbers(block, dtype)])
    if sys.byteorder == "big":
        results.byteswap()
    return memoryview(results).cast("B")


def _scaled(block: memoryview, dtype: str, scales: BlockScales | None) -> memoryview:
    if scales is None:
        assert dtype == FUNCTIONS[SCALED]
        return block
    import numpy  # its import takes a tenth of a second, and most splits compute nothing

    assert dtype == "F8_E4M3"
    values = _of_fp8()[numpy.frombuffer(block, numpy.uint8)]
    held = numpy.array(_numbers(scales.numbers, scales.dtype), numpy.float32).reshape(scales.shape)
    sides = [numpy.arange(start, stop) for start, stop in scales.block]
    flat = numpy.ravel_multi_index(numpy.ix_(*sides), scales.seen).reshape(-1)
    rows, columns = numpy.divmod(flat, scales.of[1])
    height, width = (size // count for size, count in zip(scales.of, scales.shape, strict=True))
    with numpy.errstate(all="ignore"):
        products = (values * held[rows // height, columns // width]).astype("<f4")
    bits = products.view("<u4")
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # ties to even
    nearest[numpy.isnan(products)] = 0x7FC0
    return memoryview(nearest.astype("<u2").tobytes())


def _of_fp8() -> "NDArray[float32]":
    """The numbers of the 256 bytes of F8_E4M3: four bits of exponent, three of fraction, no infinities."""
    import numpy

    codes = numpy.arange(256)
    exponents, fractions = codes >> 3 & 15, codes & 7
    values = numpy.where(exponents > 0, 8 + fractions, fractions) * 2.0 ** (numpy.maximum(exponents, 1) - 10)
    values[codes & 127 == 127] = numpy.nan
    found: NDArray[float32] = numpy.where(codes & 128, -values, values).astype(numpy.float32)
    return found


def _numbers(block: memoryview, dtype: str) -> Sequence[float]:
    if dtype == "BF16":  # the upper half of a float32
        wide = bytearray(2 * len(block))
        wide[2::4], wide[3::4] = block[::2], block[1::2]
        return struct.unpack(f"<{len(block) // 2}f", wide)
    letter, size = {"F16": ("e", 2), "F32": ("f", 4), "F64": ("d", 8)}[dtype]
    return struct.unpack(f"<{len(block) // size}{letter}", block)
