"""Meshes: split, check, verify, merge and reshard of tp x pp ranks, with experts cut or whole, through the commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import tpshard
from tests.helpers.command import fails, llama, succeeds
from tests.helpers.command import tpshard as command
from tests.helpers.grids import some
from tests.helpers.paths import TESTS
from tests.helpers.quantised import make as quantised
from tests.helpers.toys import read_all
from tpshard.errors import UsageError
from tpshard.execute.publish import Settings
from tpshard.planning.experts import Experts

Made = Callable[..., Path]
QUICK = ("--no-fsync", "-q")
FAMILIES = ["llama-gqa", "gpt2", "opt-project-prenorm", "bloom", "gpt_neox", "mixtral", "deepseek_v3", "qwen3_next"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", some(FAMILIES, ["llama-gqa", "gpt2", "deepseek_v3"]))
def test_what_is_split_is_proved_and_merged(name: str, made: Made) -> None:
    """And any mesh is resharded into any other, byte for byte what a direct split writes."""
    model = made(name)
    succeeds("split", model, "--tp", 2, "--pp", 2, "-o", "set", *QUICK)
    assert len(list(Path("set").glob("rank-*.safetensors"))) == 4
    succeeds("check", "set", "--source", model)
    result = command("verify", "set", "--source", model, "--json")
    assert result.code == 0, result.json["reason"]
    assert result.json["settings"]["pp"] == 2
    stages = {each["name"]: each["status"] for each in result.json["canaries"] if "stage" in each["name"]}
    assert stages == {"stages-exchanged": "caught", "layer-on-another-stage": "caught"}
    succeeds("merge", "set", "-o", "merged", *QUICK)
    assert read_all(Path("merged")) == read_all(model)
    ways: list[tuple[object, ...]] = [("--tp", 1), ("--tp", 1, "--pp", 2), ("--tp", 2, "--pp", 2)]
    for number, way in enumerate(ways):
        succeeds("split", model, *way, "-o", f"direct-{number}", *QUICK)
        succeeds("reshard", "set", *way, "-o", f"again-{number}", *QUICK)
        assert bytes_of(Path(f"again-{number}")) == bytes_of(Path(f"direct-{number}"))
    succeeds("reshard", "direct-0", "--tp", 2, "--pp", 2, "-o", "from-one", *QUICK)
    assert bytes_of(Path("from-one")) == bytes_of(Path("set"))


def test_each_stage_has_its_layers_and_what_stands_before_and_behind_them(made: Made) -> None:
    model = made("llama-gqa")
    succeeds("split", model, "--tp", 1, "--pp", 2, "--pp-layers", "1,2", "-o", "set", *QUICK)
    first, last = (load_file(f"set/rank-00000-of-00001-stage-0000{stage}-of-00002.safetensors") for stage in (0, 1))
    assert {name.split(".")[2] for name in first if ".layers." in name} == {"0"}
    assert {name.split(".")[2] for name in last if ".layers." in name} == {"1", "2"}
    assert {name for name in first if ".layers." not in name} == {"model.embed_tokens.weight"}
    assert {name for name in last if ".layers." not in name} == {"model.norm.weight", "lm_head.weight"}
    manifest = json.loads(Path("set/tpshard.json").read_text())
    assert manifest["mesh"] == {"tp": 1, "pp": 2, "ep": 1} and manifest["stages"] == [[0, 1], [1, 3]]
    assert manifest["options"]["pp_layers"] == [1, 2]
    plan = succeeds("plan", model, "--tp", 2, "--pp", 2, "--json").json
    assert plan["stages"] == [[0, 2], [2, 3]]
    ranks = {row["name"]: [each["rank"] for each in row["ranks"]] for row in plan["tensors"]}
    assert ranks["model.embed_tokens.weight"] == ranks["model.layers.1.mlp.up_proj.weight"] == [0, 1]
    assert ranks["model.layers.2.mlp.up_proj.weight"] == ranks["lm_head.weight"] == [2, 3]
    cached = [each["kv_cache"] for each in plan["numbers"]["ranks"]]
    assert cached[0] == cached[1] == 2 * cached[2] == 2 * cached[3] > 0
    assert [each["bytes"] for each in plan["ranks"]] == [
        sum(t.nbytes for t in tpshard.load_rank(tpshard_set(model), rank).values()) for rank in range(4)
    ]
    assert "stages: layers 0-1, 2, each on 2 ranks" in succeeds("plan", model, "--tp", 2, "--pp", 2).out


def tpshard_set(model: Path) -> Path:
    """The set of that plan, written once."""
    if not Path("two").exists():
        succeeds("split", model, "--tp", 2, "--pp", 2, "-o", "two", *QUICK)
    return Path("two")


def test_a_rank_is_loaded_by_its_number_or_its_coordinate(made: Made) -> None:
    found = tpshard_set(made("llama-gqa"))
    by_number, by_place = tpshard.load_rank(found, 3), tpshard.load_rank(found, pp=1, tp=1)
    assert by_number.keys() == by_place.keys() and "lm_head.weight" in by_place
    assert all(bool((by_number[name] == by_place[name]).all()) for name in by_number)
    for wrong in ({"rank": 4}, {"pp": 2}, {"pp": 1, "tp": 2}, {}, {"rank": 0, "pp": 0}):
        with pytest.raises(UsageError):
            tpshard.load_rank(found, **wrong)  # type: ignore[arg-type]


def test_a_tied_embedding_is_on_both_ends_and_a_stale_copy_is_found(made: Made) -> None:
    model = made("llama-tied")
    succeeds("split", model, "--tp", 1, "--pp", 3, "-o", "set", *QUICK, "--checksum", "none")
    files = [Path(f"set/rank-00000-of-00001-stage-0000{stage}-of-00003.safetensors") for stage in range(3)]
    names = [name for name in load_file(files[0]) if name.endswith("embed_tokens.weight")]
    assert [names[0] in load_file(file) for file in files] == [True, False, True]
    data = bytearray(files[2].read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    data[8 + int.from_bytes(data[:8], "little") + header[names[0]]["data_offsets"][0]] ^= 1
    files[2].write_bytes(data)
    result = command("merge", "set", "-o", "merged", *QUICK)
    assert result.code == 1 and names[0] in result.err
    result = command("verify", "set", "--source", model, "--tier", "weights", "--json")
    assert result.code == 1
    assert f"{names[0]} is not the same on the stages that have it" in result.json["reason"]
    assert command("check", "set", "--source", model).code == 1


def moved(name: str, first: Path, second: Path) -> None:
    """Take a tensor out of one file and put it into another one."""
    one, other = load_file(first), load_file(second)
    other[name] = one.pop(name)
    for path, tensors in ((first, one), (second, other)):
        data = path.read_bytes()
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        save_file(tensors, path, {key: value for key, value in metadata.items() if "DCP" not in key})


@pytest.mark.parametrize("damage", ["layer", "norm", "stages"])
def test_what_lies_on_another_stage_is_named(damage: str, made: Made) -> None:
    model = made("llama-gqa")
    succeeds("split", model, "--tp", 1, "--pp", 3, "-o", "set", *QUICK, "--checksum", "none")
    files = [Path(f"set/rank-00000-of-00001-stage-0000{stage}-of-00003.safetensors") for stage in range(3)]
    if damage == "stages":
        shutil.move(files[0], "aside")
        shutil.move(files[1], files[0])
        shutil.move("aside", files[1])
        says = "layer 0 is on stage 1, and its place is stage 0"
    elif damage == "layer":
        for name in [name for name in load_file(files[0]) if ".layers.0." in name]:
            moved(name, files[0], files[1])
        says = "layer 0 is on stage 1, and its place is stage 0"
    else:
        moved("lm_head.weight", files[2], files[0])
        says = "lm_head.weight is on stage 0, and its place is stage 2"
    result = command("verify", "set", "--source", model, "--tier", "weights", "--json")
    assert result.code == 1 and says in result.json["reason"], result.out
    assert command("check", "set", "--source", model).code in (1, 3)


def test_quantised_weights_keep_their_blocks() -> None:
    model = quantised(Path("model"), "fp8 blocks", parts=1)
    succeeds("split", model, "--tp", 2, "--pp", 2, "-o", "set", *QUICK)
    succeeds("check", "set", "--source", model)
    succeeds("merge", "set", "-o", "merged", *QUICK)
    assert read_all(Path("merged")) == read_all(model)


def test_hosts_write_their_own_stages(made: Made) -> None:
    model = made("llama-gqa")
    for ranks in ("2-3", "0,1"):
        succeeds("split", model, "--tp", 2, "--pp", 2, "-o", "shared", "--ranks", ranks, *QUICK)
    whole, shared = bytes_of(tpshard_set(model)), bytes_of(Path("shared"))
    assert {name: data for name, data in whole.items() if name != "SHA256SUMS"} == {
        name: data for name, data in shared.items() if name != "SHA256SUMS"
    }
    Path("shared/rank-00001-of-00002-stage-00001-of-00002.safetensors").unlink()
    assert "rank 3 missing" in command("check", "shared").err


def test_what_is_no_pipeline_is_refused(made: Made) -> None:
    model = made("llama-gqa")
    assert fails(4, "plan", model, "--tp", 1, "--pp", 4)["expected"] == "pp of at most 3"
    assert fails(2, "plan", model, "--tp", 1, "--pp", 2, "--pp-layers", "1,1")["hint"] == "for example --pp-layers 2,1"
    assert "one number for each stage" in fails(2, "plan", model, "--tp", 1, "--pp", 3, "--pp-layers", "1,2")["message"]
    fails(2, "plan", model, "--tp", 1, "--pp", 2, "--pp-layers", "1,x")
    fails(2, "plan", model, "--tp", 1, "--pp", 0)
    for format in ("sglang", "meta", "dcp", "dcp-hf", "hf"):
        assert fails(4, "plan", model, "--tp", 1, "--pp", 2, "--format", format)["hint"] == "use --format native"
    fails(2, "split", model, "--tp", 2, "--pp", 2, "--ranks", "4", "-o", "set")


def test_a_set_from_before_pipelines_is_read_and_says_why_it_has_no_stages() -> None:
    """One that `split` of commit 6f4d760 wrote of the tests' LLaMA at tp 2: its manifest says nothing of layers."""
    shutil.copytree(TESTS / "inputs" / "sets" / "before-pipelines", "set")
    model = llama(Path("model"))
    assert "layers" not in json.loads(Path("set/tpshard.json").read_text())
    succeeds("check", "set", "--source", model)
    succeeds("merge", "set", "-o", "merged", *QUICK)
    assert read_all(Path("merged")) == read_all(model)
    succeeds("reshard", "set", "--tp", 1, "-o", "one", *QUICK)
    error = fails(4, "reshard", "set", "--tp", 1, "--pp", 2, "-o", "stages")
    assert "nothing says which modules come before the layers" in error["message"]


