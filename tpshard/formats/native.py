"""tpshard's own format: one safetensors file per rank under the source's tensor names, and a manifest.

`tpshard.json` follows from headers and options alone, so every host of a cluster writes the same one.
docs/reference/manifest.md documents it; what is written today stays readable in later versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tpshard import __version__
from tpshard.box import volume
from tpshard.layout import Deal, Layout, Mesh, StoredTensor, deal, equal_shares, shard
from tpshard.model import Model
from tpshard.planning import OutputFile, assert_coverage, output_file, parts_by_size

if TYPE_CHECKING:
    from fractions import Fraction

FORMAT_VERSION = 1
DEFAULT_MAX_FILE_SIZE = 50_000_000_000


@dataclass(frozen=True)
class Options:
    """What a split is asked for beside the model. shares: weights as the user wrote them, or None."""

    tp: int
    uneven: bool = False
    shares: tuple[str, ...] | None = None
    pad_vocab_to: int | None = None
    max_file_size: int = DEFAULT_MAX_FILE_SIZE

    def weights(self) -> tuple[Fraction | int, ...] | None:
        """The ranks' relative shares, None for even ones."""
        if self.shares is not None:
            return tuple(weight(share) for share in self.shares)
        return equal_shares(self.tp) if self.uneven else None


@dataclass(frozen=True)
class Split:
    """A planned split: layout, deal and manifest; the rank files follow from them."""

    model: Model
    options: Options
    ranges: Deal
    layout: Layout
    set_id: str
    manifest: bytes

    def outputs(self, rank: int) -> tuple[OutputFile, ...]:
        """The files of one rank."""
        parts = parts_by_size(self.layout[rank], self.options.max_file_size)
        dcp = _is_rectangles(self.layout)
        files = []
        for index, tensors in enumerate(parts):
            metadata = {
                "format": "pt",
                "tpshard.format_version": str(FORMAT_VERSION),
                "tpshard.set": self.set_id,
                "tpshard.rank": str(rank),
                "tpshard.tp": str(self.options.tp),
                "tpshard.part": str(index),
                "tpshard.parts": str(len(parts)),
            }
            if dcp:
                info = {t.name: {"saved_offsets": [start for start, _ in t.parts[0].box]} for t in tensors}
                metadata["DCP_VERSION"] = "1.0"
                metadata["DCP_SHARDING_INFO"] = json.dumps(info, separators=(",", ":"))
            files.append(output_file(rank_file(rank, self.options.tp, index, len(parts)), tensors, metadata))
        return tuple(files)


def rank_stem(rank: int, tp: int) -> str:
    """`rank-00000-of-00004`, the beginning of the names of a rank's files."""
    return f"rank-{rank:05}-of-{tp:05}"


def rank_file(rank: int, tp: int, part: int, parts: int) -> str:
    """The name of a rank's file; numbered parts only where there are several."""
    middle = f"-part-{part:05}-of-{parts:05}" if parts > 1 else ""
    return f"{rank_stem(rank, tp)}{middle}.safetensors"


def plan_split(model: Model, options: Options) -> Split:
    """Plan a tensor-parallel split of a model. UnsupportedError when a unit would be cut."""
    ranges = deal(model.axes, options.tp, options.weights(), options.pad_vocab_to)
    layout = shard(model.tensors, model.axes, options.tp, ranges)
    assert_coverage(model.tensors, layout)
    body = _manifest(model, options, layout)
    set_id = hashlib.sha256(_dump(body)).hexdigest()[:32]
    head = {"format": "tpshard", "format_version": FORMAT_VERSION, "set": set_id, "tool": f"tpshard {__version__}"}
    return Split(model, options, ranges, layout, set_id, _dump({**head, **body}))


def record(split: Split, rank: int, files: Sequence[OutputFile], sha256: Mapping[str, str | None]) -> bytes:
    """`rank-….json`: the size and sha256 of each file of a rank; written when they are complete."""
    parts = [{"file": f.name, "size": f.size, "sha256": sha256[f.name]} for f in files]
    return _dump({"set": split.set_id, "rank": rank, "tp": split.options.tp, "parts": parts})


def _is_rectangles(layout: Layout) -> bool:
    """Whether torch's reader can be told every tensor as one rectangle: all or nothing, or it fails."""
    return all(len(stored.parts) == 1 and not stored.fills for rank in layout for stored in rank)


def _manifest(model: Model, options: Options, layout: Layout) -> dict[str, Any]:
    tensors = []
    for index, tensor in enumerate(model.tensors):
        entry: dict[str, Any] = {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "file": model.file_of[tensor.name],
            "rule": tensor.cut.kind,
        }
        if tensor.cut.dim is not None:
            entry["dim"] = tensor.cut.dim
            entry["segments"] = list(tensor.cut.segments)
            if tensor.cut.interleave:
                entry["interleave"] = tensor.cut.interleave
            entry["ranks"] = [_stored_json(rank[index]) for rank in layout]
        tensors.append(entry)
    return {
        "mesh": asdict(Mesh(options.tp)),
        "source": dict(model.source),
        "architecture": dict(model.architecture),
        "options": {
            "dtype": model.dtype,
            "uneven": options.uneven,
            "shares": None if options.shares is None else list(options.shares),
            "pad_vocab_to": options.pad_vocab_to,
            "max_file_size": options.max_file_size,
        },
        "axes": {name: asdict(axis) for name, axis in sorted(model.axes.items())},
        "tied": dict(model.tied),
        "tensors": tensors,
    }


def _stored_json(stored: StoredTensor) -> dict[str, Any]:
    parts = [{"box": [list(side) for side in part.box], "at": list(part.at)} for part in stored.parts]
    entry: dict[str, Any] = {"shape": list(stored.shape), "parts": parts}
    if any(volume(box) for box in stored.fills):
        entry["padding"] = [[list(side) for side in box] for box in stored.fills]
    return entry


def _dump(data: Mapping[str, Any]) -> bytes:
    """JSON with one tensor a line: small, and readable in a diff."""
    lines = []
    for key, value in data.items():
        if key == "tensors":
            rows = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in value)
            lines.append(f' "tensors": [\n  {rows}\n ]')
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def weight(share: str) -> Fraction:
    """A rank's share as the user writes it, exactly; ValueError or ZeroDivisionError when it is no number."""
    from fractions import Fraction  # and decimal with it: only for those who give shares

    return Fraction(share)


def share_texts(shares: Sequence[str]) -> tuple[str, ...]:
    """Shares in their shortest exact form, so that `0.50` and `0.5` are one option."""
    return tuple(str(weight(share)) for share in shares)
