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
import torch

import tpshard
from tests.engines import engine_models as models
from tests.engines import fp8_blocks
from tests.engines.check_vllm import rounded
from tests.engines.running import Generator, Loader, Ranks, differences, everything, split, written
from tests.helpers.gpt_oss import with_blocks
from tests.quantised.fixture_table import FIXTURES, TABLE
from tpshard.errors import UnsupportedError

pytest_plugins = ("tests.engines.engine_fixtures",)
REFUSED = {
    "autoround-mixed-bits": "INC",
    "ct-int4-g-idx": "activation ordering",
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
WHOLE_EXPERTS = (
    *("autoround-awq-qwen3-moe", "autoround-gptq-qwen3-moe", "ct-fp8-channel-qwen3-moe", "ct-int4-qwen3-moe"),
    *("ct-nvfp4-qwen3-moe", "ct-nvfp4-unequal-scales", "fp8-block-deepseek", "fp8-block-deepseek-mtp"),
    *("fp8-block-qwen3-moe", "fp8-block-stacked-experts", "modelopt-fp8-qwen3-moe", "modelopt-nvfp4-qwen3-moe"),
    *("modelopt-w4a16-nvfp4-qwen3-moe", "mxfp4-gpt-oss"),
)
"""Those with experts."""
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
def test_ours_loads_as_what_vllm_holds(name: str, tp: int, loader: Loader, tmp_path: Path) -> None:
    source = completed(name, tmp_path / "source")
    theirs = loader.held(source, tp, "auto", tmp_path / "theirs")
    shards = tmp_path / "shards"
    split(source, tp, shards, format="vllm")
    assert differences(in_dtypes_of(theirs, written(shards, tp)), theirs) == []
    assert differences(loader.held(shards, tp, "sharded_state", tmp_path / "loaded"), theirs) == []
    assert not tpshard.check(shards, source).differences
    tpshard.merge(shards, tmp_path / "merged")
    merged, whole = everything(tmp_path / "merged"), everything(source)
    lost = sorted(whole.keys() - merged.keys())
    assert all(name.endswith("-mtp") and ".layers.2." in key for key in lost), lost
    assert differences([merged], [{key: whole[key] for key in whole.keys() - set(lost)}]) == []


@pytest.mark.parametrize("name", WHOLE_EXPERTS)
def test_ours_is_what_vllm_holds_of_whole_experts(name: str, loader: Loader, tmp_path: Path) -> None:
    source = completed(name, tmp_path / "source")
    theirs = loader.held(source, 2, "auto", tmp_path / "theirs", ep=True)
    shards = tmp_path / "shards"
    split(source, 2, shards, format="vllm", ep=2)
    assert differences(in_dtypes_of(theirs, written(shards, 2)), theirs) == []
    assert differences(loader.held(shards, 2, "sharded_state", tmp_path / "loaded", ep=True), theirs) == []
    assert not tpshard.check(shards, source).differences
    tpshard.merge(shards, tmp_path / "merged")
    merged, whole = everything(tmp_path / "merged"), everything(source)
    assert all(".layers.2." in key for key in whole.keys() - merged.keys())
    assert differences([merged], [{key: whole[key] for key in merged}]) == []


@pytest.mark.parametrize("name", fp8_blocks.BLOCKS)
def test_fp8_in_blocks_of_families_without_a_fixture(name: str, loader: Loader, tmp_path: Path) -> None:
    require_held(fp8_blocks.make(name, tmp_path / "source"), loader, tmp_path)
    held = written(tmp_path / "shards", 2)[0]
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in held.values())


@pytest.mark.parametrize("name", fp8_blocks.PACKED_TEXTS)
def test_packed_texts_of_families_without_a_fixture(name: str, loader: Loader, tmp_path: Path) -> None:
    require_held(fp8_blocks.packed_text(name, tmp_path / "source"), loader, tmp_path)


@pytest.mark.parametrize(
    ("name", "place"),
    [*((name, "") for name in fp8_blocks.NESTED), *((name, "text_config") for name in fp8_blocks.PLACED)],
)
def test_text_in_fp8_that_a_model_nests(name: str, place: str, loader: Loader, tmp_path: Path) -> None:
    require_held(fp8_blocks.nesting(name, tmp_path / "source", place), loader, tmp_path)


