"""The commands `archs`, `archs list`, `archs show` and `archs draft`."""

import shlex
from dataclasses import asdict
from typing import Annotated

import typer

from tpshard.cli import options as opt
from tpshard.cli.console import opened
from tpshard.cli.options import again

app = typer.Typer(rich_markup_mode=None)
_LINE = "{:<20} {:<12} {:<20} {:<10} {:<20} {}"
_NESTING = "{:<20} {:<11} {:<10} {:<24} {}"


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
    """List architectures, and who runs and loads them.

    Where verify says "bytes", there is remote code alone: files are compared, nothing is run. What is not listed splits
    with rules of your own: `tpshard archs draft`. Quantised checkpoints of all of them split; named are the engines'
    formats of which a quantised one was compared with what the engine holds. Behind an engine's version stands "read"
    where its names were read in its sources and nothing was run.
    """
    with opened(json, quiet) as console:
        from tpshard.api.archs import nesting, rows, supported, versions_text

        if console.as_json:
            entries = [
                {
                    "name": name,
                    "model_types": [each.model_type for each in types],
                    "supported": list(map(asdict, types)),
                }
                for name, types in supported().items()
            ]
            nested = list(map(asdict, nesting()))
            console.data({"schema_version": 1, "command": "archs", "architectures": entries, "nesting": nested})
        else:
            heads = "architecture", "verify", "engines", "versions", "quantised", "model_types"
            console.show(_LINE.format(*heads))
            for name, verify, engines, versions, quantised, those in rows():
                lists = " ".join(engines) or "-", versions or "-", " ".join(quantised) or "-", ", ".join(those)
                console.show(_LINE.format(name, verify, *lists))
            console.show("", _NESTING.format("nests a text model", "engines", "versions", "quantised", "text models"))
            for each in nesting():
                named = " ".join(each.engines), versions_text(each.versions), " ".join(each.quantised) or "-"
                console.show(_NESTING.format(each.model_type, *named, ", ".join(each.texts)))


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
