"""Mixtures of experts on real checkpoints: what each rank holds, against slices of the source made by hand in torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from bench.synthetic import DEEPSEEK_V3, deepseek_tensors
from checkpoints import VOCAB
from moe_checkpoints import MOE, STACKED
from toys import contents, read_all, write_checkpoint

import tpshard
from tpshard.architecture import builtin
from tpshard.checkpoint import open_checkpoint
from tpshard.errors import CorruptError, UnsupportedError
from tpshard.header import TensorInfo
from tpshard.model import from_checkpoint
from tpshard.publish import Settings
from tpshard.rules import classify

if TYPE_CHECKING:
    from torch import Tensor

Made = Callable[..., Path]
NORM_OF_ALL_HEADS = {"olmoe", "minimax_m2"}
EXPERT = re.compile(r"experts\.\d+\.")
PREDICTS_MORE = ["deepseek_v3", "glm4_moe"]


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def tensors_of(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def held_by(name: str, whole: Tensor, config: Mapping[str, Any], rank: int, tp: int) -> Tensor:
    """What a rank must hold of a tensor."""
    import torch

    module, _, suffix = name.rpartition(".")
    module = module.rpartition(".")[2]
    whole_norm = config["model_type"] in NORM_OF_ALL_HEADS
    kv = config["num_key_value_heads"]

    def share(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(tp, dim)[rank]

    if module in ("embed_tokens", "lm_head", "head"):
        rows = -(-VOCAB // tp) * tp
        return share(torch.cat([whole, whole.new_zeros(rows - VOCAB, *whole.shape[1:])]), 0)
    if suffix == "sinks" or module in ("q_proj", "q_b_proj", "kv_b_proj") or (module == "q_norm" and whole_norm):
        return share(whole, 0)
    if module in ("k_proj", "v_proj") or (module == "k_norm" and whole_norm):
        return whole.chunk(kv)[rank * kv // tp] if kv < tp else share(whole, 0)
    if module in ("gate_proj", "up_proj", "w1", "w3"):
        return share(whole, 0)
    if module in ("o_proj", "down_proj", "w2"):
        return whole if suffix == "bias" else share(whole, 1)
    if config["model_type"] == "gpt_oss" and module == "experts":  # stored [expert, in, out], gate and up by turns
        if suffix.startswith("gate_up"):
            pairs = whole.unflatten(-1, (-1, 2))
            return share(pairs, pairs.dim() - 2).flatten(-2)
        return whole if suffix.endswith("bias") else share(whole, 1)
    if suffix == "gate_up_proj" or module == "input_linear":
        gate, up = whole.chunk(2, 1)
        return torch.cat([share(gate, 1), share(up, 1)], 1)
    if suffix == "down_proj" or module == "output_linear":
        return share(whole, 2)
    return whole


def compare(model: Path, out: Path, tp: int) -> None:
    import torch

    config, source = config_of(model), tensors_of(model)
    for rank in range(tp):
        (file,) = out.glob(f"rank-{rank:05}-of-{tp:05}.safetensors")
        held = tensors_of_file(file)
        assert set(held) == set(source)
        for name, whole in source.items():
            expected = held_by(name, whole, config, rank, tp)
            assert held[name].dtype == expected.dtype
            assert torch.equal(held[name], expected), f"rank {rank}: {name}"


def tensors_of_file(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def logits(path: Path) -> Tensor:
    """transformers' logits, of copied weights: in the mapped file they need not be aligned, and sums differ then."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        result: Tensor = model(1 + torch.arange(24)[None] * 7 % (VOCAB - 1)).logits
    return result


@pytest.mark.parametrize("name", MOE)
def test_there_and_back(name: str, made: Made, quick: Settings, tmp_path: Path) -> None:
    import torch

    model = made(name)
    for tp in (2, 4):
        out = tmp_path / f"{tp}"
        tpshard.split(model, tp, out, settings=quick)
        compare(model, out, tp)
        assert tpshard.check(out, model, tp=tp, settings=quick).equal
        tpshard.merge(out, tmp_path / f"merged-{tp}", settings=quick)
        assert read_all(tmp_path / f"merged-{tp}") == read_all(model)
    for a, b in ((2, 4), (4, 2)):
        tpshard.reshard(tmp_path / f"{a}", b, tmp_path / f"{a}-{b}", settings=quick)
        assert contents(tmp_path / f"{a}-{b}") == contents(tmp_path / f"{b}")
    assert torch.equal(logits(tmp_path / "merged-4"), logits(model))


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


def with_one_more(model: Path, out: Path, without: str = "", **changes: Any) -> Path:
    """The checkpoint with the layer that predicts a further token, as DeepSeek-V3 and GLM-4.5 publish it."""
    import torch
    from safetensors.torch import save_file

    tensors, config = tensors_of(model), config_of(model) | changes
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    last, new = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    extra = {name.replace(last, new): tensor + 1 for name, tensor in tensors.items() if name.startswith(last)}
    for name, shape in {
        "embed_tokens": (VOCAB, hidden),
        "shared_head.head": (VOCAB, hidden),
        "shared_head.norm": (hidden,),
        "enorm": (hidden,),
        "hnorm": (hidden,),
        "eh_proj": (hidden, 2 * hidden),
    }.items():
        extra[f"{new}{name}.weight"] = torch.randn(shape, generator=torch.Generator().manual_seed(len(extra)))
    assert not without or extra.pop(new + without) is not None
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors | extra, out / "model.safetensors", metadata={"format": "pt"})
    return out


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
