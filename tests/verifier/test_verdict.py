"""From files to a verdict, and to its reports."""

from __future__ import annotations

import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tpshard
from tests.helpers.checkpoints import make, published
from tests.helpers.cut import cut
from tests.helpers.small_models import tokens
from tpshard.errors import CorruptError, LocalIOError, UsageError
from tpshard.verifier.builtin import prepare as builtin
from tpshard.verifier.builtin.memory import Load, Need, estimate
from tpshard.verifier.families.configs import describe
from tpshard.verifier.options import VerifyOptions
from tpshard.verifier.prompt import prompt_ids
from tpshard.verifier.ranks.open import FileWeights, open_shards, open_source
from tpshard.verifier.report.page import to_html
from tpshard.verifier.report.verdict import Canary, Finding, Tier, Verdict
from tpshard.verifier.report.write import check_kind, to_junit, to_markdown, write
from tpshard.verifier.run import verify as run


def verify(shards: Path, source: Path, prompt: torch.Tensor | None = None, **options: Any) -> Verdict:
    """The verdict of the tiers that run the model."""
    return run(VerifyOptions(shards, **options), source, prompt=prompt)


def write_shards(model: Path, out: Path, tp: int) -> Path:
    """A shard set as the native format names its files, cut by hand."""
    out.mkdir()
    config = json.loads((model / "config.json").read_text())
    shutil.copy(model / "config.json", out)
    for rank, tensors in enumerate(cut(load_file(model / "model.safetensors"), config, tp)):
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(kept, out / f"rank-{rank:05}-of-{tp:05}.safetensors", {"tpshard.rank": str(rank)})
    return out


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("verify")
    model = make("llama-bf16", folder / "model")
    return model, write_shards(model, folder / "model-tp4", 4)


@pytest.fixture
def copy(pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return pair[0], Path(shutil.copytree(pair[1], tmp_path / "shards"))


def edit(shards: Path, rank: int, name: str, value: float, tp: int = 4) -> None:
    file = shards / f"rank-{rank:05}-of-{tp:05}.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[5] = value
    save_file(tensors, file)


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"sequence_parallel": True}, {"float32": True}])
def test_a_correct_split_passes(pair: tuple[Path, Path], options: dict[str, bool]) -> None:
    model, shards = pair
    verdict = verify(shards, model, tokens=4, device="cpu", **options)
    assert (verdict.verdict, verdict.exit_code, verdict.warnings) == ("pass", 0, ())
    assert [tier.name for tier in verdict.tiers] == ["weights", "exact", "native"]
    assert verdict.canaries and all(canary.status == "caught" for canary in verdict.canaries)


