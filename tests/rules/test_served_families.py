"""The families that are served with many GPUs: what each rank holds of the published files, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tpshard
from tests.helpers.by_hand import tensors_of, tensors_of_file
from tests.helpers.grids import in_turn
from tests.helpers.served_checkpoints import SERVED, held, make
from tests.helpers.toys import contents, read_all
from tpshard.execute.publish import Settings


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in found:
            found[name] = make(name, tmp_path_factory.mktemp("served") / "model")
        return found[name]

    return get


@pytest.mark.parametrize(("name", "turned"), in_turn(list(SERVED), (False, True)))
def test_there_and_back(name: str, turned: bool, served: Any, quick: Settings, tmp_path: Path) -> None:
    import torch

    model, cuts = served(name), SERVED[name].cuts
    widths = SERVED[name].widths[:: -1 if turned else 1]
    source = tensors_of(model)
    for tp in widths:
        tpshard.split(model, tp, tmp_path / f"{tp}", settings=quick)
        for rank in range(tp):
            (file,) = (tmp_path / f"{tp}").glob(f"rank-{rank:05}-of-{tp:05}.safetensors")
            found = tensors_of_file(file)
            assert found.keys() == source.keys()
            for each, whole in source.items():
                wanted = held(each, whole, cuts, rank, tp)
                assert torch.equal(found[each].view(torch.uint8), wanted.contiguous().view(torch.uint8)), (
                    f"{rank}: {each}"
                )
    out, other = (tmp_path / f"{tp}" for tp in widths)
    assert tpshard.check(out, model, settings=quick).equal
    tpshard.merge(out, tmp_path / "merged", settings=quick)
    assert read_all(tmp_path / "merged") == read_all(model)
    tpshard.reshard(out, widths[1], tmp_path / "resharded", settings=quick)
    assert contents(tmp_path / "resharded") == contents(other)
