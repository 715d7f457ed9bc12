"""Collectives put into a model of transformers from outside, where the shapes of a rank's parameters ask for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpshard.errors import DifferentError
from tpshard.verifier.elements import RankShares
from tpshard.verifier.group import Group, Single
from tpshard.verifier.hf.heads import (
    LINEAR_NUMBERS,
    MIXER_NUMBERS,
    STATES,
    attentions,
    heads_of,
    output_of,
    tell,
    tell_mixers,
)
from tpshard.verifier.hf.streamed import as_parameter, changed

BY_CORE, CORES = "CodeGenAttention", 4
"""A class that reads q, v and k by core of the machine that trained CodeGen, and needs heads for each of them."""
QK_NORMS = ("q_norm", "k_norm")


@dataclass
class Link:
    """The group that the model's collectives go through, and who is shown a rank's summands, for the time of a run."""

    group: Group = field(default_factory=Single)
    show: Callable[[str, Tensor], None] = lambda name, partial: None

    def reduce(self, name: str, partial: Tensor) -> Tensor:
        self.show(name, partial)
        return self.group.all_reduce(partial)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def in_dim(module: nn.Module) -> int:
    """The dim of a linear module's weight that holds its input features."""
    return 1 if isinstance(module, nn.Linear) else 0


def is_row(name: str, module: nn.Module, cuts: Mapping[str, RankShares]) -> bool:
    """Whether a linear module holds some of its input features."""
    cut = cuts.get(f"{name}.weight")
    return cut is not None and is_linear(module) and cut.dim == in_dim(module)


def is_column(name: str, module: nn.Module, cuts: Mapping[str, RankShares]) -> bool:
    """Whether a linear module holds some of its output features."""
    cut = cuts.get(f"{name}.weight")
    return cut is not None and is_linear(module) and cut.dim != in_dim(module)


def is_experts(module: nn.Module) -> bool:
    """Whether a module stacks the matrices of all experts, which may have no gate."""
    return "down_proj" in module._parameters and not module._parameters.keys().isdisjoint(("gate_up_proj", "up_proj"))


