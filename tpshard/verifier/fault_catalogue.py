"""Sharding faults, injected into loaded shards on purpose: what a verifier must notice.

Each changes one layer (or the embedding, or the head) of a sharded model, and gives nothing where it does not apply.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from operator import mul, truediv

import torch
from torch import Tensor

from tpshard.verifier.places import DamagedShards, Places, Stretch
from tpshard.verifier.ranks.weights import Weights
from tpshard.verifier.stacks import sharing

Inject = Callable[[DamagedShards, Places], None]
Pairs = Iterable[tuple[Stretch, Stretch]]
Change = Callable[[Tensor], Tensor]
ALL, FIRST, LAST = slice(None), slice(1), slice(-1, None)
"""Of the tensors of a role."""


@dataclass(frozen=True)
class Fault:
    """A kind of damage. `harmless` ones change no logits; `between` ones need a second rank."""

    name: str
    inject: Inject
    harmless: bool = False
    between: bool = False

    def mutant(self, places: Places) -> list[Weights] | None:
        """The damaged ranks, or None where the fault does not apply to this model or changes no bit."""
        if self.between and len(places.ranks) == 1:
            return None
        shards = DamagedShards(places)
        self.inject(shards, places)
        return shards.ranks_if_different()


def _borrowed(role: str | None = None, first: Sequence[int] | None = (1, 0)) -> Inject:
    """Ranks have a role's tensors, or all, of other ranks: the first ones of `first`; None: each of the one before."""

    def inject(shards: DamagedShards, places: Places) -> None:
        order = [rank - 1 for rank in range(shards.tp)] if first is None else [*first, *range(2, shards.tp)]
        shards.borrow(order, places.names if role is None else places.tensors(role))

    return inject


def _with_biases(places: Places, rank: int, kind: str) -> list[Stretch]:
    """A rank's q, k or v."""
    return [*places.part(rank, kind), *places.part(rank, kind, bias=True)]


