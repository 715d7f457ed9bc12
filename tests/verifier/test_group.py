"""Groups: what each collective gives, in which order, and what happens when a rank fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tpshard.verifier.group import Group, Single, Threads, slice_of


def test_collectives_of_uneven_tensors() -> None:
    def work(group: Group) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.full((group.rank + 1, 2), float(group.rank))
        whole = torch.arange(10.0).reshape(1, 5, 2) * (group.rank + 1)
        return (
            group.all_reduce(torch.tensor([group.rank + 1.0])),
            group.all_gather(rows, 0),
            group.reduce_scatter(whole, 1),
        )

    results = Threads(3).run(work)
    scattered = torch.cat([result[2] for result in results], 1)
    assert torch.equal(scattered, torch.arange(10.0).reshape(1, 5, 2) * 6)
    for total, gathered, _ in results:
        assert total.tolist() == [6.0]
        assert gathered[:, 0].tolist() == [0, 1, 1, 2, 2, 2]


def test_sums_are_made_in_rank_order() -> None:
    values = [1.0, 1e16, -1e16, 1.0]  # only ((1 + 1e16) - 1e16) + 1 gives 1

    def work(group: Group) -> float:
        return float(group.all_reduce(torch.tensor([values[group.rank]], dtype=torch.float64)))

    assert Threads(4).run(work) == [1.0] * 4


def test_slices_cover_without_overlap() -> None:
    for total in range(12):
        for size in (1, 2, 3, 5):
            slices = [slice_of(total, size, rank) for rank in range(size)]
            assert [i for start, stop in slices for i in range(start, stop)] == list(range(total))
            lengths = [stop - start for start, stop in slices]
            assert max(lengths) - min(lengths) <= 1


def test_many_rounds_do_not_mix() -> None:
    def work(group: Group) -> list[list[tuple[int, int]]]:
        return [group.exchange_object((group.rank, i)) for i in range(50)]

    for rounds in Threads(3).run(work):
        assert rounds == [[(0, i), (1, i), (2, i)] for i in range(50)]


def test_a_failing_rank_stops_the_others_and_is_raised() -> None:
    def work(group: Group) -> None:
        group.barrier()
        if group.rank == 1:
            raise KeyError("rank 1")
        group.barrier()

    with pytest.raises(KeyError, match="rank 1"):
        Threads(3).run(work)


@pytest.mark.parametrize("longer", [0, 1, 2])
def test_ranks_that_disagree_on_collectives_do_not_hang(longer: int) -> None:
    def work(group: Group) -> None:
        for _ in range(3 if group.rank == longer else 2):
            group.barrier()

    with pytest.raises(AssertionError, match="number of collectives"):
        Threads(3).run(work)


def test_single_is_the_identity() -> None:
    x = torch.arange(6.0).reshape(1, 3, 2)
    group = Single()
    for result in (group.all_reduce(x), group.all_gather(x, 1), group.reduce_scatter(x, 1)):
        assert torch.equal(result, x)
