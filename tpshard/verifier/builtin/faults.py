"""Sharding faults, injected into loaded shards on purpose: what a verifier must notice.

Each changes one layer (or the embedding, or the head) of a sharded model, and gives nothing where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpshard.verifier.builtin.store import Store
from tpshard.verifier.families.family import Family
from tpshard.verifier.ranks.weights import Borrowed, Replaced, Weights


class Bench:
    """The shards under a fault: tensors read as [out, in] and written back, in the stored dtype.

    `layer` is the one to damage, `other` another one to borrow from (None in a model of one layer).
    """

    def __init__(self, family: Family, ranks: Sequence[Weights], layer: int) -> None:
        self.family = family
        self.ranks = ranks
        self.layer = layer
        self.other = None if family.layers == 1 else (layer + 1) % family.layers
        cpu = torch.device("cpu")
        self.stores = [Store(weights, family, torch.float32, cpu, rank) for rank, weights in enumerate(ranks)]
        self.held = [store.held(layer) for store in self.stores]
        self.changes: list[dict[str, Tensor]] = [{} for _ in ranks]
        self.borrowed: list[dict[str, Weights]] = [{} for _ in ranks]

    @property
    def tp(self) -> int:
        return len(self.ranks)

    def at(self, module: str, layer: int | None = None) -> str:
        return self.family.layer.format(self.layer if layer is None else layer) + module

    def name(self, module: str, suffix: str = "weight") -> str:
        return f"{self.stores[0].full(module)}.{suffix}"

    def has(self, module: str, suffix: str = "weight") -> bool:
        return self.name(module, suffix) in self.ranks[0].names()

    def read(self, rank: int, module: str, suffix: str = "weight") -> Tensor:
        name = self.name(module, suffix)
        tensor = self.changes[rank].get(name)
        tensor = self.ranks[rank].get(name) if tensor is None else tensor
        turned = suffix == "weight" and module in self.stores[0].transposed
        return (tensor.T if turned else tensor).to("cpu", copy=True)

    def write(self, rank: int, module: str, tensor: Tensor, suffix: str = "weight") -> None:
        turned = suffix == "weight" and module in self.stores[0].transposed
        self.changes[rank][self.name(module, suffix)] = (tensor.T if turned else tensor).contiguous()

    def edit(
        self, module: str, change: Callable[[Tensor], Tensor], *, suffix: str = "weight", rank: int | None = None
    ) -> None:
        """Apply a change to a tensor of one rank, or of all; nothing when there is no such tensor."""
        if self.has(module, suffix):
            for r in range(self.tp) if rank is None else [rank]:
                self.write(r, module, change(self.read(r, module, suffix)), suffix)

    def head_rows(self, rank: int, kind: str, head: int) -> tuple[str, slice]:
        """The module and rows that make a rank's local q, k or v head."""
        family, d = self.family, self.family.head_dim
        q, kv, _ = self.held[rank]
        if family.fused is None:
            return self.at(family.qkv["qkv".index(kind)]), slice(head * d, (head + 1) * d)
        if family.fused == "segments":
            first = {"q": 0, "k": q, "v": q + kv}[kind] + head
        else:
            per = q // kv
            group, within = divmod(head, per) if kind == "q" else (head, per + "kv".index(kind))
            first = group * (per + 2) + within
        return self.at(family.qkv[0]), slice(first * d, (first + 1) * d)

    def swap_heads(self, one: tuple[int, str, int], two: tuple[int, str, int]) -> None:
        """Exchange two heads, each (rank, "q", "k" or "v", local head), with their biases."""
        (module_1, rows_1), (module_2, rows_2) = self.head_rows(*one), self.head_rows(*two)
        for suffix in ("weight", "bias"):
            if not self.has(module_1, suffix):
                continue
            first = self.read(one[0], module_1, suffix)[rows_1]
            second = self.read(two[0], module_2, suffix)[rows_2]
            for rank, module, rows, value in ((one[0], module_1, rows_1, second), (two[0], module_2, rows_2, first)):
                tensor = self.read(rank, module, suffix)
                tensor[rows] = value
                self.write(rank, module, tensor, suffix)

    def mutant(self) -> list[Weights] | None:
        """The damaged ranks; None when not one bit is different."""
        for weights, changes, borrowed in zip(self.ranks, self.changes, self.borrowed, strict=True):
            if any(not torch.equal(tensor.cpu(), weights.get(name).cpu()) for name, tensor in changes.items()) or any(
                not _same(weights, other, name) for name, other in borrowed.items()
            ):
                whole = zip(self.ranks, self.borrowed, self.changes, strict=True)
                return [Replaced(Borrowed(w, b), c) for w, b, c in whole]
        return None


