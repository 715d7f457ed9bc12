"""A model of transformers, given the parameters of one rank, or of the whole model; no collectives yet."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tpshard.errors import CorruptError, DifferentError, UnsupportedError
from tpshard.verifier.dequantise.find import QUANTISATION
from tpshard.verifier.elements import RankShares
from tpshard.verifier.hf.heads import with_shared_heads
from tpshard.verifier.hf.overrides import precision
from tpshard.verifier.hf.parameters import StoredParts, recipes
from tpshard.verifier.hf.streamed import arriving, as_parameter
from tpshard.verifier.model_types import COMPUTES_AS, TRIED
from tpshard.verifier.ranks.weights import Weights, move
from tpshard.verifier.report.verdict import layer_of

TEXT_KEYS = ("text_config", "llm_config", "language_config")
# Facts of a file, not of a model.
NO_MATTER = {"architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache"}
# Weights are dequantised before a class has them.
_LEFT_OUT = {"model_type", "architectures", *QUANTISATION}
_HEADED = ("CausalLM", "LMHead", "ConditionalGeneration")
TUPLE_LAYERS = {"bamba", "codegen", "falcon_h1", "glm_moe_dsa", "mpt"}


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model: the config itself, or what a multimodal one nests."""
    config = config["thinker_config"] if isinstance(config.get("thinker_config"), Mapping) else config
    nested = next((config[key] for key in TEXT_KEYS if isinstance(config.get(key), Mapping)), None)
    outer = str(config.get("model_type"))
    if outer not in TRIED and nested is None and f"{outer}_text" in COMPUTES_AS:
        # The first files of Qwen2-VL and Qwen2.5-VL have the text model's values beside the vision model's.
        return _on_text_alone({**config, "model_type": f"{outer}_text"})
    if outer in TRIED or nested is None:
        return _on_text_alone(config)
    tied = bool(nested.get("tie_word_embeddings") or config.get("tie_word_embeddings"))
    return {**_on_text_alone(nested), "tie_word_embeddings": tied}


