"""Damaged manifests, records, configs and rules end with a documented code: some of the cases of `make fuzz`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import documents

SEED, COUNT = 11, 200


def test_damaged_documents_are_refused_or_judged(tmp_path: Path) -> None:
    assert list(documents.run(COUNT, SEED, tmp_path)) == []


def test_a_crash_is_complained_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: object, **options: object) -> None:
        raise KeyError("bfloat16")

    stage = tmp_path / "stage"
    documents.Stage.make(stage)
    monkeypatch.setattr("tpshard.inputs.shard_set.parse", crash)
    monkeypatch.setattr("tpshard.inputs.shard_set.CorruptError", RuntimeError)
    path = stage / "set-native" / "tpshard.json"
    each = documents.Case(path, path.read_bytes(), ("inspect", path.parent))
    assert (documents.complaint(each) or "").startswith("exit 70")
