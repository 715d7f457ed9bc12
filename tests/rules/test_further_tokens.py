"""Layers that predict further tokens and have heads of their own, through the real commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engines.engine_newest import with_draft
from tests.helpers.command import fails, succeeds, tpshard
from tests.helpers.toys import read_all

KV_HEADS = {"0": 4, "1": 8}
"""By layer: the first attends to all tokens, the second to a window. Of the model's layers it is the other way."""

TENSORS = 2 * 20 + 1


def held(name: str, whole: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """What a rank has of Inkling's layers, by hand."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    if module in ("wk_dv", "wv_dv", "k_sconv", "v_sconv"):
        kv = KV_HEADS[name.split(".")[3]]
        return whole.chunk(min(kv, tp))[rank * kv // tp if tp > kv else rank]
    if module in ("wq_du", "wr_du", "w13_dn"):
        return whole.chunk(tp)[rank]
    return whole.chunk(tp, 1)[rank] if module in ("wo_ud", "w2_md") else whole


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_each_rank_has_its_own_heads_and_all_comes_back(tp: int, tmp_path: Path) -> None:
    source, out = with_draft("inkling_mm_model", tmp_path / "source"), tmp_path / "out"
    succeeds("split", source, "--tp", tp, "-o", out, "--no-fsync")
    succeeds("check", out, "--source", source)
    succeeds("merge", out, "-o", tmp_path / "merged", "--no-fsync")
    assert read_all(tmp_path / "merged") == read_all(source)
    whole = {name: x for name, x in load_file(source / "model.safetensors").items() if name.startswith("model.mtp.")}
    assert len(whole) == TENSORS
    for rank in range(tp):
        own = load_file(out / f"rank-{rank:05}-of-{tp:05}.safetensors")
        assert {name for name in own if name.startswith("model.mtp.")} == whole.keys()
        assert not [name for name, x in whole.items() if not torch.equal(own[name], held(name, x, rank, tp))]


def test_what_is_cut_and_not_run_is_named_until_it_is_accepted(tmp_path: Path) -> None:
    source, out = with_draft("inkling_mm_model", tmp_path / "source"), tmp_path / "out"
    succeeds("split", source, "--tp", 2, "-o", out, "--no-fsync")
    given = ("verify", out, "--source", source, "--tier", "weights,exact", "--tokens", 1, "--json")
    found = tpshard(*given)
    assert found.json["verdict"] == "inconclusive" and "model.mtp" in found.json["reason"]
    found = succeeds(*given, "--allow-not-run", "model.mtp")
    assert found.json["verdict"] == "pass"
    assert sum(each["tensors"] for each in found.json["not_run"] if each["prefix"] == "model.mtp") == TENSORS


def test_the_config_may_say_in_either_place_which_attend_to_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published ones do beside the text's, transformers in it; where neither does, all attend to all tokens."""
    monkeypatch.chdir(tmp_path)
    plans = []
    for number, text in enumerate(({}, {"mtp_config": None, "text_config": {"mtp_local_layer_ids": [1]}})):
        source = with_draft("inkling_mm_model", tmp_path / str(number), text)
        assert ("mtp_config" in json.loads((source / "config.json").read_text())) == (not number)
        plans.append(succeeds("plan", source, "--tp", 2, "--json").json["tensors"])
    assert plans[0] == plans[1]
    source = with_draft("inkling_mm_model", tmp_path / "silent", {"mtp_config": None})
    message = fails(3, "plan", source, "--tp", 2)["message"]
    assert "config.json contradicts the tensor model.mtp.layers.1.transformer_block.attn." in message


def test_they_are_on_the_last_stage_and_decoding_does_not_need_them(tmp_path: Path) -> None:
    source = with_draft("inkling_mm_model", tmp_path / "source")
    plan = succeeds("plan", source, "--tp", 2, "--pp", 2, "--json").json
    rows = [each for each in plan["tensors"] if each["name"].startswith("model.mtp.")]
    assert [[held["rank"] for held in each["ranks"]] for each in rows] == [[2, 3]] * TENSORS
    assert succeeds("plan", source, "--tp", 2, "--json").json["numbers"]["communication"]["all_reduces"] == 2 * 2
