"""What vLLM calls its parameters, and SGLang too: by family, only where what a source has does not say it already."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Spelled = Mapping[str, Sequence[str]]
"""Parts of names, and what a source may have in the place of each."""

_ROUTER = ("gate", "router.gate", "router.layer", "router")
_CHOICE = "e_score_correction_bias"
_SHARED = ("shared_experts", "shared_expert", "shared_mlp")
SPELLED: Spelled = {
    "experts._shared_experts._layer": _SHARED,
    "experts._shared_experts._layer.shared_experts": _SHARED,
    "experts._shared_experts._layer.expert_gate": ("shared_expert_gate",),
    "experts.gate": _ROUTER,
    "gate": _ROUTER[1:],
    f"experts.gate.{_CHOICE}": ("gate.bias",),
    f"experts.routed_experts.{_CHOICE}": (
        *(f"{module}.{_CHOICE}" for module in ("gate", "moe_statics", "gate.moe_statics", "experts")),
        *("gate.expert_bias", "expert_bias", "router_bias"),
    ),
    _CHOICE: (f"gate.{_CHOICE}", f"moe_statics.{_CHOICE}"),
    "expert_bias": (_CHOICE, f"gate.{_CHOICE}"),
    "experts.routed_input_transform": ("fc1_latent_proj",),
    "experts.routed_output_transform": ("fc2_latent_proj",),
    "shared_mlp": ("shared_experts",),
    "mlp.router": ("block_sparse_moe.gate",),
    "block_sparse_moe": ("mlp",),
    "mlp": ("block_sparse_moe",),
    "self_attn.mla_attn": ("self_attn", "attention"),
    "self_attn.mla_attn.o_proj": ("attention.dense",),
    "self_attn": ("attention",),
    "self_attn.attention_sink_bias": ("self_attn.sinks",),
    "attn": ("self_attn",),
    "short_conv": ("conv",),
    "mamba.mamba": ("mamba",),
    "moe.experts._shared_experts._layer": ("share_expert",),
    "hc_fn.weight": ("hc_fn",),
    "hc_head_fn.weight": ("hc_head_fn",),
    "weight": ("base_layer.weight",),
}
"""Parts of any family's names. What a source has under the very name that vLLM has is not looked for elsewhere."""

FUSED: Spelled = {
    "qkv_proj": (
        *("q_proj k_proj v_proj index_q_proj | index_k_proj", "q_proj k_proj v_proj | indexer.index_qk_proj"),
        *("q_proj k_proj v_proj", "q_proj k_proj k_proj", "wq wk wv"),
    ),
    "qkv": ("q k v",),
    "qkvr": ("wq_du wk_dv wv_dv wr_du",),
    "kv_proj": ("key_proj value_proj",),
    "input_mix_weight_down_block_inject": ("input_mix_weight_down block_inject_weight",),
    "gate_up_proj": ("gate_proj up_proj", "w1 w3", "c_fc_0 c_fc_1"),
    "w13": ("w1 w3",),
    "fused_qkv_a_proj": ("q_a_proj kv_a_proj_with_mqa", "wq_a wkv_a_with_mqa"),
    "qkvb_proj": ("q_proj k_proj v_proj b_proj",),
    "in_proj_qkvgfab": ("q_proj k_proj v_proj b_proj | f_a_proj",),
    "in_proj_qkvbfg_a": ("q_proj k_proj v_proj b_proj | f_a_proj g_a_proj",),
    "conv1d": ("q_conv1d k_conv1d v_conv1d",),
    "in_proj_qkvz": ("in_proj_qkv in_proj_z",),
    "in_proj_ba": ("in_proj_b in_proj_a",),
    "wk_weights_proj": ("wk weights_proj",),
    "fused_wqa_wkv": ("wq_a wkv",),
    "fused_wkv_wgate": ("wkv wgate",),
    "merged_qkv": ("wq wk wv",),
    "merged_kv": ("wk wv",),
    "merged_linear": ("w1 w3",),
    "q_proj": ("wq",),
    "o_proj": ("wo",),
    "down_proj": ("w2",),
}
"""Modules that are several of the source's, one behind the other, or are called otherwise; all lie in one place.

Where a source has no values, vLLM holds its keys twice. Behind a bar stand those that every rank has whole, beside its
share of the others.
"""
_TENSORS: Spelled = {"embed_tokens.weight": ("wte.embedding wte.new_embedding",)}
"""The same of single tensors."""


