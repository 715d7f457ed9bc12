"""JSON Schemas (draft 2020-12) of everything that tpshard prints and writes as JSON.

An object has exactly the fields that stand here, and the tests hold every object that a command of theirs prints, and
every file that it writes, against them: a field without a schema fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from tpshard.errors import UsageError
from tpshard.formats.split import FORMAT_VERSION
from tpshard.report.results import SCHEMA_VERSION
from tpshard.report.schema_terms import (
    COUNT,
    DEFINITIONS,
    DTYPE,
    FLAG,
    NAMED,
    NUMBER,
    POSITIVE,
    SET,
    SHA256,
    SHAPE,
    TEXT,
    TEXTS,
    Schema,
    array,
    by_name,
    fields,
    one_of,
    or_null,
    ref,
)

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _result(command: str, of: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """What a command prints where it has judged or done what it was asked for."""
    return fields({"schema_version": {"const": SCHEMA_VERSION}, "command": {"const": command}, **of}, optional)


_AXIS = {"name": TEXT, "count": COUNT, "unit": POSITIVE}
_SHARE = fields({"rank": COUNT, "shape": SHAPE, "bytes": COUNT})
_CHOICE = {name: or_null(COUNT) for name in ("weights", "kv_cache", "total", "short", "bytes_per_token")}


def _written(command: str) -> Schema:
    """What split, merge and reshard print."""
    ranks = array(fields({"rank": COUNT, "parts": ref("parts")}))
    rest = {"mesh": ref("mesh"), "set": SET, "bytes": COUNT, "ranks": ranks, "warnings": TEXTS}
    return _result(command, {"output": TEXT, **rest})


def _inspected(kind: str, facts: Mapping[str, Schema]) -> Schema:
    return _result("inspect", {"kind": {"const": kind}, "path": TEXT, **facts, "tensors": ref("tensors")})


SCHEMAS: dict[str, Schema] = {
    "plan": _result(
        "plan",
        {
            "model_type": or_null(TEXT),
            "source": ref("source"),
            "architecture": ref("architecture"),
            "mesh": ref("mesh"),
            "set": SET,
            "format": TEXT,
            "tensors": array(
                fields(
                    {
                        **NAMED,
                        "rule": one_of("column", "row", "replicate", "drop"),
                        "dim": or_null(COUNT),
                        "segments": array(fields({"axis": TEXT, "count": COUNT, "unit": POSITIVE})),
                        "interleave": or_null(TEXT),
                        "ranks": array(_SHARE),
                    },
                    {"reason": TEXT},
                )
            ),
            "ranks": array(fields({"rank": COUNT, "bytes": COUNT})),
            "numbers": ref("numbers"),
            "padded": array(fields({"axis": TEXT, "count": COUNT, "padded": COUNT})),
            "replicated": TEXTS,
            "tied": by_name(TEXT),
            "possible_tp": array(POSITIVE),
            "impossible_tp": array(fields({"tp": POSITIVE, "reason": TEXT})),
            "warnings": TEXTS,
        },
        {"stored": array(fields({"name": TEXT, "dtype": DTYPE, "from": TEXTS, "ranks": array(_SHARE)}))},
    ),
    "split": _written("split"),
    "merge": _written("merge"),
    "reshard": _written("reshard"),
    "check": _result(
        "check",
        {
            "path": TEXT,
            "source": or_null(TEXT),
            "mesh": ref("mesh"),
            "set": SET,
            "equal": FLAG,
            "differences": array(fields({"file": TEXT, "tensor": or_null(TEXT), "message": TEXT})),
            "unchecked": TEXTS,
            "warnings": TEXTS,
        },
    ),
    "inspect": {
        "oneOf": [
            _inspected(
                "checkpoint",
                {
                    "model_type": or_null(TEXT),
                    "repo_id": or_null(TEXT),
                    "revision": or_null(TEXT),
                    "bytes": COUNT,
                    "parameters": COUNT,
                    "files": array(fields({"name": TEXT, "size": COUNT})),
                    "warnings": TEXTS,
                },
            ),
            _inspected(
                "shards",
                {
                    "model_type": or_null(TEXT),
                    "mesh": ref("mesh"),
                    "set": SET,
                    "source": ref("source"),
                    "bytes": COUNT,
                    "missing_ranks": array(COUNT),
                },
            ),
            _inspected("file", {"bytes": COUNT, "metadata": by_name(TEXT), "header_bytes": COUNT}),
        ]
    },
    "verify": {
        "oneOf": [
            _result(
                "verify",
                {
                    "verdict": one_of("pass", "fail", "inconclusive"),
                    "reason": or_null(TEXT),
                    "model_type": TEXT,
                    "tp": POSITIVE,
                    "source": TEXT,
                    "shards": TEXT,
                    "tiers": array(ref("tier")),
                    "canaries": array(ref("canary")),
                    "ranks": array(fields({"rank": COUNT, "bytes": COUNT})),
                    "warnings": TEXTS,
                    "settings": ref("settings"),
                    "volatile": ref("volatile"),
                },
            ),
            _result("verify", {"verdict": {"const": "error"}, "error": ref("failed")}),
        ]
    },
    "advise": _result(
        "advise",
        {
            "model_type": TEXT,
            "source": TEXT,
            "gpus": POSITIVE,
            "gpu_memory": POSITIVE,
            "usable": NUMBER,
            "batch": POSITIVE,
            "seq": POSITIVE,
            "choices": array(
                fields({"tp": POSITIVE, "possible": FLAG, **_CHOICE, "fits": or_null(FLAG), "reason": TEXT})
            ),
            "take": or_null(POSITIVE),
            "reason": TEXT,
            "possible_above": array(POSITIVE),
            "warnings": TEXTS,
        },
    ),
    "env": _result(
        "env",
        {
            **dict.fromkeys(("tpshard", "python", "platform"), TEXT),
            "cores": POSITIVE,
            "memory": fields({"total": COUNT, "available": or_null(COUNT)}),
            "disk": fields({"path": TEXT, "free": COUNT}),
            "gpus": array(fields({"name": TEXT, "memory": or_null(COUNT), "driver": TEXT})),
            "torch": {
                "anyOf": [
                    fields(
                        {"version": TEXT, "cuda": or_null(TEXT), "devices": COUNT, "backends": by_name(or_null(TEXT))}
                    ),
                    fields({"version": or_null(TEXT), "error": TEXT}),
                    {"type": "null"},
                ]
            },
            "packages": by_name(TEXT),
            "extras": array(fields({"name": TEXT, "installed": FLAG, "for": TEXT})),
        },
    ),
    "archs": _result("archs", {"architectures": array(fields({"name": TEXT, "model_types": TEXTS}))}),
    "archs-show": _result("archs", {"name": TEXT, "sha256": SHA256, "text": TEXT}),
    "archs-draft": _result(
        "archs",
        {
            **dict.fromkeys(("model_type", "closest", "text"), TEXT),
            "share": {**NUMBER, "maximum": 1},
            "undecided": array(fields({"module": TEXT, "shapes": by_name(array(SHAPE)), "candidates": TEXTS})),
            "refusal": or_null(TEXT),
            "output": or_null(TEXT),
        },
    ),
    "schema": _result("schema", {"schemas": TEXTS}),
    "error": fields({"schema_version": {"const": SCHEMA_VERSION}, "error": ref("failed")}),
    "manifest": fields(
        {
            "format": {"const": "tpshard"},
            "format_version": {"const": FORMAT_VERSION},
            "set": SET,
            "tool": TEXT,
            "mesh": ref("mesh"),
            "source": ref("source"),
            "architecture": ref("architecture"),
            "options": fields(
                {
                    "dtype": or_null(TEXT),
                    "uneven": FLAG,
                    "shares": or_null(TEXTS),
                    "pad_vocab_to": or_null(POSITIVE),
                    "max_file_size": POSITIVE,
                    "format": TEXT,
                    "engine_version": or_null(TEXT),
                }
            ),
            "axes": by_name(fields({**_AXIS, "replicate": FLAG, "pad": FLAG, "group": or_null(TEXT)})),
            "tied": by_name(TEXT),
            "tensors": array(
                fields(
                    {**NAMED, "file": TEXT, "rule": one_of("column", "row", "replicate", "buffer")},
                    {
                        "full": TEXT,
                        "dropped": TEXT,
                        "dim": COUNT,
                        "segments": TEXTS,
                        "interleave": TEXT,
                        "ranks": array(ref("stored")),
                    },
                )
            ),
        },
        {
            "stored": array(
                fields({"name": TEXT, "dtype": DTYPE}, {"every": ref("stored"), "ranks": array(or_null(ref("stored")))})
            )
        },
        "tpshard.json, the manifest of a shard set",
    ),
    "record": fields(
        {"set": SET, "rank": COUNT, "tp": POSITIVE, "parts": ref("parts")},
        description="rank-NNNNN-of-NNNNN.json, written when the rank is complete",
    ),
}
"""By name: what the command of this name prints with --json, what any command prints that fails, two kinds of files."""


def schema(name: str) -> Schema:
    """The schema of this name, whole in itself. UsageError for a name that `SCHEMAS` has not."""
    if name not in SCHEMAS:
        raise UsageError(f"no schema {name!r}", expected=", ".join(SCHEMAS), hint="`tpshard schema` lists them")
    title = {"$schema": DIALECT, "title": f"tpshard {name}"}
    return {**title, **SCHEMAS[name], "$defs": _definitions(SCHEMAS[name])}


def _definitions(of: Schema) -> dict[str, Schema]:
    """The definitions that a schema refers to, and those that these refer to."""
    names: dict[str, None] = dict.fromkeys(re.findall(r'"#/\$defs/(\w+)"', json.dumps(of)))
    found: dict[str, Schema] = {}
    for name in names:
        found |= {name: DEFINITIONS[name]} | _definitions(DEFINITIONS[name])
    return found
