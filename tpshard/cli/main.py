"""The command line: parses, calls the verbs of `tpshard.api`, prints. No logic lives here."""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpshard import __version__
from tpshard.cli import advise as cli_numbers
from tpshard.cli import schema as cli_schema
from tpshard.cli import verify as cli_verify
from tpshard.cli.console import Console, opened
from tpshard.cli.options import (
    BANDWIDTH,
    BATCH,
    CHECKSUM,
    DRAFT_OUT,
    DRAWING,
    DRY_RUN,
    DTYPE,
    ENGINE_VERSION,
    FORMAT,
    GPU_MEMORY,
    JSON,
    KV_DTYPE,
    MERGE_OUT,
    MERGE_SIZE,
    META_PICKLE,
    MODEL,
    NO_FSYNC,
    OUT,
    OVERWRITE,
    PAD,
    PATH,
    PICKLE,
    QUIET,
    RANKS,
    REVISION,
    RULES,
    SEQ,
    SET_TP,
    SHARDS,
    SHARES,
    SIZE,
    SOURCE,
    TP,
    UNEVEN,
    WORKERS,
    Checksum,
    rank_list,
    share_list,
)
from tpshard.errors import Interrupted, TpshardError, UsageError
from tpshard.units import human_bytes

if TYPE_CHECKING:
    from tpshard import Settings
    from tpshard.report.results import WriteReport

DIFFERENCES = 20
"""Lines of `check` about what differs: a wrong source differs in every tensor."""

app = typer.Typer(
    name="tpshard",
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Cut a checkpoint for tensor parallelism, put it back together, and prove that both are right.\n\n"
    "\b\n"
    "  tpshard plan MODEL --tp 4                 show what would be written\n"
    "  tpshard split MODEL --tp 4                write MODEL-tp4, a file for each rank\n"
    "  tpshard check MODEL-tp4 --source MODEL    compare every byte with the source\n"
    "  tpshard verify MODEL-tp4 --source MODEL   run both: the same function?\n"
    "  tpshard merge MODEL-tp4                   make an ordinary checkpoint of it again",
    epilog="Exit codes: 0 ok, 1 judged different, 2 usage, 3 corrupt input, 4 unsupported, 5 refused as unsafe, "
    "6 local I/O, 7 Hub or network, 8 inconclusive, 9 target exists or locked, 70 bug, 130 interrupted.",
)
archs_app = typer.Typer(rich_markup_mode=None)
app.add_typer(archs_app, name="archs")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"tpshard {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(UsageError.exit_code)


