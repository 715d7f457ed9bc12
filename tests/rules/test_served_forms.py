"""Forms that models are served in, through the real commands: what each rank holds, by hand, and all of it back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import served_forms
from tests.helpers.by_hand import held_by, tensors_of, tensors_of_file
from tests.helpers.command import fails, succeeds
from tests.helpers.grids import in_turn
from tests.helpers.served_forms import NESTED, REMOTE
from tests.helpers.toys import read_all, write_checkpoint
from tpshard.errors import CorruptError, UsageError
from tpshard.inputs.checkpoint import open_checkpoint
from tpshard.rules.architecture import builtin, parse_architecture
from tpshard.rules.classify import Classification, classify

if TYPE_CHECKING:
    from torch import Tensor

Made = Callable[..., Path]
TOWERS = ("vision", "visual", "projector", "resampler", "audio", "embed_tokens_extend")
BEGINNINGS = ("model.language_model.", "language_model.model.", "language_model.", "model.transformer.")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plain(name: str) -> str:
    """A decoder's name without what a larger model puts before it."""
    start = next((each for each in BEGINNINGS if name.startswith(each)), "")
    rest = name.removeprefix(start)
    return f"model.{rest}" if start and not rest.startswith("lm_head") else rest


def there_and_back(model: Path, folder: Path, tp: int, config: Mapping[str, Any]) -> None:
    """Split, every rank by hand, check, and merged it is the source."""
    import torch

    out = folder / f"tp{tp}"
    succeeds("split", model, "--tp", tp, "-o", out, "--no-fsync")
    source = tensors_of(model)
    for rank in range(tp):
        (file,) = out.glob(f"rank-{rank:05}-of-{tp:05}.safetensors")
        held = tensors_of_file(file)
        assert held.keys() == source.keys()
        for name, whole in source.items():
            beside = any(part in name for part in TOWERS) and not plain(name).startswith("model.layers.")
            expected = whole if beside else held_by(plain(name), whole, config, rank, tp)
            assert torch.equal(held[name], expected), f"rank {rank}: {name}"
    succeeds("check", out, "--source", model)
    succeeds("merge", out, "-o", folder / "merged", "--no-fsync")
    assert read_all(folder / "merged") == read_all(model)
    succeeds("verify", out, "--source", model, "--tier", "bytes")


FORMS = [(name, published) for name in NESTED for published in (True, False)]


@pytest.mark.parametrize(("form", "tp"), in_turn([f for f in FORMS if f != ("muse_glimmer", False)], (2, 4)))
def test_what_nests_a_text_model(form: tuple[str, bool], tp: int, tmp_path: Path) -> None:
    name, published = form
    model = served_forms.make(name, tmp_path / "model", published=published)
    config = json.loads((model / "config.json").read_text())
    there_and_back(model, tmp_path, tp, config.get("text_config", config))


@pytest.mark.parametrize(("name", "tp"), in_turn(list(REMOTE), (2, 4)))
def test_what_publishes_its_own_code(name: str, tp: int, tmp_path: Path) -> None:
    model = served_forms.write(name, tmp_path / "model")
    there_and_back(model, tmp_path, tp, json.loads((model / "config.json").read_text()))


def test_ernie_as_it_is_published(tmp_path: Path) -> None:
    """All values at the top, and lists of both kinds of experts: the decoder is cut in the same way."""
    nested = served_forms.make("ernie4_5_vl_moe", tmp_path / "nested", published=True)
    config = served_forms.ernie_as_published(json.loads((nested / "config.json").read_text()))
    model = write_checkpoint(tmp_path / "model", config, read_all(nested))
    plans = [succeeds("plan", each, "--tp", 2, "--json").json for each in (nested, model)]
    assert plans[0]["ranks"] == plans[1]["ranks"]
    cut = {tensor["name"]: [each["axis"] for each in tensor["segments"]] for tensor in plans[1]["tensors"]}
    assert cut["model.layers.1.mlp.experts.1.up_proj.weight"] == ["experts_ffn-32"]
    assert cut["model.layers.1.mlp.experts.2.up_proj.weight"] == ["experts_ffn-16"]


