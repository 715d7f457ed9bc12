"""What an engine stores of a tensor that is a function of its numbers."""

from __future__ import annotations

import pytest
import torch

from tpshard.execute.functions import BlockScales, computed
from tpshard.planning.layout import SCALED

KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
NUMBERS = [0.0, -0.0, 1.0, -3.25, 2.7725887, 88.5, 88.72, 89.0, 800.0, -200.0, float("inf"), float("-inf")]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_minus_the_exponential(dtype: str) -> None:
    numbers = torch.cat((torch.tensor(NUMBERS, dtype=torch.float64), torch.linspace(-5, 5, 101, dtype=torch.float64)))
    stored = numbers.to(KINDS[dtype])
    block = memoryview(stored.view(torch.uint8).numpy().tobytes())
    found = torch.frombuffer(bytearray(computed("-exp", block, dtype, "F32")), dtype=torch.float32)
    assert torch.equal(found, -stored.double().exp().float())


@pytest.mark.parametrize("factor", [(256 / 48) ** 0.5, 12.0**0.5, 1 / 3])
@pytest.mark.parametrize(("dtype", "result"), [(a, b) for a in KINDS for b in ("BF16", "F16", "F32", "F64")])
def test_the_product_with_a_number(dtype: str, result: str, factor: float) -> None:
    """As torch rounds to the dtype that is stored, and then multiplies in it."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.cat((torch.tensor(NUMBERS, dtype=torch.float64), torch.randn(999, generator=generator).double()))
    stored = numbers.to(KINDS[dtype])
    block = memoryview(stored.view(torch.uint8).numpy().tobytes())
    found = bytearray(computed(f"* {factor!r}", block, dtype, result))
    assert torch.equal(torch.frombuffer(found, dtype=KINDS[result]), stored.to(KINDS[result]) * factor)


def test_what_is_no_number_stays_none() -> None:
    block = memoryview(torch.tensor([float("nan"), 0.0]).numpy().tobytes())
    found = torch.frombuffer(bytearray(computed("-exp", block, "F32", "F32")), dtype=torch.float32)
    assert found[0].isnan() and found[1] == -1.0


@pytest.mark.parametrize(("shape", "grid"), [((128, 256), (1, 2)), ((256, 384), (2, 3)), ((64, 256), (1, 2))])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_blocks_times_their_scales(shape: tuple[int, int], grid: tuple[int, int], scales: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    scale = (torch.rand(grid, generator=generator) * 10.0 ** torch.randint(-6, 3, grid, generator=generator)).to(scales)
    height, width = (a // b for a, b in zip(shape, grid, strict=True))
    wide = scale.float().repeat_interleave(height, 0).repeat_interleave(width, 1)
    expected = (weight.float() * wide).bfloat16()
    numbers = memoryview(scale.view(torch.uint8).numpy().tobytes())
    for rows in ((0, shape[0]), (3, 60)):
        block = (rows, (5, shape[1] - 7))
        stored = memoryview(weight.view(torch.uint8)[rows[0] : rows[1], 5 : shape[1] - 7].numpy().tobytes())
        kind = "F32" if scales == torch.float32 else "BF16"
        scaling = BlockScales(shape, grid, numbers, kind, shape, block)
        found = computed(SCALED, stored, "F8_E4M3", "BF16", scaling)
        held = torch.frombuffer(bytearray(found), dtype=torch.bfloat16).view(rows[1] - rows[0], -1)
        there = expected[rows[0] : rows[1], 5 : shape[1] - 7]
        numbers_there = ~there.isnan()  # what is no number has many forms
        assert torch.equal(held.isnan(), there.isnan())
        assert torch.equal(held.view(torch.int16)[numbers_there], there.view(torch.int16)[numbers_there])


def test_what_has_no_scales_stays() -> None:
    block = memoryview(torch.randn(8).bfloat16().view(torch.uint8).numpy().tobytes())
    assert computed(SCALED, block, "BF16", "BF16") == block
