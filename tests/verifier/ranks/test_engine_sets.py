"""Shards in engines' own formats: what is right passes under the source's names, and every mistake is named by them."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tpshard.formats
from tests.helpers import served_checkpoints
from tests.helpers import transformers_runs as library
from tests.helpers.checkpoints import VARIANTS, build, make
from tests.helpers.command import succeeds
from tests.helpers.command import tpshard as command
from tests.helpers.grids import in_turn, one_in
from tests.helpers.toys import read_all
from tpshard.api import convert as api
from tpshard.api import verify as verifying
from tpshard.errors import CorruptError, UnsupportedError
from tpshard.execute.publish import Settings
from tpshard.verifier.options import VerifyOptions
from tpshard.verifier.ranks import vllm_names as sharded_state
from tpshard.verifier.ranks.open import FileWeights, open_shards, open_source
from tpshard.verifier.ranks.translate import translated
from tpshard.verifier.report.verdict import Verdict
from tpshard.verifier.run import verify
from tpshard.verifier.tiers import exact

Get = Callable[..., Path]
Splits = Callable[..., tuple[Path, Path]]
Change = Callable[[dict[str, Tensor]], None]

VLLM = [
    *(("llama-gqa", tp) for tp in (2, 4)),
    *(("falcon-new", tp) for tp in (2, 4)),
    *(
        (name, 2)
        for name in (
            "llama-tied",
            "llama-mha-bias",
            "mistral",
            "qwen2-bias",
            "qwen3",
            "gemma2",
            "gpt2",
            "gptj",
            "gpt_neox",
            "gpt_neox-tied-nobias",
            "gpt_bigcode-mqa",
            "bloom",
            "falcon-mqa",
            "falcon-mha-alibi",
            "opt",
            "opt-350m-like",
            # By transformers' classes.
            "granite",
            "nemotron",
            "phi3",
            "mixtral",
            "qwen3_moe",
        )
    ),
]
# One of every other family that vLLM takes and the built-in decoder does not, and what differs from the variant.
BY_TRANSFORMERS: dict[str, dict[str, object]] = {
    "olmoe": {"num_key_value_heads": 4},
    "olmo2": {},
    "glm": {},
    "glm4_moe-bias-qk-norm": {},
    "deepseek_v2-lite": {},
    "deepseek_v3": {},
    "gpt_oss": {"num_key_value_heads": 4},  # vLLM repeats none
    "granitemoe": {},
    "phimoe": {"lm_head_bias": False},
    "qwen2_moe": {},
    "deepseek_v32": {},
    "glm_moe_dsa": {},
    "glm4_moe_lite": {},
    "qwen3_next": {},
    "minimax_m2": {},
    "ernie4_5_moe": {"use_bias": False},
    "hy_v3": {},
    "exaone_moe": {},
    "afmoe": {},
    "granitemoeshared": {},
    "mimo_v2_flash": {},
    "apertus": {},
    "hyperclovax": {},
    "qwen3_5_text": {},
    "qwen3_5_moe_text": {},
    "lfm2": {"conv_dim": 64, "block_dim": 64},
    "lfm2_moe": {},
    "granitemoehybrid": {"mamba_proj_bias": False},
    "falcon_h1": {"mamba_n_groups": 4},
    "jamba": {},
    "nemotron_h": {"n_groups": 4},
    "solar_open": {"attention_bias": False},
    "cohere2_moe": {},
    "flex_olmo": {},
    "hunyuan_v1_moe": {},
    "llama4_text": {"attention_bias": False},
    "gemma4_text": {},
    "gemma4_text-moe": {},
}
TABLE = tomllib.loads((Path(tpshard.formats.__file__).parent / "tables" / "vllm.toml").read_text())
CHANGED = {version: entry.get("families", {}) for version, entry in TABLE["later"].items()}
# Those whose class runs among zeros.
MASKED: dict[str, dict[str, object]] = {"laguna": {}, "mamba2": {"use_bias": False}, "qwen4_exp": {}}
STACKED = ("deepseek_v3-stacked", "granitemoe-stacked")
OTHERWISE = ("nemotron_h", "minimax_m2", "ernie4_5_moe", "hy_v3", "exaone_moe", "mimo_v2_flash", "laguna")
"""Those of which newer code saves some tensors under other names than published files have."""


@pytest.fixture(scope="module")
def splits(made: Get, tmp_path_factory: pytest.TempPathFactory) -> Splits:
    """A model and its split in a format, each made once; tests that damage it copy it."""
    root, done = tmp_path_factory.mktemp("engines"), dict[tuple[str, int, str, str | None], tuple[Path, Path]]()

    def get(name: str, tp: int, format: str = "vllm", version: str | None = None) -> tuple[Path, Path]:
        key = (name, tp, format, version)
        if key not in done:
            out = root / "-".join(map(str, key))
            # Meta's vocabulary has no padding.
            model = make(name, root / f"{name}-{len(done)}", vocab_size=256) if format == "meta" else made(name)
            settings = Settings(fsync=False, workers=1)
            api.split(model, tp, out, format=format, engine_version=version, settings=settings)
            done[key] = model, out
        return done[key]

    return get


def judged(model: Path, shards: Path) -> Verdict:
    return verify(VerifyOptions(shards, tiers=("exact",), device="cpu"), model)


@pytest.mark.parametrize("vocab", [29, 70])
def test_a_rank_that_holds_padding_alone_hides_no_fault(vocab: int, tmp_path: Path) -> None:
    """At tp 2 vLLM's vocabulary is a multiple of 64: of 29 words the last rank has none, of 70 few and a long rest."""
    model = make("llama-gqa", tmp_path / "model", vocab_size=vocab)
    settings = Settings(fsync=False, workers=1)
    api.split(model, 2, tmp_path / "shards", format="vllm", settings=settings)
    found = verify(VerifyOptions(tmp_path / "shards", tiers=("weights",), device="cpu"), model)
    assert (found.verdict, found.reason) == ("pass", None)
    assert {(each.name, each.status) for each in found.canaries} >= {
        ("bit-flipped", "caught"),
        ("rows-exchanged", "caught"),
    }
    rewrite(tmp_path / "shards", 0, lambda tensors: tensors["lm_head.weight"][5].neg_())
    found = verify(VerifyOptions(tmp_path / "shards", tiers=("weights",), device="cpu"), model)
    assert found.verdict == "fail" and "lm_head.weight" in str(found.reason)


