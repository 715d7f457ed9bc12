"""Which heads a rank has, from the shapes of its attention's parameters, and the module told so."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tpshard.errors import DifferentError, UnsupportedError
from tpshard.verifier.elements import RankShares, needed_kv

COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KV_COUNTS = ("num_key_value_heads", "num_kv_heads")
WIDTHS = ("split_size", "embed_dim")
"""What holds the width of all heads."""
FUSED = ("qkv_proj", "c_attn", "Wqkv")
"""Projections that make q, k and v, one behind the other."""
LINEAR_NUMBERS = ("A_log", "dt_bias")
MIXER_NUMBERS = (*LINEAR_NUMBERS, "D")
"""What linear attention has of each value head beside its features, and a Mamba 2 mixer of each head."""
STATES = ("A_log", "D")
FEATURES = ("conv1d", "x_proj", "dt_proj", "out_proj")
"""What a Mamba 1 mixer has of each feature: parameters of its own, and modules."""
OUT = ("o_proj", "out_proj", "c_proj", "dense")
_KEYS_AND_VALUES = re.compile(r"\.(k_proj|v_proj|k_norm|k_layernorm)\.(weight|bias)$")
BIASES = ("position_bias", "alibi")
"""Arguments that hold a value for each head of the whole model."""


@dataclass(frozen=True)
class Heads:
    """A rank's q heads and KV heads in an attention module, and the first of each among all.

    of_q: of each q head its KV head among the rank's, where these have not as many q heads each.
    """

    q: int
    kv: int
    first_q: int
    first_kv: int
    of_q: tuple[int, ...] = ()


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that attend, by name."""
    return {name: module for name, module in model.named_modules() if type(module).__name__.endswith("Attention")}


def output_of(module: nn.Module) -> str:
    """The projection behind the heads."""
    return next(leaf for leaf in OUT if hasattr(module, leaf))


