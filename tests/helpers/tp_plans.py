"""The tensor-parallel plans that transformers publishes, what differs from them here and why, and a page of both.

`python -m tests.helpers.tp_plans` writes docs/reference/architectures.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache

from tests.families.published_families import lines as lines_of_families
from tests.helpers.paths import DOCS
from tpshard.api.archs import nesting, rows, versions_text
from tpshard.rules.architecture import Architecture, all_builtin

KINDS = {
    "colwise": "column", "colwise_gather_output": "column", "colwise_rep": "column", "packed_colwise": "column",
    "rowwise": "row", "rowwise_split_input": "row", "rowwise_rep": "row", "packed_rowwise": "row",
    "embedding_colwise": "row",
    "embedding_rowwise": "column",  # of an embedding, transformers calls the vocab rows
    "replicate": "replicate", "replicated_with_grad_allreduce": "replicate", "mla_kv_a_proj": "replicate",
}  # fmt: skip
"""What a style does to a weight."""
NO_WEIGHT = {"moe_tp_experts", "all_reduce", "moe_identity_expert", "local_params"}
"""Styles that say what is exchanged around a module; its weights have patterns of their own."""

_QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_QK_NORM = ("self_attn.q_norm", "self_attn.k_norm")
_W123 = tuple(f"block_sparse_moe.experts.*.w{number}" for number in (1, 2, 3))
_LINEAR = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text")
_MAMBA = ("in_proj", "conv1d", "A_log", "D", "dt_bias", "norm", "out_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_DELTA = (*(f"{letter}_{what}" for letter in "qkv" for what in ("proj", "conv1d")), "A_log", "dt_bias")


def _shared(module: str, names: tuple[str, ...] = _GATED) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names)


DIFFERENCES: dict[str, dict[str, tuple[str, ...]]] = {
    "Over all heads at once. transformers gathers q and k and keeps the norm whole; cut like q and k, its mean of "
    "squares is a sum over the ranks.": {
        model_type: _QK_NORM for model_type in ("olmo2", "olmo3", "olmoe", "minimax_m2", "flex_olmo", "olmo_hybrid")
    },
    "One row per head, which goes with its head. The plan leaves it out.": {"cohere": _QK_NORM},
    "Latent attention whole on every rank. What each head has of it is cut here, as in the plan of deepseek_v2.": {
        model_type: (*(f"self_attn.{name}_proj" for name in ("q", "q_b", "kv_b")), "self_attn.o_proj")
        for model_type in ("deepseek_v3", "mistral4")
    },
    "A query without a latent, which the plan leaves out.": {"glm4_moe_lite": ("self_attn.q_proj",)},
    "A plan of the experts alone. The attention is LLaMA's and is cut as in LLaMA, and so is a dense layer.": {
        **{model_type: _QKVO for model_type in ("granitemoe", "granitemoeshared", "hunyuan_v1_moe", "phimoe")},
        "afmoe": (*_QKVO, "self_attn.gate_proj", *(f"mlp.{name}" for name in _GATED)),
        "granitemoehybrid": _QKVO,
        "nemotron_h": tuple(f"mixer.{letter}_proj" for letter in ("q", "k", "v", "o", "up", "down")),
        "jamba": (*_QKVO, *(f"feed_forward.{name}" for name in _GATED)),
        "lfm2_moe": (*_QKVO[:3], "self_attn.out_proj", *(f"feed_forward.w{number}" for number in (1, 2, 3))),
        "qwen4_exp_text": _QKVO,
        "inkling_text": (*_QKVO, "self_attn.r_proj", "self_attn.k_sconv.conv1d", "self_attn.v_sconv.conv1d"),
    },
    "A plan of the experts alone. Each feature of Mamba 1 has a state of its own.": {
        "jamba": tuple(f"mamba.{name}" for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj"))
    },
    "A plan of the experts alone. Each feature passes through the convolution by itself.": {
        "lfm2_moe": ("conv.in_proj", "conv.conv", "conv.out_proj")
    },
    "A plan of the experts alone. Each head of Mamba 2 goes with the group that it reads.": {
        "granitemoehybrid": tuple(f"mamba.{name}" for name in _MAMBA),
        "nemotron_h": tuple(f"mixer.{name}" for name in _MAMBA),
    },
    "Attention and a feed-forward alone in the plan. Each head of lightning attention has its query, key, value and "
    "gate; one norm is over all of them.": {
        "minimax": tuple(f"self_attn.{name}" for name in ("qkv_proj", "output_gate", "norm", "out_proj"))
    },
    "Attention and a feed-forward alone in the plan. Each head of linear attention is as much a head.": {
        "olmo_hybrid": tuple(
            f"linear_attn.{name}"
            for name in (
                "q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_proj", "A_log", "dt_bias",
                "conv1d", "q_conv1d", "k_conv1d", "v_conv1d",
            )
        ),
        "glm5_next_text": tuple(
            f"self_attn.{name}"
            for name in (
                "q_proj", "k_proj", "v_proj", "b_proj", "f_b_proj", "g_b_proj", "A_log", "dt_bias", "conv1d",
                "q_conv1d", "k_conv1d", "v_conv1d", "forget_gate.A_log", "forget_gate.dt_bias", "forget_gate.f_b_proj",
            )
        ),
    },
    "What linear attention has of each head beside its projections. The plan gathers what those give, and every rank "
    "computes all heads.": dict.fromkeys(_LINEAR, ("linear_attn.conv1d", "linear_attn.A_log", "linear_attn.dt_bias")),
    "The shared expert whole on every rank. It is a feed-forward like any other.": {
        "hunyuan_v1_moe": tuple(f"mlp.shared_mlp.{name}" for name in _GATED),
        "qwen2_moe": tuple(f"mlp.shared_expert.{name}" for name in _GATED),
        **dict.fromkeys(
            ("afmoe", "cohere2_moe", "exaone_moe", "glm4_moe_lite", "solar_open"),
            tuple(f"mlp.shared_experts.{name}" for name in _GATED),
        ),
        **dict.fromkeys(
            ("granitemoeshared", "granitemoehybrid"), ("shared_mlp.input_linear", "shared_mlp.output_linear")
        ),
        "nemotron_h": ("mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"),
    },
    "Experts one by one, as files have them; the plan speaks of the stacked tensors in memory.": {
        **{
            model_type: tuple(f"mlp.experts.*.{name}" for name in _GATED)
            for model_type in (
                "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe", "olmoe",
                "qwen2_moe", "qwen3_moe", "afmoe", "cohere2_moe", "deepseek_v32", "exaone_moe", "flex_olmo",
                "glm4_moe_lite", "glm_moe_dsa", "hy_v3", "qwen3_5_moe_text", "qwen3_next", "solar_open", "mistral4",
                "mimo_v2_flash", "dots3_note_text", "ernie4_5_vl_moe_text", "glm5_next_text", "laguna",
                "qwen4_exp_text",
                "glm4v_moe_text", "qwen3_vl_moe_text", "qwen3_omni_moe_text",
            )
        },
        **dict.fromkeys(("mixtral", "minimax", "minimax_m2", "phimoe"), _W123),
        "jamba": tuple(f"feed_forward.experts.*.{name}" for name in _GATED),
        "lfm2_moe": tuple(f"feed_forward.experts.*.w{number}" for number in (1, 2, 3)),
        "nemotron_h": ("mixer.experts.*.up_proj", "mixer.experts.*.down_proj"),
    },
    "Experts under the names of the files; the plan speaks of those in memory.": {
        **dict.fromkeys(
            ("granitemoe", "granitemoeshared", "granitemoehybrid"),
            ("block_sparse_moe.input_linear", "block_sparse_moe.output_linear")
        ),
        "hy_v3": tuple(f"mlp.shared_mlp.{name}" for name in _GATED),
    },
    "The name of the files; the plan has that of newer code.": {
        "mimo_v2_flash": ("self_attn.attention_sink_bias",),
        "laguna": tuple(f"mlp.shared_expert.{name}" for name in _GATED),
        "hy_v4": (
            "self_attn.linear_gate", "self_attn.learnable_sink_param", "mlp.linear_gate",
            "mlp.shared_experts.linear_gate",
        ),
        "inkling_text": (
            *(f"attn.{name}" for name in ("wq_du", "wk_dv", "wv_dv", "wr_du", "wo_ud", "k_sconv", "v_sconv")),
            "mlp.w13_dn", "mlp.w2_md", "mlp.experts.w13_weight", "mlp.experts.w2_weight",
            "mlp.shared_experts.shared_w13_weight", "mlp.shared_experts.shared_w2_weight",
        ),
        "qwen4_exp_text": ("ple.ple_embedding.ngram_embedding.shard_*",),
    },
    "Query, key and value as one module, as later files have them.": {"mimo_v2_flash": ("self_attn.qkv_proj",)},
    "Experts one by one, as some tools write them.": {
        "step3p5": tuple(f"moe.experts.*.{name}" for name in _GATED),
        "llama4_text": tuple(f"feed_forward.experts.*.{name}" for name in _GATED),
    },
    "Feed-forwards whole on every rank but for the experts. Each is cut here like any other.": {
        "minimax_m3_vl_text": (*(f"mlp.{name}" for name in _GATED), *_shared("block_sparse_moe.shared_experts")),
        "step3p5": (*(f"mlp.{name}" for name in _GATED), *_shared("share_expert")),
        "deepseek_v4": _shared("ffn.shared_experts", ("w1", "w2", "w3")),
    },
    "Attention whole on every rank. Each head has its own query here, and groups of heads are projected together.": {
        "deepseek_v4": tuple(f"attn.{name}" for name in ("wq_b", "attn_sink", "wo_a", "wo_b"))
    },
    "What chooses the blocks of keys, for each KV head.": {"minimax_m3_vl_text": ("self_attn.index_q_proj",)},
    "Attention whole on every rank. Each head of latent and of linear attention is a rank's own here.": {
        "kimi_linear": tuple(
            f"self_attn.{name}"
            for name in (
                *_DELTA, "b_proj", "f_b_proj", "g_b_proj", "g_proj", "q_b_proj", "kv_b_proj", "o_proj"
            )
        ),
        "bailing_hybrid": tuple(
            f"attention.{name}"
            for name in (
                *_DELTA, "b_proj", "f_proj", "g_proj", "g_norm", "q_b_proj", "kv_b_proj", "query_key_value",
                "dense", "o_proj",
            )
        ),
    },
    "The rules are of two model types, of which this one has no experts.": {
        "gemma4_unified_text": ("experts.gate_up_proj", "experts.down_proj")
    },
}  # fmt: skip
"""What is cut here and not in transformers' plan: reason → model_type → modules of a layer.

