"""Which axis each dim of a stored tensor is, by the tensor's suffix: the only place that maps axes to dims."""

from __future__ import annotations

SUFFIXES = ("weight", "bias")
AXES = ("out", "in", "expert", "kernel")
"""What a dim can be. An embedding's `out` is the vocab; `expert` counts the experts of a stacked tensor; `kernel` are
the places of a convolution."""


def stored_axes(suffix: str, ndim: int) -> tuple[str, ...]:
    """The axes of a stored tensor's dims.

    `nn.Linear` and `nn.Embedding` store `[out, in]` (an embedding's `out` is the vocab); a bias, a norm's weight and
    any other vector is `[out]`. A tensor with more dims has no known axes and can only be replicated, unless the
    architecture file gives its dims.

    >>> stored_axes("weight", 2)
    ('out', 'in')
    """
    if ndim == 1:
        return ("out",)
    if ndim == 2 and suffix != "bias":
        return ("out", "in")
    return ()
