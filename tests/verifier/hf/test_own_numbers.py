"""Models that publish code of their own: what their class computes is what is computed here in a few plain lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers import published_text
from tpshard.verifier.hf.config import model_config
from tpshard.verifier.hf.overrides import precision
from tpshard.verifier.hf.skeleton import fill, frame_of, skeleton
from tpshard.verifier.ranks.weights import InMemory

Tensors = Mapping[str, Tensor]
Config = Mapping[str, Any]
Part = Callable[[Tensors, Config, Tensor, int], Tensor]
"""Of tensors, config, what comes in and a layer's number, what is added to the stream."""
IDS = torch.tensor([[3, 1, 41, 5, 9, 2, 6, 53, 5, 8, 9, 7]])
CPU = torch.device("cpu")


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, theta: float) -> Tensor:
    """Heads [S, H, D], of which the first half goes with the second."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None, None] * theta ** -(torch.arange(half, dtype=torch.float64) / half)
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of heads [S, H, D], each token on those before it; several of q go with one of k and v."""
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), v).flatten(1)


def fused(x: Tensor, weight: Tensor, q: int, kv: int, theta: float) -> Tensor:
    """Attention of q heads and KV heads, whose rows of a matrix are queries, keys and values."""
    head = len(weight) // (q + 2 * kv)
    parts = (x @ weight.T).split([q * head, kv * head, kv * head], -1)
    queries, keys, values = (each.unflatten(-1, (-1, head)) for each in parts)
    return attention(turned(queries, theta), turned(keys, theta), values)


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def gated_of(tensors: Tensors, module: str, x: Tensor) -> Tensor:
    return gated(x, *(tensors[f"{module}.{each}_proj.weight"] for each in ("gate", "up", "down")))


def packed(tensors: Tensors, config: Config, x: Tensor, layer: int) -> Tensor:
    start, heads = f"model.layers.{layer}.self_attn.", config["num_attention_heads"]
    out = fused(x, tensors[f"{start}W_pack.weight"], heads, heads, 1e4)
    return out @ tensors[f"{start}o_proj.weight"].T


def dense(tensors: Tensors, config: Config, x: Tensor, layer: int) -> Tensor:
    return gated_of(tensors, f"model.layers.{layer}.mlp", x)


def of_ling(tensors: Tensors, config: Config, x: Tensor, layer: int) -> Tensor:
    start, heads = f"model.layers.{layer}.attention.", (config["num_attention_heads"], config["num_key_value_heads"])
    out = fused(x, tensors[f"{start}query_key_value.weight"], *heads, config["rope_theta"])
    return out @ tensors[f"{start}dense.weight"].T


def experts(tensors: Tensors, config: Config, x: Tensor, layer: int) -> Tensor:
    """Two of the experts for each token, by a softmax of all scores that is made to sum to 1, and the shared ones."""
    start = f"model.layers.{layer}.mlp."
    scores = (x @ tensors[f"{start}gate.weight"].T).softmax(-1)
    rows = []
    for token, row in zip(x, scores, strict=True):
        first, second = map(int, row.argsort(descending=True)[:2])
        each = [row[i] * gated_of(tensors, f"{start}experts.{i}", token) for i in (first, second)]
        rows.append((each[0] + each[1]) / (row[first] + row[second]))
    return torch.stack(rows) + gated_of(tensors, f"{start}shared_experts", x)


def adapted(tensors: Tensors, module: str, scales: Mapping[str, float]) -> Tensor:
    found = tensors[f"{module}.base_layer.weight"]
    for name, scale in scales.items():
        found = found + scale * tensors[f"{module}.lora_B.{name}.weight"] @ tensors[f"{module}.lora_A.{name}.weight"]
    return found


SCALES = {"speech": 1.0, "vision": 2.0}


def of_phi(tensors: Tensors, config: Config, x: Tensor, layer: int) -> Tensor:
    start, heads = f"model.layers.{layer}.self_attn.", (config["num_attention_heads"], config["num_key_value_heads"])
    out = fused(x, adapted(tensors, f"{start}qkv_proj", SCALES), *heads, 1e4)
    return out @ adapted(tensors, f"{start}o_proj", SCALES).T


def phi_dense(tensors: Tensors, config: Config, x: Tensor, layer: int) -> Tensor:
    start = f"model.layers.{layer}.mlp."
    both = adapted(tensors, f"{start}gate_up_proj", SCALES)
    return gated(x, *both.chunk(2), adapted(tensors, f"{start}down_proj", SCALES))


