"""What a verb is asked for: a frozen object each, which the Python functions and the commands make alike.

An object is checked when it is made: UsageError, or UnsupportedError for a dtype that nothing is cast to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tpshard.errors import UsageError
from tpshard.execute.publish import Settings
from tpshard.formats import DEFAULT_FORMAT, format_of
from tpshard.formats import FORMATS as FORMATS
from tpshard.formats.split import DEFAULT_MAX_FILE_SIZE, Options, share_texts, weight
from tpshard.planning.model import DTYPE_ALIASES, check_dtype
from tpshard.verifier.options import TIERS as TIERS

if TYPE_CHECKING:
    from tpshard.report.capacity import Workload


@dataclass(frozen=True)
class ModelOptions:
    """An unsharded model and how it is read. path: a directory, a .safetensors file, or a Hub repo at `revision`.

    rules: a built-in architecture by name, or an architecture file; None is the built-in rules of the model_type.
    dtype: what floating-point weights are cast to; None leaves them as they are. allow_pickle: read pickled weights
    where there are no others. follow_symlinks: read files that are symlinks out of the model's directory. cast_all:
    cast what is float32 on purpose as well. allow_overflow: write infinity for values that the dtype has no number for.
    """

    path: str | Path
    revision: str | None = None
    rules: str | Path | None = None
    dtype: str | None = None
    allow_pickle: bool = False
    follow_symlinks: bool = False
    cast_all: bool = False
    allow_overflow: bool = False

    def __post_init__(self) -> None:
        if self.dtype in DTYPE_ALIASES:
            object.__setattr__(self, "dtype", DTYPE_ALIASES[self.dtype])
        check_dtype(self.dtype)
        if self.dtype is None and (self.cast_all or self.allow_overflow):
            what = "--cast-all and --allow-overflow are for casts"
            raise UsageError(what, expected="--dtype beside them", hint="add --dtype, or leave them out")

    @property
    def reading(self) -> dict[str, bool]:
        """What may be read, as the functions of `inputs.checkpoint` take it."""
        return {"allow_pickle": self.allow_pickle, "follow_symlinks": self.follow_symlinks}


@dataclass(frozen=True)
class TargetOptions:
    """The layout that is asked for; `layout` is the same as the formats take it, with every default filled in.

    uneven: deal units that do not divide. shares: a weight for each rank. pad_vocab_to: the vocab's size after padding.
    max_file_size: in bytes; None is 50 GB, or files as in the source where there are no ranks. engine_version: whose
    names the files have. pp: pipeline stages, of `tp` ranks each. pp_layers: how many layers each stage has.
    ep: among how many whole experts are dealt.
    """

    tp: int
    uneven: bool = False
    shares: Sequence[str | float] | None = None
    pad_vocab_to: int | None = None
    max_file_size: int | None = None
    format: str = "native"
    engine_version: str | None = None
    pp: int = 1
    pp_layers: Sequence[int] | None = None
    ep: int = 1
    layout: Options = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.ep) < 1:
            found = f"tp {self.tp}, pp {self.pp}, ep {self.ep}"
            raise UsageError("tp, pp and ep must be at least 1", found=found)
        if self.tp % self.ep:
            what, found = f"ep {self.ep} does not divide tp {self.tp}", f"ep {self.ep}"
            raise UsageError(what, expected=f"ep 1 or {self.tp}", found=found, hint=f"use --ep {self.tp}")
        sizes = None if self.pp_layers is None else tuple(self.pp_layers)
        if sizes is not None and (len(sizes) != self.pp or min(sizes) < 1):
            what, found = "--pp-layers takes one number for each stage", ", ".join(map(str, sizes))
            raise UsageError(what, expected=f"{self.pp} numbers from 1", found=found, hint="give --pp beside it")
        shares = None if self.shares is None else _weights(self.shares, self.tp)
        size = DEFAULT_MAX_FILE_SIZE if self.max_file_size is None else self.max_file_size
        if size < 1:
            raise UsageError("--max-file-size must be positive", found=size)
        named = self.format, self.engine_version
        layout = Options(self.tp, self.uneven, shares, self.pad_vocab_to, size, *named, self.pp, sizes, self.ep)
        object.__setattr__(self, "layout", layout)


def _weights(shares: Sequence[str | float], tp: int) -> tuple[str, ...]:
    """A positive weight for each rank, in its shortest form."""
    try:
        texts = share_texts([str(share) for share in shares])
    except (ValueError, ZeroDivisionError):
        raise UsageError("--shares takes numbers, as in 0.5,0.3,0.2", found=",".join(map(str, shares))) from None
    if len(texts) != tp or any(weight(text) <= 0 for text in texts):
        message = "--shares takes one positive number for each rank"
        raise UsageError(message, expected=f"{tp} numbers", found=", ".join(texts))
    return texts


@dataclass(frozen=True)
class PlanOptions:
    """A plan. workload: what memory and communication are computed for; None is one sequence of 4096 tokens."""

    model: ModelOptions
    target: TargetOptions
    workload: Workload | None = None


@dataclass(frozen=True, kw_only=True)
class _RankOptions:
    """Which ranks are written, where and how. out: None is MODEL-tpN in the current directory.

    ranks: write only these, into a directory that other hosts write the other ranks into. chosen: the same, sorted.
    """

    target: TargetOptions
    out: str | Path | None = None
    ranks: Iterable[int] | None = None
    settings: Settings = field(default_factory=Settings)
    chosen: list[int] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        chosen, size = None if self.ranks is None else sorted(set(self.ranks)), self.target.layout.mesh.size
        if chosen is not None and not format_of(self.target.format).has_ranks:
            found = f"--format {self.target.format}"
            raise UsageError("--ranks needs a format with ranks", found=found, hint="leave --ranks out")
        if chosen is not None and (not chosen or chosen[0] < 0 or chosen[-1] >= size):
            found = ", ".join(map(str, chosen))
            raise UsageError("--ranks takes ranks of the set", expected=f"0 to {size - 1}", found=found)
        object.__setattr__(self, "chosen", chosen)


@dataclass(frozen=True, kw_only=True)
class SplitOptions(_RankOptions):
    """A split of an unsharded model."""

    model: ModelOptions


@dataclass(frozen=True, kw_only=True)
class ReshardOptions(_RankOptions):
    """A split of a shard set, for another tp or in another format. allow_pickle: read Meta's own files."""

    shards: str | Path
    allow_pickle: bool = False


