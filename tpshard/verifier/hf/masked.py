"""A class's own code, unchanged, on a rank's share of the parameters: in their places among zeros, and sums over ranks.

Nothing is told to the class: its heads, groups and widths are those of the unsharded model. What a rank does not hold
is zero, and gives nothing to a sum over ranks if, and only if, the rank holds all that its own features need.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tpshard.errors import DifferentError
from tpshard.verifier.hf.parallel import Link, in_dim, is_linear, product
from tpshard.verifier.hf.places_in_whole import PlacedShare, Shares
from tpshard.verifier.hf.streamed import Streamed, as_parameter, is_read_of, zeros_like


@dataclass
class MaskedLink(Link):
    """The same, which lets no gradient pass from a rank to the others."""

    def reduce(self, name: str, partial: Tensor) -> Tensor:
        self.show(name, partial)
        return self.group.all_reduce(partial.detach())


Leaves = Mapping[str, PlacedShare]
"""By leaf, a rank's share of a module's parameters."""


@dataclass
class Sums:
    """Which modules' outputs are summed over ranks, and which are taken of all ranks before they are used."""

    summed: set[str] = field(default_factory=set)
    gathered: set[str] = field(default_factory=set)


def is_row(module: nn.Module, leaves: Leaves) -> bool:
    """Whether a linear module has some of its input features."""
    weight = leaves.get("weight")
    return weight is not None and is_linear(module) and weight.dim == in_dim(module)


def row_leaf(module: nn.Module, leaves: Leaves) -> str | None:
    """The one parameter of a module that is cut along its inputs; None of those that have none, or others beside."""
    wide = [leaf for leaf in leaves if _dims(module, leaf) > 1]
    if len(wide) != 1:
        return None
    dim = in_dim(module) if is_linear(module) else _dims(module, wide[0]) - 1
    return wide[0] if leaves[wide[0]].dim == dim else None


def connect(model: Any, shares: Shares, rank: int, link: Link) -> None:
    """Put the sums over ranks into a model that `put_in_place` has changed.

    DifferentError where a module's weight and bias do not go together.
    """
    kinds = kinds_of(model, shares)
    for name, module in model.named_modules():
        leaves = {leaf: shares[f"{name}.{leaf}"][rank] for leaf in module._parameters if f"{name}.{leaf}" in shares}
        if not leaves:
            continue
        if is_linear(module) or _is_conv(module):
            _together(name, module, leaves)
        if name in kinds.summed:
            module.forward = _summed(name, module, leaves, len(next(iter(shares.values()))), link)
        elif name in kinds.gathered:
            module.forward = _gathered(module, leaves["weight"], link)


def kinds_of(model: Any, shares: Shares) -> Sums:
    """What each module of which ranks have parts needs, by how these lie in its parameters."""
    found, ends = Sums(), (model.get_input_embeddings(), model.get_output_embeddings())
    rows = [name for name, module in model.named_modules() if is_row(module, _leaves(name, module, shares))]
    for name, module in model.named_modules():
        leaves = _leaves(name, module, shares)
        wide = [share for leaf, share in leaves.items() if _dims(module, leaf) > 1]
        if not leaves or any(row != name and row.startswith(f"{name}.") for row in rows):
            continue
        if any(module is end for end in ends) or isinstance(module, nn.Embedding) or name in rows:
            found.summed.add(name)
        elif is_linear(module) or _is_conv(module):
            pass  # its features stay with the rank
        elif not wide and next(module.children(), None) is None and "weight" in leaves:
            found.gathered.add(name)
        elif len(wide) > 1 or any(_by_expert_or_input(module, leaves) for _ in wide):
            found.summed.add(name)
    return found


def _leaves(name: str, module: nn.Module, shares: Shares) -> dict[str, PlacedShare]:
    return {leaf: shares[f"{name}.{leaf}"][0] for leaf in module._parameters if f"{name}.{leaf}" in shares}


def _dims(module: nn.Module, leaf: str) -> int:
    parameter = module._parameters[leaf]
    return 0 if parameter is None else parameter.dim()


