"""What the arguments in a checkpoint of Megatron say of the model, held against its config: Megatron builds by them."""

from collections.abc import Iterator, Mapping
from typing import Any

_KEYS: Mapping[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer"),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "ffn_hidden_size": ("intermediate_size", "n_inner"),
    "norm_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "rotary_base": ("rope_theta",),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "moe_router_topk": ("num_experts_per_tok",),
    "moe_ffn_hidden_size": ("moe_intermediate_size",),
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "qk_head_dim": ("qk_nope_head_dim",),
    "qk_pos_emb_head_dim": ("qk_rope_head_dim",),
    "v_head_dim": ("v_head_dim",),
}
"""Arguments of Megatron, and the keys of a config.json that say the same."""


def misargued(args: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """The arguments that are not those of the model. What is missing on either side is not judged."""
    rope = config.get("rope_parameters")
    said = {**(rope if isinstance(rope, dict) else {}), **config}
    wanted = {key: next((said[k] for k in keys if said.get(k) is not None), None) for key, keys in _KEYS.items()}
    if args.get("group_query_attention"):
        wanted["num_query_groups"] = said.get("num_key_value_heads")
    if not args.get("multi_latent_attention"):
        wanted["kv_channels"] = said.get("head_dim")
    if said.get("tie_word_embeddings") is not None:
        wanted["untie_embeddings_and_output_weights"] = not said["tie_word_embeddings"]
    for key, value in wanted.items():
        found = args.get(key)
        if value is not None and found is not None and found != value:
            yield f"Megatron's argument {key} is {found}, and the model's is {value}"
