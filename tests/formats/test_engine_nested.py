"""vLLM's names of models that nest a text model: the real commands over each type, towers by hand, and refusals.

What vLLM itself holds of each is compared by `make test-engines`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines import fp8_blocks
from tests.engines.engine_nested import LOADED, make
from tests.helpers.command import fails, succeeds
from tests.helpers.grids import some
from tests.helpers.multimodal_checkpoints import renamed

Tensors = dict[str, torch.Tensor]
Made = Callable[[str], Path]
EACH = tuple(name for name in LOADED if "-" not in name)
"""One checkpoint of every type."""

NOT_RUN = (
    *("gemma4_unified", "ernie4_5_moe_vl", "ernie4_5_moe_vl-tied", "muse_glimmer", "molmo2", "molmo2-olmo-norms"),
    *("step3p7", "phi4mm"),
)
"""Those whose text model verify does not run."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A checkpoint by its name, made once."""

    def get(name: str) -> Path:
        path = home / name
        return path if path.exists() else make(name, path)

    home = tmp_path_factory.mktemp("nested")
    return get


def everything(directory: Path) -> Tensors:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def ranks(directory: Path) -> list[Tensors]:
    """The engine's tensors of each rank."""
    return [load_file(path) for path in sorted(directory.glob("model-rank-*.safetensors"))]


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", some(LOADED, EACH))
def test_split_checked_verified_and_merged(name: str, made: Made, tmp_path: Path) -> None:
    source, shards = made(name), tmp_path / "shards"
    succeeds("split", source, "--tp", 2, "--format", "vllm", "-o", shards)
    succeeds("check", shards, "--source", source)
    tiers = "bytes" if name in NOT_RUN else "bytes,weights"
    assert succeeds("verify", shards, "--source", source, "--tier", tiers, "--json").json["verdict"] == "pass"
    tower = [each for each in everything(source) if each.split(".")[0] not in ("lm_head", "language_model")]
    tower = [each for each in tower if not each.startswith(("model.language_model.", "model.layers.", "model.norm."))]
    assert len(tower) > 5
    succeeds("merge", shards, "-o", tmp_path / "merged")
    assert same(everything(tmp_path / "merged"), everything(source))


def test_a_tower_is_cut_by_heads_and_features(made: Made, tmp_path: Path) -> None:
    source = everything(made("qwen2_5_vl"))
    succeeds("split", made("qwen2_5_vl"), "--tp", 2, "--format", "vllm", "-o", tmp_path / "out")
    for rank, held in enumerate(ranks(tmp_path / "out")):
        block = "visual.blocks.1"
        q, k, v = source[f"{block}.attn.qkv.weight"].chunk(3)
        own = torch.cat([each.chunk(2)[rank] for each in (q, k, v)])
        assert torch.equal(held[f"{block}.attn.qkv.weight"], own)
        assert torch.equal(held[f"{block}.attn.proj.weight"], source[f"{block}.attn.proj.weight"].chunk(2, 1)[rank])
        assert torch.equal(held[f"{block}.attn.proj.bias"], source[f"{block}.attn.proj.bias"])
        gate, up = (source[f"{block}.mlp.{each}_proj.bias"].chunk(2)[rank] for each in ("gate", "up"))
        assert torch.equal(held[f"{block}.mlp.gate_up_proj.bias"], torch.cat([gate, up]))
        assert torch.equal(held["visual.patch_embed.proj.weight"], source["visual.patch_embed.proj.weight"])
        q, k, v = (source[f"model.layers.0.self_attn.{each}_proj.bias"].chunk(2)[rank] for each in "qkv")
        assert torch.equal(held["language_model.model.layers.0.self_attn.qkv_proj.bias"], torch.cat([q, k, v]))


def test_what_vllm_gathers_is_cut_as_one(made: Made, tmp_path: Path) -> None:
    name = "visual.blocks.0.attn.qkv.weight"
    succeeds("split", made("qwen2_vl"), "--tp", 4, "--format", "vllm", "-o", tmp_path / "out")
    assert torch.equal(torch.cat([held[name] for held in ranks(tmp_path / "out")]), everything(made("qwen2_vl"))[name])


