"""DeepSeek's own files: whole experts on each rank, run by transformers' class, and every mistake named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers import transformers_runs as library
from tests.helpers.checkpoints import make
from tests.helpers.grids import one_in
from tpshard.api import convert as api
from tpshard.api import verify as verifying
from tpshard.execute.publish import Settings
from tpshard.verifier.elements import RankShares
from tpshard.verifier.hf.parallel import own_weights
from tpshard.verifier.options import VerifyOptions
from tpshard.verifier.report.verdict import Verdict
from tpshard.verifier.run import verify
from tpshard.verifier.tiers import exact

Get = Callable[[str], Path]
Change = Callable[[dict[str, Tensor]], None]
FFN = "layers.2.ffn."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """A variant without padding, which DeepSeek's files cannot hold; made once."""
    root = tmp_path_factory.mktemp("models")
    return lambda name: root / name if (root / name).exists() else make(name, root / name, vocab_size=256)


@pytest.fixture(scope="module")
def pair(model: Get, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """deepseek_v3 and its set for two ranks; tests that damage it copy it."""
    out = tmp_path_factory.mktemp("set") / "out"
    api.split(model("deepseek_v3"), 2, out, format="deepseek", settings=Settings(fsync=False, workers=1))
    return model("deepseek_v3"), out


def judged(model: Path, shards: Path) -> Verdict:
    return verify(VerifyOptions(shards, tiers=("exact",), device="cpu"), model)


@pytest.mark.parametrize(
    ("name", "tp"),
    [*((name, tp) for name in ("deepseek_v2", "deepseek_v3") for tp in (2, 4)), ("deepseek_v3-all-sparse", 4)],
)
def test_a_correct_set_is_equal(name: str, tp: int, model: Get, tmp_path: Path) -> None:
    with torch.no_grad():
        tier = exact(library.opened(model(name), tp, tmp_path / "out", format="deepseek"))
    assert (tier.status, tier.reason) == ("pass", None)
    assert sum(finding.module.endswith(".mlp.experts") for finding in tier.findings) == 0
    assert sum(finding.module.endswith("experts (every expert)") for finding in tier.findings) >= 2 * tp


def test_every_tier_passes_and_sees_the_canaries(pair: tuple[Path, Path]) -> None:
    verdict = verifying.verify(pair[1], pair[0], device="cpu", tokens=2)
    assert [(tier.name, tier.status) for tier in verdict.tiers] == [
        (name, "pass") for name in ("bytes", "weights", "exact", "native")
    ]
    assert (verdict.exit_code, verdict.tp, verdict.settings["engine"]) == (0, 2, "transformers")
    assert {canary.status for canary in verdict.canaries} == {"caught"}


def exchanged(one: str, other: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


def dropped(*names: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[name]

    return change


def renumbered(tensors: dict[str, Tensor]) -> None:
    """Rank 1's experts, 4 to 7, as 3 to 6."""
    for i in range(4, 8):
        for w in ("w1", "w2", "w3"):
            tensors[f"{FFN}experts.{i - 1}.{w}.weight"] = tensors.pop(f"{FFN}experts.{i}.{w}.weight")


FAULTS: dict[str, tuple[Change, str]] = {
    "two experts": (
        exchanged(f"{FFN}experts.5.w2.weight", f"{FFN}experts.6.w2.weight"),
        "model.layers.2.mlp.experts of rank 1 differs first",
    ),
    "gate and up of an expert": (
        exchanged(f"{FFN}experts.7.w1.weight", f"{FFN}experts.7.w3.weight"),
        "model.layers.2.mlp.experts of rank 1 differs first",
    ),
    "experts of another rank": (renumbered, "rank 1 has other experts of model.layers.2.mlp.experts.gate_up_proj"),
    "an expert missing": (
        dropped(*(f"{FFN}experts.7.{w}.weight" for w in ("w1", "w2", "w3"))),
        "the ranks' shares of model.layers.2.mlp.experts.down_proj do not add up",
    ),
    "gate and up of the shared one": (
        exchanged(f"{FFN}shared_experts.w1.weight", f"{FFN}shared_experts.w3.weight"),
        "model.layers.2.mlp.shared_experts.gate_proj of rank 1 differs first",
    ),
    "heads": (
        lambda tensors: tensors.update(
            {"layers.2.attn.wkv_b.weight": tensors["layers.2.attn.wkv_b.weight"].roll(28, 0)}
        ),
        "model.layers.2.self_attn.kv_b_proj of rank 1 differs first",
    ),
    "the router": (
        lambda tensors: tensors.update({f"{FFN}gate.weight": tensors[f"{FFN}gate.weight"].roll(1, 0)}),
        "model.layers.2.mlp.gate of rank 1 differs first",
    ),
    "its bias": (dropped(f"{FFN}gate.bias"), "rank 1 has no tensor model.layers.2.mlp.gate.e_score_correction_bias"),
}


@pytest.mark.parametrize("fault", one_in(2, list(FAULTS)))
def test_a_mistake_is_named(fault: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    change, reason = FAULTS[fault]
    shards = Path(shutil.copytree(pair[1], tmp_path / "set"))
    path = shards / "model1-mp2.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    verdict = judged(pair[0], shards)
    assert verdict.exit_code == 1 and (verdict.reason or "").startswith(reason), verdict.reason


def test_exchanged_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shards = Path(shutil.copytree(pair[1], tmp_path / "set"))
    library.exchange(shards / "model0-mp2.safetensors", shards / "model1-mp2.safetensors")
    verdict = judged(pair[0], shards)
    assert verdict.exit_code == 1 and "rank 0 has other experts of model.layers.1.mlp.experts" in (verdict.reason or "")


def test_an_expert_that_the_source_lacks(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """All others are there, from the second on."""
    source = Path(shutil.copytree(pair[0], tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    lacking = {name: tensor for name, tensor in tensors.items() if "layers.2.mlp.experts.0." not in name}
    save_file(lacking, source / "model.safetensors")
    verdict = judged(source, pair[1])
    assert verdict.verdict == "inconclusive" and "the source has not all experts" in (verdict.reason or "")


def test_weights_of_others_experts_are_nothing() -> None:
    chosen, weights = torch.tensor([[0, 5], [3, 2]]), torch.tensor([[0.25, 0.5], [1.0, 2.0]])
    cut = RankShares(0, (3, 3), 6)
    assert own_weights(cut, 0, chosen, weights).tolist() == [[0.25, 0.0], [0.0, 2.0]]
    assert own_weights(cut, 1, chosen, weights).tolist() == [[0.0, 0.5], [1.0, 0.0]]