The other way round there is `WHOLE`.
"""
OTHERWISE: dict[str, dict[str, tuple[str, ...]]] = {
    "Stored for products from the left. The plan calls a dim what it would be in other matrices; it is the same dim.": {
        "llama4_text": ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")
    },
    "Behind the heads of linear attention. The plan gathers what the projections give; here a rank has whole heads, "
    "and their sum is over the ranks.": dict.fromkeys(_LINEAR, ("linear_attn.out_proj",)),
}
"""What is cut here by its input and in transformers' plan by its output, or the other way round."""
WHOLE: dict[str, dict[str, tuple[str, ...]]] = {
    "What chooses the tokens to attend to. The plan gathers what it gives; here every rank chooses by itself.": {
        "qwen4_exp_text": ("self_attn.indexer.index_qk_proj",)
    },
    "What mixes the streams beside the layers. The plan cuts one of its two matrices, and every rank has their input "
    "whole.": {
        "qwen4_exp_text": (
            "attn_hyper_connection.input_mix_weight_down", "mlp_hyper_connection.input_mix_weight_down",
            "hyper_connection_mixer.input_mix_weight_down",
        )
    },
}  # fmt: skip
"""What is whole on every rank here and cut in transformers' plan."""
_OTHER = {"column": "row", "row": "column"}


