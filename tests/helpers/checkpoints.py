"""Small random checkpoints of every supported family, as transformers saves them and as published files look.

Sizes are small but rich: biases and norms are perturbed so that a mistake in any tensor shows, the vocabulary divides
by neither 2 nor 4, heads divide by 4, and every GQA family has a variant with 2 KV heads (replicated at tp 4).
torch and transformers are imported inside the functions, so that collecting tests stays fast.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.helpers.dense_checkpoints import CENTRED_AT_ZERO, DENSE, ELSEWHERE
from tests.helpers.moe_checkpoints import MOE, STACKED
from tests.helpers.newer_checkpoints import NEWER

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VOCAB = 251
POSITIONS = 64
STD = 0.08


@dataclass(frozen=True)
class Variant:
    """One small model: `config` holds what differs from the config class, `dtype` is torch's name of it."""

    name: str
    model_type: str
    config: dict[str, Any]
    dtype: str = "float32"


@dataclass(frozen=True)
class Family:
    """Where a family keeps what the published variants move: base-model prefix, head, input embedding."""

    prefix: str
    head: str
    embedding: str


FAMILIES = {
    "llama": Family("model.", "lm_head", "model.embed_tokens"),
    "mistral": Family("model.", "lm_head", "model.embed_tokens"),
    "qwen2": Family("model.", "lm_head", "model.embed_tokens"),
    "qwen3": Family("model.", "lm_head", "model.embed_tokens"),
    "gemma2": Family("model.", "lm_head", "model.embed_tokens"),
    "gpt2": Family("transformer.", "lm_head", "transformer.wte"),
    "gpt_neox": Family("gpt_neox.", "embed_out", "gpt_neox.embed_in"),
    "gptj": Family("transformer.", "lm_head", "transformer.wte"),
    "gpt_bigcode": Family("transformer.", "lm_head", "transformer.wte"),
    "gpt_neo": Family("transformer.", "lm_head", "transformer.wte"),
    "bloom": Family("transformer.", "lm_head", "transformer.word_embeddings"),
    "falcon": Family("transformer.", "lm_head", "transformer.word_embeddings"),
    "opt": Family("model.", "lm_head", "model.decoder.embed_tokens"),
}
FAMILIES |= {t: Family(*ELSEWHERE.get(t, ("model.", "lm_head", "model.embed_tokens"))) for t, _ in DENSE.values()}
FAMILIES |= {model_type: Family("model.", "lm_head", "model.embed_tokens") for model_type, _ in (MOE | NEWER).values()}
FAMILIES["dbrx"] = Family("transformer.", "lm_head", "transformer.wte")
FAMILIES["mamba2"] = Family("backbone.", "lm_head", "backbone.embeddings")
FAMILIES["nemotron_h"] = Family("backbone.", "lm_head", "backbone.embeddings")

_COMMON = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": POSITIONS,
}
_GQA = _LLAMA | {"num_key_value_heads": 2}
_GPT2 = {"n_embd": 96, "n_layer": 2, "n_head": 12, "n_positions": POSITIONS}
_NEOX = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_GPTJ = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "rotary_dim": 8}
_BIGCODE = {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": POSITIONS}
_NEO = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "max_position_embeddings": POSITIONS,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 8,
}
_BLOOM = {"hidden_size": 64, "n_layer": 2, "n_head": 8}
_FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "max_position_embeddings": POSITIONS}
_FALCON_NEW = _FALCON | {"new_decoder_architecture": True, "multi_query": False, "num_kv_heads": 2}
_FALCON_RW = _FALCON | {
    "hidden_size": 96,
    "num_attention_heads": 12,
    "multi_query": False,
    "parallel_attn": False,
    "bias": True,
    "alibi": True,
}
_OPT = {
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": POSITIONS,
}


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


