"""`load_rank`: the tensors of one rank on a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tpshard.errors import CorruptError, UsageError
from tpshard.inputs.shard_set import ShardSet, open_shards
from tpshard.storage.names import NOT_LOADED

if TYPE_CHECKING:
    import torch


def load_rank(
    directory: str | Path,
    rank: int | None = None,
    device: str | torch.device = "cpu",
    *,
    pp: int | None = None,
    tp: int | None = None,
    check: bool = True,
) -> dict[str, torch.Tensor]:
    """The tensors of one rank of a shard set, by name, on `device`: `cpu`, `cuda`, `cuda:1`; as stored, so padded.

    One allocation a file on the device, of which the tensors are views in the file's own layout, but for those that lie
    there unaligned. For a GPU, threads read the file into pinned buffers while others of them are copied.
    check: hold what is read against the sha256 that was recorded when it was written, if it was, and raise CorruptError
    where it differs. Hashing goes on beside the reads, and is slower than they are where the file is in memory.
    Of dcp and dcp-hf sets it is what the rank's files hold: what several ranks have lies in the lowest one's alone.
    Of an engine's set it is what the engine loads.
    pp, tp: the rank by its stage and its place there, instead of by its number, `pp * tp_size + tp`.
    UsageError for a rank that the set has not, CorruptError when it is incomplete, UnsupportedError without the device.
    """
    shards = open_shards(Path(directory))
    rank = _rank(shards, rank, pp, tp)
    if rank not in shards.files:
        raise CorruptError(f"rank {rank} is missing", path=directory, hint="`tpshard check` tells what else is")
    from tpshard.execute.device import load_files

    files = tuple(file for file in shards.files[rank] if not file.path.name.startswith(f"{NOT_LOADED}-"))
    return load_files(files, device, shards.recorded if check else {})


def _rank(shards: ShardSet, rank: int | None, pp: int | None, tp: int | None) -> int:
    """A rank's number, of its number or its coordinate. UsageError for one that the set has not."""
    mesh, directory = shards.mesh, shards.directory
    if (rank is None) == (pp is None and tp is None):
        raise UsageError("give a rank by its number, or by pp and tp", path=directory, expected="one of the two")
    if rank is None:
        stage, place = pp or 0, tp or 0
        if not (0 <= stage < mesh.pp and 0 <= place < mesh.tp):
            what, expected = f"no rank at pp {stage}, tp {place} in this set", f"pp below {mesh.pp}, tp below {mesh.tp}"
            raise UsageError(what, path=directory, expected=expected, found=f"pp {stage}, tp {place}")
        return mesh.rank(stage, place)
    if not 0 <= rank < mesh.size:
        raise UsageError(f"no rank {rank} in this set", path=directory, expected=f"0 to {mesh.size - 1}", found=rank)
    return rank
