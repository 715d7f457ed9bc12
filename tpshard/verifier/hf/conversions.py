"""Stored names as the parameters of a class, by transformers' own table of conversions."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tpshard.verifier.hf.config import OUTER
from tpshard.verifier.hf.converted import Conversion
from tpshard.verifier.hf.own_code import conversions_of, published_as
from tpshard.verifier.hf.parameters import StoredParts

_JOINED = ((["Concatenate"], [0]), (["MergeModulelist"], [0]), (["MergeModulelist", "Concatenate"], [0, 1]))
"""Operations, and the dims that they go along."""
_TEXT = "language_model."
"""Where models with towers have their text model."""


@dataclass(frozen=True)
class Conversions:
    """What transformers does to a checkpoint's names before it gives them to a class.

    made: the parameters that are there under their own names, since they were converted before.
    """

    renamings: list[Any]
    converters: list[Any]
    prefix: str
    keys: Mapping[str, Any]
    model: Any
    made: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: Any) -> "Conversions":
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        outer = getattr(model.config, OUTER, None)
        table = get_checkpoint_conversion_mapping(outer) if outer else None  # type: ignore[no-untyped-call]
        own = published_as(model.config)
        every = [*(conversions_of(own, model.config) if own else table or ()), *get_model_conversion_mapping(model)]
        converters = [each for each in every if isinstance(each, WeightConverter)]
        renamings = [each for each in every if not isinstance(each, WeightConverter)]
        return cls(renamings, converters, str(getattr(model, "base_model_prefix", "")), model.state_dict(), model)

    def recipes(self, names: Collection[str]) -> dict[str, StoredParts]:
        """Which stored tensors make which parameters, as far as that is by name, by stacking and by joining rows.

        An expert of which a matrix is missing is left out. What is converted otherwise is named, no more: see
        `converted`.
        """
        found, matched = self._matched(names)
        for conversion in matched:
            columns = list(conversion.parts.values())
            if not _is_joined(conversion.converter):
                found |= dict.fromkeys(conversion.keys, StoredParts((tuple(conversion.stored),), stacked=False))
            elif len(columns) == len(conversion.converter.source_patterns):
                stacked = type(conversion.converter.operations[0]).__name__ == "MergeModulelist"
                experts = tuple(zip(*columns, strict=False)) if stacked else (tuple(conversion.stored),)
                first = _first_number(columns[0][0]) if stacked else 0
                found[conversion.key] = StoredParts(experts, stacked, first)
        return found

    def others(self, names: Collection[str]) -> list[Conversion]:
        """What is converted otherwise than by name, by stacking and by joining rows."""
        return [each for each in self._matched(names)[1] if not _is_joined(each.converter)]

    def _matched(self, names: Collection[str]) -> tuple[dict[str, StoredParts], list[Conversion]]:
        """What is converted by name alone, and the rest by the first parameter that it makes."""
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        found: dict[str, StoredParts] = {}
        parts: dict[str, dict[str, list[str]]] = {}
        for stored in sorted(names, key=dot_natural_key):
            if stored in self.made:
                found[stored] = StoredParts(((stored,),), stacked=False)
                continue
            name, pattern = rename_source_key(stored, self.renamings, self.converters, self.prefix, dict(self.keys))
            key = name if name in self.keys else name.replace(_TEXT, "", 1)  # of a larger model's table
            if key not in self.keys:
                continue
            if pattern is None:
                found.setdefault(key, StoredParts(((stored,),), stacked=False))
            else:
                parts.setdefault(key, {}).setdefault(pattern, []).append(stored)
        matched = []
        for key, by_pattern in parts.items():
            converter = next(each for each in self.converters if by_pattern.keys() <= set(each.source_patterns))
            order = {pattern: by_pattern[pattern] for pattern in converter.source_patterns if pattern in by_pattern}
            matched.append(Conversion(converter, self.model, key, order))
        return found, matched


def _is_joined(converter: Any) -> bool:
    """Whether rows are joined, or those of each of a stack."""
    kinds = [type(each).__name__ for each in converter.operations]
    dims = [getattr(each, "dim", 0) for each in converter.operations]
    return (kinds, dims) in _JOINED


def _first_number(name: str) -> int:
    """The number of the expert that a tensor is of: the last in its name."""
    return next(int(part) for part in reversed(name.split(".")) if part.isdecimal())
