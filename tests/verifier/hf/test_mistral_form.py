"""Mistral's own form: transformers' classes compute it, from its names and with q and k in another order of rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers import mistral_form
from tests.helpers.command import succeeds
from tests.helpers.command import tpshard as command
from tests.helpers.grids import some
from tests.helpers.transformers_runs import CPU, reference
from tpshard.rules import architecture
from tpshard.verifier.group import Threads
from tpshard.verifier.hf.backend import TransformersBackend
from tpshard.verifier.hf.config import model_config
from tpshard.verifier.hf.mistral_params import text_config
from tpshard.verifier.hf.skeleton import fill, frame_of, skeleton
from tpshard.verifier.prompt import prompt_ids
from tpshard.verifier.ranks.open import open_source

RULES = Path(architecture.__file__).parent / "architectures" / "mistral_native.toml"
EVERY = tuple(mistral_form.KINDS)
BY_DEFAULT = ["mixtral", "merged"]


@pytest.mark.parametrize("kind", some(EVERY, BY_DEFAULT))
def test_it_is_proved(kind: str, tmp_path: Path) -> None:
    found = verified(split(kind, tmp_path), "weights,exact,native")
    assert (found["verdict"], found["settings"]["engine"]) == ("pass", "transformers"), found["reason"]
    assert [tier["status"] for tier in found["tiers"]] == ["pass"] * 3
    assert {canary["status"] for canary in found["canaries"]} == {"caught"} and found["not_run"] == []
    assert found["settings"].get("runs") == (
        "the whole model" if "vision_encoder" in mistral_form.KINDS[kind] else None
    )


HEADS = {
    "7b": ("layers.1.attention.wq.weight", 16, "layers.1.self_attn.q_proj"),
    "mixtral": ("layers.0.attention.wq.weight", 16, "layers.0.self_attn.q_proj"),
    "large 3": ("layers.1.attention.wq_b.weight", 24, "layers.1.self_attn.q_b_proj"),
    "pixtral": ("vision_encoder.transformer.layers.0.attention.wk.weight", 16, "layers.0.attention.k_proj"),
    "merged": ("layers.0.attention.wq.weight", 16, "layers.0.self_attn.q_proj"),
}


@pytest.mark.parametrize("kind", some(EVERY, ["7b", "pixtral"]))
def test_heads_in_another_order_fail(kind: str, tmp_path: Path) -> None:
    name, rows, module = HEADS[kind]
    out = split(kind, tmp_path, "--checksum", "none")
    change(out, name, lambda tensor: tensor[: 2 * rows].roll(rows, 0))
    found = verified(out, "exact")
    assert found["verdict"] == "fail" and module in found["reason"], found["reason"]


def test_rows_of_a_head_in_transformers_order_fail(tmp_path: Path) -> None:
    """As if they had been converted before."""
    out = split("7b", tmp_path, "--checksum", "none")
    change(out, "layers.0.attention.wk.weight", lambda rows: rows.view(-1, 8, 2, 64).transpose(1, 2).reshape(-1, 64))
    found = verified(out, "exact")
    assert found["verdict"] == "fail" and "layers.0.self_attn.k_proj" in found["reason"], found["reason"]


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("7b", "layers.*.attention.wk"),
        ("mixtral", "layers.*.feed_forward.experts.*.w3"),
        ("large 3", "layers.*.attention.wkv_b"),
    ],
)
def test_what_is_whole_and_should_be_cut_fails(kind: str, module: str, tmp_path: Path) -> None:
    text = RULES.read_text()
    without = re.sub(rf'"{re.escape(module)}",?', "", text)
    assert without != text
    file = tmp_path / "wrong.toml"
    file.write_text(without.replace('\n"replicate" = [', f'\n"replicate" = ["{module}?",', 1))
    found = verified(split(kind, tmp_path, "--rules", file), "exact")
    assert found["verdict"] == "fail", found["reason"]


def test_a_cut_through_heads_fails(tmp_path: Path) -> None:
    """Of two KV heads each of four ranks gets a half."""
    text, whole = RULES.read_text(), 'kv = { count = "n_kv_heads or n_heads", unit = "head_dim or dim // n_heads"'
    assert whole in text
    file = tmp_path / "wrong.toml"
    file.write_text(text.replace(whole, 'kv = { count = "n_kv_heads * 2", unit = "head_dim // 2"'))
    found = verified(split("7b", tmp_path, "--rules", file, tp=4), "exact")
    assert found["verdict"] == "fail" and "layers.0.self_attn" in found["reason"], found["reason"]


SCALING = {"llama_4_scaling": {"original_max_position_embeddings": 8, "beta": 0.1}}


@pytest.mark.parametrize(
    ("kind", "more", "computed_by"),
    [
        ("7b", {}, "mistral"),
        ("7b", SCALING, "ministral3"),
        ("mixtral", {}, "mixtral"),
        ("large 3", {"yarn": None}, "mistral4"),
    ],
)
def test_the_class_computes_what_the_form_says(
    kind: str, more: Mapping[str, Any], computed_by: str, tmp_path: Path
) -> None:
    """Written out by hand: pairs side by side are rotated as numbers of the complex plane."""
    model = mistral_form.published(tmp_path / "model", kind, **more)
    config, source = open_source(model)
    frame, source, _ = frame_of(model_config(config)).converted(source, ())
    ids = prompt_ids(frame.config.vocab_size, 0, 2, 20)
    sides = TransformersBackend(source, (), Threads(1), ids, CPU, frame.of_source(source))
    weights = {name: tensor.double() for name, tensor in load_file(model / "consolidated.safetensors").items()}
    ours, _ = reference(sides)
    wanted = torch.stack([by_hand({**mistral_form.KINDS[kind], **more}, weights, each) for each in ids])
    assert frame.config.model_type == computed_by
    assert float((ours - wanted).norm() / wanted.norm()) <= 1e-9


def by_hand(params: Mapping[str, Any], weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """The logits of a text."""
    x = weights["tok_embeddings.weight"][ids]
    for i in range(params["n_layers"]):
        layer = {n.removeprefix(f"layers.{i}."): w for n, w in weights.items() if n.startswith(f"layers.{i}.")}
        normed = normal(x, layer["attention_norm.weight"], params)
        x = x + (latent if "kv_lora_rank" in params else grouped)(params, layer, normed)
        x = x + fed(params, layer, normal(x, layer["ffn_norm.weight"], params))
    return normal(x, weights["norm.weight"], params) @ weights["output.weight"].T


def normal(x: Tensor, weight: Tensor, params: Mapping[str, Any]) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + params["norm_eps"]).rsqrt() * weight


def rotated(x: Tensor, theta: float) -> Tensor:
    """x: [T, heads, size]"""
    length, _, size = x.shape
    angles = torch.arange(length).outer(theta ** -(torch.arange(0, size, 2).double() / size))
    turned = (
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        * torch.polar(torch.ones(()).double(), angles)[:, None]
    )
    return torch.view_as_real(turned).flatten(-2)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v: [T, heads, size]"""
    scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)


