"""A model as planning sees it: logical tensors with their cuts, the axes, and where it came from.

A checkpoint and a shard set both give one, so split and reshard differ in nothing but where the bytes are read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tpshard.inputs.checkpoint import Checkpoint, source_digest
from tpshard.errors import UnsupportedError
from tpshard.planning.layout import LogicalTensor, whole
from tpshard.rules.multimodal import find_subject
from tpshard.planning.join import Placed, alignment_order
from tpshard.rules.classify import Axis

CASTABLE = ("F64", "F32", "F16", "BF16")
"""Dtypes that `--dtype` casts from and to; everything else (integers, FP8) travels untouched."""
DTYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The names that config.json and `--dtype` use."""


@dataclass(frozen=True)
class Model:
    """tensors: in file order, with the dtype that the output has. file_of: the source's weight file of each.

    source, architecture: what the manifest says of them (plain JSON). tied: module → module. config: of the model.
    full_names: of tensors whose name in the source lacks the architecture's prefix.
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

    def full_name(self, name: str) -> str:
        """A tensor's name as the architecture's rules have it."""
        return self.full_names.get(name, name)

    def without(self, names: Collection[str]) -> Model:
        """The model without some tensors."""
        if not names:
            return self
        return replace(self, tensors=tuple(tensor for tensor in self.tensors if tensor.name not in names))


def from_checkpoint(checkpoint: Checkpoint, rules: Path | None = None, dtype: str | None = None) -> Model:
    """Classify a checkpoint's tensors. dtype: a name of DTYPE_NAMES to cast to, buffers excepted."""
    subject = find_subject(checkpoint.config, rules, checkpoint.config_path)
    classified, text = subject.classify(checkpoint.tensors)
    logical = []
    for info in checkpoint.tensors:
        cut = classified.cuts[info.name]
        cast = DTYPE_NAMES[dtype] if dtype and info.dtype in CASTABLE and cut.kind != "buffer" else info.dtype
        logical.append(LogicalTensor(info.name, cast, info.shape, cut))
    files = []
    for file in checkpoint.files:
        files.append({"name": file.name, "size": file.size, **({"sha256": file.sha256} if file.sha256 else {})})
    return Model(
        tensors=tuple(alignment_order(logical)),
        axes=classified.axes,
        tied=classified.tied,
        file_of=checkpoint.file_of,
        source={
            "name": checkpoint.name,
            "repo_id": checkpoint.repo_id,
            "revision": checkpoint.revision,
            "headers_sha256": source_digest(checkpoint.files),
            "files": files,
        },
        architecture={
            "model_type": checkpoint.config.get("model_type"),
            "rules": subject.architecture.name,
            "rules_sha256": subject.architecture.digest,
            **({"text": text} if text else {}),
        },
        dtype=dtype,
        full_names=classified.full_names,
        config=checkpoint.config,
    )


def placed_in(checkpoint: Checkpoint, model: Model) -> list[Placed]:
    """Where each logical tensor lies in the checkpoint's files, whole and in its own dtype."""
    infos = {info.name: info for info in checkpoint.tensors}
    placed = []
    for tensor in model.tensors:
        info = infos[tensor.name]
        placed.append(Placed(whole(replace(tensor, dtype=info.dtype)), info.file, info.begin))
    return placed


def check_dtype(dtype: str | None) -> None:
    """UnsupportedError for a dtype name that `--dtype` does not know."""
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UnsupportedError(f"cannot cast to {dtype}", expected=", ".join(DTYPE_NAMES), found=dtype)
