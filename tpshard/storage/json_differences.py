"""Two JSON documents compared key by key."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_LENGTH = 60
"""Characters of a value that are shown."""


class KeyDifference(NamedTuple):
    """A key with other values on the two sides; the texts are JSON, or None where a side lacks the key."""

    key: str
    expected: str | None
    found: str | None

    def __str__(self) -> str:
        found, expected = (
            "absent" if text is None else text if len(text) <= _LENGTH else f"{text[:_LENGTH]}…"
            for text in (self.found, self.expected)
        )
        return f"{self.key} is {found}, not {expected}"


def key_differences(expected: Mapping[str, Any], found: Mapping[str, Any], above: str = "") -> Iterator[KeyDifference]:
    """Every key whose values differ, with its path; 1, 1.0 and true are three values."""
    for key in sorted(expected.keys() | found.keys()):
        inner, other = expected.get(key), found.get(key)
        if isinstance(inner, Mapping) and isinstance(other, Mapping):
            yield from key_differences(inner, other, f"{above}{key}.")
            continue
        texts = [_text(side[key]) if key in side else None for side in (expected, found)]
        if texts[0] != texts[1]:
            yield KeyDifference(f"{above}{key}", *texts)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
