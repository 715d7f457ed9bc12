"""Vision-language checkpoints: the decoder is cut as the text model alone would be, and all the rest is replicated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tpshard
from tests.helpers import multimodal_checkpoints as multimodal
from tests.helpers.command import llama_tensors, succeeds
from tests.helpers.command import tpshard as tpshard_command
from tests.helpers.grids import in_turn
from tests.helpers.multimodal_checkpoints import CONFIGS, with_config
from tests.helpers.toys import Tensor, contents, random_tensor, read_all, read_rank, write_checkpoint
from tpshard.errors import CorruptError, TpshardError, UnsupportedError
from tpshard.execute.publish import Settings
from tpshard.rules.multimodal import find_rules, text_config

TODAY = {
    **dict.fromkeys(
        ("llava", "mistral3", "internvl", "gemma3"),
        {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.", "": "model."},
    ),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl"),
        {"model.": "model.language_model.", "visual.": "model.visual.", "lm_head.": "lm_head."},
    ),
}
"""Names of published files → those that transformers' classes have today; qwen3_vl and idefics3 have but one form."""
CASES = [(name, form) for name in CONFIGS for form in ("published", "today") if form == "published" or name in TODAY]
TEXT_TYPES = {
    "llava": "llama", "mistral3": "mistral", "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3",
    "idefics3": "llama", "internvl": "qwen2", "gemma3": "gemma3_text",
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found: dict[str, Path] = {}

    def get(name: str, form: str = "published") -> Path:
        key = f"{name}-{form}"
        if key not in found:
            path = tmp_path_factory.mktemp("multimodal") / key
            if form == "published":
                found[key] = multimodal.make(name, path)
            else:
                found[key] = multimodal.renamed(get(name), path, TODAY[name])
        return found[key]

    return get


def is_vision(name: str) -> bool:
    return any(part in name for part in ("vision", "visual", "projector", "connector"))


def plain_name(name: str) -> str:
    """The decoder's name without what a multimodal model puts before it; the model's prefix may be missing."""
    for start in ("language_model.", "model.language_model.", "model.text_model."):
        name = name.removeprefix(start)
    return name if name.startswith("lm_head.") else "model." + name.removeprefix("model.")


def text_alone(model: Path, out: Path) -> Path:
    """The decoder as an ordinary checkpoint."""
    config = json.loads((model / "config.json").read_text())
    tensors = {plain_name(name): tensor for name, tensor in read_all(model).items() if not is_vision(name)}
    text = config["text_config"] | {"model_type": TEXT_TYPES[config["model_type"]]}
    text["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return write_checkpoint(out, text, tensors)


@pytest.mark.parametrize(("case", "tp"), in_turn(CASES, (2, 4)))
def test_the_decoder_is_split_and_the_rest_replicated(
    case: tuple[str, str], tp: int, published: Any, quick: Settings, tmp_path: Path
) -> None:
    model, out, alone = published(*case), tmp_path / "out", tmp_path / "alone"
    tpshard.split(model, tp, out, settings=quick)
    tpshard.split(text_alone(model, tmp_path / "text"), tp, alone, settings=quick)
    source = read_all(model)
    for rank in range(tp):
        held, expected = read_rank(out, rank, tp), read_rank(alone, rank, tp)
        assert set(held) == set(source)
        vision = {tensor for tensor in held if is_vision(tensor)}
        assert {tensor: held[tensor] for tensor in vision} == {tensor: source[tensor] for tensor in vision}
        assert vision and {plain_name(tensor): held[tensor] for tensor in set(held) - vision} == expected
    assert tpshard.check(out, model, settings=quick).equal
    other = 6 - tp
    tpshard.reshard(out, other, tmp_path / "other", settings=quick)
    tpshard.split(model, other, tmp_path / "direct", settings=quick)
    assert contents(tmp_path / "other") == contents(tmp_path / "direct")
    tpshard.merge(out, tmp_path / "merged", settings=quick)
    assert read_all(tmp_path / "merged") == source


@pytest.mark.parametrize("name", sorted(TODAY.keys() & CONFIGS.keys()))
def test_the_names_of_today_are_transformers_own(name: str, published: Any) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(published(name))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert read_all(published(name, "today")).keys() <= model.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "form", "prefix", "replicated"),
    [
        ("llava", "published", "language_model.", ["multi_modal_projector", "vision_tower"]),
        ("llava", "today", "model.language_model.", ["model.multi_modal_projector", "model.vision_tower"]),
        ("qwen2_5_vl", "published", "model.", ["visual"]),
        ("idefics3", "published", "model.text_model.", ["model.connector", "model.vision_model"]),
    ],
)
def test_the_plan_says_what_is_split(
    name: str, form: str, prefix: str, replicated: list[str], published: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    model = published(name, form)
    plan = succeeds("plan", model, "--tp", 2, "--json").json
    text = plan["architecture"]["text"]
    assert plan["architecture"]["model_type"] == name
    assert (text["prefix"], text["replicated"], text["config"]) == (prefix, replicated, "text_config")
    line = f"text model: {text['model_type']} under {prefix}* is split; replicated: {', '.join(replicated)}"
    assert line in succeeds("plan", model, "--tp", 2).out.splitlines()
    succeeds("split", model, "--tp", 2, "-o", "out")
    assert json.loads(Path("out/tpshard.json").read_text())["architecture"] == plan["architecture"]


def test_a_model_without_a_nested_one_says_nothing_of_it(made: Any, tmp_path: Path) -> None:
    assert "text" not in tpshard.plan(made("llama"), 2).to_json()["architecture"]
    assert "text model" not in succeeds("plan", made("llama"), "--tp", 2).out


# --- a decoder of a few numbers, among other tensors ---

CONFIG: dict[str, Any] = {
    "model_type": "some_vl",
    "text_config": {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 10,
    },
}  # fmt: skip


def tiny(prefix: str = "language_model.", **others: tuple[int, ...]) -> dict[str, Tensor]:
    """A LLaMA under a prefix, and other tensors (`__` for a dot)."""
    rng = np.random.default_rng(1)
    extra = {name.replace("__", "."): random_tensor(rng, "F32", shape) for name, shape in others.items()}
    return {prefix + name: tensor for name, tensor in llama_tensors().items()} | extra


def plan(tmp_path: Path, tensors: dict[str, Tensor], **config: Any) -> dict[str, Any]:
    model = write_checkpoint(tmp_path / f"model{len(list(tmp_path.iterdir()))}", CONFIG | config, tensors)
    return tpshard.plan(model, 2).to_json()


def rules_of(report: dict[str, Any]) -> dict[str, str]:
    return {tensor["name"]: tensor["rule"] for tensor in report["tensors"]}


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model.", "a.b.c.", "thinker."])
def test_any_prefix_is_found(prefix: str, tmp_path: Path) -> None:
    report = plan(tmp_path, tiny(prefix, tower__layers__0__self_attn__q_proj__weight=(16, 16)))
    assert report["architecture"]["text"]["prefix"] == prefix
    rules = rules_of(report)
    assert rules.pop("tower.layers.0.self_attn.q_proj.weight") == "replicate"
    assert [rules[f"{prefix}model.layers.1.{name}.weight"] for name in ("self_attn.q_proj", "mlp.down_proj")] == [
        "column", "row",
    ]  # fmt: skip
    assert rules[f"{prefix}lm_head.weight"] == "column"


def test_two_decoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"is there 2 times, under 'language_model.*', 'talker.*'"):
        plan(tmp_path, tiny() | tiny("talker."))


