"""Checkpoints of Megatron as `verify` reads them: what Megatron would load is run, what it would load wrongly named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.grids import some
from tests.helpers.transformers_runs import exchange
from tests.megatron.recorded import FOLDER, RECORDED
from tpshard.api import convert as api
from tpshard.api import verify as verifying
from tpshard.errors import CorruptError, UnsafeError
from tpshard.execute.publish import Settings
from tpshard.verifier.ranks.megatron import open_set
from tpshard.verifier.ranks.open import open_source
from tpshard.verifier.ranks.translate import translated

Get = Callable[..., Path]
SETS = [
    ("llama-gqa", 2, 1, 1, "megatron"),
    ("llama-gqa", 4, 1, 1, "megatron"),
    ("gpt2", 2, 1, 1, "megatron"),
    ("mixtral", 2, 1, 1, "megatron"),
    ("deepseek_v3", 2, 1, 1, "megatron"),
    ("llama-gqa", 2, 1, 1, "megatron-legacy"),
    ("llama-gqa", 4, 1, 1, "megatron-legacy"),  # two ranks for each KV group: they gather it before they use it
    ("qwen2-tied", 2, 3, 1, "megatron-legacy"),
    ("gpt2", 2, 2, 1, "megatron-legacy"),
    ("nemotron", 2, 1, 1, "megatron-legacy"),
    ("mixtral", 2, 1, 2, "megatron-legacy"),
    ("qwen2_moe", 2, 1, 1, "megatron-legacy"),
    ("deepseek_v2-lite", 2, 3, 2, "megatron-legacy"),
    ("deepseek_v3", 2, 1, 2, "megatron-legacy"),
]
"""Model, tp, pp, ep, format."""
CHOSEN = [SETS[0], SETS[6], SETS[8]]


def written(made: Get, out: Path, name: str, tp: int, pp: int, ep: int, form: str) -> tuple[Path, Path]:
    api.split(made(name), tp, out, pp=pp, ep=ep, format=form, settings=Settings(fsync=False, workers=1))
    return made(name), out


@pytest.mark.parametrize(("name", "tp", "pp", "ep", "form"), some(SETS, CHOSEN))
def test_a_correct_set_passes(name: str, tp: int, pp: int, ep: int, form: str, made: Get, tmp_path: Path) -> None:
    """torch_dist knows no ranks: one has everything."""
    model, shards = written(made, tmp_path / "set", name, tp, pp, ep, form)
    verdict = verifying.verify(shards, model, tiers=("bytes", "weights", "exact"), device="cpu")
    assert [(tier.name, tier.status) for tier in verdict.tiers] == [(t, "pass") for t in ("bytes", "weights", "exact")]
    assert (verdict.exit_code, verdict.tp, verdict.warnings) == (0, 1 if form == "megatron" else tp, ())
    assert verdict.canaries and all(canary.status == "caught" for canary in verdict.canaries)
    assert ("stages-exchanged" in {canary.name for canary in verdict.canaries}) == (pp > 1)


def require_the_source(shards: Path, model: Path) -> None:
    """Every tensor that one rank has of a set is the source's, bit for bit, and none of them is missing."""
    source = open_source(model)[1]
    (rank,) = translated(open_set(shards), source).ranks
    assert set(rank.names()) == set(source.names())
    for name in source.names():
        found, wanted = rank.get(name), source.get(name)
        rows = len(wanted)  # what pads a vocabulary is nobody's business
        assert found[:rows].contiguous().view(torch.uint8).equal(wanted.view(torch.uint8)), name
        assert found.shape == wanted.shape or "embed" in name or "lm_head" in name


@pytest.mark.parametrize("name", RECORDED)
def test_what_megatron_itself_wrote(name: str, tmp_path: Path) -> None:
    """Without a manifest of ours. Some of its numbers are none, so that nothing could be computed with them."""
    model = RECORDED[name].write(tmp_path / "model")
    shutil.copytree(FOLDER / name, tmp_path / "set")
    shutil.copy(model / "config.json", tmp_path / "set")
    assert open_set(tmp_path / "set").arguments["num_layers"] == 2
    require_the_source(tmp_path / "set", model)


