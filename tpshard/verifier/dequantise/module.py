"""The stored tensors of one quantised module, by what they are to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tpshard.errors import DifferentError
from tpshard.verifier.ranks.weights import Weights


@dataclass(frozen=True)
class Quantised:
    """A module of some weights. `stored`: the names of its tensors by role.

    Roles: values, scale, zero, groups (the group of each input feature), super (one scale for the whole weight), input
    (a factor of every input), shape (the weight's sizes).
    """

    weights: Weights
    name: str
    stored: Mapping[str, str]

    def has(self, role: str) -> bool:
        return role in self.stored

    def shape(self, role: str) -> tuple[int, ...]:
        return self.weights.shape(self._held(role))

    def get(self, role: str) -> Tensor:
        return self.weights.get(self._held(role))

    def rows(self, role: str, start: int, stop: int) -> Tensor:
        return self.weights.rows(self._held(role), start, stop)

    def _held(self, role: str) -> str:
        name = self.stored[role]
        if name not in self.weights.names():
            raise DifferentError(f"{name} is missing, and {self.name} is stored", tensor=name)
        return name

    def require(self, role: str, *shapes: tuple[int, ...]) -> None:
        """DifferentError unless a tensor of the module has one of these shapes."""
        if (found := self.shape(role)) not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            what = f"{self.stored[role]} does not fit {self.stored['values']}"
            raise DifferentError(what, tensor=self.name, expected=expected, found=list(found))


class Scheme(Protocol):
    """How the tensors of a module make its weight. What is not in a rank's own tensors is known from the source's."""

    def shape(self, module: Quantised) -> tuple[int, ...]:
        """The weight's shape: [out, in], or [expert, …] where the experts are stacked."""

    def rows(self, module: Quantised, start: int, stop: int) -> Tensor:
        """Rows of the weight, in float64. DifferentError where tensors do not fit each other."""