def searched(tensors: Tensors, config: Config, x: Tensor, layer: int) -> Tensor:
    start, heads = f"model.layers.{layer}.self_attn.", config["num_attention_heads"]
    if f"{start}linear_attn.weight" in tensors:
        return x @ tensors[f"{start}linear_attn.weight"].T
    q, k, v = ((x @ tensors[f"{start}{each}_proj.weight"].T).unflatten(-1, (-1, len(x.T) // heads)) for each in "qkv")
    return attention(turned(q, 1e4), turned(k, 1e4), v) @ tensors[f"{start}o_proj.weight"].T


def lightning(tensors: Tensors, config: Config, x: Tensor, layer: int) -> Tensor:
    """Heads that forget at a rate of their own, and one norm of all; or attention, with a part of each head turned."""
    start, heads, width = f"model.layers.{layer}.self_attn.", config["num_attention_heads"], config["head_dim"]

    def of(module: str) -> Tensor:
        return x @ tensors[f"{start}{module}.weight"].T

    if f"{start}q_proj.weight" in tensors:
        q, k, v = (of(f"{each}_proj").unflatten(-1, (-1, width)) for each in "qkv")
        part = config["rotary_dim"]
        q, k = (torch.cat([turned(e[..., :part], config["rope_theta"]), e[..., part:]], -1) for e in (q, k))
        return attention(q, k, v) @ tensors[f"{start}o_proj.weight"].T
    q, k, v = torch.nn.functional.silu(of("qkv_proj")).unflatten(-1, (heads, 3, width)).unbind(-2)
    slow = 1 - layer / (config["num_hidden_layers"] - 1 + 1e-5) + 1e-5
    rate = torch.exp(-slow * 2.0 ** (-8 / heads * torch.arange(1, heads + 1, dtype=torch.float64)))[:, None, None]
    state, rows = torch.zeros(heads, width, width, dtype=torch.float64), []
    for query, key, value in zip(q, k, v, strict=True):
        state = rate * state + key[:, :, None] * value[:, None]
        rows.append((query[:, None] @ state).flatten())
    normed = rms(torch.stack(rows), tensors[f"{start}norm.weight"], 1e-6)
    return (of("output_gate").sigmoid() * normed) @ tensors[f"{start}out_proj.weight"].T


def mixtral(tensors: Tensors, config: Config, x: Tensor, layer: int) -> Tensor:
    start = f"model.layers.{layer}.block_sparse_moe."
    scores, rows = (x @ tensors[f"{start}gate.weight"].T).softmax(-1), []
    for token, row in zip(x, scores, strict=True):
        chosen = row.argsort(descending=True)[:2]
        each = [[tensors[f"{start}experts.{i}.w{w}.weight"] for w in (1, 3, 2)] for i in map(int, chosen)]
        parts = [weight * gated(token, *one) for weight, one in zip(row[chosen], each, strict=True)]
        rows.append((parts[0] + parts[1]) / row[chosen].sum())
    return torch.stack(rows)


PARTS: dict[str, tuple[Part, Part]] = {
    "baichuan": (packed, dense),
    "baichuan-2": (packed, dense),
    "bailing_moe": (of_ling, experts),
    "minimax_text_01": (lightning, mixtral),
    "nemotron-nas": (searched, dense),
    "phi4mm": (of_phi, phi_dense),
}


EPS = {"nemotron-nas": 1e-6, "phi4mm": 1e-5}
"""What a config that says none has, of which the rest says one."""


def plain(name: str, tensors: Tensors, config: Config) -> Tensor:
    """Logits, by the definition of the model."""
    attends, feeds = PARTS[name]
    embedding = "word_embeddings" if "model.word_embeddings.weight" in tensors else "embed_tokens"
    x, eps = tensors[f"model.{embedding}.weight"][IDS[0]], config.get("rms_norm_eps") or EPS[name]
    for layer in range(config["num_hidden_layers"]):
        for part, norm in ((attends, "input_layernorm"), (feeds, "post_attention_layernorm")):
            if (weight := tensors.get(f"model.layers.{layer}.{norm}.weight")) is None:
                continue
            normed = rms(x, weight, eps)
            x = normed if config.get("postnorm") else x
            kind = "mlp" if part is feeds else "linear_attention" if layer == 0 else "full_attention"
            alpha, beta = (config.get(f"layernorm_{kind}_{each}", 1.0) for each in ("alpha", "beta"))
            x = alpha * x + beta * part(tensors, config, normed, layer)
    head = tensors.get("lm_head.weight", tensors[f"model.{embedding}.weight"])
    if name == "baichuan-2":
        head = head / head.pow(2).sum(1, keepdim=True).sqrt()
    return rms(x, tensors["model.norm.weight"], eps) @ head.T


def class_of(tensors: Tensors, config: Config) -> Any:
    """The class that `verify` runs, of the same tensors."""
    of_class = model_config(config)
    frame, source, _ = frame_of(of_class).converted(InMemory(dict(tensors)), [])
    model: Any = skeleton(of_class, torch.float64, CPU)
    fill(model, frame, source, torch.float64, CPU)
    return model


def of(model: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = json.loads((model / "config.json").read_text()) | {"vision_lora": {"lora_alpha": 8, "r": 4}}
    return {key: x.double() for file in model.glob("*.safetensors") for key, x in load_file(file).items()}, config


@pytest.mark.parametrize("name", PARTS)
def test_the_class_computes_the_model(name: str, tmp_path: Path) -> None:
    tensors, config = of(published_text.make(name, tmp_path / "model"))
    with precision(torch.float64), torch.no_grad():
        theirs = class_of(tensors, config)(input_ids=IDS).logits[0]
    ours = plain(name, tensors, config)
    assert float((ours - theirs).norm() / ours.norm()) < 1e-9


def test_positions_go_on_where_the_first_layer_attends_to_nothing(tmp_path: Path) -> None:
    """Classes take them from what the first layer has kept."""
    tensors, config = of(published_text.make("nemotron-nas", tmp_path / "model"))
    other = {"model.layers.0.": "model.layers.1.", "model.layers.1.": "model.layers.0."}
    tensors = {next((key.replace(a, b) for a, b in other.items() if a in key), key): x for key, x in tensors.items()}
    first, second, *rest = config["block_configs"]
    config = {**config, "block_configs": [second, first, *rest]}
    model = class_of(tensors, config)
    with precision(torch.float64), torch.no_grad():
        before = model(input_ids=IDS[:, :-1], use_cache=True)
        last = model(input_ids=IDS[:, -1:], past_key_values=before.past_key_values).logits[0, -1]
    wanted = plain("nemotron-nas", tensors, config)[-1]
    assert float((last - wanted).norm() / wanted.norm()) < 1e-9
