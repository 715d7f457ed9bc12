"""What config.json says must be there: the rules beside transformers' classes, and checkpoints that contradict it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.checkpoints import _COMMON, VARIANTS, make
from tests.helpers.command import LLAMA, fails, llama, llama_tensors, succeeds, tpshard
from tests.helpers.grids import some
from tests.helpers.toys import Tensor, write_checkpoint
from tpshard.errors import CorruptError
from tpshard.rules.multimodal import find_rules
from tpshard.storage.safetensors import TensorInfo

FEW = ["llama", "qwen2-bias", "gpt2", "gpt_neox", "falcon-new", "opt", "deepseek_v3", "nemotron_h", "stablelm-bias"]
Shapes = Mapping[str, tuple[int, ...]]


@cache
def model_of(name: str, **changes: Any) -> tuple[dict[str, Any], Shapes, Any]:
    """A variant's config, the shapes of its stored tensors, and its model; without memory."""
    from transformers import AutoConfig
    from transformers.core_model_loading import revert_weight_conversion

    from tpshard.verifier.hf.skeleton import class_of

    variant = VARIANTS[name]
    config = AutoConfig.for_model(variant.model_type, **{**_COMMON, **variant.config, **changes})
    with torch.device("meta"):
        model = class_of(config)(config)
    stored = revert_weight_conversion(model, model.state_dict())  # type: ignore[no-untyped-call]
    found = {key: tuple(value.shape) for key, value in stored.items()}
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    said = {**config.to_dict(), "model_type": variant.model_type, "architectures": [type(model).__name__]}
    return said, found, model


def infos(shapes: Shapes) -> list[TensorInfo]:
    made = []
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        made.append(TensorInfo(name, "BF16", shape, "model.safetensors", 0, size))
    return made


