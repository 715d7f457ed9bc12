"""The command `verify`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tpshard.cli import options as opt
from tpshard.cli.console import Console, opened
from tpshard.errors import TpshardError, UsageError

if TYPE_CHECKING:
    from tpshard.verifier.report.verdict import Verdict


Device = Literal["auto", "cpu", "cuda"]
Reference = Literal["tpshard", "transformers"]
Engine = Literal["auto", "tpshard", "transformers"]


def _number(option: str, least: int) -> Callable[[str | int], int]:
    """A parser for whole numbers from `least` on, and for defaults. Typer's own errors differ between its versions."""

    def parse(text: str | int) -> int:
        if not str(text).strip().isdecimal() or int(text) < least:
            raise UsageError(f"{option} does not take this number", expected=f"{least} or more", found=repr(text))
        return int(text)

    return parse


def layer_list(text: str | None) -> tuple[int, ...] | None:
    """`0,1,-1` as numbers of layers."""
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        expected = "numbers of layers, as in 0,1,-1"
        raise UsageError("--layers does not take these", expected=expected, found=repr(text)) from None


_SOURCE = Annotated[
    str | None,
    typer.Option(
        "--source", help="The unsharded model [default: found by the name that SHARDS record].", metavar="MODEL"
    ),
]
_TIER = Annotated[
    str | None,
    typer.Option("--tier", help="Any of bytes,exact,native [default: all that can run here].", metavar="TIERS"),
]
_DEVICE = Annotated[Device, typer.Option("--device", help="Where to compute; auto: on GPUs where there are any.")]
_TOKENS = Annotated[
    int,
    typer.Option(
        "--tokens",
        help="Tokens decoded after the prompt in the native tier.",
        parser=_number("--tokens", 0),
        metavar="N",
    ),
]
_FLOAT32 = Annotated[bool, typer.Option("--float32", help="The exact tier in float32, with a limit of 1e-5.")]
_LAYERS = Annotated[
    str | None, typer.Option("--layers", help="Only these layers, as in 0,1,-1 [default: all].", metavar="LIST")
]
_STREAM = Annotated[
    bool | None,
    typer.Option("--stream/--no-stream", help="Read weights block by block [default: when memory is short]."),
]
_SEQUENCE = Annotated[
    bool, typer.Option("--sequence-parallel", help="Cut the sequence between modules: reduce-scatter and all-gather.")
]
_REFERENCE = Annotated[Reference, typer.Option("--reference", help="transformers: compare with its own model as well.")]
_ENGINE = Annotated[
    Engine, typer.Option("--engine", help="Whose model runs; auto: transformers' own where tpshard has none.")
]
_PROMPT = Annotated[
    str | None,
    typer.Option("--prompt", help="A text for the model's tokenizer [default: ids by --seed].", metavar="TEXT"),
]
_SEED = Annotated[
    int, typer.Option("--seed", help="Seed of the prompt's ids.", parser=_number("--seed", 0), metavar="N")
]
_NPROC = Annotated[
    int | None,
    typer.Option(
        "--nproc-per-node",
        help="Processes: one for each rank, or 1 for all [default: 1; for each rank on a host with several GPUs].",
        parser=_number("--nproc-per-node", 1),
        metavar="N",
    ),
]
_REPORT = Annotated[
    list[Path] | None,
    typer.Option("--report", help="Also write .json, .xml (JUnit), .md or .html; repeatable.", metavar="FILE"),
]


