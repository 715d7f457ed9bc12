"""`tpshard.json`: what it says of a planned split, and of every stored tensor.

It follows from headers and options alone, so every host of a cluster writes the same one. docs/reference/manifest.md
documents it; what is written today stays readable in later versions.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from tpshard import __version__
from tpshard.formats.split import FORMAT_VERSION, Options, RankLayouts
from tpshard.planning.axes import Axis, Cut
from tpshard.planning.box import Box, Shape, volume
from tpshard.planning.layout import Layout, Part, StoredTensor
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model


def manifest_of(model: Model, options: Options, layouts: RankLayouts, *, own_names: bool) -> tuple[str, bytes]:
    """The name of a set, which is a digest of all that follows from headers and options, and its manifest."""
    body = _body(model, options, layouts, own_names)
    set_id = _digest(body)
    head = {"format": "tpshard", "format_version": FORMAT_VERSION, "set": set_id, "tool": f"tpshard {__version__}"}
    return set_id, _object(_lines(head) + body)


def digest_of(manifest: Mapping[str, Any]) -> str:
    """What `set` must be in a manifest that was read."""
    head = ("format", "format_version", "set", "tool")
    return _digest(_lines({key: value for key, value in manifest.items() if key not in head}))


def _digest(body: Sequence[str]) -> str:
    return hashlib.sha256(_object(body)).hexdigest()[:32]


def _body(model: Model, options: Options, layouts: RankLayouts, own_names: bool) -> list[str]:
    """The manifest's lines, but for those that say who wrote it."""
    rows = []
    known: dict[object, str] = {}  # layers are alike
    for index, tensor in enumerate(model.tensors):
        full_name, dropped = model.full_name(tensor.name), layouts.dropped.get(tensor.name)
        row = [
            f'"name":{compact(tensor.name)},"dtype":"{tensor.dtype}","shape":{integers(tensor.shape)}',
            f'"file":{compact(model.file_of[tensor.name])},"rule":"{tensor.cut.kind}"',
        ]
        if full_name != tensor.name:
            row.append(f'"full":{compact(full_name)}')
        if dropped is not None:
            row.append(f'"dropped":{compact(dropped)}')
        if tensor.cut.dim is not None:
            key = (tensor.shape, tensor.cut, tensor.dtype)
            if key not in known:
                known[key] = _cut(tensor.cut)
                if own_names:
                    ranks = ",".join(_stored(rank[index], named=False) for rank in layouts.layout)
                    known[key] += f',"ranks":[{ranks}]'
            row.append(known[key])
        rows.append(f"{{{','.join(row)}}}")
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
        "axes": {name: _axis(axis) for name, axis in sorted(model.axes.items())},
        "tied": dict(model.tied),
        **({"quantisation": dict(model.quantisation)} if model.quantisation else {}),
    }
    lines = [*_lines(body), _table("tensors", rows)]
    return lines if own_names else [*lines, _table("stored", _all_stored(layouts.layout))]


def _axis(axis: Axis) -> dict[str, Any]:
    """An axis; along what it is dealt is said where that is not tp, and by how many units where not one by one."""
    return {key: value for key, value in asdict(axis).items() if (key, value) not in (("along", "tp"), ("step", 1))}


def _cut(cut: Cut) -> str:
    interleave = f',"interleave":{compact(cut.interleave)}' if cut.interleave else ""
    number = cut.ratio if isinstance(cut.ratio, int) else f'"{cut.ratio}"'
    ratio = f',"ratio":{number}' if cut.ratio != 1 else ""
    return f'"dim":{cut.dim},"segments":{compact(list(cut.segments))}{interleave}{ratio}'


def cut_from_json(entry: Mapping[str, Any]) -> Cut:
    """A tensor's cut as its row of the manifest has it."""
    segments, ratio = tuple(entry.get("segments", ())), entry.get("ratio", 1)
    if isinstance(ratio, str):
        from fractions import Fraction  # and decimal with it: only for those who pack words

        ratio = Fraction(ratio)
    return Cut(entry["rule"], entry.get("dim"), segments, entry.get("interleave"), ratio)


def _all_stored(layout: Layout) -> list[str]:
    """A line for every stored tensor, with what each rank has of it; null for a rank that has none."""
    by_rank = [{stored.name: stored for stored in rank} for rank in layout]
    names = dict.fromkeys(name for rank in by_rank for name in rank)
    lines = []
    for name in names:
        held = [rank.get(name) for rank in by_rank]
        dtype = next(stored.dtype for stored in held if stored is not None)
        ranks = ["null" if stored is None else _stored(stored, named=True) for stored in held]
        same = all(each == ranks[0] for each in ranks)
        found = f'"every":{ranks[0]}' if same else f'"ranks":[{",".join(ranks)}]'
        lines.append(f'{{"name":{compact(name)},"dtype":"{dtype}",{found}}}')
    return lines


def _stored(stored: StoredTensor, named: bool) -> str:
    """A stored tensor of one rank. named: whether parts say of which logical tensor they are."""
    if named:
        parts = [f'{{"tensor":{compact(part.tensor)},{_place(*part[1:])}}}' for part in stored.parts]
    else:
        parts = [f"{{{_place(*part[1:])}}}" for part in stored.parts]
    return f'{{"shape":{integers(stored.shape)},"parts":[{",".join(parts)}]{_rest(*stored[4:])}}}'


@lru_cache(maxsize=1 << 16)
def _place(box: Box, at: Shape, view: Shape | None, order: tuple[int, ...] | None) -> str:
    """A part without its tensor. Cached: layers are alike."""
    text = f'"box":{_boxes(box)},"at":{integers(at)}'
    if view is not None:
        text += f',"view":{integers(view)}'
    return text if order is None else f'{text},"order":{integers(order)}'


@lru_cache(maxsize=4096)
def _rest(fills: tuple[Box, ...], view: Shape | None, value: bytes) -> str:
    """What a stored tensor has beside shape and parts."""
    text = "" if view is None else f',"view":{integers(view)}'
    if any(volume(box) for box in fills):
        text += f',"padding":[{",".join(map(_boxes, fills))}]'
    return f'{text},"value":"{value.hex()}"' if value else text


def _boxes(box: Box) -> str:
    return f"[{','.join(map(integers, box))}]"


def integers(values: Sequence[int]) -> str:
    """A list of whole numbers as compact JSON."""
    return f"[{','.join(map(str, values))}]"


def stored_from_json(name: str, dtype: str, entry: Mapping[str, Any], tensor: str | None = None) -> StoredTensor:
    """What `_stored` wrote. tensor: of which logical tensor the parts are, where they do not say it."""

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
        _table(key, list(map(compact, value)))
        if key in ("tensors", "stored")
        else f" {json.dumps(key)}: {json.dumps(value)}"
        for key, value in data.items()
    ]


def _table(key: str, rows: Sequence[str]) -> str:
    return f' "{key}": [\n  ' + ",\n  ".join(rows) + "\n ]"


def _object(lines: Sequence[str]) -> bytes:
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


compact = json.JSONEncoder(separators=(",", ":")).encode
"""Compact JSON. Rows of tensors are put together from pieces: an encoder for each would take ten times as long."""
