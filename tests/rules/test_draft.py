"""Drafts of rules: a known family is hidden and drafted from the others, and must come out right or not usable."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tpshard
from tests.helpers.checkpoints import VARIANTS
from tests.helpers.command import LLAMA, fails, llama, llama_tensors, succeeds
from tests.helpers.grids import one_in, some
from tests.helpers.toys import Tensor, random_tensor, write_checkpoint
from tpshard.errors import TpshardError, UsageError
from tpshard.inputs.checkpoint import Checkpoint, open_checkpoint
from tpshard.rules.architecture import all_builtin, builtin, find_architecture, parse_architecture
from tpshard.rules.classify import Classification, classify
from tpshard.rules.draft.known import modules
from tpshard.rules.draft.render import Draft, make

Made = Callable[..., Path]
# Families of separate q, k, v, gate and up under LLaMA's names: a draft needs no hand.
LIKE_LLAMA = {
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "smollm3", "seed_oss", "olmo",
    "cohere2", "exaone4", "nemotron", "starcoder2",
}  # fmt: skip


# One of each way to name and to store a layer; a draft takes most of a second.
DIFFERENT = """
    llama llama-mqa qwen2-bias qwen3-tied-bias gemma2 nemotron-bias exaone4 starcoder2-untied-nobias olmo2
    cohere-qk-norm stablelm-parallel phi phi3-gqa-head-dim glm4 gpt2 gpt_neox gptj gpt_bigcode-mqa gpt_bigcode-mha
    gpt_neo bloom falcon-new falcon-mqa opt opt-350m-like mpt codegen xglm persimmon mixtral mixtral-stacked qwen2_moe
    deepseek_v3 gpt_oss granitemoe qwen3_next nemotron_h falcon_h1 llama4_text
""".split()


def hidden(checkpoint: Checkpoint) -> tuple[dict[str, Any], Draft]:
    """The draft for a checkpoint under another model_type, made without its own family's rules."""
    own = find_architecture(checkpoint.config, None, "").name
    config = {**checkpoint.config, "model_type": "mine"}
    return config, make(config, checkpoint.tensors, [a for a in all_builtin() if a.name != own])


def effect(found: Classification, name: str) -> tuple[Any, ...]:
    """What a rule does to a tensor, whatever the axes are called."""
    cut = found.cuts[name]
    sizes = tuple((found.axes[axis].count, found.axes[axis].unit) for axis in cut.segments)
    return cut.dim, sizes, cut.interleave and found.axes[cut.interleave].count


def layouts(path: Path, rules: Path | None) -> list[Any]:
    """What each rank holds, at several tp; the kind of error where a tp is refused."""
    found: list[Any] = []
    for tp in (1, 2, 3, 4, 8):
        try:
            found.append(tpshard.plan(path, tp, rules=rules, uneven=tp == 3).split.layout[:])
        except TpshardError as error:
            found.append(type(error))
    return found