@dataclass(frozen=True)
class MergeOptions:
    """A merge. out: None is MODEL-merged in the current directory. max_file_size: None is files as in the source.

    vocab_size: the true size of a vocabulary that Megatron has padded.
    """

    shards: str | Path
    out: str | Path | None = None
    max_file_size: int | None = None
    allow_pickle: bool = False
    vocab_size: int | None = None
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class CheckOptions:
    """A check. source: compare with this model; None is recorded checksums. tp: what the set must have.

    revision, rules, allow_pickle, follow_symlinks: of the source. settings: threads, and what follows the progress.
    """

    shards: str | Path
    source: str | Path | None = None
    tp: int | None = None
    revision: str | None = None
    rules: str | Path | None = None
    allow_pickle: bool = False
    settings: Settings = field(default_factory=Settings)
    follow_symlinks: bool = False


@dataclass(frozen=True)
class AdviseOptions:
    """Advice about a model on `gpus` devices, in `nodes` of as many each.

    workload: what they are to do, with the memory of one. format: whose ranks are judged, as `--format` takes it.
    """

    model: ModelOptions
    gpus: int
    workload: Workload
    nodes: int = 1
    format: str = DEFAULT_FORMAT

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.workload.gpu_memory is None:
            expected = "at least one device, and its memory"
            raise UsageError("advice needs devices", expected=expected, hint="Workload(gpu_memory=80 * 10**9)")
        if self.nodes < 1 or self.gpus % self.nodes:
            what = f"{self.gpus} devices are not as many on each of {self.nodes} nodes"
            raise UsageError(what, expected="a number of nodes that divides the devices", found=f"nodes {self.nodes}")
        if reason := format_of(self.format).no_advice:
            what = f"nothing is advised about --format {self.format}: {reason}"
            hint = "leave --format out, or name the engine's: vllm, sglang, meta, deepseek"
            raise UsageError(what, expected="a format with a file for each rank", found=self.format, hint=hint)
