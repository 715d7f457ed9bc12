"""Shards as engines name and fuse them, read as the source names them. Fused modules are mathematics, not layouts.

What a fused parameter holds follows from stored shapes: the inputs of the output projection say how many rows are q's,
and k and v are equal halves of the rest. Only names are a table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tpshard.errors import DifferentError, UnsupportedError
from tpshard.verify.families import FAMILIES, describe
from tpshard.verify.family import Family
from tpshard.verify.pieces import Columns, Piece, PieceWeights, Rows, Turned
from tpshard.verify.shards import FileWeights, ShardSet

_Pieces = Iterator[tuple[str, Piece]]
_LAYER = re.compile(r"(.*?\.)(\d+)\.(.+)")
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_SCALES = ("_k_scale", "_v_scale", "_q_scale", "_prob_scale")


@dataclass(frozen=True)
class Names:
    """How vLLM names one family's parameters; modules are named below their layer.

    qkv, gate_up: the fused modules. turned: modules with the source's weights transposed. grouped: a module with its q,
    k and v apart that the source interleaves. whole: modules that all ranks hold whole, and share out here; the one
    that ends with the MLP by its inputs. roots: the engine's first component of a name → the source's. renamed: tensors
    under the names that transformers' classes have, which --engine transformers takes.
    """

    qkv: str | None = None
    gate_up: str | None = None
    turned: frozenset[str] = frozenset()
    grouped: str | None = None
    whole: tuple[str, ...] = ()
    roots: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


def _experts(module: str) -> Mapping[str, str]:
    """Stacked experts: what vLLM has as w13 and w2."""
    stacked = {"w13_weight": "gate_up_proj", "w2_weight": "down_proj"}
    return {f"{module}.experts.routed_experts.{name}": f"mlp.experts.{into}" for name, into in stacked.items()}


_LLAMA = Names(qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj")
_BLOOM = Names(grouped="self_attention.query_key_value")
VLLM: Mapping[str, Names] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2"), _LLAMA),
    **dict.fromkeys(("cohere", "cohere2", "exaone4", "gemma", "gemma3_text", "granite", "olmo", "seed_oss"), _LLAMA),
    **dict.fromkeys(("smollm3", "stablelm"), _LLAMA),
    **dict.fromkeys(("glm4", "nemotron", "starcoder2"), replace(_LLAMA, gate_up=None)),
    "phi3": Names(),
    "mixtral": replace(_LLAMA, renamed=_experts("block_sparse_moe")),
    "qwen3_moe": replace(_LLAMA, renamed={**_experts("mlp"), "mlp.experts.gate.weight": "mlp.gate.weight"}),
    "gpt2": Names(turned=frozenset(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))),
    "gptj": Names(qkv="attn.qkv_proj"),
    "gpt_neox": Names(roots={"model": "gpt_neox", "lm_head": "embed_out"}),
    "gpt_bigcode": Names(whole=("mlp.c_fc", "mlp.c_proj"), roots={"model": "transformer"}),
    "bloom": _BLOOM,
    "falcon": _BLOOM,
    "opt": Names(qkv="self_attn.qkv_proj"),
}
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


def translated(opened: ShardSet, source: Collection[str]) -> ShardSet:
    """The set with every rank's tensors under the names that the source has, in its order of rows and features.

    UnsupportedError for a family whose names in this format are not known.
    """
    if opened.format == "native":
        return opened
    model_type = str(opened.config.get("model_type"))
    known: Collection[str] = VLLM if opened.format == "vllm" else ("llama",)
    if model_type not in known:
        raise UnsupportedError(
            f"verify does not know the names that the format {opened.format} has for model_type {model_type!r}",
            path=opened.directory,
            expected=", ".join(sorted(known)),
            hint="`tpshard verify --tier bytes` compares them; `tpshard reshard --format native` makes what it runs",
        )
    family = _described(opened.config)
    tp = len(opened.ranks)
    if opened.format == "vllm":
        names = VLLM[model_type]
        made = [dict(_Rank(opened, names, family, rank).pieces()) for rank in range(tp)]
        made = [_tied(pieces, opened.config, family) for pieces in made]
    else:
        made = [dict(_meta(opened.ranks, family, rank)) for rank in range(tp)]
    rename = _prefix(family, source)
    ranks = [PieceWeights({rename(name): piece for name, piece in pieces.items()}) for pieces in made]
    return replace(opened, ranks=tuple(ranks), stored=opened.ranks)


def _described(config: Mapping[str, Any]) -> Family:
    """The family, or a LLaMA of its sizes: what `VLLM` has and the decoder does not is named as LLaMA is."""
    model_type = str(config.get("model_type"))
    sizes = {key: config[key] for key in _SIZES if key in config}
    return describe(config if model_type in FAMILIES else {**sizes, "model_type": "llama"})


def _prefix(family: Family, source: Collection[str]) -> Callable[[str], str]:
    """Names with the base prefix as the source has it: published files may lack it, or a part of it."""
    full = family.prefixes[0]
    for prefix in family.prefixes:
        if f"{prefix}{family.embed}.weight" in source:
            return lambda name: prefix + name.removeprefix(full) if name.startswith(full) else name
    return lambda name: name


def _tied(pieces: dict[str, Piece], config: Mapping[str, Any], family: Family) -> dict[str, Piece]:
    """A tied pair is one parameter in the file, and may be under the head's name."""
    embedding = f"{family.prefixes[0]}{family.embed}.weight"
    head = next((f"{name}.weight" for name in family.heads_names if f"{name}.weight" in pieces), None)
    if config.get("tie_word_embeddings") is not True or embedding in pieces or head is None:
        return pieces
    return {embedding if name == head else name: piece for name, piece in pieces.items()}


