"""Sharding faults in the stored tensors of any architecture, found by names and by how shapes are cut.

Each changes one layer (or the embedding, or the head) of loaded shards, and gives nothing where it does not apply.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpshard.verifier.builtin.faults import flip_largest
from tpshard.verifier.hf.heads import total_heads
from tpshard.verifier.hf.skeleton import Cut
from tpshard.verifier.ranks.weights import Borrowed, Replaced, Weights
from tpshard.verifier.report.verdict import layer_of

OUT = re.compile(r"(att(ention|n)\w*|mamba|mixer)\.(o_proj|out_proj|c_proj|dense)\.")
DOWN = re.compile(r"(?<!attn\.)\b(down_proj|w2|fc2|fc_out|c_proj|output_linear|dense_4h_to_h)(_bias)?\b")
UP = re.compile(r"\b(up_proj|w3|fc1|fc_in|c_fc|gate_up_proj|input_linear|dense_h_to_4h)(_bias)?\b")
PAIRS = {"gate_proj": "up_proj", "w1": "w3"}
BOTH = re.compile(r"\b(gate_up_proj|input_linear)(_bias)?\b")
FUSED = re.compile(r"\.(qkv_proj|c_attn|Wqkv)\.")
V = re.compile(r"\.v_proj\.")
KV = re.compile(r"\.(k_proj|v_proj|k_norm)\.")
CHOICE_BIAS = re.compile(r"(correction_bias|expert_bias)$")
NORM = re.compile(r"norm|\.ln_")
EMBEDDINGS, HEAD = ("embed_tokens", "wte", "embed_in"), ("lm_head", "embed_out", "output_projection")
INTERLEAVED = {"gpt_oss"}
"""Families that store gate and up alternately."""


def is_bias(name: str) -> bool:
    return name.endswith("bias") and not CHOICE_BIAS.search(name)


class Bench:
    """The shards under a fault: the tensors `names` of which the model is made. `layer` is the one to damage."""

    def __init__(
        self, config: Any, source: Weights, ranks: Sequence[Weights], layer: int, names: Sequence[str] | None
    ) -> None:
        self.config = config
        self.source = source
        self.ranks = ranks
        self.tp = len(ranks)
        self.layer = layer
        self.changes: list[dict[str, Tensor]] = [{} for _ in ranks]
        self.borrowed: list[dict[str, Weights]] = [{} for _ in ranks]
        wanted = source.names() if names is None else names
        self.names = [name for name in wanted if all(name in rank.names() for rank in ranks)]

    def cut(self, name: str) -> Cut | None:
        """How a stored tensor is spread over the ranks; None if each has all of it."""
        full = self.source.shape(name)
        shapes = [rank.shape(name) for rank in self.ranks]
        dims = [dim for dim in range(len(full)) if any(shape[dim] != full[dim] for shape in shapes)]
        return Cut(dims[0], tuple(shape[dims[0]] for shape in shapes), full[dims[0]]) if dims else None

    def find(self, pattern: re.Pattern[str], *, bias: bool = False, cut: bool | None = None) -> list[str]:
        """The layer's tensors of a kind: matrices or biases, cut ones or whole ones."""
        return [
            name
            for name in self.names
            if layer_of(name) == self.layer
            and pattern.search(name)
            and is_bias(name) == bias
            and (cut is None or (self.cut(name) is not None) == cut)
        ]

    def read(self, rank: int, name: str) -> Tensor:
        tensor = self.changes[rank].get(name)
        return (self.ranks[rank].get(name) if tensor is None else tensor).to("cpu", copy=True)

    def write(self, rank: int, name: str, tensor: Tensor) -> None:
        self.changes[rank][name] = tensor.contiguous()

    def edit(self, names: Sequence[str], change: Callable[[Tensor], Tensor], rank: int | None = None) -> None:
        """Apply a change to tensors of one rank, or of all."""
        for name in names:
            for r in range(self.tp) if rank is None else [rank]:
                self.write(r, name, change(self.read(r, name)))

    def exchange(self, order: Sequence[int], names: Sequence[str], *, of_any_shape: bool = False) -> None:
        """Give each rank another's tensors, where shapes allow."""
        for rank, lender in enumerate(order):
            for name in names:
                if of_any_shape or self.ranks[rank].shape(name) == self.ranks[lender].shape(name):
                    self.borrowed[rank][name] = self.ranks[lender]

    def out(self) -> tuple[str, Cut, int] | None:
        """The layer's projection behind the heads, its cut, and the width of a head there."""
        heads, _ = total_heads(self.config)
        for name in self.find(OUT, cut=True):
            cut = self.cut(name)
            assert cut is not None
            return name, cut, cut.total // heads
        return None

    def outside(self, names: Sequence[str]) -> list[str]:
        return [name for name in self.names if name.split(".")[-2] in names]

    def mutant(self) -> list[Weights] | None:
        """The damaged ranks; None when not one bit is different."""
        for weights, changes, borrowed in zip(self.ranks, self.changes, self.borrowed, strict=True):
            new = [*changes.items(), *((name, lender.get(name)) for name, lender in borrowed.items())]
            if any(not torch.equal(tensor.cpu(), weights.get(name).cpu()) for name, tensor in new):
                whole = zip(self.ranks, self.borrowed, self.changes, strict=True)
                return [Replaced(Borrowed(w, b), c) for w, b, c in whole]
        return None


