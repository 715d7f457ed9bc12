"""Expert parallelism: routed experts dealt whole, each rank's in a row."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

from tpshard.planning.deal import Range
from tpshard.storage.tensor_names import numbered

AXIS = "experts"
"""The axis of whole experts, dealt along ep."""


@dataclass(frozen=True)
class Experts:
    """The routed experts of a model: `count` in each layer that has any.

    within: how the kinds of their tensors' names begin up to the expert's number. stacked: the kinds of modules that
    hold all experts of a layer along their first dim. Kinds are names with 0 for every number.
    """

    count: int
    within: tuple[str, ...]
    stacked: tuple[str, ...]

    def number(self, name: str) -> int | None:
        """The expert that a tensor is of, by its name in the rules; None where it is of none, or of all."""
        kind, numbers = numbered(name)
        for begin in self.within:
            if kind.startswith(f"{begin}0."):
                return numbers[begin.split(".").count("0")]
        return None

    def are_stacked(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor holds all experts of a layer along its first dim."""
        return shape[:1] == (self.count,) and numbered(name)[0].startswith(self.stacked)

    def ranges(self, ep: int) -> tuple[Range, ...]:
        """The experts of each of `ep` places: as many, and the first places one more of what does not divide.

        So does vLLM place them (`determine_expert_map`, linear).
        """
        each, rest = divmod(self.count, ep)
        return tuple(pairwise(accumulate((each + (place < rest) for place in range(ep)), initial=0)))
