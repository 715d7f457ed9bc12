"""Megatron's parameters as the source names and orders them: q, k and v, gate and up lie apart there.

What is fused is mathematics: of each KV group its heads of q, its k, its v; gate and up one behind the other.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from tpshard.errors import DifferentError
from tpshard.storage.safetensors import TensorInfo
from tpshard.verifier.ranks.open import FileWeights, RankSet
from tpshard.verifier.ranks.pieces import Joined, PieceWeights, RankPiece, Rows, Turned, stored
from tpshard.verifier.ranks.weights import named

_LAYER = re.compile(r"(?:decoder\.layers\.(\d+)\.|mtp\.layers\.(\d+)\.(?:transformer_layer\.)?)(.+)")
_NORM = re.compile(r"(.+\.layer_norm)_(weight|bias)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.linear_fc([12])")
_OUTSIDE: Mapping[str, tuple[str, ...]] = {
    "embedding.word_embeddings": ("model.embed_tokens", "transformer.wte"),
    "embedding.position_embeddings": ("transformer.wpe",),
    "decoder.final_layernorm": ("model.norm", "transformer.ln_f"),
    "output_layer": ("lm_head",),
}
_MODULES: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("input_layernorm", "ln_1"),
    "self_attention.linear_qkv.layer_norm": ("input_layernorm", "ln_1"),
    "pre_mlp_layernorm": ("post_attention_layernorm", "ln_2"),
    "mlp.linear_fc1.layer_norm": ("post_attention_layernorm", "ln_2"),
    "self_attention.linear_qkv": ("attn.c_attn",),
    "self_attention.linear_proj": ("self_attn.o_proj", "attn.c_proj"),
    "self_attention.q_layernorm": ("self_attn.q_norm", "self_attn.q_a_layernorm"),
    "self_attention.k_layernorm": ("self_attn.k_norm",),
    "self_attention.kv_layernorm": ("self_attn.kv_a_layernorm",),
    "self_attention.linear_q_proj": ("self_attn.q_proj",),
    "self_attention.linear_q_down_proj": ("self_attn.q_a_proj",),
    "self_attention.linear_q_up_proj": ("self_attn.q_b_proj",),
    "self_attention.linear_q_up_proj.layer_norm": ("self_attn.q_a_layernorm",),
    "self_attention.linear_kv_down_proj": ("self_attn.kv_a_proj_with_mqa",),
    "self_attention.linear_kv_up_proj": ("self_attn.kv_b_proj",),
    "self_attention.linear_kv_up_proj.layer_norm": ("self_attn.kv_a_layernorm",),
    "mlp.linear_fc1": ("mlp.up_proj", "mlp.c_fc"),
    "mlp.linear_fc2": ("mlp.down_proj", "mlp.c_proj"),
    "mlp.router": ("mlp.gate", "block_sparse_moe.gate"),
    "mlp.shared_experts.linear_fc2": ("mlp.shared_experts.down_proj", "mlp.shared_expert.down_proj"),
    "enorm": ("enorm",),
    "hnorm": ("hnorm",),
    "eh_proj": ("eh_proj",),
    "final_layernorm": ("shared_head.norm",),
}
_TENSORS = {
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
}
_GATED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "mlp.linear_fc1": (("mlp.gate_proj", "mlp.up_proj"),),
    "mlp.shared_experts.linear_fc1": tuple(
        (f"mlp.{each}.gate_proj", f"mlp.{each}.up_proj") for each in ("shared_experts", "shared_expert")
    ),
}
_EXPERTS = {"1": (("mlp", "gate_proj", "up_proj"), ("block_sparse_moe", "w1", "w3")),
            "2": (("mlp", "down_proj"), ("block_sparse_moe", "w2"))}  # fmt: skip
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_TURNED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""GPT-2's, which are stored as [in, out]."""


@dataclass(frozen=True)
class _Sizes:
    """What of the config decides the order of rows."""

    layers: int
    heads: int
    groups: int
    head_dim: int


