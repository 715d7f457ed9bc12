"""Sets of torch.distributed.checkpoint: what torch would load is run, and what it would load wrongly is named."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from tests.helpers.transformers_runs import exchange
from tpshard.api import convert as api
from tpshard.api import verify as verifying
from tpshard.errors import CorruptError, TpshardError, UnsafeError, UnsupportedError
from tpshard.execute.publish import Settings
from tpshard.storage.safetensors import TensorInfo
from tpshard.verifier.options import VerifyOptions
from tpshard.verifier.ranks.dcp import Chunk, dealt, of_metadata
from tpshard.verifier.ranks.open import FileWeights, open_shards
from tpshard.verifier.report.verdict import Verdict
from tpshard.verifier.run import verify

Get = Callable[..., Path]
Splits = Callable[..., tuple[Path, Path]]
K = "model.layers.1.self_attn.k_proj.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def splits(made: Get, tmp_path_factory: pytest.TempPathFactory) -> Splits:
    """A model and its set, each made once; tests that damage it copy it."""
    root = tmp_path_factory.mktemp("sets")

    def get(name: str, tp: int, format: str) -> tuple[Path, Path]:
        out = root / f"{name}-{tp}-{format}"
        if not out.exists():
            api.split(made(name), tp, out, format=format, settings=Settings(fsync=False, workers=1))
        return made(name), out

    return get


def judged(model: Path, shards: Path) -> Verdict:
    return verify(VerifyOptions(shards, tiers=("exact",), device="cpu"), model)


@pytest.mark.parametrize(
    ("format", "name", "tp"),
    [
        ("dcp", "llama-gqa", 2),
        ("dcp", "llama-gqa", 4),
        # Several rectangles of one tensor: q, k and v apart, by group, and with k and v for all ranks.
        ("dcp", "gpt2", 4),
        ("dcp", "falcon-new", 2),
        ("dcp", "falcon-new", 4),
        ("dcp", "gpt_bigcode-mqa", 4),
        ("dcp", "phi3", 4),
        ("dcp-hf", "llama-gqa", 2),
        ("dcp-hf", "llama-gqa", 4),
        ("dcp-hf", "qwen3", 4),
    ],
)
def test_a_correct_set_passes(format: str, name: str, tp: int, splits: Splits) -> None:
    model, shards = splits(name, tp, format)
    verdict = verifying.verify(shards, model, tiers=("bytes", "exact"), device="cpu")
    assert [(tier.name, tier.status) for tier in verdict.tiers] == [("bytes", "pass"), ("exact", "pass")]
    assert (verdict.exit_code, verdict.tp, verdict.warnings) == (0, tp, ())
    assert verdict.canaries and all(canary.status == "caught" for canary in verdict.canaries)


@pytest.mark.parametrize("format", ["dcp", "dcp-hf"])
def test_a_set_is_streamed(format: str, splits: Splits) -> None:
    model, shards = splits("llama-gqa", 4, format)
    verdict = verify(VerifyOptions(shards, tiers=("exact", "native"), tokens=2, device="cpu", stream=True), model)
    assert verdict.verdict == "pass" and verdict.settings["streamed"]


def test_names_without_the_base_prefix(made: Get, tmp_path: Path) -> None:
    model = made("gpt2", strip_prefix=True)
    api.split(model, 2, tmp_path / "set", format="dcp", settings=Settings(fsync=False, workers=1))
    verdict = judged(model, tmp_path / "set")
    assert verdict.verdict == "pass" and verdict.tiers[0].findings[-3].module == "ln_f"


@pytest.mark.parametrize("format", ["dcp", "dcp-hf"])
def test_every_rectangle_is_what_torchs_own_reader_loads_there(format: str, splits: Splits) -> None:
    model, shards = splits("llama-gqa", 4, format)
    state = {name: torch.zeros_like(tensor) for name, tensor in load_file(model / "model.safetensors").items()}
    reader = dcp.FileSystemReader(shards) if format == "dcp" else dcp.HuggingFaceStorageReader(str(shards))
    dcp.load(state, storage_reader=reader, no_dist=True)
    opened = open_shards(shards)
    seen = dict.fromkeys(state, 0)
    for weights, held in zip(opened.ranks, opened.chunks, strict=True):
        for name, chunks in held.items():
            for chunk in chunks:
                box = tuple(slice(first, last) for first, last in zip(chunk.at, chunk.end, strict=True))
                assert torch.equal(weights.get(chunk.info.name), state[name][box])
                seen[name] += state[name][box].numel()
    assert seen == {name: tensor.numel() for name, tensor in state.items()}


def flip(info: TensorInfo) -> None:
    """Change the sign of the first element, float32."""
    with open(info.file, "r+b") as file:
        file.seek(info.begin + 3)
        byte = file.read(1)[0]
        file.seek(info.begin + 3)
        file.write(bytes([byte ^ 0x80]))


@pytest.mark.parametrize("format", ["dcp", "dcp-hf"])
def test_one_changed_byte_is_named(format: str, splits: Splits, tmp_path: Path) -> None:
    """At tp 4 there are two KV heads: the second one's rectangle is ranks 2's and 3's."""
    model, good = splits("llama-gqa", 4, format)
    shards = Path(shutil.copytree(good, tmp_path / "set"))
    flip(open_shards(shards).chunks[2][K][0].info)
    verdict = judged(model, shards)
    reason = "model.layers.1.self_attn.k_proj of rank 2 differs first"
    assert verdict.exit_code == 1 and (verdict.reason or "").startswith(reason), verdict.reason
    flip(open_shards(shards).chunks[2][K][0].info)
    assert judged(model, shards).exit_code == 0


