"""The built-in decoder's own partition: which elements of the source a rank must hold, by the family's mathematics."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tpshard.errors import CorruptError
from tpshard.verifier.builtin.decoder import HeadShare, share_of
from tpshard.verifier.builtin.store import Store
from tpshard.verifier.elements import Held, Parameter, idle
from tpshard.verifier.families.family import Family
from tpshard.verifier.ranks.weights import Weights


def parameters(family: Family, source: Weights, ranks: Sequence[Weights], layers: Sequence[int]) -> Iterator[Parameter]:
    """Every tensor of the source, and what the ranks hold beside, in the order of computation; last what is not run.

    DifferentError where a rank lacks a tensor, or does not hold whole heads.
    """
    cpu = torch.device("cpu")
    whole = Store(source, family, torch.float64, cpu)
    stores = [Store(weights, family, torch.float64, cpu, rank) for rank, weights in enumerate(ranks)]
    seen = set()
    for module, layer in _modules(family, layers):
        for suffix in ("weight", "bias"):
            if not any(store.has(module, suffix) for store in (whole, *stores)):
                continue
            sides = [_held(store, module, suffix) for store in (whole, *stores)]
            projects = layer is not None and module.removeprefix(family.layer.format(layer)) in family.qkv
            orders = starts = None
            if projects and any(side.shape != sides[0].shape for side in sides):
                counts = [store.held(layer or 0) for store in stores]
                shares = [share_of(family, layer or 0, counts, rank) for rank in range(len(ranks))]
                if family.fused is not None:
                    orders = [fused_order(family, share) for share in shares]
                elif not module.endswith(family.qkv[0]):
                    starts = [each.first_kv * family.head_dim for each in shares]
            padded = module in (family.embed, *family.heads_names)
            seen.add(f"{whole.full(module)}.{suffix}")
            yield Parameter(f"{whole.full(module)}.{suffix}", sides[0], sides[1:], orders, padded, starts=starts)
    yield from idle(source, ranks, seen, layers, family.layers, {})


def require_described(family: Family, config: Mapping[str, Any], source: Weights) -> None:
    """CorruptError unless the source has just the weights and biases that its config says it has.

    A class that computes no logits needs no head: `architectures` of the config names it.
    """
    store = Store(source, family, torch.float64, torch.device("cpu"))
    for module, layer in _modules(family, range(family.layers)):
        name = module if layer is None else module.removeprefix(family.layer.format(layer))
        if module not in family.heads_names:
            _require(store, module, "weight", not (family.bare_norms and name in family.norms))
            _require(store, module, "bias", name in family.biases)
    classes = config.get("architectures")
    named = list(map(str, classes)) if isinstance(classes, list) else []
    if not named or any(kind in name for name in named for kind in ("CausalLM", "LMHead", "ConditionalGeneration")):
        head = next((name for name in family.heads_names if store.has(name)), family.heads_names[0])
        if not family.tied:
            _require(store, head, "weight", True)
        _require(store, head, "bias", head in family.biases)


def _require(store: Store, module: str, suffix: str, wanted: bool) -> None:
    if store.has(module, suffix) != wanted:
        name = f"{store.full(module)}.{suffix}"
        what = f"config.json contradicts the weights: {name} {'is not there' if wanted else 'is there'}"
        expected, found = ("the tensor", "none") if wanted else ("no such tensor", "one")
        hint = "config.json and the weights are of different models, or one of them was changed"
        raise CorruptError(what, tensor=name, expected=expected, found=found, hint=hint)


def _modules(family: Family, layers: Sequence[int]) -> Iterator[tuple[str, int | None]]:
    """Modules with their layer, in the order of computation."""
    for before in (family.embed, family.positions, family.embed_norm, family.project_in):
        if before is not None:
            yield before, None
    for layer in layers:
        for name in (
            *(family.attn_norm, *family.qkv, family.q_norm, family.k_norm, family.out, family.attn_out_norm),
            *(family.mlp_norm, family.gate, family.up, family.down, family.mlp_out_norm),
        ):
            if name is not None:
                yield family.layer.format(layer) + name, layer
    for after in (family.final_norm, family.project_out, *family.heads_names):
        if after is not None:
            yield after, None


def _held(store: Store, module: str, suffix: str) -> Held:
    """A parameter; the embedding in place of a tied head that is not stored. DifferentError where there is neither."""
    if store.has(module, suffix):
        return Held(store.weights, f"{store.full(module)}.{suffix}")
    if module in store.family.heads_names and suffix == "weight" and store.head() == store.family.embed:
        return Held(store.weights, f"{store.full(store.family.embed)}.weight")
    raise store.missing(f"{store.full(module)}.{suffix}")


def fused_order(family: Family, share: HeadShare) -> Tensor:
    """The rows of a fused q, k and v that a rank holds, of all its rows; `Family.fused` says how they lie."""
    heads, kv, d = family.heads, family.kv_heads, family.head_dim
    rows = torch.arange((heads + 2 * kv) * d)
    if family.fused == "segments":
        q, k, v = torch.split(rows.view(-1, d), [heads, kv, kv])
    else:
        stored = rows.view(kv, heads // kv + 2, d)
        q, k, v = stored[:, :-2].reshape(heads, d), stored[:, -2], stored[:, -1]
    q = q[share.first_q : share.first_q + share.q]
    k, v = (each[share.first_kv : share.first_kv + share.kv] for each in (k, v))
    if family.fused == "segments":
        return torch.cat([q, k, v]).flatten()
    groups = zip(torch.split(q, share.q_of_kv(heads // kv)), torch.split(k, 1), torch.split(v, 1), strict=True)
    return torch.cat([torch.cat(each) for each in groups]).flatten()