def in_source(opened: RankSet, source: FileWeights) -> list[dict[str, RankPiece]]:
    """Every rank's tensors under the source's names. DifferentError for a parameter that it has nothing for."""
    config = opened.config
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    hidden = config.get("hidden_size") or config.get("n_embd") or 1
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    sizes = _Sizes(
        int(layers),
        int(heads),
        int(config.get("num_key_value_heads") or heads),
        int(config.get("head_dim") or hidden // heads),
    )
    ranks = [rank.pieces for rank in opened.ranks if isinstance(rank, PieceWeights)]
    made: list[dict[str, RankPiece]] = []
    for rank, pieces in enumerate(ranks):
        of = _OfMegatron(ranks, rank, sizes, source)
        found: dict[str, RankPiece] = {}
        for name, piece in pieces.items():
            for into, each in of.named(name, piece):
                if into in found:
                    raise DifferentError(f"rank {rank} has {into} twice, also as {_info(each).name}", tensor=into)
                found[into] = each
        made.append(found)
    return made


def _info(piece: RankPiece) -> TensorInfo:
    return stored(piece)


@dataclass(frozen=True)
class _OfMegatron:
    """One rank of a set, beside the others."""

    ranks: Sequence[Mapping[str, RankPiece]]
    rank: int
    sizes: _Sizes
    source: FileWeights

    def named(self, name: str, piece: RankPiece) -> Iterator[tuple[str, RankPiece]]:
        """The source's tensors that one of Megatron's parameters is made of."""
        if (found := _LAYER.fullmatch(name)) is None:
            module, _, suffix = name.rpartition(".")
            yield self._first(name, [f"{each}.{suffix}" for each in _OUTSIDE.get(module, ())], ""), piece
            return
        number = int(found[1]) if found[1] is not None else self.sizes.layers + int(found[2])
        layer = next(
            (each for each in ("model.layers.", "transformer.h.") if self._has(f"{each}{number}.")), "model.layers."
        )
        rest, layer = found[3], f"{layer}{number}."
        norm = _NORM.fullmatch(rest)
        module, suffix = (norm[1], norm[2]) if norm else rest.rpartition(".")[::2]
        if rest in _TENSORS:
            yield self._first(name, [_TENSORS[rest]], layer), piece
        elif module == "self_attention.linear_qkv":
            yield from self._q_k_v(name, piece, layer, suffix)
        elif expert := _EXPERT.fullmatch(module):
            tried = [
                [f"{each[0]}.experts.{expert[1]}.{one}.{suffix}" for one in each[1:]] for each in _EXPERTS[expert[2]]
            ]
            yield from self._halves(name, piece, layer, tried)
        elif (gated := _GATED.get(module)) and any(self._is(f"{layer}{each[0]}.{suffix}") for each in gated):
            yield from self._halves(name, piece, layer, [[f"{one}.{suffix}" for one in each] for each in gated])
        else:
            into = self._first(name, [f"{each}.{suffix}" for each in _MODULES.get(module, ())], layer)
            yield into, self._turned(into, piece)

    def _halves(
        self, name: str, piece: RankPiece, layer: str, tried: Sequence[Sequence[str]]
    ) -> Iterator[tuple[str, RankPiece]]:
        """Tensors one behind another, each of as many rows."""
        firsts = [each[0] for each in tried]
        place = self._first(name, firsts, layer).removeprefix(layer)
        names = next(each for each in tried if place == each[0] or each[0].endswith(place))
        rows = piece.shape[0] // len(names)
        if piece.shape[0] % len(names):
            raise self._differs(name, f"has {piece.shape[0]} rows, which are not {len(names)} halves")
        for number, each in enumerate(names):
            index = torch.arange(rows * number, rows * (number + 1))
            yield self._first(name, [each], layer), piece if len(names) == 1 else Rows(piece, index)

    def _q_k_v(self, name: str, piece: RankPiece, layer: str, suffix: str) -> Iterator[tuple[str, RankPiece]]:
        """q, k and v. Where KV groups are fewer than ranks, ranks gather them, and each has those that it needs."""
        sizes, tp, rows = self.sizes, len(self.ranks), piece.shape[0]
        per = sizes.heads // sizes.groups + 2
        ours = None
        if sizes.groups < tp and rows * tp == sizes.groups * per * sizes.head_dim:
            piece, rows, ours = Joined([rank[name] for rank in self.ranks]), rows * tp, self.rank
        if rows % (per * sizes.head_dim):
            raise self._differs(name, f"has {rows} rows, which are not KV groups of {per} heads of {sizes.head_dim}")
        heads = torch.arange(rows).view(-1, per, sizes.head_dim)
        q, k, v = heads[:, :-2].flatten(), heads[:, -2], heads[:, -1]
        if ours is not None:
            q, group = q.view(tp, -1)[ours], ours * sizes.groups // tp
            k, v = k[group], v[group]
        parts = q, k.flatten(), v.flatten()
        fused = f"{layer}{_MODULES['self_attention.linear_qkv'][0]}.{suffix}"
        if self._is(fused):
            into = self._first(name, [fused.removeprefix(layer)], layer)
            yield into, self._turned(into, Rows(piece, torch.cat(parts)))
            return
        for module, index in zip(_QKV, parts, strict=True):
            yield self._first(name, [f"{module}.{suffix}"], layer), Rows(piece, index)

    def _turned(self, into: str, piece: RankPiece) -> RankPiece:
        module, _, suffix = into.rpartition(".")
        return Turned(piece) if suffix == "weight" and module.endswith(_TURNED) else piece

    def _first(self, name: str, tried: Sequence[str], layer: str) -> str:
        """The name that the source has; DifferentError where it has none of those that are tried."""
        found = (named(f"{layer}{each}", self.source.names()) for each in tried)
        if (known := next(filter(None, found), None)) is None:
            raise self._differs(name, "is nothing that the source has")
        return known

    def _is(self, name: str) -> bool:
        return named(name, self.source.names()) is not None

    def _has(self, begin: str) -> bool:
        short = begin.partition(".")[2]
        return any(name.startswith((begin, short)) for name in self.source.names())

    def _differs(self, name: str, what: str) -> DifferentError:
        return DifferentError(f"{name} of rank {self.rank} {what}", tensor=name)
