"""Which tp to take: those that cut no unit, what each needs on a device, and the reason in a line.

Made of headers and config alone. Only groups of tensors that are cut alike are laid out, so every tp of a model of
46,000 tensors takes no longer than one of 300.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from tpshard.planning.deal import deal, possible_tp, why_not
from tpshard.planning.layout import shard
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.report.capacity import USABLE, Workload, cache_bytes, fits, ring_bytes, traits
from tpshard.report.results import result
from tpshard.storage.safetensors import nbytes
from tpshard.units import human_bytes


@dataclass(frozen=True)
class TpChoice:
    """One tp. weights, kv_cache: bytes of the fullest rank, and `total` both; None where the tp is not possible.

    short: bytes that the fullest rank has too many, 0 where it fits. bytes_per_token: what each rank sends for a token.
    cut: the units that would be cut, which `reason` names as well.
    """

    tp: int
    possible: bool
    weights: int | None = None
    kv_cache: int | None = None
    total: int = 0
    fits: bool | None = None
    short: int | None = None
    bytes_per_token: int | None = None
    reason: str = ""
    cut: str = ""

    def to_json(self) -> dict[str, Any]:
        """An entry of `choices` in the JSON contract."""
        entry = {**asdict(self), "total": self.total if self.possible else None}
        return {key: value for key, value in entry.items() if key != "cut"}


@dataclass(frozen=True)
class Advice:
    """The choices for one model on `gpus` devices, and the tp to take: None where none fits."""

    model_type: str
    name: str
    gpus: int
    workload: Workload
    choices: tuple[TpChoice, ...]
    take: int | None
    reason: str
    possible_above: tuple[int, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The `advise` object of the JSON contract."""
        return result(
            "advise",
            model_type=self.model_type,
            source=self.name,
            gpus=self.gpus,
            gpu_memory=self.workload.gpu_memory,
            usable=USABLE,
            batch=self.workload.batch,
            seq=self.workload.seq,
            choices=[choice.to_json() for choice in self.choices],
            take=self.take,
            reason=self.reason,
            possible_above=list(self.possible_above),
            warnings=list(self.warnings),
        )


def advice(model: Model, gpus: int, workload: Workload, warnings: tuple[str, ...] = ()) -> Advice:
    """Judge every tp from 1 to `gpus` for a classified model."""
    choices = tuple(_choice(model, tp, workload) for tp in range(1, gpus + 1))
    model_type, name = str(model.architecture["model_type"]), str(model.source["repo_id"] or model.source["name"])
    above = tuple(tp for tp in possible_tp(model.axes) if tp > gpus)
    return Advice(model_type, name, gpus, workload, choices, *_verdict(choices, gpus), above, warnings)


def rank_weights(model: Model, tp: int) -> list[int]:
    """Bytes of tensors that each rank of an even split holds."""
    kinds = Counter((tensor.dtype, tensor.shape, tensor.cut) for tensor in model.tensors)
    first = {(tensor.dtype, tensor.shape, tensor.cut): tensor for tensor in reversed(model.tensors)}
    layout = shard([first[kind] for kind in kinds], model.axes, deal(model.axes, Mesh(tp)))
    counts = kinds.values()
    return [sum(nbytes(s.dtype, s.shape) * count for s, count in zip(rank, counts, strict=True)) for rank in layout]


def _choice(model: Model, tp: int, workload: Workload) -> TpChoice:
    assert workload.gpu_memory is not None
    if cut := ", ".join(str(axis) for axis in model.axes.values() if why_not(axis, tp)):
        return TpChoice(tp, possible=False, reason=f"{cut} on {tp} ranks would be cut", cut=cut)
    facts = traits(model)
    weights = max(rank_weights(model, tp))
    cache = max(cache_bytes(model, facts, deal(model.axes, Mesh(tp)), workload))
    total = weights + cache
    short = max(0, total - int(USABLE * workload.gpu_memory))
    notes = [] if short == 0 else [f"{human_bytes(short)} too much for a device"]
    for axis in model.axes.values():
        if axis.replicate and axis.count < tp:
            notes.append(f"each of {axis.count} {axis.name} on {tp // axis.count} ranks")
        elif axis.pad and axis.count % tp:
            notes.append(f"{axis.name} padded to {-(-axis.count // tp) * tp}")
    if facts.cache_axis is None and tp > 1:
        notes.append("the latent cache whole on each rank")
    sent, reason = ring_bytes(facts, tp, 1), "; ".join(notes) or "fits"
    return TpChoice(tp, True, weights, cache, total, fits(total, workload.gpu_memory), short, sent, reason)


def _verdict(choices: tuple[TpChoice, ...], gpus: int) -> tuple[int | None, str]:
    """The smallest tp that fits and leaves no device idle, else the smallest that fits; and why."""
    fitting = [choice.tp for choice in choices if choice.fits]
    if not fitting:
        nearest = min((choice for choice in choices if choice.short), key=lambda choice: (choice.total, choice.tp))
        assert nearest.short is not None
        return None, (
            f"does not fit on {gpus} devices: at tp {nearest.tp} each needs {human_bytes(nearest.total)}, "
            f"{human_bytes(nearest.short)} more than it has room for"
        )
    whole = [tp for tp in fitting if gpus % tp == 0]
    take = min(whole or fitting)
    copies = gpus // take
    rest = f"; {gpus - copies * take} devices stay idle" if gpus % take else ""
    why = "the smallest that fits" if take == fitting[0] else f"the smallest that fits and divides {gpus}"
    if copies == 1:
        return take, f"{why}: one copy of the model{rest}"
    talk = "no communication" if take == 1 else "the least communication"
    return take, f"{why}: {copies} copies of the model, and {talk}{rest}"
