"""The mesh of ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mesh:
    """How many ranks there are along each kind of parallelism. pp and ep are reserved."""

    tp: int
    pp: int = 1
    ep: int = 1
