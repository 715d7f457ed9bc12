"""What safetensors refuses our parser refuses: some mutated headers of the many that `make fuzz` judges."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize

from tests.fuzz import headers
from tpshard.storage.safetensors import Header

SEED, COUNT = 11, 5000


def test_no_damaged_header_is_accepted_that_safetensors_refuses() -> None:
    assert list(headers.complaints(COUNT, SEED)) == []


def test_the_damage_is_of_both_kinds() -> None:
    """Some mutants are still sound and most are not, or nothing would be judged."""
    accepted = 0
    for file in headers.mutants(COUNT, SEED):
        with contextlib.suppress(SafetensorError):
            deserialize(file)
            accepted += 1
    assert COUNT / 50 < accepted < COUNT / 2


def test_a_parser_that_accepts_everything_is_complained_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(raw: bytes, file: str, file_size: int) -> Any:
        return Header((), {}, 8, "")

    monkeypatch.setattr(headers, "parse_header", blind)
    assert len(list(headers.complaints(200, SEED))) > 50
