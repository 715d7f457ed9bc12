"""The decoder against transformers, and its sharded forms against the unsharded one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.checkpoints import DECODED, make, published
from tests.helpers.grids import some
from tests.helpers.small_models import can_be_uneven, reference, relative, run, shards, source, tokens
from tpshard.errors import DifferentError

SHARDINGS = [(2, None), (4, None), (2, (3, 1))]
# A longer sequence changes this one's frequencies, so decoding is no longer the prefill of the same tokens.
CHANGES_WITH_LENGTH = "llama-rope-dynamic"


@pytest.mark.parametrize("name", DECODED)
def test_unsharded_equals_transformers(name: str) -> None:
    model, ids = reference(name), tokens()
    with torch.no_grad():
        first = model(ids[:, :20], use_cache=True)
        wanted = [first.logits]
        for step in torch.chunk(ids[:, 20:], ids.shape[1] - 20, 1):
            wanted.append(model(step, past_key_values=first.past_key_values, use_cache=True).logits)
        whole = reference(name)(ids).logits
    config, tensors = source(name)
    assert relative(run(config, [tensors], ids, dtype=torch.float32)[0], whole) <= 1e-5
    decoded = run(config, [tensors], ids, prefill=20, dtype=torch.float32)[0]
    assert relative(decoded, torch.cat(wanted, 1)) <= 1e-5


# Tensor parallelism of every variant; of every family also with what lies between blocks divided by tokens.
ONE_OF_EACH = {variant.model_type: name for name, variant in reversed(DECODED.items())}.values()
SHARDED = some(
    [(name, sequence) for name in DECODED for sequence in (False, True)],
    [*((name, False) for name in list(DECODED)[::2]), *((name, True) for name in ONE_OF_EACH)],
)


@pytest.mark.parametrize(("name", "sequence_parallel"), SHARDED)
def test_sharded_equals_unsharded(name: str, sequence_parallel: bool) -> None:
    config, tensors = source(name)
    ids = tokens()
    whole = run(config, [tensors], ids)[0]
    stepwise = run(config, [tensors], ids, prefill=21)[0] if name == CHANGES_WITH_LENGTH else whole
    for tp, parts in SHARDINGS:
        if parts and not can_be_uneven(name):
            continue
        ranks = shards(name, tp, parts)
        for logits in run(config, ranks, ids, sequence_parallel=sequence_parallel):
            assert relative(logits, whole) <= 1e-12
        for logits in run(config, ranks, ids, prefill=21, sequence_parallel=sequence_parallel):
            assert relative(logits, stepwise) <= 1e-12


def test_a_verdict_repeats_bit_for_bit() -> None:
    config, _ = source("llama-gqa")
    first, second = (run(config, shards("llama-gqa", 4), tokens(), dtype=torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gpt_neox-tied-nobias", "bloom", "falcon-mqa", "opt"])
def test_published_names_compute_the_same(name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    config, tensors = source(name)
    saved = make(name, tmp_path / "saved", dtype="float32")
    bare = load_file(published(saved, tmp_path / "bare", strip_prefix=True) / "model.safetensors")
    stored = load_file(published(saved, tmp_path / "stored", tied_head_stored=True) / "model.safetensors")
    assert not bare.keys() & tensors.keys()
    whole = run(config, [tensors], tokens())[0]
    assert torch.equal(run(config, [bare], tokens())[0], whole)
    assert torch.equal(run(config, [stored], tokens())[0], whole)


def test_tiled_kv_replicas_are_another_function() -> None:
    config, tensors = source("llama-gqa")
    ranks = shards("llama-gqa", 4)
    for name in [n for n in ranks[0] if n.endswith(("k_proj.weight", "v_proj.weight"))]:
        ranks[1][name], ranks[2][name] = ranks[2][name], ranks[1][name]
    whole = run(config, [tensors], tokens())[0]
    assert relative(run(config, ranks, tokens())[0], whole) > 1e-3


def test_alibi_slopes_follow_the_global_head() -> None:
    """Ranks exchanged as a whole but for the vocabulary: only ALiBi sees which heads sit where."""
    for name, differs in (("bloom-12-heads", True), ("gpt_neox", False)):
        config, tensors = source(name)
        ranks = shards(name, 2)
        for key in [n for n in ranks[0] if ".h." in n or ".layers." in n]:
            ranks[0][key], ranks[1][key] = ranks[1][key], ranks[0][key]
        error = relative(run(config, ranks, tokens())[0], run(config, [tensors], tokens())[0])
        assert (error > 1e-3) is differs


def test_a_missing_tensor_names_rank_and_tensor() -> None:
    config, _ = source("llama-gqa")
    ranks = shards("llama-gqa", 2)
    del ranks[1]["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(DifferentError, match=r"rank 1 has no tensor model\.layers\.2\.mlp\.up_proj\.weight"):
        run(config, ranks, tokens())


def test_shards_of_another_width_are_refused() -> None:
    config, _ = source("llama")
    with pytest.raises(DifferentError, match="rows are too few"):
        run(config, shards("llama", 4)[:2], tokens())
    ranks = shards("llama", 2)
    ranks[0]["model.layers.0.self_attn.k_proj.weight"] = ranks[0]["model.layers.0.self_attn.k_proj.weight"][:12]
    with pytest.raises(DifferentError, match="does not hold whole heads"):
        run(config, ranks, tokens())