# Those of the families that verify's own decoder has; `old_config` knows them too.
DECODED: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("llama", "llama", _LLAMA),
        Variant("llama-gqa", "llama", _GQA),
        Variant("llama-mqa", "llama", _LLAMA | {"num_key_value_heads": 1}),
        Variant("llama-mha-bias", "llama", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
        Variant("llama-tied", "llama", _LLAMA | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        Variant("llama-head-dim", "llama", _GQA | {"hidden_size": 96, "head_dim": 16}),
        Variant("llama-bf16", "llama", _GQA, dtype="bfloat16"),
        Variant("llama-rope-linear", "llama", _GQA | _rope("linear", factor=4.0)),
        # 16 trained positions: longer prompts make the frequencies change.
        Variant("llama-rope-dynamic", "llama", _GQA | {"max_position_embeddings": 16} | _rope("dynamic", factor=4.0)),
        Variant("llama-rope-yarn", "llama", _GQA | _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
        Variant(
            "llama-rope-llama3",
            "llama",
            _GQA
            | _rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
            ),
        ),
        Variant("mistral", "mistral", _GQA | {"sliding_window": None}),
        Variant("mistral-sliding", "mistral", _GQA | {"sliding_window": 8}),
        Variant("qwen2-bias", "qwen2", _GQA),
        Variant("qwen2-tied", "qwen2", _GQA | {"tie_word_embeddings": True}),
        Variant(
            "qwen2-sliding", "qwen2", _GQA | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
        ),
        Variant("qwen3", "qwen3", _GQA | {"head_dim": 16}),
        Variant(
            "qwen3-tied-bias", "qwen3", _GQA | {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}
        ),
        Variant(
            "gemma2",
            "gemma2",
            # The softcaps are small and the scale is not head_dim, so that leaving either out shows.
            _GQA
            | {
                "head_dim": 16,
                "query_pre_attn_scalar": 24,
                "sliding_window": 8,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0,
            },
        ),
        Variant("gpt2", "gpt2", _GPT2),
        Variant("gpt2-untied-inner", "gpt2", _GPT2 | {"n_inner": 128, "tie_word_embeddings": False}),
        Variant("gpt2-scaled", "gpt2", _GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
        Variant("gpt2-bf16", "gpt2", _GPT2, dtype="bfloat16"),
        Variant("gpt_neox", "gpt_neox", _NEOX),
        Variant(
            "gpt_neox-seq-residual",
            "gpt_neox",
            _NEOX | {"num_attention_heads": 8, "rotary_pct": 0.5, "use_parallel_residual": False},
        ),
        Variant("gpt_neox-tied-nobias", "gpt_neox", _NEOX | {"attention_bias": False, "tie_word_embeddings": True}),
        Variant("gptj", "gptj", _GPTJ),
        Variant("gptj-tied-inner", "gptj", _GPTJ | {"n_inner": 128, "tie_word_embeddings": True}),
        Variant("gpt_bigcode-mqa", "gpt_bigcode", _BIGCODE | {"multi_query": True}),
        Variant("gpt_bigcode-mha", "gpt_bigcode", _BIGCODE | {"multi_query": False, "n_inner": 128}),
        Variant("gpt_neo", "gpt_neo", _NEO),
        Variant("gpt_neo-inner", "gpt_neo", _NEO | {"intermediate_size": 128}),
        Variant("bloom", "bloom", _BLOOM),
        # 12 heads: ALiBi's slopes for a number that is not a power of two.
        Variant(
            "bloom-12-heads",
            "bloom",
            {"hidden_size": 96, "n_layer": 2, "n_head": 12, "apply_residual_connection_post_layernorm": True},
        ),
        Variant("falcon-new", "falcon", _FALCON_NEW),
        Variant(
            "falcon-new-one-norm",
            "falcon",
            _FALCON_NEW | {"num_ln_in_parallel_attn": 1, "bias": True, "ffn_hidden_size": 128},
        ),
        Variant("falcon-mqa", "falcon", _FALCON | {"multi_query": True}),
        Variant("falcon-mha-alibi", "falcon", _FALCON_RW),
        Variant("opt", "opt", _OPT),
        Variant("opt-350m-like", "opt", _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
        Variant("opt-project-prenorm", "opt", _OPT | {"word_embed_proj_dim": 32}),
        Variant("opt-no-final-norm", "opt", _OPT | {"_remove_final_layer_norm": True}),
        Variant("opt-nobias", "opt", _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
        Variant("opt-f16", "opt", _OPT, dtype="float16"),
    )
}
VARIANTS = DECODED | {name: Variant(name, *rest) for name, rest in (DENSE | MOE | NEWER).items()}


def norm_center_of(model_type: str) -> float:
    """What a norm's weights are drawn around: 0 where the norm multiplies by 1 + weight."""
    return 0.0 if model_type in CENTRED_AT_ZERO | {"gemma2"} else 1.0


def build(name: str, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """The variant `name` as a transformers model in eval mode, with eager attention unless overridden.

    Each parameter, or buffer that is saved, is drawn from a generator of its own, seeded by `seed` and its name: with
    another config those of the same shape stay as they were. `dtype` and `attn_implementation` are overrides too.
    """
    import torch
    from transformers import AutoConfig

    from tpshard.verifier.hf.skeleton import class_of

    variant = VARIANTS[name]
    settings = _COMMON | variant.config | config_overrides
    dtype = getattr(torch, settings.pop("dtype", variant.dtype))
    attention = settings.pop("attn_implementation", "eager")
    config = AutoConfig.for_model(variant.model_type, **settings)
    model: PreTrainedModel = class_of(config)(config, dtype=dtype, attn_implementation=attention)
    norm_center = norm_center_of(variant.model_type)
    with torch.no_grad():
        saved = model.state_dict()
        buffers = [
            (name, buffer) for name, buffer in model.named_buffers() if name in saved and buffer.is_floating_point()
        ]
        for parameter_name, parameter in [*model.named_parameters(), *buffers]:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {parameter_name}".encode()))
            center = norm_center if parameter.dim() == 1 and parameter_name.endswith(".weight") else 0.0
            parameter.copy_(center + STD * torch.randn(parameter.shape, generator=generator))
    model.eval()  # type: ignore[no-untyped-call]
    return model


def make(name: str, path: Path, seed: int = 0, **config_overrides: Any) -> Path:
    """Write the variant's checkpoint directory as transformers' save_pretrained does, and return it."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    build(name, seed, **config_overrides).save_pretrained(path, save_original_format=not name.endswith(STACKED))
    return path


def sharded(path: Path, out: Path, max_shard_size: int | str = 50_000) -> Path:
    """The same checkpoint as several files with an index; refuses a size (bytes, or "100KB") that gives one file."""
    from huggingface_hub import save_torch_state_dict

    _copy_side_files(path, out)
    save_torch_state_dict(_load(path), out, max_shard_size=max_shard_size)
    if not (out / "model.safetensors.index.json").exists():
        raise ValueError(f"{max_shard_size} bytes hold all of {path}: one file, no index")
    return out


def pickled(path: Path, out: Path) -> Path:
    """The same checkpoint as one pytorch_model.bin."""
    import torch

    _copy_side_files(path, out)
    torch.save(_load(path), out / "pytorch_model.bin")
    return out


def published(
    path: Path,
    out: Path,
    *,
    strip_prefix: bool = False,
    add_prefix: bool = False,
    base_only: bool = False,
    buffers: bool = False,
    tied_head_stored: bool = False,
    old_keys: bool = False,
) -> Path:
    """Rewrite a checkpoint of `make` (one safetensors file) as published files look, into `out`.

    strip_prefix: names without the base-model prefix (`h.0.…`, `layers.0.…`); the head keeps its name.
    add_prefix: the prefix put back where it lacks.
    base_only: no head, as when the base model alone was saved.
    buffers: the masks and rotary frequencies that older versions stored; ValueError for families that never had any.
    tied_head_stored: a copy of the embedding under the head's name; ValueError when the model is not tied.
    old_keys: the config in the keys of the first published files.
    """
    from safetensors.torch import save_file

    config = json.loads((path / "config.json").read_text())
    family = FAMILIES[config["model_type"]]
    tensors = _load(path)
    head = f"{family.head}.weight"
    if base_only:
        config["architectures"] = [re.sub("ForCausalLM|LMHeadModel", "Model", each) for each in config["architectures"]]
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{family.head}.")}
    if tied_head_stored:
        if head in tensors or base_only:
            raise ValueError(f"{path.name}: not tied, or without a head")
        tensors[head] = tensors[f"{family.embedding}.weight"].clone()
    if buffers:
        if config["model_type"] not in BUFFERS:
            raise ValueError(f"{config['model_type']}: published files carry no buffers")
        tensors |= BUFFERS[config["model_type"]](config)
    if strip_prefix:
        tensors = {name.removeprefix(family.prefix): tensor for name, tensor in tensors.items()}
    if add_prefix:
        keep = (family.prefix, f"{family.head}.")
        tensors = {n if n.startswith(keep) else family.prefix + n: tensor for n, tensor in tensors.items()}
    _copy_side_files(path, out)
    save_file({name: tensors[name] for name in sorted(tensors)}, out / "model.safetensors", metadata={"format": "pt"})
    if base_only:
        (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if old_keys:
        (out / "config.json").write_text(json.dumps(old_config(config), indent=2, sort_keys=True) + "\n")
    return out


def old_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config as the first published files of its family wrote it: only keys of that time, old names, defaults absent.

    The values mean the same model. transformers reads all of them but Falcon's, whose model_type (RefinedWeb,
    RefinedWebModel) it knew only through code in the repo.
    """
    old = dict(config)
    family = old["model_type"]
    old["torch_dtype"] = old.pop("dtype")
    rope = dict(old.pop("rope_parameters", None) or {})
    if rope and family not in ("gpt_neox", "falcon"):
        old["rope_theta"] = rope.pop("rope_theta")
        # linear and dynamic are older than the key `rope_type`
        kind = "type" if rope["rope_type"] in ("linear", "dynamic") else "rope_type"
        old["rope_scaling"] = None if rope["rope_type"] == "default" else {kind: rope.pop("rope_type")} | rope
    old.pop("layer_types", None)
    if family == "gpt_bigcode":
        del old["num_key_value_heads"]
    if family in ("llama", "mistral") and old["head_dim"] == old["hidden_size"] // old["num_attention_heads"]:
        del old["head_dim"]
    if family == "gpt2":
        old["n_ctx"] = old["n_positions"]
    elif family == "gpt_neox":
        old |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    elif family == "bloom":
        old |= {"n_embed": old.pop("hidden_size"), "num_attention_heads": old.pop("n_head"), "n_inner": None}
    elif family == "falcon":
        old |= _refined_web(old)
        for key in _AFTER_REFINED_WEB:
            old.pop(key, None)
    defaults = _ABSENT.get(family, {})
    return {key: value for key, value in old.items() if key not in defaults or value != defaults[key]}


# Keys that the first published files of the family lack where they hold the default.
_TIED = {"tie_word_embeddings": True}
_ABSENT: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "gemma2": _TIED,
    "gpt2": _TIED | {"n_inner": None, "add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False},
    "gpt_neox": {"attention_bias": True, "is_decoder": False},
    "gpt_bigcode": _TIED | {"add_cross_attention": False},
    "gpt_neo": _TIED,
    "bloom": _TIED,
    "falcon": _TIED,
    "opt": _TIED | {"enable_bias": True, "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
}
_AFTER_REFINED_WEB = (
    "num_attention_heads",
    "num_hidden_layers",
    "num_kv_heads",
    "new_decoder_architecture",
    "ffn_hidden_size",
    "activation",
    "num_ln_in_parallel_attn",
    "max_position_embeddings",
)


def _refined_web(config: dict[str, Any]) -> dict[str, Any]:
    """Falcon's keys before transformers had the model: the 40B layout told by model_type and n_head_kv alone."""
    if config["ffn_hidden_size"] != 4 * config["hidden_size"] or config["num_ln_in_parallel_attn"] == 1:
        raise ValueError("RefinedWeb configs have no ffn_hidden_size and no num_ln_in_parallel_attn")
    old = {"n_head": config["num_attention_heads"], "n_layer": config["num_hidden_layers"]}
    if config["new_decoder_architecture"]:
        return old | {"model_type": "RefinedWeb", "n_head_kv": config["num_kv_heads"]}
    return old | {"model_type": "RefinedWebModel"}


def _causal_mask(positions: int) -> torch.Tensor:
    import torch

    return torch.ones(positions, positions).tril().view(1, 1, positions, positions)


def _inverse_frequencies(dim: int) -> torch.Tensor:
    import torch

    return 1.0 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _gpt2_buffers(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    import torch

    buffers = {}
    for layer in range(config["n_layer"]):
        buffers[f"transformer.h.{layer}.attn.bias"] = _causal_mask(config["n_positions"])
        buffers[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return buffers


def _gptj_buffers(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    import torch

    buffers = {}
    for layer in range(config["n_layer"]):
        buffers[f"transformer.h.{layer}.attn.bias"] = _causal_mask(config["n_positions"]).to(torch.bool)
        buffers[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    return buffers


def _gpt_neo_buffers(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    import torch

    buffers = {}
    for layer in range(config["num_layers"]):
        mask = _causal_mask(config["max_position_embeddings"])
        if config["attention_layers"][layer] == "local":
            mask = mask - mask.tril(-config["window_size"])
        buffers[f"transformer.h.{layer}.attn.attention.bias"] = mask.to(torch.uint8)
        buffers[f"transformer.h.{layer}.attn.attention.masked_bias"] = torch.tensor(-1e9)
    return buffers


def _gpt_neox_buffers(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """20B and Pythia were saved in half precision, their float buffers too."""
    import torch

    head_dim = config["hidden_size"] // config["num_attention_heads"]
    rotary = int(head_dim * config["rope_parameters"]["partial_rotary_factor"])
    buffers = {}
    for layer in range(config["num_hidden_layers"]):
        attention = f"gpt_neox.layers.{layer}.attention"
        buffers[f"{attention}.bias"] = _causal_mask(config["max_position_embeddings"]).to(torch.uint8)
        buffers[f"{attention}.masked_bias"] = torch.tensor(-1e4, dtype=torch.float16)
        buffers[f"{attention}.rotary_emb.inv_freq"] = _inverse_frequencies(rotary).half()
    return buffers


def _llama_buffers(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": _inverse_frequencies(config["head_dim"])
        for layer in range(config["num_hidden_layers"])
    }


BUFFERS: dict[str, Callable[[dict[str, Any]], dict[str, torch.Tensor]]] = {
    "gpt2": _gpt2_buffers,
    "gptj": _gptj_buffers,
    "gpt_neo": _gpt_neo_buffers,
    "gpt_neox": _gpt_neox_buffers,
    "llama": _llama_buffers,
}


def _load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def _copy_side_files(path: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(path.glob("*.json")):
        shutil.copyfile(file, out / file.name)
