"""Functions of numbers, of which an engine stores the results.

Of an exponential that is the float32 nearest to the true one, the same on every host; an engine's own may be the one
beside it. Of a product it is the number nearest to the float32 nearest to the true one, as engines have it.
"""

import math
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tpshard.planning.box import Box, Shape
from tpshard.planning.layout import FUNCTIONS, SCALED, TIMES, is_result

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


def computed(
    function: str, block: memoryview, dtype: str, result: str, scales: BlockScales | None = None
) -> memoryview:
    """A block of a tensor in one dtype as what the function makes of it, in the dtype `result`. Shape [n] → [n].

    scales: what SCALED multiplies with; numbers that have none and are in the dtype of the result stay.
    """
    assert is_result(function, result)
    if function == SCALED:
        return _scaled(block, dtype, scales)
    if function.startswith(TIMES):
        return _product(block, dtype, result, float(function.removeprefix(TIMES)))
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
        return memoryview(_bfloat16(values * held[rows // height, columns // width]))


def _product(block: memoryview, dtype: str, result: str, factor: float) -> memoryview:
    """The numbers, rounded to the dtype that the results have, times a number: what torch computes of these."""
    import numpy

    wide = "<f8" if result == "F64" else "<f4"
    with numpy.errstate(all="ignore"):
        numbers = numpy.array(_numbers(block, dtype), "<f8")
        if dtype != result:
            numbers = numpy.array(_numbers(memoryview(_rounded(numbers, result)), result), "<f8")
        return memoryview(_rounded(numbers.astype(wide) * numpy.array(factor, wide), result))


def _rounded(numbers: "NDArray[Any]", dtype: str) -> bytes:
    """The nearest numbers of a dtype."""
    if dtype == "BF16":
        return _bfloat16(numbers)
    stored: bytes = numbers.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()
    return stored


def _bfloat16(numbers: "NDArray[Any]") -> bytes:
    import numpy

    numbers = numbers.astype("<f4")
    bits = numbers.view("<u4")
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # ties to even
    nearest[numpy.isnan(numbers)] = 0x7FC0
    stored: bytes = nearest.astype("<u2").tobytes()
    return stored


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
