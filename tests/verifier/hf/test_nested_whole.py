"""Models with towers of which no class computes the text alone: a picture goes through all of it, right rules pass.

Published names and shapes differ from those of the class by more than what names say: q, k and v in one matrix, experts
of text and pictures in one list, matrices turned round.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import served_checkpoints, served_forms
from tests.helpers.command import succeeds, tpshard
from tests.helpers.grids import some
from tests.helpers.served_forms import NESTED
from tests.helpers.toys import read_all, write_checkpoint
from tpshard.rules import architecture

ARCHITECTURES = Path(architecture.__file__).parent / "architectures"
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    def get(name: str, *, published: bool = True) -> Path:
        path = home / f"{name}-{published}".replace(" ", "-")
        if path.exists():
            return path
        nested = name in NESTED
        return served_forms.make(name, path, published=published) if nested else served_checkpoints.make(name, path)

    home = tmp_path_factory.mktemp("nested")
    return get


def verified(model: Path, out: Path, tiers: str, *more: object) -> Any:
    given = ("--source", model, "--tier", tiers, "--tokens", 1, "--json", *more)
    return tpshard("verify", out, *given)


ONE_FORM = {"muse_glimmer", "phi4_multimodal", "glm5_next"}  # the last has a test of its own
SERVED = [("mistral_large4", True)]
FORMS = [(name, published) for name in NESTED for published in (True, False) if published or name not in ONE_FORM]


@pytest.mark.parametrize(("name", "published"), some([*FORMS, *SERVED], [("molmo2", True)]))
def test_right_rules_pass(name: str, published: bool, made: Made, tmp_path: Path) -> None:
    model, out = made(name, published=published), tmp_path / "out"
    succeeds("split", model, "--tp", 2, "-o", out, "--no-fsync")
    found = verified(model, out, "weights,exact,native").json
    assert found["verdict"] == "pass", found["reason"]
    assert (found["settings"]["runs"], found["warnings"], found["not_run"]) == ("the whole model", [], [])
    assert {canary["status"] for canary in found["canaries"]} == {"caught"}


@pytest.mark.parametrize(("name", "published"), some([*FORMS, *SERVED], [("ernie4_5_vl_moe", True)]))
def test_the_class_has_what_transformers_loads(name: str, published: bool, made: Made) -> None:
    """Logits of transformers' own loading, and others for another picture."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from tpshard.verifier.hf.config import model_config
    from tpshard.verifier.hf.pictures import pictures_for, with_placeholder
    from tpshard.verifier.hf.skeleton import fill, frame_of, skeleton
    from tpshard.verifier.ranks.open import open_source

    path, cpu = made(name, published=published), torch.device("cpu")
    config, stored = open_source(path)
    frame = frame_of(with_placeholder(model_config(config, whole=True), 251))
    frame, source, _ = frame.converted(stored, [])
    whole: Any = skeleton(frame.config, torch.float32, cpu)
    fill(whole, frame.of_source(source), source, torch.float32, cpu)
    auto = AutoModelForCausalLM if name == "phi4_multimodal" else AutoModelForImageTextToText
    wanted: Any = auto.from_pretrained(
        path, config=frame.config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        found = pictures_for(whole, torch.arange(3, 35).view(2, 16), 0, 251)
        assert found is not None
        pixels = found.of_dtype(torch.float32, cpu)
        theirs, ours = (each(input_ids=found.ids, **pixels).logits for each in (wanted, whole))
        first = next(iter(pixels))
        other = whole(input_ids=found.ids, **(pixels | {first: -pixels[first]})).logits
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5
    assert float((other - ours)[:, -1].norm() / ours[:, -1].norm()) > 1e-4


def test_layers_that_predict_further_tokens_are_named(made: Made, tmp_path: Path) -> None:
    """Step 3.7 as published has one: the rest is run whole."""
    model, out = made("step3p7"), tmp_path / "out"
    succeeds("split", model, "--tp", 2, "-o", out, "--no-fsync")
    found = verified(model, out, "weights,exact", "--allow-not-run", "model.layers.").json
    assert (found["verdict"], found["settings"]["runs"]) == ("pass", "the whole model"), found["reason"]
    assert {each["prefix"].split(".*")[0] for each in found["not_run"]} == {"model.layers.2"}


def test_ernie_as_it_is_published_is_run_whole(made: Made, tmp_path: Path) -> None:
    """All values at the top of the config, under a model type that transformers does not know."""
    nested = made("ernie4_5_vl_moe")
    config = served_forms.ernie_as_published(json.loads((nested / "config.json").read_text()))
    model, out = write_checkpoint(tmp_path / "model", config, read_all(nested)), tmp_path / "out"
    succeeds("split", model, "--tp", 2, "-o", out, "--no-fsync")
    found = verified(model, out, "weights,exact").json
    assert (found["verdict"], found["settings"]["runs"]) == ("pass", "the whole model"), found["reason"]


WRONG = [
    ("molmo2", "column ffn ffn if published", "column both if published", "mlp"),  # up on one rank, gate on the other
    ("molmo2", "column heads kv kv if published", "column joined if published", "self_attn"),
    ("molmo2", "row heads if published", "replicate if published and num_hidden_layers", "self_attn"),
    ("mllama", "row heads if cross", "replicate if cross and num_hidden_layers", "cross_attn"),
    ("mllama", "column kv if cross", "replicate if cross and num_hidden_layers", "cross_attn"),
    ("muse_glimmer", '"model.layers.*.self_attn.gate_proj"', "", "self_attn"),
    (
        "ernie4_5_vl_moe",
        "row experts_ffn if sparse and not stacked",
        "replicate if not stacked and sparse",
        "mlp",
    ),
]
_AXES = """
both = { count = "2 * intermediate_size" }
joined = { count = "num_attention_heads + 2 * num_key_value_heads", unit = "head_dim" }
"""
"""Of fused matrices, axes that cut them as one."""


@pytest.mark.parametrize(("name", "right", "wrong", "module"), some(WRONG, [WRONG[0], WRONG[3]]))
def test_wrong_rules_fail(name: str, right: str, wrong: str, module: str, made: Made, tmp_path: Path) -> None:
    text = (ARCHITECTURES / f"{'mllama_text_model' if name == 'mllama' else f'{name}_text'}.toml").read_text()
    if not wrong:
        text = text.replace(f", {right}", "").replace('"replicate" = [', f'"replicate" = [{right},', 1)
    else:
        assert text.count(f'"{right}"') == 1
        text = text.replace(f'"{right}"', f'"{wrong}"')
    (tmp_path / "mine.toml").write_text(text.replace("[axes]", f"[axes]{_AXES if name == 'molmo2' else ''}", 1))
    model, out = made(name), tmp_path / "out"
    succeeds("split", model, "--tp", 2, "--rules", tmp_path / "mine.toml", "-o", out, "--no-fsync")
    found = verified(model, out, "weights,exact", "--rules", tmp_path / "mine.toml")
    first = found.json["tiers"][1]["first"]
    assert found.code == 1 and f".layers.{first['layer']}.{module}" in first["module"], found.json["reason"]


@pytest.mark.parametrize(
    ("name", "leaf"), [("molmo2", "self_attn.att_proj.weight"), ("ernie4_5_vl_moe", "mlp.experts.3.gate_proj.weight")]
)
def test_another_element_is_found(name: str, leaf: str, made: Made, tmp_path: Path) -> None:
    """In what is converted too: it is named by the parameter that it is of."""
    model, out = made(name), tmp_path / "out"
    succeeds("split", model, "--tp", 2, "-o", out, "--no-fsync", "--checksum", "none")
    damage(out, lambda tensors, stored: tensors[stored].view(-1)[70].mul_(2), leaf)
    found = verified(model, out, "weights,exact")
    assert found.code == 1, found.json["reason"]
    assert [tier["status"] for tier in found.json["tiers"]] == ["fail", "fail"]
    assert "rank 1" in found.json["tiers"][0]["reason"]


def test_rows_in_another_order_are_found(made: Made, tmp_path: Path) -> None:
    """Of q, k and v in one matrix a rank has all that it must, v first."""
    model, out = made("molmo2"), tmp_path / "out"
    succeeds("split", model, "--tp", 2, "-o", out, "--no-fsync", "--checksum", "none")
    damage(out, lambda tensors, name: tensors[name].copy_(tensors[name].roll(8, 0)), "self_attn.att_proj.weight")
    found = verified(model, out, "weights,exact")
    assert found.code == 1 and "self_attn" in found.json["reason"], found.json["reason"]


def damage(out: Path, change: Callable[[dict[str, torch.Tensor], str], object], leaf: str) -> None:
    """Change the last layer's tensor of this name in rank 1's file."""
    from safetensors import safe_open

    file = out / "rank-00001-of-00002.safetensors"
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    tensors = load_file(file)
    change(tensors, max(name for name in tensors if name.endswith(leaf)))
    save_file(tensors, file, said)
