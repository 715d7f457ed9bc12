"""Shard sets that are incomplete, mixed, exchanged, damaged or changed: every one is refused or judged, never used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash.scene import fine_grained
from tests.crash.seams import Died, Faulty, one_thread
from tests.helpers.command import fails, llama, succeeds, tpshard
from tests.helpers.grids import one_in
from tests.helpers.toys import Tensor, metadata, read, read_all
from tpshard.api import convert as api
from tpshard.errors import CorruptError
from tpshard.execute.publish import Settings
from tpshard.inputs.shard_set import open_shards
from tpshard.storage.safetensors import build_header

Json = Any
VERBS = (("check", "set"), ("merge", "set"), ("reshard", "set", "--tp", 2), ("inspect", "set"))


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint and a shard set of it."""
    folder = tmp_path_factory.mktemp("made")
    with contextlib.chdir(folder):
        split(llama(Path("model")), "set")
    return folder


@pytest.fixture(autouse=True)
def here(undamaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of them in the working directory, for one test to damage."""
    shutil.copytree(undamaged, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def split(model: Path, out: str, tp: int = 4, *options: object) -> Path:
    succeeds("split", model, "--tp", tp, "-o", out, "--no-fsync", *options)
    return Path(out)


def weights(rank: int, tp: int = 4) -> Path:
    return Path("set") / f"rank-{rank:05}-of-{tp:05}.safetensors"


def record(rank: int) -> Path:
    return weights(rank).with_suffix(".json")


def exchange(one: Path, other: Path) -> None:
    kept = one.with_suffix(".kept")
    one.rename(kept)
    other.rename(one)
    kept.rename(other)


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> None:
    """Write a rank's file anew after a change of its tensors and metadata; its record then has the right size."""
    tensors, said = read(path), metadata(path)
    change(tensors, said)
    header = build_header([(name, t.dtype, t.shape) for name, t in tensors.items()], said)
    path.write_bytes(header + b"".join(t.data for t in tensors.values()))


def flip(path: Path, tensor: str, element: tuple[int, ...]) -> None:
    """Flip a bit of one element of a float32 tensor in a file."""
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])[tensor]
    flat = 0
    for index, size in zip(element, entry["shape"], strict=True):
        flat = flat * size + index
    raw[8 + length + entry["data_offsets"][0] + 4 * flat + 2] ^= 1
    path.write_bytes(raw)


def all_refuse(code: int, *, inspect: bool = True) -> dict[str, Any]:
    """Every verb that reads the set refuses it with the same words."""
    errors = [fails(code, *arguments) for arguments in (VERBS if inspect else VERBS[:-1])]
    assert all(error == errors[0] for error in errors)
    return errors[0]


def test_the_set_is_whole() -> None:
    for arguments in VERBS:
        succeeds(*arguments)
    assert read_all(Path("model-merged")) == read_all(Path("model"))
    assert succeeds("check", "set", "--source", "model", "--json").json["equal"] is True


# --- not there ---


def test_ranks_missing() -> None:
    weights(1).unlink()
    record(3).unlink()
    error = all_refuse(3, inspect=False)
    assert "rank 1, 3 missing" in error["message"] and error["found"] == "2 of 4" and "--ranks 1,3" in error["hint"]
    assert succeeds("inspect", "set", "--json").json["missing_ranks"] == [1, 3]


def test_the_hint_for_missing_ranks_works() -> None:
    weights(1).unlink()
    record(1).unlink()
    succeeds("split", "model", "--tp", 4, "-o", "set", "--ranks", 1, "--no-fsync")
    succeeds("check", "set", "--source", "model")


