"""vLLM's `sharded_state`, and SGLang's: what each parameter of a rank is, in the source's names and order.

Only names are a table. What a fused parameter holds follows from shapes, the source's and its own (`fused.py`).
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tpshard.errors import DifferentError
from tpshard.verifier.families.family import Family
from tpshard.verifier.ranks.fused import Parts, Placed, begun
from tpshard.verifier.ranks.open import FileWeights
from tpshard.verifier.ranks.pieces import Columns, Joined, RankPiece, Rows, Stored, Turned
from tpshard.verifier.ranks.replicas import SCALES, some_experts

Pieces = Iterator[tuple[str, RankPiece]]
TEXT = "language_model"
"""Below which a model that nests a text model has it."""
_LAYER = re.compile(r"(.*?\.\d+\.)(.+)")
_EXPERTS = re.compile(r".+\.experts\.routed_experts\.(w13|w2)_(.+)")


@dataclass(frozen=True)
class Names:
    """How vLLM names one family's parameters. `roots` and `renamed` give them the source's names, as far as it has one
    for them; all else is said in those, and below their layer.

    roots: how whole names begin. other_roots: in sources that have none of those. renamed: how names below a layer
    begin. otherwise: how these begin in sources that newer code has saved, under the names of its own modules. qkv:
    the fused module. halves: a module that is two, one behind the other. turned: tensors with their last two dims
    exchanged. computed: what is minus the exponential of one of the source's tensors. grouped: a module with its q,
    k and v apart that the source interleaves. gathered: modules that every rank computes for all, in even slices,
    or as if q, k and v lay apart. whole: modules that all ranks hold whole, and share out here. once: tensors that
    rank 0 alone adds, and the others hold zeros of. paired: modules with each head's even rows before its odd ones.
    alike: where k is stored as v, too. even: modules of which each rank has an even share, and that are computed whole.
    """

    roots: Mapping[str, str] = field(default_factory=dict)
    other_roots: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    otherwise: Mapping[str, str] = field(default_factory=dict)
    qkv: str | None = None
    halves: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    turned: tuple[str, ...] = ()
    computed: Mapping[str, str] = field(default_factory=dict)
    grouped: str | None = None
    gathered: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    paired: tuple[str, ...] = ()
    alike: bool = False
    even: tuple[str, ...] = ()

    def beside(self, source: Collection[str]) -> "Names":
        """The names for a source with these tensors."""
        bases = tuple(f"{root}." for root in self.roots.values())
        if not self.other_roots or any(name.startswith(bases) for name in source):
            return self
        return replace(self, roots=self.other_roots)

    def of(self, stored: str) -> str:
        """A stored parameter's name in the source's terms."""
        name = begun(stored, self.roots)
        found = _LAYER.fullmatch(name)
        return name if found is None else found[1] + begun(found[2], self.renamed)


def _swiglu(module: str) -> dict[str, tuple[str, ...]]:
    return {f"{module}.gate_up_proj": (f"{module}.gate_proj", f"{module}.up_proj")}


_SHARED, _BIAS = "mlp.experts._shared_experts._layer", "e_score_correction_bias"
_LLAMA = Names(qkv="self_attn.qkv_proj", halves=_swiglu("mlp"))
_FUSED_MLP = replace(_LLAMA, halves={})
_BLOOM = Names(grouped="self_attention.query_key_value")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_SHARED_MOE = replace(_LLAMA, halves=_swiglu("mlp") | _swiglu("mlp.shared_experts"))
_HUNYUAN = replace(_LLAMA, halves=_swiglu("mlp") | _swiglu("mlp.shared_mlp"))
_LATENTS = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
_MLA = {"self_attn.mla_attn": "self_attn"}
_DEEPSEEK = Names(
    renamed={_SHARED: "mlp.shared_experts", "mlp.experts.gate": "mlp.gate", **_MLA},
    halves={**_SHARED_MOE.halves, "self_attn.fused_qkv_a_proj": _LATENTS},
)
_INDEX = ("self_attn.indexer.wk", "self_attn.indexer.weights_proj")
_QWEN2_MOE = replace(
    _LLAMA,
    renamed={_SHARED: "mlp.shared_expert", f"{_SHARED}.expert_gate": "mlp.shared_expert_gate"},
    halves=_swiglu("mlp") | _swiglu("mlp.shared_expert"),
)
_GLM_MOE = replace(
    _SHARED_MOE,
    renamed={_SHARED: "mlp.shared_experts", f"mlp.experts.routed_experts.{_BIAS}": f"mlp.gate.{_BIAS}"},
)
_LINEAR = {
    "linear_attn.in_proj_qkvz": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
    "linear_attn.in_proj_ba": ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
}
_SHORT_CONV = Names(
    renamed={"short_conv": "conv", f"feed_forward.experts.routed_experts.{_BIAS}": "feed_forward.expert_bias"},
    qkv="self_attn.qkv_proj",
    halves={"feed_forward.w13": ("feed_forward.w1", "feed_forward.w3")},
)
_MAMBA = {"mamba.A": "mamba.A_log"}
_GEMMA4 = replace(
    _LLAMA,
    renamed={"experts.routed_experts": "mlp.experts.routed_experts"},
    otherwise={"mlp.experts": "experts"},
    alike=True,
    even=("embed_tokens_per_layer", "per_layer_model_projection"),
)
VLLM: Mapping[str, Names] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"), _LLAMA),
    **dict.fromkeys(("cohere", "cohere2", "exaone4", "granite", "olmo", "seed_oss", "stablelm"), _LLAMA),
    **dict.fromkeys(("ministral", "ministral3", "ernie4_5", "hunyuan_v1_dense", "cwm", "internlm3", "helium"), _LLAMA),
    **dict.fromkeys(("hyperclovax", "iquestcoder", "granite_swa", "vaultgemma"), _LLAMA),
    **dict.fromkeys(("apertus", "arcee", "jais2", "nanochat"), _FUSED_MLP),
    "llama4_text": Names(
        renamed={"feed_forward.experts._shared_experts._layer": "feed_forward.shared_expert"},
        qkv="self_attn.qkv_proj",
        halves=_swiglu("feed_forward") | _swiglu("feed_forward.shared_expert"),
        turned=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
        paired=("self_attn.q_proj", "self_attn.k_proj"),
    ),
    "gemma4_text": _GEMMA4,
    "chatglm": Names(
        roots={"transformer.embedding": "transformer.embedding.word_embeddings", "lm_head": "transformer.output_layer"}
    ),
    "exaone": Names(qkv="attn.attention.qkv_proj", halves={"mlp.gate_up_proj": ("mlp.c_fc_0", "mlp.c_fc_1")}),
    **dict.fromkeys(("mixtral", "phimoe"), _LLAMA),
    **dict.fromkeys(("glm4", "nemotron", "starcoder2"), _FUSED_MLP),
    "glm": replace(_FUSED_MLP, gathered=("mlp.gate_up_proj",)),
    **dict.fromkeys(("olmo2", "olmo3", "olmoe"), replace(_LLAMA, whole=_QK_NORMS)),
    "phi3": Names(),
    "internlm2": Names(
        halves={"feed_forward.gate_up_proj": ("feed_forward.w1", "feed_forward.w3")}, gathered=("attention.wqkv",)
    ),
    **dict.fromkeys(
        ("granitemoe", "granitemoeshared"),
        replace(
            _LLAMA,
            renamed={
                "block_sparse_moe.experts.routed_experts.w13_weight": "block_sparse_moe.input_linear.weight",
                "block_sparse_moe.experts.routed_experts.w2_weight": "block_sparse_moe.output_linear.weight",
                "block_sparse_moe.gate": "block_sparse_moe.router.layer",
            },
        ),
    ),
    "granitemoehybrid": Names(
        renamed={
            "block_sparse_moe.experts.routed_experts.w13_weight": "block_sparse_moe.input_linear.weight",
            "block_sparse_moe.experts.routed_experts.w2_weight": "block_sparse_moe.output_linear.weight",
            "block_sparse_moe.gate": "block_sparse_moe.router.layer",
        },
        qkv="self_attn.qkv_proj",
        computed=_MAMBA,
    ),
    "nemotron_h": Names(
        roots={"model": "backbone", "model.embed_tokens": "backbone.embeddings"},
        other_roots={"model.embed_tokens": "model.embeddings"},
        renamed={
            f"mixer.experts.routed_experts.{_BIAS}": f"mixer.gate.{_BIAS}",
            "mixer.experts._shared_experts._layer": "mixer.shared_experts",
            "mixer.experts.routed_input_transform": "mixer.fc1_latent_proj",
            "mixer.experts.routed_output_transform": "mixer.fc2_latent_proj",
        },
        halves={"mixer.qkv_proj": ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj")},
        computed={"mixer.A": "mixer.A_log"},
    ),
    "falcon_h1": Names(
        renamed={"mamba.mamba": "mamba"},
        qkv="self_attn.qkv_proj",
        halves=_swiglu("feed_forward"),
        computed=_MAMBA,
    ),
    "jamba": Names(
        renamed={"qkv_proj": "self_attn.qkv_proj", "o_proj": "self_attn.o_proj", "attn": "self_attn.attn"},
        qkv="self_attn.qkv_proj",
        halves=_swiglu("feed_forward"),
        computed=_MAMBA,
    ),
    "qwen2_moe": _QWEN2_MOE,
    "qwen3_next": replace(_QWEN2_MOE, renamed={**_QWEN2_MOE.renamed, "mlp.experts.gate": "mlp.gate"}),
    "qwen3_moe": replace(_LLAMA, renamed={"mlp.experts.gate": "mlp.gate"}),
    "qwen3_5_text": replace(_LLAMA, halves={**_LLAMA.halves, **_LINEAR}),
    "qwen3_5_moe_text": replace(
        _QWEN2_MOE,
        renamed={**_QWEN2_MOE.renamed, "mlp.experts.gate": "mlp.gate"},
        halves={**_QWEN2_MOE.halves, **_LINEAR},
    ),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _SHORT_CONV),
    **dict.fromkeys(
        ("dots1", "solar_open"),
        replace(
            _SHARED_MOE,
            renamed={f"{_SHARED}.shared_experts": "mlp.shared_experts", "mlp.experts.gate": "mlp.gate"},
        ),
    ),
    "cohere2_moe": replace(_SHARED_MOE, renamed={_SHARED: "mlp.shared_experts"}),
    "flex_olmo": replace(_LLAMA, renamed={"mlp.experts.gate": "mlp.gate"}, whole=_QK_NORMS),
    "hunyuan_v1_moe": replace(_HUNYUAN, renamed={f"{_SHARED}.shared_experts": "mlp.shared_mlp"}),  # since 0.33
    "glm4_moe": _GLM_MOE,
    "glm4_moe_lite": Names(renamed={**_GLM_MOE.renamed, **_MLA}, halves=_DEEPSEEK.halves),
    "mimo_v2_flash": replace(
        _GLM_MOE, halves=_LLAMA.halves, otherwise={"self_attn.attention_sink_bias": "self_attn.sinks"}
    ),
    "ernie4_5_moe": replace(
        _SHARED_MOE,
        renamed={_SHARED: "mlp.shared_experts", f"mlp.experts.routed_experts.{_BIAS}": f"mlp.moe_statics.{_BIAS}"},
        otherwise={"mlp.moe_statics": "mlp.gate.moe_statics"},
    ),
    "exaone_moe": replace(
        _SHARED_MOE,
        renamed={_SHARED: "mlp.shared_experts", "mlp.experts.gate": "mlp.gate"},
        otherwise={f"mlp.{_BIAS}": f"mlp.gate.{_BIAS}"},
    ),
    "afmoe": replace(_SHARED_MOE, renamed={_SHARED: "mlp.shared_experts", "mlp.gate": "mlp.router.gate"}),
    "hy_v3": replace(
        _HUNYUAN,
        renamed={_SHARED: "mlp.shared_mlp", "mlp.gate": "mlp.router.gate"},
        otherwise={
            "mlp.shared_mlp": "mlp.shared_experts",
            "mlp.router.gate": "mlp.gate",
            "mlp.expert_bias": f"mlp.{_BIAS}",
        },
    ),
    "laguna": replace(
        _LLAMA,
        renamed={_SHARED: "mlp.shared_expert", f"mlp.experts.routed_experts.{_BIAS}": f"mlp.experts.{_BIAS}"},
        halves={},
        otherwise={"mlp.shared_expert": "mlp.shared_experts", f"mlp.experts.{_BIAS}": f"mlp.gate.{_BIAS}"},
    ),
    "mamba2": Names(computed={"mixer.A": "mixer.A_log"}),
    "bailing_hybrid": Names(
        renamed={
            "self_attn": "attention",
            "self_attn.mla_attn": "attention",
            "self_attn.mla_attn.o_proj": "attention.dense",
            f"mlp.experts.routed_experts.{_BIAS}": "mlp.gate.expert_bias",
            _SHARED: "mlp.shared_experts",
        },
        halves={
            **_SHARED_MOE.halves,
            "attention.fused_qkv_a_proj": ("attention.q_a_proj", "attention.kv_a_proj_with_mqa"),
            "attention.qkvb_proj": tuple(f"attention.{letter}_proj" for letter in "qkvb"),
        },
    ),
    "minimax_m2": replace(_LLAMA, otherwise={"block_sparse_moe": "mlp"}),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2"), _DEEPSEEK),
    **dict.fromkeys(
        ("deepseek_v32", "glm_moe_dsa"),
        replace(_DEEPSEEK, halves={**_DEEPSEEK.halves, "self_attn.indexer.wk_weights_proj": _INDEX}),
    ),
    "gpt_oss": Names(
        roots={"model.embedding": "model.embed_tokens"},
        renamed={"attn": "self_attn"},
        qkv="self_attn.qkv_proj",
        turned=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        once=("mlp.experts.routed_experts.w2_bias",),
    ),
    "gpt2": Names(turned=("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")),
    "gptj": Names(qkv="attn.qkv_proj"),
    "gpt_neox": Names(roots={"model": "gpt_neox", "lm_head": "embed_out"}),
    "gpt_bigcode": Names(whole=("mlp.c_fc", "mlp.c_proj"), roots={"model": "transformer"}),
    **dict.fromkeys(("bloom", "falcon", "RefinedWeb", "RefinedWebModel"), _BLOOM),
    "opt": Names(qkv="self_attn.qkv_proj"),
}


def even(total: int, rank: int, tp: int) -> Tensor:
    """The indices of a rank's even share."""
    return torch.arange(total * rank // tp, total * (rank + 1) // tp)


@dataclass(frozen=True)
class Rank:
    """One rank of a set, in the terms of a source. beside: the names of all that is not below `TEXT`, if any is."""

    ranks: Sequence[FileWeights]
    names: Names
    family: Family
    rank: int
    source: FileWeights
    beside: Names | None = None

    def pieces(self) -> Placed:
        """The rank's tensors under the source's names, base prefix included; no scales of an unquantised cache.

        What the source has no tensor for keeps its own name, and is left out where it changes nothing.
        """
        weights, text = self.ranks[self.rank], self.names.beside(self.source.names())
        for name in weights.names():
            if name.rpartition(".")[2] not in SCALES:
                names = text if self.beside is None or name.startswith(f"{TEXT}.") else self.beside
                found = _LAYER.fullmatch(names.of(name))
                layer, tensor = ("", names.of(name)) if found is None else (found[1], found[2])
                yield from self._parts(names, layer, tensor, Stored(weights, name))

    def _parts(self, names: Names, layer: str, tensor: str, stored: Stored) -> Placed:
        family = self.family
        parts = Parts(self.source, layer, len(self.ranks), self.rank, names.otherwise)
        module, _, suffix = tensor.rpartition(".")
        if tensor in names.once and not some_experts(self.ranks, stored.name):
            stored = Stored(self.ranks[0], stored.name)
        if experts := _EXPERTS.fullmatch(tensor):
            before = sum(each.shape(stored.name)[0] for each in self.ranks[: self.rank])
            yield from parts.experts(experts[1], experts[2], stored, names.turned, before)
        elif module == names.qkv:
            yield from self._fused(parts, names, [f"{part}.{suffix}" for part in family.qkv], stored)
        elif module.endswith(names.even):
            every = Joined([Stored(weights, stored.name) for weights in self.ranks])
            rows = self.source.shape(tensor)[0]
            if every.shape[0] not in (rows, -(-rows // 64) * 64):  # a vocabulary is padded
                raise DifferentError(
                    f"the ranks' {tensor} are not its even shares", expected=rows, found=every.shape[0]
                )
            yield tensor, Rows(every, torch.arange(rows))
        elif module in names.halves:
            yield from parts.fused([f"{half}.{suffix}" for half in names.halves[module]], stored)
        elif tensor in names.computed:
            yield parts.of_exponential(names.computed[tensor], stored)
        elif tensor in names.turned:
            yield f"{layer}{tensor}", Turned(stored)
        elif module == names.grouped and family.fused in ("heads", "groups"):
            yield f"{layer}{tensor}", Rows(stored, self._interleaved(stored))
        elif module in names.gathered:
            yield f"{layer}{tensor}", self._of_all(stored)
        elif module in names.whole:
            yield f"{layer}{tensor}", self._part(module, suffix, stored)
        else:
            yield from parts.alone(tensor, stored)

    def _fused(self, parts: Parts, names: Names, tensors: list[str], stored: Stored) -> Placed:
        """q, k and v, each with its rows in the order of the source."""
        twice = names.alike and not parts.has(tensors[2])
        pieces = list(parts.fused([*tensors[:2], tensors[1]] if twice else tensors, stored))
        if twice:
            (_, k), (_, v) = pieces[1], pieces.pop()
            if k is None or v is None or not torch.equal(k.rows(0, k.shape[0]), v.rows(0, k.shape[0])):
                raise DifferentError(f"the values in {stored.name} of rank {self.rank} are not its keys")
        for name, piece in pieces:
            if piece is not None and name.rpartition(".")[0].endswith(names.paired):
                rows = torch.arange(piece.shape[0]).view(-1, 2, self.family.head_dim // 2)
                piece = Rows(piece, rows.mT.flatten())
            yield name, piece

    def _q_k_v(self, stored: Stored) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of q, k and v in a fused one. Where no whole heads fit, all are q's, which the decoder refuses."""
        rows, d = stored.shape[0], self.family.head_dim
        q = self.family.heads * d // len(self.ranks)
        if q % d or rows <= q or (rows - q) % (2 * d):
            return torch.arange(rows), torch.arange(0), torch.arange(0)
        kv = (rows - q) // 2
        return torch.arange(q), torch.arange(q, q + kv), torch.arange(q + kv, rows)

    def _interleaved(self, stored: Stored) -> Tensor:
        """The rows of [q; k; v] in the order of the source: for each KV group its q heads, its k, its v."""
        q, k, v = self._q_k_v(stored)
        d = self.family.head_dim
        groups = len(k) // d
        if not groups or len(q) // d % groups:
            return torch.cat((q, k, v))
        return torch.cat((q.view(groups, -1), k.view(groups, d), v.view(groups, d)), 1).flatten()

    def _of_all(self, stored: Stored) -> RankPiece:
        """This rank's rows of a module whose outputs all ranks gather and then sort."""
        tp, name, every = len(self.ranks), stored.name, []
        for rank, weights in enumerate(self.ranks):
            if name not in weights.names() or weights.shape(name) != stored.shape:
                raise DifferentError(f"rank {rank} has no {name} of the others' shape", tensor=name)
            every.append(Stored(weights, name))
        rows = tp * stored.shape[0]
        if self.family.fused is None:
            at = even(rows // 2, self.rank, tp)
            return Rows(Joined(every), torch.cat((at, rows // 2 + at)))
        fitting = (self.family.heads + 2 * self.family.kv_heads) * self.family.head_dim
        if rows != fitting:
            message = f"the ranks' rows of {name} together are not the model's q, k and v"
            raise DifferentError(message, tensor=name, expected=fitting, found=rows)
        apart = [self._q_k_v(stored) for stored in every]
        sorted_rows = [Rows(every[other], apart[other][i]) for i in range(3) for other in range(tp)]
        return Rows(Joined(sorted_rows), even(rows, self.rank, tp))

    def _part(self, module: str, suffix: str, stored: Stored) -> RankPiece:
        """This rank's share of what it computes whole: the ranks' sum is then what each of them has."""
        shape, tp = stored.shape, len(self.ranks)
        if module == self.family.down:
            first, last = (shape[-1] * (self.rank + i) // tp for i in (0, 1))
            return stored if suffix == "bias" else Columns(stored, first, last)
        if module == _QK_NORMS[1]:
            # KV heads fewer than ranks are repeated.
            rows = max(self.family.head_dim, shape[0] // tp)
            first = self.rank * (shape[0] // rows) // tp * rows if shape[0] < rows * tp else self.rank * rows
            return Rows(stored, torch.arange(first, min(first + rows, shape[0])))
        return Rows(stored, even(shape[0], self.rank, tp))