@pytest.mark.parametrize("name", some(VARIANTS, one_in(10, DIFFERENT)))
def test_a_draft_is_right_or_refused(name: str, made: Made, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(made(name))
    config, draft = hidden(checkpoint)
    if VARIANTS[name].model_type in LIKE_LLAMA:
        assert draft.refusal is None
    (tmp_path / "mine.toml").write_text(draft.text)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copyfile(made(name) / "model.safetensors", tmp_path / "model.safetensors")
    if draft.refusal is None:
        assert not draft.undecided
        assert layouts(tmp_path, tmp_path / "mine.toml") == layouts(made(name), None)
        return
    with pytest.raises(TpshardError):
        tpshard.plan(tmp_path, 2, rules=tmp_path / "mine.toml")
    # What is decided is right even so.
    undecided = {choice.module.name for choice in draft.undecided}
    assert all(choice.candidates for choice in draft.undecided)
    if "# UNDECIDED: layers" not in draft.text and "# UNDECIDED: experts" not in draft.text:
        truth = classify(find_architecture(checkpoint.config, None, ""), checkpoint.config, checkpoint.tensors)
        decided = [tensor for tensor in checkpoint.tensors if modules([tensor])[0].name not in undecided]
        found = classify(parse_architecture(draft.text, "mine.toml"), config, decided)
        for tensor in decided:
            assert effect(found, tensor.name) == effect(truth, tensor.name), tensor.name


# --- a LLaMA of a few numbers under another model_type ---

FFN = 24


def foreign(path: Path, change: Mapping[str, tuple[int, ...] | None] = {}, **config: Any) -> Path:  # noqa: B006
    """It, with tensors added, replaced or (None) removed; `*` stands for each layer."""
    rng = np.random.default_rng(0)
    tensors: dict[str, Tensor] = llama_tensors(intermediate_size=FFN)
    for pattern, shape in change.items():
        for layer in range(2 if "*" in pattern else 1):
            name = pattern.replace("*", str(layer))
            tensors.pop(name, None)
            if shape is not None:
                tensors[name] = random_tensor(rng, "F32", shape)
    return write_checkpoint(path, LLAMA | {"model_type": "mine", "intermediate_size": FFN} | config, tensors)


def drafted(path: Path) -> dict[str, Any]:
    return succeeds("archs", "draft", path, "--json").json


def undecided(found: dict[str, Any]) -> dict[str, list[str]]:
    assert found["refusal"] is not None
    return {entry["module"]: entry["candidates"] for entry in found["undecided"]}


Q, K, V = (f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkv")


@pytest.mark.parametrize(
    ("change", "module", "candidates"),
    [
        # 4 heads and 2 KV heads of 4: the three ways to store them in one tensor have one shape.
        (
            {Q: None, K: None, V: None, "model.layers.*.self_attn.qkv_proj.weight": (32, 16)},
            "model.layers.*.self_attn.qkv_proj",
            {"column heads kv kv", "column heads kv values / kv"},
        ),
        ({"model.layers.*.mlp.gate_up_proj.weight": (48, 16)}, "model.layers.*.mlp.gate_up_proj", {"column ffn ffn"}),
        ({"model.layers.*.mlp.router.weight": (4, 16)}, "model.layers.*.mlp.router", {"replicate"}),
        ({"model.layers.*.mlp.gate.weight": (4, 16)}, "model.layers.*.mlp.gate", {"replicate"}),
        ({"model.positions.weight": (64, 16)}, "model.positions", {"replicate"}),
        ({"model.layers.*.self_attn.mixer.weight": (16, 16)}, "model.layers.*.self_attn.mixer", {"column heads"}),
        ({"model.layers.*.self_attn.sub_norm.weight": (16,)}, "model.layers.*.self_attn.sub_norm", {"replicate"}),
        ({"model.layers.*.self_attn.sinks": (4,)}, "model.layers.*.self_attn.sinks", {"replicate"}),
        ({"model.layers.*.mlp.ffn_norm.weight": (24,)}, "model.layers.*.mlp.ffn_norm", {"replicate"}),
        ({"model.layers.*.conv.weight": (16, 1, 4)}, "model.layers.*.conv", {"replicate"}),
        ({K: (12, 16)}, "model.layers.*.self_attn.k_proj", {"column kv"}),  # not 2 heads of 4
        ({"model.layers.1.self_attn.q_proj.weight": (8, 16)}, "model.layers.*.self_attn.q_proj", {"column heads"}),
    ],
)
def test_what_shapes_do_not_decide_is_left_open(
    change: dict[str, tuple[int, ...] | None], module: str, candidates: set[str], tmp_path: Path
) -> None:
    model = foreign(tmp_path / "model", change)
    draft = drafted(model)
    found, text = undecided(draft), draft["text"]
    assert list(found) == [module] and candidates <= set(found[module])
    assert f"# UNDECIDED: {module}" in text
    tomllib.loads(text)
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(TpshardError):
        tpshard.plan(model, 2, rules=tmp_path / "mine.toml")


def test_what_known_families_disagree_about_is_left_open(tmp_path: Path) -> None:
    text = builtin("llama").text
    changed = text.replace('"model.layers.*.mlp.gate_proj", ', "")
    changed = changed.replace('"replicate" = [', '"replicate" = ["model.layers.*.mlp.gate_proj", ')
    assert changed.count("mlp.gate_proj") == 1
    checkpoint = open_checkpoint(foreign(tmp_path / "model"))
    known = [builtin("llama"), parse_architecture(changed, "other.toml")]
    draft = make(checkpoint.config, checkpoint.tensors, known)
    assert [choice.module.name for choice in draft.undecided] == ["model.layers.*.mlp.gate_proj"]
    assert make(checkpoint.config, checkpoint.tensors, known[:1]).refusal is None


def test_a_draft_is_completed_by_hand(tmp_path: Path) -> None:
    model = foreign(tmp_path / "model", {"model.layers.*.mlp.router.weight": (4, 16)})
    text = drafted(model)["text"]
    completed = text.replace('"replicate" = [', '"replicate" = [\n    "model.layers.*.mlp.router",')
    (tmp_path / "mine.toml").write_text(completed)
    rules = {t["name"]: t["rule"] for t in tpshard.plan(model, 2, rules=tmp_path / "mine.toml").to_json()["tensors"]}
    assert rules["model.layers.1.mlp.router.weight"] == "replicate"
    assert rules["model.layers.1.mlp.up_proj.weight"] == "column"


@pytest.mark.parametrize(("size", "rule"), [(4, "replicate"), (16, "column heads")])
def test_a_norm_of_q_is_over_one_head_or_over_all(size: int, rule: str, tmp_path: Path) -> None:
    model = foreign(tmp_path / "model", {"model.layers.*.self_attn.q_norm.weight": (size,)})
    found = drafted(model)
    assert found["refusal"] is None
    assert "model.layers.*.self_attn.q_norm" in tomllib.loads(found["text"])["rules"][rule]


def test_heads_of_two_sizes_are_left_open(tmp_path: Path) -> None:
    """By the width q has heads of 4, by head_dim k has one of 8."""
    model = foreign(tmp_path / "model", head_dim=8, num_key_value_heads=1)
    assert set(undecided(drafted(model))) == {f"model.layers.*.self_attn.{name}_proj" for name in "qkvo"}


def test_a_square_matrix_needs_to_know_how_others_are_stored(tmp_path: Path) -> None:
    """Where the feed-forward is [in, out], q and o may be so too."""
    names = {name: f"model.layers.*.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    change = {names["gate"]: (16, 24), names["up"]: (16, 24), names["down"]: (24, 16)}
    found = undecided(drafted(foreign(tmp_path / "model", change)))
    assert {f"model.layers.*.self_attn.{name}_proj" for name in "qo"} <= set(found)
    assert "model.layers.*.mlp.up_proj" not in found


@pytest.mark.parametrize("bias", [False, True])
def test_a_feed_forward_of_unknown_names_is_told_by_its_shapes(bias: bool, tmp_path: Path) -> None:
    gone = {f"model.layers.*.mlp.{name}_proj.weight": None for name in ("gate", "up", "down")}
    change: dict[str, tuple[int, ...] | None] = gone | {
        "model.layers.*.feed.widen.weight": (24, 16), "model.layers.*.feed.narrow.weight": (16, 24),
    }  # fmt: skip
    if bias:
        change |= {"model.layers.*.feed.widen.bias": (24,), "model.layers.*.feed.narrow.bias": (16,)}
    found = drafted(foreign(tmp_path / "model", change))
    rules = tomllib.loads(found["text"])["rules"]
    assert (rules["column ffn"], rules["row ffn"]) == (["model.layers.*.feed.widen"], ["model.layers.*.feed.narrow"])


def test_a_config_of_unknown_keys_is_left_open_with_what_they_may_be(tmp_path: Path) -> None:
    model = foreign(tmp_path / "model", num_hidden_layers=None, depth=2, intermediate_size=None, mlp_width=FFN)
    text = drafted(model)["text"]
    assert "# UNDECIDED: layers" in text and "depth" in text
    assert "24 is mlp_width" in text
    with pytest.raises(UsageError, match="missing keys: layers"):
        parse_architecture(text, "mine.toml")


@pytest.mark.parametrize(("stored", "said"), [(True, None), (False, None), (True, True)])
def test_ties_are_what_is_stored_where_the_config_is_silent(stored: bool, said: bool | None, tmp_path: Path) -> None:
    change = {} if stored else {"lm_head.weight": None}
    given = {} if said is None else {"tie_word_embeddings": said}
    found = tomllib.loads(drafted(foreign(tmp_path / "model", change, **given))["text"])
    assert found["tied"] == {"lm_head": "model.embed_tokens"}
    assert found.get("defaults") == ({"tie_word_embeddings": not stored} if said is None else None)


def test_the_text_model_of_a_nested_config_is_drafted(tmp_path: Path) -> None:
    text = {key: value for key, value in LLAMA.items() if key != "torch_dtype"} | {"model_type": "mine"}
    tensors = {f"language_model.{name}": tensor for name, tensor in llama_tensors().items()}
    tensors["vision.proj.weight"] = random_tensor(np.random.default_rng(0), "F32", (16, 4))
    model = write_checkpoint(tmp_path / "model", {"model_type": "mine_vl", "text_config": text}, tensors)
    found = drafted(model)
    assert (found["model_type"], found["refusal"]) == ("mine", None)
    (tmp_path / "mine.toml").write_text(found["text"])
    plan = tpshard.plan(model, 2, rules=tmp_path / "mine.toml").to_json()
    assert plan["architecture"]["text"]["prefix"] == "language_model."
    for name in ("model.embed_tokens", "lm_head"):
        del tensors[f"language_model.{name}.weight"]
    headless = write_checkpoint(tmp_path / "none", {"model_type": "mine_vl", "text_config": text}, tensors)
    assert "where the text model lies" in fails(4, "archs", "draft", headless)["message"]


# --- the command ---


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_the_command(tmp_path: Path) -> None:
    model = foreign(tmp_path / "model")
    printed = succeeds("archs", "draft", model)
    assert "closest: " in printed.err and "--rules FILE" in printed.err
    written = succeeds("archs", "draft", model, "-o", "mine.toml")
    assert written.out == "mine.toml\n" and Path("mine.toml").read_text() == printed.out
    assert "the file exists" in fails(9, "archs", "draft", model, "-o", "mine.toml")["message"]
    succeeds("split", model, "--tp", 2, "--rules", "mine.toml", "-o", "out", "--no-fsync")
    found = succeeds("archs", "draft", model, "-o", "other.toml", "--json").json
    assert list(found) == [
        "schema_version", "command", "model_type", "closest", "share", "undecided", "refusal", "text", "output",
    ]  # fmt: skip
    assert (found["command"], found["output"], found["text"]) == ("archs", "other.toml", printed.out)


def test_the_error_for_an_unknown_model_type_names_the_command(tmp_path: Path) -> None:
    assert "`tpshard archs draft MODEL`" in str(fails(4, "plan", foreign(tmp_path / "model"), "--tp", 2)["hint"])


def test_a_model_type_with_rules_needs_no_draft(tmp_path: Path) -> None:
    error = fails(2, "archs", "draft", llama(tmp_path / "model"))
    assert "already" in error["message"] and "archs show llama" in error["hint"]


def test_a_draft_says_what_is_open(tmp_path: Path) -> None:
    model = foreign(tmp_path / "model", {"model.layers.*.mlp.router.weight": (4, 16)})
    assert "undecided modules: 1" in succeeds("archs", "draft", model).err
    shapes = drafted(model)["undecided"][0]["shapes"]
    assert shapes == {"weight": [[4, 16]]}
