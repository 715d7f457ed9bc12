"""The commands `archs`, `archs list`, `archs show` and `archs draft`."""

import shlex
from typing import Annotated

import typer

from tpshard.cli import options as opt
from tpshard.cli.console import opened
from tpshard.cli.options import again

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def archs(context: typer.Context, json: opt.JSON = False, quiet: opt.QUIET = False) -> None:
    """List architectures, print the rules of one, or draft new ones.

    \b
      tpshard archs
      tpshard archs show llama
      tpshard archs draft MODEL -o mine.toml
    """
    if context.invoked_subcommand is None:
        list_all(json, quiet)


@app.command("list")
def list_all(json: opt.JSON = False, quiet: opt.QUIET = False) -> None:
    """List the built-in architectures and their model_types."""
    with opened(json, quiet) as console:
        from tpshard.api.archs import model_types

        found = model_types()
        if console.as_json:
            entries = [{"name": name, "model_types": list(types)} for name, types in found.items()]
            console.data({"schema_version": 1, "command": "archs", "architectures": entries})
        else:
            for name, types in found.items():
                console.show(f"{name:<14} {', '.join(types)}")


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Name or model_type.", metavar="NAME", autocompletion=opt.architectures)],
    json: opt.JSON = False,
    quiet: opt.QUIET = False,
) -> None:
    """Print the rules of one architecture: the form that --rules takes."""
    with opened(json, quiet) as console:
        from tpshard.api.archs import rules_of

        architecture = rules_of(name)
        if console.as_json:
            text = {"name": architecture.name, "sha256": architecture.digest, "text": architecture.text}
            console.data({"schema_version": 1, "command": "archs", **text})
        else:
            console.show(*architecture.text.splitlines())


@app.command("draft")
def draft(
    model: opt.MODEL,
    out: opt.DRAFT_OUT = None,
    revision: opt.REVISION = None,
    allow_pickle: opt.PICKLE = False,
    follow_symlinks: opt.FOLLOW = False,
    json: opt.JSON = False,
    quiet: opt.QUIET = False,
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
        from tpshard.api.archs import draft as make
        from tpshard.api.archs import save

        made = make(model, revision, allow_pickle=allow_pickle, follow_symlinks=follow_symlinks)
        if out is not None:
            save(made, out)
        if console.as_json:
            console.data(made.to_json() | {"output": None if out is None else str(out)})
        else:
            console.show(*made.text.splitlines()) if out is None else console.path(out)
        console.say(f"closest: {made.closest}, with {made.share:.0%} of the modules in common")
        if made.undecided:
            console.warn(f"undecided modules: {len(made.undecided)}; the rules are refused until they are complete")
        elif made.refusal:
            console.warn(f"the rules are refused as they stand: {made.refusal}")
        following = ["tpshard", "plan", model, "--tp", "2", "--rules", str(out or "FILE")]
        console.say(
            f"next: read it, then {shlex.join([*following, *again(revision, follow_symlinks=follow_symlinks)])}"
        )
