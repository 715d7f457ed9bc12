"""`tpshard.json`: what it says of a planned split, and of every stored tensor.

It follows from headers and options alone, so every host of a cluster writes the same one. docs/reference/manifest.md
documents it; what is written today stays readable in later versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tpshard import __version__
from tpshard.box import Box, volume
from tpshard.layout import Layout, Mesh, Part, StoredTensor
from tpshard.model import Model

if TYPE_CHECKING:
    from tpshard.formats.base import Laid, Options

FORMAT_VERSION = 1


def manifest_of(model: Model, options: Options, laid: Laid) -> tuple[str, bytes]:
    """The name of a set, which is a digest of all that follows from headers and options, and its manifest."""
    body = _body(model, options, laid)
    set_id = _digest(body)
    head = {"format": "tpshard", "format_version": FORMAT_VERSION, "set": set_id, "tool": f"tpshard {__version__}"}
    return set_id, _object(_lines(head) + body)


def digest_of(manifest: Mapping[str, Any]) -> str:
    """What `set` must be in a manifest that was read."""
    head = ("format", "format_version", "set", "tool")
    return _digest(_lines({key: value for key, value in manifest.items() if key not in head}))


def _digest(body: Sequence[str]) -> str:
    return hashlib.sha256(_object(body)).hexdigest()[:32]


def _body(model: Model, options: Options, laid: Laid) -> list[str]:
    """The manifest's lines, but for those that say who wrote it."""
    native = options.format == "native"
    rows = []
    known: dict[object, str] = {}  # layers are alike
    for index, tensor in enumerate(model.tensors):
        entry: dict[str, Any] = {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "file": model.file_of[tensor.name],
            "rule": tensor.cut.kind,
        }
        if (full := model.full_name(tensor.name)) != tensor.name:
            entry["full"] = full
        if tensor.name in laid.dropped:
            entry["dropped"] = laid.dropped[tensor.name]
        if tensor.cut.dim is not None:
            entry["dim"] = tensor.cut.dim
            entry["segments"] = list(tensor.cut.segments)
            if tensor.cut.interleave:
                entry["interleave"] = tensor.cut.interleave
        row = _compact(entry)
        if tensor.cut.dim is not None and native:
            key = (tensor.shape, tensor.cut, tensor.dtype)
            if key not in known:
                known[key] = _compact([_stored_json(rank[index], named=False) for rank in laid.layout])
            row = f'{row[:-1]},"ranks":{known[key]}}}'
        rows.append(row)
    body: dict[str, Any] = {
        "mesh": asdict(Mesh(options.tp)),
        "source": dict(model.source),
        "architecture": dict(model.architecture),
        "options": {
            "dtype": model.dtype,
            "uneven": options.uneven,
            "shares": None if options.shares is None else list(options.shares),
            "pad_vocab_to": options.pad_vocab_to,
            "max_file_size": options.max_file_size,
            "format": options.format,
            "engine_version": options.engine_version,
        },
        "axes": {name: asdict(axis) for name, axis in sorted(model.axes.items())},
        "tied": dict(model.tied),
    }
    lines = [*_lines(body), _table("tensors", rows)]
    return lines if native else [*lines, _table("stored", list(map(_compact, _all_stored(laid.layout))))]


def _all_stored(layout: Layout) -> list[dict[str, Any]]:
    """Every stored tensor by name, with what each rank has of it; null for a rank that has none."""
    by_rank = [{stored.name: stored for stored in rank} for rank in layout]
    names = dict.fromkeys(name for rank in by_rank for name in rank)
    entries = []
    for name in names:
        held = [rank.get(name) for rank in by_rank]
        dtype = next(stored.dtype for stored in held if stored is not None)
        ranks = [None if stored is None else _stored_json(stored, named=True) for stored in held]
        same = all(each == ranks[0] for each in ranks)
        entries.append({"name": name, "dtype": dtype, **({"every": ranks[0]} if same else {"ranks": ranks})})
    return entries


def _stored_json(stored: StoredTensor, named: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"shape": list(stored.shape), "parts": [_part_json(part, named) for part in stored.parts]}
    if stored.view is not None:
        entry["view"] = list(stored.view)
    if any(volume(box) for box in stored.fills):
        entry["padding"] = [_box_json(box) for box in stored.fills]
    if stored.value:
        entry["value"] = stored.value.hex()
    return entry


def _part_json(part: Part, named: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"tensor": part.tensor} if named else {}
    entry |= {"box": _box_json(part.box), "at": list(part.at)}
    if part.view is not None:
        entry["view"] = list(part.view)
    if part.order is not None:
        entry["order"] = list(part.order)
    return entry


def _box_json(box: Box) -> list[list[int]]:
    return [list(side) for side in box]


def stored_from_json(name: str, dtype: str, entry: Mapping[str, Any], tensor: str | None = None) -> StoredTensor:
    """What `_stored_json` wrote. tensor: of which logical tensor the parts are, where they do not say it."""

    def box(sides: list[list[int]]) -> Box:
        return tuple((start, stop) for start, stop in sides)

    def numbers(value: list[int] | None) -> tuple[int, ...] | None:
        return None if value is None else tuple(value)

    parts = tuple(
        Part(
            tensor or part["tensor"],
            box(part["box"]),
            tuple(part["at"]),
            numbers(part.get("view")),
            numbers(part.get("order")),
        )
        for part in entry["parts"]
    )
    return StoredTensor(
        name,
        dtype,
        tuple(entry["shape"]),
        parts,
        tuple(box(fill) for fill in entry.get("padding", ())),
        numbers(entry.get("view")),
        bytes.fromhex(entry.get("value", "")),
    )


def dump(data: Mapping[str, Any]) -> bytes:
    """JSON with one tensor a line: small, and readable in a diff."""
    return _object(_lines(data))


def _lines(data: Mapping[str, Any]) -> list[str]:
    return [
        _table(key, list(map(_compact, value)))
        if key in ("tensors", "stored")
        else f" {json.dumps(key)}: {json.dumps(value)}"
        for key, value in data.items()
    ]


def _table(key: str, rows: Sequence[str]) -> str:
    return f' "{key}": [\n  ' + ",\n  ".join(rows) + "\n ]"


def _object(lines: Sequence[str]) -> bytes:
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