@pytest.mark.parametrize("form", ["megatron", "megatron-legacy"])
@pytest.mark.parametrize("name", ["qwen3", "nemotron", "mixtral", "qwen2_moe", "deepseek_v2-lite", "deepseek_v3"])
def test_every_tensor_has_the_sources_name_and_order(name: str, form: str, made: Get, tmp_path: Path) -> None:
    tp = 2 if form == "megatron" else 1
    model, shards = written(made, tmp_path / "set", name, tp, 1, 1, form)
    require_the_source(shards, model)


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A file of torch.save with something else in it."""
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def reason(shards: Path, model: Path) -> str:
    """Why the weights tier fails."""
    verdict = verifying.verify(shards, model, tiers=("weights",), device="cpu")
    assert verdict.exit_code == 1
    return str(verdict.tiers[0].reason)


def test_an_element_that_is_another(made: Get, tmp_path: Path) -> None:
    model, shards = written(made, tmp_path / "set", "llama-gqa", 2, 1, 1, "megatron-legacy")
    name = "decoder.layers.1.mlp.linear_fc1.weight"

    def change(state: dict[str, Any]) -> None:
        rows = len(state["model"][name])
        state["model"][name][rows // 2, 3] += 1  # the first row of up

    changed(shards / "release/mp_rank_01/model_optim_rng.pt", change)
    found = reason(shards, model)
    assert found.startswith("model.layers.1.mlp.up_proj.weight[0, 3] of rank 1 is")
    assert found.endswith("it is stored in decoder.layers.1.mlp.linear_fc1.weight of mp_rank_01")


def test_a_byte_that_is_another_in_torch_dist(made: Get, tmp_path: Path) -> None:
    model, shards = written(made, tmp_path / "set", "llama-gqa", 2, 1, 1, "megatron")
    piece = open_set(shards).ranks[0].pieces["decoder.layers.2.mlp.linear_fc2.weight"]  # type: ignore[attr-defined]
    info = next(iter(piece.pieces[1].weights.infos.values()))  # the second rank's columns
    with Path(info.file).open("r+b") as file:
        file.seek(info.begin + 1)
        byte = file.read(1)
        file.seek(info.begin + 1)
        file.write(bytes([byte[0] ^ 1]))
    assert reason(shards, model).startswith("model.layers.2.mlp.down_proj.weight[0, 64] of rank 0 is")


def test_ranks_that_are_exchanged(made: Get, tmp_path: Path) -> None:
    model, shards = written(made, tmp_path / "set", "llama-gqa", 2, 1, 1, "megatron-legacy")
    exchange(shards / "release/mp_rank_00/model_optim_rng.pt", shards / "release/mp_rank_01/model_optim_rng.pt")
    assert reason(shards, model) == "the files of ranks 0 and 1 are exchanged"


def test_stages_that_are_exchanged_and_a_stale_copy(made: Get, tmp_path: Path) -> None:
    model, shards = written(made, tmp_path / "set", "qwen2-tied", 1, 3, 1, "megatron-legacy")
    files = [shards / f"release/mp_rank_00_{stage:03}/model_optim_rng.pt" for stage in range(3)]
    changed(files[2], lambda state: state["model"]["output_layer.weight"].add_(1))
    assert "output_layer" in reason(shards, model) or "word_embeddings" in reason(shards, model)
    exchange(files[0], files[1])
    assert reason(shards, model)


@pytest.mark.parametrize("form", ["megatron", "megatron-legacy"])
def test_arguments_of_another_model(form: str, made: Get, tmp_path: Path) -> None:
    model, shards = written(made, tmp_path / "set", "llama-gqa", 1, 1, 1, form)
    path = "release/common.pt" if form == "megatron" else "release/mp_rank_00/model_optim_rng.pt"
    changed(shards / path, lambda state: setattr(state["args"], "rotary_base", 500000))
    assert reason(shards, model) == "Megatron's argument rotary_base is 500000, and the model's is 10000.0"


def test_what_cannot_be_judged_at_all(made: Get, tmp_path: Path) -> None:
    model, shards = written(made, tmp_path / "set", "llama-gqa", 2, 1, 1, "megatron-legacy")
    path = shards / "release/mp_rank_01/model_optim_rng.pt"
    kept = path.read_bytes()
    changed(path, lambda state: state.pop("model"))
    with pytest.raises(CorruptError):
        reason(shards, model)
    path.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(CorruptError):
        reason(shards, model)
    torch.save({"args": print}, path)
    with pytest.raises(UnsafeError):
        reason(shards, model)
    shutil.rmtree(path.parent)
    with pytest.raises(CorruptError, match="ranks are missing"):
        reason(shards, model)
