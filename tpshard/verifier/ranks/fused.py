"""What one of vLLM's parameters holds of several of the source's tensors: q, k and v, gate and up, all experts.

Where one ends and the next begins follows from the source's shapes, whatever unit they count in: rows, blocks, words.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile

import torch

from tpshard.errors import DifferentError
from tpshard.storage.torch_pickle import DTYPES
from tpshard.verifier.ranks.open import FileWeights
from tpshard.verifier.ranks.pieces import Columns, Logarithm, Quotient, RankPiece, Rows, Stored, Turned
from tpshard.verifier.ranks.vllm_names import Names, fused_of
from tpshard.verifier.ranks.weights import named

Placed = Iterator[tuple[str, RankPiece | None]]
"""The source's tensors, and what a rank has of each; None where vLLM has no place for it."""
_MATRICES = {"w13": (("gate_proj", "up_proj"), ("w1", "w3"), ("up_proj",)), "w2": (("down_proj",), ("w2",))}
_PLACES = ("mlp.", "block_sparse_moe.", "feed_forward.", "mixer.", "moe.", "ffn.", "")
"""Where a layer may have its experts."""
_STACKED = {
    "w13": ("experts.gate_up_proj", "experts.up_proj", "experts.w13_weight", "input_linear"),
    "w2": ("experts.down_proj", "experts.w2_weight", "output_linear"),
}
_APART = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
"""Stacks of one matrix each."""
_BY_COLUMN = ("qweight", "qzeros", "scales")
"""What GPTQ and AWQ store as [in, out]."""
_BEFORE = ("gate_proj.weight", "up_proj.weight", "w1.weight", "w3.weight")
"""What gives an expert's features; the others take them."""
_SHAPE = "weight_shape"
_NUMBERS = ("scale", "scale_2", "zero_point")
"""How the names end of what may be one number, of which vLLM has one for each matrix, or for all that it fuses."""
_ON, _OFF = (1.0, -1.0), (0.0,)
_NEUTRAL: Mapping[str, tuple[float, ...]] = {
    **{"k_scale": _ON, "v_scale": _ON, "q_scale": _ON, "prob_scale": _ON},
    **{"k_zero_point": _OFF, "v_zero_point": _OFF, "q_zero_point": _OFF, "w13_bias": _OFF, "w2_bias": _OFF},
    **{f"{which}_{name}": (1.0,) for which in _MATRICES for name in ("input_scale", "input_global_scale")},
    "input_scale": (math.nan,),
    **dict.fromkeys(("ls1", "ls2"), (1.0,)),
}
"""What changes nothing, by the names of parameters that vLLM has and the source has not. A scale of -1 says that there
is none, and NaN stands where vLLM drops what it has loaded."""


def within(stored: Stored, first: int, shape: tuple[int, ...]) -> Stored:
    """The elements of a stored tensor from `first` on, as a tensor of this shape."""
    info = stored.weights.infos[stored.name]
    begin, end = (info.begin + each * DTYPES[info.dtype].itemsize for each in (first, first + math.prod(shape)))
    return Stored(FileWeights([replace(info, shape=shape, begin=begin, end=end)]), stored.name)


