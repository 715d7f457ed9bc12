"""What is at this path: a set that tpshard wrote, files that Meta published, or a checkpoint of Megatron?"""

from pathlib import Path

from tpshard.errors import UsageError
from tpshard.inputs.shard_set import ShardSet, is_shard_set, open_shards
from tpshard.storage.names import is_megatron, is_meta


def open_set(directory: Path, allow_pickle: bool, vocab_size: int | None = None) -> ShardSet:
    """A set that tpshard wrote, or files that Meta or Megatron wrote.

    vocab_size: of a checkpoint of Megatron, the true size of its vocabulary. UsageError with anything else.
    """
    if not is_shard_set(directory) and is_megatron(directory):
        from tpshard.inputs.megatron import open_megatron

        return open_megatron(directory, vocab_size)
    if vocab_size is not None:
        hint = "leave it out: tpshard's own sets say how large their vocabulary is"
        raise UsageError("--vocab-size is for checkpoints of Megatron", path=directory, hint=hint)
    if not is_shard_set(directory) and is_meta(directory):
        from tpshard.inputs.meta import open_meta

        return open_meta(directory, allow_pickle)
    return open_shards(directory)
