"""Classes of which a rank's parameters lie among zeros, streamed: the same figures, and no more read than a matrix."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import transformers_runs as library
from tests.helpers.checkpoints import VARIANTS
from tests.helpers.command import succeeds, tpshard
from tests.helpers.grids import some
from tests.helpers.own_rules import CONFIGS, make, rules
from tests.verifier.hf.test_streamed import Counted, both, in_dtype
from tests.verifier.hf.test_untried import WRONG
from tpshard.verifier.fault_catalogue import FAULTS
from tpshard.verifier.hf import prepare, streamed
from tpshard.verifier.hf.gradients import Gradients
from tpshard.verifier.hf.masked_backend import MaskedBackend
from tpshard.verifier.hf.prepare import largest_block
from tpshard.verifier.model_types import AMONG_ZEROS
from tpshard.verifier.tiers import exact

Made = Callable[..., Path]
PUBLISHED = [name for name, variant in VARIANTS.items() if variant.model_type in AMONG_ZEROS]
OWN = [name for name in CONFIGS if name != "diffllama"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 rows, of which the tests' tables have several."""
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 1 << 10)


def opened(model: Path, tp: int, out: Path, **how: Any) -> MaskedBackend:
    one = library.opened(model, tp, out, **how)
    frame = one.frame.of_source(one.source)
    return MaskedBackend(one.source, one.ranks, one.team, one.prompt, one.device, frame).placed()


GRID = [(name, tp) for name in PUBLISHED for tp in (2, 4)]


@pytest.mark.parametrize(("name", "tp"), some(GRID, [("dbrx", 2), ("inkling", 2), ("zamba2", 4)]))
def test_results_are_those_of_weights_in_memory(name: str, tp: int, made: Made, tmp_path: Path) -> None:
    one = opened(made(name), tp, tmp_path / "out")
    for tier in (exact, in_dtype):
        kept, read = both(tier, one)
        assert kept.status == "pass" and read == kept  # every figure of every module, to its last bit


@pytest.mark.parametrize("name", some(PUBLISHED, ["laguna", "olmo_hybrid"]))
def test_faults_are_found_equally(name: str, made: Made, tmp_path: Path) -> None:
    one = opened(made(name), 2, tmp_path / "out")
    places = one.places(one.frame.layers[-1])
    found = 0
    for fault in ("sign-of-an-element-of-down", "out-scaled-by-tp"):
        if (damaged := FAULTS[fault].mutant(places)) is not None:
            kept, read = both(exact, one.with_ranks(damaged))
            assert kept.status == "fail" and read == kept, fault
            found += 1
    assert found


def verified(*more: object) -> tuple[int, dict[str, Any]]:
    given = ("--rules", "mine.toml", "--tokens", 1, "--json", *more)
    done = tpshard("verify", "out", "--source", "model", *given)
    found = done.json
    assert found["settings"].pop("streamed") is ("--stream" in more)
    return done.code, {key: found[key] for key in ("verdict", "reason", "tiers", "canaries", "settings", "not_run")}