def _on_text_alone(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the model that computes the same, where there are no pictures."""
    alike = COMPUTES_AS.get(str(config.get("model_type")))
    if alike is None:
        return config
    changed = {**config, "model_type": alike}
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := config.get(key), Mapping):
            kept = {name: value for name, value in rope.items() if not name.startswith("mrope")}
            changed[key] = {name: "default" if value == "mrope" else value for name, value in kept.items()}
    return changed


def covers(config: Mapping[str, Any]) -> bool:
    """Whether a class of transformers computes logits for this config, tried here or not. Remote code never does."""
    model_type = str(text_of(config).get("model_type"))
    if model_type in TRIED:
        return True
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        return False
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def model_config(config: Mapping[str, Any]) -> Any:
    """The text model's config as transformers reads it.

    UnsupportedError where the library is not installed, or where it or this engine does not know the model.
    """
    config = text_of(config)
    try:
        from transformers import AutoConfig
        from transformers.utils import logging
    except ImportError:
        hint = "pip install transformers, or --tier bytes"
        raise UnsupportedError(f"a {config.get('model_type')} model needs transformers", hint=hint) from None
    if not covers(config):
        what = f"this transformers has no class that computes logits for the model type {config.get('model_type')!r}"
        raise UnsupportedError(what, hint="--tier bytes compares the files; remote code is never run")
    from huggingface_hub.errors import StrictDataclassError

    # Every rank's model would repeat the library's remarks on the config.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]

    settings = {key: _plain(value) for key, value in config.items() if key not in _LEFT_OUT}
    try:
        made = AutoConfig.for_model(config["model_type"], **settings)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        reason, hint = " ".join(str(error).split()), "a newer transformers may"
        raise UnsupportedError(f"this transformers does not read the config: {reason}", hint=hint) from None
    if hasattr(made, "per_layer_config"):
        made.allow_global_per_layer_attribute_access = True  # for what is said of most layers
    return made


def _plain(value: Any) -> Any:
    """A value of config.json, in which transformers writes an infinite number as `{"__float__": "Infinity"}`."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _plain(v) for k, v in value.items()}
    return value


def same_model(one: Any, other: Any, but: Collection[str] = ()) -> bool:
    """Whether two configs are of models of the same sizes and settings. but: keys that others judge."""
    left, right = one.to_dict(), other.to_dict()
    return all(left.get(key) == right.get(key) for key in (left.keys() | right.keys()) - NO_MATTER - {*but})


@contextmanager
def _empty_parameters() -> Iterator[None]:
    """Parameters have shapes, no memory and no first values; buffers are computed as usual."""
    from transformers import PreTrainedModel

    register, initialize = nn.Module.register_parameter, PreTrainedModel.initialize_weights

    def without_memory(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None and not parameter.is_meta:
            self._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign,assignment]
    PreTrainedModel.initialize_weights = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        PreTrainedModel.initialize_weights = initialize  # type: ignore[method-assign]


def class_of(config: Any) -> Callable[..., Any]:
    """What makes a model of a config that computes logits. Some are registered only as a part of larger ones."""
    import transformers
    from transformers import AutoModelForCausalLM

    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM.from_config
    kind = type(config).__name__.removesuffix("Config")
    made: Callable[..., Any] = getattr(transformers, f"{kind}ForCausalLM")._from_config
    return made


def skeleton(config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The unsharded model, with eager attention and experts, without its parameters' memory."""
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"
    with _empty_parameters(), precision(dtype):
        model: Any = class_of(config)(config, dtype=dtype, attn_implementation="eager")
    built: nn.Module = model.train(False)
    for module in built.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # for gradients alone, and refused where a rank has fewer rows
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return built


def layers_of(model: Any) -> list[tuple[str, nn.Module]]:
    """The decoder's layers in order, with their names."""
    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [(f"{name}.{i}", layer) for i, layer in enumerate(module)]
    raise AssertionError("no list of layers")


@dataclass(frozen=True)
class Frame:
    """What parameters the model has, and which of its layers are looked at.

    `head` and `embedding` are the parameters that may be one: where nothing is stored for the head, they are.
    `buffers` are those of `shapes` that a file need not have. `headless`: the source has no head, and need not; the
    embedding is taken in its place, so that what the model computes before it is seen. `turned`: stacked experts that
    the source stores for products from the left. `aside`: as in `RankSet`.
    """

    config: Any
    shapes: Mapping[str, tuple[int, ...]]
    prefix: str
    head: str
    embedding: str
    layers: tuple[int, ...]
    buffers: frozenset[str]
    headless: bool = False
    turned: frozenset[str] = frozenset()
    aside: Mapping[str, int] = field(default_factory=dict)

    @property
    def tried(self) -> bool:
        """Whether this class was split and run here, so that a difference is the shards' and not ours."""
        return self.config.model_type in TRIED

    def require_described(self, source: Weights, classes: object) -> None:
        """CorruptError unless the source has just the parameters and biases that its config says it has.

        classes: `architectures` of the config; one that computes no logits needs no head.
        """
        found = recipes(source.names(), self.shapes.keys(), self.prefix)
        named = list(map(str, classes)) if isinstance(classes, list) else []
        headed = not named or any(kind in name for name in named for kind in _HEADED)
        spared = {self.head} if self.config.tie_word_embeddings or not headed else set()
        lacking = (key for key in self.shapes.keys() - self.buffers - spared if key not in found)
        used = {name for recipe in found.values() for name in recipe.stored}
        extra = (name for name in source.names() if name.endswith(".bias") and name not in used)
        stray = (name for name in extra if f"{name.removesuffix('bias')}weight" in used)
        for names, what, expected, there in (
            (sorted(lacking), "is not there", "the tensor", "none"),
            (sorted(stray), "is there", "no such tensor", "one"),
        ):
            for name in names[:1]:
                message = f"config.json contradicts the weights: {name} {what}"
                hint = "config.json and the weights are of different models, or one of them was changed"
                raise CorruptError(message, tensor=name, expected=expected, found=there, hint=hint)

    def needed(self, key: str) -> bool:
        """Whether the parameter is outside of layers, or of a layer that is looked at."""
        layer = layer_of(key)
        return layer is None or layer in self.layers

    def is_table(self, key: str) -> bool:
        """Whether the parameter has a row for each token of the vocabulary."""
        shape = self.shapes[key]
        outside = len(shape) == 2 and layer_of(key) is None and shape[0] >= self.shapes[self.embedding][0]
        return outside or key in (self.head, self.embedding)

    def recipes(self, weights: Weights) -> dict[str, StoredParts]:
        """What the parameters are made of. A tied head, or one that is not there, is made of the embedding."""
        found = recipes(weights.names(), self.shapes.keys(), self.prefix)
        tied = self.config.tie_word_embeddings or self.headless
        if self.head not in found and self.embedding in found and tied:
            found[self.head] = found[self.embedding]
        found |= {key: replace(found[key], turned=True) for key in self.turned & found.keys()}
        return {key: recipe for key, recipe in found.items() if self.needed(key)}

    def of_source(self, source: Weights) -> "Frame":
        """The frame of a model as this source stores it."""
        found, turned = self.recipes(source), set()
        for key, recipe in found.items():
            experts, *dims = self.shapes[key] if len(self.shapes[key]) == 3 else (0,)
            if dims and dims[0] != dims[1] and recipe.shape(source) == (experts, dims[1], dims[0]):
                turned.add(key)
        return replace(self, headless=self.head not in found, turned=frozenset(turned))

    def stored(self, weights: Weights) -> list[str]:
        """The stored tensors that the parameters are made of."""
        return sorted({name for recipe in self.recipes(weights).values() for name in recipe.stored})

    def cuts(self, source: Weights, ranks: Sequence[Weights]) -> dict[str, RankShares]:
        """The parameters that ranks hold in part. DifferentError where a rank lacks one, or shapes fit no cut."""
        return self.cuts_by(self.recipes(source), [self.recipes(rank) for rank in ranks], source, ranks)

    def cuts_by(
        self,
        whole: Mapping[str, StoredParts],
        held: Sequence[Mapping[str, StoredParts]],
        source: Weights,
        ranks: Sequence[Weights],
    ) -> dict[str, RankShares]:
        """The same by recipes that are there: the source's, and each rank's."""
        cuts = {}
        for key, recipe in whole.items():
            full, name = recipe.shape(source), recipe.stored[0]
            for rank, found in enumerate(held):
                if key not in found:
                    some = recipe.stacked and any(each in ranks[rank].names() for each in recipe.stored)
                    what = f"has other experts of {key} than are its own" if some else f"has no tensor {name}"
                    raise DifferentError(f"rank {rank} {what}", tensor=name)
            shapes = [found[key].shape(rank) for found, rank in zip(held, ranks, strict=True)]
            if recipe.stacked and all(found[key].stacked for found in held):
                _experts_in_order(key, [found[key] for found in held], shapes, full[0])
            dims = {dim for shape in shapes for dim, (n, m) in enumerate(zip(shape, full, strict=False)) if n != m}
            if len(dims) > 1 or any(len(shape) != len(full) for shape in shapes):
                shown = ", ".join(map(str, shapes))
                raise DifferentError(f"{name} does not have the model's shape", tensor=name, expected=full, found=shown)
            for dim in dims:
                cuts[key] = RankShares(dim, tuple(shape[dim] for shape in shapes), full[dim])
        return with_shared_heads(cuts, self.config)


def _experts_in_order(key: str, recipes: Sequence[StoredParts], shapes: Sequence[tuple[int, ...]], total: int) -> None:
    """DifferentError unless each rank has all experts, or those that follow the rank's before it."""
    some = any(shape[0] != total for shape in shapes)
    expected = 0
    for rank, (recipe, shape) in enumerate(zip(recipes, shapes, strict=True)):
        if recipe.first != expected:
            what = f"rank {rank} has other experts of {key} than are its own"
            wanted, held = f"those from {expected} on", f"{recipe.first} to {recipe.first + shape[0] - 1}"
            raise DifferentError(what, tensor=recipe.stored[0], expected=wanted, found=held)
        expected += shape[0] if some else 0


def frame_of(config: Any, layers: tuple[int, ...] | None = None) -> Frame:
    """The frame of a model, with these of its layers; all by default."""
    model = skeleton(config, torch.float32, torch.device("cpu"))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    names = {id(module): name for name, module in model.named_modules()}
    ends = (model.get_output_embeddings(), model.get_input_embeddings())  # type: ignore[operator]
    head, embedding = (f"{names[id(end)]}.weight" for end in ends)
    every = tuple(range(len(layers_of(model))))
    prefix = str(getattr(model, "base_model_prefix", ""))
    buffers = frozenset(shapes.keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)})
    return Frame(config, shapes, prefix, head, embedding, every if layers is None else layers, buffers)


