"""The small files beside the weights: what an input has of them, and what a split writes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpshard.formats.split import Split
from tpshard.inputs.checkpoint import Checkpoint
from tpshard.inputs.shard_set import ShardSet
from tpshard.storage.local import Content
from tpshard.storage.names import CONFIG, QUANTISED_KEYS


def small_files(source: Checkpoint | ShardSet) -> dict[str, Content]:
    """The files beside the weights, of Meta's form as they are made of it."""
    made = source.made if isinstance(source, ShardSet) else {}
    return {**made, **source.side_files}


def written_beside(planned: Split, checkpoint: Checkpoint) -> Mapping[str, Content]:
    """The small files that a split of this checkpoint has beside its ranks, without the manifest."""
    return planned.format.side_files(planned, cast_files(checkpoint, planned.model.dtype))


def cast_files(checkpoint: Checkpoint, dtype: str | None) -> dict[str, Content]:
    """A checkpoint's small files, with a config.json that names the dtype to which the weights are cast, if any."""
    small = small_files(checkpoint)
    if dtype is not None and Path(checkpoint.config_path).name == CONFIG:
        config = config_with_dtype(checkpoint.config, dtype)
        small[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    return small


def config_with_dtype(source: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config with the dtype that the weights now have: engines take theirs from it, or from a nested config."""
    config = dict(source)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    for name, inner in config.items():
        if isinstance(inner, dict) and name not in QUANTISED_KEYS:
            config[name] = inner | {k: dtype for k in ("torch_dtype", "dtype") if isinstance(inner.get(k), str)}
    return config
