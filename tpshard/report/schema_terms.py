"""The terms in which `schema` speaks: what JSON Schema calls them, and objects that several results hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpshard.errors import TpshardError
from tpshard.storage.safetensors import DTYPE_BITS

Schema = dict[str, Any]


def fields(
    required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None, description: str | None = None
) -> Schema:
    """An object of these fields and no others."""
    schema = {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }
    return schema if description is None else {"description": description, **schema}


def array(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def by_name(values: Schema, **more: Any) -> Schema:
    """An object whose fields are names: of tensors, modules, axes."""
    return {"type": "object", "additionalProperties": values, **more}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


TEXT: Schema = {"type": "string"}
TEXTS = array(TEXT)
FLAG: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number", "minimum": 0}
COUNT: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
DTYPE = one_of(*DTYPE_BITS)
SHA256: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
SET: Schema = {"type": "string", "pattern": "^[0-9a-f]{32}$", "description": "names a shard set"}
SHAPE = array(COUNT)
BOX = array(array(COUNT, minItems=2, maxItems=2), description="[start, stop] of each dim")
ERROR: Schema = {"anyOf": [NUMBER, one_of("inf", "nan")]}
FIGURE: Schema = {"anyOf": [{"type": "number"}, one_of("inf", "-inf", "nan")]}
NAMED = {"name": TEXT, "dtype": DTYPE, "shape": SHAPE}


METRICS = (
    "differences", "relative_error", "worst_module_error", "router_error",
    "ratio", "token_ratio", "worst_token", "kl_ratio",
    "unsharded_error", "sharded_error", "kl_unsharded", "kl_sharded", "top1_unsharded", "top1_sharded",
)  # fmt: skip
"""What a tier of verify measures, and has limits for."""


def _metrics(values: Schema) -> Schema:
    return by_name(values, propertyNames=one_of(*METRICS))


def _codes(kind: type[TpshardError]) -> set[str]:
    """The `code` of an error and of all that derive from it."""
    return {kind.code}.union(*map(_codes, kind.__subclasses__()))


DEFINITIONS: dict[str, Schema] = {
    "mesh": fields({"tp": POSITIVE, "pp": {"const": 1}, "ep": {"const": 1}}),
    "source": fields(
        {
            "name": TEXT,
            "repo_id": or_null(TEXT),
            "revision": or_null(TEXT),
            "files": array(fields({"name": TEXT, "size": COUNT}, {"sha256": SHA256})),
        },
        {"headers_sha256": SHA256},
        "the unsharded model; headers_sha256 is not there where the source is Meta's own files",
    ),
    "architecture": fields(
        {"model_type": or_null(TEXT), "rules": TEXT, "rules_sha256": SHA256},
        {"text": fields({"model_type": TEXT, "config": or_null(TEXT), "prefix": TEXT, "replicated": TEXTS})},
        "text: of a multimodal model, whose text model is split",
    ),
    "parts": array(fields({"file": TEXT, "size": COUNT, "sha256": or_null(SHA256)})),
    "stored": fields(
        {"shape": SHAPE, "parts": array(ref("part"))},
        {"view": SHAPE, "padding": array(BOX), "value": {"type": "string", "pattern": "^([0-9a-f]{2})+$"}},
        "one tensor of one rank; view: the shape in which parts and padding see it; value: of the padding, in hex",
    ),
    "part": fields(
        {"box": BOX, "at": array(COUNT)},
        {"tensor": TEXT, "view": SHAPE, "order": array(COUNT)},
        "a box of an unsharded tensor and its corner in the stored one; view and order: how the box sees its tensor",
    ),
    "numbers": fields(
        {
            "batch": POSITIVE,
            "seq": POSITIVE,
            "gpu_memory": or_null(COUNT),
            "usable": NUMBER,
            "kv_cache": fields(
                {
                    "layers": COUNT,
                    "axis": or_null(TEXT),
                    "latent": or_null(COUNT),
                    "dtype": DTYPE,
                    "window": or_null(COUNT),
                }
            ),
            "ranks": array(
                fields(
                    {"rank": COUNT, "weights": COUNT, "kv_cache": COUNT, "total": COUNT},
                    {"free": {"type": "integer"}, "fits": FLAG},
                )
            ),
            "communication": fields(
                {
                    "all_reduces": COUNT,
                    "hidden": COUNT,
                    "dtype": DTYPE,
                    "bytes_per_token": COUNT,
                    "bytes_per_prompt": COUNT,
                },
                {"bandwidth": NUMBER, "seconds_per_token": NUMBER, "seconds_per_prompt": NUMBER},
            ),
        },
        description="memory and communication; sizes in bytes, bandwidth in bytes per second",
    ),
    "failed": fields(
        {
            "code": one_of(*sorted(_codes(TpshardError))),
            "message": TEXT,
            **dict.fromkeys(("path", "tensor", "expected", "found", "hint"), or_null(TEXT)),
        },
        description="what is wrong, where, and what to do",
    ),
    "place": fields({"module": TEXT, "layer": or_null(COUNT), "rank": or_null(COUNT), "error": ERROR}),
    "tier": fields(
        {
            "name": one_of("bytes", "exact", "native", "transformers"),
            "status": one_of("pass", "fail", "inconclusive", "skipped"),
            "reason": or_null(TEXT),
            "thresholds": _metrics(NUMBER),
            "metrics": _metrics(FIGURE),
            "worst": or_null(ref("place")),
            "first": or_null(ref("place")),
            "modules": array(fields({"module": TEXT, "rank": COUNT, "error": ERROR})),
        }
    ),
    "canary": fields(
        {
            "name": TEXT,
            "tier": one_of("exact", "native"),
            "status": one_of("caught", "missed", "too small"),
            "error": ERROR,
        }
    ),
    "settings": fields(
        {"tiers": TEXTS},
        {
            "engine": one_of("tpshard", "transformers"),
            "prompt_tokens": COUNT,
            "tokens": COUNT,
            "tokens_from": one_of("the reference", "the seed"),
            "seed": COUNT,
            "float32": FLAG,
            "layers": or_null(array(COUNT)),
            "sequence_parallel": FLAG,
            "streamed": FLAG,
            "processes": POSITIVE,
        },
        "where only bytes were judged: tiers alone",
    ),
    "volatile": fields(
        {},
        {
            "seconds": NUMBER,
            "tier_seconds": by_name(NUMBER),
            **dict.fromkeys(("device", "torch", "transformers", "python"), TEXT),
        },
        "what differs between two runs on the same input",
    ),
    "tensors": array(fields({**NAMED, "bytes": COUNT, "file": TEXT})),
}
"""What several of `SCHEMAS` hold."""