def _by_expert_or_input(module: nn.Module, leaves: Leaves) -> bool:
    """Whether a module's own product is a rank's summand: of some experts, or of some of the inputs."""
    for leaf, share in leaves.items():
        dims = _dims(module, leaf)
        if dims > 1 and (share.dim == dims - 1 or (dims == 3 and share.dim == 0)):
            return True
    return False


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _together(name: str, module: nn.Module, leaves: Leaves) -> None:
    """DifferentError unless a bias is cut as the outputs of its module are."""
    weight, bias = leaves.get("weight"), leaves.get("bias")
    if module._parameters.get("bias") is None:
        return
    outputs = None if weight is None or is_row(module, leaves) else weight
    if (outputs is None) != (bias is None) or (
        outputs is not None and bias is not None and outputs.sure and bias.sure and not outputs.at.equal(bias.at)
    ):
        raise DifferentError(f"{name}: its bias is not cut as its outputs are", tensor=f"{name}.bias")


@contextmanager
def _without(module: nn.Module, leaves: Leaves) -> Iterator[None]:
    """The module as it is of a rank that has nothing of what is cut."""
    kept = {leaf: module._parameters[leaf] for leaf in leaves}
    for leaf, parameter in kept.items():
        assert parameter is not None
        module._parameters[leaf] = as_parameter(zeros_like(parameter))
    try:
        yield
    finally:
        module._parameters.update(kept)


def _summed(name: str, module: nn.Module, leaves: Leaves, tp: int, link: Link) -> Callable[..., Any]:
    """The sum over ranks of what a module gives; what it gives without the cut parameters counts once."""
    forward = module.forward

    def row(x: Tensor) -> Tensor:
        weight = module._parameters["weight"]
        assert weight is not None
        total, bias = link.reduce(name, product(module, x, weight)), module._parameters.get("bias")
        return total if bias is None else total + bias

    def of_all(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        first = out if isinstance(out, Tensor) else out[0]
        total = link.reduce(name, first)
        if not _given(module, leaves, args):
            with _without(module, leaves):
                rest = forward(*args, **kwargs)
            rest = rest if isinstance(rest, Tensor) else rest[0]
            if bool(rest.any()):
                total = total - (tp - 1) * rest
        return total if isinstance(out, Tensor) else (total, *out[1:])

    if is_row(module, leaves):
        return row
    return (lambda *args: link.reduce(name, forward(*args))) if _only_cut(module, leaves) else of_all


def _given(module: nn.Module, leaves: Leaves, args: tuple[Any, ...]) -> bool:
    """Whether a module is called with what it holds: a block of it, say, for one expert."""
    own = [module._parameters[leaf] for leaf in leaves]
    held = {p.untyped_storage().data_ptr() for p in own if p is not None and not isinstance(p, Streamed)}
    tensors = [x for x in args if isinstance(x, Tensor)]
    return any(x.untyped_storage().data_ptr() in held or any(is_read_of(x, p) for p in own) for x in tensors)


def _only_cut(module: nn.Module, leaves: Leaves) -> bool:
    """Whether a module gives nothing but what its cut parameters make: a table, or a linear module."""
    return isinstance(module, nn.Embedding) or is_linear(module)


def _gathered(module: nn.Module, share: PlacedShare, link: Link) -> Callable[..., Tensor]:
    """A module with a number for each feature, on the features of all ranks: a norm over all heads, say."""
    forward = module.forward
    mine = {leaf: p for leaf, p in module._parameters.items() if p is not None and p.shape[-1:] == (share.total,)}

    def all_of(x: Tensor) -> Tensor:
        if x.shape[-1] != share.total:
            return x
        own = x * share.own.to(x.device)
        # Gradients are of the rank's own features.
        return link.group.all_reduce(own.detach()) + (own - own.detach())

    def on_all(*args: Any, **kwargs: Any) -> Tensor:
        whole = {leaf: all_of(parameter) for leaf, parameter in mine.items()}
        module._parameters.update({leaf: _parameter(value) for leaf, value in whole.items()})
        try:
            out = forward(
                *(all_of(x) if _is_stream(x) else x for x in args),
                **{key: all_of(x) if _is_stream(x) else x for key, x in kwargs.items()},
            )
        finally:
            module._parameters.update(mine)
        held: Tensor = out * share.held.to(out.device) if out.shape[-1] == share.total else out
        return held

    return on_all


def _parameter(value: Tensor) -> Any:
    return nn.Parameter(value.detach(), requires_grad=False)


def _is_stream(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
