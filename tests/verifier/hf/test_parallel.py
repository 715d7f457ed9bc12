"""transformers' own classes run tensor-parallel: every architecture is proved, and no fault gets by."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import tpshard
from tests.helpers import transformers_runs as library
from tests.helpers.checkpoints import VARIANTS, build, make
from tests.helpers.grids import in_turn, one_in, some, without
from tests.helpers.newer_checkpoints import NEWER
from tpshard.errors import DifferentError, UnsupportedError, UsageError
from tpshard.verifier.builtin.decoder import Decoder
from tpshard.verifier.canaries import exact_canaries
from tpshard.verifier.criteria import EXACT_LIMIT, relative
from tpshard.verifier.elements import RankShares
from tpshard.verifier.families.configs import FAMILIES, describe
from tpshard.verifier.fault_catalogue import FAULTS
from tpshard.verifier.group import Single
from tpshard.verifier.hf import prepare as engine
from tpshard.verifier.hf.backend import TransformersBackend
from tpshard.verifier.hf.config import model_config
from tpshard.verifier.hf.heads import heads_of
from tpshard.verifier.hf.overrides import Pinned, Wide
from tpshard.verifier.hf.parameters import recipes
from tpshard.verifier.model_types import AMONG_ZEROS, BY_CONFIG, COMPUTES_AS, DECODED, TRIED, proved_by
from tpshard.verifier.options import VerifyOptions
from tpshard.verifier.ranks.weights import InMemory, replaced
from tpshard.verifier.tiers import exact, native

Made = Callable[..., Path]
# Those that every architecture can have; the whole catalogue is in docs/benchmarks/power.md.
TYPICAL = (
    "rank-files-exchanged",
    "heads-swapped-in-a-rank",
    "wrong-kv-replica",
    "gate-and-up-exchanged",
    "out-bias-dropped",
    "down-bias-dropped",
    "up-row-shifted",
    "experts-exchanged",
    "sinks-of-another-rank",
    "qk-norm-of-another-rank",
    "sign-of-an-element-of-out",
    "sign-of-an-element-of-down",
)
# Their modules have names and shapes of another family's, so that a fault lies where it lies in that one.
LIKE_LLAMA = {"mistral", "gemma", "smollm3", "ministral", "ministral3", "cwm", "internlm3", "iquestcoder"}
LIKE_ANOTHER = LIKE_LLAMA | {"cohere2", "exaone4", "granite", "olmo3", "olmoe", "seed_oss"}
# Variants that differ from another one in how positions are computed, which is the same on every rank.
SAME_CUTS = [name for name in library.VARIANTS if any(part in name for part in ("-rope-", "-sliding", "-scaled"))]
SPLITS = [*((name, 2) for name in library.ONE_OF_EACH), *((name, 4) for name in library.VARIANTS)]
OTHERS = [name for name in library.VARIANTS if name not in (*library.ONE_OF_EACH, *SAME_CUTS)]


@pytest.fixture(scope="module")
def sides(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, int], TransformersBackend]]:
    """A variant, split; loaded once."""
    kept: dict[tuple[str, int], TransformersBackend] = {}

    def get(name: str, tp: int = 2) -> TransformersBackend:
        if (name, tp) not in kept:
            kept.clear()  # one at a time is enough
            kept[name, tp] = library.opened(made(name), tp, tmp_path_factory.mktemp("split") / "out")
        return kept[name, tp]

    with torch.no_grad():
        yield get


@pytest.mark.parametrize("name", one_in(3, library.ONE_OF_EACH))
def test_the_reference_is_the_librarys_model(name: str, sides: Callable[..., TransformersBackend]) -> None:
    one = sides(name)
    wanted = build(name, dtype="float32")(one.prompt).logits
    assert relative(library.reference(one)[0], wanted) <= 1e-5


@pytest.mark.parametrize(
    ("name", "tp"), some(SPLITS, [*in_turn(library.ONE_OF_EACH, (2, 4)), *((name, 4) for name in OTHERS[::12])])
)
def test_a_correct_split_is_equal(name: str, tp: int, sides: Callable[..., TransformersBackend]) -> None:
    tier = exact(sides(name, tp))
    assert (tier.status, tier.reason) == ("pass", None)
    assert max(finding.error for finding in tier.findings) <= EXACT_LIMIT
    ranks = {finding.rank for finding in tier.findings}
    assert ranks == set(range(tp)) and len(tier.findings) >= 6 * tp


@pytest.mark.parametrize(("name", "tp"), one_in(4, in_turn(without(library.ONE_OF_EACH, LIKE_ANOTHER), library.WIDTHS)))
def test_typical_faults_are_caught(name: str, tp: int, sides: Callable[..., TransformersBackend]) -> None:
    one = sides(name, tp)
    wanted, pins = library.reference(one)
    last = one.frame.config.num_hidden_layers - 1
    caught = 0
    for fault in TYPICAL:
        damaged = FAULTS[fault].mutant(one.places(last))
        if damaged is not None:
            caught += 1
            assert library.error(replace(one, ranks=damaged), wanted, pins) > 1e3 * EXACT_LIMIT, fault
    assert caught >= 5


def test_every_model_type_with_rules_is_run() -> None:
    """By the decoder, by its class, or by a class that computes the same; Kimi K3 by nobody, of which there is none.

    A draft model is run by nobody. Of some a class knows the tensors by names that nobody told, or computes logits only
    as a part of a larger model.
    """
    files = Path(tpshard.__file__).parent.glob("rules/architectures/*.toml")
    rules = {name for file in files for name in tomllib.loads(file.read_text())["model_types"]}
    remote = {"eagle", "eagle3", "kimi_k3_text"}
    assert rules - remote <= FAMILIES.keys() | TRIED | AMONG_ZEROS | COMPUTES_AS.keys() | BY_CONFIG.keys()
    assert FAMILIES.keys() == DECODED
    assert {name for name in rules if proved_by(name) == "bytes"} == remote
    assert {*COMPUTES_AS.values(), *BY_CONFIG.values()} <= TRIED | AMONG_ZEROS


def test_every_architecture_has_a_variant() -> None:
    known = {VARIANTS[name].model_type for name in (*library.VARIANTS, *NEWER)} - AMONG_ZEROS
    assert known == TRIED


@pytest.mark.parametrize(
    ("name", "fault", "module"),
    [
        ("phi4-mini", "vocab-shifted-by-a-rank", "model.embed_tokens of rank 0"),
        ("phi3", "k-and-v-exchanged", "input of model.layers.1.self_attn.o_proj of rank 0"),
        ("phi3", "gate-and-up-exchanged", "input of model.layers.1.mlp.down_proj of rank 0"),
        ("opt", "up-bias-dropped", "model.decoder.layers.1.fc1 of rank 0"),
        ("opt", "down-bias-added-tp-times", "model.decoder.layers.1.fc2 of rank 0"),
        ("mpt", "sign-of-an-element-of-out", "transformer.blocks.1.attn.out_proj of rank 1"),
        ("gpt_oss", "sign-of-an-element-of-down", "model.layers.2.mlp.experts of rank 1"),
        ("gpt_oss", "router-rows-exchanged", "model.layers.2.mlp.router of rank 0"),
        ("gpt_oss", "v-bias-dropped", "model.layers.2.self_attn.v_proj of rank 0"),
        ("deepseek_v3", "latent-of-one-rank-stale", "model.layers.2.self_attn.kv_a_proj_with_mqa of rank 1"),
        ("deepseek_v3", "vocab-shifted-by-a-rank", "model.embed_tokens of rank 0"),
        ("deepseek_v3", "norm-of-one-rank-stale", "model.layers.2.input_layernorm of rank 0"),
    ],
)
def test_a_fault_is_named(name: str, fault: str, module: str, sides: Callable[..., TransformersBackend]) -> None:
    one = sides(name)
    damaged = FAULTS[fault].mutant(one.places(one.frame.config.num_hidden_layers - 1))
    assert damaged is not None
    tier = exact(replace(one, ranks=damaged))
    assert tier.status == "fail" and tier.reason is not None and tier.reason.startswith(module), tier.reason


def test_an_expert_that_no_token_meets_is_looked_at(sides: Callable[..., TransformersBackend]) -> None:
    one = sides("mixtral")
    short = replace(one, prompt=one.prompt[:1, :1])
    chosen = {int(i) for made in library.reference(short)[1].made.values() for i in made[0].flatten()}
    last = one.frame.config.num_hidden_layers - 1
    idle = next(i for i in range(8) if i not in chosen)
    name = f"model.layers.{last}.block_sparse_moe.experts.{idle}.w2.weight"
    ranks = [replaced(one.ranks[0], {name: one.ranks[0].get(name).neg()}), one.ranks[1]]
    tier = exact(replace(short, ranks=ranks))
    assert tier.status == "fail" and tier.reason is not None and "(every expert)" in tier.reason


@pytest.mark.parametrize("name", ["llama-rope-yarn", "qwen3", "gemma2", "gpt2", "opt", "gpt_neox"])
def test_in_float64_it_is_the_built_in_decoder(name: str, sides: Callable[..., TransformersBackend]) -> None:
    """Two independent implementations, one of which computes in float32 unless it is kept from it."""
    one = sides(name)
    family = describe(one.frame.config.to_dict())
    ours = Decoder(family, one.source, Single(), dtype=torch.float64, device=library.CPU).forward(one.prompt)
    assert relative(library.reference(one)[0], ours) <= 1e-13


class _NoFloat32(TorchFunctionMode):
    """Fails at the first float32 tensor that any operation gives."""

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        assert not isinstance(out, Tensor) or out.dtype not in (torch.float32, torch.complex64), func
        return out


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "gpt_oss", "phimoe", "olmo2", "mpt", "cohere-qk-norm"])
def test_nothing_is_computed_in_float32(name: str, sides: Callable[..., TransformersBackend]) -> None:
    side = sides(name).reference(torch.float64)
    with _NoFloat32(), Wide():
        side.model(input_ids=sides(name).prompt, use_cache=False)


def test_wide_and_not_wide() -> None:
    x = torch.ones(3, dtype=torch.float64) / 3
    with Wide():
        assert (
            torch.equal(x.float(), x) and torch.equal(x.to(torch.float32), x) and torch.zeros(1).dtype == torch.float64
        )
        assert torch.softmax(x, 0, dtype=torch.float32).dtype == torch.float64
        assert float(torch.full((), torch.finfo(torch.float64).min)) == torch.finfo(torch.float64).min
    assert x.float().dtype == torch.float32


def test_a_tie_falls_as_it_fell_before() -> None:
    router = torch.nn.Identity()

    def choose(scores: Tensor, pins: Pinned) -> tuple[Tensor, Tensor]:
        class Router(torch.nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                top = x.topk(2, dim=-1)
                return top.values, x.max(dim=-1, keepdim=True).indices

        router = Router()
        with pins.watching({"router": router}):
            assert torch.equal(
                scores.topk(1).indices, scores.argmax(-1, keepdim=True)
            )  # outside of routers all is as ever
            found: tuple[Tensor, Tensor] = router(scores)
        return found

    del router
    first = Pinned()
    choose(torch.tensor([[1.0, 2.0, 3.0]]), first)
    values, best = choose(torch.tensor([[3.0, 1.0, 2.0]]), Pinned(first.made))
    assert values.tolist() == [[2.0, 1.0]] and best.tolist() == [[2]]


def test_shares_and_where_they_begin() -> None:
    assert [RankShares(0, (3, 2, 1), 6).first(rank) for rank in range(3)] == [0, 3, 5]
    assert [RankShares(0, (4, 4, 4, 4), 8).first(rank) for rank in range(4)] == [0, 0, 4, 4]
    assert [RankShares(0, (63, 63, 63, 63), 251).first(rank) for rank in range(4)] == [0, 63, 126, 189]
    assert [RankShares(0, (8, 8), 8, alike=True).first(rank) for rank in range(2)] == [0, 0]


def test_names_of_experts() -> None:
    keys = {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj", "model.norm.weight"}
    stored = {
        f"layers.0.block_sparse_moe.experts.{i}.{w}.weight": torch.full((2, 3) if w != "w2" else (3, 2), float(i))
        for i in (0, 1)
        for w in ("w1", "w2", "w3")
    }
    weights = InMemory(stored | {"norm.weight": torch.ones(3), "other": torch.ones(1)})
    found = recipes(weights.names(), keys, "model")
    assert found.keys() == keys
    up = found["model.layers.0.mlp.experts.gate_up_proj"]
    assert up.shape(weights) == (2, 4, 3) == tuple(up.tensor(weights).shape)
    assert up.tensor(weights)[1].unique().tolist() == [1.0]
    assert found["model.layers.0.mlp.experts.down_proj"].shape(weights) == (2, 3, 2)
    lacking = InMemory(
        {name: x for name, x in stored.items() if name != "layers.0.block_sparse_moe.experts.1.w3.weight"}
    )
    assert recipes(lacking.names(), keys, "model").keys() == {"model.layers.0.mlp.experts.down_proj"}


def test_heads_that_are_not_whole(sides: Callable[..., TransformersBackend]) -> None:
    one = sides("phi3")
    model = one.reference(torch.float64).model
    name = "model.layers.0.self_attn"
    module = model.get_submodule(name)
    cuts = dict(one.cuts())
    assert heads_of(name, module, one.frame.config, cuts, 1).first_q == 4
    cuts[f"{name}.o_proj.weight"] = RankShares(1, (28, 36), 64)
    with pytest.raises(DifferentError, match="whole heads"):
        heads_of(name, module, one.frame.config, cuts, 0)
    cuts[f"{name}.o_proj.weight"] = RankShares(1, (24, 40), 64)
    with pytest.raises(DifferentError, match="without their k and v"):
        heads_of(name, module, one.frame.config, cuts, 0)


def test_a_parameter_that_nobody_cuts(sides: Callable[..., TransformersBackend]) -> None:
    one = sides("phi3")
    name = "model.layers.0.input_layernorm.weight"
    ranks = [replaced(rank, {name: rank.get(name)[:32]}) for rank in one.ranks]
    with pytest.raises(DifferentError, match="input_layernorm.weight is cut"):
        exact(replace(one, ranks=ranks))
    missing = InMemory({key: one.ranks[1].get(key) for key in one.ranks[1].names() if key != name})
    with pytest.raises(DifferentError, match="rank 1 has no tensor"):
        exact(replace(one, ranks=[one.ranks[0], missing]))


@pytest.mark.parametrize("name", ["phi3", "mpt", "deepseek_v3", "glm4_moe"])
def test_uneven_shares(name: str, made: Made, tmp_path: Path) -> None:
    heads = {"num_key_value_heads": 8} if name == "glm4_moe" else {}
    model = make(name, tmp_path / "model", **heads)
    one = library.opened(model, 3, tmp_path / "out", uneven=True)
    with torch.no_grad():
        tier = exact(one)
        assert tier.status == "pass", tier.reason
        canaries = exact_canaries(one)
    assert len(canaries) >= 5 and all(canary.status == "caught" for canary in canaries)
    assert (
        len(
            {
                one.ranks[rank].shape(name)
                for rank in range(3)
                for name in one.ranks[0].names()
                if "o_proj" in name or "out_proj" in name
            }
        )
        > 1
    )


@pytest.mark.parametrize("name", ["cohere2", "qwen3_moe"])
def test_the_native_tier(name: str, sides: Callable[..., TransformersBackend]) -> None:
    one = sides(name)
    tier = native(one, torch.bfloat16, *one.teach(6))
    assert tier.status == "pass", tier.reason
    damaged = FAULTS["heads-swapped-between-ranks"].mutant(one.places(0))
    assert damaged is not None
    assert native(one.with_ranks(damaged), torch.bfloat16, *one.teach(2)).status == "fail"


def test_heads_of_a_core_on_two_ranks(made: Made, tmp_path: Path) -> None:
    """Of CodeGen's four cores each has two heads, and so has each of eight ranks half a core's q, v and k."""
    with torch.no_grad():
        tier = exact(library.opened(made("codegen"), 8, tmp_path / "out"))
    assert (tier.status, tier.reason) == ("pass", None)


def test_some_layers(sides: Callable[..., TransformersBackend]) -> None:
    """Faults in other layers are none of a sample's business."""
    one = sides("mpt")
    damaged = FAULTS["up-row-shifted"].mutant(one.places(0))
    assert damaged is not None
    assert exact(replace(one, ranks=damaged).only(1)).status == "pass"
    assert exact(replace(one, ranks=damaged).only(0)).status == "fail"


def test_whose_code_runs() -> None:
    assert engine.engine_of("auto", model_config({"model_type": "llama"}).to_dict()) == "tpshard"
    assert engine.engine_of("transformers", {"model_type": "llama"}) == "transformers"
    assert engine.engine_of("auto", {"model_type": "phi3"}) == "transformers"
    with pytest.raises(UnsupportedError, match="kimi_k3"):
        engine.engine_of("auto", {"model_type": "kimi_k3"})
    with pytest.raises(UsageError):
        VerifyOptions(Path("shards"), engine="vllm")
    assert engine.engine_of("auto", {"model_type": "bitnet"}) == "transformers"  # never tried here
    with pytest.raises(UnsupportedError, match="no class that computes logits for the model type 'kimi_k3'"):
        model_config({"model_type": "kimi_k3"})


def test_without_transformers_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UnsupportedError) as caught:
        model_config({"model_type": "phi3"})
    assert caught.value.exit_code == 4 and "pip install transformers" in str(caught.value.hint)
