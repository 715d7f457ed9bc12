"""Which modules of a checkpoint are quantised: what its config names, held against the tensors that are there.

The tensors decide: a module is quantised as its companions say. The config gives the method, which must be a known
one, and what no shape tells: the sizes of groups and blocks, and whether groups are in order.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.rules.quantisation.schemes import COMPUTED, QUANTISED, Companion, ratio_of, split_name
from tpshard.storage.safetensors import DTYPE_BITS, TensorInfo


@dataclass(frozen=True)
class Quantisation:
    """What is quantised in a checkpoint, and how.

    method: as the config names it, "" where nothing is. companions: of quantised modules by tensor name, biases not
    among them. schemes: the number of modules by scheme. cache: the dtype of keys and values that the config declares.
    scattered: whether rows of a weight have their groups in any order, so that no rank can do without one of them.
    """

    method: str = ""
    companions: Mapping[str, Companion] = field(default_factory=dict)
    schemes: Mapping[str, int] = field(default_factory=dict)
    cache: str | None = None
    scattered: bool = False

    def to_json(self) -> dict[str, Any]:
        """What the manifest says of it; nothing where nothing is quantised."""
        if not self.companions:
            return {}
        kept = sorted({suffix for _, suffix in map(split_name, self.companions)} & _OF_WHOLE)
        return {"method": self.method, "modules": dict(self.schemes), "kv_cache": self.cache, "of_whole": kept}


_OF_WHOLE = {"g_idx", "weight_g_idx", "weight_shape"}
"""Companions whose numbers count rows, groups or features of the unsharded weight, in the ranks' files as well."""
_Stored = Mapping[str, TensorInfo]
"""The tensors of one module by suffix; the weight of stacked experts has none."""
_METHODS = {
    "fp8": "fp8",
    "fbgemm_fp8": "fbgemm_fp8",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "modelopt",
    "modelopt_fp4": "modelopt",
    "modelopt_mixed": "modelopt",
    "gptq": "gptq",
    "awq": "awq",
    "auto-round": "auto-round",
    "intel/auto-round": "auto-round",
    "mxfp4": "mxfp4",
    "quark": "quark",
}
_FLAT = "its values are packed over the rows of the flat tensor"
_OWN = "its files hold the tool's own objects, not tensors with documented axes"
_CODES = "its values are codes of codebooks that rows share"
_REFUSED = {
    **dict.fromkeys(("bitsandbytes", "bitsandbytes_8bit", "bitsandbytes_4bit"), _FLAT),
    **dict.fromkeys(("torchao", "quanto", "hqq", "eetq"), _OWN),
    **dict.fromkeys(("aqlm", "quip", "quip#", "spqr", "vptq", "higgs"), _CODES),
    "gguf": "its blocks are those of a container of its own",
}
_SIZE_KEYS = ("group_size", "q_group_size", "weight_block_size", "block_structure", "block_size", "awq_block_size")
_BIT_KEYS = ("bits", "num_bits", "w_bit")
_WITHOUT = "split the checkpoint that it was made from"
_QUARK = ("fp8_e4m3 per_tensor", "fp8_e4m3 per_channel", "int8 per_tensor", "int8 per_channel", "fp4 per_group")
"""Quark's weights that lie as other tools' do: its groups of integers turn the matrix, its 6 bits cross bytes."""


def recognise(declared: Mapping[str, Any] | None, tensors: Iterable[TensorInfo], path: object) -> Quantisation:
    """The quantisation of a checkpoint. declared: what its config, or a file beside it, says of it; None for nothing.

    UnsupportedError for a method that is not known, CorruptError where tensors and config, or values and scales, do not
    belong together.
    """
    method = "" if declared is None else _method(declared, path)
    declared = declared or {}
    scattered = "True" in map(str, _values(declared, ("desc_act",)))
    sizes = tuple(sorted({size for value in _values(declared, _SIZE_KEYS) for size in _numbers(value) if size > 1}))
    said = {number for value in _values(declared, _BIT_KEYS) for number in _numbers(value) if 2 <= number <= 8}
    bits = (*sorted(said), *(number for number in range(2, 9) if number not in said))
    companions: dict[str, Companion] = {}
    schemes: Counter[str] = Counter()
    known: dict[object, tuple[str | None, dict[str, Companion]]] = {}  # layers are alike
    for module, stored in _modules(tensors).items():
        key = tuple((suffix, info.dtype, info.shape) for suffix, info in stored.items())
        if key not in known:
            known[key] = _judged(module, stored, sizes, bits, scattered)
        scheme, rows = known[key]
        companions.update((stored[suffix].name, row) for suffix, row in rows.items())
        if scheme is not None:
            schemes[scheme] += 1
    if bool(method) != bool(companions):
        says = f"the checkpoint says that it is quantised by {method}" if method else "no config names a quantisation"
        what = f"{says}, and {'no tensor is' if method else f'{next(iter(companions))} is quantised'}"
        hint = "are config and weights of the same model? A config without the entry is that of unquantised weights"
        expected = "weights of 8 bits and fewer, with their scales" if method else "a quantization_config"
        found = "plain weights only" if method else "no quantization_config"
        raise CorruptError(what, path=path, expected=expected, found=found, hint=hint)
    return Quantisation(method, companions, dict(schemes), _cache(declared), scattered)


