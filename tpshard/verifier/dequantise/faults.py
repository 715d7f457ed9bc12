"""Faults in the companions of a quantised weight, put into a rank's memory on purpose."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tpshard.verifier.dequantise.bits import AWQ_ORDER, stream
from tpshard.verifier.dequantise.grid import PLAIN, Grid
from tpshard.verifier.dequantise.integers import Awq, Gptq, Packed
from tpshard.verifier.dequantise.view import DequantisedWeights
from tpshard.verifier.ranks.weights import replaced

Change = Callable[[DequantisedWeights, str, DequantisedWeights], Mapping[str, Tensor]]
"""What to put in place of a rank's own tensors, for one of its weights; the last argument is another rank."""
_TWINS = (("gate_proj", "up_proj"), ("w1", "w3"))


def _scales_shifted(mine: DequantisedWeights, name: str, _: DequantisedWeights) -> Mapping[str, Tensor]:
    """Each scale in the place of the next along the last dim that has two."""
    scale = mine.module(name).get("scale")
    dim = next((dim for dim in reversed(range(scale.dim())) if scale.shape[dim] > 1), None)
    order = None if dim is None else torch.arange(scale.shape[dim]).roll(1)
    return {} if dim is None else {_stored(mine, name, "scale"): scale[(slice(None),) * dim + (order,)]}


def _of_another(role: str) -> Change:
    """A companion as another rank has it."""

    def change(mine: DequantisedWeights, name: str, other: DequantisedWeights) -> Mapping[str, Tensor]:
        if role not in mine.recipes[name].stored or name not in other.recipes:
            return {}
        own, lent = (each.module(name).get(role) for each in (mine, other))
        return {_stored(mine, name, role): lent} if own.shape == lent.shape else {}

    return change


def _supers_exchanged(mine: DequantisedWeights, name: str, _: DequantisedWeights) -> Mapping[str, Tensor]:
    """The scale for all of a gate's weight in place of the other's, and the other way round."""
    pairs = (pair for one, other in _TWINS for pair in ((one, other), (other, one)))
    twins = (re.sub(rf"\b{one}\b", other, name) for one, other in pairs)
    twin = next((each for each in twins if each != name and each in mine.recipes), name)
    role = "super" if "super" in mine.recipes[name].stored else "scale"
    if role not in mine.recipes[twin].stored:
        return {}
    own, other = (mine.module(each).get(role) for each in (name, twin))
    one = own.shape == other.shape and (role == "super" or own.numel() == 1)
    return {_stored(mine, name, role): other} if one else {}


def _nibbles_exchanged(mine: DequantisedWeights, name: str, _: DequantisedWeights) -> Mapping[str, Tensor]:
    """The halves of every byte of four-bit values."""
    match mine.recipes[name].scheme:
        case Grid(form=form) if form != PLAIN:
            pass
        case Packed(bits=4) | Gptq(bits=4) | Awq():
            pass
        case _:
            return {}
    values = mine.module(name).get("values")
    halves = values.view(torch.uint8)
    return {_stored(mine, name, "values"): (halves >> 4 | halves << 4).view(values.dtype)}


def _other_order(mine: DequantisedWeights, name: str, _: DequantisedWeights) -> Mapping[str, Tensor]:
    """The values of every word in the order that they have in AWQ, of GPTQ's, or the other way round."""
    order = torch.tensor(AWQ_ORDER)
    match mine.recipes[name].scheme:
        case Gptq(bits=4):
            pass
        case Awq():
            order = order.argsort()
        case _:
            return {}
    values = mine.module(name).get("values")
    each = stream(values, 4, 8 * values.shape[-1]).view(*values.shape, 8)[..., order]
    words = (each.long() << 4 * torch.arange(8)).sum(-1)
    return {_stored(mine, name, "values"): words.to(torch.int32)}


def _stored(mine: DequantisedWeights, name: str, role: str) -> str:
    return mine.recipes[name].stored[role]


_FAULTS: Mapping[str, Change] = {
    "scales-shifted": _scales_shifted,
    "zeros-of-another-rank": _of_another("zero"),
    "groups-of-another-rank": _of_another("groups"),
    "gate-and-up-scales-exchanged": _supers_exchanged,
    "nibbles-exchanged": _nibbles_exchanged,
    "order-of-awq-exchanged": _other_order,
}
COMPANION_FAULTS = tuple(_FAULTS)
"""The names of the faults."""


def with_fault(fault: str, mine: DequantisedWeights, name: str, other: DequantisedWeights) -> DequantisedWeights | None:
    """A rank with a fault in the companions of one of its weights; None where it does not apply."""
    changes = _FAULTS[fault](mine, name, other)
    return mine.with_companions(replaced(mine.companions, changes)) if changes else None