@pytest.mark.parametrize(
    "name", ["language_model__model__layers__0__cross_attn__q_proj__weight", "language_model__model__extra__weight"]
)
def test_a_decoders_tensor_without_a_rule_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="is a part of the text model, and no llama rule matches it") as error:
        plan(tmp_path, tiny(**{name: (16, 16)}))
    assert error.value.tensor == name.replace("__", ".")


def test_what_lies_beside_the_decoder_may_share_its_outer_prefix(tmp_path: Path) -> None:
    """As in the first Qwen2-VL files: the head outside `model.`, the vision model beside it."""
    report = plan(tmp_path, tiny("", visual__blocks__0__qkv__weight=(48, 16)))
    assert report["architecture"]["text"]["prefix"] == "model."
    assert rules_of(report)["lm_head.weight"] == "column"
    assert rules_of(report)["visual.blocks.0.qkv.weight"] == "replicate"


@pytest.mark.parametrize("gone", ["model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"])
def test_an_incomplete_decoder_is_refused(gone: str, tmp_path: Path) -> None:
    tensors = tiny(vision__proj__weight=(16, 4))
    del tensors[f"language_model.{gone}.weight"]
    with pytest.raises(CorruptError) as error:
        plan(tmp_path, tensors)
    assert gone.partition(".layers")[0] in str(error.value)


