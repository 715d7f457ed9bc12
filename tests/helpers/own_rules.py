"""Small models whose heads nobody here knows how to find, and somebody's rules for them.

The rules are what `archs draft` begins and a person completes; the built-in rules of a type, where there are any, are
not used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ALIKE = SIZES | {"num_key_value_heads": 4}
_ROUTED = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
_MOE = _ROUTED | {"moe_intermediate_size": 16, "head_dim": 8}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "bitnet": SIZES,
    "dbrx": {
        **{"vocab_size": 96, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "diffllama": SIZES,
    "doge": SIZES,
    "falcon_mamba": {
        **{"vocab_size": 96, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "expand": 2},
        "time_step_rank": 4,
    },
    "hy_v4": _ALIKE | _MOE | _LATENT | {"head_dim": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "jetmoe": SIZES | {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "kimi_linear": _ALIKE
    | _LATENT
    | {
        **{"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_token": 2, "linear_head_dim": 8},
        **{"linear_num_heads": 4, "linear_conv_kernel_dim": 3, "q_lora_rank": None},
        "layer_types": ["linear_attention", "full_attention"],
    },
    "laguna": SIZES | _MOE,
    "longcat_flash": _LATENT
    | {
        **{"vocab_size": 96, "hidden_size": 32, "num_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"max_position_embeddings": 64, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "n_routed_experts": 4},
        **{"zero_expert_num": 2, "moe_topk": 2, "head_dim": 8, "qk_head_dim": 16},
    },
    "mamba2": {
        **{"vocab_size": 96, "hidden_size": 32, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2},
        **{"num_hidden_layers": 2, "chunk_size": 8, "expand": 2},
    },
    "mellum": SIZES | _MOE,
    "minimax": SIZES | _MOE | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "olmo_hybrid": SIZES | _LINEAR,
    "youtu": _ALIKE | _LATENT,
    "zamba2": _ALIKE
    | {
        **{"mamba_d_state": 8, "mamba_expand": 2, "n_mamba_heads": 4, "mamba_ngroups": 2, "mamba_headdim": 16},
        **{"num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "adapter_rank": 4},
        **{"use_shared_attention_adapter": False, "use_long_context": False, "chunk_size": 8},
    },
}

_HEAD = "head_dim or hidden_size // num_attention_heads"
_GQA = {
    "heads": f'{{ count = "num_attention_heads", unit = "{_HEAD}", group = "kv" }}',
    "kv": f'{{ count = "num_key_value_heads", unit = "{_HEAD}", replicate = true }}',
    "numbers": '{ count = "num_attention_heads", group = "kv" }',
}
_MLA = {
    "qk": '{ count = "num_attention_heads", unit = "qk_nope_head_dim + qk_rope_head_dim" }',
    "kvb": '{ count = "num_attention_heads", unit = "qk_nope_head_dim + v_head_dim" }',
    "out": '{ count = "num_attention_heads", unit = "v_head_dim" }',
}
_FFN = {"ffn": '{ count = "intermediate_size" }'}
_EXPERTS = {"moe": '{ count = "moe_intermediate_size" }'}
_NORMS = ("*_layernorm", "=model.norm")
_ENDS = ("=model.embed_tokens", "=lm_head?")


def _ssm(groups: str, states: str, heads: str, width: str) -> dict[str, str]:
    return {
        "ssm_groups": f'{{ count = "{groups}", unit = "{states}", replicate = true }}',
        "ssm_heads": f'{{ count = "{heads}", unit = "{width}", group = "ssm_groups" }}',
        "ssm_numbers": f'{{ count = "{heads}", group = "ssm_groups" }}',
    }


def _mixer(*places: str) -> dict[str, tuple[str, ...]]:
    """A Mamba 2 mixer's rules."""
    return {
        "column ssm_heads ssm_heads ssm_groups ssm_groups ssm_numbers": tuple(f"{at}.in_proj?" for at in places),
        "column ssm_heads ssm_groups ssm_groups": tuple(f"{at}.conv1d?" for at in places),
        "column ssm_numbers": tuple(f"{at}.{leaf}?" for at in places for leaf in ("A_log", "D", "dt_bias")),
        "column ssm_heads": tuple(f"{at}.norm?" for at in places),
        "row ssm_heads": tuple(f"{at}.out_proj?" for at in places),
    }