@dataclass(frozen=True)
class Parts:
    """The tensors that a source has in a layer ("" outside of layers), as a rank of `tp` holds them."""

    source: FileWeights
    layer: str
    tp: int
    rank: int
    names: Names

    def placed(self, tensor: str, stored: Stored) -> Placed:
        """What the source has in the place of a tensor: one, or several that lie one behind another."""
        names, whole = self.several(tensor)
        found = dict[str, RankPiece | None]()
        for name, piece in self._placed(names, stored, whole):
            if name not in found:
                found[name] = piece
                yield name, piece
            elif not _same(piece, found[name]):
                raise DifferentError(f"{stored.name} of rank {self.rank} has {name} twice, and not the same")

    def several(self, tensor: str) -> tuple[list[str], int]:
        """What the source has in the place of a tensor, and how many of the last ones every rank has whole."""
        for name in self.names.tried(tensor):
            if self.has(name):
                return [name], 0
            fused = list(fused_of(name))
            complete = [parts for parts in fused if all(map(self.has, (*parts[0], *parts[1])))]
            if found := next(iter(complete or [parts for parts in fused if any(map(self.has, parts[0]))]), None):
                return [*found[0], *found[1]], len(found[1])
        return [self._of_cache(tensor) or tensor], 0

    def _of_cache(self, tensor: str) -> str | None:
        """What an attention has for its cache, which any of its modules may store."""
        module, _, suffix = tensor.rpartition(".")
        if suffix not in _NEUTRAL:
            return None
        attention = module.rpartition(".")[0]
        names = (f"{attention}.{suffix}", *(f"{attention}.{each}_proj.{suffix}" for each in (suffix[0], "qkv")))
        return next((other for name in names for other in self.names.tried(name) if self.has(other)), None)

    def one(self, tensor: str) -> str:
        """What the source calls a tensor that is one of its own; its own name where the source has none."""
        return next((name for name in self.names.tried(tensor) if self.has(name)), tensor)

    def rows(self, tensor: str) -> dict[str, int]:
        """How many rows each of the source's tensors has that stand in the place of one, of numbered parts too."""
        module, _, suffix = tensor.rpartition(".")
        numbered = (f"{module}.shard_{number}.{suffix}" for number in count())
        found = [*takewhile(self.has, numbered)] or self.several(tensor)[0]
        return {name: self.source.shape(name)[0] for name in filter(None, map(self.in_source, found))}

    def has(self, tensor: str) -> bool:
        """Whether the source has a tensor."""
        return self.in_source(tensor) is not None

    def of_exponential(self, tensor: str, stored: Stored) -> tuple[str, RankPiece]:
        """A tensor of whose even share minus the exponential is stored."""
        name = self.in_source(tensor)
        if name is None:
            raise self._differs(stored, "is of a tensor that the source does not have", tensor, "none")
        rows = self.source.shape(name)[0]
        share = torch.arange(rows * self.rank // self.tp, rows * (self.rank + 1) // self.tp)
        return name, Logarithm(stored, Rows(Stored(self.source, name), share))

    def of_product(self, tensor: str, stored: Stored, factor: float) -> tuple[str, RankPiece]:
        """A tensor that is stored whole and times a number."""
        name = self.in_source(tensor)
        if name is None:
            raise self._differs(stored, "is of a tensor that the source does not have", tensor, "none")
        return name, Quotient(stored, Stored(self.source, name), factor)

    def experts(
        self, which: str, suffix: str, stored: Stored, turned: Sequence[str], numbers: tuple[int, int]
    ) -> Placed:
        """Experts as the source has them: one by one, or stacked, under the names of transformers' classes too.

        which: `w13` for gate and up, `w2` for down. turned: stacked ones with their last two dims exchanged. numbers:
        of the first expert, where the ranks share each, and where each rank holds some of them whole.
        """
        if not stored.shape:
            raise self._differs(stored, "is no stack of experts", "a dim of experts", "none")
        count, *shape = stored.shape
        for place in _PLACES:
            for matrices in _MATRICES[which]:
                one_by_one = [f"{place}experts.{{}}.{each}.{suffix}" for each in matrices]
                if all(self.has(name.format(numbers[0])) for name in one_by_one):
                    whole = self.has(one_by_one[-1].format(numbers[0] + count))
                    for expert in range(count):
                        one = within(stored, expert * math.prod(shape), tuple(shape))
                        names = [name.format(expert + numbers[whole]) for name in one_by_one]
                        yield from (() if whole else self._padded(names, one)) or self._placed(names, one)
                    return
        for place in _PLACES if len(shape) == 2 else ():
            apart = [f"{place}{each}.{suffix}" for each in _APART[which]]
            if all(self.has(name) and len(self.source.shape(self.in_source(name) or "")) == 3 for name in apart):
                width = stored.shape[1] // len(apart)
                for i, name in enumerate(apart):
                    rows = Turned(Columns(Turned(stored), i * width, (i + 1) * width))
                    yield self.in_source(name) or name, rows if len(apart) > 1 else stored
                return
        end = f"_{suffix.removeprefix('weight_')}"
        ends = (*(("", "_blocks") if suffix == "weight" else (end, f"{end}s")), f".{suffix}")
        tried = [f"{place}{name}{end}" for place in _PLACES for name in _STACKED[which] for end in ends]
        tensor = next(filter(self.in_source, tried), tried[0])
        if tensor in turned or self._is_turned(tensor, stored):
            yield f"{self.layer}{tensor}", Turned(stored)
        else:
            yield from self._placed([tensor], stored)

    def _padded(self, names: Sequence[str], stored: Stored) -> list[tuple[str, RankPiece | None]]:
        """An expert's matrices where each rank has place for more features than its share, with zeros in the rest.

        None where it has not. DifferentError where there is something else than zeros.
        """
        dim = 0 if names[0].endswith(_BEFORE) else 1
        full = self.source.shape(self.in_source(names[0]) or "")
        if not names[0].endswith(".weight") or len(full) != 2 or len(stored.shape) != 2 or full[dim] % self.tp:
            return []
        place, share = stored.shape[dim] // len(names), full[dim] // self.tp
        if stored.shape[dim] % len(names) or place == share:
            return []
        parts = [(self.in_source(name) or name, i * place) for i, name in enumerate(names)]
        rest = [_along(dim, stored, begin + share, begin + place) for _, begin in parts]
        if place < share or any(bool(piece.rows(0, piece.shape[0]).any()) for piece in rest):
            raise self._differs(stored, f"does not hold shares of {', '.join(names)} and zeros", share, place)
        return [(name, _along(dim, stored, begin, begin + share)) for name, begin in parts]

    def _is_turned(self, tensor: str, stored: Stored) -> bool:
        """Whether the source has a stack of matrices the other way round than vLLM: one dim is the model's, as told."""
        name, dim = self.in_source(tensor), 1 if tensor.endswith(_STACKED["w2"]) else 2
        full = () if name is None else self.source.shape(name)
        return len(full) == 3 and full[dim] != stored.shape[dim] == full[3 - dim]

    def in_source(self, tensor: str) -> str | None:
        """A tensor of the layer as the source has it."""
        return named(f"{self.layer}{tensor}", self.source.names())

    def _placed(self, tensors: Sequence[str], stored: Stored, whole: int = 0) -> Placed:
        """whole: how many of the last ones every rank has whole."""
        names = [name for name in map(self.in_source, tensors) if name is not None]
        if not names:
            last = stored.name.rpartition(".")[2]
            if last in _NEUTRAL:
                self._require_neutral(stored, _NEUTRAL[last])
            else:
                yield f"{self.layer}{tensors[0]}", stored
            return
        if len(names) < len(tensors):
            raise self._differs(stored, "holds more than the source has", ", ".join(names), ", ".join(tensors))
        shapes, count = [self.source.shape(name) for name in names], math.prod(stored.shape)
        if shapes[0] and stored.shape[len(shapes[0]) :] == (1,):  # vectors of the source are columns in vLLM
            stored = within(stored, 0, stored.shape[:-1])
        numbers = names[0].endswith(_NUMBERS) and {math.prod(shape) for shape in shapes} == {1}
        if len(names) > 1 and (names[0].endswith(_SHAPE) or (numbers and count == 1)):
            yield from ((name, None) for name in names[:-1])
            yield names[-1], within(stored, 0, shapes[-1])
        elif numbers:
            yield from self._numbers(names, stored)
        elif len(names) == 1:
            yield names[0], _in_dims(stored, shapes[0])
        else:
            yield from zip(names, self._apart(stored, names, shapes, whole), strict=True)

    def _numbers(self, names: Sequence[str], stored: Stored) -> Placed:
        """One number each; one that the source has for a matrix that it stores fused fills all places."""
        count = math.prod(stored.shape)
        if len(names) == 1 and count > 1:
            values, wanted = stored.weights.get(stored.name).flatten(), self.source.get(names[0]).flatten()
            first = int((values.double() != wanted.double()).double().argmax())  # one that is another, if any is
            yield names[0], within(stored, first, self.source.shape(names[0]))
            return
        if count != len(names):
            raise self._differs(stored, f"does not hold {', '.join(names)}", len(names), count)
        for place, name in enumerate(names):
            yield name, within(stored, place, self.source.shape(name))

    def _apart(
        self, stored: Stored, names: Sequence[str], shapes: Sequence[tuple[int, ...]], whole: int
    ) -> Iterator[RankPiece]:
        """Tensors one behind another: whole, or of the first an even share, and of the others as much as is left.

        whole: how many of the last ones are whole whatever the others are.
        """
        dim = 1 if names[0].endswith(_BY_COLUMN) else 0
        shape, sizes = stored.shape, [full[dim] if len(full) > dim else 0 for full in shapes]
        held = shape[dim] if len(shape) > dim else 0
        if sum(sizes) != held:
            count = len(sizes) - whole
            first, others, last = sizes[0] // self.tp, sizes[1:count], sizes[count:]
            rest = held - first - sum(last)
            if sizes[0] % self.tp or rest < 0 or any(rest * size % sum(others) for size in others):
                raise self._differs(stored, f"does not hold shares of {', '.join(names)}", sizes, held)
            sizes = [first, *(rest * size // sum(others) for size in others), *last]
        begin = 0
        for size in sizes:
            if dim:
                yield Columns(stored, begin, begin + size)
            else:
                yield within(stored, begin * math.prod(shape[1:]), (size, *shape[1:]))
            begin += size

    def _require_neutral(self, stored: Stored, values: Sequence[float]) -> None:
        """DifferentError where a parameter that the source does not have is none that changes nothing."""
        found = stored.weights.get(stored.name).double().flatten().tolist()
        if not all(value in values or (math.isnan(value) and math.isnan(values[0])) for value in found):
            expected = " or ".join(f"{value:g}" for value in values)
            raise self._differs(stored, "would change what the source computes, which has none", expected, found[:8])

    def _differs(self, stored: Stored, what: str, expected: object, found: object) -> DifferentError:
        message = f"{stored.name} of rank {self.rank} {what}"
        return DifferentError(message, tensor=stored.name, expected=expected, found=found)


def _along(dim: int, piece: Stored, first: int, last: int) -> RankPiece:
    return Columns(piece, first, last) if dim else Rows(piece, torch.arange(first, last))


def _same(one: RankPiece | None, other: RankPiece | None) -> bool:
    return one is other or (
        one is not None and other is not None and torch.equal(one.rows(0, one.shape[0]), other.rows(0, other.shape[0]))
    )


def _in_dims(stored: Stored, full: tuple[int, ...]) -> Stored:
    """A tensor with the dims that the source has: without dims of 1, or with its last ones as one, in the engine."""
    shape, size = stored.shape, math.prod(stored.shape)
    real = [dim for dim, length in enumerate(full) if length != 1]
    if len(shape) == len(full) or not shape:
        return stored
    if len(real) == 1 and size in (max(shape), 1):
        return within(stored, 0, tuple(size if dim in real else 1 for dim in range(len(full))))
    if full == (1, *shape):
        return within(stored, 0, full)
    *before, last = shape
    inner = full[len(shape) :]
    count = math.prod(inner)
    if not inner or last % count:
        return stored
    return within(stored, 0, (*before, last // count, *inner))
