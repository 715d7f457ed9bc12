"""The entry of a model that nests a text model: whose names the text has, and what vLLM has of the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from typing import Any

import numpy as np

from tests.engines.table.coded import ONE, Numbers
from tests.engines.table.findings import Findings, layer_pattern
from tests.engines.table.known import OfEntry, differences
from tests.engines.table.names import fused, pattern
from tests.engines.table.reading import CannotSay, Reading, kind_of
from tpshard.errors import TpshardError
from tpshard.formats.engine_nested import is_text
from tpshard.formats.engine_tables import SCALES, EngineFamily
from tpshard.rules.architecture import builtin
from tpshard.storage.tensor_names import numbered

_HEADS = ("num_heads", "num_attention_heads", "encoder_attention_heads", "vt_num_attention_heads")
_ATTENTION = ("attn", "attention", "wqkv", "wo")


@dataclass
class Beside:
    """What is beside the text. cuts: how each name is cut, "" for whole. behind: layers, where some are left out.

    or_whole: whether what is cut at some widths is whole at others.
    """

    begins: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    fused: dict[str, list[str]] = field(default_factory=dict)
    cuts: dict[str, str] = field(default_factory=dict)
    unplaced: dict[str, str] = field(default_factory=dict)
    ones: dict[str, str] = field(default_factory=dict)
    place: str = ""
    behind: str = ""
    or_whole: bool = False
    problems: list[str] = field(default_factory=list)


def in_text(reading: Reading, tensor: str) -> bool:
    """Whether a tensor is the text's: not where vLLM has it beside all that the text's layers are below."""
    model, into = reading.model, reading.parameter_of.get(tensor)
    of_rules = not model.architecture["text"]["replicated"]  # which are for all of it
    if into is None and of_rules:
        into = reading.parameter_of[max(reading.parameter_of, key=lambda each: len(commonprefix([each, tensor])))]
    if not is_text(model, tensor) or into is None or model.layers is None:
        return is_text(model, tensor)
    within = model.layers.within
    layered = (each for each in reading.parameter_of if f" {each} {model.full_name(each)}".count(f" {within}"))
    first = next(layered, None)
    root = reading.parameter_of[first].split(".")[0] if first else "model"
    own = builtin(str(model.architecture["text"]["model_type"])).tied if of_rules else {}
    heads = {head.split(".")[0] for head in own}
    return (root == "model" and not of_rules) or into.split(".")[0] in {root, *heads}


def text_alone(reading: Reading, prefix: str) -> Reading:
    """What was read of the text model, under its own names. prefix: how vLLM's begin."""
    model = reading.model
    texts = [tensor for tensor in model.tensors if in_text(reading, tensor.name)]
    names = {tensor.name: model.full_name(tensor.name) for tensor in texts}
    tied = {head.rpartition(".")[2]: names[f"{to}.weight"].removesuffix(".weight") for head, to in model.tied.items()}
    own = replace(model, tensors=tuple(texts), full_names=names, tied=tied, config=model.text_config or model.config)
    others = {tensor for tensor in reading.parameter_of if not in_text(reading, tensor)}
    theirs = {reading.parameter_of[tensor] for tensor in others}
    ranks = [
        {
            name.removeprefix(prefix): held
            for name, held in rank.items()
            if name not in theirs
            and name.startswith(prefix)
            and (prefix or name in reading.recipes or name.rpartition(".")[2] in SCALES)
        }
        for rank in reading.ranks
    ]
    return replace(reading, model=own, ranks=ranks)


def prefixes(reading: Reading) -> list[str]:
    """How vLLM's names of the text may begin: with what all of them begin with, the longest first."""
    held = [into.split(".") for tensor, into in reading.parameter_of.items() if in_text(reading, tensor)]
    first, last = min(held), max(held)
    same = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    return ["".join(f"{part}." for part in first[:size]) for size in range(same, -1, -1)]


def text_findings(readings: list[Reading], prefix: str, head: str) -> tuple[Findings, list[Reading]]:
    """What the text models say together."""
    alone = [text_alone(each, prefix) for each in readings]
    found = Findings(layer_pattern(alone[0]), head)
    for each in alone:
        found.add(each)
    return found, alone


