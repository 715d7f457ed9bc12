"""`check`: where in which file a set differs from its source, whatever the format calls the tensors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.checkpoints import make
from tests.helpers.command import llama, succeeds, tpshard
from tests.helpers.grids import without
from tpshard.inputs.shard_set import open_shards

SETS = {"native": 2, "vllm": 2, "sglang": 2, "meta": 2, "dcp": 2, "dcp-hf": 2, "deepseek": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LLaMA whose vocabulary divides, and a DeepSeek-V3, for the format that holds nothing else."""
    root = tmp_path_factory.mktemp("models")
    return {"llama": llama(root / "llama", vocab_size=12), "deepseek": make("deepseek_v3", root / "v3", vocab_size=256)}


@pytest.mark.parametrize("form", SETS)
def test_a_flipped_bit_is_named_in_every_kind_of_tensor_of_every_format(
    form: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tensor that is fused of several the source's part is named as well; a KeyError once."""
    monkeypatch.chdir(tmp_path)
    model = models["deepseek" if form == "deepseek" else "llama"]
    succeeds("split", model, "--tp", SETS[form], "--format", form, "-o", "set", "-q", "--no-fsync")
    fused = 0
    for file in open_shards(Path("set")).files[1]:
        kept = file.path.read_bytes()
        kinds = {re.sub(r"\b\d+\b", "N", info.name): info for info in file.tensors}  # a layer, an expert of each
        for info in without(file.tensors, [info for info in file.tensors if info not in kinds.values()]):
            at = info.begin + info.nbytes // 2
            file.path.write_bytes(kept[:at] + bytes([kept[at] ^ 1]) + kept[at + 1 :])
            result = tpshard("check", "set", "--source", model, "--json")
            assert result.code == 1
            (found,) = result.json["differences"]
            assert (found["file"], found["tensor"]) == (file.path.name, info.name)
            assert f"byte {at:,} of the file" in found["message"]
            fused += ", which is of " in found["message"]
        file.path.write_bytes(kept)
    assert succeeds("check", "set", "--source", model, "--json").json["equal"]
    assert (fused > 0) is (form in ("vllm", "sglang", "meta", "deepseek"))
