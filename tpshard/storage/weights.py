"""Which of a checkpoint's files hold its weights: one selection, whether they are to be read or to be downloaded."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import PurePosixPath

from tpshard.errors import CorruptError, TpshardError, UnsafeError, UnsupportedError, UsageError
from tpshard.storage.foreign import recognised
from tpshard.storage.local import load_json
from tpshard.storage.names import (
    MISTRAL,
    MISTRAL_INDEX,
    PICKLE,
    PICKLE_INDEX,
    PICKLE_PATTERN,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    fits,
)

ReadFile = Callable[[str], bytes]
"""The content of a small file by its name."""

_SAFETENSORS = (SAFETENSORS, SAFETENSORS_INDEX)
_PICKLE = (PICKLE, PICKLE_INDEX)
_MISTRAL = (MISTRAL, MISTRAL_INDEX)
USUAL = frozenset((*_SAFETENSORS, *_PICKLE, *_MISTRAL))
"""The names of a model's single weight file, or of its index."""
_OTHERS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx")


def preferred(names: Collection[str], read: ReadFile, place: object, *, pickle: bool = True) -> str | None:
    """The single weight file, or else the index of several; safetensors before pickles, as transformers prefers.

    Mistral's own files are the last: where there are others, these have the names that config.json is for.

    CorruptError where both are there and hold the model, as far as their names say: one of them is stale.
    """
    forms = (_SAFETENSORS, _PICKLE, _MISTRAL) if pickle else (_SAFETENSORS, _MISTRAL)
    for single, index in forms:
        if single in names and index in names:
            return index if _lists(index, single, names, read, place) else single
        if single in names or index in names:
            return single if single in names else index
    return None


def _lists(index: str, single: str, names: Collection[str], read: ReadFile, place: object) -> bool:
    """Whether an index lists the single file, rather than files that are not there."""
    listed = _listed_in_root(read(index), index)
    if single not in listed and (others := [file for file in listed if file in names]):
        raise CorruptError(
            f"{single} and the files of {index} are two sets of the same weights, and nothing says which is stale",
            path=place,
            expected=f"{single}, or {index} with its files",
            found=f"{single} and {', '.join(others[:2])}{', …' if len(others) > 2 else ''}",
            hint=f"move away the one that is not meant, or give {place}/{single} to take just that file",
        )
    return single in listed


def weight_files(
    names: Collection[str], read: ReadFile, place: object, *, published: bool = False
) -> tuple[list[str], Mapping[str, str] | None, object]:
    """The weight files among `names`, and of the index that lists them, if one does, weight_map and total_size.

    Without an index, all files of a numbered series are taken. published: `names` are all that the publisher has.
    CorruptError where not all files are there that the index lists or the series counts, or where the index is damaged;
    UnsupportedError where there is something else; UsageError where there is nothing; UnsafeError for an index that
    points outside.
    """
    name = preferred(names, read, place)
    if name is None:
        if series := _series(names):
            return _whole(series, place), None, None
        raise no_weights(names, place)
    if name in (SAFETENSORS, PICKLE, MISTRAL):
        return [name], None, None
    weight_map, total = _parse_index(read(name), f"{place}/{name}")
    files = sorted(set(weight_map.values()))
    if missing := [file for file in files if file not in names]:
        raise CorruptError(
            f"{missing[0]} is listed in the index but is not there",
            path=place,
            expected=f"{len(files)} files",
            found=f"{len(files) - len(missing)} of them",
            hint=wrong_index(names) if published or _is_whole(_series(names)) else "download the missing files again",
        )
    return files, weight_map, total


def wrong_index(names: Collection[str]) -> str:
    """The way out where an index is at odds with files that are as they were published."""
    hint = "the index was published so: downloading it again cannot help"
    if not _is_whole(_series(names)):
        return f"{hint}; tell its publisher"
    return f"{hint}; remove the index from a copy of your own, and all files are read without it"


def _series(names: Collection[str]) -> dict[int, tuple[str, int]]:
    """The files of the usual names with numbers, `model-00001-of-00003.safetensors`: the name and the count of each."""
    for stem, ending in (SAFETENSORS.split("."), PICKLE.split("."), MISTRAL.split(".")):
        pattern = re.compile(rf"{stem}-(\d{{1,9}})-of-(\d{{1,9}})\.{ending}")
        matches = [match for name in names if (match := pattern.fullmatch(name))]
        if matches:
            return {int(match[1]): (match[0], int(match[2])) for match in sorted(matches, key=lambda match: match[0])}
    return {}


