"""The commands `plan`, `split`, `merge` and `reshard`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tpshard.cli import options as opt
from tpshard.cli.console import Console, opened
from tpshard.cli.options import again, check_report, rank_list, settings, target_options, workload
from tpshard.errors import UsageError, local_error
from tpshard.units import human_bytes

if TYPE_CHECKING:
    from tpshard.api.options import PlanOptions
    from tpshard.report.results import PlanReport, WriteReport

_SHOWN = 8
"""Names in a line of files that are left out; `--json` has all."""


def plan(
    model: opt.MODEL,
    tp: opt.TP,
    every: Annotated[bool, typer.Option("--all", help="Every layer, not one row for all that are alike.")] = False,
    revision: opt.REVISION = None,
    rules: opt.RULES = None,
    dtype: opt.DTYPE = None,
    cast_all: opt.CAST_ALL = False,
    pp: opt.PP = 1,
    pp_layers: opt.PP_LAYERS = None,
    ep: opt.EP = 1,
    uneven: opt.UNEVEN = False,
    shares: opt.SHARES = None,
    pad_vocab_to: opt.PAD = None,
    max_file_size: opt.SIZE = None,
    format: opt.FORMAT = "native",
    engine_version: opt.ENGINE_VERSION = None,
    allow_pickle: opt.PICKLE = False,
    follow_symlinks: opt.FOLLOW = False,
    batch: opt.BATCH = None,
    seq: opt.SEQ = None,
    kv_dtype: opt.KV_DTYPE = None,
    gpu_memory: opt.GPU_MEMORY = None,
    bandwidth: opt.BANDWIDTH = None,
    report: opt.DRAWING = None,
    grouped: Annotated[
        bool, typer.Option("--grouped", help="With --json: one entry for layers and experts that are alike.")
    ] = False,
    json: opt.JSON = False,
    quiet: opt.QUIET = False,
) -> None:
    """Show what a split would write, and write nothing.

    Works on headers alone: of a Hub repo only config and headers are read. Says what each rank holds, with a KV cache
    for --batch sequences of --seq tokens, and what the ranks send each other; --report draws it.

    \b
      tpshard plan ./Llama-3.1-8B --tp 4
      tpshard plan org/name --tp 8 --batch 16 --seq 8192 --gpu-memory 80 --bandwidth 450
      tpshard plan org/name --tp 8 --report plan.html
    """
    with opened(json, quiet) as console:
        from tpshard.api.options import ModelOptions, PlanOptions

        source = ModelOptions(model, revision, rules, dtype, allow_pickle, follow_symlinks, cast_all)
        target = target_options(
            tp, pp, pp_layers, ep, uneven, shares, pad_vocab_to, max_file_size, format, engine_version
        )
        work = workload(batch, seq, kv_dtype, gpu_memory, bandwidth)
        if grouped and not json:
            raise UsageError("--grouped is for --json", hint="the table has a row for layers that are alike as it is")
        _show(console, PlanOptions(source, target, work), every, report, grouped)


def split(
    model: opt.MODEL,
    tp: opt.TP,
    out: opt.OUT = None,
    ranks: opt.RANKS = None,
    revision: opt.REVISION = None,
    rules: opt.RULES = None,
    dtype: opt.DTYPE = None,
    cast_all: opt.CAST_ALL = False,
    allow_overflow: opt.OVERFLOW = False,
    pp: opt.PP = 1,
    pp_layers: opt.PP_LAYERS = None,
    ep: opt.EP = 1,
    uneven: opt.UNEVEN = False,
    shares: opt.SHARES = None,
    pad_vocab_to: opt.PAD = None,
    max_file_size: opt.SIZE = None,
    format: opt.FORMAT = "native",
    engine_version: opt.ENGINE_VERSION = None,
    allow_pickle: opt.PICKLE = False,
    follow_symlinks: opt.FOLLOW = False,
    checksum: opt.CHECKSUM = "sha256",
    workers: opt.WORKERS = None,
    overwrite: opt.OVERWRITE = False,
    no_fsync: opt.NO_FSYNC = False,
    dry_run: opt.DRY_RUN = False,
    json: opt.JSON = False,
    quiet: opt.QUIET = False,
) -> None:
    """Write one safetensors file per rank, beside config and tokenizer.

    A run that was interrupted is resumed by the same command. With --ranks each host of a cluster writes its own ranks
    into one directory.

    \b
      tpshard split ./Llama-3.1-8B --tp 4
      tpshard split org/name --tp 8 -o /data/name-tp8 --ranks 0-3
    """
    with opened(json, quiet, resumes=True) as console:
        from tpshard.api.convert import split_with
        from tpshard.api.options import ModelOptions, PlanOptions, SplitOptions

        source = ModelOptions(model, revision, rules, dtype, allow_pickle, follow_symlinks, cast_all, allow_overflow)
        target = target_options(
            tp, pp, pp_layers, ep, uneven, shares, pad_vocab_to, max_file_size, format, engine_version
        )
        if dry_run:
            _show(console, PlanOptions(source, target))
            return
        chosen = rank_list(ranks, tp * pp)
        with settings(console, "split", workers, checksum, overwrite, no_fsync) as how:
            report = split_with(SplitOptions(model=source, target=target, out=out, ranks=chosen, settings=how))
        check = ["tpshard", "check", str(report.output), "--source", model]
        _print_written(
            console,
            report,
            [*check, *again(revision, rules, allow_pickle=allow_pickle, follow_symlinks=follow_symlinks)],
        )


def merge(
    shards: opt.SHARDS,
    out: opt.MERGE_OUT = None,
    max_file_size: opt.MERGE_SIZE = None,
    allow_pickle: opt.META_PICKLE = False,
    vocab_size: opt.VOCAB_SIZE = None,
    workers: opt.WORKERS = None,
    overwrite: opt.OVERWRITE = False,
    no_fsync: opt.NO_FSYNC = False,
    json: opt.JSON = False,
    quiet: opt.QUIET = False,
) -> None:
    """Make an ordinary Hugging Face checkpoint of a shard set again.

    Names, dtypes, shapes and bits are the source's; ranks that hold the same part must agree, and each
    file must be as it was written, by the checksums that split recorded.

    \b
      tpshard merge Llama-3.1-8B-tp4 -o Llama-3.1-8B-again
    """
    with opened(json, quiet, resumes=True) as console:
        from tpshard.api.convert import merge_with
        from tpshard.api.options import MergeOptions

        with settings(console, "merge", workers, "none", overwrite, no_fsync) as how:
            report = merge_with(MergeOptions(shards, out, max_file_size, allow_pickle, vocab_size, how))
        _print_written(console, report)
        if not json and report.unread_checksums:
            console.say("this set was written without checksums, so nothing says whether its files are as they were")


def reshard(
    shards: opt.SHARDS,
    tp: opt.TP,
    out: opt.OUT = None,
    ranks: opt.RANKS = None,
    pp: opt.PP = 1,
    pp_layers: opt.PP_LAYERS = None,
    ep: opt.EP = 1,
    uneven: opt.UNEVEN = False,
    shares: opt.SHARES = None,
    pad_vocab_to: opt.PAD = None,
    max_file_size: opt.SIZE = None,
    format: opt.FORMAT = "native",
    engine_version: opt.ENGINE_VERSION = None,
    allow_pickle: opt.META_PICKLE = False,
    checksum: opt.CHECKSUM = "sha256",
    workers: opt.WORKERS = None,
    overwrite: opt.OVERWRITE = False,
    no_fsync: opt.NO_FSYNC = False,
    json: opt.JSON = False,
    quiet: opt.QUIET = False,
) -> None:
    """Split a shard set anew: for another tp, or in another format.

    In one pass; the files are the same, byte for byte, as those of a direct split.

    \b
      tpshard reshard Llama-3.1-8B-tp4 --tp 8 -o Llama-3.1-8B-tp8
    """
    with opened(json, quiet, resumes=True) as console:
        from tpshard.api.convert import reshard_with
        from tpshard.api.options import ReshardOptions

        target = target_options(
            tp, pp, pp_layers, ep, uneven, shares, pad_vocab_to, max_file_size, format, engine_version
        )
        chosen = rank_list(ranks, tp * pp)
        with settings(console, "reshard", workers, checksum, overwrite, no_fsync) as how:
            report = reshard_with(
                ReshardOptions(
                    shards=shards, target=target, out=out, ranks=chosen, allow_pickle=allow_pickle, settings=how
                )
            )
        _print_written(console, report, ["tpshard", "check", str(report.output)])


def _show(
    console: Console, options: PlanOptions, every: bool = False, drawing: Path | None = None, grouped: bool = False
) -> None:
    """Print a plan, and draw it where a file for that is given."""
    from tpshard.api.convert import plan_with

    if drawing is not None:
        if drawing.suffix != ".html":
            hint = "give --report a name that ends in .html"
            raise UsageError("a plan is drawn as HTML", path=drawing, hint=hint)
        check_report(drawing)
    with console.patience("plan: reading headers and planning"):
        report = plan_with(options)
    if drawing is not None:
        _write_drawing(drawing, report)
        console.say(f"drawn in {drawing}")
    console.warn(*report.warnings)
    _say_left_out(console, report)
    if console.as_json and (grouped or sys.stdout.isatty()):
        console.data(report.to_json(grouped))
    elif console.as_json:
        console.pieces(report.json_text())
    else:
        from tpshard.cli.tables import print_plan

        print_plan(report, every)


def _say_left_out(console: Console, report: PlanReport | WriteReport) -> None:
    """A line for each reason: the files that do not travel."""
    reasons: dict[str, list[str]] = {}
    for each in report.left_out:
        reasons.setdefault(each.reason, []).append(each.file)
    for reason, names in reasons.items():
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        console.say(f"left out: {shown} ({reason})")


def _write_drawing(path: Path, report: PlanReport) -> None:
    """Draw a plan into a file."""
    from tpshard.report.plan_page import draw

    try:
        path.write_text(draw(report), encoding="utf-8")
    except OSError as error:
        raise local_error(error, "cannot write the report", path) from None


def _print_written(console: Console, report: WriteReport, following: Sequence[str] = ()) -> None:
    console.warn(*report.warnings)
    _say_left_out(console, report)
    if console.as_json:
        console.data(report.to_json())
        return
    console.path(report.output)
    console.say(f"{report.command}: {human_bytes(report.nbytes)} in {report.output}")
    ranks = {part.rank for part in report.parts}
    when = "next, when all ranks are there" if report.parts and len(ranks) < report.mesh.size else "next"
    if following:
        console.say(f"{when}: {shlex.join(following)}")
