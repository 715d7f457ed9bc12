"""Open an unsharded checkpoint: a directory, one file, or a Hub repo → config and tensor infos, nothing loaded.

Everything that a published directory can get wrong is found here, before a byte is moved.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tpshard.errors import CorruptError, TpshardError, UnsafeError, UsageError
from tpshard.storage.carried import LeftOut, Selection, select
from tpshard.storage.foreign import recognised
from tpshard.storage.local import Directory, cached_repo, load_json, read_bytes
from tpshard.storage.names import CONFIG, MANIFEST, META_PARAMS, QUANTISED, QUANTISED_KEYS, is_meta, side_files
from tpshard.storage.pool import Pool
from tpshard.storage.safetensors import Header, TensorInfo
from tpshard.storage.source import Source, SourceFile, source_header
from tpshard.storage.weights import USUAL, no_weights, preferred, weight_files, wrong_index


@dataclass(frozen=True)
class Checkpoint:
    """An unsharded checkpoint. `directory` is None for a Hub repo of which only headers were read.

    tensors are in file order; `TensorInfo.file` is the path to read, `file_of` the name of the weight file.
    side_files: what travels with the weights, by name. left_out: the files that do not, weights as well.
    quantisation: what config.json, a config nested in it, or a quantisation tool's own file says of that; None where
    nothing does.
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
    side_files: Mapping[str, Path]
    left_out: tuple[LeftOut, ...] = ()
    warnings: tuple[str, ...] = ()
    quantisation: Mapping[str, Any] | None = None


def read_config(raw: bytes, path: object) -> dict[str, Any]:
    """config.json as a dict."""
    config = load_json(raw, path)
    if not isinstance(config, dict):
        raise CorruptError("config.json is not an object", path=path, found=type(config).__name__)
    return config


def _config_file(names: Collection[str]) -> str | None:
    """The file that tells the architecture: config.json, or params.json beside weights in Mistral's own form."""
    if CONFIG in names:
        return CONFIG
    return META_PARAMS if META_PARAMS in names and any(map(_OF_MISTRAL.fullmatch, names)) else None


_OF_MISTRAL = re.compile(r"consolidated(-\d+-of-\d+)?\.safetensors")


def _of_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """params.json as a config: the values under their own names, and what others look for under theirs."""
    kind = params.get("model_type", "transformer")
    found = {**params, "model_type": "mistral_native" if kind == "transformer" else kind}
    found["tie_word_embeddings"] = bool(params.get("tied_embeddings"))
    if isinstance(said := params.get("quantization"), dict):
        found["quantization_config"] = {"quant_method": str(said.get("qformat_weight", "")).partition("_")[0], **said}
    return found


def config_in(directory: Path) -> Any:
    """What config.json of a directory says, or params.json in its place; CorruptError where neither is there."""
    path = directory / CONFIG
    if not path.exists() and (directory / META_PARAMS).exists():
        path = directory / META_PARAMS
        return _of_params(read_config(read_bytes(path), path))
    return load_json(read_bytes(path), path)


def read_quantisation(config: Mapping[str, Any], config_path: object, source: Source) -> dict[str, Any] | None:
    """What a checkpoint says of its quantisation, with the method under `quant_method`; None where it says nothing."""
    for each in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in QUANTISED_KEYS:
            if said := each.get(key):
                return _object(said, key, config_path)
    names = source.names()
    for name, method in QUANTISED.items():
        if name in names:
            path = source.path(name) or f"{source.place}/{name}"
            said = _object(load_json(source.read_small(name), path), name, path)
            said = said.get("quantization", said) if name == "hf_quant_config.json" else said
            said = _object(said, name, path)
            return {**said, "quant_method": said.get("quant_method") or method}
    return None


def _object(said: object, what: str, path: object) -> dict[str, Any]:
    if not isinstance(said, dict):
        raise CorruptError(f"{what} is not an object", path=path, found=type(said).__name__)
    return said


