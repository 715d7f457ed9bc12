"""The tiers: correct splits pass, every fault is caught and named, canaries keep a blind tier from passing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tests.helpers.checkpoints import DECODED
from tests.helpers.cut import cut
from tests.helpers.grids import ALL, in_turn, some
from tests.helpers.small_models import CPU, Tensors, source, tokens
from tpshard.verifier.backend import Reference
from tpshard.verifier.builtin.backend import DecoderBackend
from tpshard.verifier.builtin.decoder import Probe
from tpshard.verifier.canaries import exact_canaries, native_canaries
from tpshard.verifier.criteria import distances
from tpshard.verifier.families.configs import describe
from tpshard.verifier.fault_catalogue import FAULTS
from tpshard.verifier.group import Threads
from tpshard.verifier.options import silent
from tpshard.verifier.ranks.weights import InMemory, replaced
from tpshard.verifier.tiers import exact, native
from tpshard.verifier.weights_tier import compare_weights, weights_canaries


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.no_grad():
        yield


def setup(
    name: str, tp: int, dtype: torch.dtype = torch.float32, ranks: Sequence[Tensors] | None = None
) -> DecoderBackend:
    config, tensors = source(name)
    stored = {key: value.to(dtype) for key, value in tensors.items()}
    held = [InMemory(rank) for rank in (ranks or cut(stored, config, tp))]
    return DecoderBackend(InMemory(stored), held, Threads(tp), tokens(16), CPU, describe(config))


OF_OTHER_LAYERS = {
    "experts-exchanged",
    "experts-of-another-rank",
    "router-rows-exchanged",
    "choice-bias-shifted",
    "latent-of-one-rank-stale",
}
OF_OTHER_LAYERS |= {f"{what}-of-another-rank" for what in ("sinks", "convolution", "decay", "qk-norm")}
"""Faults of experts, latents and layers without attention, which the decoder does not have."""


# Every place where heads, biases, norms and embeddings are stored; at 4 ranks the KV heads of a few are replicated.
AT_TWO = ("llama-mqa", "llama-mha-bias", "llama-tied", "qwen2-tied", "gpt2-untied-inner", "gpt_bigcode-mha", "gpt_neox")
AT_TWO += ("gpt_neox-tied-nobias", "gptj-tied-inner", "falcon-new-one-norm", "falcon-mha-alibi", "opt-350m-like")
AT_TWO += ("opt-nobias", "gpt_neo")
AT_FOUR = ("llama-gqa", "qwen2-bias", "qwen3-tied-bias", "gemma2", "gpt2", "gpt_bigcode-mqa", "gptj", "bloom")
AT_FOUR += ("falcon-new", "falcon-mqa", "opt")
FAULTY = some(
    [(name, tp) for name in DECODED for tp in (2, 4)],
    [*((name, 2) for name in AT_TWO), *((name, 4) for name in AT_FOUR)],
)


def test_faults_are_put_into_every_family() -> None:
    assert {DECODED[name].model_type for name, _ in FAULTY} >= {v.model_type for v in DECODED.values()} - {
        "mistral",
        "qwen3",
    }


@pytest.mark.parametrize(("name", "tp"), FAULTY)
def test_every_fault_is_caught_by_the_exact_criterion_and_no_correct_split(name: str, tp: int) -> None:
    """By turns one half of the faults and the other, unless all are asked for."""
    case = setup(name, tp)
    wanted = case.run(torch.float64, case.steps).logits

    def error(case: DecoderBackend) -> float:
        return max(case.errors(torch.float64, Reference(wanted)))

    assert error(case) <= 1e-12
    first = FAULTY.index((name, tp)) % 2
    for fault in FAULTS.values() if ALL else [*FAULTS.values()][first::2]:
        mutant = fault.mutant(case.places(case.family.layers - 1))
        if mutant is not None:
            caught = error(replace(case, ranks=mutant)) > 1e-12
            assert caught is not fault.harmless, fault.name


def test_most_faults_apply_to_some_model() -> None:
    applied = set()
    for name in ("qwen3-tied-bias", "llama-gqa", "gpt2", "gptj", "falcon-mqa", "llama-mha-bias"):
        for tp in (2, 4):
            case = setup(name, tp)
            applied |= {n for n, fault in FAULTS.items() if fault.mutant(case.places(0)) is not None}
    assert applied == FAULTS.keys() - OF_OTHER_LAYERS
    assert len(FAULTS) >= 30


BOTH_TIERS = ["llama-gqa", "gemma2", "gpt2", "falcon-new", "opt-350m-like", "bloom"]


@pytest.mark.parametrize(("name", "block_bytes"), in_turn(BOTH_TIERS, (None, 3000)))
def test_correct_splits_pass_both_tiers(name: str, block_bytes: int | None) -> None:
    for tp, dtype in ((2, torch.bfloat16), (4, torch.float32)):
        case = replace(setup(name, tp, dtype), block_bytes=block_bytes)
        result = exact(case)
        assert result.status == "pass" and result.metrics["relative_error"] <= 1e-14
        result = native(case, dtype, steps := case.teacher_tokens(4), case.run_wide(steps))
        assert result.status == "pass", result.reason
        assert exact(replace(case, sequence_parallel=True)).status == "pass"
        assert exact(case, float32=True).status == "pass"


@pytest.mark.parametrize(
    ("fault", "layer", "module", "rank"),
    [
        ("heads-swapped-in-a-rank", 1, "model.layers.1.self_attn.q_proj", 0),
        ("wrong-kv-replica", 2, "model.layers.2.self_attn.k_proj", 1),
        ("up-row-shifted", 2, "model.layers.2.mlp.up_proj", 0),
        ("sign-of-an-element-of-down", 1, "model.layers.1.mlp.down_proj", 3),
        ("sign-of-an-element-of-out", 0, "model.layers.0.self_attn.o_proj", 3),
        ("norm-of-one-rank-stale", 1, "model.layers.1.input_layernorm", 0),
        ("embedding-row-shifted", 0, "model.embed_tokens", 0),
        ("head-shifted-by-a-rank", 0, "lm_head", 0),
    ],
)
def test_the_first_module_and_rank_that_differ_are_named(fault: str, layer: int, module: str, rank: int) -> None:
    case = setup("llama-gqa", 4)
    mutant = FAULTS[fault].mutant(case.places(layer))
    assert mutant is not None
    result = exact(replace(case, ranks=mutant))
    assert result.status == "fail" and result.first is not None
    assert (result.first.module, result.first.rank) == (module, rank)
    assert result.reason is not None and f"{module} of rank {rank}" in result.reason
    if module.startswith("model.layers"):
        assert result.first.layer == layer


@pytest.mark.parametrize(
    ("name", "fault", "found"),
    [
        ("gpt2", "down-bias-dropped", "transformer.h.1.mlp.c_proj.bias"),
        ("gpt2", "v-bias-dropped", "v of transformer.h.1.attn.c_attn.bias"),
        ("opt", "out-bias-added-tp-times", "model.decoder.layers.1.self_attn.out_proj.bias"),
        ("opt", "up-bias-dropped", "model.decoder.layers.1.fc1.bias"),
        ("gptj-tied-inner", "head-bias-dropped", "lm_head.bias"),
        ("qwen3", "q-and-k-norm-exchanged", "model.layers.1.self_attn.q_norm"),
    ],
)
def test_biases_and_inner_norms_are_named(name: str, fault: str, found: str) -> None:
    case = setup(name, 2)
    mutant = FAULTS[fault].mutant(case.places(1))
    assert mutant is not None
    result = exact(replace(case, ranks=mutant))
    assert result.reason is not None and result.reason.startswith(f"{found} of rank 0 differs first")


@pytest.mark.parametrize("suffix", ["mlp.c_proj.bias", "mlp.c_fc.bias", "attn.c_attn.bias"])
def test_a_bias_that_one_rank_lacks_is_named(suffix: str) -> None:
    case = setup("gpt2", 2)
    tensors = {name: case.ranks[1].get(name) for name in case.ranks[1].names() if name != f"transformer.h.0.{suffix}"}
    result = exact(replace(case, ranks=[case.ranks[0], InMemory(tensors)]))
    assert result.first is not None and result.first.rank == 1
    assert result.first.module.removeprefix("q of ") == f"transformer.h.0.{suffix}"


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "opt"])
def test_exchanged_rank_files_are_named(name: str) -> None:
    case = setup(name, 4)
    exchanged = case.with_ranks([case.ranks[rank] for rank in (0, 3, 2, 1)])
    assert exact(exchanged).status == "fail"
    assert compare_weights(exchanged, (), silent).reason == "the files of ranks 1 and 3 are exchanged"


@pytest.mark.parametrize("fault", ["vocab-shifted-by-a-rank", "head-shifted-by-a-rank"])
@pytest.mark.parametrize("name", ["llama-tied", "llama-gqa"])
def test_an_embedding_in_another_ranks_file_is_no_exchange_of_files(name: str, fault: str) -> None:
    case = setup(name, 2)
    mutant = FAULTS[fault].mutant(case.places(1))
    assert mutant is not None
    result = compare_weights(case.with_ranks(mutant), (), silent)
    assert result.reason is not None and " of rank 0 is the one of rank 1" in result.reason
    assert "lm_head" in result.reason or "model.embed_tokens" in result.reason


@pytest.mark.parametrize("name", ["llama", "gpt2-scaled", "falcon-mqa"])
def test_files_of_unlike_ranks_are_exchanged_whole(name: str) -> None:
    """Shares of 3 to 1: no tensor of one rank has the shape of the other's."""
    config, tensors = source(name)
    case = setup(name, 2, ranks=cut(tensors, config, 2, [3, 1]))
    assert exact(case).status == "pass"
    assert {c.name: c.status for c in exact_canaries(case)}["rank-files-exchanged"] == "caught"
    assert {c.name: c.status for c in native_canaries(case, torch.float32)}["another-ranks-shard"] == "caught"
    result = compare_weights(case.with_ranks([case.ranks[1], case.ranks[0]]), (), silent)
    assert result.reason == "the files of ranks 0 and 1 are exchanged"