def total_heads(config: Any) -> tuple[int, int]:
    """Q heads and KV heads of the unsharded model."""
    heads = int(getattr(config, "num_attention_heads", 0) or config.num_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def heads_in(module: nn.Module, config: Any) -> int:
    """Q heads of an attention module of the unsharded model: layers may have their own number."""
    own = getattr(module, "num_heads", None)
    return own if isinstance(own, int) and own > 0 else total_heads(config)[0]


def heads_of(name: str, module: nn.Module, config: Any, cuts: Mapping[str, RankShares], rank: int) -> Heads:
    """A rank's heads. DifferentError where a rank does not hold whole heads, or q heads without their k and v."""
    heads = heads_in(module, config)
    row = f"{name}.{output_of(module)}.weight"
    out = cuts[row]
    if sum(out.sizes) != out.total or any(size * heads % out.total for size in out.sizes):
        wanted, sizes = f"heads of {out.total // heads}", ", ".join(map(str, out.sizes))
        raise DifferentError(f"the ranks' {row} are not {heads} whole heads", tensor=row, expected=wanted, found=sizes)
    counts = [size * heads // out.total for size in out.sizes]
    q, first_q = counts[rank], sum(counts[:rank])
    kv = sharing(_kv(name, module, config, cuts, counts, out.total // heads), counts)
    held, first, group = kv.sizes[rank], kv.first(rank), heads // kv.total
    # Global q head h attends to KV head h // group; the model's own code deals a rank's KV heads to its q heads evenly.
    of_q = tuple((first_q + i) // group - first for i in range(q))
    even = held > 0 and q % held == 0 and of_q == tuple(i // (q // held) for i in range(q))
    if not even and kv.starts is None:
        wanted, kept = f"KV heads of q heads {first_q} to {first_q + q - 1}", f"{held} KV heads from {first} on"
        what = f"rank {rank}: {name} has q heads without their k and v"
        raise DifferentError(what, tensor=row, expected=wanted, found=kept)
    return Heads(q, held, first_q, first, () if even else of_q)


def sharing(cut: RankShares, q: Sequence[int]) -> RankShares:
    """Where the ranks' KV heads begin, if these are just what their q heads need and some are on several ranks.

    q: the ranks' q heads. What is cut is any of the features of KV heads: layers and values may have their own widths.
    """
    if cut.alike or sum(cut.sizes) == cut.total:
        return cut
    heads = sum(q)
    for kv in (count for count in range(1, len(q)) if heads % count == 0 and cut.total % count == 0):
        needed, width = needed_kv(q, heads // kv), cut.total // kv
        if cut.sizes == tuple(count * width for _, count in needed):
            return replace(cut, starts=tuple(first * width for first, _ in needed))
    return cut


def with_shared_heads(cuts: Mapping[str, RankShares], config: Any) -> dict[str, RankShares]:
    """The cuts, with the starts of what makes keys and values by the q heads of the same module."""
    found = dict(cuts)
    for key, cut in cuts.items():
        if match := _KEYS_AND_VALUES.search(key):
            parent = key[: match.start()]
            outs = (cuts.get(f"{parent}.{leaf}.weight") for leaf in OUT)
            out = next((out for out in outs if out is not None), None)
            heads = total_heads(config)[0]
            if out is not None and not any(size * heads % out.total for size in out.sizes):
                found[key] = sharing(cut, [size * heads // out.total for size in out.sizes])
    return found


def _kv(
    name: str, module: nn.Module, config: Any, cuts: Mapping[str, RankShares], q: list[int], head: int
) -> RankShares:
    """The ranks' KV heads: by k_proj, by what a fused projection has beside q, or as many as q heads (MLA)."""
    heads, kv_heads = heads_in(module, config), total_heads(config)[1]
    key, width = getattr(module, "k_proj", None), getattr(module, "head_dim", None)
    if isinstance(key, nn.Linear) and isinstance(width, int) and key.out_features % width == 0:
        kv_heads = key.out_features // width  # layers may differ
    if getattr(module, "is_kv_shared_layer", False):  # has the keys of a layer before
        group = int(module.num_key_value_groups)  # type: ignore[arg-type]
        return RankShares(0, tuple(count for _, count in needed_kv(q, group)), heads // group)
    if hasattr(module, "k_proj"):
        k = cuts.get(f"{name}.k_proj.weight")
        if k is None:
            return RankShares(0, (kv_heads,) * len(q), kv_heads, alike=True)
        size = k.total // kv_heads
        return RankShares(0, tuple(rows // size if rows % size == 0 else 0 for rows in k.sizes), kv_heads)
    fused = next((leaf for leaf in FUSED if hasattr(module, leaf)), None)
    if fused is None:
        return RankShares(0, tuple(q), heads)
    all_of_it = cuts[f"{name}.{fused}.weight"]
    rows = [size - n * head for size, n in zip(all_of_it.sizes, q, strict=True)]
    kv_heads = (all_of_it.total - heads * head) // (2 * head)  # layers may differ
    return RankShares(0, tuple(n // (2 * head) if n % (2 * head) == 0 else 0 for n in rows), kv_heads)


def tell_mixers(model: nn.Module, cuts: Mapping[str, RankShares], rank: int) -> None:
    """Set the numbers that linear attention by a gated delta rule reads, and those that a Mamba 2 mixer reads.

    Mixers are told by these numbers: every family names its class anew. DifferentError where a rank holds no whole
    heads, or heads without what they read.
    """
    for name, module in model.named_modules():
        if not {f"{name}.out_proj.weight", f"{name}.o_proj.weight"} & cuts.keys():
            continue
        if type(module).__name__.endswith("GatedDeltaNet"):
            _tell_linear(name, module, cuts, rank)
        elif all(hasattr(module, leaf) for leaf in ("num_heads", "n_groups", "ssm_state_size", "conv_dim")):
            _tell_mixer(name, module, cuts, rank)
        elif all(hasattr(module, leaf) for leaf in ("x_proj", "time_step_rank")):
            _tell_features(name, module, cuts, rank)


def _held(name: str, leaves: Sequence[str], cuts: Mapping[str, RankShares], rank: int) -> list[int | None]:
    """How much a rank has of a module's parameters; None of those that are not cut."""
    found = (cuts.get(f"{name}.{leaf}") for leaf in leaves)
    return [None if cut is None else cut.sizes[rank] for cut in found]


def _tell_linear(name: str, module: Any, cuts: Mapping[str, RankShares], rank: int) -> None:
    conv, *numbers = _held(name, ("conv1d.weight", *LINEAR_NUMBERS), cuts, rank)
    each, v = module.num_v_heads // module.num_k_heads, numbers[0] or 0
    k = v // each
    wide = 2 * k * module.head_k_dim + v * module.head_v_dim
    if not v or v % each or conv != wide or set(numbers) != {v}:
        what = f"rank {rank}: {name} does not hold whole key heads with their value heads"
        wanted = f"heads of {module.head_k_dim}, {each} of {module.head_v_dim} for each"
        held = f"{conv} features, and numbers of {numbers} heads"
        raise DifferentError(what, tensor=f"{name}.conv1d.weight", expected=wanted, found=held)
    module.num_k_heads, module.num_v_heads, module.conv_dim = k, v, wide
    module.key_dim, module.value_dim = k * module.head_k_dim, v * module.head_v_dim


def _tell_features(name: str, module: Any, cuts: Mapping[str, RankShares], rank: int) -> None:
    """A Mamba 1 mixer, whose features have a state each: as many everywhere, or a rank's are not the same ones."""
    gates, *features = _held(name, ("in_proj.weight", *(f"{leaf}.weight" for leaf in FEATURES), *STATES), cuts, rank)
    if not gates or set(features) != {gates // 2} or gates % 2:
        what, held = f"rank {rank}: {name} does not hold whole features", f"{features} beside {gates} rows"
        raise DifferentError(what, tensor=f"{name}.in_proj.weight", expected="as many of each", found=held)
    module.intermediate_size = gates // 2


def _tell_mixer(name: str, module: Any, cuts: Mapping[str, RankShares], rank: int) -> None:
    conv, rows, *numbers = _held(name, ("conv1d.weight", "in_proj.weight", *MIXER_NUMBERS), cuts, rank)
    each, h = module.num_heads // module.n_groups, numbers[0] or 0
    first = sum(cuts[f"{name}.A_log"].sizes[:rank]) if h else 0
    g = (first + h - 1) // each - first // each + 1 if h else 0
    wide = h * module.head_dim
    features = wide + 2 * g * module.ssm_state_size
    # The module's own code deals a rank's groups to its heads evenly.
    even = h > 0 and h % g == 0 and all((first + i) // each - first // each == i // (h // g) for i in range(h))
    if h and not even and conv == features and rows == wide + features + h and set(numbers) == {h}:
        what = f"{name}: transformers' mixer cannot run groups that have unlike numbers of a rank's heads"
        raise UnsupportedError(what, expected=f"{each} heads for each group, or a share of one group")
    if not even or conv != features or rows != wide + features + h or set(numbers) != {h}:
        what = f"rank {rank}: {name} does not hold whole heads with their groups"
        wanted = f"heads of {module.head_dim}, {each} to a group of {module.ssm_state_size}"
        held = f"{rows} rows, {conv} features, and numbers of {numbers} heads"
        raise DifferentError(what, tensor=f"{name}.in_proj.weight", expected=wanted, found=held)
    _cut_buffers(module, first, h, first // each, g)
    module.num_heads, module.n_groups, module.intermediate_size, module.conv_dim = h, g, wide, features


def _cut_buffers(module: Any, first: int, heads: int, first_group: int, groups: int) -> None:
    """A rank's part of what a mixer computes from the config for each row of its first projection (Falcon-H1)."""
    head, state = module.head_dim, module.ssm_state_size
    of_heads, of_groups = (module.num_heads, head, first, heads), (module.n_groups, state, first_group, groups)
    blocks = (of_heads, of_heads, of_groups, of_groups, (module.num_heads, 1, first, heads))
    sizes = [count * unit for count, unit, _, _ in blocks]
    for leaf, buffer in module._buffers.items():
        if buffer is not None and buffer.shape[-1] == sum(sizes):
            parts = zip(buffer.split(sizes, -1), blocks, strict=True)
            module._buffers[leaf] = torch.cat(
                [part.narrow(-1, at * unit, n * unit) for part, (_, unit, at, n) in parts], -1
            )
    if hasattr(module, "groups_time_state_size"):
        module.groups_time_state_size = groups * state


def _cut_decays(module: nn.Module, heads: Heads, total: int) -> None:
    """A rank's part of what lightning attention keeps of each head's decay: the source's buffers have all heads."""
    for leaf, buffer in module._buffers.items():
        dims = [dim for dim in (0, 1) if buffer is not None and buffer.dim() > dim and buffer.shape[dim] == total]
        if buffer is not None and dims:
            module._buffers[leaf] = buffer.narrow(dims[0], heads.first_q, heads.q)


def _repeat_for_each_q(module: Any, heads: Heads, norms_all: bool) -> None:
    """Give the module keys and values once for each q head: the rank's KV heads have unlike numbers of them.

    norms_all: whether a norm of keys has a value for each feature of all heads, or a row for each head.
    """
    of_q = torch.tensor(heads.of_q)

    def repeated(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], heads.kv, -1)[..., of_q.to(x.device), :].flatten(-2)

    def fused(x: Tensor) -> Tensor:
        head = x.shape[-1] // (heads.q + 2 * heads.kv)
        q, k, v = torch.split(x, [heads.q * head, heads.kv * head, heads.kv * head], -1)
        return torch.cat([q, repeated(k), repeated(v)], -1)

    keys = "k_proj"
    if norms_all and module.k_norm.weight.dim() == 1:
        keys = "k_norm"
    elif norms_all:
        module.k_norm.weight = nn.Parameter(module.k_norm.weight[of_q.to(module.k_norm.weight.device)], False)
    for leaf, change in (*((leaf, fused) for leaf in FUSED), (keys, repeated), ("v_proj", repeated)):
        if isinstance(getattr(module, leaf, None), nn.Module):
            getattr(module, leaf).register_forward_hook(lambda _, __, out, change=change: change(out))


def tell(name: str, module: nn.Module, config: Any, cuts: Mapping[str, RankShares], rank: int) -> None:
    """Set the numbers that an attention module's own code reads, and cut what comes by head."""
    heads, total = heads_of(name, module, config, cuts, rank), heads_in(module, config)
    head = cuts[f"{name}.{output_of(module)}.weight"].total // total
    kv = heads.kv
    if heads.of_q:
        _repeat_for_each_q(module, heads, f"{name}.k_norm.weight" in cuts)
        kv = heads.q
    for names, value in ((COUNTS, heads.q), (KV_COUNTS, kv)):
        for attribute in names:
            if isinstance(getattr(module, attribute, None), int):
                setattr(module, attribute, value)
    if hasattr(module, "num_key_value_groups"):
        module.num_key_value_groups = heads.q // kv  # type: ignore[assignment]
    for attribute in (*WIDTHS, *(("hidden_size",) if hasattr(module, "Wqkv") else ())):
        if hasattr(module, attribute):
            setattr(module, attribute, heads.q * head)
    if hasattr(module, "slope_rate"):
        _cut_decays(module, heads, total)
    if hasattr(module, "config"):
        mine: Any = copy.copy(module.config)
        mine.num_attention_heads = heads.q
        if hasattr(mine, "num_key_value_heads"):
            mine.num_key_value_heads = kv
        module.config = mine
    # StableLM has a norm for each head; every rank stores them all.
    of_q = heads.of_q or range(heads.kv)
    for leaf, mine_of in (("q_layernorm", range(heads.q)), ("k_layernorm", of_q)):
        norms = getattr(getattr(module, leaf, None), "norms", None)
        if isinstance(norms, nn.ModuleList):
            first = heads.first_q if leaf == "q_layernorm" else heads.first_kv
            getattr(module, leaf).norms = nn.ModuleList(norms[first + each] for each in mine_of)

    def cut_biases(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        for key in BIASES:
            bias = kwargs.get(key)
            if isinstance(bias, Tensor) and bias.shape[0] == total:
                kwargs = kwargs | {key: bias.narrow(0, heads.first_q, heads.q)}
        return args, kwargs

    module.register_forward_pre_hook(cut_biases, with_kwargs=True)
