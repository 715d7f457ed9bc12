"""The families that came last: what each rank holds, by hand, and whatever their files may look like."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tpshard
from tests.helpers.by_hand import compare, config_of, there_and_back, with_one_more
from tests.helpers.further_checkpoints import DEFAULT, FURTHER
from tests.helpers.grids import in_turn, without
from tests.helpers.newer_checkpoints import AS_THEY_ARE, NEWER
from tests.helpers.toys import read_all
from tpshard.errors import CorruptError, UnsupportedError
from tpshard.execute.publish import Settings
from tpshard.inputs.checkpoint import open_checkpoint
from tpshard.planning.axes import Cut
from tpshard.rules.architecture import builtin
from tpshard.rules.classify import Classification, classify
from tpshard.rules.multimodal import find_rules
from tpshard.storage.safetensors import TensorInfo

Made = Callable[..., Path]
EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate_proj|up_proj|down_proj)\.weight")
PREDICTS_MORE = ["glm4_moe_lite", "deepseek_v32", "glm_moe_dsa"]
SOME = without(NEWER, FURTHER.keys() - set(DEFAULT))
LINEAR = ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"]


def classified(model: Path, tensors: Iterable[TensorInfo] | None = None, **changes: Any) -> Classification:
    """The cuts of a checkpoint, of other tensors perhaps, and under a config that differs."""
    checkpoint = open_checkpoint(model)
    config = {key: value for key, value in (config_of(model) | changes).items() if value != "gone"}
    return classify(builtin(config["model_type"]), config, checkpoint.tensors if tensors is None else tensors)


@pytest.mark.parametrize(("name", "widths"), in_turn(SOME, ((4, 2), (2, 4))))
def test_there_and_back(name: str, widths: tuple[int, int], made: Made, quick: Settings, tmp_path: Path) -> None:
    there_and_back(made(name), tmp_path, quick, widths)


@pytest.mark.parametrize("name", SOME)
def test_a_config_may_leave_out_what_is_the_default(name: str, made: Made) -> None:
    from transformers import AutoConfig

    config = config_of(made(name))
    default = AutoConfig.for_model(config["model_type"]).to_dict()
    silent = [key for key in config if key != "model_type" and (key, config[key]) in default.items()]
    assert silent
    found, full = classified(made(name), **dict.fromkeys(silent, "gone")), classified(made(name))
    assert (found.cuts, found.axes) == (full.cuts, full.axes)


@pytest.mark.parametrize("model_type", sorted({model_type for model_type, _ in NEWER.values()}))
def test_defaults_are_those_of_the_config_class(model_type: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    for key, value in builtin(model_type).defaults.items():
        known = getattr(type(config), key) if hasattr(type(config), key) else getattr(config, key, None)
        assert known == value, key


def stacked(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """The experts of a layer in two tensors, as newer code saves them."""
    kept: list[TensorInfo] = []
    experts: dict[tuple[str, str], list[TensorInfo]] = {}
    for tensor in tensors:
        if match := EXPERT.fullmatch(tensor.name):
            experts.setdefault((match[1], match[2]), []).append(tensor)
        else:
            kept.append(tensor)
    for (module, matrix), each in experts.items():
        rows, columns = each[0].shape
        if matrix == "down_proj":
            kept.append(replace(each[0], name=f"{module}.down_proj", shape=(len(each), rows, columns)))
        elif (module, "gate_proj") not in experts:
            kept.append(replace(each[0], name=f"{module}.up_proj", shape=(len(each), rows, columns)))
        elif matrix == "gate_proj":
            kept.append(replace(each[0], name=f"{module}.gate_up_proj", shape=(len(each), 2 * rows, columns)))
    return kept


# What the library calls them when it saves its own names.
RENAMED = {
    "exaone_moe": {".mlp.e_score_correction_bias": ".mlp.gate.e_score_correction_bias"},
    "hy_v3": {
        ".mlp.expert_bias": ".mlp.e_score_correction_bias",
        ".mlp.router.gate.": ".mlp.gate.",
        ".mlp.shared_mlp.": ".mlp.shared_experts.",
    },
}


@pytest.mark.parametrize("name", [name for name in NEWER if name not in AS_THEY_ARE])
def test_experts_may_be_stacked(name: str, made: Made) -> None:
    """The same axis, cut in the dims that it then has."""
    tensors = open_checkpoint(made(name)).tensors
    one_by_one, found = classified(made(name)), {}
    for tensor in stacked(tensors):
        new = tensor.name
        for old, other in RENAMED.get(name, {}).items():
            new = new.replace(old, other)
        found[new] = replace(tensor, name=new)
    cuts = classified(made(name), found.values()).cuts
    axis = next(cut.segments[0] for name, cut in one_by_one.cuts.items() if EXPERT.fullmatch(name))
    seen = 0
    for new, cut in cuts.items():
        if new.endswith("experts.gate_up_proj"):
            assert cut == Cut("column", 1, (axis, axis))
            seen += 1
        elif new.endswith("experts.up_proj"):
            assert cut == Cut("column", 1, (axis,))
            seen += 1
        elif new.endswith("experts.down_proj"):
            assert cut == Cut("row", 2, (axis,))
            seen += 1
    assert seen >= 2 and len(cuts) == len(found)
    experts = next(key for key in ("n_routed_experts", "num_experts") if key in config_of(made(name)))
    with pytest.raises(CorruptError, match="config.json contradicts the tensor"):
        classified(made(name), found.values(), **{experts: 5})


@pytest.mark.parametrize("name", PREDICTS_MORE)
def test_a_layer_beyond_the_last_is_split_like_the_others(
    name: str, made: Made, quick: Settings, tmp_path: Path
) -> None:
    model = with_one_more(made(name), tmp_path / "model", num_nextn_predict_layers=1)
    tpshard.split(model, 2, tmp_path / "out", settings=quick)
    compare(model, tmp_path / "out", 2)
    tpshard.merge(tmp_path / "out", tmp_path / "merged", settings=quick)
    assert read_all(tmp_path / "merged") == read_all(model)
    with pytest.raises(CorruptError, match="layers 2 beyond the config"):
        classified(model, num_nextn_predict_layers=0)


def mtp(tensors: Iterable[TensorInfo], layer: int, hidden: int) -> list[TensorInfo]:
    """A layer once more, and what is around it, as published files have what predicts further tokens."""
    start = f"model.layers.{layer}."
    extra = [replace(t, name="mtp.layers.0." + t.name.removeprefix(start)) for t in tensors if t.name.startswith(start)]
    names = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    return [
        *extra,
        replace(extra[0], name="mtp.fc.weight", shape=(hidden, 2 * hidden)),
        *(replace(extra[0], name=f"mtp.{name}.weight", shape=(hidden,)) for name in names),
    ]


@pytest.mark.parametrize(("name", "layer"), [*((name, 1) for name in LINEAR), ("exaone_moe", 0)])
def test_layers_that_predict_further_tokens_are_cut_like_the_others(name: str, layer: int, made: Made) -> None:
    tensors = open_checkpoint(made(name)).tensors
    more = mtp(tensors, layer, 64)
    cuts = classified(made(name), [*tensors, *more]).cuts
    for tensor in more:
        like = cuts.get(tensor.name.replace("mtp.layers.0.", f"model.layers.{layer}."))
        assert cuts[tensor.name] == (like or Cut("replicate")), tensor.name
    assert any(cuts[tensor.name].dim is not None for tensor in more)


@pytest.mark.parametrize("name", LINEAR)
def test_published_configs_say_how_often_a_layer_attends(name: str, made: Made) -> None:
    found = classified(made(name), layer_types="gone", full_attention_interval=2)
    assert found.cuts == classified(made(name)).cuts
    with pytest.raises(UnsupportedError, match=r"no \w+ rule matches the tensor model.layers.1.self_attn"):
        classified(made(name), layer_types="gone")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("glm4_moe_lite", {"mlp_layer_types": "gone"}),
        ("deepseek_v32", {"mlp_layer_types": "gone"}),
        ("exaone_moe", {"mlp_layer_types": "gone", "first_k_dense_replace": 1}),
        ("hy_v3", {"mlp_layer_types": "gone", "first_k_dense_replace": 1}),
        ("cohere2_moe", {"mlp_layer_types": "gone", "first_k_dense_replace": 1}),
        ("llama4_text", {"moe_layers": "gone"}),
    ],
)
def test_dense_layers_are_listed_or_counted(name: str, changes: Mapping[str, Any], made: Made) -> None:
    assert classified(made(name), **changes).cuts == classified(made(name)).cuts
    wrong = {"moe_layers": [0]} if name == "llama4_text" else {"mlp_layer_types": ["sparse", "sparse"]}
    with pytest.raises(UnsupportedError, match="rule matches the tensor model.layers.0"):
        classified(made(name), **wrong)


def test_layers_of_nemotron_are_letters_or_words(made: Made) -> None:
    found = classified(
        made("nemotron_h"), layers_block_type="gone", hybrid_override_pattern="M*-E", num_hidden_layers=4
    )
    assert found.cuts == classified(made("nemotron_h")).cuts
    with pytest.raises(UnsupportedError, match="no nemotron_h rule matches the tensor backbone.layers.2.mixer"):
        classified(made("nemotron_h"), layers_block_type="gone", hybrid_override_pattern="M*E-", num_hidden_layers=4)


def test_heads_of_mamba_go_with_their_groups(made: Made) -> None:
    """8 heads in 2 groups: of 4 ranks two hold a group each, of 3 ranks nobody half a head."""
    axes = classified(made("bamba")).axes
    assert {name: (axes[name].count, axes[name].unit, axes[name].group) for name in axes if "ssm" in name} == {
        "ssm_groups": (2, 12, None),
        "ssm_heads": (8, 16, "ssm_groups"),
        "ssm_numbers": (8, 1, "ssm_groups"),
    }
    assert tpshard.plan(made("bamba"), 2).to_json()["possible_tp"] == [1, 2, 4, 8]


def test_a_key_head_is_never_parted_from_its_value_heads(made: Made) -> None:
    """4 key heads of 2 value heads: at most 4 ranks, and whole key heads at 3."""
    assert tpshard.plan(made("qwen3_next"), 2).to_json()["possible_tp"] == [1, 2, 4]
    axes = classified(made("qwen3_next")).axes
    assert {name: (axes[name].count, axes[name].unit, axes[name].group) for name in axes if "linear" in name} == {
        "linear_keys": (4, 8, None),
        "linear_values": (8, 12, "linear_keys"),
        "linear_numbers": (8, 1, "linear_keys"),
    }


@pytest.mark.parametrize(
    ("outer", "text", "prefix"),
    [
        ("llama4", "llama4_text", "language_model.model."),
        ("qwen3_5", "qwen3_5_text", "model.language_model."),
        ("qwen3_5_moe", "qwen3_5_moe_text", "model.language_model."),
    ],
)
def test_a_vision_model_that_nests_one(outer: str, text: str, prefix: str, made: Made) -> None:
    """As published: the decoder is cut, the vision model is replicated, and so is nothing of the decoder."""
    plain = open_checkpoint(made(text)).tensors
    inner = {t.name: prefix + t.name.removeprefix("model.") if t.name.startswith("model.") else t.name for t in plain}
    if outer == "llama4":
        inner["lm_head.weight"] = "language_model.lm_head.weight"
    vision = replace(plain[0], name="vision_model.patch_embedding.linear.weight", shape=(8, 8))
    more = mtp(plain, 1, 64) if outer != "llama4" else []
    tensors = [*(replace(t, name=inner[t.name]) for t in plain), vision, *more]
    subject = find_rules({"model_type": outer, "text_config": config_of(made(text))}, None, "config.json")
    found, entry = subject.classify(tensors, {})
    expected = classified(made(text), [*plain, *more]).cuts
    assert {name: found.cuts[inner.get(name, name)] for name in expected} == expected
    assert found.cuts[vision.name] == Cut("replicate")
    assert entry is not None
    depth = entry["prefix"].count(".")
    assert entry["replicated"] == [".".join(vision.name.split(".")[:depth])]
