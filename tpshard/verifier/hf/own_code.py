"""Models that publish code of their own, and that a class of transformers computes: by which config, from which names.

A type is here only if its class computes the same of all that its published configs say; where one says more, nothing
is given, and the files are compared alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tpshard.verifier.hf import mistral_params
from tpshard.verifier.model_types import BY_CONFIG

Config = Mapping[str, Any]
PUBLISHED_AS = "published_as"
"""The key of a class's config that says under which type a model was published."""


@dataclass(frozen=True)
class OwnCode:
    """A published type. config: that of its class; None where this computes something else.

    names: what the class calls parts of names, one after the other. fused: a module whose rows are those of several,
    as many as each of these has; shared: a key of the config that says in how many shares, each with a part of all.
    paired: modules whose rows are of heads in which what is rotated together lies side by side, and what the class
    calls them, where it is half a head apart. experts: what gate, up and down of each expert are called, where that is
    not what the class's own files call them.
    """

    config: Callable[[Config], dict[str, Any] | None]
    names: tuple[tuple[str, str], ...] = ()
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    shared: str | None = None
    paired: tuple[tuple[str, str], ...] = ()
    experts: tuple[str, str, str] | None = None


def _renamed(config: Config, keys: Mapping[str, str]) -> dict[str, Any]:
    found = {key: value for key, value in config.items() if key not in keys}
    return {**found, **{new: config[old] for old, new in keys.items() if old in config}}


def _minicpm(config: Config) -> dict[str, Any] | None:
    """Granite: both scale embeddings, what each layer adds, and logits."""
    if config.get("num_experts"):
        return None
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    return {
        **{key: value for key, value in config.items() if key not in ("scale_emb", "scale_depth", "dim_model_base")},
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
        "embedding_multiplier": config.get("scale_emb", 1),
        "residual_multiplier": config.get("scale_depth", 1) / layers**0.5,
        "logits_scaling": hidden / config.get("dim_model_base", 1),
        "attention_multiplier": (config.get("head_dim") or hidden // config["num_attention_heads"]) ** -0.5,
    }


def _exaone(config: Config) -> dict[str, Any]:
    keys = {
        "num_layers": "num_hidden_layers",
        "layer_norm_epsilon": "rms_norm_eps",
        "activation_function": "hidden_act",
    }
    return _renamed(config, keys)


def _qwen(config: Config) -> dict[str, Any] | None:
    """Qwen2 without groups; gate and up are each half as wide as said. Longer texts than the trained ones differ."""
    if not config.get("no_bias", True):
        return None
    keys = {"layer_norm_epsilon": "rms_norm_eps", "rotary_emb_base": "rope_theta"}
    return {
        **_renamed(config, keys),
        "num_key_value_heads": config["num_attention_heads"],
        "intermediate_size": (config.get("intermediate_size") or config["ffn_hidden_size"]) // 2,
        "hidden_act": "silu",
    }


def _mimo_v2(config: Config) -> dict[str, Any] | None:
    window = {
        "num_attention_heads": "swa_num_attention_heads",
        "head_dim": "swa_head_dim",
        "v_head_dim": "swa_v_head_dim",
    }
    alike = all(config.get(swa) in (None, config.get(key)) for key, swa in window.items())
    kinds, experts = config.get("hybrid_layer_pattern"), config.get("moe_layer_freq")
    groups = config.get("swa_num_key_value_heads")
    sinks = config.get("add_swa_attention_sink_bias", True) and not config.get("add_full_attention_sink_bias")
    if not (alike and kinds and experts and sinks) or groups not in (None, 2 * config["num_key_value_heads"]):
        return None
    partial = config.get("partial_rotary_factor", 1.0)
    thetas = {
        "full_attention": config.get("rope_theta", 5e6),
        "sliding_attention": config.get("swa_rope_theta", 1e4),
    }
    return {
        **_renamed(config, {"layernorm_epsilon": "rms_norm_eps"}),
        "layer_types": ["sliding_attention" if kind else "full_attention" for kind in kinds],
        "mlp_layer_types": ["sparse" if kind else "dense" for kind in experts],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": partial}
            for kind, theta in thetas.items()
        },
    }


