"""The command `verify`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Option

from tpshard.cli import options as opt
from tpshard.cli.console import Console, opened
from tpshard.errors import TpshardError, UsageError

if TYPE_CHECKING:
    from tpshard.verifier.report.verdict import Verdict


Device = Literal["auto", "cpu", "cuda"]
Reference = Literal["tpshard", "transformers"]
Engine = Literal["auto", "tpshard", "transformers"]


def layer_list(text: str | None) -> tuple[int, ...] | None:
    """`0,1,-1` as numbers of layers."""
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        expected = "numbers of layers, as in 0,1,-1"
        raise UsageError("--layers does not take these", expected=expected, found=repr(text)) from None


_SOURCE_HELP = "The unsharded model [default: found by the name that SHARDS record]."
_SOURCE = Annotated[str | None, Option("--source", help=_SOURCE_HELP, metavar="MODEL")]
_TIER_HELP = "Any of bytes,weights,exact,native [default: all that can run here]."


def _tiers(incomplete: str) -> list[str]:
    """The lists of tiers that go on from what was typed, for the shell's completion."""
    from tpshard.api.options import TIERS

    given, comma, last = incomplete.rpartition(",")
    return [given + comma + tier for tier in TIERS if tier.startswith(last) and tier not in given.split(",")]


_TIER = Annotated[list[str] | None, Option("--tier", help=_TIER_HELP, metavar="TIERS", autocompletion=_tiers)]
_DEVICE = Annotated[Device, Option("--device", help="Where to compute; auto: on GPUs where there are any.")]
_TOKENS_HELP = "Tokens decoded after the prompt."
_TOKENS = Annotated[int, opt.number("--tokens", _TOKENS_HELP, least=0, expected="0 or more")]
_FLOAT32 = Annotated[bool, Option("--float32", help="The exact tier in float32, with a limit of 1e-5.")]
_LAYERS_HELP = "Only these layers, as in 0,1,-1 [default: all]."
_LAYERS = Annotated[str | None, Option("--layers", help=_LAYERS_HELP, metavar="LIST")]
_STREAM_HELP = "Read weights block by block, as they are used [default: when memory is short]."
_STREAM = Annotated[bool | None, Option("--stream/--no-stream", help=_STREAM_HELP)]
_SEQUENCE_HELP = "Cut the sequence between modules: reduce-scatter and all-gather."
_SEQUENCE = Annotated[bool, Option("--sequence-parallel", help=_SEQUENCE_HELP)]
_REFERENCE = Annotated[Reference, Option("--reference", help="transformers: compare with its own model as well.")]
_ENGINE_HELP = "Whose model runs; auto: transformers' own where tpshard has none."
_ENGINE = Annotated[Engine, Option("--engine", help=_ENGINE_HELP)]
_PROMPT_HELP = "A text for the model's tokenizer [default: ids by --seed]."
_PROMPT = Annotated[str | None, Option("--prompt", help=_PROMPT_HELP, metavar="TEXT")]
_SEED = Annotated[int, opt.number("--seed", "Seed of the prompt's ids.", least=0, expected="0 or more")]
_NPROC_HELP = "Processes: one for each rank, or 1 for all [default: 1; for each rank on a host with several GPUs]."
_NPROC = Annotated[int | None, opt.number("--nproc-per-node", _NPROC_HELP, expected="1 or more")]
_IDLE_HELP = "Cut tensors whose names begin so need not be run; repeatable."
_IDLE = Annotated[list[str] | None, Option("--allow-not-run", help=_IDLE_HELP, metavar="PREFIX")]
_REPORT_HELP = "Also write .json, .xml (JUnit), .md or .html; repeatable."
_REPORT = Annotated[list[Path] | None, Option("--report", help=_REPORT_HELP, metavar="FILE")]


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
    allow_not_run: _IDLE = None,
    nproc_per_node: _NPROC = None,
    revision: opt.REVISION = None,
    rules: opt.RULES = None,
    allow_pickle: opt.PICKLE = False,
    follow_symlinks: opt.FOLLOW = False,
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
                tiers=tuple(part.strip() for each in tier for part in each.split(",")) if tier else None,
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
                follow_symlinks=follow_symlinks,
                nproc=nproc_per_node,
                allow_not_run=tuple(allow_not_run or ()),
            )
            verdict = verifying.verify_with(options, console.say)
        except TpshardError as error:
            if speaks:
                _report_error(console, error, shards, reports)
                _say_error(console, error)
                verifying.has_spoken()
            elif not verifying.was_spoken_for():
                console.as_json = False
                console.error(error)
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            if speaks:
                _report_error(console, TpshardError(f"{type(error).__name__}: {error}"), shards, reports)
            raise
        if speaks:
            _print(console, verdict, shards, source, reports)
            sys.stdout.flush()
            verifying.has_spoken()
        elif verdict.exit_code:
            verifying.was_spoken_for()
    raise typer.Exit(verdict.exit_code)


def _writable(path: Path) -> Path:
    """A report's path, refused before anything is run."""
    from tpshard.verifier.report.write import check_kind

    check_kind(path)
    opt.check_report(path)
    return path


def _report_error(console: Console, error: TpshardError, shards: Path, reports: list[Path]) -> None:
    """The error in every report that was asked for; one that cannot be written does not hide the error itself."""
    from tpshard.verifier.report.write import write_error

    for path in reports:
        try:
            write_error(error, shards.name, path)
        except TpshardError as another:
            console.warn(str(another))


def _say_error(console: Console, error: TpshardError) -> None:
    if console.as_json:
        from tpshard.verifier.report.write import error_json

        console.data(error_json(error))
        console.as_json = False  # the object, which has a verdict, is out; the message on stderr is left
    console.error(error)


def _print(console: Console, verdict: Verdict, shards: Path, source: str | None, reports: list[Path]) -> None:
    from tpshard.verifier.report.wording import caught, reasons, rows
    from tpshard.verifier.report.write import write

    for path in reports:
        write(verdict, path)
    console.warn(*verdict.warnings)
    if console.as_json:
        console.data(verdict.to_json())
        return
    what = f"{verdict.shards} ({verdict.mesh_text}) against {verdict.source}"
    console.show(f"{verdict.verdict.upper()}: {what}" + (f": {verdict.reason}" if verdict.reason else ""))
    table = [("tier", "status", "figures", "worst"), *rows(verdict)]
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    for row in table:
        console.show("  ".join(cell.ljust(size) for cell, size in zip(row, [*widths, 0], strict=True)).rstrip())
    for reason in reasons(verdict):
        console.show(reason)
    if verdict.canaries:
        console.show(caught(verdict))
    if verdict.verdict == "fail":
        following = ["tpshard", "check", str(shards), "--source", source or verdict.source]
        console.say(f"next: {shlex.join(following)}")
