"""`--format vllm` of quantised checkpoints against vLLM's own loader, bit for bit: every fixture of the table.

Run by `make test-engines`. Loading needs no kernels, so `held.py` takes their choosers out, and processes nothing after
loading, which is where vLLM's own loader of `sharded_state` puts the files' tensors too. Where a CPU has the kernels,
the engine is started: on the unsharded checkpoint, on ours, and on what vLLM saves itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tpshard
from tests.engines.running import Engine, Ranks, differences, everything, generate, written
from tests.quantised.fixture_table import FIXTURES, TABLE
from tpshard.errors import UnsupportedError

REFUSED = {
    "autoround-mixed-bits": "INC",
    "ct-int4-g-idx": "activation ordering",
    "ct-int4-nested-text-config": "Mistral3ForConditionalGeneration",
    "fbgemm-fp8": "fbgemm_fp8",
    "fp4-experts-deepseek": "scale",
    "gptq-int4-asym": "sym=False",
    "gptq-int4-desc-act": "desc_act=True",
    "gptq-int4-v2": "sym=False",
    "modelopt-fp8-pb-wo": "divisible by 128",
    "modelopt-w4a8-awq": "only supports",
}
"""What vLLM says of the unsharded checkpoint that tpshard refuses to split for it."""
COMPLETED = {
    "fp8-block-deepseek": {"topk_method": "noaux_tc"},
    "fp8-block-deepseek-mtp": {"topk_method": "noaux_tc"},
    "fp8-block-qwen3-moe": {"quantization_config": {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]}},
}
"""What vLLM needs in the configs that transformers wrote, to load the unsharded checkpoint."""
LOADED = sorted({each.name for each in TABLE} - REFUSED.keys())
AT_FOUR = (
    "autoround-awq",
    "ct-fp8-kv-per-head",
    "ct-fp8-static-phi3",
    "ct-int4-asym-group",
    "ct-nvfp4-qwen3-moe",
    "fp8-block-qwen3",
    "gptq-int4",
    "modelopt-nvfp4-kv",
)
"""Those with KV heads repeated; a fixture for each way in which companions become something else."""


def completed(name: str, directory: Path) -> Path:
    """A copy of a fixture, with what vLLM needs in its config."""
    shutil.copytree(FIXTURES / name, directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key, value in COMPLETED.get(name, {}).items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(("name", "tp"), [*((name, 2) for name in LOADED), *((name, 4) for name in AT_FOUR)])
def test_ours_loads_as_what_vllm_holds(name: str, tp: int, engine: Engine, tmp_path: Path) -> None:
    source = completed(name, tmp_path / "source")
    theirs = engine.held(source, tp, "auto", tmp_path / "theirs")
    shards = tmp_path / "shards"
    tpshard.split(source, tp, shards, format="vllm")
    assert differences(in_dtypes_of(theirs, written(shards, tp)), theirs) == []
    assert differences(engine.held(shards, tp, "sharded_state", tmp_path / "loaded"), theirs) == []
    assert not tpshard.check(shards, source).differences
    tpshard.merge(shards, tmp_path / "merged")
    merged, whole = everything(tmp_path / "merged"), everything(source)
    lost = sorted(whole.keys() - merged.keys())
    assert all(name.endswith("-mtp") and ".layers.2." in key for key in lost), lost
    assert differences([merged], [{key: whole[key] for key in whole.keys() - set(lost)}]) == []


def in_dtypes_of(theirs: Ranks, ours: Ranks) -> Ranks:
    """Our files' tensors as the loader casts them: it takes scales as the checkpoint has them."""
    return [
        {name: tensor.to(held[name].dtype) if name in held else tensor for name, tensor in rank.items()}
        for rank, held in zip(ours, theirs, strict=True)
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_is_what_vllm_refuses(name: str, engine: Engine, tmp_path: Path) -> None:
    source = completed(name, tmp_path / "source")
    with pytest.raises(UnsupportedError):
        tpshard.split(source, 2, tmp_path / "shards", format="vllm")
    with pytest.raises(RuntimeError, match=REFUSED[name]):
        engine.held(source, 2, "auto", tmp_path / "theirs")


RUN = (
    "autoround-awq",
    "autoround-gptq",
    "ct-fp8-channel",
    "ct-int4-asym-group",
    "ct-int4-channel",
    "ct-int4-group",
    "ct-int8-static",
    "ct-int8-w8a8",
    "gptq-int4",
    "gptq-int4-channel",
)
"""Those for which a CPU has kernels."""
NOT_RUN: dict[str, str] = {}
"""What the started engine says of the unsharded checkpoint where a CPU has none: these are loaded, and not run."""
SAVED: dict[str, str] = {}
"""What the engine says of the `sharded_state` that it has saved itself."""


@pytest.mark.parametrize("name", RUN)
def test_tokens_of_the_started_engine(name: str, tmp_path: Path) -> None:
    source = completed(name, tmp_path / "source")
    tpshard.split(source, 2, tmp_path / "shards", format="vllm")
    unsharded = generate(source, "auto")
    assert all(len(each["tokens"]) == len(each["logprobs"]) > 1 for each in unsharded)
    assert generate(tmp_path / "shards", "sharded_state") == unsharded


@pytest.mark.parametrize("name", NOT_RUN)
def test_loaded_and_not_run(name: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=NOT_RUN[name]):
        generate(completed(name, tmp_path / "source"), "auto")


@pytest.mark.parametrize("name", SAVED)
def test_what_vllm_saves_itself_does_not_load(name: str, tmp_path: Path) -> None:
    source, saved = completed(name, tmp_path / "source"), tmp_path / "saved"
    generate(source, "auto", saved)
    shutil.copy(source / "config.json", saved)
    with pytest.raises(RuntimeError, match=SAVED[name]):
        generate(saved, "sharded_state")
