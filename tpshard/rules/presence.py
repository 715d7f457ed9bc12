"""What config.json says must be there or must not, held against the tensors: biases and the head.

And which tensors are float32 on purpose. Both are tables of an architecture file that are keyed by conditions.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from tpshard.errors import CorruptError
from tpshard.rules import expression
from tpshard.rules.architecture import NUMBER, Architecture, Conditional, asks_layer, compile_pattern
from tpshard.rules.quantisation.schemes import split_name
from tpshard.storage.safetensors import TensorInfo

_INDEX = re.compile(rf"(?<![^.]){NUMBER}(?![^.])")
_HEADED = re.compile("CausalLM|LMHead|ConditionalGeneration")
"""Classes that compute logits, in the names that `architectures` of config.json lists."""
_TIE = "tie_word_embeddings"
_HINT = "config.json and the weights are of different models, or one of them was changed: get both from one place"


class _Table:
    """A table that is keyed by conditions, for one config. Layers are alike: a name is looked up once for all."""

    def __init__(self, table: Sequence[Conditional], config: Mapping[str, Any]) -> None:
        self.config = config
        self._patterns = [(compile_pattern(text), each.condition) for each in table for text in each.patterns]
        self._conditions: dict[str, list[str]] = {}
        self._values: dict[tuple[str, str | None], bool] = {}

    def conditions(self, name: str) -> list[str]:
        """The conditions under which something is said of a name."""
        key = _INDEX.sub("0", name)
        if key not in self._conditions:
            matching = [condition for compiled, condition in self._patterns if compiled.fullmatch(key)]
            self._conditions[key] = list(dict.fromkeys(matching))
        return self._conditions[key]

    def holds(self, name: str) -> bool:
        """Whether one of these conditions is true, in the layer that the name has."""
        return any(self._value(condition, name) for condition in self.conditions(name))

    def _value(self, condition: str, name: str) -> bool:
        found = _INDEX.search(name) if asks_layer(condition) else None
        key = (condition, found and found[0])
        if key not in self._values:
            config = {**self.config, "layer": int(found[0])} if found else self.config
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
    modules: dict[str, set[str]] = {}
    for name in names:
        module, suffix = split_name(name)
        if suffix:
            modules.setdefault(module, set()).add(suffix)
    for module, suffixes in modules.items():
        stored, bias = "bias" in suffixes, f"{module}.bias"
        if suffixes == {"bias"} and not (module in architecture.tied and config.get(_TIE)):
            what, expected = f"{module} has a bias and no weight", f"{module}.weight"
            raise CorruptError(what, tensor=bias, expected=expected)
        if stored and "weight" in suffixes and not table.holds(module):
            what, expected = f"config.json contradicts the tensor {bias}", f"no bias ({_reason(table, module)})"
            raise CorruptError(what, tensor=bias, expected=expected, found="a bias", hint=_HINT)
        if not stored and table.holds(module):
            what, expected = f"config.json contradicts the weights: {module} has no bias", _reason(table, module)
            raise CorruptError(what, tensor=bias, expected=f"a bias ({expected})", found="none", hint=_HINT)


def _reason(table: _Table, module: str) -> str:
    """What decides about a module's bias: the config's keys and their values."""
    keys = dict.fromkeys(key for condition in table.conditions(module) for key in expression.names(condition))
    values = ", ".join(f"{key} is {table.config.get(key)!r}" for key in keys if key != "layer")
    always = "always" if table.conditions(module) else "never"
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
    known = set(names)
    stored = {module for module, suffix in map(split_name, known) if suffix != "bias"}.intersection(architecture.tied)
    tied, lacking = config.get(_TIE) or outer.get(_TIE), None
    if not tied and not stored:
        lacking = next((f"{head}.weight" for head in architecture.tied), None)
    elif tied and not stored:
        biased = _Table(architecture.biases or (), config)
        lost = (f"{head}.bias" for head in architecture.tied if biased.holds(head))
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
    return {t.name for t in tensors if t.dtype == "F32" and table.holds(names.get(t.name, t.name))}
