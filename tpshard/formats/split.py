"""What is asked for beside the model, what a format makes of it, and the planned split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from tpshard.errors import UsageError
from tpshard.formats.manifest import FORMAT_VERSION, manifest_of, set_name
from tpshard.planning.axes import Axis
from tpshard.planning.deal import Deal, deal, require_even
from tpshard.planning.join import OutputFile, uncollected
from tpshard.planning.layout import Layout, LayoutRows, rows_of
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.planning.placement import Placement
from tpshard.planning.stages import Stages
from tpshard.storage.names import rank_stem, record_name

if TYPE_CHECKING:
    from fractions import Fraction

    from tpshard.formats.base import Format


DEFAULT_MAX_FILE_SIZE = 50_000_000_000


@dataclass(frozen=True)
class Options:
    """What a split is asked for beside the model. shares: weights as the user wrote them, or None.

    engine_version: whose names the files have, where a format's names changed between versions of its engine. pp: the
    stages of the pipeline. pp_layers: how many layers each of them has, None for as many as `even_layers` gives it.
    ep: among how many groups of the tp ranks whole experts are dealt; 1 where they are cut like the rest.
    """

    tp: int
    uneven: bool = False
    shares: tuple[str, ...] | None = None
    pad_vocab_to: int | None = None
    max_file_size: int = DEFAULT_MAX_FILE_SIZE
    format: str = "native"
    engine_version: str | None = None
    pp: int = 1
    pp_layers: tuple[int, ...] | None = None
    ep: int = 1

    @property
    def mesh(self) -> Mesh:
        """The ranks."""
        return Mesh(self.tp, self.pp, self.ep)

    def weights(self) -> tuple[Fraction | int, ...] | None:
        """The ranks' relative shares, None for even ones."""
        if self.shares is not None:
            return tuple(weight(share) for share in self.shares)
        return (1,) * self.tp if self.uneven else None

    def even_deal(self, who: str, axes: Mapping[str, Axis], ep: int = 1) -> Deal:
        """Equal ranges of all axes, for an engine (`who`) that takes nothing else.

        UsageError when something else is asked for, UnsupportedError when an axis does not divide.
        """
        if self.uneven or self.shares is not None or self.pad_vocab_to is not None:
            what = f"{who} takes even shares only, and no padding but its own"
            hint = "leave them out, or use --format native"
            raise UsageError(what, found="--uneven, --shares or --pad-vocab-to", hint=hint)
        mesh = Mesh(self.tp, ep=ep)  # of one stage: each deals alike
        require_even(axes, mesh, f"{who} takes even shares only: use one of those")
        return deal(axes, mesh)


@dataclass(frozen=True)
class RankLayouts:
    """What a format makes of a model: each rank's stored tensors, and the logical ones that it has no room for.

    deal: which units the ranks have, None of a set that was read. dropped: name → reason, as the plan says it.
    placement: which ranks have which tensors, None where each rank has a share of all.
    """

    layout: Layout
    deal: Deal | None
    dropped: Mapping[str, str] = field(default_factory=dict)
    placement: Placement | None = None

    @property
    def stages(self) -> Stages | None:
        """The stages of a pipeline, None where there is one."""
        return self.placement.stages if self.placement else None

    @cached_property
    def rows(self) -> LayoutRows:
        """The layout by stored tensors, for whoever can do things once for all that are alike."""
        return rows_of(self.layout)

    @cached_property
    def is_rectangles(self) -> bool:
        """Whether each stored tensor is one box of a logical one, and nothing else."""
        shares = (share for kind in self.rows.kinds for share in kind.shares if share is not None)
        return all(len(share.stored.parts) == 1 and not share.stored.fills for share in shares)


@dataclass(frozen=True)
class Split:
    """A planned split: the layout; manifest and rank files follow from it, and are made when they are asked for.

    recorded: the manifest of a set that was read.
    """

    model: Model
    options: Options
    format: Format
    layouts: RankLayouts
    recorded: tuple[str, bytes] | None = None

    @cached_property
    def set_id(self) -> str:
        """The name of the set."""
        return self.recorded[0] if self.recorded else set_name(self)

    @cached_property
    def manifest(self) -> bytes:
        """The manifest, as it is written."""
        return self.recorded[1] if self.recorded else manifest_of(self)

    @property
    def layout(self) -> Layout:
        """Every rank's stored tensors."""
        return self.layouts.layout

    def rank_stem(self, rank: int) -> str:
        """How the names of a rank's record and lock begin."""
        return rank_stem(rank, self.options.tp, self.options.pp)

    def record_name(self, rank: int) -> str:
        """The name of a rank's record."""
        return record_name(rank, self.options.tp, self.options.pp)

    @property
    def kept(self) -> Model:
        """The model without what the format drops."""
        return self.model.without(self.layouts.dropped)

    @uncollected
    def files(self, rank: int) -> tuple[OutputFile, ...]:
        """The files of one rank, made once."""
        if rank not in self._files:
            self._files[rank] = self.format.files(self, rank)
        return self._files[rank]

    @cached_property
    def _files(self) -> dict[int, tuple[OutputFile, ...]]:
        return {}

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


def weight(share: str) -> Fraction:
    """A rank's share as the user writes it, exactly; ValueError or ZeroDivisionError when it is no number."""
    from fractions import Fraction  # and decimal with it: only for those who give shares

    return Fraction(share)


def share_texts(shares: Sequence[str]) -> tuple[str, ...]:
    """Shares in their shortest exact form, so that `0.50` and `0.5` are one option."""
    return tuple(str(weight(share)) for share in shares)