def open_checkpoint(
    model: str | Path, revision: str | None = None, *, allow_pickle: bool = False, follow_symlinks: bool = False
) -> Checkpoint:
    """Open a model for reading its bytes; a Hub repo is downloaded into the shared cache first.

    follow_symlinks: files of a directory may be symlinks to anywhere.
    """
    path = Path(model)
    if path.exists():
        if revision is not None:
            raise UsageError("--revision is for a Hub repo", path=path, hint="leave it out for a local path")
        return _open_local(path, allow_pickle, follow=follow_symlinks)
    from tpshard.storage import hub

    if isinstance(model, Path) or not hub.is_repo_id(model):
        hint = "give a directory, a .safetensors file, or a Hub repo as org/name"
        raise UsageError("no such file or directory", path=path, hint=hint)
    with hub.named(model):
        snapshot = hub.download(model, revision, allow_pickle=allow_pickle)
    checkpoint = _open_local(snapshot.path, allow_pickle, snapshot.repo_id, snapshot.revision)
    known = {each.file for each in checkpoint.left_out}
    left_out = (*checkpoint.left_out, *(each for each in snapshot.left_out if each.file not in known))
    checkpoint = replace(checkpoint, left_out=left_out)
    return replace(checkpoint, warnings=(snapshot.note, *checkpoint.warnings)) if snapshot.note else checkpoint


def open_headers(
    model: str | Path, revision: str | None = None, *, allow_pickle: bool = False, follow_symlinks: bool = False
) -> Checkpoint:
    """Open a model for planning only: of a Hub repo, just config and headers are read, over HTTP ranges.

    A Hub that cannot be reached, or has only pickles, leaves the cache and the download that `open_checkpoint` makes.
    """
    from tpshard.storage import hub
    from tpshard.storage.hub_errors import UnreachableError

    if Path(model).exists() or isinstance(model, Path) or not hub.is_repo_id(model):
        return open_checkpoint(model, revision, allow_pickle=allow_pickle, follow_symlinks=follow_symlinks)
    try:
        with hub.named(model):
            repo = hub.describe(model, revision)
    except UnreachableError:
        return open_checkpoint(model, revision, allow_pickle=allow_pickle)
    names = repo.names()
    if allow_pickle and not any(name.endswith(".safetensors") for name in names):
        return open_checkpoint(model, revision, allow_pickle=True)
    if _config_file(names) is None:
        raise _no_config(names, model)
    return _open(repo, model, repo.repo_id, repo.revision, allow_pickle=False, only=None)


def _open_local(
    path: Path, allow_pickle: bool, repo_id: str | None = None, revision: str | None = None, *, follow: bool = False
) -> Checkpoint:
    directory = path if path.is_dir() else path.parent
    if (directory / MANIFEST).exists():
        hint = "`tpshard merge` makes one of it; `tpshard reshard` splits it for another tp"
        raise UsageError("this is a shard set, not an unsharded checkpoint", path=directory, hint=hint)
    if repo_id is None:
        repo_id, revision = cached_repo(directory)
    source = Directory(directory, follow)
    if is_meta(directory) and not any(name.endswith((".safetensors", ".bin")) for name in source.names()):
        raise _of_meta(directory)
    if _config_file(source.names()) is None:
        raise _no_config(source.names() if path.is_dir() else [path.name], directory)
    name = repo_id or Path(os.path.abspath(directory)).name
    only = None if path.is_dir() else path
    return replace(_open(source, name, repo_id, revision, allow_pickle, only), directory=directory)


def _open(
    source: Source, name: str, repo_id: str | None, revision: str | None, allow_pickle: bool, only: Path | None
) -> Checkpoint:
    """Read config and headers of a source that has a file for the first. only: the one weight file to read."""
    names, place = source.names(), source.place
    told_by = _config_file(names)
    assert told_by is not None
    config_path = str(source.path(told_by) or f"{place}/{told_by}")
    config = read_config(source.read_small(told_by), config_path)
    if told_by == META_PARAMS:
        config = _of_params(config)
    quantisation = read_quantisation(config, config_path, source)
    if only is not None and not only.name.endswith((".safetensors", ".bin")):
        raise UsageError("not a weight file", path=only, hint="give a directory or a .safetensors file")
    if only is None:
        published = source.path(told_by) is None
        listed, weight_map, total = weight_files(names, source.read_small, place, published=published)
    else:
        listed, weight_map, total = [only.name], None, None
    header = partial(source_header, source)
    if listed[0].endswith(".bin"):
        if not allow_pickle:
            raise pickles_refused(f"{place}/{listed[0]}")
        header = partial(_pickle_header, source)
    carried, left_out = _beside(source, listed, names, only)
    headers = Pool(source.requests).map(header, listed)
    tensors, file_of = _tensors(zip(listed, (parsed for parsed, _ in headers), strict=True), place)
    warnings: tuple[str, ...] = ()
    if weight_map is None and len(listed) > 1:
        warnings = (f"there is no index: all of {listed[0]} to {listed[-1]} are read",)
    elif weight_map is not None:
        _check_index(weight_map, file_of, place, wrong_index(names))
        size = sum(tensor.nbytes for tensor in tensors)
        if total not in (None, size):
            warnings = (f"the index says total_size {total}, the tensors have {size} bytes",)
    return Checkpoint(
        name=name,
        repo_id=repo_id,
        revision=revision,
        directory=None,
        config=config,
        config_path=config_path,
        files=tuple(file for _, file in headers),
        tensors=tensors,
        file_of=file_of,
        side_files=carried,
        left_out=left_out,
        warnings=warnings,
        quantisation=quantisation,
    )


