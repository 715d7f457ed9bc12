"""The table of power, on one model and a few random splits; `make power` does the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.power import calibration, engine, splits
from tests.power.catalogue import Case, cosine, measure, top_contained
from tests.power.table import conditions, counted, markdown, noise_lines
from tpshard.verifier.fault_catalogue import FAULTS


def test_faults_are_noticed_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.power.catalogue.WIDTHS", (4,))
    cases = measure(tmp_path, ["opt"])
    assert len({case.fault for case in cases}) >= 30
    assert all(case.exact is not FAULTS[case.fault].harmless for case in cases)
    by_name = {case.fault: case for case in cases}
    assert by_name["up-row-shifted"].named == "module" and by_name["up-row-shifted"].native
    assert by_name["up-bias-dropped"].cosine > 0.99
    part = {"variants": ["opt"], "missed_by_exact": [], "misnamed": [], "missed_by_native": [], **conditions(0)}
    faults = {name: counted([case for case in cases if case.fault == name]) for name in FAULTS}
    text = markdown({"catalogue": part | {"faults": faults}})
    assert (
        f"| up-row-shifted | 1 | 1 | 1 | 0 | 1 | {by_name['up-row-shifted'].excess:.3g} |" in text
        and "## Correct splits\n\nNot measured." in text
    )


def test_a_module_that_is_not_the_changed_one_is_misnamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.power.catalogue.changed", lambda clean, mutant: {"model.elsewhere": {0}})
    monkeypatch.setattr("tests.power.catalogue.WIDTHS", (2,))
    monkeypatch.setattr("tests.power.catalogue.FAULTS", {"up-row-shifted": FAULTS["up-row-shifted"]})
    assert [case.named for case in measure(tmp_path, ["opt"])] == ["no"]


def test_what_is_counted() -> None:
    case = Case("a", "opt", 2, 0.1, True, "module", "", 0.9, 0.995, True)
    other = Case("a", "opt", 4, 0.1, True, "block", "", 1.1, 0.5, False)
    counts = {"least": 0.9, "cases": 2, "exact": 2, "module": 1, "block": 1, "native": 1, "cosine": 1, "top": 1}
    assert counted([case, other]) == counts
    logits = torch.arange(10.0).view(1, 1, 10)
    assert top_contained(logits, logits) and not top_contained(logits, -logits)
    assert cosine(logits, logits) > 0.99 > cosine(logits, -logits)


def test_the_noise_of_correct_splits(tmp_path: Path) -> None:
    found = calibration.measure(tmp_path, 3)
    assert len(found) == 3 and not list(tmp_path.iterdir())
    assert all(0 < noise.ratio <= 1.5 and 0 < noise.kl_ratio <= 2 for noise in found)
    kept = calibration.summary([*found, replace(found[0], seed=99, hidden=5000, token_ratio=2.5)])
    assert kept["worst"][0]["seed"] == 99 and kept["criteria"]["all"]["token_ratio"]["largest"] == 2.5
    text = "\n".join(noise_lines(kept | conditions(0)))
    assert "| token_ratio | 3 |" in text and "seed 99" in text
    assert sum(kept["criteria"][hidden]["splits"] for hidden in calibration.WIDTHS) == 2 * 4


def test_random_splits_pass(tmp_path: Path) -> None:
    found = splits.measure(tmp_path, 4)
    assert len(found) == 4 and all(each.verdict != "fail" for each in found)
    assert not list(tmp_path.iterdir())


def test_the_engines_table_counts_what_it_finds(tmp_path: Path) -> None:
    with torch.no_grad():
        cases = engine.measure(tmp_path, ["phi3"], lambda line: None)
    faults = {case.fault for case in cases} - {""}
    assert len(faults) >= 15 and {case.noticed for case in cases if case.fault} == {True}
    assert [case.noticed for case in cases if not case.fault] == [False, False]
    missed = replace(cases[1], error=0.0)
    text = engine.markdown([*cases, missed], conditions(0))
    assert f"Noticed: {len(cases) - 2} of {len(cases) - 1}." in text and "refused: 0 of 2" in text
