"""Faults that other tools had, one regression test each: a split that loads and is wrong, or a loss without a word."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tpshard
from tests.helpers.toys import Tensor, bits_of, of_bits, random_tensor, read_all, read_rank, write_checkpoint
from tpshard.errors import CorruptError, DifferentError, TpshardError, UnsupportedError
from tpshard.execute.publish import Settings
from tpshard.report.results import PlanReport
from tpshard.storage import local
from tpshard.storage.files import Files
from tpshard.storage.safetensors import build_header

Made = Callable[..., Path]
HEAD = 8  # of the made LLaMA: head_dim 64 / 8


def rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    return of_bits(tensor.dtype, bits_of(tensor)[start:stop])


@pytest.fixture
def gqa(made: Made) -> Path:
    """A LLaMA with 8 heads, 2 of them KV heads."""
    return made("llama-gqa")


@pytest.mark.parametrize("module", ["k_proj", "v_proj"])
def test_kv_heads_are_repeated_not_tiled_and_head_0_counts(
    module: str, gqa: Path, quick: Settings, tmp_path: Path
) -> None:
    """[0, 0, 1, 1], not [0, 1, 0, 1]; and head 0 is a head, not "none given" (which gave its ranks another)."""
    tpshard.split(gqa, 4, tmp_path / "out", settings=quick)
    name = f"model.layers.1.self_attn.{module}.weight"
    source = read_all(gqa)[name]
    heads = [rows(source, 0, HEAD), rows(source, HEAD, 2 * HEAD)]
    assert heads[0] != heads[1]
    assert [read_rank(tmp_path / "out", rank, 4)[name] for rank in range(4)] == [heads[h] for h in (0, 0, 1, 1)]


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("llama-mha-bias", "model.layers.0.self_attn.o_proj.bias"),
        ("llama-mha-bias", "model.layers.2.mlp.down_proj.bias"),
        ("gpt2", "transformer.h.0.attn.c_proj.bias"),
        ("gpt2", "transformer.h.1.mlp.c_proj.bias"),
        ("opt", "model.decoder.layers.0.self_attn.out_proj.bias"),
        ("bloom", "transformer.h.0.mlp.dense_4h_to_h.bias"),
    ],
)
def test_a_row_parallel_bias_is_whole_on_every_rank(
    variant: str, name: str, made: Made, quick: Settings, tmp_path: Path
) -> None:
    """Not divided, not zero above rank 0: who runs the shards adds it once, after the all-reduce."""
    tpshard.split(made(variant), 4, tmp_path / "out", settings=quick)
    bias = read_all(made(variant))[name]
    assert any(bias.data)
    assert [read_rank(tmp_path / "out", rank, 4)[name] for rank in range(4)] == [bias] * 4


def test_a_fused_qkv_is_not_cut_as_one_block(made: Made, quick: Settings, tmp_path: Path) -> None:
    """Rank 0 of 4 with the first quarter of [q; k; v] would hold 9 q heads' columns and no v at all."""
    tpshard.split(made("gpt2"), 4, tmp_path / "out", settings=quick)
    name = "transformer.h.0.attn.c_attn.weight"
    whole = bits_of(read_all(made("gpt2"))[name])
    held = bits_of(read_rank(tmp_path / "out", 0, 4)[name])
    assert not np.array_equal(held, whole[:, :72])
    assert np.array_equal(held, np.concatenate([block[:, :24] for block in np.split(whole, 3, axis=1)], axis=1))


def test_an_interleaved_qkv_is_not_cut_as_three_blocks(made: Made, quick: Settings, tmp_path: Path) -> None:
    tpshard.split(made("gpt_neox"), 4, tmp_path / "out", settings=quick)
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    whole = read_all(made("gpt_neox"))[name]
    held = read_rank(tmp_path / "out", 1, 4)[name]
    assert held == rows(whole, 48, 96)  # head 1: its q, its k, its v
    assert held != of_bits("F32", np.concatenate([block[16:32] for block in np.split(bits_of(whole), 3)]))