def fill(
    model: nn.Module,
    frame: Frame,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device,
    rank: int | None = None,
    most: int | None = None,
) -> None:
    """Give the model its parameters; those of layers that are not looked at stay empty.

    most: the elements of a parameter that may be in memory at once, of which each operation reads what it needs; None:
    all are read here. A parameter that nothing stored makes is a DifferentError of a rank, an UnsupportedError of the
    source.
    """
    found = frame.recipes(weights)
    for key, recipe in found.items():
        if rank is None and recipe.stacked and recipe.shape(weights) != frame.shapes[key]:
            raise UnsupportedError("the source has not all experts", tensor=key, expected=frame.shapes[key])
        owner, _, leaf = key.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            made = arriving(key, recipe, weights, dtype, device, table=frame.is_table(key), most=most)
            module._parameters[leaf] = as_parameter(made)
        else:
            tensor = recipe.tensor(weights)
            module._buffers[leaf] = move(tensor, device, dtype if tensor.is_floating_point() else None)
    for key, _ in model.named_parameters(remove_duplicate=False):
        if key in frame.shapes and key not in found and frame.needed(key):
            if rank is None:
                raise UnsupportedError("the source has not all that transformers' model needs", tensor=key)
            raise DifferentError(f"rank {rank} has no tensor {key}", tensor=key)


def skip_layers(model: Any, layers: Collection[int]) -> None:
    """Make every other layer give what it gets."""
    tuples = model.config.model_type in TUPLE_LAYERS

    def passing(hidden_states: Tensor, *_: Any, prev_topk_indices: Any = None, **__: Any) -> Any:
        return (hidden_states, prev_topk_indices) if tuples else hidden_states

    for i, (_, layer) in enumerate(layers_of(model)):
        if i not in layers:
            layer.forward = passing
