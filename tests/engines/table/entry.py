"""From checkpoints of one type to its entry: each is read tied and untied, and in a pipeline of two stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.engines.running import Loader, engine_version
from tests.engines.table import nested
from tests.engines.table.coded import OTHER, UNSET
from tests.engines.table.findings import Findings, layer_pattern
from tests.engines.table.known import OfEntry, differences, parsed, parsed_nested
from tests.engines.table.names import pattern, shortened
from tests.engines.table.reading import CannotSay, Checkpoint, Reading, kind_of, read
from tests.engines.table.toml import as_toml
from tpshard.errors import TpshardError
from tpshard.formats.engine_nested import config_around, with_flag
from tpshard.formats.engine_tables import EngineFamily, load_table
from tpshard.formats.vllm import FORMAT
from tpshard.rules.architecture import builtin, builtin_or_none
from tpshard.rules.multimodal import text_config

TIE = "tie_word_embeddings"
DEPTH = "vision_feature_layer"
_STAGES = "two stages of a pipeline"


@dataclass
class Entry:
    """What was read of a type. not_loaded: checkpoints that vLLM refuses, with what it says; untied: heads unset.

    entry: of a text model. nested, towers, texts: of a model that nests text models, of what is beside them, and of
    each of these. like: the types of the table that have the same entry as a text.
    """

    model_type: str
    entry: Mapping[str, Any] = field(default_factory=dict)
    nested: Mapping[str, Any] = field(default_factory=dict)
    towers: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, Any] = field(default_factory=dict)
    like: dict[str, list[str]] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    not_loaded: list[str] = field(default_factory=list)
    untied: list[Reading] = field(default_factory=list)

    @property
    def in_stages(self) -> bool:
        """Whether it was read of two stages what both have."""
        return _STAGES not in self.not_loaded

    @property
    def family(self) -> EngineFamily:
        """The entry as the table's reader has it."""
        return _parsed(self.entry)


def read_entry(checkpoints: list[Checkpoint], loader: Loader, scratch: Path, named: str = "") -> Entry:
    """The entry of a type of model, from small checkpoints of it. named: the type whose names their class has."""
    config = checkpoints[0].config
    model_type = str(config["model_type"])
    found = Entry(named or model_type)
    text = None if builtin_or_none(model_type) else text_config(config)
    architecture = builtin(text.model_type if text else model_type)
    (head, embedding), *_ = architecture.tied.items() or [("", "")]
    both = _both_ways(checkpoints, f"{head}.weight", f"{embedding}.weight", text.key if text else None)
    for number, checkpoint in enumerate(both):
        try:
            readings = read(checkpoint, loader, scratch / str(number))
            if Findings.is_tied(readings[0]) and _head_unset(readings[0], head):
                found.not_loaded.append(f"{checkpoint.name}: its class does not tie the head to the embedding")
                found.untied += readings
                continue
            found.readings += readings
        except (RuntimeError, TpshardError) as error:
            found.not_loaded.append(f"{checkpoint.name}: {_said(str(error))}")
        except CannotSay as problem:
            found.problems.append(f"{checkpoint.name}: {problem}")
    if not found.readings:
        found.problems.append("vLLM loads none of the checkpoints")
        return found
    if found.readings[0].model.architecture.get("text"):
        try:
            _read_nested(found, f"{head}.weight")
        except CannotSay as problem:
            found.problems.append(str(problem))
        return found
    findings = Findings(layer_pattern(found.readings[0]), f"{head}.weight", f"{embedding}.weight")
    for reading in found.readings:
        try:
            findings.add(reading)
        except CannotSay as problem:
            found.problems.append(f"{reading.name}: {problem}")
    stages = _on_every_stage(found.readings, findings.head, loader, scratch)
    findings.every_stage = stages or ()
    if stages is None:
        found.not_loaded.append(_STAGES)
    found.entry = {"model_types": [found.model_type], **findings.entry()}
    found.problems += findings.problems or _given(found.readings, OfEntry(found.family))
    return found


def _given(readings: list[Reading], format: OfEntry) -> list[str]:
    """Where an entry that was read gives other files than what it was read of."""
    found: list[str] = []
    for reading in readings:
        with suppress(TpshardError):  # of what it refuses
            found += (f"{each} by the entry that is read" for each in differences(reading, format))
    return list(dict.fromkeys(found))


