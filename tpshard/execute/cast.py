"""Casts of floating-point weights, by torch."""

from tpshard.storage.torch_pickle import DTYPES  # first: it says what to do when torch is missing

import torch  # isort: skip  # noqa: E402


def convert(block: memoryview, source: str, target: str) -> memoryview:
    """Cast a block of bytes from one dtype to another, rounding as torch does; NaN becomes the target's default NaN.

    Shape [n] → [n].
    """
    tensor = torch.frombuffer(block, dtype=DTYPES[source]).to(DTYPES[target])
    # What torch makes of a NaN's payload depends on the processor, and on where in the block it lies. A sum is NaN
    # where any element is, and takes a tenth of the time that looking at each does.
    if tensor.sum().isnan():
        tensor[tensor.isnan()] = torch.nan
    return tensor.view(torch.uint8).numpy().data
