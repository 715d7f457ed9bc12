"""Small checkpoints in FP8, in blocks of 128, as many of the families are published: plain ones, each matrix scaled."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.engines import engine_models as models
from tests.engines import engine_nested as nested

_WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 512}
_EVEN = _WIDE | {"hidden_size": 512}
_MOE = _WIDE | {"moe_intermediate_size": 256}
_HYBRID = _EVEN | {"mamba_d_head": 128}
_SHARED_EXPERT = {"moe_intermediate_size": 256, "moe_shared_expert_intermediate_size": 256}
_LLAMA4 = _EVEN | {"intermediate_size": 256, "intermediate_size_mlp": 512}
_SHARED = _EVEN | {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
_LATENT = (
    _MOE
    | {"num_key_value_heads": 4, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    | {"kv_lora_rank": 128, "q_lora_rank": 128}
)
_LINEAR = (
    _MOE
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    | {"shared_expert_intermediate_size": 256}
)
_MIMO = _MOE | {"v_head_dim": 128, "swa_num_attention_heads": 4, "swa_head_dim": 128, "swa_v_head_dim": 128}

_AROUND = r"|eh_proj|shared_head|embed_tokens|mtp\.fc|mtp_linear_proj"
DRAFTS: dict[str, tuple[dict[str, Any], str]] = {
    "deepseek_v3": (_LATENT, r"mlp\.gate\."),
}
"""Others of which the layers that predict further tokens are published so."""
BLOCKS: dict[str, tuple[dict[str, Any], str]] = {
    "minimax_m2": (_WIDE | {"intermediate_size": 256}, r"\.gate\."),
    "glm_moe_dsa": (_LATENT | {"index_head_dim": 128}, r"mlp\.gate\.|indexer\.(wk|weights_proj)"),
    "glm4_moe_lite": (_LATENT, r"mlp\.gate\."),
    "qwen3_next": (_LINEAR, r"mlp\.gate\.|shared_expert_gate|in_proj_ba"),
    "qwen3_5_moe_text": (_LINEAR, r"mlp\.gate\.|shared_expert_gate|in_proj_[ab]"),
    "qwen3_5_text": (_LINEAR, r"in_proj_[ab]"),
    "mimo_v2_flash": (_MIMO, r"mlp\.gate\.|o_proj"),
    "hy_v3": (_MOE | {"expert_hidden_dim": 256}, r"router\.gate"),
    "exaone_moe": (_MOE, r"mlp\.gate\."),
    "ernie4_5_moe": (_MOE, r"mlp\.gate\.|moe_statics"),
    "afmoe": (_MOE, r"router\.gate"),
    "cohere2_moe": (_MOE | {"intermediate_size": 256, "prefix_dense_intermediate_size": 512}, r"mlp\.gate\."),
    "dots1": (_MOE, r"mlp\.gate\."),
    "solar_open": (_MOE, r"mlp\.gate\."),
    "hunyuan_v1_moe": (_MOE | {"intermediate_size": 256}, r"mlp\.gate\."),
    "flex_olmo": (_MOE | {"intermediate_size": 256}, r"mlp\.gate\."),
    "nanochat": (_WIDE, "none"),
    "lfm2": ({"num_attention_heads": 2}, "none"),
    **{name: (_MOE | {"num_attention_heads": 4}, r"mlp\.gate\.") for name in ("bailing_moe", "bailing_moe_v2")},
    "lfm2_moe": ({"num_attention_heads": 2, "head_dim": 128, "moe_intermediate_size": 256}, r"feed_forward\.gate\."),
    **{name: (_WIDE, "none") for name in ("apertus", "arcee", "cwm", "ernie4_5", "granite_swa", "hunyuan_v1_dense")},
    **{name: (_WIDE, "none") for name in ("hyperclovax", "jais2", "ministral3", "olmo3", "vaultgemma")},
    **{name: (_EVEN, "none") for name in ("qwen2", "gemma", "gemma2", "gemma3", "cohere", "cohere2", "granite")},
    **{
        name: (_EVEN, "none")
        for name in ("exaone", "exaone4", "glm4", "gpt_neox", "helium", "internlm3", "iquestcoder")
    },
    **{name: (_EVEN, "none") for name in ("ministral", "nemotron", "olmo", "olmo2", "opt", "seed_oss", "smollm3")},
    **{name: (_EVEN, "none") for name in ("stablelm", "starcoder2", "internlm2", "glm")},
    "falcon-new": ({"hidden_size": 512, "num_attention_heads": 4, "num_kv_heads": 2}, "none"),
    "bloom": ({"hidden_size": 256, "n_head": 2}, "none"),
    "chatglm": ({"hidden_size": 512, "num_attention_heads": 4, "kv_channels": 128}, "none"),
    "gemma4": (_EVEN | {"global_head_dim": 128}, "per_layer"),
    "olmoe": (_EVEN | {"intermediate_size": 256}, r"mlp\.gate\."),
    "mixtral": (_EVEN | {"intermediate_size": 256}, r"\.gate\."),
    "glm4_moe": (_MOE, r"mlp\.gate\."),
    "qwen2_moe": (_SHARED, r"mlp\.gate\.|shared_expert_gate"),
    "deepseek_v2": (_LATENT, r"mlp\.gate\."),
    "deepseek_v32": (_LATENT | {"index_head_dim": 128}, r"mlp\.gate\.|indexer\.(wk|weights_proj)"),
    "nemotron_h": (_HYBRID | _SHARED_EXPERT, r"\.gate\.|mixer\.in_proj"),
}
"""What differs in the config, so that ranks have whole blocks, and which matrices of layers stay as they are."""


def _turning(*sections: int) -> dict[str, Any]:
    """Rotary positions of heads as wide as a block."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}}


