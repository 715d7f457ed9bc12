"""What travels beside the weights, and what does not: from a directory, a set and the Hub, to an output and back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.command import fails, llama, succeeds
from tests.helpers.hub_server import HubServer
from tpshard.storage.carried import CARRIED_LIMIT

QUICK = ("-q", "--no-fsync")
TRAVELS = {
    "modeling_x.py": "raise SystemExit",
    "tiktoken.model": "YQ== 0\n",
    "modules.json": "[]",
    "1_Pooling/config.json": '{"pooling_mode_lasttoken": true}',
    "2_Dense/deep/er.txt": "x",
    "SYSTEM_PROMPT.txt": "x",
    "additional_chat_templates/rag.jinja": "x",
    "original/params.json": "{}",
    "README.md": "# x",
    "LICENSE": "x",
}
LEFT_OUT = {
    "model-mtp.safetensors": "weights that model.safetensors.index.json does not list",
    "consolidated.safetensors": "weights that model.safetensors.index.json does not list",
    "pytorch_model.bin": "weights that model.safetensors.index.json does not list",
    "adapter_model.safetensors": "weights of an adapter: merge it into the model first where it shall count",
    "adapter_config.json": "of an adapter, which is left out",
    "original/consolidated.00.pth": "weights of another set or form",
    "onnx/model.onnx": "weights of another set or form",
    "pytorch_model.bin.index.json": "an index of weights that are not used",
    "SHA256SUMS": "the output has a file of this name that is its own",
    "large.bin.txt": "larger than 100 MB",
    ".gitattributes": "hidden",
    ".cache/": "hidden",
    "1_Pooling/.env": "hidden",
    "__pycache__/": "made by Python",
}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LLaMA in two files with everything beside it that published ones have."""
    monkeypatch.chdir(tmp_path)
    path = llama(Path("model"), parts=2)
    for name, text in TRAVELS.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    for name in LEFT_OUT:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (path / name).mkdir()
            (path / name / "inside").write_text("x")
        else:
            (path / name).write_text("x")
    with (path / "large.bin.txt").open("wb") as file:
        file.truncate(CARRIED_LIMIT + 1)
    later = time.time() + 1000
    os.utime(path / "pytorch_model.bin", (later, later))
    return path


def small(directory: Path) -> dict[str, str]:
    """The files of a directory that hold no weights and are none of tpshard's."""
    found = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
    ours = ("rank-", "tpshard.json", "SHA256SUMS", "model.safetensors.index.json", "config.json")
    return {
        name: path.read_text()
        for name, path in found.items()
        if not name.startswith(ours) and not name.endswith(".safetensors")
    }


def test_all_but_weights_goes_through_every_verb(model: Path) -> None:
    for verb in ("plan", "split"):
        result = succeeds(verb, model, "--tp", 2, "--json", *(("-o", "set", *QUICK) if verb == "split" else ()))
        assert {each["file"]: each["reason"] for each in result.json["left_out"]} == LEFT_OUT, verb
    assert "left out: large.bin.txt (larger than 100 MB)" in succeeds("plan", model, "--tp", 2).err
    assert small(Path("set")) == TRAVELS
    succeeds("split", model, "--tp", 2, "-o", "hosts", "--ranks", "1", *QUICK)
    succeeds("split", model, "--tp", 2, "-o", "hosts", "--ranks", "0", *QUICK)
    succeeds("reshard", "set", "--tp", 4, "--format", "vllm", "-o", "again", *QUICK)
    for out in ("hosts", "again", "set"):
        assert {name: text for name, text in small(Path(out)).items() if "model-rank" not in name} == TRAVELS
        assert succeeds("check", out, "--json").json["unchecked"] == []
        assert succeeds("check", out, "--source", model, "--json").json["unchecked"] == []
    succeeds("merge", "again", "-o", "merged", *QUICK)
    assert small(Path("merged")) == TRAVELS


def test_a_changed_or_lost_file_in_a_folder_is_found(model: Path) -> None:
    succeeds("split", model, "--tp", 2, "-o", "set", *QUICK)
    path = Path("set/1_Pooling/config.json")
    path.write_text("{}")
    assert "1_Pooling/config.json was changed" in fails(3, "check", "set")["message"]
    path.unlink()
    assert "1_Pooling/config.json is listed" in fails(3, "check", "set")["message"]


def test_nothing_leaves_the_directory_by_a_symlink(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/key").write_text("secret")
    (model / "key.txt").symlink_to(tmp_path / "secrets/key")
    (model / "folder").symlink_to(tmp_path / "secrets")
    (model / "loop").symlink_to(tmp_path / "model")
    (model / "gone.txt").symlink_to("nothing")
    (model / "1_Pooling/within.json").symlink_to("../modules.json")
    os.mkfifo(model / "pipe")
    left_out = {each["file"]: each["reason"] for each in succeeds("split", model, "--tp", 2, "--json").json["left_out"]}
    out = "a symlink that leads out of the directory, or to nothing"
    new = {"key.txt": out, "gone.txt": out, "pipe": "not a file"}
    assert left_out == LEFT_OUT | new | dict.fromkeys(("folder/", "loop/"), "a symlink to a folder")
    assert small(Path("model-tp2")) == TRAVELS | {"1_Pooling/within.json": "[]"}
    (model / "tokenizer.json").symlink_to(tmp_path / "secrets/key")
    assert "leaves the model's directory" in fails(5, "split", model, "--tp", 2, "-o", "other")["message"]


def test_beside_a_file_that_is_named_only_the_usual_files_travel(model: Path) -> None:
    llama(model)
    succeeds("split", model / "model.safetensors", "--tp", 2, "-o", "set", *QUICK)
    assert small(Path("set")) == {"LICENSE": "x"}


def test_overwrite_replaces_what_was_carried_and_nothing_of_others(model: Path) -> None:
    """Also what a run of another model left half done."""
    succeeds("split", model, "--tp", 2, "-o", "set", *QUICK)
    other = llama(Path("other"), seed=1)
    Path("set/1_Pooling/mine.txt").write_text("mine")
    error = fails(9, "split", other, "--tp", 2, "-o", "set", "--overwrite")
    assert error["found"] == "1_Pooling/mine.txt"
    Path("set/1_Pooling/mine.txt").unlink()
    Path("set").rename("set.partial")
    Path("set.partial/.tpshard.lock").touch()
    succeeds("split", other, "--tp", 2, "-o", "set", "--overwrite", *QUICK)
    assert small(Path("set")) == {} and not Path("set.partial").exists()
    succeeds("split", model, "--tp", 2, "-o", "set", "--overwrite", *QUICK)
    succeeds("split", other, "--tp", 2, "-o", "set", "--overwrite", *QUICK)
    assert not [path for path in Path("set").iterdir() if path.is_dir()] and not Path("set.replaced").exists()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as running:
        running.patch(monkeypatch, tmp_path / "home")
        yield running


def test_of_a_hub_repository_the_same_travels(server: HubServer, model: Path) -> None:
    (model / "large.bin.txt").unlink()
    (model / "__pycache__/inside").unlink()
    server.add("org/tiny", model)
    expected = {name: reason for name, reason in LEFT_OUT.items() if name not in ("large.bin.txt", "__pycache__/")}
    for verb in ("plan", "split"):
        result = succeeds(verb, "org/tiny", "--tp", 2, "--json", *(("-o", "set", *QUICK) if verb == "split" else ()))
        assert {each["file"]: each["reason"] for each in result.json["left_out"]} == expected, verb
    assert small(Path("set")) == TRAVELS
