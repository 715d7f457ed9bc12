"""The command `schema`: prints the schemas of all JSON that tpshard prints and writes."""

from typing import Annotated

import typer

from tpshard.cli import options as opt
from tpshard.cli.console import opened

_NAME = Annotated[
    str | None,
    typer.Argument(help="A command, `error`, `manifest` or `record`; without it the names are listed.", metavar="NAME"),
]


def schema(name: _NAME = None, json: opt.JSON = False, quiet: opt.QUIET = False) -> None:
    """Print the JSON Schema of a command's --json, or of a file.

    The files are those that split writes: tpshard.json (manifest) and the ranks' records. A schema is JSON with and
    without --json.

    \b
      tpshard schema
      tpshard schema plan > plan.schema.json
      tpshard schema manifest
    """
    with opened(json, quiet) as console:
        from tpshard.report import schema as known
        from tpshard.report.results import SCHEMA_VERSION

        if name is not None:
            console.data(known.schema(name))
        elif json:
            console.data({"schema_version": SCHEMA_VERSION, "command": "schema", "schemas": known.names()})
        else:
            print(*known.names(), sep="\n")
