"""Module by module: what the unsharded model takes and gives, put before a rank's modules one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tpshard.verifier.criteria import relative
from tpshard.verifier.hf.heads import FUSED
from tpshard.verifier.hf.parallel import in_dim, is_column, is_experts, is_linear, is_row, own_weights, product
from tpshard.verifier.hf.sides import Side
from tpshard.verifier.hf.skeleton import RankShares, layers_of
from tpshard.verifier.report.verdict import Finding

# Their rows are several blocks, so that a rank's are no stretch of the whole's.
BLOCKS = (*FUSED, "gate_up_proj", "input_linear", "in_proj", "in_proj_qkv")
STREAM = ("hidden_states", "residual")
"""Named arguments that carry the stream; what else a module takes is the same on both sides, or a rank's own."""


@dataclass
class ModuleRecord:
    """What a module of the unsharded model took and gave: all of it, the stream in it, and its first output."""

    args: tuple[Tensor | None, ...]
    kwargs: dict[str, Tensor]
    output: Tensor
    all_args: tuple[Any, ...]
    all_kwargs: dict[str, Any]

    @property
    def input(self) -> Tensor:
        return next(x for x in (*self.args, *self.kwargs.values()) if x is not None)


def _stream(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Tensor | None, ...], dict[str, Tensor]]:
    def carries(x: Any) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and x.dim() in (2, 3)

    named = {key: x for key, x in kwargs.items() if key in STREAM and carries(x)}
    return tuple(x if carries(x) else None for x in args), named


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

    @contextmanager
    def looking(self) -> Iterator[None]:
        watched = dict.fromkeys([*self.names, *(name for name, m in self.side.modules.items() if m._parameters)])
        hooks = [
            self.side.modules[name].register_forward_hook(self._keep(name), with_kwargs=True)
            for name in watched
            if name
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.records[name] = ModuleRecord(*_stream(args, kwargs), _first(output), args, kwargs)

        return keep


@dataclass
class Feeder:
    """Feeds a rank's modules what the unsharded ones took, and compares what they give; and inside, whose fault it is.

    Inside a module the rank's own features, heads and summand are compared with the same part of the whole; `always`
    does so in modules that agree, too.
    """

    whole: Side
    records: Mapping[str, ModuleRecord]
    side: Side
    names: Sequence[str]
    limit: float
    always: bool = False
    findings: list[Finding] = field(default_factory=list)
    inside: list[tuple[str, Callable[[], float]]] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return self.side.rank or 0

    @contextmanager
    def looking(self) -> Iterator[None]:
        hooks = []
        for name in self.names:
            hooks.append(self.side.modules[name].register_forward_pre_hook(self._feed(name), with_kwargs=True))
        for name, module in self.side.modules.items():
            if name in self.records and name not in self.names:
                if is_row(name, module, self.side.cuts):
                    hooks.append(module.register_forward_pre_hook(self._share(name)))
                elif is_linear(module):
                    hooks.append(module.register_forward_hook(self._part(name, module)))
        hooks += [self.side.modules[name].register_forward_hook(self._judge(name)) for name in self.names]
        self.side.link.show = self._summand
        try:
            yield
        finally:
            self.side.link.show = lambda name, partial: None
            for hook in hooks:
                hook.remove()

    def _mine(self, name: str, x: Tensor) -> Tensor:
        """The rank's features (last dim) of what goes through a cut linear module; padding is nobody's."""
        cut = self.side.cuts[f"{name}.weight"]
        first = min(cut.first(self.rank), x.shape[-1])
        return x.narrow(-1, first, min(cut.sizes[self.rank], x.shape[-1] - first))

    def _feed(self, name: str) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        record = self.records[name]
        row = is_row(name, self.side.modules[name], self.side.cuts)

        def instead(given: Any, recorded: Tensor | None) -> Any:
            if recorded is None:
                return given
            return (self._mine(name, recorded) if row else recorded).to(given.dtype)

        def feed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            self.inside = []
            positional = tuple(instead(x, was) for x, was in zip(args, record.args, strict=True))
            return positional, {key: instead(x, record.kwargs.get(key)) for key, x in kwargs.items()}

        return feed

    def _judge(self, name: str) -> Callable[..., None]:
        wanted = self.records[name].output
        if is_column(name, self.side.modules[name], self.side.cuts) and not self.side.is_head(name):
            wanted = self._mine(name, wanted)

        def judge(_: nn.Module, __: Any, output: Any) -> None:
            error = relative(_first(output), wanted)
            culprit = None
            if error > self.limit or self.always:
                culprit = next((what for what, error_of in self.inside if error_of() > self.limit), None)
            self.findings.append(Finding(name, self.rank, error, culprit))

        return judge

    def _part(self, name: str, module: nn.Module) -> Callable[..., None]:
        """What a linear module inside of a compared one gives: the rank's features, or, of one not cut, all."""
        column = is_column(name, module, self.side.cuts)
        wanted = self.records[name].output
        wanted = self._mine(name, wanted) if column else wanted

        def look(_: nn.Module, __: Any, output: Any) -> None:
            if not column or not name.endswith(BLOCKS):
                self.inside.append((name, lambda: relative(_first(output), wanted)))

        return look

    def _share(self, name: str) -> Callable[..., None]:
        wanted = self._mine(name, self.records[name].input)

        def look(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.inside.append((f"input of {name}", lambda: relative(args[0], wanted)))

        return look

    def _summand(self, name: str, partial: Tensor) -> None:
        """A rank's summand of a sum over ranks, which is what the rank's part of the weights makes of the input."""
        module, whole = self.side.modules[name], self.whole.modules[name]
        if is_row(name, module, self.side.cuts):
            cut, x = self.side.cuts[f"{name}.weight"], self.records[name].input
            weight = whole._parameters["weight"]
            assert weight is not None
            mine = weight.narrow(in_dim(module), cut.first(self.rank), cut.sizes[self.rank])
            x = x if name in self.names and x.shape[-1] == mine.shape[in_dim(module)] else self._mine(name, x)
            self.inside.append((name, lambda: relative(partial, product(module, x, mine))))
        elif is_experts(module):
            self.inside.append((name, lambda: relative(partial, self._experts(name, whole))))

    def _experts(self, name: str, whole: nn.Module) -> Tensor:
        """The unsharded experts' output with the rank's features, or experts, alone."""
        cut, record = self.side.cuts[f"{name}.down_proj"], self.records[name]
        if cut.dim == 0:
            x, chosen, weights = record.all_args
            return _first(whole(x, chosen, own_weights(cut, self.rank, chosen, weights)))
        with _part_of_experts(whole, cut, self.rank):
            return _first(whole(*record.all_args, **record.all_kwargs))


@contextmanager
def _part_of_experts(whole: nn.Module, down: RankShares, rank: int) -> Iterator[None]:
    """The unsharded experts reduced to a rank's features, for a time."""
    first, size, tp = down.first(rank), down.sizes[rank], len(down.sizes)
    kept = dict(whole._parameters)

    def both(weight: Tensor, dim: int) -> Tensor:
        if not getattr(whole, "is_concatenated", True):
            return weight.narrow(dim, 2 * first, 2 * size)
        return torch.cat([weight.narrow(dim, first, size), weight.narrow(dim, down.total + first, size)], dim)

    try:
        for leaf, weight in kept.items():
            assert weight is not None
            if leaf == "down_proj":
                part = weight.narrow(down.dim, first, size)
            elif leaf == "up_proj":
                part = weight.narrow(3 - down.dim, first, size)
            elif leaf == "down_proj_bias":
                part = weight / tp
            else:
                part = both(weight, 1 if leaf.endswith("bias") else 3 - down.dim)
            whole._parameters[leaf] = nn.Parameter(part, requires_grad=False)
        yield
    finally:
        whole._parameters.update(kept)


def every_expert(whole: Side, record: ModuleRecord, name: str) -> tuple[tuple[Any, ...], Tensor]:
    """Arguments that send one token to each expert, and what the unsharded experts give: a prompt alone reaches few.

    Experts that are not told whom a token is for (Llama 4) get as many for each, one behind the other.
    """
    module = whole.modules[name]
    down = module._parameters["down_proj"]
    assert down is not None
    count = len(down)
    tokens = record.input.flatten(0, -2)
    tokens = tokens[tokens.any(-1)]
    x = tokens[torch.arange(count, device=tokens.device) % len(tokens)]
    if len(record.all_args) + len(record.all_kwargs) == 1:
        return (x,), _first(module(x))
    chosen = torch.arange(count, device=tokens.device).unsqueeze(1)
    args = (x, chosen, x.new_ones(count, 1))
    return args, _first(module(*args))
