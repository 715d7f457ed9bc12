"""The unsharded model and the ranks' models, built from stored tensors and run on a prompt."""

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tpshard.errors import UnsupportedError
from tpshard.verifier.elements import RankShares
from tpshard.verifier.group import Group
from tpshard.verifier.hf.overrides import Pinned, precision
from tpshard.verifier.hf.parallel import Link
from tpshard.verifier.hf.pictures import Pictures


@dataclass
class Side:
    """A model that can be run: the unsharded one (rank None), or a rank's."""

    model: nn.Module
    dtype: torch.dtype
    cuts: Mapping[str, RankShares]
    rank: int | None = None
    link: Link = field(default_factory=Link)
    progress: Callable[[], None] = lambda: None
    pictures: Pictures | None = None
    layers: Mapping[str, nn.Module] = field(default_factory=dict)
    """The layers that are looked at, by name."""
    count: Callable[[float], None] = lambda layers: None

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules())

    @cached_property
    def routers(self) -> dict[str, nn.Module]:
        return self._named("Router")

    @cached_property
    def indexers(self) -> dict[str, nn.Module]:
        """What chooses the tokens to attend to."""
        return self._named("Indexer")

    def _named(self, ending: str) -> dict[str, nn.Module]:
        return {name: module for name, module in self.modules.items() if type(module).__name__.endswith(ending)}

    def is_head(self, name: str) -> bool:
        """Whether a module makes the logits, which are gathered."""
        return self.modules[name] is self.model.get_output_embeddings()  # type: ignore[operator]

    def run(self, group: Group, steps: list[Tensor], pins: Pinned, more: int = 0) -> Tensor:
        """Logits [B, S, vocab] of all steps, in order; after the first they go through the model's own KV cache.

        `more` greedy choices are added to the steps. UnsupportedError where the library's code cannot run with these
        shapes, which says nothing of the shards.
        """
        self.link.group = group
        cached = len(steps) + more > 1
        logits: list[Tensor] = []
        cache: Any = None
        total = len(steps) + more
        with precision(self.dtype), pins.watching(self.routers | self.indexers), self._counting(total):
            for i in range(total):
                if i == len(steps):
                    steps.append(self._next(logits[-1]))
                out = self._step(steps[i], cache, cached, self._seen() if i == 0 else {})
                cache = self._cache_of(out) if cached else None
                logits.append(out.logits)
        self.progress()
        return torch.cat(logits, 1)

    def between(self, enter: Callable[[str], None], leave: Callable[[str], None]) -> ExitStack:
        """What calls `enter` before a layer and `leave` behind it, for the time of a `with`."""
        hooks = ExitStack()
        for name, layer in self.layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            hooks.enter_context(layer.register_forward_hook(lambda *_, name=name: leave(name)))
        return hooks

    def _counting(self, total: int) -> ExitStack:
        """What counts a layer once in `total` passes, for the time of a `with`."""
        hooks = ExitStack()
        for layer in self.layers.values():
            hooks.enter_context(layer.register_forward_hook(lambda *_: self.count(1 / total)))
        return hooks

    def _next(self, logits: Tensor) -> Tensor:
        """The greedy choice [B, 1], of what stands for text."""
        last = logits[:, -1:].clone()
        last[..., list(self.pictures.barred if self.pictures else ())] = -math.inf
        return last.argmax(-1)

    def _seen(self) -> Mapping[str, Tensor]:
        """What the first step takes beside tokens."""
        device = next(self.model.parameters()).device
        return self.pictures.of_dtype(self.dtype, device) if self.pictures else {}

    @cached_property
    def _keeps(self) -> str:
        """The argument that a class keeps its states in."""
        takes = inspect.signature(self.model.forward).parameters
        return "cache_params" if "cache_params" in takes and "past_key_values" not in takes else "past_key_values"

    def _cache_of(self, out: Any) -> Any:
        return getattr(out, self._keeps)

    def _step(self, ids: Tensor, cache: Any, cached: bool, seen: Mapping[str, Tensor]) -> Any:
        try:
            return self.model(input_ids=ids, use_cache=cached, **{self._keeps: cache}, **seen)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
            where = "the model" if self.rank is None else f"rank {self.rank}"
            what = f"transformers could not run {where}: {(str(error) or repr(error)).splitlines()[0]}"
            raise UnsupportedError(what, hint="--tier bytes compares the files") from error
