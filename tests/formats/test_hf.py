"""The ordinary layout as a format: an unsharded checkpoint anew, from a checkpoint or from ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.checkpoints import make
from tests.helpers.command import fails, succeeds
from tpshard.cli.options import FORMAT
from tpshard.formats import FORMATS


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_checkpoint_in_files_of_another_size() -> None:
    from transformers import AutoModelForCausalLM

    make("llama", Path("model"))
    report = succeeds("split", "model", "--tp", 1, "--format", "hf", "--max-file-size", "50kB", "--json").json
    assert report["output"] == "model-hf"
    files = sorted(Path("model-hf").glob("*.safetensors"))
    assert len(files) > 1 and Path("model-hf/model.safetensors.index.json").exists()
    assert not list(Path("model-hf").glob("tpshard.json"))
    tokens = torch.arange(8)[None]
    one, other = (AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in ("model", "model-hf"))
    assert torch.equal(one, other)


def test_ranks_become_what_merge_makes_of_them() -> None:
    make("gpt2", Path("model"))
    succeeds("split", "model", "--tp", 2, "-o", "two")
    succeeds("reshard", "two", "--tp", 1, "--format", "hf", "-o", "one")
    succeeds("merge", "two", "-o", "merged")
    names = {path.name for path in Path("merged").iterdir()}
    assert names | {"SHA256SUMS"} == {path.name for path in Path("one").iterdir()} and "model.safetensors" in names
    for name in names:
        assert Path("one", name).read_bytes() == Path("merged", name).read_bytes()


def test_a_cast_and_what_is_refused() -> None:
    make("opt", Path("model"))
    succeeds("split", "model", "--tp", 1, "--format", "hf", "--dtype", "bfloat16", "-o", "half")
    source, half = load_file("model/model.safetensors"), load_file("half/model.safetensors")
    assert all(torch.equal(half[name], source[name].bfloat16()) for name in source)
    assert "--tp 1" in str(fails(2, "split", "model", "--tp", 2, "--format", "hf", "-o", "out"))
    assert "--ranks" in str(fails(2, "split", "model", "--tp", 1, "--format", "hf", "--ranks", 0, "-o", "out"))
    assert "native" in str(fails(2, "split", "model", "--tp", 2, "--format", "tensorrt", "-o", "out"))


def test_help_names_every_format() -> None:
    said = FORMAT.__metadata__[0].help.rpartition(":")[2].strip(" .").split(", ")
    assert sorted(said) == sorted(FORMATS)
