"""What Megatron's arguments say of a model, as the config.json of a Hugging Face checkpoint."""

from collections.abc import Mapping
from typing import Any

from tpshard.errors import CorruptError, UnsupportedError

MAKE_CONFIG = "put the config.json of the model beside latest_checkpointed_iteration.txt"
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "nemotron": "NemotronForCausalLM",
}


def require_gpt(args: Mapping[str, Any], path: object) -> None:
    """UnsupportedError for a model that is not made of alike layers of attention and MLP."""
    for key in ("hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model"):
        if found := args.get(key):
            what = "this is a hybrid model, which numbers attention and MLP as layers of their own"
            hint = "convert it with Megatron-Bridge; a GPTModel of Megatron is read here"
            raise UnsupportedError(what, path=path, expected="a GPTModel", found=f"{key} {found}", hint=hint)


def config_of(args: Mapping[str, Any], dtype: str, tied: bool, path: object) -> dict[str, Any]:
    """config.json, without vocab_size, as far as the arguments tell; they cannot tell Mistral from LLaMA.

    tied: whether the checkpoint has no head of its own. UnsupportedError for a model that the arguments do not
    describe well enough.
    """
    if not args:
        what = "nothing in the checkpoint describes the model: it has no arguments"
        raise UnsupportedError(what, path=path, expected="args, as Megatron-LM saves them", hint=MAKE_CONFIG)
    if args.get("multi_latent_attention"):
        what = "the arguments of a model with latent attention do not give all that its config.json needs"
        raise UnsupportedError(what, path=path, hint=MAKE_CONFIG)
    kind = _model_type(args, path)
    config: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "torch_dtype": _DTYPES.get(dtype),
        "tie_word_embeddings": tied,
    }
    needed = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings")
    if missing := [key for key in needed if not isinstance(args.get(key), int)]:
        what = "the arguments in the checkpoint do not describe the model"
        raise CorruptError(what, path=path, expected=", ".join(needed), found=f"no {missing[0]}", hint=MAKE_CONFIG)
    epsilon = args.get("norm_epsilon") or args.get("layernorm_epsilon") or 1e-5
    if kind == "gpt2":
        return config | {
            "n_layer": args["num_layers"],
            "n_embd": args["hidden_size"],
            "n_head": args["num_attention_heads"],
            "n_inner": args["ffn_hidden_size"],
            "n_positions": args["max_position_embeddings"],
            "layer_norm_epsilon": epsilon,
            "activation_function": "gelu_new",
        }
    config |= {
        "num_hidden_layers": args["num_layers"],
        "hidden_size": args["hidden_size"],
        "num_attention_heads": args["num_attention_heads"],
        "num_key_value_heads": _groups(args),
        "head_dim": args.get("kv_channels") or args["hidden_size"] // args["num_attention_heads"],
        "intermediate_size": args["ffn_hidden_size"],
        "max_position_embeddings": args["max_position_embeddings"],
        "rope_theta": float(args.get("rotary_base") or 10000),
    }
    if args.get("use_rope_scaling"):
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(args.get("rope_scaling_factor") or 8),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    if kind == "nemotron":
        rotary = float(args.get("rotary_percent") or 1.0)
        return config | {"hidden_act": "relu2", "norm_eps": epsilon, "partial_rotary_factor": rotary}
    config |= {"hidden_act": "silu", "rms_norm_eps": epsilon}
    if kind == "llama" and args.get("add_bias_linear"):
        config |= {"attention_bias": True, "mlp_bias": True}
    return config | _experts(kind, args)


def _groups(args: Mapping[str, Any]) -> int:
    """The number of KV heads: of all heads where attention is not grouped, whatever the number of groups says."""
    grouped, heads = args.get("group_query_attention", True), args["num_attention_heads"]
    return int(args.get("num_query_groups") or heads) if grouped else int(heads)


def _model_type(args: Mapping[str, Any], path: object) -> str:
    rms, gated, linear_bias = args.get("normalization") == "RMSNorm", args.get("swiglu"), args.get("add_bias_linear")
    normed, qkv_bias = bool(args.get("qk_layernorm")), bool(args.get("add_qkv_bias"))
    shared = bool(args.get("moe_shared_expert_intermediate_size"))
    learned = args.get("position_embedding_type") == "learned_absolute"
    found = None
    if args.get("num_experts"):
        if rms and gated and not linear_bias:
            if shared:
                found = "qwen2_moe" if qkv_bias and not normed else None
            else:
                found = "qwen3_moe" if normed and not qkv_bias else "mixtral" if not normed and not qkv_bias else None
    elif rms and gated and not learned:
        kinds = {(False, False): "llama", (False, True): "qwen2", (True, False): "qwen3"}
        found = kinds.get((normed, qkv_bias)) if not linear_bias or (normed, qkv_bias) == (False, False) else None
    elif not rms and learned and not gated and not args.get("squared_relu"):
        found = "gpt2"
    elif not rms and args.get("squared_relu") and args.get("apply_layernorm_1p"):
        found = "nemotron"
    if found is None:
        what = "the arguments in the checkpoint fit no family that is known"
        raise UnsupportedError(what, path=path, expected=", ".join(_CLASSES), hint=MAKE_CONFIG)
    return found


def _experts(kind: str, args: Mapping[str, Any]) -> dict[str, Any]:
    if not args.get("num_experts"):
        return {}
    count, chosen, width = args["num_experts"], args.get("moe_router_topk") or 2, args.get("moe_ffn_hidden_size")
    if kind == "mixtral":
        intermediate = width or args["ffn_hidden_size"]
        return {"num_local_experts": count, "num_experts_per_tok": chosen, "intermediate_size": intermediate}
    found = {"num_experts": count, "num_experts_per_tok": chosen, "moe_intermediate_size": width}
    found |= {"norm_topk_prob": not args.get("moe_router_pre_softmax"), "decoder_sparse_step": 1, "mlp_only_layers": []}
    if kind == "qwen2_moe":
        found["shared_expert_intermediate_size"] = args["moe_shared_expert_intermediate_size"]
    return found