def _gated(at: str, may: str = "") -> tuple[str, ...]:
    return f"{at}.gate_proj{may}", f"{at}.up_proj{may}"


_QKVO = {
    "column heads": ("self_attn.q_proj",),
    "column kv": ("self_attn.k_proj", "self_attn.v_proj"),
    "row heads": ("self_attn.o_proj",),
}
_DENSE = {"column ffn": _gated("mlp"), "row ffn": ("mlp.down_proj",)}
_LATENTS = {
    "column qk": ("self_attn.q_b_proj",),
    "column kvb": ("self_attn.kv_b_proj",),
    "row out": ("self_attn.o_proj",),
}
_MATRICES = ("expert", "out", "in")
_CONV = ("out", "in", "kernel")

# Axes, rules, dims, and what else is said, of each. A module is in every layer, but for one that begins with "=".
_RULES: dict[str, tuple[dict[str, str], dict[str, tuple[str, ...]], dict[str, tuple[str, ...]], dict[str, str]]] = {
    "bitnet": (
        _GQA | _FFN,
        _DENSE
        | _QKVO
        | {
            "column heads": ("self_attn.q_proj", "self_attn.attn_sub_norm"),
            "column ffn": (*_gated("mlp"), "mlp.ffn_sub_norm"),
            "replicate": _NORMS,
        },
        {},
        {},
    ),
    "dbrx": (
        {
            "q": '{ count = "n_heads", unit = "d_model // n_heads", group = "kv" }',
            "kv": '{ count = "attn_config[\'kv_n_heads\']", unit = "d_model // n_heads", replicate = true }',
            "ffn": "{ count = \"ffn_config['ffn_hidden_size']\" }",
        },
        {
            "column q kv kv": ("norm_attn_norm.attn.Wqkv",),
            "row q": ("norm_attn_norm.attn.out_proj",),
            "column ffn ffn ffn ffn": tuple(f"ffn.experts.mlp.{each}" for each in ("w1", "v1", "w2")),
            "replicate": ("ffn.router.layer", "norm_attn_norm.norm_[12]", "=transformer.norm_f"),
        },
        {f"ffn.experts.mlp.{each}": ("out", "in") for each in ("w1", "v1", "w2")},
        {"prefix": "transformer.", "stem": "transformer.blocks.*.", "layers": "n_layers", "table": "transformer.wte"},
    ),
    "diffllama": (_GQA | _FFN, _QKVO | _DENSE | {"replicate": ("self_attn.lambda_*", *_NORMS)}, {}, {}),
    "doge": (
        _GQA | _FFN | {"kv_numbers": '{ count = "num_key_value_heads", replicate = true }'},
        _QKVO
        | _DENSE
        | {
            "column kv_numbers": ("self_attn.A",),
            "row kv": ("self_attn.dt_proj",),
            "replicate": ("self_attn.[qk]_norm", "input_residual", "post_attention_residual", *_NORMS),
        },
        {},
        {},
    ),
    "falcon_mamba": (
        {"features": '{ count = "expand * hidden_size" }'},
        {
            "column features features": ("mixer.in_proj",),
            "column features": ("mixer.conv1d", "mixer.dt_proj", "mixer.A_log", "mixer.D"),
            "row features": ("mixer.x_proj", "mixer.out_proj"),
            "replicate": ("norm", "=backbone.norm_f"),
        },
        {"mixer.conv1d": _CONV, "mixer.A_log": ("out", "in")},
        {"prefix": "backbone.", "stem": "backbone.layers.*.", "table": "backbone.embeddings"},
    ),
    "hy_v4": (
        _MLA | _FFN | _EXPERTS | {"each": '{ count = "num_attention_heads" }'},
        _LATENTS
        | {
            "column out": ("self_attn.linear_gate",),
            "column each": ("self_attn.learnable_sink_param",),
            "column ffn": ("mlp.linear_gate?", "mlp.up_proj?"),
            "row ffn": ("mlp.down_proj?",),
            "column moe": ("mlp.shared_experts.linear_gate?", "mlp.shared_experts.up_proj?"),
            "row moe": ("mlp.shared_experts.down_proj?", "mlp.experts.down_proj?"),
            "column moe moe": ("mlp.experts.gate_up_proj?",),
            "replicate": (
                *("mlp.gate?", "mlp.gate.e_score_correction_bias?", "self_attn.indexer.k_norm", "self_attn.indexer.w*"),
                *("hc_pre.hc_attn_layer.hc_*", "hc_pre.hc_mlp_layer.hc_*", "self_attn.*_a_proj*"),
                *(f"=model.hc_pre.hc_head.hc_head_{each}" for each in ("base", "fn", "scale")),
                *("self_attn.*_layernorm", *_NORMS),
            ),
        },
        {"mlp.experts.gate_up_proj?": _MATRICES, "mlp.experts.down_proj?": _MATRICES},
        {"experts": "n_routed_experts"},
    ),
    "jetmoe": (
        _FFN | {"kv": '{ count = "num_key_value_heads", unit = "kv_channels" }'},
        {
            "column kv": ("self_attention.experts.input_linear",),
            "column kv kv": ("self_attention.kv_proj",),
            "row kv": ("self_attention.experts.output_linear",),
            "column ffn ffn": ("mlp.input_linear",),
            "row ffn": ("mlp.output_linear",),
            "replicate": (
                *("mlp.bias", "mlp.router.layer", "self_attention.experts.bias"),
                *("self_attention.experts.router.layer", *_NORMS),
            ),
        },
        {f"{at}.{each}_linear": _MATRICES for at in ("self_attention.experts", "mlp") for each in ("input", "output")},
        {},
    ),
    "kimi_linear": (
        _MLA
        | _FFN
        | _EXPERTS
        | {
            "lq": '{ count = "linear_num_heads", unit = "linear_head_dim" }',
            "ln": '{ count = "linear_num_heads" }',
        },
        {
            "column lq if lin": (
                *(f"self_attn.{each}_proj?" for each in ("q", "k", "v", "f_b", "g_b")),
                *("self_attn.[qkv]_conv1d?", "self_attn.dt_bias?"),
            ),
            "column ln if lin": ("self_attn.b_proj?", "self_attn.A_log?"),
            "row lq if lin": ("self_attn.o_proj?",),
            "column qk if not lin": ("self_attn.q_proj?",),
            "column kvb if not lin": ("self_attn.kv_b_proj?",),
            "row out if not lin": ("self_attn.o_proj?",),
            "column ffn": _gated("block_sparse_moe", "?"),
            "row ffn": ("block_sparse_moe.down_proj?",),
            "column moe": (
                *("block_sparse_moe.experts.*.w1?", "block_sparse_moe.experts.*.w3?"),
                *_gated("block_sparse_moe.shared_experts", "?"),
            ),
            "row moe": ("block_sparse_moe.experts.*.w2?", "block_sparse_moe.shared_experts.down_proj?"),
            "replicate": (
                *("self_attn.[fg]_a_proj?", "self_attn.o_norm?", "self_attn.kv_a_proj*?", "self_attn.*_layernorm?"),
                *("block_sparse_moe.gate?", "block_sparse_moe.gate.e_score_correction_bias?", *_NORMS),
            ),
        },
        {"self_attn.[qkv]_conv1d?": _CONV, "self_attn.A_log?": ("in", "in", "out", "in")},
        {"experts": "num_experts", "more": "[conditions]\nlin = \"layer_types[layer] == 'linear_attention'\""},
    ),
    "laguna": (
        _GQA | _FFN | _EXPERTS | {"shared": '{ count = "shared_expert_intermediate_size" }'},
        _QKVO
        | {
            "column numbers": ("self_attn.g_proj",),
            "column ffn": _gated("mlp", "?"),
            "row ffn": ("mlp.down_proj?",),
            "column moe": _gated("mlp.experts.*", "?"),
            "row moe": ("mlp.experts.*.down_proj?",),
            "column shared": _gated("mlp.shared_expert", "?"),
            "row shared": ("mlp.shared_expert.down_proj?",),
            "replicate": ("mlp.experts.e_score_correction_bias?", "mlp.gate?", "self_attn.[qk]_norm", *_NORMS),
        },
        {},
        {"experts": "num_experts"},
    ),
    "longcat_flash": (
        _MLA | {"ffn": '{ count = "ffn_hidden_size" }', "moe": '{ count = "expert_ffn_hidden_size" }'},
        {
            "column qk": ("self_attn.[01].q_b_proj",),
            "column kvb": ("self_attn.[01].kv_b_proj",),
            "row out": ("self_attn.[01].o_proj",),
            "column ffn": _gated("mlps.[01]"),
            "row ffn": ("mlps.[01].down_proj",),
            "column moe": _gated("mlp.experts.*"),
            "row moe": ("mlp.experts.*.down_proj?",),
            "replicate": (
                *("mlp.router.classifier", "mlp.router.e_score_correction_bias", "self_attn.[01].*_a_proj*"),
                *("self_attn.[01].*_layernorm", "*_layernorm.[01]", "=model.norm"),
            ),
        },
        {},
        {"layers": "num_layers", "experts": "n_routed_experts + zero_expert_num"},
    ),
    "mamba2": (
        _ssm("n_groups", "state_size", "num_heads", "head_dim"),
        _mixer("mixer") | {"replicate": ("norm", "=backbone.norm_f")},
        {"mixer.conv1d": _CONV},
        {"prefix": "backbone.", "stem": "backbone.layers.*.", "table": "backbone.embeddings"},
    ),
    "mellum": (
        _GQA | _EXPERTS,
        _QKVO
        | {
            "column moe": _gated("mlp.experts.*"),
            "row moe": ("mlp.experts.*.down_proj",),
            "replicate": ("mlp.gate", "self_attn.[qk]_norm", *_NORMS),
        },
        {},
        {"experts": "num_local_experts or num_experts"},
    ),
    "minimax": (
        _GQA | _FFN,
        {
            "column heads": ("self_attn.q_proj?", "self_attn.output_gate?", "self_attn.norm?"),
            "column kv": ("self_attn.[kv]_proj?",),
            "column heads heads heads / heads": ("self_attn.qkv_proj?",),
            "row heads": ("self_attn.o_proj?", "self_attn.out_proj?"),
            "column ffn": ("block_sparse_moe.experts.*.w[13]",),
            "row ffn": ("block_sparse_moe.experts.*.w2",),
            "replicate": ("block_sparse_moe.gate", "self_attn.*_decay?", "self_attn.slope_rate?", *_NORMS),
        },
        {},
        {"experts": "num_local_experts"},
    ),
    "olmo_hybrid": (
        _GQA
        | _FFN
        | {
            "lk": '{ count = "linear_num_key_heads", unit = "linear_key_head_dim" }',
            "lv": '{ count = "linear_num_value_heads", unit = "linear_value_head_dim", group = "lk" }',
            "ln": '{ count = "linear_num_value_heads", group = "lk" }',
        },
        _DENSE
        | {
            "column heads": ("self_attn.q_proj?", "self_attn.q_norm?"),
            "column kv": ("self_attn.[kv]_proj?", "self_attn.k_norm?"),
            "row heads": ("self_attn.o_proj?",),
            "column lk": ("linear_attn.[qk]_proj?", "linear_attn.[qk]_conv1d?"),
            "column lv": ("linear_attn.v_proj?", "linear_attn.v_conv1d?", "linear_attn.g_proj?"),
            "row lv": ("linear_attn.o_proj?",),
            "column ln": tuple(f"linear_attn.{each}?" for each in ("A_log", "dt_bias", "a_proj", "b_proj")),
            "replicate": ("linear_attn.o_norm?", "*_layer_norm?", "*_layernorm?", "=model.norm"),
        },
        {"linear_attn.[qkv]_conv1d?": _CONV},
        {},
    ),
    "youtu": (
        _MLA | _FFN,
        _LATENTS | _DENSE | {"replicate": ("self_attn.*_a_proj*", "self_attn.*_layernorm", *_NORMS)},
        {},
        {},
    ),
    "zamba2": (
        _FFN
        | {"heads": '{ count = "num_attention_heads", unit = "attention_head_dim" }'}
        | _ssm("mamba_ngroups", "mamba_d_state", "n_mamba_heads", "mamba_expand * hidden_size // n_mamba_heads"),
        _mixer("mamba", "mamba_decoder.mamba")
        | {
            "column heads": ("shared_transformer.self_attn.[qkv]_proj?",),
            "row heads": ("shared_transformer.self_attn.o_proj?",),
            "column ffn ffn": tuple(
                f"shared_transformer.feed_forward.gate_up_proj{each}?" for each in ("", "_adapter_list.0.1")
            ),
            "row ffn": ("shared_transformer.feed_forward.down_proj?",),
            "replicate": (
                *("linear?", "input_layernorm?", "mamba_decoder.input_layernorm?", "shared_transformer.*_layernorm?"),
                *("shared_transformer.feed_forward.gate_up_proj_adapter_list.0.0?", "=model.final_layernorm"),
            ),
        },
        {"mamba.conv1d?": _CONV, "mamba_decoder.mamba.conv1d?": _CONV},
        {},
    ),
}


