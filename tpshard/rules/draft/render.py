"""The verb behind `tpshard archs draft`: a sketch of rules as a file, and what classification says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpshard.errors import TpshardError, UnsupportedError
from tpshard.rules.architecture import Architecture, parse_architecture
from tpshard.rules.classify import classify
from tpshard.rules.draft.infer import Choice, Sketch, draft_modules, sketch
from tpshard.rules.draft.known import Definition, Module, base, counts
from tpshard.storage.safetensors import TensorInfo

_MOST = 6
"""Candidates that are named for a module."""


@dataclass(frozen=True)
class Draft:
    """A draft of rules. refusal: why it cannot be used as it stands; None when every tensor has a rule."""

    model_type: str
    closest: str
    share: float
    text: str
    undecided: tuple[Choice, ...]
    refusal: str | None

    def to_json(self) -> dict[str, Any]:
        """The result object of the JSON contract."""
        return {
            "schema_version": 1,
            "command": "archs",
            "model_type": self.model_type,
            "closest": self.closest,
            "share": round(self.share, 3),
            "undecided": [
                {"module": c.module.name, "shapes": _shapes(c.module), "candidates": list(c.candidates[:_MOST])}
                for c in self.undecided
            ],
            "refusal": self.refusal,
            "text": self.text,
        }


def make(config: Mapping[str, Any], tensors: Sequence[TensorInfo], architectures: Sequence[Architecture]) -> Draft:
    """Draft rules for one config and its tensors, by comparison with these architectures."""
    found = draft_modules(tensors)
    made = sketch(config, found, architectures)
    text = _render(config, made, found, sorted(architectures, key=lambda a: made.families.index(a.name)))
    refusal = None
    try:
        classify(parse_architecture(text, "draft.toml"), config, tensors)
    except TpshardError as error:
        refusal = str(error)
    return Draft(str(config["model_type"]), made.families[0], made.closest, text, tuple(made.undecided), refusal)


def decoder_tensors(config: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """The tensors of a nested text model, named as those of an ordinary one; it is where the embedding is."""
    shape = (config.get("vocab_size"), config.get("hidden_size"))
    tables = [tensor.name for tensor in tensors if tensor.shape == shape and "." in tensor.name]
    places = {name.rpartition(".")[0].rpartition(".")[0] + "." for name in tables}
    held = [place for place in places if sum(tensor.name.startswith(place) for tensor in tensors) > len(tables)]
    inside = [place for place in held if not any(other != place and other.startswith(place) for other in held)]
    if len(inside) != 1:
        raise UnsupportedError(
            "where the text model lies is not plain: no place, or several, have an embedding and layers",
            expected=f"one embedding of shape {list(shape)} beside the layers",
            found=", ".join(sorted(tables)) or "none",
            hint="write rules for the text model by hand, in the form of `tpshard archs show llama`",
        )
    found = []
    for tensor in tensors:
        if tensor.name.startswith(inside[0]):
            found.append(replace(tensor, name="model." + tensor.name[len(inside[0]) :]))
        elif tensor.name in tables:
            found.append(replace(tensor, name=".".join(tensor.name.split(".")[-2:])))
    return found


def _render(
    config: Mapping[str, Any], made: Sketch, found: Sequence[Module], architectures: Sequence[Architecture]
) -> str:
    closest = architectures[0]
    axes = _axes(made.choices)
    lines = [
        f"# A draft of rules for {config['model_type']}, made by comparing names and shapes with known architectures.",
        f"# Closest: {closest.name}, with {made.closest:.0%} of the modules in common.",
        "# Read every line. `tpshard plan` and `split` take the file with --rules; `tpshard verify` proves the result.",
    ]
    if made.undecided:
        lines.append(
            f"# UNDECIDED modules below: {len(made.undecided)}. Until each is under a rule, the model is refused."
        )
    lines.append(f"model_types = [{_quoted(str(config['model_type']))}]")
    if prefix := base(made.stem):
        lines.append(f"prefix = {_quoted(prefix)}")
    inside = [module for module in found if made.stem and module.name.startswith(f"{made.stem}*.")]
    layers = 1 + max((max(module.numbers) for module in inside), default=-1)
    lines.append(_count("layers", config, layers, architectures))
    if experts := 1 + max((max(module.experts) for module in inside if module.experts), default=-1):
        line = _count("experts", config, experts, architectures)
        needed = any(choice.rule and choice.module.experts for choice in made.choices)
        lines += [line] if needed or not line.startswith("#") else []
    lines += _tied(config, made, closest)
    lines += ["", "[axes]", *(_axis(name, axis, axes) for name, axis in axes.items()), "", "[rules]"]
    for rule, choices in _by_rule(made.choices, axes).items():
        names = [_pattern(choice, layers, made.stem, architectures) for choice in choices]
        lines += [f"{_quoted(rule)} = [", *(f"    {name}," for name in names), "]"]
    for choice in made.undecided:
        lines += [
            "",
            f"# UNDECIDED: {_whole_name(choice.module)}, {_described(choice.module)}{_known_sizes(choice, config)}.",
        ]
        lines += ["# Write it under one of these, if one is right:"]
        for candidate in choice.candidates[:_MOST]:
            families = dict.fromkeys(a.name for a in architectures if any(_key(r) == candidate for r in a.rules))
            known = f"   (as {', '.join(list(families)[:3])} has it)" if families else ""
            lines.append(f"#   {_quoted(candidate)}{known}")
    conv1d = [choice for choice in made.choices if choice.conv1d]
    if conv1d:
        lines += ["", "[dims]", *(f'{_quoted(choice.module.name)} = ["in", "out"]' for choice in conv1d)]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _key(rule: Any) -> str:
    return " ".join([rule.kind, *rule.axes, *(["/", rule.interleave] if rule.interleave else [])])


def _whole_name(module: Module) -> str:
    return module.name if {"", "weight"} & set(module.shapes) else f"{module.name}.bias"


def _shapes(module: Module) -> dict[str, list[list[int]]]:
    return {suffix: sorted(map(list, shapes)) for suffix, shapes in module.shapes.items()}


def _described(module: Module) -> str:
    return ", ".join(
        f"{suffix or 'parameter'} {' or '.join(map(str, shapes))}" for suffix, shapes in _shapes(module).items()
    )


def _known_sizes(choice: Choice, config: Mapping[str, Any]) -> str:
    """The config's keys that have the value of one of the dims."""
    sizes = sorted({size for shapes in choice.module.shapes.values() for shape in shapes for size in shape})
    named = []
    for size in sizes:
        if keys := [key for key, value in config.items() if type(value) is int and value == size > 1]:
            named.append(f"{size} is {' or '.join(keys)}")
    return f" ({', '.join(named)})" if named else ""


