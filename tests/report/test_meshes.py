"""Meshes tp x pp x ep: figures counted by hand, figures of what split writes, and which mesh is advised."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bench.synthetic import DEEPSEEK_V3, LLAMA_405B, write_deepseek, write_llama
from tests.helpers.checkpoints import VARIANTS, build, make
from tests.helpers.command import fails, llama, succeeds, tpshard
from tests.helpers.grids import one_in, some
from tests.helpers.paths import TESTS
from tpshard.api.advise import advise
from tpshard.api.convert import plan
from tpshard.errors import UnsupportedError
from tpshard.inputs.checkpoint import open_checkpoint
from tpshard.inputs.model import from_checkpoint
from tpshard.planning.model import Model
from tpshard.report.advice import Advice, Devices, MeshChoice, advice
from tpshard.report.capacity import Workload, number_lines
from tpshard.report.stage_bytes import like_layers

Made = Callable[..., Path]
BF16 = 2


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3.1 405B and DeepSeek-V3 in bf16: all headers, and holes in place of numbers."""
    folder = tmp_path_factory.mktemp("big")
    write_llama(folder / "405b", LLAMA_405B, data=False)
    write_deepseek(folder / "v3", DEEPSEEK_V3)
    return folder


@pytest.fixture(scope="module")
def v3(big: Path) -> Model:
    """DeepSeek-V3, classified."""
    return from_checkpoint(open_checkpoint(big / "v3"))


@pytest.fixture(scope="module")
def v3_on_16(v3: Model) -> Advice:
    """What is advised for it on 16 devices that are large enough for anything."""
    return advice(v3, Devices(16), Workload(seq=1000, gpu_memory=10**15))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def chosen(found: Advice, tp: int, pp: int = 1, ep: int = 1) -> MeshChoice:
    return next(each for each in found.meshes if (each.mesh.tp, each.mesh.pp, each.mesh.ep) == (tp, pp, ep))


def test_llama_405b_on_two_nodes_as_counted_by_hand(big: Path) -> None:
    """A layer: q and o are 16384 x 16384, k and v 1024 x 16384, gate, up and down 53248 x 16384; two norms whole."""
    layer = (2 * 16384 * 16384 + 2 * 1024 * 16384 + 3 * 53248 * 16384) // 8 + 2 * 16384
    vocab = 128256 * 16384 // 8
    first, last = 63 * layer + vocab, 63 * layer + vocab + 16384  # the embedding; the head and the last norm
    cache = 2 * 63 * 1 * 128 * (4 * 1000)  # a key and a value of one head in 63 layers, for 4 prompts of 1000 tokens
    options = ("--tp", 8, "--pp", 2, "--batch", 4, "--seq", 1000, "--gpu-memory", 80)
    found = succeeds("plan", big / "405b", *options, "--json", "--grouped").json
    stages = found["numbers"]["stages"]
    assert [stage["weights"] for stage in stages] == [BF16 * first, BF16 * last]
    assert [rank["bytes"] for rank in found["ranks"]] == [BF16 * first] * 8 + [BF16 * last] * 8
    assert [stage["kv_cache"] for stage in stages] == [BF16 * cache] * 2
    assert [stage["layers"] for stage in stages] == [[0, 63], [63, 126]]
    # 126 all-reduces of 16384 numbers in a stage, of which each of 8 ranks sends 2 x 7 / 8
    token = 126 * 16384 * BF16 * 2 * 7 // 8
    for stage in stages:
        assert [stage[f"bytes_per_{each}"] for each in ("token", "step", "prompt")] == [token, 4 * token, 4000 * token]
        assert stage["all_reduces"] == 126 and stage["fits"]
    handed = [16384 * BF16 * tokens for tokens in (1, 4, 4000)]
    assert [stages[0][f"handed_on_per_{each}"] for each in ("token", "step", "prompt")] == handed
    assert "handed_on_per_token" not in stages[1]
    text = succeeds("plan", big / "405b", *options).out
    assert "stage 0, layers 0-62: fullest rank 50.7 GB weights + 129.0 MB KV cache; each sends 7.2 MB a token, " in text
    assert "hands on 32.8 kB a token, 131.1 kB a step, 131.1 MB for the prompts" in text


