"""From checkpoints of one type to its entry: each is read tied and untied, and in a pipeline of two stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.engines.running import Loader
from tests.engines.table.coded import UNSET
from tests.engines.table.findings import Findings, layer_pattern
from tests.engines.table.known import parsed
from tests.engines.table.names import pattern
from tests.engines.table.reading import CannotSay, Checkpoint, Reading, kind_of, read
from tpshard.errors import TpshardError
from tpshard.formats.engine_tables import EngineFamily
from tpshard.rules.architecture import builtin

TIE = "tie_word_embeddings"


@dataclass
class Entry:
    """What was read of a type. not_loaded: checkpoints that vLLM refuses, with what it says."""

    model_type: str
    entry: Mapping[str, Any] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    not_loaded: list[str] = field(default_factory=list)

    @property
    def family(self) -> EngineFamily:
        """The entry as the table's reader has it."""
        return parsed({key: value for key, value in self.entry.items() if key != "model_types"})


def read_entry(checkpoints: list[Checkpoint], loader: Loader, scratch: Path) -> Entry:
    """The entry of a type of model, from small checkpoints of it."""
    found = Entry(str(checkpoints[0].config["model_type"]))
    (head, embedding), *_ = builtin(found.model_type).tied.items() or [("", "")]
    for number, checkpoint in enumerate(_both_ways(checkpoints, f"{head}.weight", f"{embedding}.weight")):
        try:
            readings = read(checkpoint, loader, scratch / str(number))
            if Findings.is_tied(readings[0]) and UNSET in readings[0].constants.values():
                found.not_loaded.append(f"{checkpoint.name}: its class does not tie the head to the embedding")
                continue
            found.readings += readings
        except (RuntimeError, TpshardError) as error:
            found.not_loaded.append(f"{checkpoint.name}: {str(error).strip().splitlines()[-1]}")
        except CannotSay as problem:
            found.problems.append(f"{checkpoint.name}: {problem}")
    if not found.readings:
        found.problems.append("vLLM loads none of the checkpoints")
        return found
    findings = Findings(layer_pattern(found.readings[0]), f"{head}.weight")
    for reading in found.readings:
        try:
            findings.add(reading)
        except CannotSay as problem:
            found.problems.append(f"{reading.name}: {problem}")
    findings.every_stage = _on_every_stage(found.readings, findings.head, loader, scratch)
    found.entry = {"model_types": [found.model_type], **findings.entry()}
    found.problems += findings.problems
    return found


def _both_ways(checkpoints: list[Checkpoint], head: str, embedding: str) -> Iterator[Checkpoint]:
    """The checkpoints, and the first one with its head tied and with one of its own, where none is so."""
    yield from checkpoints
    first = checkpoints[0]
    have = {head in each.shapes for each in checkpoints}
    if embedding not in first.shapes or head == ".weight":
        return  # a name without the base prefix, or no head at all
    for own in {True, False} - have:
        shapes = {name: shape for name, shape in first.shapes.items() if name != head}
        if own:
            shapes[head] = first.shapes[embedding]
        name = f"{first.name}, {'with a head' if own else 'tied'}"
        yield Checkpoint(name, first.directory, shapes, {**first.config, TIE: not own})


def _on_every_stage(readings: list[Reading], head: str, loader: Loader, scratch: Path) -> tuple[str, ...]:
    """The modules outside of layers that both of two stages have, of a checkpoint with a head if the class has one."""
    reading = next((each for each in readings if Findings.is_tied(each) == (not head)), readings[0])
    try:
        stages = loader.held(reading.coded.directories[0], 1, "auto", scratch / "stages", pp=2, partial=True)
    except RuntimeError:
        return ()
    both = set(stages[0]) & set(stages[1])
    if Findings.is_tied(reading):  # the last stage has the embedding because it is the head
        both -= {name for name, recipe in reading.recipes.items() if "embed" in recipe.groups[0][0]}
    return tuple(sorted({pattern(kind_of(name)).removesuffix(".weight").removesuffix(".bias") for name in both}))
