"""The rules beside the tensor-parallel plans that transformers publishes: equal, or the difference has a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
from checkpoints import FAMILIES, VARIANTS

from tpshard.checkpoint import open_checkpoint
from tpshard.model import from_checkpoint
from tpshard.rules import Architecture, all_builtin

KINDS = {
    "colwise": "column", "colwise_gather_output": "column", "colwise_rep": "column", "packed_colwise": "column",
    "rowwise": "row", "rowwise_split_input": "row", "rowwise_rep": "row", "packed_rowwise": "row",
    "embedding_rowwise": "column",  # of an embedding, transformers calls the vocab rows
    "replicate": "replicate", "replicated_with_grad_allreduce": "replicate", "mla_kv_a_proj": "replicate",
}  # fmt: skip
"""What a style does to a weight."""
NO_WEIGHT = {"moe_tp_experts", "all_reduce", "moe_identity_expert"}
"""Styles that say what is exchanged around a module; its weights have patterns of their own."""

OPTIONAL = {f"layers.*.self_attn.{name}" for name in ("q_proj", "q_b_proj")} | {
    f"layers.*.mlp.{name}_proj" for name in ("gate", "up", "down")
}
"""Modules of which a config has one or the other: a query through a latent or not, dense layers among sparse ones."""
_QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_QK_NORM = ("self_attn.q_norm", "self_attn.k_norm")
_W123 = tuple(f"block_sparse_moe.experts.*.w{number}" for number in (1, 2, 3))
_GATED = ("gate_proj", "up_proj", "down_proj")
DIFFERENCES: dict[str, dict[str, tuple[str, ...]]] = {
    "Over all heads at once. transformers gathers q and k and keeps the norm whole; cut like q and k, its mean of "
    "squares is a sum over the ranks.": {
        model_type: _QK_NORM for model_type in ("olmo2", "olmo3", "olmoe", "minimax_m2", "flex_olmo")
    },
    "One row per head, which goes with its head. The plan leaves it out, and with it cannot run.": {"cohere": _QK_NORM},
    "Latent attention whole on every rank. What each head has of it is cut here, as in the plan of deepseek_v2.": {
        "deepseek_v3": (*(f"self_attn.{name}_proj" for name in ("q", "q_b", "kv_b")), "self_attn.o_proj")
    },
    "A plan of the experts alone. The attention is LLaMA's and is cut as in LLaMA.": {
        model_type: _QKVO for model_type in ("granitemoe", "hunyuan_v1_moe", "phimoe")
    },
    "The shared expert whole on every rank. It is a feed-forward like any other.": {
        "hunyuan_v1_moe": tuple(f"mlp.shared_mlp.{name}" for name in _GATED),
        "qwen2_moe": tuple(f"mlp.shared_expert.{name}" for name in _GATED),
    },
    "Experts one by one, as files have them; the plan speaks of the stacked tensors in memory.": {
        **{
            model_type: tuple(f"mlp.experts.*.{name}" for name in _GATED)
            for model_type in (
                "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe", "olmoe",
                "qwen2_moe", "qwen3_moe",
            )
        },
        **dict.fromkeys(("mixtral", "minimax_m2", "phimoe"), _W123),
    },
    "Experts stacked under the names of the files; the plan speaks of those in memory.": {
        "granitemoe": ("block_sparse_moe.input_linear", "block_sparse_moe.output_linear")
    },
}  # fmt: skip
"""What is cut here and not in transformers' plan: reason → model_type → modules of a layer.

The other way round there is nothing: whatever a plan cuts is cut here, in the same direction.
"""


def known() -> dict[str, Architecture]:
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


def alike(pattern: str, name: str) -> bool:
    mine, others = pattern.split("."), name.split(".")
    return len(mine) == len(others) and all(fnmatchcase(b, a) for a, b in zip(mine, others, strict=True))


def differences() -> set[tuple[str, str]]:
    """(model_type, module of a layer) of what is cut here and the plan says nothing of, the vocab axis excepted.

    Embeddings and heads are not in plans of base models.
    """
    found = set()
    for model_type in plans().keys() & known().keys():
        architecture = known()[model_type]
        for rule in architecture.rules:
            for pattern in rule.patterns:
                name = pattern.removesuffix("?").removeprefix(architecture.prefix)
                if (
                    rule.axes
                    and rule.axes != ("vocab",)
                    and not any(alike(name, other) for other in plans()[model_type])
                ):
                    found.add((model_type, name.removeprefix("layers.*.")))
    return found


@pytest.mark.parametrize("model_type", sorted(known()))
def test_what_a_plan_says_is_done(model_type: str) -> None:
    mine = kinds(known()[model_type])
    for pattern, style in plans().get(model_type, {}).items():
        if style not in NO_WEIGHT:
            found = set().union(*(kind for name, kind in mine.items() if alike(name, pattern)))
            assert found == {KINDS[style]}, f"{pattern} is {style}"


def test_what_no_plan_says_has_a_reason() -> None:
    listed = [(t, module) for by_type in DIFFERENCES.values() for t, modules in by_type.items() for module in modules]
    assert len(listed) == len(set(listed))
    assert differences() == {(model_type, module) for model_type, module in listed if model_type in known()}


def test_most_plans_are_of_known_model_types() -> None:
    """What transformers can run tensor-parallel and has no rules here, for information."""
    lacking = sorted(plans().keys() - known().keys())
    compared = plans().keys() & known().keys()
    assert len(compared) >= 30, f"no rules for {', '.join(lacking)}"


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.model_type in known()])
def test_every_tensor_is_cut_in_the_dim_that_the_plan_means(name: str, made: Callable[..., Path]) -> None:
    model_type = VARIANTS[name].model_type
    plan = plans().get(model_type, {})
    model = from_checkpoint(open_checkpoint(made(name)))
    seen = set()
    for tensor in model.tensors:
        module, _, suffix = tensor.name.removeprefix(FAMILIES[model_type].prefix).rpartition(".")
        pattern = ".".join("*" if part.isdecimal() else part for part in module.split("."))
        kind = KINDS.get(plan.get(pattern, ""))
        if kind == "column":
            assert (tensor.cut.kind, tensor.cut.dim) == ("column", 0), tensor.name
        elif kind == "row":
            assert (tensor.cut.kind, tensor.cut.dim) == (("row", 1) if suffix == "weight" else ("replicate", None))
        elif kind == "replicate":
            assert tensor.cut.kind == "replicate", tensor.name
        seen.add(pattern)
    assert {pattern for pattern, style in plan.items() if "expert" not in pattern and style in KINDS} <= seen | OPTIONAL