def scaled(q: Tensor, params: Mapping[str, Any]) -> Tensor:
    """Queries far behind the trained length are longer."""
    if not (scaling := params.get("llama_4_scaling")):
        return q
    steps = torch.arange(len(q)).double().div(scaling["original_max_position_embeddings"]).floor()
    return q * (1 + scaling["beta"] * (1 + steps).log())[:, None, None]


def grouped(params: Mapping[str, Any], layer: Mapping[str, Tensor], x: Tensor) -> Tensor:
    q, k, v = ((x @ layer[f"attention.w{each}.weight"].T).unflatten(1, (-1, params["head_dim"])) for each in "qkv")
    groups = params["n_heads"] // params["n_kv_heads"]
    q, k = scaled(rotated(q, params["rope_theta"]), params), rotated(k, params["rope_theta"])
    out = attended(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    return out @ layer["attention.wo.weight"].T


def latent(params: Mapping[str, Any], layer: Mapping[str, Tensor], x: Tensor) -> Tensor:
    plain, turned, theta = params["qk_nope_head_dim"], params["qk_rope_head_dim"], params["rope_theta"]
    q = normal(x @ layer["attention.wq_a.weight"].T, layer["attention.q_a_norm.weight"], params)
    q = (q @ layer["attention.wq_b.weight"].T).unflatten(1, (params["n_heads"], -1))
    both = x @ layer["attention.wkv_a_with_mqa.weight"].T
    kv = normal(both[:, : params["kv_lora_rank"]], layer["attention.kv_a_norm.weight"], params)
    kv = (kv @ layer["attention.wkv_b.weight"].T).unflatten(1, (params["n_heads"], -1))
    shared = rotated(both[:, None, params["kv_lora_rank"] :], theta).expand(-1, params["n_heads"], turned)
    q = scaled(torch.cat((q[..., :plain], rotated(q[..., plain:], theta)), -1), params)
    out = attended(q, torch.cat((kv[..., :plain], shared), -1), kv[..., plain:])
    return out @ layer["attention.wo.weight"].T


def fed(params: Mapping[str, Any], layer: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The feed-forward, or experts by their scores' softmax, which those that are chosen share."""

    def one(name: str) -> Tensor:
        w1, w2, w3 = (layer[f"{name}.w{each}.weight"].T for each in (1, 2, 3))
        return (F.silu(x @ w1) * (x @ w3)) @ w2

    gate = next(
        (weight for name, weight in layer.items() if re.fullmatch(r"(feed_forward\.)?gate\.weight", name)), None
    )
    if gate is None:
        return one("feed_forward")
    scores, chosen = (x @ gate.T).softmax(-1).topk(params["moe"]["num_experts_per_tok"])
    shares = torch.zeros(len(x), len(gate)).double().scatter(1, chosen, scores / scores.sum(-1, keepdim=True))
    inside = "feed_forward." if "feed_forward.gate.weight" in layer else ""
    out = sum(shares[:, [e]] * one(f"{inside}experts.{e}") for e in range(len(gate)))
    return out + one("shared_experts") if "shared_experts.w1.weight" in layer else out  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("kind", "more", "wanted"),
    [
        ("7b", {"sliding_window": 8}, {"model_type": "mistral", "sliding_window": 8}),
        ("7b", {"sliding_window": [8, None]}, {"model_type": "ministral", "sliding_window": 8}),
        ("7b", {"sliding_window": [8, 4]}, None),
        ("7b", {"yarn": {"factor": 4, "original_max_position_embeddings": 16}}, {"model_type": "mistral"}),
        ("7b", SCALING | {"yarn": {"factor": 4, "original_max_position_embeddings": 16}}, None),
        ("7b", {"multimodal": {"whisper_model_args": {}}}, None),
        ("mixtral", SCALING, None),
        ("mixtral", {"moe": {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}}, None),
        ("large 3", {"norm_eps": 1e-5}, None),
        ("large 3", {"moe": mistral_form.LATENT["moe"] | {"num_expert_groups": 2}}, None),
        ("large 3", {"moe": None}, {"model_type": "mistral4", "first_k_dense_replace": 2}),
    ],
)
def test_which_class_computes_it(kind: str, more: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> None:
    """Words where no class computes the same: then bytes alone are compared."""
    found = text_config({**mistral_form.KINDS[kind], "tie_word_embeddings": False, **more})
    assert isinstance(found, str) == (wanted is None)
    assert isinstance(found, str) or wanted is None or wanted.items() <= found.items()


def test_without_a_class_bytes_are_compared(tmp_path: Path) -> None:
    model = mistral_form.published(tmp_path / "model", "large 3", norm_eps=1e-5)
    succeeds("split", model, "--tp", 2, "-o", tmp_path / "out", "--no-fsync")
    refused = command("verify", tmp_path / "out", "--source", model, "--tier", "exact")
    assert refused.code == 4 and "this mistral_native model" in refused.err, refused.err
    found = succeeds("verify", tmp_path / "out", "--source", model, "--tier", "bytes", "--json").json
    assert found["verdict"] == "pass"


def test_the_tower_sees_what_the_form_says(tmp_path: Path) -> None:
    """By hand as well: of each pair of numbers one half of frequencies turns with rows, the other with columns."""
    model = mistral_form.published(tmp_path / "model", "pixtral")
    config, source = open_source(model)
    frame = frame_of(model_config(config, whole=True))
    frame, source, _ = frame.converted(source, ())
    whole: Any = skeleton(frame.config, torch.float64, CPU)
    fill(whole, frame.of_source(source), source, torch.float64, CPU)
    picture = torch.randn(1, 3, 28, 42, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        found = whole.model.get_image_features(picture, image_sizes=torch.tensor([[28, 42]]), return_dict=True)
    weights = {name: tensor.double() for name, tensor in load_file(model / "consolidated.safetensors").items()}
    wanted = seen(mistral_form.VISION, weights, picture)
    ours = torch.cat(list(found.pooler_output)).view(wanted.shape)
    assert float((ours - wanted).norm() / wanted.norm()) <= 1e-6  # transformers makes angles in float32


def seen(args: Mapping[str, Any], weights: Mapping[str, Tensor], picture: Tensor) -> Tensor:
    """What the text gets of a picture."""
    patches = F.conv2d(picture, weights["vision_encoder.patch_conv.weight"], stride=args["patch_size"])[0]
    _, rows, columns = patches.shape
    params = {"norm_eps": 1e-5}
    x = normal(patches.flatten(1).T, weights["vision_encoder.ln_pre.weight"], params)
    size = args["hidden_size"] // args["num_attention_heads"]
    frequencies = args["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)
    row, column = (each.flatten() for each in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    angles = torch.cat((row.outer(frequencies[::2]), column.outer(frequencies[1::2])), -1)
    turns = torch.polar(torch.ones(()).double(), angles)[:, None]
    for i in range(args["num_hidden_layers"]):
        start = f"vision_encoder.transformer.layers.{i}."
        layer = {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
        normed = normal(x, layer["attention_norm.weight"], params)
        q, k, v = ((normed @ layer[f"attention.w{each}.weight"].T).unflatten(1, (-1, size)) for each in "qkv")
        q, k = (torch.view_as_complex(each.unflatten(-1, (-1, 2)).contiguous()) * turns for each in (q, k))
        q, k = (torch.view_as_real(each).flatten(-2) for each in (q, k))
        scores = (torch.einsum("thd,shd->hts", q, k) * size**-0.5).softmax(-1)
        x = x + torch.einsum("hts,shd->thd", scores, v).flatten(1) @ layer["attention.wo.weight"].T
        x = x + fed({}, layer, normal(x, layer["ffn_norm.weight"], params))
    for name in ("w_in", "w_out"):
        x = F.linear(x, *(weights[f"vision_language_adapter.{name}.{leaf}"] for leaf in ("weight", "bias")))
        x = F.gelu(x) if name == "w_in" else x
    return x


def split(kind: str, folder: Path, *more: object, tp: int = 2) -> Path:
    model = mistral_form.published(folder / "model", kind)
    succeeds("split", model, "--tp", tp, "-o", folder / "out", "--no-fsync", *more)
    return folder / "out"


def change(out: Path, name: str, how: Any) -> None:
    """Put other rows in the place of the first ones of a tensor of rank 1."""
    file = out / "rank-00001-of-00002.safetensors"
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    tensors = load_file(file)
    rows = how(tensors[name])
    tensors[name] = torch.cat((rows, tensors[name][len(rows) :]))
    save_file(tensors, file, said)


def verified(out: Path, tiers: str) -> Any:
    given = ("--source", out.parent / "model", "--tier", tiers, "--tokens", 2, "--json")
    return command("verify", out, *given).json