def _is_whole(series: Mapping[int, tuple[str, int]]) -> bool:
    """Whether a series has all of its files, which count from 1, or from 0."""
    first = min(series, default=1)
    return first < 2 and {count for _, count in series.values()} == {len(series)} and max(series) < first + len(series)


def _whole(series: Mapping[int, tuple[str, int]], place: object) -> list[str]:
    """The files of a series; CorruptError where not all are there."""
    if not _is_whole(series):
        counts = sorted({count for _, count in series.values()})
        what, expected = "weight files are missing, and so is their index", " or ".join(f"{n} files" for n in counts)
        hint = "download the missing files and the index again"
        listed = ", ".join(name for name, _ in list(series.values())[:4])
        raise CorruptError(what, path=place, expected=expected, found=f"{len(series)}: {listed}", hint=hint)
    return sorted(name for name, _ in series.values())


def files_to_download(names: Collection[str], allow_pickle: bool, read: ReadFile, place: object) -> tuple[str, ...]:
    """One complete set of weight files and its index, or none: a repository may hold the same weights in several forms.

    Files of other names are taken where no form has its usual names: one of them may be what is asked for.
    What an index lists wrongly is left to whoever reads the checkpoint.
    """
    for pickle in (False, True) if allow_pickle else (False,):
        pattern = PICKLE_PATTERN if pickle else "*.safetensors"
        name = preferred(names, read, place, pickle=pickle)
        if name in (SAFETENSORS, PICKLE, MISTRAL):
            return (name,)
        if name is not None:
            return (name, *_listed_in_root(read(name), name))
        if loose := sorted(name for name in names if fits(name, [pattern])):
            return (*loose, *sorted(name for name in names if fits(name, [f"{pattern}.index.json"])))
    return ()


def _parse_index(raw: bytes, path: str) -> tuple[dict[str, str], object]:
    """weight_map and total_size of an index whose files all lie beside it; the size is not checked."""
    data = load_json(raw, path)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptError("the index has no weight_map of names to files", path=path, expected="an object of strings")
    base_names = {}
    for name in sorted(set(weight_map.values())):
        base_names[name] = PurePosixPath(name).name  # it may begin with ./
        pure = PurePosixPath(name.replace("\\", "/"))
        if pure.is_absolute() or ".." in pure.parts or re.match(r"[A-Za-z]:", name):
            what = "the index points outside the model"
            raise UnsafeError(what, path=path, found=repr(name), expected="file names inside the model's directory")
        if len(pure.parts) != 1 or name.endswith(("/", "\\")):
            message = "the index names a file in a subdirectory"
            raise CorruptError(message, path=path, expected="names of files beside it", found=repr(name))
    metadata = data.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total, str) and re.fullmatch(r"\d{1,20}", total):
        total = int(total)
    return {name: base_names[file] for name, file in weight_map.items()}, total


def _listed_in_root(raw: bytes, name: str) -> list[str]:
    """The files that an index lists, without those outside the root: reading the checkpoint refuses such an index."""
    try:
        files = set(json.loads(raw)["weight_map"].values())
        files = {file.removeprefix("./") for file in files}
        return sorted(file for file in files if "/" not in file and "\\" not in file)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{name} is not an index of weight files", expected='an object "weight_map"') from error


def no_weights(names: Collection[str], place: object) -> TpshardError:
    """The error for a place that has no weights which are read here: says what it has."""
    expected = f"{SAFETENSORS}, or {SAFETENSORS_INDEX} with its files"
    if error := recognised(names, place, "an ordinary Hugging Face checkpoint"):
        return error
    others = sorted(name for name in names if name.endswith(_OTHERS))
    if not others:
        hint = "give the directory of a model, with its config.json and weights, or a Hub repo as org/name"
        return UsageError("no weights found", path=place, expected=expected, found="no weight file", hint=hint)
    what, hint = "no weights in a form that is read here", "name a .safetensors file to use just that"
    if not any(name.endswith(".safetensors") for name in others):
        hint = "give a checkpoint that transformers' `save_pretrained` wrote"
    return UnsupportedError(what, path=place, expected=expected, found=", ".join(others[:4]), hint=hint)
