"""The verbs that plan and write: plan, split, merge, reshard. The command line only calls these.

What only some verbs need is imported inside them: a split of 2 GB takes less than a second, and imports count.

Every function raises the errors of `tpshard.errors`; results are frozen dataclasses with `to_json()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from tpshard.api.beside import cast_files, small_files
from tpshard.api.options import MergeOptions, ModelOptions, PlanOptions, ReshardOptions, SplitOptions, TargetOptions
from tpshard.api.progress import followed
from tpshard.errors import UsageError
from tpshard.execute.publish import Job, Settings, publish
from tpshard.execute.run import Convert, conversion
from tpshard.execute.target import check_room, is_written
from tpshard.formats import DEFAULT_FORMAT, format_of, hf, writes
from tpshard.formats.plan import plan_split, record
from tpshard.formats.split import Options, Split
from tpshard.inputs.checkpoint import open_checkpoint, open_headers
from tpshard.inputs.model import from_checkpoint, placed_in
from tpshard.inputs.open import open_set
from tpshard.inputs.shard_set import is_shard_set
from tpshard.planning.join import OutputFile, Placed, join, uncollected
from tpshard.planning.model import Model
from tpshard.report.results import PlanReport, RankPart, WriteReport
from tpshard.storage.local import Content, load_json, read_bytes
from tpshard.storage.names import LOCK, MANIFEST

if TYPE_CHECKING:
    from tpshard.report.capacity import Workload


def plan(
    model: str | Path,
    tp: int,
    *,
    revision: str | None = None,
    rules: str | Path | None = None,
    dtype: str | None = None,
    uneven: bool = False,
    shares: Sequence[str | float] | None = None,
    pad_vocab_to: int | None = None,
    max_file_size: int | None = None,
    format: str = "native",
    engine_version: str | None = None,
    pp: int = 1,
    pp_layers: Sequence[int] | None = None,
    ep: int = 1,
    allow_pickle: bool = False,
    follow_symlinks: bool = False,
    workload: Workload | None = None,
    cast_all: bool = False,
) -> PlanReport:
    """Plan a split and write nothing. Of a Hub repo only config and headers are read.

    model: a directory, a .safetensors file, or a Hub repo (`org/name`, at `revision`). rules: a built-in architecture
    by name, or an architecture file.
    dtype: what floating-point weights are cast to, as `bfloat16`; None leaves them as they are. cast_all: those as well
    that are float32 on purpose. uneven: deal units that do not divide. shares: a weight for each rank, as `["0.5",
    "0.3", "0.2"]`. pad_vocab_to: the vocab's size after padding; None is the next multiple of tp. max_file_size: bytes
    (default: 50 GB). format: as `--format` takes it. pp: pipeline stages, of `tp` ranks each. pp_layers: how many
    layers each stage has (default: as many, and of the rest one each from the last but one back). ep: among how
    many groups of the tp ranks whole experts are dealt; the ranks of a group cut each of theirs.
    workload: what memory and communication are reckoned for (default: one sequence of 4096 tokens).
    UnsupportedError for a model without rules or a tp that would cut a unit, CorruptError for a damaged checkpoint.
    """
    source = ModelOptions(model, revision, rules, dtype, allow_pickle, follow_symlinks, cast_all)
    target = TargetOptions(tp, uneven, shares, pad_vocab_to, max_file_size, format, engine_version, pp, pp_layers, ep)
    return plan_with(PlanOptions(source, target, workload))


@uncollected
def plan_with(options: PlanOptions) -> PlanReport:
    """The plan that the options ask for."""
    model = options.model
    checkpoint = open_headers(model.path, model.revision, **model.reading)
    built = from_checkpoint(checkpoint, model.rules, model.dtype, cast_all=model.cast_all)
    warnings = (*checkpoint.warnings, *built.notes)
    planned = plan_split(built, options.target.layout)
    warnings += planned.format.notes(planned)
    return PlanReport(planned, warnings, options.workload, checkpoint.left_out)


def split(
    model: str | Path,
    tp: int,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    rules: str | Path | None = None,
    dtype: str | None = None,
    uneven: bool = False,
    shares: Sequence[str | float] | None = None,
    pad_vocab_to: int | None = None,
    max_file_size: int | None = None,
    format: str = "native",
    engine_version: str | None = None,
    pp: int = 1,
    pp_layers: Sequence[int] | None = None,
    ep: int = 1,
    allow_pickle: bool = False,
    follow_symlinks: bool = False,
    ranks: Iterable[int] | None = None,
    settings: Settings | None = None,
    progress: bool = False,
    cast_all: bool = False,
    allow_overflow: bool = False,
) -> WriteReport:
    """Split a checkpoint for `tp * pp` ranks into `out` (default: MODEL-tpN in the current directory).

    The model's options are those of `plan`. ranks: write only these, into a directory that other hosts write the other
    ranks into. progress: show a bar. allow_overflow: write infinity where a value is beyond `dtype`, which is otherwise
    an UnsupportedError. TargetError when `out` exists and `settings` do not say `overwrite`; after an
    error or a kill the same call resumes.
    """
    source = ModelOptions(model, revision, rules, dtype, allow_pickle, follow_symlinks, cast_all, allow_overflow)
    target = TargetOptions(tp, uneven, shares, pad_vocab_to, max_file_size, format, engine_version, pp, pp_layers, ep)
    with followed("split", settings, progress) as how:
        return split_with(SplitOptions(model=source, target=target, out=out, ranks=ranks, settings=how))


def split_with(options: SplitOptions) -> WriteReport:
    """Split as the options ask for it."""
    model, layout = options.model, options.target.layout
    checkpoint = open_checkpoint(model.path, model.revision, **model.reading)
    built = from_checkpoint(checkpoint, model.rules, model.dtype, cast_all=model.cast_all)
    target = _target(options.out, built, _suffix(layout))
    _check_distinct(checkpoint.directory, target)
    planned = plan_split(built, layout)
    _check_room("split", planned, target, options)
    small = cast_files(checkpoint, model.dtype)
    placed, size = placed_in(checkpoint, built), layout.max_file_size
    warnings = (*checkpoint.warnings, *built.notes)
    refuse = not model.allow_overflow
    report = _write_split("split", planned, placed, small, target, options, size, warnings, refuse=refuse)
    return replace(report, left_out=checkpoint.left_out)


def reshard(
    shards: str | Path,
    tp: int,
    out: str | Path | None = None,
    *,
    uneven: bool = False,
    shares: Sequence[str | float] | None = None,
    pad_vocab_to: int | None = None,
    max_file_size: int | None = None,
    format: str = "native",
    engine_version: str | None = None,
    pp: int = 1,
    pp_layers: Sequence[int] | None = None,
    ep: int = 1,
    allow_pickle: bool = False,
    ranks: Iterable[int] | None = None,
    settings: Settings | None = None,
    progress: bool = False,
) -> WriteReport:
    """Split a shard set anew for another tp or format, in one pass; the files equal those of a direct split.

    The options are those of `split`; allow_pickle: of Meta's own files. DifferentError when ranks that hold the same
    part disagree, CorruptError when ranks are missing.
    """
    target = TargetOptions(tp, uneven, shares, pad_vocab_to, max_file_size, format, engine_version, pp, pp_layers, ep)
    with followed("reshard", settings, progress) as how:
        return reshard_with(
            ReshardOptions(shards=shards, target=target, out=out, ranks=ranks, allow_pickle=allow_pickle, settings=how)
        )


def reshard_with(options: ReshardOptions) -> WriteReport:
    """Reshard as the options ask for it."""
    source = open_set(Path(options.shards), options.allow_pickle)
    source.require_complete()
    layout = options.target.layout
    target = _target(options.out, source.model, _suffix(layout))
    _check_distinct(source.directory, target)
    planned = plan_split(source.model, layout)
    _check_room("reshard", planned, target, options)
    size = options.target.max_file_size
    small, recorded = small_files(source), source.recorded
    notes = source.model.notes
    report = _write_split("reshard", planned, source.placed(), small, target, options, size, notes, recorded)
    return replace(report, left_out=source.left_out)


def merge(
    shards: str | Path,
    out: str | Path | None = None,
    *,
    max_file_size: int | None = None,
    allow_pickle: bool = False,
    vocab_size: int | None = None,
    settings: Settings | None = None,
    progress: bool = False,
) -> WriteReport:
    """Make an ordinary Hugging Face checkpoint of a shard set: the source's names, dtypes, shapes and bits.

    out: default MODEL-merged in the current directory. max_file_size: bytes (default: files as in the source).
    vocab_size: of a checkpoint of Megatron, whose vocabulary is padded; needed where no config.json lies beside it.
    DifferentError when ranks that hold the same part disagree, CorruptError when ranks are missing.
    """
    with followed("merge", settings, progress) as how:
        return merge_with(MergeOptions(shards, out, max_file_size, allow_pickle, vocab_size, how))


def merge_with(options: MergeOptions) -> WriteReport:
    """Merge as the options ask for it."""
    source = open_set(Path(options.shards), options.allow_pickle, options.vocab_size)
    source.require_complete()
    target = _target(options.out, source.model, "merged")
    _check_distinct(source.directory, target)
    settings = replace(options.settings, checksum=False)
    made_of, size, recorded = source.manifest["set"], options.max_file_size, source.recorded
    nbytes, _ = _write_whole(
        source.model, source.placed(), small_files(source), made_of, size, target, settings, recorded, sums=False
    )
    unread = is_shard_set(source.directory) and not recorded
    left_out, notes = source.left_out, source.model.notes
    return WriteReport(
        "merge", target, source.mesh, made_of, nbytes, (), notes, unread_checksums=unread, left_out=left_out
    )


def _write_split(
    verb: str,
    planned: Split,
    placed: Sequence[Placed],
    small: Mapping[str, Content],
    target: Path,
    options: SplitOptions | ReshardOptions,
    max_file_size: int | None,
    warnings: tuple[str, ...] = (),
    recorded: Mapping[str, str] = MappingProxyType({}),
    refuse: bool = True,
) -> WriteReport:
    """Write a planned split: all ranks, or those of the chosen ones that are not complete at `target`.

    max_file_size: of a format without ranks. refuse: values that a cast would make infinite.
    """
    mesh, chosen, set_id = planned.options.mesh, options.chosen, planned.set_id
    if not planned.format.has_ranks:
        how = options.settings
        nbytes, notes = _write_whole(
            planned.model, placed, small, set_id, max_file_size, target, how, recorded, refuse=refuse
        )
        return WriteReport(verb, target, mesh, set_id, nbytes, (), (*warnings, *notes))
    writing = list(range(mesh.size)) if chosen is None else [r for r in chosen if not _is_written(target, planned, r)]
    if chosen and not writing:
        return _complete(verb, planned, target, chosen)
    files = {rank: planned.files(rank) for rank in writing}

    def records(digests: Mapping[str, str | None]) -> dict[str, bytes]:
        return {planned.record_name(r): record(planned, r, files[r], digests) for r in writing}

    beside = {**planned.format.side_files(planned, small), MANIFEST: planned.manifest}
    parts = [(rank, file) for rank, held in files.items() for file in held]
    outputs = [file for _, file in parts]
    plan, identity = join(planned.kept.tensors, placed, outputs), {"set": set_id}
    claims = [f".{planned.rank_stem(rank)}.lock" for rank in writing] if chosen else [LOCK]
    convert = _convert(placed, outputs, refuse)
    job = Job(
        plan, beside, identity, records, convert, shared=bool(chosen), claims=claims, verb=verb, ours=writes,
        recorded=recorded,
    )  # fmt: skip
    digests = publish(job, target, options.settings)
    written = tuple(RankPart(rank, file.name, file.size, digests[file.name]) for rank, file in parts)
    notes = () if convert is None else convert.notes()
    return WriteReport(
        verb, target, mesh, set_id, plan.nbytes, written, (*warnings, *planned.format.notes(planned, target), *notes)
    )


def _check_room(verb: str, planned: Split, target: Path, options: SplitOptions | ReshardOptions) -> None:
    """Refuse what cannot be written, from sizes alone: the steps of a large model take a minute to plan."""
    ranks = range(planned.options.mesh.size) if options.chosen is None else options.chosen
    needed = sum(planned.layouts.rows.rank_bytes[rank] for rank in ranks)
    verb = verb if planned.format.has_ranks else "merge"
    how = options.settings
    check_room(how.files, target, needed, verb, shared=bool(options.chosen), overwrite=how.overwrite)


def _complete(verb: str, planned: Split, target: Path, ranks: Sequence[int]) -> WriteReport:
    """The report of ranks that an earlier run has completed, as when a job is queued again."""
    mesh, parts = planned.options.mesh, []
    for rank in ranks:
        path = target / planned.record_name(rank)
        for part in load_json(read_bytes(path), path)["parts"]:
            parts.append(RankPart(rank, part["file"], part["size"], part["sha256"]))
    there = f"nothing was written: rank {', '.join(map(str, ranks))} is already there and complete"
    return WriteReport(verb, target, mesh, planned.set_id, 0, tuple(parts), (there,))


def _write_whole(
    model: Model,
    placed: Sequence[Placed],
    small: Mapping[str, Content],
    set_id: str,
    max_file_size: int | None,
    target: Path,
    settings: Settings,
    recorded: Mapping[str, str],
    *,
    sums: bool = True,
    refuse: bool = True,
) -> tuple[int, Sequence[str]]:
    """Write an ordinary checkpoint of a model, with SHA256SUMS or without.

    Returns the bytes of its tensors, and what is to be said of casts.
    """
    files, index = hf.outputs(model.tensors, model.file_of, max_file_size)
    plan, convert = join(model.tensors, placed, files), _convert(placed, files, refuse)
    beside, identity = {**small, **index}, {"set": set_id}
    job = Job(plan, beside, identity, lambda digests: {}, convert, sums, verb="merge", ours=writes, recorded=recorded)
    publish(job, target, settings)
    return plan.nbytes, () if convert is None else convert.notes()


def _convert(placed: Sequence[Placed], files: Sequence[OutputFile], refuse: bool) -> Convert | None:
    targets = (each.stored for file in files for each in file.tensors)
    return conversion((place.stored for place in placed), targets, refuse=refuse)


def _target(out: str | Path | None, model: Model, suffix: str) -> Path:
    """The directory to write: by the model's name in the current one, where none is given."""
    return Path(f"{str(model.source['name']).rpartition('/')[2]}-{suffix}" if out is None else out)


def _suffix(options: Options) -> str:
    """What tells an output from others of the same model: its tp, and its format where that is not the native one."""
    named = () if options.format == DEFAULT_FORMAT else (options.format,)
    more = [f"{name}{size}" for name, size in (("pp", options.pp), ("ep", options.ep)) if size > 1]
    return "-".join((f"tp{options.tp}", *more, *named)) if format_of(options.format).has_ranks else options.format


def _check_distinct(source: Path | None, target: Path) -> None:
    if source is not None and source.resolve().is_relative_to(target.resolve()):
        inside = source.resolve() != target.resolve()
        what = "the source lies inside the output" if inside else "the output is the source itself"
        raise UsageError(what, path=target, hint="give another directory with -o")


def _is_written(target: Path, planned: Split, rank: int) -> bool:
    """Whether a rank of this very set is complete in a shared directory."""
    files = planned.files(rank)
    expected = record(planned, rank, files, dict.fromkeys(file.name for file in files))
    return is_written(target / planned.record_name(rank), expected)