@dataclass(frozen=True)
class Names:
    """How vLLM has one family, beside `SPELLED` and `FUSED`.

    roots: how whole names begin, and what begins the source's. other_roots: in sources that have none of those.
    spelled: parts of names of this family alone. All else is said in vLLM's names, below their layer. turned: tensors
    with their last two dims exchanged; of experts under the source's names. grouped: a module with its q, k and v
    apart that the source interleaves. gathered: modules that every rank computes for all, in even slices, or as if q,
    k and v lay apart. whole: modules that all ranks hold whole, and share out here. once: tensors that rank 0 alone
    adds, and the others hold zeros of. paired: modules of the source with each head's even rows before its odd ones.
    even: modules, as a pattern, of which each rank has an even share, and that are computed whole; the source may have
    them in parts. padded: modules, as a pattern, with zeros behind what they hold. stacks: those of a layer's experts
    that are numbered on from the one before. stacked: tensors = what other families call such experts. side_by_side:
    stacks of the source whose matrices stand beside one another. alternate: stacks of experts of the source whose rows
    are gate's and up's by turns. multiplied: tensors = two of the config's numbers, the root of whose ratio they are
    times, and what must be true.
    """

    roots: Mapping[str, str] = field(default_factory=dict)
    other_roots: Mapping[str, str] = field(default_factory=dict)
    spelled: Spelled = field(default_factory=dict)
    turned: tuple[str, ...] = ()
    grouped: str | None = None
    gathered: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    paired: tuple[str, ...] = ()
    even: str = r"(?!)"
    padded: str = r"(?!)"
    stacks: tuple[str, ...] = ()
    stacked: Mapping[str, str] = field(default_factory=dict)
    side_by_side: tuple[str, ...] = ()
    alternate: tuple[str, ...] = ()
    multiplied: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)

    def beside(self, source: Collection[str]) -> "Names":
        """The names for a source with these tensors."""
        bases = tuple(f"{root}." for root in self.roots.values())
        if not self.other_roots or any(name.startswith(bases) for name in source):
            return self
        return replace(self, roots=self.other_roots)

    def of(self, stored: str) -> str:
        """A stored parameter's name with the beginning that it has in the source."""
        return begun(stored, self.roots)

    def tried(self, tensor: str) -> Iterator[str]:
        """What a source may call a tensor below its layer: what it is called here, and what its parts become."""
        yield tensor
        dotted = f".{tensor}."
        for table in (self.spelled, SPELLED):
            for part in sorted((part for part in table if f".{part}." in dotted), key=len, reverse=True):
                for other in table[part]:
                    yield dotted.replace(f".{part}.", f".{other}.", 1).strip(".")


def begun(name: str, table: Mapping[str, str]) -> str:
    """The name with the longest beginning that the table has exchanged."""
    old = max((old for old in table if name == old or name.startswith(f"{old}.")), key=len, default=None)
    return name if old is None else table[old] + name.removeprefix(old)


def fused_of(tensor: str) -> Iterator[tuple[list[str], list[str]]]:
    """What a fused tensor may be of: those of which a rank has a share, and those that it has whole."""
    module, _, suffix = tensor.rpartition(".")
    place, dot, last = module.rpartition(".")
    fused = [(parts, f".{suffix}") for parts in FUSED.get(last, ())]
    for parts, end in (*fused, *((parts, "") for parts in _TENSORS.get(f"{last}.{suffix}", ()))):
        shared, whole = ([f"{place}{dot}{part}{end}" for part in each.split()] for each in parts.partition("|")[::2])
        yield shared, whole


QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_MISTRAL = Names(
    roots={
        **{"model.layers": "layers", "model.embed_tokens": "tok_embeddings", "model.norm": "norm"},
        "lm_head": "output",
    },
    spelled={
        "input_layernorm": ("attention_norm",),
        "post_attention_layernorm": ("ffn_norm",),
        "mlp": ("feed_forward",),
    },
    paired=("attention.wq", "attention.wk"),
)
_LATENT = {
    **{"mla_attn.q_proj": "wq", "mla_attn.q_b_proj": "wq_b", "mla_attn.q_a_layernorm": "q_a_norm"},
    **{"kv_a_proj_with_mqa": "wkv_a_with_mqa", "kv_a_layernorm": "kv_a_norm", "kv_b_proj": "wkv_b"},
    **{"o_proj": "wo", "mla_attn.o_proj": "wo"},
}
_MISTRAL_LATENT = replace(
    _MISTRAL,
    spelled={
        **_MISTRAL.spelled,
        **{f"self_attn.{here}": (f"attention.{there}",) for here, there in _LATENT.items()},
        **{"mlp.experts._shared_experts._layer": ("shared_experts",), "mlp.experts.gate": ("gate",)},
        "mlp.gate": ("gate",),
    },
    paired=(),
)
_PLAIN, _BLOOM = Names(), Names(grouped="self_attention.query_key_value")
_NORMED_WHOLE = Names(whole=QK_NORMS)
_GEMMA4 = Names(even=r".*\.(embed_tokens_per_layer|per_layer_model_projection)")
VLLM: Mapping[str, Names] = {
    **dict.fromkeys(
        (
            "afmoe apertus arcee bailing_hybrid cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3"
            " deepseek_v32 dots1 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon_h1 gemma gemma2 gemma3_text"
            " glm4 glm4_moe glm4_moe_lite glm_moe_dsa gptj granite granite_swa granitemoe granitemoehybrid"
            " granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax internlm3 iquestcoder"
            " jais2 kimi_k2 kimi_linear laguna lfm2 lfm2_moe llama llama_bidirec mamba2 mimo_v2_flash minimax_m2"
            " minimax_m3_text minimax_m3_vl_text ministral ministral3 mistral mixtral nanochat nemotron olmo opt phi3"
            " phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 "
            " solar_open stablelm starcoder2 step3p5 vaultgemma bailing_moe_v3 nemotron-nas"
        ).split(),
        _PLAIN,
    ),
    **dict.fromkeys(("olmo2", "olmo3", "olmoe", "flex_olmo"), _NORMED_WHOLE),
    **dict.fromkeys(("bloom", "falcon", "RefinedWeb", "RefinedWebModel"), _BLOOM),
    "llama4_text": Names(
        turned=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
        paired=("self_attn.q_proj", "self_attn.k_proj"),
    ),
    "deepseek_v4": Names(roots={"lm_head": "head", "model.embed_tokens": "embed"}),
    "glm5_next_text": Names(roots={"model._active_layers": "model.layers"}),
    "ernie4_5_vl_moe_text": Names(
        spelled={"text_experts_gate.weight": ("gate.weight",), "vision_experts_gate.weight": ("gate.weight_1",)},
        turned=("mlp.text_experts_gate.weight", "mlp.vision_experts_gate.weight"),
        stacks=("text_experts", "vision_experts"),
    ),
    "qwen4_exp_text": Names(
        even=r"ple\.ple_embedding\.ngram_embedding", padded=r"\w+\.input_mix_weight_down_block_inject"
    ),
    "longcat_flash": Names(
        spelled={
            **{f"self_attn.{half}.mla_attn": (f"self_attn.{half}",) for half in (0, 1)},
            f"experts.routed_experts.{_CHOICE}": (f"router.{_CHOICE}",),
        },
        multiplied={
            f"self_attn.{half}.{which}_a_layernorm.weight": (
                "hidden_size",
                f"{which}_lora_rank",
                f"mla_scale_{which}_lora",
            )
            for half in (0, 1)
            for which in ("q", "kv")
        },
    ),
    "minicpm": Names(
        stacked={
            "mlp.ws": "mlp.experts.routed_experts.w13_weight",
            "mlp.w2s": "mlp.experts.routed_experts.w2_weight",
        }
    ),
    "molmo2_text": Names(
        roots={"model.layers": "model.blocks", "model.norm": "model.ln_f"},
        spelled={
            "input_layernorm": ("attn_norm",),
            "post_attention_layernorm": ("ff_norm",),
            "self_attn.qkv_proj": ("self_attn.att_proj",),
            "self_attn.o_proj": ("self_attn.attn_out",),
            "mlp.up_gate_proj": ("mlp.ff_proj",),
            "mlp.down_proj": ("mlp.ff_out",),
        },
        even=r".*\.embed_tokens",
        whole=QK_NORMS,
    ),
    "dots3_note": _PLAIN,
    "inkling_text": Names(
        roots={"model.embed_tokens": "model.embed", "lm_head": "model.unembed"},
        spelled={
            "mlp.gate_up_proj": ("mlp.w13_dn",),
            "mlp.down_proj": ("mlp.w2_md",),
            **{
                f"mlp.sink_experts.{each}": (f"mlp.shared_experts.shared_{each}",)
                for each in ("w13_weight", "w2_weight")
            },
        },
        even=r"(attn|mlp)_sconv",
        padded=r"mlp\.gate",
        side_by_side=("mlp.shared_experts.shared_w2_weight",),
        alternate=("mlp.experts.w13_weight",),
    ),
    "mistral_native": _MISTRAL,
    "mistral_native with latents": _MISTRAL_LATENT,
    "muse_glimmer_text": Names(spelled={"self_attn.output_gate_proj": ("self_attn.gate_proj",)}),
    "zamba2": Names(spelled={"A": ("0",), "B": ("1",)}, even=r".*_adapter_list\.\d+\.A"),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _GEMMA4),
    **dict.fromkeys(("bailing_moe", "bailing_moe_v2"), Names(roots={"model.embed_tokens": "model.word_embeddings"})),
    "chatglm": Names(
        roots={"transformer.embedding": "transformer.embedding.word_embeddings", "lm_head": "transformer.output_layer"}
    ),
    "glm": Names(gathered=("mlp.gate_up_proj",)),
    "internlm2": Names(gathered=("attention.wqkv",)),
    "nemotron_h": Names(
        roots={"model": "backbone", "model.embed_tokens": "backbone.embeddings"},
        other_roots={"model.embed_tokens": "model.embeddings"},
    ),
    "jamba": Names(spelled={each: (f"self_attn.{each}",) for each in ("qkv_proj", "o_proj", "attn")}),
    "gpt_oss": Names(
        roots={"model.embedding": "model.embed_tokens"},
        turned=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        once=("mlp.experts.routed_experts.w2_bias",),
    ),
    "gpt2": Names(turned=("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")),
    "gpt_neox": Names(roots={"model": "gpt_neox", "lm_head": "embed_out"}),
    "gpt_bigcode": Names(whole=("mlp.c_fc", "mlp.c_proj"), roots={"model": "transformer"}),
}
_KINDS = {"mistral_native": ("qk_nope_head_dim", "mistral_native with latents")}
"""Types of which some have other names: by a key of their config."""


def known_as(config: Mapping[str, Any]) -> str:
    """What `VLLM` calls a model, by its config."""
    model_type = str(config.get("model_type"))
    key, kind = _KINDS.get(model_type, ("", model_type))
    return kind if config.get(key) else model_type
