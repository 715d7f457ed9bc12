"""Small numbers in larger words: bit streams, nibbles, four-bit floats, powers of two."""

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of a four-bit float, whose highest bit is the sign."""
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""By value, the nibble of a word in which AWQ stores it."""
NAN = 255
"""The one byte of E8M0 that is no power of two."""


def stream(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers [..., count] of the little-end-first bit streams in int32 words [..., n].

    >>> stream(torch.tensor([0b011_010_001]), 3, 3).tolist()
    [1, 2, 3]
    """
    mask = (1 << bits) - 1
    if 32 % bits == 0:  # no number lies in two words
        apart = words.unsqueeze(-1) >> torch.arange(0, 32, bits, dtype=words.dtype)
        return (apart & mask).flatten(-2)[..., :count]
    unsigned = words.long() & 0xFFFFFFFF
    starts = torch.arange(count) * bits
    word, shift = starts // 32, starts % 32
    low = unsigned[..., word] >> shift
    high = unsigned[..., (word + 1).clamp(max=words.shape[-1] - 1)] << (32 - shift)
    return (low | high) & mask


def awq_stream(words: Tensor) -> Tensor:
    """The numbers [..., 8 n] of int32 words [..., n] that hold eight of them each, in AWQ's order."""
    in_words = stream(words, 4, 8 * words.shape[-1]).view(*words.shape, 8)
    return in_words[..., list(AWQ_ORDER)].flatten(-2)


def nibbles(packed: Tensor) -> Tensor:
    """The numbers [..., 2 n] of bytes [..., n] that hold two of them each, the lower half first."""
    unsigned = packed.view(torch.uint8)
    return torch.stack((unsigned & 15, unsigned >> 4), -1).flatten(-2).long()


def e2m1(packed: Tensor) -> Tensor:
    """The four-bit floats [..., 2 n] of bytes [..., n]."""
    return torch.tensor(E2M1, dtype=torch.float64)[nibbles(packed)]


def e8m0(exponents: Tensor) -> Tensor:
    """The powers of two that bytes stand for."""
    unsigned = exponents.view(torch.uint8)
    powers = torch.ldexp(torch.ones(unsigned.shape, dtype=torch.float64), unsigned.long() - 127)
    return torch.where(unsigned == NAN, torch.nan, powers)


def factor(scale: Tensor) -> Tensor:
    """A scale in float64; bytes are exponents."""
    exponent = scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
    return e8m0(scale) if exponent else scale.double()