def _same(one: Weights, other: Weights, name: str, step: int = 1024) -> bool:
    """Whether two ranks' tensors are equal, looked at a few rows at a time: an embedding is large."""
    if one.shape(name) != other.shape(name):
        return False
    rows = one.shape(name)[0] if one.shape(name) else 0
    if not rows:
        return torch.equal(one.get(name).cpu(), other.get(name).cpu())
    blocks = ((at, min(at + step, rows)) for at in range(0, rows, step))
    return all(torch.equal(one.rows(name, *at).cpu(), other.rows(name, *at).cpu()) for at in blocks)


@dataclass(frozen=True)
class Fault:
    """A kind of damage. `structural` ones are large enough for the native tier; `harmless` ones change no logits."""

    name: str
    inject: Callable[[Bench], None]
    structural: bool = True
    harmless: bool = False

    def mutant(self, family: Family, ranks: Sequence[Weights], layer: int) -> list[Weights] | None:
        """The damaged ranks, or None where the fault does not apply to this model or changes no bit."""
        bench = Bench(family, ranks, layer)
        self.inject(bench)
        return bench.mutant()


FAULTS: dict[str, Fault] = {}


def _fault(*, structural: bool = True, harmless: bool = False) -> Callable[[Callable[[Bench], None]], None]:
    def register(inject: Callable[[Bench], None]) -> None:
        name = inject.__name__.removeprefix("_").replace("_", "-")
        FAULTS[name] = Fault(name, inject, structural, harmless)

    return register


