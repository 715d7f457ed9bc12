"""What config.json says must be there or must not, held against the tensors: biases and the head.

And which tensors are float32 on purpose. Both are tables of an architecture file that are keyed by conditions.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from tpshard.errors import CorruptError
from tpshard.rules import expression
from tpshard.rules.architecture import Architecture, Conditional, asks_layer
from tpshard.rules.globs import compile_pattern
from tpshard.rules.quantisation.schemes import split_name
from tpshard.storage.safetensors import TensorInfo
from tpshard.storage.tensor_names import numbered, with_numbers

_HEADED = re.compile("CausalLM|LMHead|ConditionalGeneration")
"""Classes that compute logits, in the names that `architectures` of config.json lists."""
_TIE = "tie_word_embeddings"
_HINT = "config.json and the weights are of different models, or one of them was changed: get both from one place"


class _Table:
    """A table that is keyed by conditions, for one config. Names are given as `numbered` has them."""

    def __init__(self, table: Sequence[Conditional], config: Mapping[str, Any]) -> None:
        self.config = config
        self._patterns = [(compile_pattern(text), each.condition) for each in table for text in each.patterns]
        self._conditions: dict[str, list[str]] = {}
        self._values: dict[tuple[str, int | None], bool] = {}

    def conditions(self, kind: str) -> list[str]:
        """The conditions under which something is said of names of a kind."""
        if kind not in self._conditions:
            matching = [condition for compiled, condition in self._patterns if compiled.fullmatch(kind)]
            self._conditions[kind] = list(dict.fromkeys(matching))
        return self._conditions[kind]

    def holds(self, kind: str, numbers: Sequence[int]) -> bool:
        """Whether one of these conditions is true, in the layer that the name has."""
        return any(self._value(condition, numbers) for condition in self.conditions(kind))

    def _value(self, condition: str, numbers: Sequence[int]) -> bool:
        layer = numbers[0] if numbers and asks_layer(condition) else None
        key = (condition, layer)
        if key not in self._values:
            config = self.config if layer is None else {**self.config, "layer": layer}
            self._values[key] = bool(expression.evaluate(condition, config))
        return self._values[key]


def check_biases(architecture: Architecture, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """CorruptError for a bias that the config says is not there, or that it says is and that is not.

    names: of tensors as the rules have them, without buffers. Rules without [biases] say nothing of them. A quantised
    module may have one that nobody reads: some tools write zeros.
    """
    if architecture.biases is None:
        return
    table = _Table(architecture.biases, config)
    split: dict[str, tuple[str, str]] = {}
    modules: dict[tuple[str, tuple[int, ...]], tuple[str, ...]] = {}
    for kind, numbers in map(numbered, names):
        if kind not in split:
            split[kind] = split_name(kind)
        module, suffix = split[kind]
        if suffix:
            modules[module, numbers] = (*modules.get((module, numbers), ()), suffix)
    for (kind, numbers), suffixes in modules.items():
        if suffixes == ("bias",):
            if not (kind in architecture.tied and config.get(_TIE)):
                module = with_numbers(kind, numbers)
                what, expected = f"{module} has a bias and no weight", f"{module}.weight"
                raise CorruptError(what, tensor=f"{module}.bias", expected=expected)
            continue
        stored = "bias" in suffixes
        if (stored and "weight" not in suffixes) or stored == table.holds(kind, numbers):
            continue
        module, reason = with_numbers(kind, numbers), _reason(table, kind)
        bias = f"{module}.bias"
        if stored:
            what, expected = f"config.json contradicts the tensor {bias}", f"no bias ({reason})"
            raise CorruptError(what, tensor=bias, expected=expected, found="a bias", hint=_HINT)
        what = f"config.json contradicts the weights: {module} has no bias"
        raise CorruptError(what, tensor=bias, expected=f"a bias ({reason})", found="none", hint=_HINT)


def _reason(table: _Table, kind: str) -> str:
    """What decides about the biases of a kind of module: the config's keys and their values."""
    keys = dict.fromkeys(key for condition in table.conditions(kind) for key in expression.names(condition))
    values = ", ".join(f"{key} is {table.config.get(key)!r}" for key in keys if key != "layer")
    always = "always" if table.conditions(kind) else "never"
    return values or f"{always} in this architecture"


def check_head(
    architecture: Architecture, config: Mapping[str, Any], outer: Mapping[str, Any], names: Iterable[str]
) -> None:
    """CorruptError where the config names a class that computes logits, and the files lack what its head needs.

    That is the head, where it is not tied to the embedding, and the bias of one that is. names: of tensors as the rules
    have them. outer: the whole config of a model that nests a text model.
    """
    config = {**architecture.defaults, **config}
    classes = outer.get("architectures")
    named = list(map(str, classes)) if isinstance(classes, list) else []
    if named and not any(map(_HEADED.search, named)):
        return
    known = {name for name in names if name.startswith(tuple(architecture.tied))}
    stored = {module for module, suffix in map(split_name, known) if suffix != "bias"}.intersection(architecture.tied)
    tied, lacking = config.get(_TIE) or outer.get(_TIE), None
    if not tied and not stored:
        lacking = next((f"{head}.weight" for head in architecture.tied), None)
    elif tied and not stored:
        biased = _Table(architecture.biases or (), config)
        lost = (f"{head}.bias" for head in architecture.tied if biased.holds(*numbered(head)))
        lacking = next((bias for bias in lost if bias not in known), None)
    if lacking is not None:
        reason = f"{_TIE} is {bool(tied)}, architectures names {', '.join(named) or 'no base class'}"
        hint = "copy or download the files again; of a model without a head, `architectures` names the base class"
        what = f"config.json contradicts the weights: {lacking} is not there"
        raise CorruptError(what, tensor=lacking, expected=f"a head ({reason})", found="none", hint=hint)


def float32_on_purpose(
    architecture: Architecture, config: Mapping[str, Any], tensors: Sequence[TensorInfo], names: Mapping[str, str]
) -> Collection[str]:
    """The tensors stored as float32 that a cast to fewer bits would harm. names: as the rules have them, by name.

    In conditions, `mixed` is true where most of the checkpoint is stored in fewer bits.
    """
    bits = dict.fromkeys(("F64", "F32", "F16", "BF16"), 0)
    for tensor in tensors:
        if tensor.dtype in bits:
            bits[tensor.dtype] += tensor.nbytes
    mixed = max(bits, key=lambda dtype: bits[dtype]) in ("F16", "BF16")
    table = _Table(architecture.float32, {**config, "mixed": mixed})
    return {t.name for t in tensors if t.dtype == "F32" and table.holds(*numbered(names.get(t.name, t.name)))}
