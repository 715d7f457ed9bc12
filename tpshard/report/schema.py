"""JSON Schemas (draft 2020-12) of everything that tpshard prints and writes as JSON.

`schemas.json` says them in short. A field is `name`, `name?` where it may be missing; its value an object, alternatives
in a list, or a word: a term of `_TERMS`, `@` and a definition, `=` and the one value, or several values with commas.
`[]` (a list of those), `{}` (those by name) and `|null` follow the name or the word. `#` is a description.
An object has exactly its fields, and the tests hold every object that a command of theirs prints, and every file that
it writes, against them: a field without a schema fails.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from tpshard.errors import TpshardError, UsageError
from tpshard.formats.manifest import FORMAT_VERSION
from tpshard.report.results import SCHEMA_VERSION
from tpshard.storage.safetensors import DTYPE_BITS

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
METRICS = (
    "differences", "tensors", "elements", "relative_error", "rounding_error", "worst_module_error",
    "router_error", "unsharded_error", "sharded_error", "kl_unsharded", "kl_sharded", "top1_unsharded", "top1_sharded",
)  # fmt: skip
"""What a tier of verify measures, and has limits for."""


def _codes(kind: type[TpshardError]) -> set[str]:
    """The `code` of an error and of all that derive from it."""
    return {kind.code}.union(*map(_codes, kind.__subclasses__()))


def _by_name(values: Schema, **more: Any) -> Schema:
    return {"type": "object", "additionalProperties": values, **more}


_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number", "minimum": 0}
_METRIC = {"propertyNames": {"enum": list(METRICS)}}
_FIGURE: Schema = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}
_BOX = {"type": "array", "items": _COUNT, "minItems": 2, "maxItems": 2}
_TERMS: dict[str, Schema] = {
    "null": {"type": "null"},
    "text": {"type": "string"},
    "flag": {"type": "boolean"},
    "integer": {"type": "integer"},
    "count": _COUNT,
    "positive": {"type": "integer", "minimum": 1},
    "number": _NUMBER,
    "ratio": {"anyOf": [{"type": "integer", "minimum": 2}, {"type": "string", "pattern": "^[0-9]+/[0-9]+$"}]},
    "share": {**_NUMBER, "maximum": 1},
    "dtype": {"enum": list(DTYPE_BITS)},
    "hex": {"type": "string", "pattern": "^([0-9a-f]{2})+$"},
    "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    "set": {"type": "string", "pattern": "^[0-9a-f]{32}$", "description": "names a shard set"},
    "box": {"type": "array", "items": _BOX, "description": "[start, stop] of each dim"},
    "code": {"enum": sorted(_codes(TpshardError))},
    "error": {"anyOf": [_NUMBER, {"enum": ["inf", "nan"]}]},
    "limits": _by_name(_NUMBER, **_METRIC),
    "metrics": _by_name(_FIGURE, **_METRIC),
}
_VALUES = {"schema_version": SCHEMA_VERSION, "format_version": FORMAT_VERSION}
_SUFFIX = r"\[\]|\{\}|\|null"


def _parted(text: str) -> tuple[str, str]:
    """A name or a word, and the suffixes that follow it."""
    suffixes = text[len(re.sub(f"(?:{_SUFFIX})+$", "", text)) :]
    return text.removesuffix(suffixes), suffixes


def _suffixed(schema: Schema, suffixes: str) -> Schema:
    for suffix in re.findall(_SUFFIX, suffixes):
        if suffix == "[]":
            schema = {"type": "array", "items": schema}
        else:
            schema = _by_name(schema) if suffix == "{}" else {"anyOf": [schema, _TERMS["null"]]}
    return schema


def _meant(said: Any) -> Schema:
    """What a value of `schemas.json` stands for."""
    if isinstance(said, list):
        return {"anyOf": list(map(_meant, said))}
    if isinstance(said, dict):
        return _object(said)
    word, suffixes = _parted(said)
    if word.startswith("@"):
        schema: Schema = {"$ref": f"#/$defs/{word[1:]}"}
    elif word.startswith("= "):
        value = word[2:]
        schema = {"const": int(value) if value.isdigit() else _VALUES.get(value, value)}
    else:
        schema = {"enum": word.split(", ")} if ", " in word else _TERMS[word]
    return _suffixed(schema, suffixes)


def _object(said: dict[str, Any]) -> Schema:
    needed: dict[str, Schema] = {}
    optional: dict[str, Schema] = {}
    for key, value in said.items():
        if key != "#":
            name, suffixes = _parted(key)
            (optional if name.endswith("?") else needed)[name.rstrip("?")] = _suffixed(_meant(value), suffixes)
    schema = {"type": "object", "properties": {**needed, **optional}, "required": list(needed)}
    return ({"description": said["#"]} if "#" in said else {}) | schema | {"additionalProperties": False}


def _result(name: str, said: Any) -> Schema:
    """What a command prints where it has judged or done what it was asked for."""
    if isinstance(said, list):
        return {"oneOf": [_result(name, each) for each in said]}
    return _object({"schema_version": "= schema_version", "command": f"= {name.partition('-')[0]}", **said})


@cache
def _known() -> tuple[dict[str, Schema], dict[str, Schema]]:
    """Schemas and definitions by name."""
    said = json.loads(Path(__file__).with_name("schemas.json").read_text(encoding="utf-8"))
    schemas = {name: _result(name, each) for name, each in said["commands"].items()}
    return schemas | _object(said["documents"])["properties"], _object(said["definitions"])["properties"]


def names() -> list[str]:
    """What the command of this name prints with --json, what any command prints that fails, two kinds of files."""
    return list(_known()[0])


def schema(name: str) -> Schema:
    """The schema of this name, whole in itself. UsageError for a name that is not among `names`."""
    if name not in names():
        raise UsageError(f"no schema {name!r}", expected=", ".join(names()), hint="`tpshard schema` lists them")
    found = _known()[0][name]
    return {"$schema": DIALECT, "title": f"tpshard {name}", **found, "$defs": _definitions(found)}


def _definitions(of: Schema) -> dict[str, Schema]:
    """The definitions that a schema refers to, and those that these refer to."""
    definitions = _known()[1]
    found: dict[str, Schema] = {}
    for name in dict.fromkeys(re.findall(r'"#/\$defs/(\w+)"', json.dumps(of))):
        found |= {name: definitions[name]} | _definitions(definitions[name])
    return found
