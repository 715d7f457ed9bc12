"""Module by module, as in `probes`, for models whose parameters lie among zeros; and what each rank needs."""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tpshard.verifier.criteria import relative
from tpshard.verifier.hf.gradients import Gradients
from tpshard.verifier.hf.masked import Sums, is_row, row_leaf
from tpshard.verifier.hf.parallel import in_dim, is_linear, product
from tpshard.verifier.hf.places_in_whole import PlacedShare, Shares
from tpshard.verifier.hf.probes import STREAM, ModuleRecord
from tpshard.verifier.hf.sides import Side
from tpshard.verifier.hf.streamed import Streamed, as_parameter
from tpshard.verifier.report.verdict import Finding

Records = Mapping[str, Sequence[ModuleRecord]]
"""By module, its calls in order: a module that several layers share has several."""


def first_of(output: Any) -> Tensor | None:
    """The tensor that a module gives, or the first of several."""
    first = output if isinstance(output, Tensor) else next(iter(output), None) if output is not None else None
    return first if isinstance(first, Tensor) else None


@contextmanager
def recording(side: Side, names: Sequence[str]) -> Iterator[dict[str, list[ModuleRecord]]]:
    """Keeps every call of modules with parameters, and of those that are compared."""
    records: dict[str, list[ModuleRecord]] = defaultdict(list)

    def keep(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if (first := first_of(output)) is not None:
            records[name].append(ModuleRecord(args, kwargs, first))

    with ExitStack() as hooks:
        for name, module in side.modules.items():
            if name and (module._parameters or name in names):
                hooks.enter_context(module.register_forward_hook(partial(keep, name), with_kwargs=True))
        yield records


@dataclass
class MaskedFeeder:
    """Feeds a rank's modules what the unsharded ones took, and compares what they give where the rank has features.

    agreeing: of linear modules that a rank has whole, which of their inputs are those of the unsharded model.
    """

    whole: Side
    records: Records
    side: Side
    names: Sequence[str]
    limit: float
    shares: Shares
    sums: Sums
    findings: list[Finding] = field(default_factory=list)
    inside: list[tuple[str, Callable[[], float]]] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    agreeing: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.side.rank or 0

    @contextmanager
    def looking(self, *, compare: bool = True) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, module in self.side.modules.items():
                if name not in self.records:
                    continue
                if name in self.names:
                    feed = partial(self._feed, name)
                    hooks.enter_context(module.register_forward_pre_hook(feed, with_kwargs=True))
                elif compare and module._parameters:
                    hooks.enter_context(module.register_forward_hook(partial(self._part, name)))
                if name in self.names:
                    seen = self._judge if compare else self._count
                    hooks.enter_context(module.register_forward_hook(partial(seen, name)))
            yield

    def _count(self, name: str, *_: Any) -> None:
        """The next call has the inputs of the next one: a module may be called for each token."""
        self.calls[name] += 1

    def _share(self, name: str) -> PlacedShare | None:
        each = self.shares.get(f"{name}.weight")
        return None if each is None else each[self.rank]

    def _mine(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        """Of what a module gives, the features that the rank has; of what is summed over ranks, all."""
        share = self._share(name)
        by_feature = share is not None and name not in self.sums.summed
        by_feature &= is_linear(module) or name in self.sums.gathered
        return share.only(x) if share is not None and by_feature and x.shape[-1] == share.total else x

    def _record(self, name: str) -> ModuleRecord | None:
        each, call = self.records[name], self.calls[name]
        return each[call] if call < len(each) else None

    def _feed(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        record = self._record(name)
        self.inside = []
        if record is None:
            return tuple(args), dict(kwargs)

        def instead(given: Any, recorded: Any) -> Any:
            if isinstance(given, Tensor) and isinstance(recorded, Tensor) and given.is_floating_point():
                return recorded.to(given.dtype)
            return given

        positional = tuple(instead(x, was) for x, was in zip(args, record.args, strict=True))
        return positional, {k: instead(x, record.kwargs.get(k)) if k in STREAM else x for k, x in kwargs.items()}

    def _judge(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        record, given = self._record(name), first_of(output)
        self.calls[name] += 1
        if record is None or given is None:
            return
        error, culprit = relative(*(self._mine(name, module, x) for x in (given, record.output))), None
        if error > self.limit:
            culprit = next((what for what, error_of in self.inside if error_of() > self.limit), None)
        self.findings.append(Finding(name, self.rank, error, culprit))

    def _part(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """What a module with parameters inside of a compared one takes, if it has some of the inputs, and gives."""
        record, share, given = self._record(name), self._share(name), first_of(output)
        self.calls[name] += 1
        taken = record.args[0] if record is not None and record.args else None
        if record is None or given is None or given.shape != record.output.shape or not isinstance(taken, Tensor):
            return
        if share is None and "weight" in module._parameters and args[0].shape == taken.shape:
            self.agreeing[name] = _agree(args[0], taken)
        if share is not None and is_row(module, {"weight": share}):
            x, wanted = share.only(args[0]), share.only(taken)
            self.inside.append((f"input of {name}", lambda: relative(x, wanted)))
            weights = (each.modules[name]._parameters["weight"] for each in (self.side, self.whole))
            both = [partial(share.only, w, in_dim(module)) for w in weights if w is not None]
            self.inside.append((name, lambda: relative(*(product(module, wanted, own()) for own in both))))
        elif share is None or is_linear(module) or name in self.sums.summed:
            mine_of, expected = (self._mine(name, module, x) for x in (given, record.output))
            self.inside.append((name, lambda: relative(mine_of, expected)))


def _agree(x: Tensor, wanted: Tensor) -> Tensor:
    """Of each feature, whether it is the same but for roundings."""
    apart, size = (each.double().flatten(0, -2).norm(dim=0) for each in (x - wanted, wanted))
    same: Tensor = apart <= 1e-9 * size.clamp(min=torch.finfo(torch.float64).tiny)
    return same


def _weighed(name: str, x: Tensor) -> Tensor:
    """A number that every element has a part in."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (x * torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()


def _with_inputs(
    module: nn.Module, leaf: str, share: PlacedShare, args: tuple[Any, ...], gradients: Gradients
) -> Tensor:
    """What a module makes of the inputs that a rank has."""
    weight = module._parameters[leaf]
    assert weight is not None
    part = share.alone(weight.detach() if not isinstance(weight, Streamed) else weight)
    if isinstance(part, Streamed):
        part.reader = gradients.of_no_use
    module._parameters[leaf] = as_parameter(part)
    try:
        found = first_of(module.forward(*args))
    finally:
        module._parameters[leaf] = weight
    assert found is not None
    return found


_ROUNDING = 100
"""How many units in the last place of the largest gradient may be rounding."""


@dataclass
class Uses:
    """Of which indices of each parameter, along each dim, anything depends that is summed over ranks."""

    alive: dict[str, list[Tensor]]

    @classmethod
    def of(cls, side: Side, sums: Sums, run: Callable[[], object], rows: Shares | None = None, rank: int = 0) -> "Uses":
        """By one run with gradients; of a model without ranks, of what rank `rank` would sum if `rows` are given.
        Without `rank` rounding is no use (a router whose one choice is scaled to 1); any number of a rank's is one.

        Sums, and what is put together of all ranks, let no gradient pass from one feature to another.
        """
        weighed: list[Tensor] = []
        names = {name: p for name, p in side.model.named_parameters() if p.is_floating_point() and not p.is_meta}
        gradients = Gradients(names)

        def summed(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            first = first_of(output)
            if first is None or not first.requires_grad:
                return None
            keys = {leaf: f"{name}.{leaf}" for leaf in module._parameters}
            leaves = {leaf: rows[key][rank] for leaf, key in keys.items() if rows is not None and key in rows}
            if rows is None:
                weighed.append(_weighed(name, first))
            elif (leaf := row_leaf(module, leaves)) is not None:
                part = _with_inputs(module, leaf, leaves[leaf], args, gradients)
                weighed.append(_weighed(name, part))
            return first.detach() if isinstance(output, Tensor) else (first.detach(), *output[1:])

        def apart(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.shape == output.shape]
            return output.detach() + sum(x - x.detach() for x in given)

        with ExitStack() as hooks, gradients.wanted():
            if side.rank is None:
                for name in sums.summed:
                    hooks.enter_context(side.modules[name].register_forward_hook(partial(summed, name)))
                for name in sums.gathered if rows is not None else ():
                    hooks.enter_context(side.modules[name].register_forward_hook(apart, with_kwargs=True))
            else:
                before = side.link.show
                hooks.callback(setattr, side.link, "show", before)
                side.link.show = lambda name, x: weighed.append(_weighed(name, x)) if x.requires_grad else None
            run()
            if weighed:
                gradients.find(torch.stack(weighed).sum())
        found = gradients.largest
        most = max((float(size.max()) for dims in found.values() for size in dims if len(size)), default=0.0)
        least = most * _ROUNDING * torch.finfo(side.dtype).eps if side.rank is None else 0.0
        return cls({name: [size > least for size in dims] for name, dims in found.items()})

    def unused(self, whole: "Uses", shares: Shares, rank: int) -> Iterator[tuple[str, int]]:
        """Parameters of which a rank holds what nothing of its own depends on, and the first such index.

        Of what the whole model does not need on this prompt nothing is said, nor of a parameter that a rank does not
        use at all, nor, where ranks have whole experts, of what has a row for each expert: a router. Nor of indices of
        which some are alike, so that nobody knows which of them a rank holds.
        """
        experts = {
            each[rank].total for name, each in shares.items() if each[rank].dim == 0 and len(self.alive[name]) > 2
        }
        for name, dims in self.alive.items():
            for dim, mine in enumerate(dims):
                if name not in shares and len(mine) in experts:
                    continue
                idle = whole.alive[name][dim] & ~mine
                if (each := shares.get(name)) is not None and each[rank].dim == dim:
                    if not each[rank].sure:
                        continue
                    idle &= each[rank].held.to(idle.device)
                if bool(idle.any()) and bool(mine.any()):
                    yield name, int(idle.nonzero()[0])
                    break