def _exchange(bench: Bench, order: Sequence[int], wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Give each rank another's tensors. Whole files go whatever their shapes, single ones only where they would fit."""
    whole = all(wanted(name) for name in bench.ranks[0].names())
    for rank, source in enumerate(order):
        for name in bench.ranks[rank].names():
            if whole or (wanted(name) and bench.ranks[rank].shape(name) == bench.ranks[source].shape(name)):
                bench.borrowed[rank][name] = bench.ranks[source]


def _two_swapped(tp: int) -> list[int]:
    return [1, 0, *range(2, tp)]


def _rolled(tp: int) -> list[int]:
    return [tp - 1, *range(tp - 1)]


@_fault()
def _rank_files_exchanged(bench: Bench) -> None:
    _exchange(bench, _two_swapped(bench.tp))


@_fault()
def _rank_files_rotated(bench: Bench) -> None:
    _exchange(bench, _rolled(bench.tp))


@_fault()
def _two_ranks_the_same(bench: Bench) -> None:
    _exchange(bench, [0, 0, *range(2, bench.tp)])


@_fault()
def _vocab_shifted_by_a_rank(bench: Bench) -> None:
    embed = bench.name(bench.family.embed)
    _exchange(bench, _rolled(bench.tp), lambda name: name == embed)


@_fault()
def _head_shifted_by_a_rank(bench: Bench) -> None:
    head = bench.name(bench.stores[0].head())
    _exchange(bench, _rolled(bench.tp), lambda name: name == head)


@_fault()
def _out_of_another_rank(bench: Bench) -> None:
    out = bench.name(bench.at(bench.family.out))
    _exchange(bench, _two_swapped(bench.tp), lambda name: name == out)


@_fault()
def _down_of_another_rank(bench: Bench) -> None:
    down = bench.name(bench.at(bench.family.down))
    _exchange(bench, _two_swapped(bench.tp), lambda name: name == down)


@_fault()
def _heads_swapped_in_a_rank(bench: Bench) -> None:
    if bench.held[0][0] > 1:
        bench.swap_heads((0, "q", 0), (0, "q", 1))


@_fault()
def _heads_swapped_between_ranks(bench: Bench) -> None:
    bench.swap_heads((0, "q", 0), (1, "q", 0))


@_fault()
def _kv_swapped_between_ranks(bench: Bench) -> None:
    for kind in "kv":
        bench.swap_heads((0, kind, 0), (bench.tp - 1, kind, 0))


@_fault()
def _wrong_kv_replica(bench: Bench) -> None:
    """Tiled copies, [0, 1, 0, 1], where repeated ones, [0, 0, 1, 1], belong."""
    count = bench.family.kv_heads
    if count >= bench.tp:
        return
    for rank in range(bench.tp):
        source = (rank % count) * bench.tp // count
        for kind in "kv":
            (module, rows), (_, source_rows) = bench.head_rows(rank, kind, 0), bench.head_rows(source, kind, 0)
            for suffix in ("weight", "bias"):
                if bench.has(module, suffix):
                    tensor = bench.read(rank, module, suffix)
                    name = bench.name(module, suffix)
                    clean = bench.ranks[source].get(name).cpu()
                    turned = suffix == "weight" and module in bench.stores[0].transposed
                    tensor[rows] = (clean.T if turned else clean)[source_rows]
                    bench.write(rank, module, tensor, suffix)


@_fault()
def _k_and_v_exchanged(bench: Bench) -> None:
    for head in range(bench.held[0][1]):
        bench.swap_heads((0, "k", head), (0, "v", head))


@_fault()
def _q_and_k_exchanged(bench: Bench) -> None:
    if bench.held[0][0] == bench.held[0][1]:
        for head in range(bench.held[0][0]):
            bench.swap_heads((0, "q", head), (0, "k", head))


@_fault()
def _q_and_v_exchanged(bench: Bench) -> None:
    if bench.held[0][0] == bench.held[0][1]:
        for head in range(bench.held[0][0]):
            bench.swap_heads((0, "q", head), (0, "v", head))


@_fault()
def _gate_and_up_exchanged(bench: Bench) -> None:
    if bench.family.gate is not None:
        gate, up = bench.at(bench.family.gate), bench.at(bench.family.up)
        for rank in range(bench.tp):
            one, two = bench.read(rank, gate), bench.read(rank, up)
            bench.write(rank, gate, two)
            bench.write(rank, up, one)


@_fault()
def _rope_permuted(bench: Bench) -> None:
    """q and k in the order of the other kind of rotation, halves against pairs."""
    rope = bench.family.rope
    if rope is None:
        return
    order = torch.arange(rope.dims).view(2, -1).T.flatten()
    order = order.argsort() if rope.interleaved else order
    for rank in range(bench.tp):
        for kind, count in (("q", bench.held[rank][0]), ("k", bench.held[rank][1])):
            for head in range(count):
                module, rows = bench.head_rows(rank, kind, head)
                for suffix in ("weight", "bias"):
                    if bench.has(module, suffix):
                        tensor = bench.read(rank, module, suffix)
                        whole = tensor[rows].clone()
                        tensor[rows] = torch.cat((whole[order], whole[rope.dims :]))
                        bench.write(rank, module, tensor, suffix)


@_fault()
def _out_bias_dropped(bench: Bench) -> None:
    bench.edit(bench.at(bench.family.out), torch.zeros_like, suffix="bias")


@_fault()
def _down_bias_dropped(bench: Bench) -> None:
    bench.edit(bench.at(bench.family.down), torch.zeros_like, suffix="bias")


@_fault()
def _up_bias_dropped(bench: Bench) -> None:
    bench.edit(bench.at(bench.family.up), torch.zeros_like, suffix="bias", rank=0)


@_fault()
def _v_bias_dropped(bench: Bench) -> None:
    for head in range(bench.held[0][1]):
        module, rows = bench.head_rows(0, "v", head)
        if bench.has(module, "bias"):
            bias = bench.read(0, module, "bias")
            bias[rows] = 0
            bench.write(0, module, bias, "bias")


@_fault()
def _head_bias_dropped(bench: Bench) -> None:
    for head in bench.family.heads_names:
        bench.edit(head, torch.zeros_like, suffix="bias", rank=0)


@_fault()
def _out_bias_added_tp_times(bench: Bench) -> None:
    bench.edit(bench.at(bench.family.out), lambda bias: bias * bench.tp, suffix="bias")


@_fault()
def _down_bias_added_tp_times(bench: Bench) -> None:
    bench.edit(bench.at(bench.family.down), lambda bias: bias * bench.tp, suffix="bias")


@_fault()
def _down_bias_divided_by_tp(bench: Bench) -> None:
    bench.edit(bench.at(bench.family.down), lambda bias: bias / bench.tp, suffix="bias")


@_fault()
def _out_scaled_by_tp(bench: Bench) -> None:
    bench.edit(bench.at(bench.family.out), lambda weight: weight * bench.tp)


@_fault()
def _up_row_shifted(bench: Bench) -> None:
    bench.edit(bench.at(bench.family.up), lambda weight: weight.roll(1, 0), rank=0)


@_fault()
def _down_column_shifted(bench: Bench) -> None:
    bench.edit(bench.at(bench.family.down), lambda weight: weight.roll(1, 1), rank=0)


@_fault()
def _out_column_shifted(bench: Bench) -> None:
    bench.edit(bench.at(bench.family.out), lambda weight: weight.roll(1, 1), rank=0)


@_fault()
def _embedding_row_shifted(bench: Bench) -> None:
    bench.edit(bench.family.embed, lambda weight: weight.roll(1, 0), rank=0)


@_fault()
def _out_of_a_rank_missing(bench: Bench) -> None:
    """A shard that was never found, read as zeros."""
    bench.edit(bench.at(bench.family.out), torch.zeros_like, rank=bench.tp - 1)


@_fault()
def _down_of_a_rank_missing(bench: Bench) -> None:
    bench.edit(bench.at(bench.family.down), torch.zeros_like, rank=bench.tp - 1)


@_fault(structural=False)
def _padding_is_embedded(bench: Bench) -> None:
    """The embedding's rows begin one late, as when padding went to the front."""
    bench.edit(bench.family.embed, lambda weight: torch.cat((torch.zeros_like(weight[:1]), weight[:-1])), rank=0)


@_fault(structural=False, harmless=True)
def _padding_not_zero(bench: Bench) -> None:
    rows = [store.matrix_shape(bench.family.embed)[0] for store in bench.stores]
    extra = sum(rows) - bench.family.vocab
    if 0 < extra < rows[-1]:

        def fill(weight: Tensor) -> Tensor:
            weight[-extra:] = 1
            return weight

        for module in {bench.family.embed, bench.stores[0].head()}:
            bench.edit(module, fill, rank=bench.tp - 1)


@_fault(structural=False)
def _norm_of_another_layer(bench: Bench) -> None:
    norm = bench.family.attn_norm
    if bench.other is not None and bench.has(bench.at(norm)):
        for rank in range(bench.tp):
            bench.write(rank, bench.at(norm), bench.read(rank, bench.at(norm, bench.other)))


@_fault(structural=False)
def _norm_of_one_rank_stale(bench: Bench) -> None:
    bench.edit(bench.at(bench.family.attn_norm), lambda weight: weight * 1.01 + 0.01, rank=0)


@_fault(structural=False)
def _final_norm_dropped(bench: Bench) -> None:
    if bench.family.final_norm is not None:
        bench.edit(bench.family.final_norm, torch.ones_like)


@_fault()
def _a_layer_stale(bench: Bench) -> None:
    """A rank's layer is another layer's, as when a file of an earlier run is left."""
    if bench.other is None:
        return
    mine, others = (bench.stores[0].full(bench.at("", layer)) for layer in (bench.layer, bench.other))
    for name in bench.ranks[0].names():
        if name.startswith(mine):
            bench.changes[0][name] = bench.ranks[0].get(others + name.removeprefix(mine))


@_fault(structural=False)
def _positions_shifted(bench: Bench) -> None:
    if bench.family.positions is not None:
        bench.edit(bench.family.positions, lambda weight: weight.roll(1, 0))


@_fault(structural=False)
def _q_and_k_norm_exchanged(bench: Bench) -> None:
    if bench.family.q_norm is not None and bench.family.k_norm is not None:
        one, two = bench.at(bench.family.q_norm), bench.at(bench.family.k_norm)
        for rank in range(bench.tp):
            q, k = bench.read(rank, one), bench.read(rank, two)
            bench.write(rank, one, k)
            bench.write(rank, two, q)


def flip_largest(weight: Tensor) -> Tensor:
    """The weight with the sign of its largest element turned; same shape."""
    flat = weight.flatten()
    at = flat.abs().argmax()
    flat[at] = -flat[at]
    return flat.view_as(weight)


@_fault(structural=False)
def _sign_of_an_element_of_out(bench: Bench) -> None:
    bench.edit(bench.at(bench.family.out), flip_largest, rank=bench.tp - 1)


@_fault(structural=False)
def _sign_of_an_element_of_down(bench: Bench) -> None:
    bench.edit(bench.at(bench.family.down), flip_largest, rank=bench.tp - 1)


@_fault()
def _square_transposed(bench: Bench) -> None:
    def turn(weight: Tensor) -> Tensor:
        size = min(weight.shape)
        weight[:size, :size] = weight[:size, :size].T.clone()
        return weight

    bench.edit(bench.at(bench.family.out), turn, rank=0)


@_fault(structural=False)
def _cast_through_a_smaller_dtype(bench: Bench) -> None:
    def narrow(weight: Tensor) -> Tensor:
        smaller = torch.float8_e4m3fn if weight.element_size() == 2 else torch.bfloat16
        return weight.to(smaller).to(weight.dtype)

    bench.edit(bench.at(bench.family.down), narrow, rank=0)


def catalogue() -> Mapping[str, Fault]:
    """All faults by name."""
    return FAULTS
