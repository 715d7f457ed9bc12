"""Which words of the table's language say what the ranks have of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import NamedTuple

import numpy as np

from tests.engines.table.coded import Numbers
from tests.engines.table.reading import Reading, kind_of
from tpshard.errors import TpshardError
from tpshard.formats.engine_layout import Share, shares_of
from tpshard.formats.engine_tables import EngineFamily
from tpshard.formats.split import Options
from tpshard.formats.vllm import FORMAT
from tpshard.planning.deal import Deal
from tpshard.planning.layout import LogicalTensor, StoredTensor


class How(NamedTuple):
    """A cut of the table, None for the architecture's own, and what is done with dims.

    padded: whether rows are behind it that are not the checkpoint's.
    """

    cut: str | None = None
    transposed: bool = False
    either: bool = False
    squeezed: bool = False
    side_by_side: bool = False
    padded: bool = False
    shaped: tuple[int, ...] = ()
    least: tuple[tuple[str, int], ...] = ()

    def family(self, name: str) -> EngineFamily:
        """A family that says this of one name."""
        names = (name,)
        return EngineFamily(
            cuts={self.cut: names} if self.cut else {},
            shaped={name: self.shaped} if self.shaped else {},
            least=dict(self.least),
            **{key: names for key in ("transposed", "either", "squeezed", "side_by_side") if getattr(self, key)},
        )


def dealt(reading: Reading) -> Deal:
    """The axes as vLLM deals them, with KV heads repeated wherever there are more ranks."""
    return FORMAT._deal(EngineFamily(), reading.model.axes, reading.model, Options(reading.tp))


def explanations(reading: Reading, name: str, deal: Deal) -> set[How]:
    """Everything that says what the ranks have of a tensor."""
    tensor = next(each for each in reading.model.tensors if each.name == name)
    held = reading.blocks[name]
    found = {how for how in _possible(tensor, held) if _gives(reading, tensor, how, deal, held)}
    found = found or {How(cut) for cut in ("joint", "rows") if _in_line(reading, name, cut)}
    own, every = reading.rows.get(reading.parameter_of[name], (0, 0))
    if found or own == every:
        return found
    held = [block[:own] for block in held]
    return {how._replace(padded=True) for how in _possible(tensor, held) if _gives(reading, tensor, how, deal, held)}


def _in_line(reading: Reading, name: str, cut: str) -> bool:
    """Whether what follows one another in a parameter is cut as one."""
    (group,) = reading.recipes[reading.parameter_of[name]].groups[:1]
    full = {each: reading.model.full_name(each) for each in group}
    names, tensors = tuple(map(kind_of, full.values())), {each.name: each for each in reading.model.tensors}
    family = EngineFamily(cuts={cut: names}, fused={"joint": names})
    shapes = {tensors[each].shape[1:] for each in group if tensors[each].shape}
    if len(shapes) != 1 or (cut == "joint" and len(set(group)) < 2):
        return False
    try:
        shares = shares_of(family, reading.model, [tensors[each] for each in group], dealt(reading))
    except TpshardError:  # of rows that do not divide
        return False
    for each in group:
        for share, block in zip(shares[each], reading.blocks[each], strict=True):
            numbers = _numbers(share, tensors[each].shape)
            numbers = numbers[(numbers >= 0).any(axis=tuple(range(1, numbers.ndim)))]
            if numbers.shape != block.shape or not bool((numbers == block).all()):
                return False
    return True


def _possible(tensor: LogicalTensor, held: list[Numbers]) -> Iterator[How]:
    wide = held[0].shape
    if len(tensor.shape) == 1 < len(wide):
        yield How(shaped=tuple(0 if size == max(wide) else 1 for size in wide))
    if len(tensor.cut.segments) == 1 and tensor.cut.dim is not None and len(wide) == len(tensor.shape):
        yield How(least=((tensor.cut.segments[0], wide[tensor.cut.dim]),))
    cuts: list[str | None] = [
        None,
        "replicate",
        "first",
        *([] if tensor.cut.segments or not tensor.shape else ["even", "column vocab"]),
    ]
    if len(tensor.cut.segments) == 1 and tensor.cut.dim == 0 and len(tensor.shape) == 2:
        cuts.append("paired")
    if tensor.cut.segments:
        segments = tensor.cut.segments
        orders = list(dict.fromkeys(permutations(segments))) if len(segments) <= 3 else [segments]
        plain = [order for order in orders if order != segments or tensor.cut.interleave is not None]
        cuts += [*(["grouped"] if tensor.cut.interleave else []), "even"]
        cuts += [" ".join((tensor.cut.kind, *order)) for order in plain]
    if tensor.shape:
        cuts.append("even of whole")
    for cut in cuts:
        yield How(cut)
        if len(tensor.shape) > 1:
            yield How(cut, transposed=True)
            yield How(cut, either=True)
        if len(tensor.shape) == 3 and len(wide) == 2:
            yield How(cut, side_by_side=True)
        if tensor.shape[:1] == (1,):
            yield How(cut, squeezed=True)


def _gives(reading: Reading, tensor: LogicalTensor, how: How, deal: Deal, held: list[Numbers]) -> bool:
    name = kind_of(reading.model.full_name(tensor.name))
    try:
        shares = shares_of(how.family(name), reading.model, [tensor], deal)[tensor.name]
    except TpshardError:
        return False
    return all(
        share.shape == block.shape and bool((_numbers(share, tensor.shape) == block).all())
        for share, block in zip(shares, held, strict=True)
    )


def _numbers(share: Share, shape: tuple[int, ...]) -> Numbers:
    """The tensor's elements in a share, by number, and -1 for what is filled."""
    elements = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
    return placed(share, lambda _: elements, np.full(share.view or share.shape, -1, np.int64))


def placed(stored: StoredTensor, elements: Callable[[str], Numbers], filled: Numbers) -> Numbers:
    """A parameter's elements by number, from those of the tensors that it is made of. filled: what is of none."""
    for part in stored.parts:
        seen = elements(part.tensor)
        box = (seen if part.view is None else seen.reshape(part.view))[tuple(slice(*span) for span in part.box)]
        box = box if part.order is None else box.transpose(part.order)
        filled[tuple(slice(at, at + size) for at, size in zip(part.at, box.shape, strict=True))] = box
    return filled.reshape(stored.shape)
