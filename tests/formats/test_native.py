"""The native format: names, manifest, records, parts, and torch's own reader on it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tpshard
from tests.helpers import checkpoints
from tpshard.execute.publish import Settings
from tpshard.formats.manifest import FORMAT_VERSION


def tensors_of(directory: Path, rank: int, tp: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob(f"rank-{rank:05}-of-{tp:05}*.safetensors")):
        found.update(load_file(path))
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make("llama", tmp_path_factory.mktemp("llama") / "model", vocab_size=252)


def test_names_records_and_metadata(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = tpshard.split(llama, 4, out)
    names = {path.name for path in out.iterdir()}
    ranks = [f"rank-0000{r}-of-00004" for r in range(4)]
    weights = {f"{rank}.safetensors" for rank in ranks}
    assert names == (
        weights | {f"{r}.json" for r in ranks} | {"tpshard.json", "config.json", "generation_config.json", "SHA256SUMS"}
    )
    manifest = json.loads((out / "tpshard.json").read_bytes())
    assert manifest["format_version"] == FORMAT_VERSION
    assert manifest["mesh"] == {"tp": 4, "pp": 1, "ep": 1}
    assert manifest["source"]["name"] == "model"
    assert str(tmp_path) not in (out / "tpshard.json").read_text()
    for rank, stem in enumerate(ranks):
        path = out / f"{stem}.safetensors"
        record = json.loads((out / f"{stem}.json").read_bytes())
        assert record["set"] == manifest["set"] == report.set_id
        assert record["parts"] == [
            {
                "file": path.name,
                "size": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        ]
        with safe_open(path, framework="pt") as file:
            said = file.metadata()
        assert said["tpshard.rank"] == str(rank)
        assert said["tpshard.tp"] == "4"
        assert said["tpshard.set"] == manifest["set"]
        assert said["format"] == "pt"


def test_boxes_of_the_manifest_are_what_the_files_hold(llama: Path, tmp_path: Path) -> None:
    tpshard.split(llama, 2, tmp_path / "out")
    source = load_file(llama / "model.safetensors")
    manifest = json.loads((tmp_path / "out/tpshard.json").read_bytes())
    assert [tensor["name"] for tensor in manifest["tensors"]] and len(manifest["tensors"]) == len(source)
    for rank in range(2):
        held = tensors_of(tmp_path / "out", rank, 2)
        assert list(held) != [] and set(held) == set(source)
        for tensor in manifest["tensors"]:
            whole = source[tensor["name"]]
            if "ranks" not in tensor:
                assert torch.equal(held[tensor["name"]], whole)
                continue
            assert list(held[tensor["name"]].shape) == tensor["ranks"][rank]["shape"]
            for part in tensor["ranks"][rank]["parts"]:
                box = tuple(slice(start, stop) for start, stop in part["box"])
                at = tuple(
                    slice(corner, corner + stop - start)
                    for corner, (start, stop) in zip(part["at"], part["box"], strict=True)
                )
                assert torch.equal(held[tensor["name"]][at], whole[box])


def test_hosts_that_write_their_own_ranks_make_the_same_set(llama: Path, tmp_path: Path) -> None:
    tpshard.split(llama, 4, tmp_path / "one")
    shutil.copytree(llama, tmp_path / "elsewhere" / "model")
    tpshard.split(llama, 4, tmp_path / "many", ranks=[3, 0])
    with pytest.raises(tpshard.errors.CorruptError, match="rank 1, 2 missing"):
        tpshard.check(tmp_path / "many")
    tpshard.split(tmp_path / "elsewhere" / "model", 4, tmp_path / "many", ranks=[1, 2])
    one = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    many = {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()}
    fewer, every = (set(files.pop("SHA256SUMS").splitlines()) for files in (many, one))
    assert many == one and fewer < every, "no host knows all checksums"


@pytest.mark.parametrize("limit", [40_000, 1])
def test_parts_above_the_file_size(llama: Path, tmp_path: Path, limit: int) -> None:
    tpshard.split(llama, 2, tmp_path / "whole")
    tpshard.split(llama, 2, tmp_path / "parts", max_file_size=limit)
    files = sorted((tmp_path / "parts").glob("rank-00001-*.safetensors"))
    count = len(files)
    assert count > 1
    assert [path.name for path in files] == [
        f"rank-00001-of-00002-part-{i:05}-of-{count:05}.safetensors" for i in range(count)
    ]
    for path in files:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= limit
    whole, parts = tensors_of(tmp_path / "whole", 1, 2), tensors_of(tmp_path / "parts", 1, 2)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert tpshard.check(tmp_path / "parts", llama).equal
    tpshard.merge(tmp_path / "parts", tmp_path / "merged")
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()


def test_the_same_bytes_for_any_number_of_workers(llama: Path, tmp_path: Path) -> None:
    written = []
    for workers in (1, 2, 5):
        out = tmp_path / f"out{workers}"
        tpshard.split(llama, 4, out, settings=Settings(workers=workers))
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_torch_reads_a_set_of_rectangles_with_its_own_reader(llama: Path, tmp_path: Path, tp: int) -> None:
    import torch.distributed.checkpoint as dcp

    tpshard.split(llama, tp, tmp_path / "out")
    source = load_file(llama / "model.safetensors")
    state = {name: torch.full_like(tensor, 7) for name, tensor in source.items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "out")), no_dist=True)
    assert all(torch.equal(state[name], source[name]) for name in source)


@pytest.mark.parametrize(
    ("variant", "options"), [("gpt2", {}), ("llama", {"vocab_size": 251}), ("falcon-new", {"vocab_size": 252})]
)
def test_no_sharding_info_without_rectangles(tmp_path: Path, variant: str, options: dict[str, int]) -> None:
    model = checkpoints.make(variant, tmp_path / "model", **options)
    tpshard.split(model, 4, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert not {"DCP_SHARDING_INFO", "DCP_VERSION"} & file.metadata().keys()


def test_a_newer_manifest_is_refused_with_a_way_out(llama: Path, tmp_path: Path) -> None:
    tpshard.split(llama, 2, tmp_path / "out")
    path = tmp_path / "out/tpshard.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(tpshard.errors.UnsupportedError) as caught:
        tpshard.check(tmp_path / "out")
    assert caught.value.hint == "upgrade tpshard"


def test_a_cast_is_torchs_cast_and_the_config_says_so(llama: Path, tmp_path: Path) -> None:
    tpshard.split(llama, 2, tmp_path / "out", dtype="bfloat16")
    assert tpshard.check(tmp_path / "out", llama).equal
    tpshard.merge(tmp_path / "out", tmp_path / "merged")
    source, merged = load_file(llama / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    assert source.keys() == merged.keys()
    assert all(torch.equal(source[name].bfloat16(), merged[name]) for name in source)
    config = json.loads((tmp_path / "merged/config.json").read_bytes())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    tpshard.reshard(tmp_path / "out", 4, tmp_path / "four")
    tpshard.split(llama, 4, tmp_path / "direct", dtype="bfloat16")
    for path in (tmp_path / "direct").iterdir():
        assert path.read_bytes() == (tmp_path / "four" / path.name).read_bytes()