def test_inkling_as_it_is_published(made: Made, tmp_path: Path) -> None:
    """Gate and up lie by turns there: a rank's rows are those of its own units, and the names are others."""
    import torch
    from safetensors.torch import save_file

    names = {
        "model.embed_tokens.embed_norm.": "model.llm.embed_norm.", "model.embed_tokens.": "model.llm.embed.",
        "lm_head.": "model.llm.unembed.", "model.": "model.llm.", ".self_attn.q_proj.": ".attn.wq_du.",
        ".self_attn.k_proj.": ".attn.wk_dv.", ".self_attn.v_proj.": ".attn.wv_dv.",
        ".self_attn.r_proj.": ".attn.wr_du.", ".self_attn.o_proj.": ".attn.wo_ud.", ".self_attn.": ".attn.",
        "sconv.conv1d.": "sconv.",
        ".mlp.down_proj.": ".mlp.w2_md.", ".gate.e_score_correction_bias": ".gate.bias",
        ".shared_experts.down_proj": ".shared_experts.shared_w2_weight", ".experts.down_proj": ".experts.w2_weight",
        ".input_layernorm.": ".attn_norm.", ".post_attention_layernorm.": ".mlp_norm.",
    }  # fmt: skip

    def published(name: str) -> str:
        for old, new in names.items():
            if name.startswith(old) or (old.startswith((".", "s")) and old in name):
                name = name.replace(old, new, 1)
                if not old.startswith((".", "s")):
                    name = name.replace("model.llm.llm.", "model.llm.", 1)
        return name

    def by_turns(gate: Tensor, up: Tensor, dim: int) -> Tensor:
        return torch.stack([gate, up], dim + 1).flatten(dim, dim + 1)

    def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            if name.endswith("experts.gate_up_proj"):
                found[name.replace("gate_up_proj", "w13_weight")] = by_turns(*tensor.chunk(2, 1), 1)
            elif name.endswith("shared_experts.gate_proj"):
                up = tensors[name.replace("gate_proj", "up_proj")]
                found[name.replace("gate_proj", "shared_w13_weight")] = by_turns(tensor, up, 1)
            elif name.endswith("mlp.gate_proj.weight"):
                up = tensors[name.replace("gate_proj", "up_proj")]
                found[name.replace("gate_proj", "w13_dn")] = by_turns(tensor, up, 0)
            elif not name.endswith(("up_proj", "mlp.up_proj.weight")):
                found[name] = tensor
        return {published(name): tensor.contiguous() for name, tensor in found.items()}

    source = made("inkling")
    text = json.loads((source / "config.json").read_text())
    dense = {"intermediate_size": text["moe_intermediate_size"], "dense_intermediate_size": text["intermediate_size"]}
    model = tmp_path / "model"
    model.mkdir()
    config = {"model_type": "inkling_mm_model", "text_config": text | dense}
    (model / "config.json").write_text(json.dumps(config))
    tower = {
        "model.visual.layers.linear_0.weight": torch.ones(4, 4),
        "model.mtp.layers.0.input_proj.weight": torch.ones(8),
    }
    save_file(fused(tensors_of(source)) | tower, model / "model.safetensors", metadata={"format": "pt"})
    succeeds("split", model, "--tp", 2, "-o", tmp_path / "out", "--no-fsync")
    succeeds("check", tmp_path / "out", "--source", model)
    succeeds("merge", tmp_path / "out", "-o", tmp_path / "merged", "--no-fsync")
    assert read_all(tmp_path / "merged") == read_all(model)
    succeeds("split", source, "--tp", 2, "-o", tmp_path / "plain", "--no-fsync")
    for rank in range(2):
        file = f"rank-{rank:05}-of-00002.safetensors"
        expected, held = fused(tensors_of_file(tmp_path / "plain" / file)), tensors_of_file(tmp_path / "out" / file)
        assert held.keys() == expected.keys() | tower.keys()
        assert not [name for name, tensor in expected.items() if not torch.equal(held[name], tensor)]
    given = ("--source", model, "--tier", "weights,exact", "--tokens", 1, "--json")
    found = succeeds("verify", tmp_path / "out", *given).json
    assert (found["verdict"], found["settings"]["runs"]) == ("pass", "the text model"), found["reason"]
    assert {each["prefix"] for each in found["not_run"]} == {"model.visual", "model.mtp"}


@pytest.mark.parametrize("published", [True, False])
def test_layers_of_every_form_are_dealt_to_stages(published: bool, tmp_path: Path) -> None:
    """Molmo 2 has its layers in `blocks` where it is published, and in `layers` where newer code saved it."""
    model = served_forms.make("molmo2", tmp_path / "model", published=published)
    succeeds("split", model, "--tp", 2, "--pp", 2, "-o", tmp_path / "out", "--no-fsync")
    on = {row["name"]: row["stages"] for row in json.loads((tmp_path / "out" / "tpshard.json").read_text())["tensors"]}
    numbered = {
        name: re.search(r"(?<!vision)\.(?:blocks|layers)\.(\d+)\.(?:self_attn|mlp|attn_norm|ff_norm)", name)
        for name in on
    }
    found = {name: int(match[1]) for name, match in numbered.items() if match and not any(t in name for t in TOWERS)}
    assert set(found.values()) == {0, 1}
    assert all(on[name] == [layer] for name, layer in found.items())


