"""Rules files and their matching: every tensor by exactly one rule, and whatever does not fit is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import tpshard.rules.architecture
from tpshard.errors import CorruptError, UnsupportedError, UsageError
from tpshard.planning.axes import Axis, Cut
from tpshard.rules.architecture import Architecture, all_builtin, builtin, find_architecture, parse_architecture
from tpshard.rules.classify import Classification, classify
from tpshard.rules.quantisation.schemes import PLAIN
from tpshard.storage.safetensors import TensorInfo

RULES = """
model_types = ["toy"]
prefix = "model."
layers = "depth"
tied = { head = "model.embed" }

[defaults]
tie_word_embeddings = true
n_ffn = 6

[axes]
heads = { count = "n_heads", unit = "width // n_heads", group = "kv" }
kv = { count = "n_kv or n_heads", unit = "width // n_heads", replicate = true }
ffn = { count = "n_ffn" }
vocab = { count = "n_vocab", pad = true }

[rules]
"column vocab" = ["model.embed", "head?"]
"column heads kv kv / kv" = ["model.layers.*.qkv"]
"row heads" = ["model.layers.*.out"]
"column ffn if gated" = ["model.layers.*.gate"]
"column ffn" = ["model.layers.*.up"]
"row ffn" = ["model.layers.*.down"]
"replicate" = ["model.layers.*.norm", "model.layers.*.[ab]_norm?"]
"buffer" = ["model.layers.*.mask"]

