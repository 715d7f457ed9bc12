"""Quantised checkpoints through `tpshard split` and `tpshard verify`: every format, and what must be noticed.

Those that quantisers wrote are in tests/quantised; those of random bits have modules for every fault.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.command import Result, succeeds, tpshard
from tests.helpers.grids import some
from tests.helpers.paths import TESTS
from tests.helpers.quantised_by_hand import FORMATS, quantised
from tests.helpers.toys import metadata
from tpshard.inputs.checkpoint import open_checkpoint
from tpshard.verifier.dequantise.find import recipes
from tpshard.verifier.ranks.open import FileWeights

FIXTURES = TESTS / "quantised" / "fixtures"

PLAIN = {"bit-flipped", "rows-exchanged", "copy-stale"}
SHIFTED = PLAIN | {"scales-shifted"}
ZEROS, GROUPS = {"zeros-of-another-rank"}, {"groups-of-another-rank"}
HALVES, ORDER, TWINS = {"nibbles-exchanged"}, {"order-of-awq-exchanged"}, {"gate-and-up-scales-exchanged"}
CANARIES: dict[str, set[str]] = {
    "fp8-block": SHIFTED | TWINS,
    "fp8-tensor": PLAIN | TWINS,
    "fp8-channel": SHIFTED,
    "fp8-row": SHIFTED,
    "fp8-four-dims": SHIFTED | TWINS,
    "mxfp8": SHIFTED,
    "int8": SHIFTED,
    "int3-zeros": SHIFTED | ZEROS,
    "int4-groups": SHIFTED | ZEROS | GROUPS | HALVES,
    "int8-channel": SHIFTED,
    "nvfp4": SHIFTED | HALVES | TWINS,
    "nvfp4-modelopt": SHIFTED | HALVES | TWINS,
    "mxfp4": SHIFTED | HALVES,
    "w4a8-awq": SHIFTED | HALVES,
    "gptq": SHIFTED | ZEROS | HALVES | ORDER,
    "gptq-v2-8": SHIFTED | ZEROS,
    "gptq-scattered": SHIFTED | ZEROS | GROUPS | HALVES | ORDER,
    "awq": SHIFTED | ZEROS | HALVES | ORDER,
    "deepseek": SHIFTED,
    "gpt-oss": SHIFTED | HALVES,
}
"""By format, the faults that can be put into a rank's memory."""
assert CANARIES.keys() == {*FORMATS, "deepseek", "gpt-oss"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def split(name: str) -> None:
    quantised(name, Path("model"))
    succeeds("split", "model", "--tp", 2, "-o", "out", "--no-fsync")


def verify(*options: object, source: Path = Path("model")) -> Result:
    return tpshard("verify", "out", "--source", source, "--tokens", 1, "--json", *options)


def change(name: str, edit: Callable[[Tensor], Tensor], rank: int = 1) -> None:
    path = Path("out") / f"rank-{rank:05}-of-00002.safetensors"
    tensors = load_file(path)
    assert name in tensors, sorted(tensors)
    tensors[name] = edit(tensors[name]).contiguous()
    save_file(tensors, path, metadata(path))


def bit_flipped(tensor: Tensor) -> Tensor:
    tensor.view(-1).view(torch.uint8)[0] ^= 1
    return tensor


@pytest.mark.parametrize("name", some(CANARIES, ["nvfp4", "gptq-scattered"]))
def test_every_format_passes(name: str) -> None:
    split(name)
    found = verify().json
    assert (found["verdict"], found["reason"]) == ("pass", None)
    assert [tier["name"] for tier in found["tiers"]] == ["bytes", "weights", "exact", "native"]
    faults = {canary["name"] for canary in found["canaries"] if canary["tier"] == "weights"}
    assert faults == CANARIES[name]
    beside = {"input_scale", "input_global_scale", "weight_scale_2"}
    assert {each["prefix"].rpartition(".")[2] for each in found["not_run"]} <= beside
    assert bool(found["not_run"]) is (name in ("fp8-tensor", "nvfp4", "nvfp4-modelopt", "w4a8-awq"))


_WRITTEN = sorted(path.name for path in FIXTURES.iterdir())
_FEW = ["fp8-block-qwen3", "modelopt-w4a8-awq", "ct-int3-asym-group", "autoround-awq", "mxfp4-gpt-oss"]
_NOT_RUN = {"fp8-block-deepseek-mtp": "model.layers.2"}
"""Fixtures with a layer that nothing runs."""


@pytest.mark.parametrize("name", some(_WRITTEN, _FEW))
def test_what_quantisers_wrote(name: str) -> None:
    """It passes; with a bit of a value or of a scale turned over, the difference is in that tensor of that rank."""
    source = FIXTURES / name
    succeeds("split", source, "--tp", 2, "-o", "out", "--no-fsync")
    allowed = ("--allow-not-run", _NOT_RUN[name]) if name in _NOT_RUN else ()
    found = verify(*allowed, source=source)
    assert found.code == 0 and found.json["verdict"] == "pass", found.json["reason"]
    checkpoint = open_checkpoint(source)
    quantised_weights = recipes(FileWeights(checkpoint.tensors), checkpoint.quantisation or {})
    weight = next((each for each in quantised_weights if "down_proj" in each), None) or next(iter(quantised_weights))
    for role in ("values", "scale"):
        stored = quantised_weights[weight].stored[role]
        change(stored, bit_flipped)
        result = verify("--tier", "weights", source=source)
        assert result.code == 1 and stored in result.json["reason"] and "of rank 1" in result.json["reason"]
        change(stored, bit_flipped)
    assert verify("--tier", "weights", *allowed, source=source).code == 0


@pytest.mark.parametrize(("name", "form"), [("fp8-block-llama", "dcp-hf"), ("fp8-block-deepseek", "deepseek")])
def test_formats_that_store_modules_as_the_source_does(name: str, form: str) -> None:
    source = FIXTURES / name
    succeeds("split", source, "--tp", 2, "-o", "out", "--no-fsync", "--format", form)
    found = verify("--tier", "weights", source=source).json
    assert found["verdict"] == "pass" and "scales-shifted" in {canary["name"] for canary in found["canaries"]}


def test_a_scale_of_activations_is_compared_by_name() -> None:
    split("fp8-tensor")
    name = "model.layers.1.mlp.down_proj.input_scale"
    change(name, bit_flipped)
    result = verify("--tier", "weights")
    assert result.code == 1 and name in result.json["reason"]


def test_a_shape_that_is_neither_the_sources_nor_the_ranks() -> None:
    split("int3-zeros")
    change("model.layers.1.mlp.down_proj.weight_shape", lambda shape: shape + 1)
    result = tpshard("verify", "out", "--source", "model", "--tier", "weights")
    assert result.code == 1 and "model.layers.1.mlp.down_proj.weight_shape" in result.err


_ENGINES = [("gptq", "--reference"), ("gptq", "--engine"), ("fp8-block", "--engine"), ("nvfp4", "--reference")]


@pytest.mark.parametrize(("name", "option"), some(_ENGINES, _ENGINES[:1]))
def test_transformers_own_class(name: str, option: str) -> None:
    split(name)
    found: dict[str, Any] = verify("--tier", "exact", option, "transformers").json
    assert found["verdict"] == "pass"
    assert [tier["name"] for tier in found["tiers"]] == ["exact", "transformers"][: 2 if option == "--reference" else 1]


_STREAMED = [name for name in FORMATS if name in CANARIES]


@pytest.mark.parametrize("name", some(_STREAMED, ["nvfp4"]))
def test_transformers_own_class_that_reads_what_it_needs(name: str) -> None:
    split(name)
    options = ("--engine", "transformers", "--tier", "exact,native")
    kept, read = (verify(*options, option).json for option in ("--no-stream", "--stream"))
    assert (kept["settings"].pop("streamed"), read["settings"].pop("streamed")) == (False, True)
    assert kept.pop("volatile").keys() == read.pop("volatile").keys() and read == kept
    assert read["verdict"] == "pass"


def test_streamed_and_cast() -> None:
    """What is not quantised may have been cast when it was split; nothing else is."""
    quantised("fp8-block", Path("model"))
    succeeds("split", "model", "--tp", 2, "-o", "out", "--no-fsync", "--dtype", "float32")
    assert verify("--stream").json["verdict"] == "pass"


def test_a_nested_model_keeps_its_names_in_torchs_own_format() -> None:
    """What stands before the text model's names stays, as vision tower and projector keep theirs."""
    model = FIXTURES / "ct-int4-nested-text-config"
    succeeds("split", model, "--tp", 2, "--format", "dcp-hf", "-o", "out", "--no-fsync")
    files = sorted(Path("out").glob("*.safetensors"))
    stored = {name for file in files for name in load_file(file)}
    assert stored == set(load_file(model / "model.safetensors")) and len(files) == 2
    succeeds("verify", "out", "--source", model, "--tier", "weights", "--device", "cpu")
    succeeds("merge", "out", "-o", "whole")
    assert load_file(Path("whole/model.safetensors")).keys() == stored
