"""What one of vLLM's parameters holds of several of the source's tensors: q, k and v, gate and up, all experts.

Where one ends and the next begins follows from the source's shapes, whatever unit they count in: rows, blocks, words.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tpshard.errors import DifferentError
from tpshard.storage.torch_pickle import DTYPES
from tpshard.verifier.ranks.open import FileWeights
from tpshard.verifier.ranks.pieces import Columns, Logarithm, RankPiece, Rows, Stored, Turned
from tpshard.verifier.ranks.weights import named

Placed = Iterator[tuple[str, RankPiece | None]]
"""The source's tensors, and what a rank has of each; None where vLLM has no place for it."""
_MATRICES = {"w13": (("gate_proj", "up_proj"), ("w1", "w3"), ("up_proj",)), "w2": (("down_proj",), ("w2",))}
_EXPERTS = ("mlp.experts", "block_sparse_moe.experts", "feed_forward.experts", "mixer.experts")
_STACKED = {"w13": ("gate_up_proj", "up_proj"), "w2": ("down_proj",)}
_BY_COLUMN = ("qweight", "qzeros", "scales")
"""What GPTQ and AWQ store as [in, out]."""
_SHAPE = "weight_shape"
_NUMBERS = ("scale", "scale_2", "zero_point")
"""How the names end of what may be one number, of which vLLM has one for each matrix, or for all that it fuses."""
_ON, _OFF = (1.0, -1.0), (0.0,)
_NEUTRAL: Mapping[str, tuple[float, ...]] = {
    **{"k_scale": _ON, "v_scale": _ON, "q_scale": _ON, "prob_scale": _ON},
    **{"k_zero_point": _OFF, "v_zero_point": _OFF, "q_zero_point": _OFF, "w13_bias": _OFF, "w2_bias": _OFF},
    **{f"{which}_{name}": (1.0,) for which in _MATRICES for name in ("input_scale", "input_global_scale")},
    "input_scale": (math.nan,),
}
"""What changes nothing, by the names of parameters that vLLM has and the source has not. A scale of -1 says that there
is none, and NaN stands where vLLM drops what it has loaded."""


def begun(name: str, table: Mapping[str, str]) -> str:
    """The name with the longest beginning that the table has exchanged."""
    old = max((old for old in table if name == old or name.startswith(f"{old}.")), key=len, default=None)
    return name if old is None else table[old] + name.removeprefix(old)


def within(stored: Stored, first: int, shape: tuple[int, ...]) -> Stored:
    """The elements of a stored tensor from `first` on, as a tensor of this shape."""
    info = stored.weights.infos[stored.name]
    begin, end = (info.begin + each * DTYPES[info.dtype].itemsize for each in (first, first + math.prod(shape)))
    return Stored(FileWeights([replace(info, shape=shape, begin=begin, end=end)]), stored.name)


