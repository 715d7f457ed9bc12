"""Open an unsharded checkpoint: a directory, one file, or a Hub repo → config and tensor infos, nothing loaded.

Everything that a published directory can get wrong is found here, before a byte is moved.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from tpshard.errors import CorruptError, TpshardError, UnsafeError, UnsupportedError, UsageError
from tpshard.storage.local import blob_digest, cached_repo, entries, load_json, read_bytes, safe_path, side_paths
from tpshard.storage.names import MANIFEST, PICKLE_INDEX, SAFETENSORS_INDEX, is_meta
from tpshard.storage.safetensors import Header, SourceFile, TensorInfo, header_length, parse_header, read_header

REQUESTS = 8
"""Headers of a Hub repo that are asked for at the same time."""
QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files in which quantisation tools say what they did, some of them nowhere else."""


@dataclass(frozen=True)
class Checkpoint:
    """An unsharded checkpoint. `directory` is None for a Hub repo of which only headers were read.

    tensors are in file order; `TensorInfo.file` is the path to read, `file_of` the name of the weight file.
    """

    name: str
    repo_id: str | None
    revision: str | None
    directory: Path | None
    config: Mapping[str, Any]
    config_path: str
    files: tuple[SourceFile, ...]
    tensors: tuple[TensorInfo, ...]
    file_of: Mapping[str, str]
    side_files: tuple[Path, ...]
    warnings: tuple[str, ...] = ()


def read_config(raw: bytes, path: object) -> dict[str, Any]:
    """config.json as a dict; a `quantization_config` is refused."""
    config = load_json(raw, path)
    if not isinstance(config, dict):
        raise CorruptError("config.json is not an object", path=path, found=type(config).__name__)
    for key in ("quantization_config", "compression_config"):
        if quantization := config.get(key):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise _quantised(path, f"{key} with quant_method {method}")
    return config


def _quantised(path: object, found: str) -> UnsupportedError:
    return UnsupportedError(
        "the checkpoint is quantised: packed values and scale blocks are not cut yet",
        path=path,
        expected="plain floating-point weights",
        found=found,
        hint="split the checkpoint that it was made from",
    )


