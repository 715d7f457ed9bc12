"""The same decoder over torch.distributed: two gloo processes against one process."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from tests.helpers.small_models import relative, run, shards, source, tokens


def test_two_gloo_processes_equal_one(tmp_path: Path, warm: Path) -> None:
    names = ["llama-gqa", "falcon-new"]
    ids = tokens(11)
    torch.save({name: (source(name)[0], shards(name, 2), ids) for name in names}, tmp_path / "cases.pt")
    command = [str(warm / "python"), "-m", "tests.helpers.gloo_worker"]
    workers = [subprocess.Popen([*command, str(rank), "2", str(tmp_path)]) for rank in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    results = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    for result in results:
        assert result["half"].dtype == torch.bfloat16 and result["half"].tolist() == [3.0] * 3
        assert result["uneven"].tolist() == [[1.0, 1.0]]
        for name in names:
            config, tensors = source(name)
            whole = run(config, [tensors], ids)[0]
            for parallel in (False, True):
                assert relative(result[f"{name} {parallel}"], whole) <= 1e-12
