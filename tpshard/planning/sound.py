"""Whether a layout that was read, not planned, can be one: a manifest may say anything."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

from tpshard.planning.box import Box, Shape, full, tiles, volume
from tpshard.planning.layout import Layout, LogicalTensor, StoredTensor, is_result
from tpshard.planning.strides import placed_box
from tpshard.storage.safetensors import DTYPE_BITS, MAX_DIMS

_LARGEST = 1 << 63


def why_unsound(tensors: Sequence[LogicalTensor], layout: Layout) -> str | None:
    """What is impossible about tensors and what ranks hold of them; None when nothing is.

    Every value has its type, every part is a box of a tensor that is there, and parts and fills tile what is stored.
    Whether ranks together hold every element is left to the join.
    """
    shapes: dict[str, Shape] = {}
    for tensor in tensors:
        if type(tensor.name) is not str or tensor.name in shapes:
            return f"the tensor {tensor.name!r:.100}, by name"
        if not (_is_tensor(tensor.dtype, tensor.shape) and _is_cut(tensor)):
            return f"{tensor.name} of dtype {tensor.dtype!r:.40} and shape {tensor.shape!r:.100}"
        shapes[tensor.name] = tensor.shape
    for rank, held in enumerate(layout):
        names = set()
        for stored in held:
            if type(stored.name) is not str or stored.name in names:
                return f"rank {rank}: the tensor {stored.name!r:.100}, by name"
            names.add(stored.name)
            if not (_is_tensor(stored.dtype, stored.shape) and _fits(stored, shapes)):
                return f"rank {rank}: what {stored.name} is made of"
    return None


def _is_tensor(dtype: Any, shape: Any) -> bool:
    return isinstance(dtype, str) and dtype in DTYPE_BITS and _is_shape(shape)


def _is_shape(shape: Any) -> bool:
    if not isinstance(shape, tuple) or len(shape) > MAX_DIMS:
        return False
    return all(type(size) is int and 0 <= size < _LARGEST for size in shape) and prod(shape) < _LARGEST


def _is_cut(tensor: LogicalTensor) -> bool:
    cut = tensor.cut
    if not isinstance(cut.kind, str) or not all(isinstance(name, str) for name in cut.segments):
        return False
    if cut.interleave is not None and not isinstance(cut.interleave, str):
        return False
    return cut.dim is None or (type(cut.dim) is int and 0 <= cut.dim < len(tensor.shape))


def _fits(stored: StoredTensor, shapes: Mapping[str, Shape]) -> bool:
    view = stored.shape if stored.view is None else stored.view
    if not (_is_shape(view) and prod(view) == prod(stored.shape)):
        return False
    if stored.function and not is_result(stored.function, stored.dtype):
        return False
    if len(stored.value) not in (0, max(1, DTYPE_BITS[stored.dtype] // 8)):
        return False
    if not all(isinstance(part.tensor, str) and part.tensor in shapes for part in stored.parts):
        return False
    places = tuple((shapes[part.tensor], *part[1:]) for part in stored.parts)
    try:
        return _is_tiled(view, places, stored.fills)
    except TypeError:  # a list where a number belongs has no hash
        return False


_Place = tuple[Shape, Box, Shape, Shape | None, tuple[int, ...] | None]
"""A logical tensor's shape, and a part of it without its name."""


@lru_cache(maxsize=1 << 14)
def _is_tiled(stored: Shape, places: tuple[_Place, ...], fills: tuple[Box, ...]) -> bool:
    """Whether parts and fills are boxes that tile what is stored. Cached: layers are alike."""
    boxes = list(fills)
    if not all(_is_box(box, len(stored)) for box in fills):
        return False
    for shape, box, at, view, order in places:
        seen = shape if view is None else view
        if not (_is_shape(seen) and prod(seen) == prod(shape) and _is_box(box, len(seen))):
            return False
        if any(stop > size for (_, stop), size in zip(box, seen, strict=True)):
            return False
        if not (_is_shape(at) and len(at) == len(box) == len(stored)):
            return False
        if order is not None and not _is_order(order, len(box)):
            return False
        boxes.append(placed_box(box, at, order))
    return tiles(full(stored), [box for box in boxes if volume(box)])


def _is_box(box: Any, dims: int) -> bool:
    if not isinstance(box, tuple) or len(box) != dims:
        return False
    return all(
        type(side) is tuple and len(side) == 2 and all(type(end) is int for end in side) and 0 <= side[0] <= side[1]
        for side in box
    )


def _is_order(order: Any, dims: int) -> bool:
    return all(type(dim) is int for dim in order) and sorted(order) == list(range(dims))
