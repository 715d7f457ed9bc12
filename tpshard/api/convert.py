"""The verbs: plan, split, merge, reshard, check, inspect. The command line only calls these.

What only some verbs need is imported inside them: a split of 2 GB takes less than a second, and imports count.

Every function raises the errors of `tpshard.errors`; results are frozen dataclasses with `to_json()`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from tpshard.errors import TargetError, UsageError
from tpshard.execute.publish import Job, Settings, publish
from tpshard.execute.run import conversion
from tpshard.execute.target import is_written
from tpshard.formats import hf, writes
from tpshard.formats.plan import plan_split, record
from tpshard.formats.split import DEFAULT_MAX_FILE_SIZE, Options, Split, share_texts, weight
from tpshard.inputs.checkpoint import Checkpoint, open_checkpoint, open_headers
from tpshard.inputs.model import from_checkpoint, placed_in
from tpshard.inputs.open import open_set, rules_path
from tpshard.inputs.shard_set import is_shard_set
from tpshard.planning.join import Placed, join
from tpshard.planning.model import Model, check_dtype
from tpshard.report.results import PlanReport, RankPart, WriteReport
from tpshard.storage.local import read_bytes
from tpshard.storage.names import LOCK, MANIFEST, rank_stem

if TYPE_CHECKING:
    from tpshard.inputs.shard_set import ShardSet
    from tpshard.report.capacity import Workload

Shares = Sequence[str | float]


def _options(
    tp: int,
    uneven: bool,
    shares: Shares | None,
    pad_vocab_to: int | None,
    max_file_size: int | None,
    format: str,
    engine_version: str | None,
) -> Options:
    if tp < 1:
        raise UsageError("tp must be at least 1", found=tp)
    texts: tuple[str, ...] | None = None
    if shares is not None:
        try:
            texts = share_texts([str(share) for share in shares])
        except (ValueError, ZeroDivisionError):
            raise UsageError("--shares takes numbers, as in 0.5,0.3,0.2", found=",".join(map(str, shares))) from None
        if len(texts) != tp or any(weight(text) <= 0 for text in texts):
            raise UsageError(
                "--shares takes one positive number for each rank", expected=f"{tp} numbers", found=", ".join(texts)
            )
    size = DEFAULT_MAX_FILE_SIZE if max_file_size is None else max_file_size
    if size < 1:
        raise UsageError("--max-file-size must be positive", found=size)
    return Options(
        tp=tp,
        uneven=uneven,
        shares=texts,
        pad_vocab_to=pad_vocab_to,
        max_file_size=size,
        format=format,
        engine_version=engine_version,
    )


def plan(
    model: str | Path,
    tp: int,
    *,
    revision: str | None = None,
    rules: str | Path | None = None,
    dtype: str | None = None,
    uneven: bool = False,
    shares: Shares | None = None,
    pad_vocab_to: int | None = None,
    max_file_size: int | None = None,
    format: str = "native",
    engine_version: str | None = None,
    allow_pickle: bool = False,
    workload: Workload | None = None,
) -> PlanReport:
    """Plan a split and write nothing. Of a Hub repo only config and headers are read.

    model: a directory, a .safetensors file, or a Hub repo (`org/name`, at `revision`). rules: an architecture file.
    dtype: what floating-point weights are cast to, as `bfloat16`; None leaves them as they are. uneven: deal units
    that do not divide. shares: a weight for each rank, as `["0.5", "0.3", "0.2"]`. pad_vocab_to: the vocab's size after
    padding; None is the next multiple of tp. max_file_size: bytes (default: 50 GB). format: as `--format` takes it.
    workload: what memory and communication are reckoned for (default: one sequence of 4096 tokens).
    UnsupportedError for a model without rules or a tp that would cut a unit, CorruptError for a damaged checkpoint.
    """
    options = _options(tp, uneven, shares, pad_vocab_to, max_file_size, format, engine_version)
    check_dtype(dtype)
    checkpoint = open_headers(model, revision, allow_pickle=allow_pickle)
    built = from_checkpoint(checkpoint, rules_path(rules), dtype)
    return PlanReport(plan_split(built, options), checkpoint.warnings, workload)


def split(
    model: str | Path,
    tp: int,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    rules: str | Path | None = None,
    dtype: str | None = None,
    uneven: bool = False,
    shares: Shares | None = None,
    pad_vocab_to: int | None = None,
    max_file_size: int | None = None,
    format: str = "native",
    engine_version: str | None = None,
    allow_pickle: bool = False,
    ranks: Iterable[int] | None = None,
    settings: Settings | None = None,
) -> WriteReport:
    """Split a checkpoint for `tp` ranks into `out` (default: MODEL-tpN in the current directory).

    The model's options are those of `plan`. ranks: write only these, into a directory that other hosts write the other
    ranks into. TargetError when `out` exists and `settings` do not say `overwrite`; after an error or a kill the same
    call resumes.
    """
    settings = settings or Settings()
    options = _options(tp, uneven, shares, pad_vocab_to, max_file_size, format, engine_version)
    check_dtype(dtype)
    chosen = _ranks(ranks, tp, format)
    checkpoint = open_checkpoint(model, revision, allow_pickle=allow_pickle)
    built = from_checkpoint(checkpoint, rules_path(rules), dtype)
    target = Path(out) if out is not None else Path(f"{_base_name(built)}-{_suffix(options)}")
    _check_distinct(checkpoint.directory, target)
    planned = plan_split(built, options)
    small = _side_files(checkpoint.side_files)
    if dtype is not None:
        small["config.json"] = _config_with_dtype(checkpoint, dtype)
    if format == "hf":
        placed = placed_in(checkpoint, built)
        size = options.max_file_size if max_file_size is None else max_file_size
        return _write_hf(
            built, placed, small, target, size, settings, planned.set_id, "split", warnings=checkpoint.warnings
        )
    return _write_split(
        planned, placed_in(checkpoint, built), small, target, chosen, settings, "split", checkpoint.warnings
    )


def reshard(
    shards: str | Path,
    tp: int,
    out: str | Path | None = None,
    *,
    uneven: bool = False,
    shares: Shares | None = None,
    pad_vocab_to: int | None = None,
    max_file_size: int | None = None,
    format: str = "native",
    engine_version: str | None = None,
    allow_pickle: bool = False,
    ranks: Iterable[int] | None = None,
    settings: Settings | None = None,
) -> WriteReport:
    """Split a shard set anew for another tp or format, in one pass; the files equal those of a direct split.

    The options are those of `split`; allow_pickle: of Meta's own files. DifferentError when ranks that hold the same
    part disagree, CorruptError when ranks are missing.
    """
    settings = settings or Settings()
    options = _options(tp, uneven, shares, pad_vocab_to, max_file_size, format, engine_version)
    chosen = _ranks(ranks, tp, format)
    source = open_set(Path(shards), allow_pickle)
    source.require_complete()
    target = Path(out) if out is not None else Path(f"{_base_name(source.model)}-{_suffix(options)}")
    _check_distinct(source.directory, target)
    planned = plan_split(source.model, options)
    if format == "hf":
        small, placed = _small(source), source.placed()
        return _write_hf(source.model, placed, small, target, max_file_size, settings, planned.set_id, "reshard")
    return _write_split(planned, source.placed(), _small(source), target, chosen, settings, "reshard", ())


def _write_split(
    planned: Split,
    placed: list[Placed],
    small: dict[str, bytes],
    target: Path,
    ranks: Sequence[int] | None,
    settings: Settings,
    verb: str,
    warnings: Sequence[str],
) -> WriteReport:
    tp = planned.options.tp
    writing = list(range(tp)) if ranks is None else [r for r in ranks if not _is_written(target, planned, r)]
    if ranks is not None and not writing:
        raise TargetError(
            f"rank {', '.join(map(str, ranks))} is already there and complete",
            path=target,
            hint="`tpshard check` tells whether the whole set is; remove the rank's files to write them again",
        )
    outputs = {rank: planned.files(rank) for rank in writing}
    joined = join(planned.kept.tensors, placed, [output for rank in writing for output in outputs[rank]])

    def records(digests: Mapping[str, str | None]) -> dict[str, bytes]:
        return {f"{rank_stem(r, tp)}.json": record(planned, r, outputs[r], digests) for r in writing}

    job = Job(
        plan=joined,
        small={**planned.format.side_files(planned, small), MANIFEST: planned.manifest},
        identity={"set": planned.set_id},
        records=records,
        convert=conversion((place.stored for place in placed), chain.from_iterable(planned.layout)),
        shared=ranks is not None,
        claims=[f".{rank_stem(r, tp)}.lock" for r in writing] if ranks is not None else [LOCK],
        verb=verb,
        ours=writes,
    )
    digests = publish(job, target, settings)
    parts = tuple(
        RankPart(rank, output.name, output.size, digests[output.name]) for rank in writing for output in outputs[rank]
    )
    return WriteReport(verb, target, tp, planned.set_id, joined.nbytes, parts, tuple(warnings))


def merge(
    shards: str | Path,
    out: str | Path | None = None,
    *,
    max_file_size: int | None = None,
    allow_pickle: bool = False,
    settings: Settings | None = None,
) -> WriteReport:
    """Make an ordinary Hugging Face checkpoint of a shard set: the source's names, dtypes, shapes and bits.

    out: default MODEL-merged in the current directory. max_file_size: bytes (default: files as in the source).
    DifferentError when ranks that hold the same part disagree, CorruptError when ranks are missing.
    """
    source = open_set(Path(shards), allow_pickle)
    source.require_complete()
    target = Path(out) if out is not None else Path(f"{_base_name(source.model)}-merged")
    _check_distinct(source.directory, target)
    report = _write_hf(
        source.model,
        source.placed(),
        _small(source),
        target,
        max_file_size,
        replace(settings or Settings(), checksum=False),
        source.manifest["set"],
        "merge",
        source.tp,
    )
    return replace(report, unread_checksums=is_shard_set(source.directory))


def _write_hf(
    model: Model,
    placed: list[Placed],
    small: dict[str, bytes],
    target: Path,
    max_file_size: int | None,
    settings: Settings,
    set_id: str,
    verb: str,
    tp: int = 1,
    warnings: Sequence[str] = (),
) -> WriteReport:
    """Write a model unsharded. set_id: names what it is made of. tp: of what it is made of."""
    outputs, index = hf.outputs(model.tensors, model.file_of, max_file_size)
    joined = join(model.tensors, placed, outputs)
    job = Job(
        plan=joined,
        small={**small, **index},
        identity={"set": set_id},
        records=lambda digests: {},
        convert=conversion(
            (place.stored for place in placed), (each.stored for output in outputs for each in output.tensors)
        ),
        verb="merge",
        ours=writes,
    )
    publish(job, target, settings)
    return WriteReport(verb, target, tp, set_id, joined.nbytes, (), tuple(warnings))


def _base_name(model: Model) -> str:
    return str(model.source["name"]).rpartition("/")[2]


def _suffix(options: Options) -> str:
    return "hf" if options.format == "hf" else f"tp{options.tp}"


def _ranks(ranks: Iterable[int] | None, tp: int, format: str) -> list[int] | None:
    if ranks is None:
        return None
    if format == "hf":
        raise UsageError("--ranks needs a format with ranks", found="--format hf", hint="leave --ranks out")
    chosen = sorted(set(ranks))
    if not chosen or chosen[0] < 0 or chosen[-1] >= tp:
        raise UsageError("--ranks takes ranks of the set", expected=f"0 to {tp - 1}", found=", ".join(map(str, chosen)))
    return chosen


def _check_distinct(source: Path | None, target: Path) -> None:
    if source is None:
        return
    real_source, real_target = source.resolve(), target.resolve()
    if real_source == real_target:
        raise UsageError("the output is the source itself", path=target, hint="give another directory with -o")
    if real_source.is_relative_to(real_target):
        raise UsageError("the source lies inside the output", path=target, hint="give another directory with -o")


def _small(source: ShardSet) -> dict[str, bytes]:
    return {**source.made, **_side_files(source.side_files)}


def _side_files(paths: Iterable[Path]) -> dict[str, bytes]:
    return {path.name: read_bytes(path) for path in paths}


def _config_with_dtype(checkpoint: Checkpoint, dtype: str) -> bytes:
    """config.json with the dtype that the weights now have: engines take theirs from it, or from a nested config."""
    config = dict(checkpoint.config)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = dtype
    for name, inner in config.items():
        if isinstance(inner, dict):
            config[name] = inner | {k: dtype for k in ("torch_dtype", "dtype") if isinstance(inner.get(k), str)}
    return (json.dumps(config, indent=2) + "\n").encode()


def _is_written(target: Path, planned: Split, rank: int) -> bool:
    """Whether a rank of this very set is complete in a shared directory."""
    files = planned.files(rank)
    expected = record(planned, rank, files, dict.fromkeys(file.name for file in files))
    return is_written(target / f"{rank_stem(rank, planned.options.tp)}.json", expected)