def _experts(
    files: str, gates: str = "gate_proj up_proj", down: str = "down_proj", memory: str = "mlp.experts"
) -> dict[str, tuple[str, ...]]:
    """Stacked experts of memory, and what files have in their place."""
    return {
        f"layers.*.{memory}.gate_up_proj": tuple(f"layers.*.{files}.{name}" for name in gates.split()),
        f"layers.*.{memory}.down_proj": (f"layers.*.{files}.{down}",),
    }


_TWICE = ("self_attn.*.q_b_proj", "self_attn.*.kv_b_proj", "self_attn.*.o_proj", "self_attn.*.kv_a_proj_with_mqa")
FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "deepseek_v4": _experts("ffn.experts.*", "w1 w3", "w2"),
    "minimax_m3_vl_text": _experts("block_sparse_moe.experts.*", "w1 w3", "w2"),
    "bailing_hybrid": _experts("mlp.experts.*"),
    "step3p5": _experts("moe"),
    "kimi_linear": {
        **_experts("block_sparse_moe.experts.*", "w1 w3", "w2"),
        **{
            f"layers.*.mlp.shared_experts.{name}": (f"layers.*.block_sparse_moe.shared_experts.{name}",)
            for name in _GATED
        },
    },
    "longcat_flash": {
        **_experts("mlp.experts.*"),
        **{
            f"layers.*.{name}": tuple(f"layers.*.{name.replace('*', number)}" for number in "01")
            for name in (*_TWICE, *(f"mlps.*.{name}" for name in _GATED))
        },
    },
}
"""What files call the modules that a plan has by their names in memory: model_type → a plan's pattern → the files'."""


