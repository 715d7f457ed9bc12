"""Holds JSON against the schemas that tpshard ships, with another library's validator."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator, ValidationError

from tpshard.report.schema import schema


@cache
def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(schema(name))


def name_of(found: dict[str, Any]) -> str:
    """The schema that an object on stdout must have."""
    if "command" not in found:
        return "error"
    if found["command"] == "archs" and "text" in found:
        return "archs-draft" if "closest" in found else "archs-show"
    return str(found["command"])


def conforms(found: Any, name: str) -> None:
    """AssertionError that names each place where an object is not what its schema says."""
    places = [place for error in validator(name).iter_errors(found) for place in leaves(error)]
    wrong = [f"{place.json_path}: {place.message[:300]}" for place in places]
    assert not wrong, f"{name}: " + "\n".join(wrong)


def leaves(error: ValidationError) -> Iterator[ValidationError]:
    """What is wrong, of an object that may have one of several forms: in each of them."""
    if not error.context:
        yield error
    for inner in error.context or ():
        yield from leaves(inner)
