"""Draft models for vLLM: the layers that predict further tokens, in a set of their own, through the real commands.

What vLLM's own classes hold of each is compared by `make test-engines`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines import engine_models, engine_nested, engine_newest, fp8_blocks
from tests.engines.running import everything
from tests.helpers.command import fails, succeeds, tpshard
from tests.helpers.grids import some
from tpshard.formats.vllm_speculator import FORMAT

Tensors = dict[str, torch.Tensor]
MADE = {name: module for module in (engine_models, engine_nested, engine_newest) for name in module.DRAFTS}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_models.with_draft("deepseek_v3", tmp_path_factory.mktemp("draft") / "source")


@pytest.fixture(scope="module")
def shards(source: Path) -> Path:
    succeeds("split", source, "--tp", 2, "--format", "vllm-speculator", "-o", source.with_name("shards"))
    return source.with_name("shards")


@pytest.mark.parametrize("name", some(MADE, ["hy_v3", "qwen3_5-tied", "kimi_k3"]))
def test_split_and_checked(name: str, tmp_path: Path) -> None:
    source, shards = MADE[name].with_draft(name, tmp_path / "source"), tmp_path / "shards"
    said = succeeds("split", source, "--tp", 2, "--format", "vllm-speculator", "-o", shards).err
    assert f'--speculative-config \'{{"method": "mtp", "model": "{shards}", "num_speculative_tokens": 1}}\'' in said
    succeeds("check", shards, "--source", source)
    drafted = {tensor for tensor, found in everything(source).items() if is_drafted(name, tensor, source)}
    succeeds("merge", shards, "-o", tmp_path / "merged")
    merged = everything(tmp_path / "merged")
    left_out = {tensor for tensor in drafted if name == "hy_v3" and ("shared_head" in tensor or "embed_" in tensor)}
    assert drafted - left_out <= merged.keys()
    whole = everything(source)
    assert all(torch.equal(tensor, whole[each]) for each, tensor in merged.items())


def test_layers_are_refused_without_what_their_class_takes_of_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = engine_newest.with_draft("deepseek_v4", tmp_path / "source")
    tensors = everything(source)
    del tensors["mtp.0.emb.tok_emb.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    error = fails(4, "plan", source, "--tp", 2, "--format", "vllm-speculator")
    assert "takes nothing of the model's" in error["message"] and error["expected"] == "model.embed_tokens"
    succeeds("plan", source, "--tp", 2, "--format", "vllm")


def test_the_types_that_were_compared_in_fp8_are_those_of_the_engines_tests() -> None:
    names = {*fp8_blocks.BLOCKS, *fp8_blocks.DRAFTS} & engine_models.DRAFTS.keys()
    same_tensors = {"kimi_k2", "glm_moe_dsa", "qwen3_5_text", "qwen3_5_moe_text"}
    assert FORMAT.quantised_types == {engine_models.LOADED[name][0] for name in names} | same_tensors


def test_nemotrons_draft_has_no_embedding_and_no_head_in_the_newer_version(tmp_path: Path) -> None:
    source, ends = engine_models.with_draft("nemotron_h", tmp_path / "source"), {}
    for version in ("0.32", "0.33"):
        out = tmp_path / version
        ways = ("--tp", 2, "--format", "vllm-speculator", "--engine-version", version)
        succeeds("split", source, *ways, "-o", out)
        held = load_file(out / "model-rank-0-part-0.safetensors")
        ends[version] = {name for name in held if ".layers." not in name}
    assert ends == {"0.32": {"model.embed_tokens.weight", "lm_head.weight"}, "0.33": set()}


def is_drafted(name: str, tensor: str, source: Path) -> bool:
    config = json.loads((source / "config.json").read_text())
    layers = config.get("text_config", config).get("num_hidden_layers")
    return "mtp" in tensor or f"layers.{layers}." in tensor


def test_the_files_have_the_names_and_shares_of_vllms_class(source: Path, shards: Path) -> None:
    ranks = [load_file(shards / f"model-rank-{rank}-part-0.safetensors") for rank in range(2)]
    whole, block = everything(source), "model.layers.3.mtp_block."
    for rank, held in enumerate(ranks):
        assert {name for name in held if not name.startswith(block)} == {
            "model.embed_tokens.weight",
            *(f"model.layers.3.{each}.weight" for each in ("enorm", "hnorm", "eh_proj")),
            *(f"model.layers.3.shared_head.{each}.weight" for each in ("norm", "head")),
        }
        heads = whole["model.layers.3.self_attn.q_b_proj.weight"].chunk(2)
        assert torch.equal(held[f"{block}self_attn.mla_attn.q_b_proj.weight"], heads[rank])
        rows = whole["model.layers.3.embed_tokens.weight"][512 * rank : 512 * (rank + 1)]
        assert torch.equal(held["model.embed_tokens.weight"][: len(rows)], rows)
        assert not held["model.embed_tokens.weight"][len(rows) :].any()
        assert torch.equal(held["model.layers.3.eh_proj.weight"], whole["model.layers.3.eh_proj.weight"])


def test_a_flipped_byte_is_found(source: Path, shards: Path, tmp_path: Path) -> None:
    succeeds("split", source, "--tp", 2, "--format", "vllm-speculator", "-o", tmp_path / "shards")
    file = tmp_path / "shards" / "model-rank-1-part-0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    result = tpshard("check", tmp_path / "shards", "--source", source, "--json")
    assert result.code == 1
    assert result.json["differences"][0]["tensor"].startswith("model.layers.3.")


def test_resharding_gives_what_a_split_gives(source: Path, shards: Path, tmp_path: Path) -> None:
    succeeds("split", source, "--tp", 4, "--format", "vllm-speculator", "-o", tmp_path / "direct")
    succeeds("split", source, "--tp", 2, "-o", tmp_path / "native")
    for number, origin in enumerate((shards, tmp_path / "native")):
        out = tmp_path / f"again-{number}"
        succeeds("reshard", origin, "--tp", 4, "--format", "vllm-speculator", "-o", out)
        for rank in range(4):
            file = f"model-rank-{rank}-part-0.safetensors"
            assert all(
                torch.equal(tensor, load_file(out / file)[name])
                for name, tensor in load_file(tmp_path / "direct" / file).items()
            )


def test_the_models_own_set_says_what_it_leaves_out(source: Path, tmp_path: Path) -> None:
    planned = succeeds("plan", source, "--tp", 2, "--format", "vllm", "--json").json
    drafted = [name for name in everything(source) if name.startswith("model.layers.3.")]
    (note,) = planned["warnings"]
    assert note.startswith(f"{len(drafted)} tensors predict further tokens") and "vllm-speculator" in note
    succeeds("split", source, "--tp", 2, "--format", "vllm", "-o", tmp_path / "shards")
    merged = succeeds("merge", tmp_path / "shards", "-o", tmp_path / "merged", "--json").json
    (note,) = merged["warnings"]
    assert note.startswith(f"{len(drafted)} tensors of the model are not in this set")
    assert not everything(tmp_path / "merged").keys() & set(drafted)


def test_verify_says_that_it_runs_no_draft_model(source: Path, shards: Path) -> None:
    result = tpshard("verify", shards, "--source", source, "--json")
    found = result.json
    assert (result.code, found["verdict"]) == (8, "inconclusive")
    assert [tier["status"] for tier in found["tiers"]] == ["pass", *["inconclusive"] * 3]
    assert "draft model" in found["tiers"][1]["reason"]


def test_the_plan_counts_the_cache_of_the_draft_alone(source: Path) -> None:
    planned = {
        each: succeeds("plan", source, "--tp", 2, "--format", each, "--json").json["numbers"]["kv_cache"]["layers"]
        for each in ("vllm", "vllm-speculator")
    }
    assert planned == {"vllm": 3, "vllm-speculator": 1}


def test_a_model_without_such_layers_and_stages_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = engine_models.make("glm4_moe", tmp_path / "plain")
    error = fails(4, "plan", plain, "--tp", 2, "--format", "vllm-speculator")
    assert "no layers that predict further tokens" in error["message"]
    error = fails(4, "plan", source, "--tp", 2, "--pp", 2, "--format", "vllm-speculator")
    assert "stages" in error["message"]