@pytest.mark.parametrize("lost", ["file", "end", "record"])
@pytest.mark.parametrize("size", [(), ("--max-file-size", "1kB")])
def test_the_way_out_of_a_lost_file_works(lost: str, size: tuple[object, ...]) -> None:
    """A rank's record alone does not make it complete: the command of the hint writes what was there."""
    split(Path("model"), "whole", 4, *size)
    shutil.rmtree("set")
    shutil.copytree("whole", "set")
    again = ("split", "model", "--tp", 4, "-o", "set", "--ranks", 3, "--no-fsync", *size)
    before = {p.name: p.stat().st_mtime_ns for p in Path("set").iterdir()}
    done = succeeds(*again, "--json")
    assert "rank 3 is already there and complete" in done.err and done.json["bytes"] == 0
    assert [part["file"] for part in done.json["ranks"][0]["parts"]] == sorted(
        p.name for p in Path("set").glob("rank-00003-*s")
    )
    assert {p.name: p.stat().st_mtime_ns for p in Path("set").iterdir()} == before
    path = record(3) if lost == "record" else sorted(Path("set").glob("rank-00003-*.safetensors"))[-1]
    if lost == "end":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    assert "--ranks 3" in fails(3, "check", "set")["hint"]
    succeeds(*again)
    assert {p.name: p.read_bytes() for p in Path("set").iterdir()} == {
        p.name: p.read_bytes() for p in Path("whole").iterdir()
    }
    succeeds("check", "set", "--source", "model")


def test_whether_a_rank_is_there_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host may complete it meanwhile: what is written and what is reported follow from one look."""
    asked, look = [], api._is_written

    def spy(target: Path, planned: Any, rank: int) -> bool:
        asked.append(rank)
        return look(target, planned, rank)

    monkeypatch.setattr(api, "_is_written", spy)
    weights(1).unlink()
    done = succeeds("split", "model", "--tp", 4, "-o", "set", "--ranks", "0,1", "--no-fsync", "--json")
    assert asked == [0, 1] and [rank["rank"] for rank in done.json["ranks"]] == [1]


def test_a_part_of_a_rank_is_missing() -> None:
    shutil.rmtree("set")
    split(Path("model"), "set", 4, "--max-file-size", "1kB")
    part = next(Path("set").glob("rank-00002-of-00004-part-00001-of-*.safetensors"))
    part.unlink()
    assert "rank 2 missing" in all_refuse(3, inspect=False)["message"]


def test_not_a_shard_set() -> None:
    for verb in (("check",), ("merge",), ("reshard", "--tp", 2)):
        error = fails(2, *verb, "model")
        assert "not a shard set" in error["message"] and error["path"] == "model"
        assert "no such directory" in fails(2, *verb, "nothing")["message"]
        assert "no such directory" in fails(2, *verb, weights(0))["message"]


def test_an_unfinished_run_is_pointed_at() -> None:
    with fine_grained(), one_thread(), pytest.raises(Died):
        api.split("model", 4, "other", settings=Settings(workers=1, files=Faulty(80, None)))
    here = fails(3, "check", "other.partial")
    error = fails(2, "check", "other")
    assert error["found"] == "an unfinished run in other.partial"
    assert error["hint"] == here["hint"] and "same `tpshard split` command again, with -o other:" in here["hint"]
    succeeds("split", "model", "--tp", 4, "-o", "other")
    succeeds("check", "other")
    Path("set").rename("moved.partial")
    assert "unfinished" not in fails(2, "check", "moved")["hint"], "nobody left it so"


def test_the_manifest_is_missing() -> None:
    Path("set/tpshard.json").unlink()
    error = all_refuse(3, inspect=False)
    assert "tpshard.json is missing" in error["message"] and "every host" in error["hint"]


# --- of another set ---


def test_the_files_of_a_set_of_another_width() -> None:
    other = split(Path("model"), "other", 2)
    shutil.copy(other / "rank-00000-of-00002.safetensors", "set")
    error = all_refuse(3)
    assert "not of this set" in error["message"] and error["path"] == "set/rank-00000-of-00002.safetensors"
    assert error["expected"].endswith("tp 4") and error["found"].endswith("tp 2")


def test_a_file_of_another_model_in_the_place_of_ours() -> None:
    other = split(llama(Path("tuned"), seed=1), "other")
    shutil.copy(other / weights(2).name, "set")
    error = all_refuse(3)
    assert "not of this set" in error["message"] and error["path"] == str(weights(2))


@pytest.mark.parametrize("options", [("--dtype", "bfloat16"), ("--pad-vocab-to", 16), ("--max-file-size", "1MB")])
def test_a_file_of_a_split_with_other_options(options: tuple[object, ...]) -> None:
    other = split(Path("model"), "other", 4, *options)
    shutil.copy(other / weights(2).name, "set")
    assert "not of this set" in all_refuse(3)["message"]


def test_two_sets_in_one_directory() -> None:
    for path in split(llama(Path("tuned"), seed=1), "other").iterdir():
        shutil.copy(path, "set")
    succeeds("check", "set")  # all files were replaced: it is the other set now
    shutil.copy(Path("other") / weights(0).name, "first")
    split(Path("model"), "again")
    shutil.copy(Path("again") / weights(0).name, "set")
    assert "not of this set" in all_refuse(3)["message"]


def test_a_rank_of_a_model_that_differs_in_its_bytes_alone() -> None:
    """The names, shapes and the directory's name are the same: only the bytes tell, in the replicas and the source."""
    llama(Path("elsewhere/model"), seed=1)
    other = split(Path("elsewhere/model"), "other")
    shutil.copy(other / weights(2).name, "set")
    shutil.copy(other / record(2).name, "set")
    assert "rank-00002-of-00004" in fails(3, "check", "set", "--source", "model")["message"], "not of SHA256SUMS"
    Path("set/SHA256SUMS").unlink()
    assert tpshard("check", "set", "--source", "model").code == 1
    error = judged_by_merge()
    assert "differ" in error["message"]


