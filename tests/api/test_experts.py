"""ep between 1 and tp: experts dealt whole to places, and cut for the ranks that share one, through the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import tpshard
from tests.helpers.command import fails, succeeds
from tests.helpers.command import tpshard as command
from tests.helpers.gpt_oss import with_blocks
from tests.helpers.grids import some
from tests.helpers.paths import TESTS
from tests.helpers.toys import read_all

Made = Callable[..., Path]
Mesh = tuple[int, int, int]
QUICK = ("--no-fsync", "-q")
FIXTURES = TESTS / "quantised" / "fixtures"
WEIGHTS = ("--tier", "weights")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def way(mesh: Mesh) -> tuple[object, ...]:
    return "--tp", mesh[0], "--pp", mesh[1], "--ep", mesh[2]


def bytes_of(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def held(rank: int, tp: int, directory: str = "set") -> dict[str, NDArray[np.generic]]:
    return load_file(f"{directory}/rank-{rank:05}-of-{tp:05}.safetensors")


def test_a_place_has_experts_and_its_ranks_a_share_of_each(made: Made) -> None:
    """tp = moe_tp x ep, moe_tp varying fastest: ranks 0 and 1 have experts 0 to 3, a half of each."""
    model = made("mixtral")
    whole = load_file(model / "model.safetensors")
    succeeds("split", model, "--tp", 4, "--ep", 2, "-o", "set", *QUICK)
    for rank in range(4):
        mine, (place, share) = held(rank, 4), divmod(rank, 2)
        numbers = {int(name.split(".experts.")[1].split(".")[0]) for name in mine if ".experts." in name}
        assert numbers == set(range(4 * place, 4 * place + 4))
        for name in (name for name in mine if ".experts." in name):
            rows = slice(48 * share, 48 * share + 48)
            wanted = whole[name][:, rows] if ".w2." in name else whole[name][rows]
            assert np.array_equal(mine[name], wanted), name
        q = "model.layers.0.self_attn.q_proj.weight"
        assert np.array_equal(mine[q], whole[q][16 * rank : 16 * rank + 16]), "attention is cut by tp"
    manifest = json.loads(Path("set/tpshard.json").read_text())
    assert manifest["mesh"] == {"tp": 4, "pp": 1, "ep": 2} and manifest["expert_ranges"] == [[0, 4], [4, 8]]
    assert manifest["axes"].keys() == {"ffn", "heads", "kv", "vocab"}, "axes are the model's"
    assert tpshard.load_rank("set", tp=3).keys() == held(3, 4).keys()
    assert command("inspect", "set", "--json").json["mesh"]["ep"] == 2
    plan = succeeds("plan", model, "--tp", 4, "--ep", 2, "--json").json
    row = next(row for row in plan["tensors"] if row["name"].endswith("experts.5.w1.weight"))
    assert [(each["rank"], each["shape"]) for each in row["ranks"]] == [(2, [48, 64]), (3, [48, 64])]
    assert plan["possible_tp"] == [1, 2, 4, 8], "of what all ranks of a stage cut; with experts apart"
    assert "experts: 0-3, 4-7, each cut for 2 ranks" in succeeds("plan", model, "--tp", 4, "--ep", 2).out


def test_a_stack_is_cut_in_two_dims(made: Made) -> None:
    """And by the weights of the ranks that share experts: 1 to 3 in the first place."""
    model = made("gpt_oss")
    name = "model.layers.1.mlp.experts.down_proj"
    whole = load_file(model / "model.safetensors")
    succeeds("split", model, "--tp", 6, "--ep", 3, "--shares", "1,3,2,2,1,1", "-o", "set", *QUICK)
    ranges, features = [(0, 3), (3, 6), (6, 8)], [(0, 24), (24, 96), *[(0, 48), (48, 96)] * 2]
    for rank, (begin, end) in enumerate(features):
        first, last = ranges[rank // 2]
        assert np.array_equal(held(rank, 6)[name], whole[name][first:last, begin:end])
        assert np.array_equal(held(rank, 6)[f"{name}_bias"], whole[f"{name}_bias"][first:last]), "whole on its ranks"


MESHES: list[Mesh] = [(1, 1, 1), (4, 1, 1), (4, 1, 2), (4, 1, 4), (4, 2, 2), (8, 1, 2), (2, 2, 2)]
PAIRS = [*permutations(MESHES, 2)]


@pytest.mark.parametrize(
    "name", some(("mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe-stacked"), ["mixtral", "gpt_oss"])
)
def test_any_mesh_becomes_any_other(name: str, made: Made) -> None:
    """As a direct split writes it, byte for byte; and merged, the source again."""
    model = made(name)
    for number, mesh in enumerate(MESHES):
        succeeds("split", model, *way(mesh), "-o", f"direct-{number}", *QUICK)
    chosen = [((4, 1, 2), (8, 1, 2)), ((4, 2, 2), (4, 1, 2)), ((4, 1, 1), (4, 2, 2)), ((4, 1, 2), (1, 1, 1))]
    for one, other in some(PAIRS, chosen):
        begin, wanted = MESHES.index(one), MESHES.index(other)
        succeeds("reshard", f"direct-{begin}", *way(other), "-o", "again", "--overwrite", *QUICK)
        assert bytes_of("again") == bytes_of(f"direct-{wanted}"), (one, other)
    succeeds("merge", "direct-4", "-o", "merged", *QUICK)
    assert read_all(Path("merged")) == read_all(model)


PROVED = [
    ("mixtral", way((4, 1, 2))),
    ("mixtral", ("--tp", 6, "--ep", 3, "--uneven")),
    ("mixtral", ("--tp", 4, "--ep", 2, "--shares", "1,3,2,1")),
    ("deepseek_v3", way((4, 2, 2))),
    ("gpt_oss", way((4, 1, 2))),
    ("gpt_oss", ("--tp", 6, "--ep", 3, "--uneven")),
    ("granitemoe", way((4, 1, 2))),
    ("qwen2_moe", way((8, 1, 4))),
    ("qwen3_moe-stacked", way((4, 1, 2))),
    ("llama4_text", way((4, 1, 2))),
    ("llama4_text", way((2, 1, 2))),
]


@pytest.mark.parametrize(("name", "mesh"), some(PROVED, [PROVED[5]]))
def test_it_is_proved(name: str, mesh: tuple[object, ...], made: Made) -> None:
    model = made(name)
    succeeds("split", model, *mesh, "-o", "set", *QUICK)
    result = command("verify", "set", "--source", model, "--json")
    assert result.code == 0, result.json["reason"]
    assert all(tier["status"] == "pass" for tier in result.json["tiers"])
    canaries = {each["name"]: each["status"] for each in result.json["canaries"]}
    if "--shares" not in mesh:  # of which no two ranks have experts of one size that could be exchanged
        assert canaries["experts-of-another-rank"] == "caught"


QUANTISED = ["fp8-block-qwen3-moe", "fp8-block-stacked-experts", "ct-int4-qwen3-moe", "autoround-gptq-qwen3-moe"]
QUANTISED += ["autoround-awq-qwen3-moe", "mxfp4-gpt-oss", "ct-nvfp4-qwen3-moe"]


@pytest.mark.parametrize("name", some(QUANTISED, ["mxfp4-gpt-oss"]))
def test_quantised_experts_are_cut_where_blocks_end(name: str) -> None:
    source = FIXTURES / name
    succeeds("split", source, "--tp", 4, "--ep", 2, "-o", "set", *QUICK)
    result = command("verify", "set", "--source", source, "--json")
    assert result.code == 0, result.json["reason"]
    succeeds("merge", "set", "-o", "merged", *QUICK)
    assert read_all(Path("merged")) == read_all(source)
    succeeds("split", source, "--tp", 2, "--ep", 2, "-o", "whole", *QUICK)
    succeeds("reshard", "whole", "--tp", 4, "--ep", 2, "-o", "again", *QUICK)
    assert bytes_of("again") == bytes_of("set")


@pytest.mark.parametrize("name", some(QUANTISED, ["autoround-gptq-qwen3-moe", "ct-nvfp4-qwen3-moe"]))
def test_whole_quantised_experts_are_proved_in_files_for_vllm(name: str) -> None:
    """tests/engines holds them against vLLM's own loader."""
    source = FIXTURES / name
    succeeds("split", source, "--tp", 2, "--ep", 2, "--format", "vllm", "-o", "set", *QUICK)
    result = command("verify", "set", "--source", source, *WEIGHTS, "--json")
    assert result.code == 0, result.json["reason"]
    apart, whole = result.json["not_run"], command("verify", "set", "--source", source, "--tier", "bytes", "--json")
    assert whole.code == 0
    scales = {key for key in read_all(source) if ".experts." in key and "input_" in key}
    experts = [each for each in apart if each["prefix"].endswith(".experts.*")]
    assert [each["tensors"] for each in experts] == ([len(scales)] if scales else [])
    assert all(each["why"].endswith("compared") for each in experts)


