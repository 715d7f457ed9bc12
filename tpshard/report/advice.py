"""Which mesh to take: those tp x pp x ep that cut no unit, what each needs and sends, and the reason in a line.

Made of headers and config alone. One layer of each kind is laid out for each tp and ep (`stage_bytes`), and every pp is
sums of that, so the meshes of a model of 100,000 tensors take little longer than those of one of 300.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any

from tpshard.errors import UnsupportedError
from tpshard.formats import DEFAULT_FORMAT
from tpshard.planning.deal import possible_tp, why_not
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.planning.placement import placement
from tpshard.planning.stages import Stages
from tpshard.report.capacity import USABLE, Traits, Workload, cache_bytes, stage_needs, traits
from tpshard.report.results import result
from tpshard.report.stage_bytes import RankBytes, like_layers, rank_bytes
from tpshard.units import human_bytes


@dataclass(frozen=True)
class Devices:
    """`gpus` devices in `nodes` of as many each: where all-reduces are fast."""

    gpus: int
    nodes: int = 1

    @property
    def per_node(self) -> int:
        """The devices of a node."""
        return self.gpus // self.nodes

    def crosses(self, tp: int) -> bool:
        """Whether some of the ranks that add up their sums are on different nodes, each mesh behind the other."""
        return self.nodes > 1 and self.per_node % tp != 0

    def __str__(self) -> str:
        return f"{self.gpus} devices" + (f" ({self.nodes} nodes of {self.per_node})" if self.nodes > 1 else "")


@dataclass(frozen=True)
class TpChoice:
    """One tp, with one stage and experts cut.

    weights, kv_cache: bytes of the fullest rank, and `total` both; None where the tp is not possible.
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
class MeshChoice:
    """One mesh that the format can hold. stages: what each stage needs, as the plan's JSON has it.

    memory: of a device, in bytes. crosses: whether all-reduces cross nodes. notes: what is repeated or padded. reason:
    whether it fits, and beside the mesh to take what speaks against it.
    """

    mesh: Mesh
    devices: Devices
    memory: int
    stages: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()
    reason: str = ""

    @cached_property
    def fullest(self) -> dict[str, Any]:
        """The stage whose fullest rank is fullest."""
        return max(self.stages, key=lambda stage: int(stage["total"]))

    @cached_property
    def busiest(self) -> dict[str, Any]:
        """The stage whose ranks send most."""
        return max(self.stages, key=lambda stage: int(stage["bytes_per_token"]))

    @property
    def short(self) -> int:
        """Bytes that the fullest rank has too many; 0 where it fits."""
        return max(0, int(self.fullest["total"]) - int(USABLE * self.memory))

    @property
    def copies(self) -> int:
        """How many copies of the model the devices hold."""
        return self.devices.gpus // self.mesh.size

    @property
    def idle(self) -> int:
        """Devices that no copy takes."""
        return self.devices.gpus % self.mesh.size

    @property
    def crosses(self) -> bool:
        """Whether all-reduces cross nodes."""
        return self.devices.crosses(self.mesh.tp)

    @property
    def rank(self) -> tuple[int, ...]:
        """The lower, the better: see `docs/explanation/numbers.md`. Of what does not fit, what lacks least."""
        mesh = self.mesh
        if self.short:
            return 1, self.short, mesh.size, mesh.pp, mesh.ep
        return 0, self.crosses, bool(self.idle), mesh.size, mesh.pp, mesh.ep

    @property
    def text(self) -> str:
        """`tp 8 x pp 2 x ep 8`, without what is 1."""
        mesh = self.mesh
        return " x ".join([f"tp {mesh.tp}", *(f"pp {mesh.pp}",) * (mesh.pp > 1), *(f"ep {mesh.ep}",) * (mesh.ep > 1)])

    def sent(self) -> str:
        """What ranks and stages send for a token, and for a decoding step of several sequences."""
        each = []
        if self.busiest["all_reduces"]:
            each.append(f"sends {_for_step(self.busiest, 'bytes')}")
        if self.mesh.pp > 1:
            each.append(f"hands on {_for_step(self.stages[0], 'handed_on')}")
        return ", ".join(each) or "sends nothing"

    def to_json(self) -> dict[str, Any]:
        """An entry of `meshes` in the JSON contract."""
        full, busy = self.fullest, self.busiest
        return {
            **asdict(self.mesh),
            "copies": self.copies,
            "idle": self.idle,
            "crosses_nodes": self.crosses,
            **{key: full[key] for key in ("weights", "kv_cache", "total")},
            "fits": not self.short,
            "short": self.short,
            **{key: busy[key] for key in ("bytes_per_token", "bytes_per_step", "bytes_per_prompt")},
            "stages": list(self.stages),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Advice:
    """The meshes for one model on `devices`, the best first, and the one to take: None where none fits.

    choices: those of one stage whose experts are cut, by tp. take: the best tp of these that fits. not_held: tp, pp, ep
    and why the format cannot hold the model so.
    """

    model_type: str
    name: str
    format: str
    devices: Devices
    workload: Workload
    choices: tuple[TpChoice, ...]
    meshes: tuple[MeshChoice, ...]
    not_held: tuple[tuple[int, int, int, str], ...]
    possible_above: tuple[int, ...]
    warnings: tuple[str, ...]

    @property
    def gpus(self) -> int:
        """The number of devices."""
        return self.devices.gpus

    @property
    def mesh(self) -> MeshChoice | None:
        """The mesh to take."""
        return None if self.meshes[0].short else self.meshes[0]

    @property
    def take(self) -> int | None:
        """The tp to take where one stage is wanted, and experts cut."""
        alone = (each for each in self.meshes if each.mesh.pp == each.mesh.ep == 1 and not each.short)
        return next((each.mesh.tp for each in alone), None)

    @property
    def reason(self) -> str:
        """Why that mesh, or how much is lacking."""
        best = self.meshes[0]
        if best.short:
            total, short = human_bytes(best.fullest["total"]), human_bytes(best.short)
            needs = f"each needs {total}, {short} more than it has room for"
            return f"does not fit on {self.devices}: at {best.text} {needs}"
        return best.reason

    def to_json(self) -> dict[str, Any]:
        """The `advise` object of the JSON contract."""
        return result(
            "advise",
            model_type=self.model_type,
            source=self.name,
            format=self.format,
            gpus=self.gpus,
            nodes=self.devices.nodes,
            gpu_memory=self.workload.gpu_memory,
            usable=USABLE,
            batch=self.workload.batch,
            seq=self.workload.seq,
            choices=[choice.to_json() for choice in self.choices],
            take=self.take,
            meshes=[choice.to_json() for choice in self.meshes],
            mesh=asdict(self.mesh.mesh) if self.mesh else None,
            not_held=[{"tp": tp, "pp": pp, "ep": ep, "reason": reason} for tp, pp, ep, reason in self.not_held],
            reason=self.reason,
            possible_above=list(self.possible_above),
            warnings=list(self.warnings),
        )


def advice(
    model: Model,
    devices: Devices,
    workload: Workload,
    warnings: tuple[str, ...] = (),
    format: str = DEFAULT_FORMAT,
) -> Advice:
    """Judge every mesh of a classified model that the devices have room for.

    UnsupportedError where the format does not hold the model at all.
    """
    reduced, facts = like_layers(model), traits(model)
    whole = reduced.model.experts is not None and reduced.model.experts.count > 1
    outside = placement(reduced.model, Mesh(2, 1, 2), None).axes if whole else {}
    meshes: list[MeshChoice] = []
    refused: list[tuple[int, int, int, str]] = []
    stages = cache(lambda pp: reduced.model.stages(pp, None))
    for tp in range(1, devices.gpus + 1):
        for ep in (1,) if not whole or any(why_not(axis, tp) for axis in outside.values()) else _places(tp):
            try:
                held = rank_bytes(reduced, tp, ep, format)
            except UnsupportedError as error:
                if tp == 1:
                    raise
                refused.append((tp, 1, ep, error.message))
                continue
            meshes += _of_stages(reduced.model, facts, held, Mesh(tp, 1, ep), devices, workload, stages)
            if held.refusal and 2 * tp <= devices.gpus:
                refused.append((tp, 2, ep, held.refusal))
    ranked = tuple(_with_reasons(sorted(meshes, key=lambda each: each.rank)))
    model_type, name = str(model.architecture["model_type"]), str(model.source["repo_id"] or model.source["name"])
    above = tuple(tp for tp in possible_tp(model.axes) if tp > devices.gpus)
    choices = tuple(_choice(model, tp, ranked, refused) for tp in range(1, devices.gpus + 1))
    return Advice(model_type, name, format, devices, workload, choices, ranked, tuple(refused), above, warnings)


def _places(tp: int) -> Iterator[int]:
    """Among how many ranks experts can be dealt."""
    return (ep for ep in range(1, tp + 1) if tp % ep == 0)


def _of_stages(
    model: Model,
    facts: Traits,
    held: RankBytes,
    one: Mesh,
    devices: Devices,
    workload: Workload,
    stages_of: Callable[[int], Stages],
) -> Iterator[MeshChoice]:
    """The meshes of one tp and ep: of every number of stages that the devices and the layers allow."""
    assert workload.gpu_memory is not None
    notes = tuple(_notes(facts, held, one))
    layers = len(held.like) if not held.refusal else 1
    for pp in range(1, min(devices.gpus // one.tp, layers) + 1):
        mesh = Mesh(one.tp, pp, one.ep)
        stages = stages_of(pp) if pp > 1 else None
        weights = held.of(stages)
        needs = []
        for stage in range(pp):
            own = facts.of(stages.ranges[stage]) if stages else facts
            cached = cache_bytes(model, own, held.deal, workload)
            ranks = list(zip(weights[stage * one.tp : (stage + 1) * one.tp], cached, strict=True))
            need = stage_needs(own, mesh, stage, ranks, workload)
            needs.append(need | ({"layers": list(stages.ranges[stage])} if stages else {}))
        yield MeshChoice(mesh, devices, workload.gpu_memory, tuple(needs), notes)


def _notes(facts: Traits, held: RankBytes, mesh: Mesh) -> Iterator[str]:
    """What of the model is repeated, padded, or dealt to some ranks more than to others."""
    tp = mesh.tp
    for axis in held.deal.axes.values():
        if axis.replicate and axis.count < tp:
            yield f"each of {axis.count} {axis.name} on {tp // axis.count} ranks"
        elif axis.pad and axis.count % tp:
            yield f"{axis.name} padded to {-(-axis.count // tp) * tp}"
    if facts.cache_axis is None and tp > 1:
        yield "the latent cache whole on each rank"


def _with_reasons(ranked: Sequence[MeshChoice]) -> Iterator[MeshChoice]:
    """Say of the first one why it is, and of the others what puts them behind it."""
    best = ranked[0]
    for choice in ranked:
        if choice.short:
            state = [f"{human_bytes(choice.short)} too much for a device"]
        else:
            state = [_why(choice)] if choice is best else [_why_not(choice, best)]
        yield replace(choice, reason="; ".join([*state, *choice.notes]))


def _why(choice: MeshChoice) -> str:
    mesh, devices = choice.mesh, choice.devices
    copies = "one copy of the model" if choice.copies == 1 else f"{choice.copies} copies of the model"
    parts = [f"the fewest devices that hold it{', none idle' if not choice.idle else ''}: {copies}"]
    if mesh.size == 1:
        parts.append("no communication")
    elif devices.nodes > 1:
        parts.append("all-reduces cross nodes" if choice.crosses else "all-reduces stay in a node")
    if choice.idle:
        parts.append(_idle(choice))
    return ", ".join(parts)


def _why_not(choice: MeshChoice, best: MeshChoice) -> str:
    """The first thing in which a mesh is behind the best one, in the order in which they are ranked."""
    mesh, devices = choice.mesh, choice.devices
    if choice.crosses and not best.crosses:
        whole = mesh.tp > devices.per_node
        return "all-reduces cross nodes" if whole else f"tp {mesh.tp} does not divide the {devices.per_node} of a node"
    if choice.idle and not best.idle:
        return _idle(choice)
    if mesh.size != best.mesh.size:
        return f"{mesh.size} devices a copy, where {best.mesh.size} will do"
    if mesh.pp != best.mesh.pp:
        return f"a token passes through {mesh.pp} stages in turn"
    return "experts whole: the rank with the most wanted ones is waited for"


def _idle(choice: MeshChoice) -> str:
    return f"{choice.idle} device{'s stay' if choice.idle > 1 else ' stays'} idle"


def _for_step(sent: dict[str, Any], what: str) -> str:
    token, step = sent[f"{what}_per_token"], sent[f"{what}_per_step"]
    return f"{human_bytes(token)} a token" + (f" ({human_bytes(step)} a step)" if step != token else "")


def _choice(
    model: Model, tp: int, meshes: Sequence[MeshChoice], refused: Sequence[tuple[int, int, int, str]]
) -> TpChoice:
    """The mesh of one stage and cut experts."""
    found = next((each for each in meshes if each.mesh == Mesh(tp)), None)
    if found is None:
        cut = ", ".join(str(axis) for axis in model.axes.values() if why_not(axis, tp))
        reason = f"{cut} on {tp} ranks would be cut" if cut else next(why for t, _, _, why in refused if t == tp)
        return TpChoice(tp, possible=False, reason=reason, cut=cut)
    full = found.fullest
    size = full["weights"], full["kv_cache"], full["total"]
    return TpChoice(tp, True, *size, not found.short, found.short, found.busiest["bytes_per_token"], found.reason)
