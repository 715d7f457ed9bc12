"""Models as they are published: names, configs and what surrounds a decoder, through the real commands.

A checkpoint of a family, renamed and put beside other tensors, must split as that family does, come back byte for byte,
and be proved equal; the table says what `verify` and vLLM have of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import multimodal_checkpoints as multimodal
from tests.helpers.command import succeeds, tpshard
from tests.helpers.grids import ALL
from tests.helpers.toys import Tensor, random_tensor, read_all, read_rank, write_checkpoint

Made = Callable[..., Path]


@dataclass(frozen=True)
class Published:
    """A published form. made: the checkpoint that it is made of. names: how names begin, and what they begin with here.

    config: what differs from the config of `made`. key: where the decoder's config is nested in `config`; None: it is
    not, or its values are beside the outer ones. beside: other tensors, by name and shape, whole on every rank.
    vllm: whether its names there are known. verified: what verify says.
    """

    made: str
    names: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    beside: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    vllm: bool = False
    verified: str = "pass"


TOWER = {"vision_tower.encoder.blocks.0.mlp.fc0.weight": (48, 32), "vision_tower.patch_embed.proj.bias": (32,)}
PUBLISHED = {
    "kimi_k2": Published("deepseek_v3", config={"model_type": "kimi_k2"}, vllm=True),
    "kimi_k25": Published(
        "deepseek_v3",
        {"": "language_model."},
        {"model_type": "kimi_k25", "vision_config": {}, "text_config": {"model_type": "kimi_k2"}},
        "text_config",
        TOWER | {"mm_projector.linear_1.weight": (64, 128)},
    ),
    "qwen2_5_vl, flat": Published(
        "qwen2-bias",
        config={"model_type": "qwen2_5_vl", "vision_config": {}},
        beside={"visual.blocks.0.attn.qkv.weight": (96, 32), "visual.merger.ln_q.weight": (32,)},
    ),
    "nemotron_h, transformers' names": Published("nemotron_h", {"backbone.": "model."}),
    "nemotron_h in a larger model": Published(
        "nemotron_h",
        {"": "language_model."},
        {"model_type": "NemotronH_Nano_VL_V2", "llm_config": {}},
        "llm_config",
        {"vision_model.radio_model.model.blocks.0.mlp.fc1.weight": (48, 32), "mlp1.0.weight": (32,)},
    ),
    "deepseek_vl_v2": Published(
        "deepseek_v2",
        {"": "language."},
        {"model_type": "deepseek_vl_v2", "language_config": {}},
        "language_config",
        {"vision.blocks.0.attn.qkv.weight": (96, 32), "projector.layers.0.weight": (64, 32)},
    ),
    "qwen2_5_omni": Published(
        "qwen2-bias",
        {"": "thinker."},
        {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": {"model_type": "qwen2_5_omni_text"}}},
        "thinker_config.text_config",
        {
            "thinker.visual.blocks.0.attn.q.weight": (32, 32),
            "token2wav.code2wav_dit_model.input_embed.proj.bias": (32,),
        },
    ),
    "shieldgemma2": Published(
        "gemma3_text",
        {"": "model.language_model."},
        {"model_type": "shieldgemma2", "text_config": {}},
        "text_config",
        {"model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (32, 32)},
    ),
}


def write(name: str, made: Made, out: Path) -> Path:
    """The checkpoint of the table."""
    form = PUBLISHED[name]
    model = made(form.made)
    plain = json.loads((model / "config.json").read_text())
    config = json.loads(json.dumps(form.config))
    if form.key is None:
        config = plain | config
    else:
        inner = config
        for key in form.key.split("."):
            inner = inner[key]
        inner |= plain | inner
    tensors = {_renamed(name, form.names): tensor for name, tensor in read_all(model).items()}
    if "thinker_config" in config:  # a talker has such a decoder too
        tensors |= copied(tensors, "thinker.model.", "talker.model.")
    rng, dtype = np.random.default_rng(0), next(iter(tensors.values())).dtype
    return write_checkpoint(out, config, tensors | {n: random_tensor(rng, dtype, s) for n, s in form.beside.items()})


def _renamed(name: str, names: Mapping[str, str]) -> str:
    start = max((old for old in names if name.startswith(old)), key=len, default=None)
    return name if start is None else names[start] + name[len(start) :]


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


def test_a_form_that_vllm_has_no_names_for_is_refused(made: Made, tmp_path: Path) -> None:
    model = write("deepseek_vl_v2", made, tmp_path / "model")
    assert "are not known" in tpshard("plan", model, "--tp", 2, "--format", "vllm").err


def copied(tensors: Mapping[str, Tensor], layer: str, copy: str) -> dict[str, Tensor]:
    """A layer once more."""
    return {copy + name.removeprefix(layer): tensor for name, tensor in tensors.items() if name.startswith(layer)}


MORE = {
    "nemotron_h": (
        {"backbone.layers.1.": "mtp.layers.0.", "backbone.layers.3.": "mtp.layers.1."},
        {"mtp.layers.0.enorm": (64,), "mtp.layers.0.hnorm": (64,), "mtp.layers.0.eh_proj": (64, 128)}
        | {"mtp.layers.1.final_layernorm": (64,)},
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