def _bailing_moe_v2(config: Config) -> dict[str, Any] | None:
    """GLM-4.5: the same attention, with norms of its heads, and the same choice of experts."""
    shared = config.get("num_shared_experts") or 0
    each = config.get("moe_shared_expert_intermediate_size", config["moe_intermediate_size"])
    alike = (
        config.get("score_function", "sigmoid") == "sigmoid"
        and config.get("moe_router_enable_expert_bias", True)
        and shared
        and each == config["moe_intermediate_size"]
        and not config.get("use_bias")
        and not config.get("norm_head")
    )
    if not alike:
        return None
    keys = {
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
        "use_qkv_bias": "attention_bias",
    }
    partial = config.get("partial_rotary_factor", 1.0)
    if config.get("rotary_dim") and config.get("head_dim"):
        partial = config["rotary_dim"] / config["head_dim"]
    return {**_renamed(config, keys), "partial_rotary_factor": partial}


def _chatglm(config: Config) -> dict[str, Any] | None:
    """GLM-4 as it was before its class: fused, with rows of query, key and value one behind another."""
    alike = (
        config.get("rmsnorm", True)
        and config.get("multi_query_attention", True)
        and not config.get("add_bias_linear")
        and not config.get("apply_residual_connection_post_layernorm")
        and config.get("post_layer_norm", True)
        and config.get("original_rope", True)
    )
    if not alike:
        return None
    keys = {
        **{"num_layers": "num_hidden_layers", "multi_query_group_num": "num_key_value_heads"},
        **{"ffn_hidden_size": "intermediate_size", "kv_channels": "head_dim", "layernorm_epsilon": "rms_norm_eps"},
        **{
            "add_qkv_bias": "attention_bias",
            "padded_vocab_size": "vocab_size",
            "seq_length": "max_position_embeddings",
        },
    }
    theta = 10000 * config.get("rope_ratio", 1)
    return {"pad_token_id": None, **_renamed(config, keys), "partial_rotary_factor": 0.5, "rope_theta": theta}


_QKV = ("q_proj", "k_proj", "v_proj")
_GPT = ((r"^transformer\.wte\.", "model.embed_tokens."), (r"^transformer\.ln_f\.", "model.norm."))
_GPT_LAYER = (
    *((r"^transformer\.h\.", "model.layers."), (r"\.ln_1\.", ".input_layernorm.")),
    (r"\.ln_2\.", ".post_attention_layernorm."),
)
OWN_CODE: dict[str, OwnCode] = {
    "minicpm": OwnCode(_minicpm),
    "exaone": OwnCode(
        _exaone,
        (
            *(*_GPT, *_GPT_LAYER, (r"\.attn\.attention\.out_proj\.", ".self_attn.o_proj.")),
            *((r"\.attn\.attention\.", ".self_attn."), (r"\.mlp\.c_fc_0\.", ".mlp.gate_proj.")),
            *((r"\.mlp\.c_fc_1\.", ".mlp.up_proj."), (r"\.mlp\.c_proj\.", ".mlp.down_proj.")),
        ),
    ),
    "qwen": OwnCode(
        _qwen,
        (
            *(*_GPT, *_GPT_LAYER, (r"\.mlp\.w2\.", ".mlp.gate_proj."), (r"\.mlp\.w1\.", ".mlp.up_proj.")),
            *((r"\.mlp\.c_proj\.", ".mlp.down_proj."), (r"\.attn\.c_proj\.", ".self_attn.o_proj.")),
            (r"\.attn\.c_attn\.", ".self_attn.c_attn."),
        ),
        ((".self_attn.c_attn", _QKV),),
    ),
    "mimo_v2": OwnCode(_mimo_v2, fused=((".self_attn.qkv_proj", _QKV),), shared="num_key_value_heads"),
    "bailing_moe_v2": OwnCode(
        _bailing_moe_v2,
        (
            *((r"^model\.word_embeddings\.", "model.embed_tokens."), (r"\.attention\.dense\.", ".self_attn.o_proj.")),
            *((r"\.attention\.", ".self_attn."), (r"\.query_layernorm\.", ".q_norm.")),
            *((r"\.key_layernorm\.", ".k_norm."), (r"\.gate\.expert_bias", ".gate.e_score_correction_bias")),
        ),
        ((".self_attn.query_key_value", _QKV),),
    ),
    "chatglm": OwnCode(
        _chatglm,
        (
            (r"^transformer\.embedding\.word_embeddings\.", "model.embed_tokens."),
            *((r"^transformer\.encoder\.layers\.", "model.layers."), (r"^transformer\.output_layer\.", "lm_head.")),
            (r"^transformer\.encoder\.final_layernorm\.", "model.norm."),
            *((r"\.self_attention\.dense\.", ".self_attn.o_proj."), (r"\.self_attention\.", ".self_attn.")),
            *((r"\.mlp\.dense_h_to_4h\.", ".mlp.gate_up_proj."), (r"\.mlp\.dense_4h_to_h\.", ".mlp.down_proj.")),
        ),
        ((".self_attn.query_key_value", _QKV),),
    ),
    "mistral_native": OwnCode(
        mistral_params.text_config, mistral_params.NAMES, paired=mistral_params.PAIRED, experts=("w1", "w3", "w2")
    ),
}
"""By model_type. Read off each model's own code, which vLLM's classes follow."""