@pytest.mark.parametrize("name", fp8_blocks.PACKED)
def test_packed_text_that_a_model_nests(name: str, loader: Loader, tmp_path: Path) -> None:
    require_held(fp8_blocks.packed(name, tmp_path / "source"), loader, tmp_path)


def require_held(source: Path, loader: Loader, tmp_path: Path) -> None:
    """Our files at tp 2 are what vLLM holds of a checkpoint, it loads them as that, and they come back whole."""
    theirs = loader.held(source, 2, "auto", tmp_path / "theirs")
    shards = tmp_path / "shards"
    split(source, 2, shards, format="vllm")
    assert differences(rounded(in_dtypes_of(theirs, written(shards, 2)), theirs), theirs) == []
    loaded = loader.held(shards, 2, "sharded_state", tmp_path / "loaded")
    assert differences(rounded(loaded, theirs), theirs) == []
    assert not tpshard.check(shards, source).differences
    tpshard.merge(shards, tmp_path / "merged")
    assert differences([everything(tmp_path / "merged")], [everything(source)]) == []


@pytest.mark.parametrize(
    "name", [*sorted({*fp8_blocks.BLOCKS, *fp8_blocks.DRAFTS} & models.DRAFTS.keys()), "qwen3_5", "qwen3_5_moe"]
)
def test_the_speculator_in_fp8_is_the_draft_model_that_vllm_holds(name: str, loader: Loader, tmp_path: Path) -> None:
    require_draft_held(fp8_blocks.with_draft(name, tmp_path / "source"), loader, tmp_path)


def test_the_speculator_with_an_index_in_fp8_is_the_draft_model_that_vllm_holds(loader: Loader, tmp_path: Path) -> None:
    require_draft_held(fp8_blocks.with_draft("deepseek_v32", tmp_path / "source", "weights_proj"), loader, tmp_path)


def require_draft_held(source: Path, loader: Loader, tmp_path: Path) -> None:
    """Our speculator at tp 2 is the draft model that vLLM makes of a checkpoint, and it loads it as that."""
    theirs = loader.held(source, 2, "auto", tmp_path / "theirs", draft=True)
    shards = tmp_path / "shards"
    split(source, 2, shards, format="vllm-speculator")
    assert differences(written(shards, 2), theirs) == []
    assert differences(loader.held(shards, 2, "sharded_state", tmp_path / "loaded", draft=True), theirs) == []
    assert not tpshard.check(shards, source).differences


@pytest.mark.parametrize("name", fp8_blocks.INDEXED)
def test_the_keys_of_an_index_are_held_multiplied_by_their_scales(name: str, loader: Loader, tmp_path: Path) -> None:
    source = fp8_blocks.indexed(name, tmp_path / "source")
    require_held(source, loader, tmp_path)
    index = "model.layers.1.self_attn.indexer."
    assert written(tmp_path / "shards", 2)[1][f"{index}wk_weights_proj.weight"].dtype == torch.bfloat16
    assert written(tmp_path / "shards", 2)[1][f"{index}wq_b.weight"].dtype == torch.float8_e4m3fn
    assert everything(source)[f"{index}wk.weight"].dtype == torch.float8_e4m3fn


def test_the_weights_of_an_index_that_are_quantised_are_not_loaded(loader: Loader, tmp_path: Path) -> None:
    source = fp8_blocks.indexed("deepseek_v32", tmp_path / "source", plain="none")
    with pytest.raises(UnsupportedError, match="indexer.weights_proj.weight: it is quantised"):
        split(source, 2, tmp_path / "shards", format="vllm")
    with pytest.raises(RuntimeError, match="weight_scale_inv"):
        loader.held(source, 2, "auto", tmp_path / "theirs")


