"""`check` of what Megatron itself wrote: every byte that its files have of a model, against the model."""

from tpshard.formats.plan import plan_split
from tpshard.formats.split import Options, RankLayouts, Split
from tpshard.inputs.shard_set import ShardSet
from tpshard.planning.layout import StoredTensor
from tpshard.planning.model import Model
from tpshard.report.results import Difference


def as_found(shards: ShardSet, model: Model) -> tuple[Split, list[Difference]]:
    """What the files' one rank must hold of a model, and what of it they do not have, or have otherwise.

    What Megatron has no place for is not missing. Padding is not said: whoever wrote it has put there what he liked.
    """
    names = {model.full_name(tensor.name): tensor for tensor in model.tensors}
    held = {shards.model.full_name(tensor.name): tensor for tensor in shards.model.tensors}
    dropped = plan_split(model, Options(1, format="megatron")).layouts.dropped
    differences = []
    for full_name, tensor in names.items():
        if tensor.name in dropped:
            continue
        if (found := held.get(full_name)) is None:
            differences.append(Difference("rank 0", tensor.name, "the tensor is not there"))
        elif (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
            has = f"expected {tensor.dtype} {list(tensor.shape)}, found {found.dtype} {list(found.shape)}"
            differences.append(Difference("rank 0", tensor.name, has))
    for full_name in held.keys() - names.keys():
        differences.append(Difference("rank 0", full_name, "the source has no such tensor"))
    layout = () if differences else _named(shards, model)
    return Split(model, shards.options, shards.split.format, RankLayouts((layout,), None, dropped)), differences


def _named(shards: ShardSet, model: Model) -> tuple[StoredTensor, ...]:
    """The stored tensors, with the names that the model's file has for what they are made of."""
    names = {model.full_name(tensor.name): tensor.name for tensor in model.tensors}

    found = []
    for stored in shards.layout[0]:
        parts = (part._replace(tensor=names[shards.model.full_name(part.tensor)]) for part in stored.parts)
        found.append(stored._replace(parts=tuple(parts)))
    return tuple(found)
