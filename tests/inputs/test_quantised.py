"""Quantised checkpoints, kept quantised: every format is split, checked and merged bit for bit, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.command import LLAMA, fails, llama, llama_tensors, succeeds, tpshard
from tests.helpers.grids import ALL, some
from tests.helpers.paths import TESTS
from tests.helpers.quantised import FORMATS, GPTQ4, SMALL, fp8, gptq, make, quantised_tensors
from tests.helpers.toys import Tensor, random_tensor, read, read_all, read_rank, write_checkpoint

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def there_and_back(model: Path, tp: int, *options: object, out: str = "out") -> dict[str, Tensor]:
    """Split, check and merge, to the same bytes; the tensors of rank 1."""
    succeeds("split", model, "--tp", tp, "-o", out, *options)
    succeeds("check", out, "--source", model)
    succeeds("merge", out, "-o", f"{out}-back")
    back = Path(f"{out}-back")
    assert read_all(back) == read_all(model)
    for file in model.glob("*.json"):
        if not file.name.endswith(".index.json"):
            assert (back / file.name).read_bytes() == file.read_bytes()
    return read_rank(Path(out), 1, tp)


DOWN = "model.layers.0.mlp.down_proj"
SHARES = {
    "fp8 blocks": {"weight": (128, 64), "weight_scale_inv": (8, 4)},
    "fp8 per tensor": {"weight": (128, 64), "weight_scale": (), "input_scale": ()},
    "ct fp8 channel": {"weight": (128, 64), "weight_scale": (128, 1)},
    "modelopt fp8 channel": {"weight": (128, 64), "weight_scale": (128,)},
    "ct mxfp8": {"weight": (128, 64), "weight_scale": (128, 2)},
    "ct int3": {"weight_packed": (128, 6), "weight_scale": (128, 2), "weight_zero_point": (12, 2)},
    "ct int4 channel": {"weight_packed": (128, 8), "weight_scale": (128, 1), "weight_zero_point": (16, 1)},
    "ct int4 order": {"weight_packed": (128, 8), "weight_scale": (128, 4), "weight_g_idx": (64,), "weight_shape": (2,)},
    "ct nvfp4": {"weight_packed": (128, 32), "weight_scale": (128, 4), "weight_global_scale": (1,)},
    "modelopt nvfp4": {"weight": (128, 32), "weight_scale": (128, 4), "weight_scale_2": ()},
    "modelopt w4a8": {"weight": (64, 64), "weight_scale": (128, 2), "pre_quant_scale": (64,)},
    "int8 halves, E8M0": {"weight": (128, 32), "weight_scale_inv": (128, 2)},
    "gptq 4": {"qweight": (8, 128), "qzeros": (2, 16), "scales": (2, 128), "g_idx": (64,)},
    "gptq desc_act": {"qweight": (8, 128), "qzeros": (4, 16), "scales": (4, 128), "g_idx": (64,)},
    "gptq one group": {"qweight": (8, 128), "qzeros": (1, 16), "scales": (1, 128), "g_idx": (64,)},
    "awq": {"qweight": (64, 16), "qzeros": (2, 16), "scales": (2, 128)},
}  # fmt: skip
"""What a rank of two has of the down projection, [128, 128] and cut along `in`."""


@pytest.mark.parametrize("name", some(FORMATS, SHARES.keys()))
def test_split_check_and_merge(name: str) -> None:
    rank = there_and_back(make(Path("model"), name, num_hidden_layers=1), 2)
    held = {suffix: rank[f"{DOWN}.{suffix}"].shape for suffix in SHARES.get(name, ())}
    assert held == SHARES.get(name, {})


FIXTURES = TESTS / "quantised/fixtures"
PUBLISHED = sorted(path.name for path in FIXTURES.iterdir())


@pytest.mark.parametrize(
    "name",
    some(
        PUBLISHED,
        ["autoround-mixed-bits", "ct-fp8-nvfp4-mixed-precision", "ct-int-mixed-groups", "fp8-block-deepseek-mtp",
         "fp8-block-stacked-experts", "fp4-experts-deepseek", "modelopt-nvfp4-kv", "mxfp4-gpt-oss"],
    ),
)  # fmt: skip
def test_what_the_tools_wrote(name: str) -> None:
    """At tp 2 everything can be cut; at tp 4 too, or it is refused, with what bounds it and what can be."""
    model = FIXTURES / name
    there_and_back(model, 2)
    result = tpshard("plan", model, "--tp", 4, "--json")
    if result.code:
        error = result.json["error"]
        assert result.code == 4 and error["expected"].startswith("tp 1 or 2")
        assert (
            " at a time end where groups or blocks do in " in error["message"] or "heads on 4 ranks" in error["message"]
        )
    elif ALL:
        there_and_back(model, 4, out="four")


@pytest.mark.parametrize("name", some(FORMATS, ["gptq 4", "ct int3"]))
def test_four_ranks_and_back_by_way_of_two(name: str) -> None:
    model = make(Path("model"), name)
    there_and_back(model, 4)
    succeeds("reshard", "out", "--tp", 2, "-o", "two")
    succeeds("split", model, "--tp", 2, "-o", "direct")
    assert [read_rank(Path("two"), r, 2) for r in (0, 1)] == [read_rank(Path("direct"), r, 2) for r in (0, 1)]


# --- modules that are not plain matrices ---


def test_gpt_oss_as_published() -> None:
    """Experts stacked, packed by blocks of 32 along `in`; rows of gate and up in turn, so a rank has a stretch."""
    rng = np.random.default_rng(0)
    layer, hidden, ffn = "model.layers.0", 64, 128
    shapes = {
        f"{layer}.mlp.experts.gate_up_proj_blocks": ("U8", (2, 2 * ffn, hidden // 32, 16)),
        f"{layer}.mlp.experts.gate_up_proj_scales": ("U8", (2, 2 * ffn, hidden // 32)),
        f"{layer}.mlp.experts.gate_up_proj_bias": ("BF16", (2, 2 * ffn)),
        f"{layer}.mlp.experts.down_proj_blocks": ("U8", (2, hidden, ffn // 32, 16)),
        f"{layer}.mlp.experts.down_proj_scales": ("U8", (2, hidden, ffn // 32)),
        f"{layer}.mlp.experts.down_proj_bias": ("BF16", (2, hidden)),
        f"{layer}.mlp.router.weight": ("BF16", (2, hidden)),
        f"{layer}.mlp.router.bias": ("BF16", (2,)),
        f"{layer}.self_attn.sinks": ("BF16", (4,)),
        **{f"{layer}.self_attn.{x}_proj.weight": ("BF16", (64, 64)) for x in "qo"},
        **{f"{layer}.self_attn.{x}_proj.weight": ("BF16", (32, 64)) for x in "kv"},
        **{f"{layer}.self_attn.{x}_proj.bias": ("BF16", (32 if x in "kv" else 64,)) for x in "qkvo"},
        **{f"{layer}.{x}.weight": ("BF16", (64,)) for x in ("input_layernorm", "post_attention_layernorm")},
        "model.norm.weight": ("BF16", (64,)),
        **{name: ("BF16", (8, 64)) for name in ("model.embed_tokens.weight", "lm_head.weight")},
    }
    config = {
        "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": ffn, "num_hidden_layers": 1, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 8,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    }  # fmt: skip
    tensors = {name: random_tensor(rng, *of) for name, of in shapes.items()}
    model = write_checkpoint(Path("model"), config, tensors)
    rank = there_and_back(model, 2)
    experts = f"{layer}.mlp.experts"
    assert rank[f"{experts}.gate_up_proj_blocks"].shape == (2, 128, 2, 16)
    assert rank[f"{experts}.down_proj_blocks"].shape == (2, 64, 2, 16)
    assert rank[f"{experts}.down_proj_scales"].shape == (2, 64, 2)
    assert succeeds("plan", model, "--tp", 2, "--json").json["possible_tp"] == [1, 2, 4]
    del tensors[f"{experts}.down_proj_scales"]
    error = fails(3, "plan", write_checkpoint(Path("less"), config, tensors), "--tp", 2)
    assert f"{experts}.down_proj_blocks" in error["message"] and f"{experts}.down_proj_scales" in error["message"]


@pytest.mark.parametrize("where", ["self_attn.{}_scale", "self_attn.{}_proj.{}_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1)])
def test_scales_of_the_cache(where: str, shape: tuple[int, ...]) -> None:
    """Beside the attention or below its projections; one, or one for each head, which goes where the head goes."""
    scales = {
        f"model.layers.{layer}.{where.format(x, x)}": random_tensor(np.random.default_rng(layer), "F32", shape)
        for layer in (0, 1)
        for x in "kv"
    }
    for layer in (0, 1):
        for x, size in {"q": 16, "k": 8, "v": 8, "o": 16}.items():
            bias = random_tensor(np.random.default_rng(0), "F32", (size,))
            scales[f"model.layers.{layer}.self_attn.{x}_proj.bias"] = bias
    config = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    model = llama(Path("model"), tensors=scales, quantization_config=config, attention_bias=True)
    rank = there_and_back(model, 2)
    assert {rank[name].shape for name in scales if not name.endswith("bias")} == {
        (1, 1, 1) if len(shape) == 3 else shape
    }
    plan = succeeds("plan", model, "--tp", 2, "--json").json
    assert plan["numbers"]["kv_cache"]["dtype"] == "F8_E4M3" == plan["quantisation"]["kv_cache"]
    plan = succeeds("plan", model, "--tp", 2, "--kv-dtype", "bfloat16", "--json").json
    assert plan["numbers"]["kv_cache"]["dtype"] == "BF16"


def test_a_scale_is_no_sign_that_the_weight_is_there() -> None:
    name = "model.layers.1.self_attn.k_proj"
    tensors = llama_tensors() | {f"{name}.k_scale": random_tensor(np.random.default_rng(0), "F32", ())}
    del tensors[f"{name}.weight"]
    model = write_checkpoint(Path("model"), LLAMA | {"quantization_config": {"quant_method": "modelopt"}}, tensors)
    assert fails(3, "plan", model, "--tp", 2)["tensor"] == f"{name}.weight"


def test_modules_that_are_left_out_are_cut_as_ever() -> None:
    rank = there_and_back(make(Path("model"), "awq", skip="layers.0.mlp"), 2)
    assert rank[f"{DOWN}.weight"].shape == (128, 64) and f"{DOWN}.qweight" not in rank
    assert rank["model.layers.1.mlp.down_proj.qweight"].shape == (64, 16)


# --- where the quantisation is named ---


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("hf_quant_config.json", {"producer": {}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}),
        ("quantize_config.json", GPTQ4 | {"quant_method": None}),
        ("quantize_config.json", {key: value for key, value in GPTQ4.items() if key != "quant_method"}),
        ("quantization_config.json", GPTQ4 | {"quant_method": "auto-round"}),
    ],
)
def test_a_file_of_its_own(file: str, content: dict[str, Any]) -> None:
    name = "fp8 per tensor" if file.startswith("hf") else "gptq 4"
    model = make(Path("model"), name, quantization_config=None)
    (model / file).write_text(json.dumps(content))
    there_and_back(model, 2)
    plan = succeeds("plan", model, "--tp", 2, "--json").json
    method = content.get("quant_method") or ("modelopt" if file.startswith("hf") else "gptq")
    assert plan["quantisation"]["method"] == method
    assert plan["numbers"]["kv_cache"]["dtype"] == ("F8_E4M3" if file.startswith("hf") else "BF16")


def test_in_a_nested_config() -> None:
    model = make(Path("model"), "gptq 4", quantization_config=None, text_config={"quantization_config": GPTQ4})
    tensors = {f"model.language_model.{n.removeprefix('model.')}": t for n, t in read_all(model).items()}
    outer = {"model_type": "qwen2_vl", "text_config": SMALL | {"model_type": "llama", "quantization_config": GPTQ4}}
    there_and_back(write_checkpoint(Path("nested"), outer, tensors), 2)


# --- what is refused ---


def quark(**weight: Any) -> dict[str, Any]:
    return {"quant_method": "quark", "global_quant_config": {"weight": weight}}


@pytest.mark.parametrize(
    ("said", "names"),
    [
        *(({"quant_method": method}, method) for method in (
            "bitsandbytes", "torchao", "hqq", "eetq", "aqlm", "quip", "spqr", "vptq", "higgs", "gguf", "something",
        )),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4}, "None"),
        ({"quant_method": "awq", "version": "gemv"}, "awq gemv"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq marlin"),
        (quark(dtype="int4", qscheme="per_group", group_size=128), "quark int4 per_group of another"),
        (quark(dtype="fp6_e2m3", qscheme="per_group", group_size=32, scale_format="e8m0"), "quark fp6_e2m3 per_group"),
        (quark(dtype="fp8_e4m3", qscheme="per_channel", ch_axis=1), "quark fp8_e4m3 per_channel of another"),
        ({"quant_method": "quark", "layer_quant_config": {"*mlp*": {"weight": [{}, {}]}}}, "quark in two stages"),
    ],
)  # fmt: skip
def test_a_method_that_is_refused(said: dict[str, Any], names: str) -> None:
    model = llama(Path("model"), quantization_config=said)
    error = fails(4, "split", model, "--tp", 2)
    assert f"quantised by {names}" in error["message"] and names in error["found"]
    assert error["path"] == "model/config.json" and "the checkpoint that it was made from" in error["hint"]


def without(tensors: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    assert set(names) <= set(tensors)
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("name", "lost", "needed"),
    [
        ("fp8 blocks", "weight_scale_inv", "weight"),
        ("fp8 blocks", "weight", "weight_scale_inv"),
        ("ct int4", "weight_scale", "weight_packed"),
        ("ct nvfp4", "weight_global_scale", "weight_packed"),
        ("modelopt nvfp4", "weight_scale_2", "weight"),
        ("gptq 4", "scales", "qweight"),
        ("awq", "qweight", "scales"),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_values_without_a_scale_and_a_scale_without_values(name: str, lost: str, needed: str, declared: bool) -> None:
    said, shapes = FORMATS[name]
    tensors = without(quantised_tensors(shapes), f"{DOWN}.{lost}")
    config = SMALL | ({"quantization_config": said} if declared else {})
    error = fails(3, "plan", write_checkpoint(Path("model"), config, tensors), "--tp", 2)
    assert error["tensor"].startswith(f"{DOWN}.") and error["path"] == "model/model.safetensors"
    told = f"{error['message']} {error['expected']}"
    assert f"{DOWN}.{needed}" in told and (f"{DOWN}.{lost}" in told or f"{DOWN}.weight " in told)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8", "I32", "F4"])
def test_narrow_weights_of_which_nothing_is_known(dtype: str) -> None:
    tensor = random_tensor(np.random.default_rng(0), dtype, (8, 16))
    name = "model.layers.0.mlp.up_proj.weight"
    error = fails(3, "split", llama(Path("model"), tensors={name: tensor}), "--tp", 2)
    assert error["tensor"] == name and error["found"] == dtype


@pytest.mark.parametrize("said", [{"quant_method": "fp8"}, GPTQ4, {"quant_method": "compressed-tensors"}])
def test_a_config_without_quantised_tensors(said: dict[str, Any]) -> None:
    error = fails(3, "plan", llama(Path("model"), quantization_config=said), "--tp", 2)
    assert str(said["quant_method"]) in error["message"] and error["path"] == "model/config.json"


def test_quantised_tensors_without_a_config() -> None:
    error = fails(3, "plan", make(Path("model"), "gptq one group", quantization_config=None), "--tp", 2)
    assert "no config names a quantisation" in error["message"] and "quantization_config" in error["expected"]


def test_what_is_no_object() -> None:
    assert (
        "quantization_config" in fails(3, "plan", llama(Path("model"), quantization_config="awq"), "--tp", 2)["message"]
    )


@pytest.mark.parametrize("shape", [(8, 7), (7, 8), (8, 8, 1)])
def test_a_scale_of_another_shape(shape: tuple[int, ...]) -> None:
    said, shapes = FORMATS["fp8 blocks"]
    tensors = quantised_tensors(shapes)
    tensors[f"{DOWN}.weight_scale_inv"] = random_tensor(np.random.default_rng(0), "F32", shape)
    config = SMALL | {"quantization_config": said}
    result = tpshard("plan", write_checkpoint(Path("model"), config, tensors), "--tp", 2)
    assert result.code in (3, 4) and f"{DOWN}.weight_scale_inv" in result.err


def test_groups_in_no_order_that_the_config_does_not_tell() -> None:
    said, shapes = FORMATS["gptq 4"]
    tensors = quantised_tensors(shapes)
    order = np.frombuffer(tensors[f"{DOWN}.g_idx"].data, "<i4")[::-1]
    tensors[f"{DOWN}.g_idx"] = Tensor("I32", (128,), order.tobytes())
    model = write_checkpoint(Path("model"), SMALL | {"quantization_config": said}, tensors)
    error = fails(3, "split", model, "--tp", 2)
    assert error["tensor"] == f"{DOWN}.g_idx" and "desc_act" in error["found"]
    scattered = SMALL | {"quantization_config": said | {"desc_act": True}}
    there_and_back(write_checkpoint(Path("scattered"), scattered, tensors), 2)


# --- a block, group or pack is never cut ---


def test_blocks_bound_the_tp() -> None:
    """16 x 16 blocks in heads of 8 and a width of 80: two heads at a time, and five blocks."""
    config = {"num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 80, "num_hidden_layers": 1}
    tensors = quantised_tensors(fp8("weight_scale_inv", "F32", lambda n, k: (-(-n // 16), -(-k // 16))), **config)
    model = write_checkpoint(Path("model"), SMALL | config | {"quantization_config": FP8}, tensors)
    error = fails(4, "plan", model, "--tp", 2)
    assert "80 ffn on 2 ranks: 16 at a time" in error["message"] and "tp 1" in error["expected"]
    assert error["tensor"].endswith("proj.weight_scale_inv")
    plan = succeeds("plan", model, "--tp", 1, "--json").json
    assert plan["possible_tp"] == [1] and "16 at a time" in plan["impossible_tp"][0]["reason"]
    advice = tpshard("advise", model, "--gpus", 2, "--gpu-memory", 80, "--json").json
    assert [choice["possible"] for choice in advice["choices"]] == [True, False]
    assert "80 ffn (16 at a time)" in advice["choices"][1]["reason"]
    rank = there_and_back(model, 2, "--uneven")
    assert rank[f"{DOWN}.weight"].shape == (128, 32) and rank[f"{DOWN}.weight_scale_inv"].shape == (8, 2)
    assert rank["model.layers.0.self_attn.q_proj.weight"].shape == (64, 128)


def test_heads_follow_their_group_in_whole_blocks() -> None:
    """Three KV heads of half a block each cannot be dealt one by one; with uneven shares two go together."""
    config = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 48}
    tensors = quantised_tensors(fp8("weight_scale_inv", "F32", lambda n, k: (-(-n // 16), -(-k // 16))), **config)
    model = write_checkpoint(Path("model"), SMALL | config | {"quantization_config": FP8}, tensors)
    assert succeeds("plan", model, "--tp", 1, "--json").json["possible_tp"] == [1, 3]
    rank = there_and_back(model, 2, "--uneven")
    attention = "model.layers.0.self_attn"
    assert rank[f"{attention}.k_proj.weight"].shape == (16, 96) and rank[f"{attention}.q_proj.weight"].shape == (32, 96)


def test_a_partial_block_stays_at_the_end() -> None:
    config = {"intermediate_size": 40, "num_hidden_layers": 1}
    tensors = quantised_tensors(fp8("weight_scale_inv", "F32", lambda n, k: (-(-n // 16), -(-k // 16))), **config)
    model = write_checkpoint(Path("model"), SMALL | config | {"quantization_config": FP8}, tensors)
    rank = there_and_back(model, 2, "--uneven")
    assert rank[f"{DOWN}.weight"].shape == (128, 8) and rank[f"{DOWN}.weight_scale_inv"].shape == (8, 1)


@pytest.mark.parametrize(("kv", "possible"), [(4, [1, 2, 4]), (2, [1, 2])])
def test_words_bound_the_tp(kv: int, possible: list[int]) -> None:
    """Heads of 4, two of which fill a word: KV heads are not repeated where a rank would have half a word."""
    config = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2 * kv, "intermediate_size": 64}
    tensors = quantised_tensors(gptq(4, 8), **config)
    said = GPTQ4 | {"group_size": 8}
    model = write_checkpoint(Path("model"), SMALL | config | {"quantization_config": said}, tensors)
    assert succeeds("plan", model, "--tp", 1, "--json").json["possible_tp"] == possible


# --- options and formats ---


def test_a_cast_leaves_quantised_modules_alone() -> None:
    model = make(Path("model"), "gptq 4")
    result = succeeds("split", model, "--tp", 2, "--dtype", "float32", "-o", "out", "--json").json
    assert any("casts what is not quantised" in warning for warning in result["warnings"])
    rank = read_rank(Path("out"), 0, 2)
    assert rank[f"{DOWN}.scales"].dtype == "F16" and rank["model.norm.weight"].dtype == "F32"
    written = json.loads(Path("out/config.json").read_text())
    assert written["torch_dtype"] == "float32" and written["quantization_config"] == GPTQ4
    succeeds("check", "out", "--source", model)


@pytest.mark.parametrize(("format", "reason"), [("sglang", "repacked for the kernel"), ("meta", "params.json")])
def test_a_format_that_holds_no_quantised_models(format: str, reason: str) -> None:
    error = fails(4, "split", make(Path("model"), "fp8 blocks"), "--tp", 2, "--format", format)
    assert reason in error["message"] and error["found"] == "quantised by fp8" and "native" in error["hint"]


@pytest.mark.parametrize("format", ["dcp-hf", "dcp", "hf"])
def test_other_formats(format: str) -> None:
    model = make(Path("model"), "gptq 4", num_hidden_layers=1)
    tp = 1 if format == "hf" else 2
    succeeds("split", model, "--tp", tp, "--format", format, "--allow-pickle", "-o", "out")
    if format != "hf":
        succeeds("check", "out", "--source", model)
        succeeds("merge", "out", "-o", "back")
    assert read_all(Path("out" if format == "hf" else "back")) == read_all(model)


def test_what_is_said_of_it() -> None:
    model = make(Path("model"), "fp8 blocks", skip="down_proj")
    said = {"method": "fp8", "modules": {"FP8 in blocks": 12}, "kv_cache": None, "of_whole": []}
    assert succeeds("plan", model, "--tp", 2, "--json").json["quantisation"] == said
    assert succeeds("inspect", model, "--json").json["quantisation"] == said
    assert "quantised: fp8, 12 modules FP8 in blocks" in succeeds("plan", model, "--tp", 2).out
    succeeds("split", model, "--tp", 2, "-o", "out")
    assert succeeds("inspect", "out", "--json").json["quantisation"] == said
    assert "fp8, 12 modules FP8 in blocks" in succeeds("inspect", "out").out
    plain = llama(Path("plain"))
    assert "quantisation" not in succeeds("inspect", plain, "--json").json
    axes = json.loads(Path("out/tpshard.json").read_text())["axes"]
    assert axes["ffn"]["step"] == 16 and "step" not in axes["vocab"]
    assert len(read(Path("out") / "rank-00000-of-00002.safetensors")) == len(read_all(model))


def test_deepseeks_own_layout() -> None:
    """As its convert.py: a scale is cut as its weight is, along the same dim, and called `scale`; experts are whole."""
    model = FIXTURES / "fp8-block-deepseek"
    succeeds("split", model, "--tp", 2, "--format", "deepseek", "-o", "out")
    succeeds("check", "out", "--source", model)
    succeeds("merge", "out", "-o", "back")
    source = read_all(model)
    assert read_all(Path("back")) == source
    rank = read(Path("out/model1-mp2.safetensors"))
    for there, here, dim in (("o_proj", "wo", 1), ("q_b_proj", "wq_b", 0), ("kv_a_proj_with_mqa", "wkv_a", None)):
        for suffix, renamed in (("weight", "weight"), ("weight_scale_inv", "scale")):
            shape = list(source[f"model.layers.0.self_attn.{there}.{suffix}"].shape)
            if dim is not None:
                shape[dim] //= 2
            assert list(rank[f"layers.0.attn.{here}.{renamed}"].shape) == shape
    for name, lacking in (("fp4-experts-deepseek", ".scale"), ("ct-nvfp4-qwen3-moe", "DeepSeek-V2 and V3 alone")):
        error = fails(4, "split", FIXTURES / name, "--tp", 2, "--format", "deepseek")
        assert lacking in error["message"] and "native" in error["hint"]
