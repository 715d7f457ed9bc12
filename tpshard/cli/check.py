"""The commands `check` and `inspect`."""

from typing import Annotated

import typer

from tpshard.cli import options as opt
from tpshard.cli.console import opened
from tpshard.cli.options import settings

DIFFERENCES = 20
"""Lines of `check` about what differs: a wrong source differs in every tensor."""


def check(
    shards: opt.SHARDS,
    source: opt.SOURCE = None,
    tp: opt.SET_TP = None,
    revision: opt.REVISION = None,
    rules: opt.RULES = None,
    allow_pickle: opt.PICKLE = False,
    follow_symlinks: opt.FOLLOW = False,
    workers: opt.WORKERS = None,
    json: opt.JSON = False,
    quiet: opt.QUIET = False,
) -> None:
    """Check a shard set; exit 1 when it was judged and differs.

    Without --source: all ranks there, all of one set, headers as the manifest has them, sizes and checksums as
    recorded. With it: each byte of the source exactly where the rules say, replicas identical, padding zero, headers,
    config and other files as split writes them. Both compare small files and records with SHA256SUMS.

    \b
      tpshard check Llama-3.1-8B-tp4 --source ./Llama-3.1-8B
    """
    with opened(json, quiet) as console:
        from tpshard.api.check import check_with
        from tpshard.api.options import CheckOptions

        with settings(console, "check", workers, "none") as how:
            report = check_with(CheckOptions(shards, source, tp, revision, rules, allow_pickle, how, follow_symlinks))
        console.warn(*report.warnings, *report.unchecked)
        if console.as_json:
            console.data(report.to_json())
            if not report.equal:
                console.different(report.summary)
        else:
            for difference in report.differences[:DIFFERENCES]:
                console.show(difference)
            if (more := len(report.differences) - DIFFERENCES) > 0:
                console.show(f"and {more} more (--json lists them)")
            against = report.source or "its recorded checksums"
            every = "every byte of " if report.source else ""
            verdict = f"equal to {every}{against}" if report.equal else f"DIFFERENT from {against}"
            console.show(f"{shards}: {report.shards.size} ranks, {verdict}")
        if not report.equal:
            raise typer.Exit(1)


def inspect(
    path: opt.PATH,
    every: Annotated[bool, typer.Option("--all", help="Every tensor, not one row for layers that are alike.")] = False,
    follow_symlinks: opt.FOLLOW = False,
    json: opt.JSON = False,
    quiet: opt.QUIET = False,
) -> None:
    """Say what a path holds: kind, sizes, tensors.

    \b
      tpshard inspect Llama-3.1-8B-tp4
    """
    with opened(json, quiet) as console:
        from tpshard.api.inspect import inspect as look

        report = look(path, follow_symlinks=follow_symlinks)
        if console.as_json:
            console.data(report.to_json())
        else:
            from tpshard.cli.tables import print_inspect

            print_inspect(report, every)
