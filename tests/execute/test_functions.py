"""What an engine stores of a tensor that is a function of its numbers."""

from __future__ import annotations

import pytest
import torch

from tpshard.execute.functions import computed

NUMBERS = [0.0, -0.0, 1.0, -3.25, 2.7725887, 88.5, 88.72, 89.0, 800.0, -200.0, float("inf"), float("-inf")]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_minus_the_exponential(dtype: str) -> None:
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    numbers = torch.cat((torch.tensor(NUMBERS, dtype=torch.float64), torch.linspace(-5, 5, 101, dtype=torch.float64)))
    stored = numbers.to(kinds[dtype])
    block = memoryview(stored.view(torch.uint8).numpy().tobytes())
    found = torch.frombuffer(bytearray(computed("-exp", block, dtype)), dtype=torch.float32)
    assert torch.equal(found, -stored.double().exp().float())


def test_what_is_no_number_stays_none() -> None:
    block = memoryview(torch.tensor([float("nan"), 0.0]).numpy().tobytes())
    found = torch.frombuffer(bytearray(computed("-exp", block, "F32")), dtype=torch.float32)
    assert found[0].isnan() and found[1] == -1.0
