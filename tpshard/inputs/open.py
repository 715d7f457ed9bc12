"""What is at this path: a set that tpshard wrote, or files that Meta published?"""

from pathlib import Path

from tpshard.inputs.shard_set import ShardSet, is_shard_set, open_shards
from tpshard.storage.names import is_meta


def open_set(directory: Path, allow_pickle: bool) -> ShardSet:
    """A set that tpshard wrote, or files that Meta published."""
    if not is_shard_set(directory) and is_meta(directory):
        from tpshard.inputs.meta import open_meta

        return open_meta(directory, allow_pickle)
    return open_shards(directory)
