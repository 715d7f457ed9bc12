"""Every built-in family on real checkpoints: what each rank holds, against the family's own arithmetic in NumPy.

`reference` knows how each model's code reads its fused tensors, and cuts heads, KV heads, feed-forward columns and
vocab rows by hand. It shares nothing with the rules, which must come to the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tpshard
from tests.helpers import grids
from tests.helpers.checkpoints import BUFFERS, DECODED, FAMILIES, VOCAB, sharded
from tests.helpers.checkpoints import VARIANTS as ALL
from tests.helpers.moe_checkpoints import MOE
from tests.helpers.newer_checkpoints import NEWER
from tests.helpers.toys import (
    Bits,
    Tensor,
    bits_of,
    contents,
    metadata,
    of_bits,
    random_tensor,
    read,
    read_all,
    read_rank,
    write_checkpoint,
)
from tpshard.errors import UnsupportedError
from tpshard.execute.publish import Settings
from tpshard.inputs.checkpoint import open_checkpoint
from tpshard.inputs.model import from_checkpoint
from tpshard.planning.axes import Cut
from tpshard.rules.architecture import all_builtin

VARIANTS = {name: variant for name, variant in ALL.items() if name not in MOE | NEWER}  # those have tests of their own
Made = Callable[..., Path]
Ranges = Sequence[tuple[int, int]]

VOCAB_MODULES = {"embed_tokens", "wte", "embed_in", "word_embeddings", "lm_head", "embed_out", "output_projection"}
COLUMN = {"gate_proj", "up_proj", "c_fc", "fc_in", "fc1", "dense_h_to_4h"}
ROW = {"down_proj", "mlp.c_proj", "fc_out", "fc2", "dense_4h_to_h"}
OUTPUT = {"o_proj", "out_proj", "attn.c_proj", "attention.dense", "self_attention.dense", "self_attn.dense"}
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
SPLIT_NORMS = {"olmo2", "olmo3", "cohere"}  # families with a weight of its own for every head of q and k


@dataclass(frozen=True)
class Numbers:
    """What a config says, in one family's keys or another's."""

    family: str
    heads: int
    kv: int
    ffn: int
    vocab: int
    layers: int

    @staticmethod
    def of(config: Mapping[str, Any]) -> Numbers:
        family = config["model_type"]
        heads = next(config[key] for key in HEADS if key in config)
        hidden = next(config[key] for key in ("hidden_size", "n_embd", "d_model") if key in config)
        kv = config.get("num_key_value_heads") or heads
        if family == "falcon":
            kv = config["num_kv_heads"] if config["new_decoder_architecture"] else 1 if config["multi_query"] else heads
        elif family == "gpt_bigcode":
            kv = 1 if config["multi_query"] else heads
        ffn = next((config[key] for key in ("ffn_dim", "ffn_hidden_size", "n_inner") if config.get(key)), None)
        ffn = ffn or config.get("intermediate_size") or 4 * hidden
        layers = next(config[key] for key in LAYERS if key in config)
        return Numbers(family, heads, kv, ffn, config["vocab_size"], layers)


def in_turn(count: int, tp: int) -> Ranges:
    """`count` things dealt to ranks one after another, the first ranks getting one more."""
    parts = np.array_split(np.arange(count), tp)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]


@dataclass(frozen=True)
class Dealt:
    """Each rank's heads, KV heads, columns and vocab rows."""

    heads: Ranges
    kv: Ranges
    ffn: Ranges
    vocab: Ranges

    @staticmethod
    def of(numbers: Numbers, tp: int) -> Dealt:
        each = numbers.heads // numbers.kv
        if numbers.kv >= tp:
            kv = in_turn(numbers.kv, tp)
        elif tp % numbers.kv == 0:
            kv = [(rank * numbers.kv // tp, rank * numbers.kv // tp + 1) for rank in range(tp)]
        else:  # each rank has the KV heads of its q heads
            heads = in_turn(numbers.heads, tp)
            kv = [(first // each, (last - 1) // each + 1) for first, last in heads]
            return Dealt(heads, kv, in_turn(numbers.ffn, tp), in_turn(-(-numbers.vocab // tp) * tp, tp))
        heads = []
        for rank, (start, stop) in enumerate(kv):
            sharing = [other for other, held in enumerate(kv) if held == (start, stop)]
            a, b = in_turn((stop - start) * each, len(sharing))[sharing.index(rank)]
            heads.append((start * each + a, start * each + b))
        return Dealt(heads, kv, in_turn(numbers.ffn, tp), in_turn(-(-numbers.vocab // tp) * tp, tp))


def units(array: Bits, dim: int, count: int, held: tuple[int, int]) -> Bits:
    """Some of `count` equal units along a dim."""
    size = array.shape[dim] // count
    assert array.shape[dim] == size * count
    return array.take(range(held[0] * size, held[1] * size), axis=dim)


def fused(array: Bits, numbers: Numbers, heads: tuple[int, int], kv: tuple[int, int], weight: bool) -> Bits:
    """A rank's share of a fused q, k, v, as the model's code takes the whole apart."""
    if numbers.family == "gpt2":  # Conv1D: [in, 3 blocks]
        dim = 1 if weight else 0
        return np.concatenate([units(block, dim, numbers.heads, heads) for block in np.split(array, 3, dim)], dim)
    if numbers.family in ("phi3", "mpt"):
        sizes = [numbers.heads, numbers.kv, numbers.kv]
        unit = len(array) // sum(sizes)
        blocks = np.split(array, [sizes[0] * unit, (sizes[0] + sizes[1]) * unit])
        return np.concatenate([units(b, 0, n, held) for b, n, held in zip(blocks, sizes, (heads, kv, kv), strict=True)])
    if numbers.family == "codegen":  # four blocks, each q, v, k of a quarter of the heads
        quarter = numbers.heads // 4
        blocks = np.split(array, 12)
        first = [max(0, heads[0] - block // 3 * quarter) for block in range(12)]
        last = [min(quarter, heads[1] - block // 3 * quarter) for block in range(12)]
        return np.concatenate(
            [units(b, 0, quarter, (a, z)) for b, a, z in zip(blocks, first, last, strict=True) if a < z]
        )
    rest = array.shape[1:]
    groups, each = numbers.kv, numbers.heads // numbers.kv
    grouped = array.reshape(groups, each + 2, -1, *rest)  # each group: its q heads, its k, its v
    assert kv[0] == heads[0] // each
    parts = []
    for group in range(*kv):
        q = [h for h in range(*heads) if h // each == group]
        parts += [grouped[group, h % each] for h in q] + [grouped[group, each], grouped[group, each + 1]]
    return np.concatenate(parts)


def reference(name: str, tensor: Tensor, numbers: Numbers, dealt: Dealt, rank: int) -> Tensor:
    """What a rank must hold of a tensor."""
    array = bits_of(tensor)
    *path, module, suffix = f".{name}".split(".")
    weight = suffix == "weight"
    qualified = f"{path[-1]}.{module}"
    conv1d = numbers.family == "gpt2" and weight
    if module in VOCAB_MODULES:
        start, stop = dealt.vocab[rank]
        array = np.concatenate([array, np.zeros((dealt.vocab[-1][1] - len(array), *array.shape[1:]), dtype=np.uint8)])
        array = array[start:stop]
    elif module in ("c_attn", "query_key_value", "qkv_proj", "Wqkv"):
        array = fused(array, numbers, dealt.heads[rank], dealt.kv[rank], weight)
    elif suffix == "sinks" or module == "q_proj" or (module == "q_norm" and numbers.family in SPLIT_NORMS):
        array = units(array, 0, numbers.heads, dealt.heads[rank])
    elif module in ("k_proj", "v_proj") or (module == "k_norm" and numbers.family in SPLIT_NORMS):
        array = units(array, 0, numbers.kv, dealt.kv[rank])
    elif module == "gate_up_proj":
        array = np.concatenate([units(block, 0, numbers.ffn, dealt.ffn[rank]) for block in np.split(array, 2)])
    elif module in COLUMN:
        array = units(array, 1 if conv1d else 0, numbers.ffn, dealt.ffn[rank])
    elif weight and {module, qualified} & OUTPUT:
        array = units(array, 0 if conv1d else 1, numbers.heads, dealt.heads[rank])
    elif weight and {module, qualified} & ROW:
        array = units(array, 0 if conv1d else 1, numbers.ffn, dealt.ffn[rank])
    return of_bits(tensor.dtype, array)


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def compare_with_reference(model: Path, out: Path, tp: int) -> None:
    numbers = Numbers.of(config_of(model))
    dealt = Dealt.of(numbers, tp)
    source = read_all(model)
    for rank in range(tp):
        held = read_rank(out, rank, tp)
        assert set(held) == set(source)
        for name, tensor in source.items():
            assert held[name] == reference(name, tensor, numbers, dealt, rank), f"rank {rank}: {name}"


# All at 4 ranks, where KV heads are replicated and vocabularies padded; of each family one, in turn, at 1 and at 2.
FIRST = list({variant.model_type: name for name, variant in reversed(VARIANTS.items())}.values())
THERE_AND_BACK = grids.some(
    [(name, tp) for name in VARIANTS for tp in (1, 2, 4)],
    [
        *((name, 4) for name in {*FIRST, *list(VARIANTS)[::6]}),
        *grids.in_turn(FIRST[::4], (1, 2)),
        *((name, 2) for name in FIRST[2::4]),
    ],
)


@pytest.mark.parametrize(("name", "tp"), THERE_AND_BACK)
def test_a_variant_there_and_back(name: str, tp: int, made: Made, quick: Settings, tmp_path: Path) -> None:
    model, out, merged = made(name), tmp_path / "out", tmp_path / "merged"
    tpshard.split(model, tp, out, settings=quick)
    compare_with_reference(model, out, tp)
    assert tpshard.check(out, model, tp=tp, settings=quick).equal
    tpshard.merge(out, merged, settings=quick)
    assert read_all(merged) == read_all(model)
    assert metadata(merged / "model.safetensors") == {"format": "pt"}
    assert contents(merged).keys() == contents(model).keys()
    assert all((merged / file.name).read_bytes() == file.read_bytes() for file in model.glob("*.json"))


@pytest.mark.parametrize("name", grids.one_in(3, list(VARIANTS)))
def test_three_ranks_share_unevenly_what_no_rule_repeats(
    name: str, made: Made, quick: Settings, tmp_path: Path
) -> None:
    model, out, merged = made(name), tmp_path / "out", tmp_path / "merged"
    numbers = Numbers.of(config_of(model))
    if numbers.heads % 3 or numbers.ffn % 3:
        with pytest.raises(UnsupportedError, match="on 3 ranks: .* is not a multiple of 3") as error:
            tpshard.split(model, 3, out, settings=quick)
        assert str(error.value.expected).startswith("tp 1, 2")
    tpshard.split(model, 3, out, uneven=True, settings=quick)
    compare_with_reference(model, out, 3)
    tpshard.merge(out, merged, settings=quick)
    assert read_all(merged) == read_all(model)


@pytest.mark.parametrize(
    ("name", "tensor", "sizes"),
    [
        ("gpt2", "transformer.h.1.attn.c_proj.weight", [6 * 8, 4 * 8, 2 * 8]),  # 12 heads: 6, 3.6, 2.4
        ("gpt2", "transformer.h.1.attn.c_attn.bias", [18 * 8, 12 * 8, 6 * 8]),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", [192, 115, 77]),
        ("gpt2", "transformer.wte.weight", [126, 76, 50]),
        ("llama", "model.layers.2.self_attn.q_proj.weight", [4 * 8, 2 * 8, 2 * 8]),  # 8 heads: 4, 2.4, 1.6
        ("gpt_bigcode-mqa", "transformer.h.0.attn.c_attn.bias", [6 * 8, 4 * 8, 4 * 8]),
    ],
)
def test_shares_by_weight_of_the_devices(
    name: str, tensor: str, sizes: list[int], made: Made, quick: Settings, tmp_path: Path
) -> None:
    model, out = made(name), tmp_path / "out"
    tpshard.split(model, 3, out, shares=["0.5", "0.3", "0.2"], settings=quick)
    whole = read_all(model)[tensor].shape
    held = [read_rank(out, rank, 3)[tensor].shape for rank in range(3)]
    dim = next(dim for dim in range(len(whole)) if held[0][dim] != whole[dim])
    assert [shape[dim] for shape in held] == sizes
    assert tpshard.check(out, model, settings=quick).equal
    tpshard.merge(out, tmp_path / "merged", settings=quick)
    assert read_all(tmp_path / "merged") == read_all(model)


RESHARDED = ["gpt2", "gpt_neox-seq-residual", "falcon-mqa", "opt-350m-like", "llama-mha-bias"]
WIDTHS = [(1, 4), (4, 1), (2, 4), (4, 2), (4, 3), (3, 2)]


RESHARDS = grids.some(
    [(name, widths) for name in RESHARDED for widths in WIDTHS],
    [(name, WIDTHS[(i + j) % 6]) for i, name in enumerate(RESHARDED) for j in (0, 3)],
)


@pytest.mark.parametrize(("name", "widths"), RESHARDS)
def test_a_reshard_is_a_direct_split(
    name: str, widths: tuple[int, int], made: Made, quick: Settings, tmp_path: Path
) -> None:
    model, (a, b) = made(name), widths
    tpshard.split(model, a, tmp_path / "a", uneven=a == 3, settings=quick)
    tpshard.split(model, b, tmp_path / "direct", uneven=b == 3, settings=quick)
    tpshard.reshard(tmp_path / "a", b, tmp_path / "b", uneven=b == 3, settings=quick)
    assert contents(tmp_path / "b") == contents(tmp_path / "direct")


def classified(path: Path) -> dict[str, Cut]:
    """Every tensor's cut, under its name with the prefix."""
    config = config_of(path)
    model = from_checkpoint(open_checkpoint(path))
    family = {"RefinedWeb": "falcon", "RefinedWebModel": "falcon"}.get(config["model_type"], config["model_type"])
    keep = (FAMILIES[family].prefix, f"{FAMILIES[family].head}.")
    return {
        tensor.name if tensor.name.startswith(keep) else keep[0] + tensor.name: tensor.cut for tensor in model.tensors
    }


PUBLISHED: dict[str, list[str]] = {
    "strip_prefix": list(VARIANTS),
    "base_only": ["gpt2", "opt", "bloom", "gpt_neox", "llama-gqa", "phi", "mpt", "gemma3_text"],
    "old_keys": [name for name in DECODED if name != "falcon-new-one-norm"],  # newer than those keys
    "tied_head_stored": [
        "llama-tied", "qwen2-tied", "qwen3-tied-bias", "gemma2", "gpt2", "gpt_neox-tied-nobias", "gpt_bigcode-mqa",
        "gpt_neo", "bloom", "falcon-new", "opt", "phi-tied-qk-norm", "phi4-mini", "gemma", "gemma3_text", "starcoder2",
        "cohere", "cohere2", "granite-tied", "smollm3", "mpt",
    ],
    "buffers": ["llama-mha-bias", "gpt2", "gptj", "gpt_neo", "gpt_neox"],
}  # fmt: skip
CASES = [(name, key) for key, names in PUBLISHED.items() for name in names]


@pytest.mark.parametrize(("name", "key"), CASES)
def test_a_published_file_is_cut_like_a_saved_one(name: str, key: str, made: Made) -> None:
    plain, found = classified(made(name)), classified(made(name, **{key: True}))
    extra = {tensor: cut for tensor, cut in found.items() if tensor not in plain}
    assert {tensor: cut for tensor, cut in found.items() if tensor in plain} == {
        tensor: cut for tensor, cut in plain.items() if tensor in found
    }
    gone = set(plain) - set(found)
    family = FAMILIES[VARIANTS[name].model_type]
    if key == "base_only":
        assert {tensor.rpartition(".")[0] for tensor in gone} <= {family.head}
    else:
        assert not gone
    if key == "tied_head_stored":
        assert extra == {f"{family.head}.weight": plain[f"{family.embedding}.weight"]}
    elif key == "buffers":
        assert extra and all(cut == Cut("buffer") for cut in extra.values())
    else:
        assert not extra


@pytest.mark.parametrize(
    ("name", "rewrite"),
    [
        ("gpt2", {"strip_prefix": True, "buffers": True, "old_keys": True}),
        ("gpt2", {"tied_head_stored": True}),
        ("gptj", {"buffers": True}),
        ("gpt_neo", {"buffers": True, "old_keys": True}),
        ("gpt_neox", {"buffers": True, "old_keys": True}),
        ("llama-mha-bias", {"buffers": True, "old_keys": True}),
        ("opt", {"strip_prefix": True, "base_only": True}),
        ("bloom", {"strip_prefix": True, "old_keys": True}),
        ("falcon-new", {"old_keys": True}),
        ("falcon-mqa", {"old_keys": True, "tied_head_stored": True}),
        ("falcon-mha-alibi", {"old_keys": True, "strip_prefix": True}),
    ],
)
def test_a_published_file_there_and_back(
    name: str, rewrite: dict[str, bool], made: Made, quick: Settings, tmp_path: Path
) -> None:
    model, out, merged = made(name, **rewrite), tmp_path / "out", tmp_path / "merged"
    tpshard.split(model, 4, out, settings=quick)
    assert tpshard.check(out, model, settings=quick).equal
    source = read_all(model)
    numbers = Numbers.of(config_of(made(name)))  # the old keys say the same
    for rank in range(4):
        held = read_rank(out, rank, 4)
        for tensor_name, tensor in source.items():
            mask = tensor_name.endswith((".attn.bias", ".attention.bias"))
            expected = tensor if mask else reference(tensor_name, tensor, numbers, Dealt.of(numbers, 4), rank)
            assert held[tensor_name] == expected, f"rank {rank}: {tensor_name}"
    tpshard.merge(out, merged, settings=quick)
    assert read_all(merged) == source


def test_every_family_has_a_file_and_every_buffer_a_rule() -> None:
    known = {model_type for architecture in all_builtin() for model_type in architecture.model_types}
    assert set(FAMILIES) == {variant.model_type for variant in ALL.values()} <= known
    assert set(BUFFERS) <= set(FAMILIES)


def test_what_no_family_has_is_named(made: Made, tmp_path: Path) -> None:
    model = made("gpt2")
    extra = random_tensor(np.random.default_rng(0), "F32", (8, 96))
    tensors = read_all(model) | {"transformer.h.0.attn.c_attn.extra.weight": extra}
    with pytest.raises(UnsupportedError, match="no gpt2 rule matches") as error:
        tpshard.plan(write_checkpoint(tmp_path / "model", config_of(model), tensors), 2)
    assert error.value.tensor == "transformer.h.0.attn.c_attn.extra.weight"


@pytest.mark.parametrize(
    ("name", "tp"),
    [("gpt2", 4), ("opt-350m-like", 2), ("llama-gqa", 4), ("falcon-new", 4), ("gpt_bigcode-mqa", 2), ("gpt_neox", 4)],
)
def test_transformers_loads_what_was_merged(name: str, tp: int, made: Made, quick: Settings, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    def logits(path: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        with torch.no_grad():
            return model(1 + torch.arange(24)[None] * 7 % (VOCAB - 1)).logits

    tpshard.split(made(name), tp, tmp_path / "out", settings=quick)
    tpshard.merge(tmp_path / "out", tmp_path / "merged", settings=quick)
    assert torch.equal(logits(tmp_path / "merged"), logits(made(name)))


def test_several_files_stay_several(made: Made, quick: Settings, tmp_path: Path) -> None:
    model = sharded(made("llama-gqa"), tmp_path / "sharded")
    tpshard.split(model, 2, tmp_path / "out", settings=quick)
    tpshard.merge(tmp_path / "out", tmp_path / "merged", settings=quick)
    files = sorted(file.name for file in model.glob("*.safetensors"))
    assert len(files) > 2
    assert [read(tmp_path / "merged" / file) for file in files] == [read(model / file) for file in files]
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(len(tensor.data) for tensor in read_all(model).values())


def test_rules_of_ones_own_need_no_python(made: Made, quick: Settings, tmp_path: Path) -> None:
    def renamed(name: str) -> str:
        return name.replace("model.layers", "net.blocks").replace("model.", "net.").replace("mlp.", "feed.")

    model = made("llama-gqa")
    config = config_of(model) | {"model_type": "mine"}
    mine = write_checkpoint(tmp_path / "mine", config, {renamed(n): t for n, t in read_all(model).items()})
    builtin = Path(tpshard.__file__).parent / "rules" / "architectures" / "llama.toml"
    rules = tmp_path / "mine.toml"
    rules.write_text(renamed(builtin.read_text()).replace('["llama", "llama_bidirec"]', '["mine"]'))
    with pytest.raises(UnsupportedError, match="no rules for model_type 'mine'"):
        tpshard.split(mine, 4, tmp_path / "out", settings=quick)
    tpshard.split(mine, 4, tmp_path / "out", rules=rules, settings=quick)
    tpshard.split(model, 4, tmp_path / "plain", settings=quick)
    for rank in range(4):
        plain = read_rank(tmp_path / "plain", rank, 4)
        assert read_rank(tmp_path / "out", rank, 4) == {renamed(name): tensor for name, tensor in plain.items()}


@pytest.mark.parametrize(
    ("name", "possible"),
    [
        ("gpt2", [1, 2, 3, 4, 6, 12]),
        ("llama-gqa", [1, 2, 4, 8]),
        ("llama-mqa", [1, 2, 4, 8]),
        ("gpt_neox", [1, 2, 4]),
        ("falcon-mha-alibi", [1, 2, 3, 4, 6, 12]),
    ],
)
def test_a_plan_says_which_tp_are_possible_and_each_is(name: str, possible: list[int], made: Made) -> None:
    report = tpshard.plan(made(name), 2).to_json()
    assert report["possible_tp"] == possible
    assert all(a < b for a, b in pairwise(possible))
    for tp in range(1, possible[-1] + 2):
        if tp in possible:
            tpshard.plan(made(name), tp)
        else:
            with pytest.raises(UnsupportedError, match=f"on {tp} ranks"):
                tpshard.plan(made(name), tp)
    assert {entry["tp"] for entry in report["impossible_tp"]} == set(range(1, possible[-1] + 1)) - set(possible)
