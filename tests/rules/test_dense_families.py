"""Dense families: the rows of their fused and unusual tensors that a rank holds, sliced by hand, and silent configs.

`test_architectures` splits and merges each of their variants; here is what it cannot say.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tpshard
from tests.helpers.checkpoints import VARIANTS, VOCAB
from tests.helpers.dense_checkpoints import DENSE
from tests.helpers.grids import in_turn, some
from tests.helpers.toys import Tensor, contents, random_tensor, read_all, write_checkpoint
from tpshard.errors import CorruptError, UnsupportedError
from tpshard.execute.publish import Settings
from tpshard.inputs.checkpoint import open_checkpoint
from tpshard.planning.axes import Cut
from tpshard.rules import expression
from tpshard.rules.architecture import Architecture, builtin
from tpshard.rules.classify import classify
from tpshard.storage.safetensors import TensorInfo

Made = Callable[..., Path]
FIRST = {model_type: name for name, (model_type, _) in reversed(DENSE.items())}  # one variant of each family


def rows(tensor: torch.Tensor, *ranges: tuple[int, int]) -> torch.Tensor:
    return torch.cat([tensor[start:stop] for start, stop in ranges])


def rank_file(out: Path, rank: int, tp: int) -> dict[str, torch.Tensor]:
    return load_file(out / f"rank-{rank:05}-of-{tp:05}.safetensors")


# Module of layer 1, tp, and the row ranges of each rank. 8 heads and 2 KV heads; a head is 8 rows, or 16 where head_dim
# says so; ffn is 128. At tp 4 ranks 0 and 1 share a KV head, and 2 and 3.
SLICES: list[tuple[str, str, int, list[list[tuple[int, int]]]]] = [
    # q 0:128, k 128:160, v 160:192.
    (
        "phi3-gqa-head-dim",
        "model.layers.1.self_attn.qkv_proj.weight",
        2,
        [[(0, 64), (128, 144), (160, 176)], [(64, 128), (144, 160), (176, 192)]],
    ),
    (
        "phi3-gqa-head-dim",
        "model.layers.1.self_attn.qkv_proj.weight",
        4,
        [
            [(0, 32), (128, 144), (160, 176)],
            [(32, 64), (128, 144), (160, 176)],
            [(64, 96), (144, 160), (176, 192)],
            [(96, 128), (144, 160), (176, 192)],
        ],
    ),
    # gate 0:128, up 128:256.
    ("phi3", "model.layers.1.mlp.gate_up_proj.weight", 2, [[(0, 64), (128, 192)], [(64, 128), (192, 256)]]),
    ("glm4", "model.layers.1.mlp.gate_up_proj.weight", 2, [[(0, 64), (128, 192)], [(64, 128), (192, 256)]]),
    # q 0:96, k 96:192, v 192:288; 12 heads of 8.
    (
        "mpt-12-heads",
        "transformer.blocks.1.attn.Wqkv.weight",
        2,
        [[(0, 48), (96, 144), (192, 240)], [(48, 96), (144, 192), (240, 288)]],
    ),
    # Four cores of 48 rows, each q, v, k of two heads.
    (
        "codegen",
        "transformer.h.1.attn.qkv_proj.weight",
        8,
        [[(start, start + 8) for start in range(48 * (r // 2) + 8 * (r % 2), 48 * (r // 2 + 1), 16)] for r in range(8)],
    ),
    # One weight for every row of q, of k.
    ("olmo2", "model.layers.1.self_attn.q_norm.weight", 4, [[(0, 16)], [(16, 32)], [(32, 48)], [(48, 64)]]),
    ("olmo2", "model.layers.1.self_attn.k_norm.weight", 4, [[(0, 8)], [(0, 8)], [(8, 16)], [(8, 16)]]),
    # A row for every head.
    ("cohere-qk-norm", "model.layers.1.self_attn.q_norm.weight", 4, [[(0, 2)], [(2, 4)], [(4, 6)], [(6, 8)]]),
    ("cohere-qk-norm", "model.layers.1.self_attn.k_norm.weight", 4, [[(0, 1)], [(0, 1)], [(1, 2)], [(1, 2)]]),
]


@pytest.mark.parametrize(("name", "tensor", "tp", "ranges"), SLICES)
def test_the_rows_of_a_rank(
    name: str,
    tensor: str,
    tp: int,
    ranges: list[list[tuple[int, int]]],
    made: Made,
    quick: Settings,
    tmp_path: Path,
) -> None:
    whole = load_file(made(name) / "model.safetensors")[tensor]
    tpshard.split(made(name), tp, tmp_path / "out", settings=quick)
    for rank, held in enumerate(ranges):
        assert torch.equal(rank_file(tmp_path / "out", rank, tp)[tensor], rows(whole, *held)), f"rank {rank}"


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("stablelm-parallel", ["self_attn.q_layernorm.norms.7.weight", "self_attn.k_layernorm.norms.1.weight"]),
        ("phi-tied-qk-norm", ["self_attn.q_layernorm.weight", "self_attn.k_layernorm.bias", "self_attn.dense.bias"]),
        ("gemma3_text", ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]),
        ("exaone4", ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]),
        ("nemotron-bias", ["input_layernorm.bias", "mlp.down_proj.bias", "self_attn.o_proj.bias"]),
    ],
)
def test_what_every_rank_holds_whole(name: str, whole: list[str], made: Made, quick: Settings, tmp_path: Path) -> None:
    source = load_file(made(name) / "model.safetensors")
    tpshard.split(made(name), 4, tmp_path / "out", settings=quick)
    for rank in range(4):
        held = rank_file(tmp_path / "out", rank, 4)
        for tensor in whole:
            assert torch.equal(held[f"model.layers.0.{tensor}"], source[f"model.layers.0.{tensor}"])


@pytest.mark.parametrize(("name", "widths"), in_turn(list(FIRST.values()), ((2, 4), (4, 2))))
def test_a_reshard_is_a_direct_split(
    name: str, widths: tuple[int, int], made: Made, quick: Settings, tmp_path: Path
) -> None:
    a, b = widths
    tpshard.split(made(name), a, tmp_path / "a", settings=quick)
    tpshard.split(made(name), b, tmp_path / "direct", settings=quick)
    tpshard.reshard(tmp_path / "a", b, tmp_path / "b", settings=quick)
    assert contents(tmp_path / "b") == contents(tmp_path / "direct")


# `test_architectures` holds what was merged to the source's bytes; some of each way to store a layer are loaded too.
@pytest.mark.parametrize(
    "name", some(FIRST.values(), ["phi3", "stablelm-bias", "olmo2", "mpt", "codegen", "xglm", "apertus"])
)
def test_transformers_loads_what_was_merged(name: str, made: Made, quick: Settings, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    def logits(path: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        with torch.no_grad():
            return model(1 + torch.arange(24)[None] * 7 % (VOCAB - 1)).logits

    tpshard.split(made(name), 4, tmp_path / "out", settings=quick)
    tpshard.merge(tmp_path / "out", tmp_path / "merged", settings=quick)
    assert torch.equal(logits(tmp_path / "merged"), logits(made(name)))


def asked(architecture: Architecture) -> set[str]:
    """The config keys that a rules file looks at."""
    texts = [architecture.layers, *(rule.condition or "None" for rule in architecture.rules)]
    texts += [each.condition for each in architecture.biases or ()]
    texts += [str(axis[key]) for axis in architecture.axes.values() for key in ("count", "unit") if key in axis]
    return {"tie_word_embeddings", *(name for text in texts for name in expression.names(text))}


# And those of the first families that multimodal configs nest, which leave out what is as in the class.
@pytest.mark.parametrize("model_type", [*FIRST, "llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_a_silent_config_means_what_transformers_makes_of_it(model_type: str) -> None:
    from transformers import AutoConfig

    cls = type(AutoConfig.for_model(model_type))
    architecture = builtin(model_type)
    meant = {key: getattr(cls, key, None) for key in asked(architecture) - {"model_type"}}
    # Keys of another name that transformers takes too are properties of the class, without a default of their own.
    meant = {key: value for key, value in meant.items() if key not in cls.attribute_map and value}
    assert {key: value for key, value in architecture.defaults.items() if value} == meant


# What files of old versions carry besides: `{}` is the layer. mpt and biogpt never had any.
ROTARY = "model.layers.{}.self_attn.rotary_emb.inv_freq"
OLD_BUFFERS = {FIRST[t]: ROTARY for t in FIRST if t not in ("mpt", "biogpt")}
OLD_BUFFERS |= {"codegen": "transformer.h.{}.attn.causal_mask", "xglm": "model.embed_positions.weights"}


@pytest.mark.parametrize(("name", "buffer"), OLD_BUFFERS.items())
def test_what_old_files_carry_besides_is_a_buffer(name: str, buffer: str, made: Made) -> None:
    checkpoint = open_checkpoint(made(name))
    old = [TensorInfo(tensor, "F32", (4,), "old.bin", 0, 16) for tensor in {buffer.format(0), buffer.format(1)}]
    architecture = builtin(VARIANTS[name].model_type)
    plain = classify(architecture, checkpoint.config, checkpoint.tensors)
    found = classify(architecture, checkpoint.config, [*checkpoint.tensors, *old])
    assert {tensor: found.cuts[tensor] for tensor in plain.cuts} == plain.cuts
    assert all(found.cuts[tensor.name] == Cut("buffer") for tensor in old)


def test_a_codegen_with_code_of_its_own_is_not_guessed(made: Made) -> None:
    checkpoint = open_checkpoint(made("codegen"))
    config = {**checkpoint.config, "auto_map": {"AutoModelForCausalLM": "modeling_codegen.CodeGenForCausalLM"}}
    with pytest.raises(UnsupportedError, match="no codegen rule matches the tensor transformer.h.0.attn.qkv_proj"):
        classify(builtin("codegen"), config, checkpoint.tensors)


INTERNLM2: dict[str, Any] = {
    "model_type": "internlm2",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "bias": True,
}


def internlm2(path: Path, **changes: Any) -> Path:
    """A checkpoint with the names and shapes of InternLM 2's published code, which transformers does not have."""
    config = INTERNLM2 | changes
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    qkv = (config["num_attention_heads"] + 2 * (config["num_key_value_heads"] or 8)) * 8
    layer = {
        "attention.wqkv.weight": (qkv, hidden),
        "attention.wo.weight": (hidden, hidden),
        "feed_forward.w1.weight": (ffn, hidden),
        "feed_forward.w3.weight": (ffn, hidden),
        "feed_forward.w2.weight": (hidden, ffn),
        "attention_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
    }
    if config["bias"]:
        layer |= {"attention.wqkv.bias": (qkv,), "attention.wo.bias": (hidden,)}
    shapes = {"model.tok_embeddings.weight": (VOCAB, hidden), "model.norm.weight": (hidden,)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = (VOCAB, hidden)
    rng = np.random.default_rng(0)
    tensors: dict[str, Tensor] = {name: random_tensor(rng, "BF16", shape) for name, shape in shapes.items()}
    return write_checkpoint(path, config, tensors)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": None, "bias": False}, {"num_key_value_heads": 4, "tie_word_embeddings": True}],
    ids=["gqa-bias", "mha", "tied"],
)
def test_internlm2_by_group(changes: dict[str, Any], tp: int, quick: Settings, tmp_path: Path) -> None:
    model = internlm2(tmp_path / "model", **changes)
    source = load_file(model / "model.safetensors")
    kv = (INTERNLM2 | changes)["num_key_value_heads"] or 8
    tpshard.split(model, tp, tmp_path / "out", settings=quick)
    for rank in range(tp):
        held = rank_file(tmp_path / "out", rank, tp)
        for name in ("weight", "bias"):
            if (wqkv := source.get(f"model.layers.1.attention.wqkv.{name}")) is None:
                continue
            # Per KV group: its q heads, its k, its v.
            grouped = wqkv.view(torch.int16).reshape(kv, 8 // kv + 2, 8, *wqkv.shape[1:])
            heads = range(rank * 8 // tp, (rank + 1) * 8 // tp)
            expected = []
            for group in sorted({head * kv // 8 for head in heads}):
                expected += [grouped[group, head % (8 // kv)] for head in heads if head * kv // 8 == group]
                expected += [grouped[group, -2], grouped[group, -1]]
            assert torch.equal(held[f"model.layers.1.attention.wqkv.{name}"].view(torch.int16), torch.cat(expected))
        share = {
            "attention.wo": (1, 64 // tp),
            "feed_forward.w1": (0, 96 // tp),
            "feed_forward.w3": (0, 96 // tp),
            "feed_forward.w2": (1, 96 // tp),
        }
        for module, (dim, size) in share.items():
            name = f"model.layers.1.{module}.weight"
            part = source[name].narrow(dim, rank * size, size)
            assert torch.equal(held[name].view(torch.int16), part.contiguous().view(torch.int16))
    assert tpshard.check(tmp_path / "out", model, tp=tp, settings=quick).equal
    tpshard.merge(tmp_path / "out", tmp_path / "merged", settings=quick)
    assert read_all(tmp_path / "merged") == read_all(model)
    tpshard.split(model, 6 - tp, tmp_path / "direct", settings=quick)
    tpshard.reshard(tmp_path / "out", 6 - tp, tmp_path / "again", settings=quick)
    assert contents(tmp_path / "again") == contents(tmp_path / "direct")


def test_a_config_that_contradicts_a_fused_tensor_is_refused(quick: Settings, tmp_path: Path) -> None:
    model = internlm2(tmp_path / "model")
    (model / "config.json").write_text((model / "config.json").read_text().replace('heads": 2', 'heads": 4'))
    with pytest.raises(CorruptError, match="contradicts the tensor model.layers.0.attention.wqkv") as error:
        tpshard.split(model, 2, tmp_path / "out", settings=quick)
    assert "heads 8 x 8 + kv 4 x 8 + kv 4 x 8" in str(error.value.expected)
