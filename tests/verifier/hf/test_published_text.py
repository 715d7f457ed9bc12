"""Text models as they are published, of which transformers' class has other names, or none without a tower.

Right shards pass; of wrong ones the first module that differs is named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers import served_checkpoints
from tests.helpers.command import succeeds
from tests.helpers.command import tpshard as command
from tests.helpers.grids import some
from tpshard.rules import architecture

RULES = Path(architecture.__file__).parent / "architectures"


@dataclass(frozen=True)
class Case:
    """rules: the file of its rules.

    exchanged: a tensor of rank 1, of which the first two blocks of so many rows change places. whole: a module that
    every rank is given whole, by a rule that says so; and the module that this is seen in. allowed: beginnings of names
    of what is cut and run by nothing. runs: what the report says is run.
    """

    rules: str
    exchanged: tuple[str, int, str]
    whole: tuple[str, str]
    allowed: Sequence[str] = ()
    runs: str | None = None


CASES: dict[str, Case] = {
    "mistral_large4": Case(
        "mistral_large4",
        ("layers.0.attention.wq.weight", 24, "layers.0.self_attn.q_proj"),
        ("layers.*.attention.wkv_b", "layers.0.self_attn"),
        runs="the text model",
    ),
}
BY_DEFAULT = ["mistral_large4"]


@pytest.mark.parametrize("name", some(CASES, BY_DEFAULT))
def test_it_is_proved_as_published(name: str, tmp_path: Path) -> None:
    found = verified(name, split(name, tmp_path), "weights,exact")
    assert (found["verdict"], found["settings"]["engine"]) == ("pass", "transformers"), found["reason"]
    assert [tier["status"] for tier in found["tiers"]] == ["pass"] * 2
    assert {canary["status"] for canary in found["canaries"]} == {"caught"}
    assert found["settings"].get("runs") == CASES[name].runs


@pytest.mark.parametrize("name", some(CASES, BY_DEFAULT))
def test_heads_in_another_order_fail(name: str, tmp_path: Path) -> None:
    tensor, rows, module = CASES[name].exchanged
    out = split(name, tmp_path)
    file = out / "rank-00001-of-00002.safetensors"
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    tensors = load_file(file)
    tensors[tensor][: 2 * rows] = tensors[tensor][: 2 * rows].roll(rows, 0)
    save_file(tensors, file, said)
    found = verified(name, out, "exact")
    assert found["verdict"] == "fail" and module in found["reason"], found["reason"]


@pytest.mark.parametrize("name", some(CASES, BY_DEFAULT))
def test_a_wrong_rule_fails(name: str, tmp_path: Path) -> None:
    module, place = CASES[name].whole
    text = (RULES / f"{CASES[name].rules}.toml").read_text()
    without = re.sub(rf'"{re.escape(module)}\??",?', "", text)
    assert without != text
    file = tmp_path / "wrong.toml"
    file.write_text(without.replace('\n"replicate" = [', f'\n"replicate" = ["{module}",', 1))
    found = verified(name, split(name, tmp_path, "--rules", file), "exact")
    assert found["verdict"] == "fail", found["reason"]
    assert place in found["tiers"][0]["first"]["module"]


def split(name: str, folder: Path, *more: object) -> Path:
    model = served_checkpoints.make(name, folder / "model")
    succeeds("split", model, "--tp", 2, "-o", folder / "out", "--no-fsync", *more)
    return folder / "out"


def verified(name: str, out: Path, tiers: str) -> Any:
    allowed = [word for each in CASES[name].allowed for word in ("--allow-not-run", each)]
    given = ("--source", out.parent / "model", "--tier", tiers, "--tokens", 2, "--json", *allowed)
    return command("verify", out, *given).json
