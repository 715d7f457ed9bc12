"""Megatron's legacy files, made here of a model's tensors by torch's slices; tests/megatron reads Megatron's own."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.checkpoints import make
from tests.helpers.command import fails, llama, llama_tensors, succeeds, tpshard
from tests.helpers.toys import read_all
from tests.megatron.recorded import RECORDED

LAYERS, VOCAB = 4, 10


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def qkv(source: dict[str, Tensor], at: str) -> Tensor:
    parts = [source[f"{at}self_attn.{name}_proj.weight"].view(2, -1, 16) for name in "qkv"]
    return torch.cat(parts, 1).reshape(-1, 16)


def layer(source: dict[str, Tensor], number: int, tp: int, rank: int) -> Iterator[tuple[str, Tensor]]:
    """A rank's tensors of a layer, under the names of Transformer Engine's modules."""
    at = f"model.layers.{number}."
    yield "self_attention.linear_qkv.layer_norm_weight", source[f"{at}input_layernorm.weight"]
    yield "self_attention.linear_qkv.weight", qkv(source, at).chunk(tp)[rank]
    yield "self_attention.linear_proj.weight", source[f"{at}self_attn.o_proj.weight"].chunk(tp, 1)[rank]
    yield "mlp.linear_fc1.layer_norm_weight", source[f"{at}post_attention_layernorm.weight"]
    halves = [source[f"{at}mlp.{name}_proj.weight"].chunk(tp)[rank] for name in ("gate", "up")]
    yield "mlp.linear_fc1.weight", torch.cat(halves)
    yield "mlp.linear_fc2.weight", source[f"{at}mlp.down_proj.weight"].chunk(tp, 1)[rank]


def written(tp: int, pp: int, vpp: int, **changes: Any) -> None:
    """A LLaMA of 4 layers as Megatron saves it; of virtual stages `model0`, `model1` hold layers that lie apart."""
    llama(Path("model"), tensors=llama_tensors(num_hidden_layers=LAYERS), num_hidden_layers=LAYERS)
    source = load_file("model/model.safetensors")
    args: dict[str, Any] = {
        "num_layers": LAYERS, "hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 4,
        "ffn_hidden_size": 8, "max_position_embeddings": 32, "normalization": "RMSNorm", "swiglu": True,
        "untie_embeddings_and_output_weights": True, "tensor_model_parallel_size": tp, "padded_vocab_size": 16,
        "pipeline_model_parallel_size": pp,
    }  # fmt: skip
    each = LAYERS // (pp * vpp)
    filled = {
        name: torch.cat([source[name], torch.zeros(6, 16)]) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    for stage in range(pp):
        for rank in range(tp):
            chunks: list[dict[str, Any]] = []
            for virtual in range(vpp):
                state: dict[str, Any] = {}
                for local in range(each):
                    held = layer(source, virtual * (LAYERS // vpp) + stage * each + local, tp, rank)
                    state |= {f"decoder.layers.{local}.{name}": tensor.contiguous().clone() for name, tensor in held}
                    state[f"decoder.layers.{local}.mlp.linear_fc1._extra_state"] = None
                chunks.append(state)
            if stage == 0:
                chunks[0]["embedding.word_embeddings.weight"] = (
                    filled["model.embed_tokens.weight"].chunk(tp)[rank].clone()
                )
            if stage == pp - 1:
                chunks[-1]["decoder.final_layernorm.weight"] = source["model.norm.weight"]
                chunks[-1]["output_layer.weight"] = filled["lm_head.weight"].chunk(tp)[rank].clone()
            models = (
                {"model": chunks[0]} if vpp == 1 else {f"model{number}": state for number, state in enumerate(chunks)}
            )
            folder = Path("megatron/release", f"mp_rank_{rank:02}" + (f"_{stage:03}" if pp > 1 else ""))
            folder.mkdir(parents=True)
            optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
            common = {"args": argparse.Namespace(**args | changes), "checkpoint_version": 3.0, "optimizer": optimizer}
            torch.save({**common, **models}, folder / "model_optim_rng.pt")
    Path("megatron/latest_checkpointed_iteration.txt").write_text("release")


@pytest.mark.parametrize(("tp", "pp", "vpp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 2), (1, 4, 1), (4, 1, 1)])
def test_ranks_stages_and_virtual_stages(tp: int, pp: int, vpp: int) -> None:
    """At tp 4 each of the two KV groups is cut into two, as Megatron does it."""
    written(tp, pp, vpp)
    succeeds("merge", "megatron", "-o", "merged", "--vocab-size", VOCAB)
    assert read_all(Path("merged")) == read_all(Path("model"))
    shutil.copy("model/config.json", "megatron")
    succeeds("reshard", "megatron", "--tp", 2, "-o", "two")
    succeeds("check", "two", "--source", "model")


def test_ranks_that_disagree() -> None:
    written(2, 1, 1)
    path = Path("megatron/release/mp_rank_01/model_optim_rng.pt")
    state = torch.load(path, weights_only=False)
    state["model"]["decoder.final_layernorm.weight"] += 1
    torch.save(state, path)
    result = tpshard("merge", "megatron", "-o", "out", "--vocab-size", VOCAB)
    assert result.code == 1 and "model.norm.weight" in result.err


def test_a_rank_that_is_missing() -> None:
    written(2, 2, 1)
    shutil.rmtree("megatron/release/mp_rank_01_000")
    error = fails(3, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)
    assert error["message"] == "mp_rank_01_000 is missing" and "tp 2, pp 2" in error["expected"]


def test_ranks_of_another_mesh() -> None:
    """More of them than the arguments speak of, one whose own speak of others, and fewer layers than they say."""
    written(2, 1, 1)
    shutil.copytree("megatron/release/mp_rank_01", "megatron/release/mp_rank_02")
    error = fails(3, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)
    assert error["message"] == "mp_rank_02 is of another mesh" and "tp 2, pp 1" in error["expected"]
    assert "one run" in error["hint"]
    shutil.rmtree("megatron/release/mp_rank_02")
    path = Path("megatron/release/mp_rank_01/model_optim_rng.pt")
    state = torch.load(path, weights_only=False)
    state["args"].tensor_model_parallel_size = 4
    torch.save(state, path)
    error = fails(3, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)
    assert error["message"] == "mp_rank_01 is of another mesh" and "tp 4" in error["found"]
    shutil.rmtree("megatron")
    shutil.rmtree("model")
    written(1, 1, 1, num_layers=5)
    error = fails(3, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)
    assert "layers of the model" in error["message"] and error["expected"] == "5 layers"


@pytest.mark.parametrize("cut", [True, False])
def test_projections_to_latents_are_cut_or_whole(cut: bool) -> None:
    """Without Transformer Engine's layers, which have them whole on each rank, they are cut like others."""
    make("deepseek_v3", Path("model"))
    succeeds("split", "model", "--tp", 2, "--format", "megatron-legacy", "-o", "megatron")
    Path("megatron/tpshard.json").unlink()
    for rank in range(2) if cut else ():
        path = Path(f"megatron/release/mp_rank_{rank:02}/model_optim_rng.pt")
        state = torch.load(path, weights_only=False)
        for name in [name for name in state["model"] if "_down_proj." in name]:
            state["model"][name] = state["model"][name].chunk(2)[rank].clone()
        torch.save(state, path)
    succeeds("merge", "megatron", "-o", "merged")
    assert read_all(Path("merged")) == read_all(Path("model"))


