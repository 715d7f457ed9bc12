"""Drafts for `tpshard archs draft`: the text of a rules file, and whether classification accepts it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpshard.errors import TpshardError, UnsupportedError
from tpshard.planning.axes import rule_key
from tpshard.rules.architecture import Architecture, parse_architecture
from tpshard.rules.classify import classify
from tpshard.rules.draft.infer import Decision, Sketch, sketch
from tpshard.rules.draft.known import AxisDefinition, Module, count_expressions, model_prefix, modules
from tpshard.storage.safetensors import TensorInfo

_MOST = 6
"""The number of candidates that are listed for a module."""


@dataclass(frozen=True)
class Draft:
    """A draft of rules.

    closest, share: the closest family, and its share of modules in common. refusal: why the draft cannot be used as it
    stands; None when every tensor has a rule.
    """

    model_type: str
    closest: str
    share: float
    text: str
    undecided: tuple[Decision, ...]
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
                {
                    "module": each.module.name,
                    "shapes": _shapes(each.module),
                    "candidates": list(each.candidates[:_MOST]),
                }
                for each in self.undecided
            ],
            "refusal": self.refusal,
            "text": self.text,
        }


def make(config: Mapping[str, Any], tensors: Sequence[TensorInfo], architectures: Sequence[Architecture]) -> Draft:
    """Draft rules for a config and its tensors by comparing them with `architectures`."""
    found = modules(tensors)
    made = sketch(config, found, architectures)
    text = _render(config, made, found, sorted(architectures, key=lambda a: made.families.index(a.name)))
    refusal = None
    try:
        classify(parse_architecture(text, "draft.toml"), config, tensors)
    except TpshardError as error:
        refusal = str(error)
    return Draft(str(config["model_type"]), made.families[0], made.closest, text, tuple(made.undecided), refusal)


def decoder_tensors(config: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """The tensors of a nested text model, which is where the embedding is, under names without the nesting."""
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
    names = {name: ".".join(name.split(".")[-2:]) for name in tables}
    below = (tensor.name for tensor in tensors if tensor.name.startswith(inside[0]))
    names |= {name: "model." + name.removeprefix(inside[0]) for name in below}
    return [replace(tensor, name=names[tensor.name]) for tensor in tensors if tensor.name in names]


def _render(
    config: Mapping[str, Any], made: Sketch, found: Sequence[Module], architectures: Sequence[Architecture]
) -> str:
    closest = architectures[0]
    axes = _axes(made.decisions)
    lines = [
        f"# A draft of rules for {config['model_type']}, made by comparing names and shapes with known architectures.",
        f"# Closest: {closest.name}, with {made.closest:.0%} of the modules in common.",
        "# Read every line. `tpshard plan` and `split` take the file with --rules; `tpshard verify` proves the result,",
        "# or names the module that is cut wrongly, where transformers has a class for the model type.",
    ]
    if count := len(made.undecided):
        lines.append(f"# UNDECIDED modules below: {count}. Until each is under a rule, the model is refused.")
    lines.append(f"model_types = [{_value(str(config['model_type']))}]")
    if prefix := model_prefix(made.stem):
        lines.append(f"prefix = {_value(prefix)}")
    inside = [module for module in found if made.stem and module.name.startswith(f"{made.stem}*.")]
    layers = 1 + max((max(module.numbers) for module in inside), default=-1)
    lines.append(_count("layers", config, layers, architectures))
    if experts := 1 + max((max(module.experts) for module in inside if module.experts), default=-1):
        line = _count("experts", config, experts, architectures)
        needed = any(decision.rule and decision.module.experts for decision in made.decisions)
        lines += [line] if needed or not line.startswith("#") else []
    lines += _tied(config, made, closest)
    lines += ["", "[axes]", *(_axis(name, axis, axes) for name, axis in axes.items()), "", "[rules]"]
    for rule, decisions in _by_rule(made.decisions, axes).items():
        names = [_pattern(decision, layers, made.stem, architectures) for decision in decisions]
        lines += [f"{_value(rule)} = [", *(f"    {name}," for name in names), "]"]
    keys = {a.name: {rule_key(rule.kind, rule.axes, rule.interleave) for rule in a.rules} for a in architectures}
    for decision in made.undecided:
        shapes = f"{_described(decision.module)}{_known_sizes(decision.module, config)}"
        lines += ["", f"# UNDECIDED: {_whole_name(decision.module)}, {shapes}."]
        lines += ["# Write it under one of these, if one is right:"]
        for candidate in decision.candidates[:_MOST]:
            families = [name for name, known in keys.items() if candidate in known]
            whose = f"   (as {', '.join(families[:3])} has it)" if families else ""
            lines.append(f"#   {_value(candidate)}{whose}")
    if conv1d := [decision for decision in made.decisions if decision.conv1d]:
        lines += ["", "[dims]", *(f'{_value(decision.module.name)} = ["in", "out"]' for decision in conv1d)]
    return "\n".join(lines) + "\n"


def _value(value: bool | int | str) -> str:
    """A value as TOML has it: JSON's form is the same."""
    return json.dumps(value, ensure_ascii=False)