def classified(model: Path, **changes: Any) -> Classification:
    config = json.loads((model / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value != "gone"}
    return classify(builtin(config["model_type"]), config, open_checkpoint(model).tensors)


@pytest.mark.parametrize("model_type", ["minimax_text_01", "minimax_m1"])
def test_minimax_as_it_was_first_published(model_type: str, made: Made) -> None:
    first = {"model_type": model_type, "layer_types": "gone", "attn_type_list": [1, 0]}
    assert classified(made("minimax"), **first).cuts == classified(made("minimax")).cuts


def test_layers_have_their_own_number_of_heads(made: Made) -> None:
    found = classified(made("laguna"))
    axes = {name: (axis.count, axis.unit, axis.group) for name, axis in found.axes.items() if "-" in name}
    assert axes == {
        "heads-4": (4, 16, "kv"),
        "heads-8": (8, 16, "kv"),
        "gates-4": (4, 1, "kv"),
        "gates-8": (8, 1, "kv"),
    }
    rules = {i: found.cuts[f"model.layers.{i}.self_attn.q_proj.weight"].rule for i in (0, 1)}
    assert rules == {0: "column heads-4", 1: "column heads-8"}
    with pytest.raises(CorruptError, match=r"layers.0.self_attn.\w+.weight; .*heads-2 2 x 16|gates-2 2 x 1"):
        classified(made("laguna"), num_attention_heads_per_layer=[2, 8])


def test_a_group_of_a_layers_own_goes_with_it(tmp_path: Path) -> None:
    found = classified(served_forms.write("nemotron-nas", tmp_path / "model"))
    assert {name: axis.group for name, axis in found.axes.items() if name.startswith("heads")} == {
        "heads-2": "kv-2",
        "heads-1": "kv-1",
    }
    assert {name: axis.count for name, axis in found.axes.items() if "ffn" in name} == {
        "ffn-256": 256,
        "ffn-768": 768,
        "ffn-96": 96,
    }


def test_experts_that_lie_in_one_dim(made: Made, tmp_path: Path) -> None:
    cuts = classified(made("dbrx")).cuts
    cut = cuts["transformer.blocks.0.ffn.experts.mlp.w2"]
    assert (cut.kind, cut.dim, cut.segments) == ("row", 0, ("ffn",) * 4)
    assert "expert" in fails(4, "plan", made("dbrx"), "--tp", 2, "--ep", 2)["message"]
    config = json.loads((made("dbrx") / "config.json").read_text())
    with pytest.raises(CorruptError, match="config.json contradicts the tensor transformer.blocks.0.ffn.experts"):
        classified(made("dbrx"), ffn_config=config["ffn_config"] | {"moe_num_experts": 3})


def test_a_shared_transformer_that_is_missing_is_named(made: Made, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in read_all(made("zamba2")).items() if "layers.1.shared_tr" not in name}
    config = json.loads((made("zamba2") / "config.json").read_text())
    model = write_checkpoint(tmp_path / "model", config, tensors)
    assert "layers.*.shared_transformer" in re.sub(r"\d", "*", fails(3, "plan", model, "--tp", 2)["message"])


def test_layers_that_share_parameters_have_no_stages(made: Made) -> None:
    assert "where layers share parameters" in fails(4, "plan", made("zamba2"), "--tp", 2, "--pp", 2)["hint"]


RULES = """
model_types = ["x"]
layers = "n"
{experts}
[axes]
a = {{ count = "{count}" }}
[rules]
"{rule}" = ["{pattern}"]
"""


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (
            {"count": "sizes[layer]", "rule": "column a", "pattern": "embed"},
            "has no layer, and its axis a asks for one",
        ),
        ({"count": "sizes[expert]", "rule": "column a", "pattern": "l.*.up"}, "has no expert, and its axis a asks"),
        ({"rule": "column a for each expert", "pattern": "l.*.up", "experts": ""}, "no key `experts` says how many"),
        ({"rule": "column a for each expert / a", "pattern": "l.*.up"}, "nothing stands between"),
        ({"rule": "replicate", "pattern": "towers.**.weight"}, "stands at the end"),
    ],
)
def test_rules_that_cannot_be_meant(given: dict[str, str], what: str) -> None:
    with pytest.raises(UsageError, match=re.escape(what)):
        parse_architecture(RULES.format(**{"count": "n", "experts": 'experts = "e"'} | given), "mine.toml")


def test_whatever_lies_below(tmp_path: Path) -> None:
    text = RULES.format(count="n", experts="", rule="replicate", pattern="towers.**")
    checkpoint = open_checkpoint(served_forms.write("minicpm", tmp_path / "model"))
    one = checkpoint.tensors[0]
    tensors = [replace(one, name=f"towers.{rest}") for rest in ("a.weight", "b.0.c.1.d", "b.1.bias")]
    cuts = classify(parse_architecture(text, "x.toml"), {"n": 1}, tensors).cuts
    assert {cut.kind for cut in cuts.values()} == {"replicate"} and len(cuts) == 3
