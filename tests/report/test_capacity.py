"""Memory and communication against published figures, and against models small enough to count by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

from tests.bench.synthetic import DEEPSEEK_V3, LLAMA_8B, LLAMA_405B, deepseek_tensors, llama_tensors
from tests.helpers import served_checkpoints
from tests.helpers.command import fails, llama, succeeds, tpshard
from tpshard.api.advise import advise
from tpshard.api.convert import plan
from tpshard.errors import UsageError
from tpshard.planning.deal import deal
from tpshard.planning.layout import LogicalTensor, shard
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.report.advice import Devices, advice
from tpshard.report.capacity import Workload, cache_bytes, number_lines, numbers, ring_bytes, traits
from tpshard.report.stage_bytes import like_layers, rank_bytes
from tpshard.rules.architecture import builtin
from tpshard.rules.classify import classify
from tpshard.storage.safetensors import TensorInfo

Shapes = list[tuple[str, str, tuple[int, ...]]]
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000}  # fmt: skip
GPT3 = {"n_embd": 12288, "n_layer": 96, "n_head": 96, "vocab_size": 50257, "n_positions": 2048}


def model(model_type: str, config: dict[str, Any], shapes: Shapes) -> Model:
    """A model of shapes alone."""
    infos = [TensorInfo(name, dtype, shape, "f", 0, 0) for name, dtype, shape in shapes]
    found = classify(builtin(model_type), config, infos)
    tensors = tuple(LogicalTensor(t.name, t.dtype, t.shape, found.cuts[t.name]) for t in infos)
    source = {"name": "m", "repo_id": None}
    return Model(
        tensors, found.axes, found.tied, {}, source, {"model_type": model_type}, config=config,
        layers=found.layers, experts=found.experts,
    )  # fmt: skip


def rank_weights(built: Model, tp: int) -> list[int]:
    """Bytes of tensors that each rank of one stage holds."""
    return rank_bytes(like_layers(built), tp, 1, "native").of(None)


def made_llama(config: dict[str, Any]) -> Model:
    return model("llama", {"model_type": "llama", **config}, llama_tensors(config))


def gpt3() -> Model:
    """GPT-3 175B as GPT-2 has its tensors, in fp16."""
    d, vocab = GPT3["n_embd"], GPT3["vocab_size"]
    shapes: Shapes = [("transformer.wte.weight", "F16", (vocab, d)), ("transformer.wpe.weight", "F16", (2048, d))]
    for layer in range(GPT3["n_layer"]):
        for name, shape in {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, 4 * d),
                            "mlp.c_proj": (4 * d, d), "ln_1": (d,), "ln_2": (d,)}.items():  # fmt: skip
            shapes.append((f"transformer.h.{layer}.{name}.weight", "F16", shape))
            shapes.append((f"transformer.h.{layer}.{name}.bias", "F16", (shape[-1],)))
    shapes += [("transformer.ln_f.weight", "F16", (d,)), ("transformer.ln_f.bias", "F16", (d,))]
    return model("gpt2", {"model_type": "gpt2", **GPT3}, shapes)


@pytest.mark.parametrize(
    ("made", "tp", "total", "rank"),
    [(gpt3, 4, 350e9, 87.5e9), (lambda: made_llama(LLAMA_70B), 4, 140e9, 35e9),
     (lambda: made_llama(LLAMA_405B), 8, 810e9, 101.25e9)],
    ids=["175B", "Llama-2-70B", "Llama-3.1-405B"],
)  # fmt: skip
def test_weights_are_the_published_sizes(made: Any, tp: int, total: float, rank: float) -> None:
    """The figures are of rounded parameter counts, so to two digits."""
    built = made()
    assert rank_weights(built, 1) == [pytest.approx(total, rel=0.015)]
    assert rank_weights(built, tp) == [pytest.approx(rank, rel=0.015)] * tp


@pytest.mark.parametrize(("config", "tokens", "gib"), [(LLAMA_8B, 128_000, 15.62), (LLAMA_70B, 16_000, 4.88)])
def test_the_cache_is_the_published_size(config: dict[str, Any], tokens: int, gib: float) -> None:
    """Of "Llama 3.1 - 405B, 70B & 8B with multilinguality and long context"; the two 70B have the same attention."""
    built = made_llama(config)
    (cache,) = cache_bytes(built, traits(built), deal(built.axes, Mesh(1)), Workload(seq=tokens))
    assert cache / 2**30 == pytest.approx(gib, abs=0.006)


def test_llama_405b_in_bf16_does_not_fit_on_one_machine_of_8_devices_of_80_gb() -> None:
    """As its paper says; on 16, it does."""
    built = made_llama(LLAMA_405B)
    few = advice(built, Devices(8), Workload(gpu_memory=80 * 10**9))
    assert few.take is few.mesh is None
    assert "does not fit on 8 devices: at tp 4 x pp 2 each needs 101.7 GB, 29.7 GB more" in few.reason
    assert few.choices[7].total == pytest.approx(101.7e9, rel=0.001)
    assert few.possible_above == (16, 32, 64, 128)
    many = advice(built, Devices(16), Workload(gpu_memory=80 * 10**9))
    assert many.take == 16 and "one copy" in many.reason and many.mesh and many.mesh.mesh == Mesh(16)


def test_an_all_reduce_carries_activations() -> None:
    """2 layers x 2 sums x 16 numbers of 4 bytes, of which each of 4 ranks sends 2 x 3 / 4."""
    config = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 10}  # fmt: skip
    shapes = [(name, "F32", shape) for name, _, shape in llama_tensors(config)]
    facts = traits(model("llama", config, shapes))
    assert (facts.layers, facts.sums, facts.hidden, facts.dtype) == (2, 4, 16, "F32")
    assert ring_bytes(facts, 4, 1) == 4 * 16 * 4 * 2 * 3 // 4
    assert ring_bytes(facts, 4, 30) == 30 * ring_bytes(facts, 4, 1)
    assert ring_bytes(facts, 1, 30) == 0


def test_latent_attention_is_cached_whole_by_every_rank() -> None:
    """DeepSeek-V2's paper: the latent and one rotary key; the layer beyond the last decodes nothing."""
    config = DEEPSEEK_V3 | {"n_routed_experts": 2}
    shapes = deepseek_tensors(config)
    alone = [shape for shape in shapes if ".layers.61." not in shape[0]]
    built = model("deepseek_v3", config | {"num_nextn_predict_layers": 0}, alone)
    facts = traits(built)
    assert (facts.latent, facts.layers, facts.sums, facts.cache_axis) == (512 + 64, 61, 122, None)
    caches = cache_bytes(built, facts, deal(built.axes, Mesh(4)), Workload(batch=2, seq=10))
    assert caches == [2 * 10 * 61 * 576 * 2] * 4
    assert traits(model("deepseek_v3", config, shapes)) == facts