def metadata(shards: Path, change: Callable[[Metadata], None]) -> None:
    found: Metadata = pickle.loads((shards / ".metadata").read_bytes())
    change(found)
    (shards / ".metadata").write_bytes(pickle.dumps(found, protocol=4))


def exchanged(name: str) -> Callable[[Metadata], None]:
    """The first two rectangles of a tensor in each other's place."""

    def change(found: Metadata) -> None:
        one, two = sorted((i for i in found.storage_data if i.fqn == name), key=lambda index: index.offset)[:2]
        found.storage_data[one], found.storage_data[two] = found.storage_data[two], found.storage_data[one]

    return change


def offsets(shards: Path, rank: int, change: Callable[[Any], None]) -> None:
    """Change what a file of the Hugging Face flavour says of its tensors' places."""
    path = shards / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
    with safe_open(path, "pt") as file:
        said = file.metadata()
    places = json.loads(said["DCP_SHARDING_INFO"])
    change(places)
    save_file(load_file(path), path, said | {"DCP_SHARDING_INFO": json.dumps(places)})


def test_rectangles_in_each_others_place(splits: Splits, tmp_path: Path) -> None:
    model, good = splits("llama-gqa", 2, "dcp")
    shards = Path(shutil.copytree(good, tmp_path / "dcp"))
    metadata(shards, exchanged(Q))
    assert (judged(model, shards).reason or "").startswith("model.layers.1.self_attn.q_proj of rank 0 differs first")
    model, good = splits("llama-gqa", 2, "dcp-hf")
    shards = Path(shutil.copytree(good, tmp_path / "hf"))
    for rank in (0, 1):
        offsets(shards, rank, lambda places, first=32 * (1 - rank): places[Q].update(saved_offsets=[first, 0]))  # type: ignore[misc]
    assert (judged(model, shards).reason or "").startswith("model.layers.1.self_attn.q_proj of rank 0 differs first")


def test_k_and_v_of_a_fused_tensor_in_each_others_place(splits: Splits, tmp_path: Path) -> None:
    model, good = splits("gpt2", 2, "dcp")
    shards = Path(shutil.copytree(good, tmp_path / "set"))

    def change(found: Metadata) -> None:
        name = "transformer.h.1.attn.c_attn.weight"
        at = sorted((i for i in found.storage_data if i.fqn == name), key=lambda index: index.offset)
        k, v = at[2], at[4]  # of rank 0: q, q, k, k, v, v
        found.storage_data[k], found.storage_data[v] = found.storage_data[v], found.storage_data[k]

    metadata(shards, change)
    reason = judged(model, shards).reason or ""
    assert reason.startswith("k of transformer.h.1.attn.c_attn of rank 0 differs first"), reason