def _beside(
    source: Source, weights: Sequence[str], names: Collection[str], only: Path | None
) -> tuple[dict[str, Path], tuple[LeftOut, ...]]:
    """The files that travel with the weights, as far as they are on this machine, and those that do not.

    Beside a file that was named alone may lie anything: of that, what a checkpoint usually has travels.
    """
    if only is not None:
        chosen = Selection(tuple(side_files(names)), ())
    else:
        set_ = preferred(names, source.read_small, source.place) or weights[0]
        chosen = select(source.listing(), {*weights, set_}, set_)
    return {name: path for name in chosen.carried if (path := source.path(name)) is not None}, chosen.left_out


def pickles_refused(path: object) -> UnsafeError:
    """The error for pickled weights that were not allowed."""
    hint = "--allow-pickle reads them with torch's weights_only loader, which runs none"
    return UnsafeError("the weights are pickles, which can run code when they are read", path=path, hint=hint)


def _pickle_header(source: Source, name: str) -> tuple[Header, SourceFile]:
    from tpshard.storage.torch_pickle import read_pickle

    path = source.path(name)
    assert path is not None, "pickles are downloaded before they are read"
    return read_pickle(path, name)


def _tensors(headers: Iterable[tuple[str, Header]], place: str) -> tuple[tuple[TensorInfo, ...], dict[str, str]]:
    """The tensors of all files, in file order, and the file of each; CorruptError for one that is in two."""
    tensors: list[TensorInfo] = []
    file_of: dict[str, str] = {}
    for file, header in headers:
        for tensor in header.tensors:
            if (name := tensor.name) in file_of:
                what, found = f"{name} is in two files", f"in {file_of[name]} and in {file}"
                raise CorruptError(what, path=place, tensor=name, expected="each tensor once", found=found)
            file_of[name] = file
        tensors.extend(header.tensors)
    return tuple(tensors), file_of


def _of_meta(directory: Path) -> UsageError:
    """The error for Meta's own files where a Hugging Face checkpoint is wanted."""
    what, found = "this is a checkpoint in Meta's own form, cut for its ranks", "params.json and consolidated.*.pth"
    hint = f"`tpshard merge {directory} --allow-pickle -o OUT` makes one of it; "
    hint += f"`tpshard reshard {directory} --tp N --allow-pickle` splits it anew"
    return UsageError(what, path=directory, expected="an unsharded Hugging Face checkpoint", found=found, hint=hint)


def _no_config(names: Collection[str], place: object) -> TpshardError:
    others = any(name.endswith((".safetensors", ".bin")) for name in names) and not recognised(names, place, "")
    if others or not USUAL.isdisjoint(names):
        hint = "take it from where the weights come from: it tells the architecture"
        return CorruptError("no config.json beside the weights", path=place, hint=hint)
    return no_weights(names, place)


def _check_index(weight_map: Mapping[str, str], file_of: Mapping[str, str], place: object, hint: str) -> None:
    for name, file in weight_map.items():
        if (found := file_of.get(name)) != file:
            what, where = f"the index and the files disagree about {name}", f"in {found}" if found else "nowhere"
            raise CorruptError(what, path=place, tensor=name, expected=f"in {file}", found=where, hint=hint)
    for name, file in file_of.items():
        if name not in weight_map:
            what, expected = f"{file} holds {name}, which the index does not list", f"{name} in the weight_map"
            raise CorruptError(what, path=place, tensor=name, expected=expected, found="no such name")


def source_digest(files: tuple[SourceFile, ...]) -> str:
    """One digest of all headers, in the order of file names: changes when any name, shape, dtype or place does."""
    text = json.dumps([[file.name, file.size, file.header_sha256] for file in sorted(files, key=lambda f: f.name)])
    return hashlib.sha256(text.encode()).hexdigest()
