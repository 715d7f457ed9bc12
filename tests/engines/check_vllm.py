"""`--format vllm` against vLLM itself: every parameter of every architecture, and the tokens of five.

Run by `make test-engines`, which makes the engines' environment; ENGINE_PYTHON is its interpreter.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import tpshard
from tests.engines import engine_heads as heads
from tests.engines import engine_models as models
from tests.engines import engine_nested as nested
from tests.engines import engine_newest as newest
from tests.engines.running import Generator, Loader, Ranks, bits, differences, everything, split, written
from tests.helpers import mistral_form
from tpshard.errors import CorruptError, UnsupportedError

pytest_plugins = ("tests.engines.engine_fixtures",)
STARTED = ("llama", "gpt2", "opt", "qwen3", "mixtral")
DRAFTED: tuple[ModuleType, ...] = (models, nested, newest)
STAGED = ("llama", "qwen3", "mixtral")


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", models.LOADED)
def test_ours_is_what_vllm_holds(name: str, tp: int, loader: Loader, tmp_path: Path) -> None:
    require_held(models.make(name, tmp_path / "source"), tp, loader, tmp_path)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", nested.LOADED)
def test_ours_is_what_vllm_holds_of_a_model_and_its_tower(name: str, tp: int, loader: Loader, tmp_path: Path) -> None:
    require_held(nested.make(name, tmp_path / "source"), tp, loader, tmp_path)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", newest.LOADED)
def test_ours_is_what_vllm_holds_of_the_newest_models(name: str, tp: int, loader: Loader, tmp_path: Path) -> None:
    require_held(newest.make(name, tmp_path / "source"), tp, loader, tmp_path, newest.ROOMY.get(name, ""))


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", mistral_form.FOR_ENGINES)
def test_ours_is_what_vllm_holds_of_mistrals_own_form(name: str, tp: int, loader: Loader, tmp_path: Path) -> None:
    kind, params = mistral_form.FOR_ENGINES[name]
    require_held(mistral_form.published(tmp_path / "source", kind, **params), tp, loader, tmp_path)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", heads.LOADED)
def test_ours_is_what_vllm_holds_of_a_model_of_another_task(name: str, tp: int, loader: Loader, tmp_path: Path) -> None:
    require_held(heads.make(name, tmp_path / "source"), tp, loader, tmp_path, pooling=True)
    head = heads.LOADED[name].head
    assert all(rank[each].dtype == torch.float32 for rank in written(tmp_path / "shards", tp) for each in head)


@pytest.mark.parametrize("name", heads.REFUSED)
def test_refused_is_what_vllm_does_not_load_of_another_task(name: str, loader: Loader, tmp_path: Path) -> None:
    source = heads.make(name, tmp_path / "source")
    with pytest.raises(UnsupportedError):
        split(source, 2, tmp_path / "shards", format="vllm")
    with pytest.raises(RuntimeError):
        loader.held(source, 2, "auto", tmp_path / "theirs")


def require_held(
    source: Path, tp: int, loader: Loader, tmp_path: Path, roomy: str = "", *, pooling: bool = False
) -> None:
    """Our files are what vLLM holds of a checkpoint, it loads them as that, and they come back whole.

    roomy: how the names end of parameters that a kernel has larger, with nothing behind what is loaded.
    """
    theirs = loader.held(source, tp, "auto", tmp_path / "theirs", pooling=pooling)
    shards = tmp_path / "shards"
    split(source, tp, shards, format="vllm")
    ours = written(shards, tp)
    assert differences(rounded(ours, theirs), narrowed(theirs, ours, roomy)) == []
    loaded = loader.held(shards, tp, "sharded_state", tmp_path / "loaded", roomy=bool(roomy), pooling=pooling)
    assert differences(rounded(loaded, theirs), theirs) == []
    assert not tpshard.check(shards, source).differences
    tpshard.merge(shards, tmp_path / "merged")
    assert differences([everything(tmp_path / "merged")], [everything(source)]) == []


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 2)])
@pytest.mark.parametrize("name", models.PIPELINES)
def test_ours_is_what_vllm_holds_on_each_stage(name: str, tp: int, pp: int, loader: Loader, tmp_path: Path) -> None:
    source = models.make(name, tmp_path / "source")
    theirs = loader.held(source, tp, "auto", tmp_path / "theirs", pp=pp)
    shards = tmp_path / "shards"
    split(source, tp, shards, format="vllm", pp=pp)
    assert differences(written(shards, tp, pp), theirs) == []
    assert differences(loader.held(shards, tp, "sharded_state", tmp_path / "loaded", pp=pp), theirs) == []
    assert not tpshard.check(shards, source).differences
    tpshard.merge(shards, tmp_path / "merged")
    assert differences([everything(tmp_path / "merged")], [everything(source)]) == []


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("name", models.WHOLE_EXPERTS)
def test_ours_is_what_vllm_holds_of_whole_experts(name: str, tp: int, pp: int, loader: Loader, tmp_path: Path) -> None:
    source = models.make(name, tmp_path / "source")
    theirs = loader.held(source, tp, "auto", tmp_path / "theirs", pp=pp, ep=True)
    shards = tmp_path / "shards"
    split(source, tp, shards, format="vllm", pp=pp, ep=tp)
    assert differences(written(shards, tp, pp), theirs) == []
    assert differences(loader.held(shards, tp, "sharded_state", tmp_path / "loaded", pp=pp, ep=True), theirs) == []
    assert not tpshard.check(shards, source).differences
    tpshard.merge(shards, tmp_path / "merged")
    assert differences([everything(tmp_path / "merged")], [everything(source)]) == []


@pytest.mark.parametrize(
    ("made", "name"),
    [(module, name) for module in DRAFTED for name in module.DRAFTS] + [(models, n) for n in models.NO_CLASS],
)
def test_what_predicts_further_tokens_is_left_out_as_vllm_leaves_it_out(
    made: ModuleType, name: str, loader: Loader, tmp_path: Path
) -> None:
    source = made.with_draft(name, tmp_path / "source")
    theirs = loader.held(source, 2, "auto", tmp_path / "theirs")
    shards = tmp_path / "shards"
    split(source, 2, shards, format="vllm")
    ours, roomy = written(shards, 2), newest.ROOMY.get(name, "")
    assert differences(rounded(ours, theirs), narrowed(theirs, ours, roomy)) == []
    loaded = loader.held(shards, 2, "sharded_state", tmp_path / "loaded", roomy=bool(roomy))
    assert differences(rounded(loaded, theirs), theirs) == []
    assert not tpshard.check(shards, source).differences
    plain = loader.held(made.make(name, tmp_path / "plain"), 2, "auto", tmp_path / "plain-held")
    assert differences(rounded(ours, plain), narrowed(plain, ours, roomy)) == []


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(("made", "name"), [(module, name) for module in DRAFTED for name in module.DRAFTS])
def test_the_speculator_is_the_draft_model_that_vllm_holds(
    made: ModuleType, name: str, tp: int, loader: Loader, tmp_path: Path
) -> None:
    source = made.with_draft(name, tmp_path / "source", models.DRAFT_CONFIGS.get(name))
    theirs = loader.held(source, tp, "auto", tmp_path / "theirs", draft=True)
    shards = tmp_path / "shards"
    split(source, tp, shards, format="vllm-speculator")
    ours, roomy = written(shards, tp), newest.ROOMY.get(name, "")
    assert differences(rounded(ours, theirs), narrowed(theirs, ours, roomy)) == []
    loaded = loader.held(shards, tp, "sharded_state", tmp_path / "loaded", draft=True, roomy=bool(roomy))
    assert differences(rounded(loaded, theirs), theirs) == []
    assert not tpshard.check(shards, source).differences


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", models.UNREAD)
def test_what_vllm_leaves_out_of_a_checkpoint_it_has_from_ours(
    name: str, tp: int, loader: Loader, tmp_path: Path
) -> None:
    source = models.make(name, tmp_path / "source")
    theirs = loader.held(source, tp, "auto", tmp_path / "theirs", partial=True)
    # `held.py` fills parameters with 7 before it loads.
    lacking = {each for each, tensor in theirs[0].items() if tensor.numel() > 1 and bool((tensor == 7.0).all())}
    assert lacking
    shards = tmp_path / "shards"
    split = tpshard.split(source, tp, shards, format="vllm")
    assert any("leaves out" in note for note in split.warnings)
    ours = rounded(written(shards, tp), theirs)
    assert differences(without(ours, lacking), without(theirs, lacking)) == []
    values = [bits(tensor.float()).numpy().tobytes() for tensor in everything(source).values()]
    assert all(bits(rank[each]).numpy().tobytes() in values for rank in ours for each in lacking)
    loaded = loader.held(shards, tp, "sharded_state", tmp_path / "loaded")
    assert differences(rounded(loaded, theirs), ours) == []
    assert not tpshard.check(shards, source).differences
    tpshard.merge(shards, tmp_path / "merged")
    assert differences([everything(tmp_path / "merged")], [everything(source)]) == []


def without(ranks: Ranks, names: set[str]) -> Ranks:
    """The ranks without some of their parameters."""
    return [{name: tensor for name, tensor in rank.items() if name not in names} for rank in ranks]


@pytest.mark.parametrize("name", models.NO_CLASS)
def test_a_draft_model_is_refused_that_vllm_does_not_load(name: str, loader: Loader, tmp_path: Path) -> None:
    source = models.with_draft(name, tmp_path / "source")
    with pytest.raises(UnsupportedError, match="does not load the draft model"):
        tpshard.split(source, 2, tmp_path / "shards", format="vllm-speculator")
    with pytest.raises(RuntimeError, match="IndexError: list index out of range"):
        loader.held(source, 2, "auto", tmp_path / "theirs", draft=True)


@pytest.mark.parametrize("name", models.REFUSED)
def test_refused_is_what_vllm_does_not_load_whole(name: str, loader: Loader, tmp_path: Path) -> None:
    source = models.make(name, tmp_path / "source")
    with pytest.raises((UnsupportedError, CorruptError)):
        split(source, 4, tmp_path / "shards", format="vllm")
    try:
        theirs = loader.held(source, 4, "auto", tmp_path / "theirs")
    except RuntimeError:
        return  # vLLM refuses it too, or leaves a parameter unset, or adds one that sharded_state cannot have
    assert left_out(source, theirs), "vLLM holds all of it: there is no reason to refuse it"


@pytest.mark.parametrize("name", models.READ_OTHERWISE)
def test_refused_is_what_vllm_takes_in_another_order(name: str, loader: Loader, tmp_path: Path) -> None:
    """It cuts q, k and v as if they lay one behind another; stored are shares of all three."""
    source = models.make(name, tmp_path / "source")
    with pytest.raises(UnsupportedError, match="in another order"):
        tpshard.split(source, 2, tmp_path / "shards", format="vllm")
    stored = everything(source)["model.layers.0.self_attn.qkv_proj.weight"]
    held = loader.held(source, 2, "auto", tmp_path / "theirs")[0]["model.layers.0.self_attn.qkv_proj.weight"]
    config = models.READ_OTHERWISE[name][1]
    head, kv = config["head_dim"], config["num_key_value_heads"]
    sizes = (config["num_attention_heads"] * head, kv * head, kv * config["v_head_dim"])
    assert torch.equal(held, torch.cat([block.chunk(2)[0] for block in stored.split(sizes)]))


@pytest.mark.parametrize("name", models.NOT_RUN)
def test_refused_is_what_vllm_cannot_run(name: str, generator: Generator, tmp_path: Path) -> None:
    source = models.make(name, tmp_path / "source")
    with pytest.raises(UnsupportedError):
        split(source, 2, tmp_path / "shards", format="vllm")
    with pytest.raises(RuntimeError, match="EngineCore|Engine core"):
        generator.tokens(source, "auto", tmp_path / "tokens")


def narrowed(theirs: Ranks, ours: Ranks, roomy: str) -> Ranks:
    """Theirs, without what stands behind ours of parameters whose names end so: logits that weigh nothing."""

    def as_ours(name: str, tensor: Tensor, own: Tensor | None) -> Tensor:
        if own is None or not roomy or not name.endswith(roomy) or len(own) >= len(tensor):
            return tensor
        assert bool((tensor[len(own) :] == -torch.inf).all()), f"{name} has something behind what is loaded"
        return tensor[: len(own)].clone()

    pairs = zip(theirs, ours, strict=True)
    return [{name: as_ours(name, tensor, own.get(name)) for name, tensor in held.items()} for held, own in pairs]


def rounded(ours: Ranks, theirs: Ranks) -> Ranks:
    """Ours, where the checkpoint has float32 or int64 and vLLM's class has not, as its loader rounds them.

    And theirs where both are computed: which of two neighbouring numbers an exponential is depends on the processor.
    """

    def as_held(name: str, tensor: Tensor, held: Tensor | None) -> Tensor:
        if held is not None and (tensor.dtype, held.dtype) == (torch.int64, torch.int32):
            return tensor.to(torch.int32)
        if held is None or tensor.dtype != torch.float32 or tensor.shape != held.shape:
            return tensor
        if name.endswith(".A") and bool(((tensor - held).abs() <= 2.0**-23 * held.abs()).all()):
            return held
        return tensor.to(held.dtype) if held.dtype == torch.bfloat16 else tensor

    pairs = zip(ours, theirs, strict=True)
    return [{name: as_held(name, tensor, held.get(name)) for name, tensor in own.items()} for own, held in pairs]


def left_out(source: Path, ranks: Ranks) -> list[str]:
    """Vectors of the source that are nowhere in the ranks, judged by their first four elements."""
    held = b"".join(bits(tensor).numpy().tobytes() for rank in ranks for tensor in rank.values())
    return [
        name
        for file in source.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if bits(tensor.reshape(-1)[:4]).numpy().tobytes() not in held
    ]


@pytest.mark.parametrize("name", STARTED)
def test_tokens_of_the_started_engine(name: str, generator: Generator, tmp_path: Path) -> None:
    source = models.make(name, tmp_path / "source")
    split(source, 2, tmp_path / "shards", format="vllm")
    unsharded = generator.tokens(source, "auto", tmp_path / "unsharded")
    assert all(len(each["tokens"]) == len(each["logprobs"]) > 1 for each in unsharded)
    assert generator.tokens(tmp_path / "shards", "sharded_state", tmp_path / "sharded") == unsharded


@pytest.mark.parametrize("name", STAGED)
def test_tokens_of_the_engine_started_in_two_stages(name: str, generator: Generator, tmp_path: Path) -> None:
    source = models.make(name, tmp_path / "source")
    split(source, 1, tmp_path / "shards", format="vllm", pp=2)
    unsharded = generator.tokens(source, "auto", tmp_path / "unsharded", stages=True)
    assert all(len(each["tokens"]) == len(each["logprobs"]) > 1 for each in unsharded)
    assert generator.tokens(tmp_path / "shards", "sharded_state", tmp_path / "sharded", stages=True) == unsharded


def test_a_wrong_width_loads_without_an_error_so_check_stands_before_it(loader: Loader, tmp_path: Path) -> None:
    source = models.make("llama", tmp_path / "source")
    split(source, 4, tmp_path / "shards", format="vllm")
    with pytest.raises(RuntimeError, match="loading tensor of shape"):  # vLLM warns; held.py takes that for an error
        loader.held(tmp_path / "shards", 2, "sharded_state", tmp_path / "loaded")
    with safe_open(tmp_path / "shards" / "model-rank-0-part-0.safetensors", "pt") as file:
        assert file.metadata()["tpshard.tp"] == "4"