@pytest.mark.parametrize("name", some(["llama-tied", "llama-gqa", "qwen3", "gemma2"], ["llama-tied", "gemma2"]))
def test_vllms_files_of_stages(name: str, made: Made) -> None:
    """What is in them `make test-engines` compares with vLLM's own classes."""
    model = made(name)
    tied = json.loads((model / "config.json").read_text())["tie_word_embeddings"]
    succeeds("split", model, "--tp", 2, "--pp", 2, "--format", "vllm", "-o", "set", *QUICK)
    files = {stage: load_file(f"set/model-pp-{stage}-tp-0-part-0.safetensors") for stage in (0, 1)}
    layers = [{key.split(".")[2] for key in held if ".layers." in key} for held in files.values()]
    assert layers == [{"0", "1"}, {"2"}] if len(layers[0]) > 1 else [{"0"}, {"1"}]
    assert ("lm_head.weight" in files[1]) == (name != "gemma2") and "lm_head.weight" not in files[0]
    assert "model.embed_tokens.weight" in files[0]
    assert ("model.embed_tokens.weight" in files[1]) == (name == "gemma2"), "a tied head has its own name"
    assert [("model.norm.weight" in held) for held in files.values()] == [name == "gemma2", True]
    assert json.loads(Path("set/config.json").read_text())["tie_word_embeddings"] == tied
    succeeds("check", "set", "--source", model)
    result = command("verify", "set", "--source", model, "--json")
    assert result.code == 0, result.json["reason"]
    succeeds("merge", "set", "-o", "merged", *QUICK)
    assert read_all(Path("merged")) == read_all(model)
    succeeds("split", model, "--tp", 1, "--pp", 2, "-o", "native", *QUICK)
    succeeds("reshard", "set", "--tp", 1, "--pp", 2, "-o", "again", *QUICK)
    assert bytes_of(Path("again")) == bytes_of(Path("native"))


