"""Small multimodal checkpoints for the engines: a text model with 8 heads and 2 KV heads, a tower with 4 heads."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.engines import engine_models, engine_shapes, engine_written

_TEXT = {
    **{"vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128},
}
_VISION = {
    **{"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"image_size": 56, "patch_size": 14},
}
_QWEN = {"depth": 2, "num_heads": 4, "patch_size": 14}


def _rope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}}


_GLM_VISION = {
    **{"depth": 2, "num_heads": 4, "patch_size": 14, "image_size": 56, "hidden_size": 128},
    **{"intermediate_size": 192, "out_hidden_size": 256},
}
_GLM_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
_KIMI = {
    "text_config": engine_models.LOADED["deepseek_v3"][1] | {"model_type": "deepseek_v3"},
    "vision_config": _VISION | {"pos_emb_height": 8, "pos_emb_width": 8},
    "projection_hidden_size": 128,
    "tie_word_embeddings": False,
}
_UNIFIED = {
    key: each
    for key, each in engine_models.LOADED["gemma4-moe-k-is-v"][1].items()
    if "expert" not in key and "moe" not in key and "per_layer" not in key
}
_GEMMA4 = {
    "vision_config": _VISION
    | {"num_key_value_heads": 4, "head_dim": 32, "position_embedding_size": 64, "standardize": True},
    "audio_config": None,
}
_AUDIO = {
    **{"d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 192},
    **{"num_mel_bins": 16, "output_dim": 256},
}
_ERNIE = _TEXT | {
    **{"num_hidden_layers": 3, "moe_num_experts": [8, 8], "moe_intermediate_size": [64, 32], "moe_k": 2},
    **{"moe_num_shared_experts": 2, "moe_layer_start_index": [1, 1], "moe_layer_end_index": [29, 28]},
    **{"moe_layer_interval": 1, "use_bias": False, "freq_allocation": 6, "im_patch_id": 900},
    **{"pixel_hidden_size": 128, "spatial_conv_size": 2, "temporal_conv_size": 2, "use_temporal_conv": True},
    "vision_config": {
        **{"depth": 2, "num_heads": 4, "hidden_size": 128, "embed_dim": 128, "mlp_ratio": 2, "patch_size": 14},
        **{"in_channels": 3, "spatial_merge_size": 2, "hidden_act": "quick_gelu"},
    },
}
_MUSE = {
    "text_config": _TEXT,
    "vision_config": _VISION | {"pos_emb_height": 8, "pos_emb_width": 8, "max_position_embeddings": 64},
    **{"out_hidden_size": 512, "projector_hidden_size": 48},
}
_VIT = {
    **{
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
    "hidden_act": "gelu_pytorch_tanh",
}
_MOLMO2 = {
    "text_config": {key: each for key, each in _TEXT.items() if "token_id" not in key}
    | {"additional_vocab_size": 8, "qkv_bias": True, "use_qk_norm": True, "qk_norm_type": "qwen3", "norm_after": False}
    | {"hidden_act": "silu", "layer_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling_layers": None}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "vit_config": _VIT
    | {"num_hidden_layers": 2, "layer_norm_eps": 1e-6, "image_patch_size": 14, "image_num_pos": 16}
    | {"image_default_input_size": [56, 56]},
    "adapter_config": _VIT
    | {"hidden_act": "silu", "vit_layers": [-1, -2], "pooling_attention_mask": False, "text_hidden_size": 256},
    **{"image_patch_id": 900, "tie_word_embeddings": False},
}
_PHI4MM = {key: each for key, each in _TEXT.items() if key != "head_dim"} | {
    **{"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "resid_pdrop": 0.0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    # Two layers of the 27 that its class says the tower has.
    "img_processor": {"layer_idx": -26},
    "embd_layer": {
        "embedding_cls": "image_audio",
        "audio_embd_layer": {
            **{"embedding_cls": "audio", "compression_rate": 8, "downsample_rate": 1, "projection_cls": "mlp"},
            **{"use_conv_downsample": False, "use_qformer": False},
        },
        "image_embd_layer": {"embedding_cls": "tune_image", "hd_transform_order": "sub_glb"},
    },
    "audio_processor": {
        "name": "cascades",
        "config": {
            **{"input_size": 16, "chunk_size": -1, "left_chunk": 18, "attention_dim": 64, "attention_heads": 4},
            **{"linear_units": 96, "num_blocks": 2, "input_layer": "nemo_conv", "kernel_size": 3, "causal": True},
            **{"activation": "swish", "conv_activation": "swish", "conv_glu_type": "swish", "bias_in_glu": True},
            **{"ext_pw_kernel_size": 1, "ext_pw_out_channel": 64, "depthwise_seperable_out_channel": 64},
            **{"depthwise_multiplier": 1, "cnn_layer_norm": True, "time_reduction": 8, "attention_glu_type": "swish"},
            **{"nemo_conv_settings": {"conv_channels": 32}, "encoder_embedding_config": {"input_size": 16}},
            "relative_attention_bias_args": {"type": "t5", "t5_bias_max_distance": 500},
        },
    },
}
_PERCEPTION = {
    **{"width": 128, "layers": 2, "heads": 4, "mlp_ratio": 1.5, "image_size": 56, "patch_size": 14, "output_dim": None},
    **{"hidden_act": "quick_gelu", "ls_init_value": 0.1, "layer_norm_eps": 1e-5, "num_channels": 3},
    **{"use_ln_pre": True, "use_ln_post": False, "use_abs_posemb": True, "use_cls_token": False, "use_rope2d": True},
}
LOADED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": (
        "qwen2_vl",
        {"text_config": _TEXT | _rope(4, 6, 6), "vision_config": _QWEN | {"embed_dim": 128, "hidden_size": 256}},
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {
            "text_config": _TEXT | _rope(4, 6, 6),
            "vision_config": _QWEN | {"hidden_size": 128, "intermediate_size": 192, "out_hidden_size": 256},
        },
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {
            "text_config": _TEXT | _rope(6, 5, 5),
            "vision_config": _QWEN
            | {"hidden_size": 128, "intermediate_size": 192, "out_hidden_size": 256, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        {
            "text_config": _TEXT
            | _rope(6, 5, 5)
            | {"num_experts": 8, "moe_intermediate_size": 64, "num_experts_per_tok": 2, "norm_topk_prob": True},
            "vision_config": _QWEN
            | {"hidden_size": 128, "intermediate_size": 192, "out_hidden_size": 256, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen2_5_vl-tied": (
        "qwen2_5_vl",
        {
            "text_config": _TEXT | _rope(4, 6, 6) | {"tie_word_embeddings": True},
            "vision_config": _QWEN | {"hidden_size": 128, "intermediate_size": 192, "out_hidden_size": 256},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_vl-tied": (
        "qwen3_vl",
        {
            "text_config": _TEXT | _rope(6, 5, 5) | {"tie_word_embeddings": True},
            "vision_config": _QWEN
            | {"hidden_size": 128, "intermediate_size": 192, "out_hidden_size": 256, "deepstack_visual_indexes": [0]},
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": ("gemma3", {"text_config": _TEXT, "vision_config": _VISION, "mm_tokens_per_image": 4}),
    "mistral3": (
        "mistral3",
        {
            "text_config": _TEXT | {"model_type": "mistral"},
            "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 32},
            "tie_word_embeddings": False,
        },
    ),
    "llava": (
        "llava",
        {
            "text_config": _TEXT | {"model_type": "llama"},
            "vision_config": _VISION | {"model_type": "clip_vision_model"},
            "vision_feature_layer": -2,
        },
    ),
    "mistral3-tied": (
        "mistral3",
        {
            "text_config": _TEXT | {"model_type": "mistral", "tie_word_embeddings": True},
            "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 32},
            "tie_word_embeddings": True,
        },
    ),
    "llava-siglip-mistral": (
        "llava",
        {
            "text_config": _TEXT | {"model_type": "mistral"},
            "vision_config": _VISION | {"model_type": "siglip_vision_model"},
            "vision_feature_layer": -1,
        },
    ),
    "llava-pixtral": (
        "llava",
        {
            "text_config": _TEXT | {"model_type": "mistral"},
            "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 32},
            "vision_feature_layer": -1,
        },
    ),
    "internvl": (
        "internvl",
        {
            "text_config": _TEXT | {"model_type": "qwen2"},
            "vision_config": _VISION | {"image_size": [56, 56], "patch_size": [14, 14]},
            "tie_word_embeddings": False,
        },
    ),
    "glm4v": (
        "glm4v",
        {
            "text_config": _TEXT | {"rope_parameters": _GLM_ROPE, "attention_bias": True},
            "vision_config": _GLM_VISION,
        },
    ),
    "glm4v_moe": (
        "glm4v_moe",
        {
            "text_config": _TEXT
            | {"rope_parameters": _GLM_ROPE, "n_routed_experts": 8, "moe_intermediate_size": 64}
            | {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "use_qk_norm": False},
            "vision_config": _GLM_VISION,
        },
    ),
    "llava-siglip-qwen2": (
        "llava",
        {
            "text_config": _TEXT | {"model_type": "qwen2"},
            "vision_config": _VISION | {"model_type": "siglip_vision_model"},
            "vision_feature_layer": -2,
        },
    ),
    "llava_next": (
        "llava_next",
        {
            "text_config": _TEXT | {"model_type": "mistral"},
            "vision_config": _VISION | {"model_type": "clip_vision_model"},
        },
    ),
    "llava_next-qwen2": (
        "llava_next",
        {
            "text_config": _TEXT | {"model_type": "qwen2"},
            "vision_config": _VISION | {"model_type": "siglip_vision_model"},
        },
    ),
    "llava_next-llama": (
        "llava_next",
        {
            "text_config": _TEXT | {"model_type": "llama"},
            "vision_config": _VISION | {"model_type": "clip_vision_model"},
        },
    ),
    "llava_onevision": (
        "llava_onevision",
        {
            "text_config": _TEXT | {"model_type": "qwen2"},
            "vision_config": _VISION | {"model_type": "siglip_vision_model"},
            "tie_word_embeddings": False,
        },
    ),
    "internvl-qwen3": (
        "internvl",
        {
            "text_config": _TEXT | {"model_type": "qwen3"},
            "vision_config": _VISION | {"image_size": [56, 56], "patch_size": [14, 14]},
            "tie_word_embeddings": False,
        },
    ),
    "internvl-qwen3_moe": (
        "internvl",
        {
            "text_config": _TEXT
            | {"model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 64, "num_experts_per_tok": 2},
            "vision_config": _VISION | {"image_size": [56, 56], "patch_size": [14, 14], "use_qk_norm": True},
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_5": (
        "qwen3_5",
        {
            "text_config": engine_models.LOADED["qwen3_5_text"][1] | _rope(2, 1, 1),
            "vision_config": _QWEN | {"hidden_size": 128, "intermediate_size": 192, "out_hidden_size": 256},
        },
    ),
    "qwen3_5-tied": (
        "qwen3_5",
        {
            "text_config": engine_models.LOADED["qwen3_5_text-tied"][1] | _rope(2, 1, 1),
            "vision_config": _QWEN | {"hidden_size": 128, "intermediate_size": 192, "out_hidden_size": 256},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        {
            "text_config": engine_models.LOADED["qwen3_5_moe_text"][1] | _rope(2, 1, 1),
            "vision_config": _QWEN | {"hidden_size": 128, "intermediate_size": 192, "out_hidden_size": 256},
        },
    ),
    "llama4": (
        "llama4",
        {
            "text_config": engine_models.LOADED["llama4"][1],
            "vision_config": _VISION
            | {"intermediate_size": 512, "vision_output_dim": 192, "projector_input_dim": 192}
            | {"projector_output_dim": 192},
        },
    ),
    "gemma4": ("gemma4", {"text_config": engine_models.LOADED["gemma4"][1], **_GEMMA4}),
    "gemma4-moe-k-is-v": ("gemma4", {"text_config": engine_models.LOADED["gemma4-moe-k-is-v"][1], **_GEMMA4}),
    "gemma4_unified": (
        "gemma4_unified",
        {
            "text_config": _UNIFIED,
            "vision_config": {"mm_embed_dim": 128, "mm_posemb_size": 64, "output_proj_dims": 128},
            "audio_config": {"audio_embed_dim": 64},
        },
    ),
    "qwen2_5_omni": (
        "qwen2_5_omni",
        {
            "text_config": _TEXT | _rope(4, 6, 6) | {"tie_word_embeddings": False},
            "vision_config": _QWEN | {"hidden_size": 128, "intermediate_size": 192, "out_hidden_size": 256},
            "audio_config": _AUDIO,
        },
    ),
    "qwen3_omni_moe": (
        "qwen3_omni_moe",
        {
            "text_config": _TEXT
            | _rope(6, 5, 5)
            | {"num_experts": 8, "moe_intermediate_size": 64, "num_experts_per_tok": 2, "norm_topk_prob": True}
            | {"tie_word_embeddings": False},
            "vision_config": _QWEN
            | {"hidden_size": 128, "intermediate_size": 192, "out_hidden_size": 256, "deepstack_visual_indexes": [0]}
            | {"image_size": 56, "num_position_embeddings": 16, "apply_vit_abs_pos_embed": True},
            "audio_config": _AUDIO | {"downsample_hidden_size": 32},
        },
    ),
    "kimi_k25": ("kimi_k25", _KIMI),
    "kimi_vl": ("kimi_k25", _KIMI),
    "ernie4_5_moe_vl": ("ernie4_5_moe_vl", _ERNIE | {"tie_word_embeddings": False}),
    "ernie4_5_moe_vl-tied": ("ernie4_5_moe_vl", _ERNIE | {"tie_word_embeddings": True}),
    "muse_glimmer": ("muse_glimmer", _MUSE),
    "molmo2": ("molmo2", _MOLMO2),
    "phi4mm": ("phi4mm", _PHI4MM),
    "molmo2-olmo-norms": (
        "molmo2",
        _MOLMO2
        | {
            "text_config": _MOLMO2["text_config"]
            | {"qk_norm_type": "olmo", "qkv_bias": False, "num_key_value_heads": 4}
        },
    ),
    "step3p7": (
        "step3p7",
        {
            "text_config": engine_models.LOADED["step3p5"][1]
            | {"model_type": "step3p5", "architectures": ["Step3p5ForCausalLM"]},
            "vision_config": _PERCEPTION,
            **{"projector_bias": False, "tie_word_embeddings": False},
        },
    ),
}
"""What vLLM loads."""

_THINKERS = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
"""The class of the part that thinks, of models that also speak: what vLLM loads of them."""
_TOWER = {"vision_tower.": "vision_tower.vision_model."}
_KIMI_NAMES = {
    "language_model.model.blocks.": "language_model.model.layers.",
    "vision_tower.encoder.patch_embed.": "vision_tower.patch_embed.",
    "model.mm_projector.": "mm_projector.",
}
_PUBLISHED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("gemma3", "llava", "llava-siglip-mistral", "llava-siglip-qwen2"), _TOWER),
    **dict.fromkeys(("llava_next", "llava_next-qwen2", "llava_next-llama", "llava_onevision"), _TOWER),
    "qwen3_vl_moe": {},
    "kimi_k25": _KIMI_NAMES,
    "kimi_vl": _KIMI_NAMES
    | {
        "model.mm_projector.": "multi_modal_projector.",
        "mm_projector.proj.0.": "multi_modal_projector.linear_1.",
        "mm_projector.proj.2.": "multi_modal_projector.linear_2.",
    },
}
"""What transformers 5 saves otherwise than published files have it, which alone vLLM loads: beginnings of names."""
_CONFIGS: dict[str, dict[str, Any]] = {
    "kimi_k25": {"architectures": ["KimiK25ForConditionalGeneration"], "text_config": {"model_type": "kimi_k2"}},
    "muse_glimmer": {"vision_config": {"output_dim": 512, "adapter_dim": 48}},
    "kimi_vl": {
        "architectures": ["KimiVLForConditionalGeneration"],
        "model_type": "kimi_vl",
        "vision_config": {"model_type": "moonvit", "init_pos_emb_height": 8, "init_pos_emb_width": 8},
    },
}
"""What published configs say otherwise, or of a model that has the same tensors under other names."""


def make(name: str, path: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint with parameters of its own for every name, so that none can stand for another.

    changes: of the text model's config.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    model_type, config = LOADED[name]
    if model_type in engine_written.WRITTEN:
        return engine_models.written(path, model_type, {**config, **(changes or {})})
    config = {**config, "text_config": {**config["text_config"], **(changes or {})}}
    if model_type in _THINKERS:
        made = AutoConfig.for_model(f"{model_type}_thinker", **config)
        model = getattr(transformers, _THINKERS[model_type])(made).to(torch.bfloat16)
    else:
        made = AutoConfig.for_model(model_type, **config)
        model = AutoModelForImageTextToText.from_config(made, dtype=torch.bfloat16)
    with torch.no_grad():
        state = [*model.named_parameters(), *(each for each in model.named_buffers() if "correction_bias" in each[0])]
        for each, parameter in state:
            generator = torch.Generator().manual_seed(zlib.crc32(each.encode()))
            parameter.copy_((parameter.dim() == 1) + 0.08 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    if model_type in _THINKERS:
        _as_thinker(path, model_type)
    if name in _PUBLISHED:
        _as_published(path / "model.safetensors", _PUBLISHED[name])
    if name in _CONFIGS:
        config = json.loads((path / "config.json").read_text())
        for key, value in _CONFIGS[name].items():
            config[key] = config[key] | value if isinstance(value, dict) else value
        (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def made_as(name: str) -> tuple[str, dict[str, Any]]:
    """The model_type that a checkpoint's config says, and what it is made of."""
    model_type, config = LOADED[name]
    return _CONFIGS.get(name, {}).get("model_type", model_type), config


