"""`check` finds every byte of a set that is flipped; `check` and `verify` find every changed key of its config.

Of most files a sample; `make test-bytes` flips them all, one after the other.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest

import tpshard
from tests.helpers.checkpoints import make
from tests.helpers.command import llama, succeeds
from tests.helpers.command import tpshard as command
from tests.helpers.grids import ALL, some
from tpshard.api.check import check_framing
from tpshard.errors import TpshardError
from tpshard.execute.publish import Settings
from tpshard.formats.plan import plan_split
from tpshard.inputs.checkpoint import open_checkpoint
from tpshard.inputs.model import from_checkpoint
from tpshard.inputs.open import open_set
from tpshard.storage.names import SUMS

QUICK = Settings(workers=1, fsync=False)
PLAIN = Settings(workers=1, fsync=False, checksum=False)
EVERY = bool(os.environ.get("TPSHARD_EVERY_BYTE"))
SAMPLE = 10 if ALL else 2
"""How many bytes of a file are flipped, where not every one is."""
LARGE = 100_000
"""The size of a file of which not every byte is flipped: of DeepSeek's every 499th."""
SMALL = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4}
"""A DeepSeek of few tensors: every byte of its manifest is flipped."""
FORMATS = ["native", "vllm", "sglang", "meta", "dcp", "dcp-hf", "megatron", "megatron-legacy", "deepseek"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LLaMA of one layer whose vocabulary divides, and a DeepSeek-V3, for the format that holds nothing else."""
    root = tmp_path_factory.mktemp("models")
    made = {
        "llama": llama(root / "llama", vocab_size=12, num_hidden_layers=1),
        "deepseek": make("deepseek_v3", root / "v3", vocab_size=256, **SMALL),
    }
    for model in made.values():
        (model / "tokenizer.json").write_text('{"version": "1.0"}\n')
    return made


def is_noticed(set_: Path, model: Path | None) -> bool:
    """Whether `check` says that a set is not as it was written."""
    try:
        return not tpshard.check(set_, model, settings=QUICK).equal
    except TpshardError:
        return True


def flipped(path: Path, places: range) -> Iterator[int]:
    """A file with one byte flipped after the other, another bit each time; in the end as it was."""
    kept = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at in places:
            file.seek(at)
            file.write(bytes([kept[at] ^ 1 << at % 8]))
            yield at
            file.seek(at)
            file.write(kept[at : at + 1])
    assert path.read_bytes() == kept


@pytest.mark.parametrize(
    ("form", "checksum"),
    product(FORMATS, (True, False))
    if EVERY
    else some(product(FORMATS, (True, False)), [("native", True), ("native", False), ("meta", True), ("dcp", False)]),
)
def test_a_flipped_byte_is_noticed(form: str, checksum: bool, models: dict[str, Path], tmp_path: Path) -> None:
    """With the source always, and without it where checksums were recorded: a sample, or all of them."""
    model = models["deepseek" if form == "deepseek" else "llama"]
    tpshard.split(model, 2, tmp_path / "set", format=form, settings=QUICK if checksum else PLAIN)
    for path in sorted(path for path in (tmp_path / "set").rglob("*") if path.is_file()):
        size = path.stat().st_size
        weights = path.suffix in (".safetensors", ".pth", ".pt", ".distcp")
        for source in (model, None):
            if source is None and weights and not checksum:
                continue
            places = range(size % 7, size, max(1, size // SAMPLE))
            if EVERY:
                places = range(0, size, 1 if size < LARGE else 499)
            missed = [at for at in flipped(path, places) if not is_noticed(tmp_path / "set", source)]
            assert not missed, (path.name, source, missed)
    assert not is_noticed(tmp_path / "set", model)


@pytest.mark.parametrize("form", FORMATS)
def test_every_byte_around_the_tensors_is_compared(form: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Headers, pickles and directories of archives; by the plan of the source."""
    model = models["deepseek" if form == "deepseek" else "llama"]
    tpshard.split(model, 2, tmp_path / "set", format=form, settings=PLAIN)
    found = open_set(tmp_path / "set", False)
    planned = plan_split(from_checkpoint(open_checkpoint(model)), found.options)
    assert not check_framing(found, planned)
    (file,) = found.files[1]
    inside = {at for info in file.tensors for at in range(info.begin, info.end)}
    outside = sorted(set(range(file.size)) - inside)
    assert outside
    places = [at for at in outside if ALL or form == "native" or at % 53 == 0]
    kept = file.path.read_bytes()
    with file.path.open("r+b", buffering=0) as out:
        for at in places:
            out.seek(at)
            out.write(bytes([kept[at] ^ 1 << at % 8]))
            (difference,) = check_framing(found, planned)
            assert difference.file == found.name_of(file) and f"byte {at:,}" in difference.message
            out.seek(at)
            out.write(kept[at : at + 1])


def written(config: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change a config.json."""
    data = json.loads(config.read_text())
    change(data)
    config.write_text(json.dumps(data, indent=2) + "\n")


CHANGES: dict[str, Callable[[dict[str, object]], object]] = {
    "tie_word_embeddings is true, not absent": lambda config: config.update(tie_word_embeddings=True),
    "intermediate_size is 16, not 8": lambda config: config.update(intermediate_size=16),
    "attention_bias is true, not absent": lambda config: config.update(attention_bias=True),
    'quantization_config is {"quant_method": "fp8"}, not absent': lambda config: config.update(
        quantization_config={"quant_method": "fp8"}
    ),
    'torch_dtype is "bfloat16", not "float32"': lambda config: config.update(torch_dtype="bfloat16"),
    "hidden_size is absent, not 16": lambda config: config.pop("hidden_size"),
}


@pytest.mark.parametrize("how", some(["none", "ranks", "no-sums"], ["none", "ranks"]))
def test_a_changed_config_is_told_key_by_key(how: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Whatever `--checksum` was; and SHA256SUMS, which a set always has, knows it without the source."""
    options = {"none": ("--checksum", "none"), "ranks": ("--ranks", "0,1"), "no-sums": ()}[how]
    out, model = tmp_path / "set", models["llama"]
    succeeds("split", model, "--tp", 2, "-o", out, "-q", "--no-fsync", *options)
    kept = (out / "config.json").read_bytes()
    for says, change in list(CHANGES.items())[:: 1 if ALL or how == "none" else 3]:
        written(out / "config.json", change)
        if (out / SUMS).exists():
            assert "config.json was changed" in command("check", out).err
            assert command("check", out, "--source", model).code == 3
            shutil.move(out / SUMS, tmp_path)
        result = command("check", out, "--source", model, "--json")
        assert result.code == 1
        assert [(each["file"], each["message"]) for each in result.json["differences"]] == [("config.json", says)]
        (out / "config.json").write_bytes(kept)
        if how != "no-sums":
            shutil.move(tmp_path / SUMS, out)
        succeeds("check", out, "--source", model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """LLaMAs that can be run, by whether the head is tied to the embedding."""
    root = tmp_path_factory.mktemp("trained")
    sizes = {"num_hidden_layers": 1, "vocab_size": 256}
    return {tied: make("llama-gqa", root / str(tied), tie_word_embeddings=tied, **sizes) for tied in (True, False)}


@pytest.mark.parametrize("form", some(["native", "vllm"], ["vllm"]))
def test_every_tier_of_verify_sees_a_changed_config(form: str, trained: dict[bool, Path], tmp_path: Path) -> None:
    out, model = tmp_path / "set", trained[False]
    succeeds("split", model, "--tp", 2, "-o", out, "--format", form, "--checksum", "none", "-q", "--no-fsync")
    (out / SUMS).unlink()
    kept = (out / "config.json").read_bytes()
    width = json.loads(kept)["intermediate_size"]
    written(out / "config.json", lambda config: config.update(tie_word_embeddings=True, intermediate_size=2 * width))
    result = command("verify", out, "--source", model, "--json")
    assert result.code == 1
    tiers = {tier["name"]: tier for tier in result.json["tiers"]}
    says = f"config.json: intermediate_size is {2 * width}, not {width}"
    assert tiers.keys() == {"bytes", "weights", "exact", "native"}
    assert all(tier["status"] == "fail" for tier in tiers.values())
    assert all(f"{says}, and 1 more" in tier["reason"] for name, tier in tiers.items() if name != "bytes"), tiers
    assert f"intermediate_size is {2 * width}, not {width}, and 1 more" in tiers["bytes"]["reason"]
    (out / "config.json").write_bytes(kept)
    succeeds("verify", out, "--source", model, "--tier", "weights")


@pytest.mark.parametrize(
    ("form", "tied"),
    some(
        product(("native", "vllm", "sglang", "dcp"), (True, False)),
        [("native", True), ("vllm", True), ("sglang", False)],
    ),
)
def test_what_split_changes_in_a_config_is_no_difference(
    form: str, tied: bool, trained: dict[bool, Path], tmp_path: Path
) -> None:
    """A cast's dtype; and an engine's config says that the head is tied, whatever the class's default is."""
    out, model = tmp_path / "set", trained[tied]
    succeeds("split", model, "--tp", 2, "--dtype", "bfloat16", "--format", form, "-o", out, "-q", "--no-fsync")
    assert "bfloat16" in (out / "config.json").read_text()
    succeeds("check", out, "--source", model)
    succeeds("verify", out, "--source", model, "--tier", "weights")


def test_exchanged_places_are_found_by_check_and_by_the_verifier_alone(
    trained: dict[bool, Path], tmp_path: Path
) -> None:
    """By them torch would put another q_proj together, of the same bytes."""
    out, model = tmp_path / "set", trained[False]
    tpshard.split(model, 2, out, settings=PLAIN)
    files = sorted(out.glob("*.safetensors"))
    places = [said_places(file) for file in files]
    name = "model.layers.0.self_attn.q_proj.weight"
    places[0][name], places[1][name] = places[1][name], places[0][name]
    for file, said in zip(files, places, strict=True):
        said_places(file, said)
    result = command("check", out, "--source", model, "--json")
    assert result.code == 1
    assert [each["file"] for each in result.json["differences"]] == [file.name for file in files]
    assert command("check", out).code in (1, 3), "by the manifest"
    result = command("verify", out, "--source", model, "--tier", "weights", "--json")
    assert result.code == 1 and f"the ranks' parts of {name} where they do not" in result.json["tiers"][0]["reason"]


def said_places(file: Path, other: dict[str, object] | None = None) -> dict[str, object]:
    """What a header says of the places of its tensors; with others, it says those from now on."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    places: dict[str, object] = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    if other is not None:
        header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(other)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return places