@cache
def known() -> Mapping[str, Architecture]:
    """The architecture of each model_type that has rules; parsed once, or every parameter of a test parses all."""
    return {model_type: architecture for architecture in all_builtin() for model_type in architecture.model_types}


@cache
def plans() -> Mapping[str, Mapping[str, str]]:
    """Every plan that transformers publishes, by model_type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    found = {}
    for model_type in CONFIG_MAPPING_NAMES:
        if plan := getattr(CONFIG_MAPPING[model_type], "base_model_tp_plan", None):
            found[model_type] = plan
    return found


def kinds(architecture: Architecture) -> dict[str, set[str]]:
    """The rules' patterns without the model's prefix, and what is done with each under any condition."""
    found: dict[str, set[str]] = {}
    for rule in architecture.rules:
        for pattern in rule.patterns:
            name = pattern.removesuffix("?").removeprefix(architecture.prefix)
            found.setdefault(name, set()).add(rule.kind)
    return found


def meant(model_type: str, pattern: str, style: str) -> str:
    """The kind of rule that does what a plan's style does, or what is done instead."""
    module = pattern.removeprefix("layers.*.")
    if any(module in by_type.get(model_type, ()) for by_type in WHOLE.values()):
        return "replicate"
    other = any(module in by_type.get(model_type, ()) for by_type in OTHERWISE.values())
    return _OTHER[KINDS[style]] if other else KINDS[style]


def in_files(model_type: str) -> dict[str, str]:
    """A plan with the names that files have."""
    names = FILES.get(model_type, {})
    plan = plans().get(model_type, {})
    return {own: style for pattern, style in plan.items() for own in names.get(pattern, (pattern,))}


def alike(pattern: str, name: str) -> bool:
    mine, others = pattern.split("."), name.split(".")
    return len(mine) == len(others) and all(fnmatchcase(b, a) for a, b in zip(mine, others, strict=True))


def differences() -> set[tuple[str, str]]:
    """(model_type, module of a layer) of what is cut here and the plan says nothing of, the vocab axis excepted.

    Embeddings and heads are not in plans of base models, nor are layers that predict further tokens.
    """
    found = set()
    for model_type in plans().keys() & known().keys():
        architecture = known()[model_type]
        for rule in architecture.rules:
            for pattern in rule.patterns:
                name = pattern.removesuffix("?").removeprefix(architecture.prefix)
                if (
                    rule.axes
                    and not all(architecture.axes[axis].get("pad") for axis in rule.axes)
                    and not name.startswith("mtp")
                    and not any(alike(name, other) for other in in_files(model_type))
                ):
                    found.add((model_type, name.removeprefix("layers.*.")))
    return found


