"""`--engine-version`: names of one version and of another, through the real commands."""

import json
from pathlib import Path

import pytest

from tests.helpers.command import fails, llama, succeeds
from tests.helpers.toys import read_all
from tests.quantised.fixture_table import FIXTURES
from tpshard.formats.engine_tables import load_table
from tpshard.formats.vllm import FORMAT

LATER = """
[later."9.9"]
read = ["mistral"]

[later."9.9".refused_models]
smollm3 = "vLLM dropped it in 9.9"
gpt_neo = ""

[later."9.9".families.llama.renamed]
".input_layernorm" = ".first_norm"

[later."9.9".families.llama.fused]
".mlp.gate_up_proj" = []

[later."9.9".families.new]
like = "llama"
model_types = ["llama_bidirec"]
"""


TO_VLLM = ("--tp", 2, "--format", "vllm")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version more, in which much is another than in those that are known; llama_bidirec is known in it alone."""
    text = FORMAT.path.read_text().replace('model_types = ["llama_bidirec"]', "model_types = []")
    versions = next(line for line in text.splitlines() if line.startswith("versions = "))
    Path("later.toml").write_text(text.replace(versions, versions.replace("]", ', "9.9"]')) + LATER)
    monkeypatch.setattr(FORMAT, "path", Path("later.toml").absolute())


def names(source: Path, out: str, *version: str) -> set[str]:
    """The parameters that the engine loads of a set, which is right and comes back whole."""
    succeeds("split", source, *TO_VLLM, "-o", out, *version)
    succeeds("check", out, "--source", source)
    succeeds("merge", out, "-o", f"{out}-merged")
    assert read_all(Path(f"{out}-merged")) == read_all(source)
    return set(read_all(Path(out), "model-rank-0-*.safetensors"))


@pytest.mark.parametrize("version", load_table(FORMAT.path).versions)
def test_every_known_version_is_taken_and_kept(version: str) -> None:
    names(llama(Path("model")), "out", "--engine-version", version)
    assert json.loads(Path("out/tpshard.json").read_text())["options"]["engine_version"] == version


def test_an_unknown_version_is_refused_with_those_that_are_known() -> None:
    error = fails(4, "split", llama(Path("model")), *TO_VLLM, "--engine-version", "0.1", "-o", "out")
    assert "names of vLLM 0.1" in error["message"] and error["expected"] == ", ".join(load_table(FORMAT.path).versions)


@pytest.mark.usefixtures("later")
def test_files_have_the_names_of_the_version_that_is_asked_for() -> None:
    first, last = (names(llama(Path("model")), "first"), names(Path("model"), "last", "--engine-version", "9.9"))
    changed = {name.removeprefix("model.layers.0.") for name in last - first if ".0." in name}
    assert changed == {"first_norm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"}


@pytest.mark.usefixtures("later")
def test_a_family_that_is_like_it_changes_with_it() -> None:
    model = llama(Path("model"), model_type="ernie4_5", head_dim=4)
    assert "model.layers.0.first_norm.weight" in names(model, "out", "--engine-version", "9.9")


@pytest.mark.usefixtures("later")
def test_what_one_version_does_not_load_another_one_may() -> None:
    dropped, new = llama(Path("dropped"), model_type="smollm3"), llama(Path("new"), model_type="llama_bidirec")
    error = fails(4, "split", dropped, *TO_VLLM, "--engine-version", "9.9", "-o", "out")
    assert "vLLM 9.9 does not load smollm3" in error["message"] and "--engine-version 0.32" in error["hint"]
    names(dropped, "out")
    error = fails(4, "split", new, *TO_VLLM, "-o", "other")
    assert "llama_bidirec" in error["message"] and error["hint"].endswith("or --engine-version 9.9")
    names(new, "other", "--engine-version", "9.9")


def test_quantised_models_are_for_versions_of_which_they_were_compared() -> None:
    source, out = FIXTURES / "fp8-block-llama", ("-o", "out")
    error = fails(4, "split", source, *TO_VLLM, "--engine-version", "0.33", *out)
    assert "vLLM 0.33 for quantised models" in error["message"] and "compared" in error["message"]
    succeeds("split", source, *TO_VLLM, "--engine-version", "0.32", *out)


@pytest.mark.usefixtures("later")
def test_archs_says_of_each_type_which_versions_were_run_and_which_read() -> None:
    listed = succeeds("archs", "--json").json
    versions = {
        each["model_type"]: {(of["version"], of["compared"]) for of in each["versions"] if of["engine"] == "vllm"}
        for entry in listed["architectures"]
        for each in entry["supported"]
    }
    assert ("9.9", "read") in versions["mistral"] and ("0.32", "run") in versions["mistral"]
    assert ("9.9", "run") in versions["llama"] and versions["llama_bidirec"] == {("9.9", "run")}
    assert "9.9" not in {version for version, _ in versions["smollm3"]} and versions["gpt_neo"] == set()
    assert any("9.9 read" in line and "mistral" in line for line in succeeds("archs").out.splitlines())
