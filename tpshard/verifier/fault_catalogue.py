"""Sharding faults, injected into loaded shards on purpose: what a verifier must notice.

Each changes one layer (or the embedding, or the head) of a sharded model, and gives nothing where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tpshard.verifier.places import DamagedShards, Places, Stretch
from tpshard.verifier.ranks.weights import Weights

CANARIES = (
    "rank-files-exchanged",
    "heads-swapped-in-a-rank",
    "heads-swapped-between-ranks",
    "k-and-v-exchanged",
    "gate-and-up-exchanged",
    "wrong-kv-replica",
    "out-bias-dropped",
    "down-bias-dropped",
    "v-bias-dropped",
    "out-bias-added-tp-times",
    "down-bias-added-tp-times",
    "up-row-shifted",
    "sign-of-an-element-of-out",
    "convolution-of-another-rank",
    "decay-of-another-rank",
    "choice-bias-shifted",
)
"""The faults that a verification injects."""

VISIBLE = 3.0
"""A fault whose true effect is below this many times the dtype's own error cannot be asked of the native tier."""


@dataclass(frozen=True)
class Fault:
    """A kind of damage.

    `structural` ones are large enough for the native tier; `harmless` ones change no logits; `between` ones need a
    second rank.
    """

    name: str
    inject: Callable[[DamagedShards, Places], None]
    structural: bool = True
    harmless: bool = False
    between: bool = False

    def mutant(self, places: Places) -> list[Weights] | None:
        """The damaged ranks, or None where the fault does not apply to this model or changes no bit."""
        if self.between and len(places.ranks) == 1:
            return None
        shards = DamagedShards(places)
        self.inject(shards, places)
        return shards.ranks_if_different()


FAULTS: dict[str, Fault] = {}
"""All faults by name."""
Inject = Callable[[DamagedShards, Places], None]


def _fault(*, structural: bool = True, harmless: bool = False, between: bool = False) -> Callable[[Inject], Inject]:
    def register(inject: Inject) -> Inject:
        name = inject.__name__.removeprefix("_").replace("_", "-")
        FAULTS[name] = Fault(name, inject, structural, harmless, between)
        return inject

    return register


def _swapped(tp: int) -> list[int]:
    return [1, 0, *range(2, tp)]


def _rolled(tp: int) -> list[int]:
    return [tp - 1, *range(tp - 1)]


def _with_biases(places: Places, rank: int, kind: str) -> list[Stretch]:
    """A rank's q, k or v."""
    return [*places.part(rank, kind), *places.part(rank, kind, bias=True)]


@_fault(between=True)
def _rank_files_exchanged(shards: DamagedShards, places: Places) -> None:
    shards.borrow(_swapped(shards.tp), places.names)


@_fault(between=True)
def _rank_files_rotated(shards: DamagedShards, places: Places) -> None:
    shards.borrow(_rolled(shards.tp), places.names)


@_fault(between=True)
def _two_ranks_the_same(shards: DamagedShards, places: Places) -> None:
    shards.borrow([0, 0, *range(2, shards.tp)], places.names)


@_fault(between=True)
def _vocab_shifted_by_a_rank(shards: DamagedShards, places: Places) -> None:
    shards.borrow(_rolled(shards.tp), places.tensors("embed"))


@_fault(between=True)
def _head_shifted_by_a_rank(shards: DamagedShards, places: Places) -> None:
    shards.borrow(_rolled(shards.tp), places.tensors("head"))


def _of_another_rank(role: str, *, structural: bool) -> None:
    """A fault by which two ranks have each other's tensors of a role."""

    def inject(shards: DamagedShards, places: Places) -> None:
        shards.borrow(_swapped(shards.tp), places.tensors(role))

    name = f"{role.replace('_', '-')}-of-another-rank"
    FAULTS[name] = Fault(name, inject, structural, between=True)


for _role in ("out", "down", "convolution"):
    _of_another_rank(_role, structural=True)
for _role in ("sinks", "decay", "qk_norm"):
    _of_another_rank(_role, structural=False)


@_fault()
def _heads_swapped_in_a_rank(shards: DamagedShards, places: Places) -> None:
    heads = places.heads(0)
    if len(heads) > 1:
        shards.swap(0, heads[0], 0, heads[1])


@_fault(between=True)
def _heads_swapped_between_ranks(shards: DamagedShards, places: Places) -> None:
    mine, theirs = places.heads(0), places.heads(1)
    if mine and theirs:
        shards.swap(0, mine[0], 1, theirs[0])


@_fault(between=True)
def _kv_swapped_between_ranks(shards: DamagedShards, places: Places) -> None:
    last = shards.tp - 1
    for kind in "kv":
        for bias in (False, True):
            shards.swap(0, places.part(0, kind, bias=bias)[:1], last, places.part(last, kind, bias=bias)[:1])