def rewrite(shards: Path, rank: int, change: Change) -> None:
    """Change a rank's tensors in its file, which keeps what it says of itself."""
    path = shards / f"model-rank-{rank}-part-0.safetensors"
    with safe_open(path, "pt") as file:
        said = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, said)


@pytest.mark.parametrize(("name", "tp"), VLLM)
def test_a_correct_split_for_vllm_passes(name: str, tp: int, splits: Splits) -> None:
    model, shards = splits(name, tp)
    tiers = ("bytes", "weights", *(("exact",) if (name, tp) in one_in(4, VLLM) else ()))
    verdict = verifying.verify(shards, model, tiers=tiers, device="cpu")
    assert [(tier.name, tier.status) for tier in verdict.tiers] == [(name, "pass") for name in tiers]
    assert (verdict.exit_code, verdict.tp, verdict.warnings) == (0, tp, ())
    assert verdict.canaries and all(canary.status == "caught" for canary in verdict.canaries)


@pytest.mark.parametrize(
    ("name", "tp"), one_in(2, [*in_turn(list(BY_TRANSFORMERS), (4, 2)), *((name, 2) for name in STACKED)])
)
def test_a_correct_split_for_vllm_is_equal(name: str, tp: int, tmp_path: Path) -> None:
    model = make(name, tmp_path / "model", **BY_TRANSFORMERS.get(name, {}))
    with torch.no_grad():
        tier = exact(library.opened(model, tp, tmp_path / "out", format="vllm"))
    assert (tier.status, tier.reason) == ("pass", None)
    assert {finding.rank for finding in tier.findings} == set(range(tp))


@pytest.mark.parametrize(
    ("name", "published"),
    [*((name, True) for name in (*BY_TRANSFORMERS, *MASKED)), *((name, False) for name in OTHERWISE)],
)
def test_there_and_back(name: str, published: bool, tmp_path: Path) -> None:
    model, out, merged = tmp_path / "model", tmp_path / "out", tmp_path / "merged"
    changes = {**BY_TRANSFORMERS, **MASKED}[name]
    build(name, 0, **changes).save_pretrained(model, save_original_format=published)
    succeeds("split", model, "--tp", 2, "--format", "vllm", "-o", out, "--no-fsync")
    succeeds("check", out, "--source", model)
    succeeds("merge", out, "-o", merged, "--no-fsync")
    assert read_all(merged) == read_all(model)
    require_proved(out, model, masked=name in MASKED)


