"""A model of transformers, given the parameters of one rank, or of the whole model; no collectives yet."""

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from tpshard.errors import CorruptError, DifferentError, UnsupportedError
from tpshard.verifier.elements import RankShares
from tpshard.verifier.hf import unlike_layers
from tpshard.verifier.hf.config import WITHOUT_TOWERS, text_config, tried
from tpshard.verifier.hf.conversions import Conversions
from tpshard.verifier.hf.converted import converted
from tpshard.verifier.hf.heads import with_shared_heads
from tpshard.verifier.hf.overrides import precision
from tpshard.verifier.hf.parameters import StoredParts, recipes, ties_of
from tpshard.verifier.hf.pictures import Pictures
from tpshard.verifier.hf.streamed import arriving, as_parameter
from tpshard.verifier.ranks.weights import Weights, move
from tpshard.verifier.report.verdict import layer_of
from tpshard.verifier.stacks import Shapes, cut_dim, firsts, starts

_HEADED = ("CausalLM", "LMHead", "ConditionalGeneration")
TUPLE_LAYERS = {"bamba", "codegen", "falcon_h1", "glm_moe_dsa", "mpt"}


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
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if text_config(config) is not config and type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText.from_config
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM.from_config
    kind = type(config).__name__.removesuffix("Config")
    made: Callable[..., Any] = getattr(transformers, f"{kind}ForCausalLM")._from_config
    return made


