"""Entries as text, as the tables are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

WIDTH = 120


def as_toml(name: str, entry: Mapping[str, Any], *, room: str = "families") -> str:
    """An entry of the table: values first, then its tables."""
    head = f"{room}.{name}"
    plain = {key: value for key, value in entry.items() if not isinstance(value, dict)}
    lines = [f"[{head}]", *(f"{key} = {_value(key, value)}" for key, value in plain.items())]
    for key, table in entry.items():
        if isinstance(table, dict):
            lines += [
                "",
                f"[{head}.{key}]",
                *(f"{_quoted(each)} = {_value(each, value)}" for each, value in table.items()),
            ]
    return "\n".join(lines)


def _quoted(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)


def _value(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_quoted(each)} = {json.dumps(inner)}" for each, inner in value.items()) + " }"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "\n".join(["[", *(f"    {_value(key, each)}," for each in value), "]"])
    if not isinstance(value, list | tuple):
        return json.dumps(value)
    line = f"[{', '.join(map(json.dumps, value))}]"
    if len(key) + len(line) + 5 <= WIDTH:
        return line
    return "\n".join(["[", *(f"    {json.dumps(each)}," for each in value), "]"])
