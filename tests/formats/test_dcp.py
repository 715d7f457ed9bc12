"""torch.distributed.checkpoint's two flavours, judged by torch's own readers and its own consolidation."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, zeros
from torch.testing._internal.distributed.fake_pg import FakeStore

import tpshard
from tests.helpers.command import LLAMA, fails, llama, llama_tensors, succeeds
from tpshard.execute.publish import Settings

READERS = {"dcp": dcp.FileSystemReader, "dcp-hf": dcp.HuggingFaceStorageReader}
both = pytest.mark.parametrize("format", READERS)
QUICK = Settings(workers=2, fsync=False)
DIM = {"q": 0, "k": 0, "v": 0, "gate": 0, "up": 0, "lm_head": 0, "embed_tokens": 0, "o": 1, "down": 1}
"""Along which dim a module of a LLaMA is cut."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 KV heads and a vocabulary of 10: at tp 4 the former are repeated, and the last rank has 1 row of the latter."""
    half = {name: t for name, t in llama_tensors(dtype="BF16").items() if "norm" in name or "mlp" in name}
    return llama(tmp_path_factory.mktemp("dcp") / "model", tensors=half)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def world() -> Iterator[Callable[[int, int], None]]:
    """Make this process a rank of a world in which nothing is sent."""

    def be(rank: int, size: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield be
    if dist.is_initialized():
        dist.destroy_process_group()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two models are equal bit for bit; NaN, of which random bits have some, included."""
    shapes = {name: (t.shape, t.dtype) for name, t in one.items()}
    return shapes == {name: (t.shape, t.dtype) for name, t in other.items()} and all(
        torch.equal(bits(one[name]), bits(other[name])) for name in one
    )


def load(format: str, directory: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torch's reader finds, in tensors that held something else before."""
    state = {name: torch.full_like(tensor, 7) for name, tensor in like.items()}
    dcp.load(state, storage_reader=READERS[format](str(directory)), no_dist=True)
    return state


def metadata_of(directory: Path) -> Metadata:
    found = pickle.loads((directory / ".metadata").read_bytes())
    assert isinstance(found, Metadata)
    return found


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@both
@pytest.mark.parametrize("tp", [1, 4])
def test_torch_reads_every_bit(model: Path, format: str, tp: int) -> None:
    tpshard.split(model, tp, "out", format=format, max_file_size=1000, settings=QUICK)
    source = load_file(model / "model.safetensors")
    assert same(load(format, Path("out"), source), source)


@both
def test_dtensors_of_any_placements(model: Path, format: str, world: Callable[[int, int], None]) -> None:
    tpshard.split(model, 4, "out", format=format, settings=QUICK)
    source = load_file(model / "model.safetensors")

    def own(name: str) -> Placement:
        kind = name.split(".")[-2].removesuffix("_proj")
        return Shard(DIM[kind]) if kind in DIM else Replicate()

    def other(name: str) -> Placement:
        return Shard(source[name].dim() - 1)

    for placed, ranks, size in ((own, (0, 3), 4), (other, (2,), 3), (other, (1,), 2)):
        for rank in ranks:
            world(rank, size)
            mesh = init_device_mesh("cpu", (size,))
            state = {
                name: zeros(t.shape, dtype=t.dtype, device_mesh=mesh, placements=[placed(name)])
                for name, t in source.items()
            }
            dcp.load(state, storage_reader=READERS[format]("out"), no_dist=True)
            for name, tensor in source.items():
                place = placed(name)
                parts = tensor.chunk(size, place.dim) if isinstance(place, Shard) else [tensor] * size
                assert same({name: state[name].to_local()}, {name: parts[rank].contiguous()})


def test_the_metadata_is_as_torch_writes_it(model: Path) -> None:
    source = load_file(model / "model.safetensors")
    source |= {"counter": torch.tensor(3), "none": torch.empty(0, 2), "flags": torch.tensor([True, False])}
    dcp.save(source, storage_writer=dcp.FileSystemWriter("theirs"), no_dist=True)
    theirs = metadata_of(Path("theirs"))
    tpshard.split(model, 1, "ours", format="dcp", settings=QUICK)
    ours = metadata_of(Path("ours"))
    named = ours.state_dict_metadata
    assert named == {name: theirs.state_dict_metadata[name] for name in named} and len(named) == len(source) - 3
    assert ours.planner_data == {name: theirs.planner_data[name] for name in named}
    assert ours.version == theirs.version and ours.storage_data.keys() <= theirs.storage_data.keys()
    assert vars(ours.storage_meta).keys() == vars(theirs.storage_meta).keys()
    assert vars(next(iter(ours.storage_data.values()))).keys() == vars(next(iter(theirs.storage_data.values()))).keys()


@both
def test_what_several_ranks_hold_is_stored_once(model: Path, format: str) -> None:
    tpshard.split(model, 4, "out", format=format, settings=QUICK)
    source = load_file(model / "model.safetensors")
    held = {entry["name"]: entry for entry in json.loads(Path("out/tpshard.json").read_text())["stored"]}
    norm, k, head = (held[f"{name}.weight"]["ranks"] for name in ("model.norm", f"{LAYER}.self_attn.k_proj", "lm_head"))
    assert [rank is not None for rank in norm] == [True, False, False, False]
    assert [rank is not None for rank in k] == [True, False, True, False]
    assert [rank["shape"][0] for rank in head] == [3, 3, 3, 1]
    if format == "dcp":
        for name, described in metadata_of(Path("out")).state_dict_metadata.items():
            assert sum(chunk.sizes.numel() for chunk in described.chunks) == source[name].numel()


LAYER = "model.layers.0"


@both
def test_a_rank_may_have_nothing_of_a_tensor(format: str) -> None:
    llama(Path("small"), vocab_size=5)
    succeeds("split", "small", "--tp", 4, "-o", "out", "--format", format, "--no-fsync")
    source = load_file("small/model.safetensors")
    assert same(load(format, Path("out"), source), source)
    assert tpshard.check("out", "small").equal
    tpshard.merge("out", "merged", settings=QUICK)
    assert Path("merged/model.safetensors").read_bytes() == Path("small/model.safetensors").read_bytes()


def test_a_fused_tensor_is_several_chunks_or_refused(made: Callable[..., Path]) -> None:
    gpt2 = made("gpt2")
    succeeds("split", gpt2, "--tp", 4, "-o", "out", "--format", "dcp", "--no-fsync")
    source = load_file(gpt2 / "model.safetensors")
    assert same(load("dcp", Path("out"), source), source)
    fused = next(name for name in source if name.endswith("c_attn.weight"))
    assert len(metadata_of(Path("out")).state_dict_metadata[fused].chunks) == 12
    dcp_to_torch_save("out", "whole.pt")
    assert same(torch.load("whole.pt"), source)
    assert tpshard.check("out", gpt2).equal
    tpshard.merge("out", "merged", settings=QUICK)
    assert same(load_file("merged/model.safetensors"), source)
    error = fails(4, "split", gpt2, "--tp", 4, "-o", "other", "--format", "dcp-hf")
    assert "c_attn" in error["tensor"] and "--format dcp" in error["hint"]


@both
def test_padding_is_refused(model: Path, format: str) -> None:
    error = fails(4, "split", model, "--tp", 4, "-o", "out", "--format", format, "--pad-vocab-to", 12)
    assert error["found"] == "--pad-vocab-to 12" and "--format native" in error["hint"]
    plan = tpshard.plan(model, 4, format=format).to_json()
    size = sum(bits(tensor).numel() for tensor in load_file(model / "model.safetensors").values())
    assert plan["padded"] == [] and sum(rank["bytes"] for rank in plan["ranks"]) == size


@pytest.mark.parametrize(("format", "dtype"), [("dcp", "F8_E4M3"), ("dcp-hf", "F8_E8M0")])
def test_a_dtype_that_torch_does_not_read_is_refused(format: str, dtype: str) -> None:
    name = "model.norm.weight"
    llama(Path("odd"), tensors={name: llama_tensors(dtype=dtype)[name]})
    error = fails(4, "split", "odd", "--tp", 2, "-o", "out", "--format", format)
    assert error["tensor"] == name and dtype in error["message"]


@both
def test_the_bytes_depend_on_nothing_else(model: Path, format: str) -> None:
    options = {"format": format, "max_file_size": 1000}
    tpshard.split(model, 4, "one", settings=Settings(workers=1, fsync=False), **options)
    tpshard.split(model, 4, "three", settings=Settings(workers=3, fsync=False), **options)
    shutil.copytree(model, "elsewhere/model")
    tpshard.split("elsewhere/model", 4, "hosts", ranks=[2, 1], settings=QUICK, **options)
    with pytest.raises(tpshard.errors.CorruptError, match="rank 0, 3 missing"):
        tpshard.check("hosts")
    tpshard.split(model, 4, "hosts", ranks=[0, 3], settings=QUICK, **options)
    one = content(Path("one"))
    assert one == content(Path("three"))
    hosts = content(Path("hosts"))
    assert one.pop("SHA256SUMS") != hosts.pop("SHA256SUMS"), "only who writes all files can list them"
    assert one == hosts
    assert len(list(Path("one").glob("*model-00002-of-*" if format == "dcp-hf" else "__*_1.distcp"))) > 1


@both
@pytest.mark.parametrize("other", ["native", "dcp", "dcp-hf"])
def test_reshard_from_and_to(model: Path, format: str, other: str) -> None:
    tpshard.split(model, 2, "from", format=format, settings=QUICK)
    tpshard.reshard("from", 4, "to", format=other, settings=QUICK)
    tpshard.split(model, 4, "direct", format=other, settings=QUICK)
    assert content(Path("to")) == content(Path("direct"))


def test_consolidation_and_its_silent_zeros(model: Path) -> None:
    tpshard.split(model, 4, "out", format="dcp-hf", settings=QUICK)
    source = load_file(model / "model.safetensors")

    def consolidated(*names: str) -> dict[str, torch.Tensor]:
        Path("whole").mkdir(exist_ok=True)
        consolidate_safetensors_files("out", "whole", dict.fromkeys(names, 1))
        return load_file("whole/model-00001-of-00001.safetensors")

    assert same(consolidated(*source), source)
    Path("out/shard-00001-model-00001-of-00001.safetensors").unlink()
    damaged = consolidated("lm_head.weight")["lm_head.weight"]
    assert damaged.shape == source["lm_head.weight"].shape and not damaged[:3].any()
    for verb in (("check",), ("merge",), ("reshard", "--tp", 2)):
        error = fails(3, verb[0], "out", *verb[1:])
        assert "rank 0 missing" in error["message"]


def test_sharding_info_and_file_names(model: Path) -> None:
    tpshard.split(model, 2, "out", format="dcp-hf", settings=QUICK)
    with safe_open("out/shard-00002-model-00001-of-00001.safetensors", "pt") as file:
        said = file.metadata()
        info = json.loads(said["DCP_SHARDING_INFO"])
        assert info.keys() == set(file.keys()) and (said["DCP_VERSION"], said["format"]) == ("1.0", "pt")
    assert info["lm_head.weight"] == {"saved_offsets": [5, 0]}
    assert info[f"{LAYER}.self_attn.o_proj.weight"] == {"saved_offsets": [0, LLAMA["hidden_size"] // 2]}


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def test_damaged_archives(model: Path) -> None:
    tpshard.split(model, 2, "good", format="dcp", settings=QUICK)
    first, last = Path("bad/__0_0.distcp"), Path("bad/__1_0.distcp")
    where = metadata_of(Path("good")).storage_data

    def fresh() -> None:
        shutil.rmtree("bad", ignore_errors=True)
        shutil.copytree("good", "bad")

    for index in (0, len(where) - 1):  # in the pickle of some archive
        fresh()
        place = list(where.values())[index]
        flip(Path("bad", place.relative_path), place.offset + 100)
        assert place.relative_path in fails(3, "check", "bad")["path"]
    fresh()
    Path("bad/.metadata").unlink()
    assert ".metadata" in fails(3, "check", "bad")["message"]
    fresh()
    flip(Path("bad/.metadata"), 300)
    assert ".metadata" in fails(3, "merge", "bad")["message"]
    fresh()
    last.unlink()
    assert "rank 1 missing" in fails(3, "check", "bad")["message"]
    fresh()
    shutil.copy(last, "bad/__2_0.distcp")
    assert "__2_0.distcp" in fails(3, "check", "bad")["message"]
    fresh()
    raw = bytearray(first.read_bytes())
    tensor = load_file(model / "model.safetensors")["lm_head.weight"][:5]
    flip(first, bytes(raw).index(bytes(bits(tensor).tolist())))
    report = tpshard.check("bad", model)
    assert [(d.file, d.tensor) for d in report.differences] == [("__0_0.distcp", "lm_head.weight")]
    assert [d.file for d in tpshard.check("bad").differences] == ["__0_0.distcp"]


def test_exchanged_archives_of_equal_shapes() -> None:
    llama(Path("even"), vocab_size=12, num_key_value_heads=4)
    tpshard.split("even", 4, "out", format="dcp", settings=QUICK)
    one, other = Path("out/__1_0.distcp"), Path("out/__2_0.distcp")
    assert one.stat().st_size == other.stat().st_size
    one.rename("kept"), other.rename(one), Path("kept").rename(other)
    assert "__1_0.distcp" in fails(3, "merge", "out")["path"]


@both
def test_an_old_set_of_the_format_is_replaced(model: Path, format: str) -> None:
    tpshard.split(model, 4, "out", format=format, settings=QUICK)
    tpshard.split(model, 2, "out", format="native", settings=Settings(workers=1, fsync=False, overwrite=True))
    assert not any(name.endswith(".distcp") or name.startswith((".", "shard")) for name in content(Path("out")))
    assert tpshard.check("out", tp=2).equal


@pytest.mark.parametrize("tp", [2, 4])
def test_load_rank_reads_the_archives(model: Path, tp: int) -> None:
    tpshard.split(model, tp, "out", format="dcp", settings=QUICK)
    source = load_file(model / "model.safetensors")
    held = tpshard.load_rank("out", 1)
    rows = -(-10 // tp)
    assert torch.equal(bits(held["lm_head.weight"]), bits(source["lm_head.weight"][rows : 2 * rows]))
