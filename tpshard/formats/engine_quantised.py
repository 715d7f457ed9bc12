"""The companions of quantised modules as an engine has them: scalars in slots, constants, names, and its config.

What becomes of which companion is data, `[quantised]` of the engine's table.
"""

import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import prod
from typing import Any

from tpshard.errors import UnsupportedError
from tpshard.formats.engine_functions import dtype_of
from tpshard.formats.engine_layout import ParameterParts, Share
from tpshard.formats.engine_patterns import exchanged, match
from tpshard.formats.engine_places import with_scales
from tpshard.formats.engine_tables import Constant, EngineFamily, Method, QuantisedModules
from tpshard.planning.box import Shape, full
from tpshard.planning.join import is_grid
from tpshard.planning.layout import SCALED, LogicalTensor, RankShare, Row, RowKind, StoredTensor
from tpshard.planning.model import CASTABLE, Model
from tpshard.storage.names import QUANTISED_KEYS

_HINT = "use --format native"
_BLOCK = 128
"""The one size of blocks that engines know where the scales have four dims (ModelOpt's FP8_PB_WO)."""


def suffix_of(name: str) -> str:
    """What a companion's name ends with; of stacked experts, what follows the last underscore.

    >>> suffix_of("mlp.up_proj.weight_scale"), suffix_of("mlp.experts.down_proj_blocks")
    ('weight_scale', 'blocks')
    """
    suffix = name.rpartition(".")[2]
    return "blocks" if suffix.endswith("_blocks") else suffix


def method_of(quantised: QuantisedModules, model: Model, engine: str) -> Method:
    """What the engine has of the model's method. UnsupportedError where it does not load it, with its reason."""
    if not model.quantisation:
        return Method()
    name = str(model.quantisation["method"])
    if name not in quantised.methods:
        what = f"{engine} is not known to load what is quantised by {name}"
        raise UnsupportedError(what, expected=", ".join(quantised.methods), found=name, hint=_HINT)
    method = quantised.methods[name]
    declared = _declared(model)
    if not declared and not method.own_file:
        what = f"{engine} takes {name} from config.json alone, and the checkpoint names it in another file"
        hint = f"copy it into config.json, as quantization_config; or {_HINT}"
        raise UnsupportedError(what, expected="quantization_config in config.json", found="none", hint=hint)
    for need in method.needs:
        value = declared.get(need.key, need.values[0])
        value = value.upper() if isinstance(value, str) else value
        if value not in need.values and not any(declared.get(key) == each for key, each in need.unless.items()):
            expected = " or ".join(f"{need.key} {_text(each)}" for each in need.values)
            what = f"{engine} does not load {need.key} {_text(value)}: {need.reason}"
            raise UnsupportedError(what, expected=expected, found=f"{need.key} {_text(value)}", hint=_HINT)
    return method


def _declared(model: Model) -> Mapping[str, Any]:
    return next((said for key in QUANTISED_KEYS if (said := model.config.get(key))), {})


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def refusal(quantised: QuantisedModules, family: EngineFamily, tensor: LogicalTensor, name: str) -> str | None:
    """Why the engine cannot take a tensor of a quantised model. name: its full name."""
    module = f"{name.rpartition('.')[0]}.weight"
    kind = family.kind(module)
    turned = kind.cut in ("grouped", "paired") and tensor.cut.dim not in (None, 0)
    if (kind.transposed or turned) and tensor.dtype not in CASTABLE:
        return "how the engine cuts or turns it where it is quantised is not known"
    if kind.plain and tensor.dtype not in CASTABLE:
        return "it is quantised, and the engine's class holds it in the dtype that it computes in"
    if len(tensor.shape) == 4 and suffix_of(name) in quantised.scalars and tensor.cut.ratio not in (1, _BLOCK):
        return f"it takes blocks of {_BLOCK} only"
    return quantised.refused.get(suffix_of(name))


def counted_last(quantised: QuantisedModules, family: EngineFamily, model: Model) -> frozenset[str]:
    """Companions of which the engine has one for all that are fused, the last."""
    names = {tensor.name: model.full_name(tensor.name) for tensor in model.tensors if model.quantisation}
    dtypes = {names[tensor.name]: tensor.dtype for tensor in model.tensors if tensor.name in names}

    def counts(name: str) -> bool:
        module, suffix = name.rpartition(".")[0], suffix_of(name)
        integers = dtypes.get(f"{module}.weight") == "I8"
        if suffix in quantised.last or (suffix in quantised.last_of_integers and integers):
            return True
        beside = quantised.last_of_experts_without.get(suffix)
        if beside is None or f"{module}.{beside}" in dtypes:
            return False
        return any(each.stacked is not None for each in family.kind(name).fused)

    return frozenset(name for name, full_name in names.items() if counts(full_name))


