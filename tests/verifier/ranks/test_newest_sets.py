"""vLLM's sets of models that few others are like: what is right passes every tier, what is wrong is named.

Each is what the engines' tests compare with vLLM itself, in the form that is published.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.engines import engine_models, engine_nested, engine_newest
from tests.helpers.command import Result, succeeds
from tests.helpers.command import tpshard as run
from tests.helpers.grids import in_turn, some
from tests.helpers.mistral_form import FOR_ENGINES, published

Tensors = dict[str, torch.Tensor]
Make = Callable[[Path], Path]
Made = Callable[[str, int], tuple[Path, Path]]

# As published, with a layer more in the lists of layers than the model has.
_FURTHER = {"num_nextn_predict_layers": 1}
_STEP_3_7 = engine_nested.LOADED["step3p7"][1]["text_config"]
FORMS: dict[str, Make] = {
    **{
        name: lambda path, name=name: engine_newest.make(name, path)
        for name in (
            *("kimi_linear", "minimax_m3_vl", "glm5_next", "hy_v4", "deepseek_v4"),
            *("dots3_note", "inkling_mm_model", "deepseek_vl_v2", "NemotronH_Nano_VL_V2"),
        )
    },
    **{
        name: lambda path, name=name: engine_nested.make(name, path)
        for name in ("molmo2", "molmo2-olmo-norms", "muse_glimmer", "ernie4_5_moe_vl", "ernie4_5_moe_vl-tied", "phi4mm")
    },
    **{name: lambda path, form=form: published(path, form[0], **form[1]) for name, form in FOR_ENGINES.items()},
    "falcon_h1": lambda path: engine_models.make("falcon_h1", path),
    "gemma4_unified": lambda path: engine_nested.make("gemma4_unified", path),
    "step3p5": lambda path: engine_models.make("step3p5", path, _FURTHER),
    "step3p7": lambda path: engine_nested.make("step3p7", path, {"text_config": _STEP_3_7 | _FURTHER}),
    **{
        name: lambda path, name=name: engine_models.make(name, path)
        for name in (
            *("zamba2", "zamba2-one-group", "minicpm", "bailing_moe_v2", "exaone", "phimoe", "granitemoehybrid"),
            *("bailing_moe", "bailing_moe-tied", "bailing_moe_v3-head-wise", "nemotron-nas"),
        )
    },
}
BY_DEFAULT = ("kimi_linear", "molmo2", "step3p5", "zamba2-one-group")
GRID = in_turn(list(FORMS), (4, 2))


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A source and its set for vLLM, each made once."""
    home = tmp_path_factory.mktemp("newest")

    def get(name: str, tp: int) -> tuple[Path, Path]:
        source, shards = home / name, home / f"{name}-tp{tp}"
        if not source.exists():
            FORMS[name](source)
        if not shards.exists():
            succeeds("split", source, "--tp", tp, "--format", "vllm", "-o", shards, "--no-fsync")
        return source, shards

    return get


def verified(shards: Path, source: Path, tiers: str) -> Result:
    return run("verify", shards, "--source", source, "--tier", tiers, "--tokens", 1, "--json")


@pytest.mark.parametrize(("name", "tp"), some(GRID, [case for case in GRID if case[0] in BY_DEFAULT]))
def test_a_right_set_passes(name: str, tp: int, split: Made) -> None:
    source, shards = split(name, tp)
    found = verified(shards, source, "bytes,weights,exact")
    assert (found.code, found.json["verdict"], found.json["reason"]) == (0, "pass", None)
    assert all(canary["status"] == "caught" for canary in found.json["canaries"])


def test_adapters_that_a_set_does_not_have_are_said(split: Made) -> None:
    source, shards = split("phi4mm", 2)
    said = "32 tensors of adapters are not in a set for vllm: the model is run without them"
    assert said in verified(shards, source, "weights").json["warnings"]


