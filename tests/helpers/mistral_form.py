"""Checkpoints in Mistral's own form: params.json in place of config.json, and consolidated.safetensors.

Numbers are such that a model can be computed with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.checkpoints import VOCAB
from tests.helpers.published_text import drawn
from tests.helpers.served_cuts import Cuts
from tests.helpers.toys import Tensor, random_tensor, read_all, write

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


_WIDE = {
    "dim": 256,
    "n_layers": 2,
    "head_dim": 32,
    "hidden_dim": 512,
    "vocab_size": 1000,
    "max_position_embeddings": 128,
}
_TOWER = VISION | {"num_attention_heads": 4}
FOR_ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("7b", _WIDE),
    "mistral-tied": ("7b", _WIDE | {"tied_embeddings": True}),
    "mistral-scaled": ("7b", _WIDE | {"llama_4_scaling": {"original_max_position_embeddings": 16, "beta": 0.1}}),
    "mistral-large-3": ("large 3", _WIDE | {"n_kv_heads": 8}),
    "mistral-latent-dense": ("large 3", _WIDE | {"n_kv_heads": 8, "moe": None}),
    "pixtral": ("pixtral", _WIDE | {"vision_encoder": _TOWER}),
    "pixtral-tied": ("pixtral", _WIDE | {"vision_encoder": _TOWER, "tied_embeddings": True}),
    "pixtral-merged": ("merged", _WIDE | {"vision_encoder": _TOWER | MERGED}),
    "pixtral-large-3": ("large 3, merged", _WIDE | {"n_kv_heads": 8, "vision_encoder": _TOWER | MERGED}),
}
"""Those that vLLM loads, in sizes that its classes take."""


def _shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of Mistral 7B, Mixtral, Mistral Large 3, Pixtral, or Mistral Small 3.1."""
    dim, heads, moe, vision = params["dim"], params["n_heads"], params.get("moe"), params.get("vision_encoder")
    vocab, kv, head, wide = params["vocab_size"], params["n_kv_heads"], params["head_dim"], params["hidden_dim"]
    found: dict[str, tuple[int, ...]] = {"tok_embeddings": (vocab, dim), "output": (vocab, dim), "norm": (dim,)}
    for i in range(params["n_layers"]):
        layer: dict[str, tuple[int, ...]] = {"attention_norm": (dim,), "ffn_norm": (dim,)}
        if "kv_lora_rank" in params:
            q, latent, turned = params["q_lora_rank"], params["kv_lora_rank"], params["qk_rope_head_dim"]
            plain, out = params["qk_nope_head_dim"], params["v_head_dim"]
            layer |= {"wq_a": (q, dim), "q_a_norm": (q,), "wq_b": (heads * (plain + turned), q)}
            layer |= {"wkv_a_with_mqa": (latent + turned, dim), "kv_a_norm": (latent,)}
            layer |= {"wkv_b": (heads * (plain + out), latent), "wo": (dim, heads * out)}
        else:
            layer |= {"wq": (heads * head, dim), "wo": (dim, heads * head)}
            layer |= dict.fromkeys(("wk", "wv"), (kv * head, dim))
        layer = {name if name.endswith("n_norm") else f"attention.{name}": shape for name, shape in layer.items()}
        blocks = {"feed_forward": wide}
        if moe and "kv_lora_rank" in params and i >= moe["first_k_dense_replace"]:
            own = moe["expert_hidden_dim"]
            blocks = {"shared_experts": own, **{f"experts.{expert}": own for expert in range(moe["num_experts"])}}
            layer["gate"] = (moe["num_experts"], dim)
        elif moe and "kv_lora_rank" not in params:
            blocks = {f"feed_forward.experts.{expert}": wide for expert in range(moe["num_experts"])}
            layer["feed_forward.gate"] = (moe["num_experts"], dim)
        for block, size in blocks.items():
            layer |= {f"{block}.w1": (size, dim), f"{block}.w2": (dim, size), f"{block}.w3": (size, dim)}
        found |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    if vision:
        found |= {"vision_encoder.patch_conv": (32, 3, 14, 14), "vision_encoder.ln_pre": (32,)}
        for i in range(vision["num_hidden_layers"]):
            layer = {f"attention.w{letter}": (32, 32) for letter in "qkvo"} | {"attention_norm": (32,)}
            layer |= {"feed_forward.w1": (48, 32), "feed_forward.w2": (32, 48), "feed_forward.w3": (48, 32)}
            layer["ffn_norm"] = (32,)
            found |= {f"vision_encoder.transformer.layers.{i}.{name}": shape for name, shape in layer.items()}
        found |= {"vision_language_adapter.w_in": (dim, 32), "vision_language_adapter.w_out": (dim, dim)}
        if "mm_projector_id" in vision:
            found |= {"pre_mm_projector_norm": (32,), "patch_merger.merging_layer": (32, 128)}
    biased = [name for name in found if name.startswith("vision_language") and vision.get("adapter_bias", True)]
    return {f"{name}.weight": shape for name, shape in found.items()} | {f"{name}.bias": (dim,) for name in biased}


KINDS: dict[str, Mapping[str, Any]] = {
    "7b": PARAMS,
    "pixtral": PARAMS | {"vision_encoder": VISION},
    "mixtral": PARAMS | {"moe": {"num_experts": 4, "num_experts_per_tok": 2}},
    "large 3": PARAMS | LATENT,
    "merged": PARAMS | {"vision_encoder": VISION | MERGED},
    "large 3, merged": PARAMS | LATENT | {"vision_encoder": VISION | MERGED},
}


def published(directory: Path, kind: str, files: int = 1, **params: Any) -> Path:
    """Write one. params: what of params.json differs; None leaves a key out."""
    said = {key: value for key, value in {**KINDS[kind], **params}.items() if value is not None}
    tensors = {name: _bf16(tensor) for name, tensor in drawn(_shapes(said)).items()}
    if said.get("tied_embeddings"):
        del tensors["output.weight"]
    directory.mkdir(parents=True)
    (directory / "params.json").write_text(json.dumps(said))
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


def in_fp8(model: Path) -> Path:
    """The same with matrices of layers in FP8, as in Mistral Large 3: one scale for each, and one for its inputs."""
    rng, tensors = np.random.default_rng(1), read_all(model)
    for name in [name for name in tensors if ".attention.w" in name or ".feed_forward.w" in name]:
        tensors[name] = random_tensor(rng, "F8_E4M3", tensors[name].shape)
        for scale in ("qscale_weight", "qscale_act"):
            tensors[name.replace("weight", scale)] = random_tensor(rng, "F32", ())
    write(model / "consolidated.safetensors", tensors)
    said = json.loads((model / "params.json").read_text())
    said["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    (model / "params.json").write_text(json.dumps(said))
    return model


def _bf16(tensor: Tensor) -> Tensor:
    """The upper half of each number."""
    data = tensor.data
    return Tensor("BF16", tensor.shape, b"".join(data[at + 2 : at + 4] for at in range(0, len(data), 4)))
