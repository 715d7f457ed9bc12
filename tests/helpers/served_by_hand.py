"""What each rank must hold of tensors that only the families of `served_checkpoints` have, cut by hand in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def _fused(whole: Tensor, sizes: list[int], rank: int, tp: int) -> Tensor:
    """A rank's share of blocks of so many rows, one behind the other."""
    import torch

    return torch.cat([block.chunk(tp)[rank] for block in whole.split(sizes)])


def _minimax(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor | None:
    if name.endswith(("qkv_proj.weight", "output_gate.weight", "self_attn.norm.weight")):
        return whole.chunk(tp)[rank]
    return whole.chunk(tp, 1)[rank] if name.endswith("out_proj.weight") else None


def _olmo_hybrid(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor | None:
    if ".linear_attn." not in name:
        return None
    if name.endswith("conv1d.weight") and "_conv1d" not in name:
        keys, values = (config[f"linear_num_{e}_heads"] * config[f"linear_{e}_head_dim"] for e in ("key", "value"))
        return _fused(whole, [keys, keys, values], rank, tp)
    if name.endswith("o_norm.weight"):
        return whole
    return whole.chunk(tp, 1 if name.endswith("o_proj.weight") else 0)[rank]


def _mixer(name: str, whole: Tensor, sizes: tuple[int, int, int, int], rank: int, tp: int) -> Tensor:
    """A rank's heads of Mamba 2, and the groups that they read. sizes: heads, groups, a state's, a head's."""
    import torch

    heads, groups, state, head = sizes
    wide, narrow = heads * head, groups * state
    if name.endswith("out_proj.bias"):
        return whole
    if "in_proj" not in name and "conv1d" not in name:
        return whole.chunk(tp, 1 if "out_proj" in name else 0)[rank]
    blocks = whole.split([wide, wide, narrow, narrow, heads] if "in_proj" in name else [wide, narrow, narrow])
    group = slice(rank * groups // tp * state, (rank * groups // tp + max(groups // tp, 1)) * state)
    return torch.cat([each[group] if len(each) == narrow else each.chunk(tp)[rank] for each in blocks])


def _mamba2(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor | None:
    sizes = (config["num_heads"], config["n_groups"], config["state_size"], config["head_dim"])
    return _mixer(name, whole, sizes, rank, tp) if ".mixer." in name else None


def _zamba2(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor | None:
    if ".mamba." in name:
        keys = ("n_mamba_heads", "mamba_ngroups", "mamba_d_state", "mamba_headdim")
        return _mixer(name, whole, tuple(config[key] for key in keys), rank, tp)
    if "_adapter_list." in name and name.endswith(".0.weight"):
        return whole
    if "gate_up_proj" in name:
        return _fused(whole, [len(whole) // 2] * 2, rank, tp)
    return whole.chunk(tp)[rank] if "_adapter_list." in name else None


def _dbrx(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor | None:
    if name.endswith("Wqkv.weight"):
        q, k, v = whole.split([64, 16, 16])
        kv = rank * 2 // tp * 8, max(2 // tp, 1) * 8
        import torch

        return torch.cat([q.chunk(tp)[rank], k.narrow(0, *kv), v.narrow(0, *kv)])
    if name.endswith("wte.weight"):
        return _rows(whole, rank, tp)
    if ".experts.mlp." in name:
        experts = config["ffn_config"]["moe_num_experts"]
        return whole.unflatten(0, (experts, -1)).chunk(tp, 1)[rank].flatten(0, 1)
    return whole.chunk(tp, 1)[rank] if name.endswith("attn.out_proj.weight") else None


def _rows(whole: Tensor, rank: int, tp: int) -> Tensor:
    """A rank's share of a vocab's rows, and zeros behind the last."""
    import torch

    rows = -(-len(whole) // tp) * tp
    return torch.cat([whole, whole.new_zeros(rows - len(whole), whole.shape[1])]).chunk(tp)[rank]


def _bitnet(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor | None:
    return whole.chunk(tp)[rank] if "sub_norm" in name else None


def _gated(*, rows: tuple[str, ...]) -> Callable[[str, Tensor, Mapping[str, Any], int, int], Tensor | None]:
    def held(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor | None:
        return whole.chunk(tp)[rank] if name.removesuffix(".weight").endswith(rows) else None

    return held


def _qwen4(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor | None:
    if ".ngram_embedding." in name:
        return whole.chunk(tp, 1)[rank]
    return whole if "norm" in name or "_proj" in name and ".ple." in name or ".indexer." in name else None


def _inkling(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor | None:
    sliding = ".layers.0." in name
    kv = config["swa_num_key_value_heads" if sliding else "num_key_value_heads"]
    if any(part in name for part in ("k_proj", "v_proj", "k_sconv", "v_sconv")):
        return whole.chunk(kv)[rank * kv // tp] if kv < tp else whole.chunk(tp)[rank]
    if "r_proj" in name:
        return whole.chunk(tp)[rank]
    if ".shared_experts." in name:
        return whole.chunk(tp, 2 if "down_proj" in name else 1)[rank]
    return whole if "embed_norm" in name else None


def _mllama(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor | None:
    return _rows(whole, rank, tp) if "embed_tokens" in name else None


def _fused_heads(whole: Tensor, q: int, kv: int, head: int, rank: int, tp: int) -> Tensor:
    """A rank's share of q, k and v, one behind another."""
    import torch

    blocks = whole.split([q * head, kv * head, kv * head])
    first = rank * kv // tp * head
    return torch.cat(
        [blocks[0].chunk(tp)[rank], *(each.narrow(0, first, max(kv // tp, 1) * head) for each in blocks[1:])]
    )


def _molmo2(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor | None:
    if "wte." in name or "embed_tokens" in name:
        return _rows(whole, rank, tp)
    if "att_proj" in name:
        return _fused_heads(whole, 8, 2, 16, rank, tp)
    if "ff_proj" in name:
        return _fused(whole, [96, 96], rank, tp)
    return whole.chunk(tp, 1)[rank] if "ff_out" in name or "attn_out" in name else None


def _glm5_next(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor | None:
    if ".layers.0.self_attn." not in name:
        return None
    if ".self_attn.conv1d" in name:
        return _fused(whole, [32, 32, 32], rank, tp)
    if any(part in name for part in ("f_a_proj", "g_a_proj", "o_norm")):
        return whole
    return whole.chunk(tp, 1 if "o_proj" in name else 0)[rank]


def _nemotron_nas(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor | None:
    if "k_proj" in name or "v_proj" in name:
        kv = len(whole) // 8
        return whole.chunk(kv)[rank * kv // tp] if kv < tp else whole.chunk(tp)[rank]
    return whole if "linear_attn" in name else None


def _phi4mm(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor | None:
    row = "o_proj" in name or "down_proj" in name
    if "_proj." not in name or ".lora_B." in name and row or ".lora_A." in name and not row:
        return None if "_proj." not in name else whole
    if row:
        return whole.chunk(tp, 1)[rank]
    return _fused_heads(whole, 8, 2, 8, rank, tp) if "qkv" in name else _fused(whole, [96, 96], rank, tp)


BY_HAND: Mapping[str, Callable[[str, Tensor, Mapping[str, Any], int, int], Tensor | None]] = {
    "minimax": _minimax,
    "olmo_hybrid": _olmo_hybrid,
    "mamba2": _mamba2,
    "zamba2": _zamba2,
    "dbrx": _dbrx,
    "bitnet": _bitnet,
    "laguna": _gated(rows=("self_attn.g_proj",)),
    "hy_v4": _gated(rows=("linear_gate", "learnable_sink_param")),
    "dots3_note_text": _gated(rows=("self_attn.g_proj",)),
    "qwen4_exp_text": _qwen4,
    "inkling_text": _inkling,
    "mllama_text_model": _mllama,
    "molmo2_text": _molmo2,
    "glm5_next_text": _glm5_next,
    "nemotron-nas": _nemotron_nas,
    "phi4mm": _phi4mm,
    "phi4_multimodal": _phi4mm,
}
"""By model_type; None for a tensor that other families have, too."""