def _wrong_kv_replica(shards: DamagedShards, places: Places) -> None:
    """Tiled copies, [0, 1, 0, 1], where repeated ones, [0, 0, 1, 1], belong; a rank's second head for its first."""
    count = places.kv_heads
    if count >= shards.tp:
        return
    if shards.tp % count:
        several = [rank for rank in range(shards.tp) if len(places.part(rank, "k")) > 1]
        for rank, kind, bias in product(several[:1], "kv", (False, True)):
            if heads := places.part(rank, kind, bias=bias):
                shards.put(rank, heads[0], shards.read(rank, heads[1].name)[heads[1].index])
        return
    order = [(rank % count) * shards.tp // count for rank in range(shards.tp)]
    shards.borrow(order, places.tensors("k_norm"))
    for rank, lender in enumerate(order):
        for kind in "kv":
            for mine, theirs in zip(_with_biases(places, rank, kind), _with_biases(places, lender, kind), strict=True):
                shards.put(rank, mine, shards.ranks[lender].get(theirs.name).cpu()[theirs.index])


def _heads_swapped(other: int) -> Inject:
    """The first head of rank 0 and one of `other`: its first one, or the second one of rank 0 itself."""

    def inject(shards: DamagedShards, places: Places) -> None:
        mine, theirs = places.heads(0)[:1], places.heads(other)[other == 0 :]
        if mine and theirs:
            shards.swap(0, mine[0], other, theirs[0])

    return inject


def _kv_swapped_between_ranks(shards: DamagedShards, places: Places) -> None:
    last = shards.tp - 1
    for kind in "kv":
        for bias in (False, True):
            shards.swap(0, places.part(0, kind, bias=bias)[:1], last, places.part(last, kind, bias=bias)[:1])


def _experts_of_others(shards: DamagedShards, places: Places) -> None:
    """Ranks have the experts of those that have the next ones; who shares experts has the other's share."""
    held = places.dealt_experts()
    ranks = sharing([first for first, _ in held])
    for mine, theirs in zip(ranks.values(), [*ranks.values()][1:] + [*ranks.values()][:1], strict=True):
        for rank, other in zip(mine, theirs, strict=False):
            for one, two in zip(held[rank][1], held[other][1], strict=True):
                shards.put(rank, one, shards.ranks[other].get(two.name).cpu()[two.index])


def _exchanged(pairs: Callable[[Places, int], Pairs], *, everywhere: bool = False) -> Inject:
    """Exchange stretches of rank 0, or of every rank, within the rank."""

    def inject(shards: DamagedShards, places: Places) -> None:
        for rank in range(shards.tp if everywhere else 1):
            for one, two in pairs(places, rank):
                shards.swap(rank, [one], rank, [two])

    return inject


def _q_k_v(kinds: str) -> Inject:
    """Exchange all of rank 0's q, k or v, where it has as much of both."""

    def pairs(places: Places, rank: int) -> Pairs:
        first, second = (_with_biases(places, rank, kind) for kind in kinds)
        return zip(first, second, strict=True) if len(first) == len(second) else ()

    return _exchanged(pairs)


def _q_and_k_norms(places: Places, rank: int) -> Pairs:
    return zip(*(map(Stretch, places.tensors(role)) for role in ("q_norm", "k_norm")), strict=False)


def _router_rows(places: Places, rank: int) -> Pairs:
    return [(Stretch(name, 0, slice(0, 1)), Stretch(name, 0, slice(1, 2))) for name in places.tensors("router")]


def _edit(role: str, change: Change, rank: int | None = None, *, bias: bool = False, which: slice = ALL) -> Inject:
    """Change a role's weights, or biases, of one rank (-1: the last) or of all."""
    return lambda shards, places: shards.edit(places.tensors(role, bias=bias)[which], change, rank)


def _by_tp(role: str, operate: Callable[[Tensor, int], Tensor], *, bias: bool = True) -> Inject:
    """Scale a role's biases, or weights, by tp on all ranks."""
    return lambda shards, places: shards.edit(places.tensors(role, bias=bias), lambda x: operate(x, shards.tp))


def _sign_of_the_largest(weight: Tensor) -> Tensor:
    flat = weight.flatten()
    flat[flat.abs().argmax()] *= -1
    return flat.view_as(weight)


def _turned(weight: Tensor) -> Tensor:
    size = min(weight.shape)
    weight[:size, :size] = weight[:size, :size].T.clone()
    return weight


def _narrowed(weight: Tensor) -> Tensor:
    return weight.to(torch.float8_e4m3fn if weight.element_size() == 2 else torch.bfloat16).to(weight.dtype)


def _shifted(role: str) -> Inject:
    """What rank 0's weights hold along their cut dim, moved by one."""

    def inject(shards: DamagedShards, places: Places) -> None:
        for name in places.tensors(role):
            shards.shift(0, name, places.axis(role, name))

    return inject


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


def _v_bias_dropped(shards: DamagedShards, places: Places) -> None:
    for stretch in places.part(0, "v", bias=True):
        shards.put(0, stretch, torch.zeros_like(shards.read(0, stretch.name)[stretch.index]))


def _padding_not_zero(shards: DamagedShards, places: Places) -> None:
    for name in {*places.tensors("embed"), *places.tensors("head")}:
        rows = [rank.shape(name)[0] for rank in shards.ranks]
        extra = sum(rows) - places.vocab
        if 0 < extra < rows[-1]:
            padding = Stretch(name, 0, slice(-extra, None))
            shards.put(-1, padding, torch.ones_like(shards.read(-1, name)[padding.index]))


def _norm_of_another_layer(shards: DamagedShards, places: Places) -> None:
    for name in places.tensors("norm")[:1]:
        if twin := places.twin(name):
            for rank in range(shards.tp):
                shards.put(rank, Stretch(name), shards.read(rank, twin))


def _a_layer_stale(shards: DamagedShards, places: Places) -> None:
    """A rank's layer is another layer's, as when a file of an earlier run is left."""
    for name in places.names:
        if twin := places.twin(name):
            shards.put(0, Stretch(name), shards.ranks[0].get(twin).cpu())


_INJECTED = (
    Fault("rank-files-exchanged", _borrowed(), between=True),
    Fault("heads-swapped-in-a-rank", _heads_swapped(0)),
    Fault("heads-swapped-between-ranks", _heads_swapped(1), between=True),
    Fault("k-and-v-exchanged", _q_k_v("kv")),
    Fault("gate-and-up-exchanged", _exchanged(lambda places, rank: places.gates(rank), everywhere=True)),
    Fault("wrong-kv-replica", _wrong_kv_replica, between=True),
    Fault("out-bias-dropped", _edit("out", torch.zeros_like, bias=True)),
    Fault("down-bias-dropped", _edit("down", torch.zeros_like, bias=True)),
    Fault("v-bias-dropped", _v_bias_dropped),
    Fault("out-bias-added-tp-times", _by_tp("out", mul)),
    Fault("down-bias-added-tp-times", _by_tp("down", mul)),
    Fault("up-row-shifted", _shifted("up")),
    Fault("sign-of-an-element-of-out", _edit("out", _sign_of_the_largest, -1)),
    Fault("experts-of-another-rank", _experts_of_others, between=True),
    Fault("convolution-of-another-rank", _borrowed("convolution"), between=True),
    Fault("decay-of-another-rank", _borrowed("decay"), between=True),
    # Is added to the router's scores only to choose: no logit depends on it where choices are pinned.
    Fault("choice-bias-shifted", _edit("choice_bias", lambda bias: bias.roll(1, -1), 0)),
)
_OTHERS = (
    Fault("rank-files-rotated", _borrowed(first=None), between=True),
    Fault("two-ranks-the-same", _borrowed(first=(0, 0)), between=True),
    Fault("vocab-shifted-by-a-rank", _borrowed("embed", None), between=True),
    Fault("head-shifted-by-a-rank", _borrowed("head", None), between=True),
    Fault("out-of-another-rank", _borrowed("out"), between=True),
    Fault("down-of-another-rank", _borrowed("down"), between=True),
    Fault("sinks-of-another-rank", _borrowed("sinks"), between=True),
    Fault("qk-norm-of-another-rank", _borrowed("qk_norm"), between=True),
    Fault("kv-swapped-between-ranks", _kv_swapped_between_ranks, between=True),
    Fault("q-and-k-exchanged", _q_k_v("qk")),
    Fault("q-and-v-exchanged", _q_k_v("qv")),
    Fault("q-and-k-norm-exchanged", _exchanged(_q_and_k_norms, everywhere=True)),
    Fault("experts-exchanged", _exchanged(lambda places, rank: places.experts())),  # in one rank's down matrices
    Fault("router-rows-exchanged", _exchanged(_router_rows)),
    Fault("rope-permuted", _rope_permuted),
    Fault("up-bias-dropped", _edit("up", torch.zeros_like, 0, bias=True)),
    Fault("head-bias-dropped", _edit("head", torch.zeros_like, 0, bias=True)),
    Fault("down-bias-divided-by-tp", _by_tp("down", truediv)),
    Fault("out-scaled-by-tp", _by_tp("out", mul, bias=False)),
    Fault("out-of-a-rank-missing", _edit("out", torch.zeros_like, -1)),  # read as zeros
    Fault("down-of-a-rank-missing", _edit("down", torch.zeros_like, -1)),
    Fault("embedding-row-shifted", _edit("embed", lambda x: x.roll(1, 0), 0)),
    Fault("down-column-shifted", _shifted("down")),
    Fault("out-column-shifted", _shifted("out")),
    Fault("padding-is-embedded", _edit("embed", lambda x: torch.cat((x[:1] * 0, x[:-1])), 0)),
    Fault("padding-not-zero", _padding_not_zero, harmless=True),
    Fault("norm-of-another-layer", _norm_of_another_layer),
    Fault("norm-of-one-rank-stale", _edit("norm", lambda x: x * 1.01 + 0.01, 0, which=FIRST)),
    Fault("latent-of-one-rank-stale", _edit("latent", lambda x: x * 1.01, -1)),
    Fault("final-norm-dropped", _edit("final_norm", torch.ones_like)),
    Fault("a-layer-stale", _a_layer_stale),
    Fault("positions-shifted", _edit("positions", lambda x: x.roll(1, 0))),
    Fault("sign-of-an-element-of-down", _edit("down", _sign_of_the_largest, -1, which=LAST)),
    Fault("square-transposed", _edit("out", _turned, 0)),
    Fault("cast-through-a-smaller-dtype", _edit("down", _narrowed, 0, which=LAST)),
)
FAULTS = {fault.name: fault for fault in (*_INJECTED, *_OTHERS)}
"""All faults by name."""
CANARIES = tuple(fault.name for fault in _INJECTED)
"""The faults that a verification injects."""


def canaries_of(places: Places) -> Iterator[tuple[str, list[Weights]]]:
    """The canaries that apply, as damaged ranks."""
    for name in CANARIES:
        mutant = FAULTS[name].mutant(places)
        if mutant is not None:
            yield name, mutant
