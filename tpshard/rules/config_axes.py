"""The axes of an architecture for one config. Of those that differ from layer to layer there is one for each size."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from tpshard.planning.axes import Axis
from tpshard.rules import expression
from tpshard.rules.architecture import Architecture, Rule
from tpshard.storage.tensor_names import numbered

PLACES = ("layer", "expert")
"""What an axis' count or unit may ask beside the config: the first number in a tensor's name, and the second."""


class AxesOfConfig:
    """The axes that the rules of a checkpoint's tensors name, evaluated for its config.

    An axis that asks `layer` or `expert` is an axis of its own for each size that it has, and named after it: the
    layers' own counts of heads (`heads-48`, `heads-64`) are dealt each by itself.
    """

    def __init__(self, architecture: Architecture, config: Mapping[str, Any]) -> None:
        self._data = architecture.axes
        self._experts = architecture.experts
        self._config = config
        self._asks = {name: places for name, data in self._data.items() if (places := _places(data))}
        self._rules: dict[tuple[object, ...], Rule] = {}
        self._names: dict[tuple[str, tuple[int, ...]], str] = {}
        self._found: dict[str, dict[str, Axis]] = {name: {} for name in self._data}

    def rule(self, rule: Rule, name: str) -> Rule:
        """The rule with its axes as they are called for a tensor; the same object for tensors that are alike."""
        used = [*rule.axes, *([rule.interleave] if rule.interleave else [])]
        depth = max((len(self._asks.get(each, ())) for axis in used for each in self._with_group(axis)), default=0)
        numbers = tuple(numbered(name)[1][:depth]) if depth else ()
        key = id(rule), numbers
        if key not in self._rules:
            axes = tuple(self._name(axis, numbers) for axis in rule.axes)
            if rule.each_expert:
                assert self._experts is not None
                axes *= expression.evaluate_count(self._experts, self._config)
            interleave = self._name(rule.interleave, numbers) if rule.interleave else None
            same = (axes, interleave) == (rule.axes, rule.interleave)
            self._rules[key] = rule if same else replace(rule, axes=axes, interleave=interleave)
        return self._rules[key]

    def all(self) -> dict[str, Axis]:
        """Every axis that a rule named, in the order of the architecture's."""
        return {name: axis for found in self._found.values() for name, axis in found.items()}

    def _with_group(self, axis: str) -> Iterator[str]:
        yield axis
        if group := self._data[axis].get("group"):
            yield group

    def _name(self, name: str, numbers: tuple[int, ...]) -> str:
        """What an axis is called for the layer and expert of these numbers; it is evaluated on the way."""
        key = name, numbers
        if key not in self._names:
            data = self._data[name]
            config = (
                {**self._config, **dict(zip(PLACES, numbers, strict=False))} if name in self._asks else self._config
            )
            count, unit = (expression.evaluate_count(str(data.get(each, 1)), config) for each in ("count", "unit"))
            group = self._name(data["group"], numbers) if "group" in data else None
            own = name
            if name in self._asks:
                own = f"{name}-{count}" + (
                    f"x{unit}" if set(PLACES) & {*expression.names(str(data.get("unit", 1)))} else ""
                )
            elif group is not None and group != data["group"]:
                own = f"{name}-{group.rpartition('-')[2]}"
            pad, replicate = data.get("pad", False), data.get("replicate", False)
            self._found[name][own] = Axis(own, count, unit, replicate, pad, group)
            self._names[key] = own
        return self._names[key]


def _places(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Of layer and expert, those that an axis asks, and what comes before them."""
    asked = {name for key in ("count", "unit") for name in expression.names(str(data.get(key, 1)))}
    return PLACES if "expert" in asked else PLACES[:1] if "layer" in asked else ()
