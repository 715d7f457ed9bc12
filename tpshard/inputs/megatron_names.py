"""Of which tensors of a Hugging Face checkpoint one of Megatron's parameters is made: the table read the other way."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.formats.engine_patterns import STACK
from tpshard.formats.engine_tables import EngineFamily
from tpshard.formats.megatron_layout import QKV
from tpshard.planning.box import Shape
from tpshard.storage.safetensors import TensorInfo

LAYERS = "decoder.layers."
_INNER = re.compile(r"(mtp\.layers\.\d+\.)mtp_model_layer\.")
_PREDICTOR = re.compile(r"mtp\.layers\.(\d+)\.(?:transformer_layer\.)?")
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_OTHER_NAMES = (
    (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
    (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
    (".self_attention.linear_q_up_proj.layer_norm_", ".self_attention.q_layernorm."),
    (".self_attention.linear_kv_up_proj.layer_norm_", ".self_attention.kv_layernorm."),
)
"""Names of norms with Transformer Engine's layers, and with others."""


class _Target(NamedTuple):
    """A parameter's name as a regular expression, and the patterns of the tensors that it is made of."""

    name: re.Pattern[str]
    length: int
    sources: tuple[str, ...]


def names_of(name: str) -> Iterator[str]:
    """The names that a parameter may have: its own, and those that other layers give it."""
    yield name
    for one, other in _OTHER_NAMES:
        for this, that in ((one, other), (other, one)):
            if this in name:
                yield name.replace(this, that)


def canonical(name: str) -> str:
    """A parameter's name, of a layer that predicts a further token as torch_dist has it, whatever version wrote it."""
    return _INNER.sub(r"\1transformer_layer.", name)


def behind_own(name: str, layers: object) -> str:
    """The name that a parameter has as one of a layer, where it is of one behind the model's own."""
    found = _PREDICTOR.match(name)
    if found is None or not isinstance(layers, int):
        return name
    return f"{LAYERS}{layers + int(found[1])}.{name[found.end() :]}"


def is_stacked(name: str) -> bool:
    """Whether a key holds the parameter of all layers, along its first dim."""
    return name.startswith(LAYERS) and not name.removeprefix(LAYERS).partition(".")[0].isdecimal()


def of_layer(name: str, layer: int) -> str:
    """The name of a parameter of one layer, where a key holds that of all."""
    return f"{LAYERS}{layer}.{name.removeprefix(LAYERS)}"


def layer_of(name: str) -> int | None:
    """The layer of a parameter."""
    found = re.match(r"decoder\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


class Sources:
    """Of which tensors the parameters of one model are made. UnsupportedError for one that its family has not."""

    def __init__(self, family: EngineFamily, config: Mapping[str, Any], path: object) -> None:
        self.family, self.config, self.path = family, config, path
        pairs = [(target, (pattern,)) for pattern, target in family.renamed.items()]
        self.targets = [_target(target, patterns) for target, patterns in (*pairs, *family.fused.items())]

    def of(self, name: str, dtype: str, shape: Shape) -> Iterator[TensorInfo]:
        """The tensors that a parameter is made of, with their shapes."""
        patterns, numbers, rest = self._look_up(name, behind_own(name, self.config.get("num_hidden_layers")))
        experts = any(STACK in pattern.split(".") for pattern in patterns)
        count, inner = (shape[0], shape[1:]) if experts else (1, shape)
        if name in VOCABULARY:
            inner = (self.config["vocab_size"], *inner[1:])
        rows = self._rows(name, len(patterns), inner)
        for expert in range(count):
            for pattern, size in zip(patterns, rows, strict=True):
                full = _filled(pattern, numbers, expert) + (f".{rest}" if rest else "")
                own = (size, *inner[1:]) if inner else ()
                turned = self.family.kind(full).transposed and len(own) == 2
                yield TensorInfo(full, dtype, own[::-1] if turned else own, str(self.path), 0, 0)

    def _look_up(self, name: str, as_layer: str) -> tuple[tuple[str, ...], tuple[str, ...], str]:
        """The patterns of a parameter's tensors, the numbers in its name, and the end of theirs."""
        for each in names_of(as_layer):
            found = [(target, match) for target in self.targets if (match := target.name.fullmatch(each))]
            if found:
                target, match = max(found, key=lambda pair: pair[0].length)
                *numbers, rest = match.groups(default="")
                return target.sources, tuple(numbers), rest
        what = f"{name} is no parameter of a {self.config.get('model_type')} in Megatron that is known"
        hint = "is config.json that of this model? Otherwise convert it with Megatron-Bridge"
        raise UnsupportedError(what, path=self.path, tensor=name, hint=hint)

    def _rows(self, name: str, count: int, shape: Shape) -> list[int]:
        """How many rows each of the tensors has that a parameter of this shape is made of."""
        if count == 1:
            return [shape[0] if shape else 0]
        shares = [1] * count
        if QKV in name:
            heads = self.config.get("num_attention_heads")
            groups = self.config.get("num_key_value_heads") or heads
            shares = [heads, groups, groups] if type(heads) is int and type(groups) is int else [0]
        total = sum(shares)
        if total < 1 or not shape or shape[0] % total:
            what, expected = f"the rows of {name} are not those of the config", f"a multiple of {total}"
            raise CorruptError(what, path=self.path, tensor=name, expected=expected, found=list(shape))
        return [shape[0] // total * share for share in shares]


def _filled(pattern: str, numbers: tuple[str, ...], expert: int) -> str:
    """A tensor's name, by its pattern."""
    following = iter(numbers)
    parts = pattern.split(".")
    return ".".join(next(following) if part == "*" else str(expert) if part == STACK else part for part in parts)


def _target(target: str, sources: tuple[str, ...]) -> _Target:
    parts = (r"(\d+)" if part == "*" else re.escape(part) for part in target.split("."))
    rest = r"(\w+)" if target.endswith("_") else r"(?:\.(\w+))?"
    return _Target(re.compile(r"\.".join(parts) + rest), len(target), sources)
