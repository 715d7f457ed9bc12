"""Axes of features, and how a tensor is cut along them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tpshard.planning.mesh import Along

if TYPE_CHECKING:
    from fractions import Fraction

Kind = Literal["column", "row", "replicate", "buffer"]


@dataclass(frozen=True, slots=True)
class Axis:
    """A feature axis of a model: `count` units of `unit` elements each; only `count` may be divided.

    replicate: units are repeated when there are more ranks than units (KV heads).
    pad: zero units may be added at the end (vocab).
    group: the axis by whose units this one is dealt (heads by KV group), so that no rank holds q without its k and v.
    along: the kind of parallelism among whose ranks it is dealt.
    step: how many units are dealt together, where quantised weights have groups or blocks that no unit ends with; the
    last of the axis may be fewer. step_of: one of the tensors that have them.
    rest_last: whether every rank but the last has as many steps as a whole share rounded up, and the last the rest.
    """

    name: str
    count: int
    unit: int
    replicate: bool = False
    pad: bool = False
    group: str | None = None
    along: Along = "tp"
    step: int = 1
    step_of: str = ""
    rest_last: bool = False

    def __str__(self) -> str:
        """`8 kv`, and how many are dealt at a time where not one."""
        return f"{self.count} {self.name}" + (f" ({self.step} at a time)" if self.step > 1 else "")


@dataclass(frozen=True, slots=True)
class Cut:
    """How one tensor is split: along `dim`, whose elements are the segments' units in a row.

    `segments` are axis names (a fused q, k, v is three). With `interleave`, the segments are stored interleaved per
    unit of that axis. Replicated tensors have `dim` None and no segments.
    ratio: elements of the axes for one stored element along `dim` (a weight packed by eights, a scale of a block). A
    fraction where values cross words: 32 of 3 bits lie in 3 words of 32.
    stack: the axis of the first dim, along which it is dealt besides: a stack of experts whose matrices may be cut too.
    """

    kind: Kind
    dim: int | None = None
    segments: tuple[str, ...] = ()
    interleave: str | None = None
    ratio: int | Fraction = 1
    stack: str | None = None
    _hash: int = field(init=False, repr=False, compare=False)  # what is alike is looked up by it, for every tensor

    def __post_init__(self) -> None:
        values = (self.kind, self.dim, self.segments, self.interleave, self.ratio, self.stack)
        object.__setattr__(self, "_hash", hash(values))

    def __hash__(self) -> int:
        return self._hash

    @property
    def rule(self) -> str:
        """The rule as the user reads it."""
        return rule_key(self.kind, self.segments, self.interleave)


def rule_key(kind: str, axes: Iterable[str], interleave: str | None) -> str:
    """A rule as rules files and reports have it: `column heads kv kv / kv`."""
    return " ".join([kind, *axes, *(["/", interleave] if interleave else [])])


SPLIT_AXIS = {"column": "out", "row": "in"}
"""The feature axis along which a module is cut."""