def open_checkpoint(model: str | Path, revision: str | None = None, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a model for reading its bytes; a Hub repo is downloaded into the shared cache first."""
    path = Path(model)
    if path.exists():
        if revision is not None:
            raise UsageError("--revision is for a Hub repo", path=path, hint="leave it out for a local path")
        return _open_local(path, allow_pickle)
    from tpshard.storage import hub

    if isinstance(model, Path) or not hub.is_repo_id(model):
        raise UsageError(
            "no such file or directory",
            path=path,
            hint="give a directory, a .safetensors file, or a Hub repo as org/name",
        )
    snapshot = hub.download(model, revision, allow_pickle=allow_pickle)
    checkpoint = _open_local(snapshot.path, allow_pickle, snapshot.repo_id, snapshot.revision)
    return replace(checkpoint, warnings=(snapshot.note, *checkpoint.warnings)) if snapshot.note else checkpoint


def open_headers(model: str | Path, revision: str | None = None, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a model for planning only: of a Hub repo, just config and headers are read, over HTTP ranges.

    A Hub that cannot be reached, or has only pickles, leaves the cache and the download that `open_checkpoint` makes.
    """
    from tpshard.storage import hub
    from tpshard.storage.hub_errors import UnreachableError

    if Path(model).exists() or isinstance(model, Path) or not hub.is_repo_id(model):
        return open_checkpoint(model, revision, allow_pickle=allow_pickle)
    try:
        repo = hub.describe(model, revision)
    except UnreachableError:
        return open_checkpoint(model, revision, allow_pickle=allow_pickle)
    remote = {file.name: file for file in repo.files}
    if allow_pickle and not any(name.endswith(".safetensors") for name in remote):
        return open_checkpoint(model, revision, allow_pickle=True)
    if "config.json" not in remote:
        raise CorruptError("the repo has no config.json", path=model, hint="it tells the architecture")
    _refuse_quantised(set(remote), model)

    def header(name: str) -> tuple[Header, SourceFile]:
        file = remote[name]
        prefix = hub.read_range(repo, name, 0, min(file.size, 1 << 16))
        length = header_length(prefix, name, file.size)
        raw = prefix if length <= len(prefix) else prefix + hub.read_range(repo, name, len(prefix), length)
        parsed = parse_header(raw, name, file.size)
        return parsed, SourceFile(name, file.size, parsed.digest, file.sha256)

    config = read_config(hub.read_small(repo, "config.json"), f"{model}/config.json")
    read = partial(hub.read_small, repo)
    found = _weights(set(remote), read, model, header, None, threads=REQUESTS)
    return Checkpoint(
        name=model,
        repo_id=repo.repo_id,
        revision=repo.revision,
        directory=None,
        config=config,
        config_path=f"{model}/config.json",
        side_files=(),
        **found,
    )


def _open_local(path: Path, allow_pickle: bool, repo_id: str | None = None, revision: str | None = None) -> Checkpoint:
    directory = path if path.is_dir() else path.parent
    if (directory / MANIFEST).exists():
        raise UsageError(
            "this is a shard set, not an unsharded checkpoint",
            path=directory,
            hint="`tpshard merge` makes one of it; `tpshard reshard` splits it for another tp",
        )
    if repo_id is None:
        repo_id, revision = cached_repo(directory)
    names = {entry.name for entry in entries(directory)}
    if "config.json" not in names:
        _refuse_meta(directory)
        raise CorruptError("no config.json beside the weights", path=directory, hint="it tells the architecture")
    config = read_config(read_bytes(safe_path(directory, "config.json")), directory / "config.json")
    _refuse_quantised(names, directory)

    def header(name: str) -> tuple[Header, SourceFile]:
        file = safe_path(directory, name)
        parsed = read_header(file)
        return parsed, SourceFile(name, file.stat().st_size, parsed.digest, blob_digest(file))

    only = None if path.is_dir() else path.name
    if only is not None and not only.endswith((".safetensors", ".bin")):
        raise UsageError("not a weight file", path=path, hint="give a directory or a .safetensors file")
    pickled = None
    if allow_pickle:

        def pickled(name: str) -> tuple[Header, SourceFile]:
            from tpshard.storage.torch_pickle import read_pickle

            return read_pickle(safe_path(directory, name), name)

    found = _weights(names, lambda name: read_bytes(safe_path(directory, name)), directory, header, pickled, only)
    return Checkpoint(
        name=repo_id or Path(os.path.abspath(directory)).name,
        repo_id=repo_id,
        revision=revision,
        directory=directory,
        config=config,
        config_path=str(directory / "config.json"),
        side_files=side_paths(directory, names),
        **found,
    )


def _refuse_meta(directory: Path) -> None:
    if is_meta(directory):
        raise UsageError(
            "this is a checkpoint in Meta's own form, cut for its ranks",
            path=directory,
            expected="an unsharded Hugging Face checkpoint",
            found="params.json and consolidated.*.pth",
            hint=f"`tpshard merge {directory} --allow-pickle -o OUT` makes one of it; "
            f"`tpshard reshard {directory} --tp N --allow-pickle` splits it anew",
        )


def _refuse_quantised(names: set[str], place: object) -> None:
    if found := sorted(names.intersection(QUANTISED)):
        raise _quantised(f"{place}/{found[0]}", found[0])


ReadHeader = Callable[[str], tuple[Header, SourceFile]]


def _weights(
    names: set[str],
    read: Callable[[str], bytes],
    place: object,
    header: ReadHeader,
    pickled: ReadHeader | None,
    only: str | None = None,
    threads: int = 1,
) -> dict[str, Any]:
    """Find the weight files among `names` and read their headers: the fields of Checkpoint that follow."""
    listed, weight_map, total = _listing(names, read, place, only)
    if listed[0].endswith(".bin"):
        if pickled is None:
            raise UnsafeError(
                "the weights are pickles, which can run code when they are read",
                path=f"{place}/{listed[0]}",
                hint="--allow-pickle reads them with torch's weights_only loader, which runs none",
            )
        header = pickled
    tensors: list[TensorInfo] = []
    files: list[SourceFile] = []
    file_of: dict[str, str] = {}
    for name, (parsed, file) in zip(listed, _each(header, listed, threads), strict=True):
        files.append(file)
        for tensor in parsed.tensors:
            if tensor.name in file_of:
                raise CorruptError(
                    f"{tensor.name} is in two files",
                    path=place,
                    tensor=tensor.name,
                    expected="each tensor once",
                    found=f"in {file_of[tensor.name]} and in {name}",
                )
            file_of[tensor.name] = name
        tensors.extend(parsed.tensors)
    if weight_map is not None:
        _check_index(weight_map, file_of, place)
    size = sum(tensor.nbytes for tensor in tensors)
    wrong = total is not None and total != size
    warnings = (f"the index says total_size {total}, the tensors have {size} bytes",) if wrong else ()
    return {"tensors": tuple(tensors), "files": tuple(files), "file_of": file_of, "warnings": warnings}


def _listing(
    names: set[str], read: Callable[[str], bytes], place: object, only: str | None
) -> tuple[list[str], dict[str, str] | None, object]:
    """The weight files to read, and of an index its weight_map and total_size. The order is transformers'."""
    if only is not None:
        return [only], None, None
    for single, index in (("model.safetensors", SAFETENSORS_INDEX), ("pytorch_model.bin", PICKLE_INDEX)):
        if single in names:
            return [single], None, None
        if index in names:
            weight_map, total = _index(read(index), f"{place}/{index}")
            listed = sorted(set(weight_map.values()))
            if missing := [name for name in listed if name not in names]:
                raise CorruptError(
                    f"{missing[0]} is listed in the index but is not there",
                    path=place,
                    expected=f"{len(listed)} files",
                    found=f"{len(listed) - len(missing)} of them",
                    hint="download the checkpoint again",
                )
            return listed, weight_map, total
    raise _no_weights(names, place)


def _each(header: ReadHeader, names: list[str], threads: int) -> Iterable[tuple[Header, SourceFile]]:
    if threads == 1:
        return map(header, names)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(header, names))


