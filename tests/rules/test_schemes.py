"""Schemes: what the stored tensors of a module are, by suffix, and that all of them are cut where the module is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tpshard
from tests.helpers.toys import random_tensor, read, write_checkpoint
from tpshard.errors import CorruptError, UnsupportedError
from tpshard.planning.axes import Cut
from tpshard.rules.architecture import parse_architecture
from tpshard.rules.classify import classify
from tpshard.rules.quantisation.schemes import PLAIN, Companion, companion_of, split_name
from tpshard.storage.safetensors import TensorInfo


def test_dims_of_plain_modules() -> None:
    weight, bias = PLAIN["weight"], PLAIN["bias"]
    assert weight.axes(2) == ("out", "in")
    assert bias.axes(1) == weight.axes(1) == ("out",)
    assert weight.axes(0) == weight.axes(3) == bias.axes(2) == ()
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


# A scheme that no format has: weights packed by fours along `in`, a scale for blocks of 3 x 2, and others.
PACKED = {
    "weight": Companion((("out",), ("out", "in")), {"in": 4}),
    "scale": Companion((("out", "in"),), {"in": 2, "out": 3}),
    "order": Companion((("in",),)),
    "shape": Companion((("kernel",),)),
}
RULES = """
model_types = ["toy"]
layers = "1"
[axes]
ffn = { count = "n_ffn", unit = "48 // n_ffn" }
[rules]
"column ffn" = ["up"]
"row ffn" = ["down"]
"""
SHAPES: dict[str, tuple[int, ...]] = {
    "up.weight": (48, 2), "up.scale": (16, 4), "up.order": (8,), "up.shape": (2,), "up.bias": (48,),
    "down.weight": (8, 12), "down.scale": (3, 24), "down.order": (48,), "down.shape": (2,), "down.bias": (8,),
}  # fmt: skip


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain scheme with the companions of PACKED."""
    for suffix, companion in PACKED.items():
        monkeypatch.setitem(PLAIN, suffix, companion)


@pytest.mark.usefixtures("packed")
def test_the_cuts_of_companions_follow_from_the_rule_of_their_module() -> None:
    def cuts(**changed: tuple[int, ...]) -> dict[str, Cut]:
        shapes = SHAPES | {name.replace("_", "."): shape for name, shape in changed.items()}
        infos = [TensorInfo(name, "F32", shape, "model.safetensors", 0, 0) for name, shape in shapes.items()]
        return dict(classify(parse_architecture(RULES, "toy.toml"), {"n_ffn": 4}, infos).cuts)

    assert cuts() == {
        "up.weight": Cut("column", 0, ("ffn",)),
        "up.scale": Cut("column", 0, ("ffn",), ratio=3),
        "up.order": Cut("replicate"),
        "up.shape": Cut("replicate"),
        "up.bias": Cut("column", 0, ("ffn",)),
        "down.weight": Cut("row", 1, ("ffn",), ratio=4),
        "down.scale": Cut("row", 1, ("ffn",), ratio=2),
        "down.order": Cut("row", 0, ("ffn",)),
        "down.shape": Cut("replicate"),
        "down.bias": Cut("replicate"),
    }
    with pytest.raises(CorruptError, match="config.json contradicts the tensor down.weight") as error:
        cuts(down_weight=(8, 11))
    assert error.value.expected == "dim 1 of size 12 (ffn 4 x 12, 4 of them an element, toy rules)"


@pytest.mark.usefixtures("packed")
def test_a_split_with_ratios_merges_to_the_source(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {name: random_tensor(rng, "I16", shape) for name, shape in SHAPES.items()}
    source = write_checkpoint(tmp_path / "source", {"model_type": "toy", "n_ffn": 48}, tensors)
    rules = tmp_path / "toy.toml"
    rules.write_text(RULES)
    with pytest.raises(
        UnsupportedError, match="down.weight: a cut at 6 of 48 ffn of 1 falls inside an element"
    ) as error:
        tpshard.split(source, 8, tmp_path / "none", rules=rules)
    assert error.value.expected == "cuts at multiples of 4, as with tp 1, 2 or 4"
    tpshard.split(source, 4, tmp_path / "ranks", rules=rules)
    rank = read(tmp_path / "ranks" / "rank-00001-of-00004.safetensors")
    assert {name: tensor.shape for name, tensor in rank.items()} == {
        "up.weight": (12, 2), "up.scale": (4, 4), "up.order": (8,), "up.shape": (2,), "up.bias": (12,),
        "down.weight": (8, 3), "down.scale": (3, 6), "down.order": (12,), "down.shape": (2,), "down.bias": (8,),
    }  # fmt: skip
    rows = {row["name"]: row for row in json.loads((tmp_path / "ranks" / "tpshard.json").read_text())["tensors"]}
    assert {name: row["ratio"] for name, row in rows.items() if "ratio" in row} == {
        "up.scale": 3, "down.weight": 4, "down.scale": 2,
    }  # fmt: skip
    tpshard.reshard(tmp_path / "ranks", 2, tmp_path / "other")
    tpshard.merge(tmp_path / "other", tmp_path / "merged")
    assert read(tmp_path / "merged" / "model.safetensors") == tensors