def verify(
    shards: opt.SHARDS,
    source: _SOURCE = None,
    tier: _TIER = None,
    device: _DEVICE = "auto",
    tokens: _TOKENS = 32,
    prompt: _PROMPT = None,
    seed: _SEED = 0,
    layers: _LAYERS = None,
    float32: _FLOAT32 = False,
    stream: _STREAM = None,
    sequence_parallel: _SEQUENCE = False,
    reference: _REFERENCE = "tpshard",
    engine: _ENGINE = "auto",
    nproc_per_node: _NPROC = None,
    revision: opt.REVISION = None,
    rules: opt.RULES = None,
    allow_pickle: opt.PICKLE = False,
    report: _REPORT = None,
    json: opt.JSON = False,
    quiet: opt.QUIET = False,
) -> None:
    """Run shards and unsharded model: are they the same function?

    The shards run tensor-parallel. Exit 0: they are. 1: they differ. 8: it could not be said for sure, as without
    torch, where only bytes are compared. Under torchrun or SLURM each process takes a rank. SHARDS may have any format.

    \b
      tpshard verify Llama-3.1-8B-tp4
      tpshard verify Llama-3.1-8B-tp4 --source ./Llama-3.1-8B --tier exact --layers 0,-1
      torchrun --nproc-per-node 4 -m tpshard verify Llama-3.1-8B-tp4
    """
    with opened(json, quiet) as console:
        speaks = True
        reports: list[Path] = []
        try:
            from tpshard.api import verify as verifying

            speaks = verifying.is_first()
            for path in report or ():
                reports.append(_writable(path))
            options = verifying.VerifyOptions(
                shards=shards,
                source=source,
                tiers=None if tier is None else tuple(part.strip() for part in tier.split(",")),
                device=device,
                tokens=tokens,
                seed=seed,
                float32=float32,
                layers=layer_list(layers),
                stream=stream,
                sequence_parallel=sequence_parallel,
                reference=reference,
                engine=engine,
                prompt=prompt,
                revision=revision,
                rules=rules,
                allow_pickle=allow_pickle,
                nproc=nproc_per_node,
            )
            verdict = verifying.verify_with(options, console.say)
        except TpshardError as error:
            if not speaks:
                raise typer.Exit(error.exit_code) from None
            _report_error(console, error, shards, reports)
            if json:
                from tpshard.verifier.report.write import error_json

                console.data(error_json(error))
                console.as_json = False  # the object, which has a verdict, is out; the message on stderr is left
                console.error(error)
                raise typer.Exit(error.exit_code) from None
            raise
        except Exception as error:
            if speaks:
                _report_error(console, TpshardError(f"{type(error).__name__}: {error}"), shards, reports)
            raise
        if speaks:
            _print(console, verdict, shards, source, reports)
    raise typer.Exit(verdict.exit_code)


def _writable(path: Path) -> Path:
    """A report's path, refused before anything is run."""
    from tpshard.verifier.report.write import check_kind

    check_kind(path)
    if not path.absolute().parent.is_dir():
        raise UsageError("no such directory for a report", path=path, hint="make it, or give another path to --report")
    return path


def _report_error(console: Console, error: TpshardError, shards: Path, reports: list[Path]) -> None:
    """The error in every report that was asked for; one that cannot be written does not hide the error itself."""
    from tpshard.verifier.report.write import write_error

    for path in reports:
        try:
            write_error(error, shards.name, path)
        except TpshardError as another:
            console.warn(str(another))


def _print(console: Console, verdict: Verdict, shards: Path, source: str | None, reports: list[Path]) -> None:
    from tpshard.verifier.report.wording import caught, reasons, rows
    from tpshard.verifier.report.write import write

    for path in reports:
        write(verdict, path)
    for warning in verdict.warnings:
        console.warn(warning)
    if console.as_json:
        console.data(verdict.to_json())
        return
    what = f"{verdict.shards} (tp {verdict.tp}) against {verdict.source}"
    print(f"{verdict.verdict.upper()}: {what}" + (f": {verdict.reason}" if verdict.reason else ""))
    table = [("tier", "status", "figures", "worst"), *rows(verdict)]
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    for row in table:
        print("  ".join(cell.ljust(size) for cell, size in zip(row, [*widths, 0], strict=True)).rstrip())
    for reason in reasons(verdict):
        print(reason)
    if verdict.canaries:
        print(caught(verdict))
    if verdict.verdict == "fail":
        following = ["tpshard", "check", str(shards), "--source", source or verdict.source]
        console.say(f"next: {shlex.join(following)}")