_FEW = _WIDE | {"num_attention_heads": 2}
_GLM = {"rope_parameters": _turning(8, 12, 12)["rope_parameters"] | {"partial_rotary_factor": 0.5}}
NESTED: dict[str, tuple[dict[str, Any], str]] = {
    **{name: (_WIDE, "none") for name in ("llava", "gemma3")},
    "internvl": (_FEW, "none"),
    "qwen2_5_vl": (_FEW | _turning(16, 24, 24), "none"),
    "qwen3_vl": (_WIDE | _turning(24, 20, 20), "none"),
    "glm4v_moe": (_MOE | _GLM, r"mlp\.gate\."),
    "qwen3_5": (_LINEAR | _turning(6, 5, 5), r"in_proj_[ab]"),
    "qwen3_5_moe": (_LINEAR | _turning(6, 5, 5), r"mlp\.gate\.|shared_expert_gate|in_proj_[ab]"),
    "kimi_k25": (_LATENT, r"mlp\.gate\."),
    "kimi_vl": (_LATENT, r"mlp\.gate\."),
    "gemma4": (_EVEN | {"global_head_dim": 128}, "per_layer"),
    "qwen2_vl": (_FEW | _turning(16, 24, 24), "none"),
    "qwen3_vl_moe": (_MOE | _turning(24, 20, 20), r"mlp\.gate\."),
    "qwen3_omni_moe": (_MOE | _turning(24, 20, 20), r"mlp\.gate\.|audio"),
    "llava_next": (_WIDE, "none"),
}
"""Text models that others nest, whose towers are published as they are."""
PLACED = (
    *("llava", "gemma3", "internvl", "qwen2_5_vl", "qwen3_vl", "glm4v_moe", "qwen3_5", "qwen3_5_moe", "kimi_k25"),
)
"""Those of which the config of the text says so as well as the whole one."""


def make(name: str, path: Path, plain: str | None = None, sizes: Mapping[str, Any] = MappingProxyType({})) -> Path:
    """Write a checkpoint in FP8, with a scale for every block.

    plain: other matrices that stay as they are. sizes: what else differs in the config.
    """
    differing, kept = BLOCKS[name]
    return _quantised(models.make(name, path, {**differing, **sizes}), plain or kept)


INDEXED = ("deepseek_v32", "glm_moe_dsa")
"""Those whose indexers are published so as well, but for the weights of their heads."""


def indexed(name: str, path: Path, plain: str = "weights_proj") -> Path:
    """Write one of them. plain: which matrices of the indexer stay as they are."""
    return make(name, path, rf"mlp\.gate\.|indexer\.({plain})")


