"""Module by module: what the unsharded model takes and gives, put before a rank's modules one at a time."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tpshard.verifier.criteria import relative
from tpshard.verifier.elements import RankShares
from tpshard.verifier.hf.heads import FUSED
from tpshard.verifier.hf.parallel import (
    in_dim,
    is_column,
    is_experts,
    is_linear,
    is_row,
    own_rows,
    own_weights,
    product,
)
from tpshard.verifier.hf.sides import Side
from tpshard.verifier.hf.skeleton import layers_of
from tpshard.verifier.hf.streamed import changed
from tpshard.verifier.report.verdict import Finding

# Their rows are several blocks, so that a rank's are no stretch of the whole's.
BLOCKS = (*FUSED, "gate_up_proj", "input_linear", "in_proj", "in_proj_qkv")
STREAM = ("hidden_states", "residual")
"""Named arguments that carry the stream; what else a module takes is the same on both sides, or a rank's own."""


@dataclass
class ModuleRecord:
    """What a module of the unsharded model took, and its first output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def input(self) -> Tensor:
        """The stream that it took."""
        named = (x for key, x in self.kwargs.items() if key in STREAM)
        stream: Tensor = next(x for x in (*self.args, *named) if _carries(x))
        return stream


def _carries(x: Any) -> bool:
    """Whether an argument may be the stream [B, S, hidden], or its tokens [B * S, hidden]."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() in (2, 3)


def _first(output: Any) -> Tensor:
    first = output if isinstance(output, Tensor) else output[0]
    assert isinstance(first, Tensor)
    return first


def blocks(side: Side, layers: Sequence[int]) -> list[str]:
    """The modules that are compared: the parts of each layer, routers, and what has parameters outside of layers.

    Of an indexer, whose choice is pinned, it is the modules that it chooses by.
    """
    every = layers_of(side.model)
    parts = [
        f"{name}.{part}"
        for name, layer in (every[i] for i in layers)
        for part, module in layer.named_children()
        if next(module.parameters(), None) is not None
    ]
    inside = tuple(f"{name}." for name, _ in every)
    outside = [name for name, module in side.modules.items() if module._parameters and not name.startswith(inside)]
    choosing = [f"{name}.{part}" for name, module in side.indexers.items() for part, _ in module.named_children()]
    deeper = tuple(f"{part}." for part in parts)
    return parts + outside + [name for name in (*side.routers, *choosing) if name.startswith(deeper)]


