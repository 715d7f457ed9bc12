"""Whether an entry says the same as the table does, of the tensors of the checkpoints that were read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from tests.engines.table.reading import Reading, kind_of
from tpshard.formats.engine_nested import AsEngineHas, NestedFamily, as_engine_has, load_nested
from tpshard.formats.engine_tables import EngineFamily, _family
from tpshard.storage.tensor_names import numbered

NOT_READ = (
    "buffers", "needs", "says", "unrepeated", "alone_repeated", "rest_last", "plain", "scaled", "slots",
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
    if read.stands_in and read.stands_in != known.stands_in:
        yield f"stands_in: read {dict(read.stands_in)}, known {dict(known.stands_in)}"
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
            sorted((each.target, each.place, each.name.format(*numbers), each.stacked, each.dim) for each in kind.fused)
            for kind in (a, b)
        ),
    }
    if not (a.fused and b.fused) or a.fused[0].target.endswith("?"):
        found["renamed"] = (into(read), into(known))
    return found


def nested_differences(
    read: NestedFamily,
    known: NestedFamily,
    like: Mapping[str, list[str]],
    families: Mapping[str, EngineFamily],
    readings: Iterable[Reading],
) -> Iterator[str]:
    """Where an entry of a model that nests a text says other things than the table: of each tensor, by what it says."""
    said: set[str] = set()
    for reading in readings:
        model = reading.model
        text = str(model.architecture["text"]["model_type"])
        if text not in known.texts or known.texts[text] not in like[text]:
            yield f"{text}: read {like[text]}, known {known.texts.get(text)}"
            continue
        if read.text != known.text:
            yield f"text: read {read.text!r}, known {known.text!r}"
            return
        a, b = (as_engine_has(each, families[known.texts[text]], model) for each in (read, known))
        for tensor, mine, theirs in zip(model.tensors, a.model.tensors, b.model.tensors, strict=True):
            out = tensor.name in a.unplaced, tensor.name in b.unplaced
            pairs: dict[str, tuple[Any, ...]] = {"left out": out}
            if not any(out):
                pairs["name"] = _in(a, tensor.name), _in(b, tensor.name)
                pairs["cut"] = tuple((each.cut.kind, each.cut.dim, len(each.cut.segments)) for each in (mine, theirs))
            for what, (one, other) in pairs.items():
                line = f"{kind_of(tensor.name)}: {what}: read {one!r}, known {other!r}"
                if one != other and line not in said:
                    said.add(line)
                    yield line


def _in(held: AsEngineHas, name: str) -> list[tuple[str, int]]:
    full = held.model.full_name(name)
    numbers = numbered(full)[1]
    fused = [(each.name.format(*numbers), each.place) for each in held.family.kind(full).fused]
    return fused or [(held.family.rename(full), 0)]


def parsed_nested(text: str, model_type: str) -> NestedFamily:
    """An entry as the table's reader has it."""
    with NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        return load_nested(Path(file.name))[model_type]