def rules(model_type: str, *replicated: str, joined: str | None = None, also: tuple[str, str] | None = None) -> str:
    """The rules. Wrong ones: `replicated` are modules that every rank gets whole, and `joined` is a rule of several
    segments that are taken for a single block; `also` is an axis, and a module that is cut by it."""
    axes, cuts, dims, about = _RULES[model_type]
    prefix, stem = about.get("prefix", "model."), about.get("stem", "model.layers.*.")
    table = about.get("table", "model.embed_tokens")
    every = {"column vocab": (f"={table}", "=lm_head?"), **cuts}
    every = {rule: tuple(m for m in modules if m not in replicated) for rule, modules in every.items()}
    every["replicate"] = (*every["replicate"], *replicated)
    if also is not None:
        every["replicate"] = tuple(m for m in every["replicate"] if m != also[1])
        every["column also_"], axes = (also[1],), axes | {"also_": also[0]}
    if joined is not None:
        every["column features_"] = (*every.get("column features_", ()), *every.pop(joined))
        counts = [axes[axis].partition('count = "')[2].partition('"')[0] for axis in joined.split()[1:]]
        units = [(axes[axis].partition('unit = "')[2].partition('"')[0] or "1") for axis in joined.split()[1:]]
        total = " + ".join(f"{count} * ({unit})" for count, unit in zip(counts, units, strict=True))
        axes = axes | {"features_": f'{{ count = "{total}" }}'}

    def named(module: str) -> str:
        return module[1:] if module.startswith("=") else stem + module

    return "\n".join(
        [
            f'model_types = ["{model_type}"]',
            f'prefix = "{prefix}"',
            f'layers = "{about.get("layers", "num_hidden_layers")}"',
            f'tied = {{ lm_head = "{table}" }}',
            *([f'experts = "{about["experts"]}"'] if "experts" in about else []),
            about.get("more", ""),
            '[axes]\nvocab = { count = "vocab_size", pad = true }',
            *(f"{axis} = {value}" for axis, value in axes.items()),
            "[rules]",
            *(f'"{rule}" = {json.dumps([named(m) for m in modules])}' for rule, modules in every.items() if modules),
            "[dims]",
            *(f'"{named(module)}" = {json.dumps(each)}' for module, each in dims.items()),
        ]
    )


def make(model_type: str, path: Path = Path("model")) -> Path:
    """A checkpoint as transformers saves it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and parameter.dim() == 1 else 0.0, 0.08)
    model.save_pretrained(path)
    if model_type == "olmo_hybrid":
        _with_convolutions_apart(path / "model.safetensors")
    return path


def _with_convolutions_apart(file: Path) -> None:
    """As published: `save_pretrained` cuts the joined convolution in three equal parts, which these are not."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors, at = load_file(file), "model.layers.0.linear_attn."
    joined = torch.cat([tensors.pop(f"{at}{each}_conv1d.weight") for each in "qkv"])
    for each, part in zip("qkv", joined.split([16, 16, 32]), strict=True):
        tensors[f"{at}{each}_conv1d.weight"] = part.contiguous()
    save_file(tensors, file, {"format": "pt"})
