"""Formats whose weight is small values times a grid of scales: FP8, INT8, and all that packs two values in a byte."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tpshard.verifier.dequantise.bits import e2m1, factor, nibbles
from tpshard.verifier.dequantise.module import Quantised

PLAIN, E2M1, INT4, MX_BLOCKS = "plain", "e2m1", "int4", "mx blocks"
"""How values are stored: one an element; two four-bit floats a byte along `in`; two signed integers a byte along `out`
(ModelOpt's W4A8_AWQ); four-bit floats in blocks of 16 bytes, which transformers turns round (gpt-oss)."""


@dataclass(frozen=True)
class Grid:
    """value · scale[n // block[0], k // block[1]], times or divided by one factor for the whole weight.

    block: None along a dim that has one scale for all of it. divides: whether the factor is a divisor.
    The scales of a partial last block are whole.
    """

    block: tuple[int | None, int | None]
    form: str = PLAIN
    divides: bool = False

    def shape(self, module: Quantised) -> tuple[int, ...]:
        logical = self._logical(module)
        return (logical[0], logical[2], logical[1]) if self.form == MX_BLOCKS else logical

    def _logical(self, module: Quantised) -> tuple[int, ...]:
        """[out, in] or [expert, out, in]."""
        held = module.shape("values")
        if self.form == E2M1:
            return (*held[:-1], 2 * held[-1])
        if self.form == INT4:
            return (*held[:-2], 2 * held[-2], held[-1])
        return (*held[:2], held[2] * 2 * held[3]) if self.form == MX_BLOCKS else held

    def rows(self, module: Quantised, start: int, stop: int) -> Tensor:
        shape = self._logical(module)
        module.require("scale", *self._grids(shape))
        values = self._values(module, start, stop)
        if module.has("zero"):
            module.require("zero", module.shape("scale"))
            values = values - self._spread(module, "zero", shape, start, stop)
        weight = values * self._spread(module, "scale", shape, start, stop)
        if module.has("super"):
            one = len(shape) == 3 and module.shape("super") == shape[:1]
            module.require("super", (), (1,), *([shape[:1]] if one else []))
            whole = module.rows("super", start, stop).view(-1, 1, 1) if one else module.get("super").view(())
            weight = weight / whole.double() if self.divides else weight * whole.double()
        if module.has("input"):
            module.require("input", shape[-1:])
            weight = weight * module.get("input").double()
        return weight.mT if self.form == MX_BLOCKS else weight

    def _values(self, module: Quantised, start: int, stop: int) -> Tensor:
        if self.form == INT4:
            last = module.shape("values")[0] if len(module.shape("values")) == 2 else 0
            first, end = (start // 2, min(last, -(-stop // 2))) if last else (start, stop)
            unsigned = nibbles(module.rows("values", first, end).mT).mT
            rows = unsigned[start - 2 * first : stop - 2 * first] if last else unsigned
            return (rows - 16 * (rows > 7)).double()
        held = module.rows("values", start, stop)
        if self.form == PLAIN:
            return held.double()
        return e2m1(held).flatten(2) if self.form == MX_BLOCKS else e2m1(held)

    def _counts(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The scales along out and in."""
        sizes = zip(shape[-2:], self.block, strict=True)
        rows, columns = (1 if block is None else -(-size // block) for size, block in sizes)
        return rows, columns

    def _grids(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes that the scales may have."""
        rows, columns = self._counts(shape)
        experts = shape[:-2]
        grids = [(*experts, rows, columns), (*experts, rows, 1, columns, 1)]
        if columns == 1:
            grids.append((*experts, rows))
        return [*grids, experts, ((1,) if not experts else experts)] if rows == columns == 1 else grids

    def _spread(self, module: Quantised, role: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """A scale, or a zero, for each element of some rows."""
        counts = self._counts(shape)
        rows, columns = (
            torch.zeros(size, dtype=torch.long) if block is None else torch.arange(size) // block
            for size, block in zip(shape[-2:], self.block, strict=True)
        )
        if len(shape) == 3:
            grid = factor(module.rows(role, start, stop)).view(-1, *counts)
            return grid[:, rows][:, :, columns]
        rows = rows[start:stop]
        if counts[0] == 1 or not len(rows):
            return factor(module.get(role)).view(counts)[rows][:, columns]
        first, last = int(rows[0]), int(rows[-1]) + 1
        return factor(module.rows(role, first, last)).view(-1, counts[1])[rows - first][:, columns]
