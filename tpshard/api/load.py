"""`load_rank`: the tensors of one rank on a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tpshard.errors import CorruptError, UsageError
from tpshard.inputs.shard_set import open_shards
from tpshard.storage.names import NOT_LOADED

if TYPE_CHECKING:
    import torch


def load_rank(
    directory: str | Path, rank: int, device: str | torch.device = "cpu", *, check: bool = True
) -> dict[str, torch.Tensor]:
    """The tensors of one rank of a shard set, by name, on `device`: `cpu`, `cuda`, `cuda:1`; as stored, so padded.

    One allocation a file on the device, of which the tensors are views in the file's own layout, but for those that lie
    there unaligned. For a GPU, threads read the file into pinned buffers while others of them are copied.
    check: hold what is read against the sha256 that was recorded when it was written, if it was, and raise CorruptError
    where it differs. Hashing goes on beside the reads, and is slower than they are where the file is in memory.
    Of dcp and dcp-hf sets it is what the rank's files hold: what several ranks have lies in the lowest one's alone.
    Of an engine's set it is what the engine loads.
    UsageError for a rank that the set has not, CorruptError when it is incomplete, UnsupportedError without the device.
    """
    shards = open_shards(Path(directory))
    if not 0 <= rank < shards.tp:
        raise UsageError(f"no rank {rank} in this set", path=directory, expected=f"0 to {shards.tp - 1}", found=rank)
    if rank not in shards.files:
        raise CorruptError(f"rank {rank} is missing", path=directory, hint="`tpshard check` tells what else is")
    from tpshard.execute.device import load_files

    files = tuple(file for file in shards.files[rank] if not file.path.name.startswith(f"{NOT_LOADED}-"))
    return load_files(files, device, shards.recorded if check else {})