def _judged(
    module: str, stored: _Stored, sizes: tuple[int, ...], bits: tuple[int, ...], scattered: bool
) -> tuple[str | None, dict[str, Companion]]:
    """The scheme of a module and what its tensors are to it, by suffix; no scheme where only its outputs have one."""
    values = _pair(module, stored)
    if values is None:
        return None, {s: QUANTISED[s] for s in stored if s not in ("weight", "scale") and s in QUANTISED}
    apart = "weight_g_idx" in stored or (scattered and "g_idx" in stored)
    rows = {
        suffix: _companion(suffix or "weight", _sizes(info, stored, sizes), bits, apart)
        for suffix, info in stored.items()
        if suffix != "bias"
    }
    for suffix, row in rows.items():
        _check_experts(values, stored[suffix], row)
    _check_shapes(stored, rows)
    return _scheme(values, stored), rows


def _method(declared: Mapping[str, Any], path: object) -> str:
    """The method by its name; UnsupportedError where the cut of its tensors is not known."""
    named = declared.get("quant_method")
    if named is None and (declared.get("load_in_8bit") or declared.get("load_in_4bit")):
        named = "bitsandbytes"
    key = str(named).lower()
    reason = _REFUSED.get(key)
    if key not in _METHODS and reason is None:
        reason = "which tensors it stores is not known here"
    version = str(declared.get("version") or "gemm").lower()
    if key == "awq" and version not in ("gemm", "gemv_none"):
        named, reason = f"awq {version}", "only AWQ's gemm layout is cut"
    form = str(declared.get("checkpoint_format") or "gptq")
    if key == "gptq" and (form not in ("gptq", "gptq_v2") or declared.get("is_marlin_format")):
        named, reason = f"gptq {form}", "only GPTQ's own layouts are cut, not those of a kernel"
    if key == "quark" and (strange := next((f for f in _quark_forms(declared) if f not in _QUARK), None)):
        named, reason = f"quark {strange}", f"of its weights {', '.join(_QUARK[:-1])} and {_QUARK[-1]} are cut"
    if reason is not None:
        what = f"the checkpoint is quantised by {named}: {reason}"
        known = ", ".join(dict.fromkeys(_METHODS.values()))
        raise UnsupportedError(what, path=path, expected=known, found=f"quant_method {named}", hint=_WITHOUT)
    return _METHODS[key]


def _quark_forms(declared: Mapping[str, Any]) -> Iterator[str]:
    """What Quark's config says of each kind of weight: number format and what has a scale of its own."""
    for spec in _values(declared, ("weight",)):
        if isinstance(spec, dict):
            groups = (spec.get("group_size"), spec.get("scale_format"))
            usual = {"per_channel": spec.get("ch_axis") == 0, "per_group": groups == (32, "e8m0")}
            form = f"{spec.get('dtype')} {spec.get('qscheme')}"
            yield form if usual.get(str(spec.get("qscheme")), True) else f"{form} of another axis, size or scale"
        elif spec is not None:
            yield "in two stages"


def _values(data: Any, keys: Iterable[str]) -> Iterator[Any]:
    """The values of these keys, wherever they are in a config."""
    if isinstance(data, dict):
        for key, value in data.items():
            if key in keys:
                yield value
            yield from _values(value, keys)
    elif isinstance(data, list):
        for value in data:
            yield from _values(value, keys)


def _numbers(value: Any) -> Iterator[int]:
    """The whole numbers in the size of a group or block: `128`, `[128, 128]`, `"128x128"`."""
    if isinstance(value, str):
        value = [int(part) for part in value.split("x") if part.isdecimal()]
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and not isinstance(number, bool):
            yield number


