"""Weights as the built-in decoder asks for them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from tpshard.errors import DifferentError
from tpshard.verifier.families.family import Family
from tpshard.verifier.ranks.weights import Weights, move


@dataclass(frozen=True)
class Store:
    """One rank's weights under the family's module names, on a device and in the dtype to compute in.

    With `block_bytes` a matrix is never whole in memory: products go through row blocks of that size at most, unless
    `hold` is a dict, which then keeps what was read until its owner clears it.
    A missing tensor that the mathematics cannot do without is a DifferentError: that rank cannot be the model.
    """

    weights: Weights
    family: Family
    dtype: torch.dtype
    device: torch.device
    rank: int = 0
    block_bytes: int | None = None
    hold: dict[str, Tensor] | None = None

    @cached_property
    def prefix(self) -> str:
        """The base prefix of the rank's names."""
        for prefix in self.family.prefixes:
            if f"{prefix}{self.family.embed}.weight" in self.weights.names():
                return prefix
        raise self.missing(f"{self.family.prefixes[0]}{self.family.embed}.weight")

    @cached_property
    def transposed(self) -> frozenset[str]:
        """The matrices that Conv1D stores as [in, out]; embeddings and the head of the same models are not."""
        family = self.family
        ends = (*family.qkv, family.out, family.up, family.down) if family.conv1d else ()
        return frozenset(family.layer.format(i) + end for i in range(family.layers) for end in ends)

    def missing(self, name: str) -> DifferentError:
        """The error for a tensor that the mathematics cannot do without."""
        return DifferentError(f"rank {self.rank} has no tensor {name}", tensor=name)

    def full(self, module: str) -> str:
        """A module's stored name, base prefix included."""
        return module if module in self.family.heads_names else self.prefix + module

    def name(self, module: str, suffix: str = "weight") -> str:
        """The stored name of a module's parameter."""
        return f"{self.full(module)}.{suffix}"

    def head(self) -> str:
        """The module that makes the logits: its own if one is stored, else the embedding (tied)."""
        stored = (name for name in self.family.heads_names if f"{name}.weight" in self.weights.names())
        return next(stored, self.family.embed)

    def has(self, module: str, suffix: str = "weight") -> bool:
        return f"{self.full(module)}.{suffix}" in self.weights.names()

    def matrix_shape(self, module: str) -> tuple[int, int]:
        """A weight's stored sizes as (out, in)."""
        name = self.name(module)
        if name not in self.weights.names():
            raise self.missing(name)
        shape = self.weights.shape(name)
        if len(shape) != 2:
            raise DifferentError(f"rank {self.rank}: {name} is no matrix", tensor=name, expected="2 dims", found=shape)
        return (shape[1], shape[0]) if module in self.transposed else (shape[0], shape[1])

    def held(self, layer: int) -> tuple[int, int, int]:
        """The rank's q heads, KV heads and MLP features in a layer, from nothing but stored shapes and head_dim."""
        family = self.family
        at = family.layer.format(layer)
        q_in = self.matrix_shape(at + family.out)[1]
        ffn = self.matrix_shape(at + family.down)[1]
        rows = sum(self.matrix_shape(at + name)[0] for name in family.qkv)
        kv_rows = rows - q_in
        if q_in % family.head_dim or kv_rows < 0 or kv_rows % (2 * family.head_dim):
            name = self.name(at + family.qkv[0])
            what = f"rank {self.rank}: {name} does not hold whole heads that fit {family.out}"
            wanted, held = f"heads of {family.head_dim}", f"{rows} rows for {q_in} inputs of {family.out}"
            raise DifferentError(what, tensor=name, expected=wanted, found=held)
        return q_in // family.head_dim, kv_rows // (2 * family.head_dim), ffn

    def vector(self, module: str, suffix: str = "weight") -> Tensor | None:
        """A parameter as it is stored, or None when there is none of that name."""
        name = self.name(module, suffix)
        if name not in self.weights.names():
            return None
        if self.hold is not None and name in self.hold:
            return self.hold[name]
        tensor = move(self.weights.get(name), self.device, self.dtype)
        if self.hold is not None:
            self.hold[name] = tensor
        return tensor

    def biased(self, module: str, product: Tensor) -> Tensor:
        """What a linear module makes of its product: its bias is added, where it has one."""
        bias = self.vector(module, "bias")
        return product if bias is None else product + bias

    def head_bias(self) -> Tensor | None:
        """The head's bias (GPT-J), which is stored under the head's own name even when its weight is tied."""
        biases = (self.vector(name, "bias") for name in self.family.heads_names)
        return next((bias for bias in biases if bias is not None), None)

    def matrix(self, module: str) -> Tensor:
        """A weight as [out, in]."""
        self.matrix_shape(module)
        weight = self.vector(module)
        assert weight is not None
        return weight.T if module in self.transposed else weight

    def linear(self, module: str, x: Tensor) -> Tensor:
        """x W^T, without a bias."""
        if self.block_bytes is None or (self.hold is not None and module != self.head()):
            return F.linear(x, self.matrix(module))
        rows, width = self.weights.shape(self.name(module))
        step = max(1, self.block_bytes // (max(1, width) * self.dtype.itemsize))
        blocks = self.table(module, 0, rows, step)
        if module in self.transposed:
            total = x.new_zeros((*x.shape[:-1], width))
            for start, block in zip(range(0, rows, step), blocks, strict=True):
                total += x[..., start : start + len(block)] @ block
            return total
        return torch.cat([F.linear(x, block) for block in blocks], -1)

    def table(self, module: str, start: int, stop: int, step: int = 1024) -> Iterator[Tensor]:
        """Stored rows of a matrix from `start` to `stop`, `step` at a time."""
        for at in range(start, stop, step):
            rows = self.weights.rows(self.name(module), at, min(at + step, stop))
            yield move(rows, self.device, self.dtype)

    def look_up(self, module: str, ids: Tensor) -> Tensor:
        """Rows of an embedding [*ids.shape, width]; every id must be one of this rank's rows."""
        if self.block_bytes is None:
            return F.embedding(ids, self.matrix(module))
        name, wanted = self.name(module), sorted(set(ids.flatten().tolist()))
        rows = torch.cat([self.weights.rows(name, i, i + 1) for i in wanted])
        where = torch.searchsorted(torch.tensor(wanted, device=ids.device), ids)
        return move(rows, self.device, self.dtype)[where]
