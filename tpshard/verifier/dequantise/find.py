"""Which modules are quantised, and how: by the tensors that are stored, their dtypes and shapes, and the config."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tpshard.errors import UnsupportedError
from tpshard.verifier.dequantise.grid import E2M1, INT4, MX_BLOCKS, PLAIN, Grid
from tpshard.verifier.dequantise.integers import Awq, Gptq, Packed
from tpshard.verifier.dequantise.module import Scheme
from tpshard.verifier.ranks.open import FileWeights

QUANTISATION = ("quantization_config", "compression_config")
"""The keys of config.json that say how a model is quantised."""
_FP8 = ("F8_E4M3", "F8_E5M2")
_EXPONENTS = ("U8", "F8_E8M0")
BLOCK = 128
"""The side of a block of FP8 where the config gives none."""

Grids = tuple[int | None, int | None]


@dataclass(frozen=True)
class Recipe:
    """How a weight is made of stored tensors, which are named by role."""

    scheme: Scheme
    stored: Mapping[str, str]


def recipes(weights: FileWeights, settings: Mapping[str, Any]) -> dict[str, Recipe]:
    """The quantised weights of a model, by the name that they have when they are not quantised.

    Tensors of a small dtype that have no scale are none. UnsupportedError for a layout that is not known.
    """
    found = {}
    for name in weights.names():
        for weight, recipe in _of(weights, name, settings):
            found[weight] = recipe
    return found


def _of(weights: FileWeights, name: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Recipe]]:
    """What the tensor `name` holds the values of, if any."""
    dtype, shape = weights.infos[name].dtype, weights.shape(name)
    module, _, suffix = name.rpartition(".")
    if suffix == "qweight":
        yield f"{module}.weight", _by_layer(weights, module, settings)
    elif suffix == "weight_packed":
        yield f"{module}.weight", _compressed(weights, module)
    elif name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in weights.names():
        weight = name.removesuffix("_blocks")
        yield weight, Recipe(Grid((1, 32), MX_BLOCKS), {"values": name, "scale": f"{weight}_scales"})
    elif dtype in (*_FP8, "U8", "I8") and (suffix == "weight" or len(shape) == 3):
        scales = (f"{name}_scale_inv", f"{name}_scale", f"{module}.scale")
        scale = next((each for each in scales if each in weights.names()), None)
        if scale is not None:
            yield name, _scaled(weights, name, scale, settings)


def _stored(weights: FileWeights, **roles: str) -> dict[str, str]:
    return {role: name for role, name in roles.items() if name in weights.names()}


def _scaled(weights: FileWeights, name: str, scale: str, settings: Mapping[str, Any]) -> Recipe:
    """A weight of small values, with a scale of its own name."""
    module = name.rpartition(".")[0]
    more = {"super": f"{name}_scale_2", "zero": f"{name}_zero_point", "input": f"{module}.pre_quant_scale"}
    stored = {"values": name, "scale": scale, **_stored(weights, **more)}
    values, kind = weights.infos[name].dtype, weights.infos[scale].dtype
    shape, grid = weights.shape(name), weights.shape(scale)
    if values not in _FP8 and kind in _EXPONENTS:
        return Recipe(Grid((1, 32), E2M1), stored)
    if values == "U8" and kind in _FP8:
        return Recipe(Grid((1, 16), E2M1), stored)
    if values == "U8":
        # What such a weight's second scale is for is a format between, of which nothing is left in the result.
        stored.pop("super", None)
        return Recipe(Grid((1, shape[-1] // grid[-1]), INT4), stored)
    if kind in _EXPONENTS and grid == (*shape[:-1], -(-shape[-1] // 32)):
        return Recipe(Grid((1, 32), PLAIN), stored)
    return Recipe(Grid(_block(weights, name, scale, settings), PLAIN), stored)


def _block(weights: FileWeights, name: str, scale: str, settings: Mapping[str, Any]) -> Grids:
    """What one scale stands for: the whole weight, a row, or a block. UnsupportedError where it is none of them."""
    shape, held = weights.shape(name), weights.shape(scale)
    experts = shape[:-2]
    grid = tuple(n for i, n in enumerate(held[len(experts) :]) if not (len(held) == len(experts) + 4 and i in (1, 3)))
    count = 1
    for n in grid:
        count *= n
    if held[: len(experts)] == experts and count == 1 or held in ((), (1,)):
        return None, None
    if grid in ((shape[-2],), (shape[-2], 1)):
        return 1, None
    for rows, columns in (*_sides(settings), (BLOCK, BLOCK)):
        if grid == (-(-shape[-2] // rows), -(-shape[-1] // columns)):
            return rows, columns
    if len(grid) == 2 and not (shape[-2] % grid[0] or shape[-1] % grid[1]):
        return shape[-2] // grid[0], shape[-1] // grid[1]
    what, expected = f"verify does not know what the scales of {name} stand for", f"blocks of {BLOCK} by {BLOCK}"
    raise UnsupportedError(what, path=weights.infos[name].file, tensor=scale, expected=expected, found=list(held))


def _sides(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """The sizes of blocks that a config names."""
    groups = settings.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    stated = [each.get("block_structure") for each in weights if isinstance(each, Mapping)]
    for block in (settings.get("weight_block_size"), *stated):
        match [int(side) for side in block.split("x")] if isinstance(block, str) else block:
            case [int(rows), int(columns)] if rows > 0 and columns > 0:
                yield rows, columns


def _compressed(weights: FileWeights, module: str) -> Recipe:
    """compressed-tensors' packed weights."""
    name = f"{module}.weight"
    roles = {"zero": f"{name}_zero_point", "groups": f"{name}_g_idx", "shape": f"{name}_shape"}
    roles |= {"scale": f"{name}_scale", "super": f"{name}_global_scale"}
    stored = {"values": f"{name}_packed", **_stored(weights, **roles)}
    _require(weights, module, stored)
    if weights.infos[stored["values"]].dtype == "U8":
        exponents = weights.infos[stored["scale"]].dtype in _EXPONENTS
        return Recipe(Grid((1, 32) if exponents else (1, 16), E2M1, divides=True), stored)
    words, scales = weights.shape(stored["values"])[1], weights.shape(stored["scale"])
    columns = int(weights.get(stored["shape"])[1]) if "shape" in stored else words * 8
    bits = next((bits for bits in range(2, 9) if -(-columns * bits // 32) == words), 4)
    groups = scales[1] if len(scales) == 2 else 1
    return Recipe(Packed(bits, None if groups == 1 else columns // groups, columns), stored)


def _by_layer(weights: FileWeights, module: str, settings: Mapping[str, Any]) -> Recipe:
    """GPTQ's or AWQ's packed weights, which differ in the dim along which values are packed."""
    roles = {"scale": "scales", "zero": "qzeros", "groups": "g_idx"}
    named = {role: f"{module}.{suffix}" for role, suffix in roles.items()}
    stored = {"values": f"{module}.qweight", **_stored(weights, **named)}
    _require(weights, module, stored, "zero")
    (rows, columns), (groups, outs) = weights.shape(stored["values"]), weights.shape(stored["scale"])
    if columns != outs:
        if str(settings.get("version", "gemm")).lower() != "gemm" or columns * 8 != outs:
            found = f"version {settings.get('version')}, {columns} words for {outs} outputs"
            what = f"verify does not know how {module}.qweight is packed"
            raise UnsupportedError(what, tensor=f"{module}.qweight", expected="AWQ's gemm", found=found)
        return Recipe(Awq(None if groups == 1 else rows // groups), stored)
    bits = weights.shape(stored["zero"])[1] * 32 // outs
    size = rows * 32 // bits
    return Recipe(Gptq(bits, None if groups == 1 else -(-size // groups), _offset(settings)), stored)


def _offset(settings: Mapping[str, Any]) -> int:
    """What GPTQ's format takes from a zero before it stores it."""
    return 0 if "gptq_v2" in (settings.get("checkpoint_format"), settings.get("format")) else 1


def _require(weights: FileWeights, module: str, stored: Mapping[str, str], *roles: str) -> None:
    for role in ("scale", *roles):
        if role not in stored:
            what, values = f"{module} has packed values, and no {role} for them", stored["values"]
            raise UnsupportedError(what, path=weights.infos[values].file, tensor=values)