def test_adapters_and_layers_that_vllm_does_not_make_lie_beside(made: Made, tmp_path: Path) -> None:
    """Of a model with rules for all of it, towers too."""
    source = everything(made("phi4mm"))
    succeeds("split", made("phi4mm"), "--tp", 2, "--format", "vllm", "-o", tmp_path / "out")
    held = ranks(tmp_path / "out")
    tower = "vision_encoder.img_processor.encoder.layers."
    assert {name.removeprefix(tower)[0] for name in held[0] if name.startswith(tower)} == {"0", "1"}
    heads = source["model.embed_tokens_extend.image_embed.img_processor.encoder.layers.1.self_attn.out_proj.weight"]
    assert torch.equal(held[1][f"{tower}1.self_attn.out_proj.weight"], heads.chunk(2, 1)[1])
    assert not [name for name in held[0] if "lora" in name or "head.probe" in name]
    beside = load_file(tmp_path / "out" / "source-rank-0-part-1.safetensors")
    assert {name.removeprefix("source.") for name in beside} == {
        name for name in source if "lora" in name or "layers.2." in name or "head.probe" in name or "post_layer" in name
    }


def test_experts_of_pictures_are_a_stack_of_their_own(made: Made, tmp_path: Path) -> None:
    source = everything(made("ernie4_5_moe_vl"))
    succeeds("split", made("ernie4_5_moe_vl"), "--tp", 2, "--format", "vllm", "-o", tmp_path / "out")
    for rank, held in enumerate(ranks(tmp_path / "out")):
        for stack, experts in (("text_experts", range(8)), ("vision_experts", range(8, 16))):
            mlp = "model.layers.1.mlp."
            both = [
                torch.cat([source[f"{mlp}experts.{each}.{p}_proj.weight"].chunk(2)[rank] for p in ("gate", "up")])
                for each in experts
            ]
            assert torch.equal(held[f"language_model.{mlp}{stack}.routed_experts.w13_weight"], torch.stack(both))
        gate = held["language_model.model.layers.1.mlp.vision_experts_gate.weight"]
        assert torch.equal(gate, source["model.layers.1.mlp.gate.weight_1"].float().t())


def test_embeddings_that_are_one_are_cut_as_one(made: Made, tmp_path: Path) -> None:
    """1000 rows and 8, padded to 1024: the second table lies on the last rank alone, and zeros follow it."""
    source = everything(made("molmo2"))
    succeeds("split", made("molmo2"), "--tp", 4, "--format", "vllm", "-o", tmp_path / "out")
    both = torch.cat([source[f"model.transformer.wte.{each}embedding"] for each in ("", "new_")])
    whole = torch.cat([both, torch.zeros(16, 256, dtype=both.dtype)])
    held = [each["model.embed_tokens.weight"] for each in ranks(tmp_path / "out")]
    assert torch.equal(torch.cat(held), whole) and {each.shape for each in held} == {(256, 256)}


def test_layers_behind_the_features_lie_beside_the_engine_s_files(made: Made, tmp_path: Path) -> None:
    succeeds("split", made("llava"), "--tp", 2, "--format", "vllm", "-o", tmp_path / "out")
    loaded = set(ranks(tmp_path / "out")[0])
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in loaded
    assert not any("encoder.layers.1." in name or "post_layernorm" in name for name in loaded)
    beside = everything(tmp_path / "out").keys() - loaded
    assert any("encoder.layers.1.mlp.fc1.weight" in name for name in beside)


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_names_that_transformers_5_saves_give_the_same(name: str, made: Made, tmp_path: Path) -> None:
    tower = "vision_tower.vision_model."
    saved = renamed(
        made(name), tmp_path / "saved", {tower: "vision_tower.", "language_model.model": "language_model.model"}
    )
    nested = {tower: "model.vision_tower.", "multi": "model.multi", "language_model.model": "model.language_model"}
    newer = renamed(made(name), tmp_path / "newer", nested | {"language_model.lm_head": "lm_head"})
    succeeds("split", made(name), "--tp", 2, "--format", "vllm", "-o", tmp_path / "out")
    for source in (saved, newer):
        out = tmp_path / f"{source.name}-out"
        succeeds("split", source, "--tp", 2, "--format", "vllm", "-o", out)
        assert all(map(same, ranks(out), ranks(tmp_path / "out")))
        verdict = succeeds("verify", out, "--source", source, "--tier", "weights", "--json").json
        assert verdict["verdict"] == "pass"


def test_stacked_experts_of_either_order_give_the_same(made: Made, tmp_path: Path) -> None:
    published = made("qwen3_vl_moe")
    turned = shutil.copytree(published, tmp_path / "turned")
    tensors = everything(published)
    experts = {name: tensor.mT.contiguous() for name, tensor in tensors.items() if ".experts." in name}
    assert len(experts) == 4
    save_file(tensors | experts, turned / "model.safetensors", metadata={"format": "pt"})
    for source in (published, turned):
        succeeds("split", source, "--tp", 2, "--format", "vllm", "-o", tmp_path / f"{source.name}-out")
    assert all(map(same, ranks(tmp_path / "turned-out"), ranks(tmp_path / "qwen3_vl_moe-out")))