@dataclass
class ModuleRecorder:
    """Keeps a ModuleRecord of every module with parameters, and of every module that is compared."""

    side: Side
    names: Sequence[str]
    records: dict[str, ModuleRecord] = field(default_factory=dict)

    def looking(self) -> ExitStack:
        """What keeps records for the time of a `with`."""
        hooks = ExitStack()
        for name, module in self.side.modules.items():
            if name and (module._parameters or name in self.names):
                hooks.enter_context(module.register_forward_hook(functools.partial(self._keep, name), with_kwargs=True))
        return hooks

    def _keep(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.records[name] = ModuleRecord(args, kwargs, _first(output))


@dataclass
class Feeder:
    """Feeds a rank's modules what the unsharded ones took, and compares what they give; and inside, whose fault it is.

    Inside a module the rank's own features, heads and summand are compared with the same part of the whole.
    """

    whole: Side
    record: Callable[[str], ModuleRecord | None]
    side: Side
    names: Sequence[str]
    limit: float
    findings: list[Finding] = field(default_factory=list)
    inside: list[tuple[str, Callable[[], float]]] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return self.side.rank or 0

    def looking(self) -> ExitStack:
        """What feeds and compares for the time of a `with`."""
        hooks, cuts = ExitStack(), self.side.cuts
        for name in self.names:
            hook = functools.partial(self._feed, name)
            hooks.enter_context(self.side.modules[name].register_forward_pre_hook(hook, with_kwargs=True))
        for name, module in self.side.modules.items():
            if name and module._parameters and name not in self.names:
                if is_row(name, module, cuts):
                    hooks.enter_context(module.register_forward_pre_hook(functools.partial(self._share, name)))
                elif is_linear(module):
                    hooks.enter_context(module.register_forward_hook(functools.partial(self._part, name), prepend=True))
        for name in self.names:
            module = self.side.modules[name]  # before what repeats its keys and values
            hooks.enter_context(module.register_forward_hook(functools.partial(self._judge, name), prepend=True))
        hooks.callback(setattr, self.side.link, "show", self.side.link.show)
        self.side.link.show = self._summand
        return hooks

    def _mine(self, name: str, x: Tensor) -> Tensor:
        """The rank's features (last dim) of what goes through a cut linear module; padding is nobody's."""
        cut = self.side.cuts[f"{name}.weight"]
        first = min(cut.first(self.rank), x.shape[-1])
        return x.narrow(-1, first, min(cut.sizes[self.rank], x.shape[-1] - first))

    def _feed(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        record, row = self.record(name), is_row(name, module, self.side.cuts)
        self.inside = []
        if record is None:  # which the unsharded model does without
            return args, kwargs

        def instead(given: Any, recorded: Any) -> Any:
            if not _carries(recorded):
                return given
            return (self._mine(name, recorded) if row else recorded).to(given.dtype)

        positional = tuple(instead(x, was) for x, was in zip(args, record.args, strict=True))
        return positional, {k: instead(x, record.kwargs.get(k)) if k in STREAM else x for k, x in kwargs.items()}

    def _judge(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        if (record := self.record(name)) is None:
            return
        wanted = record.output
        if is_column(name, module, self.side.cuts) and not self.side.is_head(name):
            wanted = self._mine(name, wanted)
        error, culprit = relative(_first(output), wanted), None
        if error > self.limit:
            culprit = next((what for what, error_of in self.inside if error_of() > self.limit), None)
        self.findings.append(Finding(name, self.rank, error, culprit))

    def _part(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        """What a linear module inside of a compared one gives: the rank's features, or, of one not cut, all."""
        if (record := self.record(name)) is None:
            return
        column, whole = is_column(name, module, self.side.cuts), record.output
        if not column or not name.endswith(BLOCKS):
            wanted = self._mine(name, whole) if column else whole
            self.inside.append((name, lambda: relative(_first(output), wanted)))

    def _share(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        if (record := self.record(name)) is None:
            return
        wanted = self._mine(name, record.input)
        self.inside.append((f"input of {name}", lambda: relative(args[0], wanted)))

    def _summand(self, name: str, partial: Tensor) -> None:
        """A rank's summand of a sum over ranks, which is what the rank's part of the weights makes of the input."""
        module, whole = self.side.modules[name], self.whole.modules[name]
        if (record := self.record(name)) is None:
            return
        if is_row(name, module, self.side.cuts):
            cut, x = self.side.cuts[f"{name}.weight"], record.input
            size = cut.sizes[self.rank]
            x = x if name in self.names and x.shape[-1] == size else self._mine(name, x)

            def own() -> Tensor:
                weight = whole._parameters["weight"]
                assert weight is not None
                return product(module, x, weight.narrow(in_dim(module), cut.first(self.rank), size))

            self.inside.append((name, lambda: relative(partial, own())))
        elif is_experts(module):
            self.inside.append((name, lambda: relative(partial, self._experts(name, whole, record))))

    def _experts(self, name: str, whole: nn.Module, record: ModuleRecord) -> Tensor:
        """The unsharded experts' output with the rank's features, or experts, alone."""
        cut = self.side.cuts[f"{name}.down_proj"]
        args, experts = record.args, cut if cut.dim == 0 else cut.experts
        if experts is not None and len(args) > 1:
            x, chosen, weights = args
            args = x, chosen, own_weights(experts, self.rank, chosen, weights)
        part = {} if cut is experts else _part_of_experts(whole, cut, self.rank)
        found = _first(functional_call(whole, part, args, record.kwargs))
        if experts is not None and len(args) == 1:
            rows, every = own_rows(experts, self.rank, args[0]), found
            found = torch.zeros_like(every)
            found[rows] = every[rows]
        return found


def _part_of_experts(whole: nn.Module, down: RankShares, rank: int) -> dict[str, Tensor]:
    """A rank's features of the unsharded experts' parameters, and its summand of their last bias."""
    first, size = down.first(rank), down.sizes[rank]
    sharing = len(down.sizes) if down.experts is None else down.experts.firsts.count(down.experts.first(rank))

    def part(leaf: str, weight: Tensor) -> Tensor:
        if leaf == "down_proj_bias":
            return weight / sharing
        dim = down.dim if leaf == "down_proj" else 1 if leaf.endswith("bias") else 3 - down.dim
        if leaf in ("down_proj", "up_proj"):
            return weight.narrow(dim, first, size)
        if not getattr(whole, "is_concatenated", True):
            return weight.narrow(dim, 2 * first, 2 * size)
        return torch.cat([weight.narrow(dim, first, size), weight.narrow(dim, down.total + first, size)], dim)

    held = {leaf: weight for leaf, weight in whole._parameters.items() if weight is not None}
    return {leaf: changed(weight, functools.partial(part, leaf)) for leaf, weight in held.items()}


def every_expert(module: nn.Module, record: ModuleRecord) -> tuple[tuple[Any, ...], Tensor]:
    """Arguments that send one token to each expert, and what the unsharded experts give: a prompt alone reaches few.

    Experts that are not told whom a token is for (Llama 4) get as many for each, one behind the other.
    """
    down = module._parameters["down_proj"]
    assert down is not None
    count = len(down)
    tokens = record.input.flatten(0, -2)
    tokens = tokens[tokens.any(-1)]
    x = tokens[torch.arange(count, device=tokens.device) % len(tokens)]
    if len(record.args) + len(record.kwargs) == 1:
        return (x,), _first(module.forward(x))
    chosen = torch.arange(count, device=tokens.device).unsqueeze(1)
    args = (x, chosen, x.new_ones(count, 1))
    return args, _first(module.forward(*args))
