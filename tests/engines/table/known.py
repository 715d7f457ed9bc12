"""Whether an entry says the same as the table does, of the tensors of the checkpoints that were read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tests.engines.table.reading import Reading, kind_of
from tpshard.formats.engine_tables import EngineFamily, _family
from tpshard.storage.tensor_names import numbered

NOT_READ = (
    "buffers", "needs", "says", "unrepeated", "alone_repeated", "rest_last", "plain", "slots",
)  # fmt: skip
"""Keys of a family that loading a checkpoint that is not quantised does not show."""


def parsed(entry: Mapping[str, Any]) -> EngineFamily:
    """An entry as the table's reader has it."""
    return _family({"read": entry}, "read")


def differences(read: EngineFamily, known: EngineFamily, readings: Iterable[Reading], *, stages: bool) -> Iterator[str]:
    """Where what was read and what the table has say other things. stages: whether it says what each of a pipeline has.

    Names of layers, heads and scales are compared as they stand; patterns by what they say of each tensor.
    """
    for key in ("layer", "head", "tied", "scales", *(["every_stage"] if stages else [])):
        ours, theirs = getattr(known, key), getattr(read, key)
        if (sorted(ours) != sorted(theirs)) if isinstance(ours, tuple) else ours != theirs:
            yield f"{key}: read {theirs!r}, known {ours!r}"
    said: set[str] = set()
    for reading in readings:
        names = [reading.model.full_name(tensor.name) for tensor in reading.model.tensors]
        if read.attending(names) != known.attending(names):
            yield f"attends, in {reading.name}: read {read.attending(names)}, known {known.attending(names)}"
        layers = _layers(read, reading), _layers(known, reading)
        for tensor, name in zip(reading.model.tensors, names, strict=True):
            if tensor.cut.kind == "buffer":
                continue
            outside = (_outside(each, name, last) for each, last in zip((read, known), layers, strict=True))
            for what, (a, b) in {"left out": tuple(outside), **_told_apart(read, known, name)}.items():
                line = f"{kind_of(name)}: {what}: read {a!r}, known {b!r}"
                if a != b and line not in said:
                    said.add(line)
                    yield line


def _layers(family: EngineFamily, reading: Reading) -> int | None:
    return reading.model.config.get(family.extra_layers) if family.extra_layers else None


def _outside(family: EngineFamily, name: str, layers: int | None) -> bool:
    """Whether a tensor is of a model that predicts further tokens."""
    layer = family.layer_of(name)
    return family.kind(name).draft or (layers is not None and layer is not None and layer >= layers)


def _told_apart(read: EngineFamily, known: EngineFamily, name: str) -> Mapping[str, tuple[Any, Any]]:
    a, b = read.kind(name), known.kind(name)
    if a.refusal and b.refusal:
        return {}
    numbers = numbered(name)[1]

    def into(family: EngineFamily) -> str:
        return family.rename(name)

    found: dict[str, tuple[Any, Any]] = {
        "refused": (bool(a.refusal), bool(b.refusal)),
        "cut": (a.cut, b.cut),
        "turned": ((a.transposed, a.either), (b.transposed, b.either)),
        "squeezed": (a.squeezed, b.squeezed),
        "float32": (a.float32, b.float32),
        "function": (a.function, b.function),
        "fused": tuple(
            [(each.target, each.place, each.name.format(*numbers), each.stacked) for each in kind.fused]
            for kind in (a, b)
        ),
    }
    if not (a.fused and b.fused) or a.fused[0].target.endswith("?"):
        found["renamed"] = (into(read), into(known))
    return found