def test_there_and_back_of_a_published_form(tmp_path: Path) -> None:
    model, out = served_checkpoints.make("bailing_hybrid, Ling 3.0", tmp_path / "model"), tmp_path / "out"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["BailingMoeV3ForCausalLM"]}))
    succeeds("split", model, "--tp", 2, "--format", "vllm", "-o", out, "--no-fsync")
    require_proved(out, model, masked=True)


def test_rows_of_a_table_and_what_is_behind_others(tmp_path: Path) -> None:
    """Ranks with each other's rows, padding that is not zero, and an indexer that is another are found."""
    model, right = make("qwen4_exp", tmp_path / "model"), tmp_path / "right"
    succeeds("split", model, "--tp", 2, "--format", "vllm", "-o", right, "--no-fsync")
    table = "model.layers.0.ple.ple_embedding.ngram_embedding"
    mixer, qkv = "model.layers.1.mlp_hyper_connection.input_mix_weight_down_block_inject", "model.layers.1.self_attn."
    faults: list[tuple[str, Change]] = [
        (f"{table}.weight[120", lambda tensors: tensors[f"{table}.weight"][:2].copy_(tensors[f"{table}.weight"][2:4])),
        (mixer, lambda tensors: tensors[f"{mixer}.weight"][-1:].fill_(1.0)),
        (f"{qkv}indexer.index_qk_proj", lambda tensors: tensors[f"{qkv}qkv_proj.weight"][-1:].neg_()),
        (f"{qkv}v_proj", lambda tensors: tensors[f"{qkv}qkv_proj.weight"][-49:-48].neg_()),
    ]
    for number, (culprit, change) in enumerate(faults):
        wrong = shutil.copytree(right, tmp_path / str(number))
        rewrite(wrong, 1, change)
        found = command("verify", wrong, "--source", model, "--tier", "weights", "--json")
        assert found.code == 1 and culprit in found.out + found.err, found.out + found.err


def test_norms_that_are_multiplied(tmp_path: Path) -> None:
    """There, back and proved; and as they were before, or multiplied by another number, they are found."""
    model, out, merged = served_checkpoints.make("longcat_flash", tmp_path / "model"), tmp_path / "out", tmp_path / "m"
    succeeds("split", model, "--tp", 2, "--format", "vllm", "-o", out, "--no-fsync")
    succeeds("check", out, "--source", model)
    succeeds("merge", out, "-o", merged, "--no-fsync")
    whole = {name: each for name, each in read_all(model).items() if not name.startswith("model.mtp.")}
    assert read_all(merged) == whole
    name, theirs = (
        "model.layers.1.self_attn.0.mla_attn.q_a_layernorm.weight",
        "model.layers.1.self_attn.0.q_a_layernorm",
    )
    held, stored = (
        load_file(next(at.glob(files))) for at, files in ((out, "model-rank-1-*"), (model, "*.safetensors"))
    )
    assert torch.equal(held[name], stored[f"{theirs}.weight"] * (64 / 24) ** 0.5)
    asked = (
        "verify",
        out,
        "--source",
        model,
        "--tier",
        "bytes,weights,exact",
        "--allow-not-run",
        "model.mtp",
        "--json",
    )
    assert (found := succeeds(*asked).json)["verdict"] == "pass", found["reason"]
    for wrong in (stored[f"{theirs}.weight"], torch.nextafter(held[name], held[name] + 1)):
        rewrite(out, 1, lambda tensors, wrong=wrong: tensors.update({name: wrong}))
        found = command("verify", out, "--source", model, "--tier", "weights", "--allow-not-run", "model.mtp", "--json")
        assert found.code == 1 and theirs in found.json["reason"]


def require_proved(out: Path, model: Path, *, masked: bool) -> None:
    tiers = "bytes,weights,exact" if masked else "bytes,weights"
    found = succeeds("verify", out, "--source", model, "--tier", tiers, "--json").json
    assert (found["verdict"], found["reason"]) == ("pass", None)


