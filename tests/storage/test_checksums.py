"""SHA256SUMS, judged by `sha256sum -c` itself."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.command import fails, llama, succeeds
from tests.helpers.paths import DOCS
from tpshard.api import convert as api
from tpshard.execute.publish import Settings
from tpshard.storage.checksums import read_sums, sums
from tpshard.storage.names import SUMS

sha256sum = pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is a command of GNU coreutils")
QUICK = Settings(workers=1, fsync=False)


def judged(directory: Path) -> tuple[int, str]:
    """What `sha256sum -c` says of a directory's SHA256SUMS."""
    done = subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=directory, capture_output=True)
    return done.returncode, os.fsdecode(done.stdout + done.stderr)


@sha256sum
@pytest.mark.parametrize("form", ["native", "vllm", "meta", "hf"])
def test_every_file_of_an_output_is_listed_and_a_changed_one_is_found(tmp_path: Path, form: str) -> None:
    tp = 1 if form == "hf" else 2
    out = api.split(llama(tmp_path / "model"), tp, tmp_path / "out", format=form, settings=QUICK).output
    names = {path.name for path in out.iterdir()} - {SUMS}
    listed = [line.partition("  ")[2] for line in (out / SUMS).read_text().splitlines()]
    assert listed == sorted(names) and "config.json" in names
    assert judged(out)[0] == 0
    for name in names:
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        code, said = judged(out)
        assert code == 1 and f"{name}: FAILED" in said
        (out / name).write_bytes(data)


@sha256sum
def test_hosts_that_share_a_directory_leave_it_to_one_command_with_the_same_result(tmp_path: Path) -> None:
    """The command is the one of docs/reference/manifest.md."""
    model = llama(tmp_path / "model")
    whole = api.split(model, 2, tmp_path / "whole", settings=QUICK).output
    for rank in (1, 0):
        shared = api.split(model, 2, tmp_path / "shared", ranks=[rank], settings=QUICK).output
        assert judged(shared)[0] == 0
        assert read_sums((shared / SUMS).read_bytes()).keys() == {"config.json", "tpshard.json"}, "the small files"
    command = (
        "find . -type f ! -name SHA256SUMS -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum -- > ../sums"
    )
    assert command in (DOCS / "reference/manifest.md").read_text()
    subprocess.run(["bash", "-c", f"{command}; mv ../sums SHA256SUMS"], cwd=shared, check=True)
    assert (shared / SUMS).read_bytes() == (whole / SUMS).read_bytes()
    (shared / "rank-00001-of-00002.json").unlink()
    api.split(model, 2, shared, ranks=[1], settings=QUICK)
    assert (shared / SUMS).read_bytes() == (whole / SUMS).read_bytes(), "a host that comes back leaves the whole list"


def test_without_checksums_it_lists_no_weights_and_a_reshard_has_that_of_a_direct_split(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    succeeds("split", model, "--tp", 2, "-o", tmp_path / "none", "--checksum", "none", "-q")
    ranks = {f"rank-0000{rank}-of-00002.json" for rank in range(2)}
    listed = {"config.json", "tpshard.json", *ranks}
    assert read_sums((tmp_path / "none" / SUMS).read_bytes()).keys() == listed
    direct, again = tmp_path / "direct", tmp_path / "again"
    succeeds("split", model, "--tp", 4, "-o", direct, "-q")
    succeeds("reshard", tmp_path / "none", "--tp", 4, "-o", again, "-q")
    assert (direct / SUMS).read_bytes() == (again / SUMS).read_bytes()
    succeeds("merge", again, "-o", tmp_path / "merged", "-q")
    assert not (tmp_path / "merged" / SUMS).exists(), "an ordinary checkpoint, as the source was"
    succeeds("split", model, "--tp", 2, "-o", direct, "--overwrite", "--checksum", "none", "-q")
    assert read_sums((direct / SUMS).read_bytes()).keys() == listed, "the old one's sums are gone with it"


@sha256sum
def test_names_that_would_end_a_line_are_escaped(tmp_path: Path) -> None:
    small = {name: name.encode("utf-8", "surrogateescape") for name in ("a b", "c\\d", "e\nf", "*g", "-h", "i\udcff")}
    for name, data in small.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "large").write_bytes(b"large")
    text = sums({"large": hashlib.sha256(b"large").hexdigest()}, small)
    assert read_sums(text).keys() == {*small, "large"} and read_sums(text)["large"] in text.decode("latin-1")
    assert all(read_sums(text)[name] == hashlib.sha256(data).hexdigest() for name, data in small.items())
    (tmp_path / SUMS).write_bytes(text)
    code, said = judged(tmp_path)
    assert code == 0 and said.count(": OK\n") == len(small) + 1
    assert text.count(b"\n") == len(small) + 1 == len(os.listdir(tmp_path)) - 1


SMALL = ["config.json", "tokenizer.json", "tpshard.json", "rank-00001-of-00002.json"]


@pytest.fixture
def model_and_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with a tokenizer, and its split."""
    monkeypatch.chdir(tmp_path)
    (llama(Path("model")) / "tokenizer.json").write_text("{}\n")
    api.split("model", 2, "set", settings=QUICK)


@pytest.mark.usefixtures("model_and_set")
@pytest.mark.parametrize("source", [(), ("--source", "model")])
def test_check_compares_the_small_files_with_it(source: tuple[str, ...]) -> None:
    for name in SMALL:
        path = Path("set", name)
        data = path.read_bytes()
        path.write_bytes(data + b"\n")
        error = fails(3, "check", "set", *source)
        assert error["path"] == str(path) and f"{name} was changed" in error["message"] and SUMS in error["hint"]
        path.write_bytes(data)
    Path("set/tokenizer.json").unlink()
    error = fails(3, "check", "set", *source)
    assert error["path"] == "set/tokenizer.json" and "not there" in error["message"]
    Path("set", SUMS).unlink()
    succeeds("check", "set", *source)


@pytest.mark.usefixtures("model_and_set")
@pytest.mark.parametrize("source", [(), ("--source", "model")])
def test_check_finds_what_was_changed_in_it(source: tuple[str, ...]) -> None:
    path = Path("set", SUMS)
    lines = path.read_text().splitlines(keepends=True)
    weights = "rank-00001-of-00002.safetensors"
    for line in lines:
        name = line.split()[1]
        other = line.replace(line[0], "1" if line[0] == "0" else "0", 1)
        path.write_text("".join(lines).replace(line, other))
        says = f"the record and {SUMS} disagree about {name}" if "safetensors" in name else f"{name} was changed"
        assert says in fails(3, "check", "set", *source)["message"]
    for name in (weights, "rank-00001-of-00002.json", "tpshard.json"):
        path.write_text("".join(line for line in lines if name not in line))
        assert f"does not list {name}" in fails(3, "check", "set", *source)["message"]
    for text in ("", "no line\n", lines[0] * 2, lines[0].rstrip() + "\r\n", "0" * 64 + "  \n"):
        path.write_text(text, newline="")
        assert f"{SUMS} is damaged" in fails(3, "check", "set", *source)["message"]
    path.write_text("".join(lines))
    Path("set/vocab.json").write_text("{}")
    found = succeeds("check", "set", *source, "--json")
    assert found.json["unchecked"] == [f"vocab.json was not compared: it is not listed in {SUMS}"]


@pytest.mark.usefixtures("model_and_set")
def test_a_name_in_it_that_leaves_the_set() -> None:
    with Path("set", SUMS).open("a") as file:
        file.write("0" * 64 + "  ../model/config.json\n")
    fails(5, "check", "set")
