"""`--format vllm` of quantised models: what vLLM's own loader was seen to hold, the way back, config.json, refusals.

`vllm_quantised.json` is what vLLM held on rank 1 of 2 after loading the unsharded checkpoint: dtype and shape of the
parameters outside of layers and of the first one. `make test-engines` compares it, and all bits of all fixtures.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.engines import fp8_blocks
from tests.helpers.command import fails, succeeds, tpshard
from tests.helpers.gpt_oss import with_blocks
from tests.helpers.quantised import FORMATS, SMALL, quantised_tensors
from tests.helpers.toys import read, read_all, write_checkpoint
from tests.quantised.fixture_table import FIXTURES
from tpshard import load_rank

TABLE: dict[str, dict[str, str]] = json.loads((Path(__file__).parent / "vllm_quantised.json").read_text())
CAST = {("BF16", "F32"), ("F32", "BF16"), ("F16", "BF16")}
"""Ours and vLLM's, of scales: the files have the checkpoint's dtype, and vLLM's loader casts."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def split(name: str, *options: object) -> dict[str, Any]:
    succeeds("split", FIXTURES / name, "--tp", 2, "--format", "vllm", "-o", "out", "--no-fsync", *options)
    return {name: each for name, each in read(Path("out/model-rank-1-part-0.safetensors")).items()}


@pytest.mark.parametrize("name", TABLE)
def test_names_shapes_and_dtypes_are_vllms(name: str) -> None:
    ours = {key: each for key, each in split(name).items() if ".layers.1." not in key}
    theirs = {key: (*each.split(), "")[:2] for key, each in TABLE[name].items()}
    assert {key: "×".join(map(str, each.shape)) for key, each in ours.items()} == {k: s for k, (_, s) in theirs.items()}
    other = {key: (each.dtype, theirs[key][0]) for key, each in ours.items() if each.dtype != theirs[key][0]}
    assert all("scale" in key and dtypes in CAST for key, dtypes in other.items()), other


