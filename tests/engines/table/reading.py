"""A checkpoint of a type of model as vLLM's classes hold it: which tensors stand where in each parameter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.engines.running import Loader
from tests.engines.table.coded import Coded, Held, Numbers, decoded, write
from tpshard.formats.engine_functions import function_of
from tpshard.formats.vllm import FORMAT
from tpshard.inputs.checkpoint import config_in, open_checkpoint
from tpshard.inputs.model import from_checkpoint
from tpshard.planning.layout import TIMES
from tpshard.planning.model import Model
from tpshard.storage.tensor_names import numbered
from tpshard.storage.torch_pickle import DTYPES

WIDTHS = (2, 4)


class CannotSay(Exception):
    """Something that the table's language has no words for."""


class Recipe(NamedTuple):
    """The tensors that a parameter is made of, in order: one group, or one for each expert where they are stacked.

    dim: along which they follow one another.
    """

    groups: tuple[tuple[str, ...], ...]
    stacked: bool = False
    dim: int = 0


Blocks = Mapping[str, list[Numbers]]
"""Of each tensor what every rank has of it, as numbers of the tensor's own elements, 0 the first; -1 is a zero."""


@dataclass(frozen=True)
class Reading:
    """What the ranks hold of one checkpoint at one width. added: parameters that come while vLLM loads."""

    name: str
    model: Model
    coded: Coded
    tp: int
    ranks: list[dict[str, Held]]
    added: list[str] = field(default_factory=list)

    @cached_property
    def recipes(self) -> Mapping[str, Recipe]:
        """The parameters that have something of the checkpoint."""
        found = {name: self._recipe(name) for name in self.ranks[0]}
        return {name: recipe for name, recipe in found.items() if recipe is not None}

    @cached_property
    def constants(self) -> Mapping[str, int]:
        """The parameters that have nothing of it."""
        return {name: held.numbers.reshape(-1)[0] for name, held in self.ranks[0].items() if name not in self.recipes}

    @cached_property
    def blocks(self) -> Blocks:
        """What the ranks have of each tensor that is in one parameter. CannotSay for one that is in several."""
        found: dict[str, list[Numbers]] = {}
        for name, recipe in self.recipes.items():
            for place, group in enumerate(recipe.groups):
                for tensor in dict.fromkeys(group):
                    if tensor in found:
                        raise CannotSay(f"{tensor} is in {name} and in another parameter")
                    found[tensor] = [self._block(held[name], recipe, place, tensor) for held in self.ranks]
        return found

    @cached_property
    def rows(self) -> Mapping[str, tuple[int, int]]:
        """Of parameters that several tensors make, or one: rows of the checkpoint, and all with those behind.

        Only where they are as many on every rank.
        """
        found: dict[str, tuple[int, int]] = {}
        for name, recipe in self.recipes.items():
            sizes = set()
            for held in (rank[name].numbers for rank in self.ranks if rank[name].numbers.ndim):
                (own,) = np.nonzero((held.reshape(len(held), -1) > 0).any(1))
                sizes.add((int(own[-1]) + 1 if own.size else 0, len(held)))
            if len(sizes) == 1 and not recipe.stacked and not recipe.dim:
                (found[name],) = sizes
        return found

    @property
    def left_out(self) -> list[str]:
        """Tensors of which no rank has anything."""
        return [tensor.name for tensor in self.model.tensors if tensor.name not in self.blocks]

    def held(self, tensor: str) -> Held:
        """The parameter that a tensor is in, on rank 0."""
        return self.ranks[0][self.parameter_of[tensor]]

    @cached_property
    def parameter_of(self) -> Mapping[str, str]:
        """Tensor → parameter."""
        pairs = ((name, group) for name, recipe in self.recipes.items() for group in recipe.groups)
        return {tensor: name for name, group in pairs for tensor in group}

    def _recipe(self, name: str) -> Recipe | None:
        owners = [self.coded.owners(held[name].numbers) for held in self.ranks]
        all_of_them = sorted({self.coded.names[each] for rank in owners for each in np.unique(rank) if each >= 0})
        if not all_of_them:
            return None
        if len(all_of_them) == 1:
            return Recipe((tuple(all_of_them),))
        dims = {len(self.coded.shapes[each]) for each in all_of_them}
        stacked = dims == {owners[0].ndim - 1}
        if not stacked and dims != {owners[0].ndim}:
            raise CannotSay(f"{name} is made of tensors with another number of dims: {', '.join(all_of_them[:4])}")
        held = [rank[name].numbers for rank in self.ranks]
        if not stacked and owners[0].ndim == 3 and len(np.unique(owners[0][0])) > 1:
            return Recipe((self._in_order(name, [numbers.swapaxes(0, 1) for numbers in held]),), dim=1)
        ranks = [[rank[place] for rank in held] for place in range(len(held[0]))] if stacked else [held]
        groups = tuple(self._in_order(name, each) for each in ranks)
        if stacked and any(len(group) != len(groups[0]) for group in groups):
            raise CannotSay(f"{name} has more tensors of some experts than of others")
        return Recipe(groups, stacked)

    def _in_order(self, name: str, ranks: list[Numbers]) -> tuple[str, ...]:
        """The tensors that follow one another along the first dim, the same on every rank."""
        orders = []
        for numbers in ranks:
            rows = numbers.reshape(len(numbers), -1)
            owners = self.coded.owners(rows)
            firsts = owners.max(1)
            if ((owners != firsts[:, None]) & (owners >= 0)).any():
                raise CannotSay(f"{name} has several tensors beside each other, not one behind another")
            runs: list[int] = []
            begun = -1
            for place, owner in enumerate(firsts):
                if owner >= 0 and (not runs or owner != runs[-1] or (rows[place] == rows[begun]).all()):
                    runs.append(int(owner))
                    begun = place
            apart = [each for each, _ in groupby(runs)]
            if len(set(apart)) != len(apart):
                raise CannotSay(f"{name} has tensors in turn, a piece of each")
            orders.append(tuple(self.coded.names[each] for each in runs))
        longest = max(orders, key=len)
        every = tuple(dict.fromkeys(chain.from_iterable(orders)))  # a rank may have nothing of some
        merged = longest if len(every) == len(set(longest)) else every
        if any(order != tuple(each for each in merged if each in order) for order in orders):
            raise CannotSay(f"{name} is made of other tensors on other ranks")
        return merged

    def _block(self, held: Held, recipe: Recipe, place: int, tensor: str) -> Numbers:
        numbers = held.numbers[place] if recipe.stacked else held.numbers
        if len(recipe.groups[place]) > 1:
            rows = numbers.swapaxes(0, recipe.dim)
            owners = self.coded.owners(rows).reshape(len(rows), -1).max(1)
            rows = rows[owners == self.coded.names.index(tensor)]
            numbers = rows[: len(rows) // recipe.groups[place].count(tensor)].swapaxes(0, recipe.dim)
        return np.where(numbers > 0, numbers - self.coded.first(tensor), -1)


@dataclass(frozen=True)
class Checkpoint:
    """A small checkpoint of a type of model, of which names, shapes and config count and no numbers.

    whole: tensors of integers, with their numbers: an engine may have the same from its config.
    """

    name: str
    directory: Path
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    whole: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def at(cls, name: str, directory: Path) -> Checkpoint:
        """The one in a directory."""
        shapes, whole = {}, dict[str, Tensor]()
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                found = {each: opened.get_slice(each) for each in opened.keys()}
                shapes |= {each: tuple(held.get_shape()) for each, held in found.items()}
                integers = [each for each, held in found.items() if not DTYPES[held.get_dtype()].is_floating_point]
                whole |= {each: opened.get_tensor(each) for each in integers}
        return cls(name, directory, shapes, config_in(directory), whole)


def of_nested(model: Model) -> Model:
    """A model, as one that nests itself where the engine's table has it so and its rules are for all of it."""
    model_type = str(model.architecture["model_type"])
    if model.architecture.get("text") or model_type not in FORMAT.nested:
        return model
    text = {"model_type": model_type, "config": None, "replicated": []}
    return replace(model, architecture={**model.architecture, "text": text})


def read(checkpoint: Checkpoint, loader: Loader, scratch: Path, widths: tuple[int, ...] = WIDTHS) -> list[Reading]:
    """A checkpoint at several widths; RuntimeError with what vLLM says where it does not load it."""
    coded = write(checkpoint.shapes, checkpoint.config, checkpoint.directory, scratch / "coded", checkpoint.whole)
    model = of_nested(from_checkpoint(open_checkpoint(coded.directories[0])))
    readings, factors = [], dict(_factors(checkpoint.config))
    for tp in widths:
        out = [scratch / f"held-{tp}-{place}" for place, _ in enumerate(coded.directories)]
        again = {str(each): str(at) for each, at in zip(coded.directories[1:], out[1:], strict=True)}
        passes = [loader.held(coded.directories[0], tp, "auto", out[0], partial=True, again=again)]
        passes += [[load_file(at / f"rank-{rank}.safetensors") for rank in range(tp)] for at in out[1:]]
        ranks = [
            {
                name: _of_config(name, [held[rank][name] for held in passes], coded, checkpoint.whole)
                or _found([held[rank][name] for held in passes], coded, factors)
                for name in passes[0][rank]
            }
            for rank in range(tp)
        ]
        with safe_open(out[0] / "rank-0.safetensors", "pt") as opened:
            changed = opened.metadata()
        readings.append(Reading(checkpoint.name, model, coded, tp, ranks, json.loads(changed["added"])))
    return readings


def _of_config(name: str, passes: list[Tensor], coded: Coded, whole: Mapping[str, Tensor]) -> Held | None:
    """A buffer that an engine makes of the config, and that is what the checkpoint has under the same last name."""
    if any(not torch.equal(passes[0], each) for each in passes[1:]):
        return None
    for tensor, numbers in whole.items():
        last = tensor.rpartition(".")[2] == name.rpartition(".")[2]
        if last and passes[0].dtype == numbers.dtype and torch.equal(passes[0], numbers):
            return Held(passes[0].dtype, coded.elements(tensor))
    return None


def _found(passes: list[Tensor], coded: Coded, factors: Mapping[str, float]) -> Held:
    """What a parameter holds; a vector whose elements are not those of one tensor may be one times a number."""
    held = decoded(passes)
    own = held.numbers.ndim == 1 and not held.function
    is_run = own and held.numbers.size > 1 and bool((np.diff(held.numbers) == 1).all())
    if own and not is_run and held.constant is None and (found := coded.multiplied(passes, factors)):
        return found
    return held


def _factors(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What a table may say of products: the root of a width by a rank, with the config's flag that has its name."""
    for below, rank in config.items():
        stem = below.removesuffix("_rank")
        switch = next((key for key, value in config.items() if value is True and key.endswith(f"_{stem}")), None)
        if below.endswith("_rank") and type(rank) is int and switch and type(config.get("hidden_size")) is int:
            said = f"* root hidden_size / {below} if {switch}"
            yield said, float(function_of(said, config).removeprefix(TIMES))


def kind_of(name: str) -> str:
    """A name with 0 for every number in it."""
    return numbered(name)[0]