def test_no_decoder_at_all_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(CorruptError, match="is not complete under any prefix"):
        plan(tmp_path, {"vision.proj.weight": random_tensor(rng, "F32", (4, 4))})


def test_a_wrong_size_is_named_as_in_the_checkpoint(tmp_path: Path) -> None:
    text = CONFIG["text_config"] | {"intermediate_size": 12}
    with pytest.raises(CorruptError, match="config.json contradicts the tensor language_model.model.layers.0.mlp"):
        plan(tmp_path, tiny(), text_config=text)


def test_one_decoder_half_inside_the_prefix_is_refused(tmp_path: Path) -> None:
    tensors = tiny("model.language_model.")
    tensors["model.norm.weight"] = tensors["model.language_model.model.norm.weight"]
    with pytest.raises(CorruptError, match="are one tensor"):
        plan(tmp_path, tensors)


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        (None, None, {}),
        (True, None, {"language_model.lm_head": "language_model.model.embed_tokens"}),
        (True, False, {}),
        (False, True, {"language_model.lm_head": "language_model.model.embed_tokens"}),
    ],
)
def test_ties_are_the_text_models_or_else_the_outer_ones(
    outer: bool | None, inner: bool | None, expected: dict[str, str], tmp_path: Path
) -> None:
    text = CONFIG["text_config"] | ({} if inner is None else {"tie_word_embeddings": inner})
    tensors = {name: tensor for name, tensor in tiny().items() if "lm_head" not in name}
    given: dict[str, Any] = {"architectures": ["LlavaModel"]}  # which has no head
    given |= {} if outer is None else {"tie_word_embeddings": outer}
    assert plan(tmp_path, tensors, text_config=text, **given)["tied"] == expected
    stripped = {name.replace(".model.", "."): tensor for name, tensor in tensors.items()}
    tied = plan(tmp_path, stripped, text_config=text, **given)["tied"]
    assert tied == ({"lm_head": "language_model.embed_tokens"} if expected else {})


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
def test_other_keys_of_the_nested_config(key: str, tmp_path: Path) -> None:
    given = {"text_config": None, key: CONFIG["text_config"]}
    assert plan(tmp_path, tiny(), **given)["architecture"]["text"]["config"] == key


def test_the_outer_model_types_own_rules_win(tmp_path: Path) -> None:
    assert find_rules({"model_type": "opt", "text_config": {"model_type": "llama"}}, None, "").text is None
    own = tmp_path / "own.toml"
    own.write_text(succeeds("archs", "show", "llama").out.replace('["llama", "llama_bidirec"]', '["some_vl", "llama"]'))
    assert find_rules(CONFIG, own, "").text is None
    own.write_text(succeeds("archs", "show", "llama").out)
    subject = find_rules(CONFIG, own, "")
    assert subject.text is not None and subject.architecture.name == "own"


def test_first_files_have_the_values_beside_the_vision_models(published: Any, tmp_path: Path) -> None:
    model = multimodal.renamed(published("qwen2_5_vl"), tmp_path / "flat", {"": ""})
    config = json.loads((model / "config.json").read_text())
    text = {key: value for key, value in config["text_config"].items() if key != "model_type"}
    with_config(model, text_config=None, **text)
    found = tpshard.plan(model, 2).to_json()
    assert found["architecture"]["text"]["config"] is None
    assert found["tensors"] == tpshard.plan(published("qwen2_5_vl"), 2).to_json()["tensors"]