def accepted(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether rules and config agree that these tensors are a whole model."""
    try:
        find_rules(config, None, "config.json").classify(infos(shapes), {})
    except CorruptError:
        return False
    return True


def one_of_each_kind(names: Any) -> list[str]:
    """One name of each kind: layers and experts are alike."""
    return list({re.sub(r"\b\d+\b", "*", name): name for name in names}.values())


def switched(name: str) -> list[dict[str, Any]]:
    """The variant's config with each of its flags that decide about a tensor turned over, one at a time."""
    config, _, _ = model_of(name)
    changes: list[dict[str, Any]] = [{}]
    for key, value in config.items():
        if isinstance(value, bool) and ("bias" in key or key == "tie_word_embeddings" or "affine" in key):
            both = ("attention_bias", "mlp_bias") if config["model_type"] == "internlm3" and "bias" in key else (key,)
            changes.append({each: not value for each in both})
    return changes


@pytest.mark.parametrize("name", some(VARIANTS, FEW))
def test_what_must_be_there_is_what_transformers_class_has(name: str) -> None:
    for change in switched(name):
        config, shapes, _ = model_of(name, **change)
        assert accepted(config, shapes), change
        biases = [each for each in shapes if each.endswith(".bias")]
        for bias in one_of_each_kind(biases):
            assert not accepted(config, {n: s for n, s in shapes.items() if n != bias}), f"{change} without {bias}"
        for weight in one_of_each_kind(n for n in shapes if n.endswith(".weight")):
            bias = weight.removesuffix("weight") + "bias"
            if bias not in shapes:
                out = shapes[weight][:1]
                assert not accepted(config, {**shapes, bias: out}), f"{change} with {bias}"
        if not config["tie_word_embeddings"]:
            headless = {n: s for n, s in shapes.items() if not re.match("lm_head|embed_out|output_projection", n)}
            assert not accepted(config, headless), f"{change} without a head"


@pytest.mark.parametrize("name", some(VARIANTS, FEW))
def test_what_transformers_keeps_in_float32_stays_so(name: str) -> None:
    """The strict list of a class in any checkpoint, the other in one that is stored in fewer bits."""
    from transformers.core_model_loading import revert_weight_conversion

    config, shapes, model = model_of(name)
    strict, soft = (getattr(model, key) or () for key in ("_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"))
    for mixed, modules in ((False, {*strict}), (True, {*strict, *soft})):
        held = {key: value for key, value in model.state_dict().items() if any(_has(key, each) for each in modules)}
        kept = shapes.keys() & revert_weight_conversion(model, held)
        tensors = [replace(info, dtype="F32" if info.name in kept or not mixed else "BF16") for info in infos(shapes)]
        found, _ = find_rules(config, None, "config.json").classify(tensors, {})
        assert set(kept) <= set(found.float32), (mixed, set(kept) - set(found.float32))
        assert mixed or not strict or set(kept) == set(found.float32)


def _has(name: str, module: str) -> bool:
    """Whether a name of transformers' list is that of a tensor: whole components of it."""
    return f".{module}." in f".{name}."


@pytest.mark.parametrize("format", ["native", "vllm"])
@pytest.mark.parametrize(
    ("lost", "config"),
    [
        ("bias", {"attention_bias": True}),
        ("bias", {"model_type": "qwen2"}),
        ("lm_head", {"tie_word_embeddings": False}),
        ("lm_head", {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}),
    ],
)
def test_split_refuses_what_the_config_contradicts(
    lost: str, config: dict[str, Any], format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = {name: tensor for name, tensor in llama_tensors().items() if lost not in name}
    model = write_checkpoint(Path("model"), LLAMA | config, tensors)
    error = fails(3, "split", model, "--tp", 2, "--format", format, "-o", "out")
    assert lost in error["tensor"]


def test_a_bias_that_the_config_does_not_have_and_a_head_that_a_base_model_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bias = "model.layers.0.self_attn.o_proj.bias"
    extra = llama_tensors() | {bias.replace("0", str(i)): Tensor("F32", (16,), bytes(64)) for i in range(2)}
    error = fails(3, "split", write_checkpoint(Path("biased"), LLAMA, extra), "--tp", 2, "-o", "out")
    assert (error["tensor"], error["expected"]) == (bias, "no bias (attention_bias is None)")
    base = {name: tensor for name, tensor in llama_tensors().items() if name != "lm_head.weight"}
    model = write_checkpoint(Path("base"), LLAMA | {"architectures": ["LlamaModel"]}, base)
    succeeds("split", model, "--tp", 2, "-o", "out", "--no-fsync")


@pytest.mark.parametrize("format", ["native", "vllm"])
def test_a_stored_head_that_is_not_the_embedding_it_is_tied_to_is_said(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept, in vLLM's names too: transformers computes with it."""
    monkeypatch.chdir(tmp_path)
    out = ("--tp", 2, "--format", format, "-o", "set", "--overwrite", "--no-fsync", "--json")
    model = make("llama-gqa", tmp_path / "model")
    config, weights = model / "config.json", model / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    (said,) = succeeds("split", model, *out).json["warnings"]
    assert said.startswith("config.json ties lm_head.weight to model.embed_tokens.weight, but another one is stored")
    result = tpshard("verify", "set", "--source", model, "--tier", "exact", "--reference", "transformers")
    assert result.code == 0, result.err
    tensors = load_file(weights)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, weights)
    assert succeeds("split", model, *out).json["warnings"] == []


def test_verify_holds_the_source_against_its_config_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that is changed after the split, in the source and in the set alike."""
    monkeypatch.chdir(tmp_path)
    model = llama(Path("model"))
    succeeds("split", model, "--tp", 2, "-o", "out", "--no-fsync", "--checksum", "none")
    for directory in ("model", "out"):
        path = Path(directory, "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": True}))
    for engine in ("tpshard", "transformers"):
        result = tpshard("verify", "out", "--source", model, "--tier", "weights", "--engine", engine)
        assert result.code == 3 and "config.json contradicts the weights" in result.err, result.err
