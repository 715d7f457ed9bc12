"""load_rank: the tensors of one rank, as safetensors itself reads them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tpshard
from tests.helpers import checkpoints
from tpshard.errors import CorruptError, UnsupportedError, UsageError
from tpshard.execute import device as loader
from tpshard.inputs.shard_set import open_shards
from tpshard.storage.local import read_header
from tpshard.storage.safetensors import build_header
from tpshard.storage.source import RankFile


@pytest.mark.parametrize("limit", [None, 30_000])
@pytest.mark.parametrize("variant", ["llama-bf16", "opt-f16", "gpt2"])
def test_equals_what_safetensors_reads(
    tmp_path: Path, variant: str, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "STAGE", 4096)
    model = checkpoints.make(variant, tmp_path / "model")
    tpshard.split(model, 2, tmp_path / "out", max_file_size=limit)
    for rank in range(2):
        loaded = tpshard.load_rank(tmp_path / "out", rank)
        expected: dict[str, torch.Tensor] = {}
        for path in (tmp_path / "out").glob(f"rank-{rank:05}*.safetensors"):
            expected.update(load_file(path))
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_a_buffer_is_filled_again_only_after_its_copy_has_ended() -> None:
    """Copies that happen as late as they may: when they are waited for."""
    source = bytes(random.Random(0).randbytes(1000))
    held = [b""] * 3
    target = bytearray(len(source))

    def read(index: int, offset: int, count: int) -> None:
        held[index] = source[offset : offset + count]

    def send(index: int, offset: int, count: int) -> Callable[[], None]:
        def copy() -> None:
            target[offset : offset + count] = held[index]

        return copy

    loader.staged(len(source), 7, len(held), read, send)
    assert target == source


def test_a_failed_read_or_copy_ends_the_load_and_its_threads() -> None:
    def broken(index: int, offset: int, count: int) -> None:
        raise OSError(5, "Input/output error")

    before = threading.active_count()
    for read, send in ((broken, lambda *_: print), (lambda *_: None, broken)):
        with pytest.raises(OSError, match="Input/output"):
            loader.staged(100, 7, 3, read, send)  # type: ignore[arg-type]
        assert threading.active_count() == before


def test_tensors_that_lie_unaligned(tmp_path: Path) -> None:
    """Three bytes' worth of bfloat16 before a float32, as the format allows."""
    tensors = {"model.norm.weight": torch.randn(3).bfloat16(), "x": torch.randn(4)}
    kinds = ("BF16", "F32")
    header = build_header([(n, kind, (len(t),)) for (n, t), kind in zip(tensors.items(), kinds, strict=True)], {})
    path = tmp_path / "file.safetensors"
    path.write_bytes(header + b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors.values()))
    infos = read_header(path).tensors
    assert (infos[1].begin - infos[0].begin) % 4
    loaded = dict(loader._load_file(RankFile(path, path.stat().st_size, infos), torch.device("cpu"), None))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def flip(path: Path, at: int) -> None:
    """Change one bit of a byte; `at` may count from the end."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("format", ["native", "dcp"])
@pytest.mark.parametrize("at", [0.5, 1.0])
def test_what_was_damaged_is_refused_unless_told_not_to_look(
    tmp_path: Path, format: str, at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "STAGE", 4096)
    model, out = checkpoints.make("llama-bf16", tmp_path / "model"), tmp_path / "out"
    tpshard.split(model, 2, out, format=format)
    (file,) = open_shards(out).files[1]
    sound = tpshard.load_rank(out, 1)
    info = file.tensors[len(file.tensors) // 2 if at < 1 else -1]
    flip(file.path, info.begin + int((info.end - info.begin - 1) * at))
    with pytest.raises(CorruptError, match="not as it was written") as caught:
        tpshard.load_rank(out, 1)
    assert caught.value.path == str(file.path) and "copy it again" in str(caught.value.hint)
    tpshard.load_rank(out, 0)
    loaded = tpshard.load_rank(out, 1, check=False)
    assert [name for name in loaded if not torch.equal(loaded[name], sound[name])] == [info.name]


def test_a_set_without_checksums_is_loaded(tmp_path: Path) -> None:
    model, out = checkpoints.make("llama-bf16", tmp_path / "model"), tmp_path / "out"
    tpshard.split(model, 2, out, settings=tpshard.Settings(checksum=False))
    (file,) = open_shards(out).files[0]
    flip(file.path, -1)
    assert len(tpshard.load_rank(out, 0)) == len(file.tensors)


def test_a_read_that_fails_leaves_nobody_waiting_for_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = checkpoints.make("llama-bf16", tmp_path / "model"), tmp_path / "out"
    tpshard.split(model, 2, out)
    monkeypatch.setattr(loader, "STAGE", 4096)
    read = loader.Handles.read_into
    begin = open_shards(out).files[0][0].tensors[0].begin

    def broken(self: loader.Handles, file: str, buffers: Sequence[memoryview], offset: int) -> None:
        if offset == begin + 4096:
            time.sleep(0.05)  # the others wait meanwhile
            raise OSError(5, "Input/output error")
        read(self, file, buffers, offset)

    monkeypatch.setattr(loader.Handles, "read_into", broken)
    with pytest.raises(OSError, match="Input/output"):
        tpshard.load_rank(out, 0)


def test_refuses_a_rank_that_is_not_there(tmp_path: Path) -> None:
    model = checkpoints.make("llama", tmp_path / "model")
    tpshard.split(model, 4, tmp_path / "out", ranks=[0])
    with pytest.raises(UsageError, match="no rank 4"):
        tpshard.load_rank(tmp_path / "out", 4)
    with pytest.raises(CorruptError, match="rank 2 is missing"):
        tpshard.load_rank(tmp_path / "out", 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    model = checkpoints.make("llama", tmp_path / "model")
    tpshard.split(model, 2, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="no GPU"):
        tpshard.load_rank(tmp_path / "out", 0, "cuda")
