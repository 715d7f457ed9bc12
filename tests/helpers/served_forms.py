"""Forms that models are served in of which no class of transformers computes logits from text alone.

Models that nest a text model, small and random, under the names of published files and under those of newer code; and
decoders that publish their own code, as tensors of the right shapes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.further_checkpoints import FURTHER
from tests.helpers.toys import Tensor, write_checkpoint

VOCAB = 251
_TEXT = {
    **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_TOWER = {
    **{"depth": 1, "num_heads": 4, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"hidden_size": 32, "intermediate_size": 48, "patch_size": 14, "image_size": 28},
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
NESTED: dict[str, dict[str, Any]] = {
    "muse_glimmer": {
        "text_config": _TEXT | {"head_dim": 16},
        "vision_config": _TOWER | {"pos_emb_height": 2, "pos_emb_width": 2, "max_position_embeddings": 4},
        **{"out_hidden_size": 128, "projector_hidden_size": 48},
    },
    "mllama": {
        "text_config": _TEXT | {"cross_attention_layers": [1]},
        "vision_config": {
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_global_layers": 1},
            **{"attention_heads": 4, "image_size": 28, "patch_size": 14, "vision_output_dim": 64},
            **{"intermediate_layers_indices": [0]},
        },
    },
    # As many further embeddings as others: of other numbers transformers saves the table cut at the wrong place.
    "molmo2": {
        "text_config": _TEXT | {"head_dim": 16, "additional_vocab_size": VOCAB, "attention_bias": True},
        "vision_config": {
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
            **{"num_key_value_heads": 4, "head_dim": 8, "image_size": [28, 28], "vision_feature_layer": [-1]},
            **{"num_position_embeddings": 4},
        },
        "adapter_config": {
            **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4},
            **{"head_dim": 8, "text_hidden_size": 64, "vision_feature_layer": [-1]},
        },
    },
    "ernie4_5_vl_moe": {
        "text_config": _TEXT
        | _ROPE
        | {"moe_num_experts": 2, "moe_intermediate_size": [32, 16], "moe_k": 1, "moe_num_shared_experts": 2},
        "vision_config": _TOWER,
    },
    "glm5_next": {
        "text_config": _TEXT
        | {"num_key_value_heads": 8, "n_routed_experts": 2, "moe_intermediate_size": 32, "num_experts_per_tok": 1}
        | {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "v_head_dim": 12, "hc_mult": 2}
        | {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 16, "index_kpool": 8}
        | {"linear_head_dim": 8, "linear_num_heads": 4}
        | {"layer_types": ["linear_attention", "indexed_attention"], "mlp_layer_types": ["dense", "sparse"]},
        "vision_config": _TOWER | {"out_hidden_size": 64, "projection_intermediate_size": 32},
    },
}
_VOCAB = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NESTED |= {
    "qwen4_exp": {
        "text_config": FURTHER["qwen4_exp"][1] | _VOCAB,
        "vision_config": _TOWER | {"in_channels": 3, "out_hidden_size": 64, "num_position_embeddings": 16},
    },
    "phi4_multimodal": {
        **(_TEXT | {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        "vision_config": {
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"image_size": 28, "patch_size": 14, "crop_size": 28},
        },
        "audio_config": {
            **{"hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 4},
            **{"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 8},
        },
    },
    "dots3_note": {
        "text_config": FURTHER["dots3_note"][1] | _VOCAB,
        "vision_config": {
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"moe_intermediate_size": 16, "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 2},
            **{"num_experts_per_tok": 1, "adapter_in_dim": 32, "adapter_out_dim": 64},
        },
        "audio_config": {
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
            **{"downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": 64},
        },
    },
}


def make(model_type: str, path: Path, *, published: bool) -> Path:
    """Write the checkpoint of a nested model, under published names or under those of transformers' classes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = AutoConfig.for_model(model_type, **NESTED[model_type])
    seeing = type(config) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
    model: Any = auto.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():  # numbers of a vocabulary are the class's own
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(path, save_original_format=published)
    return path