def _whole_name(module: Module) -> str:
    return module.name if {"", "weight"} & set(module.shapes) else f"{module.name}.bias"


def _shapes(module: Module) -> dict[str, list[list[int]]]:
    return {suffix: sorted(map(list, shapes)) for suffix, shapes in module.shapes.items()}


def _described(module: Module) -> str:
    shapes = _shapes(module).items()
    return ", ".join(f"{suffix or 'parameter'} {' or '.join(map(str, known))}" for suffix, known in shapes)


def _known_sizes(module: Module, config: Mapping[str, Any]) -> str:
    """Which of the module's sizes are values of keys of the config."""
    sizes = sorted({size for shapes in module.shapes.values() for shape in shapes for size in shape})
    named = []
    for size in sizes:
        if keys := [key for key, value in config.items() if type(value) is int and value == size > 1]:
            named.append(f"{size} is {' or '.join(keys)}")
    return f" ({', '.join(named)})" if named else ""


def _count(key: str, config: Mapping[str, Any], value: int, architectures: Sequence[Architecture]) -> str:
    """The line for a count, or a comment when no known expression gives it; without the line no file parses."""
    if fitting := count_expressions(architectures, key, config, value):
        return f"{key} = {_value(fitting[0])}"
    keys = [name for name, held in config.items() if held == value and not isinstance(held, bool)]
    guess = f"; in the config so many are {', '.join(keys)}" if keys else ""
    return f'# UNDECIDED: {key} = "…", the config\'s key for the number of {key}, which is {value}{guess}'


def _tied(config: Mapping[str, Any], made: Sketch, closest: Architecture) -> list[str]:
    """The lines on tied modules, with the default for a config that does not mention tying."""
    vocab = [decision.module.name for decision in made.decisions if decision.axis and decision.axis.keys.get("pad")]
    heads = {head for head in closest.tied if head in vocab}
    tables = [name for name in vocab if name not in heads]
    if len(tables) != 1:
        return []
    head = next(iter(heads), next(iter(closest.tied), "lm_head"))
    lines = [f"tied = {{ {_value(head)} = {_value(tables[0])} }}"]
    if "tie_word_embeddings" not in config:
        lines += ["", "[defaults]", f"tie_word_embeddings = {_value(head not in vocab)}"]
    return lines


def _axes(decisions: Sequence[Decision]) -> dict[str, AxisDefinition]:
    """The axes by name, with a number for a further axis of the same name."""
    axes: dict[str, AxisDefinition] = {}
    for decision in decisions:
        if decision.axis:
            if decision.axis.cut not in (axis.cut for axis in axes.values()):
                number = sum(axis.name == decision.axis.name for axis in axes.values())
                axes[decision.axis.name + (f"_{number + 1}" if number else "")] = decision.axis
    return dict(sorted(axes.items()))


def _axis(name: str, axis: AxisDefinition, axes: Mapping[str, AxisDefinition]) -> str:
    keys = {key: " ".join(value.split()) if isinstance(value, str) else value for key, value in axis.keys.items()}
    group = "kv" if name == "heads" and "kv" in axes else keys.get("group")
    keys = {key: value for key, value in keys.items() if key != "group"}
    if group in axes and group != name:
        keys["group"] = group
    return f"{name} = {{ {', '.join(f'{key} = {_value(value)}' for key, value in keys.items())} }}"


def _by_rule(decisions: Sequence[Decision], axes: Mapping[str, AxisDefinition]) -> dict[str, list[Decision]]:
    names = {axis.cut: name for name, axis in axes.items()}
    found: dict[str, list[Decision]] = {}
    for decision in decisions:
        if rule := decision.rule:
            rule = f"{rule.split()[0]} {names[decision.axis.cut]}" if decision.axis else rule
            found.setdefault(rule, []).append(decision)
    order = ("column", "row", "replicate", "buffer")
    return dict(sorted(found.items(), key=lambda item: order.index(item[0].split()[0])))


def _pattern(decision: Decision, layers: int, stem: str, architectures: Sequence[Architecture]) -> str:
    """A module's pattern, optional if some layers lack the module or if it is a head, which may be tied."""
    name = _whole_name(decision.module)
    partial = name.startswith(f"{stem}*.") and len(decision.module.numbers) < layers
    head = any(name == known for a in architectures for known in a.tied)
    return _value(name + ("?" if decision.rule != "buffer" and (partial or head) else ""))
