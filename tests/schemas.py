"""Holds JSON against the schemas that tpshard ships, with another library's validator."""

from __future__ import annotations

from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

from tpshard.schema import schema


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
    wrong = [f"{error.json_path}: {error.message[:300]}" for error in validator(name).iter_errors(found)]
    assert not wrong, f"{name}: " + "\n".join(wrong)