def nesting(name: str, path: Path, place: str) -> Path:
    """Write a model of which the text is in FP8. place: the config that says so, "" for the whole model's."""
    sizes, kept = NESTED[name]
    path = _quantised(nested.make(name, path, sizes), rf"{kept}|visual|vision|project|merger")
    if place:
        config = json.loads((path / "config.json").read_text())
        config[place]["quantization_config"] = config.pop("quantization_config")
        (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


PACKED = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl", "llava", "gemma3", "kimi_k25", "llama4")
_EXPERTS, _TEXT = (
    r".*\.(mlp|feed_forward)\.experts\.\d+\.\w+\.weight",
    r".*\.layers\.\d+\.(self_attn|mlp|feed_forward|feed_forward\.shared_expert)\.(\w|gate|up|down)_proj\.weight",
)


PACKED_TEXTS = {
    **{"qwen2": "none", "gemma2": "none", "mixtral": r"\.gate\.", "llama4": "router"},
    "qwen2_moe": r"\.gate\.|shared_expert_gate",
}
"""Text models alone, and which of the matrices in their layers stay as they are."""


def packed(name: str, path: Path) -> Path:
    """Write a model whose text is packed in INT4; of Kimi-K2.5 routed experts alone, as it is published."""
    nested.make(name, path, _LLAMA4 if name == "llama4" else NESTED[name][0])
    if name == "llama4":
        _one_by_one(path / "model.safetensors")
    pattern = _EXPERTS if name == "kimi_k25" else f"(?!.*(visual|vision))({_TEXT}|{_EXPERTS})"
    plain = _packed(path, pattern)
    if name == "kimi_k25":
        those = ("self_attn", "shared_experts", r"mlp\.(gate|up|gate_up|down)_proj", "vision_tower", "mm_projector")
        plain = ["lm_head", *(f"re:.*{each}.*" for each in those)]
    return _declared_packed(path, plain, "text_config" if name == "kimi_k25" else "")


def packed_text(name: str, path: Path) -> Path:
    """Write a text model that is packed in INT4, with experts one by one, as tools save them."""
    models.make(name, path, _LLAMA4 if name == "llama4" else BLOCKS[name][0])
    if name == "llama4":
        _one_by_one(path / "model.safetensors")
    plain = _packed(path, rf"(?!.*({PACKED_TEXTS[name]})).*\.layers\..*\.weight")
    return _declared_packed(path, plain)


def _one_by_one(file: Path) -> None:
    """Save stacked experts that are for products from the left as matrices of their own."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for name in [each for each in tensors if each.endswith(".experts.gate_up_proj")]:
        stem = name.removesuffix("gate_up_proj")
        pairs = zip(tensors.pop(name), tensors.pop(f"{stem}down_proj"), strict=True)
        for expert, (both, down) in enumerate(pairs):
            gate, up = both.chunk(2, -1)
            for module, matrix in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                tensors[f"{stem}{expert}.{module}.weight"] = matrix.T.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def _packed(path: Path, pattern: str) -> list[str]:
    """Pack the matrices that fit a pattern, in groups of 32; the names of the others."""
    import torch
    from safetensors.torch import load_file, save_file

    generator, tensors, plain = torch.Generator().manual_seed(0), dict[str, torch.Tensor](), list[str]()
    for key, tensor in load_file(path / "model.safetensors").items():
        if tensor.dim() != 2 or not re.match(pattern, key):
            tensors[key] = tensor
            if tensor.dim() == 2:
                plain.append(key.removesuffix(".weight"))
            continue
        rows, columns = tensor.shape
        packing = torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=generator).int()
        tensors[f"{key}_packed"], tensors[f"{key}_shape"] = packing, torch.tensor([rows, columns])
        tensors[f"{key}_scale"] = torch.rand((rows, columns // 32), generator=generator).bfloat16()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return plain


def _declared_packed(path: Path, plain: list[str], place: str = "") -> Path:
    """Say it in the config, or in the one at a place."""
    config = json.loads((path / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    (config[place] if place else config)["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": plain,
        "quantization_status": "compressed",
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def with_draft(name: str, path: Path, index: str = "") -> Path:
    """Write one with a layer that predicts one more token, also in FP8 but for what is around it.

    index: of an indexer, the matrices that stay as they are, if not those of `BLOCKS`.
    """
    if name in nested.DRAFTS:
        sizes, kept = NESTED[name]
        return _quantised(nested.with_draft(name, path, sizes), f"{kept}{_AROUND}|visual")
    sizes, kept = {**BLOCKS, **DRAFTS}[name]
    kept = rf"mlp\.gate\.|indexer\.({index})" if index else kept
    return _quantised(models.with_draft(name, path, sizes | models.DRAFT_CONFIGS.get(name, {})), kept + _AROUND)


def _quantised(path: Path, plain: str) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    generator, tensors, listed = torch.Generator().manual_seed(0), dict[str, torch.Tensor](), list[str]()
    for key, tensor in load_file(path / "model.safetensors").items():
        tensors[key] = tensor
        if tensor.dim() != 2:
            if tensor.dim() == 3 and re.search("experts|block_sparse", key):
                listed.append(
                    re.sub(r"(experts|block_sparse_moe\.experts|block_sparse_moe)\..*", r"\1", key).removesuffix(
                        ".experts"
                    )
                    + ".experts"
                )
            continue
        if not re.search(r"\.(layers|h)\.|mtp", key) or re.search(plain, key):
            listed.append(key.rpartition(".")[0])
            continue
        tensors[key] = tensor.to(torch.float8_e4m3fn)
        blocks = [-(-size // 128) for size in tensor.shape]
        tensors[f"{key}_scale_inv"] = 0.5 + torch.rand(blocks, generator=generator)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": listed,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path
