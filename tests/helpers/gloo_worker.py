"""What each process of the test of torch.distributed does."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tpshard.verifier.builtin.decoder import Decoder
from tpshard.verifier.families.configs import describe
from tpshard.verifier.group import Distributed
from tpshard.verifier.ranks.weights import InMemory


def work(rank: int, size: int, folder: str) -> None:
    """Run every stored case over gloo, and store this rank's logits."""
    torch.set_num_threads(1)
    here = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{here}/rendezvous", rank=rank, world_size=size)
    group = Distributed()
    half = group.all_reduce(torch.full((3,), 1.5, dtype=torch.bfloat16))
    results = {"half": half, "uneven": group.all_gather(torch.full((rank, 2), float(rank)), 0)}
    for name, (config, ranks, ids) in torch.load(here / "cases.pt").items():
        for parallel in (False, True):
            decoder = Decoder(
                describe(config),
                InMemory(ranks[rank]),
                group,
                dtype=torch.float64,
                device=torch.device("cpu"),
                sequence_parallel=parallel,
            )
            with torch.no_grad():
                results[f"{name} {parallel}"] = decoder.forward(ids)
    torch.save(results, here / f"rank-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