def as_known(config: Config) -> Config:
    """The config of the class that computes this model; the config itself where there is none, or none is needed."""
    model_type = str(config.get("model_type"))
    if model_type not in OWN_CODE:
        return config
    known = OWN_CODE[model_type]
    try:
        made = known.config(config)
    except KeyError:  # a config that lacks a size
        return config
    if made is None:
        return config
    if made.get("model_type", model_type) == model_type:  # else it is of several, and says which
        made["model_type"] = BY_CONFIG[model_type]
    return made | {PUBLISHED_AS: model_type} if known.names or known.fused else made


def published_as(config: Any) -> str | None:
    """The type whose names must become those of the class; None where they are its own."""
    found = getattr(config, PUBLISHED_AS, None)
    return None if found is None else str(found)


def conversions_of(model_type: str) -> list[Any]:
    """What transformers' loading would have to be told of a published type."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

    known = OWN_CODE[model_type]
    found: list[Any] = [WeightRenaming(old, new) for old, new in known.names]
    for fused, parts in known.fused:
        start = fused.rpartition(".")[0]
        for leaf in ("weight", "bias"):
            each = [f"{start}.{part}.{leaf}" for part in parts]
            found.append(WeightConverter(f"{fused}.{leaf}", each, [_split(known.shared)]))
    found += [WeightConverter(f"{old}.weight", f"{new}.weight", [_in_halves()]) for old, new in known.paired]
    if known.experts:
        gate, up, down = (f".experts.*.{each}.weight" for each in known.experts)
        joined = [MergeModulelist(dim=0), Concatenate(dim=1)]
        found.append(WeightConverter([gate, up], ".experts.gate_up_proj", joined))
        found.append(WeightConverter(down, ".experts.down_proj", joined[:1]))
    return found


def _in_halves() -> Any:
    """What puts the rows of each head so that the first of each pair come before the second ones."""
    from transformers.core_model_loading import ConversionOps

    class InHalves(ConversionOps):
        """Of latent attention, which rotates pairs as they are, nothing changes."""

        def convert(  # type: ignore[no-untyped-def, override]
            self, input_dict, source_patterns, target_patterns, full_layer_name, model, **kwargs
        ):
            rows = next(iter(input_dict.values()))
            rows = rows[0] if isinstance(rows, list) else rows
            attention = model.get_submodule(full_layer_name.rsplit(".", 2)[0])
            if not hasattr(attention, "qk_rope_head_dim"):
                rows = rows.unflatten(0, (-1, attention.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
            return {target_patterns[0]: rows}

    return InHalves()


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
            each = [share.split(sizes) for share in rows.chunk(count)]
            return {target: torch.cat([share[i] for share in each]) for i, target in enumerate(target_patterns)}

    return Shares(dim=0)