def test_reshard_from_any_format_equals_split(made: Made, tmp_path: Path) -> None:
    source = made("qwen3_vl-tied")
    for form, tp in (("native", 2), ("vllm", 4), ("vllm", 2)):
        succeeds("split", source, "--tp", tp, "--format", form, "-o", tmp_path / f"{form}{tp}")
    for whence in ("native2", "vllm4"):
        succeeds("reshard", tmp_path / whence, "--tp", 2, "--format", "vllm", "-o", tmp_path / f"from-{whence}")
        for file in (*(tmp_path / "vllm2").glob("model-*"), tmp_path / "vllm2" / "config.json"):
            assert (tmp_path / f"from-{whence}" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["qwen2_5_vl-tied", "gemma3", "mistral3-tied"])
def test_a_tied_head_is_said_where_engines_read_it(name: str, made: Made, tmp_path: Path) -> None:
    succeeds("split", made(name), "--tp", 2, "--format", "vllm", "-o", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is True
    held = ranks(tmp_path / "out")[0].keys()
    assert "language_model.lm_head.weight" in held
    assert "language_model.model.embed_tokens.weight" not in held


def _without_bias(config: dict[str, Any]) -> None:
    del config["text_config"]["attention_bias"]


def _other_tower(config: dict[str, Any]) -> None:
    config["vision_config"]["model_type"] = "dinov2"


def _other_heads(config: dict[str, Any]) -> None:
    config["vision_config"]["num_heads"] = 5


def _no_count(config: dict[str, Any]) -> None:
    config["vision_config"]["num_heads"] = None


def _no_tower(config: dict[str, Any]) -> None:
    config["vision_config"] = "a picture"


def _several_layers(config: dict[str, Any]) -> None:
    config["vision_feature_layer"] = [-2, -1]


@pytest.mark.parametrize(
    ("name", "change", "code", "said"),
    [
        ("llava", _several_layers, 4, "several layers"),
        ("glm4v", _without_bias, 4, "without attention_bias"),
        ("llava", _other_tower, 4, "tower"),
        ("qwen3_vl", _other_heads, 3, "contradicts the shape of model.visual"),
        ("qwen3_vl", _no_count, 3, "does not say how many"),
        ("llava", _no_tower, 4, "tower"),
    ],
)
def test_refused(
    name: str,
    change: Callable[[dict[str, Any]], None],
    code: int,
    said: str,
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = shutil.copytree(made(name), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    change(config)
    (source / "config.json").write_text(json.dumps(config))
    assert said in fails(code, "split", source, "--tp", 2, "--format", "vllm", "-o", "out")["message"]


def test_heads_of_a_tower_that_do_not_divide_are_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = fails(4, "split", made("qwen2_5_vl"), "--tp", 8, "--format", "vllm", "-o", "out")
    assert "4 vision heads on 8 ranks" in error["message"]


def test_a_quantised_model_with_a_tower_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = fp8_blocks.packed("glm4v_moe", tmp_path / "source")
    message = fails(4, "split", source, "--tp", 2, "--format", "vllm", "-o", "out")["message"]
    assert "glm4v_moe quantised by compressed-tensors" in message


def test_a_quantised_tower_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = fp8_blocks.nesting("qwen3_vl", tmp_path / "source", "")
    tensors = everything(source)
    name = next(each for each in tensors if "visual.blocks.0.attn.proj.weight" in each)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(-(-tensors[name].shape[0] // 128), -(-tensors[name].shape[1] // 128))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    error = fails(4, "split", source, "--tp", 2, "--format", "vllm", "-o", "out")
    assert "beside the text" in error["message"] and error["tensor"] == name


QUANTISED = {
    **{
        f"{name}-fp8": partial(fp8_blocks.nesting, name, place="text_config" if name in fp8_blocks.PLACED else "")
        for name in fp8_blocks.NESTED
    },
    **{f"{name}-int4": partial(fp8_blocks.packed, name) for name in fp8_blocks.PACKED},
}


@pytest.mark.parametrize("name", some(QUANTISED, ["kimi_k25-int4", "qwen3_vl-fp8"]))
def test_a_quantised_text_is_split_checked_verified_and_merged(name: str, tmp_path: Path) -> None:
    source, shards = QUANTISED[name](path=tmp_path / "source"), tmp_path / "shards"
    succeeds("split", source, "--tp", 2, "--format", "vllm", "-o", shards)
    succeeds("check", shards, "--source", source)
    found = succeeds("verify", shards, "--source", source, "--tier", "bytes", "--tier", "weights", "--json").json
    assert found["verdict"] == "pass"
    succeeds("merge", shards, "-o", tmp_path / "merged")
    assert same(everything(tmp_path / "merged"), everything(source))