def judged_by_merge() -> dict[str, Any]:
    """The error of a merge that finds replicas unequal; the output is not there."""
    result = tpshard("merge", "set", "-o", "merged", "--no-fsync", "--json")
    assert result.code == 1 and not Path("merged").exists()
    assert result.json["error"]["code"] == "different"
    error: dict[str, Any] = result.json["error"]
    return error


def test_a_renamed_file_of_another_width() -> None:
    weights(3).rename(weights(3, 5))
    assert "not of this set" in all_refuse(3)["message"]


def test_rank_files_exchanged() -> None:
    exchange(weights(0), weights(2))
    error = all_refuse(3)
    assert (error["path"], error["expected"], error["found"]) == (str(weights(0)), "rank 0", "rank 2")
    exchange(record(0), record(2))
    assert all_refuse(3) == error


def test_records_exchanged() -> None:
    exchange(record(0), record(2))
    error = all_refuse(3)
    assert (error["path"], error["expected"], error["found"]) == (str(record(0)), "rank 0", "rank 2")


def test_parts_exchanged() -> None:
    shutil.rmtree("set")
    split(Path("model"), "set", 4, "--max-file-size", "2kB")
    first, second = sorted(Path("set").glob("rank-00001-of-00004-part-*.safetensors"))[:2]
    exchange(first, second)
    error = all_refuse(3)
    assert (error["expected"], error["found"]) == ("part 0", "part 1")


def test_a_tensor_in_two_parts() -> None:
    shutil.rmtree("set")
    split(Path("model"), "set", 4, "--max-file-size", "2kB")
    first, second = sorted(Path("set").glob("rank-00001-of-00004-part-*.safetensors"))[:2]
    again = next(iter(read(first)))
    rewrite(second, lambda tensors, said: tensors.update({again: read(first)[again]}))
    error = all_refuse(3)
    assert error["tensor"] == again and error["path"] == str(second)