def test_an_embedding_row_that_no_prompt_looks_up_is_judged() -> None:
    case = setup("llama-gqa", 2)
    unused = next(i for i in range(3, 120) if i not in case.prompt)
    damaged = {name: case.ranks[0].get(name).clone() for name in case.ranks[0].names()}
    damaged["model.embed_tokens.weight"][unused, 0] *= -1
    result = compare_weights(case.with_ranks([InMemory(damaged), case.ranks[1]]), (), silent)
    assert result.status == "fail" and result.first is not None and result.first.rank == 0
    assert result.reason is not None and f"model.embed_tokens.weight[{unused}, 0] of rank 0" in result.reason


def test_only_some_layers_are_compared_when_asked() -> None:
    case = replace(setup("llama-gqa", 2), layers=(0, 2))
    result = exact(case)
    layers = {f.module.split(".")[2] for f in result.findings if ".layers." in f.module}
    assert result.status == "pass" and layers == {"0", "2"}
    mutant = FAULTS["up-row-shifted"].mutant(case.places(1))
    assert mutant is not None and exact(replace(case, ranks=mutant)).status == "pass"


def test_native_sees_a_swap_of_heads_and_where() -> None:
    case = setup("llama-gqa", 4, torch.bfloat16)
    mutant = FAULTS["heads-swapped-between-ranks"].mutant(case.places(1))
    assert mutant is not None
    result = native(case.with_ranks(mutant), torch.bfloat16, steps := case.teacher_tokens(4), case.run_wide(steps))
    assert result.status == "fail" and result.first is not None and result.metrics["differences"] == 4
    assert result.first.module == "model.layers.1.self_attn.q_proj.weight"
    assert result.reason is not None and "rank 0 gives other bits" in result.reason