PAGE = DOCS / "reference" / "architectures.md"
_TEXT = """\
# Architectures

The model_types of config.json that have rules, by the name of the rules file: `tpshard archs show NAME` prints it. A
multimodal model is split where its text model is one of these ([nested text models](rules.md)). For any other
model_type `tpshard archs draft` writes [rules to start from](rules.md).

A test compares the rules with the tensor-parallel plans that transformers {version} publishes (`base_model_tp_plan`):
{compared} of the model_types below have one. What a plan cuts is cut here, but for a few matrices; the differences are
listed further down.

*verify* is whose code `tpshard verify` runs by itself: its own decoder (*tpshard*), a class of transformers, or neither
(*bytes*: there is remote code alone, files are compared and nothing is run). *engines* are the formats for engines that
have a table of its names (`--format`). `tpshard archs --json` says all of this. Quantised modules are cut by what they
are made of, in every architecture ([formats](formats.md#quantised-models)); *quantised* names the engines' formats of
which a quantised checkpoint of the type was compared with what the engine holds, by one method at least. *versions* are
those of vLLM, and of other engines where they are named; *read*: the names were read in the sources, nothing was run.

| rules | model_types | verify | engines | versions | quantised | transformers' plan |
|---|---|---|---|---|---|---|
{rows}

## Models that nest one of these

Whatever nests one of the text models above is split in `native`. With their towers as the engine holds them:

| model_type | text models | engines | versions | quantised by |
|---|---|---|---|---|
{nesting}

## Models that are served with several GPUs

Each from a small checkpoint in the form that is published, by `tests/families`: all of them are split, checked and
merged back byte for byte. *verify*: *whole*, every tensor that is cut runs; *the text*, what is beside the text model,
or predicts further tokens, is compared and not run; *bytes*, no class runs it. *vllm*: `--format vllm` writes it, and
*quantised* too where the type was compared so, by one method at least.

| model | model_type | verify | vllm | quantised |
|---|---|---|---|---|
{families}

## Cut here, and not by transformers' plan

{differences}

## Cut here by the input and there by the output, or the other way round

{otherwise}

## Cut by transformers' plan, and whole here

{whole}
"""


def page() -> str:
    """The page of the documentation: this file's data and the rules', test-checked."""
    import transformers

    verdicts, compared = {}, 0
    for architecture in all_builtin():
        planned = [model_type for model_type in architecture.model_types if model_type in plans()]
        compared += len(planned)
        differ = any(t in by_type for t in planned for by_type in (DIFFERENCES | OTHERWISE | WHOLE).values())
        verdicts[architecture.name] = ("more is cut here" if differ else "the same") if planned else "none"
    lines = []
    for name, verify, engines, versions, quantised, those in rows():
        lists = ", ".join(engines), versions, ", ".join(quantised), verdicts[name]
        cells = (_listed(those), verify, *(each or "–" for each in lists))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    towers = []
    for each in nesting():
        versions = versions_text(each.versions)
        cells = (_listed(each.texts), ", ".join(each.engines), versions, ", ".join(each.quantised) or "–")
        towers.append(f"| `{each.model_type}` | {' | '.join(cells)} |")
    text = {
        "rows": "\n".join(lines),
        "nesting": "\n".join(towers),
        "families": "\n".join(lines_of_families()),
        "differences": _reasons(DIFFERENCES),
        "otherwise": _reasons(OTHERWISE),
        "whole": _reasons(WHOLE),
    }
    version = ".".join(transformers.__version__.split(".")[:2])
    return _TEXT.format(version=version, compared=compared, **text)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _reasons(listed: Mapping[str, Mapping[str, tuple[str, ...]]]) -> str:
    reasons = []
    for reason, by_type in listed.items():
        own = {t: ", ".join(f"`{m}`" for m in modules) for t, modules in by_type.items() if t in known()}
        lines = [
            f"  - {', '.join(t for t in own if own[t] == modules)}: {modules}"
            for modules in dict.fromkeys(own.values())
        ]
        reasons += [f"- {reason}", *lines] if own else []
    return "\n".join(reasons)


if __name__ == "__main__":
    PAGE.write_text(page())
