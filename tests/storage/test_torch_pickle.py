"""`pytorch_model*.bin`: read only when asked to, only tensors, byte for byte as their safetensors twins."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Get
from tests.helpers.checkpoints import pickled
from tests.helpers.command import LLAMA, fails, llama, succeeds
from tests.helpers.toys import Tensor, random_tensor, read_all, read_rank
from tpshard.errors import CorruptError, TpshardError, UnsafeError, UnsupportedError
from tpshard.storage.torch_pickle import DTYPES, read_pickle

FLAG = ("--allow-pickle",)
NAME = "pytorch_model.bin"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


@pytest.fixture
def model() -> Path:
    """The toy LLaMA as a pickle, without its safetensors file."""
    return pickled_twin(llama(Path("twin")), Path("model"))


def pickled_twin(twin: Path, out: Path) -> Path:
    pickled(twin, out)
    return out


def state(model: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(model / NAME, weights_only=True)
    return found


def calls(function: object, *arguments: object) -> Any:
    """An object that is pickled as a call."""
    return type("Call", (), {"__reduce__": lambda self: (function, arguments)})()


# --- the same bytes ---


@pytest.mark.parametrize("tp", [1, 4])
def test_every_rank_holds_what_the_twin_gives(model: Path, tp: int) -> None:
    succeeds("split", model, "--tp", tp, *FLAG, "-o", "a", "--no-fsync")
    succeeds("split", "twin", "--tp", tp, "-o", "b", "--no-fsync")
    for rank in range(tp):
        assert read_rank(Path("a"), rank, tp) == read_rank(Path("b"), rank, tp)
    succeeds("check", "a", "--source", model, *FLAG)
    succeeds("check", "a", "--source", "twin")
    succeeds("merge", "a", "-o", "merged", "--no-fsync")
    assert read_all(Path("merged")) == read_all(Path("twin"))


def test_a_checkpoint_of_transformers(made: Get) -> None:
    """gpt2: Conv1D, and a head that is tied to the embedding."""
    twin = made("gpt2")
    model = pickled_twin(twin, Path("model"))
    succeeds("split", model, "--tp", 4, *FLAG, "-o", "a", "--no-fsync")
    succeeds("split", twin, "--tp", 4, "-o", "b", "--no-fsync")
    for rank in range(4):
        assert read_rank(Path("a"), rank, 4) == read_rank(Path("b"), rank, 4)


def test_indexed(model: Path) -> None:
    tensors = state(model)
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, model / file)
        weight_map |= dict.fromkeys(part, file)
    (model / NAME).unlink()
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (model / f"{NAME}.index.json").write_text(json.dumps(index))
    assert succeeds("split", model, "--tp", 2, *FLAG, "-o", "a", "--no-fsync").err.count("warning") == 0
    succeeds("check", "a", "--source", "twin")
    succeeds("merge", "a", "-o", "merged", "--no-fsync")
    files = {p.name for p in Path("merged").glob("*.safetensors")}
    assert files == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert read_all(Path("merged")) == read_all(Path("twin"))
    (model / "pytorch_model-00002-of-00002.bin").unlink()
    assert "listed in the index" in fails(3, "plan", model, "--tp", 2, *FLAG)["message"]


def test_storages_that_tensors_share(model: Path) -> None:
    """Tied weights are one storage; views into a larger one begin inside it."""
    tensors = state(model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    norms = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(2)]
    joined = torch.cat([tensors[name] for name in norms])
    tensors |= dict(zip(norms, joined.split(16), strict=True))
    torch.save(tensors, model / NAME)
    succeeds("split", model, "--tp", 2, *FLAG, "-o", "a", "--no-fsync")
    succeeds("check", "a", "--source", model, *FLAG)
    succeeds("merge", "a", "-o", "merged", "--no-fsync")
    found = load_file("merged/model.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_torch(dtype: str) -> None:
    given = random_tensor(np.random.default_rng(0), dtype, (3, 4)) if dtype != "BOOL" else Tensor(dtype, (2,), b"\0\1")
    tensor = torch.frombuffer(bytearray(given.data), dtype=torch.uint8).view(DTYPES[dtype]).view(given.shape)
    torch.save({"x": tensor, "scalar": tensor.flatten()[0].clone(), "none": tensor[:0].clone()}, NAME)
    header, file = read_pickle(Path(NAME), NAME)
    raw = Path(NAME).read_bytes()
    infos = {info.name: info for info in header.tensors}
    assert {info.dtype for info in infos.values()} == {dtype} and file.size == len(raw)
    assert (infos["x"].shape, infos["scalar"].shape, infos["none"].shape) == (given.shape, (), (0, *given.shape[1:]))
    assert raw[infos["x"].begin : infos["x"].end] == given.data
    assert raw[infos["scalar"].begin : infos["scalar"].end] == given.data[: infos["scalar"].nbytes]
    assert infos["none"].nbytes == 0


def test_parameters_and_ordered_dicts_are_tensors_too() -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(keep_vars=True), NAME)
    assert {info.name for info in read_pickle(Path(NAME), NAME)[0].tensors} == {"weight", "bias"}


def test_the_digest_tells_contents_apart() -> None:
    digests = set()
    for tensors in ({"a": torch.ones(2)}, {"b": torch.ones(2)}, {"a": torch.ones(2, 1)}, {"a": torch.ones(2).half()}):
        torch.save(tensors, NAME)
        digests.add(read_pickle(Path(NAME), NAME)[1].header_sha256)
    assert len(digests) == 4


def test_cast_from_a_pickle(model: Path) -> None:
    succeeds("split", model, "--tp", 2, *FLAG, "--dtype", "bfloat16", "-o", "a", "--no-fsync")
    succeeds("split", "twin", "--tp", 2, "--dtype", "bfloat16", "-o", "b", "--no-fsync")
    assert read_rank(Path("a"), 1, 2) == read_rank(Path("b"), 1, 2)


# --- refused ---


def test_without_the_flag(model: Path) -> None:
    error = fails(5, "split", model, "--tp", 2)
    assert "can run code" in error["message"] and "--allow-pickle" in error["hint"]
    assert error["path"] == f"model/{NAME}"
    assert fails(5, "plan", model, "--tp", 2) == error
    assert fails(5, "plan", model / NAME, "--tp", 2) == error
    succeeds("plan", model / NAME, "--tp", 2, *FLAG)
    succeeds("split", "twin", "--tp", 2, "--no-fsync")
    assert fails(5, "check", "twin-tp2", "--source", model) == error


def test_safetensors_are_preferred(model: Path) -> None:
    (model / "model.safetensors").write_bytes(Path("twin/model.safetensors").read_bytes())
    (model / NAME).write_bytes(b"never opened")
    succeeds("plan", model, "--tp", 2, *FLAG)


def evil() -> list[tuple[str, object, str]]:
    return [
        ("system", calls(os.system, "touch ran"), "posix.system"),
        ("popen", calls(subprocess.Popen, ["touch", "ran"]), "Popen"),
        ("exec", calls(exec, "open('ran', 'w')"), "exec"),
        ("getattr", calls(getattr, "text", "upper"), "getattr"),
        ("class", argparse.Namespace(a=1), "argparse.Namespace"),
    ]


@pytest.mark.parametrize(("name", "thing", "found"), evil(), ids=[case[0] for case in evil()])
@pytest.mark.parametrize("force", [False, True])
def test_a_pickle_that_calls(
    model: Path, name: str, thing: object, found: str, force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if force:  # torch's own way to switch the safe loader off must not reach us
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({**state(model), "model.extra": thing}, model / NAME)
    error = fails(5, "split", model, "--tp", 2, *FLAG)
    assert error["found"].endswith(found) and error["path"] == f"model/{NAME}"
    assert not Path("ran").exists() and "weights_only=False" not in error["hint"]


def test_a_pickle_that_calls_in_the_name_of_a_tensor(model: Path) -> None:
    torch.save({calls(os.system, "touch ran"): torch.ones(2)}, model / NAME)
    fails(5, "split", model, "--tp", 2, *FLAG)
    assert not Path("ran").exists()


def test_a_plain_pickle_that_calls(model: Path) -> None:
    (model / NAME).write_bytes(pickle.dumps({"a": calls(os.system, "touch ran")}))
    fails(4, "split", model, "--tp", 2, *FLAG)
    assert not Path("ran").exists()


def test_a_pickle_with_a_zip_file_behind_it(model: Path) -> None:
    """Python's zipfile would take the one, torch the other."""
    archive = (model / NAME).read_bytes()
    (model / NAME).write_bytes(pickle.dumps({"a": calls(os.system, "touch ran")}) + archive)
    fails(4, "split", model, "--tp", 2, *FLAG)
    assert not Path("ran").exists()


