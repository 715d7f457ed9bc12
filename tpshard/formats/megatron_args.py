"""Megatron's arguments for a model, as its checkpoints have them: what `--use-checkpoint-args` takes from there."""

from collections.abc import Collection, Mapping
from typing import Any

from tpshard.formats.base import reads_config
from tpshard.formats.torch_archive import pickle_text, pickle_value
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.storage.tensor_names import numbered


@reads_config
def arguments(model: Model, names: Collection[str], vocab: int, mesh: Mesh, **more: Any) -> dict[str, Any]:
    """Plain values alone, so that reading them needs no class of Megatron's.

    names: of Megatron's parameters. vocab: the rows of its embedding. more: what else the checkpoint says of itself.
    """
    config, kind = model.config, model.architecture.get("model_type")
    gpt2, nemotron = kind == "gpt2", kind == "nemotron"

    def either(*keys: str) -> Any:
        return next((config[key] for key in keys if config.get(key) is not None), None)

    heads, hidden = either("num_attention_heads", "n_head"), either("hidden_size", "n_embd")
    groups = either("num_key_value_heads") or heads
    args: dict[str, Any] = {
        "num_layers": either("num_hidden_layers", "n_layer"),
        "hidden_size": hidden,
        "ffn_hidden_size": either("intermediate_size", "n_inner") or 4 * hidden,
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": either("head_dim") or hidden // heads,
        "seq_length": either("max_position_embeddings", "n_positions"),
        "max_position_embeddings": either("max_position_embeddings", "n_positions"),
        "position_embedding_type": "learned_absolute" if gpt2 else "rope",
        "use_rotary_position_embeddings": not gpt2,
        "rotary_base": _base(config),
        "rotary_percent": float(either("partial_rotary_factor") or 0.5) if nemotron else 1.0,
        "rotary_interleaved": False,
        "normalization": "LayerNorm" if gpt2 or nemotron else "RMSNorm",
        "norm_epsilon": either("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
        "apply_layernorm_1p": nemotron,
        "swiglu": not (gpt2 or nemotron),
        "squared_relu": nemotron,
        "add_bias_linear": any(name.endswith("linear_fc2.bias") for name in names),
        "add_qkv_bias": any(name.endswith("linear_qkv.bias") for name in names),
        "qk_layernorm": any(name.endswith("self_attention.q_layernorm.weight") for name in names),
        "untie_embeddings_and_output_weights": "output_layer.weight" in names,
        "padded_vocab_size": vocab,
        "make_vocab_size_divisible_by": vocab // mesh.tp,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tensor_model_parallel_size": mesh.tp,
        "pipeline_model_parallel_size": mesh.pp,
        "num_experts": either("num_local_experts", "num_experts", "n_routed_experts"),
    }
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if isinstance(scaling, dict) and scaling.get("rope_type") == "llama3":
        args |= {"use_rope_scaling": True, "rope_scaling_factor": float(scaling.get("factor", 8))}
    if "kv_lora_rank" in config:
        args |= {
            "multi_latent_attention": True,
            "q_lora_rank": config.get("q_lora_rank"),
            "kv_lora_rank": config["kv_lora_rank"],
            "qk_head_dim": config.get("qk_nope_head_dim"),
            "qk_pos_emb_head_dim": config.get("qk_rope_head_dim"),
            "v_head_dim": config.get("v_head_dim"),
        }
    if predictors := len({name.split(".")[2] for name in names if name.startswith("mtp.layers.")}):
        args["mtp_num_layers"] = predictors
    return args | (_experts(model, names, args["num_layers"]) if args["num_experts"] else {}) | more


def pickled(args: Mapping[str, Any], iteration: int = 0) -> bytes:
    """The opcodes of the items of a checkpoint's dict that say what it is, to stand behind `(`."""
    said = {"checkpoint_version": 3.0, "iteration": iteration}
    items = b"".join(pickle_text(key) + pickle_value(value) for key, value in said.items())
    return items + pickle_text("args") + b"cargparse\nNamespace\n)\x81" + pickle_value(dict(args)) + b"b"


def _base(config: Mapping[str, Any]) -> int:
    """The base of rotary frequencies, where newer configs have it too."""
    said = config.get("rope_parameters")
    base = config.get("rope_theta") or (said.get("rope_theta") if isinstance(said, dict) else None)
    return int(base or 10000)


def _experts(model: Model, names: Collection[str], layers: int) -> dict[str, Any]:
    config = model.config
    shared = config.get("shared_expert_intermediate_size")
    if shared is None and config.get("n_shared_experts"):
        shared = config["n_shared_experts"] * config["moe_intermediate_size"]
    found: dict[str, Any] = {
        "moe_ffn_hidden_size": config.get("moe_intermediate_size") or config.get("intermediate_size"),
        "moe_router_topk": config.get("num_experts_per_tok"),
        "moe_layer_freq": _frequency(model, layers),
        # Chosen experts' weights that do not sum to 1 are those of a softmax over all experts.
        "moe_router_pre_softmax": "num_local_experts" not in config and not config.get("norm_topk_prob"),
        "moe_shared_expert_intermediate_size": shared,
        "moe_router_enable_expert_bias": any(name.endswith("router.expert_bias") for name in names),
        "moe_router_score_function": "sigmoid" if config.get("model_type") == "deepseek_v3" else "softmax",
    }
    if (factor := config.get("routed_scaling_factor")) is not None:
        found["moe_router_topk_scaling_factor"] = float(factor)
    if (config.get("n_group") or 1) > 1:
        found |= {"moe_router_num_groups": config["n_group"], "moe_router_group_topk": config["topk_group"]}
    return found


def _frequency(model: Model, layers: int) -> int | list[int]:
    """Which layers have experts: 1 where all of them do."""
    if model.experts is None:
        return 1
    named = ((model.full_name(tensor.name), tensor.shape) for tensor in model.tensors)
    sparse = {numbered(name)[1][0] for name, shape in named if model.experts.number(name) is not None}
    found = [int(layer in sparse) for layer in range(layers)]
    return found if 0 in found else 1