[dims]
"model.layers.*.up" = ["in", "out"]
"""
CONFIG: dict[str, Any] = {"model_type": "toy", "depth": 2, "n_heads": 4, "n_kv": 2, "width": 8, "n_vocab": 10}
LAYER: dict[str, tuple[int, ...]] = {
    "qkv.weight": (16, 8), "qkv.bias": (16,), "out.weight": (8, 8), "out.bias": (8,),
    "up.weight": (8, 6), "up.bias": (6,), "down.weight": (8, 6), "norm.weight": (8,),
}  # fmt: skip


def names(layers: int = 2) -> dict[str, tuple[int, ...]]:
    """The tensors of a whole checkpoint."""
    found: dict[str, tuple[int, ...]] = {"model.embed.weight": (10, 8)}
    for layer in range(layers):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in LAYER.items()}
    return found


def infos(shapes: Mapping[str, tuple[int, ...]]) -> list[TensorInfo]:
    return [TensorInfo(name, "F32", shape, "model.safetensors", 0, 0) for name, shape in shapes.items()]


def toy(text: str = RULES, **replaced: str) -> Architecture:
    """The rules with some of their text replaced."""
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    return parse_architecture(text, "toy.toml")


def run(shapes: Mapping[str, tuple[int, ...]] | None = None, rules: str = RULES, **config: Any) -> Classification:
    return classify(toy(rules), CONFIG | config, infos(names() if shapes is None else shapes))


def test_axes_and_cuts_follow_from_rules_and_config() -> None:
    found = run()
    assert dict(found.axes) == {
        "heads": Axis("heads", 4, 2, group="kv"),
        "kv": Axis("kv", 2, 2, replicate=True),
        "ffn": Axis("ffn", 6, 1),
        "vocab": Axis("vocab", 10, 1, pad=True),
    }
    qkv = ("heads", "kv", "kv")
    cuts = {name.removeprefix("model.layers.0."): cut for name, cut in found.cuts.items() if ".1." not in name}
    assert cuts == {
        "model.embed.weight": Cut("column", 0, ("vocab",)),
        "qkv.weight": Cut("column", 0, qkv, "kv"),
        "qkv.bias": Cut("column", 0, qkv, "kv"),
        "out.weight": Cut("row", 1, ("heads",)),
        "out.bias": Cut("replicate"),  # a row-parallel bias has no `in`
        "up.weight": Cut("column", 1, ("ffn",)),  # stored [in, out]
        "up.bias": Cut("column", 0, ("ffn",)),
        "down.weight": Cut("row", 1, ("ffn",)),
        "norm.weight": Cut("replicate"),
    }
    assert found.cuts["model.layers.1.qkv.weight"].rule == "column heads kv kv / kv"
    assert dict(found.tied) == {"head": "model.embed"}


def test_ties_and_defaults_are_the_configs_to_change() -> None:
    assert not run(tie_word_embeddings=False).tied
    with pytest.raises(CorruptError, match="config.json contradicts the tensor") as error:
        run(n_ffn=12)
    assert error.value.tensor == "model.layers.0.up.weight"
    assert error.value.expected == "dim 1 of size 12 (ffn 12 x 1, toy rules)"
    assert error.value.found == "shape [8, 6]"


def test_an_explicit_null_is_not_the_default() -> None:
    with pytest.raises(CorruptError, match="'n_ffn' must be a positive integer, got None"):
        run(n_ffn=None)


def test_names_may_lack_the_prefix() -> None:
    stripped = {name.removeprefix("model."): shape for name, shape in names().items()}
    assert {f"model.{name}": cut for name, cut in run(stripped).cuts.items()} == dict(run().cuts)


def test_the_same_tensor_with_and_without_the_prefix_is_refused() -> None:
    with pytest.raises(CorruptError, match=r"embed.weight and model.embed.weight are one tensor"):
        run(names() | {"embed.weight": (10, 8)})


def test_what_may_match_nothing_may_also_match() -> None:
    extra: dict[str, tuple[int, ...]] = {"head.weight": (10, 8)}
    extra |= {f"model.layers.{layer}.{kind}_norm.weight": (2,) for layer in range(2) for kind in "ab"}
    extra |= {"model.layers.0.mask": (4, 4)}  # a buffer need not be in every layer
    cuts = run(names() | extra).cuts
    assert cuts["head.weight"] == Cut("column", 0, ("vocab",))
    assert cuts["model.layers.1.b_norm.weight"] == Cut("replicate")
    assert cuts["model.layers.0.mask"] == Cut("buffer")


def test_a_condition_turns_a_rule_on() -> None:
    gates = {f"model.layers.{layer}.gate.weight": (6, 8) for layer in range(2)}
    assert run(names() | gates, gated=True).cuts["model.layers.0.gate.weight"] == Cut("column", 0, ("ffn",))
    with pytest.raises(UnsupportedError, match="no toy rule matches the tensor model.layers.0.gate.weight"):
        run(names() | gates)
    with pytest.raises(CorruptError, match=r"no tensor matches model.layers.\*.gate, which every toy model has"):
        run(gated=True)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.qkv_extra.weight",  # a name matches whole, never by substring
        "model.layers.0.mlp.up.weight",
        "model.layers.x.up.weight",
        "model.layers.00.up.weight",
        "model.layers.0.up.scales",
        "model.layers.0.c_norm.weight",
        "model.model.embed.weight",
        "other.weight",
    ],
)
def test_a_tensor_without_a_rule_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match="no toy rule matches") as error:
        run(names() | {name: (8, 6)})
    assert error.value.tensor == name
    assert error.value.found == "shape [8, 6]"
    assert "--rules" in str(error.value.hint)


def test_a_star_stays_inside_its_component() -> None:
    starred = RULES.replace('"replicate" = [', '"replicate" = ["model.layers.*.ex*.g", ')
    extra: dict[str, tuple[int, ...]] = {f"model.layers.{layer}.ex{layer}.g.weight": (3,) for layer in range(2)}
    with pytest.raises(CorruptError, match=r"model.layers.\*.ex0.g.weight: layers 1 missing"):
        run(names() | extra, rules=starred)
    extra = {f"model.layers.{layer}.expert.g.weight": (3,) for layer in range(2)}
    assert run(names() | extra, rules=starred).cuts["model.layers.1.expert.g.weight"] == Cut("replicate")
    with pytest.raises(UnsupportedError, match="no toy rule matches the tensor model.layers.0.ex.a.g.weight"):
        run(names() | extra | {"model.layers.0.ex.a.g.weight": (3,)}, rules=starred)


def test_modules_that_differ_in_a_number_are_not_layers() -> None:
    numbered = RULES.replace("*.gate", "*.w1").replace("*.down", "*.w2")
    shapes = {name.replace("down", "w2"): shape for name, shape in names().items()}
    shapes |= {f"model.layers.{layer}.w1.weight": (6, 8) for layer in range(2)}
    cuts = run(shapes, rules=numbered, gated=True).cuts
    assert cuts["model.layers.0.w1.weight"] == Cut("column", 0, ("ffn",))
    assert cuts["model.layers.1.w2.weight"] == Cut("row", 1, ("ffn",))


def test_a_tensor_that_two_rules_match_is_refused() -> None:
    with pytest.raises(UsageError, match=r"2 rules match the tensor model.layers.0.up.weight: .*\[a-z\]p, .*\*.up"):
        run(rules=RULES.replace('"model.layers.*.gate"', '"model.layers.*.[a-z]p"'), gated=True)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(CorruptError, match=r"no tensor matches model.layers.\*.norm,") as error:
        run({name: shape for name, shape in names().items() if "norm" not in name})
    assert error.value.expected == "model.layers.*.norm"


def test_a_pattern_under_dims_that_matches_nothing_is_refused() -> None:
    wrong = RULES.replace('"model.layers.*.up" = ["in"', '"model.layers.*.upp" = ["in"')
    with pytest.raises(UsageError, match=r"\[dims\] of the toy rules: no tensor matches model.layers.\*.upp"):
        run({name: shape[::-1] if "up." in name else shape for name, shape in names().items()}, rules=wrong)
    optional = RULES + '"model.layers.*.gate?" = ["in", "out"]\n'
    assert run(rules=optional) == run()


@pytest.mark.parametrize(
    ("change", "message", "tensor"),
    [
        ({"depth": 3}, "layers 2 missing", "model.layers.2.qkv.weight"),
        ({"depth": 1}, "layers 1 beyond the config", "model.layers.1.qkv.weight"),
        ({"depth": 10**12}, r"layers 2, 3, 4, 5, 6, … missing", "model.layers.2.qkv.weight"),
    ],
)
def test_the_layers_are_those_of_the_config(change: dict[str, Any], message: str, tensor: str) -> None:
    with pytest.raises(CorruptError, match=rf"model.layers.\*.qkv.weight: {message}") as error:
        run(**change)
    assert error.value.tensor == tensor
    assert error.value.found == "2 layers"


def test_one_tensor_that_one_layer_lacks_is_named() -> None:
    shapes = names(3)
    del shapes["model.layers.1.out.bias"]
    with pytest.raises(CorruptError, match=r"model.layers.\*.out.bias: layers 1 missing") as error:
        run(shapes, depth=3)
    assert error.value.tensor == "model.layers.1.out.bias"


@pytest.mark.parametrize("depth", [None, 0, -1, "2", 2.0, True])
def test_a_config_without_a_number_of_layers_is_refused(depth: object) -> None:
    with pytest.raises(CorruptError, match="'depth' must be a positive integer"):
        run(depth=depth)


def test_segments_must_sum_to_the_stored_size() -> None:
    with pytest.raises(CorruptError, match="contradicts the tensor model.layers.0.qkv.weight") as error:
        run(names() | {"model.layers.0.qkv.weight": (24, 8)})
    assert error.value.expected == "dim 0 of size 16 (heads 4 x 2 + kv 2 x 2 + kv 2 x 2, toy rules)"
    assert error.value.found == "shape [24, 8]"


def test_segments_that_do_not_interleave_are_refused() -> None:
    with pytest.raises(CorruptError, match="cannot be interleaved per kv"):
        run({name: (20, *shape[1:]) if "qkv" in name else shape for name, shape in names().items()}, n_kv=3)


def test_the_number_of_dims_must_be_that_of_the_rules() -> None:
    with pytest.raises(CorruptError, match="model.layers.0.up.weight has 3 dims") as error:
        run(names() | {"model.layers.0.up.weight": (2, 8, 6)})
    assert (error.value.expected, error.value.found) == ("2 dims: in, out", "shape [2, 8, 6]")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.qkv.weight", (16, 8, 1)),  # a convolution?
        ("model.layers.0.qkv.weight", ()),
        ("model.layers.0.qkv.bias", (16, 1)),
        ("model.layers.0.out.weight", (8,)),  # only a bias may lack `in`
        ("model.layers.0.out.weight", ()),
        ("model.layers.0.out.bias", (8, 8)),
    ],
)
def test_a_tensor_whose_axis_is_not_known_is_never_silently_replicated(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} cannot be split by (column|row)") as error:
        run(names() | {name: shape})
    assert (
        error.value.found == f"shape {list(shape)}, dims {', '.join(PLAIN['bias'].axes(len(shape)) or ()) or 'unknown'}"
    )


def test_experts_are_told_by_dims() -> None:
    stacked = 'experts = "n_experts"' + RULES + '"model.layers.*.down" = ["expert", "out", "in"]\n'
    shapes = {name: (3, *shape) if "down" in name else shape for name, shape in names().items()}
    assert run(shapes, rules=stacked, n_experts=3).cuts["model.layers.0.down.weight"] == Cut("row", 2, ("ffn",))
    with pytest.raises(CorruptError, match="config.json contradicts the tensor model.layers.0.down.weight") as error:
        run(shapes, rules=stacked, n_experts=4)
    assert error.value.expected == "dim 0 of size 4 (experts, toy rules)"


# Experts one by one or stacked, in all layers but the first; what comes after the last layer is there or not.
MIXED = RULES.replace('layers = "depth"', 'layers = "depth"\nextra_layers = "more or 0"\nexperts = "n_experts"')
MIXED = MIXED.replace(
    "[rules]",
    """[conditions]
