"""transformers' own classes of the families that came last, run tensor-parallel: equal, and no fault gets by."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers import transformers_runs as library
from tests.helpers.checkpoints import build
from tests.helpers.grids import one_in
from tests.helpers.newer_checkpoints import NEWER
from tpshard.errors import DifferentError
from tpshard.verifier.canaries import exact_canaries
from tpshard.verifier.criteria import EXACT_LIMIT, relative
from tpshard.verifier.fault_catalogue import FAULTS, canaries_of
from tpshard.verifier.hf.backend import TransformersBackend
from tpshard.verifier.model_types import TRIED
from tpshard.verifier.ranks.weights import Weights, replaced
from tpshard.verifier.tiers import exact, native

Made = Callable[..., Path]


@pytest.mark.parametrize("name", one_in(4, [name for name, (model_type, _) in NEWER.items() if model_type in TRIED]))
def test_a_correct_split_is_equal_and_a_faulty_one_is_not(name: str, made: Made, tmp_path: Path) -> None:
    with torch.no_grad():
        one = library.opened(made(name), 4, tmp_path / "out")
        wanted, pins = library.reference(one)
        assert relative(wanted, build(name, dtype="float32")(one.prompt).logits) <= 1e-5
        tier = exact(one)
        assert (tier.status, tier.reason) == ("pass", None)
        assert max(finding.error for finding in tier.findings) <= EXACT_LIMIT
        fault = FAULTS["sign-of-an-element-of-down"]
        mutants = (fault.mutant(one.places(i)) for i in one.frame.layers[::-1])
        bad = next(mutant for mutant in mutants if mutant)
        assert library.error(replace(one, ranks=bad), wanted, pins) > 1e3 * EXACT_LIMIT
        # LFM2's lie in a layer without heads, whose convolution has no fault of its own in the catalogue.
        assert len(list(canaries_of(one.with_layers(1).places()))) >= (3 if name == "lfm2" else 5)


@pytest.fixture(scope="module")
def sides(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TransformersBackend]:
    """A variant, split for two ranks and loaded once."""
    kept: dict[str, TransformersBackend] = {}

    def get(name: str) -> TransformersBackend:
        if name not in kept:
            kept[name] = library.opened(made(name), 2, tmp_path_factory.mktemp("split") / "out")
        return kept[name]

    return get


def damaged(
    one: TransformersBackend, pattern: str, change: Callable[[torch.Tensor], torch.Tensor], rank: int
) -> TransformersBackend:
    """One tensor of one rank changed."""
    ranks: list[Weights] = list(one.ranks)
    (name,) = (name for name in one.source.names() if re.search(pattern, name))
    ranks[rank] = replaced(ranks[rank], {name: change(ranks[rank].get(name)).contiguous()})
    return replace(one, ranks=ranks)


SHARED = ("conv1d.weight", "A_log", "dt_bias", "out_proj.weight", "norm.weight")
PARTS = {
    "qwen3_next": ("in_proj_qkvz.weight", "in_proj_ba.weight", *SHARED),
    "qwen3_5_text": ("in_proj_qkv.weight", "in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight"),
    "nemotron_h": ("in_proj.weight", "conv1d.bias", "D", *SHARED),
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in PARTS.items() for part in parts])
def test_every_part_of_a_layer_without_attention_is_looked_at(
    name: str, part: str, sides: Callable[[str], TransformersBackend]
) -> None:
    mixer = "mixer" if name == "nemotron_h" else "linear_attn"
    bad = damaged(sides(name), rf"layers\.0\.{mixer}\.{part}$", lambda tensor: tensor.roll(1, 0), 1)
    with torch.no_grad():
        tier = exact(bad)
    assert tier.status == "fail" and tier.first is not None
    assert f"model.layers.0.{mixer}" in tier.first.module and tier.first.rank == 1


@pytest.mark.parametrize(
    ("name", "part", "what"),
    [
        ("qwen3_next", "linear_attn.A_log", "whole key heads with their value heads"),
        ("qwen3_next", "linear_attn.conv1d.weight", "whole key heads with their value heads"),
        ("nemotron_h", "mixer.D", "whole heads with their groups"),
        ("nemotron_h", "mixer.in_proj.weight", "whole heads with their groups"),
    ],
)
def test_heads_that_are_not_whole(name: str, part: str, what: str, sides: Callable[[str], TransformersBackend]) -> None:
    """A number or a feature of one of a rank's heads is missing."""
    with pytest.raises(DifferentError, match=f"rank 0: model.layers.0.* does not hold {what}"):
        exact(damaged(sides(name), rf"layers\.0\.{part}$", lambda tensor: tensor[:-1], 0))


@pytest.mark.parametrize("part", ["wq_b", "wk", "k_norm", "weights_proj"])
def test_what_an_indexer_chooses_by_is_looked_at(part: str, sides: Callable[[str], TransformersBackend]) -> None:
    """Its choice is pinned, so a rank that would choose others is found by what it chooses by."""
    bad = damaged(
        sides("deepseek_v32"), rf"layers\.0\.self_attn\.indexer\.{part}\.weight", lambda tensor: tensor * 1.01, 1
    )
    with torch.no_grad():
        tier = exact(bad)
    assert tier.status == "fail" and tier.first is not None
    assert (tier.first.module, tier.first.rank) == (f"model.layers.0.self_attn.indexer.{part}", 1)


@pytest.mark.parametrize("name", ["qwen3_next", "deepseek_v32", "nemotron_h"])
def test_the_native_tier(name: str, sides: Callable[[str], TransformersBackend]) -> None:
    """Through the cache: the states of convolution, delta rule and Mamba, the keys of the indexer."""
    one = sides(name)
    with torch.no_grad():
        tier = native(one, torch.bfloat16, *one.teach(3))
        assert tier.status == "pass", tier.reason
        birds = exact_canaries(one)
    assert len(birds) >= 5 and all(bird.status == "caught" for bird in birds)


def test_an_expert_of_llama_4_that_no_token_meets_is_looked_at(sides: Callable[[str], TransformersBackend]) -> None:
    one = sides("llama4_text")
    short = replace(one, prompt=one.prompt[:1, :1])
    with torch.no_grad():
        chosen = {int(i) for made in library.reference(short)[1].made.values() for i in made[0].flatten()}
        idle = next(i for i in range(4) if i not in chosen)

        def negated(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor[:idle], -tensor[idle : idle + 1], tensor[idle + 1 :]])

        tier = exact(damaged(short, r"experts\.down_proj", negated, 0))
    assert tier.status == "fail" and tier.reason is not None and "(every expert)" in tier.reason
