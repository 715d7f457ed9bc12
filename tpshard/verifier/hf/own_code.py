"""Models that publish code of their own, and that a class of transformers computes: by which config, from which names.

A type is here only if its class computes the same of all that its published configs say; where one says more, nothing
is given, and the files are compared alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tpshard.errors import CorruptError, DifferentError
from tpshard.verifier.hf import mistral_params, own_configs
from tpshard.verifier.hf.own_configs import NO_VALUES, Config, Made
from tpshard.verifier.model_types import BY_CONFIG

PUBLISHED_AS = "published_as"
"""The key of a class's config that says under which type a model was published."""


@dataclass(frozen=True)
class OwnCode:
    """A published type. config: that of its class, or words for what this does not compute.

    names: what the class calls parts of names, one after the other. fused: a module whose rows are those of several,
    as many as each of these has; shared: a key of the config that says in how many shares, each with a part of all.
    joined: what is one parameter of the class, which has its parts' rows one behind another; those of each expert where
    names have a `*`. shaped: parameters that files may have in more dims. normed: modules whose rows the model divides
    by their length, and the key of the class's config that says so. turned: modules of whose heads a part is turned by
    positions, in a class that turns whole heads. paired: modules of whose heads what is turned together lies side by
    side, and what the class calls them, where it lies half a head apart. adapters: of matrices that lie in a
    `base_layer`; all are added to it at once, which no input asks for, so that each is run.
    """

    config: Callable[[Config], Made]
    names: tuple[tuple[str, str], ...] = ()
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    shared: str | None = None
    joined: tuple[tuple[tuple[str, ...], str], ...] = ()
    shaped: tuple[str, ...] = ()
    normed: tuple[tuple[str, str], ...] = ()
    turned: tuple[str, ...] = ()
    paired: tuple[tuple[str, str], ...] = ()
    adapters: tuple[str, ...] = ()

    @property
    def has_class_names(self) -> bool:
        """Whether files have the parameters as the class has them."""
        changed = (self.names, self.fused, self.joined, self.shaped, self.normed, self.turned, self.paired)
        return not (any(changed) or self.adapters)


_QKV = ("q_proj", "k_proj", "v_proj")
_GPT = ((r"^transformer\.wte\.", "model.embed_tokens."), (r"^transformer\.ln_f\.", "model.norm."))
_GPT_LAYER = (
    *((r"^transformer\.h\.", "model.layers."), (r"\.ln_1\.", ".input_layernorm.")),
    (r"\.ln_2\.", ".post_attention_layernorm."),
)
_LING = (
    *((r"^model\.word_embeddings\.", "model.embed_tokens."), (r"\.attention\.dense\.", ".self_attn.o_proj.")),
    (r"\.attention\.", ".self_attn."),
)
_DECAYS = (".self_attn.forget_gate.A_log",)
_LING_FUSED = ((".self_attn.query_key_value", _QKV),)


def _gate_up(module: str) -> tuple[str, str]:
    return f"{module}.gate_proj.weight", f"{module}.up_proj.weight"


