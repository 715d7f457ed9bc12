"""What the table says of one model and not of another of its type: by its class, its layers, what its loader drops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tpshard
from tests.engines.engine_models import make
from tpshard.errors import UnsupportedError
from tpshard.formats.engine_config import told_apart
from tpshard.formats.engine_tables import EngineFamily

LINEAR, LATENT = "model.layers.0.self_attn.", "model.layers.1.self_attn."


def rank(source: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    tpshard.split(source, 2, out, format="vllm", **options)
    return load_file(out / "model-rank-0-part-0.safetensors")


def test_a_name_is_another_in_the_layers_that_have_something_else() -> None:
    where = {"layers.*.keys": {"layers.*.dense": "layers.*.output"}}
    family = EngineFamily(layer="layers.*", renamed_where=where)
    names = dict(enumerate(("layers.0.dense.weight", "layers.1.dense.weight", "layers.1.keys.weight", "dense.weight")))
    told = told_apart(family, {str(number): name for number, name in names.items()})
    assert list(told.values()) == [names[0], "layers.1.output.weight", *list(names.values())[2:]]


def test_of_a_type_with_several_classes_the_config_says_which(tmp_path: Path) -> None:
    ring = rank(make("bailing_hybrid", tmp_path / "ring"), tmp_path / "ring-tp2")
    ling = rank(make("bailing_hybrid-v3", tmp_path / "ling"), tmp_path / "ling-tp2")
    assert {f"{LINEAR}dense.weight", f"{LATENT}mla_attn.o_proj.weight"} <= ring.keys()
    assert {f"{LINEAR}o_proj.weight", f"{LATENT}dense.weight", f"{LINEAR}qkvb_proj.weight"} <= ling.keys()
    assert not {f"{LINEAR}o_proj.weight", f"{LATENT}dense.weight"} & ring.keys()


def test_what_the_checkpoint_numbers_and_the_engine_calls_by_words(tmp_path: Path) -> None:
    """Zamba's adapters, which go into a small space and out of it; each layer's attention has scales of its own."""
    source = make("zamba2", tmp_path / "source")
    held, given = rank(source, tmp_path / "out"), load_file(source / "model.safetensors")
    block = "model.layers.0.shared_transformer."
    for module, cut in (("self_attn.linear_k_adapter_list.2", 2), ("feed_forward.gate_up_proj_adapter_list.2", 4)):
        into, out = (given[f"{block}{module}.{number}.weight"] for number in (0, 1))
        assert torch.equal(held[f"{block}{module}.A.weight"], into.chunk(2)[0])
        rows = out.chunk(cut)
        assert torch.equal(held[f"{block}{module}.B.weight"], torch.cat(rows[::2][: cut // 2]))
    scaled = {name.removesuffix("._k_scale") for name in held if name.endswith("._k_scale")}
    attention = [(0, 0), (0, 2), (1, 1)]
    assert scaled == {f"model.layers.{each}.shared_transformer.self_attn.dpa_list.{turn}" for each, turn in attention}


@pytest.mark.parametrize("given", [["BailingHybridForCausalLM"], [["BailingMoeV3ForCausalLM"]], None, 7])
def test_a_class_that_the_engine_does_not_have_is_refused(given: object, tmp_path: Path) -> None:
    source = make("bailing_hybrid", tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"architectures": given}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="several classes for model_type 'bailing_hybrid'") as caught:
        tpshard.split(source, 2, tmp_path / "out", format="vllm")
    assert "published config.json" in str(caught.value.hint)


def test_a_head_that_the_loader_computes_anew_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="norm_head True: vLLM norms the head"):
        tpshard.split(make("bailing_moe-norm-head", tmp_path / "source"), 2, tmp_path / "out", format="vllm")


def test_what_the_loader_leaves_out_is_in_the_files_and_said(tmp_path: Path) -> None:
    source = make("laguna", tmp_path / "source")
    report = tpshard.split(source, 2, tmp_path / "out", format="vllm")
    assert sum("1 tensors that vLLM's own loader leaves out" in each for each in report.warnings) == 1
    held = load_file(tmp_path / "out" / "model-rank-0-part-0.safetensors")
    given = load_file(source / "model.safetensors")["model.layers.1.mlp.experts.e_score_correction_bias"]
    assert torch.equal(held["model.layers.1.mlp.experts.routed_experts.e_score_correction_bias"], given.float())
    dense = make("laguna", tmp_path / "dense", {"mlp_layer_types": ["dense", "dense"]})
    report = tpshard.split(dense, 2, tmp_path / "dense-tp2", format="vllm")
    assert not any("leaves out" in each for each in report.warnings)