def test_what_is_not_read() -> None:
    written(1, 1, 1, num_experts=4, expert_tensor_parallel_size=2)
    error = fails(4, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)
    assert "for more ranks than the rest" in error["message"] and "torch_dist" in error["hint"]
    path = Path("megatron/release/mp_rank_00/model_optim_rng.pt")
    torch.save({"model": {}}, path)
    assert "no arguments" in fails(4, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)["message"]
    torch.save([1], path)
    assert "not a checkpoint" in fails(3, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)["message"]
    path.write_bytes(b"")
    assert "archive" in fails(3, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)["message"]
    torch.save({"args": print}, path)
    assert fails(5, "merge", "megatron", "-o", "out", "--vocab-size", VOCAB)["found"].endswith("print")


def test_a_tied_embeddings_copy_on_the_last_stage() -> None:
    written(1, 2, 1, untie_embeddings_and_output_weights=False)
    result = tpshard("merge", "megatron", "-o", "out", "--vocab-size", VOCAB)
    assert result.code == 1 and "model.embed_tokens.weight" in result.err
    path = Path("megatron/release/mp_rank_00_001/model_optim_rng.pt")
    state = torch.load(path, weights_only=False)
    first = torch.load("megatron/release/mp_rank_00_000/model_optim_rng.pt", weights_only=False)
    state["model"]["output_layer.weight"] = first["model"]["embedding.word_embeddings.weight"]
    torch.save(state, path)
    succeeds("merge", "megatron", "-o", "merged", "--vocab-size", VOCAB)
    expected = read_all(Path("model"))
    del expected["lm_head.weight"]
    assert read_all(Path("merged")) == expected
    assert json.loads(Path("merged/config.json").read_text())["tie_word_embeddings"] is True