OWN_CODE: dict[str, OwnCode] = {
    "minicpm": OwnCode(own_configs.minicpm),
    "exaone": OwnCode(
        own_configs.exaone,
        (
            *(*_GPT, *_GPT_LAYER, (r"\.attn\.attention\.out_proj\.", ".self_attn.o_proj.")),
            *((r"\.attn\.attention\.", ".self_attn."), (r"\.mlp\.c_fc_0\.", ".mlp.gate_proj.")),
            *((r"\.mlp\.c_fc_1\.", ".mlp.up_proj."), (r"\.mlp\.c_proj\.", ".mlp.down_proj.")),
        ),
    ),
    "qwen": OwnCode(
        own_configs.qwen,
        (
            *(*_GPT, *_GPT_LAYER, (r"\.mlp\.w2\.", ".mlp.gate_proj."), (r"\.mlp\.w1\.", ".mlp.up_proj.")),
            *((r"\.mlp\.c_proj\.", ".mlp.down_proj."), (r"\.attn\.c_proj\.", ".self_attn.o_proj.")),
            (r"\.attn\.c_attn\.", ".self_attn.c_attn."),
        ),
        ((".self_attn.c_attn", _QKV),),
    ),
    "baichuan": OwnCode(own_configs.baichuan, fused=((".self_attn.W_pack", _QKV),), normed=(("lm_head", "norm_head"),)),
    "mimo_v2": OwnCode(own_configs.mimo_v2, fused=((".self_attn.qkv_proj", _QKV),), shared="num_key_value_heads"),
    "bailing_moe": OwnCode(
        own_configs.bailing_moe,
        (
            *(*_LING, (r"\.mlp\.gate\.weight", ".block_sparse_moe.router.weight")),
            (r"\.mlp\.shared_experts\.down_proj\.", ".shared_mlp.output_linear."),
        ),
        _LING_FUSED,
        joined=(
            (_gate_up(".mlp.experts.*"), ".block_sparse_moe.experts.gate_up_proj"),
            ((".mlp.experts.*.down_proj.weight",), ".block_sparse_moe.experts.down_proj"),
            (_gate_up(".mlp.shared_experts"), ".shared_mlp.input_linear.weight"),
        ),
    ),
    "bailing_moe_v2": OwnCode(
        own_configs.bailing_moe_v2,
        (
            *(*_LING, (r"\.query_layernorm\.", ".q_norm."), (r"\.key_layernorm\.", ".k_norm.")),
            (r"\.gate\.expert_bias", ".gate.e_score_correction_bias"),
        ),
        _LING_FUSED,
    ),
    "bailing_hybrid": OwnCode(own_configs.bailing_hybrid, shaped=_DECAYS),
    "bailing_moe_v3": OwnCode(own_configs.bailing_moe_v3, shaped=_DECAYS),
    "chatglm": OwnCode(
        own_configs.chatglm,
        (
            (r"^transformer\.embedding\.word_embeddings\.", "model.embed_tokens."),
            *((r"^transformer\.encoder\.layers\.", "model.layers."), (r"^transformer\.output_layer\.", "lm_head.")),
            (r"^transformer\.encoder\.final_layernorm\.", "model.norm."),
            *((r"\.self_attention\.dense\.", ".self_attn.o_proj."), (r"\.self_attention\.", ".self_attn.")),
            *((r"\.mlp\.dense_h_to_4h\.", ".mlp.gate_up_proj."), (r"\.mlp\.dense_4h_to_h\.", ".mlp.down_proj.")),
        ),
        _LING_FUSED,
    ),
    **dict.fromkeys(
        ("minimax_text_01", "minimax_m1"),
        OwnCode(own_configs.minimax_text_01, turned=(".self_attn.q_proj.weight", ".self_attn.k_proj.weight")),
    ),
    "nemotron-nas": OwnCode(own_configs.nemotron_nas),
    "phi4mm": OwnCode(own_configs.phi4mm, adapters=("speech", "vision")),
    "mistral_native": OwnCode(
        mistral_params.text_config,
        mistral_params.NAMES,
        joined=(
            ((".experts.*.w1.weight", ".experts.*.w3.weight"), ".experts.gate_up_proj"),
            ((".experts.*.w2.weight",), ".experts.down_proj"),
        ),
        paired=mistral_params.PAIRED,
    ),
}
"""By model_type. Read off each model's own code, which vLLM's classes follow."""


def as_known(config: Config) -> Config:
    """The config of the class that computes this model; the config itself where there is none, or none is needed."""
    model_type, made = str(config.get("model_type")), _made(config)
    if made is None or isinstance(made, str):
        return config
    if made.get("model_type", model_type) == model_type:  # else it is of several, and says which
        made["model_type"] = BY_CONFIG[model_type]
    return made if OWN_CODE[model_type].has_class_names else made | {PUBLISHED_AS: model_type}


def unlike(config: Config) -> str | None:
    """What a published model computes that the class does not which else computes its type; None where nothing."""
    made = _made(config)
    return made if isinstance(made, str) else None


def _made(config: Config) -> Made | None:
    """What is made of a config; None of other types, and where it lacks a size."""
    known = OWN_CODE.get(str(config.get("model_type")))
    try:
        return None if known is None else known.config(config)
    except KeyError:
        return None
    except NO_VALUES:
        return "values in its config that nothing is computed with"


def published_as(config: Any) -> str | None:
    """The type whose names must become those of the class; None where they are its own."""
    found = getattr(config, PUBLISHED_AS, None)
    return None if found is None else str(found)


def conversions_of(model_type: str, config: Any) -> list[Any]:
    """What transformers' loading would have to be told of a published type. config: of its class."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

    known = OWN_CODE[model_type]
    found: list[Any] = [WeightRenaming(old, new) for old, new in known.names]
    for fused, parts in known.fused:
        start = fused.rpartition(".")[0]
        for leaf in ("weight", "bias"):
            each = [f"{start}.{part}.{leaf}" for part in parts]
            found.append(WeightConverter(f"{fused}.{leaf}", each, [_split(known.shared)]))
    for joined, whole in known.joined:
        stacked = "*" in joined[0]
        operations: list[Any] = [MergeModulelist(dim=0)] if stacked else []
        operations += [Concatenate(dim=int(stacked))] if len(joined) > 1 else []
        found.append(WeightConverter(list(joined), whole, operations))
    found += [WeightConverter(each, each, [_changed(_shaped)]) for each in known.shaped]
    normed = (f"{module}.weight" for module, key in known.normed if getattr(config, key))
    found += [WeightConverter(each, each, [_changed(_normed)]) for each in normed]
    found += [WeightConverter(f"{old}.weight", f"{new}.weight", [_changed(_in_halves)]) for old, new in known.paired]
    if known.turned and config.rotary_dim != config.head_dim:
        order = _order(config.rotary_dim, config.head_dim)
        found += [WeightConverter(each, each, [_changed(partial(_turned, order))]) for each in known.turned]
    if known.adapters:
        stored = (".base_layer.weight", *(f".lora_{each}.{name}.weight" for name in known.adapters for each in "AB"))
        scales = {name: _scale(getattr(config, f"{name}_lora", None)) for name in known.adapters}
        found.append(WeightConverter(list(stored), ".weight", [_changed(partial(_adapted, scales))]))
    return found


def adapters_of(config: Any) -> tuple[str, ...]:
    """Of which adapters a class is run that its config is made for."""
    published = published_as(config)
    return OWN_CODE[published].adapters if published else ()


def _scale(said: Any) -> float:
    """By how much an adapter's product counts."""
    return said["lora_alpha"] / said["r"] if isinstance(said, dict) else 1.0