@pytest.mark.parametrize("blocks", [5, 7])
def test_blocks_that_do_not_divide(blocks: int, loader: Loader, tmp_path: Path) -> None:
    """gpt-oss' parameters are as large as the kernel wants, and hold ours in their first rows and columns."""
    source, shards = with_blocks(blocks, tmp_path / "source"), tmp_path / "shards"
    theirs = loader.held(source, 2, "auto", tmp_path / "theirs")
    split(source, 2, shards, format="vllm")
    ours = written(shards, 2)
    inside = [
        {name: tensor[tuple(slice(size) for size in mine[name].shape)] for name, tensor in rank.items()}
        for mine, rank in zip(ours, theirs, strict=True)
    ]
    assert differences(in_dtypes_of(inside, ours), inside) == []
    assert differences(loader.held(shards, 2, "sharded_state", tmp_path / "loaded", roomy=True), theirs) == []
    assert any(rank[name].shape != tensor.shape for rank in inside for name, tensor in theirs[0].items())


def in_dtypes_of(theirs: Ranks, ours: Ranks) -> Ranks:
    """Our files' tensors as the loader casts them: it takes scales as the checkpoint has them."""
    return [
        {name: tensor.to(held[name].dtype) if name in held else tensor for name, tensor in rank.items()}
        for rank, held in zip(ours, theirs, strict=True)
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_is_what_vllm_refuses(name: str, loader: Loader, tmp_path: Path) -> None:
    source = completed(name, tmp_path / "source")
    with pytest.raises(UnsupportedError):
        split(source, 2, tmp_path / "shards", format="vllm")
    with pytest.raises(RuntimeError, match=REFUSED[name]):
        loader.held(source, 2, "auto", tmp_path / "theirs")


RUN = ("ct-fp8-channel", "ct-int8-static", "ct-int8-w8a8")
"""Those for which every CPU has kernels."""
RUN_WITH_AVX512 = (
    "autoround-awq",
    "autoround-gptq",
    "ct-int4-asym-group",
    "ct-int4-channel",
    "ct-int4-group",
    "gptq-int4",
    "gptq-int4-channel",
)
"""Those whose kernel is only in vLLM's build for AVX-512: INT4. What the other says of the unsharded checkpoint: """
NO_KERNEL = "object has no attribute 'cpu_gemm_wna16'"


@pytest.mark.parametrize("name", [*RUN, *RUN_WITH_AVX512])
def test_tokens_of_the_started_engine(name: str, generator: Generator, tmp_path: Path) -> None:
    source = completed(name, tmp_path / "source")
    if name in RUN_WITH_AVX512 and not torch.cpu._is_avx512_supported():
        with pytest.raises(RuntimeError, match=NO_KERNEL):
            generator.tokens(source, "auto", tmp_path / "unsharded")
        return
    unsharded = generator.tokens(source, "auto", tmp_path / "unsharded")
    assert all(len(each["tokens"]) == len(each["logprobs"]) > 1 for each in unsharded)
    split(source, 2, tmp_path / "shards", format="vllm")
    assert generator.tokens(tmp_path / "shards", "sharded_state", tmp_path / "sharded") == unsharded


def test_what_vllm_saves_of_int8_has_no_weights_and_does_not_load(generator: Generator, tmp_path: Path) -> None:
    source, saved = completed("ct-int8-w8a8", tmp_path / "source"), tmp_path / "saved"
    saved.mkdir()
    generator.tokens(source, "auto", tmp_path / "unsharded", saved)
    names = everything(saved).keys()
    assert "model.layers.0.mlp.down_proj.azp_adj" in names and "model.layers.0.mlp.down_proj.weight" not in names
    shutil.copy(source / "config.json", saved)
    with pytest.raises(RuntimeError, match=r"KeyError: 'model\.layers\.0\.mlp\.down_proj\.azp_adj'"):
        generator.tokens(saved, "sharded_state", tmp_path / "reloaded")


def test_vllm_cannot_save_fp8_per_channel_itself(generator: Generator, tmp_path: Path) -> None:
    source, saved = completed("ct-fp8-channel", tmp_path / "source"), tmp_path / "saved"
    saved.mkdir()
    with pytest.raises(RuntimeError, match="view size is not compatible"):  # the weights are turned round by then
        generator.tokens(source, "auto", tmp_path / "unsharded", saved)
    assert not list(saved.iterdir())
