"""The command line: parses, calls the verbs of `tpshard.api`, prints. No logic lives here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpshard import __version__
from tpshard.console import Console, human_bytes
from tpshard.errors import TpshardError, UsageError

if TYPE_CHECKING:
    from tpshard.publish import Settings
    from tpshard.report import WriteReport

app = typer.Typer(
    name="tpshard",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Cut a checkpoint for tensor parallelism, put it back together, and prove that both are right.\n\n"
    "First: `tpshard plan MODEL --tp 4` shows what would be written, `tpshard split MODEL --tp 4` writes it,\n"
    "`tpshard check MODEL-tp4 --source MODEL` compares every byte.",
    epilog="Exit codes: 0 ok, 1 judged different, 2 usage, 3 corrupt input, 4 unsupported, 5 refused as unsafe, "
    "6 local I/O, 7 Hub or network, 9 target exists or locked, 70 bug, 130 interrupted.",
)
archs_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The architectures that have rules.")
app.add_typer(archs_app, name="archs")


class Checksum(StrEnum):
    """What is recorded of each file's content."""

    sha256 = "sha256"
    none = "none"


class Dtype(StrEnum):
    """What `--dtype` casts to."""

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


MODEL = Annotated[
    str, typer.Argument(help="A directory, a .safetensors file, or a Hub repo (org/name).", metavar="MODEL")
]
SHARDS = Annotated[Path, typer.Argument(help="The directory that `tpshard split` wrote.", metavar="SHARDS")]
TP = Annotated[int, typer.Option("--tp", help="Number of tensor-parallel ranks.", min=1)]
OUT = Annotated[Path | None, typer.Option("-o", "--out", help="Where to write [default: MODEL-tpN here].")]
REVISION = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repo.")]
RULES = Annotated[Path | None, typer.Option(help="An architecture file of your own (see `tpshard archs show llama`).")]
DTYPE = Annotated[Dtype | None, typer.Option(help="Cast floating-point weights.")]
UNEVEN = Annotated[bool, typer.Option("--uneven", help="Deal heads and ffn columns unevenly where they do not divide.")]
SHARED = Annotated[str | None, typer.Option("--shares", help="Weight of each rank, as in 0.5,0.3,0.2.")]
PAD = Annotated[
    int | None, typer.Option("--pad-vocab-to", help="Vocab size after padding [default: the next multiple of tp].")
]
SIZE = Annotated[
    str | None, typer.Option("--max-file-size", help="Largest file, as in 5GB [default: 50GB; merge: as the source].")
]
PICKLE = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pytorch_model*.bin, with torch's weights_only loader.")
]
RANKS = Annotated[
    str | None, typer.Option("--ranks", help="Write only these ranks (0,3 or 0-3); other hosts write the others.")
]
WORKERS = Annotated[int | None, typer.Option("--workers", help="Threads [default: the cores, at most 8].", min=1)]
CHECKSUM = Annotated[Checksum, typer.Option("--checksum", help="What is recorded of each file.")]
OVERWRITE = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output once the new one is complete.")
]
NO_FSYNC = Annotated[
    bool, typer.Option("--no-fsync", help="Do not wait for the disk: for scratch disks, not safe against power loss.")
]
DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="Only show the plan.")]
JSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
QUIET = Annotated[bool, typer.Option("-q", "--quiet", help="No messages but errors.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"tpshard {__version__}")
        raise typer.Exit


@app.command()
def plan(
    model: MODEL,
    tp: TP,
    every: Annotated[bool, typer.Option("--all", help="Every layer, not one row for all that are alike.")] = False,
    revision: REVISION = None,
    rules: RULES = None,
    dtype: DTYPE = None,
    uneven: UNEVEN = False,
    shares: SHARED = None,
    pad_vocab_to: PAD = None,
    max_file_size: SIZE = None,
    allow_pickle: PICKLE = False,
    json: JSON = False,
    quiet: QUIET = False,
) -> None:
    """Show what a split would write, and write nothing.

    Works on headers alone: of a Hub repo only config and headers are read.

      tpshard plan ./Llama-3.1-8B --tp 4
    """
    with _console(json, quiet) as console:
        _plan(console, every, **_model_options(locals()))


def _plan(console: Console, every: bool, **options: Any) -> None:
    from tpshard import api

    report = api.plan(**options)
    for warning in report.warnings:
        console.warn(warning)
    if console.as_json:
        console.data(report.to_json())
    else:
        from tpshard.tables import print_plan

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
    shares: SHARED = None,
    pad_vocab_to: PAD = None,
    max_file_size: SIZE = None,
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

      tpshard split ./Llama-3.1-8B --tp 4
      tpshard split org/name --tp 8 -o /data/name-tp8 --ranks 0-3
    """
    with _console(json, quiet) as console:
        options = _model_options(locals())
        if dry_run:
            _plan(console, False, **options)
            return
        from tpshard import api

        with _settings(console, "split", workers, checksum, overwrite, no_fsync) as settings:
            report = api.split(**options, out=out, ranks=_ranks(ranks), settings=settings)
        _print_written(console, report, f"tpshard check {report.output} --source {model}")


@app.command()
def merge(
    shards: SHARDS,
    out: OUT = None,
    max_file_size: SIZE = None,
    workers: WORKERS = None,
    overwrite: OVERWRITE = False,
    no_fsync: NO_FSYNC = False,
    json: JSON = False,
    quiet: QUIET = False,
) -> None:
    """Make an ordinary Hugging Face checkpoint of a shard set again.

    Names, dtypes, shapes and bits are the source's; ranks that hold the same part must agree.

      tpshard merge Llama-3.1-8B-tp4 -o Llama-3.1-8B-again
    """
    with _console(json, quiet) as console:
        from tpshard import api

        with _settings(console, "merge", workers, Checksum.none, overwrite, no_fsync) as settings:
            report = api.merge(shards, out, max_file_size=_size(max_file_size), settings=settings)
        _print_written(console, report, f"AutoModelForCausalLM.from_pretrained({str(report.output)!r}) loads it")


@app.command()
def reshard(
    shards: SHARDS,
    tp: TP,
    out: OUT = None,
    ranks: RANKS = None,
    uneven: UNEVEN = False,
    shares: SHARED = None,
    pad_vocab_to: PAD = None,
    max_file_size: SIZE = None,
    checksum: CHECKSUM = Checksum.sha256,
    workers: WORKERS = None,
    overwrite: OVERWRITE = False,
    no_fsync: NO_FSYNC = False,
    json: JSON = False,
    quiet: QUIET = False,
) -> None:
    """Split a shard set for another number of ranks, in one pass.

    The files are the same, byte for byte, as those of a direct split.

      tpshard reshard Llama-3.1-8B-tp4 --tp 8 -o Llama-3.1-8B-tp8
    """
    with _console(json, quiet) as console:
        from tpshard import api

        with _settings(console, "reshard", workers, checksum, overwrite, no_fsync) as settings:
            report = api.reshard(
                shards,
                tp,
                out,
                uneven=uneven,
                shares=_shares(shares),
                pad_vocab_to=pad_vocab_to,
                max_file_size=_size(max_file_size),
                ranks=_ranks(ranks),
                settings=settings,
            )
        _print_written(console, report, f"tpshard check {report.output}")


@app.command()
def check(
    shards: SHARDS,
    source: Annotated[str | None, typer.Option(help="The unsharded model: compare every byte with it.")] = None,
    tp: Annotated[int | None, typer.Option("--tp", help="Refuse a set for another number of ranks.", min=1)] = None,
    revision: REVISION = None,
    rules: RULES = None,
    allow_pickle: PICKLE = False,
    workers: WORKERS = None,
    json: JSON = False,
    quiet: QUIET = False,
) -> None:
    """Check a shard set; exit 1 when it was judged and differs.

    Without --source: all ranks there, all of one set, sizes and checksums as recorded. With it: each byte of the
    source exactly where the rules say, replicas identical, padding zero.

      tpshard check Llama-3.1-8B-tp4 --source ./Llama-3.1-8B
    """
    with _console(json, quiet) as console:
        from tpshard import api

        with _settings(console, "check", workers, Checksum.none, False, True) as settings:
            report = api.check(
                shards, source, tp=tp, revision=revision, rules=rules, allow_pickle=allow_pickle, settings=settings
            )
        for note in report.unchecked:
            console.warn(note)
        if console.as_json:
            console.data(report.to_json())
        else:
            for difference in report.differences:
                print(f"{difference.file}: {difference.tensor or 'content'}: {difference.message}")
            against = f"every byte of {report.source}" if report.source else "its recorded checksums"
            verdict = "equal to" if report.equal else "DIFFERENT from"
            print(f"{shards}: {report.shards.tp} ranks, {verdict} {against}")
        if not report.equal:
            raise typer.Exit(1)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, a shard set, or one safetensors file.")],
    every: Annotated[bool, typer.Option("--all", help="Every tensor, not one row for layers that are alike.")] = False,
    json: JSON = False,
    quiet: QUIET = False,
) -> None:
    """Say what a path holds: kind, sizes, tensors.

    tpshard inspect Llama-3.1-8B-tp4
    """
    with _console(json, quiet) as console:
        from tpshard import api

        report = api.inspect(path)
        if console.as_json:
            console.data(report.to_json())
        else:
            from tpshard.tables import print_inspect

            print_inspect(report, every)


@archs_app.command("list")
def archs_list(json: JSON = False, quiet: QUIET = False) -> None:
    """List the built-in architectures."""
    with _console(json, quiet) as console:
        from tpshard import rules as loaded

        found = {name: loaded.builtin(name).model_types for name in loaded.builtin_names()}
        if console.as_json:
            entries = [{"name": name, "model_types": list(types)} for name, types in found.items()]
            console.data({"schema_version": 1, "command": "archs", "architectures": entries})
        else:
            for name, types in found.items():
                print(f"{name:<14} {', '.join(types)}")


@archs_app.command("show")
def archs_show(
    name: Annotated[str, typer.Argument(help="Name or model_type.")], json: JSON = False, quiet: QUIET = False
) -> None:
    """Print the rules of one architecture: the form that --rules takes."""
    with _console(json, quiet) as console:
        from tpshard import rules as loaded

        architecture = loaded.builtin(name)
        if console.as_json:
            text = {"name": architecture.name, "sha256": architecture.digest, "text": architecture.text}
            console.data({"schema_version": 1, "command": "archs", **text})
        else:
            print(architecture.text, end="")


def _model_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options that plan and split share, from a command's arguments to the verb's."""
    names = ("model", "tp", "revision", "rules", "dtype", "uneven", "pad_vocab_to", "allow_pickle")
    options = {name: given[name] for name in names}
    options["dtype"] = None if given["dtype"] is None else given["dtype"].value
    options["shares"] = _shares(given["shares"])
    options["max_file_size"] = _size(given["max_file_size"])
    return options


def _shares(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",")]


def _ranks(text: str | None) -> list[int] | None:
    """`0,3` or `0-3` as a list of ranks."""
    if text is None:
        return None
    ranks: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            ranks.extend(range(int(first), int(last) + 1) if dash else [int(first)])
    except ValueError:
        raise UsageError("--ranks takes rank numbers", expected="0,3 or 0-3", found=text) from None
    return ranks


def _size(text: str | None) -> int | None:
    """`5GB` in bytes; decimal units, and binary ones as KiB, MiB, GiB."""
    if text is None:
        return None
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    number = text.strip().rstrip("BbGgIiKkMmTt")
    unit = text.strip()[len(number) :].upper()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise UsageError("--max-file-size takes a size", expected="as in 5GB", found=text) from None


@contextmanager
def _settings(
    console: Console, verb: str, workers: int | None, checksum: Checksum, overwrite: bool, no_fsync: bool
) -> Iterator[Settings]:
    from dataclasses import replace

    from tpshard.publish import Settings

    with console.progress(verb) as meter:
        settings = Settings(
            checksum=checksum is Checksum.sha256,
            fsync=not no_fsync,
            overwrite=overwrite,
            start=meter.start,
            progress=meter.add,
        )
        yield replace(settings, workers=workers) if workers else settings


def _print_written(console: Console, report: WriteReport, following: str) -> None:
    for warning in report.warnings:
        console.warn(warning)
    if console.as_json:
        console.data(report.to_json())
    else:
        print(report.output)
        console.say(f"{report.command}: {human_bytes(report.nbytes)} in {report.output}")
        console.say(f"next: {following}")


@contextmanager
def _console(as_json: bool, quiet: bool) -> Iterator[Console]:
    """A command's output object; what the command raises becomes a message and an exit code."""
    console = Console(as_json=as_json, quiet=quiet)
    try:
        yield console
    except TpshardError as error:
        console.error(error)
        raise typer.Exit(error.exit_code) from None


def main(arguments: list[str] | None = None) -> None:
    """The `tpshard` command. Exits with the documented codes."""
    try:
        code = app(args=arguments, standalone_mode=False)
    except KeyboardInterrupt:
        _leave(130, "interrupted; the same command resumes")
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except Exception as error:
        _fail(error)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Exception) -> None:
    import click

    if isinstance(error, click.ClickException):
        error.show()
        sys.exit(error.exit_code)
    if isinstance(error, click.Abort):
        _leave(130, "interrupted; the same command resumes")
    import traceback

    traceback.print_exc()
    text = f"this is a bug in tpshard {__version__}; please report it with the lines above and the command"
    _leave(70, text)


def _leave(code: int, text: str) -> None:
    print(f"tpshard: {text}", file=sys.stderr)
    sys.exit(code)
