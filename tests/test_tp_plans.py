"""The rules beside the tensor-parallel plans that transformers publishes: equal, or the difference has a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import FAMILIES, VARIANTS
from tp_plans import DIFFERENCES, KINDS, NO_WEIGHT, PAGE, alike, differences, kinds, known, page, plans

from tpshard.checkpoint import open_checkpoint
from tpshard.model import from_checkpoint

OPTIONAL = {f"layers.*.self_attn.{name}" for name in ("q_proj", "q_b_proj")} | {
    f"layers.*.mlp.{name}_proj" for name in ("gate", "up", "down")
}
"""Modules of which a config has one or the other: a query through a latent or not, dense layers among sparse ones."""


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
        kind = KINDS.get(plan.get(pattern, ""))
        out = max(len(tensor.shape) - 2, 0)  # of stacked experts the first dim is the expert
        if kind == "column":
            assert (tensor.cut.kind, tensor.cut.dim) == ("column", out), tensor.name
        elif kind == "row":
            assert (tensor.cut.kind, tensor.cut.dim) == (("replicate", None) if suffix == "bias" else ("row", out + 1))
        elif kind == "replicate":
            assert tensor.cut.kind == "replicate", tensor.name
        seen.add(pattern)
    assert {pattern for pattern, style in plan.items() if "expert" not in pattern and style in KINDS} <= seen | OPTIONAL


def test_the_page_is_of_these_rules() -> None:
    assert PAGE.read_text() == page(), "PYTHONPATH=. python tests/tp_plans.py writes it anew"
