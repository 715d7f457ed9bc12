"""The weights tier: every element that a rank holds is the source's, whatever a prompt would meet."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tpshard.errors import DifferentError
from tpshard.storage.tensor_names import numbered
from tpshard.verifier.backend import Backend, Canaries, JudgeTier
from tpshard.verifier.dequantise.faults import COMPANION_FAULTS, with_fault
from tpshard.verifier.dequantise.sides import stored
from tpshard.verifier.dequantise.view import DequantisedWeights
from tpshard.verifier.elements import FirstDifference, Held, Parameter, Readable, Share, difference, row_count
from tpshard.verifier.not_run import apart
from tpshard.verifier.options import Say
from tpshard.verifier.progress import Progress
from tpshard.verifier.report.verdict import Canary, Finding, Place, Tier, layer_of


def judge_weights(backend: Backend, allowed: Sequence[str], say: Say) -> tuple[Tier, Canaries]:
    """The tier, and what injects its canaries."""
    return compare_weights(backend, allowed, say), lambda: weights_canaries(backend)


def compare_weights(backend: Backend, allowed: Sequence[str], say: Say) -> Tier:
    """Every parameter of every rank beside the same part of the source, bit for bit; of quantised ones, what is stored
    and what it stands for.

    allowed: how names begin of cut tensors that need not be run; others make the tier inconclusive, since what is cut
    can be cut wrongly and only a run would show it.
    """
    try:
        model = list(backend.parameters())
        parameters = [each for parameter in model for each in (*stored(parameter), parameter)]
        progress = Progress("weights tier", len(parameters) * len(backend.team.here), say)
        ranks = backend.team.run(lambda group: _compared(parameters, group.rank, progress))
    except DifferentError as error:
        place = Place(error.tensor or "", layer_of(error.tensor or ""), None, math.inf)  # as of shapes that differ
        return Tier("weights", "fail", first=place, reason=str(error))
    elements = sum(torch.Size(parameter.source.shape).numel() for parameter in model)
    tier = Tier(
        "weights",
        "pass",
        {"differences": 0},
        {"differences": sum(map(len, ranks)), "tensors": len(model), "elements": elements},
        by_running=tuple(each.name for each in model if each.runs and not each.known and each.dim is not None),
    )
    tier = _with_idle(tier, model, () if any(ranks) else allowed, compared=True)
    return backend.team.once(lambda: _blamed(backend, tier, parameters, ranks)) if any(ranks) else tier


def with_idle_said(
    judges: Mapping[str, JudgeTier], backend: Backend, allowed: Sequence[str]
) -> Mapping[str, JudgeTier]:
    """The tiers, the first of which says what nothing computes with: this one, or another that comes without it."""
    first = next(iter(judges), "weights")
    if first == "weights":
        return judges

    def judged() -> tuple[Tier, Canaries | None]:
        tier, inject = judges[first]()
        if tier.status != "pass":
            return tier, inject
        return _with_idle(tier, list(backend.parameters()), allowed, compared=False), inject

    return {**judges, first: judged}


def _with_idle(tier: Tier, model: Sequence[Parameter], allowed: Sequence[str], *, compared: bool) -> Tier:
    """The tier, with the tensors that nothing computes with; inconclusive where one is cut that is not allowed."""
    idle = [parameter for parameter in model if not parameter.runs]
    run = [name for parameter in model if parameter.runs for name in _names(parameter)]
    tier = replace(tier, not_run=tuple(each.name for each in idle), apart=apart(idle, run, compared=compared))
    cut = [each.name for each in idle if not each.known and each.dim is not None]
    cut = [name for name in cut if not name.startswith(tuple(allowed))]
    if not cut:
        return tier
    begins = list(dict.fromkeys(each.prefix for each in tier.apart if each.cut))
    named = ", ".join(begins[:3]) + (f" and {len(begins) - 3} more" if len(begins) > 3 else "")
    accepts = " ".join(f"--allow-not-run {each.partition('*')[0]}" for each in dict.fromkeys(begins[:3]))
    what = f"{len(cut)} tensors that are cut are run by nothing here ({named})"
    return replace(tier, status="inconclusive", reason=f"{what}: {cut[0]} is the first; {accepts} accepts that")


def _names(parameter: Parameter) -> tuple[str, ...]:
    """What a parameter is called, by a class and in the files."""
    return (parameter.name, parameter.source.name) if isinstance(parameter.source, Held) else (parameter.name,)


_Found = list[tuple[int, FirstDifference]]
"""By the number of a parameter, where a rank's tensor differs first."""


def _compared(parameters: Sequence[Parameter], rank: int, progress: Progress) -> _Found:
    found = []
    for number, parameter in enumerate(parameters):
        if (apart := difference(parameter.ranks[rank], parameter.shares()[rank])) is not None:
            found.append((number, apart))
        progress.step()
    return found


def _blamed(backend: Backend, tier: Tier, parameters: Sequence[Parameter], ranks: Sequence[_Found]) -> Tier:
    """The failed tier: what differs first in the order of computation, and whose it is instead."""
    number, rank = min((found[0][0], rank) for rank, found in enumerate(ranks) if found)
    parameter, apart = parameters[number], ranks[rank][0][1]
    where = f"{parameter.name}{list(apart.element)} of rank {rank}"
    reason = f"{where} is {_shown(apart.found)} where the source has {_shown(apart.expected)}"
    for other in [*range(rank), *range(rank + 1, len(ranks))]:
        if parameter.shares()[other].fits(parameter.ranks[rank]):
            reason = f"{parameter.name} of rank {rank} is the one of rank {other}"
        if _exchanged(backend, rank, other):
            reason = f"the files of ranks {rank} and {other} are exchanged"
            break
    findings = [
        Finding(parameters[number].name, at, each.size) for at, found in enumerate(ranks) for number, each in found
    ]
    first = Place(parameter.name, layer_of(parameter.name), rank, apart.size)
    return replace(tier, status="fail", reason=reason, first=first, worst=first, findings=tuple(findings))