@dataclass(frozen=True)
class Fault:
    """A kind of damage; `structural` ones are large enough for the native tier."""

    name: str
    inject: Callable[[Bench], None]
    structural: bool = True

    def mutant(
        self,
        config: Any,
        source: Weights,
        ranks: Sequence[Weights],
        layer: int,
        names: Sequence[str] | None = None,
    ) -> list[Weights] | None:
        """The damaged ranks, or None where the fault does not apply to this model or changes no bit.

        `names` are the stored tensors that the model is made of; all by default.
        """
        bench = Bench(config, source, ranks, layer, names)
        self.inject(bench)
        return bench.mutant()


FAULTS: dict[str, Fault] = {}


def _fault(*, structural: bool = True) -> Callable[[Callable[[Bench], None]], None]:
    def register(inject: Callable[[Bench], None]) -> None:
        name = inject.__name__.removeprefix("_").replace("_", "-")
        FAULTS[name] = Fault(name, inject, structural)

    return register


def _swapped(tp: int) -> list[int]:
    return [1, 0, *range(2, tp)]


def _exchange_blocks(tensor: Tensor, dim: int, one: int, two: int, size: int) -> Tensor:
    first, second = tensor.narrow(dim, one, size).clone(), tensor.narrow(dim, two, size).clone()
    tensor.narrow(dim, one, size).copy_(second)
    tensor.narrow(dim, two, size).copy_(first)
    return tensor


@_fault()
def _rank_files_exchanged(bench: Bench) -> None:
    bench.exchange(_swapped(bench.tp), bench.names, of_any_shape=True)


@_fault()
def _two_ranks_the_same(bench: Bench) -> None:
    bench.exchange([0, 0, *range(2, bench.tp)], bench.names)


@_fault()
def _vocab_shifted_by_a_rank(bench: Bench) -> None:
    bench.exchange([bench.tp - 1, *range(bench.tp - 1)], bench.outside(EMBEDDINGS))


@_fault()
def _head_shifted_by_a_rank(bench: Bench) -> None:
    bench.exchange([bench.tp - 1, *range(bench.tp - 1)], bench.outside(HEAD))


@_fault()
def _out_of_another_rank(bench: Bench) -> None:
    bench.exchange(_swapped(bench.tp), bench.find(OUT, cut=True))


@_fault()
def _down_of_another_rank(bench: Bench) -> None:
    bench.exchange(_swapped(bench.tp), bench.find(DOWN, cut=True))


@_fault()
def _heads_swapped_in_a_rank(bench: Bench) -> None:
    found = bench.out()
    if found is not None and found[1].sizes[0] >= 2 * found[2]:
        name, cut, head = found
        bench.edit([name], lambda weight: _exchange_blocks(weight, cut.dim, 0, head, head), rank=0)


@_fault()
def _heads_swapped_between_ranks(bench: Bench) -> None:
    found = bench.out()
    if found is not None:
        name, cut, head = found
        one, two = bench.read(0, name), bench.read(1, name)
        kept = one.narrow(cut.dim, 0, head).clone()
        one.narrow(cut.dim, 0, head).copy_(two.narrow(cut.dim, 0, head))
        two.narrow(cut.dim, 0, head).copy_(kept)
        bench.write(0, name, one)
        bench.write(1, name, two)


def _fused_blocks(bench: Bench, name: str, rank: int) -> tuple[int, int, int] | None:
    """The cut dim of a fused q, k, v, and a rank's elements of q and of k there."""
    found, cut = bench.out(), bench.cut(name)
    if found is None or cut is None:
        return None
    q = found[1].sizes[rank]
    return cut.dim, q, (cut.sizes[rank] - q) // 2