def test_the_reference_chooses_the_tokens_unless_it_would_be_read_too_often(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def metrics(stream: bool) -> tuple[str, float]:
        verdict = verify(pair[1], pair[0], tiers=("native",), tokens=6, device="cpu", stream=stream)
        assert verdict.verdict == "pass"
        return verdict.settings["tokens_from"], verdict.tiers[0].metrics["kl_unsharded"]

    kept, streamed = metrics(False), metrics(True)
    assert kept[0] == streamed[0] == "the reference"
    monkeypatch.setattr("tpshard.verifier.builtin.prepare.TAUGHT_BYTES", 0)
    seeded = metrics(True)
    assert seeded[0] == "the seed" and metrics(False)[0] == "the reference"
    assert abs(streamed[1] - kept[1]) < 1e-3 * kept[1] < abs(seeded[1] - kept[1])


def test_a_verdict_repeats_but_for_what_is_volatile(pair: tuple[Path, Path]) -> None:
    first, second = (verify(pair[1], pair[0], tokens=2, device="cpu").to_json() for _ in range(2))
    first.pop("volatile")
    second.pop("volatile")
    assert json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


def test_transformers_as_the_reference(pair: tuple[Path, Path]) -> None:
    verdict = verify(pair[1], pair[0], tiers=("exact",), reference="transformers", device="cpu")
    assert [tier.status for tier in verdict.tiers] == ["pass", "pass"]
    assert verdict.tiers[1].metrics["relative_error"] <= 1e-6


def test_exchanged_files_are_named_and_warned_of(copy: tuple[Path, Path]) -> None:
    model, shards = copy
    one, two = (shards / f"rank-{rank:05}-of-00004.safetensors" for rank in (1, 2))
    one.rename(shards / "x")
    two.rename(one)
    (shards / "x").rename(two)
    verdict = verify(shards, model, tiers=("weights", "exact"), device="cpu")
    assert (verdict.exit_code, verdict.reason) == (1, "the files of ranks 1 and 2 are exchanged")
    assert [tier.status for tier in verdict.tiers] == ["fail", "fail"]
    assert verdict.warnings[0] == f"{one.name} says that it is of rank 2"


def test_a_changed_element_fails(copy: tuple[Path, Path]) -> None:
    model, shards = copy
    edit(shards, 2, "model.layers.1.mlp.gate_proj.weight", 0.5)
    verdict = verify(shards, model, tiers=("exact",), device="cpu")
    assert verdict.exit_code == 1
    assert verdict.reason is not None and "model.layers.1.mlp.gate_proj.weight" not in verdict.reason
    assert "model.layers.1.mlp.gate_proj of rank 2" in verdict.reason


def test_a_dropped_tensor_fails_and_is_named(copy: tuple[Path, Path]) -> None:
    model, shards = copy
    file = shards / "rank-00003-of-00004.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, file)
    verdict = verify(shards, model, tiers=("exact",), device="cpu")
    assert verdict.exit_code == 1
    assert verdict.reason is not None and "rank 3 has no tensor model.layers.0.mlp.down_proj.weight" in verdict.reason


def test_a_tier_that_misses_a_canary_is_inconclusive(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpshard.verifier.canaries.EXACT_LIMIT", 1e9)
    verdict = verify(pair[1], pair[0], tiers=("exact",), device="cpu")
    assert (verdict.verdict, verdict.exit_code) == ("inconclusive", 8)
    assert verdict.reason is not None and "rank-files-exchanged" in verdict.reason
    assert "<failure" in to_junit(verdict)


def test_no_fault_to_inject_is_inconclusive(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpshard.verifier.fault_catalogue.CANARIES", ())
    assert verify(pair[1], pair[0], tiers=("exact",), device="cpu").exit_code == 8


def test_nan_is_named(copy: tuple[Path, Path]) -> None:
    model, shards = copy
    edit(shards, 1, "model.layers.2.self_attn.q_proj.weight", float("nan"))
    with pytest.raises(CorruptError, match="NaN or infinite") as caught:
        verify(shards, model, device="cpu")
    assert caught.value.tensor == "model.layers.2.self_attn.q_proj.weight"
    assert "rank-00001" in (caught.value.path or "")


def test_bad_input(pair: tuple[Path, Path], copy: tuple[Path, Path], tmp_path: Path) -> None:
    model, shards = copy
    other = make("gpt2", tmp_path / "gpt2")
    with pytest.raises(UsageError, match="another model"):
        verify(shards, other)
    with pytest.raises(UsageError, match="no such"):
        verify(tmp_path / "nowhere", model)
    with pytest.raises(UsageError, match="unknown tier"):
        verify(shards, model, tiers=("fast",))
    with pytest.raises(UsageError, match="unknown device"):
        verify(shards, model, device="tpu")
    with pytest.raises(UsageError, match="no layer 3"):
        verify(shards, model, layers=(3,))
    with pytest.raises(CorruptError, match="no rank files"):
        verify(model, model)
    (shards / "rank-00002-of-00004.safetensors").unlink()
    with pytest.raises(CorruptError, match="missing") as caught:
        verify(shards, model)
    assert caught.value.found == "all but 2"


def test_too_little_memory_is_said_before_loading(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpshard.verifier.memory.available", lambda device: 1000)
    monkeypatch.setattr(builtin, "resident", None)
    with pytest.raises(LocalIOError, match="not enough memory"):
        verify(pair[1], pair[0], device="cpu")


def test_a_70b_shape_is_streamed_in_4_gb() -> None:
    config = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "hidden_act": "silu"}
    table, body = 128256 * 8192, 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192)
    total, layer = body + 2 * table, 2 * body // 80
    need = estimate(
        describe(config | {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192}),
        Load(2 * total, total, 2 * total, total, layer, table),
        here=8, native=True, positions=2 * (16 + 32), widened=True, apart=False,
    )  # fmt: skip
    assert layer < need.streamed <= 4e9 and need.resident > 8 * body


def test_memory_decides_whether_to_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpshard.verifier.memory.available", lambda device: 1000)
    cpu = torch.device("cpu")
    assert Need(resident=600, streamed=100).choose(None, cpu) is False
    assert Need(resident=800, streamed=100).choose(None, cpu) is True
    assert Need(resident=600, streamed=100).choose(True, cpu) is True
    with pytest.raises(LocalIOError, match="not enough memory") as caught:
        Need(resident=800, streamed=100).choose(False, cpu)
    assert "--stream" in (caught.value.hint or "")


def test_tokens_are_cut_to_the_models_positions(tmp_path: Path) -> None:
    model = make("gpt2", tmp_path / "gpt2")
    shards = write_shards(model, tmp_path / "shards", 2)
    verdict = verify(shards, model, tiers=("native",), tokens=8, prompt=tokens(60), device="cpu")
    assert verdict.verdict == "pass" and verdict.settings["tokens"] == 4
    assert "no more positions" in verdict.warnings[0]
    with pytest.raises(UsageError, match="longer than the model's positions"):
        verify(shards, model, prompt=tokens(65), device="cpu")


def test_a_cast_on_record_is_applied_to_the_source(tmp_path: Path) -> None:
    """As `split --dtype` records it; without the record, a cast is a difference."""
    model, shards = make("llama-gqa", tmp_path / "model"), tmp_path / "shards"
    tpshard.split(model, 2, shards, dtype="bfloat16")
    assert verify(shards, model, tiers=("exact",), device="cpu").exit_code == 0
    manifest = json.loads((shards / "tpshard.json").read_text())
    (shards / "tpshard.json").write_text(json.dumps(manifest | {"options": {"dtype": "float3"}}))
    with pytest.raises(CorruptError, match="not a dtype"):
        verify(shards, model, tiers=("exact",), device="cpu")
    (shards / "tpshard.json").unlink()
    assert verify(shards, model, tiers=("exact",), device="cpu").exit_code == 1
    (shards / "tpshard.json").write_text(json.dumps({"mesh": {"tp": 4}}))
    with pytest.raises(CorruptError, match="disagree"):
        open_shards(shards)


def test_a_tied_head_may_be_stored_on_one_side_alone(tmp_path: Path) -> None:
    bare = make("llama-tied", tmp_path / "bare")
    stored = published(bare, tmp_path / "stored", tied_head_stored=True)
    for model, other in ((bare, stored), (stored, bare)):
        shards = write_shards(model, tmp_path / f"{model.name}-tp2", 2)
        verdict = verify(shards, other, tokens=2, device="cpu")
        assert verdict.verdict == "pass" and verdict.tiers[1].findings[-1].module == "lm_head"


def test_file_weights_read_what_is_stored(pair: tuple[Path, Path]) -> None:
    model, shards = pair
    _, weights = open_source(model)
    stored = load_file(model / "model.safetensors")
    assert set(weights.names()) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(weights.get(name), tensor) and weights.shape(name) == tuple(tensor.shape)
        assert torch.equal(weights.rows(name, 3, 7), tensor[3:7])
    _, cast = open_source(model, cast={"lm_head.weight": torch.float16})
    assert cast.get("lm_head.weight").dtype == torch.float16
    assert cast.get("model.norm.weight").dtype == stored["model.norm.weight"].dtype
    twice = [*weights.infos.values(), weights.infos["lm_head.weight"]]
    with pytest.raises(CorruptError, match="in two files"):
        FileWeights(twice)


def test_prompts_spread_over_the_vocabulary() -> None:
    ids = prompt_ids(1000, seed=3, batch=2, length=10)
    assert sorted(int(i) // 50 for i in ids.flatten()) == list(range(20))
    assert torch.equal(ids, prompt_ids(1000, 3, 2, 10)) and not torch.equal(ids, prompt_ids(1000, 4, 2, 10))


def test_infinite_and_vanishing_errors_are_drawn_and_other_tiers_reasons_told() -> None:
    findings = tuple(
        Finding(f"model.layers.{i}.mlp", 0, error) for i, error in enumerate((0.0, 1e-16, math.inf, math.nan))
    )
    tiers = (
        Tier("bytes", "fail", reason="one byte differs"),
        Tier("exact", "fail", {"relative_error": 1e-12}, {"relative_error": math.inf}, findings=findings, reason="x"),
    )
    verdict = Verdict("llama", 1, "a", "b", tiers, (Canary("c", "native", "missed", 0.5),))
    page = to_html(verdict)
    heights = [float(found) for found in re.findall(r'cy="([0-9.]+)" r="3"', page)]
    assert heights[0] > heights[1] > heights[2] == heights[3] == min(heights) > 0
    assert "bytes: one byte differs" in page and "- bytes: one byte differs" in to_markdown(verdict)
    assert "0 of 1 faults injected on purpose were noticed" in page


def test_reports(copy: tuple[Path, Path], tmp_path: Path) -> None:
    model, shards = copy
    edit(shards, 0, "model.layers.0.mlp.up_proj.weight", 1.0)
    verdict = verify(shards, model, tokens=2, device="cpu")
    for ending in (".json", ".xml", ".md", ".html"):
        write(verdict, tmp_path / f"report{ending}")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == "fail" and list(report) == sorted(report)
    first = [tier["first"]["module"] for tier in report["tiers"]]
    assert first == [f"model.layers.0.mlp.up_proj{end}" for end in (".weight", "", ".weight")]
    suite = ElementTree.parse(tmp_path / "report.xml").getroot()[0]
    assert suite.get("failures") == str(len(suite.findall(".//failure"))) != "0"
    assert "model.layers.0.mlp.up_proj.weight[0, 5] of rank 0 is 1 where" in (suite.findtext(".//failure") or "")
    assert "| exact | fail |" in to_markdown(verdict)
    page = to_html(verdict)
    drawn = sum(len(tier.findings) for tier in verdict.tiers)
    # A dot each, and a key of four ranks for each tier that has any.
    assert page.count("<circle") == drawn + 4 * sum(bool(tier.findings) for tier in verdict.tiers)
    assert page.count('class="limit"') == 1
    assert "http" not in page and "<script" not in page and "@import" not in page
    assert "tokens from</td><td>the reference</td>" in page
    with pytest.raises(UsageError, match="unknown kind of report"):
        check_kind(Path("report.pdf"))
    with pytest.raises(LocalIOError, match="cannot write"):
        write(verdict, tmp_path / "no" / "report.md")
