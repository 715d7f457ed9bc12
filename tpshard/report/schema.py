"""JSON Schemas (draft 2020-12) of everything that tpshard prints and writes as JSON.

An object has exactly the fields that stand here, and the tests hold every object that a command of theirs prints, and
every file that it writes, against them: a field without a schema fails.
"""

from __future__ import annotations

import json
import re

from tpshard.errors import UsageError
from tpshard.report.schema_terms import DEFINITIONS, Schema, read

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _result(command: str, fields: str) -> Schema:
    """What a command prints where it has judged or done what it was asked for."""
    return read(f"{{schema_version: schema_version, command: '{command}', {fields}}}")


_WRITTEN = """output: text, mesh: @mesh, set: set, bytes: count, ranks: {rank: count, parts: @parts}[],
    warnings: text[]"""

SCHEMAS: dict[str, Schema] = {
    "plan": _result(
        "plan",
        """model_type: text?, source: @source, architecture: @architecture, mesh: @mesh, set: set, format: text,
        tensors: {name: text, dtype: dtype, shape: shape, rule: 'column' | 'row' | 'replicate' | 'drop', dim: count?,
                  segments: {axis: text, count: count, unit: positive}[], interleave: text?, ranks: held,
                  reason?: text}[],
        ranks: {rank: count, bytes: count}[], numbers: @numbers,
        padded: {axis: text, count: count, padded: count}[], replicated: text[], tied: text{},
        possible_tp: positive[], impossible_tp: {tp: positive, reason: text}[], warnings: text[],
        stored?: {name: text, dtype: dtype, from: text[], ranks: held}[]""",
    ),
    "split": _result("split", _WRITTEN),
    "merge": _result("merge", _WRITTEN),
    "reshard": _result("reshard", _WRITTEN),
    "check": _result(
        "check",
        """path: text, source: text?, mesh: @mesh, set: set, equal: flag,
        differences: {file: text, tensor: text?, message: text}[], unchecked: text[], warnings: text[]""",
    ),
    "inspect": {
        "oneOf": [
            _result(
                "inspect",
                """kind: 'checkpoint', path: text, model_type: text?, repo_id: text?, revision: text?, bytes: count,
                parameters: count, files: {name: text, size: count}[], warnings: text[], tensors: @tensors""",
            ),
            _result(
                "inspect",
                """kind: 'shards', path: text, model_type: text?, mesh: @mesh, set: set, source: @source, bytes: count,
                missing_ranks: count[], tensors: @tensors""",
            ),
            _result(
                "inspect",
                "kind: 'file', path: text, bytes: count, metadata: text{}, header_bytes: count, tensors: @tensors",
            ),
        ]
    },
    "verify": {
        "oneOf": [
            _result(
                "verify",
                """verdict: 'pass' | 'fail' | 'inconclusive', reason: text?, model_type: text, tp: positive,
                source: text, shards: text, tiers: @tier[], canaries: @canary[], ranks: {rank: count, bytes: count}[],
                warnings: text[], settings: @settings, volatile: @volatile""",
            ),
            _result("verify", "verdict: 'error', error: @failed"),
        ]
    },
    "advise": _result(
        "advise",
        """model_type: text, source: text, gpus: positive, gpu_memory: positive, usable: number, batch: positive,
        seq: positive, choices: {tp: positive, possible: flag, weights: count?, kv_cache: count?, total: count?,
                                 short: count?, bytes_per_token: count?, fits: flag?, reason: text}[],
        take: positive?, reason: text, possible_above: positive[], warnings: text[]""",
    ),
    "env": _result(
        "env",
        """tpshard: text, python: text, platform: text, cores: positive, memory: {total: count, available: count?},
        disk: {path: text, free: count}, gpus: {name: text, memory: count?, driver: text}[],
        torch: {version: text, cuda: text?, devices: count, backends: text?{}} | {version: text?, error: text} | null,
        packages: text{}, extras: {name: text, installed: flag, for: text}[]""",
    ),
    "archs": _result("archs", "architectures: {name: text, model_types: text[]}[]"),
    "archs-show": _result("archs", "name: text, sha256: sha256, text: text"),
    "archs-draft": _result(
        "archs",
        """model_type: text, closest: text, text: text, share: share,
        undecided: {module: text, shapes: shape[]{}, candidates: text[]}[], refusal: text?, output: text?""",
    ),
    "schema": _result("schema", "schemas: text[]"),
    "error": read("{schema_version: schema_version, error: @failed}"),
    "manifest": read(
        """{format: 'tpshard', format_version: format_version, set: set, tool: text, mesh: @mesh, source: @source,
        architecture: @architecture,
        options: {dtype: text?, uneven: flag, shares: text[]?, pad_vocab_to: positive?, max_file_size: positive,
                  format: text, engine_version: text?},
        axes: {name: text, count: count, unit: positive, replicate: flag, pad: flag, group: text?}{}, tied: text{},
        tensors: {name: text, dtype: dtype, shape: shape, file: text, rule: 'column' | 'row' | 'replicate' | 'buffer',
                  full?: text, dropped?: text, dim?: count, segments?: text[], interleave?: text, ranks?: @stored[]}[],
        stored?: {name: text, dtype: dtype, every?: @stored, ranks?: @stored?[]}[]}""",
        "tpshard.json, the manifest of a shard set",
    ),
    "record": read(
        "{set: set, rank: count, tp: positive, parts: @parts}",
        "rank-NNNNN-of-NNNNN.json, written when the rank is complete",
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
