"""What was compared and not run, in few lines: by the shortest beginnings of names below which nothing was run."""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from tpshard.storage.tensor_names import numbered, with_numbers
from tpshard.verifier.elements import ACTIVATION_SCALES, Parameter
from tpshard.verifier.report.verdict import NotRun

_WHOLE = "nothing here computes with it; compared, and the same on every rank"
_KNOWN = "nothing here computes with it; compared with the share that the format gives each rank"
_CUT = "nothing here computes with it, and it is cut: that each rank holds its own is not proved"
_UNSEEN = "nothing here computes with it, and nothing was compared: --tier weights does"
_CUT_UNSEEN = "nothing here computes with it, and it is cut: --tier weights compares it"
_SCALES = "it scales activations or the KV cache, for which exact arithmetic has no use; compared"


def apart(idle: Sequence[Parameter], run: Collection[str], *, compared: bool) -> tuple[NotRun, ...]:
    """The idle tensors by prefix and by why, what is cut first; `run` are the names of those that are computed with.

    compared: whether they were, at least, compared with the source's.
    """
    taken = {start for name in run for start in _starts(name)}
    cuts = (_CUT, _CUT_UNSEEN)
    found: dict[tuple[str, str], list[Parameter]] = {}
    for parameter in idle:
        found.setdefault((_prefix(parameter.name, taken), _why(parameter, compared)), []).append(parameter)
    order = sorted(found.items(), key=lambda each: each[0][1] not in cuts)
    return tuple(NotRun(prefix, len(each), sum(map(_bytes, each)), why, why in cuts) for (prefix, why), each in order)


def _starts(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _prefix(name: str, taken: Collection[str]) -> str:
    """The shortest beginning that no tensor which is run has; of one inside of such, with `*` for its numbers."""
    starts = _starts(name)
    short = next((start for start in starts if start not in taken), name)
    kind, numbers = numbered(short)
    deep = short == name or short.count(".") > 3
    return with_numbers(kind, ("*",) * len(numbers)) if deep and numbers else short


def _why(parameter: Parameter, compared: bool) -> str:
    if not compared:
        return _UNSEEN if parameter.known or parameter.dim is None else _CUT_UNSEEN
    if parameter.name.endswith(ACTIVATION_SCALES):
        return _SCALES
    if parameter.dim is None:
        return _WHOLE
    return _KNOWN if parameter.known else _CUT


def _bytes(parameter: Parameter) -> int:
    """Stored bytes in the source, found by reading one row."""
    source: Any = parameter.source
    count = torch.Size(source.shape).numel()
    return count * source.rows(0, 1).element_size() if count else 0
