"""Entries of an engine's table as they stand in its file: what one takes over from others, and what versions change."""

from collections.abc import Mapping
from typing import Any


def as_of(data: Mapping[str, Any], version: str | None) -> dict[str, Any]:
    """A parsed file as it is for a version: `[later."VERSION"]` over what is said of the first one, key by key."""
    return _over(data, data.get("later", {}).get(version, {}))


def _over(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    changed = {key: _over(ours.get(key, {}), each) if isinstance(each, dict) else each for key, each in theirs.items()}
    return {**ours, **changed}


def below(place: str, value: Any) -> Any:
    """Part of a table with a place before every pattern that begins with a dot; its lists as tuples."""
    if isinstance(value, dict):
        return {below(place, key): below(place, each) for key, each in value.items()}
    if isinstance(value, list):
        return tuple(below(place, each) for each in value)
    return place + value if isinstance(value, str) and value.startswith(".") else value


def merged(entries: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """A family's keys over those that it is like, each over the one before; tables key by key."""
    entry = entries[name]
    like = entry.get("like", [])
    own = {key: value for key, value in entry.items() if key not in ("like", "model_types")}
    found: dict[str, Any] = {}
    for each in (*(merged(entries, other) for other in ([like] if isinstance(like, str) else like)), own):
        for key, value in each.items():
            found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
    return found