def test_files_that_were_exchanged(splits: Splits, tmp_path: Path) -> None:
    """The Hugging Face flavour says in each file where its tensors belong, so torch loads the same; `check` objects."""
    model, good = splits("llama-gqa", 2, "dcp-hf")
    shards = Path(shutil.copytree(good, tmp_path / "set"))
    exchange(*(shards / f"shard-{rank:05}-model-00001-of-00001.safetensors" for rank in (1, 2)))
    for record in shards.glob("rank-*.json"):
        record.unlink()
    verdict = verifying.verify(shards, model, tiers=("bytes", "exact"), device="cpu")
    assert [(tier.name, tier.status) for tier in verdict.tiers] == [("bytes", "fail"), ("exact", "pass")]
    model, good = splits("llama-gqa", 2, "dcp")
    shards = Path(shutil.copytree(good, tmp_path / "other"))
    exchange(shards / "__0_0.distcp", shards / "__1_0.distcp")
    with pytest.raises(CorruptError, match="archive"):
        judged(model, shards)


def test_what_torch_would_leave_unread_is_refused(splits: Splits, tmp_path: Path) -> None:
    model, good = splits("llama-gqa", 4, "dcp")
    shards = Path(shutil.copytree(good, tmp_path / "set"))
    metadata(shards, lambda found: found.storage_data.pop(next(i for i in found.storage_data if i.fqn == Q)))
    with pytest.raises(CorruptError, match="leave a gap, or overlap") as error:
        judged(model, shards)
    assert error.value.tensor == Q
    (shards / "__3_0.distcp").unlink()
    with pytest.raises(CorruptError, match="disagree; .*expected tp 4; found tp 3"):
        judged(model, shards)
    (shards / ".metadata").unlink()
    (shards / "__2_0.distcp").rename(shards / "__3_0.distcp")
    with pytest.raises(CorruptError, match="missing or incomplete.*all but 2"):
        judged(model, shards)
    model, good = splits("llama-gqa", 2, "dcp-hf")
    shards = Path(shutil.copytree(good, tmp_path / "hf"))
    offsets(shards, 1, lambda places: places.pop(Q))
    with pytest.raises(CorruptError, match="does not say where its tensors begin"):
        judged(model, shards)


@pytest.mark.parametrize("size", [(65, 64), (63, 64), (64, 65), (64,)], ids=str)
def test_a_tensor_of_another_size_than_its_rectangles_is_refused(
    size: tuple[int, ...], splits: Splits, tmp_path: Path
) -> None:
    """Torch would make it of the described size, with nothing in the rows beyond."""
    model, good = splits("llama-gqa", 2, "dcp")
    shards = Path(shutil.copytree(good, tmp_path / "set"))

    def change(found: Metadata) -> None:
        described = found.state_dict_metadata[Q]
        assert isinstance(described, TensorStorageMetadata) and tuple(described.size) == (64, 64)
        described.size = torch.Size(size)

    metadata(shards, change)
    with pytest.raises(CorruptError, match="not of the size that .metadata gives it") as error:
        judged(model, shards)
    assert (error.value.tensor, error.value.expected, error.value.found) == (Q, list(size), [64, 64])


def test_a_tensor_without_rectangles_is_refused(splits: Splits, tmp_path: Path) -> None:
    model, good = splits("llama-gqa", 2, "dcp")
    shards = Path(shutil.copytree(good, tmp_path / "set"))

    def change(found: Metadata) -> None:
        found.state_dict_metadata["more.weight"] = found.state_dict_metadata[Q]

    metadata(shards, change)
    with pytest.raises(CorruptError, match="found no pieces") as error:
        judged(model, shards)
    assert error.value.tensor == "more.weight"


