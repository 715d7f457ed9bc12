"""The unsharded model beside the ranks: it goes through the prompt as far as they ask, and a layer is forgotten behind
the last of them."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from tpshard.verifier.group import Single
from tpshard.verifier.hf.overrides import Pinned
from tpshard.verifier.hf.parallel import is_experts
from tpshard.verifier.hf.probes import ModuleRecord, ModuleRecorder, every_expert
from tpshard.verifier.hf.sides import Side


class _NotAsked(Exception):
    """Nobody asks for more."""


Experts = tuple[str, tuple[Any, ...], Tensor]
"""A module of experts, arguments that send a token to each, and what the unsharded ones give."""


class UnshardedRun:
    """The unsharded model on a prompt, in a thread of its own that runs while a rank waits for it, layer by layer.

    names: the modules that are recorded. ranks: how many of this process go through what it keeps.
    """

    def __init__(self, whole: Side, names: Sequence[str], prompt: Sequence[Tensor], ranks: int) -> None:
        self.whole, self.prompt, self.ranks = whole, prompt, ranks
        self.recorder = ModuleRecorder(whole, names)
        self.pins = Pinned()
        self.experts: dict[str, list[Experts]] = {}
        self._layers: list[str] = []
        self._left: Counter[str] = Counter()
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._logits: Tensor | None = None
        self._thread = threading.Thread(target=self._body, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped = True
        self._go.release()
        if kind is None or issubclass(kind, Exception):  # who presses Ctrl-C does not wait for a layer
            self._thread.join()

    def reach(self, layer: str) -> None:
        """Go on until this layer is done."""
        while layer not in self._layers and self._advance():
            pass

    def record(self, name: str) -> ModuleRecord | None:
        """What a module took and gave when it last ran; None where it never runs."""
        while name not in self.recorder.records and self._advance():
            pass
        return self.recorder.records.get(name)

    def leave(self, layer: str) -> None:
        """A rank has left a layer; when all have, what was kept of it goes."""
        self._left[layer] += 1
        if self._left[layer] == self.ranks:
            self.experts.pop(layer, None)
            for name in [name for name in self.recorder.records if name.startswith(f"{layer}.")]:
                del self.recorder.records[name]

    def logits(self) -> Tensor:
        """The unsharded model's, at its end."""
        while self._advance():
            pass
        assert self._logits is not None
        return self._logits

    def _advance(self) -> bool:
        """Go on by a layer; False at the end. An error of the model is raised here."""
        if self._ended:
            return False
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        return True

    def _body(self) -> None:
        self._go.acquire()
        try:
            if not self._stopped:
                with torch.no_grad(), ExitStack() as hooks:
                    hooks.enter_context(self.recorder.looking())
                    for name, layer in self.whole.layers.items():
                        hooks.enter_context(layer.register_forward_hook(self._at_end_of(name)))
                    self._logits = self.whole.run(Single(), list(self.prompt), self.pins)
        except _NotAsked:
            pass
        except BaseException as error:  # raised again by who asked for more
            self._error = error
        self._ended = True
        self._paused.release()

    def _at_end_of(self, layer: str) -> Callable[..., None]:
        def done(*_: object) -> None:
            names = [name for name in self.recorder.records if name.startswith(f"{layer}.")]
            experts = [name for name in names if is_experts(self.whole.modules[name])]
            self.experts[layer] = [
                (name, *every_expert(self.whole.modules[name], self.recorder.records[name])) for name in experts
            ]
            self._layers.append(layer)
            self._paused.release()
            self._go.acquire()
            if self._stopped:
                raise _NotAsked

        return done
