"""Where an engine's class has modules of its own, which what a layer has may decide."""

import struct
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tpshard.errors import CorruptError
from tpshard.formats.engine_patterns import exchanged, match, number_in
from tpshard.formats.engine_tables import EngineFamily
from tpshard.planning.layout import RankShare, Row, RowKind, StoredTensor

_ONE = struct.pack("<f", 1.0)


def with_scales(family: EngineFamily, names: Collection[str]) -> Iterator[str]:
    """The modules that have scales, in the layers that attend and in those that have others."""
    found: dict[int | None, dict[str, None]] = {}
    for pattern, module in family.scales_where.items():
        for name in (each for each in names if match(pattern, each)):
            ends = exchanged({pattern: module}, name).split(".")[: module.count(".") + 1]
            found.setdefault(family.layer_of(name), {})[".".join(ends)] = None
    for layer in family.attending(names) if family.scales else ():
        found.setdefault(layer, {pattern.replace("*", str(layer)): None for pattern in family.scales})
    for _, modules in sorted(found.items(), key=lambda each: each[0] or 0):
        yield from modules


def scales_of(family: EngineFamily, names: Collection[str], tp: int) -> Iterator[Row]:
    """The scales of an unquantised KV cache: 1.0, one scalar each, of every module that has such."""
    one = RowKind((RankShare(StoredTensor("", "F32", (), (), ((),), None, _ONE), ()),) * tp)
    for module in with_scales(family, names):
        for scale in family.scale_names:
            yield Row(f"{module}.{scale}", (), one)


def require_all(family: EngineFamily, config: Mapping[str, Any], names: Collection[str]) -> None:
    """CorruptError where a checkpoint has not all buffers that the engine keeps, or not as many parts as it says."""
    for target, key in family.counted.items():
        numbers: dict[int | None, set[int]] = {}
        for name, each in ((name, number_in(family.fused[target][0], name)) for name in names):
            if each is not None:
                numbers.setdefault(family.layer_of(name), set()).add(each)
        said = config.get(key)
        for layer, there in numbers.items():
            if isinstance(said, int) and there != set(range(said)):
                into = target.replace("*", str(layer))
                what = f"config.json says of how many parts {into} is made, and there are others"
                found, hint = f"{len(there)} parts, the last {max(there)}", "complete the checkpoint"
                raise CorruptError(what, expected=f"{key} {said}", found=found, hint=f"{hint}, or use --format native")
    for buffer, beside in family.kept.items():
        layers, complete = ({family.layer_of(name) for name in names if match(each, name)} for each in (beside, buffer))
        for layer in sorted(layers - complete, key=str):
            name = buffer.replace("*", str(layer))
            what = "a buffer that the engine keeps with its weights is not in the checkpoint"
            raise CorruptError(what, tensor=name, hint="take the published files, or use --format native")