def test_a_rectangle_whose_place_has_other_dims_is_refused(splits: Splits, tmp_path: Path) -> None:
    model, good = splits("llama-gqa", 2, "dcp")
    shards = Path(shutil.copytree(good, tmp_path / "set"))

    def change(found: Metadata) -> None:
        described = found.state_dict_metadata[Q]
        assert isinstance(described, TensorStorageMetadata)
        index = next(index for index in found.storage_data if index.fqn == Q)
        chunk = next(chunk for chunk in described.chunks if chunk.offsets == index.offset)
        chunk.offsets = torch.Size((*chunk.offsets, 0))
        found.storage_data[replace(index, offset=chunk.offsets)] = found.storage_data.pop(index)

    metadata(shards, change)
    with pytest.raises(CorruptError, match="the archive is not what .metadata says") as error:
        judged(model, shards)
    assert error.value.tensor == Q


def archived(shards: Path, archive: bytes) -> None:
    """Put another archive where Q's first rectangle is, at the end of its file."""

    def change(found: Metadata) -> None:
        index = next(index for index in found.storage_data if index.fqn == Q and index.offset == torch.Size((0, 0)))
        place = found.storage_data[index]
        path = shards / place.relative_path
        found.storage_data[index] = replace(place, offset=path.stat().st_size, length=len(archive))
        path.write_bytes(path.read_bytes() + archive)

    metadata(shards, change)


def saved(tensor: torch.Tensor) -> bytes:
    torch.save(tensor, file := io.BytesIO())
    return file.getvalue()


def repacked(archive: bytes, compression: int = zipfile.ZIP_STORED, **changed: Callable[[bytes], bytes]) -> bytes:
    """An archive written anew by Python, some of its records changed."""
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file := io.BytesIO(), "w", compression) as new:
        for entry in old.infolist():
            leaf = entry.filename.rpartition("/")[2]
            new.writestr(entry.filename, changed.get(leaf, lambda data: data)(old.read(entry)))
    return file.getvalue()


RECTANGLE = torch.arange(32.0 * 64).view(32, 64)
NO_ARCHIVE = [
    ("without bytes", saved(RECTANGLE.to("meta")), CorruptError, "not where torch looks"),
    ("too short", repacked(saved(RECTANGLE), **{"0": lambda data: data[:-4]}), CorruptError, "not where torch looks"),
    ("compressed", repacked(saved(RECTANGLE), zipfile.ZIP_DEFLATED), UnsupportedError, "compressed"),
    ("big-endian", repacked(saved(RECTANGLE), byteorder=lambda _: b"big"), UnsupportedError, "little-endian"),
    ("strided", saved(RECTANGLE.view(64, 32).t()), UnsupportedError, "strided view"),
    ("no tensor", saved([RECTANGLE]), UnsupportedError, "not a tensor"),  # type: ignore[arg-type]
    ("cut off", saved(RECTANGLE)[:-100], CorruptError, "damaged or cut off"),
]


@pytest.mark.parametrize(("archive", "kind", "says"), [case[1:] for case in NO_ARCHIVE], ids=[c[0] for c in NO_ARCHIVE])
def test_an_archive_that_does_not_hold_its_tensor_is_refused(
    archive: bytes, kind: type[TpshardError], says: str, splits: Splits, tmp_path: Path
) -> None:
    model, good = splits("llama-gqa", 2, "dcp")
    shards = Path(shutil.copytree(good, tmp_path / "set"))
    archived(shards, archive)
    with pytest.raises(kind, match=says) as error:
        judged(model, shards)
    assert error.value.tensor == Q and error.value.hint == kind.way_out


def test_another_archive_is_read_where_it_lies(splits: Splits, tmp_path: Path) -> None:
    """What the tests of wrong archives change is the archive alone."""
    shards = Path(shutil.copytree(splits("llama-gqa", 2, "dcp")[1], tmp_path / "set"))
    archived(shards, repacked(saved(RECTANGLE)))
    assert torch.equal(open_shards(shards).ranks[0].get(Q), RECTANGLE)


