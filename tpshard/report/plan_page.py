"""A plan as one HTML page that needs no network: a column per rank, tensors as blocks to scale.

The page (`plan_page.html`) draws from data that hold a row for each *kind* of tensor: layers that are alike, and the
experts in them, share theirs, so that the page of a model of 46,000 tensors stays small. Opening a layer is the page's.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from tpshard.formats.split import Split
from tpshard.planning.axes import Axis
from tpshard.planning.box import volume
from tpshard.planning.layout import LogicalTensor, Part, StoredTensor
from tpshard.report.capacity import number_lines
from tpshard.report.results import PlanReport, quantisation_line
from tpshard.storage.safetensors import nbytes

_PAGE = Path(__file__).parent / "plan_page.html"
_MOST_SLICES = 48
"""Interleaved segments are drawn one by one up to this many, beyond it as their sums."""
Slice = tuple[str, int, int, int]
"""A stretch of a block: rule, which segment, elements, on how many ranks it lies. The rule of padding is `padding`."""


def draw(report: PlanReport) -> str:
    """The page of a plan."""
    # Inside a script element only `<` could end it.
    data = json.dumps(page_data(report), separators=(",", ":")).replace("<", "\\u003c")
    return _PAGE.read_text(encoding="utf-8").replace("{{DATA}}", data)


def page_data(report: PlanReport) -> dict[str, Any]:
    """What the page draws (plain JSON): facts, rows by kind, and sections, each of single rows or of alike layers."""
    split = report.split
    kinds, sections = _sections(split)
    name = split.model.source["repo_id"] or split.model.source["name"]
    options = split.options
    return {
        "title": f"{name} on {options.mesh.size} ranks",
        "tp": options.mesh.size,
        "facts": [
            f"{split.model.architecture['model_type']}, format {options.format}, {len(split.model.tensors)} tensors",
            *([f"quantised: {quantisation_line(split.model.quantisation)}"] if split.model.quantisation else []),
            *number_lines(report.numbers()),
            *(f"padded: {p['axis']} from {p['count']} to {p['padded']}, with zeros" for p in report.padding()),
            *(f"tied: {module} = {to}" for module, to in split.model.tied.items()),
            *(f"dropped: {tensor} ({why})" for tensor, why in split.layouts.dropped.items()),
        ],
        "bytes": report.rank_bytes,
        "kinds": kinds,
        "sections": sections,
    }


def _sections(split: Split) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Kinds of blocks, and the order in which they are drawn.

    A row is `[name, kind, experts]`: in its name `*` is the layer, `**` the expert; experts are null or their numbers.
    """
    logical = {tensor.name: tensor for tensor in split.model.tensors}
    by_rank = [{stored.name: stored for stored in rank} for rank in split.layout]
    kinds: list[dict[str, Any]] = []
    known: dict[object, int] = {}
    # By the name's beginning, then by layer (None: no layer), then by row: the experts.
    found: dict[str, dict[int | None, dict[tuple[str, int], list[int]]]] = {}
    for name in dict.fromkeys(name for rank in by_rank for name in rank):
        ranks = [rank.get(name) for rank in by_rank]
        key = tuple(
            stored and (stored.dtype, stored.shape, _origin(stored, logical), len(stored.parts)) for stored in ranks
        )
        if key not in known:
            known[key] = len(kinds)
            kinds.append(_kind(ranks, logical, split.model.axes))
        start, layer, pattern, expert = _numbered(name)
        rows = found.setdefault(start, {}).setdefault(layer, {})
        experts = rows.setdefault((pattern, known[key]), [])
        if expert is not None:
            experts.append(expert)
    sections = []
    for layers in found.values():
        alike: dict[tuple[Any, ...], list[int | None]] = {}
        for layer, rows in layers.items():
            signature = tuple((pattern, kind, tuple(experts)) for (pattern, kind), experts in rows.items())
            alike.setdefault(signature, []).append(layer)
        for signature, numbers in alike.items():
            rows_ = [[pattern, kind, list(experts) or None] for pattern, kind, experts in signature]
            sections.append({"layers": None if numbers == [None] else numbers, "rows": rows_})
    return kinds, sections


