"""Config files, old and new, to families."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.checkpoints import DECODED, old_config
from tests.helpers.small_models import source
from tpshard.errors import CorruptError, UnsupportedError
from tpshard.verifier.families.configs import FAMILIES, describe

# Variants that the first published configs had no keys for.
NO_OLD_FORM = {"falcon-new-one-norm"}


@pytest.mark.parametrize("name", [name for name in DECODED if name not in NO_OLD_FORM])
def test_old_keys_describe_the_same_model(name: str) -> None:
    config = source(name)[0]
    new, old = describe(config), describe(old_config(config))
    if new.rope is not None and old.rope is not None and config["model_type"] == "falcon":
        old = replace(old, rope=replace(old.rope, max_positions=new.rope.max_positions, original_positions=64))
    assert replace(old, model_type=new.model_type) == new


def test_every_family_has_a_variant() -> None:
    # transformers has no InternLM 2, so test_internlm.py makes one of a LLaMA.
    elsewhere = {"RefinedWeb", "RefinedWebModel", "internlm2"}
    assert {variant.model_type for variant in DECODED.values()} == FAMILIES.keys() - elsewhere


def test_an_unknown_model_is_refused_with_ways_out() -> None:
    with pytest.raises(UnsupportedError, match="'mamba'") as caught:
        describe({"model_type": "mamba"})
    assert all(way in (caught.value.hint or "") for way in ("--engine transformers", "--rules NAME", "--tier bytes"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_hidden_layers": None}, CorruptError, "num_hidden_layers"),
        ({"hidden_size": "64"}, CorruptError, "hidden_size"),
        ({"num_key_value_heads": 3}, CorruptError, "KV heads do not divide"),
        ({"rope_parameters": {"rope_type": "longrope"}}, UnsupportedError, "longrope"),
        ({"rope_parameters": {"rope_type": "linear"}}, CorruptError, "without a factor"),
    ],
)
def test_a_config_that_says_nothing_or_nonsense(change: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        describe({**source("llama-gqa")[0], **change})


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'mish'"):
        describe({**source("llama-gqa")[0], "hidden_act": "mish"})


def test_more_layers_than_any_model_has_are_not_believed() -> None:
    """Something is kept for each: 10^8 of them took 1.5 GB."""
    with pytest.raises(CorruptError, match="num_hidden_layers is that of no model"):
        describe({"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 10**8})