def unplaced(quantised: QuantisedModules, family: EngineFamily, model: Model, last: Collection[str]) -> frozenset[str]:
    """Companions that the engine has no place for. last: those that count only where they are the last to be fused."""
    names = {tensor.name: model.full_name(tensor.name) for tensor in model.tensors if model.quantisation}

    def is_before(name: str) -> bool:
        return any(each.place < len(family.parts(each.target, each.dim)) - 1 for each in family.kind(name).fused)

    return frozenset(
        name
        for name, full_name in names.items()
        if suffix_of(full_name) in quantised.unplaced or (name in last and is_before(full_name))
    )


def scaled(family: EngineFamily, model: Model) -> frozenset[str]:
    """Tensors in FP8 that the engine multiplies by the scales of their blocks."""
    shapes = {tensor.name: tensor.shape for tensor in model.tensors if family.scaled}
    return frozenset(
        tensor.name
        for tensor in (model.tensors if family.scaled else ())
        if tensor.dtype == "F8_E4M3"
        and family.kind(model.full_name(tensor.name)).scaled
        and is_grid(tensor.shape, shapes.get(f"{tensor.name}{SCALED[1:]}", ()))
    )


def engine_name(quantised: QuantisedModules, family: EngineFamily, name: str) -> str:
    """A tensor's full name, with scales of the KV cache where the engine has them, whatever module stores them."""
    suffix = suffix_of(name)
    if suffix not in quantised.cache or (layer := family.layer_of(name)) is None or not family.scales:
        return name
    return f"{family.scales[0].replace('*', str(layer))}.{suffix}"


def in_shapes(
    quantised: QuantisedModules,
    family: EngineFamily,
    names: Mapping[str, str],
    shares: Mapping[str, tuple[Share, ...]],
    last: Collection[str],
) -> dict[str, tuple[Share, ...]]:
    """The shares in the shapes that the engine has: a scalar as one slot, the bytes of a block or the heads in one dim.

    Scales of the rows of integers are a column. names: tensor → full name. last: scalars that have one slot. Shares
    that are alike stay one object.
    """
    known: dict[object, tuple[Share, ...]] = {}
    found = {}
    integers = {names[name].removesuffix(".weight") for name, held in shares.items() if held[0].dtype == "I8"}
    for name, held in shares.items():
        suffix, ndim = suffix_of(names[name]), len(held[0].shape)
        slots = next((n for pattern, n in family.slots.items() if match(pattern, names[name])), 1)
        reshape: Callable[[Share], Share] | None = None
        if suffix in quantised.scalars and held[0].shape in ((), (1,)) and name not in last:
            reshape = partial(_in_slots, slots)
        elif name in last and not ndim:
            reshape = partial(_in_slots, 1)
        elif suffix in quantised.columns and ndim == 1 and names[name].rpartition(".")[0] in integers:
            size = max(part.box[0][1] for share in held for part in share.parts)
            reshape = partial(_as_column, size)
        elif suffix in quantised.bytes:
            reshape = _last_dims_joined
        elif suffix in quantised.cache and ndim > 1:
            reshape = _flat
        if reshape is not None:
            key = (id(held), suffix, slots)
            held = known.setdefault(key, tuple(map(reshape, held)))
        found[name] = held
    return found


def _in_slots(slots: int, share: Share) -> Share:
    """A scalar as a vector, of one for each matrix that is stored as one with others."""
    view = None if share.shape else (1,)
    parts = [part._replace(box=((0, 1),), at=(slot,), view=view) for part in share.parts for slot in range(slots)]
    return share._replace(shape=(slots,), parts=tuple(parts))


def _last_dims_joined(share: Share) -> Share:
    *before, blocks, size = share.shape
    return share._replace(shape=(*before, blocks * size), view=share.shape)


def _as_column(size: int, share: Share) -> Share:
    """A vector, or its stretch of one of `size` elements, as a matrix of one column."""
    parts = (part._replace(box=(*part.box, (0, 1)), at=(*part.at, 0), view=(size, 1)) for part in share.parts)
    return share._replace(shape=(*share.shape, 1), parts=tuple(parts))


def _flat(share: Share) -> Share:
    return share._replace(shape=(prod(share.shape),), view=share.shape)


def fused(
    quantised: QuantisedModules,
    names: Mapping[str, str],
    shares: Mapping[str, tuple[Share, ...]],
    recipe: ParameterParts,
) -> ParameterParts:
    """A recipe with the dim along which companions are fused."""
    first = recipe.tensors[0]
    suffix = suffix_of(names[first])
    if suffix in quantised.second:
        return replace(recipe, dim=1)
    scalar = suffix in quantised.scalars and all(shares[tensor][0].shape == (1,) for tensor in recipe.tensors)
    return replace(recipe, flat=scalar and recipe.stacked and all(len(group) == 1 for group in recipe.groups))