def test_experts_of_two_ranks() -> None:
    """Sequential experts and grouped ones, numbered from 0 on each rank."""
    model = RECORDED["mixtral-ep2"].write(Path("model"))
    source = {name: tensor.contiguous() for name, tensor in load_file(model / "model.safetensors").items()}
    args = {
        "num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 4,
        "ffn_hidden_size": 8, "max_position_embeddings": 32, "normalization": "RMSNorm", "swiglu": True,
        "untie_embeddings_and_output_weights": True, "expert_model_parallel_size": 2, "num_experts": 4,
    }  # fmt: skip
    for rank in range(2):
        state = {
            "embedding.word_embeddings.weight": source["model.embed_tokens.weight"],
            "output_layer.weight": source["lm_head.weight"],
            "decoder.final_layernorm.weight": source["model.norm.weight"],
        }
        for number in range(2):
            at, into = f"model.layers.{number}.", f"decoder.layers.{number}."
            state[f"{into}self_attention.linear_qkv.layer_norm_weight"] = source[f"{at}input_layernorm.weight"]
            state[f"{into}self_attention.linear_qkv.weight"] = qkv(source, at)
            state[f"{into}self_attention.linear_proj.weight"] = source[f"{at}self_attn.o_proj.weight"]
            state[f"{into}pre_mlp_layernorm.weight"] = source[f"{at}post_attention_layernorm.weight"]
            state[f"{into}mlp.router.weight"] = source[f"{at}block_sparse_moe.gate.weight"]
            for local in range(2):
                expert = {
                    w: source[f"{at}block_sparse_moe.experts.{2 * rank + local}.{w}.weight"] for w in ("w1", "w2", "w3")
                }
                fc1 = torch.cat([expert["w1"], expert["w3"]])
                if number:
                    state[f"{into}mlp.experts.linear_fc1.weight{local}"] = fc1
                    state[f"{into}mlp.experts.linear_fc2.weight{local}"] = expert["w2"]
                else:
                    state[f"{into}mlp.experts.local_experts.{local}.linear_fc1.weight"] = fc1
                    state[f"{into}mlp.experts.local_experts.{local}.linear_fc2.weight"] = expert["w2"]
        folder = Path("megatron", f"mp_rank_00_{rank:03}")
        folder.mkdir(parents=True)
        torch.save({"args": argparse.Namespace(**args), "model": state}, folder / "model_optim_rng.pt")
    succeeds("merge", "megatron", "-o", "merged", "--vocab-size", VOCAB)
    assert read_all(Path("merged")) == read_all(Path("model"))
