"""What `make bench-others` measures and compares with: a command's whole process tree, tensors bit by bit."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.bench import others
from tests.bench.process_tree import measure

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory of processes is read from /proc")
HOLD = """
import sys, time
from pathlib import Path
held = bytearray(80_000_000)
held[::4096] = bytes(len(held[::4096]))
Path(sys.argv[1]).touch()
while len(list(Path().glob(sys.argv[2]))) < int(sys.argv[3]):  # until all are there and hold their memory
    time.sleep(0.01)
time.sleep(1)
"""


@linux
def test_memory_is_that_of_all_processes_together(tmp_path: Path) -> None:
    (tmp_path / "hold.py").write_text(HOLD)
    hold, log = f"{sys.executable} hold.py", tmp_path / "log"
    alone = measure(f"{hold} a1 'a*' 1", tmp_path, os.environ, log)
    both = measure(f"{hold} b1 'b*' 2 & {hold} b2 'b*' 2; wait", tmp_path, os.environ, log)
    assert 80e6 < alone.anonymous < 150e6 < 160e6 < both.anonymous < 300e6
    assert alone.resident > alone.anonymous and alone.seconds > 1


def test_a_command_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 3.*\n.*reason"):
        measure("echo reason; exit 3", tmp_path, os.environ, tmp_path / "log")


def test_tensors_are_compared_by_file_name_dtype_shape_and_bits(tmp_path: Path) -> None:
    tensor = torch.arange(6, dtype=torch.float32).view(2, 3)

    def found(name: str, value: torch.Tensor, file: str = "model0-mp4.safetensors") -> dict[str, str]:
        save_file({name: value}, tmp_path / file)
        try:
            return others.digests(others.by_file(tmp_path))
        finally:
            (tmp_path / file).unlink()

    same = found("a", tensor)
    assert others.difference(same, found("a", tensor)) is None
    changed = tensor.clone()
    changed[1, 2] = -changed[1, 2]
    others_of = [changed, tensor.view(3, 2), tensor.view(torch.int32), tensor.view(2, 3)[:1]]
    assert all(others.difference(same, found("a", value)) for value in others_of)
    assert others.difference(same, found("b", tensor))
    assert others.difference(same, found("a", tensor, "model1-mp4.safetensors"))
    # vLLM may cut one rank's tensors into parts elsewhere than we do; ordinary checkpoints too.
    part = found("a", tensor, "model-rank-0-part-0.safetensors")
    assert part == found("a", tensor, "model-rank-0-part-1.safetensors")
    assert part != found("a", tensor, "model-rank-1-part-0.safetensors")


def test_files_are_the_same_when_names_and_bytes_are(tmp_path: Path) -> None:
    seen = set()
    for name, data in (("a", b"1"), ("b", b"1"), ("a", b"2"), ("a", b"1")):
        (tmp_path / name).write_bytes(data)
        seen.add(others.all_files(tmp_path))
        (tmp_path / name).unlink()
    assert len(seen) == 3


def test_a_dcp_checkpoint_is_read_whole(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    dcp.save(dict(state), checkpoint_id=tmp_path / "out", no_dist=True)
    assert others.digests(others.by_dcp(tmp_path / "out")) == others.digests(iter(state.items()))
