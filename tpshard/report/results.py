"""What the verbs return: frozen results that print as the documented JSON (docs/reference/json.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpshard.formats.split import Split
from tpshard.planning.axes import Axis
from tpshard.planning.box import extents, volume
from tpshard.planning.deal import Deal, largest_tp, possible_tp, why_not
from tpshard.planning.layout import LogicalTensor
from tpshard.storage.carried import LeftOut
from tpshard.storage.safetensors import TensorInfo, nbytes

if TYPE_CHECKING:
    from tpshard.inputs.shard_set import ShardSet
    from tpshard.report.capacity import Workload

SCHEMA_VERSION = 1
"""Fields are only added within a version."""


def result(command: str, **fields: Any) -> dict[str, Any]:
    """What a command prints as JSON."""
    return {"schema_version": SCHEMA_VERSION, "command": command, **fields}


@dataclass(frozen=True)
class PlanReport:
    """A planned split. `split` holds everything; `to_json` is the contract.

    workload: what the numbers are for, None for the usual one. left_out: the source's files that do not travel.
    """

    split: Split
    warnings: tuple[str, ...]
    workload: Workload | None = None
    left_out: tuple[LeftOut, ...] = ()

    @property
    def rank_bytes(self) -> list[int]:
        """Bytes of tensors that each rank holds."""
        return [sum(nbytes(t.dtype, t.shape) for t in rank) for rank in self.split.layout]

    def numbers(self) -> dict[str, Any]:
        """Memory and communication of the ranks: the `numbers` object of the JSON contract."""
        from tpshard.report.capacity import Workload, numbers  # not when something is written: imports count

        return numbers(self.split.model, self.deal, self.rank_bytes, self.workload or Workload())

    @property
    def deal(self) -> Deal:
        """Which units the ranks have, as the format dealt them."""
        assert self.split.layouts.deal is not None, "a set that was read is no plan"
        return self.split.layouts.deal

    @property
    def impossible_tp(self) -> list[tuple[int, str]]:
        """The tp up to the largest possible one that would cut a unit, with the first reason each."""
        return [(tp, why_not(axis, tp) or "") for tp, axis in self.cut_axes]

    @property
    def cut_axes(self) -> list[tuple[int, Axis]]:
        """The tp up to the largest possible one that would cut a unit, with the first axis that has such units."""
        axes = self.deal.axes
        cut = ((tp, [axis for axis in axes.values() if why_not(axis, tp)]) for tp in range(2, largest_tp(axes) + 1))
        return [(tp, found[0]) for tp, found in cut if found]

    def padding(self) -> list[dict[str, Any]]:
        """Axes that are padded with zeros, as the files have it: formats pad differently, or not at all."""
        stored = list(chain.from_iterable(self.split.layout))
        found = []
        for axis in self.split.model.axes.values():
            along = (tensor for tensor in self.split.kept.tensors if tensor.cut.segments == (axis.name,))
            cut = next((tensor for tensor in along if 0 not in tensor.shape), None)
            if axis.pad and cut is not None:
                name = next(each.name for each in stored if any(part.tensor == cut.name for part in each.parts))
                filled = sum(volume(box) for each in stored if each.name == name for box in each.fills)
                if extra := filled * axis.count // prod(cut.shape):
                    found.append({"axis": axis.name, "count": axis.count, "padded": axis.count + extra})
        return found

    def to_json(self) -> dict[str, Any]:
        """The `plan` object of the JSON contract."""
        split, model, tp = self.split, self.split.model, self.split.options.tp
        return result(
            "plan",
            model_type=model.architecture["model_type"],
            source=dict(model.source),
            architecture=dict(model.architecture),
            mesh={"tp": tp, "pp": 1, "ep": 1},
            set=split.set_id,
            format=split.options.format,
            tensors=[
                tensor_json(tensor, model.axes, shares, split.layouts.dropped.get(tensor.name))
                for tensor, shares in zip(model.tensors, shares_of(split), strict=True)
            ],
            **({} if split.format.own_names else {"stored": stored_json(split)}),
            ranks=[{"rank": rank, "bytes": size} for rank, size in enumerate(self.rank_bytes)],
            numbers=self.numbers(),
            padded=self.padding(),
            replicated=[axis.name for axis in model.axes.values() if axis.replicate and axis.count < tp],
            tied=dict(model.tied),
            **({"quantisation": dict(model.quantisation)} if model.quantisation else {}),
            possible_tp=possible_tp(self.deal.axes),
            impossible_tp=[{"tp": tp, "reason": reason} for tp, reason in self.impossible_tp],
            left_out=[asdict(each) for each in self.left_out],
            warnings=list(self.warnings),
        )


Share = tuple[tuple[int, ...], int]
"""What a rank holds of a logical tensor: shape, and bytes with padding."""


def quantisation_line(quantisation: Mapping[str, Any]) -> str:
    """How a model is quantised, for people: `fp8, 12 modules FP8 in blocks`."""
    modules = (f"{count} module{'s' if count > 1 else ''} {name}" for name, count in quantisation["modules"].items())
    cache = [f"KV cache {quantisation['kv_cache']}"] if quantisation["kv_cache"] else []
    return ", ".join([quantisation["method"], *modules, *cache])


def shares_of(split: Split) -> list[list[Share]]:
    """What each rank holds of each tensor of the model, in the model's order; nothing of what is dropped."""
    if split.format.own_names:
        return [
            [(rank[index].shape, nbytes(rank[index].dtype, rank[index].shape)) for rank in split.layout]
            for index in range(len(split.model.tensors))
        ]
    boxes: dict[tuple[str, int], list[tuple[int, ...]]] = {}
    for number, rank in enumerate(split.layout):
        for stored in rank:
            for part in stored.parts:
                boxes.setdefault((part.tensor, number), []).append(extents(part.box))
    found = []
    for tensor in split.model.tensors:
        shares = []
        for number in range(len(split.layout) if tensor.name not in split.layouts.dropped else 0):
            count = sum(map(prod, boxes.get((tensor.name, number), [])))
            shape, dim = tensor.shape, tensor.cut.dim
            if dim is not None and count != prod(shape):
                shape = (*shape[:dim], count * shape[dim] // max(1, prod(shape)), *shape[dim + 1 :])
            shares.append((shape, nbytes(tensor.dtype, (count,))))
        found.append(shares)
    return found


def stored_json(split: Split) -> list[dict[str, Any]]:
    """The tensors that the files have, where they are not the model's own: from which of those each is made."""
    by_rank = [{stored.name: stored for stored in rank} for rank in split.layout]
    entries = []
    for name in dict.fromkeys(name for rank in by_rank for name in rank):
        held = [(number, rank[name]) for number, rank in enumerate(by_rank) if name in rank]
        whence = list(dict.fromkeys(part.tensor for _, stored in held for part in stored.parts))
        ranks = [_held_json(number, stored.shape, nbytes(stored.dtype, stored.shape)) for number, stored in held]
        entries.append({"name": name, "dtype": held[0][1].dtype, "from": whence, "ranks": ranks})
    return entries


def _held_json(rank: int, shape: tuple[int, ...], size: int) -> dict[str, Any]:
    return {"rank": rank, "shape": list(shape), "bytes": size}


def tensor_json(
    tensor: LogicalTensor, axes: Mapping[str, Axis], shares: Sequence[Share], dropped: str | None
) -> dict[str, Any]:
    """One tensor of a plan. dropped: why the format has no room for it."""
    cut = tensor.cut
    segments = [axes[name] for name in cut.segments]
    rule = "drop" if dropped is not None else "replicate" if cut.kind == "buffer" else cut.kind
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "rule": rule,
        "dim": cut.dim,
        "segments": [{"axis": axis.name, "count": axis.count, "unit": axis.unit} for axis in segments],
        "interleave": cut.interleave,
        "ranks": [_held_json(rank, *share) for rank, share in enumerate(shares)],
        **({} if dropped is None else {"reason": dropped}),
    }