def _read_nested(found: Entry, head: str) -> None:
    """The entry of a model that nests text models, each type of these by itself and so each tower."""
    families = load_table(FORMAT.path, engine_version()).families
    texts: dict[str, str] = {}
    prefix = ""
    for text, readings in _grouped(found.readings, _text_type):
        tried = []
        for prefix in nested.prefixes(readings[0]):
            findings, alone = nested.text_findings(readings, prefix, head)
            own = {"model_types": [text], **findings.entry()}
            same = nested.like(alone, families, text)
            tried.append((not same, len(findings.problems), -prefix.count("."), prefix, own, same, findings))
            if same:
                break
        *_, prefix, own, same, findings = min(tried, key=lambda each: each[:4])
        found.texts[text], found.like[text] = own, same
        texts[text] = same[0] if same else text
        found.problems += findings.problems
    entry: dict[str, Any] = {"model_types": [found.model_type], "texts": texts, "text": prefix}
    towers = list(_grouped(found.readings, lambda each: str(_vision(each).get("model_type"))))
    for vision, readings in towers:
        beside = nested.beside(readings)
        name = vision if len(towers) > 1 else found.model_type
        tower: dict[str, Any] = {"vision": [vision]} if len(towers) > 1 else {}
        if beside.behind:
            tower["layer"] = beside.behind
            entry |= {"depth": DEPTH, "default_depth": config_around(readings[0].model).get(DEPTH, -1)}
        if beside.or_whole:
            tower["or_whole"] = True
        tower["axes"] = list(nested.axes(beside, _vision(readings[0])))
        tower |= {key: each for key in ("fused", "renamed", "unplaced", "ones") if (each := getattr(beside, key))}
        found.towers[name] = {key: shortened(each, beside.place) for key, each in tower.items()}
        entry |= {"place": beside.place, "begins": entry.get("begins", {}) | beside.begins}
        found.problems += beside.problems
    found.nested = {**entry, "towers": list(found.towers)}
    if not found.problems:
        kind = parsed_nested(text_of(found), found.model_type)
        for text, readings in _grouped(found.readings, _text_type):
            found.problems += _given(readings, OfEntry(_parsed(found.texts[text]), kind))


def text_of(found: Entry) -> str:
    """An entry as it stands in the tables."""
    if not found.nested:
        return as_toml(found.model_type, found.entry)
    parts = [as_toml(name, tower, room="towers") for name, tower in found.towers.items()]
    parts.append(as_toml(found.model_type, found.nested, room="nested"))
    for text, entry in found.texts.items():
        same = found.like[text]
        parts.append(f"# {text} has the names of {', '.join(same)}" if same else as_toml(text, entry))
    return "\n\n".join(parts)


def _text_type(reading: Reading) -> str:
    return str(reading.model.architecture["text"]["model_type"])


def _head_unset(reading: Reading, head: str) -> bool:
    """Whether the class has a head that the embedding is not loaded into."""
    last = head.rpartition(".")[2]
    heads = (value for name, value in reading.constants.items() if name.endswith(f"{last}.weight"))
    return any(value in (UNSET, OTHER) for value in heads)


def _said(error: str) -> str:
    """The line of a traceback that says what is wrong."""
    lines = [line for line in error.strip().splitlines() if "Error" in line or line.startswith("  Value error")]
    return (lines or error.strip().splitlines())[-1].strip()


def _vision(reading: Reading) -> Mapping[str, Any]:
    return config_around(reading.model).get("vision_config") or {}


def _parsed(entry: Mapping[str, Any]) -> EngineFamily:
    return parsed({key: value for key, value in entry.items() if key != "model_types"})


def _grouped(readings: list[Reading], key: Callable[[Reading], str]) -> Iterator[tuple[str, list[Reading]]]:
    for value in dict.fromkeys(map(key, readings)):
        yield value, [each for each in readings if key(each) == value]


def _both_ways(checkpoints: list[Checkpoint], head: str, embedding: str, text: str | None) -> Iterator[Checkpoint]:
    """The checkpoints, and the first one with its head tied and with one of its own, where none is so.

    text: where the config nests that of the text model.
    """
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
        yield replace(first, name=name, shapes=shapes, config=with_flag(first.config, text, TIE, not own))


def _on_every_stage(readings: list[Reading], head: str, loader: Loader, scratch: Path) -> tuple[str, ...] | None:
    """The modules outside of layers that both of two stages have, of a checkpoint with a head if the class has one.

    None where vLLM does not load it in stages.
    """
    reading = next((each for each in readings if Findings.is_tied(each) == (not head)), readings[0])
    try:
        stages = loader.held(reading.coded.directories[0], 1, "auto", scratch / "stages", pp=2, partial=True)
    except RuntimeError:
        return None
    both = set(stages[0]) & set(stages[1])
    if Findings.is_tied(reading):  # the last stage has the embedding because it is the head
        both -= {name for name, recipe in reading.recipes.items() if "embed" in recipe.groups[0][0]}
    return tuple(sorted({pattern(kind_of(name)).removesuffix(".weight").removesuffix(".bias") for name in both}))