# --- damaged ---


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw[:100], "longer than the file"),
        (lambda raw: b"", "too short"),
        (lambda raw: raw + b"\0", "after the last tensor"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\n" + b"x" * 80, "Git-LFS"),
        (lambda raw: raw.replace(b'"F32"', b'"F31"', 1), "dtype"),
    ],
)
def test_damaged_rank_file(damage: Callable[[bytes], bytes], says: str) -> None:
    weights(1).write_bytes(damage(weights(1).read_bytes()))
    error = all_refuse(3)
    assert says in error["message"] and error["path"] == str(weights(1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors, said: tensors.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda tensors, said: tensors.update({"x": tensors["model.norm.weight"]}), "holds x"),
        (lambda tensors, said: tensors.update({"model.norm.weight": Tensor("F16", (16,), b"\0" * 32)}), "not what"),
        (lambda tensors, said: tensors.update({"model.norm.weight": Tensor("F32", (4, 4), b"\0" * 64)}), "not what"),
        (lambda tensors, said: said.clear(), "not of this set"),
        (lambda tensors, said: said.pop("tpshard.rank"), "does not hold what its name says"),
        (lambda tensors, said: said.update({"tpshard.tp": "5"}), "does not hold what its name says"),
        (lambda tensors, said: said.update({"tpshard.set": "0" * 32}), "not of this set"),
    ],
)
def test_a_rank_file_that_the_manifest_does_not_describe(change: Callable[..., object], says: str) -> None:
    rewrite(weights(1), change)
    error = all_refuse(3)
    assert says in error["message"] and error["path"] == str(weights(1))


def test_a_flipped_bit() -> None:
    """Found by its checksum alone, and against the source by name, file and index."""
    flip(weights(2), "model.layers.1.mlp.up_proj.weight", (1, 7))
    result = tpshard("check", "set", "--json")
    assert result.code == 1 and result.json["equal"] is False
    [found] = result.json["differences"]
    assert found["file"] == weights(2).name and found["tensor"] is None and "sha256" in found["message"]
    assert weights(2).name in tpshard("check", "set").out
    result = tpshard("check", "set", "--source", "model", "--json")
    [found] = result.json["differences"]
    assert result.code == 1
    assert (found["file"], found["tensor"]) == (weights(2).name, "model.layers.1.mlp.up_proj.weight")
    assert "[1, 7]" in found["message"]
    text = tpshard("check", "set", "--source", "model")
    assert text.code == 1 and "model.layers.1.mlp.up_proj.weight" in text.out and "DIFFERENT" in text.out


def test_every_difference_is_named() -> None:
    wanted = set()
    for rank, tensor in ((0, "model.norm.weight"), (3, "lm_head.weight"), (3, "model.layers.0.mlp.down_proj.weight")):
        flip(weights(rank), tensor, (0,) if "norm" in tensor else (0, 1))
        wanted.add((weights(rank).name, tensor))
    found = tpshard("check", "set", "--source", "model", "--json").json["differences"]
    assert {(entry["file"], entry["tensor"]) for entry in found} == wanted


def test_padding_that_is_not_zero() -> None:
    assert read(weights(3))["lm_head.weight"].shape == (3, 16)  # 10 rows on 4 ranks: the last holds one and two zeros
    flip(weights(3), "lm_head.weight", (2, 5))
    result = tpshard("check", "set", "--source", "model", "--json")
    assert result.code == 1
    [found] = result.json["differences"]
    assert (found["file"], found["tensor"]) == (weights(3).name, "lm_head.weight") and "[2, 5]" in found["message"]


@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_replicas_that_differ(tensor: str) -> None:
    flip(weights(1), tensor, (3,) if "norm" in tensor else (3, 2))
    error = judged_by_merge()
    assert error["tensor"] == tensor and error["path"] == str(weights(1))
    result = tpshard("reshard", "set", "--tp", 2, "-o", "narrow", "--no-fsync")
    assert result.code == 1 and not Path("narrow").exists() and tensor in result.err


def test_a_source_of_another_kind() -> None:
    """Shards of one model against another one: judged when it can be, and every tensor that lacks is named."""
    wide = llama(Path("wide"), vocab_size=12)
    result = tpshard("check", "set", "--source", wide, "--json")
    assert result.code == 1
    assert {entry["tensor"] for entry in result.json["differences"]} >= {"lm_head.weight", "model.embed_tokens.weight"}
    deep = llama(Path("deep"), num_hidden_layers=3)
    result = tpshard("check", "set", "--source", deep, "--json")
    assert result.code == 1 and any("layers.2" in (entry["tensor"] or "") for entry in result.json["differences"])
    assert fails(2, "check", "set", "--source", "nothing/at/all")["path"] == "nothing/at/all"


