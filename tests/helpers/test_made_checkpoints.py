"""The made checkpoints are what they claim: loadable, seeded, perturbed everywhere, each variant a model of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.checkpoints import (
    BUFFERS,
    DECODED,
    FAMILIES,
    VARIANTS,
    VOCAB,
    build,
    make,
    norm_center_of,
    old_config,
    pickled,
    published,
    sharded,
)
from tests.helpers.further_checkpoints import FURTHER
from tests.helpers.grids import one_in, some

# What a variant is there for, set back to the plain model: the logits must change.
FEATURES: list[tuple[str, dict[str, Any]]] = [
    ("llama-mha-bias", {"mlp_bias": False}),
    ("llama-rope-linear", {"rope_parameters": None}),
    ("llama-rope-dynamic", {"rope_parameters": None}),
    ("llama-rope-yarn", {"rope_parameters": None}),
    ("llama-rope-llama3", {"rope_parameters": None}),
    ("mistral-sliding", {"sliding_window": None}),
    ("qwen2-sliding", {"use_sliding_window": False}),
    ("qwen2-sliding", {"max_window_layers": 0}),
    ("gemma2", {"sliding_window": 64}),
    ("gemma2", {"query_pre_attn_scalar": 16}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gpt2-scaled", {"scale_attn_by_inverse_layer_idx": False}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox-seq-residual", {"rotary_pct": 0.25}),
    ("gptj", {"rotary_dim": 16}),
    ("gpt_neo", {"window_size": 64}),
    ("bloom-12-heads", {"apply_residual_connection_post_layernorm": False}),
    ("falcon-mha-alibi", {"alibi": False}),
    ("opt-no-final-norm", {"_remove_final_layer_norm": False}),
    ("opt", {"do_layer_norm_before": False}),
]


@pytest.fixture(scope="module")
def checkpoint(made: Callable[..., Path]) -> Any:
    """The directory of a variant, which all tests share."""
    return made


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(1 + torch.arange(40)[None] * 7 % (VOCAB - 1)).logits


def load(path: Path) -> Any:
    """The model, its weights copied: in the mapped file they need not be aligned, and sums differ in the last bit."""
    from transformers import AutoConfig

    from tpshard.verifier.hf.skeleton import class_of

    kind: Any = class_of(AutoConfig.from_pretrained(path))
    model = kind.__self__.from_pretrained(path, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


NARROW = {"bf16": torch.bfloat16, "f16": torch.float16}
ONE_OF_EACH = {variant.model_type: name for name, variant in reversed(VARIANTS.items())}.values()
LOADED = some(VARIANTS, [*ONE_OF_EACH, *(name for name in VARIANTS if name.rpartition("-")[2] in NARROW)])


@pytest.mark.parametrize("name", one_in(2, LOADED))
def test_the_saved_model_is_the_built_one(name: str, checkpoint: Any) -> None:
    loaded = load(checkpoint(name))
    assert loaded.dtype == NARROW.get(name.rpartition("-")[2], torch.float32)
    assert torch.equal(logits(loaded), logits(build(name)))


PLAIN = [name for name in VARIANTS if name not in FURTHER]
"""Those whose tensors are all of one kind, and whose configs count heads for all layers."""
OLDER = set(FAMILIES) - {model_type for model_type, _ in FURTHER.values()}


@pytest.mark.parametrize("name", PLAIN)
def test_every_tensor_is_perturbed(name: str, checkpoint: Any) -> None:
    plain_norm = norm_center_of(VARIANTS[name].model_type)
    for tensor_name, tensor in tensors(checkpoint(name)).items():
        is_norm = tensor.dim() == 1 and tensor_name.endswith("weight")
        values = tensor.float()
        if values.numel() == 1:  # a number has no spread
            continue
        assert 0.03 < values.std() < 0.15, tensor_name
        assert abs(values.mean() - (plain_norm if is_norm else 0.0)) < 0.08, tensor_name


@pytest.mark.parametrize("name", PLAIN)
def test_sizes_split_at_tp_4_but_for_the_vocab(name: str, checkpoint: Any) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint(name))
    assert config.num_attention_heads % 4 == 0
    assert config.vocab_size == VOCAB and VOCAB % 2


def test_every_family_is_there_and_gqa_families_need_repeated_kv_heads() -> None:
    assert {variant.model_type for variant in VARIANTS.values()} == set(FAMILIES)
    keys = ("num_key_value_heads", "num_kv_heads")
    few = {v.model_type for v in VARIANTS.values() if 2 in (v.config.get(key) for key in keys)}
    as_many_as_heads = {"gpt2", "gpt_neox", "gptj", "gpt_bigcode", "gpt_neo", "bloom", "opt", "mpt", "codegen"}
    as_many_as_heads |= {"persimmon", "xglm", "biogpt", "deepseek_v2", "deepseek_v3", "deepseek_v32"}
    as_many_as_heads |= {"glm4_moe_lite", "glm_moe_dsa", "mistral4"}
    assert few - {model_type for model_type, _ in FURTHER.values()} == OLDER - as_many_as_heads


@pytest.mark.parametrize(("name", "plain"), FEATURES)
def test_leaving_out_what_a_variant_is_for_shows(name: str, plain: dict[str, Any]) -> None:
    ours, other = logits(build(name)), logits(build(name, **plain))
    assert (ours - other).norm() / ours.norm() > 1e-3


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(checkpoint: Any, tmp_path: Path) -> None:
    def read(path: Path) -> bytes:
        return (path / "model.safetensors").read_bytes()

    assert read(make("gpt2", tmp_path / "again")) == read(checkpoint("gpt2"))
    assert read(make("gpt2", tmp_path / "other", seed=1)) != read(checkpoint("gpt2"))


def test_overrides_change_the_config_alone(tmp_path: Path) -> None:
    made = make("llama", tmp_path / "llama", dtype="bfloat16", num_hidden_layers=1)
    assert {str(tensor.dtype) for tensor in tensors(made).values()} == {"torch.bfloat16"}
    wide = dict(build("llama").named_parameters())
    for name, parameter in build("llama", num_hidden_layers=1).named_parameters():
        assert torch.equal(parameter, wide[name]), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gptj", "gpt_neo", "bloom", "falcon-new", "opt"])
def test_names_without_the_prefix_load_alike_and_go_back(name: str, checkpoint: Any, tmp_path: Path) -> None:
    family = FAMILIES[VARIANTS[name].model_type]
    stripped = published(checkpoint(name), tmp_path / "stripped", strip_prefix=True)
    assert not any(tensor.startswith(family.prefix) for tensor in tensors(stripped))
    assert torch.equal(logits(load(stripped)), logits(build(name)))
    restored = published(stripped, tmp_path / "restored", add_prefix=True)
    assert tensors(restored).keys() == tensors(checkpoint(name)).keys()


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gptj", "llama-tied"])
def test_a_base_model_has_no_head(name: str, checkpoint: Any, tmp_path: Path) -> None:
    base = published(checkpoint(name), tmp_path / "base", base_only=True)
    prefix = FAMILIES[VARIANTS[name].model_type].prefix
    assert tensors(base) and all(tensor.startswith(prefix) for tensor in tensors(base))


@pytest.mark.parametrize(
    ("name", "buffer", "dtype", "shape"),
    [
        ("gpt2", "transformer.h.1.attn.bias", "float32", (1, 1, 64, 64)),
        ("gpt2", "transformer.h.1.attn.masked_bias", "float32", ()),
        ("gptj", "transformer.h.1.attn.bias", "bool", (1, 1, 64, 64)),
        ("gptj", "transformer.h.1.attn.masked_bias", "float32", ()),
        ("gpt_neo", "transformer.h.1.attn.attention.bias", "uint8", (1, 1, 64, 64)),
        ("gpt_neo", "transformer.h.1.attn.attention.masked_bias", "float32", ()),
        ("gpt_neox", "gpt_neox.layers.1.attention.bias", "uint8", (1, 1, 64, 64)),
        ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias", "float16", ()),
        ("gpt_neox", "gpt_neox.layers.1.attention.rotary_emb.inv_freq", "float16", (2,)),
        ("llama", "model.layers.2.self_attn.rotary_emb.inv_freq", "float32", (4,)),
    ],
)
def test_buffers_are_stored_and_change_nothing(
    name: str, buffer: str, dtype: str, shape: tuple[int, ...], checkpoint: Any, tmp_path: Path
) -> None:
    out = published(checkpoint(name), tmp_path / "buffers", buffers=True)
    stored = tensors(out)
    assert stored[buffer].dtype == getattr(torch, dtype) and tuple(stored[buffer].shape) == shape
    assert stored.keys() > tensors(checkpoint(name)).keys()
    assert torch.equal(logits(load(out)), logits(build(name)))


def test_the_stored_masks_are_those_that_the_model_computes(checkpoint: Any, tmp_path: Path) -> None:
    stored = tensors(published(checkpoint("gpt_neo"), tmp_path / "neo", buffers=True))
    for layer in range(2):
        name = f"transformer.h.{layer}.attn.attention.bias"
        assert torch.equal(stored[name].bool(), build("gpt_neo").get_buffer(name))
    stored = tensors(published(checkpoint("llama"), tmp_path / "llama", buffers=True))
    frequencies = build("llama").get_buffer("model.rotary_emb.inv_freq")
    assert torch.equal(stored["model.layers.0.self_attn.rotary_emb.inv_freq"], frequencies)


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "gpt2", "gpt_neox-tied-nobias", "opt-350m-like", "bloom"])
def test_a_stored_tied_head_is_the_embedding(name: str, checkpoint: Any, tmp_path: Path) -> None:
    family = FAMILIES[VARIANTS[name].model_type]
    out = published(checkpoint(name), tmp_path / "tied", tied_head_stored=True)
    stored = tensors(out)
    assert torch.equal(stored[f"{family.head}.weight"], stored[f"{family.embedding}.weight"])
    assert torch.equal(logits(load(out)), logits(build(name)))


def test_what_was_never_published_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not tied"):
        published(checkpoint("llama"), tmp_path / "tied", tied_head_stored=True)
    with pytest.raises(ValueError, match="no buffers"):
        published(checkpoint("opt"), tmp_path / "buffers", buffers=True)
    with pytest.raises(ValueError, match="RefinedWeb"):
        published(checkpoint("falcon-new-one-norm"), tmp_path / "old", old_keys=True)
    assert set(BUFFERS) < set(FAMILIES)


@pytest.mark.parametrize("name", [n for n, v in DECODED.items() if v.model_type != "falcon"])
def test_old_keys_mean_the_same_model(name: str, checkpoint: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig

    out = published(checkpoint(name), tmp_path / "old", old_keys=True)
    old = read_config(out)
    assert not {"dtype", "rope_parameters", "layer_types"} & old.keys()
    ours, read_back = (AutoConfig.from_pretrained(path).to_dict() for path in (checkpoint(name), out))
    del ours["_name_or_path"]
    (read_back.get("rope_parameters") or {}).pop("type", None)  # kept beside rope_type
    assert {key: read_back[key] for key in ours} == ours
    assert torch.equal(logits(load(out)), logits(build(name)))


@pytest.mark.parametrize(
    ("name", "present", "absent"),
    [
        ("llama-rope-linear", {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}, {"head_dim"}),
        ("llama-tied", {"tie_word_embeddings": True, "rope_scaling": None}, {"attention_bias"}),
        ("qwen3-tied-bias", {"head_dim": 8}, set()),
        ("gpt2", {"n_ctx": 64, "n_embd": 96}, {"n_inner", "tie_word_embeddings"}),
        ("gpt_neox", {"rotary_pct": 0.25, "rotary_emb_base": 10000.0}, {"rope_theta", "attention_bias"}),
        ("gpt_bigcode-mqa", {"multi_query": True}, {"num_key_value_heads"}),
        ("bloom", {"n_embed": 64, "num_attention_heads": 8}, {"hidden_size", "n_head"}),
        (
            "falcon-new",
            {"model_type": "RefinedWeb", "n_head": 8, "n_layer": 2, "n_head_kv": 2},
            {"num_kv_heads", "new_decoder_architecture", "ffn_hidden_size", "num_attention_heads"},
        ),
        ("falcon-mqa", {"model_type": "RefinedWebModel", "n_head": 8, "multi_query": True}, {"n_head_kv"}),
        ("falcon-mha-alibi", {"model_type": "RefinedWebModel", "n_head": 12, "alibi": True}, {"n_head_kv"}),
        ("opt-350m-like", {"word_embed_proj_dim": 32}, {"enable_bias"}),
        ("opt-nobias", {"enable_bias": False, "layer_norm_elementwise_affine": False}, set()),
    ],
)
def test_old_keys_are_those_of_the_first_files(
    name: str, present: dict[str, Any], absent: set[str], checkpoint: Any
) -> None:
    config = read_config(checkpoint(name))
    old = old_config(config)
    assert {key: old.get(key) for key in present} == present
    assert not absent & old.keys()
    assert config == read_config(checkpoint(name))  # the input is left alone


def test_shards_and_pickle_hold_the_same_tensors(checkpoint: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    whole = tensors(checkpoint("llama-gqa"))
    out = sharded(checkpoint("llama-gqa"), tmp_path / "sharded", max_shard_size=100_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["weight_map"].keys() == whole.keys() and read_config(out) == read_config(checkpoint("llama-gqa"))
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], whole[name])
    stored = torch.load(pickled(checkpoint("llama-gqa"), tmp_path / "pickled") / "pytorch_model.bin", weights_only=True)
    assert stored.keys() == whole.keys() and all(torch.equal(stored[name], whole[name]) for name in whole)
    with pytest.raises(ValueError, match="one file"):
        sharded(checkpoint("llama-gqa"), tmp_path / "one", max_shard_size="1GB")
