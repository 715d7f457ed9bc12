"""Checkpoints in Mistral's own form: params.json in place of config.json, and consolidated.safetensors.

Numbers are such that a model can be computed with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.helpers.checkpoints import VOCAB
from tests.helpers.published_text import drawn
from tests.helpers.served_cuts import Cuts
from tests.helpers.toys import Tensor, write

PARAMS = {
    **{"dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 96, "n_heads": 8, "n_kv_heads": 2},
    **{"norm_eps": 1e-5, "vocab_size": VOCAB, "rope_theta": 1e6},
}
LATENT: dict[str, Any] = {
    "norm_eps": 1e-6,
    **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12},
    "moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "expert_hidden_dim": 32, "num_shared_experts": 1},
        **{"first_k_dense_replace": 1, "route_every_n": 1, "num_expert_groups": 1, "num_expert_groups_per_tok": 1},
        "routed_scale": 1.0,
    },
    "yarn": {"original_max_position_embeddings": 16, "factor": 4, "apply_scale": False, "beta": 32, "alpha": 1},
    "llama_4_scaling": {"original_max_position_embeddings": 16, "beta": 0.1},
}
VISION = {
    **{"hidden_size": 32, "num_channels": 3, "image_size": 56, "patch_size": 14, "intermediate_size": 48},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "rope_theta": 1e4, "image_token_id": 10},
}
MERGED = {
    **{"mm_projector_id": "patch_merge", "add_pre_mm_projector_layer_norm": True, "adapter_bias": False},
    "spatial_merge_size": 2,
}
"""Of the tower of Mistral Small 3.1."""
CUTS = Cuts(
    ("wq", "wq_b", "wkv_b", "w1", "w3"),
    ("wo", "w2"),
    {"wk": 2, "wv": 2},
    ends=("tok_embeddings", "output"),
)


def _shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of Mistral 7B, Mixtral, Mistral Large 3, Pixtral, or Mistral Small 3.1."""
    found: dict[str, tuple[int, ...]] = {"tok_embeddings": (VOCAB, 64), "output": (VOCAB, 64), "norm": (64,)}
    for i in range(2):
        layer = {"attention_norm": (64,), "ffn_norm": (64,)}
        if kind == "large 3":
            layer |= {"attention.wq_a": (24, 64), "attention.q_a_norm": (24,), "attention.wq_b": (192, 24)}
            layer |= {"attention.wkv_a_with_mqa": (24, 64), "attention.kv_a_norm": (16,)}
            layer |= {"attention.wkv_b": (224, 16), "attention.wo": (64, 96)}
        else:
            layer |= {"attention.wq": (128, 64), "attention.wo": (64, 128)}
            layer |= {"attention.wk": (32, 64), "attention.wv": (32, 64)}
        blocks = {"feed_forward": 96}
        if kind == "large 3" and i == 1:
            blocks = {"shared_experts": 32, **{f"experts.{expert}": 32 for expert in range(4)}}
            layer["gate"] = (4, 64)
        elif kind == "mixtral":
            blocks = {f"feed_forward.experts.{expert}": 96 for expert in range(4)}
            layer["feed_forward.gate"] = (4, 64)
        for block, wide in blocks.items():
            layer |= {f"{block}.w1": (wide, 64), f"{block}.w2": (64, wide), f"{block}.w3": (wide, 64)}
        found |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    if kind in ("pixtral", "merged"):
        found |= {"vision_encoder.patch_conv": (32, 3, 14, 14), "vision_encoder.ln_pre": (32,)}
        for i in range(2):
            layer = {f"attention.w{letter}": (32, 32) for letter in "qkvo"} | {"attention_norm": (32,)}
            layer |= {"feed_forward.w1": (48, 32), "feed_forward.w2": (32, 48), "feed_forward.w3": (48, 32)}
            layer["ffn_norm"] = (32,)
            found |= {f"vision_encoder.transformer.layers.{i}.{name}": shape for name, shape in layer.items()}
        found |= {"vision_language_adapter.w_in": (64, 32), "vision_language_adapter.w_out": (64, 64)}
    if kind == "merged":
        found |= {"pre_mm_projector_norm": (32,), "patch_merger.merging_layer": (32, 128)}
    biased = {f"{name}.bias": (64,) for name in found if name.startswith("vision_language") and kind == "pixtral"}
    return {f"{name}.weight": shape for name, shape in found.items()} | biased


KINDS: dict[str, Mapping[str, Any]] = {
    "7b": PARAMS,
    "pixtral": PARAMS | {"vision_encoder": VISION},
    "mixtral": PARAMS | {"moe": {"num_experts": 4, "num_experts_per_tok": 2}},
    "large 3": PARAMS | LATENT,
    "merged": PARAMS | {"vision_encoder": VISION | MERGED},
}


def published(directory: Path, kind: str, files: int = 1, **params: Any) -> Path:
    """Write one. params: what of params.json differs."""
    tensors = {name: _bf16(tensor) for name, tensor in drawn(_shapes(kind)).items()}
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps({**KINDS[kind], **params}))
    (directory / "tekken.json").write_text("{}")
    if files == 1:
        write(directory / "consolidated.safetensors", tensors)
        return directory
    weight_map = {}
    for part in range(files):
        name = f"consolidated-{part + 1:05}-of-{files:05}.safetensors"
        mine = {each: tensor for i, (each, tensor) in enumerate(tensors.items()) if i % files == part}
        write(directory / name, mine)
        weight_map |= dict.fromkeys(mine, name)
    index = directory / "consolidated.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def _bf16(tensor: Tensor) -> Tensor:
    """The upper half of each number."""
    data = tensor.data
    return Tensor("BF16", tensor.shape, b"".join(data[at + 2 : at + 4] for at in range(0, len(data), 4)))