def test_a_set_for_another_tp() -> None:
    error = fails(1, "check", "set", "--tp", 8)
    assert (error["expected"], error["found"]) == ("tp 8", "tp 4") and "reshard" in error["hint"]
    succeeds("check", "set", "--tp", 4)


# --- the manifest ---


def paths(value: Json, prefix: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """The place of every value in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*prefix, key)
        yield from paths(inner, (*prefix, key))


def places(document: Json) -> list[tuple[object, ...]]:
    """All of them, but of the many tensors two: one that is cut and padded, one that is replicated."""
    few = [p for p in paths(document) if p[0] != "tensors" or len(p) == 1]
    tensors = document["tensors"]
    chosen = [i for i, tensor in enumerate(tensors) if tensor["name"] in ("lm_head.weight", "model.norm.weight")]
    return few + [p for p in paths(document) if p[0] == "tensors" and len(p) > 1 and p[1] in chosen]


def changed(document: Json, place: tuple[object, ...], change: Callable[[Any, Any], object]) -> Json:
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    change(inner, place[-1])
    return copy


def others(value: Json) -> list[Json]:
    """Values of other types, and another one of the same type."""
    same: dict[type, Json] = {int: 7, str: "other", bool: not value if isinstance(value, bool) else None}
    return [other for other in (None, 1.5, "text", [], {}, same.get(type(value))) if other != value]


def mutants(document: Json, places: Iterable[tuple[object, ...]]) -> Iterator[tuple[tuple[object, ...], Json]]:
    """The document with one value less, and with one value changed, for every place."""
    for place in places:
        value = document
        for key in place:
            value = value[key]
        yield place, changed(document, place, lambda inner, key: inner.pop(key))
        for other in others(value):
            yield place, changed(document, place, lambda inner, key, other=other: inner.__setitem__(key, other))


def test_any_change_of_the_manifest_is_found() -> None:
    path = Path("set/tpshard.json")
    tried = 0
    document = json.loads(path.read_text())
    for place, mutant in one_in(5, [*mutants(document, places(document))]):
        if place[0] == "tool" or mutant.get("format_version") == 7:  # a remark; a version that is not ours to judge
            continue
        path.write_text(json.dumps(mutant))
        with pytest.raises(CorruptError) as caught:
            open_shards(Path("set"))
        assert caught.value.path == "set/tpshard.json" and caught.value.hint, place
        tried += 1
    assert tried > 200


def test_a_manifest_that_was_made_consistent_again_is_of_another_set() -> None:
    """Whoever computes the digest anew gets an error of ours too: the rank files say which set they are of."""
    path = Path("set/tpshard.json")
    document = json.loads(path.read_text())
    for place, mutant in one_in(5, [*mutants(document, places(document))]):
        if place[0] in ("format", "format_version", "set", "tool"):
            continue
        path.write_text(json.dumps(mutant))
        with pytest.raises(CorruptError) as caught:
            open_shards(Path("set"))
        if caught.value.expected is None:  # so damaged that it has no digest
            continue
        path.write_text(json.dumps(mutant | {"set": str(caught.value.expected).removeprefix("set ")}))
        with pytest.raises(CorruptError):
            open_shards(Path("set"))


@pytest.mark.parametrize("key", ["format", "format_version", "set", "mesh", "tensors", "options"])
def test_a_key_of_the_manifest_is_missing(key: str) -> None:
    path = Path("set/tpshard.json")
    document = json.loads(path.read_text())
    del document[key]
    path.write_text(json.dumps(document))
    assert all_refuse(3)["path"] == "set/tpshard.json"


def test_a_manifest_that_was_only_laid_out_anew_is_the_same() -> None:
    path = Path("set/tpshard.json")
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    assert "tpshard.json was changed" in fails(3, "check", "set")["message"], "SHA256SUMS is of bytes"
    Path("set/SHA256SUMS").unlink()
    succeeds("check", "set")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"format": "tpshard"}', "version https://git-lfs"])
def test_a_manifest_that_is_none(text: str) -> None:
    Path("set/tpshard.json").write_text(text)
    assert all_refuse(3)["path"] == "set/tpshard.json"


def test_a_manifest_of_a_later_version() -> None:
    path = Path("set/tpshard.json")
    document = json.loads(path.read_text()) | {"format_version": 2, "tool": "tpshard 9.0"}
    path.write_text(json.dumps(document))
    error = all_refuse(4)
    assert "tpshard 9.0" in error["message"] and error["found"] == "2" and "upgrade" in error["hint"]


# --- records ---


@pytest.mark.parametrize("sums", [True, False])
def test_any_damage_of_a_record_is_found(sums: bool) -> None:
    if not sums:
        Path("set/SHA256SUMS").unlink()
    path = record(1)
    document = json.loads(path.read_text())
    for place, damaged in mutants(document, list(paths(document))):
        path.write_text(json.dumps(damaged))
        result = tpshard("check", "set")
        digest = damaged["parts"][0].get("sha256", 0) if place[-1] == "sha256" else 0
        expected = 3 if sums else 0 if digest is None else 1 if isinstance(digest, str) else 3
        assert result.code == expected and "Traceback" not in result.err, (place, damaged, result.err)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "version https://git-lfs"])
def test_a_record_that_is_none(text: str) -> None:
    record(1).write_text(text)
    assert all_refuse(3)["path"] == str(record(1))


def test_a_record_of_another_size_or_other_files() -> None:
    Path("set/SHA256SUMS").unlink()
    document = json.loads(record(1).read_text())
    document["parts"][0]["size"] += 1
    record(1).write_text(json.dumps(document))
    error = fails(3, "check", "set")
    assert error["path"] == str(weights(1)) and "recorded size" in error["message"]
    document["parts"][0]["size"] -= 1
    document["parts"].append({"file": "rank-00001-of-00004-part-2.safetensors", "size": 1, "sha256": None})
    record(1).write_text(json.dumps(document))
    assert "not there" in fails(3, "check", "set")["message"]


def test_a_set_without_checksums_says_so() -> None:
    split(Path("model"), "plain", 4, "--checksum", "none")
    result = succeeds("check", "plain", "--json")
    assert [note.split()[0] for note in result.json["unchecked"]] == [weights(rank).name for rank in range(4)]
    assert "no recorded checksum" in result.err


# --- unsafe ---


@pytest.mark.parametrize("name", ["tpshard.json", "rank-00001-of-00004.json", weights(1).name, "config.json"])
def test_a_symlink_that_leaves_the_set(name: str) -> None:
    (Path("set") / name).rename("elsewhere")
    (Path("set") / name).symlink_to("../elsewhere")
    error = all_refuse(5)
    assert error["path"] == f"set/{name}" and error["found"] == str(Path("elsewhere").resolve())


def test_the_digest_of_the_manifest_is_documented_arithmetic() -> None:
    """`set` is half of the sha256 of the manifest's text without its first four entries."""
    lines = Path("set/tpshard.json").read_bytes().splitlines(keepends=True)
    body = b"".join([lines[0], *lines[5:]])
    assert hashlib.sha256(body).hexdigest()[:32] == json.loads(b"".join(lines))["set"]


def test_a_tensor_that_no_rank_stores() -> None:
    """Of a format whose own index follows from the manifest: it is damaged, whatever is made of it first."""
    from tpshard.formats.manifest import digest_of, dump

    split(Path("model"), "dcp", 2, "--format", "dcp")
    path = Path("dcp/tpshard.json")
    manifest = json.loads(path.read_text())
    manifest["stored"] = [each for each in manifest["stored"] if "down_proj" not in each["name"]]
    path.write_bytes(dump(manifest | {"set": digest_of(manifest)}))
    assert fails(3, "merge", "dcp")["message"] == "the manifest is damaged"
