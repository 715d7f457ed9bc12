"""Mistral's own form for vLLM: names, the order of rows, params.json, and what is refused.

What vLLM's own classes hold of it is compared by `make test-engines`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import mistral_form
from tests.helpers.command import fails, succeeds
from tests.helpers.grids import some
from tests.helpers.toys import read_all


@pytest.mark.parametrize("name", some(mistral_form.FOR_ENGINES, ["mistral-tied", "pixtral-tied", "pixtral-large-3"]))
def test_there_and_back(name: str, tmp_path: Path) -> None:
    source, out = made(name, tmp_path), tmp_path / "out"
    succeeds("split", source, "--tp", 2, "--format", "vllm", "-o", out, "--no-fsync")
    succeeds("check", out, "--source", source)
    assert succeeds("verify", out, "--source", source, "--tier", "bytes", "--json").json["verdict"] == "pass"
    succeeds("merge", out, "-o", tmp_path / "merged", "--no-fsync")
    assert read_all(tmp_path / "merged") == read_all(source)


def test_rows_of_q_and_k_are_in_the_order_of_vllms_class(tmp_path: Path) -> None:
    """Of each head the first of every pair, then the second ones; at tp 4 two ranks have the same KV head."""
    source, out = made("mistral", tmp_path), tmp_path / "out"
    succeeds("split", source, "--tp", 4, "--format", "vllm", "-o", out, "--no-fsync")
    whole = load_file(source / "consolidated.safetensors")
    q, k, v = (whole[f"layers.1.attention.w{each}.weight"].unflatten(0, (-1, 32)) for each in "qkv")
    for rank in range(4):
        held = load_file(out / f"model-rank-{rank}-part-0.safetensors")
        mine = [*q[2 * rank : 2 * rank + 2], k[rank // 2]]
        rows = [torch.cat((head[0::2], head[1::2])) for head in mine]
        assert torch.equal(held["model.layers.1.self_attn.qkv_proj.weight"], torch.cat([*rows, v[rank // 2]]))
        assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= held.keys()


def test_latents_stay_in_their_order(tmp_path: Path) -> None:
    source, out = made("mistral-large-3", tmp_path), tmp_path / "out"
    succeeds("split", source, "--tp", 2, "--format", "vllm", "-o", out, "--no-fsync")
    whole, held = load_file(source / "consolidated.safetensors"), load_file(out / "model-rank-1-part-0.safetensors")
    heads = whole["layers.1.attention.wq_b.weight"].chunk(2)[1]
    assert torch.equal(held["model.layers.1.self_attn.mla_attn.q_b_proj.weight"], heads)


def test_a_tower_is_cut_by_its_own_heads(tmp_path: Path) -> None:
    """Its rows stay in their order, also of q and k; what brings its output into the text is whole."""
    source, out = made("pixtral-merged", tmp_path), tmp_path / "out"
    done = succeeds("split", source, "--tp", 4, "--format", "vllm", "-o", out, "--no-fsync")
    assert "--config-format mistral" in done.err + done.out
    whole, held = load_file(source / "consolidated.safetensors"), load_file(out / "model-rank-3-part-0.safetensors")
    layer = "vision_encoder.transformer.layers.1"
    for name, parts in {"attention.qkv_proj": ["wq", "wk", "wv"], "feed_forward.gate_up_proj": ["w1", "w3"]}.items():
        block = name.partition(".")[0]
        mine = [whole[f"{layer}.{block}.{part}.weight"].chunk(4)[3] for part in parts]
        assert torch.equal(held[f"{layer}.{name}.weight"], torch.cat(mine))
    for name, part in {"attention.o_proj": "attention.wo", "feed_forward.down_proj": "feed_forward.w2"}.items():
        assert torch.equal(held[f"{layer}.{name}.weight"], whole[f"{layer}.{part}.weight"].chunk(4, 1)[3])
    layers, ours = ("vision_encoder.transformer.", "language_model."), ("layers.", "tok_", "norm", "output")
    beside = {name for name in whole if not name.startswith((layers[0], *ours))}
    assert beside == {name for name in held if not name.startswith(layers)}
    assert all(torch.equal(held[name], whole[name]) for name in beside)
    q, k, v = (whole[f"layers.1.attention.w{each}.weight"].unflatten(0, (-1, 32)) for each in "qkv")
    rows = [torch.cat((head[0::2], head[1::2])) for head in (*q[6:8], k[1])]
    text = held["language_model.model.layers.1.self_attn.qkv_proj.weight"]
    assert torch.equal(text, torch.cat([*rows, v[1]]))


def test_params_say_the_dtype_and_how_to_load_is_said(tmp_path: Path) -> None:
    """vLLM else takes the widest of all tensors in the files, of which its own scales are F32."""
    source = made("mistral", tmp_path)
    done = succeeds("split", source, "--tp", 2, "--format", "vllm", "-o", tmp_path / "out", "--no-fsync")
    assert "--config-format mistral" in done.err + done.out
    assert told(tmp_path / "out") == told(source) | {"dtype": "bfloat16"}
    more = ("--format", "vllm", "--dtype", "float16", "--no-fsync")
    succeeds("split", source, "--tp", 2, *more, "-o", tmp_path / "cast")
    assert told(tmp_path / "cast")["dtype"] == "float16"
    assert load_file(tmp_path / "cast" / "model-rank-0-part-0.safetensors")["lm_head.weight"].dtype == torch.float16


def test_a_head_that_is_stored_although_it_is_tied(tmp_path: Path) -> None:
    source = made("mistral-tied", tmp_path)
    file = source / "consolidated.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "output.weight": tensors["tok_embeddings.weight"].clone()}, file)
    succeeds("split", source, "--tp", 2, "--format", "vllm", "-o", tmp_path / "out", "--no-fsync")
    assert told(source)["tied_embeddings"] and not told(tmp_path / "out")["tied_embeddings"]


@pytest.mark.parametrize(
    ("kind", "params", "why"),
    [
        ("mixtral", {}, "mistral_native with experts from sharded_state: its class for them reads the configs"),
        (
            "7b",
            {"multimodal": {"whisper_model_args": {}}},
            "mistral_native with multimodal from sharded_state: what its",
        ),
        ("pixtral", {"multimodal": mistral_form.VISION}, "of a picture's tower it reads vision_encoder alone"),
        ("pixtral", {"moe": mistral_form.KINDS["mixtral"]["moe"]}, "does not load mistral_native with experts from"),
        ("pixtral", {"vision_encoder": mistral_form.VISION | {"num_attention_heads": 1}}, "vision heads"),
        ("large 3", {"llama_4_scaling": None}, "its class starts only with it"),
    ],
)
def test_what_vllm_does_not_load_is_refused(
    kind: str, params: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = mistral_form.published(tmp_path / "model", kind, **params)
    assert why in fails(4, "plan", source, "--tp", 2, "--format", "vllm")["message"]


def test_a_head_that_the_class_of_latents_does_not_tie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kind, params = mistral_form.FOR_ENGINES["mistral-large-3"]
    source = mistral_form.published(tmp_path / "model", kind, **params, tied_embeddings=True)
    assert "does not tie the head" in fails(4, "plan", source, "--tp", 2, "--format", "vllm")["message"]


def test_a_text_beside_a_tower_must_say_what_its_class_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kind, params = mistral_form.FOR_ENGINES["pixtral-large-3"]
    source = mistral_form.published(tmp_path / "model", kind, **params | {"llama_4_scaling": None})
    assert "its class starts only with it" in fails(4, "plan", source, "--tp", 2, "--format", "vllm")["message"]


@pytest.mark.parametrize(
    ("kind", "why"), [("7b", "quantised modules of this form"), ("pixtral", "quantised by fp8 was not compared")]
)
def test_quantised_models_are_refused(kind: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = mistral_form.in_fp8(mistral_form.published(tmp_path / "model", kind))
    assert why in fails(4, "plan", source, "--tp", 2, "--format", "vllm")["message"]


def made(name: str, folder: Path) -> Path:
    kind, params = mistral_form.FOR_ENGINES[name]
    return mistral_form.published(folder / "model", kind, **params)


def told(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "params.json").read_text())
    return found
