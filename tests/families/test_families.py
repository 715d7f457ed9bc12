"""Each published form, by the real commands: split, check, merge, verify, and whether vLLM's format takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.families.published_families import DRAFTS, FAMILIES, Family
from tests.helpers.command import succeeds, tpshard
from tests.helpers.grids import some
from tests.helpers.toys import read_all
from tpshard.api.archs import nesting, supported

BY_DEFAULT = ("DeepSeek V4", "Kimi K2.5", "Step 3.7", "Baichuan, 13B")
NAMES = [family.name for family in FAMILIES]


@pytest.mark.parametrize("name", some(NAMES, BY_DEFAULT))
def test_every_cell_of_the_table(name: str, tmp_path: Path) -> None:
    (family,) = (each for each in FAMILIES if each.name == name)
    model, out = family.make(tmp_path / "model"), tmp_path / "out"
    config = model / "config.json"
    said = json.loads(config.read_text()).get("model_type") if config.exists() else None
    assert said == family.model_type
    succeeds("split", model, "--tp", 2, "-o", out, "--no-fsync")
    succeeds("check", out, "--source", model)
    succeeds("merge", out, "-o", tmp_path / "merged", "--no-fsync")
    assert read_all(tmp_path / "merged") == read_all(model)
    require_verified(family, model, out)
    for_vllm = tpshard("plan", model, "--tp", 2, "--format", "vllm")
    assert for_vllm.code == (0 if family.vllm else 4), for_vllm.err


def require_verified(family: Family, model: Path, out: Path) -> None:
    """What `verify` says of a right set is what the table says."""
    accepted = ("--allow-not-run", DRAFTS[family.name]) if family.name in DRAFTS else ()
    ways = ("--tier", "weights,exact", "--tokens", 1, *accepted, "--json")
    result = tpshard("verify", out, "--source", model, *ways)
    if family.verify == "bytes":
        assert result.code in (4, 8), "it is not run, or not to the end"
        result = succeeds("verify", out, "--source", model, "--tier", "bytes", "--json")
        assert result.json["verdict"] == "pass"
        return
    assert (result.code, result.json["verdict"]) == (0, "pass"), result.err or result.json["reason"]
    left = {each["prefix"] for each in result.json["not_run"]}
    assert bool(left) == (family.verify == "text"), left


def test_the_table_and_archs_say_the_same() -> None:
    """A form that is run has a type that is, and what vLLM's format takes is in its tables."""
    texts = {each.model_type: each for those in supported().values() for each in those}
    towers = {each.model_type: each for each in nesting()}
    for family in FAMILIES:
        model_type = family.model_type or "mistral_native"  # whose params.json says none
        if model_type in texts:
            found = texts[model_type]
            assert family.verify == "bytes" or found.verify != "bytes", family.name
            assert not family.vllm or "vllm" in found.engines, family.name
        elif family.vllm:
            assert family.model_type in towers, family.name


def test_no_name_stands_twice() -> None:
    assert len(NAMES) == len(set(NAMES))
    assert DRAFTS.keys() <= set(NAMES)