@pytest.mark.parametrize("verb", ["plan", "split"])
def test_a_key_that_no_rule_knows_is_never_dropped(verb: str, gqa: Path, quick: Settings, tmp_path: Path) -> None:
    extra = random_tensor(np.random.default_rng(0), "F32", (4, 4))
    config = json.loads((gqa / "config.json").read_text())
    tensors = read_all(gqa) | {"model.layers.0.self_attn.extra.weight": extra}
    model = write_checkpoint(tmp_path / "model", config, tensors)
    with pytest.raises(UnsupportedError, match="no llama rule matches") as error:
        if verb == "plan":
            tpshard.plan(model, 2)
        else:
            tpshard.split(model, 2, tmp_path / "out", settings=quick)
    assert error.value.tensor == "model.layers.0.self_attn.extra.weight"
    assert not (tmp_path / "out").exists()


def test_a_set_holds_as_many_bytes_as_its_source(made: Made, quick: Settings, tmp_path: Path) -> None:
    """Where nothing is repeated but norms and row biases, and only the vocab is padded, the sum is known."""
    model = made("gpt2")
    tpshard.split(model, 4, tmp_path / "out", settings=quick)
    source = read_all(model)
    once = sum(len(tensor.data) for tensor in source.values())
    repeated = [n for n in source if "ln_" in n or "wpe" in n or n.endswith("c_proj.bias")]
    expected = once + 3 * sum(len(source[name].data) for name in repeated) + 96 * 4  # and one row of padding
    held = [read_rank(tmp_path / "out", rank, 4) for rank in range(4)]
    assert sum(len(tensor.data) for rank in held for tensor in rank.values()) == expected


def verbs(shards: Path, source: Path, out: Path, settings: Settings) -> list[Callable[[], Any]]:
    return [
        lambda: tpshard.merge(shards, out, settings=settings),
        lambda: tpshard.reshard(shards, 2, out, settings=settings),
        lambda: tpshard.check(shards, settings=settings),
        lambda: tpshard.check(shards, source, settings=settings),
    ]


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("verb", range(4))
def test_a_missing_shard_is_an_error_not_zeros(
    rank: int, verb: int, gqa: Path, quick: Settings, tmp_path: Path
) -> None:
    """Neither the first (which read as zeros elsewhere) nor the last (as a shorter tensor)."""
    tpshard.split(gqa, 4, tmp_path / "out", settings=quick)
    (tmp_path / "out" / f"rank-{rank:05}-of-00004.safetensors").unlink()
    with pytest.raises(CorruptError, match=f"not complete: rank {rank} missing"):
        verbs(tmp_path / "out", gqa, tmp_path / "to", quick)[verb]()
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("verb", range(4))
@pytest.mark.parametrize("name", ["rank-00000-of-00004.safetensors", "rank-00000-of-00002.safetensors"])
def test_a_rank_of_another_width_is_refused(name: str, verb: int, gqa: Path, quick: Settings, tmp_path: Path) -> None:
    """Under its own name or another's."""
    tpshard.split(gqa, 4, tmp_path / "out", settings=quick)
    tpshard.split(gqa, 2, tmp_path / "two", settings=quick)
    shutil.copy(tmp_path / "two" / "rank-00000-of-00002.safetensors", tmp_path / "out" / name)
    with pytest.raises(CorruptError, match=f"{name} is not of this set"):
        verbs(tmp_path / "out", gqa, tmp_path / "to", quick)[verb]()


@pytest.mark.parametrize("verb", range(4))
def test_a_rank_of_another_model_is_refused(verb: int, made: Made, quick: Settings, tmp_path: Path) -> None:
    """The same shapes and the same width do not make the same set."""
    model = made("llama-gqa")
    other = write_checkpoint(tmp_path / "other", json.loads((model / "config.json").read_text()), read_all(model))
    tpshard.split(model, 4, tmp_path / "out", settings=quick)
    tpshard.split(other, 4, tmp_path / "theirs", settings=quick)
    shutil.copy(tmp_path / "theirs" / "rank-00001-of-00004.safetensors", tmp_path / "out")
    with pytest.raises(CorruptError, match="rank-00001-of-00004.safetensors is not of this set"):
        verbs(tmp_path / "out", model, tmp_path / "to", quick)[verb]()


