"""The families that are served with many GPUs: what each rank holds of the published files, by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tpshard
from tests.helpers.by_hand import tensors_of, tensors_of_file
from tests.helpers.grids import in_turn, without
from tests.helpers.served_checkpoints import SERVED, make, written
from tests.helpers.served_cuts import held
from tests.helpers.toys import Tensor, contents, random_tensor, read_all, write_checkpoint
from tpshard.execute.publish import Settings
from tpshard.rules.architecture import builtin


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in found:
            found[name] = make(name, tmp_path_factory.mktemp("served") / "model")
        return found[name]

    return get


# Their text models have tests of their own, or another form is tested.
ALIKE = ("gemma4", "glm46v", "kimi_k25", "mistral3 with mistral4", "deepseek_v4, as transformers saves it")
ALIKE = (*ALIKE, "minimax_m3_vl, numbers for layers")


@pytest.mark.parametrize(("name", "turned"), in_turn(without(SERVED, ALIKE), (False, True)))
def test_there_and_back(name: str, turned: bool, served: Any, quick: Settings, tmp_path: Path) -> None:
    import torch

    model, cuts = served(name), SERVED[name].cuts
    widths = SERVED[name].widths[:: -1 if turned else 1]
    source = tensors_of(model)
    for tp in widths:
        tpshard.split(model, tp, tmp_path / f"{tp}", settings=quick)
        for rank in range(tp):
            (file,) = (tmp_path / f"{tp}").glob(f"rank-{rank:05}-of-{tp:05}.safetensors")
            found = tensors_of_file(file)
            assert found.keys() == source.keys()
            for each, whole in source.items():
                wanted = held(each, whole, cuts, rank, tp)
                assert torch.equal(found[each].view(torch.uint8), wanted.contiguous().view(torch.uint8)), (
                    f"{rank}: {each}"
                )
    out, other = (tmp_path / f"{tp}" for tp in widths)
    assert tpshard.check(out, model, settings=quick).equal
    tpshard.merge(out, tmp_path / "merged", settings=quick)
    assert read_all(tmp_path / "merged") == read_all(model)
    tpshard.reshard(out, widths[1], tmp_path / "resharded", settings=quick)
    assert contents(tmp_path / "resharded") == contents(other)


def _quantised(model: Path, out: Path, packed: str, narrow: str, declared: dict[str, Any], group: int = 32) -> Path:
    """A checkpoint with random bits in the place of weights. packed: names of those of 4 bits, narrow: of 8."""
    rng, tensors = np.random.default_rng(1), dict[str, Tensor]()
    config = json.loads((model / "config.json").read_text()) | declared
    for name, tensor in read_all(model).items():
        module = name.removesuffix(".weight")
        if re.search(packed, name) and "pack-quantized" in str(declared):
            rows, columns = tensor.shape
            tensors[f"{module}.weight_packed"] = random_tensor(rng, "I32", (rows, columns // 8))
            tensors[f"{module}.weight_scale"] = random_tensor(rng, "BF16", (rows, columns // group))
            tensors[f"{module}.weight_shape"] = random_tensor(rng, "I32", (2,))
        elif re.search(packed, name):
            rows, columns = tensor.shape
            tensors[name] = random_tensor(rng, "I8", (rows, columns // 2))
            tensors[f"{module}.scale"] = random_tensor(rng, "F8_E8M0", (rows, columns // group))
        elif narrow and re.search(narrow, name):
            rows, columns = tensor.shape
            tensors[name] = random_tensor(rng, "F8_E4M3", tensor.shape)
            tensors[f"{module}.scale"] = random_tensor(rng, "F8_E8M0", (-(-rows // 8), -(-columns // 8)))
        else:
            tensors[name] = tensor
    return write_checkpoint(out, config, tensors)


def _there_and_back(model: Path, folder: Path, settings: Settings) -> dict[str, Tensor]:
    """Rank 1 of 2, of a split that is equal to the source and merged is the source."""
    tpshard.split(model, 2, folder / "out", settings=settings)
    assert tpshard.check(folder / "out", model, settings=settings).equal
    tpshard.merge(folder / "out", folder / "merged", settings=settings)
    assert read_all(folder / "merged") == read_all(model)
    return read_all(folder / "out", "rank-00001-*.safetensors")


def test_deepseek_v4_as_published_in_fp8_and_fp4(quick: Settings, tmp_path: Path) -> None:
    """Blocks of FP8, and experts of two values a byte with a scale for 32 of them."""
    wide = replace(
        SERVED["deepseek_v4"], shapes={}, config=SERVED["deepseek_v4"].config | {"moe_intermediate_size": 64}
    )
    model = _quantised(
        written(wide, tmp_path / "plain"),
        tmp_path / "model",
        r"\.experts\.\d+\.w\d\.weight$",
        r"(attn\.(w\w+|indexer\.wq_b)|shared_experts\.w\d)\.weight$",
        {
            "expert_dtype": "fp4",
            "quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [8, 8]},
        },
    )
    found = _there_and_back(model, tmp_path, quick)
    assert found["layers.1.ffn.experts.3.w1.weight"].shape == (32, 32)
    assert found["layers.1.ffn.experts.3.w2.scale"].shape == (64, 1)
    assert found["layers.1.attn.wo_b.scale"].shape == (8, 3)
    assert found["layers.1.attn.indexer.wq_b.scale"].shape == (8, 3)
    assert found["layers.1.attn.wq_b.scale"].shape == (8, 3)


def test_kimi_k25_as_published_in_int4(quick: Settings, tmp_path: Path) -> None:
    """Experts of compressed-tensors, packed into words; all the rest as it is."""
    text = SERVED["kimi_k25"].config["text_config"] | {"moe_intermediate_size": 64}
    wide = replace(SERVED["kimi_k25"], config=SERVED["kimi_k25"].config | {"text_config": text})
    weights = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, "type": "int"}
    declared = {
        "quantization_config": {
            **{"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
    }
    model = _quantised(
        written(wide, tmp_path / "plain"), tmp_path / "model", r"\.experts\.\d+\.\w+\.weight$", "", declared
    )
    found = _there_and_back(model, tmp_path, quick)
    start = "language_model.model.layers.1.mlp.experts.3."
    assert found[f"{start}up_proj.weight_packed"].shape == (32, 8)
    assert found[f"{start}down_proj.weight_packed"].shape == (64, 4)
    assert found[f"{start}down_proj.weight_scale"].shape == (64, 1)


@pytest.mark.parametrize(
    "model_type",
    ["deepseek_v4", "kimi_linear", "bailing_hybrid", "longcat_flash", "minimax_m3_vl_text", "step3p5"],
)
def test_defaults_are_those_of_the_config_class(model_type: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    for key, value in builtin(model_type).defaults.items():
        if key != "num_hash_layers":  # the class reads it, and keeps a list of layers
            known = getattr(type(config), key) if hasattr(type(config), key) else getattr(config, key, None)
            assert known == value, key