def test_a_text_model_without_rules_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'some_vl', nor for its text model 'foreign_text_model'"):
        plan(tmp_path, tiny(), text_config={"model_type": "foreign_text_model"})
    assert text_config({"model_type": "llama"}) is None
    for config in ({"model_type": "x", "vision_config": {}}, {"model_type": "x", "text_config": 3}):
        with pytest.raises(TpshardError, match="no rules for model_type 'x'"):
            find_rules(config, None, "config.json")


def test_a_cast_reaches_the_nested_config_and_the_rest(tmp_path: Path, quick: Settings) -> None:
    text = CONFIG["text_config"] | {"torch_dtype": "float32"}
    model = write_checkpoint(tmp_path / "m", CONFIG | {"text_config": text}, tiny(vision__proj__weight=(4, 4)))
    tpshard.split(model, 2, tmp_path / "out", dtype="bfloat16", settings=quick)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["text_config"]) == ("bfloat16", text | {"torch_dtype": "bfloat16"})
    assert {tensor.dtype for tensor in read_rank(tmp_path / "out", 0, 2).values()} == {"BF16"}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("llava", "today"),
        ("mistral3", "published"),
        ("qwen2_vl", "published"),
        ("qwen2_5_vl", "today"),
        ("qwen3_vl", "published"),
    ],
)
def test_verify_runs_the_whole_model(name: str, form: str, published: Any, tmp_path: Path, quick: Settings) -> None:
    model = published(name, form)
    tpshard.split(model, 2, tmp_path / "out", settings=quick)
    found = tpshard_command("verify", tmp_path / "out", "--source", model, "--tier", "weights,exact", "--json").json
    assert (found["verdict"], found["settings"]["engine"]) == ("pass", "transformers"), found["reason"]
    assert (found["settings"]["runs"], found["not_run"], found["warnings"]) == ("the whole model", [], [])
    assert {canary["status"] for canary in found["canaries"]} == {"caught"}


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "glm4v_moe", "qwen3_vl_moe"])
def test_what_runs_a_text_model_is_the_whole_model_without_pictures(name: str, published: Any) -> None:
    """Positions in three dimensions are the same in each for text."""
    import torch
    from transformers import AutoModelForImageTextToText

    from tpshard.verifier.group import Single, Threads
    from tpshard.verifier.hf.backend import TransformersBackend
    from tpshard.verifier.hf.config import model_config
    from tpshard.verifier.hf.overrides import Pinned
    from tpshard.verifier.hf.skeleton import frame_of
    from tpshard.verifier.ranks.open import open_source

    config, source = open_source(published(name))
    ids, frame = torch.arange(3, 35).view(2, 16), frame_of(model_config(config)).of_source(source)
    sides = TransformersBackend(source, (), Threads(1), ids, torch.device("cpu"), frame)
    with torch.no_grad():
        ours = sides.reference(torch.float64).run(Single(), [ids], Pinned())
        wanted = AutoModelForImageTextToText.from_pretrained(published(name), dtype=torch.float32)(input_ids=ids).logits
    assert float((ours - wanted).norm() / wanted.norm()) <= 1e-5
    assert tpshard.plan(published(name), 2).to_json()["architecture"]["text"]["model_type"] == f"{name}_text"


def test_verify_says_that_it_does_not_know_the_model(published: Any, tmp_path: Path, quick: Settings) -> None:
    model = Path(shutil.copytree(published("llava"), tmp_path / "model"))
    tpshard.split(model, 2, tmp_path / "out", settings=quick)
    config = json.loads((model / "config.json").read_text())
    with_config(model, text_config=config["text_config"] | {"model_type": "kimi_k3"})
    result = tpshard_command("verify", tmp_path / "out", "--source", model, "--tier", "exact")
    assert result.code == 4 and "no class that computes logits for the model type 'kimi_k3'" in result.err