def test_the_last_bit_of_an_element_is_seen() -> None:
    """In float32, where it is far below the exact tier's limit."""
    case = setup("llama-gqa", 2)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = case.ranks[1].get(name).clone()
    weight.view(torch.int32)[0, 0] ^= 1
    bad = case.with_ranks([case.ranks[0], replaced(case.ranks[1], {name: weight})])
    result = compare_weights(bad, (), silent)
    assert result.status == "fail" and result.reason is not None
    assert result.reason.startswith(f"{name}[0, 0] of rank 1 is ")


def test_float32_refuses_no_correct_split_whose_weights_lie_far_apart() -> None:
    """Large scores of attention: the last bits of a sum over ranks decide what is attended to."""
    config, tensors = source("qwen2-bias")
    scaled = {key: value * (22 if "q_proj" in key or "k_proj" in key else 1) for key, value in tensors.items()}
    case = replace(setup("qwen2-bias", 4, ranks=cut(scaled, config, 4)), source=InMemory(scaled))
    result = exact(case, float32=True)
    assert result.status == "inconclusive" and result.reason is not None and "leave out --float32" in result.reason
    assert result.metrics["relative_error"] > 1e-5 and exact(case).status == "pass"
    mutant = FAULTS["norm-of-one-rank-stale"].mutant(case.places(1))
    assert mutant is not None and exact(case.with_ranks(mutant), float32=True).status == "fail"


