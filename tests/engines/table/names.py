"""Patterns of the table, from pairs of names: a tensor's, and that of the parameter which it is in.

All names are kinds: 0 stands for every number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tests.engines.table.reading import CannotSay
from tpshard.formats.engine_patterns import STACK, match
from tpshard.formats.engine_tables import EngineFamily


def pattern(kind: str, expert: int | None = None, stack: str = STACK) -> str:
    """A kind as a pattern. expert: which of its numbers is that of a stacked expert, which `stack` stands for."""
    parts = kind.split(".")
    for number, place in enumerate([place for place, part in enumerate(parts) if part == "0"]):
        parts[place] = stack if number == expert else "*"
    return ".".join(parts)


def renamed(pairs: Mapping[str, str]) -> dict[str, str]:
    """The fewest and shortest patterns that turn each name into its parameter's, and leave alone what is alike.

    A pattern is taken that is right for every name that it fits, one of a single component if it is for most; or else,
    at last, the whole name.
    """
    found: dict[str, str] = {}
    for name in sorted(pairs, key=lambda each: (each.count("."), each)):
        if EngineFamily(renamed=found).rename(name) == pairs[name]:
            continue
        if name == pairs[name]:
            found[pattern(name)] = pattern(name)
            continue
        for old, new in _beginnings(name, pairs[name]):
            tried = EngineFamily(renamed=found | {old: new})
            fits = [tried.rename(each) == pairs[each] for each in pairs if match(old, each)]
            if old not in found and (all(fits) or ("." not in old and 2 * sum(fits) > len(fits))):
                found[old] = new
                break
        else:
            found[pattern(name)] = pattern(pairs[name])
    for name, into in pairs.items():
        if EngineFamily(renamed=found).rename(name) != into:
            raise CannotSay(f"no pattern turns {name} into {into}")
    return found


def _beginnings(name: str, into: str) -> Iterable[tuple[str, str]]:
    """A name's beginnings and what each becomes, the shortest first, while what follows them is the same in both."""
    old, new = name.split("."), into.split(".")
    same = 0
    while same < min(len(old), len(new)) - 1 and old[-1 - same] == new[-1 - same]:
        same += 1
    for cut in range(same, -1, -1):
        ours, theirs = old[: len(old) - cut], new[: len(new) - cut]
        if ours.count("0") == theirs.count("0") and ours[-1] != "0":
            yield pattern(".".join(ours)), pattern(".".join(theirs))


def fused(into: str, kinds: Sequence[str], expert: int | None, stack: str = STACK) -> tuple[str, list[str]]:
    """A parameter made of several tensors, and these, as the table has them.

    expert: which number of their names is that of a stacked expert, which `stack` stands for.
    """
    target, sources = into.split("."), [kind.split(".") for kind in kinds]
    while len(target) > 1 and all(len(each) > 1 and each[-1] == target[-1] for each in sources):
        target, sources = target[:-1], [each[:-1] for each in sources]
    last = {each[-1] for each in sources}
    if len(last) == 1 and target[-1].endswith(f"_{(tail := last.pop())}"):
        target[-1] = target[-1].removesuffix(tail)
        sources = [each[:-1] for each in sources]
    patterns = [pattern(".".join(each), expert, stack) for each in sources]
    if any(each.split(".").count("*") != target.count("0") for each in patterns):
        raise CannotSay(f"{into} has other numbers than {', '.join(kinds)}")
    return pattern(".".join(target)), numbered_parts(patterns)


def numbered_parts(patterns: list[str]) -> list[str]:
    """One pattern for parts that are numbered from 0 on; any others as they are."""
    begun = patterns[0].removesuffix("_0")
    together = len(patterns) > 1 and patterns == [f"{begun}_{number}" for number in range(len(patterns))]
    return [f"{begun}_{STACK}"] if together else patterns


def shortened(value: object, layer: str) -> object:
    """Part of an entry with `layer` left out before patterns."""
    if isinstance(value, dict):
        return {shortened(layer=layer, value=key): shortened(each, layer) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(each, layer) for each in value]
    return value.removeprefix(layer) if isinstance(value, str) and value.startswith(f"{layer}.") else value