@dataclass(frozen=True)
class Parts:
    """The tensors that a source has in a layer ("" outside of layers), as a rank of `tp` holds them.

    otherwise: how names below the layer begin in sources that do not have them as the others do.
    """

    source: FileWeights
    layer: str
    tp: int
    rank: int
    otherwise: Mapping[str, str]

    def alone(self, tensor: str, stored: Stored) -> Placed:
        """A tensor that is fused with no other. What the attention has for its cache, any of its modules may store."""
        names, (module, _, suffix) = [tensor], tensor.rpartition(".")
        if suffix in _NEUTRAL:
            attention = module.rpartition(".")[0]
            names += [f"{attention}.{suffix}", *(f"{attention}.{each}_proj.{suffix}" for each in (suffix[0], "qkv"))]
        yield from self._placed([next((name for name in names if self._named(name)), tensor)], stored)

    def has(self, tensor: str) -> bool:
        """Whether the source has a tensor."""
        return self._named(tensor) is not None

    def fused(self, tensors: Sequence[str], stored: Stored) -> Placed:
        """Tensors that lie one behind another."""
        yield from self._placed(tensors, stored)

    def of_exponential(self, tensor: str, stored: Stored) -> tuple[str, RankPiece]:
        """A tensor of whose even share minus the exponential is stored."""
        name = self._named(tensor)
        if name is None:
            raise self._differs(stored, "is of a tensor that the source does not have", tensor, "none")
        rows = self.source.shape(name)[0]
        share = torch.arange(rows * self.rank // self.tp, rows * (self.rank + 1) // self.tp)
        return name, Logarithm(stored, Rows(Stored(self.source, name), share))

    def experts(self, which: str, suffix: str, stored: Stored, turned: Sequence[str], before: int) -> Placed:
        """Experts as the source has them: one by one, or stacked under the names of transformers' classes.

        which: `w13` for gate and up, `w2` for down. turned: stacked ones with their last two dims exchanged. before:
        how many experts the ranks before this one hold, should each rank hold some of them whole.
        """
        count, *shape = stored.shape
        for module in _EXPERTS:
            for matrices in _MATRICES[which]:
                if all(self._named(f"{module}.0.{each}.{suffix}") for each in matrices):
                    whole = self._named(f"{module}.{count}.{matrices[-1]}.{suffix}") is not None
                    for expert in range(count):
                        one = within(stored, expert * math.prod(shape), tuple(shape))
                        number = expert + before if whole else expert
                        yield from self._placed([f"{module}.{number}.{each}.{suffix}" for each in matrices], one)
                    return
        end = f"_{suffix.removeprefix('weight_')}"
        ends = ("", "_blocks") if suffix == "weight" else (end, f"{end}s")
        tried = [f"{module}.{name}{end}" for module in _EXPERTS for name in _STACKED[which] for end in ends]
        tensor = next(filter(self._named, tried), tried[0])
        if tensor in turned or self._is_turned(tensor, stored):
            yield f"{self.layer}{tensor}", Turned(stored)
        else:
            yield from self._placed([tensor], stored)

    def _is_turned(self, tensor: str, stored: Stored) -> bool:
        """Whether the source has a stack of matrices the other way round than vLLM: one dim is the model's, as told."""
        name, dim = self._named(tensor), 1 if tensor.endswith(_STACKED["w2"]) else 2
        full = () if name is None else self.source.shape(name)
        return len(full) == 3 and full[dim] != stored.shape[dim] == full[3 - dim]

    def _named(self, tensor: str) -> str | None:
        """A tensor of the layer as the source has it."""
        tried = (f"{self.layer}{name}" for name in (tensor, begun(tensor, self.otherwise)))
        return next((name for each in tried if (name := named(each, self.source.names()))), None)

    def _placed(self, tensors: Sequence[str], stored: Stored) -> Placed:
        names = [name for name in map(self._named, tensors) if name is not None]
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
            yield from zip(names, self._apart(stored, names, shapes), strict=True)

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

    def _apart(self, stored: Stored, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Iterator[RankPiece]:
        """Tensors one behind another: whole, or of the first an even share, and of the others as much as is left."""
        dim = 1 if names[0].endswith(_BY_COLUMN) else 0
        shape, sizes = stored.shape, [full[dim] if len(full) > dim else 0 for full in shapes]
        held = shape[dim] if len(shape) > dim else 0
        if sum(sizes) != held:
            first, others = sizes[0] // self.tp, sizes[1:]
            rest = held - first
            if sizes[0] % self.tp or rest < 0 or any(rest * size % sum(others) for size in others):
                raise self._differs(stored, f"does not hold shares of {', '.join(names)}", sizes, held)
            sizes = [first, *(rest * size // sum(others) for size in others)]
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


def _in_dims(stored: Stored, full: tuple[int, ...]) -> Stored:
    """A tensor with the dims that the source has, of which the engine has the last ones as one, or no first of 1."""
    if full == (1, *stored.shape):
        return within(stored, 0, full)
    *before, last = stored.shape or (0,)
    inner = full[len(stored.shape) :]
    size = math.prod(inner)
    if not stored.shape or not inner or last % size:
        return stored
    return within(stored, 0, (*before, last // size, *inner))