def _count(key: str, config: Mapping[str, Any], value: int, architectures: Sequence[Architecture]) -> str:
    """The line of a count; where no known expression gives it, a comment, and the file does not parse."""
    if fitting := counts(architectures, key, config, value):
        return f"{key} = {_quoted(fitting[0])}"
    keys = [name for name, held in config.items() if held == value and not isinstance(held, bool)]
    guess = f"; in the config so many are {', '.join(keys)}" if keys else ""
    return f'# UNDECIDED: {key} = "…", the config\'s key for the number of {key}, which is {value}{guess}'


def _tied(config: Mapping[str, Any], made: Sketch, closest: Architecture) -> list[str]:
    """Which module shares its weight with which, and what a config means that says nothing of it."""
    vocab = [choice.module.name for choice in made.choices if choice.axis and choice.axis.keys.get("pad")]
    heads = {head for head in closest.tied if head in vocab}
    tables = [name for name in vocab if name not in heads]
    if len(tables) != 1:
        return []
    head = next(iter(heads), next(iter(closest.tied), "lm_head"))
    lines = [f"tied = {{ {_quoted(head)} = {_quoted(tables[0])} }}"]
    if "tie_word_embeddings" not in config:
        lines += ["", "[defaults]", f"tie_word_embeddings = {str(head not in vocab).lower()}"]
    return lines


def _axes(choices: Sequence[Choice]) -> dict[str, Definition]:
    """The axes by name. Another one of the same name gets a number."""
    axes: dict[str, Definition] = {}
    for choice in choices:
        if choice.axis:
            same = [name for name, axis in axes.items() if _same(axis, choice.axis)]
            if not same:
                number = sum(axis.name == choice.axis.name for axis in axes.values())
                axes[choice.axis.name + (f"_{number + 1}" if number else "")] = choice.axis
    return dict(sorted(axes.items()))


def _same(a: Definition, b: Definition) -> bool:
    return (a.name, a.count, a.unit) == (b.name, b.count, b.unit)


def _axis(name: str, axis: Definition, axes: Mapping[str, Definition]) -> str:
    keys = {key: " ".join(value.split()) if isinstance(value, str) else value for key, value in axis.keys.items()}
    group = "kv" if name == "heads" and "kv" in axes else keys.get("group")
    keys = {key: value for key, value in keys.items() if key != "group"}
    if group in axes and group != name:
        keys["group"] = group
    return f"{name} = {{ {', '.join(f'{key} = {_value(value)}' for key, value in keys.items())} }}"


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int) else _quoted(value)


def _by_rule(choices: Sequence[Choice], axes: Mapping[str, Definition]) -> dict[str, list[Choice]]:
    found: dict[str, list[Choice]] = {}
    for choice in choices:
        if choice.rule and choice.axis:
            axis = choice.axis
            name = next(name for name, other in axes.items() if _same(other, axis))
            found.setdefault(f"{choice.rule.split()[0]} {name}", []).append(choice)
        elif choice.rule:
            found.setdefault(choice.rule, []).append(choice)
    order = ("column", "row", "replicate", "buffer")
    return dict(sorted(found.items(), key=lambda item: order.index(item[0].split()[0])))


def _pattern(choice: Choice, layers: int, stem: str, architectures: Sequence[Architecture]) -> str:
    """A module's pattern; optional where not every layer has it, or where a known family's is."""
    name = _whole_name(choice.module)
    partial = name.startswith(f"{stem}*.") and len(choice.module.numbers) < layers
    head = any(name == known for a in architectures for known in a.tied)
    return _quoted(name + ("?" if choice.rule != "buffer" and (partial or head) else ""))
