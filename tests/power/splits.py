"""Correct splits of random models: none may be refused, by any tier, whatever its sizes, dtype, shares and seed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

import tpshard
from tests.helpers.checkpoints import make
from tpshard.errors import UnsupportedError
from tpshard.execute.publish import Settings
from tpshard.verifier import elements
from tpshard.verifier.builtin import memory, prepare
from tpshard.verifier.options import VerifyOptions
from tpshard.verifier.run import verify

# Matrices of these sizes are compared in several blocks, and run so where the weights are streamed.
BLOCK_BYTES = 1 << 12
OUTLIERS = (10, 100, 1000)
EVERY = 5
"""Every so many seeds the weights have outliers, as those of real models have."""
DTYPES = ("float32", "bfloat16", "float16")
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox", "gptj", "gpt_bigcode", "gpt_neo", "bloom",
    "falcon", "opt",
)  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """One random model and how it was split; `verdict` and `missed` (canaries) are what verify made of it.

    `outliers` is what some rows and columns of its matrices were multiplied by.
    """

    seed: int
    family: str
    dtype: str
    tp: int
    shares: str
    outliers: int
    options: dict[str, Any]
    verdict: str
    reason: str
    missed: list[str]

    @property
    def right(self) -> bool:
        """Whether verify passed it, or said that the model itself overflows, or that float32 is blind to outliers."""
        blamed = "the unsharded model itself gives" in self.reason
        coarse = self.outliers > 1 and self.options.get("float32", False)
        return self.verdict == "pass" or (self.verdict == "inconclusive" and (blamed or coarse))


def config(rng: random.Random, family: str, unit: int) -> tuple[str, dict[str, Any]]:
    """A variant to start from, and sizes that replace its own; heads and MLP are multiples of `unit`."""
    heads, head = unit * rng.randint(1, max(2, 12 // unit)), rng.choice((4, 8, 12, 16))
    layers, ffn = rng.randint(1, 4), unit * rng.randint(9, 200 // unit)
    vocab = {"vocab_size": rng.randint(60, 400)}
    groups = rng.randint(1, 3)
    if family in ("llama", "mistral", "qwen2", "qwen3", "gemma2"):
        # Every other even split repeats its KV heads, where the width has a divisor to have so few of.
        few = rng.choice([n for n in range(1, unit + 1) if unit % n == 0])
        kv = few if rng.random() < 0.5 else unit * rng.randint(1, max(1, 6 // unit))
        heads = unit * groups if kv == few else kv * groups
        start = {
            "llama": ["llama", "llama-mha-bias", "llama-tied", "llama-rope-llama3", "llama-rope-yarn"],
            "mistral": ["mistral", "mistral-sliding"],
            "qwen2": ["qwen2-bias", "qwen2-tied"],
            "qwen3": ["qwen3", "qwen3-tied-bias"],
            "gemma2": ["gemma2"],
        }[family]
        sizes: dict[str, Any] = {
            "num_attention_heads": heads, "num_key_value_heads": kv, "num_hidden_layers": layers,
            "intermediate_size": ffn,
        }  # fmt: skip
        # Qwen 2 has no head_dim of its own; elsewhere the stream need not be as wide as the heads together.
        free = family != "qwen2"
        sizes |= (
            {"hidden_size": heads * rng.choice((4, 8, 12)), "head_dim": head} if free else {"hidden_size": heads * head}
        )
        return rng.choice(start), vocab | sizes
    width = heads * head
    if family == "gpt2":
        name = rng.choice(("gpt2", "gpt2-untied-inner", "gpt2-scaled"))
        return name, vocab | {"n_embd": width, "n_head": heads, "n_layer": layers, "n_inner": ffn}
    if family == "gpt_neox":
        name = rng.choice(("gpt_neox", "gpt_neox-seq-residual", "gpt_neox-tied-nobias"))
        sizes = {"num_attention_heads": heads, "num_hidden_layers": layers, "intermediate_size": ffn}
        return name, vocab | sizes | {"hidden_size": width, "rotary_pct": rng.choice((0.5, 1.0))}
    if family == "gptj":
        sizes = {"n_embd": width, "n_head": heads, "n_layer": layers, "n_inner": ffn}
        return rng.choice(("gptj", "gptj-tied-inner")), vocab | sizes | {"rotary_dim": rng.choice((2, 4))}
    if family == "gpt_bigcode":
        sizes = {"n_embd": width, "n_head": heads, "n_layer": layers, "n_inner": ffn}
        return rng.choice(("gpt_bigcode-mqa", "gpt_bigcode-mha")), vocab | sizes
    if family == "gpt_neo":
        kinds = {"attention_types": [[["global", "local"], 1]], "num_layers": 2}
        if rng.random() < 0.5:
            kinds = {"attention_types": [[["local"], layers]], "num_layers": layers}
        return "gpt_neo", vocab | kinds | {"hidden_size": width, "num_heads": heads, "intermediate_size": ffn}
    if family == "bloom":
        sizes = {"hidden_size": width, "n_head": heads, "n_layer": layers}
        return rng.choice(("bloom", "bloom-12-heads")), vocab | sizes
    if family == "falcon":
        name = rng.choice(("falcon-new", "falcon-new-one-norm", "falcon-mqa", "falcon-mha-alibi"))
        kv = {"num_kv_heads": heads} if name.startswith("falcon-new") else {}
        heads = heads * groups if kv else heads
        sizes = {"num_attention_heads": heads, "hidden_size": heads * head, "num_hidden_layers": layers}
        return name, vocab | kv | sizes | {"ffn_hidden_size": ffn}
    assert family == "opt"
    name = rng.choice(("opt", "opt-350m-like", "opt-project-prenorm", "opt-no-final-norm", "opt-nobias"))
    narrow = {} if name in ("opt", "opt-no-final-norm", "opt-nobias") else {"word_embed_proj_dim": 24}
    if not narrow:
        narrow = {"word_embed_proj_dim": width}
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers, "ffn_dim": ffn}
    return name, vocab | sizes | narrow


def chosen(rng: random.Random, family: str) -> tuple[str, int, dict[str, Any], str, dict[str, Any]]:
    """A dtype, a width, how to share, a variant of the family, and sizes that replace its own."""
    dtype, tp = rng.choice(DTYPES), rng.choice((2, 2, 3, 4, 4, 5, 6, 8))
    how: dict[str, Any] = rng.choice(({}, {"uneven": True}, {"shares": [rng.randint(1, 4) for _ in range(tp)]}))
    return dtype, tp, how, *config(rng, family, 1 if how else tp)


def with_outliers(model: Path, factor: int, seed: int) -> None:
    """Multiply 3 rows and 3 columns of every matrix of a checkpoint, whatever its dtype."""
    generator = torch.Generator().manual_seed(seed)
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        for tensor in tensors.values():
            if tensor.dim() > 1:
                chosen = torch.zeros(tensor.shape, dtype=torch.bool)
                rows, columns = (torch.randperm(size, generator=generator)[:3] for size in tensor.shape[-2:])
                chosen[..., rows, :] = True
                chosen[..., columns] = True
                tensor[chosen] *= factor
        save_file(tensors, file, {"format": "pt"})


@contextmanager
def split_model(
    folder: Path, seed: int, dtype: str, tp: int, how: dict[str, Any], name: str, sizes: dict[str, Any], outliers: int
) -> Iterator[tuple[Path, Path] | None]:
    """A random model and its shards, removed afterwards; None when those sizes cannot be split so."""
    model, out = folder / "model", folder / "shards"
    try:
        make(name, model, seed, dtype=dtype, **sizes)
        with_outliers(model, outliers, seed)
        try:
            tpshard.split(model, tp, out, settings=Settings(workers=1, fsync=False), **how)
        except UnsupportedError:
            yield None
        else:
            yield model, out
    finally:
        shutil.rmtree(model, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)


def draw(seed: int, folder: Path) -> Drawn | None:
    """One random model, split and judged; None when those sizes cannot be split so, which is no matter of verify's."""
    rng = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    dtype, tp, how, name, sizes = chosen(rng, family)
    options = {"sequence_parallel": rng.random() < 0.3, "stream": rng.random() < 0.3, "float32": rng.random() < 0.2}
    outliers = rng.choice(OUTLIERS) if seed % EVERY == EVERY - 1 else 1
    with split_model(folder, seed, dtype, tp, how, name, sizes, outliers) as made, ExitStack() as small:
        if made is None:
            return None
        for module in (elements, memory, prepare):
            small.enter_context(patch.object(module, "BLOCK_BYTES", BLOCK_BYTES))
        model, out = made
        verdict = verify(VerifyOptions(out, device="cpu", tokens=4, seed=seed, **options), model)
    return Drawn(
        seed=seed,
        family=family,
        dtype=dtype,
        tp=tp,
        shares="even" if not how else ", ".join(map(str, how.get("shares", ["equal, remainder dealt"]))),
        outliers=outliers,
        options=sizes | {"variant": name} | options,
        verdict=verdict.verdict,
        reason=verdict.reason or "",
        missed=[canary.name for canary in verdict.canaries if canary.status == "missed"],
    )


def measure(folder: Path, count: int, say: Callable[[str], None] = lambda line: None) -> list[Drawn]:
    """The first `count` seeds, from 0 on, whose model can be split as drawn."""
    found: list[Drawn] = []
    seed = 0
    while len(found) < count:
        drawn = draw(seed, folder)
        if drawn is not None:
            found.append(drawn)
            if not drawn.right:
                say(f"seed {seed}: {drawn.verdict}: {drawn.reason}")
            if len(found) % 20 == 0:
                say(f"{len(found)} splits, {sum(each.verdict == 'pass' for each in found)} passed")
        seed += 1
    return found