@dataclass(frozen=True)
class _Rank:
    """One rank of vLLM's `sharded_state`."""

    opened: ShardSet
    names: Names
    family: Family
    rank: int

    @property
    def weights(self) -> FileWeights:
        return self.opened.ranks[self.rank]

    def pieces(self) -> _Pieces:
        """The rank's tensors under the source's names, base prefix included."""
        for name in self.weights.names():
            if name.rpartition(".")[2] in _SCALES:
                continue
            module, _, suffix = name.rpartition(".")
            found = _LAYER.fullmatch(name)
            if found is not None and found[3] in self.names.renamed:
                yield self._root(f"{found[1]}{found[2]}.{self.names.renamed[found[3]]}"), Rows(self.weights, name)
                continue
            found = _LAYER.fullmatch(module)
            if found is None or suffix not in ("weight", "bias"):
                yield self._root(name), Rows(self.weights, name)
                continue
            layer, below = f"{found[1]}{found[2]}.", found[3]
            for part, piece in self._module(layer, below, suffix):
                yield self._root(f"{layer}{part}.{suffix}"), piece

    def _root(self, name: str) -> str:
        root, dot, rest = name.partition(".")
        return self.names.roots.get(root, root) + dot + rest

    def _module(self, layer: str, below: str, suffix: str) -> _Pieces:
        names, family, name = self.names, self.family, f"{layer}{below}.{suffix}"
        if below == names.qkv:
            q, k, v = self._q_k_v(layer, name)
            yield from ((part, Rows(self.weights, name, at)) for part, at in zip(family.qkv, (q, k, v), strict=True))
        elif below == names.gate_up:
            assert family.gate is not None
            half = self.weights.shape(name)[0] // 2
            yield family.gate, Rows(self.weights, name, torch.arange(half))
            yield family.up, Rows(self.weights, name, torch.arange(half, self.weights.shape(name)[0]))
        elif below in names.turned and suffix == "weight":
            yield below, Turned(self.weights, name)
        elif below == names.grouped and family.fused in ("heads", "groups"):
            yield below, Rows(self.weights, name, self._interleaved(layer, name))
        elif below in names.whole:
            yield below, self._part(below, name, suffix)
        else:
            yield below, Rows(self.weights, name)

    def _q_k_v(self, layer: str, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of q, k and v in a fused one. Where no whole heads fit, all are q's, which the decoder refuses."""
        out = f"{layer}{self.family.out}.weight"
        rows, d = self.weights.shape(name)[0], self.family.head_dim
        q = self.weights.shape(out)[-1] if out in self.weights.names() else rows
        if q % d or rows <= q or (rows - q) % (2 * d):
            return torch.arange(rows), torch.arange(0), torch.arange(0)
        kv = (rows - q) // 2
        return torch.arange(q), torch.arange(q, q + kv), torch.arange(q + kv, rows)

    def _interleaved(self, layer: str, name: str) -> Tensor:
        """The rows of [q; k; v] in the order of the source: for each KV group its q heads, its k, its v."""
        q, k, v = self._q_k_v(layer, name)
        d = self.family.head_dim
        groups = len(k) // d
        if not groups or len(q) // d % groups:
            return torch.cat((q, k, v))
        return torch.cat((q.view(groups, -1), k.view(groups, d), v.view(groups, d)), 1).flatten()

    def _part(self, below: str, name: str, suffix: str) -> Piece:
        """This rank's share of what it computes whole: the ranks' sum is then what each of them has."""
        shape, tp = self.weights.shape(name), len(self.opened.ranks)
        by_inputs = below == self.family.down
        if by_inputs and suffix == "bias":
            return Rows(self.weights, name)
        count = shape[1] if by_inputs else shape[0]
        first, last = (count * (self.rank + i) // tp for i in (0, 1))
        if by_inputs:
            return Columns([self.weights], name, first, last, 0, shape[0])
        return Rows(self.weights, name, torch.arange(first, last))


def _meta(ranks: Sequence[FileWeights], family: Family, rank: int) -> _Pieces:
    """One rank of Meta's files."""
    weights = ranks[rank]
    for name in weights.names():
        module, _, suffix = name.rpartition(".")
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
        below = None if found is None else _META_LAYER.get(found[2])
        into = _META_TOP.get(module) if found is None or below is None else f"model.layers.{found[1]}.{below}"
        if into is None:
            yield name, Rows(weights, name)
        elif module == "tok_embeddings" and weights.shape(name)[-1] != family.hidden:
            yield f"{into}.{suffix}", _rows_of_all(ranks, name, rank)
        elif below in family.qkv[:2]:
            yield f"{into}.{suffix}", Rows(weights, name, _halves(weights.shape(name)[0], family.head_dim))
        else:
            yield f"{into}.{suffix}", Rows(weights, name)


def _rows_of_all(ranks: Sequence[FileWeights], name: str, rank: int) -> Columns:
    """An even share of rows, of a matrix that is cut by columns."""
    for other, weights in enumerate(ranks):
        if name not in weights.names() or weights.shape(name) != ranks[0].shape(name):
            raise DifferentError(f"rank {other} has no {name} of rank 0's shape", tensor=name)
    rows, columns = ranks[0].shape(name)
    first, last = (rows * (rank + i) // len(ranks) for i in (0, 1))
    return Columns(ranks, name, 0, columns, first, last)


def _halves(rows: int, head_dim: int) -> Tensor:
    """Meta keeps the two members of a rotary pair together; the source has all first ones of a head, then all second.

    Heads cut in two stay as they are: the decoder refuses them.
    """
    index = torch.arange(rows)
    return index if rows % head_dim else index.view(-1, head_dim // 2, 2).transpose(1, 2).flatten()


def stored_in(opened: ShardSet, what: str, rank: int) -> str | None:
    """The parameter that holds what a report names (a module, its bias, q of it), where that has another name."""
    weights, name = opened.ranks[rank], what.rpartition(" of ")[2]
    if not isinstance(weights, PieceWeights):
        return None
    found = next(
        (weights.pieces[each].stored.name for each in (f"{name}.weight", name) if each in weights.pieces), None
    )
    return None if found in (f"{name}.weight", name) else found


def require_replicas(opened: ShardSet) -> None:
    """DifferentError where what an engine takes from each rank, and the decoder from one, is not the same on all."""
    names = VLLM.get(str(opened.config.get("model_type"))) if opened.format == "vllm" else None
    if names is None:
        return
    for rank, weights in enumerate(opened.stored):
        for name in weights.names():
            module, _, suffix = name.rpartition(".")
            if suffix in _SCALES and bool((weights.get(name) != 1.0).any()):
                raise DifferentError(f"{name} of rank {rank} scales an unquantised cache", tensor=name, expected=1.0)
            if module.endswith(names.whole or ("\n",)) and not _same(weights, opened.stored[0], name):
                raise DifferentError(f"{name} of rank {rank}, which all ranks hold whole, is not rank 0's", tensor=name)


def _same(one: FileWeights, other: FileWeights, name: str, step: int = 1024) -> bool:
    if name not in other.names() or one.shape(name) != other.shape(name):
        return False
    rows = one.shape(name)[0]
    blocks = ((at, min(at + step, rows)) for at in range(0, rows, step))
    return all(torch.equal(one.rows(name, *at), other.rows(name, *at)) for at in blocks)
