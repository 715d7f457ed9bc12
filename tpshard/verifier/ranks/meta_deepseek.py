"""Meta's and DeepSeek's own files: a rank's tensors in the source's names and order."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from tpshard.errors import DifferentError
from tpshard.verifier.families.family import Family
from tpshard.verifier.ranks.open import FileWeights
from tpshard.verifier.ranks.pieces import Joined, RankPiece, Rows, Stored
from tpshard.verifier.ranks.vllm import Pieces, even

_META_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_META_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_DEEPSEEK_TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_DEEPSEEK_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn.wq": "self_attn.q_proj",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_layernorm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_norm": "self_attn.kv_a_layernorm",
    "attn.wkv_b": "self_attn.kv_b_proj",
    "attn.wo": "self_attn.o_proj",
    "ffn.gate": "mlp.gate",
}
_MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MLP = re.compile(r"ffn\.((?:shared_experts|experts\.\d+)\.)?(w[123])")


def meta(ranks: Sequence[FileWeights], family: Family, rank: int) -> Pieces:
    """One rank of `consolidated.00.pth`."""
    weights = ranks[rank]
    for name in weights.names():
        module, _, suffix = name.rpartition(".")
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
        below = None if found is None else _META_LAYER.get(found[2])
        into = _META_TOP.get(module) if found is None or below is None else f"model.layers.{found[1]}.{below}"
        stored = Stored(weights, name)
        if into is None:
            yield name, stored
        elif module == "tok_embeddings" and stored.shape[-1] != family.hidden:
            yield f"{into}.{suffix}", _rows_of_all(ranks, name, rank)
        elif below in family.qkv[:2]:
            yield f"{into}.{suffix}", Rows(stored, _halves(stored.shape[0], family.head_dim))
        else:
            yield f"{into}.{suffix}", stored


def _rows_of_all(ranks: Sequence[FileWeights], name: str, rank: int) -> RankPiece:
    """An even share of rows, of a matrix that is cut by columns."""
    for other, weights in enumerate(ranks):
        if name not in weights.names() or weights.shape(name) != ranks[0].shape(name):
            raise DifferentError(f"rank {other} has no {name} of rank 0's shape", tensor=name)
    columns = Joined([Stored(weights, name) for weights in ranks], 1)
    return Rows(columns, even(columns.shape[0], rank, len(ranks)))


def _halves(rows: int, head_dim: int) -> Tensor:
    """Meta keeps the two members of a rotary pair together; the source has all first ones of a head, then all second.

    Heads cut in two stay as they are: the decoder refuses them.
    """
    index = torch.arange(rows)
    return index if rows % head_dim else index.view(-1, head_dim // 2, 2).transpose(1, 2).flatten()


def deepseek(weights: FileWeights) -> Pieces:
    """One rank of `model0-mp4.safetensors`: the routed experts that it has keep their numbers."""
    for name in weights.names():
        module, _, suffix = name.rpartition(".")
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
        into = _DEEPSEEK_TOP.get(module)
        if found is not None:
            into = _DEEPSEEK_LAYER.get(found[2])
            if mlp := _MLP.fullmatch(found[2]):
                into = f"mlp.{mlp[1] or ''}{_MATRICES[mlp[2]]}"
            into = into and f"model.layers.{found[1]}.{into}"
            suffix = "e_score_correction_bias" if (found[2], suffix) == ("ffn.gate", "bias") else suffix
        yield (name if into is None else f"{into}.{suffix}"), Stored(weights, name)
