"""Stored names as the parameters of a class, by transformers' own table of conversions."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tpshard.verifier.hf.parameters import StoredParts

_JOINED = (["Concatenate"], ["MergeModulelist"], ["MergeModulelist", "Concatenate"])


@dataclass(frozen=True)
class Conversions:
    """What transformers does to a checkpoint's names before it gives them to a class."""

    renamings: list[Any]
    converters: list[Any]
    prefix: str
    keys: Mapping[str, Any]

    @classmethod
    def of(cls, model: Any) -> "Conversions":
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        every = get_model_conversion_mapping(model)
        converters = [each for each in every if isinstance(each, WeightConverter)]
        renamings = [each for each in every if not isinstance(each, WeightConverter)]
        return cls(renamings, converters, str(getattr(model, "base_model_prefix", "")), model.state_dict())

    def recipes(self, names: Collection[str]) -> dict[str, StoredParts]:
        """Which stored tensors make which parameters, as far as that is by name, by stacking and by joining rows.

        An expert of which a matrix is missing is left out.
        """
        from transformers.core_model_loading import rename_source_key

        found: dict[str, StoredParts] = {}
        parts: dict[str, dict[str, list[str]]] = {}
        for stored in sorted(names, key=_in_order):
            key, pattern = rename_source_key(stored, self.renamings, self.converters, self.prefix, dict(self.keys))
            if key not in self.keys:
                continue
            if pattern is None:
                found.setdefault(key, StoredParts(((stored,),), stacked=False))
            else:
                parts.setdefault(key, {}).setdefault(pattern, []).append(stored)
        for key, by_pattern in parts.items():
            converter = next(each for each in self.converters if by_pattern.keys() <= set(each.source_patterns))
            kinds = [type(each).__name__ for each in converter.operations]
            if kinds not in _JOINED or len(by_pattern) != len(converter.source_patterns):
                continue
            columns = [by_pattern[pattern] for pattern in converter.source_patterns]
            experts = tuple(zip(*columns, strict=False))
            stacked = kinds[0] == "MergeModulelist"
            if stacked or len(experts) == 1:
                found[key] = StoredParts(experts, stacked, _first_number(columns[0][0]) if stacked else 0)
        return found


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _first_number(name: str) -> int:
    """The number of the expert that a tensor is of: the last in its name."""
    return next(int(part) for part in reversed(name.split(".")) if part.isdecimal())