def _numbered(name: str) -> tuple[str, int | None, str, int | None]:
    """What stands before the layer's number (the whole name where none), the layer, the pattern, the expert."""
    match re.split(r"(?<![^.])(\d+)(?=\.)", name, maxsplit=2):
        case [start, layer, rest]:
            return start, int(layer), f"{start}*{rest}", None
        case [start, layer, middle, expert, rest]:
            return start, int(layer), f"{start}*{middle}**{rest}", int(expert)
    return name, None, name, None


def _origin(stored: StoredTensor, logical: Mapping[str, LogicalTensor]) -> tuple[object, ...]:
    """Cut and shape of the tensors that a stored one is made of: where these are equal, so is what is drawn."""
    names = dict.fromkeys(part.tensor for part in stored.parts)
    return tuple((logical[name].cut, logical[name].shape) for name in names)


def _kind(
    ranks: Sequence[StoredTensor | None], logical: Mapping[str, LogicalTensor], axes: Mapping[str, Axis]
) -> dict[str, Any]:
    """A kind of block: rule, names of its segments, and each rank's shape, bytes and slices."""
    holders = Counter((part.tensor, part.box) for stored in ranks if stored for part in stored.parts)
    tensors = [logical[name] for name in dict.fromkeys(part.tensor for s in ranks if s for part in s.parts)]
    if len(tensors) == 1:
        cut = tensors[0].cut
        rule, segments = cut.rule if cut.dim is not None else "replicate", list(cut.segments)
    else:  # an engine's fused tensor: a segment for each that it is made of
        rule = " + ".join(dict.fromkeys(tensor.cut.rule for tensor in tensors)) or "constant"
        segments = [tensor.name.rpartition(".")[0].rpartition(".")[2] for tensor in tensors]
    order = {tensor.name: index for index, tensor in enumerate(tensors)}
    held = []
    for stored in ranks:
        slices: list[Slice] = []
        for part in stored.parts if stored else ():
            tensor, count = logical[part.tensor], holders[part.tensor, part.box]
            kind = "replicate" if tensor.cut.dim is None else tensor.cut.kind
            if len(tensors) > 1 or tensor.cut.dim is None or part.view is not None:
                slices.append((kind, order[part.tensor] if len(tensors) > 1 else 0, volume(part.box), count))
            else:
                slices += [(kind, index, size, count) for index, size in _by_segment(part, tensor, axes)]
        slices += [("padding", 0, volume(box), 1) for box in (stored.fills if stored else ()) if volume(box)]
        held.append([list(stored.shape), nbytes(stored.dtype, stored.shape), _few(slices)] if stored else [None, 0, []])
    first = next(stored for stored in ranks if stored)
    whole = list(tensors[0].shape) if len(tensors) == 1 else None
    return {"rule": rule, "dtype": first.dtype, "shape": whole, "segments": segments, "ranks": held}


def _by_segment(part: Part, tensor: LogicalTensor, axes: Mapping[str, Axis]) -> list[tuple[int, int]]:
    """The segments in a part and the elements of each, in the order in which they lie."""
    dim = tensor.cut.dim
    assert dim is not None
    low, high = part.box[dim]
    each = volume((*part.box[:dim], *part.box[dim + 1 :]))
    repeats = axes[tensor.cut.interleave].count if tensor.cut.interleave else 1
    sizes = [axes[name].count * axes[name].unit // repeats for name in tensor.cut.segments]
    found, start = [], 0
    for _ in range(repeats):
        for index, size in enumerate(sizes):
            overlap = min(high, start + size) - max(low, start)
            if overlap > 0:
                found.append((index, overlap * each))
            start += size
    return found


def _few(slices: Sequence[Slice]) -> list[Slice]:
    """Neighbours that are alike as one; of very many slices the sums."""
    alike = groupby(slices, key=itemgetter(0, 1, 3))
    joined = [(kind, index, sum(size for *_, size, _ in same), count) for (kind, index, count), same in alike]
    if len(joined) <= _MOST_SLICES:
        return joined
    sums: Counter[tuple[str, int, int]] = Counter()
    for kind, index, size, count in joined:
        sums[kind, index, count] += size
    return [(kind, index, size, count) for (kind, index, count), size in sums.items()]
