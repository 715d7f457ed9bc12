"""The notation in which `schema` speaks, and objects that several results hold.

    {name: text, sizes: count[], kind: 'a' | 'b', by: number{}, note: text?, at?: {row: count}}

An object has these fields and no others; a field with `?` before the colon may be left out. After a term, `[]` makes a
list of it, `{}` an object that holds it under names (of tensors, modules, axes), and `?` allows null. One literal is a
constant, several are the possible values. `@name` refers to one of `DEFINITIONS`.
"""

from __future__ import annotations

import ast
import re
from collections import deque
from typing import Any

from tpshard.errors import TpshardError
from tpshard.formats.split import FORMAT_VERSION
from tpshard.report.results import SCHEMA_VERSION
from tpshard.storage.safetensors import DTYPE_BITS

Schema = dict[str, Any]

METRICS = (
    "differences", "relative_error", "worst_module_error", "router_error",
    "ratio", "token_ratio", "worst_token", "kl_ratio",
    "unsharded_error", "sharded_error", "kl_unsharded", "kl_sharded", "top1_unsharded", "top1_sharded",
)  # fmt: skip
"""What a tier of verify measures, and has limits for."""


def _codes(kind: type[TpshardError]) -> set[str]:
    """The `code` of an error and of all that derive from it."""
    return {kind.code}.union(*map(_codes, kind.__subclasses__()))


_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number", "minimum": 0}
_PAIR = {"type": "array", "items": _COUNT, "minItems": 2, "maxItems": 2}
_METRIC = {"enum": list(METRICS)}
_FIGURE = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}
_TERMS: dict[str, Schema] = {
    "schema_version": {"const": SCHEMA_VERSION},
    "format_version": {"const": FORMAT_VERSION},
    "text": {"type": "string"},
    "flag": {"type": "boolean"},
    "null": {"type": "null"},
    "integer": {"type": "integer"},
    "count": _COUNT,
    "positive": {"type": "integer", "minimum": 1},
    "number": _NUMBER,
    "share": {**_NUMBER, "maximum": 1},
    "dtype": {"enum": list(DTYPE_BITS)},
    "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    "set": {"type": "string", "pattern": "^[0-9a-f]{32}$", "description": "names a shard set"},
    "hex": {"type": "string", "pattern": "^([0-9a-f]{2})+$"},
    "shape": {"type": "array", "items": _COUNT},
    "box": {"type": "array", "items": _PAIR, "description": "[start, stop] of each dim"},
    "error": {"anyOf": [_NUMBER, {"enum": ["inf", "nan"]}]},
    "code": {"enum": sorted(_codes(TpshardError))},
    "limits": {"type": "object", "additionalProperties": _NUMBER, "propertyNames": _METRIC},
    "figures": {"type": "object", "additionalProperties": _FIGURE, "propertyNames": _METRIC},
}
_TOKEN = re.compile(r"'[^']*'|[\w-]+\??:|@?\w+|\[\]|\{\}|[{}?|]")


def read(text: str, description: str | None = None) -> Schema:
    """The schema that a text in this notation stands for."""
    assert not _TOKEN.sub("", text).strip(", \n"), f"{text!r} has what is not of the notation"
    tokens = deque(_TOKEN.findall(text))
    schema = _union(tokens)
    assert not tokens, f"{text!r} goes on with {tokens[0]!r}"
    return schema if description is None else {"description": description, **schema}


def _union(tokens: deque[str]) -> Schema:
    """Consume one term, or several with `|` between them."""
    terms = [_term(tokens)]
    while tokens and tokens[0] == "|":
        tokens.popleft()
        terms.append(_term(tokens))
    if len(terms) == 1:
        return terms[0]
    return {"enum": [term["const"] for term in terms]} if "const" in terms[0] else {"anyOf": terms}


