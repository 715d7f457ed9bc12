"""Schemes: what the stored tensors of a module are, by suffix, and that all of them are cut where the module is."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import tpshard
from tests.helpers.toys import random_tensor, read, write_checkpoint
from tpshard.errors import CorruptError, UnsupportedError
from tpshard.planning.axes import Cut
from tpshard.rules.architecture import parse_architecture
from tpshard.rules.classify import Classification, classify
from tpshard.rules.quantisation.recognise import recognise
from tpshard.rules.quantisation.schemes import PLAIN, QUANTISED, WHOLE, Companion, companion_of, ratio_of, split_name
from tpshard.storage.safetensors import TensorInfo


def test_dims_of_plain_modules() -> None:
    weight, bias = PLAIN["weight"], PLAIN["bias"]
    assert weight.axes(2) == ("out", "in")
    assert bias.axes(1) == weight.axes(1) == ("out",)
    assert weight.axes(0) is weight.axes(3) is bias.axes(2) is None
    assert weight.has("out", "in") and bias.has("out") and not bias.has("out", "in")


@pytest.mark.parametrize(
    ("name", "module", "suffix", "companion"),
    [
        ("a.up.weight", "a.up", "weight", "weight"),
        ("a.up.bias", "a.up", "bias", "bias"),
        ("mixer.A_log", "mixer.A_log", "", "weight"),
        ("experts.down_proj_bias", "experts.down_proj_bias", "", "bias"),
        ("mixer.dt_bias", "mixer.dt_bias", "", "bias"),
        ("mixer.unbias", "mixer.unbias", "", "weight"),
        ("bias", "bias", "", "bias"),
    ],
)
def test_a_name_tells_module_and_companion(name: str, module: str, suffix: str, companion: str) -> None:
    assert split_name(name) == (module, suffix)
    assert companion_of(name) is PLAIN[companion]


@pytest.mark.parametrize(
    ("kind", "dtype", "expected", "found", "sizes", "ratio"),
    [
        (None, "F16", 8, 8, (), 1),
        (None, "F16", 8, 4, (), None),
        ("packed", "I32", 4096, 512, (), 8),
        ("packed", "I32", 96, 9, (), Fraction(32, 3)),
        ("packed", "I32", 100, 10, (), Fraction(32, 3)),  # the last word may have room left
        ("packed", "I32", 96, 7, (), None),
        ("packed", "U8", 64, 32, (), 2),
        ("packed", "I8", 64, 64, (), 1),
        ("packed", "F8_E4M3", 64, 32, (), None),
        ("scale", "F32", 576, 5, (128,), 128),
        ("scale", "F32", 576, 4, (128,), None),
        ("scale", "F32", 576, 576, (128,), 1),
        ("scale", "F32", 576, 1, (128,), WHOLE),
        ("scale", "F32", 128, 1, (128,), 128),  # a block, which no rank cuts
        ("scale", "F32", 96, 3, (16, 32), 32),
        ("zeros", "I32", 64, 8, (32,), 8),
        ("zeros", "I8", 64, 2, (32,), 32),
        ("head", "F32", 64, 2, (), 32),
    ],
)
def test_a_ratio_follows_from_sizes(
    kind: str | None, dtype: str, expected: int, found: int, sizes: tuple[int, ...], ratio: object
) -> None:
    companion = Companion((), {"in": kind} if kind else {}, sizes=sizes)
    assert ratio_of(companion, "in", dtype, expected, found, unit=32) == ratio


def test_bits_that_the_config_names_come_first() -> None:
    """Two words of 16 values are of 3 bits or of 4."""
    packed = QUANTISED["weight_packed"]
    assert ratio_of(packed, "in", "I32", 16, 2) == Fraction(32, 3)
    assert ratio_of(replace(packed, bits=(4, 2, 3)), "in", "I32", 16, 2) == 8


RULES = """
model_types = ["toy"]
layers = "1"
[axes]
ffn = { count = "n_ffn", unit = "96 // n_ffn" }
[rules]
"column ffn" = ["up"]
"row ffn" = ["down"]
"""
# 3 bits: 32 values in 3 words. Groups of 16; zero points packed along `out`, of 8 rows in one word and of 96 in 9.
STORED: dict[str, tuple[str, tuple[int, ...]]] = {
    "up.weight_packed": ("I32", (96, 6)),
    "up.weight_scale": ("BF16", (96, 4)),
    "up.weight_zero_point": ("I32", (9, 4)),
    "up.weight_shape": ("I64", (2,)),
    "up.weight_g_idx": ("I32", (64,)),
    "up.bias": ("BF16", (96,)),
    "down.weight_packed": ("I32", (8, 9)),
    "down.weight_scale": ("BF16", (8, 6)),
    "down.weight_zero_point": ("I32", (1, 6)),
    "down.weight_shape": ("I64", (2,)),
    "down.bias": ("BF16", (8,)),
}
CONFIG = {"model_type": "toy", "quantization_config": {"quant_method": "compressed-tensors", "group_size": 16}}


def classified(n_ffn: int, **changed: tuple[int, ...]) -> Classification:
    stored = STORED | {name: (STORED[name][0], shape) for name, shape in changed.items()}
    infos = [TensorInfo(name, *of, "model.safetensors", 0, 0) for name, of in stored.items()]
    quantised = recognise(CONFIG["quantization_config"], infos, "config.json")  # type: ignore[arg-type]
    return classify(parse_architecture(RULES, "toy.toml"), {"n_ffn": n_ffn}, infos, quantised=quantised.companions)


def test_the_cuts_of_companions_follow_from_the_rule_of_their_module() -> None:
    three = Fraction(32, 3)
    found = classified(6)
    assert found.cuts == {
        "up.weight_packed": Cut("column", 0, ("ffn",)),
        "up.weight_scale": Cut("column", 0, ("ffn",)),
        "up.weight_zero_point": Cut("column", 0, ("ffn",), ratio=three),
        "up.weight_shape": Cut("replicate"),
        "up.weight_g_idx": Cut("replicate"),
        "up.bias": Cut("column", 0, ("ffn",)),
        "down.weight_packed": Cut("row", 1, ("ffn",), ratio=three),
        "down.weight_scale": Cut("row", 1, ("ffn",), ratio=16),
        "down.weight_zero_point": Cut("row", 1, ("ffn",), ratio=16),
        "down.weight_shape": Cut("replicate"),
        "down.bias": Cut("replicate"),
    }
    assert found.axes["ffn"].step == 2  # units of 16: whole groups, and two to end a word
    assert classified(96).axes["ffn"].step == 32 and classified(3).axes["ffn"].step == 1
    with pytest.raises(CorruptError, match="config.json contradicts the tensor down.weight_packed") as error:
        classified(6, **{"down.weight_packed": (8, 7)})
    assert error.value.expected == "dim 1 of size 96 (ffn 6 x 16, toy rules)"


def test_a_split_with_ratios_merges_to_the_source(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {name: random_tensor(rng, *of) for name, of in STORED.items()}
    source = write_checkpoint(tmp_path / "source", CONFIG | {"n_ffn": 6}, tensors)
    rules = tmp_path / "toy.toml"
    rules.write_text(RULES)
    with pytest.raises(UnsupportedError, match="6 ffn on 2 ranks: 2 at a time") as error:
        tpshard.split(source, 2, tmp_path / "none", rules=rules)
    assert error.value.expected == "tp 1 or 3"
    tpshard.split(source, 3, tmp_path / "ranks", rules=rules)
    rank = read(tmp_path / "ranks" / "rank-00001-of-00003.safetensors")
    assert {name: tensor.shape for name, tensor in rank.items()} == {
        "up.weight_packed": (32, 6), "up.weight_scale": (32, 4), "up.weight_zero_point": (3, 4),
        "up.weight_shape": (2,), "up.weight_g_idx": (64,), "up.bias": (32,),
        "down.weight_packed": (8, 3), "down.weight_scale": (8, 2), "down.weight_zero_point": (1, 2),
        "down.weight_shape": (2,), "down.bias": (8,),
    }  # fmt: skip
    rows = {row["name"]: row for row in json.loads((tmp_path / "ranks" / "tpshard.json").read_text())["tensors"]}
    assert {name: row["ratio"] for name, row in rows.items() if "ratio" in row} == {
        "up.weight_zero_point": "32/3", "down.weight_packed": "32/3", "down.weight_scale": 16,
        "down.weight_zero_point": 16,
    }  # fmt: skip
    tpshard.reshard(tmp_path / "ranks", 2, tmp_path / "other", uneven=True)
    tpshard.merge(tmp_path / "other", tmp_path / "merged")
    assert read(tmp_path / "merged" / "model.safetensors") == tensors
