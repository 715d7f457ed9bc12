"""vLLM's `sharded_state`, and SGLang's: what each parameter of a rank is, in the source's names and order.

Only names are a table. What a fused parameter holds follows from shapes, the source's and its own (`fused.py`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpshard.errors import DifferentError
from tpshard.verifier.families.family import Family
from tpshard.verifier.ranks.fused import Parts, Placed, within
from tpshard.verifier.ranks.open import FileWeights
from tpshard.verifier.ranks.pieces import Columns, Joined, RankPiece, Rows, Stacked, Stored, Turned
from tpshard.verifier.ranks.replicas import SCALES, some_experts
from tpshard.verifier.ranks.vllm_names import QK_NORMS, Names

Pieces = Iterator[tuple[str, RankPiece]]
TEXT = "language_model"
"""Below which a model that nests a text model has it."""
_LAYER = re.compile(r"(.*?\.\d+\.)(.+)")
_EXPERTS = re.compile(r"(?:.+\.)?(\w*experts)\.routed_experts\.(w13|w2)_(.+)")


def even(total: int, rank: int, tp: int) -> Tensor:
    """The indices of a rank's even share."""
    return torch.arange(total * rank // tp, total * (rank + 1) // tp)


def _by_turns(stack: Stored) -> RankPiece:
    """Matrices whose rows are one of their first half, one of their other half, and so on."""
    count, rows, width = stack.shape
    order = torch.arange(rows).view(2, -1).mT.flatten() if rows % 2 == 0 else torch.arange(rows)
    return Stacked([Rows(within(stack, i * rows * width, (rows, width)), order) for i in range(count)])


@dataclass(frozen=True)
class Rank:
    """One rank of a set, in the terms of a source. beside: the names of all that is not the text's, if any is.

    text: how the text's names begin.
    """

    ranks: Sequence[FileWeights]
    names: Names
    family: Family
    rank: int
    source: FileWeights
    config: Mapping[str, Any]
    beside: Names | None = None
    text: tuple[str, ...] = ()

    def pieces(self) -> Placed:
        """The rank's tensors under the source's names, base prefix included; no scales of an unquantised cache.

        What the source has no tensor for keeps its own name, and is left out where it changes nothing.
        """
        weights, text = self.ranks[self.rank], self.names.beside(self.source.names())
        for name in weights.names():
            if name.rpartition(".")[2] not in SCALES:
                names = text if self.beside is None or name.startswith(self.text) else self.beside
                found = _LAYER.fullmatch(names.of(name))
                layer, tensor = ("", names.of(name)) if found is None else (found[1], found[2])
                yield from self._parts(names, layer, tensor, Stored(weights, name))

    def _parts(self, names: Names, layer: str, tensor: str, stored: Stored) -> Placed:
        parts = Parts(self.source, layer, len(self.ranks), self.rank, names)
        module, _, suffix = tensor.rpartition(".")
        if tensor in names.once and not some_experts(self.ranks, stored.name):
            stored = Stored(self.ranks[0], stored.name)
        if re.fullmatch(names.padded, module):
            stored = self._without_padding(stored, sum(parts.rows(tensor).values()))
        if experts := _EXPERTS.fullmatch(names.stacked.get(tensor, tensor)):
            numbers = self._numbers(names, experts[1], stored)
            for name, piece in parts.experts(experts[2], experts[3], stored, names.turned, numbers):
                if name.endswith(names.alternate) and isinstance(piece, Stored) and len(piece.shape) == 3:
                    piece = _by_turns(piece)
                yield name, piece
        elif re.fullmatch(names.even, module):
            yield from self._of_even_shares(parts, tensor, stored)
        elif suffix == "A" and parts.has(logarithm := parts.one(f"{tensor}_log")):
            yield parts.of_exponential(logarithm, stored)
        elif (one := parts.one(tensor)) in names.multiplied:
            yield parts.of_product(one, stored, self._factor(*names.multiplied[one]))
        elif one in names.side_by_side:
            yield f"{layer}{one}", self._stacked(stored, parts.source.shape(f"{layer}{one}")[0])
        elif tensor in names.turned:
            yield f"{layer}{parts.one(tensor)}", Turned(stored)
        elif module == names.grouped and self.family.fused in ("heads", "groups"):
            yield f"{layer}{tensor}", Rows(stored, self._interleaved(stored))
        elif module in names.gathered:
            yield f"{layer}{tensor}", self._of_all(stored)
        elif module in names.whole:
            yield f"{layer}{tensor}", self._part(module, suffix, stored)
        else:
            for name, piece in parts.placed(tensor, stored):
                if piece is not None and name.rpartition(".")[0].endswith(names.paired):
                    rows = torch.arange(piece.shape[0]).view(-1, 2, self.family.head_dim // 2)
                    piece = Rows(piece, rows.mT.flatten())
                yield name, piece

    def _stacked(self, stored: Stored, count: int) -> RankPiece:
        """As many matrices as lie beside one another."""
        width, rest = divmod(stored.shape[-1], count)
        if rest:
            message = f"{stored.name} of rank {self.rank} is no {count} matrices beside one another"
            raise DifferentError(message, tensor=stored.name, expected=count, found=list(stored.shape))
        return Stacked([Columns(stored, i * width, (i + 1) * width) for i in range(count)])

    def _factor(self, above: str, below: str, switch: str) -> float:
        """The root of a ratio of the config's numbers, or 1 where it says that none is taken."""
        return (self.config[above] / self.config[below]) ** 0.5 if self.config.get(switch) else 1.0

    def _numbers(self, names: Names, stack: str, stored: Stored) -> tuple[int, int]:
        """The first expert of a stack that all ranks have a share of, and of one of which each rank has some whole."""
        if stack in names.stacks:
            before = names.stacks[: names.stacks.index(stack)]
            others = (stored.name.replace(f".{stack}.", f".{other}.") for other in before)
            first = sum(self._of(self.rank, name).shape[0] for name in others)
            return first, first
        return 0, sum(self._of(rank, stored.name).shape[0] for rank in range(self.rank))

    def _of(self, rank: int, name: str) -> Stored:
        """What a rank stores under a name. DifferentError where that is no tensor with rows."""
        weights = self.ranks[rank]
        if name not in weights.names() or not weights.shape(name):
            raise DifferentError(f"rank {rank} has no {name} with rows", tensor=name)
        return Stored(weights, name)

    def _of_even_shares(self, parts: Parts, tensor: str, stored: Stored) -> Placed:
        """What all ranks' even shares make together; a vocabulary is padded."""
        every, begin = Joined([self._of(rank, stored.name) for rank in range(len(self.ranks))]), 0
        sizes = parts.rows(tensor)
        rows = sum(sizes.values())
        if every.shape[0] not in (rows, -(-rows // 64) * 64):
            message = f"the ranks' {tensor} are not its even shares"
            raise DifferentError(message, expected=rows, found=every.shape[0])
        for name, size in sizes.items():
            yield name, Rows(every, torch.arange(begin, begin + size))
            begin += size

    def _without_padding(self, stored: Stored, rows: int) -> Stored:
        """DifferentError where something stands behind the rows that count."""
        if rows > stored.shape[0] or bool(stored.rows(rows, stored.shape[0]).any()):
            what = f"{stored.name} of rank {self.rank} is not {rows} rows with zeros behind"
            raise DifferentError(what, tensor=stored.name, expected=rows, found=stored.shape[0])
        return within(stored, 0, (rows, *stored.shape[1:]))

    def _q_k_v(self, stored: Stored) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of q, k and v in a fused one. Where no whole heads fit, all are q's, which the decoder refuses."""
        rows, d = stored.shape[0], self.family.head_dim
        q = self.family.heads * d // len(self.ranks)
        if q % d or rows <= q or (rows - q) % (2 * d):
            return torch.arange(rows), torch.arange(0), torch.arange(0)
        kv = (rows - q) // 2
        return torch.arange(q), torch.arange(q, q + kv), torch.arange(q + kv, rows)

    def _interleaved(self, stored: Stored) -> Tensor:
        """The rows of [q; k; v] in the order of the source: for each KV group its q heads, its k, its v."""
        q, k, v = self._q_k_v(stored)
        d = self.family.head_dim
        groups = len(k) // d
        if not groups or len(q) // d % groups:
            return torch.cat((q, k, v))
        return torch.cat((q.view(groups, -1), k.view(groups, d), v.view(groups, d)), 1).flatten()

    def _of_all(self, stored: Stored) -> RankPiece:
        """This rank's rows of a module whose outputs all ranks gather and then sort."""
        tp, name, every = len(self.ranks), stored.name, []
        for rank, weights in enumerate(self.ranks):
            if name not in weights.names() or weights.shape(name) != stored.shape:
                raise DifferentError(f"rank {rank} has no {name} of the others' shape", tensor=name)
            every.append(Stored(weights, name))
        rows = tp * stored.shape[0]
        if self.family.fused is None:
            at = even(rows // 2, self.rank, tp)
            return Rows(Joined(every), torch.cat((at, rows // 2 + at)))
        fitting = (self.family.heads + 2 * self.family.kv_heads) * self.family.head_dim
        if rows != fitting:
            message = f"the ranks' rows of {name} together are not the model's q, k and v"
            raise DifferentError(message, tensor=name, expected=fitting, found=rows)
        apart = [self._q_k_v(stored) for stored in every]
        sorted_rows = [Rows(every[other], apart[other][i]) for i in range(3) for other in range(tp)]
        return Rows(Joined(sorted_rows), even(rows, self.rank, tp))

    def _part(self, module: str, suffix: str, stored: Stored) -> RankPiece:
        """This rank's share of what it computes whole: the ranks' sum is then what each of them has."""
        shape, tp = stored.shape, len(self.ranks)
        if module in QK_NORMS and shape[0] == self.family.head_dim:
            return stored  # one for all heads
        if module == self.family.down:
            first, last = (shape[-1] * (self.rank + i) // tp for i in (0, 1))
            return stored if suffix == "bias" else Columns(stored, first, last)
        if module == QK_NORMS[1]:
            # KV heads fewer than ranks are repeated.
            rows = max(self.family.head_dim, shape[0] // tp)
            first = self.rank * (shape[0] // rows) // tp * rows if shape[0] < rows * tp else self.rank * rows
            return Rows(stored, torch.arange(first, min(first + rows, shape[0])))
        return Rows(stored, even(shape[0], self.rank, tp))
