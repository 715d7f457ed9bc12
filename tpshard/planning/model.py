"""A model as planning sees it: logical tensors with their cuts, the axes, and where it came from.

A checkpoint and a shard set both give one, so split and reshard differ in nothing but where the bytes are read.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from tpshard.errors import UnsupportedError
from tpshard.planning.axes import Axis
from tpshard.planning.experts import Experts
from tpshard.planning.layout import LogicalTensor
from tpshard.planning.stages import Layers, Stages, stages

CASTABLE = ("F64", "F32", "F16", "BF16")
"""Dtypes that `--dtype` casts from and to; everything else (integers, FP8) travels untouched."""
DTYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The names that config.json and `--dtype` use."""
DTYPE_ALIASES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What `--dtype` also takes."""


@dataclass(frozen=True)
class Model:
    """tensors: in file order, with the dtype that the output has. file_of: the source's weight file of each.

    source, architecture: what the manifest says of them (plain JSON). tied: module → module.
    cast_all: whether `dtype` is also that of the tensors which are float32 on purpose.
    config: of the model. text_config: of its decoder, where the model nests one.
    full_names: of tensors whose name in the source lacks the architecture's prefix.
    quantisation: what the manifest says of it (plain JSON); empty where nothing is quantised.
    notes: what the user should know of it. layers: where its tensors stand in a pipeline; None where nobody says.
    experts: its routed experts, if it has any.
    """

    tensors: tuple[LogicalTensor, ...]
    axes: Mapping[str, Axis]
    tied: Mapping[str, str]
    file_of: Mapping[str, str]
    source: Mapping[str, Any]
    architecture: Mapping[str, Any]
    dtype: str | None = None
    full_names: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] | None = None
    quantisation: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cast_all: bool = False
    layers: Layers | None = None
    experts: Experts | None = None

    def full_name(self, name: str) -> str:
        """A tensor's name as the architecture's rules have it."""
        return self.full_names.get(name, name)

    def complete_name(self, name: str) -> str:
        """A tensor's name with the base prefix that it may lack; in a model with more than text, the source's own."""
        full = self.full_name(name)
        return full if full.endswith(name) else name

    def stages(self, pp: int, given: Sequence[int] | None) -> Stages:
        """The stages of a pipeline. given: how many layers each has. The last has the embedding of a tied head too."""
        stored = {
            each.rpartition(".")[0] for tensor in self.tensors for each in (tensor.name, self.full_name(tensor.name))
        }
        return stages(self.layers, pp, given, [to for head, to in self.tied.items() if head not in stored])

    def without(self, names: Collection[str]) -> Self:
        """The model without some tensors."""
        if not names:
            return self
        return replace(self, tensors=tuple(tensor for tensor in self.tensors if tensor.name not in names))


def check_dtype(dtype: str | None) -> None:
    """UnsupportedError for a dtype name that `--dtype` does not know."""
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UnsupportedError(f"cannot cast to {dtype}", expected=", ".join(DTYPE_NAMES), found=dtype)
