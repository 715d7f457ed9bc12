"""DeepSeek's files against an independent cut of the same checkpoint, made with torch's narrow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.checkpoints import make
from tests.helpers.command import fails, succeeds

DIMS = {"q_proj": 0, "q_b_proj": 0, "kv_b_proj": 0, "gate_proj": 0, "up_proj": 0, "embed_tokens": 0, "lm_head": 0,
        "o_proj": 1, "down_proj": 1}  # fmt: skip
NAMES = {"q_proj": "wq", "q_a_proj": "wq_a", "q_a_layernorm": "q_norm", "q_b_proj": "wq_b",
         "kv_a_proj_with_mqa": "wkv_a", "kv_a_layernorm": "kv_norm", "kv_b_proj": "wkv_b", "o_proj": "wo",
         "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "embed_tokens": "embed", "lm_head": "head",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "norm": "norm",
         "gate": "gate"}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def converted(model: Path, tp: int) -> list[dict[str, Tensor]]:
    """Every rank's tensors; experts are taken apart first where the file has them stacked."""
    experts = json.loads((model / "config.json").read_text())["n_routed_experts"]
    ranks: list[dict[str, Tensor]] = [{} for _ in range(tp)]
    for name, tensor in load_file(model / "model.safetensors").items():
        *path, module, last = name.removeprefix("model.").split(".")
        path = [{"self_attn": "attn", "mlp": "ffn"}.get(part, part) for part in path]
        new = ".".join([*path, NAMES[module], {"e_score_correction_bias": "bias"}.get(last, last)])
        if "experts" in path:
            ranks[int(path[-1]) * tp // experts][new] = tensor
            continue
        dim = DIMS.get(module)
        cut = dim is not None and dim < tensor.dim()
        for rank in range(tp):
            ranks[rank][new] = tensor.chunk(tp, dim)[rank].contiguous() if cut else tensor
    return ranks


@pytest.mark.parametrize("variant", ["deepseek_v2", "deepseek_v2-lite", "deepseek_v3"])
@pytest.mark.parametrize("tp", [2, 4])
def test_the_ranks_are_what_narrowing_gives(variant: str, tp: int, tmp_path: Path) -> None:
    model = make(variant, tmp_path / "model", vocab_size=256)
    succeeds("split", model, "--tp", tp, "--format", "deepseek", "-o", tmp_path / "out")
    for rank, expected in enumerate(converted(model, tp)):
        found = load_file(tmp_path / f"out/model{rank}-mp{tp}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    succeeds("check", tmp_path / "out", "--source", model, "--tp", tp)
    succeeds("merge", tmp_path / "out", "-o", tmp_path / "merged")
    merged, source = load_file(tmp_path / "merged/model.safetensors"), load_file(model / "model.safetensors")
    assert merged.keys() == source.keys() and all(torch.equal(merged[name], source[name]) for name in source)


def test_stacked_experts_give_the_same_files(tmp_path: Path) -> None:
    model = make("deepseek_v3", tmp_path / "model", vocab_size=256)
    tensors = load_file(model / "model.safetensors")
    stacked = dict(tensors)
    routed = sorted({name.rpartition(".experts.")[0] for name in tensors if ".mlp.experts." in name})
    count = json.loads((model / "config.json").read_text())["n_routed_experts"]
    for prefix in routed:

        def each(module: str, prefix: str = prefix) -> list[Tensor]:
            return [stacked.pop(f"{prefix}.experts.{expert}.{module}.weight") for expert in range(count)]

        gates, ups, downs = each("gate_proj"), each("up_proj"), each("down_proj")
        stacked[f"{prefix}.experts.gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        )
        stacked[f"{prefix}.experts.down_proj"] = torch.stack(downs)
    assert routed and stacked.keys() != tensors.keys()
    (tmp_path / "stacked").mkdir()
    (tmp_path / "stacked/config.json").write_bytes((model / "config.json").read_bytes())
    save_file(stacked, tmp_path / "stacked/model.safetensors", {"format": "pt"})
    for source in ("model", "stacked"):
        succeeds("split", source, "--tp", 2, "--format", "deepseek", "-o", f"{source}-out")
    for rank in range(2):
        one, other = (load_file(f"{source}-out/model{rank}-mp2.safetensors") for source in ("model", "stacked"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    succeeds("merge", "stacked-out", "-o", "merged")
    merged = load_file("merged/model.safetensors")
    assert merged.keys() == stacked.keys() and all(torch.equal(merged[name], stacked[name]) for name in stacked)


def test_what_the_format_cannot_hold(tmp_path: Path) -> None:
    model = make("deepseek_v2", tmp_path / "model", vocab_size=256)
    out = ("--format", "deepseek", "-o", tmp_path / "out")
    assert "8 heads on 3 ranks" in str(fails(4, "split", model, "--tp", 3, *out))
    assert "even shares" in str(fails(2, "split", model, "--tp", 2, "--uneven", *out))
    assert "one file" in str(fails(2, "split", model, "--tp", 2, "--max-file-size", "5kB", *out))
    make("llama", tmp_path / "llama")
    assert "DeepSeek-V2 and V3 alone" in str(fails(4, "split", tmp_path / "llama", "--tp", 2, *out))


def test_experts_of_a_width_that_does_not_divide_are_planned_as_they_are_split(tmp_path: Path) -> None:
    """They stay whole, so their width is no matter: plan and a dry run said otherwise once, and split was right."""
    changed = {"vocab_size": 256, "moe_intermediate_size": 30, "n_shared_experts": 2}
    model = make("deepseek_v3", tmp_path / "model", **changed)
    options = ("--tp", 4, "--format", "deepseek")
    plan = succeeds("plan", model, *options, "--json").json
    succeeds("split", model, *options, "--dry-run")
    succeeds("split", model, *options, "-o", tmp_path / "out")
    files = [load_file(tmp_path / f"out/model{rank}-mp4.safetensors") for rank in range(4)]
    sizes = [sum(tensor.nbytes for tensor in held.values()) for held in files]
    assert [rank["bytes"] for rank in plan["ranks"]] == [rank["weights"] for rank in plan["numbers"]["ranks"]] == sizes
    assert 4 in plan["possible_tp"] and [entry["tp"] for entry in plan["impossible_tp"] if entry["tp"] == 4] == []
    succeeds("check", tmp_path / "out", "--source", model)
    native = fails(4, "plan", model, "--tp", 4)
    assert "30 moe_ffn on 4 ranks" in native["message"]
