"""Text models as they are published, with numbers that can be computed with: some by class, some by shapes alone."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import served_checkpoints, served_forms
from tests.helpers.served_checkpoints import SERVED
from tests.helpers.toys import Tensor, read_all, write_checkpoint

VOCAB = 64
_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCAB, "num_hidden_layers": 2}
_GPT = {
    "transformer.wte": (VOCAB, 32), "lm_head": (VOCAB, 32), "transformer.ln_f": (32,),
    "transformer.h.*.ln_1": (32,), "transformer.h.*.ln_2": (32,), "transformer.h.*.mlp.c_proj": (32, 48),
}  # fmt: skip
_NORMS = {f"model.layers.*.{each}_layernorm": (32,) for each in ("input", "post_attention")}


def _gated(module: str, wide: int) -> dict[str, tuple[int, ...]]:
    start = f"model.layers.*.{module}"
    return {f"{start}.gate_proj": (wide, 32), f"{start}.up_proj": (wide, 32), f"{start}.down_proj": (32, wide)}


_BAICHUAN = {"model_type": "baichuan", "intermediate_size": 48, "hidden_act": "silu", "rms_norm_eps": 1e-6}
_PACKED = {
    "model.embed_tokens": (VOCAB, 32), "lm_head": (VOCAB, 32), "model.norm": (32,), **_NORMS, **_gated("mlp", 48),
    "model.layers.*.self_attn.W_pack": (96, 32), "model.layers.*.self_attn.o_proj": (32, 32),
}  # fmt: skip
SHAPES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "exaone": (
        {"intermediate_size": 48, "num_key_value_heads": 2, "num_layers": 2, "num_hidden_layers": None}
        | {"layer_norm_epsilon": 1e-5, "activation_function": "silu", "rope_theta": 500000.0},
        _GPT
        | {f"transformer.h.*.attn.attention.{each}_proj": (32, 32) for each in ("q", "out")}
        | {f"transformer.h.*.attn.attention.{each}_proj": (16, 32) for each in "kv"}
        | {f"transformer.h.*.mlp.c_fc_{each}": (48, 32) for each in (0, 1)},
    ),
    "qwen": (
        {"intermediate_size": 96, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "no_bias": True},
        _GPT
        | {"transformer.h.*.attn.c_attn": (96, 32), "transformer.h.*.attn.c_attn.bias": (96,)}
        | {"transformer.h.*.attn.c_proj": (32, 32)}
        | {f"transformer.h.*.mlp.w{each}": (48, 32) for each in (1, 2)},
    ),
    "chatglm": (
        {"ffn_hidden_size": 48, "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True}
        | {"num_layers": 2, "num_hidden_layers": None, "kv_channels": 8, "padded_vocab_size": VOCAB, "vocab_size": 60}
        | {"layernorm_epsilon": 1e-5, "rmsnorm": True, "seq_length": 64, "add_bias_linear": False, "pad_token_id": 0},
        {
            "transformer.embedding.word_embeddings": (VOCAB, 32), "transformer.output_layer": (VOCAB, 32),
            "transformer.encoder.final_layernorm": (32,), "transformer.encoder.layers.*.input_layernorm": (32,),
            "transformer.encoder.layers.*.post_attention_layernorm": (32,),
            "transformer.encoder.layers.*.self_attention.query_key_value": (64, 32),
            "transformer.encoder.layers.*.self_attention.query_key_value.bias": (64,),
            "transformer.encoder.layers.*.self_attention.dense": (32, 32),
            "transformer.encoder.layers.*.mlp.dense_h_to_4h": (96, 32),
            "transformer.encoder.layers.*.mlp.dense_4h_to_h": (32, 48),
        },
    ),
    "baichuan": (_BAICHUAN | {"max_position_embeddings": 64}, _PACKED),
    "baichuan-2": (_BAICHUAN | {"max_position_embeddings": 64, "model_max_length": 64, "z_loss_weight": 0}, _PACKED),
    "baichuan-13B": (_BAICHUAN | {"model_max_length": 64}, _PACKED),
    "bailing_moe": (
        {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_shared_experts": 2, "num_experts_per_tok": 2}
        | {"intermediate_size": 80, "moe_intermediate_size": 16, "norm_topk_prob": True, "first_k_dense_replace": 0}
        | {"use_bias": False, "use_qkv_bias": False, "norm_head": False, "rms_norm_eps": 1e-6, "rope_theta": 600000},
        {
            "model.word_embeddings": (VOCAB, 32), "lm_head": (VOCAB, 32), "model.norm": (32,), **_NORMS,
            "model.layers.*.attention.query_key_value": (64, 32), "model.layers.*.attention.dense": (32, 32),
            "model.layers.*.mlp.gate": (4, 32), **_gated("mlp.shared_experts", 32),
            **{name: each for i in range(4) for name, each in _gated(f"mlp.experts.{i}", 16).items()},
        },
    ),
    "minimax_text_01": (
        {"num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "rope_theta": 10000000, "rms_norm_eps": 1e-5}
        | {"attn_type_list": [0, 1], "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"postnorm": True, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "hidden_act": "silu"}
        | {f"layernorm_{each}_alpha": 3.5 + i for i, each in enumerate(("full_attention", "linear_attention", "mlp"))}
        | {f"layernorm_{each}_beta": 1.5 for each in ("full_attention", "linear_attention", "mlp")},
        {
            "model.embed_tokens": (VOCAB, 32), "lm_head": (VOCAB, 32), "model.norm": (32,), **_NORMS,
            "model.layers.0.self_attn.qkv_proj": (96, 32), "model.layers.0.self_attn.output_gate": (32, 32),
            "model.layers.0.self_attn.norm": (32,), "model.layers.0.self_attn.out_proj": (32, 32),
            **{f"model.layers.1.self_attn.{each}_proj": (32, 32) for each in "qo"},
            **{f"model.layers.1.self_attn.{each}_proj": (16, 32) for each in "kv"},
            "model.layers.*.block_sparse_moe.gate": (4, 32),
            **{
                f"model.layers.*.block_sparse_moe.experts.{i}.w{w}": (32, 16) if w == 2 else (16, 32)
                for i in range(4) for w in (1, 2, 3)
            },
        },
    ),
}  # fmt: skip
"""By model_type, what a config has beside sizes, and the shapes of weights, and of biases."""


def make(name: str, path: Path) -> Path:
    """Write the checkpoint, as it is published."""
    if name in SHAPES:
        changes, shapes = SHAPES[name]
        found = {}
        for module, shape in shapes.items():
            full = module if module.endswith(".bias") else f"{module}.weight"
            found |= {full.replace("*", str(layer)): shape for layer in range(2 if "*" in module else 1)}
        config = _SIZES | {"model_type": name} | changes
        return write_checkpoint(path, {key: x for key, x in config.items() if x is not None}, drawn(found))
    if name == "minicpm":
        model = served_forms.write(name, path)
        config = json.loads((model / "config.json").read_text())
        config |= {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}
        return write_checkpoint(path, config, drawn({each: x.shape for each, x in read_all(model).items()}))
    if name in ("bailing_hybrid", "bailing_moe_v3"):
        return _ling_3(name, path)
    if name in ("phi4mm", "nemotron-nas"):
        model = served_forms.write(name, path)
        config = json.loads((model / "config.json").read_text())
        return write_checkpoint(path, config, drawn({each: x.shape for each, x in read_all(model).items()}))
    if name == "step3p5":
        return _without_tower(served_checkpoints.make("step3p7", path.with_name("step3p7")), path)
    if SERVED[name].model_type is None:
        config = {"num_experts_per_tok": 2, **SERVED[name].config}
        text = {each: x for each, x in SERVED[name].shapes.items() if each.startswith(("model.", "lm_head."))}
        return write_checkpoint(path, config, drawn(text))
    return served_checkpoints.make(name, path)


def _ling_3(name: str, path: Path) -> Path:
    """Ling 3.0 with a layer behind the last whole group, and with decays in the dims that they are given there."""
    served = SERVED["bailing_hybrid, Ling 3.0"]
    kinds = ["linear_attention", "full_attention", "full_attention"]
    longer = replace(served, config={**served.config, "num_hidden_layers": 3, "layer_types": kinds})
    model = served_checkpoints.written(longer, path.with_name(f"{path.name}-saved"))
    tensors = {
        name: Tensor(x.dtype, (1, 1, *x.shape, 1), x.data) if name.endswith("A_log") else x
        for name, x in read_all(model).items()
    }
    config = json.loads((model / "config.json").read_text())
    return write_checkpoint(path, config | {"model_type": name, "partial_rotary_factor": 0.5}, tensors)


def _without_tower(model: Path, path: Path) -> Path:
    """Its text model, which Step 3.5 is."""
    config = json.loads((model / "config.json").read_text())["text_config"] | {"model_type": "step3p5"}
    kept = {name: x for name, x in read_all(model).items() if name.startswith(("model.", "lm_head."))}
    return write_checkpoint(path, config, kept)


def drawn(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random numbers: norms around 1, all else around 0."""
    found = {}
    for name, shape in shapes.items():
        numbers = 0.08 * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        norm = "norm" in name or ".ln_" in name
        found[name] = Tensor("F32", tuple(shape), (numbers + norm).astype("<f4").tobytes())
    return found