@app.command()
def plan(
    model: MODEL,
    tp: TP,
    every: Annotated[bool, typer.Option("--all", help="Every layer, not one row for all that are alike.")] = False,
    revision: REVISION = None,
    rules: RULES = None,
    dtype: DTYPE = None,
    uneven: UNEVEN = False,
    shares: SHARES = None,
    pad_vocab_to: PAD = None,
    max_file_size: SIZE = None,
    format: FORMAT = "native",
    engine_version: ENGINE_VERSION = None,
    allow_pickle: PICKLE = False,
    batch: BATCH = None,
    seq: SEQ = None,
    kv_dtype: KV_DTYPE = None,
    gpu_memory: GPU_MEMORY = None,
    bandwidth: BANDWIDTH = None,
    report: DRAWING = None,
    json: JSON = False,
    quiet: QUIET = False,
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
        work = cli_numbers.workload(batch, seq, kv_dtype, gpu_memory, bandwidth)
        _plan(console, every, report, workload=work, **_model_options(locals()))


def _plan(console: Console, every: bool, drawing: Path | None, **options: Any) -> None:
    import tpshard as api

    if drawing is not None:
        cli_numbers.check_drawing(drawing)
    report = api.plan(**options)
    if drawing is not None:
        cli_numbers.write_drawing(drawing, report)
        console.say(f"drawn in {drawing}")
    for warning in report.warnings:
        console.warn(warning)
    if console.as_json:
        console.data(report.to_json())
    else:
        from tpshard.cli.tables import print_plan

        print_plan(report, every)


@app.command()
def split(
    model: MODEL,
    tp: TP,
    out: OUT = None,
    ranks: RANKS = None,
    revision: REVISION = None,
    rules: RULES = None,
    dtype: DTYPE = None,
    uneven: UNEVEN = False,
    shares: SHARES = None,
    pad_vocab_to: PAD = None,
    max_file_size: SIZE = None,
    format: FORMAT = "native",
    engine_version: ENGINE_VERSION = None,
    allow_pickle: PICKLE = False,
    checksum: CHECKSUM = Checksum.sha256,
    workers: WORKERS = None,
    overwrite: OVERWRITE = False,
    no_fsync: NO_FSYNC = False,
    dry_run: DRY_RUN = False,
    json: JSON = False,
    quiet: QUIET = False,
) -> None:
    """Write one safetensors file per rank, beside config and tokenizer.

    A run that was interrupted is resumed by the same command. With --ranks each host of a cluster writes its own ranks
    into one directory.

    \b
      tpshard split ./Llama-3.1-8B --tp 4
      tpshard split org/name --tp 8 -o /data/name-tp8 --ranks 0-3
    """
    with opened(json, quiet, resumes=True) as console:
        options = _model_options(locals())
        if dry_run:
            _plan(console, False, None, **options)
            return
        import tpshard as api

        with _settings(console, "split", workers, checksum, overwrite, no_fsync) as settings:
            report = api.split(**options, out=out, ranks=rank_list(ranks, tp), settings=settings)
        following = ["tpshard", "check", str(report.output), "--source", model]
        following += ["--revision", revision] if revision else []
        following += ["--rules", str(rules)] if rules else []
        following += ["--allow-pickle"] if allow_pickle else []
        _print_written(console, report, following)


@app.command()
def merge(
    shards: SHARDS,
    out: MERGE_OUT = None,
    max_file_size: MERGE_SIZE = None,
    allow_pickle: META_PICKLE = False,
    workers: WORKERS = None,
    overwrite: OVERWRITE = False,
    no_fsync: NO_FSYNC = False,
    json: JSON = False,
    quiet: QUIET = False,
) -> None:
    """Make an ordinary Hugging Face checkpoint of a shard set again.

    Names, dtypes, shapes and bits are the source's; ranks that hold the same part must agree. The recorded checksums
    are not compared: `tpshard check` before it does that.

    \b
      tpshard check Llama-3.1-8B-tp4
      tpshard merge Llama-3.1-8B-tp4 -o Llama-3.1-8B-again
    """
    with opened(json, quiet, resumes=True) as console:
        import tpshard as api

        with _settings(console, "merge", workers, Checksum.none, overwrite, no_fsync) as settings:
            report = api.merge(shards, out, max_file_size=max_file_size, allow_pickle=allow_pickle, settings=settings)
        _print_written(console, report)
        if not json and report.unread_checksums:
            check = shlex.join(["tpshard", "check", str(shards)])
            console.say(f"the recorded checksums were not compared; this does it: {check}")


@app.command()
def reshard(
    shards: SHARDS,
    tp: TP,
    out: OUT = None,
    ranks: RANKS = None,
    uneven: UNEVEN = False,
    shares: SHARES = None,
    pad_vocab_to: PAD = None,
    max_file_size: SIZE = None,
    format: FORMAT = "native",
    engine_version: ENGINE_VERSION = None,
    allow_pickle: META_PICKLE = False,
    checksum: CHECKSUM = Checksum.sha256,
    workers: WORKERS = None,
    overwrite: OVERWRITE = False,
    no_fsync: NO_FSYNC = False,
    json: JSON = False,
    quiet: QUIET = False,
) -> None:
    """Split a shard set anew: for another tp, or in another format.

    In one pass; the files are the same, byte for byte, as those of a direct split.

    \b
      tpshard reshard Llama-3.1-8B-tp4 --tp 8 -o Llama-3.1-8B-tp8
    """
    with opened(json, quiet, resumes=True) as console:
        import tpshard as api

        with _settings(console, "reshard", workers, checksum, overwrite, no_fsync) as settings:
            report = api.reshard(
                shards,
                tp,
                out,
                uneven=uneven,
                shares=share_list(shares),
                pad_vocab_to=pad_vocab_to,
                max_file_size=max_file_size,
                format=format,
                engine_version=engine_version,
                allow_pickle=allow_pickle,
                ranks=rank_list(ranks, tp),
                settings=settings,
            )
        _print_written(console, report, ["tpshard", "check", str(report.output)])


@app.command()
def check(
    shards: SHARDS,
    source: SOURCE = None,
    tp: SET_TP = None,
    revision: REVISION = None,
    rules: RULES = None,
    allow_pickle: PICKLE = False,
    workers: WORKERS = None,
    json: JSON = False,
    quiet: QUIET = False,
) -> None:
    """Check a shard set; exit 1 when it was judged and differs.

    Without --source: all ranks there, all of one set, sizes and checksums as recorded. With it: each byte of the
    source exactly where the rules say, replicas identical, padding zero. Both compare config, tokenizer and records
    with SHA256SUMS, where the set has one.

    \b
      tpshard check Llama-3.1-8B-tp4 --source ./Llama-3.1-8B
    """
    with opened(json, quiet) as console:
        import tpshard as api

        with _settings(console, "check", workers, Checksum.none, False, True) as settings:
            report = api.check(
                shards, source, tp=tp, revision=revision, rules=rules, allow_pickle=allow_pickle, settings=settings
            )
        for note in (*report.warnings, *report.unchecked):
            console.warn(note)
        if console.as_json:
            console.data(report.to_json())
            if not report.equal:
                console.different(report.summary)
        else:
            for difference in report.differences[:DIFFERENCES]:
                print(difference)
            if (more := len(report.differences) - DIFFERENCES) > 0:
                print(f"and {more} more (--json lists them)")
            against = report.source or "its recorded checksums"
            every = "every byte of " if report.source else ""
            verdict = f"equal to {every}{against}" if report.equal else f"DIFFERENT from {against}"
            print(f"{shards}: {report.shards.tp} ranks, {verdict}")
        if not report.equal:
            raise typer.Exit(1)


@app.command()
def inspect(
    path: PATH,
    every: Annotated[bool, typer.Option("--all", help="Every tensor, not one row for layers that are alike.")] = False,
    json: JSON = False,
    quiet: QUIET = False,
) -> None:
    """Say what a path holds: kind, sizes, tensors.

    \b
      tpshard inspect Llama-3.1-8B-tp4
    """
    with opened(json, quiet) as console:
        import tpshard as api

        report = api.inspect(path)
        if console.as_json:
            console.data(report.to_json())
        else:
            from tpshard.cli.tables import print_inspect

            print_inspect(report, every)


@archs_app.callback(invoke_without_command=True)
def _archs(context: typer.Context, json: JSON = False, quiet: QUIET = False) -> None:
    """List architectures, print the rules of one, or draft new ones.

    \b
      tpshard archs
      tpshard archs show llama
      tpshard archs draft MODEL -o mine.toml
    """
    if context.invoked_subcommand is None:
        archs_list(json, quiet)


@archs_app.command("list")
def archs_list(json: JSON = False, quiet: QUIET = False) -> None:
    """List the built-in architectures and their model_types."""
    with opened(json, quiet) as console:
        from tpshard.api.archs import model_types

        found = model_types()
        if console.as_json:
            entries = [{"name": name, "model_types": list(types)} for name, types in found.items()]
            console.data({"schema_version": 1, "command": "archs", "architectures": entries})
        else:
            for name, types in found.items():
                print(f"{name:<14} {', '.join(types)}")


@archs_app.command("show")
def archs_show(
    name: Annotated[str, typer.Argument(help="Name or model_type.", metavar="NAME")],
    json: JSON = False,
    quiet: QUIET = False,
) -> None:
    """Print the rules of one architecture: the form that --rules takes."""
    with opened(json, quiet) as console:
        from tpshard.api.archs import rules_of

        architecture = rules_of(name)
        if console.as_json:
            text = {"name": architecture.name, "sha256": architecture.digest, "text": architecture.text}
            console.data({"schema_version": 1, "command": "archs", **text})
        else:
            print(architecture.text, end="")


@archs_app.command("draft")
def archs_draft(
    model: MODEL,
    out: DRAFT_OUT = None,
    revision: REVISION = None,
    allow_pickle: PICKLE = False,
    json: JSON = False,
    quiet: QUIET = False,
) -> None:
    """Write rules to start from, for a model_type that has none.

    Names and shapes are compared with the known architectures; only config and headers are read. A module gets a rule
    where all that fits comes to the same cut. The others are listed as UNDECIDED with candidates, and until each has a
    rule the file is refused: a draft is read, completed, and proved.

    \b
      tpshard archs draft org/name -o mine.toml
      tpshard plan org/name --tp 4 --rules mine.toml
      tpshard split org/name --tp 4 --rules mine.toml
      tpshard verify name-tp4
    """
    with opened(json, quiet) as console:
        from tpshard.api.archs import draft, save

        made = draft(model, revision, allow_pickle=allow_pickle)
        if out is not None:
            save(made, out)
        if console.as_json:
            console.data(made.to_json() | {"output": None if out is None else str(out)})
        else:
            print(made.text if out is None else out, end="" if out is None else "\n")
        console.say(f"closest: {made.closest}, with {made.share:.0%} of the modules in common")
        if made.undecided:
            console.warn(f"undecided modules: {len(made.undecided)}; the rules are refused until they are complete")
        elif made.refusal:
            console.warn(f"the rules are refused as they stand: {made.refusal}")
        following = ["tpshard", "plan", model, "--tp", "2", "--rules", str(out or "FILE")]
        following += ["--revision", revision] if revision else []
        console.say(f"next: read it, then {shlex.join(following)}")


cli_verify.add(app)


def _model_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options that plan and split share, from a command's arguments to the verb's."""
    names = ["model", "tp", "revision", "rules", "uneven", "pad_vocab_to", "max_file_size"]
    names += ["format", "engine_version", "allow_pickle"]
    options = {name: given[name] for name in names}
    options["dtype"] = None if given["dtype"] is None else given["dtype"].value
    options["shares"] = share_list(given["shares"])
    return options


@contextmanager
def _settings(
    console: Console, verb: str, workers: int | None, checksum: Checksum, overwrite: bool, no_fsync: bool
) -> Iterator[Settings]:
    from dataclasses import replace

    from tpshard import Settings

    with console.progress(verb) as meter:
        settings = Settings(
            checksum=checksum is Checksum.sha256,
            fsync=not no_fsync,
            overwrite=overwrite,
            start=meter.start,
            progress=meter.add,
        )
        yield replace(settings, workers=workers) if workers else settings


def _print_written(console: Console, report: WriteReport, following: Sequence[str] = ()) -> None:
    for warning in report.warnings:
        console.warn(warning)
    if console.as_json:
        console.data(report.to_json())
        return
    print(report.output)
    console.say(f"{report.command}: {human_bytes(report.nbytes)} in {report.output}")
    ranks = {part.rank for part in report.parts}
    when = "next, when all ranks are there" if report.parts and len(ranks) < report.tp else "next"
    if following:
        console.say(f"{when}: {shlex.join(following)}")


cli_numbers.add(app)
cli_schema.add(app)


def main(arguments: list[str] | None = None) -> None:
    """The `tpshard` command. Exits with the documented codes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold bytes that are not text
    try:
        code = app(args=arguments, standalone_mode=False)
    except TpshardError as error:
        meant = error
    except OSError as error:
        from tpshard.errors import local_error

        meant = local_error(error, "the system refused")
    except Exception as error:
        meant = _parse_error(error) or _bug(error)
    else:
        sys.exit(code if isinstance(code, int) else 0)
    # Also a command line that was not understood to its end may ask for JSON.
    Console(as_json="--json" in (sys.argv[1:] if arguments is None else arguments)).error(meant)
    sys.exit(meant.exit_code)


def run() -> None:
    """The console script: `main` without the interpreter's clean-up, which takes a tenth of a short command's time."""
    try:
        main()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 0 if done.code is None else 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the result could not be written to where it was to go
        code = code or 6
    os._exit(code)


def _parse_error(error: Any) -> TpshardError | None:
    """What the command line's parser complains about, as an error of ours; None when it is not the parser's."""
    # Newer versions of typer have a copy of click inside, older ones use click: both name the base class so.
    parser_error: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    if isinstance(error, typer.Abort):
        return Interrupted("interrupted")
    if not isinstance(error, parser_error):
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "tpshard"
    message = " ".join(error.format_message().split()).rstrip(".")
    return UsageError(message[0].lower() + message[1:], hint=f"`{command} --help` lists the options")


def _bug(error: Exception) -> TpshardError:
    import traceback

    traceback.print_exc()
    what = f"{type(error).__name__}: {error}".split("\n")[0]
    hint = f"please report it, with the traceback, the command and the version, {__version__}"
    return TpshardError(f"this is a bug in tpshard: {what}", hint=hint)