@pytest.mark.parametrize(
    ("change", "message", "tensor"),
    [
        (lambda found: found.state_dict_metadata.pop(Q), "where a tensor lies and not what it is", Q),
        (lambda found: placed_in(found, "../set/__0_0.distcp"), "into another directory", Q),
        (lambda found: placed_in(found, 3), "not torch's metadata", None),
        (lambda found: delattr(found.state_dict_metadata[Q], "size"), "not torch's metadata", None),
        (lambda found: found.state_dict_metadata[Q].chunks.append(None), "not torch's metadata", None),
        (lambda found: setattr(found, "storage_data", [Q]), "not torch's metadata", None),
    ],
)
def test_a_metadata_that_torch_would_not_write_is_refused(
    change: Callable[[Any], None], message: str, tensor: str | None, splits: Splits, tmp_path: Path
) -> None:
    model, good = splits("llama-gqa", 2, "dcp")
    shards = Path(shutil.copytree(good, tmp_path / "set"))
    metadata(shards, change)
    with pytest.raises(CorruptError, match=message) as error:
        judged(model, shards)
    assert error.value.tensor == tensor and str(error.value.path).endswith(".metadata")


def placed_in(found: Any, path: object) -> None:
    """Say that Q's first rectangle lies in another file."""
    index = next(index for index in found.storage_data if index.fqn == Q)
    found.storage_data[index] = replace(found.storage_data[index], relative_path=path)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("called",))


def test_the_metadata_builds_nothing_else(splits: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, good = splits("llama-gqa", 2, "dcp")
    shards = Path(shutil.copytree(good, tmp_path / "set"))
    (shards / ".metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(UnsafeError, match="builtins.print"):
        judged(model, shards)
    assert "called" not in capsys.readouterr().out
    (shards / ".metadata").write_bytes(b"\x80\x04.")
    with pytest.raises(CorruptError, match="not torch's metadata"):
        judged(model, shards)
    (shards / ".metadata").write_bytes(b"\x80\x02}r" + (10**8).to_bytes(4, "little") + b".")  # 1.6 GB of places
    with pytest.raises(CorruptError, match="place 100000000 of what a pickle of 9 bytes remembers"):
        judged(model, shards)


def test_what_torch_itself_writes_is_read(tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6.0).view(2, 3), "half": torch.ones(4, dtype=torch.bfloat16)[1:], "step": 3}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    (chunks,) = of_metadata(tmp_path).values()
    weights = FileWeights(chunk.info for chunk in chunks)
    assert set(weights.names()) == {"a.weight", "half"}
    for name in weights.names():
        assert torch.equal(weights.get(name), state[name])  # type: ignore[arg-type]


def chunk(at: tuple[int, ...], shape: tuple[int, ...]) -> Chunk:
    return Chunk(at, TensorInfo("t", "F32", shape, "file", 0, 0))


def test_ranks_are_made_of_rectangles() -> None:
    def shares(*files: list[tuple[int, int]]) -> list[list[tuple[int, ...]]]:
        held = [{"t": [chunk((at, 0), (size, 2)) for at, size in file]} if file else {} for file in files]
        ((_, dim, ranks),) = dealt(held)
        assert dim == 0
        return [[each.at[0] for each in rank] for rank in ranks]

    assert shares([(0, 8)], [], [], []) == [[0]] * 4
    assert shares([(4, 4)], [(0, 4)]) == [[0], [4]]
    assert shares([(0, 1)], [], [(1, 1)], []) == [[0], [0], [1], [1]]
    # q of each, k and v for two ranks each.
    fused = [(0, 2), (8, 1), (10, 1)], [(2, 2)], [(4, 2), (9, 1), (11, 1)], [(6, 2)]
    assert shares(*map(list, fused)) == [[0, 8, 10], [2, 8, 10], [4, 9, 11], [6, 9, 11]]
    with pytest.raises(UnsupportedError, match="cannot deal t to 4 ranks"):
        shares([(0, 1)], [(1, 1)], [(2, 1)], [])
    for wrong in ([(0, 1)], [(2, 1)]), ([(0, 2)], [(1, 1)]), ([(1, 1)], [(2, 1)]):
        with pytest.raises(CorruptError, match="gap"):
            shares(*map(list, wrong))
    with pytest.raises(UnsupportedError, match="several dims"):
        next(dealt([{"t": [chunk((0, 0), (1, 1)), chunk((0, 1), (1, 1)), chunk((1, 0), (1, 2))]}]))
    with pytest.raises(UnsupportedError, match="several dims"):
        next(dealt([{"t": [chunk((0, 0), (1, 2)), chunk((1, -1), (1, 2))]}]))