def test_vllm_is_told_of_stages_that_it_would_make_otherwise(made: Made) -> None:
    model = made("llama-gqa")
    usual = succeeds("plan", model, "--tp", 1, "--pp", 2, "--pp-layers", "2,1", "--format", "vllm", "--json").json
    assert usual["warnings"] == []
    says = "vLLM deals layers otherwise by itself: set VLLM_PP_LAYER_PARTITION=1,2 wherever it starts"
    way = ("--tp", 1, "--pp", 2, "--pp-layers", "1,2", "--format", "vllm", "--json")
    assert succeeds("plan", model, *way).json["warnings"] == [says]
    assert succeeds("split", model, *way, "-o", "set", "--no-fsync").json["warnings"] == [says]


def test_what_vllm_holds_on_stages_is_not_guessed(made: Made) -> None:
    error = fails(4, "plan", made("gpt2"), "--tp", 1, "--pp", 2, "--format", "vllm")
    assert "what vLLM holds of gpt2 on each stage of a pipeline is not known" in error["message"]


def whole_experts(model: Path, tp: int) -> dict[int, set[str]]:
    """The experts of each rank's file, of which each has all of some."""
    found: dict[int, set[str]] = {}
    shapes = {name: tensor.shape for name, tensor in read_all(model).items()}
    for rank in range(tp):
        held = load_file(f"set/rank-{rank:05}-of-{tp:05}.safetensors")
        experts = {name for name in held if ".experts." in name}
        assert all(held[name].shape == tuple(shapes[name]) for name in experts)
        found[rank] = {name.partition(".experts.")[2].partition(".")[0] for name in experts}
    return found