def like(alone: list[Reading], families: Mapping[str, EngineFamily], own: str) -> list[str]:
    """The types of the table whose families give what the ranks hold of a text model, the one of its own name first."""
    same = [model_type for model_type, family in families.items() if all(_gives(family, each) for each in alone)]
    return sorted(same, key=lambda each: (-_alike(each, own), each))


def _gives(family: EngineFamily, alone: Reading) -> bool:
    try:
        return next(differences(alone, OfEntry(family)), None) is None
    except (TpshardError, AssertionError, LookupError, ValueError):  # of words that are for models of another kind
        return False


def _alike(one: str, other: str) -> float:
    """How many of the words of two types' names are in both."""
    a, b = (set(each.removesuffix("_text").split("_")) for each in (one, other))
    return len(a & b) / len(a | b)


def beside(readings: Iterable[Reading]) -> Beside:
    """What vLLM has of the tensors that are not the text's."""
    found = Beside()
    for reading in readings:
        model = reading.model
        names = [tensor.name for tensor in model.tensors if not in_text(reading, tensor.name)]
        pairs, parts = _apart(reading, names)
        of_rules = [name for name in names if is_text(model, name)]  # that the text's rules have
        found.begins = begins(pairs, found.begins)
        same = {name.split(".")[0] for name in of_rules if begin(found.begins, name) == name}
        found.begins |= {first: first for first in same}
        begun = {name: begin(found.begins, name) for name in names}
        found.renamed |= {pattern(kind_of(begun[a])): pattern(kind_of(b)) for a, b in pairs.items() if begun[a] != b}
        for into, sources in parts.items():
            try:
                target, patterns = fused(kind_of(into), [kind_of(begun[each]) for each in sources], None)
            except CannotSay as problem:
                found.problems.append(str(problem))
                continue
            if found.fused.setdefault(target, patterns) != patterns:
                found.problems.append(
                    f"{into} is made of {', '.join(patterns)} in some layers, and of others in others"
                )
        found.ones |= dict(_ones(reading, names))
        placed = {kind_of(begun[name]) for name in names if name in reading.parameter_of}
        for name in names:
            kind = kind_of(begun[name])
            if name in reading.parameter_of:
                how = cut_of(reading, name)
                if how is None:
                    what = f"no cut of the table gives what the ranks of tp {reading.tp} have of it"
                    found.problems.append(f"{name}: {what}")
                elif (known := found.cuts.setdefault(begun[name], how)) != how:
                    if known and how:
                        found.problems.append(f"{name} is cut in one way and another")
                    found.or_whole, found.cuts[begun[name]] = True, known or how
            elif kind in placed:
                found.behind = pattern(kind[: f"{kind}.".index(".0.") + 2])
            else:
                found.unplaced[pattern(kind)] = "vLLM's class has no place for it"
    layered = {kind.split(".")[0] for kind in map(kind_of, found.cuts) if "0" in kind.split(".")}
    found.place = next((each for each in sorted(layered, key=lambda each: ("vis" not in each, each))), "")
    return found


def _ones(reading: Reading, names: list[str]) -> Iterator[tuple[str, str]]:
    """Parameters beside the text that are ones of the class, and one in the same layer of the same shape and dtype."""
    held, parameters = reading.ranks[0], {reading.parameter_of[each] for each in names if each in reading.parameter_of}
    roots = {each.split(".")[0] for each in parameters}
    for name, constant in reading.constants.items():
        if constant == ONE and name.split(".")[0] in roots and name.rpartition(".")[2] not in SCALES:
            layer, like = numbered(name)[1], (held[name].numbers.shape, held[name].dtype)
            same = (each for each in parameters if numbered(each)[1] == layer)
            beside = (each for each in same if (held[each].numbers.shape, held[each].dtype) == like)
            if one := min(beside, default=""):
                yield pattern(kind_of(name)), pattern(kind_of(one))


