"""What is changed about torch while a model of transformers runs: float32 means float64, and routing is pinned."""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpshard.verifier.criteria import relative

CHOICES = {torch.topk, Tensor.topk, torch.max, Tensor.max}
"""What routers choose their experts with."""
MASKED = 1e30
"""What is not to be chosen scores less than minus this: the least number of a dtype, or minus infinity."""


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class Wide(TorchFunctionMode):
    """Every float32 becomes float64.

    transformers computes norms, softmax, rotary tables and routers in float32 whatever the model's dtype is; here a
    conversion to float32, a `dtype=torch.float32` and a new tensor of the default dtype are float64 instead.
    """

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        named = {key: _wider(value) for key, value in (kwargs or {}).items()}
        if func is torch.full and isinstance(named.get("fill_value", args[-1] if args else None), float):
            # Float64's least number, which masks are made of, is none of the default dtype.
            named.setdefault("dtype", torch.float64)
        out = func(*(_wider(value) for value in args), **named)
        return out.double() if isinstance(out, Tensor) and out.dtype == torch.float32 else out


def precision(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """What makes a model's dtype hold in all its parts: only float64 is not already what its code computes in."""
    return Wide() if dtype == torch.float64 else nullcontext()


class Pinned(TorchFunctionMode):
    """Makes routers choose what another run chose, so that a tie cannot fall differently on the two sides.

    With `choices` None it records: `made` holds, by router, every choice in order, and `offered` what each was made
    from, which is to be compared: nothing else may read a bias that only chooses. A pinned choice still takes its
    values from the scores at hand.
    """

    def __init__(self, choices: Mapping[str, Sequence[Tensor]] | None = None) -> None:
        super().__init__()
        self.choices = choices
        self.made: dict[str, list[Tensor]] = {}
        self.offered: dict[str, list[Tensor]] = {}
        self.router: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.router is None or func not in CHOICES or isinstance(out, Tensor):
            return out
        made = self.made.setdefault(self.router, [])
        self.offered.setdefault(self.router, []).append(args[0])
        if self.choices is None:
            made.append(out.indices)
            return out
        indices = self.choices[self.router][len(made)]
        made.append(indices)
        dim = args[2] if len(args) > 2 else (kwargs or {}).get("dim", -1)
        if out.indices.dim() == args[0].dim():
            return type(out)((args[0].gather(dim, indices), indices))
        return type(out)((args[0].gather(dim, indices.unsqueeze(dim)).squeeze(dim), indices))

    def differences(self, reference: "Pinned", routers: Container[str]) -> dict[str, float]:
        """By router, the largest relative error of what it chose from; infinite where other values are masked."""
        return {
            name: max(_difference(*pair) for pair in zip(offered, reference.offered[name], strict=True))
            for name, offered in self.offered.items()
            if name in routers
        }

    @contextmanager
    def watching(self, routers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Choices are pinned within these modules alone: attention has maxima of its own."""

        before: list[str | None] = []  # one may lie in another

        def enter(name: str, *_: Any) -> None:
            before.append(self.router)
            self.router = name

        def leave(*_: Any) -> None:
            self.router = before.pop()

        with ExitStack() as hooks, self:
            for name, module in routers.items():
                hooks.enter_context(module.register_forward_pre_hook(partial(enter, name)))
                hooks.enter_context(module.register_forward_hook(leave))
            yield


def _difference(x: Tensor, wanted: Tensor) -> float:
    seen = wanted.abs() < MASKED
    if not torch.equal(x.abs() < MASKED, seen):
        return math.inf
    return relative(x.where(seen, 0), wanted.where(seen, 0))
