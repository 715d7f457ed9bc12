"""The rules beside the tensor-parallel plans that transformers publishes: equal, or the difference has a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.checkpoints import FAMILIES, VARIANTS
from tests.helpers.tp_plans import (
    DIFFERENCES,
    KINDS,
    NO_WEIGHT,
    OTHERWISE,
    PAGE,
    alike,
    differences,
    in_files,
    kinds,
    known,
    meant,
    page,
    plans,
)
from tpshard.inputs.checkpoint import open_checkpoint
from tpshard.inputs.model import from_checkpoint

OPTIONAL = (
    {f"layers.*.self_attn.{name}" for name in ("q_proj", "q_b_proj")}
    | {f"layers.*.mlp.{name}_proj" for name in ("gate", "up", "down")}
    | {"layers.*.self_attn.sinks"}
)
"""Modules of which a config has one or the other: a query through a latent or not, dense layers among sparse ones. And
what files call otherwise."""


@pytest.mark.parametrize("model_type", sorted(known()))
def test_what_a_plan_says_is_done(model_type: str) -> None:
    mine = kinds(known()[model_type])
    for pattern, style in in_files(model_type).items():
        if style not in NO_WEIGHT:
            found = set().union(*(kind for name, kind in mine.items() if alike(name, pattern)))
            assert found == {meant(model_type, pattern, style)}, f"{pattern} is {style}"


def test_what_no_plan_says_has_a_reason() -> None:
    listed = [(t, module) for by_type in DIFFERENCES.values() for t, modules in by_type.items() for module in modules]
    assert len(listed) == len(set(listed))
    assert differences() == {(model_type, module) for model_type, module in listed if model_type in known()}


def test_what_is_cut_otherwise_is_in_a_plan() -> None:
    for by_type in OTHERWISE.values():
        for model_type, modules in by_type.items():
            for module in modules:
                style = plans()[model_type][f"layers.*.{module}"]
                assert meant(model_type, f"layers.*.{module}", style) != KINDS[style]


def test_most_plans_are_of_known_model_types() -> None:
    """What transformers can run tensor-parallel and has no rules here, for information."""
    lacking = sorted(plans().keys() - known().keys())
    compared = plans().keys() & known().keys()
    assert len(compared) >= 30, f"no rules for {', '.join(lacking)}"


@pytest.mark.parametrize("variant", [name for name, given in VARIANTS.items() if given.model_type in known()])
def test_every_tensor_is_cut_in_the_dim_that_the_plan_means(variant: str, made: Callable[..., Path]) -> None:
    model_type = VARIANTS[variant].model_type
    plan = plans().get(model_type, {})
    model = from_checkpoint(open_checkpoint(made(variant)))
    seen = set()
    for tensor in model.tensors:
        name = tensor.name.removeprefix(FAMILIES[model_type].prefix)
        module, _, suffix = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        pattern = ".".join("*" if part.isdecimal() else part for part in module.split("."))
        kind = meant(model_type, pattern, plan[pattern]) if plan.get(pattern) in KINDS else None
        out = max(len(tensor.shape) - 2, 0)  # of stacked experts the first dim is the expert
        other = out + 1
        if model_type == "llama4_text" and len(tensor.shape) == 3:
            out, other = other, out  # for products from the left
        if kind == "column":
            assert (tensor.cut.kind, tensor.cut.dim) == ("column", out), tensor.name
        elif kind == "row":
            assert (tensor.cut.kind, tensor.cut.dim) == (("replicate", None) if suffix == "bias" else ("row", other))
        elif kind == "replicate":
            assert tensor.cut.kind == "replicate", tensor.name
        seen.add(pattern)
    assert {pattern for pattern, style in plan.items() if "expert" not in pattern and style in KINDS} <= seen | OPTIONAL


def test_the_page_is_of_these_rules() -> None:
    assert PAGE.read_text() == page(), "python -m tests.helpers.tp_plans writes it anew"