@pytest.mark.parametrize("model_type", some(OWN, ["jetmoe"]))
def test_own_rules_are_proved_alike(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(model_type)
    Path("mine.toml").write_text(rules(model_type))
    succeeds("split", "model", "--tp", 2, "--rules", "mine.toml", "-o", "out", "--no-fsync")
    kept, read = (verified("--tier", "weights,exact,native", how) for how in ("--no-stream", "--stream"))
    assert read == kept and kept[0] == 0


@pytest.mark.parametrize(("model_type", "how", "what"), some(WRONG, [WRONG[2], WRONG[9], WRONG[10], WRONG[15]]))
def test_wrong_rules_fail_alike(
    model_type: str, how: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nothing of a rank needs is found by gradients, and a cut that is right by those of the whole model."""
    monkeypatch.chdir(tmp_path)
    make(model_type)
    Path("mine.toml").write_text(rules(model_type, what) if how == "replicated" else rules(model_type, joined=what))
    succeeds("split", "model", "--tp", 2, "--rules", "mine.toml", "-o", "out", "--no-fsync")
    kept, read = (verified("--tier", "exact", how) for how in ("--no-stream", "--stream"))
    assert read == kept and kept[0] == 1


@pytest.mark.parametrize("model_type", some(OWN, ["dbrx", "mellum"]))
def test_no_more_is_read_at_once_than_a_matrix_and_none_is_kept_for_its_gradient(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(model_type)
    Path("mine.toml").write_text(rules(model_type))
    one = opened(Path("model"), 2, Path("out"), rules="mine.toml")
    source, ranks = Counted(one.source), [Counted(rank) for rank in one.ranks]
    most, alive, peak = largest_block(one.frame), weakref.WeakSet[Any](), [0]
    noted = Gradients._noted

    def counted(self: Gradients, part: Tensor, again: Callable[[], Tensor]) -> Tensor:
        alive.add(part.untyped_storage())
        peak[0] = max(peak[0], sum(storage.nbytes() for storage in alive) // 8)
        return noted(self, part, again)

    monkeypatch.setattr(Gradients, "_noted", counted)
    with torch.no_grad():
        assert exact(replace(one, source=source, ranks=ranks, most=most)).status == "pass"
    rows = 64 * one.frame.shapes[one.frame.head][1]  # of a table, of which blocks are a multiple of 64 rows
    assert max(map(max, (source.asked, *(rank.asked for rank in ranks)))) <= max(most, rows)
    assert 0 < peak[0] <= 3 * max(most, rows)


def test_it_is_streamed_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make("mellum")
    Path("mine.toml").write_text(rules("mellum"))
    succeeds("split", "model", "--tp", 2, "--rules", "mine.toml", "-o", "out", "--no-fsync")
    given = ("verify", "out", "--source", "model", "--tier", "exact", "--tokens", 1, "--json")
    # Three times 25,000 numbers in memory, or three of 1024; of either what 32 tokens make of them.
    monkeypatch.setattr(prepare, "usable", lambda *_: 0)
    kept, read = (tpshard(*given, how).json["error"]["expected"] for how in ("--no-stream", "--stream"))
    least, most = (int(each.split()[0].replace(",", "")) for each in (read, kept))
    assert most - least > 8 * 3 * 20_000
    monkeypatch.setattr(prepare, "usable", lambda *_: least)
    assert succeeds(*given).json["settings"]["streamed"] is True
    short = tpshard(*given, "--no-stream").json["error"]
    assert short["code"] == "io" and short["hint"].startswith("--stream needs less")
    monkeypatch.setattr(prepare, "usable", lambda *_: 1000)
    assert tpshard(*given).code == 6
    succeeds(*given[:4], "--tier", "weights", "--stream")  # runs nothing, and needs no memory for it


def test_a_class_that_takes_all_experts_at_once_is_refused_with_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of somebody's own product over all experts; the tier that runs nothing is not refused."""
    from transformers.models.mellum.modeling_mellum import MellumExperts

    def forward(self: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("td,efd->etf", x, self.gate_up_proj).chunk(2, -1)
        every = torch.einsum("etf,edf->etd", torch.nn.functional.silu(gate) * up, self.down_proj)
        by_token = torch.zeros(len(x), len(every), dtype=weights.dtype).scatter(1, chosen, weights)
        return torch.einsum("te,etd->td", by_token, every)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MellumExperts, "forward", forward)
    make("mellum")
    Path("mine.toml").write_text(rules("mellum"))
    succeeds("split", "model", "--tp", 2, "--rules", "mine.toml", "-o", "out", "--no-fsync")
    given = ("verify", "out", "--source", "model", "--tokens", 1, "--json")
    assert succeeds(*given, "--tier", "exact", "--no-stream").json["verdict"] == "pass"
    refused = tpshard(*given, "--tier", "exact", "--stream").json["error"]
    assert refused["code"] == "unsupported" and refused["hint"].startswith("--no-stream keeps all weights")
    assert "computes with all of model.layers.0.mlp.experts.gate_up_proj at once" in refused["message"]
    assert refused["expected"].endswith("GB at most") and refused["found"].endswith("GB")
    succeeds(*given, "--tier", "weights", "--stream")