def test_a_layer_that_attends_twice_caches_twice(tmp_path: Path) -> None:
    """LongCat: 2 layers x 2 attentions x (16 + 8) numbers; what predicts a further token decodes nothing."""
    found = plan(served_checkpoints.make("longcat_flash", tmp_path / "m"), 2, workload=Workload(batch=3, seq=10))
    cache = found.numbers()["kv_cache"]
    assert (cache["layers"], cache["caches"], cache["latent"], cache["dtype"]) == (2, 4, 24, "F32")
    assert [rank["kv_cache"] for rank in found.numbers()["ranks"]] == [3 * 10 * 2 * 2 * (16 + 8) * 4] * 2
    assert any(line.endswith("2 layers with 4 caches, F32") for line in number_lines(found.numbers()))


def test_linear_attention_and_mixers_cache_no_tokens(tmp_path: Path, made: Callable[..., Path]) -> None:
    """Of 2 layers of Kimi Linear the last keeps a latent of 16 + 8; of Jamba's the last has keys and values."""
    work = Workload(batch=3, seq=10)
    found = plan(served_checkpoints.make("kimi_linear", tmp_path / "m"), 2, workload=work).numbers()
    assert (found["kv_cache"]["layers"], found["kv_cache"]["caches"], found["kv_cache"]["latent"]) == (1, 1, 24)
    assert [rank["kv_cache"] for rank in found["ranks"]] == [3 * 10 * 1 * (16 + 8) * 4] * 2
    assert found["communication"]["all_reduces"] == 4  # one behind each attention, one behind each feed-forward
    config = json.loads((made("jamba") / "config.json").read_text())
    heads, width = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
    found = plan(made("jamba"), 1, workload=work).numbers()
    assert (found["kv_cache"]["layers"], found["kv_cache"]["axis"]) == (1, "kv")
    assert [rank["kv_cache"] for rank in found["ranks"]] == [3 * 10 * 1 * 2 * heads * width * 4]


