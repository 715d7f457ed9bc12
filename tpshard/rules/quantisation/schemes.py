"""The stored tensors of a module: the one table of what the suffix of a tensor's name means.

A rule cuts a module along one feature axis, by one list of boundaries. Each tensor that the module stores is a
companion: it says which axes its dims are, and how many elements of an axis one of its own elements stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fractions import Fraction

AXES = ("out", "in", "expert", "kernel")
"""What a dim can be. An embedding's `out` is the vocab; `expert` counts the experts of a stacked tensor; `kernel` are
the places of a convolution. Quantised companions have dims that are no axis and never cut: `one`, `byte`, `group`."""

Role = Literal["plain", "values", "scale", "other"]
"""What a companion is to a quantised module: its packed or narrow weight, what that cannot be read without, or more."""


@dataclass(frozen=True, slots=True)
class Companion:
    """A tensor that a module stores.

    forms: the axes of its dims, one form for each number of dims that it may have. A tensor with another number of dims
    has no known axes and can only be replicated, unless the architecture file gives its dims.
    ratio: by axis, how the elements of the axis for one stored element are found (see `ratio_of`); an axis that is not
    named has one for one.
    sizes: of its groups or blocks, one of which each of its scales is for. bits: of its packed values, by preference.
    whole: replicated whatever its dims are. turns: its dims are in the order of an unquantised weight's, where an
    architecture file gives that.
    """

    forms: tuple[tuple[str, ...], ...]
    ratio: Mapping[str, str] = field(default_factory=dict)
    role: Role = "plain"
    sizes: tuple[int, ...] = ()
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    whole: bool = False
    turns: bool = False

    def axes(self, ndim: int) -> tuple[str, ...] | None:
        """The axes of the dims, None where they are not known.

        >>> PLAIN["weight"].axes(2)
        ('out', 'in')
        """
        return next((form for form in self.forms if len(form) == ndim), None)

    def has(self, *axes: str) -> bool:
        """Whether all of `axes` are among its dims, in one form or another."""
        return set(axes) <= {axis for form in self.forms for axis in form}


Scheme = Mapping[str, Companion]
"""The companions of a module by suffix."""

PLAIN: Scheme = {"weight": Companion((("out",), ("out", "in"))), "bias": Companion((("out",),))}
"""Modules that are not quantised. `nn.Linear` and `nn.Embedding` store `[out, in]`; a norm's weight is `[out]`."""

_MATRIX = (("out", "in"), ("expert", "out", "in"))
_GRID = ((), ("out",), *_MATRIX, ("out", "one", "in", "one"))
_SCALE = Companion(_GRID, {"out": "scale", "in": "scale"}, "scale", turns=True)
_WHOLE = Companion((), role="other", whole=True)
_HEAD = Companion(((), ("out",), ("out", "one"), ("out", "one", "one")), {"out": "head"}, "other")
_PACKED = {"out": "packed", "in": "packed"}
_ROWS = (("in", "out"),)

QUANTISED: Scheme = {
    "weight": Companion(_MATRIX, _PACKED, "values", turns=True),
    "weight_packed": Companion(_MATRIX, {"in": "packed"}, "values"),
    "qweight": Companion(_ROWS, _PACKED, "values"),
    "blocks": Companion((("expert", "out", "in", "byte"),), {"in": "scale"}, "values"),
    "weight_scale": _SCALE,
    "weight_scale_inv": _SCALE,
    "scale": _SCALE,
    "scale_inv": _SCALE,
    "qscale_weight": _SCALE,
    "scales": Companion(_ROWS, {"in": "scale"}, "scale"),
    "block_scales": Companion((("expert", "out", "in"),), {"in": "scale"}, "scale"),
    "qzeros": Companion(_ROWS, {"in": "scale", "out": "packed"}, "other"),
    "weight_zero_point": Companion(_GRID, {"in": "scale", "out": "zeros"}, "other"),
    "g_idx": Companion((("in",),), role="other"),
    "weight_g_idx": Companion((("in",),), role="other"),
    "pre_quant_scale": Companion((("in",),), role="other"),
    **dict.fromkeys(
        "weight_scale_2 weight_global_scale weight_shape input_scale input_scale_ub input_global_scale "
        "input_zero_point activation_scale output_scale qscale_act".split(),
        _WHOLE,
    ),
    **dict.fromkeys((f"{x}_{what}" for x in "qkv" for what in ("scale", "zero_point")), _HEAD),
}
"""What quantised modules store beside a bias: `weight` where its dtype is not one to compute with."""