def test_what_was_not_compared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself does not load Phi-MoE in FP8, of which it calls the router otherwise than the list of what is not."""
    wide = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256, "hidden_size": 512}
    monkeypatch.setitem(fp8_blocks.BLOCKS, "phimoe", (wide, r"block_sparse_moe\.(gate|router)\."))
    for name, said in (("phimoe", True), ("qwen2", False)):
        fp8_blocks.make(name, Path(name))
        notes = succeeds("plan", name, "--tp", 2, "--format", "vllm").err
        assert ("holds of a quantised phimoe was not compared" in notes) == said, notes


@pytest.mark.parametrize("name", ["ct-fp8-static-phi3", "modelopt-nvfp4-qwen3-moe"])
def test_and_back(name: str) -> None:
    split(name)
    succeeds("check", "out", "--source", FIXTURES / name)
    succeeds("merge", "out", "-o", "whole")
    assert read_all(Path("whole")) == read_all(FIXTURES / name)
    succeeds("reshard", "out", "--tp", 1, "--format", "native", "-o", "one")
    succeeds("check", "one", "--source", FIXTURES / name)


@pytest.mark.parametrize(
    ("name", "scaled"), [("lfm2", ()), ("glm_moe_dsa", ()), ("qwen3_5_text", ("model.layers.1.self_attn.attn",))]
)
def test_scales_of_a_method_are_where_the_class_has_them(name: str, scaled: Sequence[str]) -> None:
    source = fp8_blocks.make(name, Path("source"))
    succeeds("split", source, "--tp", 2, "--format", "vllm", "-o", "out", "--no-fsync")
    held = read(Path("out/model-rank-1-part-0.safetensors"))
    assert [key for key in held if key.endswith(".k_scale")] == [f"{module}.k_scale" for module in scaled]
    assert [key for key in held if key.endswith("._k_scale")]
    succeeds("check", "out", "--source", source)
    succeeds("merge", "out", "-o", "whole", "--no-fsync")
    assert read_all(Path("whole")) == read_all(source)
    succeeds("verify", "out", "--source", source, "--tier", "weights")


@pytest.mark.parametrize(("name", "suffix"), [("gptq-int4", "g_idx"), ("ct-int8-static", "input_zero_point")])
def test_what_vllm_has_no_place_for_lies_beside_its_files(name: str, suffix: str) -> None:
    split(name)
    beside = read(Path("out/source-rank-0-part-1.safetensors"))
    assert any(key.endswith(f"q_proj.{suffix}") for key in beside) and len(list(Path("out").glob("source-*"))) == 1
    assert not beside.keys() & load_rank("out", 0).keys()
    succeeds("check", "out", "--source", FIXTURES / name)
    succeeds("merge", "out", "-o", "whole")
    assert read_all(Path("whole")) == read_all(FIXTURES / name)


@pytest.mark.parametrize(
    ("name", "key", "module", "other"),
    [
        (
            "gptq-dynamic",
            "modules_in_block_to_quantize",
            "model.layers.0.mlp.down_proj",
            "model.layers.0.self_attn.o_proj",
        ),
        ("fp8-block-qwen3-moe", "modules_to_not_convert", "model.layers.0.mlp.gate", "model.layers.0.self_attn.o_proj"),
    ],
)
def test_the_config_names_modules_that_fused_files_do_not(name: str, key: str, module: str, other: str) -> None:
    split(name)
    listed = json.loads(Path("out/config.json").read_text())["quantization_config"][key]
    assert module in listed and other not in listed
    succeeds("check", "out", "--source", FIXTURES / name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gptq-int4-desc-act", "desc_act true"),
        ("gptq-int4-asym", "sym false"),
        ("ct-int4-g-idx", "actorder"),
        ("modelopt-w4a8-awq", "quant_algo"),
        ("modelopt-fp8-pb-wo", "blocks of 128"),
        ("fbgemm-fp8", "fbgemm_fp8"),
        ("autoround-mixed-bits", "auto-round"),
        ("fp4-experts-deepseek", "scale"),
    ],
)
def test_what_vllm_does_not_load(name: str, reason: str) -> None:
    error = fails(4, "split", FIXTURES / name, "--tp", 2, "--format", "vllm", "-o", "out")
    assert reason in error["message"] and "native" in error["hint"]
    assert not Path("out").exists()


def test_blocks_that_do_not_divide() -> None:
    """gpt-oss has 90 of them, at tp 4 and 8: vLLM gives each rank as many, rounded up, and the last one the rest."""
    model = with_blocks(5, Path("model"))
    error = fails(4, "split", model, "--tp", 2, "-o", "native")
    assert "160 ffn on 2 ranks" in error["message"] and "--uneven" in error["hint"]
    assert succeeds("plan", model, "--tp", 2, "--format", "vllm", "--json").json["possible_tp"] == [1, 2]
    succeeds("split", model, "--tp", 2, "--format", "vllm", "-o", "out", "--no-fsync")
    experts = "model.layers.0.mlp.experts"
    source = {
        name.removeprefix(f"{experts}."): tensor.flatten(3) if name.endswith("_blocks") else tensor
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    for rank, (first, last) in enumerate([(0, 3), (3, 5)]):
        shard = load_file(f"out/model-rank-{rank}-part-0.safetensors")
        held = {name.rpartition(".")[2]: tensor for name, tensor in shard.items() if name.startswith(experts)}
        rows, columns = slice(64 * first, 64 * last), slice(first, last)
        wanted = {
            "w13_weight": source["gate_up_proj_blocks"][:, rows].flatten(2),
            "w13_weight_scale": source["gate_up_proj_scales"][:, rows],
            "w13_bias": source["gate_up_proj_bias"][:, rows],
            "w2_weight": source["down_proj_blocks"][:, :, columns].flatten(2),
            "w2_weight_scale": source["down_proj_scales"][:, :, columns],
            "w2_bias": source["down_proj_bias"] * (rank == 0),
        }
        assert held.keys() == wanted.keys()
        assert all(torch.equal(held[name], tensor) for name, tensor in wanted.items())
    succeeds("check", "out", "--source", model)
    succeeds("merge", "out", "-o", "whole")
    assert read_all(Path("whole")) == read_all(model)


def test_matrices_that_meet_inside_a_block() -> None:
    """Whole at tp 1, gate ends inside a block of 16 rows; vLLM has one grid for gate and up."""
    said, shapes = FORMATS["fp8 blocks"]
    config = SMALL | {"intermediate_size": 120, "torch_dtype": "bfloat16", "quantization_config": said}
    tensors = quantised_tensors(shapes, intermediate_size=120)
    model = write_checkpoint(Path("model"), config, tensors, [list(tensors)])
    succeeds("split", model, "--tp", 1, "-o", "native")
    error = fails(4, "split", model, "--tp", 1, "--format", "vllm", "-o", "out")
    assert error["tensor"].endswith("gate_proj.weight") and error["found"] == "120"


def test_a_method_that_vllm_would_not_see() -> None:
    """vLLM reads GPTQ's settings from config.json, and nothing of quantize_config.json."""
    shutil.copytree(FIXTURES / "gptq-int4", "model")
    config = json.loads(Path("model/config.json").read_text())
    del config["quantization_config"]
    Path("model/config.json").write_text(json.dumps(config))
    succeeds("plan", "model", "--tp", 2)
    error = fails(4, "split", "model", "--tp", 2, "--format", "vllm", "-o", "out")
    assert error["found"] == "none" and "config.json" in error["hint"]