@pytest.mark.parametrize(("version", "name"), [(version, name) for version, names in CHANGED.items() for name in names])
def test_names_that_a_later_version_changed_are_read(version: str, name: str, tmp_path: Path) -> None:
    model, sets = tmp_path / "model", (tmp_path / "first", tmp_path / "later")
    build(name, 0, **BY_TRANSFORMERS[name]).save_pretrained(model)
    for out, asked in zip(sets, ((), ("--engine-version", version)), strict=True):
        succeeds("split", model, "--tp", 2, "--format", "vllm", *asked, "-o", out, "--no-fsync")
        found = succeeds("verify", out, "--source", model, "--tier", "bytes,weights", "--json").json
        assert (found["verdict"], found["reason"]) == ("pass", None)
    first, later = (read_all(out, "model-rank-0-*.safetensors").keys() for out in sets)
    assert first != later


def test_every_name_that_vllm_has_is_tried() -> None:
    known = sharded_state.VLLM
    written = TABLE["families"]
    unrun = {"kimi_k3_text"}  # no class computes it
    named = {  # by transformers' class, or by the config
        "ernie4_5_moe_vl_text": "ernie4_5_vl_moe_text",
        **{"dots3_note_text": "dots3_note", "inkling_mm_model_text": "inkling_text", "phi4mm": "phi3"},
    }
    types = {named.get(name, name) for family in written.values() for name in family.get("model_types", ())}
    assert known.keys() | unrun == types | {"gemma4_unified_text"}  # which is nested alone
    tried = {VARIANTS[name].model_type for name in (*(name for name, _ in VLLM), *BY_TRANSFORMERS, *MASKED)} | {
        "bailing_hybrid",
        "internlm2",
        "exaone",
        "chatglm",
        # in test_newest_sets.py
        *("deepseek_v4", "ernie4_5_vl_moe_text", "gemma4_unified_text", "glm5_next_text", "minicpm", "molmo2_text"),
        *("muse_glimmer_text", "zamba2", "bailing_moe", "bailing_moe_v2"),
        *("bailing_moe_v3", "nemotron-nas", "dots3_note", "inkling_text"),
        *("mistral_native", "mistral_native with latents"),
        "longcat_flash",
    }
    assert tried <= known.keys()
    alike = [known[name] for name in ("llama", "nemotron", "deepseek_v3", "falcon", "olmo2", "solar_open")]
    assert all(known[other] in alike for other in known.keys() - tried)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "falcon-new"])
def test_streaming_reads_fused_parameters_in_blocks(name: str, splits: Splits) -> None:
    model, shards = splits(name, 2)
    verdict = verify(VerifyOptions(shards, tiers=("exact", "native"), tokens=2, device="cpu", stream=True), model)
    assert verdict.verdict == "pass" and verdict.settings["streamed"]


def test_names_without_the_base_prefix(made: Get, tmp_path: Path) -> None:
    model = made("gpt2", strip_prefix=True)
    api.split(model, 2, tmp_path / "shards", format="vllm", settings=Settings(fsync=False, workers=1))
    verdict = judged(model, tmp_path / "shards")
    assert verdict.verdict == "pass" and verdict.tiers[0].findings[-3].module == "ln_f"


def swapped(name: str, one: slice, other: slice) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        before = tensors[name].clone()
        tensors[name][one], tensors[name][other] = before[other], before[one]

    return change


