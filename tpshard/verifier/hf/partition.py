"""Which elements of the source each rank must hold of the parameters of transformers' classes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpshard.verifier.elements import Held, Parameter, RankShares, Share, idle
from tpshard.verifier.hf.parameters import StoredParts, place_of
from tpshard.verifier.hf.skeleton import Frame
from tpshard.verifier.ranks.weights import Weights
from tpshard.verifier.stacks import sharing

_PLAIN = re.compile(
    r"\.([qkvo]_proj|[qk]_norm|gate_proj|up_proj|down_proj|w[123]|fc1|fc2|q_b_proj|kv_b_proj)(\.(weight|bias))?$"
)
"""Modules that are cut in ranges, one a rank: heads or features lie one behind another in every class that runs."""


@dataclass(frozen=True)
class HeldParts:
    """A parameter that is made of several stored tensors, read some experts at a time."""

    weights: Weights
    parts: StoredParts

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts.shape(self.weights)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.parts.rows(self.weights, start, stop)


def parameters(frame: Frame, source: Weights, ranks: Sequence[Weights]) -> Iterator[Parameter]:
    """Every parameter in the model's order, then the source's tensors that the class has no place for.

    DifferentError where a rank lacks one, or shapes fit no cut.
    """
    whole, held = frame.recipes(source), [frame.recipes(rank) for rank in ranks]
    used = {name for recipe in whole.values() for name in recipe.stored}
    place = place_of(source.names(), frame.shapes.keys(), frame.prefix)
    ends = {key.rpartition(".")[0] for key in (frame.head, frame.embedding)}
    cuts = frame.cuts_by(whole, held, source, ranks)
    weights = dict[str, Parameter]()
    for key in (key for key in frame.shapes if key in whole):
        padded, known = key.rpartition(".")[0] in ends, frame.tried and _PLAIN.search(key) is not None
        if whole[key].stacked and all(found[key].stored == whole[key].stored for found in held):
            for name in whole[key].stored:
                each = [Held(rank, name) for rank in ranks]
                like_keys = name.removeprefix(place)
                yield Parameter(like_keys, Held(source, name), each, known=frame.tried)
            continue
        sides = [_held(source, whole[key]), *(_held(rank, found[key]) for rank, found in zip(ranks, held, strict=True))]
        cut = cuts.get(key)
        if cut is not None and frame.is_of_experts(key) and (cut.dim == 0 or cut.experts):
            # Of matrices that lie one by one it is known which are joined to a parameter.
            known, parts = frame.tried and whole[key].stacked, len(whole[key].experts[0])
            groups = _sharing(sides[0], cut.experts or cut)
            yield Parameter(key, sides[0], sides[1:], known=known, parts=parts, groups=groups)
            continue
        starts = None if cut is None else cut.starts
        orders = of_tables(whole[key], held_by(key, held), source, ranks) if padded else None
        module, _, leaf = key.rpartition(".")
        beside = weights.get(module) if leaf == "bias" else None
        made = Parameter(key, sides[0], sides[1:], orders, padded, known=known or padded, starts=starts, beside=beside)
        if leaf == "weight":
            weights[module] = made
        yield made
    yield from idle(source, ranks, used, frame.layers, frame.depth, frame.aside)


def held_by(key: str, held: Sequence[Mapping[str, StoredParts]]) -> list[StoredParts]:
    """What each rank makes a parameter of."""
    return [found[key] for found in held]


def of_tables(
    whole: StoredParts, held: Sequence[StoredParts], source: Weights, ranks: Sequence[Weights]
) -> list[Tensor] | None:
    """The rows of each rank where an embedding is several tables, of each of which a rank has its part; else None."""
    if not whole.joined or any(len(parts.stored) != len(whole.stored) for parts in held):
        return None
    orders: list[list[Tensor]] = [[] for _ in ranks]
    first = 0
    for number, name in enumerate(whole.stored):
        sides = [Held(rank, parts.stored[number]) for rank, parts in zip(ranks, held, strict=True)]
        count = source.shape(name)[0]
        for rank, share in enumerate(Parameter(name, Held(source, name), sides, padded=True).shares()):
            order = torch.arange(count) if share.order is None else share.order
            orders[rank].append(torch.where(order < 0, order, order + first))
        first += count
    return [torch.cat(each) for each in orders]


def _sharing(source: Held | HeldParts, experts: RankShares) -> list[tuple[Share, tuple[int, ...]]]:
    """The experts that some ranks have, and who these are."""
    found = sharing(experts.firsts).items()
    return [(Share(source, 0, torch.arange(first, first + experts.sizes[ranks[0]])), ranks) for first, ranks in found]


def _held(weights: Weights, parts: StoredParts) -> Held | HeldParts:
    return HeldParts(weights, parts) if parts.stacked or parts.joined else Held(weights, parts.stored[0])
