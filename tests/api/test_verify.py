"""From a split's directory to a verdict: the source found, bytes compared, one process or several."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tpshard as package
from tests.helpers.toys import write_checkpoint
from tpshard.api import convert as api
from tpshard.api import verify as verifying
from tpshard.api.verify import find_source, verify
from tpshard.errors import CorruptError, LocalIOError, UnsupportedError, UsageError
from tpshard.execute.publish import Settings
from tpshard.storage import hub
from tpshard.storage.hub_errors import UnreachableError
from tpshard.verifier import launch as processes
from tpshard.verifier.launch import first_host, surroundings
from tpshard.verifier.options import VerifyOptions
from tpshard.verifier.ranks.names import width


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small LLaMA and its split for two ranks, beside each other."""
    from tests.helpers.checkpoints import make

    folder = tmp_path_factory.mktemp("pair")
    model = make("llama-bf16", folder / "model")
    shards = folder / "model-tp2"
    api.split(model, 2, shards, settings=Settings(fsync=False, workers=1))
    return model, shards


@pytest.fixture
def copy(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the shards that may be damaged, away from the model."""
    return Path(shutil.copytree(pair[1], tmp_path / "shards"))


def rank_file(shards: Path, rank: int) -> Path:
    return shards / f"rank-{rank:05}-of-00002.safetensors"


def rewrite(shards: Path, rank: int, name: str, change: object) -> None:
    """Replace one tensor of a rank, and keep what the file says of itself."""
    from safetensors import safe_open

    path = rank_file(shards, rank)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    tensors = load_file(path)
    tensors[name] = change(tensors[name])  # type: ignore[operator]
    save_file(tensors, path, said)


def exchange(shards: Path) -> None:
    one, two = rank_file(shards, 0), rank_file(shards, 1)
    one.rename(shards / "x")
    two.rename(one)
    (shards / "x").rename(two)


def test_all_tiers_with_the_source_beside_the_shards(pair: tuple[Path, Path]) -> None:
    lines: list[str] = []
    verdict = verify(pair[1], say=lines.append, device="cpu", tokens=4)
    assert [(tier.name, tier.status) for tier in verdict.tiers] == [
        (name, "pass") for name in ("bytes", "weights", "exact", "native")
    ]
    assert (verdict.exit_code, verdict.source, verdict.shards, verdict.tp) == (0, "model", "model-tp2", 2)
    assert lines[0] == f"source: {pair[0]}"
    estimate = next(i for i, line in enumerate(lines) if "GB of memory" in line and "estimate" in line)
    assert estimate < lines.index("bytes tier")


def test_the_verb_of_the_library_is_a_function(pair: tuple[Path, Path]) -> None:
    assert package.verify(pair[1], tiers=("bytes",)).verdict == "pass"
    assert inspect.isfunction(package.verify) and "verify" in package.__all__
    assert {"shards", "source", "tiers", "device", "say"} <= set(inspect.signature(package.verify).parameters)


def test_the_source_in_the_current_directory(
    pair: tuple[Path, Path], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    with pytest.raises(UsageError, match="the model that was split was not found: model") as caught:
        find_source(VerifyOptions(copy), print)
    assert "--source" in (caught.value.hint or "")
    monkeypatch.chdir(pair[0].parent)
    assert find_source(VerifyOptions(copy), print) == pair[0].parent / "model"


def test_the_source_by_repo_and_revision(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, revision: str | None, *, allow_pickle: bool) -> hub.Snapshot:
        asked.append((repo, revision))
        if len(asked) > 1:
            raise UnreachableError("no network")
        return hub.Snapshot(tmp_path, repo, "abc", note="from the cache")

    monkeypatch.setattr(hub, "download", download)
    manifest = json.loads((copy / "tpshard.json").read_text())
    manifest["source"] |= {"name": "org/name", "repo_id": "org/name", "revision": "abc"}
    (copy / "tpshard.json").write_text(json.dumps(manifest))
    lines: list[str] = []
    assert find_source(VerifyOptions(copy), lines.append) == tmp_path and lines == ["from the cache"]
    assert asked == [("org/name", "abc")]
    with pytest.raises(UsageError, match="not found: org/name") as caught:
        find_source(VerifyOptions(copy), print)
    assert str(caught.value.found).endswith("on the Hub: no network")
    write_checkpoint(tmp_path / "name", {"model_type": "llama"}, {}, [[]])
    assert find_source(VerifyOptions(copy), print) == tmp_path / "name"


@pytest.mark.parametrize("given", ["nowhere/at/all", "./nowhere"])
def test_a_source_that_is_not_there(copy: Path, given: str) -> None:
    with pytest.raises(UsageError, match="no such file or directory"):
        verify(copy, given)


def test_a_revision_of_a_local_source_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="--revision is for a Hub repo"):
        verify(pair[1], pair[0], revision="main")


def test_exchanged_ranks_are_named_by_all_tiers_together_and_refused_by_bytes_alone(
    pair: tuple[Path, Path], copy: Path
) -> None:
    exchange(copy)
    verdict = verify(copy, pair[0], device="cpu", tiers=("bytes", "weights", "exact"))
    assert (verdict.exit_code, verdict.reason) == (1, "the files of ranks 0 and 1 are exchanged")
    assert [tier.status for tier in verdict.tiers] == ["fail", "fail", "fail"]
    assert verify(copy, pair[0], device="cpu", tiers=("exact",)).exit_code == 1
    with pytest.raises(CorruptError, match="does not hold what its name says"):
        verify(copy, pair[0], tiers=("bytes",))


def test_a_changed_tensor_is_named_by_module_and_rank(pair: tuple[Path, Path], copy: Path) -> None:
    rewrite(copy, 1, "model.layers.1.mlp.up_proj.weight", lambda weight: weight.roll(1, 0).contiguous())
    verdict = verify(copy, pair[0], device="cpu", tokens=2)
    assert verdict.exit_code == 1 and [tier.status for tier in verdict.tiers] == ["fail"] * 4
    assert verdict.reason is not None and "model.layers.1.mlp.up_proj.weight[0, 0] of rank 1" in verdict.reason
    assert "model.layers.1.mlp.up_proj of rank 1" in (verdict.tiers[2].reason or "")
    assert "rank-00001" in (verdict.tiers[0].reason or "") and "up_proj" in (verdict.tiers[0].reason or "")
    only = verify(copy, pair[0], tiers=("bytes",))
    assert (only.exit_code, only.model_type, only.tp) == (1, "llama", 2)


def test_a_size_off_the_record_is_a_warning_and_a_file_that_cannot_be_parsed_an_error(
    pair: tuple[Path, Path], copy: Path
) -> None:
    record = copy / "rank-00001-of-00002.json"
    data = json.loads(record.read_text())
    data["parts"][0]["size"] = 5
    record.write_text(json.dumps(data))
    verdict = verify(copy, pair[0], tiers=("exact",), device="cpu")
    assert verdict.exit_code == 0 and "its record says 5" in verdict.warnings[0]
    rank_file(copy, 1).write_bytes(b"not safetensors, not even close")
    with pytest.raises(CorruptError):
        verify(copy, pair[0], tiers=("exact",), device="cpu")


def test_a_tier_that_cannot_run_is_left_out_unless_it_was_asked_for(
    pair: tuple[Path, Path], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "tpshard.json").unlink()
    verdict = verify(copy, pair[0], device="cpu", tokens=0)
    assert (verdict.exit_code, verdict.tiers[0].status) == (0, "skipped")
    with pytest.raises(CorruptError, match="tpshard.json is missing"):
        verify(copy, pair[0], device="cpu", tiers=("bytes", "exact"))
    monkeypatch.setattr(verifying, "find_spec", lambda name: None)
    verdict = verify(pair[1], pair[0])
    assert [(t.name, t.status) for t in verdict.tiers] == [
        ("bytes", "pass"),
        ("weights", "inconclusive"),
        ("exact", "inconclusive"),
        ("native", "inconclusive"),
    ]
    assert verdict.exit_code == 8, "nothing has run"
    assert verify(pair[1], pair[0], tiers=("bytes",)).exit_code == 0
    with pytest.raises(UnsupportedError, match="needs torch"):
        verify(pair[1], pair[0], tiers=("exact",))


def test_a_family_that_nothing_runs_is_inconclusive(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Rules of one's own may be wrong, and bytes alone follow the rules."""
    model = shutil.copytree(pair[0], tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"model_type": "novel"}
    (model / "config.json").write_text(json.dumps(config))
    rules = (Path(package.__file__).parent / "rules/architectures/llama.toml").read_text()
    (tmp_path / "novel.toml").write_text(re.sub(r"^model_types = .*$", 'model_types = ["novel"]', rules, flags=re.M))
    quick = Settings(fsync=False, workers=1)
    api.split(model, 2, tmp_path / "out", rules=tmp_path / "novel.toml", settings=quick)
    verdict = verify(tmp_path / "out", model, device="cpu", rules=tmp_path / "novel.toml")
    assert [tier.status for tier in verdict.tiers] == ["pass", "inconclusive", "inconclusive", "inconclusive"]
    assert verdict.exit_code == 8 and "novel" in str(verdict.reason)
    assert verify(tmp_path / "out", model, tiers=("bytes",), rules=tmp_path / "novel.toml").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiers": ("bits",)}, "unknown tier 'bits'"),
        ({"tiers": ()}, "no tier to run"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"reference": "vllm"}, "unknown reference 'vllm'"),
        ({"tokens": -1}, "no negative number"),
        ({"nproc": 3}, "one process for all ranks, or one for each"),
        ({"layers": (9,)}, "there is no layer 9"),
        ({"prompt": "a text"}, "the model's tokenizer cannot be used"),
    ],
)
def test_options_that_cannot_be_meant(pair: tuple[Path, Path], options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        verify(pair[1], pair[0], **options)


@pytest.mark.parametrize("library", ["transformers", "tokenizers"])
def test_a_prompt_through_the_models_tokenizer(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = Path(shutil.copytree(pair[0], tmp_path / "model"))
    words = Tokenizer(models.WordLevel({"two": 7, "words": 9, "?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    monkeypatch.setattr(verifying, "find_spec", lambda name: name == library)
    assert verifying.prompt_tokens("two words", model).tolist() == [[7, 9]]
    with pytest.raises(UsageError, match="no tokens"):
        verifying.prompt_tokens("", model)
    monkeypatch.setattr(verifying, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="--prompt needs a tokenizer"):
        verifying.prompt_tokens("two words", model)


def test_two_processes_started_here_agree_with_one(pair: tuple[Path, Path]) -> None:
    lines: list[str] = []
    several = verify(pair[1], pair[0], nproc=2, device="cpu", tokens=2, say=lines.append)
    assert several.verdict == "pass" and several.settings["processes"] == 2
    assert several.settings["tokens_from"] == "the reference"
    assert [tier.name for tier in several.tiers] == ["bytes", "weights", "exact", "native"]
    assert any(line.startswith("keeping the shards: about") for line in lines)
    assert sum(line.startswith("exact tier") for line in lines) == 1
    one = verify(pair[1], pair[0], device="cpu", tiers=("exact",))
    found = {(f.module, f.rank) for f in several.tiers[2].findings}
    assert found == {(f.module, f.rank) for f in one.tiers[0].findings}


def test_several_processes_name_what_differs_and_end_with_one_ranks_error(
    pair: tuple[Path, Path], copy: Path, warm_processes: None
) -> None:
    exchange(copy)
    verdict = verify(copy, pair[0], nproc=2, device="cpu", tiers=("weights", "exact"))
    assert (verdict.exit_code, verdict.reason) == (1, "the files of ranks 0 and 1 are exchanged")
    exchange(copy)
    rewrite(copy, 1, "model.norm.weight", lambda weight: weight * float("nan"))
    with pytest.raises(CorruptError, match="NaN") as caught:
        verify(copy, pair[0], nproc=2, device="cpu", tiers=("exact",))
    assert caught.value.tensor == "model.norm.weight" and "rank-00001" in (caught.value.path or "")


def test_a_rank_that_lacks_a_tensor_fails_in_every_process(
    pair: tuple[Path, Path], copy: Path, warm_processes: None
) -> None:
    tensors = load_file(rank_file(copy, 1))
    del tensors["model.layers.1.input_layernorm.weight"]
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, rank_file(copy, 1))
    verdict = verify(copy, pair[0], nproc=2, device="cpu", tiers=("exact", "native"), tokens=1)
    assert verdict.exit_code == 1 and [tier.status for tier in verdict.tiers] == ["fail", "fail"]
    assert "rank 1 has no tensor model.layers.1.mlp.down_proj.weight" in (verdict.reason or "")


def test_a_killed_process_is_told_of(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    original = processes._process

    def dying(module: str, folder: str, rank: int, count: int, environment: object, errors: object) -> object:
        worker = original(module, folder, rank, count, environment, errors)  # type: ignore[arg-type]
        if rank == 1:
            worker.kill()
        return worker

    monkeypatch.setattr(processes, "_process", dying)
    with pytest.raises(LocalIOError, match="rank 1 was killed by signal 9"):
        verify(pair[1], pair[0], nproc=2, device="cpu")


def test_the_group_that_is_there() -> None:
    assert surroundings({}) is None
    assert surroundings({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"}) is None
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "x", "LOCAL_RANK": "1"}
    found = surroundings(torchrun)
    assert found is not None
    assert (found.rank, found.size, found.local_rank, found.url) == (5, 8, 1, "env://")
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3"}
    found = surroundings(slurm | {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "gpu[03-04],other"})
    assert found is not None and found.local_rank == 3
    assert found.url == "tcp://gpu03:20077?rank=3&world_size=8"
    assert surroundings(slurm | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    for wrong in ({"RANK": "two"}, {"RANK": "8"}):
        with pytest.raises(UsageError, match="not as it should be"):
            surroundings(torchrun | wrong)
    assert [first_host(nodes) for nodes in ("a", "a,b", "n[1,3]", "n[01-04]-ib", "")] == [
        "a", "a", "n1", "n01", "127.0.0.1",
    ]  # fmt: skip


def test_nccl_needs_a_gpu_for_each_rank() -> None:
    one, two, none = "gpu host 1", "gpu host 2", processes._device(None)
    assert processes.nccl_or_gloo([one, two]) == "nccl"
    assert {processes.nccl_or_gloo(devices) for devices in ([one, one], [one, none], [none, none])} == {"gloo"}


def test_width_is_read_from_the_names(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert width(pair[1]) == 2 and width(tmp_path) == 1
    (tmp_path / "rank-00000-of-00007-part-00000-of-00002.safetensors").touch()
    assert width(tmp_path) == 7