Parts = Mapping[str, Any]
"""By pattern, the stored tensor that a parameter is made of."""
Change = Callable[[Parts, str, Any], Any]
"""Of parts, what they make: a parameter of this name, of a model."""


def _shaped(parts: Parts, name: str, model: Any) -> Any:
    """In the dims of the class."""
    (tensor,) = parts.values()
    return tensor.reshape(model.get_parameter(name).shape)


def _normed(parts: Parts, *_: Any) -> Any:
    """Rows of length 1; of marks the same ones, since a row's length is that of the whole row."""
    import torch

    (tensor,) = parts.values()
    return tensor if tensor.dtype == torch.bool else torch.nn.functional.normalize(tensor)


def _order(turned: int, head: int) -> list[int]:
    """Features of a head so that two which are turned together lie half of it apart."""
    half, middle = turned // 2, (turned + head) // 2
    return [*range(half), *range(turned, middle), *range(half, turned), *range(middle, head)]


def _turned(order: list[int], parts: Parts, *_: Any) -> Any:
    """Rows with each head's features in this order."""
    (tensor,) = parts.values()
    return tensor.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)


def _in_halves(parts: Parts, name: str, model: Any) -> Any:
    """The rows of each head so that the first of each pair come before the second ones.

    Of latent attention, which turns pairs as they are, nothing changes.
    """
    (rows,) = parts.values()
    attention = model.get_submodule(name.rsplit(".", 2)[0])
    if hasattr(attention, "qk_rope_head_dim"):
        return rows
    return rows.unflatten(0, (-1, attention.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _adapted(scales: Mapping[str, float], parts: Parts, key: str, _: Any) -> Any:
    """A matrix and its adapters' products, in float64, where no element is lost.

    Of marks the matrix's. DifferentError where a rank's part of an adapter is not of the same elements.
    """
    import torch

    found = parts[".base_layer.weight"]
    marks = found.dtype == torch.bool
    found = found if marks else found.double()
    for name, scale in scales.items():
        first, second = (parts.get(f".lora_{each}.{name}.weight") for each in "AB")
        if first is None or second is None:
            continue
        if marks:
            if not bool((found == (second.any(1)[:, None] & first.any(0))).all()):
                what = f"the adapter {name} of {key} is not cut as the matrix that it is added to"
                raise DifferentError(what, tensor=key)
        else:
            found = found + scale * second.double() @ first.double()
    return found


def _changed(change: Change) -> Any:
    """What makes one parameter of stored tensors."""
    from transformers.core_model_loading import ConversionOps

    class Changed(ConversionOps):
        """A parameter by a function of its parts."""

        def convert(  # type: ignore[no-untyped-def, override]
            self, input_dict, source_patterns, target_patterns, full_layer_name, model, **kwargs
        ):
            parts = {pattern: each[0] if isinstance(each, list) else each for pattern, each in input_dict.items()}
            return {target_patterns[0]: change(parts, full_layer_name, model)}

    return Changed()


def _split(shared: str | None) -> Any:
    """What splits rows into those of several modules, as many as each has: one behind the other, or in shares."""
    import torch
    from transformers.core_model_loading import Split

    class Shares(Split):
        """Each share holds a part of the rows of every module."""

        def convert(  # type: ignore[no-untyped-def, override]
            self, input_dict, source_patterns, target_patterns, full_layer_name, model, **kwargs
        ):
            rows = next(iter(input_dict.values()))
            rows = rows[0] if isinstance(rows, list) else rows
            count = 1 if shared is None else getattr(model.config, shared)
            sizes = [
                model.get_parameter(full_layer_name.replace(target_patterns[0], target)).shape[0] // count
                for target in target_patterns
            ]
            shares = rows.chunk(count)
            if any(share.shape[0] != sum(sizes) for share in shares):
                what, hint = f"config.json contradicts the shape of {full_layer_name}", "take the published config.json"
                expected, found = f"{count} times the rows {sizes}", f"{rows.shape[0]} rows"
                raise CorruptError(what, tensor=full_layer_name, expected=expected, found=found, hint=hint)
            each = [share.split(sizes) for share in shares]
            return {target: torch.cat([share[i] for share in each]) for i, target in enumerate(target_patterns)}

    return Shares(dim=0)
