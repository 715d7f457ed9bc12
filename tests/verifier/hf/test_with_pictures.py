"""Models with a tower, run whole: pictures go through it, and their places have positions in three dimensions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import multimodal_checkpoints as multimodal
from tests.helpers.command import succeeds, tpshard
from tests.helpers.grids import some
from tpshard.verifier.hf import prepare, streamed
from tpshard.verifier.hf.config import model_config
from tpshard.verifier.hf.pictures import Pictures, pictures_for, with_placeholder
from tpshard.verifier.hf.skeleton import fill, frame_of, skeleton
from tpshard.verifier.ranks.open import open_source

Made = Callable[[str], Path]
CPU = torch.device("cpu")
EVERY = (*multimodal.CONFIGS, *multimodal.MORE_CONFIGS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    def get(name: str) -> Path:
        return home / name if (home / name).exists() else multimodal.make(name, home / name)

    home = tmp_path_factory.mktemp("pictures")
    return get


def seen_by(model: Path) -> tuple[Any, Pictures]:
    """The class with all its weights, and the pictures that `verify` gives it."""
    config, source = open_source(model)
    made = model_config(config, whole=True)
    frame = frame_of(with_placeholder(made, 251)).of_source(source)
    whole: Any = skeleton(frame.config, torch.float32, CPU)
    fill(whole, frame, source, torch.float32, CPU)
    with torch.no_grad():
        found = pictures_for(whole, torch.arange(3, 35).view(2, 16), 0, 251)
    assert found is not None
    return whole, found


@pytest.mark.parametrize("name", some(EVERY, ["llava", "qwen2_5_vl"]))
def test_pictures_are_seen(name: str, made: Made) -> None:
    """transformers' own loading of the checkpoint gives the same logits, and others for another picture."""
    from transformers import AutoModelForImageTextToText

    model, found = seen_by(made(name))
    wanted = AutoModelForImageTextToText.from_pretrained(made(name), dtype=torch.float32, attn_implementation="eager")
    for key in ("image_token_id", "image_token_index"):
        if hasattr(wanted.config, key):
            setattr(wanted.config, key, 250)
    pixels = found.of_dtype(torch.float32, CPU)
    with torch.no_grad():
        theirs, ours = (each(input_ids=found.ids, **pixels).logits for each in (wanted, model))
        other = model(input_ids=found.ids, **(pixels | {"pixel_values": -pixels["pixel_values"]})).logits
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5
    assert float((other - ours)[:, -1].norm() / ours[:, -1].norm()) > 1e-4


def test_positions_are_in_three_dimensions(made: Made) -> None:
    """The places of a picture have rows and columns: as text they would give other logits."""
    model, found = seen_by(made("qwen2_5_vl"))
    pixels = found.of_dtype(torch.float32, CPU)
    with torch.no_grad():
        logits = model(input_ids=found.ids, **pixels).logits
        rows, columns = model.model.compute_3d_position_ids(
            found.ids, pixels["image_grid_thw"], None, None, None, None, None, pixels["mm_token_type_ids"]
        )[1:, 0]
        count = torch.arange(found.ids.shape[1]).expand(3, *found.ids.shape)
        as_text = model(input_ids=found.ids, position_ids=count, **pixels).logits
    places = found.ids[0] == 250
    assert len(set(rows[places].tolist())) == 2 and len(set(columns[places].tolist())) == 3
    assert float((logits - as_text)[:, -1].norm() / logits[:, -1].norm()) > 1e-3


def test_the_first_form_of_a_config_is_run_whole(made: Made, tmp_path: Path) -> None:
    """Qwen2.5-VL as first published: the text model's values beside the vision model's."""
    model = Path(shutil.copytree(made("qwen2_5_vl"), tmp_path / "flat"))
    config = json.loads((model / "config.json").read_text())
    text = {key: value for key, value in config.pop("text_config").items() if key not in ("model_type", "dtype")}
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    (model / "config.json").write_text(json.dumps(text | config))
    succeeds("split", model, "--tp", 2, "-o", tmp_path / "out", "--no-fsync")
    given = ("--source", model, "--tier", "exact", "--tokens", 2, "--json")
    found = succeeds("verify", tmp_path / "out", *given).json
    assert (found["settings"]["runs"], found["warnings"]) == ("the whole model", [])


def test_a_rank_with_another_tower_fails(made: Made, tmp_path: Path) -> None:
    """Seen by running it, and named: the text model alone would not."""
    model, out = made("llava"), tmp_path / "out"
    succeeds("split", model, "--tp", 2, "-o", out, "--no-fsync", "--checksum", "none")
    file = out / "rank-00001-of-00002.safetensors"
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    tensors = load_file(file)
    name = next(each for each in tensors if "vision" in each and each.endswith("layers.0.mlp.fc1.weight"))
    tensors[name] = tensors[name].roll(1, 0)
    save_file(tensors, file, said)
    given = ("--source", model, "--tier", "exact", "--tokens", 1, "--json")
    found = tpshard("verify", out, *given)
    assert found.code == 1 and "mlp.fc1" in found.json["reason"], found.json["reason"]


@pytest.mark.parametrize("name", some(EVERY, ["qwen2_5_vl"]))
def test_streamed_it_is_the_same(name: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower's matrices are read one by one as the text model's are: every figure is what it is in memory."""
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 1 << 10)
    model, out = made(name), tmp_path / "out"
    succeeds("split", model, "--tp", 2, "-o", out, "--no-fsync")
    given = ("--source", model, "--engine", "transformers", "--tier", "weights,exact", "--tokens", 1, "--json")
    kept, read = (succeeds("verify", out, *given, how).json for how in ("--no-stream", "--stream"))
    assert (read["settings"]["runs"], read["settings"]["streamed"]) == ("the whole model", True)
    assert {key for key in kept if kept[key] != read[key]} == {"settings", "volatile"}


def test_where_the_whole_cannot_be_run_its_text_is_streamed(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line says why, and the tower is named as not run."""
    model, out = made("llava"), tmp_path / "out"
    succeeds("split", model, "--tp", 2, "-o", out, "--no-fsync")
    monkeypatch.setattr(prepare, "pictures_for", lambda *_: None)
    given = ("--source", model, "--engine", "transformers", "--tier", "weights,exact", "--tokens", 1, "--json")
    found = succeeds("verify", out, *given, "--stream").json
    assert (found["settings"]["runs"], found["settings"]["streamed"]) == ("the text model", True)
    assert "its text model is run alone" in found["warnings"][0]
    assert found["verdict"] == "pass" and "vision_tower" in [each["prefix"] for each in found["not_run"]]
