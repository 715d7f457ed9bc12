"""More ranks than KV heads, and not a multiple of them: ranks hold the KV heads of their q heads, some in common."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.command import fails, succeeds, tpshard
from tests.helpers.grids import one_in, some
from tests.helpers.toys import read_all

# Projections one by one, fused by groups and one behind another; norms of each head, of all heads, with a row a head.
DECODER = ("llama-gqa", "qwen3", "falcon-new", "gemma2", "ministral")
CLASSES = ("phi3-gqa-head-dim", "olmo2", "cohere-qk-norm", "stablelm-bias", "mixtral", "gpt_oss", "gemma4_text-shared")
CLASSES += ("minimax_m2", "mimo_v2_flash", "qwen3_next", "llama4_text")
Made = Callable[..., Path]
FIXTURES = Path(__file__).parents[1] / "quantised" / "fixtures"
QUICK = ("llama-gqa", "falcon-new", "olmo2")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", some([*DECODER, *CLASSES], QUICK))
def test_three_ranks_of_two_kv_heads_are_proved(name: str, made: Made) -> None:
    model = made(name)
    succeeds("split", model, "--tp", 3, "--uneven", "-o", "out", "--no-fsync")
    report = succeeds("verify", "out", "--source", model, "--tokens", 2, "--json").json
    assert {tier["name"]: tier["status"] for tier in report["tiers"]} == dict.fromkeys(
        ("bytes", "weights", "exact", "native"), "pass"
    )
    assert {canary["status"] for canary in report["canaries"]} == {"caught"}
    succeeds("merge", "out", "-o", "again", "--no-fsync")
    succeeds("check", "out", "--source", model)
    assert load_file("again/model.safetensors").keys() == load_file(model / "model.safetensors").keys()


def test_transformers_agrees(made: Made) -> None:
    model = made("llama-gqa")
    succeeds("split", model, "--tp", 5, "--shares", "3,2,1,1,1", "-o", "out", "--no-fsync")
    shapes = [load_file(f"out/rank-0000{rank}-of-00005.safetensors") for rank in range(5)]
    assert [held["model.layers.0.self_attn.q_proj.weight"].shape[0] // 8 for held in shapes] == [3, 2, 1, 1, 1]
    assert [held["model.layers.0.self_attn.k_proj.weight"].shape[0] // 8 for held in shapes] == [1, 2, 1, 1, 1]
    again = ("--engine", "transformers", "--reference", "transformers", "--tokens", 2)
    succeeds("verify", "out", "--source", model, *again)


def test_one_head_on_more_ranks_than_another(made: Made) -> None:
    """Ranks 1 and 2 hold KV head 1, and nobody two: no range overlaps in part."""
    model = made("llama-gqa")
    succeeds("split", model, "--tp", 3, "--shares", "2,1,1", "-o", "out", "--no-fsync")
    shapes = [load_file(f"out/rank-0000{rank}-of-00003.safetensors") for rank in range(3)]
    assert [held["model.layers.0.self_attn.k_proj.weight"].shape[0] // 8 for held in shapes] == [1, 1, 1]
    for engine in ("tpshard", "transformers"):
        succeeds("verify", "out", "--source", model, "--engine", engine, "--tier", "weights,exact", "--tokens", 2)
    assert fails(4, "split", model, "--tp", 3, "--shares", "2,1,1", "--format", "dcp", "-o", "x")["hint"]


QUANTISED = [
    ("fp8-block-ue8m0", "1,1,1", "tpshard"),
    ("fp8-block-ue8m0", "1,2,1", "transformers"),
    ("gptq-int4-asym", "1,2,1", "tpshard"),
    ("ct-fp8-channel", "1,1,1", "transformers"),
    ("ct-fp8-static-phi3", "1,2,1", "auto"),
]


@pytest.mark.parametrize(("name", "shares", "engine"), one_in(3, QUANTISED))
def test_a_quantised_model(name: str, shares: str, engine: str) -> None:
    """4 q heads and 2 KV heads: ranks 1 and 2 hold KV head 1, or rank 1 holds both."""
    model = FIXTURES / name
    succeeds("split", model, "--tp", 3, "--shares", shares, "-o", "out", "--no-fsync")
    verdict = succeeds("verify", "out", "--source", model, "--engine", engine, "--tokens", 2, "--json").json
    assert [tier["status"] for tier in verdict["tiers"]] == ["pass"] * 4
    succeeds("merge", "out", "-o", "again", "--no-fsync")
    assert read_all(Path("again")) == read_all(model)


def test_from_one_such_set_to_another(made: Made) -> None:
    model = made("falcon-new")
    succeeds("split", model, "--tp", 3, "--uneven", "-o", "out", "--no-fsync")
    succeeds("reshard", "out", "--tp", 5, "--shares", "3,2,1,1,1", "-o", "other", "--no-fsync")
    succeeds("split", model, "--tp", 5, "--shares", "3,2,1,1,1", "-o", "direct", "--no-fsync")
    files = sorted(path.name for path in Path("direct").iterdir() if path.suffix == ".safetensors")
    assert len(files) == 5
    assert all((Path("other") / name).read_bytes() == (Path("direct") / name).read_bytes() for name in files)


def test_q_heads_without_their_kv_heads_fail(made: Made) -> None:
    """A rule that forgets what q heads are dealt by."""
    rules = succeeds("archs", "show", "falcon").out
    assert 'group = "kv"' in rules
    Path("mine.toml").write_text(re.sub(r'(,\s*)?group = "kv"(\n)?', "", rules))
    model = made("falcon-new")
    succeeds("split", model, "--tp", 2, "--shares", "3,5", "--rules", "mine.toml", "-o", "out", "--no-fsync")
    for tier in ("weights", "exact"):
        verdict = tpshard("verify", "out", "--source", model, "--rules", "mine.toml", "--tier", tier, "--json")
        assert verdict.code == 1 and "q heads without their k and v" in verdict.json["reason"], verdict


@pytest.mark.parametrize(("name", "engine"), [("llama-gqa", "tpshard"), ("olmo2", "transformers")])
def test_a_stale_copy_is_named(name: str, engine: str, made: Made) -> None:
    model, key = made(name), "model.layers.1.self_attn.k_proj.weight"
    succeeds("split", model, "--tp", 3, "--uneven", "-o", "out", "--no-fsync", "--checksum", "none")
    file = Path("out/rank-00001-of-00003.safetensors")
    held = load_file(file)
    held[key][0, 0] += 1  # KV head 0, of which rank 0 has a copy
    with file.open("r+b") as raw:
        length = int.from_bytes(raw.read(8), "little")
        begin = json.loads(raw.read(length))[key]["data_offsets"][0]
        raw.seek(8 + length + begin)
        raw.write(held[key].view(-1)[:1].view(torch.uint8).numpy().tobytes())
    verdict = tpshard("verify", "out", "--source", model, "--engine", engine, "--tier", "weights", "--json")
    assert verdict.code == 1 and key in verdict.json["reason"] and "rank 1" in verdict.json["reason"]
    merged = tpshard("merge", "out", "-o", "again")
    assert merged.code == 1 and key in merged.err


def test_a_plan_says_how_often_each_is_held(made: Made) -> None:
    assert (
        "replicated: 2 kv on 3 ranks, each on 2 ranks in a row"
        in succeeds("plan", made("llama-gqa"), "--tp", 3, "--uneven").out
    )


@pytest.mark.parametrize("target", ["dcp", "dcp-hf"])
def test_torchs_files_cannot_hold_it(target: str, made: Made) -> None:
    error = fails(4, "split", made("llama-gqa"), "--tp", 3, "--uneven", "--format", target, "-o", "out")
    assert "hold every rectangle once" in error["message"]
    assert error["hint"] == "use --format native"
