"""What all formats share: options, the planned split, the manifest, and the interface of a format.

`tpshard.json` follows from headers and options alone, so every host of a cluster writes the same one.
docs/reference/manifest.md documents it; what is written today stays readable in later versions.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tpshard import __version__
from tpshard.box import Box, volume
from tpshard.layout import Layout, Mesh, Part, StoredTensor, equal_shares
from tpshard.model import Model
from tpshard.planning import OutputFile, assert_coverage, output_file, parts_by_size

if TYPE_CHECKING:
    from fractions import Fraction
    from pathlib import Path

FORMAT_VERSION = 1
DEFAULT_MAX_FILE_SIZE = 50_000_000_000


@dataclass(frozen=True)
class Options:
    """What a split is asked for beside the model. shares: weights as the user wrote them, or None.

    engine_version: whose names the files have, where a format's names changed between versions of its engine.
    """

    tp: int
    uneven: bool = False
    shares: tuple[str, ...] | None = None
    pad_vocab_to: int | None = None
    max_file_size: int = DEFAULT_MAX_FILE_SIZE
    format: str = "native"
    engine_version: str | None = None

    def weights(self) -> tuple[Fraction | int, ...] | None:
        """The ranks' relative shares, None for even ones."""
        if self.shares is not None:
            return tuple(weight(share) for share in self.shares)
        return equal_shares(self.tp) if self.uneven else None


@dataclass(frozen=True)
class Laid:
    """What a format makes of a model: each rank's stored tensors, and the logical ones that it has no room for.

    dropped: name → reason, as the plan says it.
    """

    layout: Layout
    dropped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """A planned split: layout and manifest; the rank files follow from them."""

    model: Model
    options: Options
    laid: Laid
    set_id: str
    manifest: bytes

    @property
    def layout(self) -> Layout:
        """Every rank's stored tensors."""
        return self.laid.layout

    @property
    def kept(self) -> Model:
        """The model without what the format drops."""
        return self.model.without(self.laid.dropped)

    def metadata(self, rank: int, part: int, parts: int) -> dict[str, str]:
        """What a safetensors file of the set says of itself."""
        return {
            "format": "pt",
            "tpshard.format_version": str(FORMAT_VERSION),
            "tpshard.set": self.set_id,
            "tpshard.rank": str(rank),
            "tpshard.tp": str(self.options.tp),
            "tpshard.part": str(part),
            "tpshard.parts": str(parts),
        }


class Format(ABC):
    """An on-disk format: what each rank stores, and in which files.

    side_names: small files that the source does not have.
    """

    side_names: frozenset[str] = frozenset()

    @abstractmethod
    def lay(self, model: Model, options: Options) -> Laid:
        """The ranks' stored tensors. UnsupportedError for a model or options that the format cannot hold."""

    @abstractmethod
    def file_name(self, rank: int, tp: int, part: int, parts: int) -> str:
        """The name of a rank's file."""

    @abstractmethod
    def parse_name(self, name: str) -> Mapping[str, int] | None:
        """What a file's name says of `rank`, `tp`, `part` and `parts`; None when it is no rank file of this format."""

    def metadata(self, split: Split, tensors: Sequence[StoredTensor]) -> dict[str, str]:
        """What a file's safetensors metadata says beside what says every file's."""
        return {}

    def files(self, split: Split, rank: int) -> tuple[OutputFile, ...]:
        """The files of one rank."""
        parts = parts_by_size(split.layout[rank], split.options.max_file_size)
        return tuple(
            output_file(
                self.file_name(rank, split.options.tp, index, len(parts)),
                tensors,
                {**split.metadata(rank, index, len(parts)), **self.metadata(split, tensors)},
            )
            for index, tensors in enumerate(parts)
        )

    def side_files(self, split: Split, small: Mapping[str, bytes]) -> dict[str, bytes]:
        """The small files beside the ranks': the source's, and what the engine wants of its own."""
        return {**small, **self.derived(split)}

    def derived(self, split: Split) -> dict[str, bytes]:
        """Those of the side files that follow from the split alone: who opens a set compares every byte of them."""
        return {}

    def verify_file(self, split: Split, rank: int, path: Path) -> OutputFile | None:
        """How a file that is no safetensors file lies on disk; CorruptError when it is not what it should be."""
        return None


def plan_split(model: Model, options: Options) -> Split:
    """Plan a tensor-parallel split of a model. UnsupportedError when a unit would be cut."""
    from tpshard.formats import format_of

    laid = format_of(options.format).lay(model, options)
    assert_coverage([tensor for tensor in model.tensors if tensor.name not in laid.dropped], laid.layout)
    body = _manifest(model, options, laid)
    set_id = hashlib.sha256(_object(body)).hexdigest()[:32]
    head = {"format": "tpshard", "format_version": FORMAT_VERSION, "set": set_id, "tool": f"tpshard {__version__}"}
    return Split(model, options, laid, set_id, _object(_lines(head) + body))


def rank_stem(rank: int, tp: int) -> str:
    """`rank-00000-of-00004`, the beginning of the names of a rank's record and lock in every format."""
    return f"rank-{rank:05}-of-{tp:05}"


def record(split: Split, rank: int, files: Sequence[OutputFile], sha256: Mapping[str, str | None]) -> bytes:
    """`rank-….json`: the size and sha256 of each file of a rank; written when they are complete."""
    parts = [{"file": f.name, "size": f.size, "sha256": sha256[f.name]} for f in files]
    return dump({"set": split.set_id, "rank": rank, "tp": split.options.tp, "parts": parts})


def _manifest(model: Model, options: Options, laid: Laid) -> list[str]:
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


def weight(share: str) -> Fraction:
    """A rank's share as the user writes it, exactly; ValueError or ZeroDivisionError when it is no number."""
    from fractions import Fraction  # and decimal with it: only for those who give shares

    return Fraction(share)


def share_texts(shares: Sequence[str]) -> tuple[str, ...]:
    """Shares in their shortest exact form, so that `0.50` and `0.5` are one option."""
    return tuple(str(weight(share)) for share in shares)