def ernie_as_published(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the nested form as it is published: all values at the top, lists of both kinds of experts."""
    left_out = ("mlp_layer_types", "rope_parameters", "head_dim")
    inner = {key: value for key, value in config["text_config"].items() if key not in left_out}
    vision = config["vision_config"]
    kept = {key: vision[key] for key in ("depth", "hidden_size", "num_heads", "patch_size", "spatial_merge_size")}
    return inner | {
        **{"model_type": "ernie4_5_moe_vl", "moe_num_experts": [2, 2], "moe_layer_start_index": [1, 1]},
        **{"moe_layer_end_index": [1, 1], "moe_layer_interval": 1, "rope_theta": 1e4, "freq_allocation": 2},
        **{"im_patch_id": VOCAB - 1, "spatial_conv_size": 2, "temporal_conv_size": 2},
        "vision_config": kept
        | {"embed_dim": vision["hidden_size"], "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"]},
    }


_LLAMA = {
    "model.embed_tokens": (VOCAB, 64), "model.norm": (64,), "lm_head": (VOCAB, 64),
    "model.layers.*.input_layernorm": (64,), "model.layers.*.post_attention_layernorm": (64,),
    "model.layers.*.self_attn.q_proj": (64, 64), "model.layers.*.self_attn.k_proj": (16, 64),
    "model.layers.*.self_attn.v_proj": (16, 64), "model.layers.*.self_attn.o_proj": (64, 64),
    "model.layers.*.mlp.gate_proj": (96, 64), "model.layers.*.mlp.up_proj": (96, 64),
    "model.layers.*.mlp.down_proj": (64, 96),
}  # fmt: skip
_NO_ATTENTION = {"no_op": True, "replace_with_linear": False, "n_heads_in_group": None}
_ATTENTION = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 4}
_SEARCHED = {
    "num_hidden_layers": 4,
    "block_configs": [
        {"attention": _ATTENTION, "ffn": {"no_op": False, "replace_with_linear": False, "ffn_mult": 2.625}},
        {"attention": _NO_ATTENTION, "ffn": {"no_op": False, "replace_with_linear": False, "ffn_mult": 12.5}},
        {"attention": _ATTENTION | {"n_heads_in_group": 8}, "ffn": {"no_op": True, "replace_with_linear": False}},
        {
            "attention": _NO_ATTENTION | {"no_op": False, "replace_with_linear": True},
            "ffn": {"no_op": False, "replace_with_linear": False, "intermediate_size": 96},
        },
    ],
}


def _searched() -> dict[str, tuple[int, ...]]:
    """Layers of 256 and 768 features, one without attention, one without an MLP, one with a matrix for attention."""
    ends = {name: shape for name, shape in _LLAMA.items() if ".layers." not in name}
    layer = {name.partition("*.")[2]: shape for name, shape in _LLAMA.items() if ".layers." in name}
    found = dict(ends)
    for number, (kv, ffn) in enumerate(((2, 256), (0, 768), (1, 0), (-1, 96))):
        for name, shape in layer.items():
            attends, feeds = "self_attn" in name or name == "input_layernorm", "mlp" in name or name.startswith("post")
            if (attends and not kv) or (feeds and not ffn) or ("self_attn" in name and kv < 0):
                continue
            if "k_proj" in name or "v_proj" in name:
                shape = (8 * kv, 64)
            elif "mlp" in name:
                shape = (64, ffn) if "down" in name else (ffn, 64)
            found[f"model.layers.{number}.{name}"] = shape
        if kv < 0:
            found[f"model.layers.{number}.self_attn.linear_attn"] = (64, 64)
    return found


def _adapted() -> dict[str, tuple[int, ...]]:
    """Phi-3's fused matrices, each with adapters; and towers beside the embeddings."""
    found = {name: shape for name, shape in _LLAMA.items() if "_proj" not in name and name != "lm_head"}
    modules = {"self_attn.qkv_proj": (96, 64), "self_attn.o_proj": (64, 64)}
    modules |= {"mlp.gate_up_proj": (192, 64), "mlp.down_proj": (64, 96)}
    for module, (rows, columns) in modules.items():
        layer = f"model.layers.*.{module}"
        found[f"{layer}.base_layer"] = (rows, columns)
        for adapter in ("speech", "vision"):
            found |= {f"{layer}.lora_A.{adapter}": (4, columns), f"{layer}.lora_B.{adapter}": (rows, 4)}
    tower = "model.embed_tokens_extend.image_embed"
    found |= {f"{tower}.glb_GN": (1, 1, 32), f"{tower}.img_processor.encoder.layers.0.mlp.fc1": (48, 32)}
    return found | {"model.embed_tokens_extend.audio_embed.audio_projection.speech.0": (64, 32)}


_EXPERTS = {name: shape for name, shape in _LLAMA.items() if ".mlp." not in name} | {
    "model.layers.*.mlp.gate": (2, 64),
    **{f"model.layers.*.mlp.experts.{e}.w{w}": (64, 96) if w == 2 else (96, 64) for e in (0, 1) for w in (1, 2, 3)},
}
REMOTE: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "nemotron-nas": ({"model_type": "nemotron-nas"} | _SEARCHED, _searched()),
    "phi4mm": ({"model_type": "phi4mm"}, _adapted()),
    "minicpm": ({"model_type": "minicpm", "tie_word_embeddings": False}, _LLAMA),
    "minicpm-experts": ({"model_type": "minicpm", "tie_word_embeddings": False, "num_experts": 2}, _EXPERTS),
}
"""Decoders that publish their own code: what their configs have beside the usual keys, and the shapes of weights."""


def write(name: str, path: Path) -> Path:
    """Write the checkpoint of a decoder of `REMOTE`."""
    changes, shapes = REMOTE[name]
    config = _TEXT | changes
    if "block_configs" in changes:
        config = {
            key: value for key, value in config.items() if key not in ("intermediate_size", "num_key_value_heads")
        }
    tensors = {}
    for module, shape in shapes.items():
        for layer in range(config["num_hidden_layers"]) if "*" in module else (0,):
            numbers = np.random.default_rng(zlib.crc32(f"{module} {layer}".encode())).standard_normal(shape)
            bare = module.endswith("glb_GN")
            full = module.replace("*", str(layer), 1) + ("" if bare else ".weight")
            tensors[full] = Tensor("F32", shape, numbers.astype("<f4").tobytes())
    return write_checkpoint(path, config, tensors)