def skeleton(config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The unsharded model, with eager attention and experts, without its parameters' memory.

    UnsupportedError where its class makes none of the config.
    """
    config = copy.deepcopy(config)
    for each in {id(each): each for each in (config, text_config(config))}.values():
        each._experts_implementation = "eager"
    with _empty_parameters(), precision(dtype):
        try:
            model: Any = class_of(config)(config, dtype=dtype, attn_implementation="eager")
            unlike_layers.put_in(model)
        except Exception as error:  # the library's own, of any kind
            said = " ".join(str(error).split()) or type(error).__name__
            hint = "--tier bytes compares the files"
            raise UnsupportedError(f"transformers makes no model of this config: {said}", hint=hint) from error
    built: nn.Module = model.train(False)
    if getattr(config, WITHOUT_TOWERS, False):
        _drop_towers(built)
    for module in built.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # for gradients alone, and refused where a rank has fewer rows
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return built


def _drop_towers(model: Any) -> None:
    """Leave the text model of a larger one, where the larger one has it in a module."""
    base = model.get_submodule(model.base_model_prefix)
    start, layer = f"{model.base_model_prefix}.", layers_of(model)[0][0]
    for name, _ in list(base.named_children()):
        if layer.startswith(f"{start}{name}.") and layer.count(".", len(start)) > 1:
            base._modules.update({other: None for other in base._modules if other != name})


def layers_of(model: Any) -> list[tuple[str, nn.Module]]:
    """The decoder's layers in order, with their names."""
    count = text_config(model.config).num_hidden_layers
    embedding = model.get_input_embeddings()
    near = next(name for name, module in model.named_modules() if module is embedding).rpartition(".")[0]
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # A tower may have as many, and lists in a layer, too: the decoder's lie beside its embedding.
    beside = [name for name in lists if name.rpartition(".")[0] == near]
    found = [*(name for name in beside if len(lists[name]) == count), *beside]
    found += [name for name in lists if len(lists[name]) == count]
    if not found:
        raise AssertionError("no list of layers")
    return [(f"{found[0]}.{i}", layer) for i, layer in enumerate(lists[found[0]])]


@dataclass(frozen=True)
class Frame:
    """What parameters the model has, and which of its layers are looked at.

    `head` and `embedding` are the parameters that may be one: where nothing is stored for the head, they are.
    `buffers` are those of `shapes` that a file need not have. `headless`: the source has no head, and need not; the
    embedding is taken in its place, so that what the model computes before it is seen. `turned`: stacked experts that
    the source stores for products from the left. `aside`: as in `RankSet`. `conversions`: of a class that was not
    tried, what transformers does to names. `ties`: of a parameter that the class has under several names, the others.
    `decoder`: how the names of its layers begin. `depth`: how many there are. `pictures`: what is put before a tower,
    where the class has one.
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
    conversions: Conversions | None = None
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    decoder: str = ""
    depth: int = 0
    pictures: Pictures | None = None

    @property
    def tried(self) -> bool:
        """Whether this class was split and run here, so that a rank's model can be told its heads and widths."""
        return tried(self.config)

    def require_described(self, source: Weights, classes: object) -> None:
        """CorruptError unless the source has just the parameters and biases that its config says it has.

        UnsupportedError of a class that was not tried: it may have them under names that nobody told.
        classes: `architectures` of the config; one that computes no logits needs no head.
        """
        found = self._stored_parts(source)
        named = list(map(str, classes)) if isinstance(classes, list) else []
        headed = not named or any(kind in name for name in named for kind in _HEADED)
        spared = {self.head} if getattr(self.config, "tie_word_embeddings", False) or not headed else set()
        lacking = (key for key in self.shapes.keys() - self.buffers - spared if key not in found)
        used = {name for recipe in found.values() for name in recipe.stored}
        extra = (name for name in source.names() if name.endswith(".bias") and name not in used)
        stray = (name for name in extra if f"{name.removesuffix('bias')}weight" in used)
        for names, what, expected, there in (
            (sorted(lacking), "is not there", "the tensor", "none"),
            (sorted(stray), "is there", "no such tensor", "one"),
        ):
            for name in names[:1]:
                if not self.tried:
                    unknown = f"the source has not all parameters of its class, by names that are known: {name}"
                    raise UnsupportedError(unknown, tensor=name, hint="--tier bytes compares the files")
                message = f"config.json contradicts the weights: {name} {what}"
                hint = "config.json and the weights are of different models, or one of them was changed"
                raise CorruptError(message, tensor=name, expected=expected, found=there, hint=hint)

    def layer(self, key: str) -> int | None:
        """The decoder's layer that a parameter is of."""
        return layer_of(key) if key.startswith(self.decoder) else None

    def needed(self, key: str) -> bool:
        """Whether the parameter is outside of layers, or of a layer that is looked at."""
        layer = self.layer(key)
        return layer is None or layer in self.layers

    def is_table(self, key: str) -> bool:
        """Whether the parameter has a row for each token of the vocabulary."""
        shape = self.shapes[key]
        outside = len(shape) == 2 and self.layer(key) is None and shape[0] >= self.shapes[self.embedding][0]
        return outside or key in (self.head, self.embedding)

    @property
    def text(self) -> Any:
        """The config of the text model."""
        return text_config(self.config)

    def _stored_parts(self, weights: Weights) -> dict[str, StoredParts]:
        """What the parameters are made of, by names alone."""
        found = recipes(weights.names(), self.shapes.keys(), self.prefix)
        if self.conversions is not None:
            found = {**self.conversions.recipes(weights.names()), **found}
        for key in self.ties.keys() - found.keys():
            if there := next((other for other in self.ties[key] if other in found), None):
                found[key] = found[there]
        return found

    def recipes(self, weights: Weights) -> dict[str, StoredParts]:
        """What the parameters are made of. A tied head, or one that is not there, is made of the embedding."""
        found = self._stored_parts(weights)
        tied = getattr(self.config, "tie_word_embeddings", False) or self.headless
        if self.head not in found and self.embedding in found and tied:
            found[self.head] = found[self.embedding]
        found |= {key: replace(found[key], turned=True) for key in self.turned & found.keys()}
        return {key: recipe for key, recipe in found.items() if self.needed(key)}

    def of_source(self, source: Weights) -> "Frame":
        """The frame of a model as this source stores it."""
        found, turned, shapes = self.recipes(source), set(), dict(self.shapes)
        # Experts that compute nothing have matrices in the class, and none in published files.
        empty = getattr(text_config(self.config), "zero_expert_num", None) or 0
        for key, recipe in found.items():
            experts, *dims = self.shapes[key] if len(self.shapes[key]) == 3 else (0,)
            if dims and dims[0] != dims[1] and recipe.shape(source) == (experts, dims[1], dims[0]):
                turned.add(key)
            elif dims and empty and recipe.shape(source) == (experts - empty, *dims):
                shapes[key] = (experts - empty, *dims)
        return replace(self, shapes=shapes, headless=self.head not in found, turned=frozenset(turned))

    def converted(self, source: Weights, ranks: Sequence[Weights]) -> tuple["Frame", Weights, Sequence[Weights]]:
        """Source and ranks with parameters in the place of what transformers makes them of, and the frame of these."""
        conversions = self.conversions
        others = [] if conversions is None else conversions.others(source.names())
        if conversions is None or not others:
            return self, source, ranks
        made, whole, held = converted(others, self.shapes.keys(), source, ranks)
        return replace(self, conversions=replace(conversions, made=made)), whole, held

    def stored(self, weights: Weights, *, numbers: bool = True) -> list[str]:
        """The stored tensors that the parameters are made of; numbers: and buffers, which may be whole numbers."""
        found = self.recipes(weights).items()
        return sorted({name for key, each in found if numbers or key not in self.buffers for name in each.stored})

    def is_of_experts(self, key: str) -> bool:
        """Whether a parameter is a stack, a matrix or a bias of each expert."""
        owner, _, _ = key.rpartition(".")
        return len(self.shapes.get(f"{owner}.down_proj", ())) == 3

    def of_text(self, weights: Weights) -> list[str]:
        """The stored tensors of the text model, its embedding and its head."""
        text, ends = self.decoder.rpartition(".layers")[0], (self.head, self.embedding)
        mine = [each for key, each in self.recipes(weights).items() if key.startswith(text) or key in ends]
        return sorted({name for recipe in mine for name in recipe.stored})

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
        cuts, shapes = {}, dict[str, list[tuple[int, ...]]]()
        for key, recipe in whole.items():
            name = recipe.stored[0]
            for rank, found in enumerate(held):
                if key not in found:
                    some = recipe.stacked and any(each in ranks[rank].names() for each in recipe.stored)
                    what = f"has other experts of {key} than are its own" if some else f"has no tensor {name}"
                    raise DifferentError(f"rank {rank} {what}", tensor=name)
            shapes[key] = [found[key].shape(rank) for found, rank in zip(held, ranks, strict=True)]
        for key, recipe in whole.items():
            full, name = recipe.shape(source), recipe.stored[0]
            dims = {dim for shape in shapes[key] for dim, (n, m) in enumerate(zip(shape, full, strict=False)) if n != m}
            fits = all(len(shape) == len(full) for shape in shapes[key])
            if recipe.stacked and 0 not in dims:
                _in_order(key, [found[key] for found in held], [0] * len(held))
            down = f"{key.rpartition('.')[0]}.down_proj"
            if fits and 0 in dims and self.is_of_experts(key) and down in whole:
                experts = firsts(shapes[down], whole[down].shape(source))
                if experts is not None and (begin := starts(shapes[key], full, experts)) is not None:
                    _in_order(key, [found[key] for found in held], experts)
                    cuts[key] = _some_experts(shapes[key], full, experts, begin)
                    continue
            if len(dims) > 1 or not fits or (0 in dims and self.is_of_experts(key)):
                shown = ", ".join(map(str, shapes[key]))
                raise DifferentError(f"{name} does not have the model's shape", tensor=name, expected=full, found=shown)
            for dim in dims:
                cuts[key] = RankShares(dim, tuple(shape[dim] for shape in shapes[key]), full[dim])
        return with_shared_heads(cuts, self.text)


def _some_experts(shapes: Shapes, full: tuple[int, ...], experts: Sequence[int], begin: Sequence[int]) -> RankShares:
    """How ranks have some experts each, whole or cut."""
    dim = cut_dim(shapes, full)
    some = RankShares(0, tuple(shape[0] for shape in shapes), full[0], starts=tuple(experts))
    if not dim:
        return some
    return RankShares(dim, tuple(shape[dim] for shape in shapes), full[dim], starts=tuple(begin), experts=some)


def _in_order(key: str, recipes: Sequence[StoredParts], experts: Sequence[int]) -> None:
    """DifferentError unless each rank's experts have the numbers that they must have, where they have any."""
    for rank, (recipe, first) in enumerate(zip(recipes, experts, strict=True)):
        if recipe.stacked and recipe.first != first:
            what, last = f"rank {rank} has other experts of {key} than are its own", len(recipe.experts) - 1
            wanted, held = f"those from {first} on", f"{recipe.first} to {recipe.first + last}"
            raise DifferentError(what, tensor=recipe.stored[0], expected=wanted, found=held)


def frame_of(config: Any, layers: tuple[int, ...] | None = None) -> Frame:
    """The frame of a model, with these of its layers; all by default."""
    model = skeleton(config, torch.float32, torch.device("cpu"))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    names = {id(module): name for name, module in model.named_modules()}
    ends = (model.get_output_embeddings(), model.get_input_embeddings())  # type: ignore[operator]
    head, embedding = (f"{names[id(end)]}.weight" for end in ends)
    every = tuple(range(len(layers_of(model))))
    if not every:
        raise UnsupportedError("the config is of a model without layers", hint="take the published config.json")
    prefix = str(getattr(model, "base_model_prefix", ""))
    buffers = frozenset(shapes.keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)})
    untried = not tried(config)
    conversions = Conversions.of(model) if untried else None
    ties = ties_of(model) if untried else {}
    decoder = layers_of(model)[0][0].rpartition(".")[0] + "." if untried else ""
    more: dict[str, Any] = {"conversions": conversions, "ties": ties, "decoder": decoder, "depth": len(every)}
    return Frame(config, shapes, prefix, head, embedding, every if layers is None else layers, buffers, **more)


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
            continue
        tensor = recipe.tensor(weights)
        module._buffers[leaf] = move(tensor, device, dtype if tensor.is_floating_point() else None)
    for key, _ in model.named_parameters(remove_duplicate=False):
        if key in frame.shapes and key not in found and frame.needed(key):
            if rank is None:
                raise UnsupportedError("the source has not all that transformers' model needs", tensor=key)
            raise DifferentError(f"rank {rank} has no tensor {key}", tensor=key)


def skip_layers(model: Any, layers: Collection[int]) -> None:
    """Make every other layer give what it gets."""
    every = layers_of(model)
    known = text_config(model.config).model_type in TUPLE_LAYERS
    count = 2 if known else _tuple_of(every[0][1])

    def passing(hidden_states: Tensor, *_: Any, prev_topk_indices: Any = None, **__: Any) -> Any:
        return (hidden_states, prev_topk_indices, *repeat(None, count - 2))[:count] if count else hidden_states

    for i, (_, layer) in enumerate(every):
        if i not in layers:
            layer.forward = passing


def _tuple_of(layer: nn.Module) -> int:
    """Of how many values a layer gives a tuple, by what it returns last; 0 where it gives a tensor."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(type(layer).forward)))
    last = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)][-1]
    if isinstance(last, ast.Name):
        made = (node for node in ast.walk(tree) if isinstance(node, ast.Assign))
        named = [node.value for node in made if last.id in [getattr(each, "id", None) for each in node.targets]]
        last = next((value for value in named if isinstance(value, ast.Tuple)), last)
    return len(last.elts) if isinstance(last, ast.Tuple) else 0