def _term(tokens: deque[str]) -> Schema:
    """Consume an object, a literal, a reference or a word, and what follows it."""
    word = tokens.popleft()
    if word == "{":
        schema = _object(tokens)
    elif word[0] == "@":
        schema = {"$ref": f"#/$defs/{word[1:]}"}
    else:
        schema = {"const": ast.literal_eval(word)} if word[0] == "'" or word.isdecimal() else _TERMS[word]
    while tokens and tokens[0] in ("[]", "{}", "?"):
        match tokens.popleft():
            case "[]":
                schema = {"type": "array", "items": schema}
            case "{}":
                schema = {"type": "object", "additionalProperties": schema}
            case _:
                schema = {"anyOf": [schema, _TERMS["null"]]}
    return schema


def _object(tokens: deque[str]) -> Schema:
    """Consume the fields of an object and its closing brace."""
    required: dict[str, Schema] = {}
    optional: dict[str, Schema] = {}
    while (name := tokens.popleft()) != "}":
        (optional if name.endswith("?:") else required)[name.rstrip("?:")] = _union(tokens)
    properties = required | optional
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_TERMS["held"] = read("{rank: count, shape: shape, bytes: count}[]")
DEFINITIONS: dict[str, Schema] = {
    "mesh": read("{tp: positive, pp: 1, ep: 1}"),
    "source": read(
        """{name: text, repo_id: text?, revision: text?, files: {name: text, size: count, sha256?: sha256}[],
            headers_sha256?: sha256}""",
        "the unsharded model; headers_sha256 is not there where the source is Meta's own files",
    ),
    "architecture": read(
        """{model_type: text?, rules: text, rules_sha256: sha256,
            text?: {model_type: text, config: text?, prefix: text, replicated: text[]}}""",
        "text: of a multimodal model, whose text model is split",
    ),
    "parts": read("{file: text, size: count, sha256: sha256?}[]"),
    "stored": read(
        "{shape: shape, parts: @part[], view?: shape, padding?: box[], value?: hex}",
        "one tensor of one rank; view: the shape in which parts and padding see it; value: of the padding, in hex",
    ),
    "part": read(
        "{box: box, at: count[], tensor?: text, view?: shape, order?: count[]}",
        "a box of an unsharded tensor and its corner in the stored one; view and order: how the box sees its tensor",
    ),
    "numbers": read(
        """{batch: positive, seq: positive, gpu_memory: count?, usable: number,
            kv_cache: {layers: count, axis: text?, latent: count?, dtype: dtype, window: count?},
            ranks: {rank: count, weights: count, kv_cache: count, total: count, free?: integer, fits?: flag}[],
            communication: {all_reduces: count, hidden: count, dtype: dtype, bytes_per_token: count,
                            bytes_per_prompt: count, bandwidth?: number, seconds_per_token?: number,
                            seconds_per_prompt?: number}}""",
        "memory and communication; sizes in bytes, bandwidth in bytes per second",
    ),
    "failed": read(
        "{code: code, message: text, path: text?, tensor: text?, expected: text?, found: text?, hint: text?}",
        "what is wrong, where, and what to do",
    ),
    "place": read("{module: text, layer: count?, rank: count?, error: error}"),
    "tier": read(
        """{name: 'bytes' | 'exact' | 'native' | 'transformers', status: 'pass' | 'fail' | 'inconclusive' | 'skipped',
            reason: text?, thresholds: limits, metrics: figures, worst: @place?, first: @place?,
            modules: {module: text, rank: count, error: error}[]}"""
    ),
    "canary": read("{name: text, tier: 'exact' | 'native', status: 'caught' | 'missed' | 'too small', error: error}"),
    "settings": read(
        """{tiers: text[], engine?: 'tpshard' | 'transformers', prompt_tokens?: count, tokens?: count,
            tokens_from?: 'the reference' | 'the seed', seed?: count, float32?: flag, layers?: count[]?,
            sequence_parallel?: flag, streamed?: flag, processes?: positive}""",
        "where only bytes were judged: tiers alone",
    ),
    "volatile": read(
        """{seconds?: number, tier_seconds?: number{}, device?: text, torch?: text, transformers?: text,
            python?: text}""",
        "what differs between two runs on the same input",
    ),
    "tensors": read("{name: text, dtype: dtype, shape: shape, bytes: count, file: text}[]"),
}
"""What several of `SCHEMAS` hold."""
