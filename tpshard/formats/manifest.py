"""`tpshard.json`: what it says of a planned split, and of every stored tensor.

It follows from headers and options alone, so every host of a cluster writes the same one. docs/reference/manifest.md
documents it; what is written today stays readable in later versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from tpshard import __version__
from tpshard.planning.axes import Axis, Cut
from tpshard.planning.box import Box, Shape, volume
from tpshard.planning.layout import LayoutRows, Part, RankShare, RowKind, StoredTensor
from tpshard.planning.mesh import Mesh

if TYPE_CHECKING:
    from tpshard.formats.split import Split

FORMAT_VERSION = 1
_Line = Iterable[str]
"""A line of the manifest, or a table of a line for each tensor, in pieces."""
_TABLES = ("tensors", "stored")


def set_name(split: Split) -> str:
    """The name of a set, which is a digest of all that follows from headers and options."""
    return _digest(_body(split))


def manifest_of(split: Split) -> bytes:
    """The manifest of a planned split."""
    version = {"format_version": FORMAT_VERSION, "set": split.set_id, "tool": f"tpshard {__version__}"}
    return b"".join(_object(chain(_lines({"format": "tpshard", **version}), _body(split))))


def digest_of(manifest: Mapping[str, Any]) -> str:
    """What `set` must be in a manifest that was read."""
    head = ("format", "format_version", "set", "tool")
    return _digest(_lines({key: value for key, value in manifest.items() if key not in head}))


def _digest(body: Iterable[_Line]) -> str:
    found = hashlib.sha256()
    for piece in _object(body):
        found.update(piece)
    return found.hexdigest()[:32]


def _body(split: Split) -> Iterator[_Line]:
    """The manifest's lines, but for those that say who wrote it."""
    model, options, placement = split.model, split.options, split.layouts.placement
    yield from _lines(
        {
            "mesh": asdict(options.mesh),
            **(placement.ranges if placement else {}),
            "source": dict(model.source),
            "architecture": dict(model.architecture),
            "options": {
                "dtype": model.dtype,
                **({} if model.dtype is None else {"cast_all": model.cast_all}),
                "uneven": options.uneven,
                "shares": None if options.shares is None else list(options.shares),
                "pad_vocab_to": options.pad_vocab_to,
                "max_file_size": options.max_file_size,
                "format": options.format,
                "engine_version": options.engine_version,
                **({} if options.pp_layers is None else {"pp_layers": list(options.pp_layers)}),
            },
            "axes": {name: _axis(axis) for name, axis in sorted(model.axes.items())},
            "tied": dict(model.tied),
            **({"layers": asdict(model.layers)} if model.layers else {}),
            **({"experts": asdict(model.experts)} if model.experts else {}),
            **({"quantisation": dict(model.quantisation)} if model.quantisation else {}),
        }
    )
    yield _table("tensors", _tensors(split))
    if not split.format.own_names:
        yield _table("stored", _all_stored(split.layouts.rows))


def _tensors(split: Split) -> Iterator[str]:
    """A row for every tensor of the model, with what each rank has of it where those are what the ranks store."""
    model, dropped, rows, stages = split.model, split.layouts.dropped, split.layouts.rows.rows, split.layouts.stages
    known: dict[object, tuple[str, str, str]] = {}  # layers are alike
    for index, tensor in enumerate(model.tensors):
        name, cut, full_name = tensor.name, tensor.cut, model.full_name(tensor.name)
        on = stages.of(name, full_name) if stages else ()
        kind = rows[index].kind if split.format.own_names else None
        if (key := (tensor.shape, cut, tensor.dtype, on, kind if split.layouts.placement else None)) not in known:
            end = "" if cut.dim is None else f",{_cut(cut)}"
            held = _of_a_stage(kind, split.options.mesh) if kind else ()
            if held and (cut.dim is not None or any(share != held[0] for share in held)):
                end += f',"ranks":[{",".join(map(_share, held))}]'
            end += f',"stages":{integers(on)}' if on else ""
            whole = f'"dtype":"{tensor.dtype}","shape":{integers(tensor.shape)}'
            known[key] = whole, f'"rule":"{cut.kind}"', end
        whole, rule, end = known[key]
        full = "" if full_name == name else f',"full":{compact(full_name)}'
        why = f',"dropped":{compact(dropped[name])}' if name in dropped else ""
        file = compact(model.file_of[name])
        yield f'{{"name":{compact(name)},{whole},"file":{file},{rule}{full}{why}{end}}}'


def _of_a_stage(kind: RowKind, mesh: Mesh) -> Sequence[RankShare | None]:
    """What the ranks of a stage have: every stage that has a tensor cuts it alike."""
    stage, _ = mesh.coordinate(kind.holders[0])
    return kind.shares[stage * mesh.tp : (stage + 1) * mesh.tp]


