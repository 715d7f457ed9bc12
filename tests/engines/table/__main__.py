"""`python -m tests.engines.table NAME_OR_DIRECTORY ...`: an entry of vLLM's table, read off vLLM.

A name is a type of which `engine_models.py`, `engine_nested.py` or `engine_newest.py` have checkpoints: all are read. A
directory is a small checkpoint of a type that tpshard has rules for, as its publisher names the tensors; several of one
type (with biases and without, dense and with experts) make one entry. With `--known` nothing is written: the files of
the table are held against what is read.
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
from tests.engines.table.entry import Entry, read_entry, text_of
from tests.engines.table.reading import Checkpoint
from tests.helpers import mistral_form
from tpshard.errors import TpshardError
from tpshard.formats.engine_config import named_as
from tpshard.formats.engine_tables import load_table
from tpshard.formats.vllm import FORMAT

OWN_FORM = "mistral_native"
"""The type of what is published with params.json in place of config.json: `mistral_form.py` has checkpoints of it."""


def main() -> int:
    """Read, and print. 1 where something cannot be said, or with --known is not what the table says."""
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
            for named, each in by_class(list(checkpoints(model, place / "made"))).items():
                found = read_entry(each, loader, place / "read" / named, named)
                failed += report(found, given.known, quiet=given.quiet)
        loader.end()
    return min(failed, 1)


def types() -> list[str]:
    """The types of the table of which the tests have checkpoints."""
    own = {**engine_models.LOADED, **engine_models.UNREAD}
    made = {**own, **{name: engine_nested.made_as(name) for name in engine_nested.LOADED}}
    newest = (name.partition("-")[0] for name in engine_newest.LOADED)
    return list(dict.fromkeys((*(model_type for model_type, _ in made.values()), *newest, OWN_FORM)))


def checkpoints(model: str, scratch: Path) -> Iterator[Checkpoint]:
    """The checkpoints that are given by a type's name or a directory."""
    if Path(model).is_dir():
        yield Checkpoint.at(model, Path(model))
        return
    if model == OWN_FORM:
        for name, (kind, params) in mistral_form.FOR_ENGINES.items():
            yield Checkpoint.at(name, mistral_form.published(scratch / name, kind, **params))
        return
    newest = [name for name in {**engine_newest.LOADED, **engine_newest.LATER} if name.partition("-")[0] == model]
    for name in newest:
        yield Checkpoint.at(name, engine_newest.make(name, scratch / name))
    names = {**engine_models.LOADED, **engine_models.REFUSED, **engine_models.UNREAD}
    of_type = [name for name, (model_type, _) in names.items() if model_type == model]
    nested = [name for name in engine_nested.LOADED if engine_nested.made_as(name)[0] == model]
    for name in nested:
        yield Checkpoint.at(name, engine_nested.make(name, scratch / name))
    if not of_type and not nested and not newest:
        sys.exit(f"{model} is no directory, and engine_models.py has no checkpoint of such a type")
    for name in of_type:
        yield Checkpoint.at(name, engine_models.make(name, scratch / name))


def by_class(made: list[Checkpoint]) -> dict[str, list[Checkpoint]]:
    """Checkpoints by the type whose names they have: of a type with several classes, that of their class."""
    table, found = load_table(FORMAT.path, engine_version()), dict[str, list[Checkpoint]]()
    for each in made:
        named = named_as(FORMAT.engine, table, str(each.config["model_type"]), each.config)
        found.setdefault(named, []).append(each)
    return found


def report(found: Entry, compare: bool, *, quiet: bool = False) -> int:
    """Print an entry, or in what the table's files are not what was read; how many things there are to look at.

    quiet: of a type that agrees, not what vLLM did not load, nor what the table refuses.
    """
    problems = [f"cannot say: {each}" for each in found.problems]
    notes = [f"does not load: {each}" for each in found.not_loaded]
    if compare:
        differ, refused = _differences(found) if found.readings else (["vLLM loads none of the checkpoints"], [])
        equal = "not equal" if differ else "equal but for" if problems else "equal"
        print(f"{found.model_type}: {equal}", flush=True)
        for line in [*differ, *problems, *([] if quiet and not differ else [*notes, *refused])]:
            print(f"  {line}", flush=True)
        return len(differ)
    print(text_of(found))
    for line in [*problems, *notes]:
        print(f"# {line}")
    return len(problems)


def _differences(found: Entry) -> tuple[list[str], list[str]]:
    """Where the table gives other files than what was read, and which checkpoints it refuses."""
    version = engine_version()
    differ, refused = [], []
    compared = 0
    for reading in (*found.readings, *found.untied):
        try:
            differ += known.differences(reading, FORMAT, version)
            compared += 1
        except TpshardError as error:
            if not any(reading is each for each in found.untied):
                refused.append(f"the table refuses {reading.name}: {error}")
    if not compared:
        differ.append("the table refuses all that vLLM loads")
    table = load_table(FORMAT.path, version)
    if found.in_stages and found.model_type in table.pipelines:
        read, said = found.family.every_stage, table.families[found.model_type].every_stage
        differ += [f"every_stage: read {read}, known {said}"] if sorted(read) != sorted(said) else []
    return list(dict.fromkeys(differ)), list(dict.fromkeys(refused))


if __name__ == "__main__":
    sys.exit(main())