def test_places_that_are_as_many_as_the_features_of_all_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kimi Linear's ranks have place for 256 features at least: of as many a rank of two has half, and zeros."""
    form = engine_newest.LOADED["kimi_linear"]
    wide = replace(form, config={**form.config, "moe_intermediate_size": 256})
    monkeypatch.setitem(engine_newest.LOADED, "wide", wide)
    source, shards = engine_newest.make("wide", tmp_path / "source"), tmp_path / "shards"
    succeeds("split", source, "--tp", 2, "--format", "vllm", "-o", shards, "--no-fsync")
    found = verified(shards, source, "weights,exact")
    assert (found.code, found.json["verdict"], found.json["reason"]) == (0, "pass", None)


Fault = Callable[[list[Tensors]], None]
"""Changes the ranks' tensors."""


def exchanged(name: str) -> Fault:
    """Two ranks have each other's slices."""

    def fault(ranks: list[Tensors]) -> None:
        ranks[0][name], ranks[1][name] = ranks[1][name], ranks[0][name]

    return fault


def flipped(name: str, at: tuple[int, ...]) -> Fault:
    """The last bit of an element of rank 1."""

    def fault(ranks: list[Tensors]) -> None:
        element = ranks[1][name][at].view(-1)
        element.view(torch.int32 if element.element_size() == 4 else torch.int16)[0] ^= 1

    return fault


def turned(name: str, one: slice, other: slice) -> Fault:
    """Rows of each rank exchanged."""

    def fault(ranks: list[Tensors]) -> None:
        for held in ranks:
            before = held[name].clone()
            held[name][one], held[name][other] = before[other], before[one]

    return fault


