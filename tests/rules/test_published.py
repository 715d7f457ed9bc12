"""Models as they are published: names, configs and what surrounds a decoder, through the real commands.

A checkpoint of a family, renamed and put beside other tensors, must split as that family does, come back byte for byte,
and be proved equal; the table says what `verify` and vLLM have of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import multimodal_checkpoints as multimodal
from tests.helpers.command import succeeds, tpshard
from tests.helpers.grids import ALL
from tests.helpers.published_forms import PUBLISHED, copied, write
from tests.helpers.toys import Tensor, random_tensor, read_all, read_rank, write_checkpoint

Made = Callable[..., Path]


@pytest.mark.parametrize("name", PUBLISHED)
def test_there_and_back(name: str, made: Made, tmp_path: Path) -> None:
    form, model = PUBLISHED[name], write(name, made, tmp_path / "model")
    ways: dict[str, tuple[object, ...]] = {"native": (), "stages": ("--pp", 2)}
    for layout, way in (ways | {"vllm": ("--format", "vllm")} if form.vllm else ways).items():
        out, merged = tmp_path / layout, tmp_path / f"{layout}-merged"
        succeeds("split", model, "--tp", 2, *way, "-o", out, "--no-fsync")
        succeeds("check", out, "--source", model)
        succeeds("merge", out, "-o", merged, "--no-fsync")
        assert read_all(merged) == read_all(model)
    plan = succeeds("plan", model, "--tp", 2, "--json").json
    whole = {tensor["name"] for tensor in plan["tensors"] if tensor["rule"] == "replicate"}
    beside = {*form.beside, *(name for name in read_all(model) if name.startswith("talker."))}
    assert beside <= whole
    tiers = "weights,exact,native" if ALL else "weights"
    found = tpshard("verify", tmp_path / "native", "--source", model, "--tier", tiers, "--tokens", 1, "--json").json
    assert found["verdict"] == form.verified, found["reason"]
    assert {name for tier in found["tiers"] for name in tier["not_run"]} >= beside
    stages = json.loads((tmp_path / "stages" / "tpshard.json").read_text())
    on = {row["name"]: row["stages"] for row in stages["tensors"]}
    assert all(on[name] == [0] for name in beside), "what makes embeddings stands before the layers"


MORE = {
    "nemotron_h": (
        {"backbone.layers.1.": "mtp.layers.0.", "backbone.layers.3.": "mtp.layers.1."},
        {"mtp.layers.0.enorm": (64,), "mtp.layers.0.hnorm": (64,), "mtp.layers.0.eh_proj": (64, 128)}
        | {"mtp.layers.1.final_layernorm": (64,)},
    ),
    "hy_v4": (
        {"model.layers.1.": "model.mtp_layers.0."},
        {f"model.mtp_layers.0.{norm}": (64,) for norm in ("enorm", "hnorm", "final_layernorm")}
        | {"model.mtp_layers.0.eh_proj": (64, 128)},
    ),
    "ernie4_5_moe": (
        {"model.layers.0.": "model.mtp_block.0."},
        {"model.mtp_emb_norm.0": (64,), "model.mtp_hidden_norm.0": (64,), "model.mtp_linear_proj.0": (64, 128)},
    ),
}
"""Layers that predict further tokens: of which layers they are copies, and what is around them."""


@pytest.mark.parametrize("name", MORE)
def test_what_predicts_further_tokens_is_cut_like_the_layers_that_it_copies(
    name: str, made: Made, tmp_path: Path
) -> None:
    plain, (copies, around), rng = read_all(made(name)), MORE[name], np.random.default_rng(0)
    extra = {f"{module}.weight": random_tensor(rng, "F32", shape) for module, shape in around.items()}
    for layer, copy in copies.items():
        extra |= copied(plain, layer, copy)
    config = json.loads((made(name) / "config.json").read_text())
    model, out = write_checkpoint(tmp_path / "model", config, plain | extra), tmp_path / "out"
    succeeds("split", model, "--tp", 2, "-o", out, "--no-fsync")
    succeeds("check", out, "--source", model)
    succeeds("merge", out, "-o", tmp_path / "merged", "--no-fsync")
    assert read_all(tmp_path / "merged") == read_all(model)
    for rank in range(2):
        held = read_rank(out, rank, 2)
        for layer, copy in copies.items():
            assert copied(held, layer, copy).items() <= held.items()
        assert all(held[f"{module}.weight"] == extra[f"{module}.weight"] for module in around)
    found = tpshard("verify", out, "--source", model, "--tier", "weights", "--json").json
    assert (found["verdict"], {name for tier in found["tiers"] for name in tier["not_run"]}) == (
        "inconclusive",
        extra.keys(),
    )
    assert "--allow-not-run" in found["reason"]


def turned(tensor: Tensor) -> Tensor:
    """Stacked matrices, each transposed."""
    numbers = np.frombuffer(tensor.data, "<f4").reshape(tensor.shape).swapaxes(1, 2)
    return Tensor(tensor.dtype, numbers.shape, numbers.tobytes())


def test_experts_of_qwen3_vl_are_stored_for_products_from_either_side(tmp_path: Path) -> None:
    """Published files have them from the left, transformers saves them from the right: the same cut."""
    saved = multimodal.make("qwen3_vl_moe", tmp_path / "saved")
    config, tensors = json.loads((saved / "config.json").read_text()), read_all(saved)
    left = {name: turned(tensor) if ".experts." in name else tensor for name, tensor in tensors.items()}
    model = write_checkpoint(tmp_path / "published", config, left)
    for each in (saved, model):
        out = tmp_path / f"{each.name}-tp2"
        succeeds("split", each, "--tp", 2, "-o", out, "--no-fsync")
        succeeds("check", out, "--source", each)
        succeeds("merge", out, "-o", tmp_path / f"{each.name}-merged", "--no-fsync")
        assert read_all(tmp_path / f"{each.name}-merged") == read_all(each)
        tiers = "weights,exact,native" if ALL else "weights,exact"
        found = tpshard("verify", out, "--source", each, "--tier", tiers, "--tokens", 1, "--json").json
        assert (found["verdict"], found["reason"]) == ("pass", None)
    for rank in range(2):
        right, other = (read_rank(tmp_path / f"{each.name}-tp2", rank, 2) for each in (saved, model))
        assert other == {name: turned(tensor) if ".experts." in name else tensor for name, tensor in right.items()}