def _shown(value: float) -> str:
    """A number; words of packed ones with all their digits."""
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1 << 53 else f"{value:g}"


def _exchanged(backend: Backend, rank: int, other: int) -> bool:
    """Whether all that is cut is right once two ranks are put in each other's place."""
    ranks = list(backend.ranks)
    ranks[rank], ranks[other] = ranks[other], ranks[rank]
    cut = (each for each in backend.with_ranks(ranks).parameters() if each.dim is not None)
    try:
        return all(each.shares()[at].fits(each.ranks[at]) for each in cut for at in (rank, other))
    except DifferentError:
        return False


@dataclass(frozen=True)
class _Damaged:
    """A tensor whose first `count` rows are changed as they are read."""

    held: Readable
    change: Callable[[Tensor], Tensor]
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.held.shape

    def rows(self, start: int, stop: int) -> Tensor:
        if start >= self.count:
            return self.held.rows(start, stop)
        changed = self.change(self.held.rows(0, self.count).clone())[start:stop]
        return changed if stop <= self.count else torch.cat((changed, self.held.rows(self.count, stop)))


def _bit_flipped(rows: Tensor) -> Tensor:
    """The last bit of an element in the middle turned over."""
    flat = rows.view(-1).view(torch.uint8)
    flat[len(flat) // 2 // rows.element_size() * rows.element_size()] ^= 1
    return rows


def _rows_exchanged(rows: Tensor) -> Tensor:
    """The first row exchanged with the next one that is another; as it was where all are equal."""
    others = (rows != rows[:1]).flatten(1).any(-1) if rows.dim() > 1 else rows != rows[:1]
    if bool(others.any()):
        other = int(others.nonzero()[0])
        rows[[0, other]] = rows[[other, 0]]
    return rows


Damage = Callable[[Parameter, int], Readable | None]
"""What a rank has of a parameter, with a fault; None where the fault does not apply."""
_ROWS = 64
"""In how many of a tensor's first rows a fault is put, where it has so many."""
_ELEMENTS = 1 << 22
"""And in how many elements of them at most, but for two rows."""


def _in_rows(change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(parameter: Parameter, rank: int) -> Readable:
        held = parameter.ranks[rank]
        most = max(2, _ELEMENTS // max(1, torch.Size(held.shape[1:]).numel()))  # a row may be an expert
        return _Damaged(held, change, min(_ROWS, most, _own_rows(parameter, rank)))

    return damage


def _own_rows(parameter: Parameter, rank: int) -> int:
    """How many of a rank's rows are rows of the model: none of an empty tensor, or where all are padding."""
    held = parameter.ranks[rank]
    padding = parameter.shares()[rank].padding if parameter.padded else 0
    return row_count(held) - padding if torch.Size(held.shape).numel() else 0


def _in_companions(fault: str) -> Damage:
    def damage(parameter: Parameter, rank: int) -> Readable | None:
        mine, other = parameter.ranks[rank], parameter.ranks[0]
        if not (isinstance(mine, Held) and isinstance(other, Held) and isinstance(mine.weights, DequantisedWeights)):
            return None
        if not isinstance(other.weights, DequantisedWeights) or mine.name not in mine.weights.recipes:
            return None
        found = with_fault(fault, mine.weights, mine.name, other.weights)
        return None if found is None else Held(found, mine.name)

    return damage


_BIT = "bit-flipped"
_FAULTS: Mapping[str, Damage] = {
    _BIT: _in_rows(_bit_flipped),
    "rows-exchanged": _in_rows(_rows_exchanged),
    "copy-stale": _in_rows(lambda rows: rows.roll(1, -1)),
    **{fault: _in_companions(fault) for fault in COMPANION_FAULTS},
}


def weights_canaries(backend: Backend) -> list[Canary]:
    """Faults in one tensor of each kind, in memory; one that changes nothing there is left out.

    They are put into the last rank that has any rows of the model's: of a small vocabulary the last may have none.
    """
    kinds: dict[str, tuple[Parameter, int]] = {}
    for parameter in backend.parameters():
        kind, _ = numbered(parameter.name)
        if parameter.runs and kind not in kinds:
            if own := [rank for rank in range(len(parameter.ranks)) if _own_rows(parameter, rank)]:
                kinds[kind] = (parameter, own[-1])

    def work() -> list[Canary]:
        canaries = []
        for name, damage in _FAULTS.items():
            # Of a cut that nobody knows, the order of what a rank holds is not judged.
            sure = [each for each in kinds.values() if each[0].known or each[0].dim is None or name == _BIT]
            judged = [_caught(*each, damage(*each)) for each in sure]
            if any(caught is not None for caught in judged):
                missed = sum(caught is False for caught in judged)
                canaries.append(Canary(name, "weights", "missed" if missed else "caught", float(missed)))
        return canaries

    return backend.team.once(work)


def _caught(parameter: Parameter, rank: int, damaged: Readable | None) -> bool | None:
    """Whether the tier sees a changed tensor of a rank; None where the change changes nothing."""
    if damaged is None or _alike(damaged, parameter.ranks[rank]):
        return None
    changed = replace(parameter, ranks=(*parameter.ranks[:rank], damaged, *parameter.ranks[rank + 1 :]))
    try:
        return difference(damaged, changed.shares()[rank]) is not None
    except DifferentError:
        return True


def _alike(damaged: Readable, held: Readable) -> bool:
    try:
        return difference(damaged, Share(held)) is None
    except DifferentError:
        return False  # companions that do not fit each other
