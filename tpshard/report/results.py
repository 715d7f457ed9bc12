"""What the verbs return: frozen results that print as the documented JSON (docs/reference/json.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpshard.formats.split import Split
from tpshard.planning.axes import Axis
from tpshard.planning.deal import Deal, largest_tp, possible_tp, why_not
from tpshard.planning.layout import Row
from tpshard.planning.mesh import Mesh
from tpshard.report import plan_rows
from tpshard.report.plan_rows import TensorRows, by_reason
from tpshard.storage.carried import LeftOut
from tpshard.storage.safetensors import TensorInfo

if TYPE_CHECKING:
    from tpshard.inputs.shard_set import ShardSet
    from tpshard.report.capacity import Workload

SCHEMA_VERSION = 1
"""Fields are only added within a version."""
_MOST_TP = 16
"""The largest tp for which a plan's talk says why it is not possible."""


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
        return list(self.split.layouts.rows.rank_bytes)

    def numbers(self) -> dict[str, Any]:
        """Memory and communication of the ranks: the `numbers` object of the JSON contract."""
        from tpshard.report.capacity import Workload, numbers  # not when something is written: imports count

        work, stages = self.workload or Workload(), self.split.layouts.stages
        return numbers(self.split.kept, self.deal, self.rank_bytes, work, stages, self.split.options.ep)

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

    @property
    def impossible(self) -> str:
        """Each tp up to 16 that would cut a unit, by what it would cut; of the many above, just that they are."""
        reasons = by_reason((tp, f"{axis.count} {axis.name}") for tp, axis in self.cut_axes if tp <= _MOST_TP)
        rest = sum(tp > _MOST_TP for tp, _ in self.cut_axes)
        return "; ".join(reasons + ([f"{rest} more above {_MOST_TP} (--json lists them)"] if rest else []))

    def padding(self) -> list[dict[str, Any]]:
        """Axes that are padded with zeros, as the files have it: formats pad differently, or not at all."""
        found, split = [], self.split
        for axis in split.model.axes.values():
            along = (tensor for tensor in split.model.tensors if axis.pad and tensor.cut.segments == (axis.name,))
            cut = next((each for each in along if 0 not in each.shape and each.name not in split.layouts.dropped), None)
            if cut is not None:
                kind = next(row.kind for row in split.layouts.rows.rows if cut.name in row.tensors)
                if extra := kind.padding * axis.count // prod(cut.shape):
                    found.append({"axis": axis.name, "count": axis.count, "padded": axis.count + extra})
        return found

    @cached_property
    def tensors(self) -> TensorRows:
        """The model's tensors with what each rank holds of them."""
        return TensorRows(self.split)

    def to_json(self, grouped: bool = False) -> dict[str, Any]:
        """The `plan` object of the JSON contract. grouped: one entry for layers and experts that are alike."""
        if grouped:
            return self._json(plan_rows.tensors_grouped(self.tensors), plan_rows.stored_grouped)
        return self._json(plan_rows.tensors_json(self.tensors), plan_rows.stored_json)

    def json_text(self) -> Iterator[str]:
        """The text of `to_json()`, in pieces: of a large model it is a hundred megabytes, which nobody holds."""
        return object_text(self._json(plan_rows.tensors_text(self.tensors), plan_rows.stored_text))

    def _json(self, tensors: Iterable[object], stored: Callable[[Iterable[Row]], Iterable[object]]) -> dict[str, Any]:
        split, model = self.split, self.split.model
        return result(
            "plan",
            model_type=model.architecture["model_type"],
            source=dict(model.source),
            architecture=dict(model.architecture),
            mesh=asdict(split.options.mesh),
            **(split.layouts.placement.ranges if split.layouts.placement else {}),
            set=split.set_id,
            format=split.options.format,
            tensors=tensors,
            **({} if split.format.own_names else {"stored": stored(split.layouts.rows.rows)}),
            ranks=[{"rank": rank, "bytes": size} for rank, size in enumerate(self.rank_bytes)],
            numbers=self.numbers(),
            padded=self.padding(),
            replicated=self.replicated,
            tied=dict(model.tied),
            **({"quantisation": dict(model.quantisation)} if model.quantisation else {}),
            possible_tp=self.possible_tp,
            impossible_tp=[{"tp": tp, "reason": reason} for tp, reason in self.impossible_tp],
            left_out=[asdict(each) for each in self.left_out],
            warnings=list(self.warnings),
        )

    @property
    def replicated(self) -> list[str]:
        """The axes whose units are repeated, because there are fewer of them than ranks."""
        tp = self.split.options.tp
        return [axis.name for axis in self.split.model.axes.values() if axis.replicate and axis.count < tp]

    @property
    def possible_tp(self) -> list[int]:
        """The tp that divide everything evenly."""
        return possible_tp(self.deal.axes)


def quantisation_line(quantisation: Mapping[str, Any]) -> str:
    """How a model is quantised, for people: `fp8, 12 modules FP8 in blocks`."""
    modules = (f"{count} module{'s' if count > 1 else ''} {name}" for name, count in quantisation["modules"].items())
    cache = [f"KV cache {quantisation['kv_cache']}"] if quantisation["kv_cache"] else []
    return ", ".join([quantisation["method"], *modules, *cache])


def object_text(value: Mapping[str, Any]) -> Iterator[str]:
    """JSON as json.dumps has it, in pieces. A value may be an iterator of texts, each an item of a list."""
    for index, (key, each) in enumerate(value.items()):
        yield f"{', ' if index else '{'}{json.dumps(key)}: "
        if not isinstance(each, Iterator):
            yield json.dumps(each)
            continue
        yield "["
        for place, item in enumerate(each):
            yield f", {item}" if place else item
        yield "]"
    yield "}"


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
    mesh: Mesh
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
            mesh=asdict(self.mesh),
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
            mesh=asdict(self.shards.mesh),
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
