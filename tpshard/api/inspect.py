"""`inspect`: what a path is."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tpshard.errors import UsageError
from tpshard.report.results import InspectReport
from tpshard.storage.local import read_header
from tpshard.storage.names import is_megatron
from tpshard.storage.safetensors import element_count


def inspect(path: str | Path, *, follow_symlinks: bool = False) -> InspectReport:
    """What is this? A checkpoint, a shard set, or one safetensors file: kind, sizes and every tensor.

    UsageError for a path that is not there, CorruptError for a damaged file.
    """
    from tpshard.inputs.checkpoint import open_checkpoint
    from tpshard.inputs.shard_set import is_shard_set, open_shards
    from tpshard.rules.quantisation.recognise import recognise

    path = Path(path)
    if not path.exists():
        raise UsageError("no such file or directory", path=path)
    if path.is_file():
        header, size = read_header(path), path.stat().st_size
        facts: dict[str, Any] = {"bytes": size, "metadata": header.metadata, "header_bytes": header.data_begin}
        return InspectReport("file", path, facts, header.tensors)
    if is_shard_set(path):
        shards = open_shards(path)
        tensors = tuple(info for rank in sorted(shards.files) for file in shards.files[rank] for info in file.tensors)
        facts = {
            "model_type": shards.model.architecture["model_type"],
            "mesh": asdict(shards.mesh),
            "set": shards.manifest["set"],
            "source": dict(shards.model.source),
            "bytes": sum(file.size for files in shards.files.values() for file in files),
            "missing_ranks": shards.missing(),
            **_quantised(shards.model.quantisation),
        }
        return InspectReport("shards", path, facts, tensors)
    if is_megatron(path):
        return _megatron(path)
    checkpoint = open_checkpoint(path, follow_symlinks=follow_symlinks)
    facts = {
        "model_type": checkpoint.config.get("model_type"),
        "repo_id": checkpoint.repo_id,
        "revision": checkpoint.revision,
        "bytes": sum(file.size for file in checkpoint.files),
        "parameters": sum(element_count(info.shape) for info in checkpoint.tensors),
        "files": [{"name": file.name, "size": file.size} for file in checkpoint.files],
        "warnings": list(checkpoint.warnings),
        **_quantised(recognise(checkpoint.quantisation, checkpoint.tensors, checkpoint.config_path).to_json()),
    }
    return InspectReport("checkpoint", path, facts, checkpoint.tensors)


def _megatron(path: Path) -> InspectReport:
    """What Megatron wrote, with every rectangle of its tensors as it is stored."""
    from tpshard.inputs.megatron import open_megatron

    shards = open_megatron(path)
    files = shards.files[0]
    facts: dict[str, Any] = {
        "model_type": shards.model.architecture["model_type"],
        "repo_id": None,
        "revision": None,
        "bytes": sum(file.size for file in files),
        "parameters": sum(element_count(tensor.shape) for tensor in shards.model.tensors),
        "files": [{"name": shards.name_of(file), "size": file.size} for file in files],
        "warnings": [],
    }
    return InspectReport("checkpoint", path, facts, tuple(info for file in files for info in file.tensors))


def _quantised(quantisation: Mapping[str, Any]) -> dict[str, Any]:
    return {"quantisation": dict(quantisation)} if quantisation else {}