def require_whole_blocks(
    family: EngineFamily, model: Model, recipes: Mapping[str, ParameterParts], shares: Mapping[str, tuple[Share, ...]]
) -> None:
    """UnsupportedError where matrices meet inside a block once they are fused: engines have one grid for all.

    And where a cut that is the engine's own, in equal slices of what is stored, lies in one.
    """
    rows = _block_rows(model.config.get("quantization_config"))
    if rows is None:
        return
    for recipe in recipes.values():
        sliced = [name for name in recipe.tensors if family.kind(model.full_name(name)).cut == "even"]
        for tensor in (*(tensor for group in recipe.groups for tensor in group[:-1]), *sliced):
            stored = shares[tensor][0]
            if stored.dtype in ("F8_E4M3", "F8_E5M2") and len(stored.shape) > 1 and stored.shape[0] % rows:
                what = f"{tensor} ends inside a block, and the engine has others behind it"
                expected, found = f"a multiple of {rows} rows on each rank", stored.shape[0]
                raise UnsupportedError(what, tensor=tensor, expected=expected, found=found, hint=_HINT)


def _block_rows(declared: Any) -> int | None:
    """The rows of a block of FP8, None where there are none."""
    size = declared.get("weight_block_size") if isinstance(declared, dict) else None
    return size[0] if isinstance(size, list) and size and isinstance(size[0], int) else None


def constants(
    method: Method, family: EngineFamily, model: Model, rows: Sequence[Row], names: Collection[str], tp: int
) -> Iterator[Row]:
    """What the engine wants beside the rows, where the checkpoint has none of it. names: the checkpoint's."""
    there = {row.name: row.kind for row in rows}
    known: dict[object, RowKind] = {}

    def row(name: str, constant: Constant, like: RowKind | None) -> Iterator[Row]:
        shapes = (constant.shape,) * tp
        if like is not None:
            shapes = tuple(_without(like.shape(rank), constant.without) for rank in range(tp))
        if (key := (id(constant), shapes)) not in known:
            known[key] = RowKind(tuple(_constant(constant, shape, model) for shape in shapes))
        if name not in there:
            yield Row(name, (), known[key])

    said, cached = _declared(model), bool(model.quantisation and model.quantisation["kv_cache"])
    buffers = [b for b in method.buffers if cached or not any(said.get(key) == v for key, v in b.unless.items())]
    modules = with_scales(family, names) if buffers and family.buffers else ()
    for module, buffer in product(modules, buffers):
        if module.rpartition(".")[2] not in buffer.not_in:
            for name in buffer.names:
                yield from row(f"{module}.{name}", buffer, there.get(f"{module}.{buffer.like}"))
    for joint, beside in ((".", method.modules), ("_", method.experts)):
        for constant, (name, kind) in product(beside, there.items()):
            if name.endswith(end := f"{joint}{constant.like}"):
                for other in constant.names:
                    yield from row(f"{name.removesuffix(end)}{joint}{other}", constant, kind)
    ones = {kind.dtype: Constant((), 1.0, kind.dtype) for kind in there.values()} if family.ones else {}
    for (target, like), (name, kind) in product(family.ones.items(), there.items()):
        if match(like, name):
            yield from row(exchanged({like: target}, name), ones[kind.dtype], kind)


def _without(shape: Shape, dim: int | None) -> Shape:
    return tuple(size for each, size in enumerate(shape) if each != dim)


def _constant(constant: Constant, shape: Shape, model: Model) -> RankShare:
    dtype = constant.dtype or dtype_of(model)
    value = _bytes_of(constant.value, dtype) if constant.value else b""
    return RankShare(StoredTensor("", dtype, shape, (), (full(shape),), None, value), ())


def _bytes_of(value: float, dtype: str) -> bytes:
    """A number's bytes, one that all dtypes have exactly."""
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    return struct.pack({"F64": "<d", "F32": "<f", "F16": "<e"}[dtype], value)


def completed(method: Method, model: Model, config: dict[str, Any]) -> dict[str, Any]:
    """config.json with the lists of modules that the engine else reads off the names in the files, which are fused."""
    declared = config.get("quantization_config")
    if not method.lists or not isinstance(declared, dict):
        return config
    quantised = {model.full_name(each.name).rpartition(".")[0] for each in model.tensors if each.dtype not in CASTABLE}
    matrices = {model.full_name(each.name).rpartition(".")[0] for each in model.tensors if len(each.shape) > 1}
    added = {}
    for key, which in method.lists.items():
        listed = [str(each) for each in declared.get(key) or ()]
        if which == "plain":
            added[key] = [m for m in sorted(matrices - quantised) if not any(each in m for each in listed)]
        elif not listed:
            added[key] = sorted(quantised)
    added = {key: [*(declared.get(key) or ()), *modules] for key, modules in added.items() if modules}
    return {**config, "quantization_config": {**declared, **added}} if added else config