def repack(source: Path, change: Callable[[str, bytes], bytes] = lambda name, data: data, **options: Any) -> None:
    """Write a torch archive anew with Python's zipfile, which does not align the records."""
    with zipfile.ZipFile(source) as old:
        entries = [(info.filename, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(source, "w", **options) as new:
        for name, data in entries:
            new.writestr(name, change(name, data))


def save(thing: object, **options: Any) -> None:
    torch.save(thing, NAME, **options)


def truncate(share: float) -> None:
    save({"a": torch.ones(1000)})
    raw = Path(NAME).read_bytes()
    Path(NAME).write_bytes(raw[: int(len(raw) * share)])


def repacked(change: Callable[[str, bytes], bytes] = lambda name, data: data, **options: Any) -> None:
    save({"a": torch.ones(3), "b": torch.ones(5)})
    repack(Path(NAME), change, **options)


def reordered() -> None:
    """As torch packs it, but the second and the third tensor, of one size, lie in each other's place."""
    save({"a": torch.ones(3), "b": torch.zeros(3), "c": torch.ones(3)})
    with zipfile.ZipFile(NAME) as archive:
        records = {entry.filename.partition("/")[2]: archive.read(entry) for entry in archive.infolist()}
    order = [name for name in records if name not in ("data/1", "data/2", "version", ".data/serialization_id")]
    writer = torch.PyTorchFileWriter(NAME)  # type: ignore[attr-defined]
    for name in (*order, "data/2", "data/1"):
        writer.write_record(name, records[name], len(records[name]))
    writer.write_end_of_file()


def big_endian(name: str, data: bytes) -> bytes:
    return b"big" if name.endswith("/byteorder") else data


def no_pickle(name: str, data: bytes) -> bytes:
    return b"\xff" * len(data) if name.endswith("data.pkl") else data


def half_a_tensor(name: str, data: bytes) -> bytes:
    return data[: len(data) // 2] if name.endswith("data/1") else data


REFUSED: list[tuple[str, Callable[[], object], type[TpshardError], str]] = [
    ("empty", lambda: Path(NAME).write_bytes(b""), CorruptError, "not a torch archive"),
    ("html", lambda: Path(NAME).write_bytes(b"<!DOCTYPE html>"), CorruptError, "not a torch archive"),
    ("lfs", lambda: Path(NAME).write_bytes(b"version https://git-lfs.github.com"), CorruptError, "Git-LFS pointer"),
    ("cut in the data", lambda: truncate(0.5), CorruptError, "damaged or cut off"),
    ("cut at the end", lambda: truncate(0.99), CorruptError, "damaged or cut off"),
    ("legacy", lambda: save({"a": torch.ones(2)}, _use_new_zipfile_serialization=False), UnsupportedError, "before"),
    ("deflated", lambda: repacked(compression=zipfile.ZIP_DEFLATED), UnsupportedError, "compressed"),
    ("packed anew", repacked, CorruptError, "not where torch looks"),
    ("in another order", reordered, CorruptError, "another order than torch"),
    ("big-endian", lambda: repacked(big_endian), UnsupportedError, "little-endian"),
    ("bytes that are no pickle", lambda: repacked(no_pickle), CorruptError, "damaged"),
    ("a record too short", lambda: repacked(half_a_tensor), CorruptError, ""),
    ("a zip of something else", lambda: zipfile.ZipFile(NAME, "w").writestr("a.txt", "a"), CorruptError, ""),
    ("a list", lambda: save([torch.ones(2)]), CorruptError, "not a state dict"),
    ("a tensor", lambda: save(torch.ones(2)), CorruptError, "not a state dict"),
    ("nested", lambda: save({"state_dict": {"a": torch.ones(2)}}), CorruptError, "state dict"),
    ("with a number", lambda: save({"a": torch.ones(2), "epoch": 3}), CorruptError, "state dict"),
    ("strided", lambda: save({"a": torch.ones(4, 3).t()}), UnsupportedError, "strided view"),
    ("expanded", lambda: save({"a": torch.ones(3).expand(4, 3)}), UnsupportedError, "strided view"),
    ("sparse", lambda: save({"a": torch.ones(2, 2).to_sparse()}), UnsupportedError, "not a plain tensor"),
    ("conjugated", lambda: save({"a": torch.ones(2).cfloat().conj()}), UnsupportedError, "not a plain tensor"),
    ("negated", lambda: save({"a": torch.ones(2).cfloat().conj().imag}), UnsupportedError, ""),
    ("complex128", lambda: save({"a": torch.ones(2).cdouble()}), UnsupportedError, "not a plain tensor"),
    ("meta", lambda: save({"a": torch.ones(2, device="meta")}), CorruptError, ""),
]


@pytest.mark.parametrize(("make", "kind", "says"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_not_a_file_of_plain_tensors(make: Callable[[], object], kind: type[TpshardError], says: str) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(LLAMA))
    make()
    Path(NAME).rename(Path("model") / NAME)
    error = fails(kind.exit_code, "plan", "model", "--tp", 2, *FLAG)
    assert says in error["message"] and error["path"] == f"model/{NAME}"


def test_any_flipped_byte_of_the_pickle_is_judged(model: Path) -> None:
    """Whatever the damage: an error of ours, or a state dict whose tensors lie in records of the archive."""
    raw = (model / NAME).read_bytes()
    with zipfile.ZipFile(model / NAME) as archive:
        entry = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
        with archive.open(entry) as stream:
            pickled = stream.read()
    begin = raw.index(pickled)
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.choice(len(pickled), 150, replace=False):
        damaged = bytearray(raw)
        damaged[begin + position] ^= 1 << int(rng.integers(8))
        Path(NAME).write_bytes(damaged)
        try:
            header, _ = read_pickle(Path(NAME), NAME)
        except TpshardError as error:
            refused += 1
            assert isinstance(error, (CorruptError, UnsafeError, UnsupportedError))
        else:
            assert all(info.end <= len(raw) for info in header.tensors)
    assert refused > 30


def test_torch_is_asked_for_where_it_is_missing(model: Path) -> None:
    """In a process that cannot import torch: a pickle is refused with the way to get it, safetensors are read."""
    code = "import sys; sys.modules['torch'] = None\nfrom tpshard.cli.main import main\nmain(sys.argv[1:])"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)

    refused = run("split", "model", "--tp", "2", *FLAG)
    assert refused.returncode == 4 and "pip install torch" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert run("split", "twin", "--tp", "2", "--dtype", "float16").returncode == 4
    assert run("split", "twin", "--tp", "2", "--no-fsync").returncode == 0
    succeeds("check", "twin-tp2", "--source", "twin")