def product(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """x times a weight in the place of a linear module's; no bias."""
    return F.linear(x, weight if isinstance(module, nn.Linear) else weight.T)


def connect(model: nn.Module, config: Any, cuts: Mapping[str, RankShares], rank: int) -> Link:
    """Make a model that holds a rank's parameters compute with other ranks; what its collectives go through.

    DifferentError where parameters are cut in a way that no tensor parallelism has.
    """
    link = Link()
    attending = attentions(model)
    for name, module in attending.items():
        row = cuts.get(f"{name}.{output_of(module)}.weight")
        if row is not None and type(module).__name__ == BY_CORE:
            heads_of(name, module, config, cuts, rank)
            _all_heads(module, row, rank, link)
        elif row is not None:
            tell(name, module, config, cuts, rank)
    tell_mixers(model, cuts, rank)
    for name, module in model.named_modules():
        mine = {leaf: cuts[f"{name}.{leaf}"] for leaf in module._parameters if f"{name}.{leaf}" in cuts}
        if mine and not _connect(name, module, mine, rank, link, model, name in attending):
            leaf, cut = next(iter(mine.items()))
            what, sizes = f"{name}.{leaf} is cut, which no tensor parallelism does", ", ".join(map(str, cut.sizes))
            raise DifferentError(what, tensor=f"{name}.{leaf}", expected=cut.total, found=sizes)
    return link


def _connect(
    name: str, module: nn.Module, cuts: Mapping[str, RankShares], rank: int, link: Link, model: Any, attends: bool
) -> bool:
    """Whether a module, some of whose parameters are cut, could be made to compute its share."""
    whole = {f"{name}.{leaf}": cut for leaf, cut in cuts.items()}
    vocab = model.config.vocab_size
    weight = cuts.get("weight")
    if module is model.get_input_embeddings() and weight is not None and weight.dim == 0:
        _adds_up(name, weight, vocab)
        module.forward = _vocab_parallel(name, module, weight, rank, link)
    elif module is model.get_output_embeddings() and all(cut.dim == 0 for cut in cuts.values()):
        _adds_up(name, cuts["weight"], vocab)
        module.forward = _gathered(module, vocab, link)
    elif is_row(name, module, whole) and cuts.keys() == {"weight"}:
        _adds_up(name, cuts["weight"], cuts["weight"].total, cuts["weight"].total)
        module.forward = _row_parallel(name, module, link)
    elif is_column(name, module, whole):
        # Its rows are the rank's own; a bias goes with them.
        if hasattr(module, "nf"):
            setattr(module, "nf", cuts["weight"].sizes[rank])  # noqa: B010
        return cuts.keys() == _leaves(module)
    elif is_experts(module) and any(cut.experts or cut.dim == 0 for cut in cuts.values()):
        module.forward = _some_experts(name, module, cuts["down_proj"], rank, link)
        return cuts.keys() == _leaves(module)
    elif is_experts(module) and "down_proj" in cuts:
        down = cuts["down_proj"]
        _adds_up(f"{name}.down_proj", down, down.total, down.total)
        module.forward = _experts(name, module, len(down.sizes), link)
    elif isinstance(module, nn.Conv1d) and module.groups == module.out_channels and weight is not None:
        # Every feature by itself.
        module.in_channels = module.out_channels = module.groups = weight.sizes[rank]
        return weight.dim == 0 and cuts.keys() == _leaves(module)
    elif weight is not None and _norms_all_heads(name, module):
        module.forward = _over_all_ranks(name, module, weight, rank, link)
    else:
        # A value for each head, or in a norm a row for each head.
        numbers: tuple[set[str], ...] = (
            ({"sinks"},) if attends else tuple(map(set, (LINEAR_NUMBERS, MIXER_NUMBERS, STATES)))
        )
        return cuts.keys() in numbers or (name.endswith(QK_NORMS) and len(_weight(module).shape) == 2)
    return True


def _leaves(module: nn.Module) -> set[str]:
    return {leaf for leaf, parameter in module._parameters.items() if parameter is not None}


def _norms_all_heads(name: str, module: nn.Module) -> bool:
    """Whether a norm that is cut is over the heads of all ranks: of q or k, or gated ones behind a mixer."""
    kind = type(module).__name__
    return kind.endswith("RMSNormGated") or (name.endswith(QK_NORMS) and kind.endswith("RMSNorm"))


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def _adds_up(name: str, cut: RankShares, least: int, most: int | None = None) -> None:
    """DifferentError unless the ranks' shares together are the whole; beyond a vocabulary there may be padding."""
    held = sum(cut.sizes)
    if held < least or (most is not None and held > most):
        raise DifferentError(f"the ranks' shares of {name} do not add up", expected=least, found=held)


def _vocab_parallel(name: str, module: nn.Module, cut: RankShares, rank: int, link: Link) -> Callable[[Tensor], Tensor]:
    first, size = cut.first(rank), cut.sizes[rank]
    forward = module.forward

    def look_up(ids: Tensor) -> Tensor:
        mine = (ids >= first) & (ids < first + size)
        rows: Tensor = forward((ids - first) * mine)
        return link.reduce(name, rows * mine.unsqueeze(-1))

    return look_up


def _gathered(module: nn.Module, vocab: int, link: Link) -> Callable[[Tensor], Tensor]:
    forward = module.forward
    return lambda x: link.group.all_gather(forward(x), -1)[..., :vocab]


def _row_parallel(name: str, module: nn.Module, link: Link) -> Callable[[Tensor], Tensor]:
    def sum_over_ranks(x: Tensor) -> Tensor:
        total = link.reduce(name, product(module, x, _weight(module)))
        bias = module._parameters.get("bias")
        return total if bias is None else total + bias

    return sum_over_ranks


def _experts(name: str, module: nn.Module, tp: int, link: Link) -> Callable[..., Tensor]:
    """A sum over ranks behind the experts. The last bias is inside, so that each rank adds its part of it."""
    forward = module.forward
    bias = module._parameters.get("down_proj_bias")
    if bias is not None:
        module._parameters["down_proj_bias"] = as_parameter(changed(bias, lambda part: part / tp))
    return lambda *args, **kwargs: link.reduce(name, forward(*args, **kwargs))


def own_weights(cut: RankShares, rank: int, chosen: Tensor, weights: Tensor) -> Tensor:
    """The weights of chosen experts, 0 for those that are not of the rank's range."""
    first = cut.first(rank)
    return weights * ((chosen >= first) & (chosen < first + cut.sizes[rank]))


def own_rows(cut: RankShares, rank: int, x: Tensor) -> slice:
    """The tokens for a rank's experts, where as many for each expert come one behind the other (Llama 4)."""
    each, first = len(x) // cut.total, cut.first(rank)
    return slice(first * each, (first + cut.sizes[rank]) * each)


def _some_experts(name: str, module: nn.Module, cut: RankShares, rank: int, link: Link) -> Callable[..., Tensor]:
    """Some experts on each rank, whole or a share of each: other experts add nothing here. Then a sum over ranks.

    The last bias is inside: each of the ranks that share experts adds its part of it.
    """
    experts = cut.experts or cut
    forward, first, size = module.forward, experts.first(rank), experts.sizes[rank]
    if (bias := module._parameters.get("down_proj_bias")) is not None:
        sharing = experts.firsts.count(first)
        module._parameters["down_proj_bias"] = as_parameter(changed(bias, lambda part: part / sharing))

    def work(x: Tensor, chosen: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if chosen is None or weights is None:
            rows, every = own_rows(experts, rank, x), torch.zeros_like(x)
            every[rows] = forward(x[rows])
            return link.reduce(name, every)
        weights = own_weights(experts, rank, chosen, weights)
        return link.reduce(name, forward(x, (chosen - first).clamp(0, size - 1), weights))

    return work


def _all_heads(module: nn.Module, row: RankShares, rank: int, link: Link) -> None:
    """Attention over the heads of all ranks, made of their rows, of which a rank multiplies its own.

    Where a core's heads are several ranks', each of those has its share of the core's q, v and k.
    """
    qkv, out = module.get_submodule("qkv_proj"), module.get_submodule("out_proj")
    project, several = qkv.forward, max(1, len(row.sizes) // CORES)

    def gathered(x: Tensor) -> Tensor:
        whole = link.group.all_gather(project(x), -1)
        return whole.view(*whole.shape[:-1], CORES, several, 3, -1).transpose(-3, -2).flatten(-4)

    qkv.forward = gathered
    out.register_forward_pre_hook(lambda _, args: (args[0].narrow(-1, row.first(rank), row.sizes[rank]),))


def _over_all_ranks(name: str, module: nn.Module, cut: RankShares, rank: int, link: Link) -> Callable[..., Tensor]:
    """A norm over all heads at once: the ranks' heads (and gates) are put together, and the module's own code norms.

    Each comes once, also of those that several ranks hold.
    """
    own, size, first = module.forward, cut.sizes[rank], cut.first(rank)
    mine = _weight(module)
    firsts = [cut.first(each) for each in range(len(cut.sizes))]
    held = torch.cat([torch.arange(start, start + count) for start, count in zip(firsts, cut.sizes, strict=True)])
    features, places = held.sort(stable=True)
    if set(features.tolist()) != set(range(cut.total)):
        what, sizes = f"{name} is not held by the ranks together", ", ".join(map(str, cut.sizes))
        raise DifferentError(what, tensor=f"{name}.weight", expected=cut.total, found=sizes)
    order = places[torch.searchsorted(features, torch.arange(cut.total))]

    def put_together(x: Tensor, dim: int) -> Tensor:
        return link.group.all_gather(x, dim).index_select(dim, order.to(x.device))

    def norm(*args: Tensor) -> Tensor:
        module._parameters["weight"] = nn.Parameter(put_together(mine, 0), requires_grad=False)
        whole: Tensor = own(*(put_together(x, -1) for x in args))
        module._parameters["weight"] = as_parameter(mine)
        return whole.narrow(-1, first, size)

    return norm
