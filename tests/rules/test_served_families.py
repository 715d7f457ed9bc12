"""The families that are served with many GPUs: what each rank holds of the published files, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tpshard
from tests.helpers.by_hand import tensors_of, tensors_of_file
from tests.helpers.checkpoints import VOCAB
from tests.helpers.grids import in_turn
from tests.helpers.served_checkpoints import SERVED, Cuts, make
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


def held(name: str, whole: Any, cuts: Cuts, rank: int, tp: int) -> Any:
    """What a rank must hold of a tensor."""
    import torch

    module = name.removesuffix(".weight").removesuffix(".bias")

    def one_of(ends: Any) -> str | None:
        return next((end for end in ends if f".{module}".endswith(f".{end}")), None)

    if any(part in name for part in ("vision", "visual", "projector", "patch_merge", "embed_audio", "vit_large")):
        return whole
    if one_of(cuts.ends):
        rows = -(-VOCAB // tp) * tp
        return torch.cat([whole, whole.new_zeros(rows - VOCAB, *whole.shape[1:])]).chunk(tp)[rank]
    if (end := one_of(cuts.blocks)) is not None:
        sizes, repeats = cuts.blocks[end]
        dim = whole.dim() - 2
        blocks = whole.split(list(sizes) * repeats, dim)
        if repeats == 1:
            return torch.cat([block.chunk(tp, dim)[rank] for block in blocks], dim)
        each, own = len(sizes), repeats // tp
        mine = blocks[rank * own * each : (rank + 1) * own * each]
        return torch.cat(mine)
    if (end := one_of(cuts.kv)) is not None:
        kv = cuts.kv[end]
        return whole.chunk(kv)[rank * kv // tp] if kv < tp else whole.chunk(tp)[rank]
    if whole.dim() == 3 and one_of(("gate_proj", "up_proj", "experts.gate_up_proj")):
        return whole.chunk(tp, 1)[rank]
    if one_of(cuts.third):
        return whole.chunk(tp, 2)[rank]
    if one_of(cuts.columns):
        return whole.chunk(tp)[rank]
    if one_of(cuts.rows):
        return whole.chunk(tp, whole.dim() - 1)[rank]
    return whole


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
                assert torch.equal(found[each].view(torch.uint8), wanted.contiguous().view(torch.uint8)), f"{rank}: {each}"
    out, other = (tmp_path / f"{tp}" for tp in widths)
    assert tpshard.check(out, model, settings=quick).equal
    tpshard.merge(out, tmp_path / "merged", settings=quick)
    assert read_all(tmp_path / "merged") == read_all(model)
    tpshard.reshard(out, widths[1], tmp_path / "resharded", settings=quick)
    assert contents(tmp_path / "resharded") == contents(other)
