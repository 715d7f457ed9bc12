"""What all formats share: options, the planned split, and the interface of a format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from tpshard.planning.box import corner
from tpshard.errors import UnsupportedError, UsageError
from tpshard.formats.manifest import FORMAT_VERSION, compact, dump, integers, manifest_of
from tpshard.planning.layout import Deal, Layout, StoredTensor, deal, equal_shares, listing, possible_tp, why_not
from tpshard.planning.model import Model
from tpshard.planning.join import OutputFile, assert_coverage, output_file, parts_by_size, uncollected
from tpshard.rules.classify import Axis

if TYPE_CHECKING:
    from fractions import Fraction

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

    def even_deal(self, who: str, axes: Mapping[str, Axis]) -> Deal:
        """Equal ranges of all axes, for an engine (`who`) that takes nothing else.

        UsageError when something else is asked for, UnsupportedError when an axis does not divide.
        """
        if self.uneven or self.shares is not None or self.pad_vocab_to is not None:
            raise UsageError(
                f"{who} takes even shares only, and no padding but its own",
                found="--uneven, --shares or --pad-vocab-to",
                hint="leave them out, or use --format native",
            )
        for axis in axes.values():
            if reason := why_not(axis, self.tp):
                raise UnsupportedError(
                    reason,
                    expected="tp " + listing(possible_tp(axes)),
                    found=f"tp {self.tp}",
                    hint=f"{who} takes even shares only: use one of those",
                )
        return deal(axes, self.tp, None, None)


@dataclass(frozen=True)
class Laid:
    """What a format makes of a model: each rank's stored tensors, and the logical ones that it has no room for.

    dropped: name → reason, as the plan says it.
    """

    layout: Layout
    dropped: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def is_rectangles(self) -> bool:
        """Whether each stored tensor is one box of a logical one, and nothing else."""
        return all(len(stored.parts) == 1 and not stored.fills for rank in self.layout for stored in rank)


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

    @uncollected
    def files(self, rank: int) -> tuple[OutputFile, ...]:
        """The files of one rank, made once."""
        if rank not in self._files:
            self._files[rank] = self.format.files(self, rank)
        return self._files[rank]

    @cached_property
    def _files(self) -> dict[int, tuple[OutputFile, ...]]:
        return {}

    @property
    def format(self) -> Format:
        """The format that the set is written in."""
        from tpshard.formats import format_of

        return format_of(self.options.format)

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

    side_names: small files that the source does not have. container: the files are no safetensors files, and all bytes
    of them but the tensors' follow from the split.
    """

    side_names: frozenset[str] = frozenset()
    container: bool = False

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
        """The files of one rank. To be called through the split, which remembers them."""
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


@uncollected
def plan_split(model: Model, options: Options) -> Split:
    """Plan a tensor-parallel split of a model. UnsupportedError when a unit would be cut."""
    from tpshard.formats import format_of

    laid = format_of(options.format).lay(model, options)
    assert_coverage([tensor for tensor in model.tensors if tensor.name not in laid.dropped], laid.layout)
    return Split(model, options, laid, *manifest_of(model, options, laid))


def rank_stem(rank: int, tp: int) -> str:
    """`rank-00000-of-00004`, the beginning of the names of a rank's record and lock in every format."""
    return f"rank-{rank:05}-of-{tp:05}"


def record(split: Split, rank: int, files: Sequence[OutputFile], sha256: Mapping[str, str | None]) -> bytes:
    """`rank-….json`: the size and sha256 of each file of a rank; written when they are complete."""
    parts = [{"file": f.name, "size": f.size, "sha256": sha256[f.name]} for f in files]
    return dump({"set": split.set_id, "rank": rank, "tp": split.options.tp, "parts": parts})


def weight(share: str) -> Fraction:
    """A rank's share as the user writes it, exactly; ValueError or ZeroDivisionError when it is no number."""
    from fractions import Fraction  # and decimal with it: only for those who give shares

    return Fraction(share)


def share_texts(shares: Sequence[str]) -> tuple[str, ...]:
    """Shares in their shortest exact form, so that `0.50` and `0.5` are one option."""
    return tuple(str(weight(share)) for share in shares)


def bare(axis: Axis) -> Axis:
    """An axis for an engine that neither pads nor repeats it."""
    return replace(axis, pad=False, replicate=False, group=None)


def saved_offsets(tensors: Sequence[StoredTensor]) -> dict[str, str]:
    """torch's description of the rectangles that a safetensors file holds; its reader wants it of every tensor."""
    info = (f'{compact(each.name)}:{{"saved_offsets":{integers(corner(each.parts[0].box))}}}' for each in tensors)
    return {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": f"{{{','.join(info)}}}"}