def _no_weights(names: set[str], place: object) -> TpshardError:
    expected = f"model.safetensors, or {SAFETENSORS_INDEX} with its files"
    endings = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx")
    others = sorted(name for name in names if name.endswith(endings))
    if not others:
        return CorruptError("no weights found", path=place, expected=expected, found="no weight file")
    return UnsupportedError(
        "no weights in a form that is read here",
        path=place,
        expected=expected,
        found=", ".join(others[:4]),
        hint="name a .safetensors file to use just that",
    )


def _index(raw: bytes, path: str) -> tuple[dict[str, str], object]:
    data = load_json(raw, path)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptError("the index has no weight_map of names to files", path=path, expected="an object of strings")
    for name in sorted(set(weight_map.values())):
        pure = PurePosixPath(name.replace("\\", "/"))
        if pure.is_absolute() or ".." in pure.parts or re.match(r"[A-Za-z]:", name):
            raise UnsafeError(
                "the index points outside the model",
                path=path,
                found=repr(name),
                expected="file names inside the model's directory",
            )
        if len(pure.parts) != 1:
            raise CorruptError(
                "the index names a file in a subdirectory",
                path=path,
                expected="names of files beside it",
                found=repr(name),
            )
    metadata = data.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _check_index(weight_map: Mapping[str, str], file_of: Mapping[str, str], place: object) -> None:
    for name, file in weight_map.items():
        if file_of.get(name) != file:
            raise CorruptError(
                f"the index and the files disagree about {name}",
                path=place,
                tensor=name,
                expected=f"in {file}",
                found=f"in {file_of[name]}" if name in file_of else "nowhere",
            )
    for name, file in file_of.items():
        if name not in weight_map:
            raise CorruptError(
                f"{file} holds {name}, which the index does not list",
                path=place,
                tensor=name,
                expected=f"{name} in the weight_map",
                found="no such name",
            )


def source_digest(files: tuple[SourceFile, ...]) -> str:
    """One digest of all headers, in the order of file names: changes when any name, shape, dtype or place does."""
    text = json.dumps([[file.name, file.size, file.header_sha256] for file in sorted(files, key=lambda f: f.name)])
    return hashlib.sha256(text.encode()).hexdigest()
