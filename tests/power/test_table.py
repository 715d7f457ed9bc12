"""The table of power, on one model and a few random splits; `make power` does the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.power import engine, splits
from tests.power.catalogue import Case, cosine, measure, top_contained
from tests.power.table import conditions, counted, judged, markdown, split_lines
from tpshard.verifier.fault_catalogue import FAULTS


def test_faults_are_noticed_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.power.catalogue.WIDTHS", (2,))
    monkeypatch.setattr("tests.power.catalogue.OTHERS", ("meta",))
    cases, left_out = measure(tmp_path, ["opt"])
    assert left_out == ["opt in meta at tp 2: Meta's layout holds LLaMA models alone"]
    assert len({case.fault for case in cases}) >= 30
    for case in cases:
        assert {case.weights, case.exact, case.native, case.named} == {not FAULTS[case.fault].harmless}, case
    assert {case.fault: case for case in cases}["up-bias-dropped"].cosine > 0.99
    text = markdown({"catalogue": judged(cases, ["opt"], conditions(0))})
    assert "| up-row-shifted | 1 | 1 | 1 | 1 | 1 | 0 |" in text and "did not notice: none" in text
    assert "| padding-not-zero (changes nothing) | 1 | 0 | 0 | 0 | 0 | 1 |" in text
    assert "## Correct splits\n\nNot measured." in text


def test_a_tensor_that_is_not_the_changed_one_is_misnamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.power.catalogue.changed", lambda clean, mutant: {("model.elsewhere.weight", 0)})
    monkeypatch.setattr("tests.power.catalogue.WIDTHS", (2,))
    kept = {name: FAULTS[name] for name in ("up-row-shifted", "rank-files-exchanged")}
    monkeypatch.setattr("tests.power.catalogue.FAULTS", kept)
    monkeypatch.setattr("tests.power.catalogue.OTHERS", ("vllm",))
    cases, _ = measure(tmp_path, ["opt"])
    assert [(case.format, case.weights, case.named) for case in cases] == [
        (name, True, False) for name in ("native", "native", "vllm", "vllm")
    ]
    text = markdown({"catalogue": judged(cases, ["opt"], conditions(0))})
    assert "other name than what was changed: 4." in text and "- up-row-shifted, 2 times: “" in text


def test_what_is_counted() -> None:
    case = Case("out-bias-dropped", "opt", "native", 2, True, True, True, True, 0.1, "", 0.995, True)
    other = replace(case, tp=4, native=False, named=False, cosine=0.5, top=False)
    counts = {"cases": 2, "weights": 2, "exact": 2, "native": 1, "named": 1, "cosine": 1, "top": 1}
    assert counted([case, other]) == counts
    kept = judged([case, other], ["opt"], {})
    assert {tier: len(cases) for tier, cases in kept["missed"].items()} == {"weights": 0, "exact": 0, "native": 1}
    logits = torch.arange(10.0).view(1, 1, 10)
    assert top_contained(logits, logits) and not top_contained(logits, -logits)
    assert cosine(logits, logits) > 0.99 > cosine(logits, -logits)


def test_random_splits_pass(tmp_path: Path) -> None:
    found = splits.measure(tmp_path, 4)
    outlying = [each for each in found if each.outliers > 1]
    assert [each.right for each in found] == [True] * 4 and len(outlying) == 1
    assert not list(tmp_path.iterdir())
    refused = replace(found[0], verdict="fail", reason="rank 1 differs")
    reason = "the unsharded model itself gives values that are not finite in float16"
    overflow = replace(outlying[0], verdict="inconclusive", reason=reason)
    assert not refused.right and overflow.right and not replace(overflow, reason="faults were not noticed").right
    text = "\n".join(split_lines([*found, refused, overflow]))
    assert "| fail | 1 | 0 |" in text and "| inconclusive | 1 | 1 |" in text and "rank 1 differs" in text


def test_outliers_are_in_three_rows_and_columns(tmp_path: Path) -> None:
    values = {"matrix": torch.ones(8, 9, dtype=torch.float16), "vector": torch.ones(8, dtype=torch.float16)}
    save_file(values, tmp_path / "model.safetensors")
    splits.with_outliers(tmp_path, 100, 0)
    found = load_file(tmp_path / "model.safetensors")
    assert sorted((found["matrix"] == 100).sum(0).tolist()) == [3] * 6 + [8] * 3
    assert (found["matrix"] == 1).sum() == 30 and (found["vector"] == 1).all()


def test_the_engines_table_counts_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.transformers_runs.WIDTHS", (2,))
    cases, drawn = engine.measure(tmp_path, ["phi3"])
    faults = {case.fault for case in cases} - {""}
    assert len(faults) >= 15 and {case.exact for case in cases if case.fault} == {True}
    assert {case.fault: case.native for case in cases}["down-column-shifted"]
    assert [case.noticed for case in cases if not case.fault] == [False]
    assert [each.right for each in drawn] == [True] and drawn[0].outliers in splits.OUTLIERS
    missed = replace(cases[1], weights=False, error=0.0, native=False)
    text = engine.markdown([*cases, missed], drawn, conditions(0))
    assert f"Noticed: {len(cases) - 1} of {len(cases)}." in text and "refused: 0 of 1" in text