def test_values_that_are_not_finite_are_the_models_own() -> None:
    """A float16 model that overflows unsharded is no failure of its shards."""
    config, tensors = source("llama-gqa")
    scaled = {key: value * (1e5 if "lm_head" in key else 1) for key, value in tensors.items()}
    case = setup("llama-gqa", 2, torch.float16)
    held = [InMemory({k: v.half() for k, v in rank.items()}) for rank in cut(scaled, config, 2)]
    case = replace(case, source=InMemory({k: v.half() for k, v in scaled.items()}), ranks=held)
    assert compare_weights(case, (), silent).status == "pass"
    result = native(case, torch.float16, case.steps, case.run_wide(case.steps))
    assert result.status == "inconclusive" and result.reason is not None
    assert result.reason.startswith("the unsharded model itself gives values that are not finite in float16")


def test_distances_by_hand() -> None:
    r = torch.randn(2, 8, 100, dtype=torch.float64)
    noise = torch.randn_like(r) * 0.1
    found = distances(r, r + noise, r + 2 * noise)
    assert found["sharded_error"] == pytest.approx(2 * found["unsharded_error"], rel=1e-6)
    assert 3.5 < found["kl_sharded"] / found["kl_unsharded"] < 4.2
    assert distances(r, r, r * float("nan"))["sharded_error"] == float("inf")
    assert distances(r, r, r)["top1_sharded"] == 1


WATCHED = ["gpt2", "gpt_neox", "llama-gqa", "opt", "gpt_bigcode-mha", "falcon-mqa"]


@pytest.mark.parametrize(("name", "tp"), in_turn(WATCHED, (1, 2, 4)))
def test_canaries_are_caught(name: str, tp: int) -> None:
    case = setup(name, tp, torch.bfloat16)
    found = exact_canaries(case)
    assert len(found) >= 4 and all(canary.status == "caught" for canary in found)
    found = weights_canaries(case)
    assert len(found) == 3 and all(canary.status == "caught" for canary in found)
    if tp > 1:
        assert [canary.status for canary in native_canaries(case, torch.bfloat16)] == ["caught"]


def test_canaries_that_change_nothing_are_left_out() -> None:
    names = {canary.name for canary in exact_canaries(setup("llama-gqa", 2))}
    assert "wrong-kv-replica" not in names  # 2 KV heads on 2 ranks: no replicas
    assert "wrong-kv-replica" in {canary.name for canary in exact_canaries(setup("llama-gqa", 4))}
    assert not any("bias" in name for name in names)


def test_sequence_parallelism_is_used_when_asked_for_and_not_under_a_probe() -> None:
    case = replace(setup("llama-gqa", 2), sequence_parallel=True)
    used = case.team.run(lambda group: case.sharded(group, torch.float64).scatter)
    probed = case.team.run(lambda group: case.sharded(group, torch.float64, Probe()).scatter)
    assert used == [True, True] and probed == [False, False]