def _cache(declared: Mapping[str, Any]) -> str | None:
    scheme = next((v for v in _values(declared, ("kv_cache_scheme",)) if isinstance(v, dict)), {})
    algorithms = [str(value).upper() for value in _values(declared, ("kv_cache_quant_algo",))]
    eight = (scheme.get("num_bits"), scheme.get("type")) == (8, "float") or "FP8" in algorithms
    return "F8_E4M3" if eight else None


def _modules(tensors: Iterable[TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The modules of which anything is quantised. A bias or a plain weight is listed where it stands beside that."""
    tensors = tuple(tensors)
    found: dict[str, dict[str, TensorInfo]] = {}
    for info in tensors:
        module, suffix = split_name(info.name)
        if _is_values(suffix, info) or (suffix in QUANTISED and suffix not in ("weight", "scale")):
            found.setdefault(module, {})[suffix] = info
    for info in tensors if found else ():
        module, suffix = split_name(info.name)
        if module in found and suffix in ("weight", "bias", "scale", ""):
            found[module].setdefault(suffix, info)
    return found


def _is_values(suffix: str, info: TensorInfo) -> bool:
    """Whether a tensor is a weight with values that nothing computes with as they are."""
    if suffix not in ("weight", "") or info.dtype in COMPUTED:
        return suffix in QUANTISED and QUANTISED[suffix].role == "values" and suffix != "weight"
    numbers = info.dtype not in ("BOOL", "C64") and (suffix == "weight" or DTYPE_BITS[info.dtype] <= 8)
    return len(info.shape) > 1 and numbers


_USUAL = 128
"""The size of groups and blocks where a tool that has no other does not say it."""
_SCALES = {
    "weight": ("weight_scale_inv", "weight_scale", "scale", "qscale_weight"),
    "": ("scale_inv", "block_scales"),
    "weight_packed": ("weight_scale",),
    "qweight": ("scales",),
    "blocks": ("block_scales",),
}
"""What holds the scales of values, by their suffix."""


def _pair(module: str, stored: _Stored) -> TensorInfo | None:
    """The values of a module; None where only its outputs are quantised. CorruptError for values without scales."""
    values = [suffix for suffix, info in stored.items() if _is_values(suffix, info)]
    if not values:
        rest = [suffix for suffix in stored if suffix != "weight" and suffix in QUANTISED]
        for suffix in sorted(rest, key=lambda suffix: QUANTISED[suffix].role != "scale"):
            if not suffix.startswith(("q_", "k_", "v_", "output_")):
                plain = stored.get("weight", stored.get(""))
                what = f"{stored[suffix].name} is there without a quantised weight"
                expected = f"{plain.name if plain else module + '.weight'} in a dtype of 8 bits or packed"
                found = f"{plain.name} of dtype {plain.dtype}" if plain else "no weight"
                name = stored[suffix].name
                raise CorruptError(what, path=stored[suffix].file, tensor=name, expected=expected, found=found)
        return None
    if len(values) > 1:
        what = f"{module} stores its weight {len(values)} times"
        raise CorruptError(what, tensor=module, expected="one of them", found=", ".join(stored[v].name for v in values))
    info = stored[values[0]]
    scales = [suffix for suffix in _SCALES[values[0]] if suffix in stored]
    needed = {suffix: suffix in stored for suffix in _needed(info, [stored[suffix] for suffix in scales])}
    if not scales or not all(needed.values()):
        lacking = next((suffix for suffix, there in needed.items() if not there), _SCALES[values[0]][0])
        joint = "_" if values[0] in ("", "blocks") else "."
        missing = f"{module}{joint}{'scales' if lacking == 'block_scales' else lacking}"
        what = f"{info.name} is quantised, and its scale {missing} is not there"
        hint = "is the checkpoint complete?"
        raise CorruptError(what, path=info.file, tensor=info.name, expected=missing, found=info.dtype, hint=hint)
    return info


_PLAIN = Companion(())


def _needed(values: TensorInfo, scales: list[TensorInfo]) -> tuple[str, ...]:
    """The second scale that 4-bit floats have whose blocks' scales are FP8."""
    if values.dtype == "U8" and any(scale.dtype == "F8_E4M3" for scale in scales):
        return ("weight_global_scale",) if values.name.endswith("_packed") else ("weight_scale_2",)
    return ()


@lru_cache(maxsize=256)
def _companion(suffix: str, sizes: tuple[int, ...], bits: tuple[int, ...], apart: bool) -> Companion:
    """A row of the table for one module. apart: scales of groups that are in no order have no input feature."""
    row = replace(QUANTISED[suffix], bits=bits)
    if "scale" in row.ratio.values():
        row = replace(row, sizes=sizes)
    if apart and row.ratio.get("in") == "scale":
        return replace(row, forms=tuple(tuple("group" if a == "in" else a for a in form) for form in row.forms))
    return row


def _sizes(info: TensorInfo, stored: _Stored, declared: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of a companion's groups: those of its number format where that has but one, else the declared ones."""
    if len(info.shape) < 2:
        return ()
    values = next(info for suffix, info in stored.items() if _is_values(suffix, info))
    if "blocks" in stored or info.dtype == "U8" or (info.dtype == "F8_E8M0" and values.dtype in ("U8", "I8")):
        return (32,)
    if info.dtype == "F8_E4M3" and values.dtype == "U8":
        return (16,)
    if declared or len(info.shape) != 4:
        return declared or ((_USUAL,) if values.dtype == "U8" else ())
    # ModelOpt's FP8_PB_WO does not say the size of its blocks; [out / block, 1, in / block, 1] does.
    pairs = zip(values.shape, info.shape[::2], strict=False)
    return (_USUAL, *sorted({size // blocks for size, blocks in pairs if blocks and size % blocks == 0}))


def _scheme(values: TensorInfo, stored: _Stored) -> str:
    """What a module's quantisation is called."""
    scales = next(info for suffix, info in stored.items() if QUANTISED.get(suffix, _PLAIN).role == "scale")
    if "qweight" in stored:
        return "AWQ" if values.shape[1:] != scales.shape[1:] else "GPTQ"
    if values.dtype == "I32":
        return "packed INT"
    if values.dtype == "U8" and scales.dtype == "F8_E4M3":
        return "NVFP4"
    if values.dtype in ("U8", "I8") and scales.dtype in ("U8", "F8_E8M0"):
        return "MXFP4"
    if values.dtype == "U8":
        return "packed INT"
    if scales.dtype == "U8":
        return "MXFP8"
    name = "INT8" if values.dtype == "I8" else "FP8"
    if any("scale_inv" in suffix for suffix in stored):
        return f"{name} in blocks"
    if all(size == 1 for size in scales.shape[-2:]):
        return f"{name} per tensor"
    rows = scales.shape[-2] if len(scales.shape) > 1 else scales.shape[0]
    return f"{name} per channel" if rows == values.shape[-2] else f"{name} in blocks"


def _check_experts(values: TensorInfo, info: TensorInfo, row: Companion) -> None:
    """CorruptError for a scale of stacked experts beside a weight that is not, or for another number of them."""
    axes = row.axes(len(info.shape))
    if axes is None or "expert" not in axes:
        return
    stacked = len(values.shape) > 2
    if not stacked or info.shape[0] != values.shape[0]:
        what, found = f"{info.name} does not fit {values.name}", f"shapes {list(info.shape)} and {list(values.shape)}"
        expected = f"{values.shape[0]} experts" if stacked else "as many dims as the weight has"
        raise CorruptError(what, path=info.file, tensor=info.name, expected=expected, found=found)


def _check_shapes(stored: _Stored, companions: Mapping[str, Companion]) -> None:
    """CorruptError where a scale is not of the shape that the module's values have."""
    known: dict[str, tuple[int, str]] = {}
    places = []
    for suffix, row in companions.items():
        info = stored[suffix]
        axes = row.axes(len(info.shape))
        if row.whole or axes is None or "expert" in axes or (len(axes) == 1 and row.role == "scale"):
            continue
        for axis, size in zip(axes, info.shape, strict=True):
            if (kind := row.ratio.get(axis)) is None or (kind == "packed" and info.dtype.startswith("F")):
                known.setdefault(axis, (size, info.name))
            places.append((info, row, axis, size))
    for info, row, axis, size in places:
        count, of = known.get(axis, (0, ""))
        if of and ratio_of(row, axis, info.dtype, count, size) is None:
            units = f", in groups or blocks of {' or '.join(map(str, row.sizes))}" if row.sizes else ""
            what, expected = f"{info.name} does not fit {of}", f"a shape for {count} {axis} features{units}"
            found = f"shape {list(info.shape)}"
            raise CorruptError(what, path=info.file, tensor=info.name, expected=expected, found=found)
