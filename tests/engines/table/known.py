"""Whether an entry of the table gives what the ranks hold: element by element, of every parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import torch

from tests.engines.table.coded import ONE, OTHER, UNSET, ZERO, Coded, Held, Numbers
from tests.engines.table.cuts import placed
from tests.engines.table.reading import Reading, kind_of
from tpshard.formats.engine_functions import function_of
from tpshard.formats.engine_nested import AsEngineHas, NestedFamily, as_engine_has, load_nested
from tpshard.formats.engine_tables import EngineFamily, _family
from tpshard.formats.sharded_state import ShardedState
from tpshard.formats.split import Options
from tpshard.planning.layout import StoredTensor
from tpshard.planning.model import Model
from tpshard.storage.names import NOT_LOADED
from tpshard.storage.torch_pickle import DTYPES


class OfEntry(ShardedState):
    """Files by an entry that is in no table. kind: of a model that nests the text model that the family is of."""

    def __init__(self, family: EngineFamily, kind: NestedFamily | None = None) -> None:
        super().__init__("vLLM", "vllm.toml")
        self.family, self.kind = family, kind

    def _as_engine_has(self, model: Model, version: str | None, tp: int = 1) -> AsEngineHas:
        if self.kind:
            return as_engine_has(self.kind, self.family, model, tp)
        return AsEngineHas(replace(self.family), model)  # a family remembers the names of one model alone


def parsed(entry: Mapping[str, Any]) -> EngineFamily:
    """An entry as the table's reader has it."""
    return _family({"read": entry}, "read")


def parsed_nested(text: str, model_type: str) -> NestedFamily:
    """An entry as the table's reader has it."""
    with NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        return load_nested(Path(file.name))[model_type]


def differences(reading: Reading, format: ShardedState, version: str | None = None) -> Iterator[str]:
    """Where the files of a format are not what the ranks hold; TpshardError where it refuses the checkpoint."""
    family, model, _ = format._as_engine_has(reading.model, version, reading.tp)
    layout = format.lay(reading.model, Options(reading.tp, engine_version=version)).layout
    said: set[tuple[str, str]] = set()
    for rank, held in enumerate(reading.ranks):
        ours = {each.name: each for each in layout[rank] if not each.name.startswith(f"{NOT_LOADED}.")}
        for name in (*sorted(held.keys() ^ ours.keys()), *sorted(held.keys() & ours.keys())):
            if name not in ours:
                what = "vLLM has it, and the files have not"
            elif name not in held:
                what = "the files have it, and vLLM has not"
            elif held[name].constant == UNSET and _is_unread(family, model, ours[name]):
                continue
            else:
                what = _differs(ours[name], held[name], reading)
            if what and (kind_of(name), what) not in said:
                said.add((kind_of(name), what))
                where = f", on rank {rank} of {reading.tp}" if name in held and name in ours else ""
                yield f"{name}, made of {_made_of(reading, ours.get(name), name)}: {what}{where}"


def _is_unread(family: EngineFamily, model: Model, ours: StoredTensor) -> bool:
    """Whether all that a parameter is made of is left out by the engine's loader."""
    return all(family.kind(model.full_name(part.tensor)).unread for part in ours.parts)


def _differs(ours: StoredTensor, held: Held, reading: Reading) -> str:
    """In what a parameter of ours is another one; what vLLM leaves unset may be zeros, and behind ours."""
    if DTYPES[ours.dtype] != held.dtype and (ours.dtype, held.dtype) != ("I64", torch.int32):  # which the loader casts
        return f"held as {held.dtype}, stored as {ours.dtype}"
    if ours.function != (function := function_of(held.function, reading.model.config)):
        return f"computed by {function or 'nothing'}, stored as computed by {ours.function or 'nothing'}"
    numbers, theirs = _numbers(ours, reading.coded), held.numbers
    if numbers.ndim == theirs.ndim and all(a <= b for a, b in zip(numbers.shape, theirs.shape, strict=True)):
        inside = tuple(map(slice, numbers.shape))
        around = np.ones(theirs.shape, bool)
        around[inside] = False
        if (theirs[around] == UNSET).all():
            theirs = theirs[inside]
    if numbers.shape != theirs.shape:
        return f"held with shape {list(theirs.shape)}, stored with {list(numbers.shape)}"
    theirs = np.where((theirs == UNSET) & (numbers == ZERO), ZERO, theirs)
    return "" if bool((numbers == theirs).all()) else "other elements"


def _numbers(stored: StoredTensor, coded: Coded) -> Numbers:
    """Which elements our file has in place of a parameter."""
    filled = np.full(stored.view or stored.shape, OTHER, np.int64)
    for box in stored.fills:
        filled[tuple(slice(*span) for span in box)] = ONE if any(stored.value) else ZERO
    return placed(stored, coded.elements, filled)


def _made_of(reading: Reading, ours: StoredTensor | None, name: str) -> str:
    """The tensors that a parameter is made of: in the ranks, or else in our file."""
    recipe = reading.recipes.get(name)
    tensors = recipe.groups[0] if recipe else [part.tensor for part in ours.parts] if ours else ()
    return ", ".join(dict.fromkeys(map(kind_of, tensors))) or "nothing of the checkpoint"
