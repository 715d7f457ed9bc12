"""The stored tensors of a module: the one table of what the suffix of a tensor's name means.

A rule cuts a module along one feature axis, by one list of boundaries. Each tensor that the module stores is a
companion: it says which axes its dims are, and how many elements of an axis one of its own elements stands for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

AXES = ("out", "in", "expert", "kernel")
"""What a dim can be. An embedding's `out` is the vocab; `expert` counts the experts of a stacked tensor; `kernel` are
the places of a convolution."""


@dataclass(frozen=True, slots=True)
class Companion:
    """A tensor that a module stores.

    forms: the axes of its dims, one form for each number of dims that it may have. A tensor with another number of dims
    has no known axes and can only be replicated, unless the architecture file gives its dims.
    ratio: by axis, the elements of the axis for one stored element; 1 for an axis that is not named.
    """

    forms: tuple[tuple[str, ...], ...]
    ratio: Mapping[str, int] = field(default_factory=dict)

    def axes(self, ndim: int) -> tuple[str, ...]:
        """The axes of the dims, none where they are not known.

        >>> PLAIN["weight"].axes(2)
        ('out', 'in')
        """
        return next((form for form in self.forms if len(form) == ndim), ())

    def has(self, *axes: str) -> bool:
        """Whether all of `axes` are among its dims, in one form or another."""
        return set(axes) <= {axis for form in self.forms for axis in form}


Scheme = Mapping[str, Companion]
"""The companions of a module by suffix."""

PLAIN: Scheme = {"weight": Companion((("out",), ("out", "in"))), "bias": Companion((("out",),))}
"""Modules that are not quantised. `nn.Linear` and `nn.Embedding` store `[out, in]`; a norm's weight is `[out]`."""

SUFFIXES = PLAIN.keys()
"""What may follow a module's name in the name of a tensor."""


def split_name(name: str) -> tuple[str, str]:
    """A tensor's module and suffix; the suffix is empty for a parameter that has none, which is a module of its own.

    >>> split_name("mlp.up_proj.weight"), split_name("mixer.A_log")
    (('mlp.up_proj', 'weight'), ('mixer.A_log', ''))
    """
    module, _, suffix = name.rpartition(".")
    return (module, suffix) if module and suffix in SUFFIXES else (name, "")


def companion_of(name: str) -> Companion:
    """What a tensor is to its module, by its name.

    A parameter without a suffix is stored as a weight is, or as what its name ends with: `experts.down_proj_bias`.
    """
    ending = name.rpartition(".")[2]
    return next((PLAIN[suffix] for suffix in SUFFIXES if f"_{ending}".endswith(f"_{suffix}")), PLAIN["weight"])
