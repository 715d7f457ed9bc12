"""What an engine's table says of one model and not of all of its type: by its config.json, or by the layers it has."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tpshard.errors import UnsupportedError
from tpshard.formats.engine_nested import AsEngineHas
from tpshard.formats.engine_patterns import exchanged, match
from tpshard.formats.engine_tables import EngineFamily, Head, Table
from tpshard.planning.model import DTYPE_NAMES, Model

HINT = "use --format native, or another engine's format"


def kinds_of(table: Table, model_type: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The entries that a model may have the names of, by what its config says; its own model_type is the last."""
    kinds = table.kinds.get(model_type, {})
    return (*(kind for key, kind in kinds.items() if config.get(key)), model_type)


def named_as(engine: str, table: Table, model_type: str, config: Mapping[str, Any]) -> str:
    """The model_type whose names the table has for a model: its own, or that of its class where it may have several.

    UnsupportedError for a class that the engine does not load.
    """
    given, classes = classes_of(config), table.classes.get(model_type)
    for name in given:
        if reason := table.refused_classes.get(name):
            hint = "name a class that computes the same in `architectures` of config.json, or use --format native"
            raise UnsupportedError(f"{engine} {table.version} does not load {name}: {reason}", hint=hint)
    kind = kinds_of(table, model_type, config)[0]
    if classes is None or kind != model_type:
        return kind
    for name in given:
        if name in classes:
            return classes[name]
    what = (
        f"{engine} has several classes for model_type {model_type!r}, and the config's architectures name none of them"
    )
    found = ", ".join(given) or "no architectures"
    raise UnsupportedError(what, expected=", ".join(classes), found=found, hint="take the published config.json")


def classes_of(config: Mapping[str, Any]) -> list[str]:
    """The classes that a config names; none where it says something else there."""
    given = config.get("architectures")
    return [each for each in given if isinstance(each, str)] if isinstance(given, list) else []


def head_of(table: Table, model: Model) -> tuple[str, Head] | None:
    """The class that a model's config names and what the table says of its head, where it is one of another task."""
    for name in classes_of(model.config):
        ends = [end for end in table.heads if name.endswith(end)]
        head = table.heads[max(ends, key=len)] if ends else Head()
        if head != Head():
            return name, head
    return None


def with_head(engine: str, table: Table, held: AsEngineHas) -> AsEngineHas:
    """The names with the head of another task, or without one, where the config's class is such a one.

    UnsupportedError where the engine does not load it. Its own head is then what the engine has no place for.
    """
    family, model, unplaced = held
    found = head_of(table, model)
    if found is None:
        return held
    name, head = found
    if head.reason:
        raise UnsupportedError(f"{engine} does not load {name} from sharded_state: {head.reason}", hint=HINT)
    if head.module and model.quantisation:
        raise UnsupportedError(f"what {engine} holds of {name} where it is quantised was not compared", hint=HINT)
    own = family.head and f"{family.head}.weight"
    unplaced |= {each.name for each in model.tensors if family.rename(model.full_name(each.name)) == own}
    apart = told_apart(
        EngineFamily(spelled=head.spelled), {each.name: model.full_name(each.name) for each in model.tensors}
    )
    cuts = {how: (*family.cuts.get(how, ()), *patterns) for how, patterns in head.cuts.items()}
    refused = {key: why for key, why in family.refused.items() if key != head.module}
    family = replace(
        family,
        head=head.module,
        renamed={**family.renamed, **head.renamed},
        cuts={**family.cuts, **cuts},
        float32=(*family.float32, *head.float32),
        refused={**refused, **head.refused},
    )
    return AsEngineHas(family, replace(model, tied={}, full_names=apart), unplaced)


def require_config(engine: str, model_type: str, held: AsEngineHas) -> None:
    """UnsupportedError for a config that the engine does not load, or not from `sharded_state`."""
    family, config = held.family, held.model.config
    for key, reason in family.needs.items():
        if not config.get(key, True):
            raise UnsupportedError(f"{engine} does not load {model_type} with {key} false: {reason}", hint=HINT)
    for key, reason in family.lacks.items():
        if value := config.get(key):
            what = f"{engine} does not load {model_type} with {key} {value!r:.40}: {reason}"
            raise UnsupportedError(what, hint=HINT)
    for key, reason in family.says.items():
        if key not in config:
            what = f"{engine} does not load {model_type} with a config that does not say {key}: {reason}"
            raise UnsupportedError(what, expected=key, hint="take the published config.json")


def with_dtype(config: dict[str, Any], model: Model) -> dict[str, Any]:
    """A config that says the dtype of its tensors: the given one, or its own, or the widest that they have."""
    stored = {tensor.dtype for tensor in model.tensors}
    widest = next((name for name, dtype in DTYPE_NAMES.items() if dtype in stored), None)
    said = model.dtype or config.get("dtype") or widest
    return config if said is None or config.get("dtype") == said else {**config, "dtype": said}


def told_apart(family: EngineFamily, names: Mapping[str, str]) -> dict[str, str]:
    """Full names, by tensor, with what `renamed_where` and `spelled` say: no pattern knows a layer, or a number."""
    where = [
        ({family.layer_of(name) for name in names.values() if match(pattern, name)}, renamed)
        for pattern, renamed in family.renamed_where.items()
    ]
    found = {}
    for tensor, name in names.items():
        layer = family.layer_of(name)
        for layers, renamed in where:
            name = exchanged(renamed, name) if layer in layers else name
        found[tensor] = _spelled(family, name)
    return found


def _spelled(family: EngineFamily, name: str) -> str:
    for pattern, words in family.spelled.items():
        if match(pattern, name):
            parts, place = name.split("."), pattern.count(".") + 1
            return ".".join((*parts[:place], words[int(parts[place])], *parts[place + 1 :]))
    return name