def test_experts_are_dealt_whole(made: Made) -> None:
    """8 experts on 3 ranks: the first two have one more, as vLLM places them."""
    model = made("mixtral")
    succeeds("split", model, "--tp", 2, "--ep", 2, "-o", "set", *QUICK)
    assert whole_experts(model, 2) == {0: {"0", "1", "2", "3"}, 1: {"4", "5", "6", "7"}}
    manifest = json.loads(Path("set/tpshard.json").read_text())
    assert manifest["mesh"]["ep"] == 2 and manifest["expert_ranges"] == [[0, 4], [4, 8]]
    rows = {row["name"]: row for row in manifest["tensors"]}
    assert rows["model.layers.0.block_sparse_moe.experts.5.w1.weight"]["ranks"][0] is None
    plan = succeeds("plan", model, "--tp", 2, "--ep", 2, "--json").json
    assert plan["expert_ranges"] == [[0, 4], [4, 8]]
    row = next(row for row in plan["tensors"] if row["name"].endswith("experts.5.w1.weight"))
    assert [(each["rank"], each["shape"]) for each in row["ranks"]] == [(1, row["shape"])]
    assert "experts: 0-3, 4-7, whole on each rank" in succeeds("plan", model, "--tp", 2, "--ep", 2).out
    assert Experts(8, (), ()).ranges(3) == ((0, 3), (3, 6), (6, 8))


@pytest.mark.parametrize(
    ("name", "format"),
    some(
        product(("mixtral", "deepseek_v3", "gpt_oss"), ("native", "vllm")),
        [("deepseek_v3", "native"), ("gpt_oss", "vllm")],
    ),
)
def test_whole_experts_are_proved_and_merged(name: str, format: str, made: Made) -> None:
    """One by one and stacked; on one stage and on two. Any mesh becomes any other, as a direct split writes it."""
    model = made(name)
    for pp in (1, 2):
        out = f"set-{pp}"
        tpshard.split(model, 2, out, ep=2, pp=pp, format=format, settings=Settings(fsync=False))
        succeeds("check", out, "--source", model)
        result = command("verify", out, "--source", model, "--json")
        assert result.code == 0, result.json["reason"]
        succeeds("merge", out, "-o", f"merged-{pp}", *QUICK)
        assert read_all(Path(f"merged-{pp}")) == read_all(model)
        succeeds("reshard", out, "--tp", 2, "-o", f"cut-{pp}", *QUICK)
        assert tpshard.load_rank(f"cut-{pp}", 0).keys() == tpshard.load_rank(f"cut-{pp}", 1).keys()
    assert bytes_of(Path("cut-1")) == bytes_of(Path("cut-2"))
    succeeds("reshard", "cut-1", "--tp", 2, "--ep", 2, "--format", format, "-o", "whole", *QUICK)
    assert bytes_of(Path("whole")) == bytes_of(Path("set-1"))


def test_experts_of_another_rank_are_found(made: Made) -> None:
    """Two experts exchanged between two ranks: each has as many as it must, of another's."""
    model = made("mixtral")
    succeeds("split", model, "--tp", 2, "--ep", 2, "-o", "set", *QUICK, "--checksum", "none")
    files = [Path(f"set/rank-0000{rank}-of-00002.safetensors") for rank in (0, 1)]
    for name in [name for name in load_file(files[0]) if ".layers.1." in name and ".experts.3." in name]:
        moved(name, files[0], files[1])
        moved(name.replace(".experts.3.", ".experts.4."), files[1], files[0])
    result = command("verify", "set", "--source", model, "--tier", "weights", "--json")
    assert result.code == 1 and "has other experts of model.layers.1" in result.json["reason"], result.out
    assert command("check", "set", "--source", model).code in (1, 3)


def test_what_is_no_place_for_experts_is_refused(made: Made) -> None:
    assert fails(2, "plan", made("mixtral"), "--tp", 4, "--ep", 3)["expected"] == "ep 1, 2 or 4"
    assert fails(4, "plan", made("mixtral"), "--tp", 4, "--ep", 2, "--format", "vllm")["hint"].startswith(
        "use --ep 4 or 1"
    )
    assert "no routed experts" in fails(4, "plan", made("llama-gqa"), "--tp", 2, "--ep", 2)["message"]
    for format in ("sglang", "dcp", "deepseek"):
        error = fails(4, "plan", made("mixtral"), "--tp", 2, "--ep", 2, "--format", format)
        assert error["hint"] == "use --format native"