def test_rank_files_that_were_exchanged_are_refused(gqa: Path, quick: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tpshard.split(gqa, 4, out, settings=quick)
    (out / "rank-00001-of-00004.safetensors").rename(out / "other")
    (out / "rank-00002-of-00004.safetensors").rename(out / "rank-00001-of-00004.safetensors")
    (out / "other").rename(out / "rank-00002-of-00004.safetensors")
    with pytest.raises(CorruptError, match="rank-00001-of-00004.safetensors") as error:
        tpshard.check(out, settings=quick)
    assert "exchanged" in str(error.value.hint)


def test_replicas_that_differ_are_found(gqa: Path, quick: Settings, tmp_path: Path) -> None:
    """Ranks 0 and 1 share KV head 0: one of them changed is no checkpoint any more."""
    out = tmp_path / "out"
    tpshard.split(gqa, 4, out, settings=quick)
    path = out / "rank-00001-of-00004.safetensors"
    raw = path.read_bytes()
    k = read_rank(out, 1, 4)["model.layers.0.self_attn.k_proj.weight"].data
    assert raw.count(k) == 1
    path.write_bytes(raw.replace(k, bytes([k[0] ^ 1]) + k[1:]))
    with pytest.raises(DifferentError, match="k_proj.weight: ranks that hold the same part of it differ"):
        tpshard.merge(out, tmp_path / "merged", settings=quick)
    with pytest.raises(DifferentError, match="k_proj.weight: ranks that hold the same part of it differ"):
        tpshard.reshard(out, 2, tmp_path / "two", settings=quick)
    assert not (tmp_path / "merged").exists() and not (tmp_path / "two").exists()
    assert len(tpshard.check(out, settings=quick).differences) == 1
    assert len(tpshard.check(out, gqa, settings=quick).differences) == 1


@pytest.mark.parametrize(("tp", "held"), [(2, [126, 125]), (4, [63, 63, 63, 62]), (8, [32] * 7 + [27])])
def test_no_vocab_row_is_lost_and_padding_is_zero(
    tp: int, held: list[int], made: Made, quick: Settings, tmp_path: Path
) -> None:
    model = made("llama")
    tpshard.split(model, tp, tmp_path / "out", settings=quick)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        source = read_all(model)[name]
        parts = [read_rank(tmp_path / "out", rank, tp)[name] for rank in range(tp)]
        assert [part.shape for part in parts] == [(held[0], 64)] * tp  # padded to the same size
        assert b"".join(part.data[: 64 * 4 * n] for part, n in zip(parts, held, strict=True)) == source.data
        assert not any(b"".join(part.data[64 * 4 * n :] for part, n in zip(parts, held, strict=True)))
    tpshard.merge(tmp_path / "out", tmp_path / "merged", settings=quick)
    assert read_all(tmp_path / "merged") == read_all(model)


def test_a_vocab_padded_as_asked_comes_back_unpadded(made: Made, quick: Settings, tmp_path: Path) -> None:
    model = made("gpt2")
    tpshard.split(model, 4, tmp_path / "out", pad_vocab_to=320, settings=quick)
    parts = [read_rank(tmp_path / "out", rank, 4)["transformer.wte.weight"] for rank in range(4)]
    source = read_all(model)["transformer.wte.weight"]
    assert [part.shape for part in parts] == [(80, 96)] * 4
    assert b"".join(part.data for part in parts) == source.data + bytes(69 * 96 * 4)
    assert tpshard.check(tmp_path / "out", model, settings=quick).equal
    tpshard.reshard(tmp_path / "out", 2, tmp_path / "two", settings=quick)
    assert read_rank(tmp_path / "two", 1, 2)["transformer.wte.weight"].shape == (126, 96)
    tpshard.merge(tmp_path / "two", tmp_path / "merged", settings=quick)
    assert read_all(tmp_path / "merged") == read_all(model)


def test_padding_that_is_not_zero_is_found(made: Made, quick: Settings, tmp_path: Path) -> None:
    model, out = made("gpt2"), tmp_path / "out"
    tpshard.split(model, 4, out, settings=quick)
    path = out / "rank-00003-of-00004.safetensors"
    wte = read_rank(out, 3, 4)["transformer.wte.weight"].data
    raw = bytearray(path.read_bytes())
    raw[raw.index(wte) + len(wte) - 1] = 1
    path.write_bytes(raw)
    (difference,) = tpshard.check(out, model, settings=quick).differences
    assert (difference.file, difference.tensor) == (path.name, "transformer.wte.weight")
    assert "first at element [62, 95]" in difference.message


# Memory: other converters need the model, or several times it.

LARGE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


def hollow(path: Path, config: dict[str, Any]) -> Path:
    """A LLaMA of this shape whose weights are holes in a file: they take no disk and read as zeros."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: list[tuple[str, tuple[int, ...]]] = [("embed_tokens", (config["vocab_size"], hidden)), ("norm", (hidden,))]
    for layer in range(config["num_hidden_layers"]):
        shapes += [
            (f"layers.{layer}.{name}", shape)
            for name, shape in {
                "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
                "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            }.items()
        ]  # fmt: skip
    header = build_header([(f"model.{name}.weight", "BF16", shape) for name, shape in shapes], {})
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (path / "model.safetensors").write_bytes(header)
    os.truncate(path / "model.safetensors", len(header) + 2 * sum(int(np.prod(shape)) for _, shape in shapes))
    return path


def test_a_plan_reads_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint of 140 GB less than 1 MB is read, and its plan is small."""
    model = hollow(tmp_path / "model", LARGE)
    assert (model / "model.safetensors").stat().st_size > 130e9
    asked: list[int] = []

    read = local.read_range

    def watched(path: str, begin: int, end: int) -> bytearray:
        asked.append(end - begin)
        return read(path, begin, end)

    def fail(*args: object) -> int:
        raise AssertionError("a plan reads no data")

    monkeypatch.setattr(local, "read_range", watched)
    monkeypatch.setattr(Files, "preadv", fail)
    found: list[PlanReport] = []
    assert peak_of(lambda: found.append(tpshard.plan(model, 8))) < 32_000_000
    assert 0 < sum(asked) < 1_000_000
    (report,) = found
    assert report.rank_bytes == [report.rank_bytes[0]] * 8
    assert sum(report.rank_bytes) > 130e9


def peak_of(call: Callable[[], object]) -> int:
    """The most bytes that Python held at once while the call ran."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def peaks_of_a_model(layers: int, place: Path) -> tuple[int, int, int]:
    """What split, check and merge of a LLaMA with so many layers hold at once."""
    config = {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 1001,
    }  # fmt: skip
    settings = Settings(workers=2, fsync=False)
    model, out, merged = (place / f"{name}{layers}" for name in ("model", "out", "merged"))
    hollow(model, config)
    return (
        peak_of(partial(tpshard.split, model, 4, out, settings=settings)),
        peak_of(partial(tpshard.check, out, model, settings=settings)),
        peak_of(partial(tpshard.merge, out, merged, settings=settings)),
    )


def test_memory_stays_while_the_model_grows(tmp_path: Path) -> None:
    """4 MB and 64 MB: the same few blocks. In processes of their own: elsewhere caches are full of other models."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = pool.starmap(peaks_of_a_model, [(2, tmp_path), (32, tmp_path)], chunksize=1)
    for small, large in zip(*peaks, strict=True):
        assert large < 16_000_000
        assert large < small + 6_000_000  # of which the plan is a part


def test_a_way_out_is_in_every_refusal_of_a_width(gqa: Path) -> None:
    """8 heads on 16 ranks, 128 columns on 3: the message says which tp would do."""
    for tp in (3, 5, 16):
        with pytest.raises(TpshardError) as error:
            tpshard.plan(gqa, tp)
        assert (error.value.exit_code, error.value.expected) == (4, "tp 1, 2, 4 or 8")
        assert "--uneven" in str(error.value.hint)