def dropped(name: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def interleaved(name: str, heads: int) -> Change:
    """[q; k; v] in the order of the source, as a writer leaves it that knows nothing of the engine."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensor = tensors[name]
        tensors[name] = tensor.view(3, heads, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)

    return change


LAYER = "model.layers.1."
H = "transformer.h.1."
W13 = "model.layers.1.block_sparse_moe.experts.routed_experts.w13_weight"
FAULTS = {
    # 4 q heads of 8 rows, 1 KV head.
    "two q heads": (
        "llama-gqa",
        swapped(LAYER + "self_attn.qkv_proj.weight", slice(0, 8), slice(8, 16)),
        f"{LAYER}self_attn.q_proj of rank 1",
        f"{LAYER}self_attn.qkv_proj.weight",
    ),
    "k and v": (
        "llama-gqa",
        swapped(LAYER + "self_attn.qkv_proj.weight", slice(32, 40), slice(40, 48)),
        f"{LAYER}self_attn.k_proj of rank 1",
        f"{LAYER}self_attn.qkv_proj.weight",
    ),
    "gate and up": (
        "llama-gqa",
        swapped(LAYER + "mlp.gate_up_proj.weight", slice(0, 64), slice(64, 128)),
        f"{LAYER}mlp.up_proj of rank 1",
        f"{LAYER}mlp.gate_up_proj.weight",
    ),
    "bias": (
        "qwen2-bias",
        dropped(LAYER + "self_attn.qkv_proj.bias"),
        f"{LAYER}self_attn.q_proj.bias of rank 1",
        None,
    ),
    "v of a transposed matrix": (
        "gpt2",
        swapped(H + "attn.c_attn.weight", slice(96, 104), slice(104, 112)),
        f"v of {H}attn.c_attn of rank 1",
        None,
    ),
    "left interleaved": (
        "bloom",
        interleaved(H + "self_attention.query_key_value.weight", 4),
        f"q of {H}self_attention.query_key_value of rank 1",
        None,
    ),
    "made apart": (
        "gpt_neox",
        interleaved("model.layers.1.attention.query_key_value.weight", 2),
        "q of gpt_neox.layers.1.attention.query_key_value of rank 1",
        "model.layers.1.attention.query_key_value.weight",
    ),
    "shape": (
        "llama-gqa",
        lambda tensors: tensors.update(
            {LAYER + "self_attn.qkv_proj.weight": tensors[LAYER + "self_attn.qkv_proj.weight"][:40]}
        ),
        f"rank 1: {LAYER}self_attn.q_proj.weight does not hold whole heads",
        None,
    ),
    "a whole MLP that is another": (
        "gpt_bigcode-mqa",
        # A row of rank 0's share, which the decoder does not take from rank 1, but the engine does.
        swapped("model.h.1.mlp.c_fc.weight", slice(0, 1), slice(1, 2)),
        "model.h.1.mlp.c_fc.weight of rank 1, which all ranks hold whole, is not rank 0's",
        None,
    ),
    "an expert's gate and up": (
        "mixtral",
        lambda tensors: tensors.update({W13: tensors[W13].roll(tensors[W13].shape[1] // 2, 1)}),
        "model.layers.1.mlp.experts of rank 1",
        None,
    ),
    "a norm that is another": (
        "olmo2",
        swapped("model.layers.1.self_attn.q_norm.weight", slice(0, 1), slice(1, 2)),
        "model.layers.1.self_attn.q_norm.weight of rank 1, which all ranks hold whole, is not rank 0's",
        None,
    ),
    # 24 rows of q's latent, then 24 of the other.
    "two latents": (
        "deepseek_v3",
        swapped("model.layers.1.self_attn.fused_qkv_a_proj.weight", slice(0, 24), slice(24, 48)),
        "model.layers.1.self_attn.q_a_proj of rank 1",
        "model.layers.1.self_attn.fused_qkv_a_proj.weight",
    ),
    "a shared expert's gate and up": (
        "deepseek_v3",
        swapped("model.layers.1.mlp.experts._shared_experts._layer.gate_up_proj.weight", slice(0, 16), slice(16, 32)),
        "model.layers.1.mlp.shared_experts.gate_proj of rank 1",
        "model.layers.1.mlp.experts._shared_experts._layer.gate_up_proj.weight",
    ),
    "a bias that every rank adds": (
        "gpt_oss",
        lambda tensors: tensors["model.layers.1.mlp.experts.routed_experts.w2_bias"].fill_(1.0),
        "model.layers.1.mlp.experts.routed_experts.w2_bias of rank 1 is added to rank 0's",
        None,
    ),
    "sinks": (
        "gpt_oss",
        swapped("model.layers.1.attn.sinks", slice(0, 1), slice(1, 2)),
        "input of model.layers.1.self_attn.o_proj of rank 1",
        None,
    ),
    # 16 rows of the keys by which tokens are chosen, then 4 of the heads' weights.
    "keys of an index": (
        "deepseek_v32",
        swapped("model.layers.1.self_attn.indexer.wk_weights_proj.weight", slice(0, 4), slice(16, 20)),
        "model.layers.1.self_attn.indexer.wk of rank 1",
        "model.layers.1.self_attn.indexer.wk_weights_proj.weight",
    ),
    # In a window a rank of two has 4 heads of 16, then 2 KV heads: keys of 16, values of 12.
    "values narrower than keys": (
        "mimo_v2_flash",
        swapped("model.layers.1.self_attn.qkv_proj.weight", slice(64, 76), slice(96, 108)),
        "model.layers.1.self_attn.k_proj of rank 1",
        "model.layers.1.self_attn.qkv_proj.weight",
    ),
    "a matrix of all ranks' rows": (
        "glm",
        swapped("model.layers.1.mlp.gate_up_proj.weight", slice(0, 1), slice(1, 2)),
        "input of model.layers.1.mlp.down_proj of rank 0",
        None,
    ),
    "a number that is no exponential": (
        "jamba",
        lambda tensors: tensors["model.layers.0.mamba.A"][5].mul_(1.0001),
        "input of model.layers.0.mamba.out_proj of rank 1",
        None,
    ),
    "scale": (
        "llama-gqa",
        lambda tensors: tensors.update({LAYER + "self_attn.attn._k_scale": torch.tensor(2.0)}),
        f"{LAYER}self_attn.attn._k_scale of rank 1",
        None,
    ),
}


@pytest.mark.parametrize("fault", one_in(3, list(FAULTS)))
def test_a_mistake_is_named_by_the_source_and_by_the_file(fault: str, splits: Splits, tmp_path: Path) -> None:
    name, change, where, stored = FAULTS[fault]
    model, good = splits(name, 2)
    shards = Path(shutil.copytree(good, tmp_path / "shards"))
    rewrite(shards, 1, change)
    verdict = judged(model, shards)
    assert verdict.exit_code == 1 and verdict.reason is not None
    assert verdict.reason.startswith(where), verdict.reason
    assert verdict.canaries == ()  # a tier that saw a difference is not blind
    if stored is not None:
        assert verdict.reason.endswith(f"it is stored in {stored}")


def test_a_wrong_kv_replica(splits: Splits, tmp_path: Path) -> None:
    """At tp 4 ranks 0 and 1 hold the first of two KV heads, after two q heads; here rank 1 has the second one."""
    model, good = splits("llama-gqa", 4)
    shards = Path(shutil.copytree(good, tmp_path / "shards"))
    name = "model.layers.0.self_attn.qkv_proj.weight"
    other = load_file(shards / "model-rank-2-part-0.safetensors")[name]
    rewrite(shards, 1, lambda tensors: tensors.update({name: torch.cat((tensors[name][:16], other[16:]))}))
    verdict = judged(model, shards)
    assert verdict.exit_code == 1
    assert (verdict.reason or "").startswith("model.layers.0.self_attn.k_proj of rank 1")


@pytest.mark.parametrize(
    ("format", "version", "files"),
    [("vllm", None, "model-rank-{}-part-0.safetensors"), ("meta", "3", "consolidated.{:02}.pth")],
)
def test_exchanged_files(format: str, version: str | None, files: str, splits: Splits, tmp_path: Path) -> None:
    model, good = splits("llama-gqa", 2, format, version)
    shards = Path(shutil.copytree(good, tmp_path / "shards"))
    library.exchange(shards / files.format(0), shards / files.format(1))
    verdict = verifying.verify(shards, model, tiers=("weights",), device="cpu")
    assert (verdict.exit_code, verdict.reason) == (1, "the files of ranks 0 and 1 are exchanged")


def test_padding_that_is_not_zero_is_for_the_bytes_tier(splits: Splits, tmp_path: Path) -> None:
    """Of 256 rows 251 are tokens. The engine cuts the others' logits off, so it is the same function."""
    model, good = splits("llama-gqa", 2)
    shards = Path(shutil.copytree(good, tmp_path / "shards"))
    rewrite(shards, 1, lambda tensors: tensors["lm_head.weight"][-1].fill_(1.0))
    assert judged(model, shards).verdict == "pass"
    verdict = verifying.verify(shards, model, tiers=("bytes", "exact"), device="cpu")
    assert [(tier.name, tier.status) for tier in verdict.tiers] == [("bytes", "fail"), ("exact", "pass")]


@pytest.mark.parametrize(("name", "generation"), [("llama-gqa", "2"), ("llama-gqa", "3"), ("llama-tied", "3")])
def test_a_correct_split_for_meta_passes(name: str, generation: str, splits: Splits) -> None:
    model, shards = splits(name, 2, "meta", generation)
    verdict = verifying.verify(shards, model, tiers=("bytes", "exact"), device="cpu")
    assert [tier.status for tier in verdict.tiers] == ["pass", "pass"]
    assert verdict.canaries and all(canary.status == "caught" for canary in verdict.canaries)


def test_rotary_order_left_as_it_was(splits: Splits, tmp_path: Path) -> None:
    model, good = splits("llama-gqa", 2, "meta", "3")
    shards = Path(shutil.copytree(good, tmp_path / "shards"))
    file = shards / "consolidated.01.pth"
    tensors = torch.load(file, weights_only=True)
    tensors["layers.2.attention.wk.weight"] = load_file(model / "model.safetensors")[
        "model.layers.2.self_attn.k_proj.weight"
    ][8:]
    torch.save(tensors, file)
    reason = judged(model, shards).reason or ""
    assert reason.startswith("model.layers.2.self_attn.k_proj of rank 1")
    assert reason.endswith("it is stored in layers.2.attention.wk.weight")


def test_only_the_rows_that_are_asked_for_are_read(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shards = splits("bloom", 2)
    _, source = open_source(model)
    rank = translated(open_shards(shards), source).ranks[1]
    name = "transformer.h.0.self_attention.query_key_value.weight"
    whole = rank.get(name)
    assert torch.equal(whole, source.get(name)[96:])
    read, plain = [], FileWeights.rows

    def rows(self: FileWeights, name: str, start: int, stop: int) -> Tensor:
        read.append((start, stop))
        return plain(self, name, start, stop)

    monkeypatch.setattr(FileWeights, "rows", rows)
    # 4 heads of 8. Rows 20 to 28 of the source end the first one's v and begin the second one's q.
    assert torch.equal(rank.rows(name, 20, 28), whole[20:28])
    assert read == [(8, 12), (68, 72)]


@pytest.mark.parametrize(
    ("name", "format", "version"),
    [
        ("gpt2", "vllm", None),
        ("gpt_bigcode-mqa", "vllm", None),
        ("llama-gqa", "vllm", None),
        ("llama-gqa", "meta", "2"),
    ],
)
def test_blocks_of_rows_are_those_of_the_whole(name: str, format: str, version: str | None, splits: Splits) -> None:
    model, shards = splits(name, 2, format, version)
    _, source = open_source(model)
    for rank in translated(open_shards(shards), source).ranks:
        assert set(source.names()) == set(rank.names())
        for tensor in rank.names():
            whole = rank.get(tensor)
            assert tuple(whole.shape) == rank.shape(tensor) and whole.dtype == rank.dtype(tensor)
            assert torch.equal(rank.rows(tensor, 3, 7), whole[3:7])


def test_what_cannot_be_read_is_said(splits: Splits, tmp_path: Path) -> None:
    model, good = splits("llama-gqa", 4)
    shards = Path(shutil.copytree(good, tmp_path / "shards"))
    middle = shards / "model-rank-2-part-0.safetensors"
    middle.rename(shards / "rank-00000-of-00004.safetensors")
    with pytest.raises(CorruptError, match="several formats"):
        judged(model, shards)
    (shards / "rank-00000-of-00004.safetensors").unlink()
    with pytest.raises(CorruptError, match="missing or incomplete.*all but 2"):
        judged(model, shards)
    (shards / "model-rank-3-part-0.safetensors").rename(middle)
    with pytest.raises(CorruptError, match="tpshard.json and the rank files disagree; .*expected tp 4; found tp 3"):
        judged(model, shards)
    config = json.loads((good / "config.json").read_text())
    shards = Path(shutil.copytree(good, tmp_path / "other"))
    (shards / "config.json").write_text(json.dumps(config | {"model_type": "mpt"}))
    with pytest.raises(UnsupportedError, match="verify does not know the names.*vllm.*mpt") as error:
        judged(model, shards)
    assert error.value.exit_code == 4