def exchanged(one: tuple[int, str], other: tuple[int, str]) -> None:
    """Give two ranks' tensors each other's contents."""
    for (rank, name), (lender, theirs) in product((one, other), (one, other)):
        if (rank, name) < (lender, theirs):
            mine, lent = held(rank, 4), held(lender, 4) if lender != rank else held(rank, 4)
            mine[name], lent[theirs] = lent[theirs].copy(), mine[name].copy()
            save_file(mine, f"set/rank-{rank:05}-of-00004.safetensors", {"format": "pt"})
            save_file(lent, f"set/rank-{lender:05}-of-00004.safetensors", {"format": "pt"})


AT = "model.layers.1.block_sparse_moe.experts"
FAULTS = {
    "two experts' ranks exchanged": ((1, f"{AT}.2.w1.weight"), (3, f"{AT}.6.w1.weight")),
    "the shares of one expert exchanged": ((2, f"{AT}.5.w2.weight"), (3, f"{AT}.5.w2.weight")),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("tier", ["weights", "exact"])
def test_what_lies_on_another_rank_is_found(fault: str, tier: str, made: Made) -> None:
    model = made("mixtral")
    succeeds("split", model, "--tp", 4, "--ep", 2, "-o", "set", *QUICK, "--checksum", "none")
    exchanged(*FAULTS[fault])
    result = command("verify", "set", "--source", model, "--tier", tier, "--json")
    assert result.code == 1 and "model.layers.1.mlp.experts" in result.json["reason"], result.out


def test_an_expert_of_another_place_is_named(made: Made) -> None:
    model = made("mixtral")
    succeeds("split", model, "--tp", 4, "--ep", 2, "-o", "set", *QUICK, "--checksum", "none")
    for rank, (mine, theirs) in product(range(4), [(3, 4)]):
        tensors = held(rank, 4)
        old, new = (mine, theirs) if rank < 2 else (theirs, mine)
        renamed = {name.replace(f"{AT}.{old}.", f"{AT}.{new}."): tensor for name, tensor in tensors.items()}
        save_file(renamed, f"set/rank-{rank:05}-of-00004.safetensors", {"format": "pt"})
    result = command("verify", "set", "--source", model, *WEIGHTS, "--json")
    assert result.code == 1 and "has other experts of model.layers.1" in result.json["reason"], result.out


def test_what_cannot_be_laid_out_is_refused_with_a_way_out(made: Made) -> None:
    error = fails(4, "plan", made("mixtral"), "--tp", 4, "--ep", 2, "--format", "vllm")
    assert "its ep is its tp" in error["message"] and error["expected"] == "ep 1 or 4"
    blocks = with_blocks(5, Path("blocks").absolute())
    error = fails(4, "plan", blocks, "--tp", 4, "--ep", 2)
    assert "160 ffn of experts on 2 ranks: 32 at a time end where groups or blocks do" in error["message"]
    assert error["expected"] == "ep 4" and "--uneven" in error["hint"]
    assert (
        command("plan", blocks, "--tp", 4, "--ep", 4).code == command("plan", blocks, "--tp", 4, "--uneven").code == 0
    )
    assert command("plan", blocks, "--tp", 4, "--ep", 2, "--uneven").code == 0


def test_a_canary_that_is_missed_leaves_nothing_proved(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verification that would not look at copies says so of itself."""
    model = made("gpt2")
    succeeds("split", model, "--tp", 1, "--pp", 2, "-o", "set", *QUICK)
    result = command("verify", "set", "--source", model, *WEIGHTS, "--json")
    names = {each["name"]: each["status"] for each in result.json["canaries"]}
    assert result.code == 0 and names["tied-copy-stale"] == "caught"
    monkeypatch.setattr("tpshard.verifier.ranks.stages.stale", lambda *_: iter(()))
    result = command("verify", "set", "--source", model, *WEIGHTS, "--json")
    assert result.code == 8 and "tied-copy-stale" in result.json["reason"]