def test_deepseek_v3_with_whole_experts_as_counted_by_hand(big: Path, v3_on_16: Advice) -> None:
    """tp 8 x pp 2 x ep 8: 32 of 256 experts whole on a rank; what is latent whole, what has heads cut."""
    h = 7168
    attention = (128 * 192 * 1536 + 128 * 256 * 512 + h * 128 * 128) // 8 + (1536 + 576) * h + 1536 + 512 + 2 * h
    dense = attention + 3 * 18432 * h // 8
    sparse = attention + 32 * 3 * 2048 * h + 3 * 2048 * h // 8 + 256 * h
    bias, vocab = 4 * 256, 129280 * h // 8  # F32
    further = sparse + 2 * h * h + 2 * vocab + 3 * h  # the layer that predicts one more token: no cache
    weights = [
        BF16 * (3 * dense + 28 * sparse + vocab) + 28 * bias,
        BF16 * (30 * sparse + vocab + h + further) + 31 * bias,
    ]
    planned = plan(big / "v3", 8, pp=2, ep=8, workload=Workload(seq=1000, gpu_memory=10**15))
    stages = planned.numbers()["stages"]
    assert [stage["weights"] for stage in stages] == weights
    assert planned.rank_bytes == [weights[0]] * 8 + [weights[1]] * 8
    assert [stage["kv_cache"] for stage in stages] == [layers * 576 * BF16 * 1000 for layers in (31, 30)]
    assert [stage["bytes_per_token"] for stage in stages] == [sums * h * BF16 * 2 * 7 // 8 for sums in (62, 60)]
    assert stages[0]["handed_on_per_prompt"] == h * BF16 * 1000
    # of 8 ranks each has an eighth of the tokens; each token goes to 8 experts and back, 7 of 8 on other ranks
    sent = [{"layers": n, "active": 8, "bytes_per_token": n * h * BF16 * 2 * 7 // 8,
             "dispatched_per_token": n * h * BF16 * 8 * 2 * 7 // 8 // 8} for n in (28, 30)]  # fmt: skip
    assert [stage["experts"] for stage in stages] == sent
    text = " ".join(number_lines(planned.numbers()))
    assert "an all-to-all that sends a token to its 8 experts alone would be 752.6 kB a token" in text
    assert list(chosen(v3_on_16, 8, 2, 8).stages) == stages


def test_the_cache_of_a_token_is_the_published_one(big: Path, v3_on_16: Advice) -> None:
    """70.272 kB and 516.096 kB a token: "Insights into DeepSeek-V3", table 1 (arXiv:2505.09343). On one rank."""
    (stage,) = plan(big / "405b", 1, workload=Workload(seq=1)).numbers()["stages"]
    assert stage["kv_cache"] == 516_096
    for tp in (1, 16):
        assert chosen(v3_on_16, tp).fullest["kv_cache"] == 1000 * 70_272  # latent: tp does not cut it
    assert sum(stage["kv_cache"] for stage in chosen(v3_on_16, 1, 16).stages) == 1000 * 70_272  # stages do


def test_advice_for_two_nodes_is_tp_in_a_node_and_stages_across(big: Path) -> None:
    options = ("advise", big / "405b", "--nodes", 2, "--gpus-per-node", 8, "--gpu-memory", 80)
    found = succeeds(*options, "--json").json
    assert found["mesh"] == {"tp": 8, "pp": 2, "ep": 1} and (found["gpus"], found["nodes"]) == (16, 2)
    meshes = {(each["tp"], each["pp"]): each for each in found["meshes"]}
    assert meshes[16, 1]["crosses_nodes"] and meshes[16, 1]["fits"] and not meshes[8, 2]["crosses_nodes"]
    assert meshes[16, 1]["reason"] == "all-reduces cross nodes; each of 8 kv on 2 ranks"
    assert meshes[4, 4]["reason"] == "a token passes through 4 stages in turn"
    assert meshes[4, 3]["reason"] == "4 devices stay idle" and meshes[4, 3]["idle"] == 4
    assert meshes[8, 1]["short"] == meshes[8, 1]["total"] - 72 * 10**9 and "29.7 GB too much" in meshes[8, 1]["reason"]
    order = [(not each["fits"], each["crosses_nodes"]) for each in found["meshes"]]
    assert order == sorted(order, key=lambda pair: (pair[0], pair[1] and not pair[0]))
    shown = succeeds(*options)
    assert "(2 nodes of 8)" in shown.out and "take tp 8 x pp 2: the fewest devices" in shown.out
    assert "--tp 8 --pp 2" in shown.err
    line = next(line for line in shown.out.splitlines() if line.startswith("tp 8 x pp 2 "))
    assert "fits: 50.7 GB weights + 132.1 MB KV cache; sends 7.2 MB a token, hands on 32.8 kB a token; " in line
    assert "more, of which 0 fit (--all shows them)" in shown.out
    assert len(succeeds(*options, "--all").out.splitlines()) > len(shown.out.splitlines())


def test_one_node_of_16_takes_tp_16(big: Path) -> None:
    """And two nodes of 8 that hold a copy each take tp 8 twice."""
    one = advise(big / "405b", 16, Workload(gpu_memory=80 * 10**9))
    assert one.mesh and (one.mesh.mesh.tp, one.mesh.mesh.pp, one.take) == (16, 1, 16)
    two = advise(big / "405b", 16, Workload(gpu_memory=160 * 10**9), nodes=2)
    assert two.mesh and (two.mesh.mesh.tp, two.mesh.mesh.pp, two.mesh.copies) == (8, 1, 2)
    assert "all-reduces stay in a node" in two.reason


def test_a_model_is_laid_out_by_one_layer_of_each_kind(v3: Model) -> None:
    """46,000 tensors are as many as those of a dense layer, a sparse one, and the one beyond the last."""
    reduced = like_layers(v3)
    assert len(v3.tensors) == 46_183 and len(reduced.model.tensors) < 1_700
    assert reduced.like == (0, 0, 0, *[3] * 58)


def test_layers_are_alike_in_shapes_dtypes_and_what_the_config_says_of_each(tmp_path: Path) -> None:
    model = from_checkpoint(open_checkpoint(llama(tmp_path / "m")))
    assert like_layers(model).like == (0, 0)
    for key in (".up_proj.", ".input_layernorm."):
        (one,) = (tensor for tensor in model.tensors if key in tensor.name and ".layers.1." in tensor.name)
        for other in (
            replace(one, shape=(2, *one.shape[1:])),
            replace(one, dtype="F16"),
            replace(one, name=f"{one.name}x"),
        ):
            changed = tuple(other if tensor is one else tensor for tensor in model.tensors)
            assert like_layers(replace(model, tensors=changed)).like == (0, 1)
    for layer_types, like in ((["full", "sliding"], (0, 1)), (["full", "full"], (0, 0))):
        assert like_layers(replace(model, config={**model.config, "layer_types": layer_types})).like == like


def test_a_stage_is_as_full_as_its_fullest_rank(tmp_path: Path) -> None:
    options = ("plan", llama(tmp_path / "m"), "--tp", 2, "--pp", 2, "--shares", "0.3,0.7", "--json")
    found = succeeds(*options).json["numbers"]
    first, second, third, fourth = (rank["total"] for rank in found["ranks"])
    assert first < second and third < fourth
    assert [stage["total"] for stage in found["stages"]] == [second, fourth]


MESHES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2), (2, 2, 2), (1, 3, 1), (4, 2, 4), (4, 1, 2)]
FORMATS = ["native", "vllm", "sglang", "meta", "deepseek"]
GRID = [(name, format) for name in VARIANTS for format in FORMATS]
CHOSEN = [("llama-gqa", "native"), ("llama-tied", "vllm"), ("deepseek_v3", "native"), ("deepseek_v3", "deepseek"),
          ("mixtral", "vllm"), ("gpt_oss", "native"), ("nemotron_h", "vllm")]  # fmt: skip


@pytest.mark.parametrize(("name", "format"), some(GRID, CHOSEN))
def test_advice_counts_what_a_plan_counts(name: str, format: str, made: Made) -> None:
    """Of every rank of every stage: a plan lays out each layer, advice one of each kind."""
    require_counted(made(name), format)


FIXTURES = [(path.name, format) for path in sorted((TESTS / "quantised/fixtures").iterdir()) for format in FORMATS[:2]]


@pytest.mark.parametrize(("name", "format"), some(FIXTURES, [("gptq-int4", "vllm"), ("ct-nvfp4", "native")]))
def test_advice_counts_what_a_plan_counts_of_quantised_models(name: str, format: str) -> None:
    require_counted(TESTS / "quantised/fixtures" / name, format)


def require_counted(model: Path, format: str) -> None:
    work = Workload(seq=7, gpu_memory=10**12)
    try:
        found = advise(model, 16, work, format=format)
    except UnsupportedError:
        with pytest.raises(UnsupportedError):
            plan(model, 1, format=format)
        return
    held = {(each.mesh.tp, each.mesh.pp, each.mesh.ep): each for each in found.meshes}
    for tp, pp, ep in MESHES:
        try:
            planned = plan(model, tp, format=format, pp=pp, ep=ep, workload=work)
        except UnsupportedError:
            assert (tp, pp, ep) not in held
            continue
        assert list(held[tp, pp, ep].stages) == planned.numbers()["stages"], (tp, pp, ep)


SPLIT = [
    ("llama-gqa", "native", (2, 2, 1)), ("llama-tied", "native", (1, 3, 1)), ("deepseek_v3", "native", (2, 2, 2)),
    ("llama-tied", "vllm", (2, 2, 1)), ("mixtral", "vllm", (2, 2, 2)), ("deepseek_v3", "deepseek", (2, 1, 1)),
    ("gpt2", "native", (2, 2, 1)), ("qwen3_moe", "vllm", (4, 1, 4)),
]  # fmt: skip


def tensor_bytes(path: Path) -> int:
    """The size of a safetensors file without its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize(("name", "format", "mesh"), one_in(2, SPLIT))
def test_files_are_as_large_as_plan_says(
    name: str, format: str, mesh: tuple[int, int, int], made: Made, tmp_path: Path
) -> None:
    """The files of each rank of what split writes, and of each stage's fullest rank."""
    tp, pp, ep = mesh
    model = make(name, tmp_path / "model", vocab_size=256) if format == "deepseek" else made(name)
    options = (model, "--tp", tp, "--pp", pp, "--ep", ep, "--format", format)
    planned = succeeds("plan", *options, "--json").json
    written = succeeds("split", *options, "-o", tmp_path / "set", "--no-fsync", "--json").json
    sizes = [sum(tensor_bytes(tmp_path / "set" / part["file"]) for part in each["parts"]) for each in written["ranks"]]
    assert len(sizes) == tp * pp
    assert sizes == [rank["weights"] for rank in planned["numbers"]["ranks"]]
    stages = [max(sizes[stage * tp : (stage + 1) * tp]) for stage in range(pp)]
    assert stages == [stage["weights"] for stage in planned["numbers"]["stages"]]
    advised = tpshard("advise", model, "--gpus", tp * pp, "--gpu-memory", 80, "--format", format, "--json").json
    choice = next(each for each in advised["meshes"] if [each[key] for key in ("tp", "pp", "ep")] == list(mesh))
    assert [stage["weights"] for stage in choice["stages"]] == stages and choice["weights"] == max(stages)


def test_whole_experts_fit_where_cut_ones_do_not_divide(tmp_path: Path, made: Made) -> None:
    """8 KV heads and experts of 6 columns: tp 4 cuts an expert's column; with whole experts it does not."""
    model = build("mixtral", intermediate_size=6, num_attention_heads=8, num_key_value_heads=8, num_local_experts=4)
    model.save_pretrained(tmp_path / "m")
    found = succeeds("advise", tmp_path / "m", "--gpus", 4, "--gpu-memory", 80, "--all", "--json").json
    assert not found["choices"][3]["possible"]
    assert [4, 1, 4] in [[each[key] for key in ("tp", "pp", "ep")] for each in found["meshes"]]


def test_a_format_without_stages_says_so(tmp_path: Path) -> None:
    found = succeeds("advise", llama(tmp_path / "m"), "--gpus", 4, "--gpu-memory", 80, "--format", "meta")
    assert "not held: --format meta holds no pipeline stages" in found.out and "pp" not in found.out.split("take")[1]
    assert "--format meta" in found.err


@pytest.mark.parametrize(
    ("code", "says", "options"),
    [
        (2, "advice needs devices", ()),
        (2, "2 nodes of 3 devices are not 8", ("--gpus", 8, "--nodes", 2, "--gpus-per-node", 3)),
        (2, "8 devices are not as many on each of 3 nodes", ("--gpus", 8, "--nodes", 3)),
        (2, "--format dcp: whoever loads it cuts it anew", ("--gpus", 8, "--format", "dcp")),
        (2, "it is a draft model", ("--gpus", 8, "--format", "vllm-speculator")),
        (4, "DeepSeek's layout holds DeepSeek-V2 and V3 alone", ("--gpus", 8, "--format", "deepseek")),
    ],
)
def test_what_cannot_be_advised(code: int, says: str, options: tuple[Any, ...], tmp_path: Path) -> None:
    assert says in fails(code, "advise", llama(tmp_path / "m"), "--gpu-memory", 80, *options)["message"]


def test_advice_needs_no_torch(tmp_path: Path) -> None:
    import subprocess

    script = "import sys; sys.modules['torch'] = None; from tpshard.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "advise", str(llama(tmp_path / "m")), "--gpus", "4", "--gpu-memory", "80"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["mesh"] == {"tp": 1, "pp": 1, "ep": 1}
