"""The table of who judged what in docs/reference/formats.md: made of tests that are there and run what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers import format_table
from tests.helpers.format_table import CLAIMS, PAGE, Claim, uncovered, written
from tpshard.formats import FORMATS, format_of

READ_ONLY = {"megatron-legacy"}
"""What is read and has no `--format` of its own."""


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.format}-{claim.way}-{claim.name}")
def test_a_test_runs_what_is_claimed(claim: Claim) -> None:
    assert uncovered(claim) == []


def test_what_is_claimed_is_collected(request: pytest.FixtureRequest) -> None:
    """Of the files that pytest has collected whole, every test that a claim names is among what it runs."""
    config = request.config
    if config.option.keyword or config.option.markexpr or any("::" in each for each in config.args):
        return  # a part of the files was asked for
    collected = {(item.path, getattr(item, "originalname", item.name)) for item in request.session.items}
    files = {path for path, _ in collected}
    assert [claim.test for claim in CLAIMS if claim.file in files and (claim.file, claim.name) not in collected] == []


def test_the_page_is_of_these_claims() -> None:
    assert PAGE.read_text() == written(PAGE.read_text()), "python -m tests.helpers.format_table writes it anew"


def test_every_format_has_a_claim_for_what_it_declares() -> None:
    claimed = {claim.format for claim in CLAIMS}
    assert set(FORMATS) <= claimed <= set(FORMATS) | READ_ONLY
    for name in FORMATS:
        made, form = [each for each in CLAIMS if each.format == name and "written" in each.way], format_of(name)
        assert made, f"nobody judges what --format {name} writes"
        stages, experts = (
            any(max(each.pp, default=1) > 1 for each in made),
            any(each.ep or each.as_tp for each in made),
        )
        assert (stages, experts) == (form.has_stages, form.has_experts) or form.no_advice, name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"test": "api/test_pipelines.py::test_of_nothing"}, "is no test"),
        ({"test": "api/test_pipelines.py::bytes_of"}, "is no test"),
        ({"test": "api/test_nowhere.py::test_of_nothing"}, "is no test"),
        ({"test": "bench/bench.py::test_it"}, "is no test"),
        ({"tp": (2, 16)}, "does not run tp 16"),
        ({"pp": (4,)}, "does not run pp 4"),
        ({"ep": (2,)}, "does not run ep 2"),
        ({"as_tp": True}, "does not run ep as tp"),
        ({"format": "sglang"}, "does not say sglang"),
        ({"test": "formats/test_dcp.py::test_torch_reads_every_bit", "tp": (4,), "pp": ()}, "read nothing"),
        ({"test": "inputs/test_from_megatron.py::test_a_hybrid_model", "tp": (), "pp": ()}, "written nothing"),
    ],
)
def test_a_claim_that_no_test_covers_is_found(changes: dict[str, object], says: str) -> None:
    claim = next(claim for claim in CLAIMS if claim.name == "test_what_is_split_is_proved_and_merged")
    assert any(says in each for each in uncovered(replace(claim, **changes)))  # type: ignore[arg-type]


def test_a_file_that_nothing_runs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the engines whose file the Makefile does not name."""
    claim = next(claim for claim in CLAIMS if claim.test.startswith("engines/check_vllm.py"))
    monkeypatch.setattr(format_table, "_makefile", lambda: "tests/engines/check_vllm_quantised.py")
    assert uncovered(claim) == ["nothing runs check_vllm.py"]