DRAFTS = ("qwen3_5", "qwen3_5-tied", "qwen3_5_moe")
"""Those that published files have with a layer that predicts one more token."""


def with_draft(name: str, path: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """The checkpoint with such a layer."""
    import torch
    from safetensors.torch import load_file, save_file

    file, last = make(name, path, changes) / "model.safetensors", "model.language_model.layers.1."
    tensors = load_file(file)
    drafted = {f"mtp.layers.0.{each.removeprefix(last)}": t for each, t in tensors.items() if last in each}
    width = len(tensors["model.language_model.norm.weight"])
    for each in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        drafted[f"mtp.{each}.weight"] = torch.empty(width, dtype=torch.bfloat16)
    drafted["mtp.fc.weight"] = torch.empty((width, 2 * width), dtype=torch.bfloat16)
    save_file(tensors | engine_shapes.own_numbers(drafted), file, metadata={"format": "pt"})
    return path


def _as_thinker(path: Path, model_type: str) -> None:
    """Make a checkpoint the thinker of a whole model."""
    from safetensors.torch import load_file, save_file

    config = json.loads((path / "config.json").read_text())
    (architecture,) = config.pop("architectures")
    whole = {
        "architectures": [architecture.replace("Thinker", "")],
        "model_type": model_type,
        "dtype": "bfloat16",
        "thinker_config": config,
    }
    (path / "config.json").write_text(json.dumps(whole, indent=2))
    file = path / "model.safetensors"
    save_file({f"thinker.{name}": each for name, each in load_file(file).items()}, file, metadata={"format": "pt"})


def _as_published(file: Path, begins: dict[str, str]) -> None:
    """Give tensors the names, and stacked experts the order of dims, that published files have."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, tensor in load_file(file).items():
        old = next((each for each in begins if name.startswith(each)), "")
        turned = tensor.dim() == 3 and ".experts." in name and not begins
        tensors[begins.get(old, "") + name[len(old) :]] = tensor.mT.contiguous() if turned else tensor
    save_file(tensors, file, metadata={"format": "pt"})