def _share(share: RankShare | None) -> str:
    return "null" if share is None else "".join(map(str, _stored(share, named=False)))


def _axis(axis: Axis) -> dict[str, Any]:
    """An axis; along what it is dealt is said where that is not tp, and by how many units where not one by one."""
    usual = {"along": "tp", "step": 1, "step_of": "", "rest_last": False}
    return {key: value for key, value in asdict(axis).items() if key not in usual or value != usual[key]}


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


def _all_stored(rows: LayoutRows) -> Iterator[str]:
    """A line for every stored tensor, with what each rank has of it; null for a rank that has none."""
    known: dict[RowKind, tuple[list[str], list[int]]] = {}
    for row in rows.rows:
        if row.kind not in known:
            known[row.kind] = _apart(_kind(row.kind))
        texts, owners = known[row.kind]
        names = list(map(compact, row.tensors))
        pieces = [""] * (len(texts) + len(owners))
        pieces[::2], pieces[1::2] = texts, [names[owner] for owner in owners]
        yield f'{{"name":{compact(row.name)},{"".join(pieces)}}}'


def _apart(pieces: Iterable[str | int]) -> tuple[list[str], list[int]]:
    """The texts of a line, and which of the row's tensors is named between each two of them."""
    texts, owners = [""], []
    for piece in pieces:
        if isinstance(piece, str):
            texts[-1] += piece
        else:
            owners.append(piece)
            texts.append("")
    return texts, owners


def _kind(kind: RowKind) -> list[str | int]:
    """What a line says after the name: pieces of text, and which of the row's tensors are named between them."""
    ranks = [["null"] if share is None else _stored(share, named=True) for share in kind.shares]
    dtype = kind.dtype
    if all(each == ranks[0] for each in ranks):
        return [f'"dtype":"{dtype}","every":', *ranks[0]]
    listed = chain.from_iterable([",", *each] for each in ranks)
    return [f'"dtype":"{dtype}","ranks":[', *islice(listed, 1, None), "]"]


def _stored(share: RankShare, named: bool) -> list[str | int]:
    """A stored tensor of one rank, in pieces. named: whether parts say of which logical tensor they are."""
    stored, owners = share
    pieces: list[str | int] = [f'{{"shape":{integers(stored.shape)},"parts":[']
    for index, (owner, part) in enumerate(zip(owners, stored.parts, strict=True)):
        comma = "," if index else ""
        pieces += (
            [f'{comma}{{"tensor":', owner, f",{_place(*part[1:])}}}"] if named else [f"{comma}{{{_place(*part[1:])}}}"]
        )
    return [*pieces, f"]{_rest(*stored[4:])}}}"]


@lru_cache(maxsize=1 << 16)
def _place(box: Box, at: Shape, view: Shape | None, order: tuple[int, ...] | None) -> str:
    """A part without its tensor. Cached: layers are alike."""
    text = f'"box":{_boxes(box)},"at":{integers(at)}'
    if view is not None:
        text += f',"view":{integers(view)}'
    return text if order is None else f'{text},"order":{integers(order)}'


@lru_cache(maxsize=4096)
def _rest(fills: tuple[Box, ...], view: Shape | None, value: bytes, function: str) -> str:
    """What a stored tensor has beside shape and parts."""
    text = "" if view is None else f',"view":{integers(view)}'
    if any(volume(box) for box in fills):
        text += f',"padding":[{",".join(map(_boxes, fills))}]'
    if function:
        text += f',"function":"{function}"'
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
        entry.get("function", ""),
    )


def dump(data: Mapping[str, Any]) -> bytes:
    """JSON with one tensor a line: small, and readable in a diff."""
    return b"".join(_object(_lines(data)))


def _lines(data: Mapping[str, Any]) -> Iterator[_Line]:
    for key, value in data.items():
        yield _table(key, map(compact, value)) if key in _TABLES else (f" {json.dumps(key)}: {json.dumps(value)}",)


def _table(key: str, rows: Iterable[str]) -> _Line:
    yield f' "{key}": [\n  '
    for index, row in enumerate(rows):
        yield f",\n  {row}" if index else row
    yield "\n ]"


def _object(lines: Iterable[_Line]) -> Iterator[bytes]:
    """The bytes of an object, in pieces: a manifest is a hundred times as large as what it is made of."""
    yield b"{\n"
    for index, line in enumerate(lines):
        if index:
            yield b",\n"
        yield from map(str.encode, line)
    yield b"\n}\n"


compact = json.JSONEncoder(separators=(",", ":")).encode
"""Compact JSON. Rows of tensors are put together from pieces: an encoder for each would take ten times as long."""
