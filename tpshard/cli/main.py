"""The command line: the app, its commands in the order of `--help`, and what becomes of errors. No logic lives here."""

import io
import os
import sys
from functools import cache
from typing import Annotated, Any

import typer

from tpshard import __version__
from tpshard.cli.advise import advise, env
from tpshard.cli.archs import app as archs_app
from tpshard.cli.check import check, inspect
from tpshard.cli.console import Console
from tpshard.cli.convert import merge, plan, reshard, split
from tpshard.cli.schema import schema
from tpshard.cli.verify import verify
from tpshard.errors import Interrupted, TpshardError, UsageError, local_error

app = typer.Typer(
    name="tpshard",
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
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
for command in (plan, split, merge, reshard, check, inspect, verify, advise, env, schema):
    app.command()(command)
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


@cache
def _command() -> Any:
    """What typer makes of the app, once: a test that calls `main` a thousand times waits for it once."""
    return typer.main.get_command(app)


def main(arguments: list[str] | None = None) -> None:
    """The `tpshard` command. Exits with the documented codes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold bytes that are not text
    try:
        code = _command()(args=arguments, standalone_mode=False)
    except TpshardError as error:
        meant = error
    except OSError as error:
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
