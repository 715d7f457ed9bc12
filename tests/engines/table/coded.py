"""Checkpoints whose elements say where they come from, and what of them is found in what an engine holds.

Every element has a number. It is written as digits, one digit a checkpoint, and a digit is a number that bfloat16 has:
whichever dtype an engine holds a parameter in, the digits survive, and so they do a function such as -exp. What stands
for no digit was made by the engine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from tpshard.storage.names import CONFIG, META_PARAMS, MISTRAL, SAFETENSORS

Numbers = NDArray[np.int64]

ZERO, ONE, UNSET, OTHER = 0, -1, -2, -3
"""In place of an element's number: constants of the engine's. UNSET is what `held.py` fills parameters with first."""
_CONSTANTS = {0.0: ZERO, 1.0: ONE, 7.0: UNSET}


def _digits() -> NDArray[np.float64]:
    """Numbers of both signs whose exponentials float32 tells apart, without those that engines fill with."""
    found = [sign * 2.0**power * (1 + step / 128) for power in range(-11, 5) for step in range(128) for sign in (-1, 1)]
    return np.array(sorted(set(found) - {-1.0, *_CONSTANTS}))


DIGITS = _digits()
_EXPONENTIALS = -np.exp(DIGITS)
_INTEGERS = np.arange(len(DIGITS)) + 8
"""Digits of integers: none is a constant of the engine's."""


@dataclass(frozen=True)
class Coded:
    """The checkpoints that together say each element's number, and the tensors that they are of.

    Element i of all tensors, one after another in order of their names, has number i + 1.
    """

    shapes: Mapping[str, tuple[int, ...]]
    directories: tuple[Path, ...]

    @cached_property
    def names(self) -> list[str]:
        """The tensors, as `owners` counts them."""
        return sorted(self.shapes)

    @cached_property
    def ends(self) -> Numbers:
        """The number of each tensor's last element."""
        return np.cumsum([int(np.prod(self.shapes[name], dtype=np.int64)) for name in self.names])

    def owners(self, numbers: Numbers) -> Numbers:
        """Which tensor each element is of; -1 for constants."""
        return np.where(numbers > 0, np.searchsorted(self.ends, numbers), -1)

    def first(self, name: str) -> int:
        """The number of a tensor's first element."""
        place = self.names.index(name)
        return int(self.ends[place - 1]) + 1 if place else 1

    def elements(self, name: str) -> Numbers:
        """The numbers of a tensor's elements."""
        shape = self.shapes[name]
        return (np.arange(int(np.prod(shape, dtype=np.int64))) + self.first(name)).reshape(shape)

    def multiplied(self, passes: list[torch.Tensor], factors: Mapping[str, float]) -> Held | None:
        """A parameter that is a vector times a number, by what it is with each of the checkpoints.

        Found by trying all of both: products are rounded, so that several digits may have the same.
        """
        for name in (name for name, shape in self.shapes.items() if shape == passes[0].shape and len(shape) == 1):
            numbers = np.arange(self.first(name), self.first(name) + self.shapes[name][0])
            places = (numbers // len(DIGITS) ** place % len(DIGITS) for place in range(len(passes)))
            vectors = [torch.from_numpy(DIGITS[digits]).to(passes[0].dtype) for digits in places]
            for function, factor in factors.items():
                if all(torch.equal(one * factor, held) for one, held in zip(vectors, passes, strict=True)):
                    return Held(passes[0].dtype, numbers, function)
        return None


@dataclass(frozen=True)
class Held:
    """A parameter of one rank: the number of each element, or a constant. function: what was made of the elements."""

    dtype: torch.dtype
    numbers: Numbers
    function: str = ""

    @property
    def constant(self) -> int | None:
        """The one constant that it holds everywhere."""
        first = int(self.numbers.reshape(-1)[0]) if self.numbers.size else ZERO
        return first if first <= 0 and bool((self.numbers == first).all()) else None


def write(
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, object],
    beside: Path,
    into: Path,
    whole: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Coded:
    """Write the checkpoints. beside: the directory whose small files they get as well. whole: tensors of integers."""
    names = sorted(shapes)
    total = sum(int(np.prod(shapes[name], dtype=np.int64)) for name in names)
    passes = 1
    while len(DIGITS) ** passes <= total:
        passes += 1
    directories = tuple(into / f"digit-{each}" for each in range(passes))
    for place, directory in enumerate(directories):
        directory.mkdir(parents=True)
        tensors, number = {}, 1
        for name in names:
            size = int(np.prod(shapes[name], dtype=np.int64))
            digits = np.arange(number, number + size) // len(DIGITS) ** place % len(DIGITS)
            values = torch.from_numpy(_INTEGERS[digits] if name in whole else DIGITS[digits])
            dtype = whole[name].dtype if name in whole else torch.bfloat16
            tensors[name] = values.to(dtype).reshape(shapes[name])
            number += size
        own_form = not (beside / CONFIG).exists() and (beside / META_PARAMS).exists()  # Mistral's
        file = directory / (MISTRAL if own_form else SAFETENSORS)
        save_file(tensors, file, metadata={"format": "pt"})
        for file in beside.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and "index" not in file.name:
                shutil.copy(file, directory)
        if own_form:
            params = json.loads((beside / META_PARAMS).read_text()) | {"tied_embeddings": config["tie_word_embeddings"]}
        (directory / (META_PARAMS if own_form else CONFIG)).write_text(json.dumps(params if own_form else config))
    return Coded(shapes, directories)


def decoded(passes: list[torch.Tensor]) -> Held:
    """What a parameter holds, from what it is with each of the checkpoints."""
    values = [tensor.double().numpy() for tensor in passes]
    floating = passes[0].dtype.is_floating_point
    for function, digits in (("", DIGITS), ("-exp", _EXPONENTIALS)) if floating else (("", _INTEGERS),):
        numbers = _numbers(values, digits, exact=not function)
        if numbers is not None:
            return Held(passes[0].dtype, numbers, function)
    return Held(passes[0].dtype, _constants(values))


def _numbers(values: list[NDArray[np.float64]], digits: NDArray[np.float64], *, exact: bool) -> Numbers | None:
    """The elements' numbers; None where what stands there is neither digits nor constants."""
    order = np.argsort(digits)
    ordered = digits[order]
    found = np.zeros(values[0].shape, np.int64)
    is_digit = np.ones(values[0].shape, bool)
    for place, value in enumerate(values):
        near = np.clip(np.searchsorted(ordered, value), 1, len(ordered) - 1)
        near -= np.abs(value - ordered[near - 1]) < np.abs(value - ordered[near])
        is_digit &= np.abs(value - ordered[near]) <= (0 if exact else 1e-6 * np.abs(value))
        found += order[near] * len(digits) ** place
    if not is_digit.any():
        return None
    constants = _constants(values)
    if (constants[~is_digit] == OTHER).any():
        return None
    return np.where(is_digit, found, constants)


def _constants(values: list[NDArray[np.float64]]) -> Numbers:
    found = np.full(values[0].shape, OTHER, np.int64)
    for value, number in _CONSTANTS.items():
        found[np.all([each == value for each in values], axis=0)] = number
    return found