_JOINED = {"blocks": "blocks", "scales": "block_scales", "scale_inv": "scale_inv", "activation_scale": "input_scale"}
"""Suffixes of stacked experts, whose weights have none: `experts.down_proj_blocks`; their rows in the table."""
_CACHE = {"q": ("q_proj",), "k": ("k_proj", "kv_b_proj"), "v": ("v_proj", "kv_b_proj")}
"""Modules for whose output a scale of the KV cache holds, where it is stored beside them: `self_attn.k_scale`."""
_CACHE_FUSED = ("qkv_proj", "query_key_value", "o_proj")

SUFFIXES = PLAIN.keys()
"""What may follow a module's name in the name of a tensor that is not quantised."""
COMPUTED = ("F64", "F32", "F16", "BF16")
"""The dtypes of weights that are not quantised."""


def split_name(name: str) -> tuple[str, str]:
    """A tensor's module and suffix; the suffix is empty for a parameter that has none, which is a module of its own.

    >>> split_name("mlp.up_proj.weight"), split_name("mixer.A_log")
    (('mlp.up_proj', 'weight'), ('mixer.A_log', ''))
    >>> split_name("mlp.up_proj.weight_scale"), split_name("experts.down_proj_scales")
    (('mlp.up_proj', 'weight_scale'), ('experts.down_proj', 'block_scales'))
    """
    module, _, suffix = name.rpartition(".")
    if module and (suffix in SUFFIXES or suffix in QUANTISED):
        return module, suffix
    for end, row in _JOINED.items():
        if suffix.endswith(f"_{end}"):
            return name.removesuffix(f"_{end}"), row
    return name, ""


def stand_ins(name: str) -> Iterator[str]:
    """The names by which the rules may know the module of a quantised companion, which they do not name itself.

    >>> list(stand_ins("mlp.up_proj.weight_scale")), next(stand_ins("self_attn.k_scale"))
    (['mlp.up_proj.weight', 'mlp.up_proj'], 'self_attn.k_scale.weight')
    """
    module, suffix = split_name(name)
    if suffix in QUANTISED:
        yield from (f"{module}.weight", module)
    if suffix and QUANTISED.get(suffix) is _HEAD:
        yield from (f"{module}.{part}.weight" for part in (*_CACHE[suffix[0]], *_CACHE_FUSED))


def companion_of(name: str) -> Companion:
    """What a tensor of a module that is not quantised is to it, by its name.

    A parameter without a suffix is stored as a weight is, or as what its name ends with: `experts.down_proj_bias`.
    """
    ending = name.rpartition(".")[2]
    return next((PLAIN[suffix] for suffix in SUFFIXES if f"_{ending}".endswith(f"_{suffix}")), PLAIN["weight"])


WHOLE = 0
"""In place of a ratio: one element for the whole axis."""


def ratio_of(
    companion: Companion, axis: str, dtype: str, expected: int, found: int, unit: int = 0
) -> int | Fraction | None:
    """The ratio at which `expected` elements of an axis are `found` stored ones; WHOLE, or None where there is none.

    How it is found is said in `Companion.ratio`. packed: values in 32-bit words, 2 to 8 bits each, or two in a byte.
    scale: groups or blocks of one of the sizes. zeros: packed where they lie in words, else as scales. head: units of
    the axis.

    >>> ratio_of(QUANTISED["qweight"], "in", "I32", 4096, 512)
    8
    """
    kind = companion.ratio.get(axis)
    ratios: list[int | Fraction] = [1]
    if kind in ("packed", "zeros") and dtype == "I32":
        from fractions import Fraction  # and decimal with it: only for those who pack words

        ratios = [1, *(32 // bits if 32 % bits == 0 else Fraction(32, bits) for bits in companion.bits)]
    elif kind == "packed" and dtype in ("U8", "I8"):
        ratios = [1, 2]
    elif kind in ("scale", "zeros"):
        ratios = [1, *companion.sizes, WHOLE]
    elif kind == "head":
        ratios = [unit, WHOLE]
    fitting = (ratio for ratio in ratios if (found == 1 if ratio == WHOLE else -(-expected // ratio) == found))
    return next(fitting, None)