@_fault()
def _k_and_v_exchanged(bench: Bench) -> None:
    for name in bench.find(V):
        other = name.replace("v_proj", "k_proj")
        one, two = bench.read(0, name), bench.read(0, other)
        if one.shape == two.shape:
            bench.write(0, name, two)
            bench.write(0, other, one)
    for name in bench.find(FUSED, cut=True):
        parts = _fused_blocks(bench, name, 0)
        if parts is not None:
            dim, q, kv = parts
            bench.edit([name], lambda weight: _exchange_blocks(weight, dim, q, q + kv, kv), rank=0)  # noqa: B023


@_fault()
def _q_and_k_exchanged(bench: Bench) -> None:
    for name in bench.find(FUSED, cut=True):
        parts = _fused_blocks(bench, name, 0)
        if parts is not None and parts[1] == parts[2]:
            dim, q, _ = parts
            bench.edit([name], lambda weight: _exchange_blocks(weight, dim, 0, q, q), rank=0)  # noqa: B023


@_fault()
def _gate_and_up_exchanged(bench: Bench) -> None:
    for gate, up in PAIRS.items():
        for name in bench.find(re.compile(rf"\b{gate}\."), cut=True):
            other = name.replace(f".{gate}.", f".{up}.")
            # An attention's gate has no other (AFMoE).
            for rank in range(bench.tp) if other in bench.names else ():
                one, two = bench.read(rank, name), bench.read(rank, other)
                bench.write(rank, name, two)
                bench.write(rank, other, one)
    for name in [*bench.find(BOTH, cut=True), *bench.find(BOTH, bias=True, cut=True)]:
        cut = bench.cut(name)
        assert cut is not None
        for rank in range(bench.tp):
            size, weight = cut.sizes[rank], bench.read(rank, name)
            order = torch.arange(size).roll(size // 2)
            if bench.config.model_type in INTERLEAVED:
                order = torch.arange(size).view(-1, 2).flip(1).flatten()
            bench.write(rank, name, weight.index_select(cut.dim, order))


@_fault()
def _wrong_kv_replica(bench: Bench) -> None:
    """Tiled copies, [0, 1, 0, 1], where repeated ones, [0, 0, 1, 1], belong."""
    _, count = total_heads(bench.config)
    if count >= bench.tp or bench.tp % count:
        return
    order = [(rank % count) * bench.tp // count for rank in range(bench.tp)]
    bench.exchange(order, [*bench.find(KV, cut=True), *bench.find(KV, bias=True, cut=True)])
    for name in bench.find(FUSED, cut=True):
        for rank, lender in enumerate(order):
            parts = _fused_blocks(bench, name, rank)
            if parts is not None:
                dim, q, kv = parts
                weight = bench.read(rank, name)
                weight.narrow(dim, q, 2 * kv).copy_(bench.ranks[lender].get(name).narrow(dim, q, 2 * kv))
                bench.write(rank, name, weight)


@_fault()
def _out_bias_dropped(bench: Bench) -> None:
    bench.edit(bench.find(OUT, bias=True), torch.zeros_like)


@_fault()
def _down_bias_dropped(bench: Bench) -> None:
    bench.edit(bench.find(DOWN, bias=True), torch.zeros_like)


@_fault()
def _up_bias_dropped(bench: Bench) -> None:
    bench.edit(bench.find(UP, bias=True), torch.zeros_like, rank=0)


@_fault()
def _v_bias_dropped(bench: Bench) -> None:
    bench.edit(bench.find(V, bias=True), torch.zeros_like, rank=0)


@_fault()
def _out_bias_added_tp_times(bench: Bench) -> None:
    bench.edit(bench.find(OUT, bias=True), lambda bias: bias * bench.tp)


@_fault()
def _down_bias_added_tp_times(bench: Bench) -> None:
    bench.edit(bench.find(DOWN, bias=True), lambda bias: bias * bench.tp)


@_fault()
def _up_row_shifted(bench: Bench) -> None:
    for name in bench.find(UP, cut=True):
        cut = bench.cut(name)
        assert cut is not None
        bench.edit([name], lambda weight: weight.roll(1, cut.dim), rank=0)  # noqa: B023


@_fault()
def _down_column_shifted(bench: Bench) -> None:
    for name in bench.find(DOWN, cut=True):
        cut = bench.cut(name)
        assert cut is not None
        bench.edit([name], lambda weight: weight.roll(1, cut.dim), rank=0)  # noqa: B023


@_fault()
def _embedding_row_shifted(bench: Bench) -> None:
    bench.edit(bench.outside(EMBEDDINGS), lambda weight: weight.roll(1, 0), rank=0)


@_fault()
def _out_of_a_rank_missing(bench: Bench) -> None:
    """A shard that was never found, read as zeros."""
    bench.edit(bench.find(OUT, cut=True), torch.zeros_like, rank=bench.tp - 1)


@_fault()
def _experts_exchanged(bench: Bench) -> None:
    """Two experts in each other's place in one rank's down matrices."""
    stacked = [name for name in bench.find(DOWN, cut=True) if len(bench.source.shape(name)) == 3]
    bench.edit(stacked, lambda weight: _exchange_blocks(weight, 0, 0, 1, 1), rank=0)
    for name in bench.find(re.compile(r"\.experts\.0\.(down_proj|w2)\."), cut=True):
        other = name.replace(".experts.0.", ".experts.1.")
        one, two = bench.read(0, name), bench.read(0, other)
        bench.write(0, name, two)
        bench.write(0, other, one)


@_fault(structural=False)
def _router_rows_exchanged(bench: Bench) -> None:
    routers = bench.find(re.compile(r"\.(gate|router)(\.layer)?\.weight$"), cut=False)
    bench.edit(routers, lambda weight: _exchange_blocks(weight, 0, 0, 1, 1), rank=0)


@_fault(structural=False)
def _choice_bias_shifted(bench: Bench) -> None:
    """What is added to the router's scores only to choose, which no logit depends on where choices are pinned."""
    biases = bench.find(CHOICE_BIAS, cut=False)
    bench.edit(biases, lambda bias: bias.roll(1, -1), rank=0)


@_fault(structural=False)
def _sinks_of_another_rank(bench: Bench) -> None:
    bench.exchange(_swapped(bench.tp), bench.find(re.compile(r"\.sinks$")))


@_fault()
def _convolution_of_another_rank(bench: Bench) -> None:
    bench.exchange(_swapped(bench.tp), bench.find(re.compile(r"\.conv1d\."), cut=True))


@_fault(structural=False)
def _decay_of_another_rank(bench: Bench) -> None:
    bench.exchange(_swapped(bench.tp), bench.find(re.compile(r"\.A_log$"), cut=True))


@_fault(structural=False)
def _qk_norm_of_another_rank(bench: Bench) -> None:
    bench.exchange(_swapped(bench.tp), bench.find(re.compile(r"\.[qk]_norm\."), cut=True))


@_fault(structural=False)
def _norm_of_one_rank_stale(bench: Bench) -> None:
    bench.edit(bench.find(NORM, cut=False)[:1], lambda weight: weight * 1.01 + 0.01, rank=0)


@_fault(structural=False)
def _latent_of_one_rank_stale(bench: Bench) -> None:
    bench.edit(bench.find(re.compile(r"\.kv_a_proj"), cut=False), lambda weight: weight * 1.01, rank=bench.tp - 1)


@_fault()
def _a_layer_stale(bench: Bench) -> None:
    """A rank's layer is another layer's, as when a file of an earlier run is left."""
    mine = [name for name in bench.names if layer_of(name) == bench.layer]
    for name in mine:
        other = re.sub(rf"(?<=\.){bench.layer}(?=\.)", str(max(bench.layer - 1, 0)), name, count=1)
        if other in bench.names and bench.ranks[0].shape(other) == bench.ranks[0].shape(name):
            bench.write(0, name, bench.ranks[0].get(other))


@_fault(structural=False)
def _sign_of_an_element_of_out(bench: Bench) -> None:
    bench.edit(bench.find(OUT, cut=True), flip_largest, rank=bench.tp - 1)


@_fault(structural=False)
def _sign_of_an_element_of_down(bench: Bench) -> None:
    """Of experts that are stored one by one, in the last one alone."""
    bench.edit(bench.find(DOWN, cut=True)[-1:], flip_largest, rank=bench.tp - 1)


@_fault(structural=False)
def _cast_through_a_smaller_dtype(bench: Bench) -> None:
    def narrow(weight: Tensor) -> Tensor:
        smaller = torch.float8_e4m3fn if weight.element_size() == 2 else torch.bfloat16
        return weight.to(smaller).to(weight.dtype)

    bench.edit(bench.find(DOWN, cut=True)[-1:], narrow, rank=0)
