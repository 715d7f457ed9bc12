"""Megatron's arguments for a model, as `common.pt` has them: what `--use-checkpoint-args` takes from there."""

from collections.abc import Mapping, Sequence
from typing import Any

from tpshard.formats.base import reads_config
from tpshard.formats.dcp_metadata import Described
from tpshard.planning.model import Model


@reads_config
def arguments(model: Model, tensors: Sequence[Described], tp: int) -> dict[str, Any]:
    """Plain values alone, so that reading them needs no class of Megatron's."""
    config, kind = model.config, model.architecture.get("model_type")
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    names = {name.rpartition("layers.")[2] for name in shapes}
    gpt2, nemotron = kind == "gpt2", kind == "nemotron"

    def either(*keys: str) -> Any:
        return next((config[key] for key in keys if config.get(key) is not None), None)

    heads, hidden = either("num_attention_heads", "n_head"), either("hidden_size", "n_embd")
    groups = either("num_key_value_heads") or heads
    padded = shapes["embedding.word_embeddings.weight"][0]
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
        "untie_embeddings_and_output_weights": "output_layer.weight" in shapes,
        "padded_vocab_size": padded,
        "make_vocab_size_divisible_by": padded // tp,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
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
    return args | _experts(config, names) if args["num_experts"] else args


def _base(config: Mapping[str, Any]) -> int:
    """The base of rotary frequencies, where newer configs have it too."""
    said = config.get("rope_parameters")
    base = config.get("rope_theta") or (said.get("rope_theta") if isinstance(said, dict) else None)
    return int(base or 10000)


def _experts(config: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    shared = config.get("shared_expert_intermediate_size")
    if shared is None and config.get("n_shared_experts"):
        shared = config["n_shared_experts"] * config["moe_intermediate_size"]
    first = config.get("first_k_dense_replace")
    frequency: Any = 1
    if first:
        frequency = [0] * first + [1] * (config["num_hidden_layers"] - first)
    return {
        "moe_ffn_hidden_size": config.get("moe_intermediate_size") or config.get("intermediate_size"),
        "moe_router_topk": config.get("num_experts_per_tok"),
        "moe_layer_freq": frequency,
        # Chosen experts' weights that do not sum to 1 are those of a softmax over all experts.
        "moe_router_pre_softmax": "num_local_experts" not in config and not config.get("norm_topk_prob"),
        "moe_shared_expert_intermediate_size": shared,
        "moe_router_enable_expert_bias": any(name.endswith("router.expert_bias") for name in names),
    }
