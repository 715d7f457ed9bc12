"""Formats that pack integers into words of 32 bits: compressed-tensors' pack-quantized, GPTQ and AWQ."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tpshard.errors import DifferentError
from tpshard.verifier.dequantise.bits import awq_stream, stream
from tpshard.verifier.dequantise.module import Quantised


def groups_of(module: Quantised, count: int, size: int | None, held: int) -> Tensor:
    """The group of each of `count` input features among the `held` ones that have scales here; size None: there is one.

    A rank whose scales were cut may have the numbers that its groups have in the source: they are counted from its
    first one then. DifferentError where a feature has no group.
    """
    if not module.has("groups"):
        groups = torch.zeros(count, dtype=torch.long) if size is None else torch.arange(count) // size
    else:
        module.require("groups", (count,))
        groups = module.get("groups").long()
        if count and int(groups.max()) >= held:
            groups = groups - groups.min()
    if count and not 0 <= int(groups.min()) <= int(groups.max()) < held:
        what = f"{module.name} has input features of groups without scales"
        expected, found = f"groups 0 to {held - 1}", f"{int(groups.min())} to {int(groups.max())}"
        raise DifferentError(what, tensor=module.name, expected=expected, found=found)
    return groups


@dataclass(frozen=True)
class Packed:
    """compressed-tensors: (u − zero) · scale[n, group of k], u a row's bit stream; zeros are packed along `out`.

    Symmetric weights have their zero in the middle. group: input features of a scale; None: one for all. columns: the
    input features of the whole weight, of which the last words of a row may hold few.
    """

    bits: int
    group: int | None
    columns: int

    def shape(self, module: Quantised) -> tuple[int, ...]:
        rows, words = module.shape("values")
        if module.has("groups"):
            return rows, module.shape("groups")[0]
        if -(-self.columns * self.bits // 32) == words:
            return rows, self.columns
        return rows, words * 32 // self.bits if self.group is None else self.group * module.shape("scale")[1]

    def rows(self, module: Quantised, start: int, stop: int) -> Tensor:
        count, columns = self.shape(module)
        module.require("values", (count, -(-columns * self.bits // 32)))
        scale = module.rows("scale", start, stop).double().view(stop - start, -1)
        groups = groups_of(module, columns, self.group, scale.shape[1])
        values = stream(module.rows("values", start, stop), self.bits, columns)
        if module.has("zero"):
            module.require("zero", (-(-count * self.bits // 32), scale.shape[1]))
            zeros = stream(module.get("zero").T, self.bits, count).T[start:stop]
            return (values - zeros[:, groups]) * scale[:, groups]
        return (values - (1 << self.bits - 1)) * scale[:, groups]


@dataclass(frozen=True)
class Gptq:
    """(q − zero) · scale of k's group; q is packed along `in`, zeros along `out`, and all lie as [in, out].

    offset: what is added to a stored zero, modulo 2^bits: 1 in GPTQ's first format, 0 in its second.
    """

    bits: int
    group: int | None
    offset: int

    def shape(self, module: Quantised) -> tuple[int, ...]:
        words, rows = module.shape("values")
        return rows, words * 32 // self.bits

    def rows(self, module: Quantised, start: int, stop: int) -> Tensor:
        count, columns = self.shape(module)
        held = module.shape("scale")[0]
        module.require("scale", (held, count))
        module.require("zero", (held, count * self.bits // 32))
        values = stream(module.get("values").T[start:stop], self.bits, columns)
        zeros = (stream(module.get("zero"), self.bits, count)[:, start:stop] + self.offset) % (1 << self.bits)
        scale = module.get("scale")[:, start:stop].double()
        groups = groups_of(module, columns, self.group, held)
        return (values - zeros[groups].T) * scale[groups].T


@dataclass(frozen=True)
class Awq:
    """(q − zero) · scale of k's group; both are packed along `out`, eight in a word, in AWQ's order ("gemm")."""

    group: int | None

    def shape(self, module: Quantised) -> tuple[int, ...]:
        columns, words = module.shape("values")
        return 8 * words, columns

    def rows(self, module: Quantised, start: int, stop: int) -> Tensor:
        count, columns = self.shape(module)
        held = module.shape("scale")[0]
        module.require("scale", (held, count))
        module.require("zero", (held, count // 8))
        first, last = start // 8, -(-stop // 8)
        values, zeros = (
            awq_stream(module.get(role)[:, first:last])[:, start - 8 * first : stop - 8 * first]
            for role in ("values", "zero")
        )
        scale = module.get("scale")[:, start:stop].double()
        groups = groups_of(module, columns, self.group, held)
        return ((values - zeros[groups]) * scale[groups]).T