@dataclass(frozen=True, slots=True)
class RankPart:
    """One written file of a rank."""

    rank: int
    file: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class WriteReport:
    """What split, merge or reshard wrote: `nbytes` of tensors into `output`. parts: of ranks; none of a merge.

    unread_checksums: whether checksums are recorded beside what was read, which nobody compared. left_out: files beside
    what was read that do not travel.
    """

    command: str
    output: Path
    tp: int
    set_id: str
    nbytes: int
    parts: tuple[RankPart, ...]
    warnings: tuple[str, ...]
    unread_checksums: bool = False
    left_out: tuple[LeftOut, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The result object of the JSON contract."""
        ranks: dict[int, list[dict[str, Any]]] = {}
        for part in self.parts:
            ranks.setdefault(part.rank, []).append({"file": part.file, "size": part.size, "sha256": part.sha256})
        return result(
            self.command,
            output=str(self.output),
            mesh={"tp": self.tp, "pp": 1, "ep": 1},
            set=self.set_id,
            bytes=self.nbytes,
            ranks=[{"rank": rank, "parts": parts} for rank, parts in sorted(ranks.items())],
            left_out=[asdict(each) for each in self.left_out],
            warnings=list(self.warnings),
        )


@dataclass(frozen=True)
class CheckReport:
    """What check found. `differences` is empty when all that could be judged is equal."""

    shards: ShardSet
    source: str | None
    differences: list[Difference]
    unchecked: list[str]
    warnings: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    @property
    def summary(self) -> str:
        """What differs first, and how many differences more there are."""
        more = len(self.differences) - 1
        return f"{self.differences[0]}{f', and {more} more' if more else ''}"

    def to_json(self) -> dict[str, Any]:
        """The `check` object of the JSON contract."""
        return result(
            "check",
            path=str(self.shards.directory),
            source=self.source,
            mesh={"tp": self.shards.tp, "pp": 1, "ep": 1},
            set=self.shards.manifest["set"],
            equal=self.equal,
            differences=[asdict(difference) for difference in self.differences],
            unchecked=list(self.unchecked),
            warnings=list(self.warnings),
        )


@dataclass(frozen=True)
class InspectReport:
    """What a path holds: `kind` is checkpoint, shards or file."""

    kind: str
    path: Path
    facts: dict[str, Any]
    tensors: tuple[TensorInfo, ...]

    def to_json(self) -> dict[str, Any]:
        """The `inspect` object of the JSON contract."""
        tensors = [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes, "file": Path(t.file).name}
            for t in self.tensors
        ]
        return result("inspect", kind=self.kind, path=str(self.path), **self.facts, tensors=tensors)


@dataclass(frozen=True)
class Difference:
    """One judged difference: which file, which tensor, what was expected and found."""

    file: str
    tensor: str | None
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.tensor or 'content'}: {self.message}"