@_fault(between=True)
def _wrong_kv_replica(shards: DamagedShards, places: Places) -> None:
    """Tiled copies, [0, 1, 0, 1], where repeated ones, [0, 0, 1, 1], belong."""
    count = places.kv_heads
    if count >= shards.tp or shards.tp % count:
        return
    order = [(rank % count) * shards.tp // count for rank in range(shards.tp)]
    shards.borrow(order, places.tensors("k_norm"))
    for rank, lender in enumerate(order):
        for kind in "kv":
            for mine, theirs in zip(_with_biases(places, rank, kind), _with_biases(places, lender, kind), strict=True):
                shards.put(rank, mine, shards.ranks[lender].get(theirs.name).cpu()[theirs.index])


def _exchanged(one: str, two: str) -> Inject:
    """Exchange all of rank 0's q, k or v, where it has as much of both."""

    def inject(shards: DamagedShards, places: Places) -> None:
        first, second = _with_biases(places, 0, one), _with_biases(places, 0, two)
        if len(first) == len(second):
            shards.swap(0, first, 0, second)

    return inject


for _one, _two in ("kv", "qk", "qv"):
    FAULTS[f"{_one}-and-{_two}-exchanged"] = Fault(f"{_one}-and-{_two}-exchanged", _exchanged(_one, _two))


@_fault()
def _gate_and_up_exchanged(shards: DamagedShards, places: Places) -> None:
    for rank in range(shards.tp):
        for gate, up in places.gates(rank):
            shards.swap(rank, [gate], rank, [up])


@_fault()
def _rope_permuted(shards: DamagedShards, places: Places) -> None:
    """q and k in the order of the other kind of rotation."""
    order = places.rope_order
    if order is None:
        return
    for rank in range(shards.tp):
        for head in (*_with_biases(places, rank, "q"), *_with_biases(places, rank, "k")):
            values = shards.read(rank, head.name)[head.index]
            rest = torch.arange(len(order), values.shape[head.dim])
            shards.put(rank, head, values.index_select(head.dim, torch.cat((order, rest))))


@_fault()
def _v_bias_dropped(shards: DamagedShards, places: Places) -> None:
    for stretch in places.part(0, "v", bias=True):
        shards.put(0, stretch, torch.zeros_like(shards.read(0, stretch.name)[stretch.index]))


def _edit(name: str, role: str, change: Callable[[Tensor, int], Tensor], rank: int | None = None) -> None:
    """A fault that changes a role's biases (or weights, if the name speaks of none); `change` is given tp."""

    def inject(shards: DamagedShards, places: Places) -> None:
        names = places.tensors(role, bias="bias" in name)
        shards.edit(names, lambda tensor: change(tensor, shards.tp), rank if rank is None else rank % shards.tp)

    FAULTS[name] = Fault(name, inject)


_edit("out-bias-dropped", "out", lambda bias, tp: torch.zeros_like(bias))
_edit("down-bias-dropped", "down", lambda bias, tp: torch.zeros_like(bias))
_edit("up-bias-dropped", "up", lambda bias, tp: torch.zeros_like(bias), rank=0)
_edit("head-bias-dropped", "head", lambda bias, tp: torch.zeros_like(bias), rank=0)
_edit("out-bias-added-tp-times", "out", lambda bias, tp: bias * tp)
_edit("down-bias-added-tp-times", "down", lambda bias, tp: bias * tp)
_edit("down-bias-divided-by-tp", "down", lambda bias, tp: bias / tp)
_edit("out-scaled-by-tp", "out", lambda weight, tp: weight * tp)
_edit("out-of-a-rank-missing", "out", lambda weight, tp: torch.zeros_like(weight), rank=-1)  # read as zeros
_edit("down-of-a-rank-missing", "down", lambda weight, tp: torch.zeros_like(weight), rank=-1)
_edit("embedding-row-shifted", "embed", lambda weight, tp: weight.roll(1, 0), rank=0)


@_fault()
def _up_row_shifted(shards: DamagedShards, places: Places) -> None:
    shards.roll("up", rank=0)


@_fault()
def _down_column_shifted(shards: DamagedShards, places: Places) -> None:
    shards.roll("down", rank=0)


@_fault()
def _out_column_shifted(shards: DamagedShards, places: Places) -> None:
    shards.roll("out", rank=0)


@_fault(structural=False)
def _padding_is_embedded(shards: DamagedShards, places: Places) -> None:
    """The embedding's rows begin one late, as when padding went to the front."""
    shards.edit(places.tensors("embed"), lambda weight: torch.cat((torch.zeros_like(weight[:1]), weight[:-1])), rank=0)


@_fault(structural=False, harmless=True)
def _padding_not_zero(shards: DamagedShards, places: Places) -> None:
    for name in {*places.tensors("embed"), *places.tensors("head")}:
        rows = [rank.shape(name)[0] for rank in shards.ranks]
        extra = sum(rows) - places.vocab
        if 0 < extra < rows[-1]:
            padding, last = Stretch(name, 0, slice(-extra, None)), shards.tp - 1
            shards.put(last, padding, torch.ones_like(shards.read(last, name)[padding.index]))


@_fault(structural=False)
def _norm_of_another_layer(shards: DamagedShards, places: Places) -> None:
    for name in places.tensors("norm")[:1]:
        twin = places.twin(name)
        for rank in range(shards.tp) if twin is not None else ():
            shards.put(rank, Stretch(name), shards.read(rank, str(twin)))


@_fault(structural=False)
def _norm_of_one_rank_stale(shards: DamagedShards, places: Places) -> None:
    shards.edit(places.tensors("norm")[:1], lambda weight: weight * 1.01 + 0.01, rank=0)


@_fault(structural=False)
def _latent_of_one_rank_stale(shards: DamagedShards, places: Places) -> None:
    shards.edit(places.tensors("latent"), lambda weight: weight * 1.01, rank=shards.tp - 1)


@_fault(structural=False)
def _final_norm_dropped(shards: DamagedShards, places: Places) -> None:
    shards.edit(places.tensors("final_norm"), torch.ones_like)


@_fault()
def _a_layer_stale(shards: DamagedShards, places: Places) -> None:
    """A rank's layer is another layer's, as when a file of an earlier run is left."""
    for name in places.names:
        twin = places.twin(name)
        if twin is not None:
            shards.put(0, Stretch(name), shards.ranks[0].get(twin).cpu())


@_fault(structural=False)
def _positions_shifted(shards: DamagedShards, places: Places) -> None:
    shards.edit(places.tensors("positions"), lambda weight: weight.roll(1, 0))


@_fault(structural=False)
def _q_and_k_norm_exchanged(shards: DamagedShards, places: Places) -> None:
    for rank in range(shards.tp):
        q, k = ([Stretch(name) for name in places.tensors(role)] for role in ("q_norm", "k_norm"))
        shards.swap(rank, q, rank, k)


@_fault()
def _experts_exchanged(shards: DamagedShards, places: Places) -> None:
    """Two experts in each other's place in one rank's down matrices."""
    for one, two in places.experts():
        shards.swap(0, [one], 0, [two])


@_fault(structural=False)
def _router_rows_exchanged(shards: DamagedShards, places: Places) -> None:
    for name in places.tensors("router"):
        shards.swap(0, [Stretch(name, 0, slice(0, 1))], 0, [Stretch(name, 0, slice(1, 2))])


@_fault(structural=False)
def _choice_bias_shifted(shards: DamagedShards, places: Places) -> None:
    """What is added to the router's scores only to choose, which no logit depends on where choices are pinned."""
    shards.edit(places.tensors("choice_bias"), lambda bias: bias.roll(1, -1), rank=0)


def flip_largest(weight: Tensor) -> Tensor:
    """The weight with the sign of its largest element turned; same shape."""
    flat = weight.flatten()
    at = flat.abs().argmax()
    flat[at] = -flat[at]
    return flat.view_as(weight)


@_fault(structural=False)
def _sign_of_an_element_of_out(shards: DamagedShards, places: Places) -> None:
    shards.edit(places.tensors("out"), flip_largest, rank=shards.tp - 1)


@_fault(structural=False)
def _sign_of_an_element_of_down(shards: DamagedShards, places: Places) -> None:
    """Of experts that are stored one by one, in the last one alone."""
    shards.edit(places.tensors("down")[-1:], flip_largest, rank=shards.tp - 1)


@_fault()
def _square_transposed(shards: DamagedShards, places: Places) -> None:
    def turn(weight: Tensor) -> Tensor:
        size = min(weight.shape)
        weight[:size, :size] = weight[:size, :size].T.clone()
        return weight

    shards.edit(places.tensors("out"), turn, rank=0)


@_fault(structural=False)
def _cast_through_a_smaller_dtype(shards: DamagedShards, places: Places) -> None:
    def narrow(weight: Tensor) -> Tensor:
        smaller = torch.float8_e4m3fn if weight.element_size() == 2 else torch.bfloat16
        return weight.to(smaller).to(weight.dtype)

    shards.edit(places.tensors("down")[-1:], narrow, rank=0)


def canaries_of(places: Places, *, structural: bool) -> Iterator[tuple[str, list[Weights]]]:
    """The canaries that apply, as damaged ranks; `structural` leaves the small ones out."""
    for name in CANARIES:
        mutant = FAULTS[name].mutant(places) if FAULTS[name].structural or not structural else None
        if mutant is not None:
            yield name, mutant