def halves_exchanged(name: str) -> Fault:
    """Of each expert's rows."""

    def fault(ranks: list[Tensors]) -> None:
        for held in ranks:
            held[name] = held[name].roll(held[name].shape[1] // 2, 1)

    return fault


def filled(name: str, at: tuple[int, ...]) -> Fault:
    """A number where there must be none."""

    def fault(ranks: list[Tensors]) -> None:
        ranks[1][name][at] = 1.0

    return fault


L, TEXT = "model.layers.", "language_model.model.layers."
MOE = "block_sparse_moe.experts"
# 8 heads of 32 on 2 ranks: the rows of q, k and v each are 128, those of b 4.
FAULTS: dict[str, tuple[str, Fault, str]] = {
    "kimi, heads": ("kimi_linear", exchanged(f"{L}0.self_attn.in_proj_qkvgfab.weight"), f"{L}0.self_attn."),
    "kimi, q and k": (
        "kimi_linear",
        turned(f"{L}0.self_attn.in_proj_qkvgfab.weight", slice(0, 128), slice(128, 256)),
        f"{L}0.self_attn.q_proj",
    ),
    "kimi, what all ranks hold": (
        "kimi_linear",
        flipped(f"{L}0.self_attn.in_proj_qkvgfab.weight", (400, 3)),
        "layers.0.self_attn.forget_gate.f_a_proj.weight[12, 3] of rank 1",
    ),
    "kimi, convolutions": (
        "kimi_linear",
        turned(f"{L}0.self_attn.conv1d.weight", slice(0, 128), slice(128, 256)),
        f"{L}0.self_attn.",
    ),
    "kimi, an expert": ("kimi_linear", flipped(f"{L}1.{MOE}.routed_experts.w13_weight", (3, 257, 0)), f"{L}1."),
    "kimi, a place without a feature": (
        "kimi_linear",
        filled(f"{L}1.{MOE}.routed_experts.w2_weight", (3, 0, 200)),
        f"{MOE}.routed_experts.w2_weight of rank 1 does not hold shares",
    ),
    "step, gate and up": (
        "step3p5",
        halves_exchanged(f"{L}1.moe.experts.routed_experts.w13_weight"),
        "layers.1.m",
    ),
    "step, an expert": ("step3p5", flipped(f"{L}2.moe.experts.routed_experts.w13_weight", (1, 40, 0)), "layers.2."),
    "step, a shared expert": (
        "step3p5",
        exchanged(f"{L}1.moe.experts._shared_experts._layer.gate_up_proj.weight"),
        "layers.1.mlp.shared_experts.gate_proj",
    ),
    "zamba, an adapter's first half": (
        "zamba2",
        exchanged(f"{L}0.shared_transformer.feed_forward.gate_up_proj_adapter_list.2.A.weight"),
        "gate_up_proj_adapter_list.2.0",
    ),
    "zamba, an adapter's other half": (
        "zamba2",
        flipped(f"{L}0.shared_transformer.self_attn.linear_k_adapter_list.2.B.weight", (5, 5)),
        "linear_k_adapter_list.2.1",
    ),
    "zamba, a bias beside a convolution": (
        "zamba2-one-group",
        flipped(f"{L}0.mamba_decoder.mamba.conv1d.bias", (32,)),
        "mamba.conv1d.bias",
    ),
    "molmo, words that are only read": (
        "molmo2",
        flipped("model.embed_tokens.weight", (490, 0)),
        "embed_tokens.weight[1002, 0]",
    ),
    "molmo, words": ("molmo2", exchanged("model.embed_tokens.weight"), "embed"),
    "molmo, heads": ("molmo2", exchanged(f"{L}1.self_attn.qkv_proj.weight"), "1.self_attn"),
    "molmo, the tower": (
        "molmo2",
        exchanged("vision_backbone.image_vit.transformer.resblocks.0.attention.merged_qkv.weight"),
        "resblocks.0.attention.w",
    ),
    "molmo, pooling": ("molmo2", exchanged("vision_backbone.image_pooling_2d.q_proj.weight"), "image_pooling_2d.wq"),
    "muse, a gate": ("muse_glimmer", exchanged(f"{L}1.self_attn.output_gate_proj.weight"), "1.self_attn.gate_proj"),
    "muse, the tower": (
        "muse_glimmer",
        flipped("vision_encoder.transformer.0.mlp.c_fc.weight", (5, 0)),
        "vision_tower.layers.0.mlp.fc1.weight",
    ),
    "minimax, what chooses blocks": (
        "minimax_m3_vl",
        exchanged(f"{TEXT}1.self_attn.qkv_proj.weight"),
        "layers.1.self_attn",
    ),
    "minimax, a key of blocks": (
        "minimax_m3_vl",
        flipped(f"{TEXT}1.self_attn.qkv_proj.weight", (250, 0)),
        "layers.1.self_attn.index",
    ),
    "minimax, the tower": (
        "minimax_m3_vl",
        exchanged("vision_tower.patch_merge_mlp.linear_2.weight"),
        "patch_merge_mlp.linear_2.weight",
    ),
    "ernie, an expert for pictures": (
        "ernie4_5_moe_vl",
        exchanged(f"{TEXT}1.mlp.vision_experts.routed_experts.w2_weight"),
        "1.mlp",
    ),
    "ernie, a router": ("ernie4_5_moe_vl", flipped(f"{TEXT}1.mlp.vision_experts_gate.weight", (0, 0)), "1.mlp"),
    "ernie, the resampler": (
        "ernie4_5_moe_vl",
        exchanged("resampler_model.temporal_linear2.weight"),
        "model.resampler_model.temporal_linear.2.weight",
    ),
    "step 3.7, the tower": (
        "step3p7",
        exchanged("vision_model.transformer.resblocks.0.attn.qkv_proj.weight"),
        "resblocks.0.attn.in_proj_weight",
    ),
    "glm, heads": (
        "glm5_next",
        exchanged("language_model.model._active_layers.0.self_attn.in_proj_qkvbfg_a.weight"),
        "layers.0.self_attn.",
    ),
    "glm, decay": (
        "glm5_next",
        exchanged("language_model.model._active_layers.0.self_attn.A_log"),
        "layers.0.self_attn",
    ),
    "ling 1, keys and values": (
        "bailing_moe",
        turned(f"{L}1.attention.query_key_value.weight", slice(128, 160), slice(160, 192)),
        "layers.1.self_attn.k_proj.weight of rank 0 holds",
    ),
    "ling 1, words that are read and written": (
        "bailing_moe-tied",
        flipped("lm_head.weight", (3, 3)),
        "model.embed_tokens.weight[",
    ),
    "ling 1, an expert": (
        "bailing_moe",
        flipped(f"{L}0.mlp.experts.routed_experts.w13_weight", (3, 40, 0)),
        "layers.0.mlp.experts.3.up_proj.weight of rank 1 holds",
    ),
    "ling 3, gates of heads": (
        "bailing_moe_v3-head-wise",
        exchanged(f"{L}0.self_attn.qkvb_proj.weight"),
        "layers.0.self_attn.b_proj.weight of rank 1",
    ),
    "ling 3, latents": (
        "bailing_moe_v3-head-wise",
        exchanged(f"{L}1.self_attn.kv_b_proj.weight"),
        "layers.1.self_attn.kv_b_proj.weight of rank 1",
    ),
    "nas, heads": ("nemotron-nas", exchanged(f"{L}0.self_attn.qkv_proj.weight"), "layers.0.self_attn.q_proj"),
    "nas, gate and up": ("nemotron-nas", flipped(f"{L}0.mlp.gate_up_proj.weight", (70, 0)), "layers.0.mlp."),
    "phi, heads": ("phi4mm", exchanged(f"{L}1.self_attn.qkv_proj.weight"), "layers.1.self_attn.qkv_proj"),
    "phi, an element": (
        "phi4mm",
        flipped(f"{L}1.mlp.down_proj.weight", (3, 5)),
        "layers.1.mlp.down_proj.weight of rank 1 holds",
    ),
    "phi, the tower": (
        "phi4mm",
        exchanged("vision_encoder.img_processor.encoder.layers.0.self_attn.qkv_proj.bias"),
        "img_processor.encoder.layers.0.self_attn.",
    ),
    "phi, what hears": (
        "phi4mm",
        flipped("embed_tokens_extend.audio_projection_for_vision.2.weight", (0, 0)),
        "audio_projection.vision.2.weight[0, 0] of rank 1",
    ),
    "dots, latents": (
        "dots3_note",
        exchanged(f"{TEXT}1.self_attn.mla_attn.q_b_proj.weight"),
        "layers.1.self_attn.q_b_proj",
    ),
    "dots, what chooses tokens": (
        "dots3_note",
        flipped(f"{TEXT}0.self_attn.indexer.wk_weights_proj.weight", (66, 0)),
        "layers.0.self_attn.indexer.weights_proj.weight[2, 0] of rank 1",
    ),
    "dots, a gate": (
        "dots3_note",
        turned(f"{TEXT}2.self_attn.g_proj.weight", slice(0, 1), slice(1, 2)),
        "layers.2.self_attn.g_proj",
    ),
    "dots, the tower": (
        "dots3_note",
        flipped("visual.blocks.0.attn.qkv.weight", (5, 0)),
        "vision_tower.blocks.0.attn.qkv.weight[5, 0] of rank 1",
    ),
    "mistral, heads": ("mistral", exchanged(f"{L}1.self_attn.qkv_proj.weight"), "layers.1.self_attn.v_proj"),
    "mistral, an order of rows": (
        "mistral",
        turned(f"{L}1.self_attn.qkv_proj.weight", slice(128, 144), slice(144, 160)),
        "layers.1.self_attn.k_proj",
    ),
    "mistral, an element of q": (
        "mistral",
        flipped(f"{L}0.self_attn.qkv_proj.weight", (17, 0)),
        "layers.0.self_attn.q_proj.weight",
    ),
    "mistral, words that are read and written": ("mistral-tied", flipped("lm_head.weight", (3, 3)), "embed"),
    "mistral, latents": (
        "mistral-large-3",
        exchanged(f"{L}1.self_attn.mla_attn.q_b_proj.weight"),
        "layers.1.self_attn.q_b_proj",
    ),
    "mistral, an expert": (
        "mistral-large-3",
        flipped(f"{L}1.mlp.experts.routed_experts.w2_weight", (2, 0, 0)),
        "layers.1.experts.2.w2.weight of rank 1",
    ),
    "inkling, gate and up": (
        "inkling_mm_model",
        halves_exchanged(f"{L}1.mlp.experts.routed_experts.w13_weight"),
        "layers.1.mlp.experts.gate_up_proj",
    ),
    "inkling, heads": ("inkling_mm_model", exchanged(f"{L}1.attn.qkvr.weight"), "layers.1.self_attn."),
    "inkling, what is shared": (
        "inkling_mm_model",
        exchanged(f"{L}1.mlp.sink_experts.w2_weight"),
        "layers.1.mlp.shared_experts.",
    ),
    "inkling, convolved features": ("inkling_mm_model", exchanged(f"{L}1.mlp_sconv.weight"), "layers.1.mlp_sconv"),
    "inkling, a router without an expert": (
        "inkling_mm_model",
        filled(f"{L}1.mlp.gate.weight", (12, 0)),
        "mlp.gate.weight of rank 1 is not 10 rows with zeros behind",
    ),
    "inkling, the tower": (
        "inkling_mm_model",
        flipped("visual.vision_encoder.layers.linear_1.weight", (0, 0)),
        "visual.layers.linear_1.weight",
    ),
    "deepseek vl, latents": (
        "deepseek_vl_v2",
        exchanged(f"{TEXT}1.self_attn.kv_b_proj.weight"),
        "layers.1.self_attn.kv_b_proj",
    ),
    "deepseek vl, the tower": ("deepseek_vl_v2", exchanged("vision.attn_pool.mlp.fc1.weight"), "attn_pool.mlp.fc1"),
    "nano, heads": ("NemotronH_Nano_VL_V2", exchanged(f"{TEXT}1.mixer.qkv_proj.weight"), "layers.1.mixer.q_proj"),
    "nano, the tower": (
        "NemotronH_Nano_VL_V2",
        exchanged("vision_model.model.encoder.layers.0.attn.qkv.weight"),
        "radio_model.model.blocks.0.attn.qkv.weight",
    ),
    "nano, a factor": (
        "NemotronH_Nano_VL_V2",
        flipped("vision_model.model.encoder.layers.0.ls1", (5,)),
        "encoder.layers.0.ls1",
    ),
    "hy, streams": ("hy_v4", flipped(f"{L}1.hc_mlp_layer.hc_pre.hc_fn.weight", (3, 3)), "layers.1."),
    "hy, an expert": ("hy_v4", exchanged(f"{L}1.mlp.experts.routed_experts.w13_weight"), "layers.1.mlp.experts"),
    "deepseek, sinks": ("deepseek_v4", exchanged(f"{L}0.attn.attn_sink"), "layers.0."),
    "deepseek, an expert": (
        "deepseek_v4",
        flipped(f"{L}1.ffn.experts.routed_experts.w2_weight", (2, 0, 0)),
        "layers.1.",
    ),
    "deepseek, a shared expert": (
        "deepseek_v4",
        exchanged(f"{L}1.ffn.experts._shared_experts._layer.down_proj.weight"),
        "layers.1.",
    ),
}


@pytest.mark.parametrize(
    "fault",
    some(
        list(FAULTS),
        ["kimi, q and k", "kimi, a place without a feature", "step, gate and up", "zamba, an adapter's first half"]
        + ["zamba, a bias beside a convolution", "molmo, words that are only read", "ernie, an expert for pictures"]
        + ["ernie, the resampler"],
    ),
)
def test_a_mistake_is_named(fault: str, split: Made, tmp_path: Path) -> None:
    name, change, said = FAULTS[fault]
    source, right = split(name, 2)
    shards = shutil.copytree(right, tmp_path / "shards")
    paths = [shards / f"model-rank-{rank}-part-0.safetensors" for rank in range(2)]
    ranks = [load_file(path) for path in paths]
    change(ranks)
    for path, tensors in zip(paths, ranks, strict=True):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({each: tensor.contiguous() for each, tensor in tensors.items()}, path, metadata)
    found = verified(shards, source, "weights")
    if found.code == 0:  # an order that only running shows
        found = verified(shards, source, "exact")
    reason = found.json.get("reason") or found.err
    assert (found.code, said in reason) == (1, True), reason
