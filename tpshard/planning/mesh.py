"""The mesh of ranks: how many there are along each kind of parallelism, and where each of them stands."""

from dataclasses import dataclass
from typing import Literal

Along = Literal["tp", "pp", "ep"]
"""A kind of parallelism: tensor, pipeline, expert."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """`tp * pp` ranks. ep divides tp: of the tp ranks of a stage, each `tp / ep` share experts that are cut.

    A rank is a coordinate (pp, tp), tp varying fastest. Its place among the experts follows from its tp coordinate:
    tp = moe_tp x ep, moe_tp varying fastest. ValueError for sizes that are no mesh.
    """

    tp: int
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.ep) < 1 or self.tp % self.ep:
            raise ValueError(f"no mesh: tp {self.tp}, pp {self.pp}, ep {self.ep}")

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.tp * self.pp

    def coordinate(self, rank: int) -> tuple[int, int]:
        """A rank's (pp, tp)."""
        return divmod(rank, self.tp)

    def rank(self, pp: int, tp: int) -> int:
        """The rank at a coordinate."""
        return pp * self.tp + tp

    def expert_place(self, rank: int) -> tuple[int, int]:
        """A rank's (ep, moe_tp): whose experts it holds, and which share of each."""
        return divmod(rank % self.tp, self.tp // self.ep)

    def width(self, along: Along) -> int:
        """Among how many an axis is dealt that goes along one kind of parallelism."""
        return {"tp": self.tp, "pp": self.pp, "ep": self.ep}[along]

    def place(self, rank: int, along: Along) -> int:
        """Which of those a rank is."""
        pp, tp = self.coordinate(rank)
        return {"tp": tp, "pp": pp, "ep": self.expert_place(rank)[0]}[along]