def _apart(reading: Reading, names: list[str]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Tensors that are a parameter each, and parameters that are made of several."""
    pairs, parts = {}, {}
    for into, recipe in reading.recipes.items():
        of = recipe.groups[0]
        if of[0] in names:
            if len(recipe.groups) == len(of) == 1:
                pairs[of[0]] = into
            else:
                parts[into] = of
    return pairs, parts


def begin(begins_: Mapping[str, str], name: str) -> str:
    """A name with its beginning as vLLM has it, as `formats/engine_nested` does it."""
    for old, new in begins_.items():
        if name == old or name.startswith(f"{old}."):
            name = new + name.removeprefix(old)
    return name


def begins(pairs: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """The shortest beginnings that turn each name into its parameter's."""
    found = dict(known)
    for name in sorted(pairs, key=lambda each: (each.count("."), each)):
        if begin(found, name) == pairs[name]:
            continue
        old, new = name.split("."), pairs[name].split(".")
        same = 0
        while same < min(len(old), len(new)) - 1 and old[-1 - same] == new[-1 - same]:
            same += 1
        for cut in range(same, -1, -1):
            tried = found | {".".join(old[: len(old) - cut]): ".".join(new[: len(new) - cut])}
            tried = dict(sorted(tried.items(), key=lambda each: -each[0].count(".")))
            if all(begin(tried, each) == pairs[each] or begin(found, each) != pairs[each] for each in pairs) and (
                begin(tried, name) == pairs[name]
            ):
                found = tried
                break
    return found


def cut_of(reading: Reading, name: str) -> str | None:
    """How the ranks share a tensor: "" where each has it whole, None where no words say it."""
    shape, blocks, tp = reading.coded.shapes[name], reading.blocks[name], reading.tp
    whole = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
    if all(_same(whole, block) for block in blocks):
        return ""
    for how, segments, dim in (("column", 1, 0), ("row", 1, 1), ("thirds", 3, 0), ("halves", 2, 0)):
        if dim < len(shape) and shape[dim] % (segments * tp) == 0:
            parts = [np.split(part, tp, dim) for part in np.split(whole, segments, dim)]
            if all(_same(np.concatenate([each[rank] for each in parts], dim), b) for rank, b in enumerate(blocks)):
                return how
    return None


def _same(a: Numbers, b: Numbers) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def axes(found: Beside, vision: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The axes that cuts are along: one for the attention, one for each module else in which something is cut.

    That attention is counted by heads is taken from names: what is loaded does not show where heads end. vision: the
    config of what is at the place.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for module, how in _modules(found.cuts).items():
        parents = module.split(".")
        attends = set(parents) & set(_ATTENTION) or any("attn" in each for each in parents)
        own = "vision" if module.startswith(f"{found.place}.") else parents[0]
        inner = [part for part in parents[1:-1] if part not in ("*", "layers", "blocks")]
        inner = f"{own} heads" if attends else " ".join([own, *inner[-1:], "features"])
        groups.setdefault(inner, {}).setdefault(how, []).append(module)
    heads = next((key for key in _HEADS if key in vision), "")
    for name, cut in sorted(groups.items(), key=lambda each: not each[0].endswith("heads")):
        count = {"count": heads, "default": vision[heads]} if name == "vision heads" and heads else {}
        yield {"name": name, **count, **cut}


def _modules(cuts: Mapping[str, str]) -> dict[str, str]:
    """The modules that are cut, as patterns; where modules of other numbers are cut otherwise, the last one stands."""
    kinds: dict[str, set[str]] = {}
    for name, how in cuts.items():
        kinds.setdefault(kind_of(name), set()).add(how)
    found: dict[str, str] = {}
    for name, how in sorted(cuts.items()):
        starred = pattern(kind_of(name))
        if len(kinds[kind_of(name)]) > 1:
            parts, stars = name.split("."), starred.split(".")
            last = max(place for place, part in enumerate(stars) if part == "*")
            starred = ".".join([*stars[:last], parts[last], *stars[last + 1 :]])
        if how and not (how == "row" and starred.endswith(".bias")):
            found[starred.removesuffix(".weight").removesuffix(".bias")] = how
    return found
