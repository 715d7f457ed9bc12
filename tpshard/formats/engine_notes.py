"""What whoever loads a set in an engine must know of it: stages of its own, drafts, and what the engine leaves out."""

from collections.abc import Collection, Iterator

from tpshard.formats.engine_config import head_of
from tpshard.formats.engine_nested import text_config_of
from tpshard.formats.engine_tables import Table
from tpshard.formats.split import Split
from tpshard.planning.stages import even_layers

DRAFT = "of a layer that predicts further tokens, a draft model of its own"
"""Why such tensors are not among the model's."""


def notes_of(engine: str, table: Table, split: Split, named: str) -> tuple[str, ...]:
    """All of them, of a set whose names are those that a table has for the model_type `named`."""
    stages, pp = split.layouts.stages, split.options.pp
    sizes = tuple(last - first for first, last in stages.ranges) if stages else ()
    others = (*_started(engine, table, split, named), *_drafts(engine, table, split, named))
    others += tuple(note for each in (_unread, _quantised, _head) for note in each(engine, table, split))
    if stages is None or sizes == even_layers(stages.layers.count, pp):
        return others
    variable = f"VLLM_PP_LAYER_PARTITION={','.join(map(str, sizes))}"
    return (f"{engine} deals layers otherwise by itself: set {variable} wherever it starts", *others)


def _started(engine: str, table: Table, split: Split, named: str) -> Iterator[str]:
    model, family = split.model, table.families.get(named)
    for path, how in family.started.items() if family else ():
        said: object = text_config_of(model) if model.architecture.get("text") else model.config
        for key in path.split(".") if path else ():
            said = said.get(key) if isinstance(said, dict) else None
        if said or not path:
            yield f"start {engine} {how}"


def _drafts(engine: str, table: Table, split: Split, named: str) -> tuple[str, ...]:
    count = list(split.layouts.dropped.values()).count(DRAFT)
    if not count:
        return ()
    how = "its names are not known"
    if named in table.speculators:
        how = "--format vllm-speculator writes it"
    elif named in table.refused_drafts:
        how = f"{engine} {table.version} does not load it"
    return (f"{count} tensors predict further tokens, which {engine} loads as a draft model: {how}",)


def _head(engine: str, table: Table, split: Split) -> tuple[str, ...]:
    found = None if split.model.architecture.get("text") else head_of(table, split.model)
    return (f"{engine} loads {found[0]} so with {found[1].started}",) if found and found[1].started else ()


def _unread(engine: str, table: Table, split: Split) -> tuple[str, ...]:
    model = split.model
    family = table.families.get(str(model.architecture.get("model_type")))
    if family is None or not family.unread:
        return ()
    count = sum(family.kind(model.full_name(tensor.name)).unread for tensor in model.tensors)
    what = f"{count} tensors that {engine}'s own loader leaves out, although it computes with them, are in these files"
    return (f"{what}: with the checkpoint itself it computes something else",) if count else ()


def _quantised(engine: str, table: Table, split: Split) -> tuple[str, ...]:
    """Of a model that nests another, the table lists by which methods this may be."""
    return () if split.model.architecture.get("text") else quantised_note(engine, table.quantised_types, split)


def quantised_note(engine: str, compared: Collection[str], split: Split) -> tuple[str, ...]:
    """What is said of a quantised model of a type that is not among those that were compared."""
    architecture = split.model.architecture.get("text") or split.model.architecture
    if not split.model.quantisation or architecture["model_type"] in compared:
        return ()
    what = f"what {engine} holds of a quantised {architecture['model_type']} was not compared"
    return (f"{what}: load these files once before you ship them",)
