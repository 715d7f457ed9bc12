"""Quantised weights read as the floating-point weights that they stand for, under the names of those."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from tpshard.storage.safetensors import TensorInfo
from tpshard.verifier.dequantise.find import Recipe
from tpshard.verifier.dequantise.module import Quantised
from tpshard.verifier.ranks.open import FileWeights
from tpshard.verifier.ranks.weights import Weights


class DequantisedWeights(FileWeights):
    """The tensors of a model, or of a rank, with one float64 `weight` in place of a quantised module's tensors.

    `infos` have the weights' own shapes and sizes, and the file of the values; a place in that file they do not have.
    What is not quantised is read from `plain`, which may cast it, and what is, from `companions`, which does not.
    """

    def __init__(self, plain: FileWeights, recipes: Mapping[str, Recipe], companions: Weights) -> None:
        self.plain = plain
        self.recipes = recipes
        self.dequantised = recipes.keys()
        self.companions = companions
        super().__init__(self._infos())

    @property
    def as_stored(self) -> FileWeights:
        return self.plain

    @property
    def nbytes(self) -> int:
        return self.plain.nbytes

    def with_companions(self, companions: Weights) -> "DequantisedWeights":
        """The same with other tensors in place of what is stored of quantised modules."""
        return DequantisedWeights(self.plain, self.recipes, companions)

    def module(self, name: str) -> Quantised:
        """The stored tensors of a quantised weight."""
        return Quantised(self.companions, name, self.recipes[name].stored)

    def get(self, name: str) -> Tensor:
        return self.rows(name, 0, self.shape(name)[0]) if name in self.recipes else self.plain.get(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self.recipes:
            return self.plain.rows(name, start, stop)
        return self.recipes[name].scheme.rows(self.module(name), start, stop).contiguous()

    def _infos(self) -> list[TensorInfo]:
        weights = {recipe.stored["values"]: name for name, recipe in self.recipes.items()}
        taken = {name for recipe in self.recipes.values() for name in recipe.stored.values()}
        infos = [info for name, info in self.plain.infos.items() if name in weights or name not in taken]
        return [self._info(weights[info.name], info) if info.name in weights else info for info in infos]

    def _info(self, name: str, values: TensorInfo) -> TensorInfo:
        shape = self.recipes[name].scheme.shape(self.module(name))
        return TensorInfo(name, "F64", shape, values.file, 0, 8 * torch.Size(shape).numel())


class RoundedWeights(FileWeights):
    """A rank's tensors. Some, `rounded`, are the source's quantised weights in the dtype that an engine computes in.

    Where a number is the source's rounded to that dtype, it is the source's, and of the same shape; else it stays.
    """

    def __init__(self, plain: FileWeights, rounded: Collection[str], source: DequantisedWeights) -> None:
        self.plain, self.rounded, self.source = plain, rounded, source
        super().__init__(plain.infos.values())

    @property
    def as_stored(self) -> FileWeights:
        return self.plain

    def get(self, name: str) -> Tensor:
        return self.rows(name, 0, self.shape(name)[0]) if name in self.rounded else self.plain.get(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        found = self.plain.rows(name, start, stop)
        if name not in self.rounded or self.source.shape(name) != self.shape(name):
            return found
        expected = self.source.rows(name, start, stop)
        nearest = expected.float().to(found.dtype)
        return expected.where(found == nearest, found.double())
