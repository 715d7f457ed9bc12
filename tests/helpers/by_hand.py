"""What each rank must hold of a checkpoint's tensors, cut by hand in torch: nothing of it is shared with the rules."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tpshard
from tests.helpers.checkpoints import VOCAB
from tests.helpers.served_by_hand import BY_HAND
from tests.helpers.toys import contents, read_all
from tpshard.execute.publish import Settings

if TYPE_CHECKING:
    from torch import Tensor

NORM_OF_ALL_HEADS = {"olmoe", "minimax_m2", "flex_olmo", "olmo_hybrid"}


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def tensors_of(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def held_by(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor:
    """What a rank must hold of a tensor."""
    import torch

    own = BY_HAND.get(config["model_type"])
    if own is not None and (expected := own(name, whole, config, rank, tp)) is not None:
        return expected
    module, _, suffix = name.rpartition(".")
    module = module.rpartition(".")[2]
    whole_norm = config["model_type"] in NORM_OF_ALL_HEADS
    kv = _kv_heads(name, config)

    def share(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(tp, dim)[rank]

    if module in ("embed_tokens", "lm_head", "head", "embeddings"):
        rows = -(-VOCAB // tp) * tp
        return share(torch.cat([whole, whole.new_zeros(rows - VOCAB, *whole.shape[1:])]), 0)
    if (
        suffix in ("sinks", "attention_sink_bias")
        or module in ("q_proj", "q_b_proj", "kv_b_proj")
        or (module == "q_norm" and whole_norm)
    ):
        return share(whole, 0)
    if module in ("k_proj", "v_proj") or (module == "k_norm" and whole_norm):
        return whole.chunk(kv)[rank * kv // tp] if kv < tp else share(whole, 0)
    if module in ("gate_proj", "up_proj", "w1", "w3"):
        return share(whole, 0)
    if module == "out_proj" and config["model_type"] in ("lfm2", "lfm2_moe"):
        return whole if suffix == "bias" else share(whole, 1)
    if config["model_type"] in ("lfm2", "lfm2_moe") and ".conv." in name:
        return _fused(whole, 0, [1, 1, 1], rank, tp) if module == "in_proj" else share(whole, 0)
    if module in ("o_proj", "down_proj", "w2"):
        return whole if suffix == "bias" else share(whole, 1)
    if config["model_type"] == "gpt_oss" and module == "experts":  # stored [expert, in, out], gate and up by turns
        if suffix.startswith("gate_up"):
            pairs = whole.unflatten(-1, (-1, 2))
            return share(pairs, pairs.dim() - 2).flatten(-2)
        return whole if suffix.endswith("bias") else share(whole, 1)
    if config["model_type"] == "llama4_text" and module == "experts":  # stored [expert, in, out]
        return _fused(whole, 2, [1, 1], rank, tp) if suffix == "gate_up_proj" else share(whole, 1)
    if suffix == "gate_up_proj" or module == "input_linear":
        return _fused(whole, whole.dim() - 2, [1, 1], rank, tp)
    if suffix == "down_proj" or module == "output_linear":
        return share(whole, whole.dim() - 1)
    if ".mamba." in name or (".mixer." in name and "latent" not in name and "mixer.gate." not in name):
        return _of_mamba(name, whole, config, rank, tp)
    if ".linear_attn." in name and module != "norm":
        return _of_linear_attention(name, whole, config, rank, tp)
    return whole


def _kv_heads(name: str, config: Mapping[str, Any]) -> int:
    """The KV heads of the layer that a tensor is in."""
    kv = int(config.get("num_key_value_heads", 1))
    layer = next((part for part in name.split(".") if part.isdecimal()), None)
    if config["model_type"] == "mimo_v2_flash" and layer and config["layer_types"][int(layer)] == "sliding_attention":
        return 2 * kv
    return int(config.get("per_layer_config", {}).get(layer, {}).get("num_key_value_heads", kv))


def _fused(whole: Tensor, dim: int, sizes: Sequence[int], rank: int, tp: int) -> Tensor:
    """A rank's share of blocks of relative sizes, one behind the other."""
    import torch

    blocks = whole.split([size * whole.shape[dim] // sum(sizes) for size in sizes], dim)
    return torch.cat([block.chunk(tp, dim)[rank] for block in blocks], dim)


def _of_mamba(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor:
    """A rank's heads, and the groups that they read."""
    import torch

    if config["model_type"] == "jamba":
        if name.endswith(("in_proj.weight", "in_proj.bias")):
            return _fused(whole, 0, [1, 1], rank, tp)
        if "layernorm" in name or name.endswith("out_proj.bias"):
            return whole
        return whole.chunk(tp, 1 if name.endswith(("x_proj.weight", "out_proj.weight")) else 0)[rank]
    if config["model_type"] == "nemotron_h":
        keys = ("mamba_num_heads", "n_groups", "ssm_state_size", "mamba_head_dim")
    else:
        keys = ("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head")
    heads, groups, state, head = (config[key] for key in keys)
    wide = heads * head
    if name.endswith("out_proj.bias"):
        return whole
    if not name.endswith(("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias")):
        return whole.chunk(tp, 1 if name.endswith("out_proj.weight") else 0)[rank]
    sizes = [wide, wide, groups * state, groups * state, heads]
    blocks = whole.split(sizes if "in_proj" in name else sizes[1:4])
    first, count = (rank * groups // tp, 1) if groups < tp else (rank * groups // tp, groups // tp)
    held = [
        block.narrow(0, first * state, count * state) if len(block) == groups * state else block.chunk(tp)[rank]
        for block in blocks
    ]
    return torch.cat(held)


def _of_linear_attention(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor:
    """A rank's key heads with their value heads, of whatever linear attention has for each."""
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
        values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
        return _fused(whole, 0, [keys, keys, values], rank, tp)
    return whole.chunk(tp, 1 if name.endswith("out_proj.weight") else 0)[rank]


def compare(model: Path, out: Path, tp: int) -> None:
    import torch

    config, source = config_of(model), tensors_of(model)
    for rank in range(tp):
        (file,) = out.glob(f"rank-{rank:05}-of-{tp:05}.safetensors")
        held = tensors_of_file(file)
        assert set(held) == set(source)
        for name, whole in source.items():
            expected = held_by(name, whole, config, rank, tp)
            assert held[name].dtype == expected.dtype
            assert torch.equal(held[name], expected), f"rank {rank}: {name}"


def tensors_of_file(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def logits(path: Path) -> Tensor:
    """transformers' logits, of copied weights: in the mapped file they need not be aligned, and sums differ then."""
    import torch
    import transformers

    config, auto = transformers.AutoConfig.from_pretrained(path), transformers.AutoModelForCausalLM
    own = f"{type(config).__name__.removesuffix('Config')}ForCausalLM"  # a text model that is registered in larger ones
    made = auto if type(config) in auto._model_mapping else getattr(transformers, own)
    model = made.from_pretrained(path, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        result: Tensor = model(1 + torch.arange(24)[None] * 7 % (VOCAB - 1)).logits
    return result


def there_and_back(model: Path, folder: Path, settings: Settings, widths: tuple[int, int]) -> None:
    """Split at two widths, every rank by hand; merged it is the source, resharded it is the other split."""
    import torch

    for tp in widths:
        tpshard.split(model, tp, folder / f"{tp}", settings=settings)
        compare(model, folder / f"{tp}", tp)
    out, other = (folder / f"{tp}" for tp in widths)
    assert tpshard.check(out, model, tp=widths[0], settings=settings).equal
    tpshard.merge(out, folder / "merged", settings=settings)
    assert read_all(folder / "merged") == read_all(model)
    tpshard.reshard(out, widths[1], folder / "resharded", settings=settings)
    assert contents(folder / "resharded") == contents(other)
    assert torch.equal(logits(folder / "merged"), logits(model))


def with_one_more(model: Path, out: Path, without: str = "", **changes: Any) -> Path:
    """The checkpoint with the layer that predicts a further token, as DeepSeek-V3 and GLM-4.5 publish it."""
    import torch
    from safetensors.torch import save_file

    tensors, config = tensors_of(model), config_of(model) | changes
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    last, new = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    extra = {name.replace(last, new): tensor + 1 for name, tensor in tensors.items() if name.startswith(last)}
    for name, shape in {
        "embed_tokens": (VOCAB, hidden),
        "shared_head.head": (VOCAB, hidden),
        "shared_head.norm": (hidden,),
        "enorm": (hidden,),
        "hnorm": (hidden,),
        "eh_proj": (hidden, 2 * hidden),
    }.items():
        extra[f"{new}{name}.weight"] = torch.randn(shape, generator=torch.Generator().manual_seed(len(extra)))
    assert not without or extra.pop(new + without) is not None
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors | extra, out / "model.safetensors", metadata={"format": "pt"})
    return out