sparse_layer = "layer in sparse"
dense_layer = "not sparse_layer"

[found]
stacked = "model.layers.*.experts.up"

[rules]""",
)
MIXED = MIXED.replace(
    '"column ffn" = ["model.layers.*.up"]',
    """
"column ffn if dense_layer" = ["model.layers.*.up"]
"column ffn if sparse_layer and not stacked" = ["model.layers.*.experts.*.up"]
"column ffn if sparse_layer and stacked" = ["model.layers.*.experts.up"]
"replicate if layer >= depth" = ["model.layers.*.join"]
""",
).replace('"model.layers.*.up" = ["in", "out"]', '"model.layers.*.experts.up?" = ["expert", "out", "in"]')
SPARSE: dict[str, Any] = {"sparse": [1, 2, 3], "n_experts": 3, "depth": 3}


def mixed(layers: int = 3, stacked: bool = False) -> dict[str, tuple[int, ...]]:
    shapes = {name: shape for name, shape in names(layers).items() if ".up." not in name}
    shapes["model.layers.0.up.weight"] = (6, 8)
    for layer in range(1, layers):
        if stacked:
            shapes[f"model.layers.{layer}.experts.up"] = (3, 6, 8)
        else:
            shapes |= {f"model.layers.{layer}.experts.{expert}.up.weight": (6, 8) for expert in range(3)}
    return shapes


def test_a_condition_on_the_layer_holds_in_some_layers() -> None:
    cuts = run(mixed(), rules=MIXED, **SPARSE).cuts
    assert cuts["model.layers.2.experts.1.up.weight"] == Cut("column", 0, ("ffn",))
    with pytest.raises(UnsupportedError, match="no toy rule matches the tensor model.layers.0.up.weight"):
        run(mixed(), rules=MIXED, **SPARSE | {"sparse": [0, 1, 2]})
    with pytest.raises(CorruptError, match=r"layers.\*.up.weight: layers 1 missing") as error:
        run({n: s for n, s in mixed().items() if ".1.experts" not in n}, rules=MIXED, **SPARSE | {"sparse": [2]})
    assert error.value.tensor == "model.layers.1.up.weight"
    assert run(mixed(1), rules=MIXED, **SPARSE | {"depth": 1}).cuts  # no layer needs an expert
    with pytest.raises(CorruptError, match=r"'\(not \(layer in sparse\)\)' has no value for this config"):
        run(mixed(), rules=MIXED, n_experts=3, depth=3)


@pytest.mark.parametrize(
    ("condition", "spelled_out"),
    [
        ("sparse", "(layer >= 1)"),
        ("kinds[layer] == 'sparse'", "kinds[layer] == 'sparse'"),
        ('kinds[layer] == "sparse" and sparse', 'kinds[layer] == "sparse" and (layer >= 1)'),
        (r"kind == 'not \' sparse' or sparse", r"kind == 'not \' sparse' or (layer >= 1)"),
        ("""kind == "'" or sparse or kind == "'" """, """kind == "'" or (layer >= 1) or kind == "'" """),
        ("sparse_ or not_sparse or 1", "sparse_ or not_sparse or 1"),
    ],
)
def test_a_condition_is_named_by_names_alone(condition: str, spelled_out: str) -> None:
    """Not by a string that reads the same, a longer name, or a number."""
    named = '[conditions]\nsparse = "layer >= 1"\n1 = "depth"\nlisted = \'\'\'' + condition + "'''\n[rules]"
    text = RULES.replace("[rules]", named).replace("column ffn if gated", "column ffn if listed")
    assert toy(text).rules[3].condition == f"({spelled_out})"


def test_an_axis_asks_a_condition_by_its_name() -> None:
    named = '[conditions]\nfirst = "layer < 1"\n\n[axes]'
    text = RULES.replace("[axes]", named).replace('"n_ffn"', '"n_ffn + 2 if first else n_ffn"')
    shapes = names() | {"model.layers.0.up.weight": (8, 8), "model.layers.0.up.bias": (8,)}
    shapes["model.layers.0.down.weight"] = (8, 8)
    found = run(shapes, rules=text)
    assert {name: axis.count for name, axis in found.axes.items() if "ffn" in name} == {"ffn-8": 8, "ffn-6": 6}
    assert found.cuts["model.layers.0.up.weight"].segments == ("ffn-8",)


def test_experts_are_stored_one_by_one_or_stacked() -> None:
    assert run(mixed(stacked=True), rules=MIXED, **SPARSE).cuts["model.layers.1.experts.up"] == Cut(
        "column", 1, ("ffn",)
    )
    none = {name: shape for name, shape in mixed().items() if "experts" not in name}
    with pytest.raises(CorruptError, match=r"no tensor matches model.layers.\*.experts.\*.up, which every toy model"):
        run(none, rules=MIXED, **SPARSE)
    with pytest.raises(UnsupportedError, match="no toy rule matches the tensor model.layers.1.experts.0.up.weight"):
        run(mixed() | {"model.layers.2.experts.up": (3, 6, 8)}, rules=MIXED, **SPARSE)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("model.layers.2.experts.1.up.weight", r"model.layers.2.experts.\*.up.weight: experts 1 missing"),
        ("model.layers.1.experts.2.up.weight", r"model.layers.1.experts.\*.up.weight: experts 2 missing"),
    ],
)
def test_an_expert_that_one_layer_lacks_is_named(gone: str, message: str) -> None:
    shapes = mixed()
    del shapes[gone]
    with pytest.raises(CorruptError, match=message) as error:
        run(shapes, rules=MIXED, **SPARSE)
    assert error.value.tensor == gone
    assert (error.value.expected, error.value.found) == ("experts 0 to 2", "2 experts")


def test_a_number_that_is_no_layers_and_no_experts_tells_tensors_apart() -> None:
    rules = MIXED.replace("[rules]", '[rules]\n"replicate if sparse_layer" = ["model.layers.*.experts.*.part.*"]')
    parts = {f"model.layers.{layer}.experts.{e}.part.{p}": (3,) for layer in (1, 2) for e in range(3) for p in (4, 7)}
    assert run(mixed() | parts, rules=rules, **SPARSE).cuts["model.layers.2.experts.1.part.7"] == Cut("replicate")
    del parts["model.layers.2.experts.1.part.7"]
    with pytest.raises(CorruptError, match=r"model.layers.2.experts.\*.part.7: experts 1 missing"):
        run(mixed() | parts, rules=rules, **SPARSE)


def test_an_expert_that_the_config_does_not_know_is_named() -> None:
    with pytest.raises(CorruptError, match=r"model.layers.1.experts.\*.up.weight: experts 2 beyond the config"):
        run(mixed(), rules=MIXED, **SPARSE | {"n_experts": 2})
    with pytest.raises(UnsupportedError, match="no toy rule matches the tensor model.layers.1.experts.x.up.weight"):
        run(mixed() | {"model.layers.1.experts.x.up.weight": (6, 8)}, rules=MIXED, **SPARSE)


def test_layers_after_the_last_are_there_whole_or_not_at_all() -> None:
    more = mixed(4) | {"model.layers.3.join.weight": (8, 16)}
    assert run(more, rules=MIXED, more=1, **SPARSE).cuts["model.layers.3.join.weight"] == Cut("replicate")
    assert run(mixed(), rules=MIXED, more=1, **SPARSE).cuts
    for gone in ("join.weight", "norm.weight", "experts.1.up.weight"):
        with pytest.raises(CorruptError) as error:
            run({n: s for n, s in more.items() if n != f"model.layers.3.{gone}"}, rules=MIXED, more=1, **SPARSE)
        assert gone == "join.weight" or error.value.tensor == f"model.layers.3.{gone}"
    with pytest.raises(CorruptError, match="layers 3 beyond the config"):
        run(mixed(4), rules=MIXED, **SPARSE)
    with pytest.raises(CorruptError, match="layers 4 missing"):
        run(more, rules=MIXED, more=2, **SPARSE)
    with pytest.raises(CorruptError, match="'more or 0' must be an integer, 0 or more"):
        run(more, rules=MIXED, more=-1, **SPARSE)


def test_a_pattern_for_one_layer_is_for_that_layer_alone() -> None:
    one = RULES.replace('"replicate" = [', '"replicate" = ["model.layers.1.gate", ')
    assert run(names() | {"model.layers.1.gate.weight": (3,)}, rules=one).cuts["model.layers.1.gate.weight"].dim is None
    with pytest.raises(UnsupportedError, match="no toy rule matches the tensor model.layers.0.gate.weight"):
        run(names() | {"model.layers.0.gate.weight": (3,), "model.layers.1.gate.weight": (3,)}, rules=one)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_a_class_of_layer_numbers_tells_layers_apart(order: tuple[int, int, int]) -> None:
    some = RULES.replace('"replicate" = [', '"replicate" = ["model.blocks.[02].g", ')
    shapes = {f"model.blocks.{i}.g.weight": (3,) for i in order}
    with pytest.raises(UnsupportedError, match="no toy rule matches the tensor model.blocks.1.g.weight"):
        run(names() | shapes, rules=some)
    del shapes["model.blocks.1.g.weight"]
    assert run(names() | shapes, rules=some).cuts["model.blocks.2.g.weight"] == Cut("replicate")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('prefix = "model."', 'prefiks = "model."', "unknown keys: prefiks"),
        ('layers = "depth"\n', "", "missing keys: layers"),
        ('layers = "depth"', 'layers = "depth"\nexperts = true', "experts must be an expression"),
        ('layers = "depth"', 'layers = "depth"\nextra_layers = "1 +"', r"cannot read the expression '1 \+'"),
        ("[defaults]", "[found]\nx = 1\n[defaults]", "found must be a table of strings"),
        ("[defaults]", "[conditions]\nx = 1\n[defaults]", "conditions must be a table of strings"),
        ("[defaults]", '[conditions]\nx = "1 +"\n[defaults]', r"cannot read the expression '\(1 \+\)'"),
        ("[defaults]", '[found]\nx = "[z-a]"\n[defaults]', "bad character range"),
        ("layers.*.down", "layers.*.experts.*.down", r"'model.layers.\*.experts.\*.down' is of experts, and no key"),
        ('"column vocab"', '"column vocab if layer > 1"', "pattern 'model.embed' has no layer, and its condition"),
        ('ffn = { count = "n_ffn" }', 'ffn = { count = "n_ffn", pads = true }', "axis ffn: unknown keys: pads"),
        ('ffn = { count = "n_ffn" }', 'ffn = { unit = "1" }', "axis ffn: missing keys: count"),
        ('ffn = { count = "n_ffn" }', "ffn = 6", "axes must be a table of tables"),
        ("replicate = true", 'replicate = "yes"', "axis kv: replicate must be true or false"),
        ("pad = true", "pad = 1", "axis vocab: pad must be true or false"),
        ('count = "n_vocab"', "count = true", "axis vocab: count must be an expression"),
        ('group = "kv"', 'group = "kw"', "axis heads: group 'kw' is not an axis"),
        ('group = "kv"', 'group = "heads"', "axis heads: group 'heads' is not an axis, or has a group itself"),
        ('["toy"]', '"toy"', "model_types must be a list of strings"),
        ('["model.layers.*.out"]', '"model.layers.*.out"', "rules must be a table of lists of strings"),
        ('["in", "out"]', '["in", "uot"]', "dims must be lists of out, in, expert"),
        ('["in", "out"]', '"in"', "dims must be lists of out, in, expert"),
        ('{ head = "model.embed" }', "{ head = 1 }", "tied must be a table of strings"),
        ('"model."', "1", "prefix must be a string"),
        ('"row heads"', '"rows heads"', "rule 'rows heads': expected `column AXIS…`"),
        ('"row heads"', '"row"', "rule 'row': expected"),
        ('"buffer"', '"drop"', "rule 'drop': expected"),
        ('"buffer"', '"buffer ffn"', "rule 'buffer ffn': expected"),
        ('"row heads"', '"row haeds"', "rule 'row haeds': 'haeds' is not an axis"),
        ("kv kv / kv", "kv kv / vk", "'vk' is not an axis"),
        (" if gated", " if gated()", "is not part of the expression language"),
        ('"n_ffn" }', "\"__import__('os').getcwd()\" }", r"is not part of the expression language"),
        ('"depth"', '"depth +"', "cannot read the expression"),
        ('"model.layers.*.mask"', '"model.layers.*.[z-a]"', r"pattern 'model.layers.\*.\[z-a\]': bad character range"),
        ("[rules]", "[rules", "line 17"),
        ("[defaults]", "defaults = 3\n[other]", "unknown keys: other"),
    ],
)
def test_a_bad_rules_file_is_refused(old: str, new: str, message: str) -> None:
    assert old in RULES
    with pytest.raises(UsageError, match=message) as error:
        parse_architecture(RULES.replace(old, new, 1), "toy.toml")
    assert error.value.path == "toy.toml"
    assert str(error.value).startswith("bad rules file: ")


def test_an_unused_expression_is_checked_too() -> None:
    """A condition that is false, an axis that no rule uses: what stands in the file must be of the language."""
    with pytest.raises(UsageError, match="not part of the expression language"):
        parse_architecture(RULES.replace("[axes]", '[axes]\nspare = { count = "open(1)" }'), "toy.toml")


def test_a_rules_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UsageError, match="cannot read the rules file"):
            find_architecture(CONFIG, path, "config.json")
    (tmp_path / "latin.toml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="cannot read the rules file"):
        find_architecture(CONFIG, tmp_path / "latin.toml", "config.json")


def test_a_rules_file_for_another_model_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy.toml"
    path.write_text(RULES)
    assert find_architecture(CONFIG, path, "config.json").name == "toy"
    with pytest.raises(UsageError, match="the rules file is for another architecture") as error:
        find_architecture({"model_type": "llama"}, path, "config.json")
    assert (error.value.expected, error.value.found) == ("model_types with 'llama'", "toy")


@pytest.mark.parametrize(
    ("model_type", "closest"),
    [("lama", "llama"), ("gpt_neox2", "gpt_neox"), ("qwen2_5", "qwen2"), ("flacon", "falcon")],
)
def test_an_unknown_model_type_is_refused_with_the_closest(model_type: str, closest: str) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"no rules for model_type '{model_type}' \(closest: {closest}"
    ) as error:
        find_architecture({"model_type": model_type}, None, "config.json")
    assert "--rules FILE" in str(error.value.hint)


@pytest.mark.parametrize("model_type", ["zzz", "../rules", "../architectures/opt", "", "toy.toml", "*"])
def test_a_model_type_like_no_other_is_refused_too(model_type: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        find_architecture({"model_type": model_type}, None, "config.json")
    assert error.value.message == f"no rules for model_type {model_type!r}"


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": ["llama"]}])
def test_a_config_without_a_model_type_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="config.json names no model_type") as error:
        find_architecture(config, None, "config.json")
    assert error.value.path == "config.json"


def test_the_digest_names_the_text() -> None:
    assert toy().digest == toy().digest != toy(RULES + "# another\n").digest


def test_the_built_in_files_are_found_by_each_of_their_types() -> None:
    families = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox", "gptj", "gpt_bigcode", "gpt_neo"}
    assert families | {"bloom", "falcon", "opt"} <= {architecture.name for architecture in all_builtin()}
    for architecture in all_builtin():
        assert builtin(architecture.name) is architecture
        assert all(builtin(model_type) is architecture for model_type in architecture.model_types)


def test_no_other_file_is_read_as_toml_for_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, parse = [], tpshard.rules.architecture.parse_architecture

    def spy(text: str, path: str) -> Architecture:
        parsed.append(Path(path).stem)
        return parse(text, path)

    monkeypatch.setattr(tpshard.rules.architecture, "parse_architecture", spy)
    tpshard.rules.architecture._builtin_file.cache_clear()  # other tests of this process have parsed some
    for name in ("llama", "RefinedWeb", "qwen2_vl_text"):
        builtin(name)
    assert parsed == ["llama", "falcon", "qwen2"]


def test_a_bare_parameter_has_the_dims_that_the_rules_file_gives_it() -> None:
    rules = 'experts = "n_experts"' + RULES.replace('"row ffn" = [', '"row ffn" = ["model.layers.*.down_bias", ')
    rules += '"model.layers.*.down_bias" = ["expert", "out"]\n'
    shapes: dict[str, tuple[int, ...]] = {f"model.layers.{layer}.down_bias": (3, 8) for layer in range(2)}
    assert run(names() | shapes, rules, n_experts=3).cuts["model.layers.0.down_bias"] == Cut("replicate")
    with pytest.raises(CorruptError, match="has 2 dims"):
        run(names() | shapes, rules.replace('_bias" = ["expert", "out"]', '_bias" = ["out"]'), n_experts=3)
