"""`python -m tests.engines.table NAME_OR_DIRECTORY ...`: an entry of vLLM's table, read off vLLM.

A name is one of `engine_newest.py`, or a type of `engine_models.py`, all checkpoints of which are read. A directory is
a small checkpoint of a type that tpshard has rules for, as its publisher names the tensors; several of one type (with
biases and without, dense and with experts) make one entry. With `--known` nothing is written: what is read is held
against the table.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.engines import engine_models, engine_nested, engine_newest
from tests.engines.running import Loader, engine_version
from tests.engines.table import known
from tests.engines.table.entry import Entry, read_entry
from tests.engines.table.reading import Checkpoint
from tests.engines.table.toml import as_toml
from tpshard.formats.engine_tables import load_table
from tpshard.formats.vllm import FORMAT


def main() -> int:
    """Read, and print. 1 where something cannot be said, or is not what the table says."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines.table", description=__doc__)
    parser.add_argument("models", nargs="*", help="types of engine_models.py, or directories")
    parser.add_argument("--known", action="store_true", help="compare with the table; without models, all its types")
    parser.add_argument("--quiet", action="store_true", help="of types that agree with the table, a line each")
    given = parser.parse_args()
    os.environ.setdefault("ENGINE_PYTHON", ".venv-engines/bin/python")
    models = given.models or (types() if given.known else parser.error("which models?"))
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        loader = Loader(Path(scratch) / "log")
        for number, model in enumerate(models):
            place = Path(scratch) / str(number)
            found = read_entry(list(checkpoints(model, place / "made")), loader, place)
            failed += report(found, given.known, quiet=given.quiet)
        loader.end()
    return min(failed, 1)


def types() -> list[str]:
    """The types of the table of which the tests have checkpoints."""
    made = {**engine_models.LOADED, **{name: engine_nested.made_as(name) for name in engine_nested.LOADED}}
    return list(dict.fromkeys(model_type for model_type, _ in made.values()))


def checkpoints(model: str, scratch: Path) -> Iterator[Checkpoint]:
    """The checkpoints that are given by a type's name or a directory."""
    if Path(model).is_dir():
        yield Checkpoint.at(model, Path(model))
        return
    if model in engine_newest.LOADED or model in engine_newest.LATER:
        yield Checkpoint.at(model, engine_newest.make(model, scratch / model))
        return
    names = {**engine_models.LOADED, **engine_models.REFUSED, **engine_models.UNREAD}
    of_type = [name for name, (model_type, _) in names.items() if model_type == model]
    nested = [name for name in engine_nested.LOADED if engine_nested.made_as(name)[0] == model]
    for name in nested:
        yield Checkpoint.at(name, engine_nested.make(name, scratch / name))
    if not of_type and not nested:
        sys.exit(f"{model} is no directory, and engine_models.py has no checkpoint of such a type")
    for name in of_type:
        yield Checkpoint.at(name, engine_models.make(name, scratch / name))


def report(found: Entry, compare: bool, *, quiet: bool = False) -> int:
    """Print an entry, or what it says otherwise than the table; how many things there are to look at.

    quiet: of a type that agrees, not what vLLM did not load.
    """
    problems = [f"cannot say: {each}" for each in found.problems]
    notes = [f"does not load: {each}" for each in found.not_loaded]
    if compare:
        differ = list(_differences(found)) if found.readings else []
        print(f"{found.model_type}: {'equal' if not (differ or problems) else 'not equal'}", flush=True)
        problems += differ
        for line in [*problems, *([] if quiet and not problems else notes)]:
            print(f"  {line}", flush=True)
        return len(problems)
    print(text_of(found))
    for line in [*problems, *notes]:
        print(f"# {line}")
    return len(problems)


def text_of(found: Entry) -> str:
    """An entry as it stands in the tables."""
    if not found.nested:
        return as_toml(found.model_type, found.entry)
    parts = [as_toml(name, tower, room="towers") for name, tower in found.towers.items()]
    parts.append(as_toml(found.model_type, found.nested, room="nested"))
    for text, entry in found.texts.items():
        same = found.like[text]
        parts.append(f"# {text} has the names of {', '.join(same)}" if same else as_toml(text, entry))
    return "\n\n".join(parts)


def _differences(found: Entry) -> Iterator[str]:
    """Where an entry says other things than the table."""
    table = load_table(FORMAT.path, engine_version())
    if found.nested:
        if kind := FORMAT.nested.get(found.model_type):
            read = known.parsed_nested(text_of(found), found.model_type)
            yield from known.nested_differences(read, kind, found.like, table.families, found.readings)
        else:
            yield "the table has no such type"
    elif family := table.families.get(found.model_type):
        stages = found.model_type in table.pipelines
        yield from known.differences(found.family, family, found.readings, stages=stages)
    else:
        yield "the table has no such type"


if __name__ == "__main__":
    sys.exit(main())
