"""vLLM's `sharded_state` of the layers that predict further tokens, which vLLM loads as a draft model of its own.

They are a set of their own, since of each of the two models vLLM's loader takes every tensor in a directory.
"""

import json
import shlex
from dataclasses import replace
from pathlib import Path

from tpshard.errors import UnsupportedError
from tpshard.formats.engine_config import named_as
from tpshard.formats.engine_nested import AsEngineHas, is_text, text_config_of, text_type
from tpshard.formats.engine_notes import quantised_note
from tpshard.formats.engine_patterns import exchanged, fits_any, match
from tpshard.formats.engine_tables import EngineFamily, Speculator, Table, load_table
from tpshard.formats.sharded_state import ShardedState, is_draft
from tpshard.formats.split import Split
from tpshard.planning.model import Model
from tpshard.storage.tensor_names import numbered, with_numbers


class DraftState(ShardedState):
    """What `ShardedState` leaves out as a draft model, by the same table: the class for it has other names."""

    no_advice = "it is a draft model, beside the ranks of its model"
    not_held = "of the model that the draft model predicts for"

    @property
    def quantised_types(self) -> frozenset[str]:
        """Those that were compared in FP8."""
        return frozenset(name for name, each in load_table(self.path).speculators.items() if each.quantised)

    def _known(self, table: Table) -> set[str]:
        """The text models, alone or in a model that nests them, of whose draft models the table knows the names."""
        return set(table.speculators)

    def notes(self, split: Split, out: Path | None = None) -> tuple[str, ...]:
        """How the engine is told of it."""
        says = json.dumps({"method": "mtp", "model": str(out or "OUT"), "num_speculative_tokens": 1})
        quantised = quantised_note(self.engine, self.quantised_types, split)
        return (
            *quantised,
            f"{self.engine} loads it beside the model's own set: --speculative-config {shlex.quote(says)}",
        )

    def _as_engine_has(self, model: Model, version: str | None, tp: int = 1) -> AsEngineHas:
        """The draft model alone, under the names of the model's own layers; UnsupportedError where there is none."""
        found = super()._as_engine_has(model, version, tp)
        family, unplaced, text = found.family, found.unplaced, model.architecture.get("text")
        model_type, table = text_type(self.nested, model), load_table(self.path, version)
        drafted = [each.name for each in found.model.tensors if is_draft(found.family, found.model, each.name)]
        if drafted and (reason := table.refused_drafts.get(model_type)):
            what = f"{self.engine} {table.version} does not load the draft model of {model_type}: {reason}"
            raise UnsupportedError(what, tensor=min(drafted), hint="--format native keeps its layers")
        if text:  # the class for its layers is a text model's
            family, unplaced = table.families[model_type], frozenset()
            inside = tuple(tensor for tensor in model.tensors if is_text(model, tensor.name))
            model = replace(model, tensors=inside, config=text_config_of(model))
        draft = {tensor.name for tensor in model.tensors if is_draft(family, model, tensor.name)}
        if not draft:
            what = "the checkpoint has no layers that predict further tokens"
            raise UnsupportedError(what, hint="--format vllm writes the model")
        model_type, known = named_as(self.engine, table, model_type, model.config), table.speculators
        if model_type not in known:
            what = f"the names that {self.engine} has for the draft model of {model_type!r} are not known"
            raise UnsupportedError(what, expected=", ".join(sorted(known)), found=model_type)
        entry = known[model_type]
        held = {name for name in draft if not fits_any(entry.left_out, model.full_name(name))}
        there = {exchanged(entry.moved, model.full_name(name)) for name in held}
        for tensor in model.tensors:
            full = model.full_name(tensor.name)
            if fits_any(entry.shares, full) and full not in there:
                held.add(tensor.name)
        kept = tuple(tensor for tensor in model.tensors if tensor.name in held)
        names = {tensor.name: _as_layer(entry, family, model, tensor.name) for tensor in kept}
        placed = [exchanged(entry.moved, name) for name in names.values()]
        if lacking := [each for each in entry.owns if not any(match(each, name) for name in placed)]:
            what = f"{self.engine}'s class for the draft model of {model_type} takes nothing of the model's"
            hint = "--format native keeps the layers"
            raise UnsupportedError(what, expected=", ".join(lacking), found="none", hint=hint)
        own = replace(
            family,
            head=entry.head,
            tied=entry.tied,
            extra_layers="",
            drafts=(),
            moved=entry.moved,
            cuts={**family.cuts, **entry.cuts},
            float32=(*family.float32, *entry.float32),
        )
        tied = {head: model.full_name(f"{to}.weight").removesuffix(".weight") for head, to in model.tied.items()}
        tied = {head.rpartition(".")[2]: to for head, to in tied.items()} if entry.head else {}
        whole = replace(model, tensors=kept, full_names={**model.full_names, **names}, tied=tied)
        return AsEngineHas(own, whole, unplaced & held)


def _as_layer(entry: Speculator, family: EngineFamily, model: Model, name: str) -> str:
    """The name that a tensor of the draft would have in the model's own layers, or beside them."""
    full = model.full_name(name)
    found = exchanged(entry.as_layers, full)
    place = family.kind(found).layer
    if found == full or place is None or not entry.numbered_from:
        return found
    kind, numbers = numbered(found)
    first = int(model.config.get(entry.numbered_from, 0))
    return with_numbers(kind, (*numbers[:place], numbers[place] + first, *numbers[place + 1 :]))


FORMAT = DraftState("vLLM", "vllm.toml", nested="vllm_nested.toml")
