"""Mixtures of experts on real checkpoints: what each rank holds, against slices of the source made by hand in torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tpshard
from tests.bench.synthetic import DEEPSEEK_V3, deepseek_tensors
from tests.helpers.by_hand import compare, config_of, tensors_of, tensors_of_file, there_and_back, with_one_more
from tests.helpers.grids import in_turn, one_in
from tests.helpers.moe_checkpoints import MOE, STACKED
from tests.helpers.toys import read_all, write_checkpoint
from tpshard.errors import CorruptError, UnsupportedError
from tpshard.execute.publish import Settings
from tpshard.inputs.checkpoint import open_checkpoint
from tpshard.inputs.model import from_checkpoint
from tpshard.rules.architecture import builtin
from tpshard.rules.classify import classify
from tpshard.storage.safetensors import TensorInfo

if TYPE_CHECKING:
    pass

Made = Callable[..., Path]
EXPERT = re.compile(r"experts\.\d+\.")
PREDICTS_MORE = ["deepseek_v3", "glm4_moe"]


@pytest.mark.parametrize(("name", "widths"), one_in(2, in_turn(list(MOE), ((4, 2), (2, 4)))))
def test_there_and_back(name: str, widths: tuple[int, int], made: Made, quick: Settings, tmp_path: Path) -> None:
    there_and_back(made(name), tmp_path, quick, widths)


def test_the_variants_have_what_they_are_for(made: Made) -> None:
    """Experts in every one, stored the way its name says, and both ways for all but gpt_oss."""
    for name in MOE:
        names = set(read_all(made(name)))
        one_by_one = any(EXPERT.search(tensor) for tensor in names)
        together = any(tensor.endswith("experts.gate_up_proj") for tensor in names)
        assert together == (STACKED in name or name == "gpt_oss"), name
        assert one_by_one == (not together and "granitemoe" not in name), name
    assert {model_type for name, (model_type, _) in MOE.items() if STACKED in name} == {t for t, _ in MOE.values()} - {
        "gpt_oss"
    }
    assert {builtin(model_type).name for model_type, _ in MOE.values()} == {
        model_type for model_type, _ in MOE.values()
    }


@pytest.mark.parametrize("name", MOE)
def test_a_config_may_leave_out_what_is_the_default(name: str, made: Made, tmp_path: Path) -> None:
    from transformers import AutoConfig

    model = made(name)
    default = AutoConfig.for_model(config_of(model)["model_type"]).to_dict()
    short = {key: v for key, v in config_of(model).items() if key == "model_type" or (key, v) not in default.items()}
    assert len(short) < len(config_of(model))
    bare = write_checkpoint(tmp_path / "bare", short, read_all(model))
    stripped = {tensor.removeprefix("model."): value for tensor, value in read_all(model).items()}
    stripped = write_checkpoint(tmp_path / "stripped", short, stripped)
    plain = {
        tensor.name.removeprefix("model."): tensor.cut for tensor in from_checkpoint(open_checkpoint(model)).tensors
    }
    for other in (bare, stripped):
        found = from_checkpoint(open_checkpoint(other))
        assert {tensor.name.removeprefix("model."): tensor.cut for tensor in found.tensors} == plain
        assert found.axes == from_checkpoint(open_checkpoint(model)).axes


@pytest.mark.parametrize("model_type", sorted({model_type for model_type, _ in MOE.values()}))
def test_defaults_are_those_of_the_config_class(model_type: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    for key, value in builtin(model_type).defaults.items():
        assert getattr(type(config), key, getattr(config, key, None)) == value, key


def test_published_qwen3_counts_its_experts_under_another_key(made: Made, tmp_path: Path) -> None:
    model = made("qwen3_moe")
    config = config_of(model)
    config["num_experts"] = config.pop("num_local_experts")
    tpshard.plan(write_checkpoint(tmp_path / "published", config, read_all(model)), 2)
    config["num_experts"] += 1
    with pytest.raises(CorruptError, match="experts 8 missing"):
        tpshard.plan(write_checkpoint(tmp_path / "more", config, read_all(model)), 2)


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.5.w3.weight"),
        ("qwen2_moe", "model.layers.2.mlp.experts.7.down_proj.weight"),
        ("qwen3_moe-every-other", "model.layers.1.mlp.experts.0.up_proj.weight"),
        ("deepseek_v3", "model.layers.1.mlp.experts.3.gate_proj.weight"),
        ("ernie4_5_moe", "model.layers.1.mlp.experts.3.down_proj.weight"),
    ],
)
def test_a_missing_expert_is_named(name: str, gone: str, made: Made, tmp_path: Path) -> None:
    tensors = read_all(made(name))
    del tensors[gone]
    layer, expert = re.findall(r"\d+", gone)[:2]
    with pytest.raises(CorruptError, match=f"layers.{layer}.*experts {expert} missing") as error:
        tpshard.plan(write_checkpoint(tmp_path / "model", config_of(made(name)), tensors), 2)
    assert error.value.tensor == gone
    assert error.value.expected == "experts 0 to 7"


@pytest.mark.parametrize("name", [name for name in MOE if STACKED not in name])
def test_a_checkpoint_without_its_experts_is_refused(name: str, made: Made, tmp_path: Path) -> None:
    tensors = {tensor: value for tensor, value in read_all(made(name)).items() if "expert" not in tensor}
    tensors = {tensor: value for tensor, value in tensors.items() if "_linear" not in tensor}
    assert len(tensors) < len(read_all(made(name)))
    with pytest.raises(CorruptError, match=r"no tensor matches model.layers.\*.*(expert|input_linear)"):
        tpshard.plan(write_checkpoint(tmp_path / "model", config_of(made(name)), tensors), 2)


@pytest.mark.parametrize("name", ["mixtral-stacked", "gpt_oss", "granitemoe", "deepseek_v3-stacked"])
def test_stacked_experts_are_as_many_as_the_config_says(name: str, made: Made, tmp_path: Path) -> None:
    config = config_of(made(name))
    key = "n_routed_experts" if "n_routed_experts" in config else "num_local_experts"
    with pytest.raises(CorruptError, match="config.json contradicts the tensor model.layers") as error:
        tpshard.plan(write_checkpoint(tmp_path / "model", config | {key: 4}, read_all(made(name))), 2)
    assert str(error.value.expected).startswith("dim 0 of size 4 (experts")


def test_a_dense_layer_where_the_config_wants_experts_is_refused(made: Made, tmp_path: Path) -> None:
    config = config_of(made("deepseek_v3")) | {"first_k_dense_replace": 0}
    with pytest.raises(UnsupportedError, match=r"no deepseek_v3 rule matches the tensor model.layers.0.mlp.down_proj"):
        tpshard.plan(write_checkpoint(tmp_path / "model", config, read_all(made("deepseek_v3"))), 2)
    config["first_k_dense_replace"] = 2
    with pytest.raises(UnsupportedError, match=r"no deepseek_v3 rule matches the tensor model.layers.1.mlp.experts.0"):
        tpshard.plan(write_checkpoint(tmp_path / "other", config, read_all(made("deepseek_v3"))), 2)


@pytest.mark.parametrize("name", PREDICTS_MORE)
def test_a_layer_beyond_the_last_is_split_like_the_others(
    name: str, made: Made, quick: Settings, tmp_path: Path
) -> None:
    model = with_one_more(made(name), tmp_path / "model")
    tpshard.split(model, 4, tmp_path / "out", settings=quick)
    compare(model, tmp_path / "out", 4)
    tpshard.merge(tmp_path / "out", tmp_path / "merged", settings=quick)
    assert read_all(tmp_path / "merged") == read_all(model)


@pytest.mark.parametrize("name", PREDICTS_MORE)
@pytest.mark.parametrize("without", ["eh_proj.weight", "mlp.experts.6.up_proj.weight", "self_attn.o_proj.weight"])
def test_a_layer_beyond_the_last_is_whole(name: str, without: str, made: Made, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match=re.escape(without.split(".")[-2])):
        tpshard.plan(with_one_more(made(name), tmp_path / "model", without), 2)


@pytest.mark.parametrize("name", PREDICTS_MORE)
def test_a_layer_beyond_the_last_is_one_that_the_config_knows(name: str, made: Made, tmp_path: Path) -> None:
    for number in (0, 2):
        with pytest.raises(CorruptError, match="layers 3 beyond the config" if number == 0 else "layers 4 missing"):
            tpshard.plan(with_one_more(made(name), tmp_path / str(number), num_nextn_predict_layers=number), 2)


def test_latent_attention_deals_a_head_whole(made: Made, quick: Settings, tmp_path: Path) -> None:
    """A head is 24 rows of q_b, 28 of kv_b and 12 columns of o: the same heads, however unevenly they are dealt."""
    model = made("deepseek_v3")
    tpshard.split(model, 3, tmp_path / "out", shares=["0.5", "0.3", "0.2"], settings=quick)
    heads = []
    for rank in range(3):
        held = tensors_of_file(tmp_path / "out" / f"rank-{rank:05}-of-00003.safetensors")
        q, kv, o = (held[f"model.layers.2.self_attn.{module}.weight"] for module in ("q_b_proj", "kv_b_proj", "o_proj"))
        assert q.shape[0] // 24 == kv.shape[0] // 28 == o.shape[1] // 12
        assert q.shape[0] % 24 == kv.shape[0] % 28 == o.shape[1] % 12 == 0
        heads.append(q.shape[0] // 24)
    assert sum(heads) == 8 and heads[0] > heads[2]
    tpshard.merge(tmp_path / "out", tmp_path / "merged", settings=quick)
    assert read_all(tmp_path / "merged") == read_all(model)


def test_gpt_oss_keeps_each_gate_with_its_up(made: Made, quick: Settings, tmp_path: Path) -> None:
    import torch

    model = made("gpt_oss")
    tpshard.split(model, 4, tmp_path / "out", settings=quick)
    source = tensors_of(model)
    for rank in range(4):
        held = tensors_of_file(tmp_path / "out" / f"rank-{rank:05}-of-00004.safetensors")
        for name in ("gate_up_proj", "gate_up_proj_bias"):
            whole, part = (some[f"model.layers.0.mlp.experts.{name}"] for some in (source, held))
            assert torch.equal(part[..., ::2], whole[..., ::2].chunk(4, -1)[rank])
            assert torch.equal(part[..., 1::2], whole[..., 1::2].chunk(4, -1)[rank])
        bias = "model.layers.0.mlp.experts.down_proj_bias"
        assert torch.equal(held[bias], source[bias])


@pytest.mark.parametrize(
    ("name", "possible"),
    [
        ("deepseek_v3", [1, 2, 4, 8]),
        ("mixtral", [1, 2, 4, 8]),
        ("qwen2_moe", [1, 2, 4, 8]),
        ("gpt_oss", [1, 2, 4, 8]),
    ],
)
def test_a_plan_says_which_tp_are_possible(name: str, possible: list[int], made: Made) -> None:
    assert tpshard.plan(made(name), 2).to_json()["possible_tp"] == possible


def test_the_published_shape_of_deepseek_v3_fits_its_rules() -> None:
    infos = [TensorInfo(name, dtype, shape, "", 0, 0) for name, dtype, shape in deepseek_tensors(DEEPSEEK_V3)]
    found = classify(builtin("deepseek_v3"), DEEPSEEK_V3, infos)
    assert {axis.name: (axis.count, axis.unit) for axis in found.axes.values()} == {
        "heads": (128, 192),
        "kv_heads": (128, 256),
        "out_heads": (128, 128),
        "ffn": (18432, 1),
        "moe_ffn": (2048, 1),
        "shared_ffn": (2048, 1),
        "vocab": (129280, 1),
    }
    routed = [cut for name, cut in found.cuts.items() if ".mlp.experts." in name]
    assert len(routed) == (61 + 1 - 3) * 256 * 3 and {cut.segments for cut in routed} == {("moe_ffn",)}
    with pytest.raises(CorruptError, match="layers 61 beyond the config"):
        classify(builtin("deepseek_v3"), DEEPSEEK_V3 | {"num_nextn_predict_layers": 0}, infos)