def test_kv_heads_are_cached_where_they_are() -> None:
    """8 KV heads: a half at tp 2; whole heads, repeated, at tp 16; halves again with a cache of a byte a number."""
    built = made_llama(LLAMA_8B)
    facts = traits(built)

    def each(tp: int, kv_dtype: str | None = None) -> list[int]:
        return cache_bytes(built, facts, deal(built.axes, Mesh(tp)), Workload(1, 100, kv_dtype))

    (whole,) = each(1)
    assert each(2) == [whole // 2] * 2 and each(16) == [whole // 8] * 16
    assert each(2, "float8") == [whole // 4] * 2 and each(2, "float32") == [whole] * 2


@pytest.mark.parametrize(
    "name",
    ["llama-gqa", "gpt2", "gpt_neox", "bloom", "gptj", "opt-350m-like", "falcon-mqa", "gpt_bigcode-mqa", "mpt",
     "codegen", "mixtral", "deepseek_v3"],
)  # fmt: skip
def test_the_cache_is_as_large_as_that_of_transformers(name: str, made: Callable[..., Path]) -> None:
    """A model of transformers is run on 8 tokens, and its cache measured; so are its layers and hidden size."""
    import torch

    from tests.helpers.checkpoints import build

    with torch.no_grad():
        cache = build(name).eval()(torch.arange(3, 11)[None], use_cache=True).past_key_values
    held = [state for layer in cache.layers for state in (layer.keys, layer.values)]
    found = plan(made(name), 1, workload=Workload(batch=1, seq=8)).numbers()
    assert found["ranks"][0]["kv_cache"] == sum(state.numel() * state.element_size() for state in held)
    assert found["kv_cache"]["layers"] == len(cache.layers)
    config = json.loads((made(name) / "config.json").read_text())
    assert found["communication"]["hidden"] == next(
        config[key] for key in ("hidden_size", "n_embd", "d_model") if key in config
    )


def test_weights_by_groups_are_those_of_the_layout() -> None:
    built = made_llama(LLAMA_8B | {"num_hidden_layers": 2, "vocab_size": 1001})
    layout = shard(built.tensors, built.axes, deal(built.axes, Mesh(16)))
    elements = [sum(prod(stored.shape) for stored in rank) for rank in layout]
    assert rank_weights(built, 16) == [2 * count for count in elements]


def test_numbers_say_what_fits_and_how_long_it_takes() -> None:
    built = made_llama(LLAMA_8B)
    work = Workload(batch=2, seq=1000, gpu_memory=10**10, bandwidth=450e9)
    found = numbers(built, deal(built.axes, Mesh(2)), rank_weights(built, 2), work)
    first, sent = found["ranks"][0], found["communication"]
    assert first["total"] == first["weights"] + first["kv_cache"] and first["free"] == 10**10 - first["total"]
    assert first["fits"]
    tight = numbers(built, deal(built.axes, Mesh(2)), rank_weights(built, 2),
                    dataclasses.replace(work, gpu_memory=first["total"] + 1))  # fmt: skip
    assert not tight["ranks"][0]["fits"] and tight["ranks"][0]["free"] == 1
    assert sent["bytes_per_prompt"] == 2000 * sent["bytes_per_token"] == 2000 * 64 * 4096 * 2
    assert sent["seconds_per_prompt"] == pytest.approx(sent["bytes_per_prompt"] / 450e9)
    assert sent["seconds_per_token"] == pytest.approx(2 * sent["bytes_per_token"] / 450e9)


def test_advice_prefers_a_tp_that_leaves_no_device_idle() -> None:
    """24 heads on 8 devices: 3 ranks would do, and 2 devices would stay idle."""
    config = LLAMA_8B | {"num_attention_heads": 24, "num_key_value_heads": 24, "hidden_size": 3072}
    config |= {"intermediate_size": 12288}
    built = made_llama(config)
    need = advice(built, Devices(8), Workload(gpu_memory=10**12)).choices
    assert [choice.tp for choice in need if choice.possible] == [1, 2, 3, 4, 6, 8]
    assert "24 heads, 24 kv, 12288 ffn on 5 ranks would be cut" in need[4].reason
    found = advice(built, Devices(8), Workload(gpu_memory=int(need[2].total / 0.9) + 2))
    assert found.choices[2].fits and not found.choices[1].fits
    assert found.take == 4 and "none idle" in found.reason and "2 copies" in found.reason
    assert advice(built, Devices(3), Workload(gpu_memory=int(need[2].total / 0.9) + 2)).take == 3


def test_plan_shows_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama(Path("m"))
    options = ("plan", "m", "--tp", "4", "--batch", 2, "--seq", "8", "--gpu-memory", "0.00001", "--bandwidth", "1")
    text = succeeds(*options).out
    found = succeeds(*options, "--json").json["numbers"]
    assert (found["batch"], found["seq"], found["gpu_memory"]) == (2, 8, 10_000)
    assert [rank["kv_cache"] for rank in found["ranks"]] == [2 * 8 * 2 * (2 * 4) * 4] * 4
    assert found["communication"]["all_reduces"] == 4 and found["communication"]["bytes_per_token"] == 384
    assert f"each: {found['ranks'][0]['weights'] / 1000:.1f} kB weights + 1.0 kB KV cache" in text
    assert "ranks 0-3" in text and "fits, " in text and "4 all-reduces of 16 numbers a token" in text
    fails(2, "plan", "m", "--tp", 2, "--gpu-memory", "much")
    fails(2, "plan", "m", "--tp", 2, "--bandwidth", "0")


def test_advise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama(Path("m"))
    result = succeeds("advise", "m", "--gpus", 4, "--gpu-memory", 80)
    assert "take tp 1: the fewest devices that hold it, none idle: 4 copies of the model, no comm" in result.out
    assert "not possible: tp 3 (4 heads, 2 kv, 8 ffn do not divide)" in result.out.splitlines()
    line = next(line for line in result.out.splitlines() if line.startswith("tp 4 "))
    assert "  fits: " in line and "each of 2 kv on 2 ranks; vocab padded to 12" in line
    assert "next: tpshard plan m --tp 1" in result.err
    found = succeeds("advise", "m", "--gpus", 4, "--gpu-memory", 80, "--json").json
    assert found["take"] == 1 and [choice["possible"] for choice in found["choices"]] == [True, True, False, True]


def test_advise_ends_with_1_where_nothing_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama(Path("m"))
    result = tpshard("advise", "m", "--gpus", 2, "--gpu-memory", "0.000001", "--json")
    assert result.code == 1 and result.json["take"] is None
    shorts = [choice["short"] for choice in result.json["choices"]]
    totals = [choice["total"] for choice in result.json["choices"]]
    assert shorts == [total - 900 for total in totals] and "more than it has room for" in result.json["reason"]


@pytest.mark.parametrize(
    "given", [{"kv_dtype": "int3"}, {"batch": 0}, {"seq": -1}, {"gpu_memory": 0}, {"bandwidth": 0}]
)
def test_a_workload_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(given))}"):
        Workload(**given)


def test_advice_needs_devices_and_their_memory(tmp_path: Path) -> None:
    for gpus, work in ((8, Workload()), (0, Workload(gpu_memory=10**9))):
        with pytest.raises(UsageError, match="advice needs devices"):
            advise(llama(tmp_path / "m"), gpus, work)