@pytest.mark.parametrize("name", fp8_blocks.INDEXED)
def test_the_keys_of_an_index_are_multiplied_by_their_scales(name: str) -> None:
    source = load_file(fp8_blocks.indexed(name, Path("index")) / "model.safetensors")
    succeeds("split", "index", "--tp", 2, "--format", "vllm", "-o", "out")
    index = "model.layers.1.self_attn.indexer."
    scales = source[f"{index}wk.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    keys = (source[f"{index}wk.weight"].float() * scales).bfloat16()
    expected = torch.cat((keys, source[f"{index}weights_proj.weight"]))
    for rank in (0, 1):
        held = load_file(f"out/model-rank-{rank}-part-0.safetensors")
        assert torch.equal(held[f"{index}wk_weights_proj.weight"], expected)
        assert not any("indexer.wk." in name for name in held)
    beside = load_file("out/source-rank-0-part-1.safetensors")
    assert {name.rpartition("indexer.")[2] for name in beside} >= {"wk.weight", "wk.weight_scale_inv"}
    succeeds("check", "out", "--source", "index")
    verified = succeeds("verify", "out", "--source", "index", "--tier", "bytes", "--tier", "weights", "--json").json
    assert verified["verdict"] == "pass"
    succeeds("merge", "out", "-o", "whole")
    assert read_all(Path("whole")) == read_all(Path("index"))
    succeeds("reshard", "out", "--tp", 1, "--format", "vllm", "-o", "one")
    succeeds("check", "one", "--source", "index")


def test_a_wrong_key_of_an_index_is_found() -> None:
    fp8_blocks.indexed("deepseek_v32", Path("index"))
    succeeds("split", "index", "--tp", 2, "--format", "vllm", "-o", "out")
    path, name = Path("out/model-rank-1-part-0.safetensors"), "model.layers.1.self_attn.indexer.wk_weights_proj.weight"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    held = load_file(path)
    held[name][0, 0] *= -1
    save_file(held, path, metadata)
    for command in (("check",), ("verify", "--tier", "bytes", "--tier", "weights")):
        found = tpshard(*command, "out", "--source", "index")
        assert found.code == 1 and f"{name.rpartition('wk')[0]}wk.weight" in found.out + found.err


def test_the_weights_of_an_index_that_are_quantised_are_refused() -> None:
    fp8_blocks.indexed("deepseek_v32", Path("index"), plain="none")
    error = fails(4, "split", "index", "--tp", 2, "--format", "vllm", "-o", "out")
    assert "indexer.weights_proj.weight: it is quantised" in error["message"]


def test_rows_in_another_order_with_their_scales_and_experts_one_by_one() -> None:
    source = load_file(fp8_blocks.packed_text("llama4", Path("packed")) / "model.safetensors")
    succeeds("split", "packed", "--tp", 2, "--format", "vllm", "-o", "out")
    held = load_file("out/model-rank-1-part-0.safetensors")
    layer = "model.layers.1."
    for end in ("weight_packed", "weight_scale"):
        q, k, v = (source[f"{layer}self_attn.{each}_proj.{end}"] for each in "qkv")
        paired = [each.view(-1, 64, 2, each.shape[1]).transpose(1, 2).reshape(each.shape) for each in (q, k)]
        parts = [each[len(each) // 2 :] for each in (*paired, v)]
        assert torch.equal(held[f"{layer}self_attn.qkv_proj.{end}"], torch.cat(parts))
    experts = f"{layer}feed_forward.experts."
    gates = [
        torch.cat([source[f"{experts}{expert}.{each}_proj.weight_scale"][128:] for each in ("gate", "up")])
        for expert in range(8)
    ]
    assert torch.equal(held[f"{experts}routed_experts.w13_weight_scale"], torch.stack(gates))
    succeeds("check", "out", "--source", "packed")
    succeeds("merge", "out", "-o", "whole")
    assert read_all(Path("whole")) == read_all(Path("packed"))


@pytest.mark.parametrize(("ffn", "divides"), [(512, True), (384, False)])
def test_equal_slices_of_what_is_stored_in_blocks(ffn: int, divides: bool) -> None:
    source = load_file(fp8_blocks.make("glm", Path("glm"), sizes={"intermediate_size": ffn}) / "model.safetensors")
    if not divides:
        fails(4, "split", "glm", "--tp", 2, "--format", "vllm", "-o", "out")
        return
    succeeds("split", "glm", "--tp", 2, "--format", "vllm", "-o", "out")
    held = load_file("out/model-rank-1-part-0.safetensors")
    for end in ("weight", "weight_scale_inv"):
        name = f"model.layers.0.mlp.gate_up_proj.{end}"
        assert torch.equal(held[name].float(), source[name].chunk(2)[1].float())
